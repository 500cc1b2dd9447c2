"""What a report reads from run folders, and how runs are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clbench.errors import UserError
from clbench.evaluation.records import TEST, eval_folder, read_seeds
from clbench.io import read_json, read_jsonl, refuse_links
from clbench.metrics import Record, aggregate, bootstrap_draws, compute_metrics, load_record
from clbench.metrics.definitions import FloatArray
from clbench.metrics.record import read_cell
from clbench.report import settings

MAX_TASKS = 200  # at most, in figures
MAX_ADAPTERS = 100
MAX_VALUE = 1e18  # for sizes, times and losses
Routing = dict[str, list[dict[int, int]]]  # layer → per task j, {adapter: count}


@dataclass
class Run:
    """One run folder: its record, metrics, training log and costs. None or empty = not recorded.

    `view`: the evaluation view of the record (eval/views/NAME); "" = the run's own.
    """

    path: Path
    record: Record
    view: str = ""
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    draws: dict[str, FloatArray] = field(default_factory=dict)
    task_ends: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    phases: dict[str, tuple[int, bool]] = field(default_factory=dict)  # phase → steps (batches) per task, trains?
    train_seconds: float | None = None
    eval_seconds: float | None = None
    routing: Routing = field(default_factory=dict)
    deciding: dict[str, Any] = field(default_factory=dict)  # see settings.py
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.path.name}-{self.view}" if self.view else self.path.name

    @property
    def manifest(self) -> dict[str, Any]:
        return self.record.manifest

    @property
    def algorithm(self) -> str:
        """Its name; and whether it is given the task's identity at test time, if that is a choice."""
        value = self.manifest.get("algorithm") or self.path.name
        name = "+".join(map(str, value)) if isinstance(value, list) else str(value)
        settings = self.manifest.get("algorithm_config")
        told = settings.get("eval_with_task_id") if isinstance(settings, dict) else None
        lora = self.manifest.get("lora")
        if isinstance(lora, dict) and lora.get("enabled"):
            name += " on LoRA"
        if self.view:
            return f"{name} ({self.view.replace('_', ' ')})"
        return name if told is None else f"{name} ({'task id' if told else 'no task id'})"

    @property
    def policy(self) -> str:
        return str(self.manifest.get("policy") or "")

    @property
    def dataset(self) -> str:
        return str(self.manifest.get("dataset") or "")

    @property
    def labels(self) -> list[str]:
        """What has to be stated with its results: observations that no robot would have, episodes to choose by."""
        seen = self.manifest.get("privileged")
        labels = [f"privileged observations: {seen}"] if seen else []
        return labels + ([] if self.record.split == TEST else [f"{self.record.split} episodes"])

    @property
    def seed(self) -> Any:
        return self.manifest.get("seed")

    def last(self, key: str) -> float | None:
        """`key` at the end of the last task that recorded it."""
        values = [v for e in self.task_ends if (v := _number(e.get(key))) is not None]
        return values[-1] if values else None

    @property
    def growth(self) -> list[tuple[int, float]]:
        """(k, parameters added to the base up to visit k, included); a visit logs its own addition."""
        points: list[tuple[int, float]] = []
        for e in self.task_ends:
            added = _number(e.get("parameters_added"))
            if added is not None:
                points.append((e["k"], added + (points[-1][1] if points else 0.0)))
        return points

    @property
    def peak_memory_mb(self) -> float | None:
        values = [v for e in self.task_ends if (v := _number(e.get("peak_memory_mb"))) is not None]
        return max(values) if values else None


@dataclass
class Group:
    """Runs that differ only in their seed."""

    label: str
    runs: list[Run]
    metrics: dict[str, dict[str, Any]]

    @property
    def multitask(self) -> bool:
        return all(r.record.one_row for r in self.runs)

    @property
    def singletask(self) -> bool:
        return all(r.record.mode == "singletask" for r in self.runs)

    def mean(self, values: Sequence[float | None]) -> float | None:
        """Mean over the runs that have a value."""
        have = [v for v in values if v is not None]
        return sum(have) / len(have) if have else None


def load_run(path: Path, view: str = "", split: str = TEST) -> Run:
    """Read a run folder; what is absent stays empty. Raises UserError if there is no evaluated matrix of `split`."""
    if not path.is_dir():
        raise UserError(f"{path} is not a run folder.")
    refuse_links(path)  # the report is written into it
    folder = eval_folder(path, split)
    if split != TEST and not (folder / "matrix.json").is_file():
        raise UserError(f"{path} has no {split} episodes: evaluate it with -- eval.split={split}.")
    folder = folder / "views" / view if view else folder
    run = Run(path=path.resolve(), record=load_record(path if folder == path / "eval" else folder), view=view)
    if len(run.record.tasks) > MAX_TASKS:
        raise UserError(f"{path} has {len(run.record.tasks)} tasks; a report draws at most {MAX_TASKS}.")
    if run.record.split != split:
        raise UserError(f"{folder} has a matrix of {run.record.split} episodes in place of {split} episodes.")
    run.notes += run.record.notes
    if not run.manifest:
        run.notes.append("no manifest.json: algorithm, seed and versions are unknown")
    run.notes += run.labels
    _read_log(run)
    summary = folder / "summary.json"
    if summary.is_file():
        data = read_json(summary)
        run.eval_seconds = _number(data.get("seconds")) if isinstance(data, dict) else None
    run.routing = _read_routing(run, folder / "cells")
    run.deciding = settings.deciding(run)
    return run


def views_of(path: Path, split: str = TEST) -> list[str]:
    """Names of the other views under which a run was evaluated."""
    return sorted(p.parent.name for p in (eval_folder(path, split) / "views").glob("*/matrix.json"))


def _number(value: Any) -> float | None:
    """A number that can be summed and drawn, else None."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_VALUE
    return float(value) if good else None


def _read_log(run: Run) -> None:
    """Fill steps, task_ends and train_seconds. A resumed run logs steps twice: the later entry counts."""
    path = run.path / "log.jsonl"
    if not path.is_file():
        run.notes.append("no log.jsonl: no training curves, times or sizes")
        return
    try:
        events = [e for e in read_jsonl(path) if isinstance(e, dict)]
        if not all(_number(e.get(key, 0)) is not None and e.get(key, 0) >= 0 for e in events for key in ("k", "step")):
            raise UserError(f"{path} has an event without a valid k or step.")
    except UserError as error:  # results are still worth reporting if the log of a crashed run is damaged
        run.notes.append(f"the training log is left out: {error}")
        return
    steps: dict[tuple[int, str, int], dict[str, Any]] = {}
    ends: dict[int, dict[str, Any]] = {}
    for e in events:
        k, step = e.get("k"), e.get("step")
        if e.get("event") in ("step", "batch") and type(k) is int and type(step) is int:
            phase = str(e.get("phase", "train"))  # the last step of a phase is always logged
            run.phases[phase] = max(step + 1, run.phases.get(phase, (0, False))[0]), e["event"] == "step"
        if e.get("event") == "step" and type(k) is int and type(step) is int:
            e["loss"] = _number(e.get("loss"))
            steps[k, str(e.get("phase", "train")), step] = e
        elif e.get("event") == "task_end" and type(k) is int:
            ends[k] = e
    run.steps = list(steps.values())
    run.task_ends = [ends[k] for k in sorted(ends)]
    seconds = [s for e in run.task_ends if (s := _number(e.get("seconds"))) is not None]
    if not seconds:
        seconds = [s for e in events if e.get("event") == "run_end" if (s := _number(e.get("seconds"))) is not None]
    run.train_seconds = sum(seconds) if seconds else None


def _read_routing(run: Run, cells: Path) -> Routing:
    """Which adapter each layer chose, per evaluated task, in the episodes of the last checkpoint."""
    record = run.record
    routing: Routing = {}
    seeds = read_seeds(cells.parent)
    for j in range(len(record.tasks)):
        for episode in read_cell(cells, record.tasks, record.rows[-1], j, seeds):
            chosen = episode.get("routing")
            for layer, counts in chosen.items() if isinstance(chosen, dict) else ():
                if not isinstance(counts, dict):
                    raise UserError(f"{run.path}: the routing of an episode (j={j}) is not counts per adapter.")
                per_task = routing.setdefault(str(layer), [{} for _ in record.tasks])[j]
                for adapter, count in counts.items():
                    number, index = _number(count), adapter.isascii() and adapter.isdigit() and len(adapter) < 10
                    if not index or int(adapter) >= MAX_ADAPTERS or number is None or number < 0:
                        raise UserError(f"{run.path}: the routing of an episode (j={j}) is not counts per adapter.")
                    per_task[int(adapter)] = per_task.get(int(adapter), 0) + int(count)
    return routing


# --------------------------------------------------------------------------------------- side by side


def load_runs(paths: Sequence[Path], bootstrap: int = 1000, split: str = TEST) -> list[Run]:
    """Read the runs and compute their metrics, with joint and single-task runs among them as references.

    All are of `split`, test or validation episodes.

    Raises:
        UserError: a run is given twice, is not evaluated, or the runs learned different tasks.
    """
    if len({p.resolve() for p in paths}) != len(paths):
        raise UserError("a run is given twice.")
    if len({p.resolve().name for p in paths}) != len(paths):
        raise UserError("two runs have the same folder name; rename one, so that the report can tell them apart.")
    runs = [load_run(p, view, split) for p in paths for view in ("", *views_of(p, split))]
    names = [r.name for r in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:  # a run, and another one's view
        raise UserError(f"two of the runs and their views are called {twice}; rename the run's folder.")
    every = runs
    runs, prefixes = [r for r in every if not _is_prefix(r, every)], [r for r in every if _is_prefix(r, every)]
    _check_same_tasks(runs)
    for run in runs:
        joint = _reference(run, runs, "multitask")
        single = _reference(run, runs, "singletask")
        references: dict[str, Any] = {
            "joint": joint.record if joint else None,
            "single": single.record if single else None,
            "prefixes": [r.record for r in _prefix_references(run, prefixes)],
        }
        run.metrics = compute_metrics(run.record, **references, bootstrap=bootstrap)
        run.draws = bootstrap_draws(run.record, **references, bootstrap=bootstrap)
    return runs


def _is_prefix(run: Run, runs: Sequence[Run]) -> bool:
    """Whether it is joint training on only the first tasks of another run's stream."""
    mine = set(run.record.tasks)
    return run.record.mode == "multitask" and any(
        mine == set(other.record.tasks[:k]) and len(mine) < len(set(other.record.tasks))
        for other in runs
        if other.record.mode == "sequential"
        for k in range(1, len(other.record.tasks))
    )


def _prefix_references(run: Run, prefixes: Sequence[Run]) -> list[Run]:
    """For each number of first tasks, the joint run that `run` is measured against, if any."""
    found = []
    for tasks in {frozenset(p.record.tasks) for p in prefixes}:
        reference = _reference(run, [p for p in prefixes if frozenset(p.record.tasks) == tasks], "multitask")
        found += [reference] if reference else []
    if found:
        names = ", ".join(sorted(r.name for r in found))
        run.notes.append(f"intransigence_prefixes is measured against joint training on the first tasks: {names}")
    return found


def _check_same_tasks(runs: Sequence[Run]) -> None:
    first = runs[0]
    for run in runs[1:]:
        # A joint run has no order, and may have one column for a task that the stream visits twice.
        unordered = first.record.one_row or run.record.one_row
        ours, theirs = first.record.tasks, run.record.tasks
        same = set(ours) == set(theirs) if unordered else ours == theirs
        if not same or first.record.criterion != run.record.criterion:
            what = "tasks, or tasks in another order" if not same else "criteria of evaluation"
            raise UserError(f"{first.name} and {run.name} have different {what}; report them separately.")


def _reference(run: Run, runs: Sequence[Run], mode: str) -> Run | None:
    """The run of that mode with the same policy, data and seed (of the only such seed, if there is one)."""
    if run.record.mode != "sequential":
        return None
    same = []
    for other in runs:
        if other.record.mode == mode and (other.policy, other.dataset) == (run.policy, run.dataset):
            why_not = settings.differing([run, other], settings.OF_REFERENCES)
            if why_not:
                run.notes.append(f"not measured against {other.name}: they differ in {settings.listed(why_not)}")
            else:
                same.append(other)
    return next((r for r in same if r.seed == run.seed), same[0] if len(same) == 1 else None)


def _why_not_seeds(runs: Sequence[Run]) -> str:
    """How runs of one algorithm differ in more than their seed; "" if they do not."""
    if len({r.seed for r in runs}) < len(runs):
        return "several runs share a seed"
    if any(r.manifest.get("data_fingerprint") != runs[0].manifest.get("data_fingerprint") for r in runs):
        return "the data differ between runs"
    played = [r.record.simulators for r in runs if r.record.simulators]  # older ones do not record it
    if any(p != played[0] for p in played):
        return "the simulators' versions differ between runs"
    found = settings.differing(runs)
    return f"its runs differ in {settings.listed(found)}" if found else ""


def group_runs(runs: Sequence[Run]) -> tuple[list[Group], list[str]]:
    """Group runs by algorithm, policy and data set over seeds; also returns what a reader should know.

    Runs that differ in more than their seed are not averaged.
    """
    by_key: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        by_key.setdefault((run.algorithm, run.policy, run.dataset), []).append(run)
    several_policies = len({k[1] for k in by_key}) > 1
    several_datasets = len({k[2] for k in by_key}) > 1
    groups, notes = [], []
    for (algorithm, policy, dataset), members in by_key.items():
        extra = [x for x, shown in ((policy, several_policies), (dataset, several_datasets)) if shown and x]
        label = algorithm + (f" ({', '.join(extra)})" if extra else "")
        members = sorted(members, key=lambda r: (str(r.seed).zfill(8), r.name))
        why_not = _why_not_seeds(members)
        if why_not:
            notes.append(f"{label}: {why_not}, so its runs are listed individually and not averaged")
        parts = [(f"{label} [{r.name}]", [r]) for r in members] if why_not else [(label, members)]
        for name, part in parts:
            groups.append(Group(name, part, aggregate([r.metrics for r in part], [r.draws for r in part])))
    groups.sort(key=lambda g: (g.multitask, g.singletask))  # references last
    return groups, notes
