"""LIBERO on camera images: what is drawn and recorded, what is refused; with the simulator, that it is LeRobot's."""

from __future__ import annotations

import ast
import ctypes.util
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clbench.cli import _stream_on_states, main
from clbench.config.compose import compose, override
from clbench.config.schema import Config, DatasetConfig, RenderConfig
from clbench.data.episode_images import EpisodeImages, read_images
from clbench.data.info import fingerprint_with_images, load_info
from clbench.data.make import TaskPlan
from clbench.data.make import _check as check_plans
from clbench.data.matching import match_tasks
from clbench.envs import rendering
from clbench.envs.base import EVAL_SEED_BASE, STATE_KEY, Step, step_unseen
from clbench.envs.libero import assets as libero_assets
from clbench.envs.libero import simulator as libero
from clbench.envs.libero import tasks as libero_tasks
from clbench.envs.making import family, make_simulator
from clbench.errors import UserError
from clbench.rollout.rollout import Episode, SimulatorPool, run_episodes
from clbench.streams.stream import build_stream, drawing, pretraining_data, pretraining_tasks, visit_order
from tests.test_libero import SOUP, STOVE, has_package, with_simulator

ROOT = Path(__file__).resolve().parents[1]
MILK = "pick_up_the_milk_and_place_it_in_the_basket"
MICROWAVE = "KITCHEN_SCENE6_put_the_yellow_and_white_mug_in_the_microwave_and_close_it"
CAMERAS = ["observation.images.image", "observation.images.image2"]
SUITES = ["libero_spatial", "libero_object", "libero_goal", "libero_10"]


def composed(dataset: str, *overrides: str) -> Config:
    config, _ = compose(
        model="dit_dec_tiny", algorithms=["clare"], dataset=dataset, registered=["clare"], overrides=overrides
    )
    return config


# Streams


@pytest.mark.parametrize("name", SUITES)
def test_the_streams_on_images_are_those_on_states(name: str) -> None:
    images, states = composed(name).dataset, composed(f"{name}_state").dataset
    assert list(family(images.env.type).cameras) == CAMERAS and family(images.env.type).privileged is None
    assert (images.tasks, images.task_order, images.env.max_steps) == (
        states.tasks, states.task_order, states.env.max_steps,
    )  # fmt: skip
    assert images.pretrain is not None and states.pretrain is not None
    assert images.pretrain.tasks == states.pretrain.tasks
    assert images.make == states.make and images.pretrain.make == states.pretrain.make
    assert {images.data, images.pretrain.data} & {states.data, states.pretrain.data} == set()
    assert _stream_on_states(name) == f"{name}_state"


def test_libero_90_and_libero_long() -> None:
    d = composed("libero_90").dataset
    assert visit_order(d) == libero_tasks.suite_tasks("libero_90") and d.pretrain is None
    assert composed("libero_long") == composed("libero_10")
    assert _stream_on_states("libero_long") == "libero_10_state"
    with pytest.raises(UserError, match="'libero_90' is on camera images and has no variant on states"):
        _stream_on_states("libero_90")


def test_a_base_of_another_streams_tasks() -> None:
    """`dataset.pretrain: NAME` takes that stream's data and tasks in the place of the stream's own; later keys win."""
    named = ("libero_10", "dataset.pretrain=libero_90")
    given = composed(*named, "dataset.pretrain.make.demos_per_task=3").dataset.pretrain
    assert given is not None and given.tasks == libero_tasks.suite_tasks("libero_90")
    assert given.data == "libero_90" and given.partial and given.stream == "libero_90"
    assert given.make.demos_per_task == 3 and given.make.max_steps == 400
    hub = composed(*named, "dataset.pretrain.repo_id=a/b").dataset.pretrain
    assert hub is not None and hub.repo_id == "a/b"
    own = composed("libero_10").dataset
    assert own.pretrain is not None and own.pretrain.data == "libero_pre12" and not own.pretrain.partial
    assert override(composed("libero_10"), list(named[1:])) == composed(*named)
    with pytest.raises(UserError, match=r"unknown dataset 'libero_91'\. Did you mean 'libero_90'"):
        composed("libero_10", "dataset.pretrain=libero_91")
    with pytest.raises(UserError, match="must be disjoint from the stream"):
        composed("libero_10", "dataset.pretrain=libero_10")
    with pytest.raises(UserError, match="is of the simulator libero, this one of libero_state"):
        composed("libero_10_state", "dataset.pretrain=libero_90")
    with pytest.raises(UserError, match="is of the simulator metaworld, this one of libero"):
        override(composed("libero_10"), ["dataset.pretrain=metaworld_val"])
    same = override(composed(*named), ["dataset.pretrain.partial=true", "eval.episodes=3"])
    assert same.dataset == composed(*named).dataset
    with pytest.raises(UserError, match=r"clbench data make libero_10 -- dataset\.pretrain=libero_90"):
        pretraining_data(composed(*named).dataset)


def test_a_base_learns_all_that_a_set_of_libero_90_has() -> None:
    """Where scenes share an instruction, the first task with it has all its episodes."""
    tasks = libero_tasks.suite_tasks("libero_90")
    texts = dict(enumerate(dict.fromkeys(libero_tasks.task_instruction(t) for t in tasks)))
    found = match_tasks("libero", tasks, texts, dict.fromkeys(texts, 50), partial=True)
    assert len(texts) == 74 and sorted(found.values()) == list(texts)
    assert all(libero_tasks.task_instruction(name) == texts[index] for name, index in found.items())
    without = {i: t for i, t in texts.items() if i != found["KITCHEN_SCENE6_close_the_microwave"]}
    fewer = match_tasks("libero", tasks, without, dict.fromkeys(without, 50), partial=True)
    assert found.keys() - fewer.keys() == {"KITCHEN_SCENE6_close_the_microwave"}
    with pytest.raises(UserError, match="0 of 90 match"):
        match_tasks("libero", tasks, {0: "dance"}, {0: 50}, partial=True)


def test_scenes_that_share_an_instruction_fit_into_a_set_with_cameras() -> None:
    same = [STOVE, "KITCHEN_SCENE9_turn_on_the_stove"]
    render = {"fidelity": "fast", "size": 64}
    plans = [TaskPlan("libero", task, 0, 1, 0.1, 10, 100, 0, render) for task in same]
    check_plans(plans, 1, libero.LiberoState.max_steps)


@has_package
def test_the_task_orders_are_those_of_the_installed_package() -> None:
    source = ast.parse((libero_assets.package() / "benchmark" / "__init__.py").read_text())
    values = [
        node.value
        for node in source.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id == "task_orders"
    ]
    assert [tuple(order) for order in ast.literal_eval(values[0])] == list(libero_tasks.TASK_ORDERS)


def test_a_stream_takes_any_of_liberos_task_orders() -> None:
    tasks = libero_tasks.suite_tasks("libero_object")
    for stream in ("libero_object", "libero_object_state"):
        found = visit_order(composed(stream, "dataset.libero_order=3").dataset)
        assert found == [tasks[i] for i in (7, 4, 3, 0, 8, 1, 2, 5, 9, 6)]
    tasks = libero_tasks.suite_tasks("libero_10")
    ordered = visit_order(composed("libero_10", "dataset.libero_order=1", "dataset.task_order=null").dataset)
    assert ordered == [tasks[i] for i in (4, 6, 8, 7, 3, 1, 2, 0, 9, 5)]
    without = composed("libero_10", "dataset.libero_order=1", "dataset.task_order=[0,1,2,3,4,5,6,7,8]").dataset
    assert visit_order(without) == [task for task in ordered if task != MICROWAVE]
    for overrides, message in (
        (("dataset.libero_order=21",), "task orders 0 to 20, not 21"),
        (("dataset.libero_order=-1",), "task orders 0 to 20, not -1"),
        (("dataset.libero_order=1", "dataset.task_order=[0,1,0]"), "each visited once"),
    ):
        with pytest.raises(UserError, match=message):
            visit_order(composed("libero_goal", *overrides).dataset)


@pytest.mark.parametrize(
    ("stream", "reordered", "message"),
    [
        ("metaworld_quick", False, "'metaworld' has no published task orders"),
        ("metaworld_cw10", False, "'metaworld' has no published task orders"),  # ten tasks, too
        ("libero_90", False, "dataset.tasks lists 90 tasks that are not such a suite"),
        ("libero_goal", True, "dataset.tasks lists those of libero_goal in another order"),
        ("libero_goal_state", True, "dataset.tasks lists those of libero_goal in another order"),
    ],
)
def test_liberos_task_orders_are_of_its_suites_alone(stream: str, reordered: bool, message: str) -> None:
    config = composed(stream, "dataset.libero_order=1").dataset
    if reordered:
        config.tasks = [*config.tasks[1:], config.tasks[0]]
    with pytest.raises(UserError, match=message):
        visit_order(config)


# How images are drawn: configuration, record, mismatch


def record(folder: Path, tasks: list[str], render: dict[str, Any] | None, size: int = 64) -> str:
    """Write what two files of a data set say of it; returns its path."""
    described = [
        {
            "name": task, "instruction": libero_tasks.task_instruction(task), "task_index": i, "episodes": [i],
            "frames": 5, "expert_attempts": 0, "expert_successes": 0, "expert_success_rate": None,
            "demo_attempts": 1, "demo_successes": 1, "demo_success_rate": 1.0,
        }
        for i, task in enumerate(tasks)
    ]  # fmt: skip
    about = {
        "format": 1, "name": folder.name, "env_type": "libero", "seed": 0, "action_noise": 0.1, "tail_steps": 10,
        "max_steps": 280, "demos_per_task": 1, "ceiling_episodes": 0, "tasks": described, "fingerprint": "0",
        "versions": {},
    }  # fmt: skip
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "clbench.json").write_text(json.dumps(about | ({"render": render} if render else {})))
    image = {"dtype": "image", "shape": [size, size, 3], "names": ["height", "width", "channel"]}
    (folder / "meta" / "info.json").write_text(json.dumps({"features": dict.fromkeys(CAMERAS, image)}))
    return str(folder)


def two_tasks(folder: Path, render: dict[str, Any] | None, pretrained: dict[str, Any] | None) -> DatasetConfig:
    config = composed("libero_object").dataset
    config.task_order = [0, 7]
    config.data = record(folder / "stream", [SOUP, MILK], render)
    assert config.pretrain is not None
    config.pretrain.data, config.pretrain.tasks = record(folder / "pretrain", [STOVE], pretrained), [STOVE]
    return config


def test_other_images_than_those_learned_from_are_refused(tmp_path: Path) -> None:
    fast = {"fidelity": "fast", "size": 64}
    config = two_tasks(tmp_path / "a", fast, {"fidelity": "full", "size": 64})
    stream = build_stream(config, render=RenderConfig())  # as they were drawn
    assert [t.env for t in stream.columns] == [{"type": "libero", "task": t, "render": fast} for t in (SOUP, MILK)]
    message = r"drawn fast at 64 pixels, but .* fast at 256: .* Set render.fidelity=fast render.size=64, .*=allow"
    with pytest.raises(UserError, match=message):
        build_stream(config, render=RenderConfig(size=256))
    with pytest.raises(UserError, match="fast at 64 pixels, but the simulator would draw them full at 64"):
        build_stream(config, render=RenderConfig("full", 64))
    allowed = build_stream(config, render=RenderConfig("full", 128, "allow"))
    assert allowed.columns[0].env["render"] == {"fidelity": "full", "size": 128}, "drawn as stated"
    with pytest.raises(UserError, match=r"pretrain were drawn full at 64 .* fast at 64"):
        pretraining_tasks(config, RenderConfig("fast", 64))


def test_a_mismatch_is_said_before_training_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = record(tmp_path / "stream", [SOUP, MILK], {"fidelity": "fast", "size": 64})
    command = ["train", "--dataset", "libero_object", "--", f"dataset.data={data}", "dataset.task_order=[0,7]"]
    assert main([*command, "render.size=128"]) == 2
    error = capsys.readouterr().err
    assert "were drawn fast at 64 pixels" in error and "Traceback" not in error


def test_how_images_are_drawn_is_checked(tmp_path: Path) -> None:
    for changed, message in (
        ("render.fidelity=fst", "render.fidelity is 'fst' but must be one of fast, full"),
        ("render.size=0", "render.size must be between 16 and 2048"),
        ("render.mismatch=maybe", "render.mismatch is 'maybe'"),
        ("render.sice=64", "unknown key 'render.sice'. Did you mean 'size'"),
    ):
        with pytest.raises(UserError, match=message):
            composed("libero_object", changed)
    for spec, message in (
        ({"type": "libero", "task": SOUP, "render": {"fidelity": "best"}}, "must be one of fast, full"),
        ({"type": "libero", "task": SOUP, "render": {"size": 64.0}}, "whole number of pixels"),
        ({"type": "libero", "task": SOUP, "render": {"hight": 64}}, "unknown rendering option 'hight'"),
        ({"type": "libero", "task": SOUP, "render": 64}, "cannot be rendered as 64"),
        ({"type": "metaworld", "task": "push-v3", "render": {"size": 64}}, "'metaworld' cannot be rendered"),
    ):
        with pytest.raises(UserError, match=message):
            make_simulator(spec)
    data = record(tmp_path / "odd", [SOUP], {"fidelity": "fast"})
    with pytest.raises(UserError, match="does not describe how images were drawn"):
        load_info(data)
    assert drawing("libero_state", RenderConfig()) is None and drawing("metaworld", None) is None


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("disable", "MUJOCO_GL=disable switches drawing off. Install libegl1"),
        ("nonsense", "MUJOCO_GL=nonsense is not egl, osmesa or glfw. Install libegl1"),
        ("", "neither EGL nor OSMesa is installed. Install libegl1"),
    ],
)
def test_without_opengl_there_is_one_message(chosen: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", chosen)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    rendering.gl_context.cache_clear()  # another test may have made it
    with pytest.raises(UserError, match=message):
        make_simulator({"type": "libero", "task": SOUP})
    rendering.gl_context.cache_clear()


def test_what_draws_is_chosen_by_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    there: set[str] = set()
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: name if name in there else None)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setenv("DISPLAY", ":0")
    assert rendering.backend_name() == "glfw"
    there.add("OSMesa")
    assert rendering.backend_name() == "osmesa"
    there.add("EGL")
    assert rendering.backend_name() == "egl"
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    assert rendering.backend_name() == "osmesa"


def test_a_library_that_fails_is_one_message() -> None:
    code = "from clbench.envs.rendering import gl_context\ngl_context()"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MUJOCO_GL": "egl", "MUJOCO_EGL_DEVICE_ID": "999"}
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, env=environment, cwd=ROOT)
    said = [line for line in done.stderr.splitlines() if "UserError: camera images cannot be drawn with egl: " in line]
    assert done.returncode == 1 and len(said) == 1 and "Install libegl1 (or libosmesa6)" in said[0]


def test_thinning_out_a_mesh_keeps_its_shape() -> None:
    mujoco = pytest.importorskip("mujoco")
    points = np.random.default_rng(0).normal(size=(3000, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    text = " ".join(f"{x:.6f}" for x in points.ravel())
    model = mujoco.MjModel.from_xml_string(
        f'<mujoco><asset><mesh name="ball" vertex="{text}"/></asset><worldbody>'
        '<geom type="mesh" mesh="ball"/></worldbody></mujoco>'
    )
    before = int(model.mesh_facenum[0])
    assert before > 5000 and rendering.dense_plain_meshes(model) == [0]
    rendering.thin_out(model, 0)
    count = int(model.mesh_facenum[0])
    assert before / 10 < count < before / 1.5
    corners = model.mesh_vert[model.mesh_face[:count]]  # (faces, 3, xyz)
    assert (model.mesh_face[:count] < model.mesh_vertnum[0]).all() and (model.mesh_face[:count] >= 0).all()
    assert (np.ptp(corners, axis=1).max(axis=1) > 0).all(), "no face without an area"
    radii = np.linalg.norm(corners.mean(axis=1), axis=1)
    assert radii.min() > 0.9, "the surface stays where it was"
    assert corners.reshape(-1, 3).max(axis=0).min() > 0.9 and corners.reshape(-1, 3).min(axis=0).max() < -0.9
    assert len(np.unique(np.sort(model.mesh_face[:count], axis=1), axis=0)) == count


# Recording, and looking only where it is needed


def test_images_pass_through_a_file_unchanged(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frames = [{c: rng.integers(0, 256, (20, 30, 3), dtype=np.uint8) for c in CAMERAS} for _ in range(3)]
    images = EpisodeImages(tmp_path / "e.zip", CAMERAS)
    for frame in frames:
        images.add(frame | {STATE_KEY: np.zeros(8, np.float32)})
    digests = images.close()
    for want, found in zip(frames, read_images(tmp_path / "e.zip", CAMERAS, 3), strict=True):
        for camera in CAMERAS:
            np.testing.assert_array_equal(found[camera], want[camera])
    again = EpisodeImages(tmp_path / "f.zip", CAMERAS)
    again.add(frames[0])
    assert again.close() != digests
    again.discard()
    assert not (tmp_path / "f.zip").exists()
    assert fingerprint_with_images("abc", []) == "abc", "sets without cameras keep their fingerprints"
    swapped = fingerprint_with_images("abc", digests[::-1])
    assert len({swapped, fingerprint_with_images("abc", digests), "abc"}) == 3


class Watched:
    """A simulator that counts how often it was looked at."""

    seen = unseen = 0

    def __init__(self, spec: dict[str, Any]) -> None:
        pass

    def reset(self, seed: int) -> dict[str, np.ndarray]:
        return {"observation.images.image": np.zeros((4, 4, 3), np.uint8), STATE_KEY: np.zeros(8, np.float32)}

    def step(self, action: np.ndarray) -> Step:
        type(self).seen += 1
        return Step(self.reset(0), 0.0, False)

    def step_unseen(self, action: np.ndarray) -> Step:
        type(self).unseen += 1
        return Step({STATE_KEY: np.zeros(8, np.float32)}, 0.0, False)


class Chunks:
    stateful, history = False, 1

    def reset(self) -> None:
        pass

    def act(self, observations: Any, *rest: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        assert all("observation.images.image" in o for o in observations)
        return np.zeros((len(observations), 4, 7)), {}


def test_a_policy_that_acts_in_chunks_is_shown_every_chunks_beginning_only() -> None:
    episodes = [Episode((i,), i, {"type": "x", "task": "t"}, "do", 12) for i in range(2)]
    assert len(list(run_episodes(Chunks(), episodes, SimulatorPool(Watched), 2))) == 2  # type: ignore[arg-type]
    assert (Watched.seen, Watched.unseen) == (6, 18)


# The simulator


def spec(task: str, fidelity: str = "fast", size: int = 64) -> dict[str, Any]:
    return {"type": "libero", "task": task, "render": {"fidelity": fidelity, "size": size}}


@pytest.fixture(scope="module")
def soup() -> Iterator[Any]:
    simulator = make_simulator(spec(SOUP))
    yield simulator
    simulator.close()
    simulator.close()


class TestSimulator:
    pytestmark = with_simulator

    @pytest.mark.parametrize("seed", [pytest.param(4, marks=pytest.mark.slow), EVAL_SEED_BASE + 2])
    def test_drawing_does_not_change_the_physics(self, soup: Any, seed: int) -> None:
        states = make_simulator({"type": "libero_state", "task": SOUP})
        full = make_simulator(spec(SOUP, "full", 32))
        actions = np.random.default_rng(seed).uniform(-1, 1, (15, libero.ACTION_DIM))
        found = []
        for simulator in (states, soup, full):
            simulator.reset(seed)
            for i, action in enumerate(actions):
                last = step_unseen(simulator, action) if i % 3 else simulator.step(action)
                if simulator is states:
                    simulator.render(40, 30)
            found.append((simulator.env.get_sim_state(), last.reward, last.success))  # type: ignore[attr-defined]
        for state, reward, success in found[1:]:
            np.testing.assert_array_equal(state, found[0][0])
            assert (reward, success) == found[0][1:]
        states.close()
        full.close()

    def test_the_seed_alone_decides_what_is_seen(self, soup: Any) -> None:
        fresh = make_simulator(spec(SOUP))
        fresh.reset(9)
        first = soup.reset(7)
        soup.step(np.ones(7))
        want = soup.step(np.ones(7)).observation
        for simulator in (soup, fresh):
            again = simulator.reset(7)
            assert "observation.images.image" not in step_unseen(simulator, np.ones(7)).observation
            found = simulator.step(np.ones(7)).observation
            for key in (*CAMERAS, STATE_KEY):
                np.testing.assert_array_equal(again[key], first[key])
                np.testing.assert_array_equal(found[key], want[key])
        assert any((want[c] != first[c]).any() for c in CAMERAS)
        assert [(v.shape, v.dtype) for v in first.values()] == [
            ((64, 64, 3), np.uint8), ((64, 64, 3), np.uint8), ((8,), np.float32),
        ]  # fmt: skip
        fresh.close()

    def test_fast_looks_nearly_like_full_and_the_view_like_the_camera(self, soup: Any) -> None:
        full = make_simulator(spec(SOUP, "full"))
        fast, slow = soup.reset(3), full.reset(3)
        for camera in CAMERAS:
            difference = np.abs(fast[camera].astype(int) - slow[camera])
            assert 0 < difference.mean() < 8, camera
        # Two images of one moment but for a millisecond, in which nothing moves any more.
        assert np.abs(soup.render(64, 64).astype(int) - fast[CAMERAS[0]]).mean() < 1
        assert soup.render(48, 32).shape == (32, 48, 3)
        full.close()

    @pytest.mark.slow
    def test_observations_are_lerobots(self, tmp_path: Path) -> None:
        ours = make_simulator(spec(SOUP, "full", 128))
        actions = np.random.default_rng(0).uniform(-1, 1, (12, libero.ACTION_DIM))
        seen = [ours.reset(EVAL_SEED_BASE + 3), *(ours.step(action).observation for action in actions)]
        ours.close()
        (tmp_path / "actions").write_bytes(pickle.dumps(actions))
        environment = os.environ | {"PYTHONPATH": str(ROOT), "LIBERO_CONFIG_PATH": str(libero_assets.write_config())}
        command = [sys.executable, "-c", LEROBOTS, str(tmp_path), str(libero_assets.installed().resolve())]
        done = subprocess.run(command, text=True, capture_output=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        theirs = pickle.loads((tmp_path / "seen").read_bytes())
        assert len(theirs) == len(seen)
        for want, found in zip(theirs, seen, strict=True):
            assert set(found) == set(want)
            np.testing.assert_allclose(found[STATE_KEY], want[STATE_KEY], atol=2e-6)
            for camera in CAMERAS:
                pixels = (want[camera] * 255).round().astype(np.uint8).transpose(1, 2, 0)
                # The same to a rounding: the GPU's buffer has another size.
                assert (pixels != found[camera]).any(axis=-1).mean() < 0.02
                assert np.abs(pixels.astype(int) - found[camera]).mean() < 0.02

    @pytest.mark.slow
    def test_the_whole_way_on_images(self, tmp_path: Path) -> None:
        """Demonstrations of two tasks, a base, two visits, an evaluation: nothing is learned, everything is done."""
        from lerobot.datasets.lerobot_dataset import LeRobotDataset

        from clbench.data.make import make_dataset
        from clbench.evaluation.evaluate import evaluate
        from clbench.training.trainer import train

        def make(name: str, tasks: list[str], workers: int) -> Path:
            return make_dataset(
                tmp_path / name, name=name, env_type="libero", tasks=tasks, demos_per_task=1, seed=0, max_steps=280,
                tail_steps=0, ceiling_episodes=workers - 1, workers=workers, progress=False, render={"size": 64},
            )  # fmt: skip

        both, one = make("both", [SOUP, MILK], 2), make("one", [MILK], 1)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["both", "one"]
        info = load_info(both)
        assert info.render == {"fidelity": "fast", "size": 64} and "opengl" in info.versions
        assert "privileged" not in json.loads((both / "meta/clbench.json").read_text())
        dataset, single = LeRobotDataset("both", root=both), LeRobotDataset("one", root=one)
        features = {k: v for k, v in dataset.meta.features.items() if k.startswith(("observation", "action"))}
        image = {"dtype": "image", "shape": (64, 64, 3), "names": ["height", "width", "channel"]}
        assert features == {
            "observation.images.image": image,
            "observation.images.image2": image,
            STATE_KEY: {"dtype": "float32", "shape": (8,), "names": ["state"]},
            "action": {"dtype": "float32", "shape": (7,), "names": ["actions"]},
        }
        assert (dataset.fps, dataset.meta.robot_type) == (libero.FPS, "panda")
        start = info.tasks[0].frames  # a task's demonstrations are the same beside another one's, in any process
        assert single.num_frames == info.tasks[1].frames
        for i in (0, 5, single.num_frames - 1):
            for key in features:
                np.testing.assert_array_equal(dataset[start + i][key].numpy(), single[i][key].numpy())
        first = dataset[0]["observation.images.image"]
        assert tuple(first.shape) == (3, 64, 64) and 0.1 < float(first.mean()) < 0.9

        config = smoke_config(both, one)
        folder = train(config, "images")
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["render"] == info.render and manifest["privileged"] is None
        assert manifest["visits"][0]["env"]["render"] == info.render
        matrix = evaluate(folder, config, progress=False)
        assert np.isfinite(np.array(matrix["success"], dtype=float)[-1]).all()


def smoke_config(stream: Path, pretrain: Path) -> Config:
    """A run of two tasks on the data in `stream`, with a base from `pretrain`, of a few steps."""
    config = composed("libero_object", "render.size=64")
    config.algorithm = {"name": "seqfft"}
    d = config.dataset
    assert d.pretrain is not None
    d.data, d.tasks, d.env.max_steps = str(stream), [SOUP, MILK], 6
    d.pretrain.data, d.pretrain.tasks = str(pretrain), [MILK]
    config.train.steps = config.pretrain.steps = 2
    config.train.batch_size = config.pretrain.batch_size = 4
    config.train.num_workers, config.train.device, config.log.progress = 0, "cpu", "quiet"
    config.eval.episodes, config.eval.workers, config.eval.slots, config.eval.cells = 1, 1, 2, "last"
    return config


LEROBOTS = """
import pickle, sys
from pathlib import Path
import libero.libero as package
package._assets_path_cache = sys.argv[2]
from lerobot.envs.libero import LiberoEnv, _get_suite
from lerobot.envs.utils import preprocess_observation
from lerobot.processor.env_processor import LiberoProcessorStep
env = LiberoEnv(_get_suite("libero_object"), 0, "libero_object", obs_type="pixels_agent_pos",
                observation_width=128, observation_height=128, episode_index=3)
def batched(value):
    return {k: batched(v) for k, v in value.items()} if isinstance(value, dict) else value[None]
def seen(observation):
    processed = LiberoProcessorStep().observation(preprocess_observation(batched(observation)))
    return {k: v[0].numpy() for k, v in processed.items()}
found = [seen(env.reset(seed=0)[0])]
for action in pickle.loads((Path(sys.argv[1]) / "actions").read_bytes()):
    found.append(seen(env.step(action)[0]))
(Path(sys.argv[1]) / "seen").write_bytes(pickle.dumps(found))
"""
