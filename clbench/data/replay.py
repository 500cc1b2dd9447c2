"""Bounded memories of past tasks' samples, as references (visit, index).

`ReplayMemory` keeps the same number of samples of every task; `ReservoirMemory` keeps one uniform sample of everything
seen (Vitter 1985, algorithm R).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from clbench.errors import UserError


class ReplayMemory:
    """For every stored visit a uniform sample, without replacement, of its frames or of its episodes.

    Args:
        per_task: frames kept of each visit.
        unit: "frames" = single frames; "episodes" = whole episodes while they fit into `per_task` frames (at least
            one).
    """

    def __init__(self, per_task: int, unit: str = "frames") -> None:
        self.per_task, self.unit = per_task, unit
        self.indices: dict[int, Tensor] = {}  # visit → (m,) sample indices

    def __len__(self) -> int:
        return sum(len(v) for v in self.indices.values())

    def store(self, k: int, episode_of: Tensor, generator: torch.Generator) -> None:
        """Keep a uniform subset of visit k's samples; `episode_of` (n,) gives each sample's episode."""
        n = len(episode_of)
        if self.unit == "frames":
            kept = torch.randperm(n, generator=generator)[: self.per_task]
        else:
            lengths = torch.bincount(episode_of)
            order = torch.randperm(len(lengths), generator=generator)
            fits = lengths[order].cumsum(0) <= self.per_task
            fits[0] = True
            chosen = torch.zeros(len(lengths), dtype=torch.bool)
            chosen[order[fits.cumprod(0).bool()]] = True
            kept = chosen[episode_of].nonzero()[:, 0]
        self.indices[k] = kept.sort().values

    def available(self, exclude: Collection[int]) -> int:
        """How many samples of visits outside `exclude` are stored."""
        return sum(len(v) for k, v in self.indices.items() if k not in exclude)

    def sample(self, n: int, generator: torch.Generator, *, balanced: bool, exclude: Collection[int]) -> Tensor:
        """Draw n references (n, 2), without replacement while enough are stored; never of visits in `exclude`.

        balanced: every stored visit gives n / visits samples (the remainder goes to visits drawn at random);
        otherwise all stored samples are equally likely.
        """
        pools = {k: v for k, v in sorted(self.indices.items()) if k not in exclude}
        if not pools:
            raise ValueError("the replay memory is empty")
        if not balanced:
            refs = torch.cat([torch.stack([torch.full_like(v, k), v], 1) for k, v in pools.items()])
            return refs[draw_without_replacement(len(refs), n, generator)]
        visits = torch.tensor(list(pools))
        share = torch.full((len(visits),), n // len(visits))
        share[torch.randperm(len(visits), generator=generator)[: n % len(visits)]] += 1
        parts = []
        for k, m in zip(visits.tolist(), share.tolist(), strict=True):
            chosen = pools[k][draw_without_replacement(len(pools[k]), m, generator)]
            parts.append(torch.stack([torch.full_like(chosen, k), chosen], 1))
        refs = torch.cat(parts)
        return refs[torch.randperm(len(refs), generator=generator)]

    def state_dict(self) -> dict[str, Any]:
        return {str(k): v for k, v in self.indices.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for k, v in state.items():
            if not (str(k).isdigit() and torch.is_tensor(v) and v.ndim == 1 and v.dtype == torch.int64):
                raise UserError(f"the checkpoint's replay memory is damaged (entry '{k}').")
        self.indices = {int(k): v for k, v in state.items()}


class ReservoirMemory(ReplayMemory):
    """One uniform sample, without replacement, of all samples seen: Vitter's algorithm R.

    The first `capacity` samples fill the reservoir. After that, sample t (counted from 0 over the whole stream) draws
    a slot s uniformly from 0 … t and replaces what is there if s < capacity. After t samples each of them is stored
    with probability capacity / t. A visit's samples are offered once, in random order, at its end.

    Args:
        capacity: frames kept in all.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.capacity, self.seen = capacity, 0
        self.slots = torch.empty(0, 2, dtype=torch.int64)  # (≤ capacity, 2) references, in slot order

    def store(self, k: int, episode_of: Tensor, generator: torch.Generator) -> None:
        """Offer visit k's samples to the reservoir."""
        order = torch.randperm(len(episode_of), generator=generator)
        t = self.seen + torch.arange(len(order))
        drawn = (torch.rand(len(order), generator=generator, dtype=torch.float64) * (t + 1)).long()
        slot = torch.where(t < self.capacity, t, drawn)
        kept = (slot < self.capacity).nonzero()[:, 0].tolist()
        size = min(self.capacity, self.seen + len(order))
        slots = torch.cat([self.slots, torch.empty(size - len(self.slots), 2, dtype=torch.int64)])
        for i in kept:  # in order: a later sample may push an earlier one out
            slots[slot[i], 0], slots[slot[i], 1] = k, order[i]
        self.slots, self.seen = slots, self.seen + len(order)
        self._index()

    def _index(self) -> None:
        visits = self.slots[:, 0].unique().tolist()
        self.indices = {v: self.slots[self.slots[:, 0] == v, 1].sort().values for v in visits}

    def state_dict(self) -> dict[str, Any]:
        return {"slots": self.slots, "seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        slots = state.get("slots")
        if set(state) != {"slots", "seen"} or not torch.is_tensor(slots) or slots.ndim != 2 or slots.shape[1] != 2:
            raise UserError("the checkpoint's reservoir is damaged.")
        self.slots, self.seen = slots, int(state["seen"])
        self._index()


def draw_without_replacement(pool: int, n: int, generator: torch.Generator) -> Tensor:
    """n of `pool` without replacement; whole rounds are repeated when n is larger than the pool."""
    rounds = [torch.randperm(pool, generator=generator) for _ in range(-(-n // pool))]
    return torch.cat([*rounds, torch.empty(0, dtype=torch.int64)])[:n]
