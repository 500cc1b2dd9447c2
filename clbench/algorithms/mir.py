"""MIR: maximally interfered retrieval (Aljundi et al., NeurIPS 2019, arXiv 1908.04742).

Memory and mixing are those of ER, but what is replayed is chosen: of |C| candidates drawn from the memory, the k whose
loss a step on the incoming batch would raise most:

    θ_v = θ − η · ∇_θ mean ℓ(θ; current samples),      Δ(c) = ℓ(θ_v; c) − ℓ(θ; c),      replay the k largest Δ.

Both losses of a candidate use the same noise and timesteps. The choice is renewed every `mir_refresh_interval`
steps, the first time before a task's first step; `mir_refresh_interval: 1` is the paper's method, larger values
amortise its cost over steps. Each step replays m samples (as ER) out of the k chosen: a random part of them if m < k,
each of them about m / k times if m > k.

The gradient is that of the current samples alone, as in the paper, without dropout. θ is restored from a copy, bit for
bit, even when something fails in between.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clbench.algorithms.er import ER
from clbench.algorithms.hooks import Context, Plan, iterate_named
from clbench.data.frames import Batch, batch_size, select
from clbench.data.replay import draw_without_replacement
from clbench.errors import UserError
from clbench.policies.view import without_dropout
from clbench.terminal import tell

DEFAULT_VIRTUAL_LR = 1e-4


@contextmanager
def virtual_step(parameters: Mapping[str, nn.Parameter], gradient: Mapping[str, Tensor], lr: float) -> Iterator[None]:
    """θ − lr · g inside the block; θ again, bit for bit, after it, however it ends."""
    kept = {n: p.detach().clone() for n, p in parameters.items()}
    try:
        with torch.no_grad():
            for n, p in parameters.items():
                p.sub_(gradient[n].to(p.dtype), alpha=lr)
        yield
    finally:
        with torch.no_grad():
            for n, p in parameters.items():
                p.copy_(kept[n])


class MIR(ER):
    """Replay the stored samples that the coming update would hurt most."""

    name = "mir"
    assumes_plain_steps = True

    @dataclass
    class Config(ER.Config):
        """Keys of `algorithm`: those of er, and these.

        Attributes:
            mir_refresh_interval: steps between choices; 1 = the paper's method.
            mir_candidate_size: |C|, candidates drawn from the memory at each choice.
            mir_top_k: k, how many of them are replayed until the next choice.
            mir_virtual_lr: η of the virtual step; null = 1e-4.
            mir_lora_only: true = the virtual step moves the trainable parameters (LoRA's, with lora.enabled); false =
                all parameters, frozen ones too.
        """

        mir_refresh_interval: int = 200
        mir_candidate_size: int = 16
        mir_top_k: int = 8
        mir_virtual_lr: float | None = None
        mir_lora_only: bool = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.chosen = torch.empty(0, 2, dtype=torch.int64)  # (k, 2) references
        self._samples: Batch | None = None  # their contents, fetched when first needed

    def check(self, config: Any) -> None:
        super().check(config)
        c = self.config
        for key in ("mir_refresh_interval", "mir_candidate_size", "mir_top_k"):
            if getattr(c, key) < 1:
                raise UserError(f"algorithm.{key} must be at least 1 but is {getattr(c, key)}.")
        if c.mir_top_k > c.mir_candidate_size:
            raise UserError(
                f"algorithm.mir_top_k ({c.mir_top_k}) must not exceed algorithm.mir_candidate_size "
                f"({c.mir_candidate_size}): the samples to replay are chosen from the candidates."
            )
        if c.mir_virtual_lr is not None and not 0 < c.mir_virtual_lr < math.inf:
            raise UserError(f"algorithm.mir_virtual_lr must be positive (or null) but is {c.mir_virtual_lr}.")

    def bind(self, ctx: Context) -> None:
        super().bind(ctx)
        m = self._count(ctx.train.batch_size)
        if m > self.config.mir_top_k and ctx.rank == 0:
            tell(
                f"warning: mir replays {m} samples a step but chooses only mir_top_k={self.config.mir_top_k}: each is "
                f"repeated. For this batch size mir_top_k={m} and mir_candidate_size={2 * m} fit better.",
            )

    def on_task_start(self, ctx: Context) -> None:
        super().on_task_start(ctx)
        self.chosen, self._samples = torch.empty(0, 2, dtype=torch.int64), None

    # ---- choosing -------------------------------------------------------------------------------
    def plan_batch(self, ctx: Context, step: int) -> Plan | None:
        """The candidates, at steps that choose; every micro-batch gets all of them."""
        available = self.memory.available(ctx)
        if not available:
            return None
        added = self._count(ctx.train.batch_size) if self.config.mode == "append" else 0
        if step % self.config.mir_refresh_interval:
            return Plan(torch.empty(0, 2, dtype=torch.int64), added=added)
        n, gen = min(self.config.mir_candidate_size, available), self._generator("mir-candidates", step)
        refs = self.memory.sample(ctx, n, gen, balanced=self.config.balanced_sampling)
        return Plan(refs, added=added, shared=True)

    def modify_batch(self, batch: Batch, task_id: int) -> Batch:
        ctx = self.ctx
        if not self.memory.available(ctx):
            return batch
        if ctx.planned is not None and int(ctx.positions[0]) == ctx.share(ctx.global_batch).start:
            self._choose(ctx, {n: v for n, v in ctx.planned.items() if n != "slot"})
        if self._samples is None:  # resumed between two choices
            self._samples = ctx.frames.fetch(self.chosen)
        B, m = ctx.global_batch, self._count(ctx.train.batch_size)
        replayed = draw_without_replacement(len(self.chosen), m, self._generator("mir-replay", ctx.step))
        low, high = int(ctx.positions[0]), int(ctx.positions[-1]) + 1
        share = torch.arange(m * low // B, m * high // B)
        mine = {**select(self._samples, replayed[share]), "slot": B + share}
        return self._mix(batch, mine, m)

    def _choose(self, ctx: Context, candidates: Batch) -> None:
        delta = self._interference(ctx, candidates)
        k = min(self.config.mir_top_k, len(delta))
        best = delta.sort(descending=True, stable=True).indices[:k].cpu()
        planned = self.plan_batch(ctx, ctx.step)
        assert planned is not None  # this step chooses
        self.chosen, self._samples = planned.refs[best], select(candidates, best)
        if ctx.step % ctx.train.log_every < self.config.mir_refresh_interval:  # at most one in log_every steps
            ctx.log(
                "mir_choice",
                step=ctx.step,
                visits=torch.bincount(self.chosen[:, 0]).tolist(),
                delta_chosen=float(delta[best.to(delta.device)].mean()),
                delta_mean=float(delta.mean()),
            )

    def _interference(self, ctx: Context, candidates: Batch) -> Tensor:
        """Δ (n,) of the candidates: by how much a step on the current samples would raise their losses."""
        config, policy = self.config, ctx.policy
        trained = dict(iterate_named(policy))
        parameters = trained
        if not config.mir_lora_only:
            parameters = {n: p for n, p in policy.named_parameters() if p.is_floating_point()}
        lr = DEFAULT_VIRTUAL_LR if config.mir_virtual_lr is None else config.mir_virtual_lr
        try:
            for p in parameters.values():
                p.requires_grad_(True)
            with without_dropout(policy):
                gradient = ctx.mean_gradient(ctx.generator("mir-gradient", ctx.step), parameters)
                draw = ctx.draw(batch_size(candidates), ctx.generator("mir-losses", ctx.step))
                with torch.no_grad():
                    before = ctx.loss(candidates, draw)
                    with virtual_step(parameters, gradient, lr):
                        after = ctx.loss(candidates, draw)
        finally:
            for n, p in parameters.items():
                p.requires_grad_(n in trained)
        return (after - before).float()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "chosen": self.chosen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "chosen" not in state:
            raise UserError(f"the checkpoint's state of mir should hold 'chosen' but holds {sorted(state)}.")
        super().load_state_dict({n: v for n, v in state.items() if n != "chosen"})
        self.chosen, self._samples = state["chosen"], None
