"""`clbench sweep`: the runs of an experiment file, trained, evaluated and compared. Finished runs are not run again.

name: cw10                          # the report goes to results/reports/cw10
model: dit_dec_tiny
dataset: metaworld_cw10
seeds: [0, 1, 2]
algorithms: [seqfft, er, clare]     # names, or {algo: er, label: er_lr3, overrides: [train.optimizer.lr=3e-4]}
overrides: [eval.episodes=20]       # for all runs
parallel: 2                         # runs at once, each with one thread
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
import unicodedata
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from clbench.config.compose import compose, load_yaml
from clbench.config.dit import check_policy
from clbench.config.folders import find, names
from clbench.config.policy_types import check_fits
from clbench.config.schema import Config
from clbench.errors import RESUME_EXIT, UserError, nearest
from clbench.evaluation.records import eval_folder
from clbench.io import read_json
from clbench.lock import held, taken_by
from clbench.paths import results_root
from clbench.patience import patience
from clbench.processes import Child, server, start_command
from clbench.registry import algorithm_names
from clbench.slots import VARIABLE, Slots
from clbench.stopping import Stop, stoppable
from clbench.terminal import printable, show, tell

KEPT = "What is done is kept: give the same command again."
PROGRESS_SECONDS = 10.0
LOCK_SECONDS = 60.0  # that another command of one of its runs is waited for


@dataclass
class Entry:
    """One algorithm of an experiment, or a combination of several joined by commas. `label` names its runs."""

    algo: str = ""
    label: str = ""
    overrides: list[str] = field(default_factory=list)


@dataclass
class Experiment:
    """The keys of an experiment file."""

    name: str = ""
    model: str = "dit_dec_tiny"
    dataset: str = "metaworld_quick"
    seeds: list[int] = field(default_factory=lambda: [0])
    algorithms: list[str | Entry] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    parallel: int = 1
    smoke: bool = False


@dataclass(frozen=True)
class Run:
    """One run of an experiment."""

    run_id: str
    train: tuple[str, ...]
    config: Config


def load_experiment(name: str) -> tuple[Experiment, list[Run]]:
    """Read an experiment file and list its runs; raises UserError for unknown keys and names."""
    from clbench.checkpoints.run_folder import results_folder

    path = Path(name) if name.endswith((".yaml", ".yml")) else find("experiments", name)
    if path is None or not path.is_file():
        raise UserError(f"there is no experiment '{name}'.{nearest(name, names('experiments'))}")
    experiment = Experiment(**load_yaml(path, Experiment))
    if not experiment.algorithms or not experiment.seeds:
        raise UserError(f"{path}: algorithms and seeds must not be empty.")
    if experiment.parallel < 1:
        raise UserError(f"{path}: parallel must be at least 1, is {experiment.parallel}.")
    experiment.name = experiment.name or path.stem
    results_folder(experiment.name, None)  # its logs and its report go to folders of that name
    entries = [Entry(e) if isinstance(e, str) else Entry(**e) for e in experiment.algorithms]  # type: ignore[arg-type]
    if not all(e.algo for e in entries):
        raise UserError(f"{path}: an algorithm is a name or {{algo, label, overrides}}; one has no algo.")
    runs = []
    for seed in experiment.seeds:  # one seed of everything before the next
        for entry in entries:
            algo = entry.algo
            run_id = f"{experiment.name}_{entry.label or algo}_s{seed}"
            results_folder(run_id, None)  # a name or label must not lead elsewhere
            own = ("--algo", algo, "--seed", str(seed), "--run-id", run_id, "--resume")
            overrides = (*_overrides(experiment), *entry.overrides)
            config, _ = compose(
                model=experiment.model,
                algorithms=algo.split(","),
                dataset=experiment.dataset,
                registered=algorithm_names(),
                overrides=[f"seed={seed}", *overrides],
                smoke=experiment.smoke,
                source=str(path),
            )
            runs.append(Run(run_id, (*_axes(experiment), *own, "--", *overrides), config))
    folders = [unicodedata.normalize("NFC", run.run_id).casefold() for run in runs]  # as some file systems tell them
    for run, folder in zip(runs, folders, strict=True):
        if folders.count(folder) > 1:
            raise UserError(f"{path}: two runs for the folder {run.run_id}. Label algorithms apart, give a seed once.")
    if len({run.config.eval.split for run in runs}) > 1:
        raise UserError(f"{path}: its runs differ in eval.split, and one report cannot hold both. Write two files.")
    return experiment, runs


def _axes(experiment: Experiment) -> tuple[str, ...]:
    smoke = ("--smoke",) if experiment.smoke else ()
    return ("--model", experiment.model, "--dataset", experiment.dataset, *smoke)


def _overrides(experiment: Experiment) -> tuple[str, ...]:
    threads = (f"train.threads={max(1, (os.cpu_count() or 1) // experiment.parallel)}",)
    return (*threads, *experiment.overrides)


def finished(run: Run) -> bool:
    """Whether a run is trained and evaluated with exactly the settings that the experiment asks for."""
    from clbench.checkpoints.changes import FREE_ON_RESUME, changed_keys
    from clbench.checkpoints.run_folder import finished_visits, read_manifest

    folder = results_root() / run.run_id
    complete = eval_folder(folder, run.config.eval.split) / "complete.json"
    if not (folder / "manifest.json").is_file() or not complete.is_file():
        return False
    if finished_visits(folder) != len(read_manifest(folder)["checkpoints"]):
        return False
    done, asked = read_json(complete), run.config.eval
    if not isinstance(done, dict) or not isinstance(done.get("views", []), list):
        raise UserError(f"{complete} is damaged: it does not say what was evaluated. Remove it and evaluate again.")
    covered = done.get("cells") in {asked.cells, "full"} and done.get("episodes") == asked.episodes
    covered &= all(v in done.get("views", []) for v in asked.views)
    covered &= asked.heldout_episodes in (0, done.get("heldout_episodes", 0))
    return covered and not changed_keys(folder, run.config, FREE_ON_RESUME)


def run_sweep(name: str, dry_run: bool = False, trust: Sequence[str] = ()) -> int:
    """Run what is left of an experiment; returns 1 when a run failed, after the others have finished.

    `trust`: what --trust names. Its commands get that and, beside it, the experiment's own runs.

    Raises Interrupted when a signal asked to stop; the runs under way have saved.
    """
    with stoppable() as stop, ExitStack() as stack:
        return _run_sweep(name, dry_run, trust, stop, stack)


def _run_sweep(name: str, dry_run: bool, trust: Sequence[str], stop: Stop, stack: ExitStack) -> int:
    experiment, runs = load_experiment(name)
    logs = results_root() / "sweeps" / experiment.name
    if not dry_run:
        stack.enter_context(held(logs, "sweep"))  # two of one experiment would train the same runs
    left = [r for r in runs if not finished(r)]
    show(f"experiment {experiment.name}: {len(runs) - len(left)} of {len(runs)} runs are finished")
    for r in runs:
        check_policy(r.config.policy)
        check_fits(r.config)
    with patience("looking at the configurations"):
        from clbench.algorithms.build import build_algorithm

        for r in runs:  # what a configuration can show to be wrong, before anything heavy
            build_algorithm(r.config)
    if dry_run:
        for r in runs:
            show(f"  {'left' if r in left else 'done'}  {r.run_id}")
        return 0
    for stale in logs.glob(".slots-*"):  # of a sweep that was killed
        shutil.rmtree(stale)
    failed: list[str] = []
    if left:
        show(f"runs → {results_root()}, their output → {logs}")
        # The base is shared: it is made before runs race for it, with all cores.
        base = _Job("pretrain", ("pretrain", *_axes(experiment), *_trusting(trust), "--", *experiment.overrides),
                    logs / "pretrain.log")  # fmt: skip
        _play([base], 1, logs, stop)
        if base.status:
            tell(f"failed: the base; see {base.log}")
            return 1
        _wait_for_locks(left, stop)
        jobs = _jobs(left, logs, experiment.parallel, trust)
        _play(jobs, experiment.parallel, logs, stop)
        failed = list(dict.fromkeys(job.name for job in jobs if job.status))
    for run_id in failed:
        tell(f"failed: {run_id}; see {logs / run_id}.log")
    done = [r.run_id for r in runs if finished(r)]
    if done:
        with patience("reading runs and drawing"):
            from clbench.report import build_report

            page = build_report(
                [results_root() / r for r in done],
                name=experiment.name,
                command=f"clbench sweep {name}",
                split=runs[0].config.eval.split,
            )
        show(f"report of {len(done)} of {len(runs)} runs: {page}")
    return 1 if failed else 0


def _wait_for_locks(runs: Sequence[Run], stop: Stop) -> None:
    """Wait for commands of an earlier sweep that was killed: they save and end. After LOCK_SECONDS a run fails."""
    until, said = time.monotonic() + LOCK_SECONDS, False
    for run in runs:
        folder = results_root() / run.run_id
        for place, what in ((folder, "training"), (folder / "eval", "evaluation")):
            while time.monotonic() < until and (who := taken_by(place, what)) is not None:
                if not said:
                    show(f"waiting for the {what} of {run.run_id} to end ({who})")
                said = True
                stop.check(KEPT)
                time.sleep(0.2)


def _trusting(names: Sequence[str], *more: str) -> tuple[str, ...]:
    return tuple(f"--trust={name}" for name in [*names, *more]) if names else ()


@dataclass
class _Job:
    """One command of a sweep. It waits for `after`; `status` is its exit status once it has ended.

    `order`: jobs with smaller ones are started first.
    """

    name: str
    arguments: tuple[str, ...]
    log: Path
    after: _Job | None = None
    order: tuple[float, ...] = ()
    process: Child | None = None
    status: int | None = None
    began: float = 0.0
    said: str = ""


def _jobs(runs: Sequence[Run], logs: Path, parallel: int, trust: Sequence[str] = ()) -> list[_Job]:
    """Each run's training and, after it, its evaluation.

    One seed of everything comes before the next. Of a seed, trainings come first, the longest of them first; for the
    evaluations, which can be shared among slots, fill what is left (slots.py).
    """
    found = []
    seeds = list(dict.fromkeys(r.config.seed for r in runs))
    workers = ("--workers", "1") if parallel > 1 else ()
    for r in runs:
        log, seed = logs / f"{r.run_id}.log", seeds.index(r.config.seed)
        own = [r.run_id] if (results_root() / r.run_id).is_dir() else []
        train = _Job(r.run_id, ("train", *_trusting(trust, *own), *r.train), log, order=(seed, 0, -_steps(r.config)))
        arguments = ("eval", *_trusting(trust, r.run_id), "--run-id", r.run_id, *workers)
        found += [train, _Job(r.run_id, arguments, log, train, (seed, 1))]
    return found


def _steps(config: Config) -> float:
    """How long a training takes compared with others: its steps per task, those of an algorithm's own phases too."""
    own = [v for k, v in config.algorithm.items() if k.endswith("steps") and isinstance(v, int)]
    return config.train.steps + sum(own)


def _play(jobs: Sequence[_Job], parallel: int, logs: Path, stop: Stop) -> None:
    """Run all jobs, `parallel` of them at once; what comes after a failed one is left out.

    Asked to stop, it asks the commands to, waits for them, and raises Interrupted.
    """
    server()
    with tempfile.TemporaryDirectory(prefix=".slots-", dir=logs) as folder:
        slots = Slots(Path(folder), parallel)
        held = {id(slot): slot for slot in iter(slots.take, None)}
        using: dict[int, tuple[_Job, IO[bytes] | None]] = {}
        todo, asked, told = sorted(jobs, key=lambda j: j.order), time.monotonic(), False
        while todo or using:
            for n, (job, slot) in list(using.items()):
                assert job.process is not None
                job.status = job.process.poll()
                if job.status is None:
                    continue
                del using[n]
                if slot is not None:
                    held[id(slot)] = slot
                if job.status in (130, RESUME_EXIT):  # asked by someone else, or by the terminal
                    stop.signal = stop.signal or signal.SIGTERM
                _tell_end(job, jobs, stop)
            if stop.signal is not None and not told:
                for job, _ in using.values():
                    assert job.process is not None
                    job.process.terminate()
                told, todo = True, []
            todo = [j for j in todo if j.after is None or not j.after.status]  # 0 or None
            ready = [j for j in todo if j.after is None or j.after.status == 0]
            for job in ready[: parallel - len(using)]:
                todo.remove(job)
                slot = held.pop(next(iter(held))) if held else slots.take()
                with job.log.open("a", encoding="utf-8") as log:
                    job.process = start_command(job.arguments, log=log, env={VARIABLE: folder})
                job.began = job.began or time.monotonic()
                using[id(job)] = job, slot
            if not any(j.after is None or j.after.status == 0 for j in todo):
                for free in held.values():  # for the evaluations that are under way
                    free.close()
                held.clear()
            if time.monotonic() - asked >= PROGRESS_SECONDS:
                asked = time.monotonic()
                _tell_progress([job for job, _ in using.values()])
            time.sleep(0.1)
        stop.check(KEPT)


def _tell_end(job: _Job, jobs: Sequence[_Job], stop: Stop) -> None:
    """Say that a run has ended: after its last command, or one that failed."""
    last = not any(j.after is job for j in jobs)
    if len(jobs) > 1 and stop.signal is None and (last or job.status):
        first = job if job.after is None else job.after
        minutes = (time.monotonic() - first.began) / 60
        show(f"{'FAILED' if job.status else 'done'}: {job.name} in {minutes:.1f} min")


def _tell_progress(jobs: Sequence[_Job]) -> None:
    for job in jobs:
        line = _last_line(job.log)
        if line and line != job.said:
            show(f"  {job.name}: {line}")
            job.said = line


def _last_line(log: Path) -> str:
    with log.open("rb") as f:
        f.seek(max(0, log.stat().st_size - 4096))
        lines = f.read().decode("utf-8", "replace").replace("\r", "\n").split("\n")
    return printable(next((line.strip() for line in reversed(lines) if line.strip()), ""))
