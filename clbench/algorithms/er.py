"""ER: experience replay (Ratcliff 1990; Chaudhry et al. 2019, arXiv 1902.10486).

A bounded memory keeps a uniform sample of the past tasks' data. Each training batch of B samples holds m of them,

    m = max(2, round(replay_batch_ratio · B)),

in place of current samples (mode "replace") or in addition to them ("append"), from the second task on; the current
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
from clbench.algorithms.memory import SELECTIONS, STORAGES, Memory
from clbench.data.frames import Batch, concat, select
from clbench.errors import UserError
from clbench.seeding import generator


def replaced_positions(batch: int, m: int) -> Tensor:
    """(batch,) index of the replayed sample at each position of the global batch, or -1.

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
            mode: replace (the batch keeps its size) | append (the current batch loses no samples).
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
        self.memory = Memory(
            config.buffer_size_per_task,
            unit=config.memory_unit,
            selection=config.selection,
            size=config.buffer_size,
            storage=config.storage,
        )

    def check(self, config: Any) -> None:
        c = self.config
        for key in ("buffer_size_per_task", "buffer_size"):
            value = getattr(c, key)
            if value is not None and value < 1:
                raise UserError(f"algorithm.{key} must be at least 1 but is {value}.")
        for key, known in (
            ("mode", ("replace", "append")),
            ("memory_unit", ("frames", "episodes")),
            ("selection", SELECTIONS),
            ("storage", STORAGES),
        ):
            if getattr(c, key) not in known:
                raise UserError(f"algorithm.{key} is '{getattr(c, key)}' but must be {' or '.join(known)}.")
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
        self.memory.bind(ctx)

    # ---- drawing and mixing ---------------------------------------------------------------------
    def _generator(self, purpose: str, step: int) -> torch.Generator:
        """Generator for a step's draws; another phase of the same task draws afresh."""
        phase = () if self.ctx.phase == "train" else (self.ctx.phase,)
        return generator(purpose, self.ctx.seed, self.ctx.k, step, *phase)

    def plan_batch(self, ctx: Context, step: int) -> Plan | None:
        if not self.memory.available(ctx):
            return None
        n = self._count(ctx.train.batch_size)
        refs = self.memory.sample(ctx, n, self._generator("er-replay", step), balanced=self.config.balanced_sampling)
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
        self.memory.store(ctx, "er-memory")

    def exemplar_bytes(self) -> int:
        return self.memory.exemplar_bytes()

    def state_bytes(self) -> int:
        return self.memory.state_bytes()  # copies are exemplars

    def state_dict(self) -> dict[str, Any]:
        return self.memory.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.memory.load_state_dict(state)
