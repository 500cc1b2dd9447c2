"""Data sets that clbench did not make: local, and from a hub (a server on this machine's loopback stands for it)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lerobot.datasets import LeRobotDataset
from omegaconf import OmegaConf

import clbench.policies  # noqa: F401
from clbench import cli, registry
from clbench.checkpoints.policy_io import policy_config
from clbench.config.compose import to_config
from clbench.config.schema import Config, DatasetConfig, EnvConfig, PretrainDataConfig, RenderConfig
from clbench.data import hub
from clbench.data.frames import StreamFrames, load_batches, unpacked
from clbench.data.info import FORMAT, INFO_FILE
from clbench.data.lerobot_set import is_described
from clbench.data.matching import match_tasks, named_tasks, plain
from clbench.data.source import DataSource, _check_actions, fps_note, open_data
from clbench.envs.libero.tasks import suite_tasks, task_instruction
from clbench.envs.making import family
from clbench.errors import Interrupted, UserError
from clbench.io import read_json, write_json
from clbench.stopping import Stop
from clbench.streams.stream import Task, TaskStream, build_stream, pretraining_tasks, stream_data
from clbench.testing.same import assert_same_run
from clbench.testing.toy import make_toy_data
from clbench.training.pretrain import base_folder, base_key
from clbench.training.trainer import train
from tests.hub_sets import COMMIT, IMAGES, make_hub_set, served

ENV = "toy_cameras"
STOVE, DRAWER, BOWL = "turn_on_the_stove", "open_the_middle_drawer_of_the_cabinet", "put_the_bowl_on_the_stove"
GOALS = [BOWL, DRAWER, STOVE]
# In another order than the stream's, between tasks of other suites, and not written quite as the simulator does.
TEXTS = [
    "pick up the milk and place it in the basket",
    "Open the middle drawer of the cabinet.",
    "turn on  the stove",
    "put both moka pots on the stove",
    "put the bowl on the stove",
    "pick up the ketchup and place it in the basket",
]
BASE_TASKS = [
    "pick_up_the_milk_and_place_it_in_the_basket",
    "pick_up_the_ketchup_and_place_it_in_the_basket",
]
REPO = "someone/libero_goal"
POLICY = policy_config({"type": "dit_dec", "chunk_size": 4, "n_action_steps": 2}, "cpu")


@pytest.fixture(scope="module", autouse=True)
def _cameras() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.OWN["simulators"], ENV, "tests.camera_tasks:CameraTasks")
        yield


@pytest.fixture(scope="module")
def image_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hub_set(tmp_path_factory.mktemp("sets") / "images", TEXTS)


@pytest.fixture(scope="module")
def video_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the sets whose second camera is called wrist_image; one feature more, one file."""
    names = ("observation.images.image", "observation.images.wrist_image")
    root = tmp_path_factory.mktemp("sets") / "videos"
    return make_hub_set(root, TEXTS[1:3], images=names, videos=True, file_mb=100, extra=True)


@pytest.fixture
def copied(image_set: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(image_set, tmp_path / "set"))


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Let the hub's client, which tests keep offline, speak to one address; its cache is a temporary folder."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    def go(url: str) -> None:
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))  # between its tries
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path / "lerobot"))
    return go


def goals(data: Path | str = "", **changes: Any) -> DatasetConfig:
    config = DatasetConfig(name="goals", data=str(data), env=EnvConfig(ENV, 10), tasks=GOALS)
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def hub_goals(**changes: Any) -> DatasetConfig:
    return goals(**{"data": "goals", "repo_id": REPO, **changes})


# ---------------------------------------------------------------------------------------------- matching


def test_a_local_set_becomes_a_stream(image_set: Path) -> None:
    stream = build_stream(goals(image_set))
    assert [(t.name, t.task_index, t.text, t.episodes, t.frames) for t in stream.columns] == [
        (BOWL, 4, "put the bowl on the stove", (4, 10), 10),
        (DRAWER, 1, "Open the middle drawer of the cabinet.", (1, 7), 10),
        (STOVE, 2, "turn on  the stove", (2, 8), 10),
    ]
    assert [t.instruction for t in stream.columns] == [task_instruction(t) for t in GOALS]  # what evaluation says, too
    assert stream.columns[0].features == {k: k for k in (*IMAGES, "observation.state", "action")}
    d = stream.data
    assert (d["kind"], d["fps"], d["simulator_steps_per_second"]) == ("lerobot", 10.0, 20.0)
    assert (d["tasks_unused"], d["episodes_unused"]) == (3, 6)
    assert d["fingerprint"] == stream.fingerprint and len(stream.fingerprint) == 64


def test_only_case_white_space_and_a_full_stop_are_overlooked() -> None:
    assert plain("  Turn ON the\tstove. ") == "turn on the stove"
    assert plain("turn on the stove!") != "turn on the stove" != plain("turn-on the stove")


def matched(tasks: list[str], texts: list[str], counts: dict[int, int] | None = None) -> dict[str, int]:
    numbered = dict(enumerate(texts))
    return match_tasks(ENV, tasks, numbered, counts or dict.fromkeys(numbered, 1))


def test_everything_wrong_with_a_match_is_in_one_message() -> None:
    drawer = "open the middle drawer of the cabinet"
    texts = ["turn on the stove", "Turn on the stove", "put the bowl on the stoves", drawer]
    with pytest.raises(UserError) as e:
        matched(GOALS, texts, {0: 1, 1: 1, 2: 1, 3: 0})
    message = str(e.value)
    assert "0 of 3 match" in message
    assert f'{BOWL}: "put the bowl on the stove" is missing (nearest: "put the bowl on the stoves"' in message
    assert f'{STOVE}: several tasks of the data have its instruction: 0 ("turn on the stove"), 1' in message
    assert f'{DRAWER}: "{drawer}" has no episodes' in message
    assert "The data has 4 tasks" in message


def test_a_stream_goes_without_tasks_that_a_set_has_not(image_set: Path) -> None:
    """What the message says is what to say: for the stream, and for the base."""
    rack = "put_the_wine_bottle_on_the_rack"
    config = goals(image_set, tasks=[BOWL, rack, DRAWER, STOVE], task_order=[STOVE, rack, BOWL])
    with pytest.raises(UserError, match=rf"2 of 3 match, but: {rack}.* -- 'dataset\.task_order=\[3,0\]'$"):
        build_stream(config)
    config.task_order = [3, 0]
    assert [v.task for v in build_stream(config).visits] == [STOVE, BOWL]

    config.pretrain = PretrainDataConfig(data=str(image_set), tasks=[rack, DRAWER])
    with pytest.raises(UserError, match=rf" -- 'dataset\.pretrain\.tasks=\[{DRAWER}\]'$"):
        pretraining_tasks(config)
    config.pretrain.tasks = [rack]
    with pytest.raises(UserError, match=r"or leave those tasks out\.$"):
        pretraining_tasks(config)


def test_an_instruction_of_several_scenes_is_refused() -> None:
    scenes = ["KITCHEN_SCENE1_open_the_top_drawer_of_the_cabinet", "KITCHEN_SCENE2_open_the_top_drawer_of_the_cabinet"]
    with pytest.raises(UserError, match="also the instruction of KITCHEN_SCENE2_open_the_top_drawer_of_the_cabinet"):
        matched(scenes[:1], ["open the top drawer of the cabinet"])
    with pytest.raises(UserError, match="0 of 2 match"):
        matched(scenes, ["open the top drawer of the cabinet"])


def test_which_scene_is_meant_depends_on_the_suites_that_a_set_holds() -> None:
    """The instruction "turn on the stove" is in libero_goal and twice in libero_90: clear where libero_90 is not."""
    suites = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
    four = [task_instruction(t) for suite in suites for t in suite_tasks(suite)]
    for suite in suites:
        found = matched(suite_tasks(suite), four)
        assert [four[i] for i in found.values()] == [task_instruction(t) for t in suite_tasks(suite)]
        assert len(set(found.values())) == 10
    with pytest.raises(UserError, match="KITCHEN_SCENE3_turn_on_the_stove"):
        matched([STOVE], [*four, "close the microwave"])


@pytest.mark.parametrize("env_type", [t for t in registry.OWN["simulators"] if t.startswith("libero")])
def test_libero_says_its_suites_and_its_gripper(env_type: str) -> None:
    assert family(env_type).suite_of(STOVE) == "libero_goal"
    assert family(env_type).gripper_command([STOVE]) == -1
    assert family("metaworld").suite_of("push-v3") == ""


# ---------------------------------------------------------------------------------------------- samples


def whole(root: Path, deltas: dict[str, list[int]]) -> LeRobotDataset:
    seconds = {k: [d / 10 for d in v] for k, v in deltas.items()}
    return LeRobotDataset(root.name, root=root, delta_timestamps=seconds)


BOTH = pytest.mark.parametrize("cache_gb", [0, 1], ids=["decoded again", "kept decoded"])


@BOTH
@pytest.mark.parametrize("episodes", [(4, 10), (10, 4), (7, 1, 9)], ids=str)
def test_samples_are_those_of_the_whole_set(image_set: Path, episodes: tuple[int, ...], cache_gb: int) -> None:
    """Also from episodes that are not sorted or not beside each other, with histories and chunks."""
    task = replace(build_stream(goals(image_set)).columns[0], episodes=episodes)
    frames = StreamFrames([(task,)], POLICY, cache_gb)
    part = frames.parts(0)[0]
    part.deltas = {"observation.state": [-1, 0], IMAGES[0]: [-2, 0], "action": [0, 1, 2, 3]}
    reference = whole(image_set, part.deltas)
    assert part.decoded == (cache_gb == 0) and len(part) == 5 * len(episodes)
    assert part.episode_of.tolist() == [n for n in range(len(episodes)) for _ in range(5)]
    batch = unpacked(frames.fetch(torch.tensor([[0, i] for i in range(len(part))])))
    for i in range(len(part)):
        item = reference[episodes[i // 5] * 5 + i % 5]
        assert int(batch["episode_index"][i]) == episodes[i // 5]
        for key in item.keys() - {"task"}:
            assert torch.equal(batch[key][i], item[key]), (key, i)
        assert batch["task"][i] == task.instruction
    assert batch.keys() == item.keys()
    assert batch["action_is_pad"].any() and batch[f"{IMAGES[0]}_is_pad"].any()


@BOTH
def test_renamed_videos(video_set: Path, cache_gb: int) -> None:
    rename = {"observation.images.wrist_image": IMAGES[1]}
    stream = build_stream(goals(video_set, tasks=[STOVE, DRAWER], rename=rename))
    assert stream.data["features"]["observation.images.wrist_image"] == IMAGES[1]
    assert "observation.states.joint_state" in stream.data["features_unused"]
    frames = StreamFrames([v.tasks for v in stream.visits], POLICY, cache_gb)
    part = frames.parts(0)[0]
    assert set(part.features) >= {*IMAGES, "observation.state", "action"}
    assert "observation.states.joint_state" not in part.features
    refs = torch.tensor([[0, 7], [1, 0], [0, 1]])
    batch = unpacked(frames.fetch(refs))
    reference = whole(video_set, {"action": [0, 1, 2, 3]})
    for row, i in enumerate((3 * 5 + 2, 0, 1 * 5 + 1)):  # the stove's episodes are 1 and 3, the drawer's 0 and 2
        item = reference[i]
        assert torch.equal(batch[IMAGES[1]][row], item["observation.images.wrist_image"])
        for key in (IMAGES[0], "observation.state", "action", "action_is_pad", "index", "task_index"):
            assert torch.equal(batch[key][row], item[key]), key
    assert not any("wrist" in key or "joint" in key for key in batch)


def test_loader_workers_read_the_same(image_set: Path) -> None:
    frames = StreamFrames([v.tasks for v in build_stream(goals(image_set)).visits], POLICY, cache_gb=0)
    refs = [torch.tensor([[2, 3], [0, 9]]), torch.tensor([[1, 0], [1, 5], [0, 4]])]
    here = list(load_batches(frames, iter(refs), workers=0))
    there = list(load_batches(frames, iter(refs), workers=2))
    for a, b in zip(here, there, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)


def test_a_sample_is_counted_without_what_is_not_used(image_set: Path, video_set: Path) -> None:
    image = StreamFrames([v.tasks for v in build_stream(goals(image_set)).visits], POLICY).parts(0)[0]
    rename = {"observation.images.wrist_image": IMAGES[1]}
    config = goals(video_set, tasks=[STOVE, DRAWER], rename=rename)
    video = StreamFrames([v.tasks for v in build_stream(config).visits], POLICY).parts(0)[0]
    assert image.sample_bytes() == video.sample_bytes() == 2 * 16 * 16 * 3 + 4 * 8 + 4 * 7 * 4


# ---------------------------------------------------------------------------------------------- the hub


def test_only_what_the_stream_needs_is_fetched_and_only_once(
    image_set: Path, online: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with served({REPO: image_set}) as (url, asked):
        online(url)
        stream = build_stream(hub_goals())
        said = capsys.readouterr().err
        assert f"fetching the description (meta/) of {REPO}, revision v3.0" in said
        assert "fetching 6 files (0.1 MB)" in said  # one file an episode; three tasks with two episodes each
        assert f"of {REPO} from the hub into" in said
        asked.clear()
        again = build_stream(hub_goals())
        assert asked == [] and capsys.readouterr().err == ""
    root = stream.columns[0].root
    assert len(list((root / "data").rglob("*.parquet"))) == 6 < len(list((image_set / "data").rglob("*.parquet"))) == 12
    assert root.is_relative_to(hub.cache_folder()) and root.name == COMMIT
    d = stream.data
    assert (d["kind"], d["repo_id"], d["revision"], d["commit"]) == ("hub", REPO, "v3.0", COMMIT)
    assert stream.fingerprint == again.fingerprint == build_stream(goals(image_set)).fingerprint
    frames = StreamFrames([v.tasks for v in stream.visits], POLICY)  # of a part of the files
    batch = unpacked(frames.fetch(torch.tensor([[0, 7], [2, 0]])))
    reference = whole(image_set, {"action": [0, 1, 2, 3]})
    for row, i in enumerate((10 * 5 + 2, 2 * 5)):
        assert all(torch.equal(batch[k][row], v) for k, v in reference[i].items() if k != "task")


def test_what_is_in_lerobots_cache_needs_no_network(
    image_set: Path, online: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """And what is missing of it is fetched at the commit that the rest has."""
    with served({REPO: image_set}) as (url, _):
        online(url)
        first = build_stream(hub_goals())
    online("http://127.0.0.1:9")
    assert build_stream(hub_goals()).fingerprint == first.fingerprint
    assert build_stream(hub_goals(revision=COMMIT)).fingerprint == first.fingerprint
    missing = sorted((first.columns[0].root / "data").rglob("*.parquet"))[2]
    missing.unlink()
    with pytest.raises(UserError, match=f"{REPO} .* not complete on this machine and the hub cannot be reached"):
        build_stream(hub_goals())
    with served({REPO: image_set}) as (url, _):
        online(url)
        capsys.readouterr()
        assert build_stream(hub_goals()).fingerprint == first.fingerprint
        assert "fetching 1 files" in capsys.readouterr().err


@pytest.mark.parametrize("left", [("info.json",), ("info.json", "tasks.parquet"), ("tasks.parquet",), ()], ids=str)
@pytest.mark.parametrize("own_folder", [False, True])
def test_a_first_fetch_that_was_interrupted_goes_on(
    image_set: Path, online: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, left: tuple[str, ...], own_folder: bool,
) -> None:  # fmt: skip
    """Killed within meta/, of which only `left` had come."""
    import huggingface_hub

    whole = huggingface_hub.snapshot_download

    def interrupted(*a: Any, **options: Any) -> str:
        if not options.get("local_files_only"):
            options["allow_patterns"] = [f"meta/{name}" for name in left] or "none"
            whole(*a, **options)
            raise KeyboardInterrupt
        return whole(*a, **options)

    name = stream_file(tmp_path)
    folder = [f"dataset.data={tmp_path / 'kept'}"] if own_folder else []
    command = ["data", "check", name, "--", f"dataset.repo_id={REPO}", *folder]
    with served({REPO: image_set}) as (url, _):
        online(url)
        with monkeypatch.context() as patch:
            patch.setattr(huggingface_hub, "snapshot_download", interrupted)
            assert cli.main(command) == 130
        cache = tmp_path / "lerobot"
        if cache.exists():  # under another name, so that the hub's client knows no list of its files, as older ones do
            for listing in list(cache.rglob("trees")):
                shutil.rmtree(listing)
            monkeypatch.setenv("HF_LEROBOT_HOME", str(cache.rename(tmp_path / "later")))
        online("http://127.0.0.1:9")
        assert cli.main(command) == 2
        assert "not complete on this machine and the hub cannot be reached" in capsys.readouterr().err
        online(url)
        assert cli.main(command) == 0
    shown = capsys.readouterr()
    assert "fetching the description" in shown.err and "fetching 6 files" in shown.err
    assert f"fingerprint {build_stream(goals(image_set)).fingerprint}" in shown.out


def test_a_description_in_several_files_is_whole_with_all_of_them(copied: Path) -> None:
    assert is_described(copied)
    files = sorted((copied / "meta/episodes").rglob("*.parquet"))
    assert len(files) > 1
    for file in files:
        content = file.read_bytes()
        file.unlink()
        assert not is_described(copied), f"{file.name} has not come"
        file.write_bytes(content)
    assert is_described(copied)
    for damaged in ("{", '{"codebase_version": "v2.1"}', "[]"):  # to be said, not to be fetched again
        (copied / "meta/info.json").write_text(damaged)
        assert is_described(copied), damaged


def test_the_cache_is_lerobots() -> None:
    from lerobot.utils.constants import HF_LEROBOT_HUB_CACHE

    assert hub.cache_folder() == HF_LEROBOT_HUB_CACHE


def test_a_folder_of_ones_own(image_set: Path, online: Callable[[str], None], tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    with served({REPO: image_set}, tags=("v3.0", "later")) as (url, asked):
        online(url)
        stream = build_stream(hub_goals(data=str(kept)))
        assert stream.columns[0].root == kept
        assert stream.data["commit"] == COMMIT and not hub.cache_folder().exists()
        asked.clear()
        assert build_stream(hub_goals(data=str(kept))).fingerprint == stream.fingerprint and asked == []
        with pytest.raises(UserError, match="not someone/libero_goal at later"):
            build_stream(hub_goals(data=str(kept), revision="later"))
        with pytest.raises(UserError, match="not empty and is not a copy of"):
            build_stream(hub_goals(data=str(image_set)))
        made = make_toy_data(tmp_path / "made", ["push-v3"], episodes=1, length=3)
        with pytest.raises(UserError, match="holds a data set that clbench made"):
            build_stream(hub_goals(data=str(made)))


@pytest.mark.slow
def test_videos_of_the_hub_in_a_folder(video_set: Path, online: Callable[[str], None], tmp_path: Path) -> None:
    rename = {"observation.images.wrist_image": IMAGES[1]}
    with served({REPO: video_set}) as (url, _):
        online(url)
        stream = build_stream(hub_goals(data=str(tmp_path / "kept"), tasks=[STOVE, DRAWER], rename=rename))
    online("http://127.0.0.1:9")
    batch = unpacked(StreamFrames([v.tasks for v in stream.visits], POLICY).fetch(torch.tensor([[0, 7]])))
    item = whole(video_set, {"action": [0, 1, 2, 3]})[3 * 5 + 2]
    assert torch.equal(batch[IMAGES[1]][0], item["observation.images.wrist_image"])
    next((tmp_path / "kept" / "videos").rglob("*.mp4")).unlink()
    with pytest.raises(UserError, match="not complete on this machine"):
        build_stream(hub_goals(data=str(tmp_path / "kept"), tasks=[STOVE, DRAWER], rename=rename))


@pytest.mark.parametrize(
    ("repos", "tags", "revision", "message"),
    [
        ({}, ("v3.0",), None, "no data set someone/libero_goal, or it is private"),
        ({REPO: 403}, ("v3.0",), None, "accepted its terms"),
        ({REPO: 500}, ("v3.0",), None, "the hub cannot be reached"),
        ({REPO: "set"}, ("v2.0", "v2.1"), None, r"no tag v3.0.* It has v2.0, v2.1\..*convert_dataset_v21_to_v30"),
        ({REPO: "set"}, ("v3.0",), "v9", "no revision 'v9'. It has v3.0"),
    ],
    ids=["missing", "gated", "down", "old", "revision"],
)
def test_what_the_hub_refuses(
    image_set: Path, online: Callable[[str], None], repos: dict[str, Any], tags: Any, revision: Any, message: str
) -> None:
    with served({r: image_set if v == "set" else v for r, v in repos.items()}, tags) as (url, _):
        online(url)
        with pytest.raises(UserError, match=message):
            build_stream(hub_goals(revision=revision))


def test_a_hub_that_lacks_a_file_of_its_set(copied: Path, online: Callable[[str], None]) -> None:
    sorted((copied / "data").rglob("*.parquet"))[4].unlink()
    with served({REPO: copied}) as (url, _):
        online(url)
        with pytest.raises(UserError, match=r"lacks data/chunk-000/file-004\.parquet, which its own"):
            build_stream(hub_goals())


def test_an_interrupted_fetch_goes_on(
    image_set: Path, online: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the cache and in a folder: after the description is half there, and between description and data."""
    import huggingface_hub

    real = huggingface_hub.snapshot_download

    def half(*args: Any, **kwargs: Any) -> str:
        if kwargs.get("local_files_only"):
            return str(real(*args, **kwargs))
        real(*args, **{**kwargs, "allow_patterns": ["meta/info.json"]})
        raise KeyboardInterrupt

    for data in ("goals", str(tmp_path / "own")):
        with served({REPO: image_set}) as (url, _):
            online(url)
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(huggingface_hub, "snapshot_download", half)
                build_stream(hub_goals(data=data))
            hub.fetch_description(REPO, None, None if data == "goals" else Path(data))
            assert build_stream(hub_goals(data=data)).fingerprint


def test_offline_for_real(tmp_path: Path) -> None:
    """The hub's own client, told to stay offline and with nothing in its cache: one line, exit status 2, no torch."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_LEROBOT_HOME": str(tmp_path), "PYTHONPATH": os.getcwd()}
    code = "import sys, clbench.cli as c; s = c.main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(s)"
    arguments = ["train", "--algo", "er", "--dataset", "libero_goal_state", "--", "dataset.repo_id=someone/libero",
                 "dataset.pretrain.repo_id=someone/libero"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("clbench: someone/libero (revision v3.0) is not complete on this machine and the hub cannot")
    assert "HF_HUB_OFFLINE" in last and "clbench data make" in last


# ---------------------------------------------------------------------------------------------- what is refused


def edit_info(root: Path, **changes: Any) -> None:
    write_json(root / "meta" / "info.json", read_json(root / "meta" / "info.json") | changes)


def edit_feature(root: Path, name: str, **changes: Any) -> None:
    features = read_json(root / "meta" / "info.json")["features"]
    features[name] |= changes
    edit_info(root, features=features)


def edit_column(root: Path, number: int, name: str, change: Callable[[Any], Any]) -> None:
    path = root / "data" / "chunk-000" / f"file-{number:03d}.parquet"
    table = pq.read_table(path)
    place = table.column_names.index(name)
    values = pa.array(change(table[name].to_pylist()), type=table.schema.field(name).type)
    pq.write_table(table.set_column(place, table.schema.field(name), values), path)


def drop_feature(root: Path, name: str) -> None:
    features = read_json(root / "meta" / "info.json")["features"]
    del features[name]
    edit_info(root, features=features)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


FILE = "data/chunk-000/file-001.parquet"
WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "old format": (lambda r: edit_info(r, codebase_version="v2.1"), "format v2.1; clbench reads v3. Convert it"),
    "new format": (lambda r: edit_info(r, codebase_version="v4.0"), "format v4.0; clbench reads v3. Use a newer"),
    "no version": (lambda r: write_json(r / "meta/info.json", {}), "no 'codebase_version'"),
    "paths": (lambda r: edit_info(r, data_path="../{chunk_index}.parquet"), "data_path"),
    "no state": (lambda r: drop_feature(r, "observation.state"), "observation.state is missing"),
    "no action": (lambda r: drop_feature(r, "action"), "action is missing"),
    "no camera": (lambda r: drop_feature(r, IMAGES[1]), "image2 is missing.*dataset.rename="),
    "state's shape": (lambda r: edit_feature(r, "observation.state", shape=[9]), r"is float32 \(9,\), not .*\(8,\)"),
    "state's type": (lambda r: edit_feature(r, "observation.state", dtype="int64"), "is int64"),
    "camera's type": (lambda r: edit_feature(r, IMAGES[0], dtype="float32"), "not square images"),
    "feature's name": (lambda r: edit_info(r, features={"../x": {"dtype": "video", "shape": [1]}}), "is not a feature"),
    "no file": (lambda r: (r / FILE).unlink(), "1 of the files that this stream needs are missing, e.g. " + FILE),
    "empty file": (lambda r: (r / FILE).write_bytes(b""), "missing, e.g. " + FILE),
    "cut file": (lambda r: cut(r / FILE), "is damaged"),
    "no tasks": (lambda r: (r / "meta/tasks.parquet").unlink(), "meta/tasks.parquet is missing"),
    "cut tasks": (lambda r: cut(r / "meta/tasks.parquet"), "is damaged"),
    "no episodes": (lambda r: shutil.rmtree(r / "meta/episodes"), "meta/episodes is missing"),
    "fewer episodes": (lambda r: edit_info(r, total_episodes=13), "states 13 episodes"),
    "no description": (lambda r: (r / "meta/info.json").unlink(), "not a complete data set"),
    "frames": (lambda r: edit_column(r, 1, "index", lambda v: [n + 1 for n in v]), "frames of episode 1 are not those"),
    "tasks of frames": (lambda r: edit_column(r, 1, "task_index", lambda v: [0] * len(v)), "1 have other tasks"),
    "not finite": (
        lambda r: edit_column(r, 1, "observation.state", lambda v: [[float("nan")] * 8] * len(v)), "not finite"
    ),
    "poses": (
        lambda r: edit_column(r, 1, "action", lambda v: [[2.5, *a[1:]] for a in v]), "go from -1 to 2.5.* takes"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_sets_are_refused(copied: Path, what: str) -> None:
    change, message = WRONG[what]
    change(copied)
    with pytest.raises(UserError, match=message):
        build_stream(goals(copied))


def test_what_no_task_of_the_stream_needs_may_be_missing(copied: Path) -> None:
    fingerprint = build_stream(goals(copied)).fingerprint
    (copied / "data/chunk-000/file-000.parquet").unlink()
    assert build_stream(goals(copied)).fingerprint == fingerprint


def test_statistics_are_not_needed(copied: Path) -> None:
    """clbench computes those it uses from the pretraining tasks' frames."""
    (copied / "meta/stats.json").unlink()
    stream = build_stream(goals(copied))
    StreamFrames([v.tasks for v in stream.visits], POLICY).fetch(torch.tensor([[0, 0]]))


def test_a_gripper_that_counts_otherwise(tmp_path: Path) -> None:
    root = make_hub_set(tmp_path / "set", TEXTS[1:3], episodes=1, images=(), state=89, gripper=(0.0, 1.0))
    config = goals(root, env=EnvConfig("libero_state", 10), tasks=[STOVE, DRAWER])
    with pytest.raises(UserError, match="from 0 to 1 and never opens: the simulator 'libero_state' opens it at -1"):
        build_stream(config)


@pytest.mark.parametrize("type_and_task", [("metaworld", "shelf-place-v3"), ("libero", STOVE), ("libero_state", STOVE)])
def test_a_gripper_that_counts_otherwise_on_every_simulator(
    type_and_task: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the simulator itself is in another interpreter."""
    monkeypatch.setenv("LIBERO_PYTHON", sys.executable)
    env_type, task = type_and_task
    low, high = -np.ones(4), np.ones(4)
    _check_actions(Path("set"), env_type, [task], low, high)
    low[-1] = 0
    with pytest.raises(UserError, match="goes from 0 to 1 and never opens"):
        _check_actions(Path("set"), env_type, ["push-v3", task] if env_type == "metaworld" else [task], low, high)
    _check_actions(Path("set"), "metaworld", ["push-v3", "door-open-v3"], low, high)  # whose expert never opens it


def test_images_count_as_drawn_in_full(image_set: Path) -> None:
    full = {"fidelity": "full", "size": 16}
    assert open_data(goals(image_set), ENV, [STOVE], stream="s").render == full
    assert [t.env["render"] for t in build_stream(goals(image_set), render=RenderConfig()).columns] == [full] * 3
    with pytest.raises(UserError, match="were drawn full at 16 pixels, but the simulator would draw them fast at 16"):
        build_stream(goals(image_set), render=RenderConfig(fidelity="fast"))


def test_images_whose_channels_come_first(copied: Path) -> None:
    for name in IMAGES:
        edit_feature(copied, name, shape=[3, 16, 16], names=["channel", "height", "width"])
    part = StreamFrames([build_stream(goals(copied)).visits[0].tasks], POLICY).parts(0)[0]
    assert part.features[IMAGES[0]]["shape"] == (16, 16, 3)


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ({"observation.images.wrist": IMAGES[1]}, "no feature 'observation.images.wrist'"),
        ({IMAGES[0]: IMAGES[1]}, "two features observation.images.image2"),
    ],
)
def test_wrong_renames(image_set: Path, rename: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_stream(goals(image_set, rename=rename))


def test_an_episode_with_several_tasks_is_refused(copied: Path) -> None:
    path = sorted((copied / "meta/episodes").rglob("*.parquet"))[0]
    table = pq.read_table(path)
    texts = table["tasks"].to_pylist()
    texts[4] = [*texts[4], "turn on  the stove"]
    place = table.column_names.index("tasks")
    pq.write_table(table.set_column(place, "tasks", pa.array(texts)), path)
    with pytest.raises(UserError, match=r"episode 4 .* has several instructions"):
        build_stream(goals(copied))


def test_the_fingerprint_is_of_what_is_learned_from(copied: Path, tmp_path: Path) -> None:
    first = build_stream(goals(copied)).fingerprint
    other = build_stream(goals(copied, task_order=[2, 0, 1])).fingerprint
    fewer = build_stream(goals(copied, task_order=[0, 1])).fingerprint
    assert first == other != fewer
    edit_column(copied, 0, "observation.state", lambda v: [[0.5] * 8] * len(v))  # a task that is not used
    assert build_stream(goals(copied)).fingerprint == first
    edit_column(copied, 1, "observation.state", lambda v: [[*s[:7], s[7] + 1e-6] for s in v])
    assert build_stream(goals(copied)).fingerprint != first
    moved = Path(shutil.move(copied, tmp_path / "elsewhere"))
    assert build_stream(goals(moved)).fingerprint != first


def test_neither_data_nor_hub(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError) as e:
        build_stream(goals("libero_goal", name="libero_goal", env=EnvConfig("libero", 10)))
    assert "clbench data make libero_goal" in str(e.value)
    assert "-- dataset.repo_id=HuggingFaceVLA/libero" in str(e.value)
    assert cli.main(["train", "--algo", "er", "--dataset", "libero_goal_state"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "libero_goal_state. Make it with: clbench data make libero_goal_state" in said
    assert "repo_id" not in said  # no hub has such states


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset.repo_id=libero"], "must be OWNER/NAME"),
        (["dataset.revision=main"], "dataset.revision belongs to dataset.repo_id"),
        (["dataset.pretrain.revision=main"], "dataset.pretrain.revision belongs to"),
        (["dataset.rename={a: c, b: c}"], "gives several features the name c"),
        (["dataset.data=''"], "dataset.data .* is missing"),
    ],
)
def test_wrong_settings(capsys: pytest.CaptureFixture[str], overrides: list[str], message: str) -> None:
    assert cli.main(["train", "--algo", "er", "--dataset", "libero_goal_state", "--", *overrides]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_bases_data_are_missed_before_the_streams_are_fetched(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--algo", "er", "--dataset", "libero_goal_state", "--", f"dataset.repo_id={REPO}"]) == 2
    said = capsys.readouterr().err
    assert "fetching" not in said and f"clbench data make libero_goal_state -- dataset.repo_id={REPO}" in said


def record_as_made(root: Path, tasks: list[str], fidelity: str, size: int) -> Path:
    """What clbench writes beside a set that it made, as far as it says how images were drawn."""
    rates = {"expert_attempts": 0, "expert_successes": 0, "expert_success_rate": None, "demo_attempts": 2,
             "demo_successes": 2, "demo_success_rate": 1.0}  # fmt: skip
    described = [
        {"name": t, "instruction": task_instruction(t), "task_index": i, "episodes": [i], "frames": 5, **rates}
        for i, t in enumerate(tasks)
    ]
    record = {"format": FORMAT, "name": root.name, "env_type": ENV, "seed": 0, "action_noise": 0.1, "tail_steps": 10,
              "max_steps": 10, "demos_per_task": 1, "ceiling_episodes": 0, "tasks": described, "fingerprint": "f",
              "versions": {}, "render": {"fidelity": fidelity, "size": size}}  # fmt: skip
    write_json(root / INFO_FILE, record)
    return root


@pytest.mark.parametrize("command", [["train", "--algo", "er", "--dataset"], ["data", "check"]], ids=" ".join)
@pytest.mark.parametrize(
    ("drawn", "overrides", "message"),
    [
        (("full", 32), [], r"base's tasks in .* were drawn full at 32 pixels, those of the stream in .* full at 16"),
        (("fast", 16), [], r"were drawn fast at 16 .* goals -- dataset.repo_id=.* render.fidelity=full render.size=16"),
        (("full", 16), ["render.fidelity=fast"], "were drawn full at 16 pixels, but .* draw them fast at 16"),
        (("full", 16), ["render.size=64"], "were drawn full at 16 pixels, but .* draw them full at 64"),
    ],
)
def test_other_images_are_refused_before_the_frames_are_fetched(
    image_set: Path, tmp_path: Path, online: Callable[[str], None], capsys: pytest.CaptureFixture[str],
    command: list[str], drawn: tuple[str, int], overrides: list[str], message: str,
) -> None:  # fmt: skip
    made = record_as_made(tmp_path / "made", BASE_TASKS, *drawn)
    name = stream_file(tmp_path, pretrain={"data": str(made), "tasks": BASE_TASKS})
    with served({REPO: image_set}) as (url, asked):
        online(url)
        assert cli.main([*command, name, "--", f"dataset.repo_id={REPO}", *overrides]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert "fetching the description" in said or overrides  # the base alone may show it
    assert "/data/" not in "".join(asked) and not any((tmp_path / "lerobot").rglob("data"))


def test_a_base_of_the_hub_with_other_images_is_refused_before_any_frames_are_fetched(
    image_set: Path, copied: Path, tmp_path: Path, online: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    for camera in IMAGES:
        edit_feature(copied, camera, shape=[32, 32, 3])
    name = stream_file(tmp_path, repo_id=REPO, pretrain={"repo_id": "someone/other", "tasks": BASE_TASKS})
    with served({REPO: image_set, "someone/other": copied}) as (url, asked):
        online(url)
        assert cli.main(["train", "--algo", "er", "--dataset", name]) == 2
    said = capsys.readouterr().err
    assert "were drawn full at 32 pixels, those of the stream" in said and "clbench data make" not in said
    assert "/data/" not in "".join(asked)


def test_episodes_are_left_out(image_set: Path, toy_data: Path, copied: Path) -> None:
    whole_stream = build_stream(goals(image_set))
    stream = build_stream(goals(image_set, exclude_episodes=[10, 1, 0]))
    assert [(t.episodes, t.frames) for t in stream.columns] == [((4,), 5), ((7,), 5), ((2, 8), 10)]
    assert stream.data["episodes_excluded"] == [0, 1, 10] and "episodes_excluded" not in whole_stream.data
    assert stream.fingerprint != whole_stream.fingerprint
    few = ([12], "has 12, but .* has episodes 0 to 11"), ([-1], "has -1"), ([1, 7], f"{DRAWER}: .* no")
    for wrong, says in few:
        with pytest.raises(UserError, match=says):
            build_stream(goals(image_set, exclude_episodes=wrong))
    edit_column(copied, 1, "observation.state", lambda v: [[float("nan")] * 8] * len(v))  # of episode 1
    assert build_stream(goals(copied, exclude_episodes=[1])).columns[1].episodes == (7,)

    made = PretrainDataConfig(data=str(toy_data / "stream"), tasks=["push-v3"], exclude_episodes=[3, 0])
    source = open_data(made, "metaworld", ["push-v3"], stream="s", key="dataset.pretrain")
    assert source.tasks["push-v3"].episodes == (4, 5) and source.tasks["push-v3"].frames == 40
    made.exclude_episodes = [3, 4, 5]
    with pytest.raises(UserError, match=r"dataset\.pretrain\.exclude_episodes leaves out all episodes of push-v3"):
        open_data(made, "metaworld", ["push-v3"], stream="s", key="dataset.pretrain")


def test_a_base_is_another_one_without_some_episodes_or_with_other_names() -> None:
    data = DataSource(Path("x"), {}, "f")
    config = Config(model="m", policy={"type": "dit_dec"})
    config.dataset.pretrain = PretrainDataConfig(data="x", tasks=["a"])
    keys = [base_key(config, data)]
    for name, value in (("exclude_episodes", [1]), ("instructions", {"t": "a"})):
        setattr(config.dataset.pretrain, name, value)
        keys.append(base_key(config, data))
    assert set(keys[0]) == {"policy", "pretrain", "tasks", "data_fingerprint", "mixed_precision"}
    assert keys[1] == keys[0] | {"exclude_episodes": [1]} and keys[2] == keys[1] | {"instructions": {"t": "a"}}


def test_instructions_in_words_of_ones_own(image_set: Path) -> None:
    texts = ["Light the stove!", "drawer", "drawer 2"]
    assert named_tasks(ENV, {"light the  stove!": STOVE}, dict(enumerate(texts)), "k") == {STOVE: 0}
    for wrong, says in (
        ({"light the stove": "x"}, "has no task 'x'"),
        ({"drawers": DRAWER}, "no instruction 'drawers'. Did you mean 'drawer'?"),
        ({"drawer": DRAWER, "drawer 2": DRAWER}, "'drawer 2' or .* occurs twice"),
        ({"drawer": DRAWER, "Drawer": STOVE}, "'Drawer' or .* occurs twice"),
    ):
        with pytest.raises(UserError, match=says):
            named_tasks(ENV, wrong, dict(enumerate(texts)), "k")
    milk = "pick up the milk and place it in the basket"
    stream = build_stream(goals(image_set, instructions={milk: STOVE}))
    assert stream.columns[2].name == STOVE and stream.columns[2].text == milk and stream.columns[2].episodes == (0, 6)
    assert stream.columns[2].instruction == task_instruction(STOVE) and stream.data["instructions"] == {milk: STOVE}


@pytest.mark.parametrize("images", [False, True])
def test_float64_is_read_as_float32(tmp_path: Path, toy_data: Path, copied: Path, images: bool) -> None:
    if not images:
        copied = Path(shutil.copytree(toy_data / "stream", tmp_path / "toy"))
        (copied / INFO_FILE).unlink()
    tasks = GOALS if images else ["push-v3", "hammer-v3"]
    config = goals(copied, tasks=tasks, **({} if images else {"env": EnvConfig("metaworld", 10)}))
    before = build_stream(config)
    for name in ("observation.state", "action"):
        edit_feature(copied, name, dtype="float64")
    for path in copied.glob("data/*/*.parquet"):
        table = pq.read_table(path)
        for name in ("observation.state", "action"):
            size = len(table[name][0])
            wide = table[name].cast(pa.list_(pa.float64(), size))
            table = table.set_column(table.column_names.index(name), name, wide)
        pq.write_table(table.replace_schema_metadata(None), path)
    after = build_stream(config)
    assert after.fingerprint == before.fingerprint
    batch = StreamFrames([v.tasks for v in after.visits], POLICY).fetch(torch.tensor([[0, 0], [1, 3]]))
    assert batch["observation.state"].dtype == batch["action"].dtype == torch.float32


def test_other_frames_a_second_are_said(image_set: Path) -> None:
    data = build_stream(goals(image_set)).data
    said = fps_note(data)
    assert said is not None and "has 10 frames a second, but the simulator takes 20 steps" in said
    assert fps_note(data | {"fps": 20.0}) is None and fps_note({"kind": "made"}) is None


def test_a_made_set_is_not_renamed(toy_data: Path) -> None:
    with pytest.raises(UserError, match="rename is for data sets that clbench did not make"):
        open_data(PretrainDataConfig(data=str(toy_data / "stream"), rename={"a": "b"}), "metaworld", [], stream="s")


# ---------------------------------------------------------------------------------------------- commands


def stream_file(folder: Path, **dataset: Any) -> str:
    plain_dataset = {"name": "goals", "data": "goals", "env": {"type": ENV, "max_steps": 10}, "tasks": GOALS}
    (folder / "goals.yaml").write_text(json.dumps({"dataset": plain_dataset | dataset}))
    return str(folder / "goals.yaml")


def test_data_check(
    image_set: Path, tmp_path: Path, online: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    name = stream_file(tmp_path, pretrain={"data": str(image_set), "tasks": BASE_TASKS})
    with served({REPO: image_set}) as (url, _):
        online(url)
        assert cli.main(["data", "check", name, "--no-fetch", "--", f"dataset.repo_id={REPO}"]) == 0
        shown = capsys.readouterr()
        assert "to be fetched: 6 files" in shown.err and "not known before all is fetched" in shown.out
        assert cli.main(["data", "check", name, "--", f"dataset.repo_id={REPO}"]) == 0
    out = capsys.readouterr().out
    assert f"repo_id {REPO}, revision v3.0, commit {COMMIT}" in out
    assert f"task   4     2 episodes      10 frames  {BOWL}: put the bowl on the stove" in out
    assert "it says 10 frames a second; the simulator makes 20 steps" in out
    assert "not used: 3 tasks, 6 episodes" in out
    assert f"fingerprint {build_stream(goals(image_set)).fingerprint}" in out
    assert "base's tasks" in out and "not made by clbench" in out


def test_data_check_where_the_bases_data_are_not_made_yet(
    image_set: Path, tmp_path: Path, online: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """The stream's set is checked all the same; a base's set that is there and wrong stays an error."""
    absent = tmp_path / "absent"
    name = stream_file(tmp_path, pretrain={"data": str(absent), "tasks": BASE_TASKS})
    command = ["data", "check", name, "--no-fetch", "--", f"dataset.repo_id={REPO}"]
    with served({REPO: image_set}) as (url, _):
        online(url)
        assert cli.main(command) == 0
        shown = capsys.readouterr()
        assert "to be fetched: 6 files" in shown.err and "not used: 3 tasks, 6 episodes" in shown.out
        said = shown.out.splitlines()[-1]
        assert f"without which no training starts: there is no data set in {absent}. Make it with" in said
        assert f"clbench data make goals -- dataset.repo_id={REPO} render.fidelity=full" in said
        (absent / "meta").mkdir(parents=True)
        assert cli.main(command) == 2
    assert f"{absent} is not a complete data set" in capsys.readouterr().err


def test_nothing_is_made_for_a_set_of_the_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "make", stream_file(tmp_path, repo_id=REPO)]) == 0
    assert f"{REPO} is a data set of the hub, nothing is made for it" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- training


def run_config(out: Path, dataset: dict[str, Any], *overrides: str) -> Config:
    plain_config = {
        "model": "toy",
        "policy": {
            "type": "dit_dec", "chunk_size": 4, "n_action_steps": 2, "action_patch": 2, "d_model": 16, "n_heads": 2,
            "encoder_layers": 1, "decoder_layers": 1, "num_inference_steps": 2, "text_vocab_size": 64, "text_dim": 8,
        },
        "algorithm": {"name": "er", "buffer_size_per_task": 4},
        "dataset": {"name": "goals", "env": {"type": ENV, "max_steps": 10}, "tasks": GOALS, **dataset},
        "train": {"steps": 4, "batch_size": 4, "device": "cpu", "threads": 1, "log_every": 1, "num_workers": 0,
                  "save_every_steps": 2},
        "pretrain": {"steps": 3, "batch_size": 4},
        "log": {"progress": "quiet"},
        "output_dir": str(out),
    }  # fmt: skip
    merged = OmegaConf.merge(OmegaConf.structured(Config), plain_config, OmegaConf.from_dotlist(list(overrides)))
    return to_config(merged)


def test_training_on_a_set_of_the_hub(
    image_set: Path, tmp_path: Path, online: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base and stream, with replay; stopped in a task and resumed without a network, it ends with the same bytes."""
    dataset = {"data": "goals", "repo_id": REPO, "pretrain": {"repo_id": REPO, "tasks": BASE_TASKS}}
    with served({REPO: image_set}) as (url, _):
        online(url)
        run = train(run_config(tmp_path / "whole", dataset), "r")
    online("http://127.0.0.1:9")
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="in task 2, phase train, after step 2"):
        asked = iter([""] * 6 + ["a test"] * 9)
        patch.setattr(Stop, "reason", property(lambda self: next(asked)))
        train(run_config(tmp_path / "part", dataset), "r")
    assert_same_run(run, train(run_config(tmp_path / "part", dataset, "train.num_workers=2"), "r", resume=True))

    manifest = read_json(run / "manifest.json")
    assert [v["data_task"] for v in manifest["visits"]] == [
        {"index": 4, "instruction": "put the bowl on the stove", "frames": 10},
        {"index": 1, "instruction": "Open the middle drawer of the cabinet.", "frames": 10},
        {"index": 2, "instruction": "turn on  the stove", "frames": 10},
    ]
    assert [v["instruction"] for v in manifest["visits"]] == [task_instruction(t) for t in GOALS]
    for section in ("data", "heldout_data"):
        assert manifest[section]["repo_id"] == REPO and manifest[section]["commit"] == COMMIT
    assert manifest["data"]["fingerprint"] == manifest["data_fingerprint"]
    assert [v["data_task"]["index"] for v in manifest["heldout"]] == [0, 5]
    policy = read_json(run / "checkpoints" / "task_02" / "policy" / "config.json")
    assert policy["input_features"][IMAGES[1]]["shape"] == [3, 16, 16]

    local = goals(image_set, pretrain=PretrainDataConfig(data=str(image_set), tasks=BASE_TASKS))
    assert pretraining_tasks(local)[1].fingerprint == manifest["heldout_data"]["fingerprint"]
    other = run_config(tmp_path / "whole", {"data": str(image_set), "pretrain": dataset["pretrain"]})
    with pytest.raises(UserError, match=r"dataset\.repo_id"):  # the same data from elsewhere: has to be meant
        train(other, "r", resume=True)


def test_a_base_for_other_features_is_refused(image_set: Path, tmp_path: Path, toy_data: Path) -> None:
    dataset = {"data": str(image_set), "pretrain": {"data": str(image_set), "tasks": BASE_TASKS}}
    base_run = train(run_config(tmp_path, dataset, "dataset.task_order=[0,1]", "train.steps=1"), "r")
    policy = base_run / "checkpoints" / "task_00" / "policy"
    config = run_config(tmp_path, {"data": str(toy_data / "stream"), "env": {"type": "metaworld", "max_steps": 10},
                                   "tasks": ["hammer-v3", "push-v3"]})  # fmt: skip
    config.policy = {"path": str(policy)}
    with pytest.raises(UserError, match=r"image is missing.*observation.state has shape \(39,\), not \(8,\)"):
        train(config, "other")


def test_a_base_that_learned_from_images_drawn_otherwise_is_refused(image_set: Path, tmp_path: Path) -> None:
    dataset = {"data": str(image_set), "pretrain": {"data": str(image_set), "tasks": BASE_TASKS}}
    run = train(run_config(tmp_path, dataset, "dataset.task_order=[0,1]", "train.steps=1"), "r")
    base = read_json(run / "manifest.json")["base"]["path"]
    for record in (run / "manifest.json", Path(base) / "base.json"):
        found = read_json(record)
        assert found["render"] == {"fidelity": "full", "size": 16}
        write_json(record, found | {"render": {"fidelity": "fast", "size": 16}})
    for n, policy in enumerate((str(run / "checkpoints" / "task_00" / "policy"), base)):
        config = run_config(tmp_path, dataset, "dataset.task_order=[0,1]", "train.steps=1")
        config.policy = {"path": policy}
        with pytest.raises(UserError, match=r"learned from images drawn fast at 16 pixels.*drawn full at 16"):
            train(config, f"refused{n}")
        config.render.mismatch = "allow"
        train(config, f"allowed{n}")


def test_a_base_for_exchanged_cameras_is_another_one(image_set: Path, tmp_path: Path) -> None:
    """Their states and actions, and so their fingerprints, are the same."""
    folders = set()
    for rename in ({}, {IMAGES[0]: IMAGES[1], IMAGES[1]: IMAGES[0]}):
        pretrain = {"data": str(image_set), "tasks": BASE_TASKS, "rename": rename}
        config = run_config(tmp_path, {"data": str(image_set), "pretrain": pretrain})
        folders.add(base_folder(config, pretraining_tasks(config.dataset)[1]))
    assert len(folders) == 2


def test_columns_of_a_made_stream_say_their_tasks_too(toy_data: Path) -> None:
    config = DatasetConfig(name="t", data=str(toy_data / "stream"), env=EnvConfig("metaworld", 10), tasks=["push-v3"])
    stream: TaskStream = build_stream(config, sequential=False)
    task: Task = stream.columns[0]
    assert (task.task_index, task.frames, task.features) == (1, 60, None)
    assert stream.data["kind"] == "made" and stream.data["tasks_unused"] == 2
    assert stream_data(config).fingerprint == stream.fingerprint
