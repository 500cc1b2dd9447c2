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
from clbench.policies.draws import ACTION, IMAGES, adapter_of
from clbench.seeding import generator, seeded


class Actor(Protocol):
    """Chooses actions for many episodes at once.

    Attributes:
        stateful: it remembers earlier calls, so all slots must start their episodes together.
        history: how many steps it observes; with more than 1 each observation has a leading axis of these, oldest
            first, and the first of an episode stands for what was not there yet.
    """

    stateful: bool
    history: int

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

    stateful, history = False, 1

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


def queued(policy: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Replace what a policy's queues hold by these observations; returns what it is then given.

    Some of LeRobot's policies predict a chunk from their queues of the last observations. A value has shape
    (n, steps, …), or (n, …) with one step. Other policies have no such queues, and get their input as it is.
    """
    queues = getattr(policy, "_queues", None) or {}
    steps = policy.config.n_obs_steps
    if IMAGES in queues and policy.config.image_features:
        stacked = torch.stack([inputs[key] for key in policy.config.image_features], dim=-4)
        inputs = {**inputs, IMAGES: stacked}
    for key, queue in queues.items():
        queue.clear()
        if key in inputs:
            queue.extend([inputs[key]] if steps == 1 else inputs[key].unbind(1))
    return inputs


def remembers(policy: Any) -> bool:
    """Whether a policy's actions depend on its earlier calls in a way that observations do not restore."""
    config = policy.config
    if getattr(config, "temporal_ensemble_coeff", None) is not None:  # ACT's mean over the chunks of earlier steps
        return True
    seen = getattr(policy, "_queues", None) or {}
    return config.n_obs_steps != 1 and not hasattr(policy, "sample_draw") and not any(k != ACTION for k in seen)


class PolicyActor:
    """A LeRobot policy. It gives an action chunk for the last `n_obs_steps` observations.

    Policies that remember more than these (`remembers`) act through `select_action`, step by step.
    """

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
        self.policy.reset()
        self.stateful = remembers(self.policy)
        self.history = 1 if self.stateful else int(config.n_obs_steps)
        takes_noise = "noise" in inspect.signature(self.policy.predict_action_chunk).parameters
        adapter = adapter_of(self.policy)
        draw = getattr(self.policy, "sample_draw", None if adapter is None else adapter.sample)
        self._draw = draw if takes_noise else None
        named = [n for n in ("n_action_steps", "action_chunk_size") if hasattr(config, n)]  # the second is VQ-BeT's
        self.steps = 1 if self.stateful or not named else int(getattr(config, named[0]))

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
            key: torch.from_numpy(np.stack([self._seen(key, observations[i][key]) for i in rows]))
            for key in observations[0]
        }
        for key, value in batch.items():
            if value.dtype == torch.uint8:  # images: (…, height, width, C) in 0…255 → (…, C, height, width) in [0, 1]
                batch[key] = value.movedim(-1, -3).float() / 255
        batch["task"] = [instructions[i] for i in rows]
        with torch.inference_mode():
            chunk = self.chunk(self.pre(batch), [seeds[i] for i in rows], [calls[i] for i in rows])
            found = {k: v[:n].cpu().numpy() for k, v in self.diagnostics(self.policy).items()}
        actions = self.post(chunk)[:n, : self.steps]
        return actions.float().cpu().numpy(), found

    def _seen(self, key: str, value: np.ndarray) -> np.ndarray:
        return np.broadcast_to(self.shown[key], value.shape) if key in self.shown else value

    def chunk(self, inputs: dict[str, Any], seeds: Sequence[int], calls: Sequence[int]) -> Tensor:
        """The next actions (n, H, A) of running episodes, for processed observations: `predicted`, or one action of a
        policy that remembers."""
        if not self.stateful:
            return self.predicted(inputs, seeds, calls)
        with seeded("action-noise", *seeds, *calls):
            return self.policy.select_action(inputs)[:, None]

    def predicted(self, inputs: dict[str, Any], seeds: Sequence[int], calls: Sequence[int]) -> Tensor:
        """Chunks (n, H, A) for processed observations alone; the noise of row i is a function of (seeds[i], calls[i]).

        What a policy draws besides, or if it takes no noise, comes from the global generator, seeded by those of all
        rows.
        """
        with seeded("action-noise", *seeds, *calls):
            inputs = queued(self.policy, {k: v for k, v in inputs.items() if k != ACTION})  # processors add one: None
            if self._draw is None:
                return self.policy.predict_action_chunk(inputs)
            noise = [self._draw(1, generator("action-noise", s, c))["noise"] for s, c in zip(seeds, calls, strict=True)]
            device = next((p.device for p in self.policy.parameters()), None)
            return self.policy.predict_action_chunk(inputs, noise=torch.cat(noise).to(device))
