"""Sweeps: every mistake before anything heavy, one seed of everything before the next, nothing finished run again."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from clbench import cli, registry, sweep
from clbench.config.compose import to_dict, to_yaml
from clbench.config.schema import Config
from clbench.errors import Interrupted, UserError
from clbench.execution import local
from clbench.execution.units import Statuses, Unit, admissible, check, leave_out
from clbench.io import read_jsonl, write_json, write_text
from clbench.lock import held
from clbench.paths import results_root
from clbench.processes import start_command
from clbench.slots import Slots
from clbench.stopping import Stop
from clbench.testing import files


def experiment(path: Path, text: str = "") -> str:
    file = path / "mine.yaml"
    file.write_text("dataset: metaworld_quick\nalgorithms: [seqfft, {algo: er, label: er_big, overrides: "
                    "[algorithm.buffer_size_per_task=9]}]\nseeds: [0, 1]\n" + text)  # fmt: skip
    return str(file)


def test_lists_one_seed_of_everything_before_the_next(tmp_path: Path) -> None:
    _, runs = sweep.load_experiment(experiment(tmp_path))
    assert [r.run_id for r in runs] == [
        "mine_seqfft_s0", "mine_er_big_s0", "mine_seqfft_s1", "mine_er_big_s1",
    ]  # fmt: skip
    assert runs[1].config.algorithm["buffer_size_per_task"] == 9 and runs[3].config.seed == 1
    two_at_once = sweep.load_experiment(experiment(tmp_path, "parallel: 2\n"))[1]  # changes nothing in the runs
    assert [(r.train, to_dict(r.config)) for r in two_at_once] == [(r.train, to_dict(r.config)) for r in runs]


def test_two_runs_for_one_folder_are_refused(tmp_path: Path) -> None:
    for text in (
        "algorithms: [er, {algo: er, overrides: [train.steps=7]}]\n",
        "algorithms: [{algo: er, label: A}, {algo: er, label: a}]\n",  # where capitals are not told
        "algorithms: [er]\nseeds: [0, 1, 0]\n",
    ):
        (tmp_path / "mine.yaml").write_text("dataset: metaworld_quick\n" + text)
        with pytest.raises(UserError, match="two runs for the folder mine_"):
            sweep.load_experiment(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("overrides: [train.stepz=3]", "Did you mean 'steps'"),
        ("overrides: [train.steps=0]", "train.steps must be at least 1"),
        ("overrides: [train.steps=many]", r"mine\.yaml: train\.steps must be a whole number"),
        ("modle: x", "Did you mean 'model'"),
        ("parallel: many", "parallel"),
        ("parallel: -3", r"parallel must be at least 1 but is -3"),
    ],
)
def test_mistakes_show_before_anything_runs(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep.run_sweep(experiment(tmp_path, text), dry_run=True)


def test_test_and_validation_episodes_are_no_one_experiment(tmp_path: Path) -> None:
    path = Path(experiment(tmp_path))
    path.write_text(path.read_text().replace("overrides: [", "overrides: [eval.split=validation, "))
    with pytest.raises(ValueError, match=r"differ in eval\.split"):
        sweep.run_sweep(str(path), dry_run=True)


def leave(run: sweep.PlannedRun, config: Config) -> Path:
    """What a run that trained and evaluated one task leaves, as far as it is looked at; `config` is written down."""
    folder = results_root() / run.run_id
    write_text(folder / "config.yaml", to_yaml(config))
    write_json(folder / "manifest.json", {"visits": [], "checkpoints": ["a"], "mode": "sequential", "base": {}})
    write_json(folder / "checkpoints" / "task_00" / "checkpoint.json", {})
    write_json(folder / "eval" / "complete.json", {"cells": "full", "episodes": run.config.eval.episodes})
    return folder


def test_finished_means_with_the_same_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLBENCH_RESULTS_ROOT", str(tmp_path / "results"))
    _, runs = sweep.load_experiment(experiment(tmp_path))
    assert not sweep.finished(runs[0])
    folder = leave(runs[0], runs[0].config)
    assert sweep.finished(runs[0])
    older = to_dict(runs[0].config)  # by a version that did not have these keys
    for section in (older, older["dataset"], older["dataset"]["pretrain"]):
        for key in ("render", "repo_id", "rename", "make", "recipes"):
            section.pop(key, None)
    write_text(folder / "config.yaml", yaml.safe_dump(older))
    assert sweep.finished(runs[0]), "keys that came later count with their defaults"
    _, validated = sweep.load_experiment(experiment(tmp_path, "overrides: [eval.split=validation]"))
    assert not sweep.finished(validated[0])
    write_json(folder / "eval" / "validation" / "complete.json", {"cells": "full", "episodes": 20})
    assert sweep.finished(validated[0])
    _, longer = sweep.load_experiment(experiment(tmp_path, "overrides: [train.steps=7]"))
    assert not sweep.finished(longer[0])
    _, more = sweep.load_experiment(experiment(tmp_path, "overrides: [eval.episodes=50]"))
    assert not sweep.finished(more[0])


def test_a_run_on_camera_images_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes down how its images were drawn, which the experiment leaves to the data."""
    monkeypatch.setenv("CLBENCH_RESULTS_ROOT", str(tmp_path / "results"))
    file = tmp_path / "images.yaml"
    file.write_text("dataset: libero_object\nalgorithms: [seqfft]\n")
    _, (run,) = sweep.load_experiment(str(file))
    drawn = replace(run.config.render, fidelity="fast", size=64)
    leave(run, replace(run.config, render=drawn))
    assert sweep.finished(run)
    for stated, the_same in (("fidelity=fast", True), ("fidelity=full", False), ("size=64", True), ("size=128", False)):
        file.write_text(f"dataset: libero_object\nalgorithms: [seqfft]\noverrides: [render.{stated}]\n")
        _, (run,) = sweep.load_experiment(str(file))
        assert sweep.finished(run) is the_same, stated


def test_a_second_sweep_of_an_experiment_is_refused_and_told_by_whom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLBENCH_RESULTS_ROOT", str(tmp_path / "results"))
    file = experiment(tmp_path)
    logs = results_root() / "sweeps" / "mine"
    with held(logs, "sweep"):
        monkeypatch.setattr(sweep, "finished", lambda _: pytest.fail("told before anything is looked at"))
        with pytest.raises(ValueError, match=rf"mine is in use by another sweep: process {os.getpid()} on .* kill "):
            sweep.run_sweep(file)
        monkeypatch.undo()
        monkeypatch.setenv("CLBENCH_RESULTS_ROOT", str(tmp_path / "results"))
        assert sweep.run_sweep(file, dry_run=True) == 0
    assert not logs.exists()


def test_a_run_that_a_killed_sweep_still_saves_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLBENCH_RESULTS_ROOT", str(tmp_path / "results"))
    _, runs = sweep.load_experiment(experiment(tmp_path))
    holders = [
        held(results_root() / runs[0].run_id, "training"),
        held(results_root() / runs[3].run_id / "eval", "evaluation"),
    ]
    waits = []

    def pause(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) in (3, 5):
            holders.pop(0).__exit__(None, None, None)

    for holder in holders:
        holder.__enter__()
    monkeypatch.setattr("clbench.sweep.time.sleep", pause)
    sweep._wait_for_locks(runs, Stop())
    assert len(waits) == 5 and holders == []
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].startswith(
        f"waiting for the training of mine_seqfft_s0 to end (process {os.getpid()} on "
    )
    with held(results_root() / runs[0].run_id, "training"):
        monkeypatch.setattr(sweep, "LOCK_SECONDS", 0.0)  # it is tried, and the refusal says who
        sweep._wait_for_locks(runs, Stop())
    assert len(waits) == 5


def test_what_a_killed_sweep_left_is_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLBENCH_RESULTS_ROOT", str(tmp_path / "results"))
    logs = results_root() / "sweeps" / "mine"
    (logs / ".slots-killed").mkdir(parents=True)
    answers = iter([True] * 4 + [False] * 4)  # nothing is left to be trained, nothing to be reported
    monkeypatch.setattr(sweep, "finished", lambda _: next(answers))
    assert sweep.run_sweep(experiment(tmp_path)) == 0
    assert list(logs.iterdir()) == []


def test_its_commands_trust_what_the_sweep_does_and_its_own_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLBENCH_RESULTS_ROOT", str(tmp_path / "results"))
    file = tmp_path / "mine.yaml"
    file.write_text("algorithms: [er]\n")
    _, (run,) = sweep.load_experiment(str(file))
    commands: list[tuple[str, list[str]]] = []

    def start(arguments: Sequence[str], log: object, env: object) -> Command:
        before_overrides = [*arguments, "--"].index("--")
        commands.append((arguments[0], cli.parser().parse_args(arguments[:before_overrides]).trust))
        if arguments[0] == "train":
            (tmp_path / "results" / run.run_id).mkdir(exist_ok=True)
        command = Command(tuple(arguments))
        command.status = 0
        return command

    monkeypatch.setattr(local, "start_command", start)
    monkeypatch.setattr(local, "server", lambda: None)
    monkeypatch.setattr(sweep, "_lacks_data", lambda _: False)
    assert sweep.run_sweep(str(file), trust=["smolvla"]) == 0
    own = ["smolvla", run.run_id]
    assert commands == [("pretrain", ["smolvla"]), ("train", ["smolvla"]), ("eval", own), ("sweep", [])]
    commands.clear()
    assert sweep.run_sweep(str(file), trust=["smolvla"]) == 0
    assert commands[1:3] == [("train", own), ("eval", own)]


class Command:
    """What stands for a process: it ends when it is told to."""

    def __init__(self, arguments: tuple[str, ...]) -> None:
        self.arguments, self.status, self.asked = arguments, None, False

    def poll(self) -> int | None:
        return self.status

    def terminate(self) -> None:
        self.asked, self.status = True, 75


def play(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[[Command, list[Command]], int | None], **keys: object
) -> tuple[list[str], Statuses]:
    """Play a sweep of commands that end as `run` says; returns them in the order of their start, and the statuses."""
    asked, runs = sweep.load_experiment(experiment(tmp_path, "parallel: 2"))
    monkeypatch.setattr(sweep, "_lacks_data", lambda _: False)
    started: list[Command] = []

    def start(arguments: tuple[str, ...], log: object, env: object) -> Command:
        started.append(Command(arguments))
        return started[-1]

    def pause(seconds: float) -> None:
        for command in started:
            if command.status is None:
                command.status = run(command, started)

    monkeypatch.setattr(local, "start_command", start)
    monkeypatch.setattr(local, "server", lambda: None)
    monkeypatch.setattr(local.time, "sleep", pause)
    graph = sweep.units(asked, runs, tmp_path, (), "mine")
    statuses = local.LocalExecutor(2, tmp_path).run(graph, keys.get("stop") or Stop())  # type: ignore[arg-type]
    return [named(c) for c in started if c.arguments[0] in ("train", "eval")], statuses


def named(command: Command) -> str:
    if "--run-id" not in command.arguments:
        return command.arguments[0]
    return command.arguments[0] + " " + command.arguments[command.arguments.index("--run-id") + 1]


def test_trainings_of_a_seed_come_before_its_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation after its training, both of a seed before those of the next; never more than two at once."""

    def run(command: Command, started: list[Command]) -> int | None:
        assert sum(c.status is None for c in started) <= 2
        return 0

    order, statuses = play(tmp_path, monkeypatch, run)
    assert len(order) == 8 and len(statuses) == 10 and set(statuses.values()) == {0}
    assert [o[-2:] for o in order] == ["s0"] * 4 + ["s1"] * 4
    assert [o.split()[0] for o in order[:4]] == ["train", "train", "eval", "eval"]


def test_the_longest_training_is_started_first(monkeypatch: pytest.MonkeyPatch) -> None:
    short, long = Config(algorithm={"name": "a"}), Config(algorithm={"name": "b", "discriminator_steps": 400})
    monkeypatch.setattr(sweep, "_lacks_data", lambda _: False)
    runs = [sweep.PlannedRun("short", (), short), sweep.PlannedRun("long", (), long)]
    graph = sweep.units(sweep.Experiment("mine"), runs, Path(), (), "mine")
    in_order = [u.name for u in sorted(graph, key=lambda u: u.order)]
    assert [n for n in in_order if n.startswith("train")] == ["train long", "train short"]


def test_what_comes_after_a_failed_training_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order, statuses = play(tmp_path, monkeypatch, lambda c, _: 2 if named(c) == "train mine_seqfft_s0" else 0)
    assert "eval mine_seqfft_s0" not in order and len(order) == 7
    assert [n for n, s in statuses.items() if s != 0] == ["train mine_seqfft_s0", "evaluate mine_seqfft_s0"]
    assert statuses["evaluate mine_seqfft_s0"] is None and statuses["report"] == 0  # of what there is


def test_without_a_base_nothing_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order, statuses = play(tmp_path, monkeypatch, lambda c, _: 2 if c.arguments[0] == "pretrain" else 0)
    assert order == [] and statuses["base"] == 2 and statuses["report"] == 0
    assert {s for n, s in statuses.items() if n not in ("base", "report")} == {None}


def test_asked_to_stop_it_asks_its_commands_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, seen = Stop(), []

    def run(command: Command, started: list[Command]) -> int | None:
        if command.arguments[0] == "pretrain":
            return 0
        stop.signal = signal.SIGTERM
        seen[:] = [c for c in started if c.arguments[0] != "pretrain"]
        return None

    with pytest.raises(Interrupted, match="What is done is kept"):
        play(tmp_path, monkeypatch, run, stop=stop)
    assert len(seen) == 2 and all(c.asked for c in seen)


def test_slots_that_nothing_is_left_for_are_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the last command runs, another process can take the slot beside it."""
    free: list[bool] = []

    def run(command: Command, started: list[Command]) -> int | None:
        runs = [c for c in started if "--run-id" in c.arguments]
        if len(runs) < 8 or sum(c.status is None for c in started) > 1:
            return 0
        (folder,) = tmp_path.glob(".slots-*")
        slot = Slots(folder, 2).take()
        free.append(slot is not None)
        return None if len(free) < 2 else 0

    play(tmp_path, monkeypatch, run)
    assert free[-1]
    assert not list(tmp_path.glob(".slots-*"))


# ---- units and executors ---------------------------------------------------------------------------


def unit(name: str, *after: str, anyway: bool = False) -> Unit:
    return Unit(name, "train", (), Path(), Path(), after, anyway)


def test_graphs_that_cannot_be_run_are_refused() -> None:
    for wrong, says in (
        ([unit("a"), unit("a")], "two units have the same name"),
        ([unit("a", "b")], "come after"),
        ([unit("a", "c"), unit("b", "a"), unit("c", "b"), unit("d")], "wait for each other"),
    ):
        with pytest.raises(ValueError, match=says):
            check(wrong)
    check([unit("b", "a"), unit("a"), unit("c", "a", "b", anyway=True)])


def test_what_can_never_be_started_is_left_out() -> None:
    graph = [unit("a"), unit("b", "a"), unit("c", "b"), unit("d"), unit("report", "c", "d", anyway=True)]
    statuses: Statuses = {"a": 2}
    left = leave_out(graph[1:], statuses)
    assert statuses == {"a": 2, "b": None, "c": None} and [u.name for u in left] == ["d", "report"]
    assert [u.name for u in admissible(left, statuses)] == ["d"]
    assert [u.name for u in admissible(left[1:], {**statuses, "d": 0})] == ["report"]


def test_the_graph_is_printed_and_is_plain_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLBENCH_RESULTS_ROOT", str(tmp_path / "results"))
    monkeypatch.setenv("CLBENCH_DATA_ROOT", str(tmp_path / "data"))
    assert sweep.run_sweep(experiment(tmp_path), dry_run=True) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines[0] == "  left  demonstrations: clbench data make metaworld_quick"
    assert lines[1].startswith("  left  base, after demonstrations: clbench pretrain --model dit_dec_tiny --dataset ")
    assert lines[2].startswith("  left  train mine_seqfft_s0, after base: clbench train ")
    run = "mine_seqfft_s0"
    assert lines[3] == f"  left  evaluate {run}, after train {run}: clbench eval --run-id {run}"
    assert lines[-1].startswith("  left  report, after evaluate mine_seqfft_s0, ") and len(lines) == 11
    asked, runs = sweep.load_experiment(experiment(tmp_path))
    graph = sweep.units(asked, runs, tmp_path, (), "mine")
    assert json.loads(json.dumps([asdict(u) for u in graph], default=str))[0]["kind"] == "demonstrations"


class Shuffled:
    """A toy executor: one unit after the other, of those that can be started a random one."""

    def __init__(self, parallel: int, folder: Path) -> None:
        self.random = random.Random(7)

    def run(self, units: Sequence[Unit], stop: Stop) -> Statuses:
        statuses: Statuses = {}
        todo = list(units)
        while todo := leave_out(todo, statuses):
            unit = self.random.choice(admissible(todo, statuses))
            todo.remove(unit)
            with unit.log.open("a") as log:
                statuses[unit.name] = start_command(unit.arguments, log=log).wait()
        return statuses


@pytest.mark.slow
def test_another_executor_leaves_the_same_bytes(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swept(executor: str) -> Path:
        folder = tmp_path / executor
        for name in ("RESULTS", "CACHE"):
            monkeypatch.setenv(f"CLBENCH_{name}_ROOT", str(folder / name.lower()))
        folder.mkdir()
        file = folder / "mine.yaml"
        file.write_text(
            "dataset: metaworld_quick\nalgorithms: [seqfft, er]\nseeds: [0, 1]\nparallel: 2\nsmoke: true\n"
            f"executor: {executor}\noverrides:\n"
            f"- dataset.tasks=[push-v3, hammer-v3]\n- dataset.data={toy_data}/stream\n"
            f"- dataset.pretrain.tasks=[reach-v3, door-open-v3]\n- dataset.pretrain.data={toy_data}/pretrain\n"
        )
        for _ in range(2):  # the second time nothing is left
            assert sweep.run_sweep(str(file)) == 0
        return folder / "results"

    registry.register("executors", "shuffled", Shuffled)
    try:
        one, other = swept("local"), swept("shuffled")
    finally:
        registry.register("executors", "shuffled", None)
    runs = sorted(p.name for p in one.iterdir() if p.name.startswith("mine_"))
    assert len(runs) == 4
    for run in runs:
        assert files(one / run / "checkpoints") == files(other / run / "checkpoints")
        rows = [[{k: v for k, v in r.items() if k not in ("seconds", "time")} for r in read_jsonl(p)]
                for root in (one, other) for p in sorted((root / run / "eval" / "cells").glob("*.jsonl"))]  # fmt: skip
        assert len(rows) == 8 and rows[:4] == rows[4:]
