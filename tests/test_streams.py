"""Streams: order, repetition, transforms, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clbench.config.compose import compose
from clbench.config.schema import DatasetConfig
from clbench.errors import UserError
from clbench.streams.stream import build_stream, pretraining_data, pretraining_tasks, visit_order
from clbench.testing.toy import toy_config
from clbench.training.pretrain import base_folder


def dataset(toy_data: Path, **changes: Any) -> DatasetConfig:
    config = toy_config(toy_data, {"name": "seqfft"}).dataset
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def test_visits_follow_the_configured_order(toy_data: Path) -> None:
    stream = build_stream(dataset(toy_data))
    assert [v.task for v in stream.visits] == ["hammer-v3", "push-v3", "window-close-v3"]
    assert [t.episodes for t in stream.columns] == [(0, 1, 2), (3, 4, 5), (6, 7, 8)]
    assert stream.columns[1].instruction == "Push the puck to a goal"
    assert stream.columns[1].env == {"type": "metaworld", "task": "push-v3"}


def test_order_takes_names_and_indices_and_repeats(toy_data: Path) -> None:
    stream = build_stream(dataset(toy_data, task_order=[2, "hammer-v3", 2]))
    assert [v.task for v in stream.visits] == ["window-close-v3", "hammer-v3", "window-close-v3"]
    assert stream.columns[0].episodes == stream.columns[2].episodes


def test_revisits_can_see_fresh_demonstrations(toy_data: Path) -> None:
    stream = build_stream(dataset(toy_data, task_order=[0, 1, 0], fresh_on_revisit=True))
    assert stream.columns[0].episodes == (0, 2)
    assert stream.columns[2].episodes == (1,)
    with pytest.raises(ValueError, match="visited 4 times but has only 3"):
        build_stream(dataset(toy_data, task_order=[0, 0, 0, 0, 1], fresh_on_revisit=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_order": []}, "empty"),
        ({"tasks": []}, "empty"),
        ({"task_order": [0]}, "at least two"),
        ({"task_order": [0, 3]}, "indices 0 to 2"),
        ({"task_order": ["push-v2", 0]}, "Did you mean 'push-v3'"),
        ({"tasks": ["push-v3", "push-v3"]}, "more than once"),
        ({"tasks": ["push-v3", "shelf-place-v3"]}, "has no task 'shelf-place-v3'"),
        ({"data": "/nowhere/at/all"}, "clbench data make"),
    ],
)
def test_impossible_streams_are_refused(toy_data: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_stream(dataset(toy_data, **changes))


def test_joint_transform_has_one_visit_with_all_data(toy_data: Path) -> None:
    stream = build_stream(dataset(toy_data, task_order=[0, 1, 0], fresh_on_revisit=True)).joint()
    assert len(stream.visits) == 1 and stream.mode == "multitask"
    assert [(t.name, t.episodes) for t in stream.visits[0].tasks] == [("hammer-v3", (0, 1, 2)), ("push-v3", (3, 4, 5))]
    assert len(stream.columns) == 3


def test_pretraining_tasks_come_with_their_data_and_their_own_step_limit(toy_data: Path) -> None:
    config = dataset(toy_data)
    config.env.max_steps, config.pretrain.make.max_steps = 30, 70
    tasks, data = pretraining_tasks(config)
    assert [t.name for t in tasks] == ["reach-v3", "door-open-v3"]
    assert [t.max_steps for t in tasks] == [70, 70] and build_stream(config).columns[0].max_steps == 30
    assert len(data.fingerprint) == 64


@pytest.mark.parametrize("name", ["metaworld_quick", "metaworld_cw10", "metaworld_val"])
def test_shipped_streams_are_valid_and_disjoint_from_pretraining(name: str) -> None:
    from clbench.envs.making import family

    config, _ = compose(model="dit_dec_tiny", algorithms=["seqfft"], dataset=name)
    tasks = visit_order(config.dataset)
    assert config.dataset.pretrain is not None
    assert not set(tasks) & set(config.dataset.pretrain.tasks)
    assert set(tasks) | set(config.dataset.pretrain.tasks) <= set(family("metaworld").tasks())


def test_validation_stream_shares_nothing_with_the_reported_one() -> None:
    val, _ = compose(model="dit_dec_tiny", algorithms=["seqfft"], dataset="metaworld_val")
    for name in ("metaworld_quick", "metaworld_cw10"):
        reported, _ = compose(model="dit_dec_tiny", algorithms=["seqfft"], dataset=name)
        assert reported.dataset.pretrain is not None
        assert not set(val.dataset.tasks) & (set(reported.dataset.tasks) | set(reported.dataset.pretrain.tasks))


def test_cw10_is_continual_worlds_order() -> None:
    config, _ = compose(model="dit_dec_tiny", algorithms=["seqfft"], dataset="metaworld_cw10")
    assert [t.removesuffix("-v3") for t in config.dataset.tasks] == [
        "hammer", "push-wall", "faucet-close", "push-back", "stick-pull", "handle-press-side", "push", "shelf-place",
        "window-close", "peg-unplug-side",
    ]  # fmt: skip


def test_a_base_may_do_without_tasks_that_its_data_lack(toy_data: Path) -> None:
    config = dataset(toy_data)
    assert config.pretrain is not None
    whole = base_folder(toy_config(toy_data, {"name": "seqfft"}), pretraining_data(config))
    config.pretrain.tasks = ["door-open-v3", "drawer-open-v3", "reach-v3"]
    with pytest.raises(UserError, match="drawer-open-v3"):
        pretraining_data(config)
    config.pretrain.partial = True
    found = pretraining_data(config)
    assert list(found.tasks) == ["door-open-v3", "reach-v3"]
    assert found.description["tasks_left_out"] == ["drawer-open-v3"]
    run = toy_config(toy_data, {"name": "seqfft"})
    run.dataset = config
    other = base_folder(run, found)
    config.pretrain.tasks = ["door-open-v3", "reach-v3"]
    assert other == base_folder(run, pretraining_data(config)) != whole
    config.pretrain.tasks = ["drawer-open-v3"]
    with pytest.raises(UserError, match="drawer-open-v3"):
        pretraining_data(config)
