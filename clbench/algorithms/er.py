"""ER: experience replay (Ratcliff 1990; Chaudhry et al. 2019, arXiv 1902.10486).

A bounded memory keeps a uniform sample of every past task's data. Each training batch of B samples holds m of them,

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
from clbench.data.frames import Batch, concat, select
from clbench.data.replay import ReplayMemory
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
            buffer_size_per_task: frames kept of every task.
            replay_batch_ratio: replayed samples per sample of the batch, at least 2 samples; below 1 in mode replace.
            balanced_sampling: true = equally from every stored task, false = uniformly over stored samples.
            mode: replace (the batch keeps its size) | append (the current batch stays whole).
            memory_unit: frames | episodes (whole demonstrations, as many as fit).
        """

        buffer_size_per_task: int = 500
        replay_batch_ratio: float = 0.3
        balanced_sampling: bool = False
        mode: str = "replace"
        memory_unit: str = "frames"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.memory = ReplayMemory(config.buffer_size_per_task, config.memory_unit)
        self._bytes_per_sample = 0

    def check(self, config: Any) -> None:
        c = self.config
        if c.buffer_size_per_task < 1:
            raise UserError(f"algorithm.buffer_size_per_task must be at least 1, is {c.buffer_size_per_task}.")
        if c.mode not in ("replace", "append"):
            raise UserError(f"algorithm.mode is '{c.mode}', must be replace or append.")
        if not 0 < c.replay_batch_ratio < (1 if c.mode == "replace" else math.inf):
            raise UserError(
                f"algorithm.replay_batch_ratio must be {'in (0, 1)' if c.mode == 'replace' else 'positive'}, "
                f"is {c.replay_batch_ratio}."
            )
        if c.memory_unit not in ("frames", "episodes"):
            raise UserError(f"algorithm.memory_unit is '{c.memory_unit}', must be frames or episodes.")
        if c.mode == "replace" and self._count(config.train.batch_size) >= config.train.batch_size:
            raise UserError(
                f"er replaces {self._count(config.train.batch_size)} of {config.train.batch_size} samples: nothing "
                "would be left of the current task. Raise train.batch_size or lower algorithm.replay_batch_ratio."
            )

    def _count(self, batch: int) -> int:
        return max(2, round(self.config.replay_batch_ratio * batch))

    def bind(self, ctx: Context) -> None:
        super().bind(ctx)
        self._bytes_per_sample = ctx.frames.parts(0)[0].sample_bytes()

    def plan_batch(self, ctx: Context, step: int) -> Plan | None:
        same_task = [v.k for v in ctx.stream.visits if v.task == ctx.visit.task]
        if all(k in same_task for k in self.memory.indices):
            return None
        refs = self.memory.sample(
            self._count(ctx.train.batch_size),
            generator("er-replay", ctx.seed, ctx.k, step),
            balanced=self.config.balanced_sampling,
            exclude=same_task,
        )
        return Plan(refs, added=len(refs) if self.config.mode == "append" else 0)

    def modify_batch(self, batch: Batch, task_id: int) -> Batch:
        planned = self.ctx.planned
        if planned is None:
            return batch
        if self.config.mode == "append":
            return concat([batch, planned])
        taken = replaced_positions(self.ctx.global_batch, self.ctx.planned_total)[self.ctx.positions] >= 0
        mixed = concat([select(batch, (~taken).nonzero()[:, 0]), planned])
        mixed["slot"] = torch.cat([batch["slot"][~taken], batch["slot"][taken]])
        return mixed

    def on_task_end(self, ctx: Context) -> None:
        episode_of, offset = [], 0
        for part in ctx.frames.parts(ctx.k):
            episode_of.append(part.episode_of + offset)
            offset += len(part.task.episodes)
        self.memory.store(ctx.k, torch.cat(episode_of), generator("er-memory", ctx.seed, ctx.k))

    def exemplar_bytes(self) -> int:
        return len(self.memory) * self._bytes_per_sample

    def state_dict(self) -> dict[str, Any]:
        return {"memory": self.memory.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state) != {"memory"}:
            raise UserError(f"the checkpoint's state of er should hold 'memory', holds {sorted(state)}.")
        self.memory.load_state_dict(state["memory"])
