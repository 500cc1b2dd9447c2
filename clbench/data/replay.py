"""A bounded memory of past tasks' samples, as references into their data sets.

References are tiny and exact; `sample_bytes` says what the samples they stand for would take.
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
            return refs[_draw(len(refs), n, generator)]
        visits = torch.tensor(list(pools))
        share = torch.full((len(visits),), n // len(visits))
        share[torch.randperm(len(visits), generator=generator)[: n % len(visits)]] += 1
        parts = []
        for k, m in zip(visits.tolist(), share.tolist(), strict=True):
            chosen = pools[k][_draw(len(pools[k]), m, generator)]
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


def _draw(pool: int, n: int, generator: torch.Generator) -> Tensor:
    """n of `pool` without replacement; whole rounds are repeated when n is larger than the pool."""
    rounds = [torch.randperm(pool, generator=generator) for _ in range(-(-n // pool))]
    return torch.cat(rounds)[:n]
