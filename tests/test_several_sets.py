"""Streams of several LeRobot sets from YAML alone: partitions, orders, names, weights, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from clbench import cli
from clbench.checkpoints.changes import changes
from clbench.config.compose import compose, override, read_config, to_yaml
from clbench.data.frames import StreamFrames, WeightedOrder
from clbench.errors import UserError
from clbench.io import read_json
from clbench.streams.stream import build_stream, pretraining_tasks, stream_tasks, visit_order
from clbench.testing import files, toy_config
from clbench.training.trainer import train
from tests.lab_sets import lab_config, make_lab_set

LEFT = ("move left", "move right", "move left", "move right", "move left")
RIGHT = ("Move left.", "open", "open")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets: `one` has two instructions; `two` shares one of them, worded differently, and has another."""
    root = tmp_path_factory.mktemp("lab")
    make_lab_set(root / "one", LEFT)
    make_lab_set(root / "two", RIGHT, names=("observation.robot", "action"))
    return root


RENAME = {"observation.robot": "observation.state"}


def composed(tmp_path: Path, mapping: dict[str, Any], *overrides: str, smoke: bool = False) -> Any:
    path = tmp_path / "lab.yaml"
    path.write_text(json.dumps(mapping))  # which is YAML, without aliases
    return compose(
        model="dit_dec_tiny", algorithms=["seqfft"], dataset=str(path), registered=["seqfft"],
        overrides=overrides, smoke=smoke,
    )[0]  # fmt: skip


def tasks_of(config: Any) -> dict[str, list[tuple[str, str, tuple[int, ...]]]]:
    """Task → its pieces: set, instruction, episodes."""
    stream = build_stream(config.dataset, sequential=False)
    return {t.name: [(p.root.name, p.instruction, p.episodes) for p in t.pieces] for t in stream.columns}


BY_TEXT = {
    "move left": [("one", "move left", (0, 2, 4)), ("two", "Move left.", (0,))],
    "move right": [("one", "move right", (1, 3))],
    "open": [("two", "open", (1, 2))],
}
BY_SET = {
    "one": [("one", "move left", (0, 2, 4)), ("one", "move right", (1, 3))],
    "two": [("two", "Move left.", (0,)), ("two", "open", (1, 2))],
}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, BY_TEXT),
        ({"partition": "by_task_index"}, BY_TEXT),
        ({"task_stream_mode": "by_dataset"}, BY_SET),
        ({"partition": "by_dataset", "task_order": [1, "one"]}, dict(reversed(BY_SET.items()))),
        ({"partition": "by_dataset", "num_tasks": 1}, {"one": BY_SET["one"]}),
        ({"tasks": ["open", "move left"]}, {"open": BY_TEXT["open"], "move left": BY_TEXT["move left"]}),
        ({"task_order": "1-2"}, {k: BY_TEXT[k] for k in ("move right", "open")}),
        ({"task_order": [2, "0-1"]}, {k: BY_TEXT[k] for k in ("open", "move left", "move right")}),
        ({"instructions": {"OPEN": "o"}, "task_order": ["o", 1]}, {
            "o": BY_TEXT["open"], "move right": BY_TEXT["move right"],
        }),
        ({"partition": "by_episodes", "tasks": ["0-2", "4-6"]}, {
            "0-2": [("one", "move left", (0, 2)), ("one", "move right", (1,))],
            "4-6": [("one", "move left", (4,)), ("two", "Move left.", (0,)), ("two", "open", (1,))],
        }),
        ({"partition": "by_episodes", "num_tasks": 2}, {
            "0-3": [("one", "move left", (0, 2)), ("one", "move right", (1, 3))],
            "4-7": [("one", "move left", (4,)), ("two", "Move left.", (0,)), ("two", "open", (1, 2))],
        }),
        ({"exclude_episodes": [[0, 1], [2]], "partition": "by_dataset"}, {
            "one": [("one", "move left", (2, 4)), ("one", "move right", (3,))],
            "two": [("two", "Move left.", (0,)), ("two", "open", (1,))],
        }),
    ],
)  # fmt: skip
def test_partitions(lab: Path, tmp_path: Path, settings: dict[str, Any], expected: dict[str, Any]) -> None:
    config = composed(tmp_path, lab_config(lab / "one", lab / "two", rename=RENAME, **settings))
    assert list(tasks_of(config).items()) == list(expected.items())


def test_other_ways_to_name_the_sets(lab: Path, tmp_path: Path) -> None:
    whole = build_stream(composed(tmp_path, lab_config(lab / "one", lab / "two", rename=RENAME)).dataset)
    one, two = {"data": str(lab / "one")}, {"data": str(lab / "two"), "rename": RENAME}
    listed = lab_config(sets=[one, two]) | {}
    del listed["dataset"]["data"]
    assert build_stream(composed(tmp_path, listed).dataset).fingerprint == whole.fingerprint
    mixed = lab_config(mixtures={"both": [one, two], "half": [one]}) | {}
    mixed["dataset"]["data"] = "both"
    config = composed(tmp_path, mixed)
    assert build_stream(config.dataset).fingerprint == whole.fingerprint and not config.dataset.mixtures
    half = composed(tmp_path, mixed, "dataset.data=half")
    assert list(tasks_of(half)) == ["move left", "move right"]
    named = composed(tmp_path, listed, f"dataset.sets=[{{data: {lab}/one, name: a}}, {{data: {lab}/two, name: b, "
                     "rename: {observation.robot: observation.state}}]", "dataset.partition=by_dataset")  # fmt: skip
    assert list(tasks_of(named)) == ["a", "b"]
    assert override(config, [f"dataset.data={lab}/one"]).dataset.sets == []


def test_a_list_of_one_is_that_set(lab: Path, tmp_path: Path) -> None:
    config = composed(tmp_path, lab_config(lab / "one", exclude_episodes=[[0]]))
    assert (config.dataset.data, config.dataset.sets) == (str(lab / "one"), [])
    assert config.dataset.exclude_episodes == [0]
    assert tasks_of(config) == {
        "move left": [("one", "move left", (2, 4))], "move right": [("one", "move right", (1, 3))],
    }  # fmt: skip
    named = composed(tmp_path, lab_config(lab / "one", tasks=["move left", "move right"], exclude_episodes=[0]))
    assert build_stream(named.dataset) == build_stream(config.dataset)


def test_auto_takes_sets_as_tasks_where_there_is_one_instruction(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_lab_set(tmp_path / name, ["tidy up"] * 2)
    config = composed(tmp_path, lab_config(tmp_path / "a", tmp_path / "b"))
    assert list(tasks_of(config)) == ["a", "b"]
    with pytest.raises(UserError, match="has one task"):
        build_stream(composed(tmp_path, lab_config(tmp_path / "a")).dataset)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tasks": ["open", "opne"]}, r"no task 'opne'\. Did you mean 'open'\?.*It has 3 tasks"),
        ({"task_order": "0-3"}, "index 3"),
        ({"task_order": ["2-0"]}, "goes down"),
        ({"num_tasks": 4}, "only 3 tasks"),
        ({"partition": "by_episodes"}, "needs tasks, ranges of episodes"),
        ({"partition": "by_episodes", "tasks": ["0-1", "0-8"]}, "from 0 to 7"),
        ({"partition": "by_episodes", "tasks": ["0-3", "3-6"]}, "'0-3' and '3-6' have episodes in common"),
        ({"partition": "by_episodes", "num_tasks": 9}, "only 8 episodes"),
        ({"partition": "by_dataset", "instructions": {"open": "o"}}, "the partition is by_dataset"),
        ({"exclude_episodes": [[0], [3]]}, r"dataset\.sets\[1\]\.exclude_episodes has 3"),
        ({"exclude_episodes": [[0, 1, 2, 3, 4], [0, 1, 2]]}, "no episodes that are not left out"),
        ({"rename": {**RENAME, "observation.arm": "observation.x"}}, "none of the data sets has a feature"),
        ({"rename": {}}, r"two has no observations"),
        ({"instructions": {"shut": "s"}}, "has no instruction 'shut'"),
        ({"instructions": {"open": "o", "move left": "o"}}, "two instructions the name 'o'"),
    ],
)
def test_what_cannot_be_is_one_message(lab: Path, tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    config = composed(tmp_path, lab_config(lab / "one", lab / "two", **{"rename": RENAME, **settings}))
    with pytest.raises(UserError, match=words):
        build_stream(config.dataset)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"exclude_episodes": [3]}, "give a list for each"),
        ({"exclude_episodes": [[3]]}, "has 1 lists, but there are 2 data sets"),
        ({"exclude_episodes": [[3], 2]}, "a list of lists"),
        ({"partition": "by_dateset"}, "must be one of auto, by_task_index"),
        ({"num_tasks": 0}, "num_tasks must be at least 1"),
        ({"repo_id": ["a/b"]}, "dataset.data has 2, dataset.repo_id has 1"),
        ({"env": {"type": "metaworld"}}, "several data sets are for streams without a simulator"),
        ({"partition": "by_dataset", "task_stream_mode": "by_dataset"}, "another name of dataset.partition"),
    ],
)
def test_settings_that_contradict_each_other(lab: Path, tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        composed(tmp_path, lab_config(lab / "one", lab / "two", **settings))


def test_sets_that_differ_are_named_with_both_shapes(lab: Path, tmp_path: Path) -> None:
    make_lab_set(tmp_path / "wide", ["open"] * 2, action=4, fps=20)
    both = r"one and .*wide cannot be.*frames a second: 10 and 20; action: \(3,\) and \(4,\)"
    with pytest.raises(UserError, match=both):
        build_stream(composed(tmp_path, lab_config(lab / "one", tmp_path / "wide")).dataset)
    with pytest.raises(UserError, match="twice"):
        build_stream(composed(tmp_path, lab_config(lab / "one", lab / "one")).dataset)


def test_weights_say_how_often_frames_are_drawn() -> None:
    order = WeightedOrder(torch.tensor([2.0] * 5 + [1.0] * 5 + [0.5] * 4), "key", 3)
    taken = order.take(0, 1000)
    for start, count in ((0, 10), (3, 50), (700, 33)):
        assert torch.equal(WeightedOrder(order.weights, "key", 3).take(start, count), taken[start : start + count])
    counts = torch.bincount(taken, minlength=14).double()
    epochs = 1000 / (5 * 1 + 5 * 0.5 + 4 * 0.25)
    assert ((counts - epochs * order.weights).abs() < 2.5).all()
    assert not torch.equal(WeightedOrder(order.weights, "key", 4).take(0, 1000), taken)


def run_config(lab: Path, tmp_path: Path, algorithm: str = "seqfft", *overrides: str) -> Any:
    mapping = lab_config(lab / "one", lab / "two", rename=RENAME)
    own = composed(tmp_path, mapping, *[o for o in overrides if o.startswith("dataset.")])
    config = toy_config(tmp_path, {"name": algorithm}, f"output_dir={tmp_path}",
                        *[o for o in overrides if not o.startswith("dataset.")])  # fmt: skip
    config.dataset = own.dataset
    return config


def test_a_run_over_several_sets_is_recorded_resumed_and_moved(lab: Path, tmp_path: Path) -> None:
    sets = tmp_path / "sets"
    shutil.copytree(lab, sets)
    config = run_config(sets, tmp_path, "er", "dataset.partition=by_dataset")
    folder = train(config, "r")
    manifest = read_json(folder / "manifest.json")
    assert [v["task"] for v in manifest["visits"]] == ["one", "two"]
    parts = [(p["instruction"], p["episodes"]) for p in manifest["visits"][1]["parts"]]
    assert parts == [("Move left.", 1), ("open", 2)]
    assert [d["name"] for d in manifest["data"]["sets"]] == ["one", "two"]
    assert read_config(folder / "config.yaml").dataset == config.dataset
    before = files(folder / "checkpoints")
    shutil.rmtree(folder / "checkpoints" / "task_01")
    shutil.move(sets, tmp_path / "elsewhere")
    moved = run_config(tmp_path / "elsewhere", tmp_path, "er", "dataset.partition=by_dataset")
    assert train(moved, "r", resume=True) == folder and files(folder / "checkpoints") == before
    moved.dataset.sets[1].exclude_episodes = [1]
    with pytest.raises(UserError, match=r"started with other settings: .*dataset\.sets \(was"):
        changes(folder, moved, build_stream(moved.dataset), ())


def test_each_frame_has_its_own_instruction_and_joint_training_weighs_sets(lab: Path, tmp_path: Path) -> None:
    config = run_config(lab, tmp_path, "multitask", "dataset.partition=by_dataset")
    config.dataset.sets[1].weight = 3.0
    stream = build_stream(config.dataset)
    assert [t.weight for t in stream.joint().visits[0].tasks] == [1.0, 1.0, 3.0, 3.0]
    assert len(stream_tasks(config.dataset)[0]) == 4
    from types import SimpleNamespace

    alone = SimpleNamespace(action_delta_indices=None, observation_delta_indices=None)
    frames = StreamFrames([v.tasks for v in stream.visits], alone)  # type: ignore[arg-type]
    refs = torch.tensor([[1, i] for i in range(frames.length(1))])
    assert frames.fetch(refs)["task"] == ["Move left."] * 6 + ["open"] * 12
    joint = StreamFrames([v.tasks for v in stream.joint().visits], alone)  # type: ignore[arg-type]
    assert isinstance(joint.order(0, 0), WeightedOrder) and not isinstance(frames.order(0, 0), WeightedOrder)
    train(config, "joint")


def test_smoke_leaves_a_stream_without_a_simulator(lab: Path, tmp_path: Path) -> None:
    config = composed(tmp_path, lab_config(lab / "one"), smoke=True)
    assert config.dataset.env is None and config.train.steps < 20
    assert "sets: []" in to_yaml(config) and visit_order(config.dataset) == ["move left", "move right"]


def test_data_check_lists_the_sets(lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lab.yaml"
    path.write_text(json.dumps(lab_config(lab / "one", lab / "two", rename=RENAME)))
    assert cli.main(["data", "check", str(path)]) == 0
    said = capsys.readouterr().out
    assert "stream lab: 2 data sets, by_task_index" in said and "observation.robot as observation.state" in said
    assert "4 episodes      24 frames  move left" in said


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ({"data": "one"}, "5 episodes are in the stream and in its base's data"),
        ({"sets": [{"data": "one"}], "tasks": ["move left"]}, "are in the stream and in its base's data"),
    ],
)
def test_a_base_does_not_learn_the_streams_episodes(
    lab: Path, tmp_path: Path, base: dict[str, Any], words: str
) -> None:
    """Those that are held out among them, and also where neither names its tasks."""
    placed = {k: str(lab / v) if k == "data" else v for k, v in base.items()}
    placed["sets"] = [{"data": str(lab / "one")}] if "sets" in base else []
    settings = {"rename": RENAME, "holdout": 0.25, "pretrain": placed}
    config = composed(tmp_path, lab_config(lab / "one", lab / "two", partition="by_dataset", **settings))
    with pytest.raises(UserError, match=words):
        pretraining_tasks(config.dataset)
