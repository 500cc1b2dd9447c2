"""What a hook may read and call: the policy's losses and gradients, samples, random generators, ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from clbench.config.schema import TrainConfig
from clbench.data.frames import Batch, StreamFrames, batch_size
from clbench.policies.view import Outputs, PolicyView
from clbench.seeding import generator
from clbench.streams.stream import TaskStream, Visit


class Collective(Protocol):
    """What ranks do together. Every rank must make the same calls; with one process nothing happens."""

    def sum(self, tensors: Sequence[Tensor]) -> None: ...
    def gather(self, tensor: Tensor) -> Tensor: ...


@dataclass
class Context:
    """What a hook may read. Read only: the trainer updates it, hooks do not.

    One object per run: the one passed to a hook and `self.ctx` are the same.

    Attributes:
        stream, visit, k: the stream, the current visit and its index.
        phase, step: name of the phase and optimizer step in it.
        policy: the (unwrapped) policy.
        frames: samples of all visits (`fetch`, `length`).
        train: training settings.
        seed: the run's seed.
        rank, world_size, device: this process's place among the ranks.
        planned: this micro-batch's planned samples, raw, or None; in `after_backward`, this rank's of the whole step.
        positions: (n,) positions of this micro-batch's samples in the step's global batch.
        global_batch: current samples of the step over all ranks and micro-batches.
        view: the policy's losses, outputs and gradients (clbench.policies.view).
        planned_total: planned samples of the whole step.
        step_batch: this rank's current samples of the whole step, raw; available until `after_backward` returns.
        collective: sums and gathers over ranks.
        base_path: folder of the policy the run started from.
        log: write one event to the run's log.
    """

    stream: TaskStream
    policy: nn.Module
    frames: StreamFrames
    train: TrainConfig
    seed: int
    device: torch.device
    view: PolicyView
    log: Callable[..., None]
    base_path: str = ""
    rank: int = 0
    world_size: int = 1
    k: int = 0
    phase: str = ""
    step: int = 0
    planned: Batch | None = None
    positions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    global_batch: int = 0
    planned_total: int = 0
    step_batch: Batch = field(default_factory=dict)
    collective: Collective | None = None

    @property
    def visit(self) -> Visit:
        return self.stream.visits[self.k]

    def generator(self, *purpose: int | str) -> torch.Generator:
        """A generator that depends only on (seed, k, phase, purpose). Add the step where it matters."""
        return generator(self.seed, self.k, self.phase, *purpose)

    def draw(self, n: int, gen: torch.Generator) -> dict[str, Tensor]:
        """Noise and timesteps for n samples, from `gen`."""
        return self.view.draw(n, gen)

    def loss(self, batch: Batch, draw: dict[str, Tensor]) -> Tensor:
        """The policy's per-sample loss (n,) on a raw batch under `draw`."""
        return self.view.per_sample(batch, draw)

    def forward(self, batch: Batch, draw: dict[str, Tensor]) -> Tensor:
        """The policy's loss summed over a raw batch, in one forward pass whatever the policy."""
        return self.view.total(batch, draw)

    def outputs(self, batch: Batch, draw: dict[str, Tensor], want: Collection[str] = ("loss",)) -> Outputs:
        """What `want` names of a raw batch: loss, prediction, target, mask, features (clbench.policies.view)."""
        return self.view.outputs(batch, draw, want)

    @property
    def policy_loss(self) -> PolicyView:
        """`view` under its former name."""
        return self.view

    def share(self, n: int) -> slice:
        """This rank's part of n things that all ranks divide among themselves."""
        return slice(n * self.rank // self.world_size, n * (self.rank + 1) // self.world_size)

    def gather(self, tensor: Tensor) -> Tensor:
        """All ranks' tensors (of equal shapes), joined along dimension 0 in the order of the global batch."""
        return tensor if self.collective is None else self.collective.gather(tensor)

    def mean_gradient(
        self,
        gen: torch.Generator,
        parameters: Mapping[str, nn.Parameter],
        *,
        batch: Batch | None = None,
        refs: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """∇ of the mean loss of some samples, by name, under a draw from `gen`; the same on every rank.

        Args:
            batch: this rank's part of the samples, raw (as `planned` in `after_backward`); parts may differ in size.
            refs: (n, 2) references (visit, index), the same on every rank; ranks divide the samples among themselves.
                With neither, the step's current samples are used.
        """
        parts = self.train.gradient_accumulation
        if batch is None and refs is None:
            mine = self.share(self.global_batch)
            draw = {n: v[mine] for n, v in self.draw(self.global_batch, gen).items()}
            found = self.view.mean_gradient(self.step_batch, draw, parameters, parts)
            if self.collective is not None:
                self.collective.sum(list(found.values()))
            return {n: g / self.world_size for n, g in found.items()}
        if batch is not None and refs is not None:
            raise ValueError("mean_gradient takes batch or refs, not both.")
        if refs is not None:
            mine, total = self.share(len(refs)), len(refs)
            batch = self.frames.fetch(refs[mine])
        else:
            assert batch is not None
            batch = {n: v for n, v in batch.items() if n != "slot"}
            sizes = self.gather(torch.tensor([batch_size(batch)], device=self.device)).tolist()
            first = sum(sizes[: self.rank])
            mine, total = slice(first, first + sizes[self.rank]), sum(sizes)
        draw = {n: v[mine] for n, v in self.draw(total, gen).items()}
        own = mine.stop - mine.start
        found = {n: torch.zeros_like(p) for n, p in parameters.items()}
        if own:
            found = self.view.mean_gradient(batch, draw, parameters, min(parts, own))
        found = {n: g * (own / total) for n, g in found.items()}
        if self.collective is not None:
            self.collective.sum(list(found.values()))
        return found

    def squared_gradients(
        self, refs: Tensor, gen: torch.Generator, parameters: Mapping[str, nn.Parameter]
    ) -> dict[str, Tensor]:
        """Σ over the samples `refs` (n, 2) of the squared per-sample gradient, by name (fp32).

        Under a draw from `gen`. Ranks divide the samples among themselves and all get the sum.
        """
        mine = self.share(len(refs))
        draw = {n: v[mine] for n, v in self.draw(len(refs), gen).items()}
        found = self.view.squared_gradients(self.frames.fetch(refs[mine]), draw, parameters)
        if self.collective is not None:
            self.collective.sum(list(found.values()))
        return found


def iterate_named(policy: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Trainable parameters, by name."""
    return ((n, p) for n, p in policy.named_parameters() if p.requires_grad)
