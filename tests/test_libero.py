"""LIBERO: its tables, its assets and what is refused as such, and (with the simulator) what decides an episode."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clbench.cli import main
from clbench.config.compose import available, compose
from clbench.data.experts.libero import LiberoExperts
from clbench.data.make import TaskPlan
from clbench.data.make import _check as check_plans
from clbench.envs.base import EVAL_SEED_BASE, STATE_KEY, VALIDATION_SEED_BASE, Simulator
from clbench.envs.libero import assets as libero_assets
from clbench.envs.libero import simulator as libero
from clbench.envs.libero import tasks as libero_tasks
from clbench.envs.making import family, instruction, make_simulator
from clbench.errors import UserError
from clbench.lock import held
from clbench.streams.stream import visit_order

ROOT = Path(__file__).resolve().parents[1]
STREAMS = ["libero_spatial_state", "libero_object_state", "libero_goal_state", "libero_10_state"]
SOUP = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"
DRAWER = "pick_up_the_black_bowl_in_the_top_drawer_of_the_wooden_cabinet_and_place_it_on_the_plate"
STOVE = "KITCHEN_SCENE3_turn_on_the_stove"

with_simulator = [pytest.mark.libero, pytest.mark.xdist_group("libero")]
has_package = pytest.mark.skipif(importlib.util.find_spec("libero") is None, reason="hf-libero is not installed")


# Tables, known without the simulator


def test_the_suites_have_liberos_tasks() -> None:
    sizes = {suite: len(libero_tasks.suite_tasks(suite)) for suite in libero_tasks.suites()}
    assert sizes == {"libero_spatial": 10, "libero_object": 10, "libero_goal": 10, "libero_10": 10, "libero_90": 90}
    assert len(set(family("libero_state").tasks())) == 130
    assert libero_tasks.suite_tasks("libero_long") == libero_tasks.suite_tasks("libero_10")
    assert libero_tasks.suite_tasks("libero_object")[0] == SOUP
    assert instruction({"type": "libero_state", "task": STOVE}) == "turn on the stove"
    assert libero_tasks.suite_of(STOVE) == "libero_90"
    for suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10"):
        assert len({libero_tasks.task_instruction(task) for task in libero_tasks.suite_tasks(suite)}) == 10
    with pytest.raises(UserError, match=r"no suite 'libero_goals'. Did you mean 'libero_goal'"):
        libero_tasks.suite_tasks("libero_goals")
    with pytest.raises(UserError, match="libero_state has no task 'pick_up_the_milk'"):
        make_simulator({"type": "libero_state", "task": "pick_up_the_milk"})


@has_package
def test_the_tables_are_those_of_the_installed_package() -> None:
    assert libero_tasks.read_package() == json.loads(libero_tasks.TABLE_FILE.read_text())
    folder = libero_assets.package() / "bddl_files"
    for suite in libero_tasks.suites():
        for task in libero_tasks.suite_tasks(suite):
            assert (folder / suite / f"{task}.bddl").is_file()


@has_package
def test_the_step_limits_are_lerobots() -> None:
    package = importlib.util.find_spec("lerobot")
    assert package is not None and package.origin is not None
    source = (Path(package.origin).parent / "envs" / "libero.py").read_text()  # importing it imports LIBERO
    for suite, steps in libero_tasks.MAX_STEPS.items():
        assert f'"{suite}": {steps},' in source


@pytest.mark.parametrize("name", STREAMS)
def test_the_streams_are_the_suites(name: str) -> None:
    config, _ = compose(model="dit_dec_tiny", algorithms=["clare"], dataset=name, registered=["clare"])
    d, suite = config.dataset, name.removesuffix("_state")
    assert d.tasks == libero_tasks.suite_tasks(suite)
    assert d.env.max_steps == d.make.max_steps == libero_tasks.MAX_STEPS[suite]
    assert d.pretrain is not None and not set(d.pretrain.tasks) & set(d.tasks)
    assert {libero_tasks.suite_of(task) for task in d.pretrain.tasks} == {"libero_90"}
    for tasks, make in ((d.tasks, d.make), (d.pretrain.tasks, d.pretrain.make)):
        assert tasks is not d.tasks or tasks == visit_order(d)
        jobs = [TaskPlan(d.env.type, t, 0, make.demos_per_task, 0.1, 10, make.max_steps, 20) for t in tasks]
        check_plans(jobs, 2, libero.LiberoState.max_steps)


def test_two_tasks_with_one_instruction_do_not_fit_into_a_set() -> None:
    same = ["KITCHEN_SCENE3_turn_on_the_stove", "KITCHEN_SCENE9_turn_on_the_stove"]
    with pytest.raises(UserError, match="have the same instruction"):
        plans = [TaskPlan("libero_state", task, 0, 1, 0.1, 10, 100, 0) for task in same]
        check_plans(plans, 1, libero.LiberoState.max_steps)


def test_what_the_expert_cannot_do_is_said_before_anything_starts() -> None:
    assert set(LiberoExperts.cannot) <= set(libero_tasks.suite_tasks("libero_90"))
    task = "STUDY_SCENE4_pick_up_the_book_on_the_right_and_place_it_under_the_cabinet_shelf"
    jobs = [TaskPlan("libero_state", name, 0, 1, 0.1, 10, 280, 0) for name in (SOUP, task)]
    with pytest.raises(UserError, match=f"no demonstrations can be made for {task}: .*roof.* Leave it out"):
        check_plans(jobs, 1, 1000)


def test_libero_long_is_another_name() -> None:
    a, files = compose(model="dit_dec_tiny", algorithms=["clare"], dataset="libero_long_state", registered=["clare"])
    b, same = compose(model="dit_dec_tiny", algorithms=["clare"], dataset="libero_10_state", registered=["clare"])
    assert a == b and files == same


def test_rotations_are_lerobots() -> None:
    import torch
    from lerobot.processor.env_processor import LiberoProcessorStep

    rng = np.random.default_rng(0)
    quaternions = [*rng.normal(size=(50, 4)), np.array([0.0, 0, 0, 1]), np.array([1.0, 0, 0, 1e-4])]
    quaternions = [q / np.linalg.norm(q) for q in quaternions]
    want = LiberoProcessorStep()._quat2axisangle(torch.tensor(np.stack(quaternions))).numpy()
    np.testing.assert_allclose([libero.axis_angle(q) for q in quaternions], want, atol=2e-3)


# Assets: a small set in the place of the real one

FILES = {
    "scenes/room.xml": b"<mujoco/>",
    "objects/milk.xml": b"<mujoco model='milk'/>",
    "objects/milk/milk.stl": b"solid milk",
    "objects/milk/visual/milk_vis.msh": b"a mesh",
    "textures/wall.png": b"a picture",
}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Expect FILES; yields the root where they are to be installed."""
    physics = {n: hashlib.sha256(b).hexdigest() for n, b in FILES.items() if n.endswith(libero_assets.PHYSICS)}
    (tmp_path / "expected.json").write_text(
        json.dumps({"physics": physics, "visual": [n for n in FILES if n not in physics]})
    )
    monkeypatch.setattr(libero_assets, "EXPECTED_FILE", tmp_path / "expected.json")
    monkeypatch.setenv("CLBENCH_LIBERO_ROOT", str(tmp_path / "root"))
    libero_assets.expected.cache_clear()
    yield tmp_path / "root"
    libero_assets.expected.cache_clear()


def archive(path: Path, files: dict[str, bytes], *more: tarfile.TarInfo, top: str = "bundle/assets/") -> Path:
    with tarfile.open(path, "w:xz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(top + name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for member in more:
            tar.addfile(member)
    return path


def folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def test_assets_are_installed_from_an_archive_or_a_folder(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"not installed .*clbench data assets libero --from"):
        libero_assets.installed()
    assert main(["data", "assets", "libero", "--from", str(archive(tmp_path / "a.tar.xz", FILES))]) == 0
    assert capsys.readouterr().out.strip() == str(small / "assets")
    assert libero_assets.installed() == small / "assets"
    before = libero_assets.digest()
    assert {p.name for p in small.iterdir()} == {"assets", "assets.json"}, "nothing else stays"
    for source in (folder(tmp_path / "b", FILES), folder(tmp_path / "c" / "x" / "assets", FILES).parents[1]):
        libero_assets.install(str(source))
        assert libero_assets.digest() == before
        assert (small / "assets/textures/wall.png").read_bytes() == FILES["textures/wall.png"]


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: archive(p, FILES, entry("/etc/evil")), "leads out of the folder"),
        (lambda p: archive(p, FILES, entry("bundle/../../evil")), "leads out of the folder"),
        (lambda p: archive(p, FILES, entry("bundle/l", tarfile.SYMTYPE, "/etc")), "neither a file nor a folder"),
        (lambda p: archive(p, FILES, entry("bundle/l", tarfile.LNKTYPE, "x")), "neither a file nor a folder"),
        (lambda p: archive(p, FILES, entry("bundle/p", tarfile.FIFOTYPE)), "neither a file nor a folder"),
        (lambda p: archive(p, FILES | {f"n{i}": b"" for i in range(30)}), "more than 20 files"),
        (lambda p: archive(p, FILES | {"big": b"0" * 2000}), "not LIBERO's assets"),
        (lambda p: archive(p, {"readme.txt": b"hello"}), "holds no LIBERO assets: no folder in it has objects, scenes"),
        (
            lambda p: archive(p, {n: b for n, b in FILES.items() if "wall" not in n}),
            "lacks 1 of the 5 files .*wall.png",
        ),
        (
            lambda p: archive(p, FILES | {"scenes/room.xml": b"<other/>"}),
            "1 files that decide .* e.g. scenes/room.xml",
        ),
        (lambda p: archive(p, FILES | {"textures/wall.png": b""}), "wall.png is empty"),
        (lambda p: archive(p, FILES | {"textures/wall.png": b"version https://git-lfs.x"}), "is a Git LFS pointer"),
        (lambda p: p.write_bytes(b"no archive") and p, "cannot be unpacked"),
        (lambda p: p.write_bytes(archive(p, FILES).read_bytes()[:150]) and p, "cannot be unpacked|is damaged"),
        (lambda p: p, "no file or folder"),
    ],
)
def test_what_is_no_assets_archive_is_refused(
    make: Callable[[Path], Path], message: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libero_assets.install(str(archive(tmp_path / "good.tar.xz", FILES)))
    monkeypatch.setattr(libero_assets, "MAX_FILES", 20)
    monkeypatch.setattr(libero_assets, "MAX_BYTES", 1500)
    with pytest.raises(UserError, match=message):
        libero_assets.install(str(make(tmp_path / "bad.tar.xz")))
    libero_assets.installed()  # what was there is untouched
    assert {p.name for p in small.iterdir()} == {"assets", "assets.json"}
    assert not (tmp_path / "evil").exists() and not (small / "evil").exists()


def test_other_physics_files_only_on_demand(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    libero_assets.install(str(folder(tmp_path / "a", FILES)))
    usual = libero_assets.digest()
    other = folder(tmp_path / "b", FILES | {"scenes/room.xml": b"<other/>"})
    assert main(["data", "assets", "libero", "--from", str(other)]) == 2
    assert libero_assets.digest() == usual
    assert main(["data", "assets", "libero", "--from", str(other), "--accept-differences"]) == 0
    assert "scenes/room.xml: compare no results" in capsys.readouterr().err
    assert libero_assets.installed() and libero_assets.digest() != usual
    (small / "assets/objects/milk.xml").write_text("changed")
    with pytest.raises(UserError, match=r"milk.xml is not the file that was installed .*clbench data assets"):
        libero_assets.installed()
    (small / "assets/objects/milk.xml").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of the 5 files .*milk.xml.*clbench data assets"):
        libero_assets.installed()


def test_what_a_killed_installation_left_is_cleared_away(small: Path, tmp_path: Path) -> None:
    (small / ".partial-killed" / "source").mkdir(parents=True)
    libero_assets.install(str(folder(tmp_path / "a", FILES)))
    assert {p.name for p in small.iterdir()} == {"assets", "assets.json"}
    with held(small, "installation"), pytest.raises(UserError, match="in use by another installation: process "):
        libero_assets.install(str(tmp_path / "a"))


def test_other_textures_are_told_apart(small: Path, tmp_path: Path) -> None:
    libero_assets.install(str(folder(tmp_path / "a", FILES)))
    physics, looks = libero_assets.digest(), libero_assets.looks_digest()
    libero_assets.install(str(folder(tmp_path / "b", FILES | {"textures/wall.png": b"another picture"})))
    assert libero_assets.digest() == physics and libero_assets.looks_digest() != looks


def test_without_the_hub_there_is_one_message(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "assets", "libero", "--from", "hub"]) == 2  # tests have no network
    error = capsys.readouterr().err
    assert "cannot fetch lerobot/libero-assets" in error and "Give an archive or a folder" in error
    assert error.count("\n") == 1


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CLBENCH_LIBERO_ROOT", str(tmp_path))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the terminal"))
    spec = {"type": "libero_state", "task": SOUP}
    if importlib.util.find_spec("libero") is not None:
        with pytest.raises(UserError, match=r"assets are not installed .*clbench data assets libero --from"):
            make_simulator(spec)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"LIBERO is not installed\. .*scripts/bootstrap.sh.*LIBERO_PYTHON"):
        make_simulator(spec)


def test_the_doctor_names_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLBENCH_LIBERO_ROOT", str(tmp_path))
    main(["doctor"])
    out = capsys.readouterr().out
    assert "clbench data assets libero --from" in out or "LIBERO is not installed" in out


def test_state_only_names_the_stream_on_states() -> None:
    from clbench.cli import _stream_on_states

    assert _stream_on_states("libero_object") == _stream_on_states("libero_object_state") == "libero_object_state"
    assert _stream_on_states("metaworld_quick") == "metaworld_quick"
    with pytest.raises(UserError, match=r"no stream 'libero_objekt_state'. Did you mean 'libero_object_state'"):
        _stream_on_states("libero_objekt")
    assert set(STREAMS) <= set(available("datasets"))


# The simulator


def trajectory(simulator: Simulator, seed: int, steps: int = 25) -> np.ndarray:
    """Returns (steps + 1, 1 + STATE_DIM): time and state of an episode of random actions."""
    rng = np.random.default_rng(seed)
    rows = [simulator.reset(seed)[STATE_KEY]]
    for _ in range(steps):
        rows.append(simulator.step(rng.uniform(-1, 1, libero.ACTION_DIM)).observation[STATE_KEY])
    return np.stack(rows)


@pytest.fixture(scope="module")
def simulators() -> Iterator[Callable[[str], Any]]:
    made: dict[str, Any] = {}

    def get(task: str) -> Any:
        if task not in made:
            made[task] = make_simulator({"type": "libero_state", "task": task})
        return made[task]

    yield get
    for simulator in made.values():
        simulator.close()
        simulator.close()


def fail(error: BaseException) -> None:
    raise error


class TestSimulator:
    pytestmark = with_simulator

    @pytest.mark.parametrize(
        ("task", "seed"),
        [pytest.param(*c, marks=pytest.mark.slow) for c in ((SOUP, 5), (DRAWER, EVAL_SEED_BASE + 3), (STOVE, 5))],
    )
    def test_the_seed_alone_decides_an_episode(self, simulators: Callable[[str], Any], task: str, seed: int) -> None:
        used = simulators(task)
        before = np.random.get_state()[1].copy()  # type: ignore[index]
        want = trajectory(used, seed)
        trajectory(used, 6)
        np.testing.assert_array_equal(trajectory(used, seed), want)
        assert not np.array_equal(trajectory(used, seed + 1, 1)[0], want[0])
        np.testing.assert_array_equal(np.random.get_state()[1], before)  # type: ignore[index]

        hard = make_simulator({"type": "libero_state", "task": task})  # a new model at every reset, as LIBERO has it
        inner = hard.env.env  # type: ignore[attr-defined]
        load, start = inner._load_model, inner._initialize_sim
        placement = seed if seed < EVAL_SEED_BASE else seed - EVAL_SEED_BASE

        def load_anew() -> None:
            inner.object_property_initializers.clear()  # LIBERO appends to it at every load
            load()

        def start_anew() -> None:
            start()
            np.random.seed(placement)  # loading draws from the generator, too

        inner.hard_reset, inner._load_model, inner._initialize_sim = True, load_anew, start_anew
        np.testing.assert_array_equal(trajectory(hard, seed), want)
        hard.close()

    @pytest.mark.parametrize("task", [pytest.param(DRAWER, marks=pytest.mark.slow), STOVE])
    def test_computing_nothing_twice_changes_no_bit(
        self, simulators: Callable[[str], Any], task: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(libero.LiberoSimulator, "_skip_what_is_known", lambda self: None)
        plain = make_simulator({"type": "libero_state", "task": task})
        for simulator in (simulators(task), plain):
            simulator.reset(8)
            for action in np.random.default_rng(0).uniform(-1, 1, (40, libero.ACTION_DIM)):
                simulator.step(action)
        want, found = (s.env.get_sim_state() for s in (plain, simulators(task)))  # type: ignore[attr-defined]
        np.testing.assert_array_equal(found, want)
        plain.close()

    def test_another_process_sees_the_same_episode_and_is_asked_nothing(
        self, simulators: Callable[[str], Any], tmp_path: Path
    ) -> None:
        code = (
            "import builtins, hashlib, os\n"
            "import logging\n"
            "def refuse(*a): raise SystemExit('asked on the terminal')\n"
            "logging.basicConfig()\n"
            "builtins.input = refuse\n"
            "from tests import test_libero as t\n"
            "s = t.make_simulator({'type': 'libero_state', 'task': t.SOUP})\n"
            "print(hashlib.sha256(t.trajectory(s, 4).tobytes()).hexdigest())\n"
        )
        environment = {k: v for k, v in os.environ.items() if k != "LIBERO_CONFIG_PATH"}
        environment |= {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, env=environment, cwd=ROOT)
        assert done.returncode == 0 and "robosuite" not in done.stderr, done.stderr
        assert done.stdout.split()[-1] == hashlib.sha256(trajectory(simulators(SOUP), 4).tobytes()).hexdigest()
        assert not (tmp_path / ".libero").exists() and not (tmp_path / ".cache" / "libero").exists()

    def test_the_test_starts_from_liberos_states_and_demonstrations_and_validation_do_not(
        self, simulators: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        simulator = simulators(SOUP)
        published = simulator.initial_states()
        assert published.shape == (50, 110) and libero.LiberoState.test_states == 50
        monkeypatch.setattr(libero, "settle_steps", lambda task: 0)
        simulator.reset(EVAL_SEED_BASE + 7)
        np.testing.assert_array_equal(simulator.env.get_sim_state(), published[7])
        simulator.reset(EVAL_SEED_BASE + 57)
        np.testing.assert_array_equal(simulator.env.get_sim_state(), published[7])
        sampled = []
        for seed in (0, 1, 2, VALIDATION_SEED_BASE, VALIDATION_SEED_BASE + 1):
            simulator.reset(seed)
            sampled.append(simulator.env.get_sim_state())
            assert all(np.abs(sampled[-1] - other).max() > 1e-3 for other in sampled[:-1])
            assert np.abs(published - simulator.env.get_sim_state()).max(axis=1).min() > 1e-3

    def test_the_state_is_the_robots_and_the_objects_poses(self, simulators: Callable[[str], Any]) -> None:
        import torch
        from lerobot.processor.env_processor import LiberoProcessorStep

        simulator = simulators(DRAWER)
        simulator.reset(1)
        state = simulator.step(np.array([0.3, -0.2, 0.1, 0.5, 0, 0.2, 1])).observation[STATE_KEY]
        assert state.shape == (libero.STATE_DIM,) and state.dtype == np.float32
        inner = simulator.env.env
        type(inner)._update_observables(inner, force=True)
        raw = type(inner)._get_observations(inner)
        robot = {
            "eef": {n: torch.tensor(raw[f"robot0_eef_{n}"])[None] for n in ("pos", "quat")},
            "gripper": {"qpos": torch.tensor(raw["robot0_gripper_qpos"])[None]},
        }
        want = LiberoProcessorStep().observation({"observation.robot_state": robot})["observation.state"][0]
        np.testing.assert_allclose(state[:8], want, atol=2e-3)
        for i, name in enumerate(simulator.env.env.objects_dict):
            pose = np.concatenate([raw[f"{name}_pos"], raw[f"{name}_quat"]])
            np.testing.assert_allclose(state[8 + 7 * i : 15 + 7 * i], pose, atol=1e-6)
        drawers = [j for f in simulator.env.env.fixtures_dict.values() for j in f.joints]
        want = [simulator.env.sim.data.get_joint_qpos(j) for j in drawers]
        np.testing.assert_allclose(state[85 : 85 + len(want)], want, atol=1e-6)
        assert np.abs(want).max() > 0.05, "the top drawer stands open"

    @pytest.mark.slow
    def test_scenes_are_at_rest_when_an_episode_begins(self, simulators: Callable[[str], Any]) -> None:
        for task in (SOUP, libero_tasks.suite_tasks("libero_10")[0]):
            simulator = simulators(task)
            for seed in (2, EVAL_SEED_BASE):
                first = simulator.reset(seed)[STATE_KEY][8:]
                for _ in range(20):
                    last = simulator.step(libero.IDLE).observation[STATE_KEY][8:]
                assert np.abs(last - first).max() < 0.02, task

    def test_actions_are_clipped_and_checked(self, simulators: Callable[[str], Any]) -> None:
        simulator = simulators(SOUP)
        simulator.reset(0)
        wild = simulator.step(np.full(7, 9.0)).observation[STATE_KEY]
        simulator.reset(0)
        np.testing.assert_array_equal(simulator.step(np.ones(7)).observation[STATE_KEY], wild)
        with pytest.raises(ValueError, match="shape"):
            simulator.step(np.zeros(4))
        with pytest.raises(ValueError, match="not finite"):
            simulator.step(np.full(7, np.nan))

    def test_a_reset_tries_other_placements_and_hides_no_other_failure(
        self, simulators: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from robosuite.utils.errors import RandomizationError

        simulator = simulators(SOUP)
        inner, reset = simulator.env.env, simulator.env.env.reset
        raised: list[BaseException] = [RandomizationError("no place"), RandomizationError("no place")]
        monkeypatch.setattr(inner, "reset", lambda: fail(raised.pop()) if raised else reset())
        simulator.reset(0)
        assert not raised
        for error in (MemoryError(), KeyboardInterrupt()):
            raised.append(error)
            with pytest.raises(type(error)):
                simulator.reset(0)
        monkeypatch.setattr(inner, "reset", lambda: fail(RandomizationError("no place")))
        with pytest.raises(RuntimeError, match=f"{SOUP}: found no placement of its objects in 100 attempts"):
            simulator.reset(0)

    def test_versions_tell_the_assets(self) -> None:
        found = family("libero_state").versions()
        assert set(found) == {"hf-libero", "robosuite", "mujoco", "bddl", "libero_assets"}
        assert len(found["libero_assets"]) == 12

    @pytest.mark.slow
    def test_demonstrations_are_made_and_labelled(self, tmp_path: Path) -> None:
        from clbench.data.info import load_info
        from clbench.data.make import make_dataset

        root = make_dataset(
            tmp_path / "tiny", name="tiny", env_type="libero_state", tasks=[SOUP], demos_per_task=1, seed=0,
            max_steps=280, ceiling_episodes=0, workers=1, progress=False,
        )  # fmt: skip
        info = load_info(root)
        assert info.env_type == "libero_state" and info.episodes == 1 and info.frames > 20
        assert json.loads((root / "meta/clbench.json").read_text())["privileged"] == libero.LiberoState.privileged
        assert info.versions["hf-libero"]
