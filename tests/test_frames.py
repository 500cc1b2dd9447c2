"""Samples: the tensor path gives what LeRobotDataset gives; order is a pure function; images go through workers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lerobot.datasets import LeRobotDataset

import clbench.policies  # noqa: F401
from clbench.checkpoints.policy_io import policy_config
from clbench.data.frames import FrameTable, SampleOrder, StreamFrames, concat, load_batches, select
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


def test_images_go_through_lerobot_with_and_without_workers(tmp_path: Path) -> None:
    root = make_toy_data(tmp_path / "images", ["hammer-v3", "push-v3"], episodes=2, length=6, images=True)
    tasks = [
        Task(n, TASKS[n], root, e, {"type": "metaworld", "task": n}, 10)
        for n, e in (("hammer-v3", (0, 1)), ("push-v3", (2, 3)))
    ]
    frames = StreamFrames([(t,) for t in tasks], POLICY)
    assert frames.decoded
    refs = [torch.tensor([[1, 3], [0, 11]]), torch.tensor([[0, 0], [1, 1]])]
    here = list(load_batches(frames, iter(refs), workers=0))
    there = list(load_batches(frames, iter(refs), workers=2))
    for a, b in zip(here, there, strict=True):
        assert a["task"] == b["task"]
        assert a["observation.images.top"].shape == (2, 3, 32, 32)
        assert torch.equal(a["observation.images.top"], b["observation.images.top"])
        assert torch.equal(a["action"], b["action"])
    assert here[0]["task"] == [TASKS["push-v3"], TASKS["hammer-v3"]]


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
