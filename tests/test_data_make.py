"""Making demonstrations: what decides their contents, what an interruption leaves, what is refused."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clbench.cli import main
from clbench.config.compose import compose
from clbench.config.schema import DatasetConfig
from clbench.data import make as data_make
from clbench.data import verify
from clbench.data.experts.metaworld import MetaworldExperts
from clbench.data.info import INFO_FILE, fingerprint, load_info
from clbench.data.make import ROLES, episode_seed, make_dataset, run_episode
from clbench.data.source import DataSource, Depth, check_every_byte, open_data
from clbench.envs.base import EVAL_SEED_BASE, STATE_KEY, Observation, Step
from clbench.errors import UserError
from clbench.io import read_json, seal, write_json
from clbench.stopping import clearing_away
from clbench.streams.stream import build_stream, pretraining_tasks

ROOT = Path(__file__).resolve().parents[1]
TASKS = ["reach-v3", "handle-press-side-v3"]


def make(root: Path, **changes: Any) -> Path:
    parameters: dict[str, Any] = {
        "name": "tiny",
        "env_type": "metaworld",
        "tasks": TASKS,
        "demos_per_task": 2,
        "seed": 3,
        "ceiling_episodes": 2,
        "workers": 2,
        "progress": False,
    }
    return make_dataset(root, **(parameters | changes))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("made") / "tiny")


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "tiny"))


def test_what_the_expert_cannot_do_is_left_out_and_trained_without(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`copied` is the set of the other tasks, and a copy passes for the base's, so that nothing has to be made."""
    monkeypatch.setenv("CLBENCH_DATA_ROOT", str(tmp_path))
    record = read_json(shutil.copytree(copied, tmp_path / "base") / INFO_FILE) | {"name": "base"}
    others = ["window-close-v3", "faucet-close-v3"]
    for task, name in zip(record["tasks"], others, strict=True):
        task["name"] = name
    del record["seal"]  # it is of the description as it was
    write_json(tmp_path / "base" / INFO_FILE, record)
    cannot = {"push-v3": "its arm is too short", "door-open-v3": "it has no key"}
    monkeypatch.setattr(MetaworldExperts, "cannot", cannot)
    how = {"demos_per_task": 2, "seed": 3, "ceiling_episodes": 2}
    stream = {"name": "mine", "data": "tiny", "env": {"type": "metaworld", "max_steps": 200}, "make": how,
              "tasks": ["push-v3", *TASKS], "pretrain": {"data": "base", "tasks": [*others, "door-open-v3"],
              "make": how}}  # fmt: skip
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps({"dataset": stream}))
    assert main(["data", "make", str(file)]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert "tiny: no demonstrations can be made of push-v3, which is left out: its arm is too short." in lines
    assert "base: no demonstrations can be made of door-open-v3, which is left out: it has no key." in lines
    said = [line.partition(" -- ")[2].strip("'") for line in lines if "to train on the rest give -- " in line]
    assert len(said) == 2 and [k for k, line in enumerate(lines) if "nothing to do" in line] == [4, 5]

    def composed(overrides: list[str]) -> DatasetConfig:
        names = ["seqfft"]
        return compose(
            model="dit_dec_tiny", algorithms=names, dataset=str(file), registered=names, overrides=overrides
        )[0].dataset

    with pytest.raises(UserError, match="no task 'push-v3'"):
        build_stream(composed([]))
    assert [v.task for v in build_stream(composed(said)).visits] == TASKS
    assert [t.name for t in pretraining_tasks(composed(said))[0]] == others

    alone = ["dataset.tasks=[push-v3,door-open-v3]", "dataset.pretrain.tasks=[window-close-v3]"]
    assert main(["data", "make", str(file), "--", *alone]) == 2
    assert (
        "no demonstrations can be made for push-v3: its arm is too short; door-open-v3: it has no key. Leave them out."
        in capsys.readouterr().err
    )

    noisier = ["dataset.data=third", "dataset.tasks=[push-v3,reach-v3]", "dataset.pretrain.make.action_noise=0.3"]
    assert main(["data", "make", str(file), "--", *noisier]) == 2
    refused = capsys.readouterr().err.splitlines()[-1]
    assert "base already holds a data set with other parameters: action_noise is " in refused
    assert "dataset.pretrain.data=NAME" in refused
    assert not (tmp_path / "third").exists(), "nothing is made before all can be"


def columns(root: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(next(root.glob("data/*/*.parquet")))
    return {key: np.asarray(table[key].to_pylist()) for key in table.column_names}


def partials(root: Path) -> list[Path]:
    return sorted(root.parent.glob(f".{root.name}.partial-*"))


# What is made


def test_the_description_tells_what_is_there(made: Path) -> None:
    info = load_info(made)
    data = columns(made)
    assert [t.name for t in info.tasks] == TASKS and [t.task_index for t in info.tasks] == [0, 1]
    assert [t.episodes for t in info.tasks] == [(0, 1), (2, 3)]
    assert info.task("reach-v3").instruction == "Reach a goal position"
    for task in info.tasks:
        mine = data["task_index"] == task.task_index
        assert mine.sum() == task.frames and set(data["episode_index"][mine]) == set(task.episodes)
        assert task.demo_successes == 2 <= task.demo_attempts
        assert task.expert_attempts == 2 and task.expert_success_rate == task.expert_successes / 2
    assert info.frames == len(data["index"]) and info.episodes == 4
    assert set(info.versions) >= {"metaworld", "mujoco", "numpy", "lerobot"}
    found = fingerprint(data[STATE_KEY], data["action"], data["episode_index"], data["task_index"])
    assert found == info.fingerprint
    assert np.abs(data["action"]).max() <= 1
    assert partials(made) == []


def test_the_contents_depend_on_the_seed_and_not_on_the_workers(made: Path, tmp_path: Path) -> None:
    alone = make(tmp_path / "alone", workers=1)
    a, b = columns(made), columns(alone)
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)
    assert (made / "meta/clbench.json").read_text() == (alone / "meta/clbench.json").read_text()
    # A task's demonstrations are its own, whatever is made beside it; another seed gives others.
    single = make(tmp_path / "single", tasks=TASKS[1:], ceiling_episodes=0)
    mine = a["task_index"] == 1
    np.testing.assert_array_equal(columns(single)[STATE_KEY], a[STATE_KEY][mine])
    other = make(tmp_path / "other", tasks=TASKS[1:], ceiling_episodes=0, seed=4)
    assert load_info(other).fingerprint != load_info(single).fingerprint


def test_lerobot_loads_it(made: Path) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("tiny", root=made, delta_timestamps={"action": [i / 80 for i in range(4)]})
    info = load_info(made)
    assert (dataset.num_episodes, dataset.num_frames, dataset.fps) == (4, info.frames, 80)
    assert dataset.meta.robot_type == "sawyer" and dataset.meta.camera_keys == []
    first, last = dataset[0], dataset[len(dataset) - 1]
    assert tuple(first[STATE_KEY].shape) == (39,) and tuple(first["action"].shape) == (4, 4)
    assert first["task"] == "Reach a goal position" and last["task"] == "Press a handle down sideways"
    assert first["action_is_pad"].tolist() == [False] * 4
    assert last["action_is_pad"].tolist() == [False, True, True, True]
    np.testing.assert_array_equal(first["action"].numpy(), columns(made)["action"][:4].astype(np.float32))


# Seeds and episodes


def test_seeds_are_distinct_and_out_of_evaluations_reach() -> None:
    seeds = [episode_seed(0, "metaworld", "push-v3", role, i) for role in ROLES for i in range(20_000)]
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) >= 0 and max(seeds) < EVAL_SEED_BASE
    others = {episode_seed(1, "metaworld", "push-v3", "demo", i) for i in range(200)}
    assert len(others & set(seeds[:200])) < 5, "another data set shows other episodes"
    assert episode_seed(0, "metaworld", "push-v3", "demo", 0) == 986946, "a change makes old sets irreproducible"


class Counting:
    """A simulator that succeeds at its third step, for one step, and remembers what it was told."""

    def __init__(self) -> None:
        self.actions: list[np.ndarray] = []

    def reset(self, seed: int) -> Observation:
        return {STATE_KEY: np.full(2, seed, np.float32)}

    def step(self, action: np.ndarray) -> Step:
        self.actions.append(action)
        n = len(self.actions)
        return Step({STATE_KEY: np.full(2, n, np.float32)}, 0.0, n == 3)

    def render(self, width: int, height: int) -> np.ndarray:
        raise NotImplementedError

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("max_steps", "tail", "length", "success"),
    [(100, 10, 13, True), (100, 0, 3, True), (8, 10, 8, True), (2, 10, 2, False)],
)
def test_an_episode_keeps_a_tail_after_its_first_success(max_steps: int, tail: int, length: int, success: bool) -> None:
    simulator = Counting()
    states, labels, succeeded = run_episode(
        simulator, lambda _: np.array([5.0, 0.5]), 7, max_steps, tail, 0.1, np.random.default_rng(0)
    )
    assert (len(states), len(labels), len(simulator.actions), succeeded) == (length, length, length, success)
    assert states[:, 0].tolist() == [7, *range(1, length)], "a label stands beside the state it answers"
    assert (labels == np.array([1.0, 0.5], np.float32)).all(), "labels are the expert's, clipped, without noise"
    executed = np.stack(simulator.actions)
    assert np.abs(executed).max() <= 1 and np.unique(executed[:, 1]).size == length, "executed with noise"


# What is already there


def test_the_same_set_is_left_as_it_is(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in copied.rglob("*")}
    make(copied, progress=True, workers=1)
    assert "nothing to do" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in copied.rglob("*")} == before


def test_another_set_is_not_overwritten_unless_forced(copied: Path) -> None:
    with pytest.raises(UserError, match=r"demos_per_task is 2, wanted 1; .*--force") as error:
        make(copied, demos_per_task=1, tasks=TASKS[:1])
    assert "tasks is" in str(error.value) and "seed" not in str(error.value)
    make(copied, demos_per_task=1, tasks=TASKS[:1], ceiling_episodes=0, force=True)
    info = load_info(copied)
    assert info.episodes == 1 and info.tasks[0].expert_success_rate is None
    assert partials(copied) == []


def test_a_folder_that_is_not_ours_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("!")
    with pytest.raises(UserError, match="not made by clbench"):
        make(tmp_path / "thesis", force=True)
    assert (tmp_path / "thesis" / "chapter.tex").exists()


def test_two_makes_of_one_set_do_not_mix(tmp_path: Path) -> None:
    other = tmp_path / ".tiny.partial-1"
    other.mkdir()
    with open(other / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"another process is making .*: kill 1$"):
            make(tmp_path / "tiny")
    assert other.exists()


# What was made and is damaged


def opened(root: Path, depth: Depth = "all") -> DataSource:
    settings = DatasetConfig(data=str(root))
    return open_data(settings, "metaworld", TASKS, stream="mine", depth=depth)


def flip(path: Path, at: int) -> bytes:
    """Change one bit; returns what was there."""
    good = path.read_bytes()
    path.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
    return good


def without_sums(root: Path) -> None:
    """As an earlier version made it."""
    record = read_json(root / INFO_FILE)
    write_json(root / INFO_FILE, {k: v for k, v in record.items() if k not in ("files", "seal")})


def test_every_changed_bit_of_a_set_is_noticed_at_the_start(copied: Path) -> None:
    rng = np.random.default_rng(0)
    opened(copied)
    for path in sorted(p for p in copied.rglob("*") if p.is_file()):
        for at in rng.integers(0, path.stat().st_size, 10):
            good = flip(path, int(at))
            if path.name != "clbench.json" or good[at : at + 1].strip():  # white space says nothing
                with pytest.raises(UserError) as e:
                    opened(copied)
                assert str(path.relative_to(copied)) in str(e.value)
            path.write_bytes(good)
    opened(copied)


def test_a_large_sets_bytes_are_compared_when_asked_for(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a start there is time for the small files and all sizes; `data check` and --resume read everything."""
    table = next(copied.glob("data/*/*.parquet"))
    monkeypatch.setattr(verify, "START_BYTES", table.stat().st_size - 1)
    good = flip(table, 1000)
    source = opened(copied)
    with pytest.raises(UserError, match=r"file-000\.parquet was changed.*clbench data make --force mine"):
        check_every_byte(copied, source.description, "mine")
    for changed, message in ((good[:-1], "bytes instead of"), (None, "is missing")):
        table.unlink()
        if changed is not None:
            table.write_bytes(changed)
        with pytest.raises(UserError, match=message):
            opened(copied)
    table.write_bytes(good)
    shutil.copy(table, table.with_name("file-001.parquet"))
    with pytest.raises(UserError, match=r"file-001\.parquet does not belong there"):
        opened(copied)
    (table.with_name("file-001.parquet")).rename(copied / "notes.txt")  # a file that nothing reads
    check_every_byte(copied, opened(copied).description, "mine")


def test_a_set_without_sums_is_compared_with_its_fingerprint(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = opened(copied)
    without_sums(copied)
    assert opened(copied) == made  # and so its base and its runs stay what they were
    table = next(copied.glob("data/*/*.parquet"))
    values = pq.read_table(table)
    actions = values["action"].to_pylist()
    actions[7][2] += 1e-3
    column = pa.array(actions, values["action"].type)
    pq.write_table(values.set_column(values.column_names.index("action"), "action", [column]), table)
    with pytest.raises(UserError, match=r"its frames are not those that were made.*--force mine"):
        opened(copied)
    monkeypatch.setattr(verify, "START_BYTES", 1000)
    with pytest.raises(UserError, match="not those that were made"):
        check_every_byte(copied, opened(copied).description, "mine")
    table.write_bytes(table.read_bytes()[:500])
    with pytest.raises(UserError, match="frames cannot be read"):
        check_every_byte(copied, opened(copied).description, "mine")


def test_a_damaged_set_is_made_again_when_forced(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(next(copied.glob("data/*/*.parquet")), 1000)
    for check in (True, False):
        with pytest.raises(UserError, match=r"was changed\. --force makes it again"):
            make(copied, only_check=check)

    def begin(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(data_make, "_collecting", begin)
    with pytest.raises(KeyboardInterrupt):
        make(copied, force=True)
    assert copied.exists() and partials(copied) == []


def test_check_compares_every_byte(copied: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps({"dataset": {"name": "mine", "data": str(copied), "tasks": TASKS,
                                            "env": {"type": "metaworld", "max_steps": 200}}}))  # fmt: skip
    monkeypatch.setattr(verify, "START_BYTES", 0)
    assert main(["data", "check", str(file)]) == 0
    flip(next(copied.glob("data/*/*.parquet")), 1000)
    assert main(["data", "check", str(file)]) == 2


def test_a_description_names_files_of_its_set_only(copied: Path) -> None:
    record = read_json(copied / INFO_FILE)
    for files in ({"../other": [1, "a"]}, {"/etc/passwd": [1, "a"]}, {"a": [-1, "a"]}, {"a": 3}, []):
        body = {k: v for k, v in record.items() if k != "seal"} | {"files": files}
        write_json(copied / INFO_FILE, body | {"seal": seal(body)})
        with pytest.raises(UserError, match=r"clbench\.json is damaged"):
            load_info(copied)


# What goes wrong


def test_bad_parameters_are_named(tmp_path: Path) -> None:
    root = tmp_path / "tiny"
    for changes, message in (
        ({"tasks": ["reach-v3", "reech-v3"]}, "no task 'reech-v3'. Did you mean 'reach-v3'"),
        ({"tasks": []}, "at least one task"),
        ({"tasks": ["reach-v3", "reach-v3"]}, "more than once: reach-v3"),
        ({"env_type": "metawrld"}, "Did you mean 'metaworld'"),
        ({"demos_per_task": 0}, "demos_per_task must be"),
        ({"demos_per_task": 2.5}, "demos_per_task must be"),
        ({"seed": -1}, "seed must be"),
        ({"max_steps": 501}, "max_steps must be a whole number from 1 to 500"),
        ({"action_noise": -0.1}, "action_noise must be 0 or more"),
        ({"action_noise": float("nan")}, "action_noise must be 0 or more"),
        ({"workers": 0}, "workers must be"),
    ):
        with pytest.raises(UserError, match=message):
            make(root, **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_task_that_its_expert_cannot_do_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'hammer-v3' succeeded in 0 of 10 attempts \(0%\).*max_steps \(now 5\)"):
        make(tmp_path / "tiny", tasks=["hammer-v3"], demos_per_task=1, max_steps=5)
    assert list(tmp_path.iterdir()) == []


def test_tasks_that_fail_are_left_out_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In 60 steps the expert can reach, and hardly ever hammer."""
    root = tmp_path / "tiny"
    tasks = ["hammer-v3", "reach-v3"]
    short: dict[str, Any] = {"tasks": tasks, "max_steps": 60, "demos_per_task": 2, "progress": True}
    info = load_info(make(root, leave_out=True, **short))
    assert [t.name for t in info.tasks] == ["reach-v3"] and info.tasks[0].task_index == 0 and info.episodes == 2
    assert info.left_out.keys() == {"hammer-v3"}
    assert re.search(r"succeeded in [01] of 20 attempts .*, too few for 2 dem", info.left_out["hammer-v3"])
    said = capsys.readouterr().err
    assert "hammer-v3 is left out: the expert of" in said and "tiny: 1 task, 2 episodes" in said
    with pytest.raises(UserError, match=r"has no task 'hammer-v3'\. It was left out: the expert of"):
        info.task("hammer-v3")
    make(root, leave_out=True, **short)
    assert "already holds 'tiny' with these parameters" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds a data set with other parameters: tasks is"):
        make(root, **short)
    with pytest.raises(UserError, match=r"can do none of its tasks\. Raise max_steps \(now 60\)"):
        make(tmp_path / "none", leave_out=True, **(short | {"tasks": tasks[:1]}))
    assert not (tmp_path / "none").exists()


def test_an_expert_without_a_single_success_is_given_up_early(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"0 of 50 attempts \(0%\), too few for 20 .*--leave-out-failing"):
        make(tmp_path / "tiny", tasks=["hammer-v3"], demos_per_task=20, max_steps=5)


def test_the_command_names_the_tasks_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLBENCH_DATA_ROOT", str(tmp_path))
    options = ["--demos", "1", "--leave-out-failing", "--", "dataset.make.max_steps=60", "dataset.pretrain=null",
               "dataset.make.ceiling_episodes=0", "dataset.tasks=[reach-v3, hammer-v3, push-v3]"]  # fmt: skip
    assert main(["data", "make", "metaworld_quick", *options]) == 0
    said = capsys.readouterr().err
    last = said.strip().splitlines()[-1]
    assert last.startswith("metaworld_quick: to train on the rest give -- ") and "hammer-v3 is left out" in said
    left = last.rpartition("give -- ")[2].strip("'")
    made = [t.name for t in load_info(tmp_path / "metaworld_quick").tasks]
    config, _ = compose(model="dit_dec_tiny", algorithms=["seqfft"], dataset="metaworld_quick", registered=["seqfft"],
                        overrides=[*options[4:], left])  # fmt: skip
    assert [config.dataset.tasks[k] for k in config.dataset.task_order] == made and "reach-v3" in made


SCRIPT = """
import sys
from pathlib import Path
from clbench.data.make import make_dataset
if __name__ == "__main__":
    make_dataset(Path(sys.argv[1]), name="tiny", env_type="metaworld", demos_per_task=5000, seed=3,
                 tasks=["reach-v3", "push-v3", "hammer-v3"])
"""


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def shared_memory(pid: int) -> set[str]:
    """The files in /dev/shm that a process uses and that would outlive it."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line and not line.endswith("(deleted)")}


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds children in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_make_leaves_nothing_taken_for_whole(how: signal.Signals, tmp_path: Path) -> None:
    root = tmp_path / "tiny"
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), str(root)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)
    children: list[int] = []
    deadline = time.monotonic() + 60
    while len(children) < 3:  # what forks its workers, and two of them
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
        forking = children_of(process.pid)
        children = [*forking, *(worker for pid in forking for worker in children_of(pid))]
    time.sleep(1.0)
    assert all(running(pid) for pid in children), "it is at work"
    if how == signal.SIGKILL:  # with all that it started, as a container's end or a job's limit does
        semaphores = {path for pid in children for path in shared_memory(pid)}
        os.killpg(process.pid, how)
        assert not semaphores, "nothing in /dev/shm outlives them"
    else:
        process.send_signal(how)
    process.communicate(timeout=300)  # an import under way ends first
    assert process.returncode != 0
    deadline = time.monotonic() + 60
    while any(running(pid) for pid in children):
        assert time.monotonic() < deadline, "workers end with their parent"
        time.sleep(0.05)
    assert not root.exists()
    assert len(partials(root)) == (1 if how == signal.SIGKILL else 0)
    if how == signal.SIGKILL:
        make(root, demos_per_task=1, ceiling_episodes=0)
        assert load_info(root).episodes == 2
        assert partials(root) == []


def test_a_worker_that_is_killed_is_named_with_the_likely_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = data_make._start_worker

    def start_and_kill() -> data_make._Worker:
        worker = start()
        worker.process.kill()
        return worker

    monkeypatch.setattr(data_make, "_start_worker", start_and_kill)
    with pytest.raises(UserError, match=r"was killed by SIGKILL \(often: out of memory\)\. Nothing was written"):
        make(tmp_path / "tiny")
    assert list(tmp_path.iterdir()) == []


def test_sigterm_clears_away_as_ctrl_c_does() -> None:
    with pytest.raises(KeyboardInterrupt), clearing_away():
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_import_neither_swallows_a_signal_nor_fails_of_it(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As LeRobot's does, whose parts catch whatever is raised while they are imported."""
    (tmp_path / "swallowing.py").write_text(
        f"import os, time\ntry:\n    os.kill(os.getpid(), {int(number)})\n    time.sleep(0.3)\n"
        f"    os.kill(os.getpid(), {int(number)})\n    time.sleep(0.1)\n    whole = True\n"
        "except BaseException:\n    whole = False\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        with clearing_away():
            with pytest.raises(KeyboardInterrupt):
                importlib.import_module("swallowing")
                time.sleep(10)
            time.sleep(0.5)  # the second, close to the first, is one request with it: clearing away is not disturbed
        assert sys.modules["swallowing"].whole, "the import ended first"
        assert (
            capfd.readouterr().err == f"{number.name}: stopping once the libraries are loaded; again to stop at once.\n"
        )
    finally:
        sys.modules.pop("swallowing", None)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_signal_ends_an_import_that_hangs(tmp_path: Path) -> None:
    (tmp_path / "hanging.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(60)\n")
    code = "from clbench.stopping import interruptible\nwith interruptible():\n    import hanging\n"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.7)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT


# Reading descriptions


def test_what_cannot_be_read_is_explained(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Make it with: clbench data make absent"):
        load_info(tmp_path / "absent")
    with pytest.raises(UserError, match=r"has no task 'reech-v3'. Did you mean 'reach-v3'"):
        load_info(copied).task("reech-v3")
    path = copied / "meta" / "clbench.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"format": 2}))
    with pytest.raises(UserError, match=r"has format 2.*newer clbench"):
        load_info(copied)
    path.write_text(json.dumps({k: v for k, v in raw.items() if k != "fingerprint"}))
    with pytest.raises(UserError, match=r"damaged: 'fingerprint' is missing.*--force"):
        load_info(copied)
    path.write_text(json.dumps(raw)[:100])
    with pytest.raises(UserError, match="not valid JSON"):
        load_info(copied)
    path.write_text("[]")
    with pytest.raises(UserError, match="no 'format'"):
        load_info(copied)
    path.unlink()
    with pytest.raises(UserError, match="did not make"):
        load_info(copied)
