"""What chooses actions: a policy with its processors, or uniform noise.

An actor is asked for a few actions per slot at a time. All calls have the same fixed batch size (`slots`, padded), and
action noise comes from the episode's own generator, so an episode's actions do not depend on its companions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from clbench.envs.base import Observation
from clbench.seeding import generator, seeded


class Actor(Protocol):
    """`stateful`: remembers observations between calls, so all slots must start their episodes together."""

    stateful: bool

    def reset(self) -> None: ...

    def act(
        self,
        observations: Sequence[Observation],
        instructions: Sequence[str],
        seeds: Sequence[int],
        calls: Sequence[int],
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return actions (n, steps, A) and named integers per row (n,), for n ≤ slots episodes.

        `seeds` are the episodes' seeds, `calls` how often actions were requested for each before.
        """
        ...


class RandomActor:
    """Uniform actions in [-1, 1]."""

    stateful = False

    def __init__(self, action_dim: int) -> None:
        self.action_dim = action_dim

    def reset(self) -> None:
        """Nothing to forget."""

    def act(
        self,
        observations: Sequence[Observation],
        instructions: Sequence[str],
        seeds: Sequence[int],
        calls: Sequence[int],
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        actions = [
            torch.rand(1, self.action_dim, generator=generator("random-actor", s, c)) * 2 - 1
            for s, c in zip(seeds, calls, strict=True)
        ]
        return torch.stack(actions).numpy(), {}


def _no_diagnostics(policy: Any) -> dict[str, Tensor]:
    return {}


class PolicyActor:
    """A LeRobot policy. Policies with one observation step give action chunks; others act through `select_action`."""

    def __init__(
        self,
        loaded: Any,
        slots: int,
        diagnostics: Callable[[Any], dict[str, Tensor]] = _no_diagnostics,
        shown: dict[str, np.ndarray] | None = None,
    ) -> None:
        """`shown`: images (height, width, 3) that the policy is given in the place of what cameras see."""
        self.policy, self.pre, self.post = loaded.policy, loaded.preprocessor, loaded.postprocessor
        self.slots, self.diagnostics, self.shown = slots, diagnostics, shown or {}
        self.policy.eval()
        config = self.policy.config
        self.stateful = config.n_obs_steps != 1
        self.takes_noise = (
            hasattr(self.policy, "sample_draw")
            and "noise" in inspect.signature(self.policy.predict_action_chunk).parameters
        )
        self.steps = 1 if self.stateful else int(getattr(config, "n_action_steps", 1))

    def reset(self) -> None:
        self.policy.reset()

    def act(
        self,
        observations: Sequence[Observation],
        instructions: Sequence[str],
        seeds: Sequence[int],
        calls: Sequence[int],
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        n = len(observations)
        rows = [*range(n), *([0] * (self.slots - n))]
        batch: dict[str, Any] = {
            key: torch.from_numpy(np.stack([self.shown.get(key, observations[i][key]) for i in rows]))
            for key in observations[0]
        }
        for key, value in batch.items():
            if value.dtype == torch.uint8:  # images: (B, height, width, C) in 0…255 → (B, C, height, width) in [0, 1]
                batch[key] = value.permute(0, 3, 1, 2).float() / 255
        batch["task"] = [instructions[i] for i in rows]
        with torch.inference_mode():
            chunk = self._chunk(self.pre(batch), [seeds[i] for i in rows], [calls[i] for i in rows])
            found = {k: v[:n].cpu().numpy() for k, v in self.diagnostics(self.policy).items()}
        actions = self.post(chunk)[:n, : self.steps]
        return actions.float().cpu().numpy(), found

    def _chunk(self, batch: dict[str, Any], seeds: list[int], calls: list[int]) -> Tensor:
        if self.takes_noise:
            noise = [
                self.policy.sample_draw(1, generator("action-noise", s, c))["noise"]
                for s, c in zip(seeds, calls, strict=True)
            ]
            return self.policy.predict_action_chunk(batch, noise=torch.cat(noise))
        with seeded("action-noise", *seeds, *calls):  # such a policy draws from the global generator
            if self.stateful:
                return self.policy.select_action(batch)[:, None]
            return self.policy.predict_action_chunk(batch)
