"""Algorithms for tests alone: phases with other sources of samples, planned samples with weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from clbench import registry
from clbench.algorithms.hooks import CLAlgorithm, Context, GradientView, Phase, Plan, training_phase
from clbench.algorithms.memory import Memory
from clbench.algorithms.sources import FromMemory, Source
from clbench.data.frames import Batch, SampleOrder, concat


class _WithMemory(CLAlgorithm):
    @dataclass
    class Config:
        per_task: int = 10
        selection: str = "per_task"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.memory = Memory(config.per_task, selection=config.selection)

    def bind(self, ctx: Context) -> None:
        super().bind(ctx)
        self.memory.bind(ctx)

    def on_task_end(self, ctx: Context) -> None:
        self.memory.store(ctx)

    def exemplar_bytes(self) -> int:
        return self.memory.exemplar_bytes()

    def state_dict(self) -> dict[str, Any]:
        return self.memory.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.memory.load_state_dict(state)


class Rehearsal(_WithMemory):
    """After a task a second phase on the memory alone."""

    name = "rehearsal"
    claims = frozenset({"phases"})

    def phases(self, ctx: Context) -> Sequence[Phase]:
        train = training_phase(ctx)
        if not self.memory.available(ctx):
            return [train]
        return [train, replace(train, name="rehearse", source=FromMemory(self.memory))]


class Present(Source):
    """The visit's samples with actions that depend on the present weights; counts what it gave."""

    ahead = False

    def __init__(self) -> None:
        self.given = 0

    def begin(self, ctx: Context, phase: Phase) -> None:
        self._order = SampleOrder(ctx.frames.length(ctx.k), "present", ctx.seed, ctx.k)

    def batch(self, ctx: Context, phase: Phase, step: int, rows: slice) -> Batch:
        index = self._order.take(self.given, phase.batch_size)
        self.given += phase.batch_size
        batch = ctx.frames.fetch(torch.stack([torch.full_like(index, ctx.k), index], 1)[rows])
        shift = dict(ctx.policy.named_parameters())["model.velocity_net.cond_proj.bias"].detach()[:4]
        return {**batch, "action": batch["action"] + shift}

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.given = int(state["given"])


class OnPolicy(CLAlgorithm):
    """Two phases; the second one's samples are computed from the weights that its steps find."""

    name = "onpolicy"
    claims = frozenset({"phases"})

    def phases(self, ctx: Context) -> Sequence[Phase]:
        train = training_phase(ctx)
        return [train, replace(train, name="present", source=Present())]


class Weighted(_WithMemory):
    """Planned samples with a weight each, and a reference gradient of the same samples."""

    name = "weighted"
    claims = frozenset({"batch_mix", "gradient_edits"})
    seen: ClassVar[list[tuple[int, ...]]] = []  # planned samples, current samples and slots that after_backward found

    def plan_batch(self, ctx: Context, step: int) -> Plan | None:
        if not self.memory.available(ctx):
            return None
        refs = self.memory.sample(ctx, 4, ctx.generator("weighted", step))
        return Plan(refs, added=4, weight=torch.tensor([0.5, 1.0, 1.5, 2.0]))

    def modify_batch(self, batch: Batch, task_id: int) -> Batch:
        return batch if self.ctx.planned is None else concat([batch, self.ctx.planned])

    def after_backward(self, model: nn.Module, grads: GradientView) -> None:
        ctx = self.ctx
        if ctx.planned is None:
            return
        type(self).seen.append((len(ctx.planned["slot"]), len(ctx.step_batch["task"]), *ctx.planned["slot"].tolist()))
        parameters = {n: p for n, p in model.named_parameters() if n.endswith("cond_proj.bias")}
        found = ctx.mean_gradient(ctx.generator("reference", ctx.step), parameters, batch=ctx.planned)
        for name, g in found.items():
            own = grads.get(name)
            assert own is not None
            grads.set(name, own + 0.5 * g)


LEARNERS: list[type[CLAlgorithm]] = [Rehearsal, OnPolicy, Weighted]


@contextmanager
def registered() -> Iterator[None]:
    """Known by name in this process."""
    for cls in LEARNERS:
        registry.register("algorithms", cls.name, cls)
    try:
        yield
    finally:
        for cls in LEARNERS:
            registry.register("algorithms", cls.name, None)
