"""Samples: the tensor path gives what LeRobotDataset gives; order is a pure function; images go through workers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.datasets import LeRobotDataset

import clbench.policies  # noqa: F401
from clbench.checkpoints.policy_io import policy_config
from clbench.data.frames import FrameTable, SampleOrder, StreamFrames, concat, load_batches, select, unpacked
from clbench.streams.stream import Task, build_stream
from clbench.testing.toy import TASKS, make_toy_data, toy_config

POLICY = policy_config({"type": "dit_dec", "chunk_size": 4, "n_action_steps": 2}, "cpu")


def stream_frames(toy_data: Path) -> StreamFrames:
    stream = build_stream(toy_config(toy_data, {"name": "seqfft"}).dataset)
    return StreamFrames([v.tasks for v in stream.visits], POLICY)


def test_equals_lerobots_own_items(toy_data: Path) -> None:
    """Every key LeRobot gives, also at episode ends, where the chunk is padded."""
    frames = stream_frames(toy_data)
    root = toy_data / "stream"
    dataset = LeRobotDataset("stream", root=root, delta_timestamps={"action": [i / 80 for i in range(4)]})
    picked = torch.tensor([0, 5, 17, 18, 19, 20, 39, 59])  # of task 1, whose frames start at 60
    batch = frames.fetch(torch.stack([torch.ones_like(picked), picked], 1))
    for row, i in enumerate(picked.tolist()):
        item = dataset[60 + i]
        for key in ("observation.state", "action", "action_is_pad", "task_index", "index", "episode_index"):
            assert torch.equal(batch[key][row], item[key]), (key, i)
        assert batch["task"][row] == item["task"] == TASKS["push-v3"]
    assert batch["action_is_pad"].any()


def test_history_windows_are_padded_at_the_start(toy_data: Path) -> None:
    table = FrameTable.load(toy_data / "stream")
    values, pad = table.window("observation.state", torch.tensor([20, 21, 25]), [-2, -1, 0])
    state = table.columns["observation.state"]
    assert torch.equal(values[0], state[[20, 20, 20]]) and pad[0].tolist() == [True, True, False]
    assert torch.equal(values[1], state[[20, 20, 21]]) and pad[1].tolist() == [True, False, False]
    assert torch.equal(values[2], state[[23, 24, 25]]) and not pad[2].any()


def test_mixed_references_keep_their_order(toy_data: Path) -> None:
    frames = stream_frames(toy_data)
    refs = torch.tensor([[2, 1], [0, 0], [1, 5], [0, 7], [2, 0]])
    together = frames.fetch(refs)
    one_by_one = concat([frames.fetch(r[None]) for r in refs])
    for key, value in one_by_one.items():
        assert together[key] == value if isinstance(value, list) else torch.equal(together[key], value)


def test_joint_visit_indexes_all_its_tasks(toy_data: Path) -> None:
    stream = build_stream(toy_config(toy_data, {"name": "multitask"}).dataset).joint()
    frames = StreamFrames([v.tasks for v in stream.visits], POLICY)
    assert frames.length(0) == 180
    batch = frames.fetch(torch.tensor([[0, 0], [0, 60], [0, 179]]))
    assert batch["task_index"].tolist() == [0, 1, 2]


def images_and_tasks(tmp_path: Path) -> list[Task]:
    root = make_toy_data(tmp_path / "images", ["hammer-v3", "push-v3"], episodes=2, length=6, images=True)
    return [
        Task(n, TASKS[n], root, e, {"type": "metaworld", "task": n}, 10)
        for n, e in (("hammer-v3", (0, 1)), ("push-v3", (3, 2)))  # not in the order of the files
    ]


def same_batches(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(v, b[k]) and v.dtype == b[k].dtype if torch.is_tensor(v) else v == b[k] for k, v in a.items()
    )


REFS = [torch.tensor([[1, 3], [0, 11]]), torch.tensor([[0, 0], [1, 1]]), torch.tensor([[1, 11], [1, 0]])]
TOP = "observation.images.top"


def test_images_are_the_same_from_lerobot_from_workers_and_kept_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLBENCH_CACHE_ROOT", str(tmp_path / "cache"))
    tasks = [(t,) for t in images_and_tasks(tmp_path)]
    anew, kept = StreamFrames(tasks, POLICY, cache_gb=0), StreamFrames(tasks, POLICY)
    assert anew.decoded and not kept.decoded
    assert len(list((tmp_path / "cache" / "frames").glob("images-*/*.uint8"))) == 2  # one per task
    here = list(load_batches(anew, iter(REFS), workers=0))
    there = list(load_batches(anew, iter(REFS), workers=2))
    indexed = list(load_batches(kept, iter(REFS), workers=2))
    for a, b, c in zip(here, there, indexed, strict=True):
        assert a[TOP].shape == (2, 3, 32, 32) and a[TOP].dtype == torch.uint8
        assert same_batches(a, b) and same_batches(a, c)
    assert here[0]["task"] == [TASKS["push-v3"], TASKS["hammer-v3"]]
    lerobot = kept.parts(1)[0]._lerobot[0][6 + 3]  # LeRobot's third frame of episode 3, the first of the task
    assert torch.equal(unpacked(here[0])[TOP][0], lerobot[TOP])


def test_a_history_of_images_repeats_the_first_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLBENCH_CACHE_ROOT", str(tmp_path / "cache"))
    policy = policy_config({"type": "dit_dec", "chunk_size": 4, "n_action_steps": 2, "n_obs_steps": 3}, "cpu")
    tasks = [(t,) for t in images_and_tasks(tmp_path)]
    anew, kept = StreamFrames(tasks, policy, cache_gb=0), StreamFrames(tasks, policy)
    for refs in REFS:
        a, b = anew.fetch(refs), kept.fetch(refs)
        assert a[TOP].shape == (2, 3, 3, 32, 32) and same_batches(a, b)
    assert a[f"{TOP}_is_pad"].tolist() == [[False, False, False], [True, True, False]]


def test_damaged_images_are_decoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLBENCH_CACHE_ROOT", str(tmp_path / "cache"))
    tasks = [(t,) for t in images_and_tasks(tmp_path)]
    before = StreamFrames(tasks, POLICY).fetch(REFS[0])
    first, second = sorted((tmp_path / "cache").rglob("*.uint8"))
    written = first.stat().st_mtime_ns
    StreamFrames(tasks, POLICY)
    assert first.stat().st_mtime_ns == written and "decoding" not in capsys.readouterr().err
    data = bytearray(first.read_bytes())
    data[1000] ^= 1
    first.write_bytes(data)  # one bit
    second.write_bytes(second.read_bytes()[:-1])  # cut
    assert same_batches(StreamFrames(tasks, POLICY).fetch(REFS[0]), before)
    said = capsys.readouterr().err
    assert "is damaged; decoding" in said and "is not whole; decoding" in said
    first.with_suffix(".json").write_text("{")
    assert same_batches(StreamFrames(tasks, POLICY).fetch(REFS[0]), before)


def test_images_that_take_too_much_room_are_decoded_for_every_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLBENCH_CACHE_ROOT", str(tmp_path / "cache"))
    tasks = [(t,) for t in images_and_tasks(tmp_path)]
    needed = 24 * 32 * 32 * 3
    assert StreamFrames(tasks, POLICY, cache_gb=(needed - 1) / 1e9).decoded
    assert "more than train.frame_cache_gb" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
    assert not StreamFrames(tasks, POLICY, cache_gb=needed / 1e9).decoded


def test_images_are_decoded_anew_for_changed_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLBENCH_CACHE_ROOT", str(tmp_path / "cache"))
    tasks = images_and_tasks(tmp_path)
    StreamFrames([(t,) for t in tasks], POLICY)
    table = next((tasks[0].root / "data").rglob("*.parquet"))
    os.utime(table, ns=(1, 1))  # of a set whose files have no sums, times count
    StreamFrames([(t,) for t in tasks], POLICY)
    assert len(list((tmp_path / "cache" / "frames").iterdir())) == 2


def test_order_is_epochs_of_permutations_from_any_position() -> None:
    order = SampleOrder(10, 3, 1, "train")
    taken = order.take(0, 30)
    assert all(sorted(taken[i : i + 10].tolist()) == list(range(10)) for i in (0, 10, 20))
    assert not torch.equal(taken[:10], taken[10:20])
    assert torch.equal(SampleOrder(10, 3, 1, "train").take(17, 8), taken[17:25])
    assert not torch.equal(SampleOrder(10, 3, 2, "train").take(0, 10), taken[:10])
    assert not torch.equal(SampleOrder(10, 4, 1, "train").take(0, 10), taken[:10])


def test_select_and_concat_are_inverse() -> None:
    batch = {"x": torch.arange(6).reshape(3, 2), "task": ["a", "b", "c"]}
    parts = [select(batch, torch.tensor([0, 1])), select(batch, torch.tensor([2]))]
    joined = concat(parts)
    assert torch.equal(joined["x"], batch["x"]) and joined["task"] == batch["task"]
    with pytest.raises(ValueError, match="have different features"):
        concat([{"x": torch.zeros(1)}, {"y": torch.zeros(1)}])
