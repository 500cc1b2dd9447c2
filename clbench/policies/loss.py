"""One way to a policy's loss, whatever the policy: ours take noise and timesteps from outside, LeRobot's mostly do not.

A *draw* is everything random in a loss. A policy with `sample_draw` and `forward(batch, reduction="none", draw=…)`
gives exact per-sample losses under a given draw. For any other policy a draw is one integer per sample: its forward
runs under the global generator seeded from them, and per-sample losses come from a loop over single samples.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from clbench.data.frames import Batch, batch_size, select
from clbench.seeding import seeded


class PolicyLoss:
    """Losses of raw batches: processes them, runs the policy (`module` may be its distributed wrapper)."""

    def __init__(
        self,
        policy: nn.Module,
        module: nn.Module,
        processor: Callable[[Batch], Batch],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.policy, self.module = policy, module
        self.processor, self.autocast = processor, autocast
        self.takes_draw = hasattr(policy, "sample_draw")

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw for n samples from `generator`."""
        if self.takes_draw:
            return self.policy.sample_draw(n, generator)  # type: ignore[operator]
        return {"seed": torch.randint(2**31, (n,), generator=generator)}

    def per_sample(self, batch: Batch, draw: dict[str, Tensor]) -> Tensor:
        """ℓ(θ; x) of every sample, (n,)."""
        if self.takes_draw:
            with self.autocast():
                return self.module(self.processor(batch), reduction="none", draw=draw)[0]
        rows = [torch.tensor([i]) for i in range(batch_size(batch))]
        return torch.stack([self.total(select(batch, i), {"seed": draw["seed"][i]}) for i in rows])

    def total(self, batch: Batch, draw: dict[str, Tensor]) -> Tensor:
        """Σ ℓ over the batch, in one forward for every policy."""
        if self.takes_draw:
            return self.per_sample(batch, draw).sum()
        with seeded(*draw["seed"].tolist()), self.autocast():
            return self.module(self.processor(batch))[0] * batch_size(batch)
