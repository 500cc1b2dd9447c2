"""A-GEM: averaged gradient episodic memory (Chaudhry et al. 2019, arXiv 1812.00420).

At every step a batch is drawn from the memory of past tasks, and its mean gradient is the reference g_ref. A step that
would raise the loss on that batch, to first order, is projected onto those that do not:

    g ← g − (g·g_ref / ‖g_ref‖²) g_ref    if g·g_ref < 0,

with one product over all trainable parameters, from the second task on. g is the step's mean gradient over all ranks
and micro-batches, before clipping. With an optimizer that rescales it (AdamW) the guarantee is about g, not about the
step that is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from clbench.algorithms.hooks import CLAlgorithm, Context, GradientView
from clbench.algorithms.memory import Memory
from clbench.errors import UserError


def conflict(gradient: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """g·g_ref / ‖g_ref‖², over all tensors, where g·g_ref < 0; else 0."""
    product = sum(float((gradient[n].double() * reference[n].double()).sum()) for n in gradient)
    norm = sum(float(reference[n].double().square().sum()) for n in gradient)
    return product / norm if product < 0 else 0.0


class AGEM(CLAlgorithm):
    """Project gradients so that the loss on a memory does not rise."""

    name = "agem"
    claims = frozenset({"gradient_edits"})

    @dataclass
    class Config:
        """Keys of `algorithm`.

        Attributes:
            buffer_size_per_task: frames kept of every visit, a uniform sample of its data.
            reference_batch_size: samples of the memory that g_ref is the mean over; null = train.batch_size.
        """

        buffer_size_per_task: int = 500
        reference_batch_size: int | None = None

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.memory = Memory(config.buffer_size_per_task)

    def check(self, config: Any) -> None:
        for key in ("buffer_size_per_task", "reference_batch_size"):
            value = getattr(self.config, key)
            if value is not None and value < 1:
                raise UserError(f"algorithm.{key} must be at least 1 but is {value}.")

    def bind(self, ctx: Context) -> None:
        super().bind(ctx)
        self.memory.bind(ctx)

    def after_backward(self, model: nn.Module, grads: GradientView) -> None:
        ctx = self.ctx
        if not self.memory.available(ctx):
            return
        size = self.config.reference_batch_size or ctx.train.batch_size
        refs = self.memory.sample(ctx, size, ctx.generator("agem-reference", ctx.step))
        gradient = {n: g for n in grads.names() if (g := grads.get(n)) is not None}
        parameters = {n: p for n, p in model.named_parameters() if n in gradient}
        reference = ctx.mean_gradient(ctx.generator("agem-draw", ctx.step), parameters, refs=refs)
        scale = conflict(gradient, reference)
        if scale:
            for name, g in gradient.items():
                grads.set(name, g - scale * reference[name])

    def on_task_end(self, ctx: Context) -> None:
        self.memory.store(ctx, "agem-memory")

    def exemplar_bytes(self) -> int:
        return self.memory.exemplar_bytes()

    def state_bytes(self) -> int:
        return self.memory.state_bytes()

    def state_dict(self) -> dict[str, Any]:
        return self.memory.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.memory.load_state_dict(state)
