"""Replay a finished run in a plain loop, for tests of a method's mathematics: no trainer, no hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from clbench.checkpoints.policy_io import LoadedPolicy, load_policy
from clbench.checkpoints.run_folder import checkpoint_folder, read_manifest
from clbench.config.compose import read_config
from clbench.config.schema import Config
from clbench.data.frames import Batch, StreamFrames
from clbench.policies.augment import Augmentation, set_training
from clbench.policies.view import PolicyView
from clbench.seeding import generator
from clbench.streams.stream import build_stream

# An optimizer whose steps are θ ← θ − 0.01 · gradient.
PLAIN_SGD = (
    "train.optimizer.name=sgd", "train.optimizer.lr=0.01", "train.optimizer.weight_decay=0",
    "train.optimizer.schedule=constant", "train.optimizer.warmup_steps=0", "train.optimizer.grad_clip=0",
)  # fmt: skip


class PlainRun:
    """A finished run in one process: the policy before and after each visit, and the samples and noise of each step.

    Args:
        folder: what `train` returned. The policy must take its noise from outside (ours do), and have no adapters.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: Config = read_config(folder / "config.yaml")
        self._loaded: LoadedPolicy = load_policy(read_manifest(folder)["base"]["path"])
        visits = build_stream(self.config.dataset, sequential=False).visits
        self.frames = StreamFrames([v.tasks for v in visits], self._loaded.policy.config)

    def policy_before(self, k: int) -> nn.Module:
        """The policy that visit k started from, ready for training: a new one with every call."""
        base = read_manifest(self.folder)["base"]["path"]
        folder = base if k == 0 else checkpoint_folder(self.folder, k - 1) / "policy"
        policy: nn.Module = load_policy(folder).policy.train()
        return policy

    def weights_after(self, k: int) -> dict[str, Tensor]:
        """The parameters that visit k ended with, by name."""
        policy = load_policy(checkpoint_folder(self.folder, k) / "policy").policy
        return {n: p.detach() for n, p in policy.named_parameters()}

    def steps(self, k: int, phase: str = "train") -> Iterator[tuple[Batch, dict[str, Tensor]]]:
        """Each step's raw samples of visit k's demonstrations, (B, …), and their noise and timesteps, (B, …)."""
        view, size = self._view(self._loaded.policy), self.config.train.batch_size
        order = self.frames.order(k, self.config.seed, k, phase)
        for step in range(self.config.train.steps):
            index = order.take(step * size, size)
            batch = self.frames.fetch(torch.stack([torch.full_like(index, k), index], 1))
            yield batch, view.draw(size, generator(self.config.seed, k, phase, "draw", step))

    def draw(self, n: int, gen: torch.Generator) -> dict[str, Tensor]:
        """Noise and timesteps for n samples, from `gen`, like `ctx.draw`."""
        return self._view(self._loaded.policy).draw(n, gen)

    def losses(self, policy: nn.Module, batch: Batch, draw: dict[str, Tensor]) -> Tensor:
        """The policy's loss of each sample, (B,), with a graph behind it."""
        return self._view(policy).per_sample(batch, draw)

    def _view(self, policy: nn.Module) -> PolicyView:
        augment, pre = self.config.augment, self._loaded.preprocessor
        if not (augment.active and self.frames.cameras):
            return PolicyView(policy, policy, pre, nullcontext)
        set_training(pre, True)
        return PolicyView(policy, policy, pre, nullcontext, Augmentation(augment, self.frames.cameras))
