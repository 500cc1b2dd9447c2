"""Retain part of what was known: after each task, the weights are averaged with those from before it.

θ ← (1 − α) θ_before + α θ_after, the simplest form of weight averaging over tasks.
"""

from dataclasses import dataclass

import torch

from clbench.algorithms.hooks import CLAlgorithm, Context
from clbench.errors import UserError


class Average(CLAlgorithm):
    """Average the weights from before and after each task."""

    name = "example_average"
    claims = frozenset({"structure"})  # it changes weights after a task, so no method that owns them fits
    state = ("before",)

    @dataclass
    class Config:
        """Keys of `algorithm`. `share`: α, how much of the new task's change is kept, in (0, 1]."""

        share: float = 0.5

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.before: dict[str, torch.Tensor] = {}

    def check(self, config: object) -> None:
        if not 0 < self.config.share <= 1:
            raise UserError(f"algorithm.share must be in (0, 1] but is {self.config.share}.")

    def on_task_start(self, ctx: Context) -> None:
        self.before = {n: p.detach().clone() for n, p in ctx.policy.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def on_task_end(self, ctx: Context) -> None:
        for name, p in ctx.policy.named_parameters():
            if ctx.k > 0 and name in self.before:  # the first task has nothing to keep
                p.copy_(torch.lerp(self.before[name], p, self.config.share))
        self.before = {}
