"""A bounded memory of past tasks' samples, as a component: selection, drawing, copies, values per sample, state.

    class Replay(CLAlgorithm):
        def __init__(self, config):
            super().__init__(config)
            self.memory = Memory(per_task=500)

        def bind(self, ctx):                       # called once, before the first hook
            super().bind(ctx)
            self.memory.bind(ctx)

        def on_task_end(self, ctx):
            self.memory.store(ctx)

        def plan_batch(self, ctx, step):           # claim "batch_mix"
            if not self.memory.available(ctx):
                return None
            refs = self.memory.sample(ctx, 32, ctx.generator("replay", step))
            return Plan(refs, added=len(refs))

        def modify_batch(self, batch, task_id):
            return batch if self.ctx.planned is None else concat([batch, self.ctx.planned])

        def state_dict(self):
            return self.memory.state_dict()

        def load_state_dict(self, state):
            self.memory.load_state_dict(state)

Samples are referred to as (visit, index): nothing is copied unless `storage` is "copy". Those of the current task are
never drawn, even where its earlier visits are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clbench.algorithms.context import Context
from clbench.data.frames import Batch, packed
from clbench.data.replay import ReplayMemory, ReservoirMemory
from clbench.errors import UserError
from clbench.seeding import generator
from clbench.tensor_files import tensor_bytes

SELECTIONS = ("per_task", "reservoir")
STORAGES = ("reference", "copy")


BEFORE = "/uint8"  # suffix that image keys had in copies of earlier versions


class Memory:
    """Samples of past tasks, and what was computed on them.

    Args:
        per_task: samples kept of every visit.
        unit: frames | episodes (whole demonstrations, as many as fit into `per_task` frames).
        selection: per_task (a uniform sample of every visit) | reservoir (one of everything seen; Vitter 1985).
        size: samples that a reservoir keeps in all; null = per_task × visits of the stream.
        storage: reference (indices into past tasks' data sets) | copy (the samples themselves, in the checkpoint).
    """

    def __init__(
        self,
        per_task: int,
        *,
        unit: str = "frames",
        selection: str = "per_task",
        size: int | None = None,
        storage: str = "reference",
    ) -> None:
        self.per_task, self.selection, self.size, self.storage = per_task, selection, size, storage
        self.kept = ReplayMemory(per_task, unit)
        self.copies: dict[int, tuple[Tensor, Batch]] = {}  # storage copy: visit → indices (m,), packed samples
        self.values: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}  # name → visit → indices (m,), values (m, …)
        self._ctx: Context | None = None
        self._sample_bytes = 0

    def __len__(self) -> int:
        return len(self.kept)

    def bind(self, ctx: Context) -> None:
        """Take the run's context; called before the first hook, again when a run is resumed."""
        self._ctx = ctx
        self._sample_bytes = ctx.frames.parts(0)[0].sample_bytes()
        if self.selection == "reservoir" and not isinstance(self.kept, ReservoirMemory):
            self.kept = ReservoirMemory(self.size or self.per_task * len(ctx.stream.visits))
        self._use_copies()

    def _use_copies(self) -> None:
        if self._ctx is not None:
            for k, (indices, samples) in self.copies.items():
                self._ctx.frames.use_copy(k, indices, samples)

    # ---- keeping --------------------------------------------------------------------------------
    def store(self, ctx: Context, *purpose: int | str) -> None:
        """Keep samples of the current visit; which ones depends on (seed, visit, purpose) alone. Call it once per
        visit, in `on_task_end`."""
        episode_of, offset = [], 0
        for part in ctx.frames.parts(ctx.k):
            episode_of.append(part.episode_of + offset)
            offset += len(part.task.episodes)
        self.kept.store(ctx.k, torch.cat(episode_of), generator(*(purpose or ("memory",)), ctx.seed, ctx.k))
        for found in self.values.values():  # a reservoir drops some
            for k in list(found):
                indices, values = found[k]
                stays = torch.isin(indices, self.kept.indices.get(k, torch.empty(0, dtype=torch.int64)))
                found[k] = indices[stays], values[stays]
        if self.storage == "copy":
            self._copy(ctx)

    def _copy(self, ctx: Context) -> None:
        """Make the copies hold what the memory refers to; earlier visits' samples come from earlier copies."""
        copies: dict[int, tuple[Tensor, Batch]] = {}
        for k, indices in self.kept.indices.items():
            if k in self.copies and torch.equal(self.copies[k][0], indices):
                copies[k] = self.copies[k]
            else:
                copies[k] = indices, packed(ctx.frames.fetch(_refs(k, indices)))
        self.copies = copies
        self._use_copies()

    # ---- drawing --------------------------------------------------------------------------------
    def _same_task(self, ctx: Context) -> list[int]:
        return [v.k for v in ctx.stream.visits if v.task == ctx.visit.task]

    def available(self, ctx: Context) -> int:
        """How many samples of tasks other than the current one are stored."""
        return self.kept.available(self._same_task(ctx))

    def sample(self, ctx: Context, n: int, gen: torch.Generator, *, balanced: bool = False) -> Tensor:
        """Draw n references (n, 2), without replacement while enough are stored; never of the current task.

        balanced: every stored visit contributes an equal share; otherwise all stored samples are equally likely.
        """
        return self.kept.sample(n, gen, balanced=balanced, exclude=self._same_task(ctx))

    def references(self, k: int) -> Tensor:
        """References (m, 2) of what is stored of visit k."""
        return _refs(k, self.kept.indices.get(k, torch.empty(0, dtype=torch.int64)))

    # ---- values per sample ----------------------------------------------------------------------
    def put(self, name: str, refs: Tensor, values: Tensor) -> None:
        """Keep `values` (m, …), computed on the stored samples `refs` (m, 2), under `name`; on the CPU."""
        found = self.values.setdefault(name, {})
        for k in refs[:, 0].unique().tolist():
            mine = refs[:, 0] == k
            order = refs[mine, 1].argsort()
            found[k] = refs[mine, 1][order], values.detach().cpu()[mine][order]

    def get(self, name: str, refs: Tensor) -> Tensor:
        """The values (m, …) that were put for `refs` (m, 2), in their order.

        Raises:
            KeyError: nothing was put for one of them.
        """
        found = self.values[name]
        parts: Tensor | None = None
        for k in refs[:, 0].unique().tolist():
            rows = (refs[:, 0] == k).nonzero()[:, 0]
            indices, values = found[k]
            place = torch.searchsorted(indices, refs[rows, 1])
            if not torch.equal(indices[place.clamp(max=len(indices) - 1)], refs[rows, 1]):
                raise KeyError(f"no '{name}' is kept for a sample of visit {k}")
            if parts is None:
                parts = values.new_empty(len(refs), *values.shape[1:])
            parts[rows] = values[place]
        assert parts is not None, "no samples requested"
        return parts

    # ---- state ----------------------------------------------------------------------------------
    def exemplar_bytes(self) -> int:
        """Bytes of the stored samples, uncompressed, whether they are copied or referred to."""
        return len(self.kept) * self._sample_bytes

    def state_bytes(self) -> int:
        """Bytes of what is kept in addition to the samples: references and values."""
        return tensor_bytes(self.kept.state_dict()) + tensor_bytes(self._stored_values())

    def _stored_values(self) -> dict[str, Any]:
        return {
            name: {str(k): {"indices": i, "values": v} for k, (i, v) in found.items()}
            for name, found in self.values.items()
        }

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"memory": self.kept.state_dict()}
        if self.storage == "copy":
            state["copies"] = {str(k): {"indices": i, "samples": s} for k, (i, s) in self.copies.items()}
        if self.values:
            state["values"] = self._stored_values()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        want = {"memory", "copies"} if self.storage == "copy" else {"memory"}
        if set(state) - {"values"} != want:
            raise UserError(f"the checkpoint's state of a memory should hold {sorted(want)} but holds {sorted(state)}.")
        if self.selection == "reservoir" and not isinstance(self.kept, ReservoirMemory):
            self.kept = ReservoirMemory(1)  # evaluation: no context was bound; nothing is stored any more
        self.kept.load_state_dict(state["memory"])
        for k, copy in state.get("copies", {}).items():
            samples = {key.removesuffix(BEFORE): value for key, value in copy["samples"].items()}
            self.copies[int(k)] = copy["indices"], samples
        self.values = {
            name: {int(k): (kept["indices"], kept["values"]) for k, kept in found.items()}
            for name, found in state.get("values", {}).items()
        }
        self._use_copies()


def _refs(k: int, indices: Tensor) -> Tensor:
    return torch.stack([torch.full_like(indices, k), indices], 1)
