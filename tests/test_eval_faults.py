"""Evaluations that are killed, stopped, doubled or out of disk; simulators that raise, die and hang: nothing is lost.

All are run as a user runs them, with a simulator that fails on request (tests/faulty_simulator.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clbench.checkpoints.run_folder import save_checkpoint
from clbench.cli import main
from clbench.config.compose import to_yaml
from clbench.envs.base import EVAL_SEED_BASE, Step
from clbench.errors import RESUME_EXIT
from clbench.evaluation.records import CellFile, build_matrix
from clbench.evaluation.seeds import RULE, EpisodeSeeds
from clbench.io import read_json, read_jsonl, write_json, write_text
from clbench.rollout.rollout import Episode, SimulatorPool, Watch, run_episodes
from clbench.testing.toy import STREAM, toy_config
from tests.faulty_simulator import Noise, Simulator

ROOT = Path(__file__).resolve().parents[1]
TRIALS = 8
Files = dict[str, str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three tasks, without weights: the policy here is noise."""
    folder = tmp_path_factory.mktemp("run") / "r"
    config = toy_config(Path("nowhere"), {"name": "seqfft"}, f"eval.episodes={TRIALS}", "eval.cells=last")
    write_text(folder / "config.yaml", to_yaml(config))
    visits = [
        {"k": j, "task": t, "instruction": t, "env": {"type": "metaworld", "task": t, "max_steps": 20}}
        for j, t in enumerate(STREAM)
    ]
    manifest = {"visits": visits, "checkpoints": STREAM, "mode": "sequential", "base": {"path": None}}
    write_json(folder / "manifest.json", manifest)
    for k in range(len(STREAM)):
        save_checkpoint(folder, k, lambda _: {}, lambda: 0)
    return folder


@pytest.fixture(scope="module")
def undisturbed(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The files of an evaluation that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed")
    done = finish(start(run, out))
    assert done.returncode == 0, done.stderr
    return files(out)


def start(
    run: Path, out: Path, *overrides: str, faults: dict[str, str] | None = None, rows: str | None = None
) -> subprocess.Popen[str]:
    """Start an evaluation of `run` into `out` whose simulators fail as `faults` says (for what, see the module)."""
    folder = out / "faults"
    folder.mkdir(exist_ok=True)
    for name, what in (faults or {}).items():
        (folder / name).write_text(what)
    command = [sys.executable, "-m", "tests.faulty_simulator", "eval", "--run-id", str(run), "--output-base", str(out)]
    share = ["--rows", rows] if rows is not None else []
    return subprocess.Popen(
        [*command, *share, "--", "log.progress=quiet", *overrides],
        cwd=ROOT,
        env={**os.environ, "FAULTS": str(folder), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(params=["here", pytest.param("child", marks=pytest.mark.slow)])
def in_child(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether simulators have a process of their own (see clbench/envs/remote.py), under the same interpreter."""
    if request.param == "child":
        program = tmp_path / "python"
        program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} "$@"\n')
        program.chmod(0o755)
        monkeypatch.setenv("FAULTY_PYTHON", str(program))
    return request.param == "child"


def seed_of(task: str, episode: int = 0, split: str = "test", seed: int = 0) -> int:
    return EpisodeSeeds(RULE, split, seed, task).of(episode)


def finish(process: subprocess.Popen[str], timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def evaluation(out: Path) -> Path:
    return out / "r" / "eval"


def files(out: Path) -> Files:
    """All files of an evaluation, the times in them blanked; summary.json holds nothing else."""
    folder = evaluation(out)
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name != "summary.json"]
    return {
        str(p.relative_to(folder)): re.sub(r'"seconds": [0-9.]+', '"seconds": _', p.read_text()) for p in sorted(paths)
    }


def recorded(out: Path) -> int:
    """Whole lines in the cells."""
    return sum(p.read_bytes().count(b"\n") for p in (evaluation(out) / "cells").glob("*.jsonl"))


def wait_for(condition: Any, what: str, seconds: float = 40.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited for {what}"
        time.sleep(0.005)


def children(process: subprocess.Popen[str]) -> list[int]:
    """Its evaluation processes: the children of its only child, which forks them."""
    return [worker for server in _children(process.pid) for worker in _children(server)]


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):  # it has just ended, and they with it
        return [int(p) for t in Path(f"/proc/{pid}/task").iterdir() for p in (t / "children").read_text().split()]
    return []


def simulators_of(workers: Sequence[int]) -> list[int]:
    """The processes that have the simulators of evaluation processes."""
    return [simulators for worker in workers for simulators in _children(worker)]


def ended(pids: Sequence[int]) -> bool:
    return not any(Path(f"/proc/{p}").exists() and "Z" not in stat_of(p) for p in pids)


def stat_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]
    except OSError:
        return "Z"


def test_killed_at_any_moment_it_continues_with_what_is_missing(
    run: Path, undisturbed: Files, tmp_path: Path, in_child: bool
) -> None:
    """kill -9 of the whole evaluation, four times, and a line cut in half; then as if nothing had happened."""
    rng = random.Random(time.time_ns())
    total, before = 3 * TRIALS, 0
    seen: set[int] = set()
    for part in (0.0, 0.2, 0.5, 0.8):
        process = start(run, tmp_path, f"eval.workers={rng.choice((1, 2))}")
        if part:
            wait_for(lambda: recorded(tmp_path) >= max(before + 1, part * total), "episodes")  # noqa: B023
        time.sleep(0.05 * rng.random())
        workers = children(process)
        servers = simulators_of(workers)
        seen.update(servers)
        process.kill()
        finish(process)
        wait_for(lambda: ended([*workers, *servers]), "the orphans to end", 5)  # noqa: B023
        assert recorded(tmp_path) >= before
        before = recorded(tmp_path)
    assert bool(seen) == in_child
    cell = max((evaluation(tmp_path) / "cells").glob("*.jsonl"), key=lambda p: p.stat().st_size)
    os.truncate(cell, cell.stat().st_size - rng.randrange(1, 60))
    before = recorded(tmp_path)
    done = finish(start(run, tmp_path))
    assert done.returncode == 0, done.stderr
    whole_but_for_its_newline = total - before - 1
    assert re.search(rf"evaluating ({total - before}|{whole_but_for_its_newline}) episodes", done.stderr)
    assert files(tmp_path) == undisturbed


def test_simulators_that_raise_die_and_hang_are_replaced(
    run: Path, undisturbed: Files, tmp_path: Path, in_child: bool
) -> None:
    """Each once, and a process killed from outside before it did anything: no trace but the notes."""
    a, b, c = STREAM
    faults = {f"{a}-1": "raise 1", f"{a}-2": "reset-raise 1", f"{b}-0": "die 1", f"{c}-make": "raise 1",
              f"{c}-3": "hang 1", f"{c}-5": "exit 1"}  # fmt: skip
    process = start(run, tmp_path, "eval.step_timeout_s=1", "eval.retries=3", faults=faults)
    wait_for(lambda: children(process), "the first process")
    os.kill(children(process)[0], signal.SIGKILL)
    done = finish(process)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path) == undisturbed
    raised = "the simulator raised RemoteError: RuntimeError" if in_child else "the simulator raised RuntimeError"
    for note in (
        "note: an evaluation process was killed by SIGKILL (often: out of memory); starting another one",
        f"k=2 j=0 episode 1: {raised}: the physics blew up; playing it again (retry ",
        f"k=2 j=0 episode 2: {raised}: the physics blew up; playing it again (retry ",
        "k=2 j=1 episode 0: the simulator's step was killed by SIGKILL (often: out of memory); playing it again (retry",
        "k=2 j=2 episode 5: the simulator's step ended its process (exit status 3); playing it again (retry ",
        "k=2 j=2 episode 3: the simulator's step did not return within 1 s; playing it again (retry ",
    ):
        assert done.stderr.count(note) == 1, done.stderr


def test_a_cell_that_fails_again_and_again_is_named_and_tried_again(
    run: Path, undisturbed: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, _ = STREAM
    out = tmp_path
    faults = {f"{a}-0": "raise 99", f"{b}-1": "reset-hang 99"}
    done = finish(start(run, out, "eval.step_timeout_s=1", "eval.retries=1", faults=faults))
    assert done.returncode == 2
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("clbench:")]
    assert "2 cells could not be evaluated" in message and "tries it again" in message and a in message
    first, second = read_json(evaluation(out) / "failures.json")
    assert first == {"k": 2, "j": 0, "task": a, "episode": 0, "seed": seed_of(a), "attempts": 2,
                     "reason": "the simulator raised RuntimeError: the physics blew up"}  # fmt: skip
    assert (second["j"], second["episode"], second["attempts"]) == (1, 1, 2) and "reset did not" in second["reason"]
    matrix = read_json(evaluation(out) / "matrix.json")
    whole = json.loads(undisturbed["matrix.json"])
    assert matrix["success"][2] == [None, None, whole["success"][2][2]]
    assert matrix["episodes"][2][2] == TRIALS and matrix["episodes"][2][0] < TRIALS
    assert not (evaluation(out) / "complete.json").exists()
    assert files(out)["cells/k02_j02.jsonl"] == undisturbed["cells/k02_j02.jsonl"]

    assert main(["metrics", str(evaluation(out)), "--bootstrap", "0"]) == 0
    text = capsys.readouterr().out
    assert f"note: k02_j00 ({a}) could not be evaluated and counts as not evaluated: the simulator raised" in text
    (asr,) = [line for line in text.splitlines() if line.startswith("asr ")]
    assert "missing: " in asr and "not evaluated" in asr

    for fault in faults:
        (out / "faults" / fault).unlink()
    done = finish(start(run, out))
    assert done.returncode == 0, done.stderr
    assert files(out) == undisturbed


@pytest.mark.parametrize("in_child", ["child"], indirect=True)
def test_only_the_cell_whose_simulator_took_the_others_with_it_is_given_up(
    run: Path, undisturbed: Files, tmp_path: Path, in_child: bool
) -> None:
    """Four simulators are in a process that is killed again and again, always by the same one."""
    done = finish(start(run, tmp_path, "eval.retries=2", "eval.workers=1", faults={f"{STREAM[1]}-0": "die 99"}))
    assert done.returncode == 2 and "1 cell could not be evaluated" in done.stderr, done.stderr
    (failed,) = read_json(evaluation(tmp_path) / "failures.json")
    assert (failed["j"], failed["episode"], failed["attempts"]) == (1, 0, 3)
    assert failed["reason"] == "the simulator's step was killed by SIGKILL (often: out of memory)"
    assert done.stderr.count("playing it again") == 2, done.stderr
    for name in ("cells/k02_j00.jsonl", "cells/k02_j02.jsonl"):
        assert files(tmp_path)[name] == undisturbed[name]


@pytest.fixture
def stuck(run: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """An evaluation that has recorded something and now hangs, in a simulator that has all the time."""
    fault = f"{STREAM[2]}-4"
    process = start(run, tmp_path, "eval.slots=2", faults={fault: "hang 1"})
    wait_for(lambda: (tmp_path / "faults" / fault).read_text() == "hang 0", "the simulator to hang")
    yield process
    finish(process)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_two_evaluations_and_a_signal(
    run: Path, undisturbed: Files, tmp_path: Path, stuck: subprocess.Popen[str], number: signal.Signals
) -> None:
    """The second one is refused and told by whom; the first one stops on a signal, and can be continued.

    Its processes get the signal too, as from a terminal or a scheduler.
    """
    second = finish(start(run, tmp_path))
    assert second.returncode == 2
    (line,) = second.stderr.splitlines()
    assert f"in use by another evaluation: process {stuck.pid} on" in line and f"kill {stuck.pid}" in line

    workers = children(stuck)
    assert workers
    os.killpg(stuck.pid, number)
    began = time.monotonic()
    done = finish(stuck)
    assert done.returncode == RESUME_EXIT and time.monotonic() - began < 10
    assert "evaluating" in done.stderr.splitlines()[0]
    said, line = done.stderr.splitlines()[1:]
    assert said.startswith(f"{number.name}: stopping cleanly")
    assert f"stopped by {number.name}. Finished episodes are kept" in line
    assert ended(workers)
    assert not list(evaluation(tmp_path).glob(".*"))
    kept = recorded(tmp_path)
    assert kept >= 2 and read_json(evaluation(tmp_path) / "summary.json")["episodes"] == kept

    done = finish(start(run, tmp_path))
    assert done.returncode == 0 and f"evaluating {3 * TRIALS - kept} episodes" in done.stderr
    assert files(tmp_path) == undisturbed


def test_the_second_signal_ends_at_once() -> None:
    code = (
        "import time; from clbench.stopping import stoppable\n"
        "with stoppable() as stop:\n    print('on', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "on\n"
    process.terminate()
    process.terminate()  # a launcher's echo of the same request
    time.sleep(0.8)
    assert process.poll() is None
    process.terminate()
    assert process.wait(5) == -signal.SIGTERM
    process.stdout.close()


def test_an_ignored_signal_stays_ignored() -> None:
    """nohup, and a script's background job: Ctrl-C is for what runs in the foreground."""
    code = (
        "import signal; from clbench.stopping import stoppable\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "with stoppable() as stop:\n    signal.raise_signal(signal.SIGINT)\n    assert not stop.reason\n"
        "    signal.raise_signal(signal.SIGTERM)\n    assert stop.reason == 'SIGTERM'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_shares_played_at_once_leave_what_one_evaluation_leaves(run: Path, tmp_path: Path) -> None:
    """Two shares side by side, one of them disturbed; the command without --rows has nothing left to play."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    alone.mkdir()
    shared.mkdir()
    full = ("eval.cells=full", "eval.workers=1")
    assert finish(start(run, alone, *full)).returncode == 0
    hang = start(run, shared, *full, faults={"hammer-v3-0": "hang 1"}, rows="2")
    wait_for(lambda: (shared / "faults" / "hammer-v3-0").read_text() == "hang 0", "the simulator to hang")
    refused = [finish(start(run, shared, *full)), finish(start(run, shared, *full, rows="1,2"))]
    for done in refused:
        assert done.returncode == 2 and "in use by another evaluation-of-row-2" in done.stderr, done.stderr
    os.killpg(hang.pid, signal.SIGTERM)
    assert finish(hang).returncode == RESUME_EXIT
    (shared / "faults" / "hammer-v3-0").unlink()
    both = [start(run, shared, *full, rows=rows) for rows in ("0,1", "2")]
    for done in map(finish, both):
        assert done.returncode == 0 and "written by the command without --rows" in done.stdout, done.stderr
    assert not (evaluation(shared) / "matrix.json").exists()
    done = finish(start(run, shared, *full))
    assert done.returncode == 0 and "evaluating" not in done.stderr
    assert files(shared) == files(alone)
    done = finish(start(run, shared, *full, rows="3"))
    assert done.returncode == 2 and "has no checkpoint 3 yet: it has 3, counted from 0" in done.stderr


def test_episodes_of_the_earlier_rule_go_on_with_it(run: Path, undisturbed: Files, tmp_path: Path) -> None:
    """Results of versions whose tasks shared their episodes' seeds are continued with these, and say so."""
    assert finish(start(run, tmp_path)).returncode == 0
    settings = evaluation(tmp_path) / "settings.json"
    seeds = {j: read_jsonl(evaluation(tmp_path) / f"cells/k02_j{j:02d}.jsonl")[0]["seed"] for j in range(3)}
    assert seeds == {j: seed_of(task) for j, task in enumerate(STREAM)} and len(set(seeds.values())) == 3
    assert read_json(settings)["episode_seeds"] == "by_task"
    before = read_json(settings)
    del before["episode_seeds"]
    write_json(settings, before)
    for cell in (evaluation(tmp_path) / "cells").glob("*.jsonl"):
        cell.unlink()
    assert finish(start(run, tmp_path)).returncode == 0
    for j in range(3):
        rows = read_jsonl(evaluation(tmp_path) / f"cells/k02_j{j:02d}.jsonl")
        assert [r["seed"] for r in rows] == [EVAL_SEED_BASE + i for i in range(TRIALS)]
    assert read_json(evaluation(tmp_path) / "matrix.json")["run"]["episode_seeds"] == "consecutive"


def test_a_full_disk(run: Path, tmp_path: Path) -> None:
    cells = evaluation(tmp_path) / "cells"
    cells.mkdir(parents=True)
    (cells / "k02_j01.jsonl").symlink_to("/dev/full")
    done = finish(start(run, tmp_path))
    assert done.returncode == 2
    assert done.stderr.splitlines()[1:] == [
        f"clbench: cannot write {cells / 'k02_j01.jsonl'}: No space left on device. Finished episodes are kept: "
        "fix that, then run the same command again."
    ]


def test_what_a_killed_writer_left_is_cleared_away(run: Path, undisturbed: Files, tmp_path: Path) -> None:
    folder = evaluation(tmp_path)
    for name, text in undisturbed.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text.replace('"seconds": _', '"seconds": 1.5'))
    (folder / "cells" / ".k02_j01.jsonl.abc.tmp").write_text("{")
    done = finish(start(run, tmp_path))
    assert done.returncode == 0 and "evaluating" not in done.stderr
    assert files(tmp_path) == undisturbed


def test_validation_has_episodes_and_a_folder_of_its_own(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluated before and after the test, which it leaves as it is; only test episodes can come again."""
    monkeypatch.setenv("TEST_STATES", "2")
    validation = evaluation(tmp_path) / "validation"
    done = finish(start(run, tmp_path, "eval.split=validation", "eval.episodes=3", "eval.seed=5"))
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    assert "\nvalidation episodes\n" in done.stdout and f"matrix: {validation / 'matrix.json'}" in done.stdout
    validation_seeds = [seed_of(STREAM[1], i, "validation", 5) for i in range(3)]
    assert [r["seed"] for r in read_jsonl(validation / "cells/k02_j01.jsonl")] == validation_seeds
    before = files(tmp_path)
    assert all(name.startswith("validation/") for name in before)
    assert main(["metrics", str(tmp_path / "r")]) == 2
    assert f"but validation episodes, in {validation}" in capsys.readouterr().err

    done = finish(start(run, tmp_path, "eval.episodes=3", "eval.workers=1"))
    assert done.returncode == 0 and "validation episodes" not in done.stdout
    assert done.stderr.count("warning: ") == done.stderr.count("3 episodes a cell, and metaworld has 2 initial") == 1
    after = files(tmp_path)
    assert {name: text for name, text in after.items() if name.startswith("validation/")} == before
    assert read_jsonl(evaluation(tmp_path) / "cells/k02_j01.jsonl")[0]["seed"] == seed_of(STREAM[1])

    for folder, said in ((tmp_path / "r", False), (validation, True)):
        assert main(["metrics", str(folder), "--bootstrap", "0"]) == 0
        assert ("validation episodes" in capsys.readouterr().out) == said
        assert main(["metrics", str(folder), "--bootstrap", "0", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["about"]["split"] == ("validation" if said else "test")
    settings = read_json(evaluation(tmp_path) / "settings.json")
    write_json(evaluation(tmp_path) / "settings.json", {k: v for k, v in settings.items() if k != "split"})
    done = finish(start(run, tmp_path, "eval.episodes=3"))  # one made before there were splits is the test's
    assert done.returncode == 0 and not done.stderr and files(tmp_path) == after


def test_episodes_of_two_simulators_do_not_mix(
    run: Path, tmp_path: Path, in_child: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A matrix keeps its physics; another one is refused before it plays, and looked for only when it would."""
    settings = evaluation(tmp_path) / "settings.json"

    def go(physics: str, episodes: int) -> subprocess.CompletedProcess[str]:
        monkeypatch.setenv("PHYSICS", physics)
        return finish(start(run, tmp_path, f"eval.episodes={episodes}"))

    assert go("1.0", 1).returncode == 0
    assert read_json(settings)["simulators"] == {"metaworld": {"physics": "1.0"}}
    before = files(tmp_path)
    refused = go("2.0", 2)
    assert refused.returncode == 2 and files(tmp_path) == before
    (line,) = refused.stderr.splitlines()
    assert "physics 1.0 (here 2.0)" in line and "--output-base" in line
    done = go("none", 1)
    assert done.returncode == 0 and not done.stderr and files(tmp_path) == before
    assert go("1.0", 2).returncode == 0

    manifest = {**read_json(run / "manifest.json"), "versions": {"physics": "0.9", "torch": "2"}}
    write_json(tmp_path / "r" / "manifest.json", manifest)
    assert main(["metrics", str(evaluation(tmp_path)), "--bootstrap", "0"]) == 0
    where = "note: episodes were played in metaworld on physics 1.0 (where the run was trained: physics 0.9)"
    assert where in capsys.readouterr().out


def test_episodes_that_do_not_say_their_simulator_are_kept_and_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an evaluation left them that was made before versions were recorded."""
    path = evaluation(tmp_path) / "settings.json"
    assert finish(start(run, tmp_path, "eval.episodes=1")).returncode == 0
    old = {k: v for k, v in read_json(path).items() if k != "simulators"}
    write_json(path, old)
    done = finish(start(run, tmp_path, "eval.episodes=1"))
    assert done.returncode == 0 and not done.stderr and read_json(path) == old
    for episodes, warnings in ((2, 1), (3, 0)):
        done = finish(start(run, tmp_path, f"eval.episodes={episodes}"))
        assert done.returncode == 0 and done.stderr.count("warning: ") == warnings, done.stderr
        now = {**old, "simulators": {"metaworld": {"physics": "1.0"}}, "earlier_simulators": "unknown"}
        assert read_json(path) == now
    assert main(["metrics", str(evaluation(tmp_path)), "--bootstrap", "0"]) == 0
    assert "note: some episodes were played before the simulator's versions" in capsys.readouterr().out

    for cell in (evaluation(tmp_path) / "cells").iterdir():
        cell.unlink()
    assert finish(start(run, tmp_path, "eval.episodes=1")).returncode == 0
    assert read_json(path) == {**old, "simulators": {"metaworld": {"physics": "1.0"}}}
    write_json(path, {**old, "simulators": ["1.0"]})
    done = finish(start(run, tmp_path, "eval.episodes=2"))
    assert done.returncode == 2 and "settings.json is damaged" in done.stderr


# ---- parts ------------------------------------------------------------------------------------------


class Breaking(Simulator):
    """Raises in the first step of episode 2, and has no reward for episode 4."""

    def step(self, action: np.ndarray) -> Step:
        if self.episode == 2 and self.steps == 0:
            raise RuntimeError("broken")
        step = super().step(action)
        return step._replace(reward=float("nan")) if self.episode == 4 else step


class Collect(Watch):
    def __init__(self, drop: bool = False) -> None:
        self.drop, self.keys = drop, list[tuple[Any, ...]]()

    def failed(self, episode: Episode, error: Exception) -> bool:
        self.keys.append(episode.key)
        return self.drop


def outcomes(simulator: type[Simulator], watch: Watch | None, stateful: bool = False) -> dict[tuple[Any, ...], float]:
    pool = SimulatorPool(lambda spec: simulator(spec["task"]))
    todo = [Episode((t, i), seed_of(t, i), {"task": t}, t, 15) for t in ("a", "bb") for i in range(6)]
    return {o.episode.key: o.total_reward for o in run_episodes(Noise(stateful), todo, pool, 3, 0, watch)}


@pytest.mark.parametrize("stateful", [False, True])
def test_a_simulator_that_raises_takes_no_other_episode_with_it(stateful: bool) -> None:
    watch = Collect()
    found = outcomes(Breaking, watch, stateful)
    assert sorted(watch.keys) == [("a", 2), ("a", 4), ("bb", 2), ("bb", 4)]
    whole = outcomes(Simulator, None, stateful)
    assert len(whole) == 12 and found == {k: v for k, v in whole.items() if k[1] not in (2, 4)}
    with pytest.raises(RuntimeError, match="broken"):
        outcomes(Breaking, None, stateful)


def test_a_task_that_is_given_up_is_not_played_further() -> None:
    watch = Collect(drop=True)
    found = outcomes(Breaking, watch)
    assert len(found) + len(watch.keys) < 12


def test_episodes_behind_a_gap_do_not_count_and_failed_cells_are_null(tmp_path: Path) -> None:
    for j in (0, 1):
        cell = CellFile(tmp_path, 0, j)
        for e in (0, 1, 3):
            cell.append({"k": 0, "j": j, "episode": e, "seed": e, "success_once": e != 1, "success_at_end": False})
    matrix = build_matrix(tmp_path, ["a", "b"], [0], failed={(0, 1)})
    assert matrix["success"] == [[0.5, None]] and matrix["episodes"] == [[2, 3]]
    assert len(read_jsonl(cell.path)) == 3
