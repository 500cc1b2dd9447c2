"""ER: experience replay (Ratcliff 1990; Chaudhry et al. 2019, arXiv 1902.10486).

A bounded memory keeps a uniform sample of the past tasks' data. Each training batch of B samples holds m of them,

    m = max(2, round(replay_batch_ratio · B)),

in the place of current samples (mode "replace") or beside them ("append"). From the second task on; the current
task is never replayed. Within a step, samples are drawn without replacement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clbench.algorithms.hooks import CLAlgorithm, Context, Plan
from clbench.checkpoints.state import tensor_bytes
from clbench.data.frames import Batch, concat, packed, select
from clbench.data.replay import ReplayMemory, ReservoirMemory
from clbench.errors import UserError
from clbench.seeding import generator


def replaced_positions(batch: int, m: int) -> Tensor:
    """(batch,) index of the replayed sample that takes a position of the global batch, or -1.

    The m positions are spread evenly, so every slice of the batch (a rank's, a micro-batch's) holds its share.
    """
    edge = torch.arange(batch + 1) * m // batch
    return torch.where(edge[1:] > edge[:-1], edge[:-1], -1)


class ER(CLAlgorithm):
    """Mix stored samples of past tasks into every batch."""

    name = "er"
    claims = frozenset({"batch_mix"})

    @dataclass
    class Config:
        """Keys of `algorithm`.

        Attributes:
            buffer_size_per_task: frames kept of every visit.
            replay_batch_ratio: replayed samples per sample of the batch, at least 2 samples; below 1 in mode replace.
            balanced_sampling: true = equally from every stored visit, false = uniformly over stored samples.
            mode: replace (the batch keeps its size) | append (the current batch stays whole).
            memory_unit: frames | episodes (whole demonstrations, as many as fit).
            selection: per_task (a uniform sample of every visit) | reservoir (one of everything seen; Vitter 1985).
            buffer_size: frames that a reservoir keeps in all; null = buffer_size_per_task × visits of the stream.
            storage: reference (indices into past tasks' data sets) | copy (the samples themselves, in the checkpoint).
        """

        buffer_size_per_task: int = 500
        replay_batch_ratio: float = 0.3
        balanced_sampling: bool = False
        mode: str = "replace"
        memory_unit: str = "frames"
        selection: str = "per_task"
        buffer_size: int | None = None
        storage: str = "reference"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.memory = ReplayMemory(config.buffer_size_per_task, config.memory_unit)
        self.copies: dict[int, tuple[Tensor, Batch]] = {}  # storage copy: visit → indices (m,), packed samples
        self._bytes_per_sample = 0

    def check(self, config: Any) -> None:
        c = self.config
        for key in ("buffer_size_per_task", "buffer_size"):
            value = getattr(c, key)
            if value is not None and value < 1:
                raise UserError(f"algorithm.{key} must be at least 1, is {value}.")
        for key, known in (
            ("mode", ("replace", "append")),
            ("memory_unit", ("frames", "episodes")),
            ("selection", ("per_task", "reservoir")),
            ("storage", ("reference", "copy")),
        ):
            if getattr(c, key) not in known:
                raise UserError(f"algorithm.{key} is '{getattr(c, key)}', must be {' or '.join(known)}.")
        if not 0 < c.replay_batch_ratio < (1 if c.mode == "replace" else math.inf):
            raise UserError(
                f"algorithm.replay_batch_ratio must be {'in (0, 1)' if c.mode == 'replace' else 'positive'}, "
                f"is {c.replay_batch_ratio}."
            )
        if c.selection == "reservoir" and c.memory_unit == "episodes":
            raise UserError("algorithm.selection reservoir keeps single frames: use memory_unit frames.")
        if c.selection == "per_task" and c.buffer_size is not None:
            raise UserError(
                "algorithm.buffer_size is the size of a reservoir; with selection per_task set buffer_size_per_task."
            )
        if c.mode == "replace" and self._count(config.train.batch_size) >= config.train.batch_size:
            raise UserError(
                f"{self.name} replaces {self._count(config.train.batch_size)} of {config.train.batch_size} samples: "
                "nothing would be left of the current task. Raise train.batch_size or lower "
                "algorithm.replay_batch_ratio."
            )

    def _count(self, batch: int) -> int:
        return max(2, round(self.config.replay_batch_ratio * batch))

    def bind(self, ctx: Context) -> None:
        super().bind(ctx)
        self._bytes_per_sample = ctx.frames.parts(0)[0].sample_bytes()
        if self.config.selection == "reservoir" and not isinstance(self.memory, ReservoirMemory):
            size = self.config.buffer_size or self.config.buffer_size_per_task * len(ctx.stream.visits)
            self.memory = ReservoirMemory(size)
        for k, (indices, samples) in self.copies.items():
            ctx.frames.use_copy(k, indices, samples)

    # ---- drawing and mixing ---------------------------------------------------------------------
    def _same_task(self, ctx: Context) -> list[int]:
        """Visits of the current task: never replayed."""
        return [v.k for v in ctx.stream.visits if v.task == ctx.visit.task]

    def _generator(self, purpose: str, step: int) -> torch.Generator:
        """Draws of a step; another phase of the same task draws anew."""
        phase = () if self.ctx.phase == "train" else (self.ctx.phase,)
        return generator(purpose, self.ctx.seed, self.ctx.k, step, *phase)

    def plan_batch(self, ctx: Context, step: int) -> Plan | None:
        same = self._same_task(ctx)
        if not self.memory.available(same):
            return None
        refs = self.memory.sample(
            self._count(ctx.train.batch_size),
            self._generator("er-replay", step),
            balanced=self.config.balanced_sampling,
            exclude=same,
        )
        return Plan(refs, added=len(refs) if self.config.mode == "append" else 0)

    def modify_batch(self, batch: Batch, task_id: int) -> Batch:
        planned = self.ctx.planned
        return batch if planned is None else self._mix(batch, planned, self.ctx.planned_total)

    def _mix(self, batch: Batch, replayed: Batch, m: int) -> Batch:
        """Mix this micro-batch's share `replayed` of a step's m replayed samples into its current samples."""
        if self.config.mode == "append":
            return concat([batch, replayed])
        taken = replaced_positions(self.ctx.global_batch, m)[self.ctx.positions] >= 0
        mixed = concat([select(batch, (~taken).nonzero()[:, 0]), replayed])
        mixed["slot"] = torch.cat([batch["slot"][~taken], batch["slot"][taken]])
        return mixed

    # ---- the memory -----------------------------------------------------------------------------
    def on_task_end(self, ctx: Context) -> None:
        episode_of, offset = [], 0
        for part in ctx.frames.parts(ctx.k):
            episode_of.append(part.episode_of + offset)
            offset += len(part.task.episodes)
        self.memory.store(ctx.k, torch.cat(episode_of), generator("er-memory", ctx.seed, ctx.k))
        if self.config.storage == "copy":
            self._copy(ctx)

    def _copy(self, ctx: Context) -> None:
        """Make the copies hold what the memory refers to; earlier visits' samples come from earlier copies."""
        copies: dict[int, tuple[Tensor, Batch]] = {}
        for k, indices in self.memory.indices.items():
            if k in self.copies and torch.equal(self.copies[k][0], indices):
                copies[k] = self.copies[k]
            else:
                refs = torch.stack([torch.full_like(indices, k), indices], 1)
                copies[k] = indices, packed(ctx.frames.fetch(refs))
        self.copies = copies
        for k, (indices, samples) in copies.items():
            ctx.frames.use_copy(k, indices, samples)

    def exemplar_bytes(self) -> int:
        return len(self.memory) * self._bytes_per_sample

    def state_bytes(self) -> int:
        return tensor_bytes(self.memory.state_dict())  # copies are exemplars

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"memory": self.memory.state_dict()}
        if self.config.storage == "copy":
            state["copies"] = {str(k): {"indices": i, "samples": s} for k, (i, s) in self.copies.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        want = {"memory", "copies"} if self.config.storage == "copy" else {"memory"}
        if set(state) != want:
            raise UserError(f"the checkpoint's state of {self.name} should hold {sorted(want)}, holds {sorted(state)}.")
        if self.config.selection == "reservoir" and not isinstance(self.memory, ReservoirMemory):
            self.memory = ReservoirMemory(1)  # evaluation: no context was bound; nothing is stored any more
        self.memory.load_state_dict(state["memory"])
        for k, copy in state.get("copies", {}).items():
            self.copies[int(k)] = copy["indices"], copy["samples"]
        if hasattr(self, "ctx"):
            for k, (indices, samples) in self.copies.items():
                self.ctx.frames.use_copy(k, indices, samples)
