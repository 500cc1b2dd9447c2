"""Replay memory and ER's batch mix."""

from __future__ import annotations

import pytest
import torch

from clbench.algorithms.er import replaced_positions
from clbench.data.replay import ReplayMemory


def g(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_stores_a_uniform_subset_without_repeats() -> None:
    """Each of 40 frames is kept with probability 10/40: chi-square over 2,000 memories."""
    counts = torch.zeros(40)
    for seed in range(2000):
        memory = ReplayMemory(10)
        memory.store(0, torch.zeros(40, dtype=torch.int64), g(seed))
        kept = memory.indices[0]
        assert len(kept) == 10 and len(kept.unique()) == 10
        counts[kept] += 1
    expected = 2000 * 10 / 40
    chi2 = float(((counts - expected) ** 2 / (expected * 0.75)).sum())
    assert chi2 < 73.4  # 99.9 % quantile of chi-square with 40 degrees of freedom


def test_episode_unit_keeps_whole_episodes_that_fit() -> None:
    episode_of = torch.repeat_interleave(torch.arange(6), torch.tensor([5, 7, 4, 6, 9, 3]))
    for seed in range(50):
        memory = ReplayMemory(15, "episodes")
        memory.store(0, episode_of, g(seed))
        kept = memory.indices[0]
        assert len(kept) <= 15
        for e in episode_of[kept].unique():
            assert (episode_of[kept] == e).sum() == (episode_of == e).sum()
    tiny = ReplayMemory(2, "episodes")
    tiny.store(0, episode_of, g(0))
    assert len(tiny) >= 3  # at least one whole episode


def test_never_replays_the_current_task_nor_repeats_within_a_batch() -> None:
    memory = ReplayMemory(20)
    for k in range(4):
        memory.store(k, torch.zeros(30, dtype=torch.int64), g(k))
    for seed in range(100):
        refs = memory.sample(25, g(seed), balanced=bool(seed % 2), exclude=[3])
        assert 3 not in refs[:, 0]
        assert len(torch.unique(refs, dim=0)) == 25
        for k, i in refs.tolist():
            assert i in memory.indices[k]


def test_balanced_gives_every_task_its_share() -> None:
    memory = ReplayMemory(100)
    memory.store(0, torch.zeros(100, dtype=torch.int64), g(0))
    memory.store(1, torch.zeros(10, dtype=torch.int64), g(1))
    balanced = memory.sample(9, g(2), balanced=True, exclude=[9])
    assert sorted(torch.bincount(balanced[:, 0]).tolist()) == [4, 5]
    share = sum(int((memory.sample(22, g(s), balanced=False, exclude=[9])[:, 0] == 1).sum()) for s in range(300))
    assert abs(share / 300 - 2.0) < 0.3  # 10 of 110 stored samples: 2 of 22


def test_more_than_is_stored_repeats_whole_rounds() -> None:
    memory = ReplayMemory(5)
    memory.store(0, torch.zeros(5, dtype=torch.int64), g(0))
    refs = memory.sample(12, g(1), balanced=False, exclude=[1])
    counts = torch.bincount(torch.searchsorted(memory.indices[0], refs[:, 1].contiguous()))
    assert sorted(counts.tolist()) == [2, 2, 2, 3, 3]


@pytest.mark.parametrize(("batch", "m"), [(10, 3), (128, 38), (8, 7), (5, 0), (7, 7)])
def test_replaced_positions_are_spread_evenly(batch: int, m: int) -> None:
    positions = replaced_positions(batch, m)
    taken = positions[positions >= 0]
    assert taken.tolist() == list(range(m))
    for parts in (2, 5):
        if batch % parts == 0:
            sizes = [(p >= 0).sum().item() for p in positions.chunk(parts)]
            assert max(sizes) - min(sizes) <= 1
            for i in range(parts):  # a slice's planned samples are those the trainer hands it
                low, high = batch * i // parts, batch * (i + 1) // parts
                assert [v for v in positions[low:high].tolist() if v >= 0] == list(
                    range(m * low // batch, m * high // batch)
                )
