"""The T×T success matrix: which cells and episodes are missing, played by worker processes, recorded by this one."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from clbench.checkpoints.base import ADAPTER, adapter_base
from clbench.checkpoints.mean_images import read_mean_images
from clbench.checkpoints.run_folder import describe_columns, finished_visits, read_manifest
from clbench.checkpoints.statistics import check_run
from clbench.checkpoints.trusted import check_checkpoint, given
from clbench.config.compose import read_config
from clbench.config.schema import CONTROL_VIEWS, Config
from clbench.envs.making import family, physics_versions
from clbench.errors import Interrupted, UserError
from clbench.evaluation.pool import Cell, WorkerPool
from clbench.evaluation.records import (
    BASE,
    EARLIER,
    EPISODE_SEEDS,
    RANDOM,
    SIMULATORS,
    TEST,
    UNKNOWN,
    CellFile,
    build_matrix,
    cell_name,
    eval_folder,
    read_failures,
    read_seeds,
    read_simulators,
    write_failures,
)
from clbench.evaluation.rows import Checkpoints
from clbench.evaluation.seeds import CONSECUTIVE, RULE, EpisodeSeeds
from clbench.evaluation.worker import Job, Settings
from clbench.io import read_json, write_json
from clbench.lock import held
from clbench.patience import EVERY_S, patience
from clbench.processes import server
from clbench.slots import Slots
from clbench.stopping import Stop, stoppable
from clbench.streams.stream import pretraining_tasks
from clbench.terminal import tell

# What a matrix says of the run it is of: what tables and labels need, wherever the matrix is kept.
ABOUT = ("run_id", "algorithm", "algorithm_config", "lora", "policy", "dataset", "render", "mode", "seed", "privileged",
         "data_fingerprint", "versions", "git_revision")  # fmt: skip


SETTINGS_S = 30.0  # that another share may take to write down what it plays with
OTHERS = ("curves", "steps")  # folders in an eval folder that have locks of their own (curves.py)
SETTINGS = "settings.json"  # one per matrix: views and held-out tasks have their own


class CellsFailed(UserError):
    """Cells were given up, for their simulators failed again and again; everything else is done.

    `matrix`: as in matrix.json; the failed cells are null.
    """

    def __init__(self, message: str, matrix: dict[str, Any]) -> None:
        super().__init__(message)
        self.matrix = matrix


def run_config(folder: Path) -> Config:
    """The configuration of a finished or running run."""
    return read_config(folder / "config.yaml")


def wanted_cells(mode: str, cells: str, rows: int, columns: int) -> list[tuple[int, int]]:
    """(k, j) pairs to evaluate. Independent single-task policies are evaluated on their own task alone."""
    if mode == "singletask":
        return [(k, k) for k in range(rows)]
    pairs = [(k, j) for k in range(rows) for j in range(columns)]
    if mode == "multitask" or cells == "full":
        return pairs
    if cells == "lower":
        return [(k, j) for k, j in pairs if j <= k]
    if cells == "diagonal":
        return [(k, j) for k, j in pairs if j == k]
    return [(k, j) for k, j in pairs if k == rows - 1]


def evaluate(folder: Path, config: Config, output: Path | None = None, progress: bool = True) -> dict[str, Any]:
    """Play the missing episodes of a run and write its records and matrices.

    Args:
        folder: the run folder.
        config: its configuration; the `eval` section says how.
        output: where the `eval` folder goes; null = into the run folder. Validation episodes go to eval/validation.

    Returns:
        The matrix, as in matrix.json.

    Raises:
        UserError: no checkpoint yet, records of another setting in the way, another evaluation at work in that folder,
            a folder that cannot be written, or a worker that failed.
        CellsFailed: all is done and written but cells whose simulator failed more than `eval.retries` times.
        Interrupted: SIGINT or SIGTERM; finished episodes are kept.
    """
    with stoppable() as stop:
        manifest = read_manifest(folder)
        if has_no_simulator(manifest):
            from clbench.evaluation.offline import evaluate_offline

            return evaluate_offline(folder, manifest, config, output, progress, stop)
        return _evaluate(folder, config, output, progress, stop)


def evaluate_share(
    folder: Path, config: Config, shares: Sequence[int], output: Path | None = None, progress: bool = True
) -> int:
    """Play the missing episodes of some checkpoints' rows alone; returns how many were played.

    Shares with different rows may run at once, in processes that share no memory. They write episodes and what these
    were played with; the matrix, and what else is about all of a run, is left to `evaluate`, which finds the episodes
    there. It does not run beside a share.

    Raises:
        UserError: as `evaluate`; a row that there is no checkpoint for; a cell was given up.
        Interrupted: SIGINT or SIGTERM; finished episodes are kept.
    """
    manifest, e = playable(folder), config.eval
    rows = finished_visits(folder)
    absent = [k for k in shares if k >= rows]
    if absent:
        raise UserError(f"run {folder.name} has no checkpoint {absent[0]} yet: it has {rows}, counted from 0.")
    out = eval_folder(output or folder, e.split)
    columns = manifest["visits"]
    cells = [(k, j) for k, j in wanted_cells(manifest["mode"], e.cells, rows, len(columns)) if k in shares]
    with stoppable() as stop, ExitStack() as stack:
        for k in sorted(shares):
            stack.enter_context(held(eval_folder(output or folder), row_lock(k)))
        run = Evaluation(folder, manifest, config, Checkpoints(folder, manifest, rows), progress, stop, share=True)
        played = run.play(out, columns, cells, e.episodes)
        for _, about in played.failed.items():
            raise UserError(failed_cells([(out, about)]))
    return played.count


def row_lock(k: int) -> str:
    return f"evaluation-of-row-{k}"


def playable(folder: Path) -> dict[str, Any]:
    """The run's manifest; UserError for a run whose stream has no simulator."""
    manifest = read_manifest(folder)
    if has_no_simulator(manifest):
        raise UserError(
            f"run {folder.name} learned a stream without a simulator (dataset.env: null): there is nothing to play its "
            "policies in. `clbench eval` without --rows, --curves and --step evaluates its action errors on held-out "
            "episodes."
        )
    return manifest


def has_no_simulator(manifest: dict[str, Any]) -> bool:
    """Whether a run's stream has none: it is evaluated on held-out episodes (offline.py)."""
    return any(v.get("env") is None for v in manifest["visits"])


def _evaluate(folder: Path, config: Config, output: Path | None, progress: bool, stop: Stop) -> dict[str, Any]:
    manifest = playable(folder)
    e = config.eval
    if e.random_row and not family(manifest["visits"][0]["env"]["type"]).normalised_actions:
        raise UserError("eval.random_row draws actions from [-1, 1], and this simulator's have units of their own.")
    with patience("looking at the run"):
        views = _view_overrides(config)
    heldout = heldout_columns(manifest, config) if e.heldout_episodes else []
    whole = eval_folder(output or folder)
    out = eval_folder(output or folder, e.split)
    rows = finished_visits(folder)
    if rows == 0:
        raise UserError(f"run {folder.name} has no whole checkpoint yet: train it first (--resume continues it).")
    if rows < len(manifest["checkpoints"]):
        tell(
            f"warning: run {folder.name} has {rows} of {len(manifest['checkpoints'])} checkpoints; evaluating those.",
        )
    with ExitStack() as stack:
        stack.enter_context(held(whole, "evaluation"))  # of both splits: what it clears away may be the other's
        for k in range(rows):
            stack.enter_context(held(whole, row_lock(k)))  # no share is at work
        for left in whole.rglob(".*.tmp"):  # of an evaluation that was killed while it wrote a file
            if left.relative_to(whole).parts[0] not in OTHERS:
                left.unlink()
        columns = manifest["visits"]
        if not columns:
            raise UserError(f"run {folder.name} has no visits in its manifest.json: there is nothing to evaluate.")
        run = Evaluation(folder, manifest, config, Checkpoints(folder, manifest, rows), progress, stop)
        cells = wanted_cells(manifest["mode"], e.cells, rows, len(columns))
        extra = [(BASE, j) for j in range(len(columns))] if e.base_row else []
        extra += [(RANDOM, j) for j in range(len(columns))] if e.random_row else []
        matrix = run.fill(out, columns, cells + extra, e.episodes, range(rows))
        for name, overrides in views.items():
            seen = replace(config, algorithm={**config.algorithm, **overrides})
            view = replace(run, config=seen, shown=read_mean_images(folder) if name == "blind" else None)
            there = deaf(columns) if name == "deaf" else columns
            view.fill(out / "views" / name, there, cells, e.episodes, range(rows))
        if e.heldout_episodes:
            pairs = [(k, j) for k in (BASE, rows - 1) for j in range(len(heldout))]
            run.fill(out / "heldout", heldout, pairs, e.heldout_episodes, [rows - 1], first_id=len(columns))
        complete = out / "complete.json"
        if run.failed:
            complete.unlink(missing_ok=True)
            raise CellsFailed(failed_cells(run.failed), matrix)
        if rows == len(manifest["checkpoints"]):  # for `clbench sweep`: what was asked for is there
            asked = {"cells": e.cells, "episodes": e.episodes, "views": e.views, "heldout_episodes": e.heldout_episodes}
            write_json(complete, asked)
    return matrix


def about_run(manifest: dict[str, Any]) -> dict[str, Any]:
    """Whose matrix it is, from the run's manifest. One that is older than labels gets that of its environment type."""
    about = {key: manifest[key] for key in ABOUT if key in manifest}
    env = manifest["visits"][0]["env"]
    return {"privileged": family(None if env is None else env["type"]).privileged, **about}


def failed_cells(failed: list[tuple[Path, dict[str, Any]]]) -> str:
    """The one message about cells that were given up."""
    first, about = failed[0]
    others = f"; {len(failed) - 1} more in failures.json" if len(failed) > 1 else ""
    return (
        f"{len(failed)} cell{'s' if len(failed) > 1 else ''} could not be evaluated: "
        f"{first / 'cells' / cell_name(about['k'], about['j'])} ({about['task']}): {about['reason']} (episode "
        f"{about['episode']}, {about['attempts']} attempts{others}). All others are done. A failed cell is null in its "
        "matrix; the same command tries it again."
    )


def _view_overrides(config: Config) -> dict[str, dict[str, Any]]:
    if not config.eval.views:
        return {}
    from clbench.algorithms.build import view_overrides  # imports torch

    return {name: {} if name in CONTROL_VIEWS else view_overrides(config, name) for name in config.eval.views}


def deaf(columns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The columns, each with another's instruction: that of the next task with different words, in a circle.

    Raises:
        UserError: all have the same instruction.
    """
    said = list(dict.fromkeys(c["instruction"] for c in columns))
    if len(said) == 1:
        raise UserError("eval.views=[deaf] gives a task another's instruction, and the stream has only one.")
    return [{**c, "instruction": said[(said.index(c["instruction"]) + 1) % len(said)]} for c in columns]


def heldout_columns(manifest: dict[str, Any], config: Config) -> list[dict[str, Any]]:
    """The base's pretraining tasks as columns, from the manifest, or for an older run from their data's record."""
    columns = manifest.get("heldout")
    if columns is None and config.dataset.pretrain is not None:
        columns = describe_columns(pretraining_tasks(config.dataset, config.render)[0])
    if not columns:
        raise UserError(
            "eval.heldout_episodes asks for the base's pretraining tasks, but this run's base came from elsewhere: "
            "set it to 0."
        )
    return list(columns)


@dataclass
class Evaluation:
    """A run under evaluation. `fill` plays what a matrix lacks; `failed` collects (its folder, the cell) given up;
    `versions` has those of the simulators that were needed so far, `warned` those whose initial states come again;
    `share`: other processes play other rows meanwhile; `shown`: images that policies are given in the place of what
    cameras see."""

    folder: Path
    manifest: dict[str, Any]
    config: Config
    rows: Checkpoints
    progress: bool
    stop: Stop
    failed: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set)
    share: bool = False
    shown: dict[str, np.ndarray] | None = None

    def simulators(self, env_types: Iterable[str]) -> dict[str, dict[str, str]]:
        """Environment type → versions of its simulator, asked for once; UserError where it cannot be used."""
        for env_type in set(env_types) - self.versions.keys():
            self.versions[env_type] = physics_versions(env_type)
        return {env_type: self.versions[env_type] for env_type in sorted(env_types)}

    def warn_of_repeats(self, env_types: Iterable[str], count: int) -> None:
        """Say once where `count` test episodes are more than there are initial states for them."""
        for env_type in sorted(env_types):
            states = family(env_type).test_states if self.config.eval.split == TEST else None
            if states is not None and count > states and env_type not in self.warned:
                self.warned.add(env_type)
                tell(
                    f"warning: {count} episodes a cell, and {env_type} has {states} initial states for the test: from "
                    f"episode {states} on they come again, with other random numbers for the policy; one that draws "
                    "none repeats the same episodes. Intervals count all as independent.",
                )

    def fill(
        self,
        out: Path,
        columns: list[dict[str, Any]],
        cells: list[tuple[int, int]],
        count: int,
        shown: Sequence[int],
        first_id: int = 0,
    ) -> dict[str, Any]:
        """Play the missing ones of `count` episodes of every cell (k, j); write the matrix of rows `shown` to `out`.

        `first_id`: task_id of column 0; tasks outside the stream come after all of its columns.
        """
        names = [c["task"] for c in columns]
        given_up_before = read_failures(out, names)
        played = self.play(out, columns, cells, count, first_id)
        files, failed = played.files, played.failed
        first = _first_columns(columns)
        for k, j in cells:
            source = first[columns[j]["task"]]
            if source != j and (k, source) in files:
                files[k, j].rows = {n: {**r, "j": j} for n, r in files[k, source].rows.items()}
                if (k, source) in failed:
                    failed[k, j] = {**failed[k, source], "j": j}
            files[k, j].sort()
        given_up = {**{c: f for c, f in given_up_before.items() if c not in files}, **failed}
        write_failures(out, given_up)
        self.failed += [(out, failed[cell]) for cell in sorted(failed)]
        e = self.config.eval
        rule = self.rule(out)
        about = about_run(self.manifest) | {EPISODE_SEEDS: rule}
        seeds = EpisodeSeeds(rule, e.split, e.seed)
        matrix = build_matrix(out, names, shown, failed=given_up, split=e.split, about=about, seeds=seeds)
        if played.count:
            add_summary(out, played.seconds, played.count, self.workers)
        return matrix

    def rule(self, out: Path) -> str:
        """The rule of the seeds of the episodes in `out`: what is there goes on with its own."""
        there = read_seeds(out)
        return RULE if there is None else there.rule

    @property
    def workers(self) -> int:
        return self.config.eval.workers or max(1, min(2, os.cpu_count() or 1))

    def play(
        self,
        out: Path,
        columns: list[dict[str, Any]],
        cells: list[tuple[int, int]],
        count: int,
        first_id: int = 0,
    ) -> _Played:
        """Play the missing ones of `count` episodes of every cell (k, j), whose records go to `out`; see `fill`."""
        e = self.config.eval
        max_steps = [c["env"]["max_steps"] for c in columns]
        limits = {"steps_after_success": e.steps_after_success, "max_steps": max_steps}
        seeds = EpisodeSeeds(self.rule(out), e.split, e.seed)
        asked = {**limits, "seed": e.seed, "split": e.split, EPISODE_SEEDS: seeds.rule}
        digests = self.rows.digests()
        check_settings(out, self.folder, digests, asked)
        files = {(k, j): CellFile(out, k, j, seeds.for_task(columns[j]["task"])) for k, j in cells}
        first = _first_columns(columns)
        missing: dict[int, list[dict[str, Any]]] = {}
        for k, j in cells:
            source = first[columns[j]["task"]] if (k, first[columns[j]["task"]]) in files else j
            if source != j:
                continue  # copied below
            env = {n: v for n, v in columns[j]["env"].items() if n != "max_steps"}
            for episode in range(count):
                if episode not in files[k, j].rows:
                    missing.setdefault(k, []).append(
                        {
                            "j": j,
                            "task_id": first_id + j,
                            "episode": episode,
                            "seed": seeds.for_task(columns[j]["task"]).of(episode),
                            "env": env,
                            "instruction": columns[j]["instruction"],
                            "max_steps": columns[j]["env"]["max_steps"],
                        }
                    )
        with patience("comparing the policies' statistics with the data"):
            check_run(self.folder, self.manifest, self.config, [self.rows.weights(k).policy for k in sorted(missing)])
        for k in sorted(missing):
            with patience(f"checking {self.rows.place(k)}"):
                self.rows.check(k)
        workers = self.workers
        slots = Slots.shared()
        at_most = max(workers, 0 if slots is None else slots.count)
        jobs = _jobs(missing, self.rows, at_most)
        total = sum(len(job.episodes) for job in jobs)
        failed: dict[Cell, dict[str, Any]] = {}
        for policy in {job.weights.policy for job in jobs}:  # said before processes are started
            if policy is not None and (Path(policy) / "config.json").is_file():
                check_checkpoint(Path(policy))
        env_types = {e["env"]["type"] for job in jobs for e in job.episodes}
        with patience("loading simulators"):
            versions = self.simulators(env_types)
        with _alone(out, self.stop):  # nothing is written before all is known to be in order
            write_json(out / SETTINGS, check_settings(out, self.folder, digests, asked))
            if total:
                _check_simulators(out, versions)
        played = _Played(files, failed)
        if total:
            self.warn_of_repeats(env_types, count)
            tell(f"evaluating {total} episodes in {workers} processes → {out}")
            server()  # before the progress bar, which has a thread
            device = self.config.train.device
            how = Settings(
                self.config, e.slots, e.steps_after_success, device, threads=1, trust=given(), shown=self.shown
            )
            before, started = _episodes(files), time.monotonic()
            try:
                _play(jobs, how, workers, files, failed, total, self.progress, self.stop)
            except Interrupted:
                if not self.share:
                    add_summary(out, time.monotonic() - started, _episodes(files) - before, workers)
                raise
            played.seconds, played.count = time.monotonic() - started, _episodes(files) - before
        return played


@dataclass
class _Played:
    """What came of playing: the cells' records, those that were given up, the time, how many episodes were played."""

    files: dict[Cell, CellFile]
    failed: dict[Cell, dict[str, Any]]
    seconds: float = 0.0
    count: int = 0


@contextmanager
def _alone(out: Path, stop: Stop) -> Iterator[None]:
    """Be the only one that writes down what episodes in `out` are played with; waits for a share that does so."""
    until = time.monotonic() + SETTINGS_S
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(held(out, "settings"))
                break
            except UserError:
                if time.monotonic() > until:
                    raise
            stop.check("Nothing was played.")
            time.sleep(0.05)
        yield


def _first_columns(columns: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Task → its first column."""
    return {c["task"]: i for i, c in reversed(list(enumerate(columns)))}


def _episodes(files: dict[Cell, CellFile]) -> int:
    return sum(len(f.rows) for f in files.values())


def check_settings(out: Path, folder: Path, digests: Sequence[str | None], settings: dict[str, Any]) -> dict[str, Any]:
    """What settings.json is to hold. Records of other settings or other weights must not mix with new ones.

    `digests`: of the rows' weights; None = not known, or not there (yet, or any more).
    """
    path = out / SETTINGS
    now = {**settings, "checkpoints": list(digests)}
    kept: dict[str, Any] = {}
    if path.is_file():
        before = read_json(path)
        there_was = {"split": TEST, EPISODE_SEEDS: CONSECUTIVE}  # and no other one, before these were recorded
        before = {**there_was, **(before if isinstance(before, dict) else {})}
        earlier = before.get("checkpoints")
        earlier = earlier if isinstance(earlier, list) else []
        earlier = [*earlier, *digests[len(earlier) :]]  # a run may have gone on since
        both = list(zip(earlier, digests, strict=False))
        before["checkpoints"] = [now if then is None else then for then, now in both] + earlier[len(both) :]
        now["checkpoints"] = [then if now is None else now for then, now in both]
        differing = [k for k, v in now.items() if before.get(k) != v]
        if differing:
            raise UserError(
                f"{out} holds episodes of other settings or weights ({', '.join(differing)}). Use the old ones, or "
                "write elsewhere with --output-base, or move that folder away."
            )
        kept = {k: before[k] for k in (EARLIER, SIMULATORS) if k in before}
    return now | {"run": str(folder.resolve())} | kept


def _check_simulators(out: Path, now: dict[str, dict[str, str]]) -> None:
    """Episodes of one matrix come from one physics: record its versions with the first episode, refuse others later.

    Where episodes were recorded before versions were, theirs stay unknown: this is said, and kept in settings.json.
    """
    path = out / SETTINGS
    settings = read_json(path)
    before = read_simulators(out)
    if any(cell.stat().st_size for cell in (out / "cells").glob("*.jsonl")):
        for env_type in sorted(before.keys() & now.keys()):
            there, here = before[env_type], now[env_type]
            names = sorted(n for n in there.keys() | here.keys() if there.get(n) != here.get(n))
            if names:
                differing = ", ".join(f"{n} {there.get(n, 'none')} (here {here.get(n, 'none')})" for n in names)
                raise UserError(
                    f"{out} holds episodes that another simulator of {env_type} played: {differing}. One matrix must "
                    "not mix them. Evaluate in the environment they were played in, or write elsewhere with "
                    "--output-base."
                )
        if SIMULATORS not in settings:
            settings[EARLIER] = UNKNOWN
            tell(
                f"warning: the episodes in {out} do not say which simulator's versions played them; only those of "
                "the coming ones are recorded.",
            )
    else:
        before = {}
        settings.pop(EARLIER, None)
    write_json(path, settings | {SIMULATORS: before | now})


def _jobs(missing: dict[int, list[dict[str, Any]]], rows: Checkpoints, workers: int) -> list[Job]:
    """Rows as jobs; few rows are split so that every worker has something to do."""
    jobs: list[Job] = []
    for k, episodes in sorted(missing.items()):
        weights = rows.weights(k)
        if weights.state is not None and weights.policy is not None and (Path(weights.policy) / ADAPTER).is_file():
            adapter_base(Path(weights.policy))  # one that is not there is said before processes are started
        parts = max(1, min(len(episodes), -(-2 * workers // len(missing)))) if workers > 1 else 1
        for i in range(parts):
            jobs.append(Job(k, weights, tuple(episodes[i::parts])))
    return sorted(jobs, key=lambda job: -len(job.episodes))


def _play(
    jobs: list[Job],
    settings: Settings,
    workers: int,
    files: dict[Cell, CellFile],
    failed: dict[Cell, dict[str, Any]],
    total: int,
    progress: bool,
    stop: Stop,
) -> None:
    """Play jobs; record episodes in `files`, cells that were given up in `failed`, as failures.json has them."""
    bar = tqdm(
        total=total,
        desc="episodes",
        unit="ep",
        disable=not progress,
        mininterval=1 if sys.stderr.isatty() else EVERY_S,
    )
    successes = 0

    def record(row: dict[str, Any]) -> None:
        nonlocal successes
        files[row["k"], row["j"]].append(row)
        successes += row["success_once"]
        bar.update()
        bar.set_postfix_str(f"success {successes / bar.n:.2f}" if bar.n else "", refresh=False)

    def draw(line: str) -> None:
        if progress:
            bar.refresh()

    bar.set_postfix_str("starting simulators", refresh=progress)
    pool = WorkerPool(jobs, settings, workers, record, stop)
    try:
        with patience("evaluating", say=draw):
            pool.play()
    finally:
        bar.close()
        failed |= pool.failed


def add_summary(out: Path, seconds: float, episodes: int, workers: int) -> None:
    """Add this evaluation's time to eval/summary.json."""
    path = out / "summary.json"
    before = read_json(path) if path.is_file() else {"seconds": 0.0, "episodes": 0}
    if not isinstance(before, dict) or not all(isinstance(before.get(n), int | float) for n in ("seconds", "episodes")):
        raise UserError(f"{path} is damaged: it has no seconds and episodes. Move it away.")
    write_json(
        path,
        {
            "seconds": round(before["seconds"] + seconds, 2),
            "episodes": before["episodes"] + episodes,
            "workers": workers,
        },
    )
