"""Learning curves, and matrices within tasks, from the weights that training kept (checkpoints/kept.py).

    eval/curves/k00.json            {"k", "task", "fractions", "steps", "success", "episodes", "split", "criterion"}
    eval/curves/task_00/            its episodes: cells/k03_j00.jsonl is point 3; settings.json as in an eval folder
    eval/steps/step_000100/         an eval folder: row k is visit k after 100 of its steps

Points 0 and the last are the checkpoints before and after the task, played with the method's evaluation view. Those
in between are the policy as it trains: what a method chooses or masks at test time does not exist yet.
"""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clbench.checkpoints.kept import curve_points, kept_folder, kept_steps, read_points
from clbench.checkpoints.run_folder import as_argument, finished_visits
from clbench.config.schema import Config
from clbench.errors import UserError
from clbench.evaluation.evaluate import Evaluation, failed_cells, playable, wanted_cells
from clbench.evaluation.records import CellFile, counted, eval_folder
from clbench.evaluation.rows import Kept
from clbench.evaluation.seeds import EpisodeSeeds
from clbench.io import write_json
from clbench.lock import held
from clbench.stopping import Stop
from clbench.terminal import tell

FOLDER = "curves"
STEPS = "steps"
FOLLOW_S = 1.0  # between looks at a training run for new weights


@dataclass(frozen=True)
class CurveState:
    """How complete a task's learning curve is.

    Attributes:
        played: how many of its `points` have all their episodes.
        absent: steps of incomplete points whose weights do not exist, yet or any more.
    """

    k: int
    task: str
    points: int
    played: int
    absent: tuple[int, ...]


def play_curves(
    folder: Path, config: Config, stop: Stop, output: Path | None = None, progress: bool = True
) -> list[CurveState]:
    """Play the missing episodes of all points whose weights exist; write the curves that are complete.

    Weights that are no longer needed are removed (all but those that train.keep_weights_every_steps keeps).

    Raises:
        UserError: the run keeps no weights within its tasks, records with other settings are in the way, another
            process measures these curves, or episodes were abandoned.
        Interrupted: a signal asked to stop; finished episodes are kept.
    """
    manifest = playable(folder)
    whole = eval_folder(output or folder)
    config = replace(config, eval=replace(config.eval, split=config.eval.curve_split))
    states: list[CurveState] = []
    failed: list[tuple[Path, dict[str, Any]]] = []
    with ExitStack() as stack:
        stack.enter_context(held(whole, "curves"))
        for left in (whole / FOLDER).rglob(".*.tmp"):  # from a process that was killed while it wrote a file
            left.unlink()
        for k in range(len(manifest["checkpoints"])):
            points = read_points(folder, k)
            if points is not None:
                states.append(_play_curve(folder, manifest, config, whole / FOLDER, k, points, progress, stop, failed))
    if failed:
        raise UserError(failed_cells(failed))
    return states


def _play_curve(
    folder: Path,
    manifest: dict[str, Any],
    config: Config,
    curves: Path,
    k: int,
    points: list[int],
    progress: bool,
    stop: Stop,
    failed: list[tuple[Path, dict[str, Any]]],
) -> CurveState:
    """One visit's curve; `failed` collects what was abandoned."""
    e, column = config.eval, manifest["visits"][k]
    out = curves / f"task_{k:02d}"
    rows = Kept(folder, manifest, [(k, step) for step in points], {k: points[-1]})
    run = Evaluation(folder, manifest, config, rows, progress, stop)
    seeds = EpisodeSeeds(run.rule(out), e.split, e.seed).for_task(column["task"])

    def episodes(row: int) -> list[Any]:
        return counted(CellFile(out, row, k, seeds).rows.values())[: e.episodes]

    todo = [r for r in range(len(points)) if rows.there(r) and len(episodes(r)) < e.episodes]
    if todo:
        played = run.play(out, manifest["visits"], [(r, k) for r in todo], e.episodes)
        for r in todo:
            played.files[r, k].sort()
        failed += [(out, about) for _, about in sorted(played.failed.items())]
    found = [episodes(r) for r in range(len(points))]
    done = [len(rows_played) == e.episodes for rows_played in found]
    every = config.train.keep_weights_every_steps
    for step, complete in zip(points[1:-1], done[1:-1], strict=True):
        if complete and (every is None or step % every):
            shutil.rmtree(kept_folder(folder, k, step), ignore_errors=True)
    if all(done):
        n, last = len(points) - 1, points[-1]
        equal = points == curve_points(last, n, None)
        write_json(curves / f"k{k:02d}.json", {
            "k": k,
            "task": column["task"],
            "fractions": [i / n if equal else step / last for i, step in enumerate(points)],
            "steps": points,
            "success": [sum(bool(row["success_once"]) for row in rows_played) / e.episodes for rows_played in found],
            "episodes": [e.episodes] * len(points),
            "split": e.split,
            "criterion": "success_once",
        })  # fmt: skip
    absent = tuple(s for r, s in enumerate(points) if not done[r] and not rows.there(r))
    return CurveState(k, column["task"], len(points), sum(done), absent)


def follow_curves(
    folder: Path, config: Config, stop: Stop, output: Path | None = None, progress: bool = True
) -> list[CurveState]:
    """Measure learning curves alongside a training run, as it keeps weights, until all are complete; as `play_curves`.

    Also raises UserError when training is complete but weights that are still needed are missing.
    """
    visits, said = len(playable(folder)["checkpoints"]), ""
    while True:
        trained = finished_visits(folder) == visits
        states = play_curves(folder, config, stop, output, progress)
        text = summary(states)
        if text != said:
            tell(text)
            said = text
        if len(states) == visits and all(s.played == s.points for s in states):
            return states
        if trained:  # before the curves were checked: nothing more will come
            raise UserError(f"{text}; the weights of the others do not exist: {_without_weights(states, visits)}.")
        stop.check("Finished episodes are kept.")
        time.sleep(FOLLOW_S)


def _without_weights(states: list[CurveState], visits: int) -> str:
    parts = [f"task {s.k + 1} at step {', '.join(map(str, s.absent))}" for s in states if s.absent]
    unplanned = sorted(set(range(visits)) - {s.k for s in states})
    return "; ".join([*parts, *(f"task {k + 1}, of which nothing was kept" for k in unplanned)])


def summary(states: list[CurveState]) -> str:
    points = sum(s.points for s in states)
    return f"learning curves: {sum(s.played for s in states)} of {points} points of {len(states)} tasks are measured"


def check_has_curves(folder: Path, config: Config) -> None:
    """Raise UserError for a run that has no learning curves to measure."""
    manifest = playable(folder)
    if manifest["mode"] == "multitask":
        raise UserError(f"run {folder.name} was trained jointly: no task has a learning curve of its own.")
    planned = any(read_points(folder, k) for k in range(len(manifest["checkpoints"])))
    if not planned and config.train.eval_during_training is None:
        raise UserError(
            f"run {folder.name} kept no weights within its tasks, so there is no learning curve to measure: train with "
            "train.eval_during_training=10 (or train.keep_weights_every_steps=N)."
        )


def evaluate_step(
    folder: Path, config: Config, step: int, stop: Stop, output: Path | None = None, progress: bool = True
) -> tuple[dict[str, Any], Path]:
    """Play the matrix whose row k is visit k after `step` of its steps; returns it and its path.

    Raises:
        UserError: those weights were not kept for every task that is trained; as `evaluate`.
        Interrupted: a signal asked to stop; finished episodes are kept.
    """
    manifest, e = playable(folder), config.eval
    steps: dict[int, int] = {}
    for k in range(finished_visits(folder)):
        points = read_points(folder, k)
        kept = kept_steps(folder, k)
        if points is None or (step not in kept and step != points[-1]):
            has = ", ".join(map(str, [*kept, *(points or [])[-1:]])) or "none"
            raise UserError(
                f"run {folder.name} has no weights of step {step} of task {k + 1}; it has: {has}. "
                "train.keep_weights_every_steps keeps them."
            )
        steps[k] = points[-1]
    if not steps:
        raise UserError(f"run {folder.name} has no trained task yet: clbench train --resume {as_argument(folder)}")
    columns = manifest["visits"]
    out = eval_folder(output or folder, e.split) / STEPS / f"step_{step:06d}"
    with ExitStack() as stack:
        stack.enter_context(held(eval_folder(output or folder), f"evaluation-of-step-{step}"))
        for left in out.rglob(".*.tmp"):
            left.unlink()
        rows = Kept(folder, manifest, [(k, step) for k in steps], steps)
        run = Evaluation(folder, manifest, config, rows, progress, stop)
        cells = wanted_cells(manifest["mode"], e.cells, len(steps), len(columns))
        matrix = run.fill(out, columns, cells, e.episodes, range(len(steps)))
    if run.failed:
        raise UserError(failed_cells(run.failed))
    return matrix, out / "matrix.json"
