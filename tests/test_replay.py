"""Replay memory and ER's batch mix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clbench.algorithms.build import build_algorithm
from clbench.algorithms.er import ER, replaced_positions
from clbench.algorithms.hooks import Context, Plan
from clbench.algorithms.memory import Memory
from clbench.checkpoints.run_folder import checkpoint_folder
from clbench.data.frames import Batch, TaskFrames, packed, unpacked
from clbench.data.replay import ReplayMemory, ReservoirMemory
from clbench.testing.toy import toy_config
from clbench.training.trainer import train


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


def test_balanced_draws_with_more_visits_than_samples() -> None:
    memory = ReplayMemory(10)
    for k in range(6):
        memory.store(k, torch.zeros(10, dtype=torch.int64), g(k))
    drawn = [memory.sample(2, g(seed), balanced=True, exclude=[]) for seed in range(200)]
    assert all(len(refs) == 2 and len(refs[:, 0].unique()) == 2 for refs in drawn)
    assert len(torch.cat(drawn)[:, 0].unique()) == 6


def test_reservoir_keeps_everything_seen_with_equal_probability() -> None:
    """Three visits of 30, 20 and 50 samples, capacity 25: every sample stays with probability 1/4 (chi-square)."""
    lengths, runs, capacity = (30, 20, 50), 3000, 25
    counts = torch.zeros(sum(lengths))
    for seed in range(runs):
        memory = ReservoirMemory(capacity)
        for k, n in enumerate(lengths):
            memory.store(k, torch.zeros(n, dtype=torch.int64), g(1000 * k + seed))
        assert len(memory) == capacity and len(torch.unique(memory.slots, dim=0)) == capacity
        offset = 0
        for k, n in enumerate(lengths):
            counts[offset + memory.indices.get(k, torch.empty(0, dtype=torch.int64))] += 1
            offset += n
    p = capacity / sum(lengths)
    chi2 = float(((counts - runs * p) ** 2 / (runs * p * (1 - p))).sum())
    assert chi2 < 149.4  # 99.9 % quantile of chi-square with 100 degrees of freedom
    assert chi2 > 61.9  # and its 0.1 % quantile: it is random at all


def test_a_reservoir_that_is_not_full_keeps_all_and_survives_saving() -> None:
    memory = ReservoirMemory(50)
    memory.store(0, torch.zeros(20, dtype=torch.int64), g(0))
    assert memory.indices[0].tolist() == list(range(20))
    again = ReservoirMemory(50)
    again.load_state_dict(memory.state_dict())
    for m in (memory, again):
        m.store(1, torch.zeros(60, dtype=torch.int64), g(1))
    assert torch.equal(memory.slots, again.slots) and len(again) == 50


def test_every_phase_of_a_task_replays_draws_of_its_own(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PackNet trains a task in two phases, each from step 0: the second does not repeat the first's replay."""
    drawn: dict[tuple[int, str], list[torch.Tensor]] = {}
    original = ER.plan_batch

    def plan_batch(self: ER, ctx: Context, step: int) -> Plan | None:
        plan = original(self, ctx, step)
        if plan is not None:
            drawn.setdefault((ctx.k, ctx.phase), []).append(plan.refs)
        return plan

    monkeypatch.setattr(ER, "plan_batch", plan_batch)
    train(toy_config(toy_data, {"name": ["er", "packnet"]}, f"output_dir={tmp_path}", "dataset.task_order=[0,1]"), "r")
    assert {key: len(refs) for key, refs in drawn.items()} == {(1, "train"): 4, (1, "retrain"): 4}
    for step in range(4):
        assert not torch.equal(drawn[1, "train"][step], drawn[1, "retrain"][step])


@pytest.mark.parametrize("selection", ["per_task", "reservoir"])
def test_copies_train_like_references_without_reading_past_data(
    selection: str, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = {"name": "er", "buffer_size_per_task": 6, "selection": selection}
    runs = {}
    reads: list[str] = []
    original = TaskFrames.fetch

    def fetch(self: TaskFrames, indices: torch.Tensor) -> Batch:
        reads.append(self.task.name)
        return original(self, indices)

    monkeypatch.setattr(TaskFrames, "fetch", fetch)
    for storage in ("reference", "copy"):
        reads.clear()
        config = toy_config(toy_data, {**section, "storage": storage}, f"output_dir={tmp_path}")
        runs[storage] = train(config, storage)
        last = max(i for i, name in enumerate(reads) if name == "hammer-v3")
        first_of_last = reads.index("window-close-v3")
        assert (last > first_of_last) == (storage == "reference")
    for k in range(3):
        a, b = (checkpoint_folder(runs[s], k) / "policy" / "model.safetensors" for s in ("reference", "copy"))
        assert a.read_bytes() == b.read_bytes()


def test_images_are_packed_without_loss() -> None:
    image = torch.randint(0, 256, (3, 3, 4, 4), generator=g(0)).float() / 255
    other = torch.rand(3, 3, 4, 4, generator=g(1))
    batch = {"observation.images.top": image, "observation.image_like": other, "x": torch.arange(3), "task": ["a"] * 3}
    kept = packed(batch)
    assert kept["observation.images.top"].dtype == torch.uint8
    assert kept["observation.image_like"].dtype == torch.float32  # these did not come from bytes
    back = unpacked(kept)
    assert back.keys() == batch.keys()
    assert all(torch.equal(back[n], v) if torch.is_tensor(v) else back[n] == v for n, v in batch.items())


def test_copies_of_images_from_earlier_versions_are_read() -> None:
    memory = Memory(2, storage="copy")
    image = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    samples = {"observation.images.top/uint8": image, "action": torch.zeros(2, 1), "task": ["a", "a"]}
    copies = {"0": {"indices": torch.arange(2), "samples": samples}}
    memory.load_state_dict({"memory": {"0": torch.arange(2)}, "copies": copies})
    found = memory.copies[0][1]
    assert set(found) == {"observation.images.top", "action", "task"} and found["observation.images.top"] is image


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"selection": "reservoir", "memory_unit": "episodes"}, "keeps single frames"),
        ({"buffer_size": 10}, "is the size of a reservoir"),
        ({"storage": "disk"}, "storage is 'disk'"),
        ({"selection": "fifo"}, "selection is 'fifo'"),
    ],
)
def test_impossible_memories_are_refused(keys: dict[str, object], words: str, toy_data: Path) -> None:
    with pytest.raises(ValueError, match=words):
        build_algorithm(toy_config(toy_data, {"name": "er", **keys}))
