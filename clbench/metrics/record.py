"""The raw record every metric is computed from, read from a run, an eval folder or a bare matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as shown
from typing import Any

import numpy as np
import numpy.typing as npt

from clbench.errors import UserError
from clbench.evaluation.records import (
    EARLIER,
    OFFLINE_WORDS,
    QUANTITIES,
    SUCCESS,
    TEST,
    VALIDATION,
    VALUES,
    Quantity,
    cell_name,
    check_cell,
    counted,
    eval_folder,
    read_failures,
    read_seeds,
    read_simulators,
)
from clbench.evaluation.seeds import EpisodeSeeds
from clbench.io import read_bytes, read_json, read_jsonl, read_text
from clbench.metrics.definitions import FloatArray
from clbench.metrics.table import MAX_TASKS, NPY, ZIP, from_numpy, from_text

BASE_ROW = -1
CRITERIA = SUCCESS.criteria
MODES = ("sequential", "multitask", "singletask")
ABOUT = ("run_id", "policy", "algorithm", "dataset", "mode", "seed", "privileged")
MAX_EPISODES = 100_000  # of one cell
ROUNDING = 1e-3  # of a rate; a mean taken in half precision is off by as much


@dataclass(frozen=True)
class Curve:
    """Success on a task after fractions 0…1 of its own training; both (E,). `outcomes`: {episode seed: success} of each
    point, or None where only rates are known."""

    fractions: FloatArray
    success: FloatArray
    outcomes: list[dict[int, float]] | None = None


@dataclass
class Record:
    """What was measured. NaN = not evaluated.

    Attributes:
        tasks: names of the N columns, in visiting order; a task visited twice has two columns.
        success: (K, N) success rates in [0, 1].
        rows: the visit k behind each row.
        episodes: (K, N) episode counts, or None where they are unknown.
        base: (N,) success of the pretrained base before the stream, or None.
        random: (N,) success of a random policy, or None.
        outcomes: (k, j) → {episode seed: success}; k = -1 is the base.
        curves: k → learning curve of task k.
        heldout: the record on tasks outside the stream, or None.
        criterion: "success_once" or "success_at_end".
        split: "test" or "validation", of which the episodes are; None when unknown (a bare matrix).
        mode: "sequential", "multitask", "singletask", or None when unknown (a bare matrix).
        named: whether the column names came from the file.
        manifest: the run's manifest, or as much of it as the matrix has; {} = unknown.
        simulators: environment type → {package: version} that played the episodes; {} = not recorded.
        notes: what a reader of the numbers should know.
        quantity: what `success`, `base` and `outcomes` are: success rates, or errors, which are not bounded by 1.
        asked: of errors, what they were computed with: stride, scale and horizon; {} = not recorded.
    """

    tasks: list[str]
    success: FloatArray
    rows: list[int]
    episodes: npt.NDArray[np.int64] | None = None
    base: FloatArray | None = None
    random: FloatArray | None = None
    outcomes: dict[tuple[int, int], dict[int, float]] = field(default_factory=dict)
    curves: dict[int, Curve] = field(default_factory=dict)
    heldout: Record | None = None
    criterion: str = "success_once"
    split: str | None = None
    mode: str | None = None
    named: bool = True
    manifest: dict[str, Any] = field(default_factory=dict)
    simulators: dict[str, dict[str, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    source: Path | None = None
    quantity: Quantity = SUCCESS
    asked: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What the cells are, in words."""
        words = OFFLINE_WORDS.get(self.criterion)
        return self.quantity.name if words is None else f"{self.quantity.name} ({words})"

    @property
    def unit(self) -> str:
        return "" if self.criterion == "loss" else self.quantity.unit

    @property
    def is_rate(self) -> bool:
        """Whether the cells are rates in [0, 1] of which more is better; otherwise errors, of which less is."""
        return self.quantity.higher_is_better

    @property
    def one_row(self) -> bool:
        """Whether the row is that of one jointly trained policy rather than of a sequence."""
        return self.mode == "multitask" or (self.mode is None and len(self.rows) == 1 and len(self.tasks) > 1)

    @property
    def about(self) -> dict[str, Any]:
        """What has to go with the numbers: the run and its label, as far as they are known, and the simulators."""
        known = {key: self.manifest[key] for key in ABOUT if key in self.manifest}
        known |= {} if self.split is None else {"split": self.split}
        known |= {"criterion": self.criterion, "simulators": self.simulators}
        if not self.is_rate:
            known |= {"quantity": self.label, "unit": self.unit, "direction": self.quantity.direction}
        return known

    @property
    def played_with(self) -> str:
        """The simulators' versions behind the episodes, with what differed where the run was trained; "" = unknown."""
        trained = self.manifest.get("versions")
        trained = trained if isinstance(trained, dict) else {}
        parts = []
        for env_type, found in sorted(self.simulators.items()):
            other = [f"{n} {trained[n]}" for n in sorted(found) if n in trained and trained[n] != found[n]]
            text = f"{env_type} on " + ", ".join(f"{n} {v}" for n, v in sorted(found.items()))
            parts.append(text + (f" (where the run was trained: {', '.join(other)})" if other else ""))
        return "; ".join(parts)


def load_record(path: Path | str, *, criterion: str | None = None) -> Record:
    """Read the record behind `path`: a run, its eval folder, a matrix.json, or any matrix as JSON, CSV, .npy or .npz.

    Args:
        criterion: "success_once" or "success_at_end" to recompute the rates from the episode records; by
            default the matrix's own.

    Raises:
        UserError: `path` is missing or holds no matrix of rates in [0, 1].
    """
    try:
        return _load(Path(path), criterion)
    except OSError as e:  # a name too long, a disk that fails
        raise UserError(f"cannot read {path}: {e.strerror}.") from e


def _load(path: Path, criterion: str | None) -> Record:
    if path.is_dir():
        for folder in (path / "eval", path):
            if (folder / "matrix.json").is_file():
                return _load_eval(folder, criterion)
        raise UserError(
            f"{path} holds no eval/matrix.json: nothing has been evaluated there yet{_validation_of(path)}; "
            "scripts/run_cl_eval.sh evaluates a run."
        )
    if not path.exists():
        raise UserError(f"{path} does not exist. Give a run, its eval folder, or a matrix as JSON, CSV, .npy or .npz.")
    if path.name == "matrix.json" and (path.parent / "cells").is_dir():
        return _load_eval(path.parent, criterion)
    notes: list[str] = []
    table = False
    content = read_bytes(path)
    if content.startswith((NPY, ZIP)):
        data = from_numpy(content, str(path))
    elif path.suffix.lower() == ".json" or read_text(path).lstrip()[:1] in ("[", "{"):
        data = read_json(path)
    else:
        data, notes = from_text(read_text(path), str(path))
        table = True
    record = _from_json(data, str(path), keys=not table)
    record.notes += notes
    record.source = path
    if criterion is not None and criterion != record.criterion:
        raise UserError(f"{path} keeps no episode records, so its rates cannot be recomputed by {criterion}.")
    return record


def _validation_of(path: Path) -> str:
    """What to say of a folder without test episodes that has validation's."""
    for folder in (eval_folder(path, VALIDATION), path / VALIDATION):
        if (folder / "matrix.json").is_file():
            return f" but validation episodes, in {folder}"
    return ""


# ----------------------------------------------------------------------------------- cells of a matrix


def _cell(value: Any, where: str, hint: str = "", rate: bool = True) -> float:
    """A rate in [0, 1], or NaN for None; raises UserError, with `hint` for a rate outside, for anything else.

    `rate`: otherwise an error, at least 0.
    """
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where} is {shown(value)}, not a number (null = not evaluated).")
    if isinstance(value, float) and not math.isfinite(value):  # from CSV; JSON has none
        raise UserError(f"{where} is {value}, not a rate; write null for a cell that was not evaluated.")
    if not rate:
        if value < 0:
            raise UserError(f"{where} is {shown(value)}, and an error is not negative.")
        return float(value)
    if not -ROUNDING <= value <= 1 + ROUNDING:
        raise UserError(f"{where} is {shown(value)}, outside [0, 1].{hint if value >= 2 else ''}")
    return min(1.0, max(0.0, float(value)))


def _scale_hint(rows: list[Any]) -> str:
    """What to do about rates that have the values of another scale; "" where they have not."""
    known = [v for row in rows if isinstance(row, list) for v in row if isinstance(v, int | float)]
    if not known or not all(0 <= v <= 100 for v in known):
        return ""
    if all(isinstance(v, int) or v.is_integer() for v in known):
        return " If these are percent, divide by 100; if they count successes, by the episodes, or write 17/20."
    return " This looks like percent; divide by 100." if max(known) >= 10 else ""


def _fill_triangle(rows: list[Any], n: int | None) -> list[Any]:
    """Rows of 1, 2, 3, … cells are those of a lower triangle: the tasks still to come were not evaluated."""
    lengths = [len(r) if isinstance(r, list) else None for r in rows]
    if len(rows) < 2 or lengths != list(range(1, len(rows) + 1)):
        return rows
    return [r + [None] * ((n or len(rows)) - len(r)) for r in rows]


def _row(
    values: Any, where: str, n: int | None = None, hint: str | None = None, rate: bool = True
) -> FloatArray:
    if not isinstance(values, list):
        raise UserError(f"{where} is not a list of rates.")
    if n is not None and len(values) != n:
        raise UserError(f"{where} has {len(values)} cells where {n} were expected: the matrix is ragged.")
    hint = _scale_hint([values]) if hint is None else hint
    return np.array([_cell(v, f"{where}, column {j}", hint, rate) for j, v in enumerate(values)], dtype=float)


def _matrix(rows: Any, where: str, n: int | None = None, rate: bool = True) -> FloatArray:
    """(K, N) rates from a list of lists; raises UserError naming the place that is wrong."""
    if not isinstance(rows, list):
        raise UserError(f"{where} is not a matrix: expected a list of rows.")
    if rows and not any(isinstance(r, list) for r in rows):
        raise UserError(f"{where} is not a matrix: its rows are not lists. A single row is written [[…]].")
    if not rows or rows[0] == []:
        raise UserError(f"{where} is empty.")
    if max(len(rows), *(len(r) if isinstance(r, list) else 0 for r in rows)) > MAX_TASKS:
        raise UserError(f"{where} has more than {MAX_TASKS} rows or columns.")
    rows = _fill_triangle(rows, n)
    width = n if n is not None else len(rows[0]) if isinstance(rows[0], list) else None
    hint = _scale_hint(rows)
    matrix = np.stack([_row(r, f"{where}, row {k}", width, hint, rate) for k, r in enumerate(rows)])
    if len(matrix) > matrix.shape[1]:
        raise UserError(
            f"{where} has {len(matrix)} rows for {matrix.shape[1]} tasks; there is one row per visited task. "
            'A row measured before the stream is given apart, as "base".'
        )
    return matrix


def _default_names(n: int) -> list[str]:
    return [f"task_{j}" for j in range(n)]


# --------------------------------------------------------------------------------------- bare matrices


def _from_json(data: Any, where: str, keys: bool = True) -> Record:
    """A record from parsed JSON: a list of lists, or an object with "success"; `keys`: whether messages name keys."""
    if isinstance(data, list):
        success = _matrix(data, where)
        return Record(_default_names(success.shape[1]), success, list(range(len(success))), named=False)
    quantity = SUCCESS
    if isinstance(data, dict) and "quantity" in data:
        if data["quantity"] not in QUANTITIES:
            raise UserError(f'{where}: "quantity" is {shown(data["quantity"])}; known: {", ".join(QUANTITIES)}.')
        quantity = QUANTITIES[data["quantity"]]
    values, rate = VALUES[quantity.name], quantity is SUCCESS
    if not isinstance(data, dict) or values not in data:
        raise UserError(f'{where} is not a matrix: expected a list of rows, or an object with "success".')
    tasks = data.get("tasks")
    if tasks is not None and not (isinstance(tasks, list) and all(isinstance(t, str) for t in tasks)):
        raise UserError(f'{where}: "tasks" is not a list of names.')
    inside = f'{where}: "{values}"' if keys else where
    success = _matrix(data[values], inside, len(tasks) if tasks is not None else None, rate)
    n = success.shape[1]
    extra = {
        name: None if data.get(name) is None else _row(data[name], f'{where}: "{name}"', n, rate=rate)
        for name in ("base", "random")
    }
    criterion = data.get("criterion", quantity.criteria[0])
    if criterion not in quantity.criteria:
        raise UserError(f'{where}: "criterion" is {shown(criterion)}; known: {", ".join(quantity.criteria)}.')
    split = data.get("split")
    if split is not None and split not in (TEST, VALIDATION):
        raise UserError(f'{where}: "split" is {shown(split)}; known: {TEST}, {VALIDATION}.')
    about = {} if data.get("run") is None else data["run"]
    _check_manifest(about, f'{where}: "run"')
    return Record(
        tasks=tasks if tasks is not None else _default_names(n),
        success=success,
        rows=list(range(len(success))),
        episodes=_counts(data.get("episodes"), success, where),
        base=extra["base"],
        random=extra["random"],
        criterion=criterion,
        split=split,
        mode=about.get("mode"),
        named=tasks is not None,
        manifest=about,
        quantity=quantity,
    )


def _counts(counts: Any, success: FloatArray, where: str) -> npt.NDArray[np.int64] | None:
    """(K, N) episode counts (null = 0), or None when the file has none."""
    if counts is None:
        return None
    counts = _fill_triangle(counts, success.shape[1]) if isinstance(counts, list) else counts
    good = isinstance(counts, list) and len(counts) == len(success)
    good = good and all(isinstance(row, list) and len(row) == success.shape[1] for row in counts)
    if not good:
        raise UserError(f'{where}: "episodes" does not have the shape of "success".')
    for row in counts:
        for n in row:
            if n is not None and (isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < 2**53):
                raise UserError(f'{where}: "episodes" holds {shown(n)}, not a count.')
    return np.array([[n or 0 for n in row] for row in counts], dtype=np.int64)


# ---------------------------------------------------------------------------------------- eval folders


def _load_eval(folder: Path, criterion: str | None, final_k: int | None = None) -> Record:
    """The record of an eval folder: matrix.json with the records, curves and held-out tasks beside it.

    `final_k` is the visit behind the one row of held-out tasks, whose episode files may be named by it.
    """
    where = str(folder / "matrix.json")
    record = _from_json(read_json(folder / "matrix.json"), where)
    if criterion is not None and criterion not in record.quantity.criteria:
        raise UserError(
            f"{folder} is of {record.quantity.name}: it has no criterion {criterion!r}, only "
            f"{', '.join(record.quantity.criteria)}."
        )
    record.source = folder
    record.split = record.split or TEST  # older ones do not say
    found, own = _manifest(folder), record.manifest
    if not own or found.get("run_id") == own.get("run_id"):  # else the folder lies in another run's
        record.manifest = own | found
        _check_columns(record, found, "visits" if final_k is None else "heldout", folder)
    record.mode = record.manifest.get("mode")
    recompute = criterion is not None and criterion != record.criterion
    record.criterion = criterion or record.criterion
    if final_k is not None and len(record.rows) == 1 and any((folder / "cells").glob(f"k{final_k:02d}_*")):
        record.rows = [final_k]
    _add_simulators(record, folder)
    _add_asked(record, folder)
    _add_failures(record, folder)
    _add_outcomes(record, folder / "cells", recompute)
    validation = record.split == VALIDATION and folder.name == VALIDATION  # RUN/eval/validation: curves are in RUN/eval
    _add_curves(record, (folder.parent if validation else folder) / "curves", recompute)
    heldout = folder / "heldout"
    if (heldout / "matrix.json").is_file() and (not recompute or (heldout / "cells").is_dir()):
        record.heldout = _load_eval(heldout, criterion, final_k=record.rows[-1])
        record.notes += [f"on the pretraining tasks, {note}" for note in record.heldout.notes]
        if record.heldout.simulators and record.heldout.simulators != record.simulators:
            record.notes.append(f"on the pretraining tasks, episodes were played in {record.heldout.played_with}")
    return record


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the run an eval folder (or a view or the held-out tasks inside it) belongs to."""
    for parent in list(folder.resolve().parents)[:4]:  # RUN/eval/validation/views/NAME
        if (parent / "manifest.json").is_file():
            manifest = read_json(parent / "manifest.json")
            _check_manifest(manifest, str(parent / "manifest.json"))
            return dict(manifest)
    return {}


def _check_columns(record: Record, manifest: dict[str, Any], key: str, folder: Path) -> None:
    """Raise UserError where the run's manifest has other columns than the matrix in its folder, or in another order."""
    columns = manifest.get(key)
    if not isinstance(columns, list) or not columns or not all(isinstance(c, dict) for c in columns):
        return
    if [c.get("k", j) for j, c in enumerate(columns)] != list(range(len(columns))):
        raise UserError(f"the manifest.json of the run above {folder} is damaged: its '{key}' are out of order.")
    if [c.get("task") for c in columns] != record.tasks:
        raise UserError(
            f"{folder / 'matrix.json'} has other tasks, or in another order, than '{key}' in the manifest.json of the "
            "run above it: one of the two stands in the wrong place."
        )


def _check_manifest(manifest: Any, where: str) -> None:
    """Raise UserError where a manifest, or what a matrix has of it, is not what is relied on here."""
    if not isinstance(manifest, dict):
        raise UserError(f"{where} is not a JSON object.")
    seed, mode = manifest.get("seed"), manifest.get("mode")
    if not (seed is None or type(seed) is int) or not (mode is None or mode in MODES):
        raise UserError(f"{where} is damaged: it has no proper 'seed' or 'mode'.")


def read_cell(
    cells: Path, tasks: list[str], k: int, j: int, seeds: EpisodeSeeds | None = None
) -> list[dict[str, Any]]:
    """Episode records of one cell; columns of the same task share their episodes, so either file will do.

    Raises UserError for records of another cell, and for other seeds than `seeds` says (null = not known).
    """
    same = [j] + [i for i, name in enumerate(tasks) if name == tasks[j] and i != j]
    for i in same:
        path = cells / (f"base_j{i:02d}.jsonl" if k == BASE_ROW else f"k{k:02d}_j{i:02d}.jsonl")
        if path.is_file():
            episodes = read_jsonl(path)
            if len(episodes) > MAX_EPISODES:
                raise UserError(f"{path} holds more than {MAX_EPISODES} episodes.")
            if not all(isinstance(e, dict) for e in episodes):
                raise UserError(f"{path} holds lines that are not JSON objects.")
            check_cell(path, episodes, k, i, None if seeds is None else seeds.for_task(tasks[i]))
            return episodes
    return []


def _outcomes(
    episodes: list[dict[str, Any]], criterion: str, where: str, bounds: tuple[float, float] = (0.0, 1.0)
) -> dict[int, float]:
    """{episode seed: success}; raises UserError for a record without either or a seed with two outcomes."""
    low, high = bounds
    result: dict[int, float] = {}
    for e in episodes:
        seed, success = e.get("seed"), e.get(criterion)
        if type(seed) is not int or not isinstance(success, bool | int | float) or not low <= success <= high:
            raise UserError(
                f'{where}: an episode record lacks a whole "seed" or a "{criterion}" in [{low:g}, {high:g}].'
            )
        if result.setdefault(seed, float(success)) != float(success):
            raise UserError(f"{where}: episode seed {seed} is recorded twice with different outcomes.")
    return result


def _add_simulators(record: Record, folder: Path) -> None:
    """Attach the versions that played the episodes, where they were recorded."""
    record.simulators = read_simulators(folder)
    if record.simulators and EARLIER in read_json(folder / "settings.json"):
        record.notes.append(
            "some episodes were played before the simulator's versions were recorded: theirs are unknown"
        )


def _add_asked(record: Record, folder: Path) -> None:
    """Attach what errors were computed with, where it was recorded."""
    if record.is_rate:
        return
    path = folder / "settings.json"
    settings, matrix = read_json(path) if path.is_file() else {}, read_json(folder / "matrix.json")
    if not isinstance(settings, dict):
        raise UserError(f"{path} is damaged: it is not a JSON object.")
    record.asked = {key: settings[key] for key in ("stride", "scale") if key in settings}
    if matrix.get("horizon") is not None:
        record.asked["horizon"] = matrix["horizon"]


def _add_failures(record: Record, folder: Path) -> None:
    """Note the cells that were given up. They are not evaluated, whatever the matrix says."""
    for (k, j), failure in read_failures(folder, record.tasks).items():
        if k in record.rows:
            record.success[record.rows.index(k), j] = math.nan
        elif k == BASE_ROW and record.base is not None:
            record.base[j] = math.nan
        record.notes.append(
            f"{cell_name(k, j)} ({record.tasks[j]}) could not be evaluated and counts as not evaluated: "
            f"{failure.get('reason')} ({failure.get('attempts')} attempts); running the evaluation again tries it again"
        )


def _add_outcomes(record: Record, cells: Path, recompute: bool) -> None:
    """Attach the episode records of every evaluated cell; they are the truth where the matrix disagrees."""
    stale = 0
    n = len(record.tasks)
    seeds = read_seeds(cells.parent)
    episodes = np.zeros(record.success.shape, dtype=np.int64) if record.episodes is None else record.episodes
    for k, rates in [*zip(record.rows, record.success, strict=True), (BASE_ROW, record.base)]:
        if rates is None:
            continue
        for j in range(n):
            if math.isnan(rates[j]):  # it may have records already, but the matrix says it is not done
                continue
            played = read_cell(cells, record.tasks, k, j, seeds)
            low = -math.inf if record.criterion == "loss" else 0.0  # a likelihood's may be negative
            bounds = (0.0, 1.0) if record.is_rate else (low, math.inf)
            outcomes = _outcomes(played, record.criterion, f"{cells} (k={k}, j={j})", bounds)
            if all(isinstance(e.get("episode"), int) for e in played):  # those that the matrix counts
                outcomes = {e["seed"]: outcomes[e["seed"]] for e in counted(played)}
            if not outcomes:
                if recompute:
                    rates[j] = math.nan
                continue
            mean = float(np.mean(list(outcomes.values())))
            stale += not recompute and abs(mean - rates[j]) > 1e-3 * max(1.0, abs(mean))
            rates[j] = mean
            record.outcomes[k, j] = outcomes
            if k != BASE_ROW:
                episodes[record.rows.index(k), j] = len(outcomes)
    if recompute and not record.outcomes:
        raise UserError(f"{cells} holds no episode records, so rates cannot be recomputed by {record.criterion}.")
    record.episodes = episodes if record.episodes is not None or record.outcomes else None
    if recompute:
        record.random = None
    if stale:
        record.notes.append(
            f"{stale} cells of matrix.json differ from their episode records, which were used; "
            "running the evaluation again rebuilds the matrix"
        )


def _add_curves(record: Record, folder: Path, recompute: bool) -> None:
    """Attach the learning curves; their episode records are the truth. With `recompute`, others are left out."""
    splits: set[str] = set()
    for k in record.rows:
        path = folder / f"k{k:02d}.json"
        if not path.is_file():
            continue
        data = read_json(path)
        if not isinstance(data, dict) or "fractions" not in data or "success" not in data:
            raise UserError(f'{path} is not a learning curve: expected "fractions" and "success".')
        fractions = _row(data["fractions"], f'{path}: "fractions"')
        success = _row(data["success"], f'{path}: "success"', len(fractions))
        if np.isnan(fractions).any() or (np.diff(fractions) <= 0).any():
            raise UserError(f'{path}: "fractions" do not increase from 0 to 1.')
        cells, seeds = folder / f"task_{k:02d}" / "cells", read_seeds(folder / f"task_{k:02d}")
        played = [read_cell(cells, record.tasks, point, k, seeds) for point in range(len(fractions))]
        if all(played):
            outcomes = [
                _outcomes([dict(e) for e in counted(p)], record.criterion, f"{cells} (point {i})")
                for i, p in enumerate(played)
            ]
            success = np.array([np.mean(list(o.values())) for o in outcomes])
            record.curves[k] = Curve(fractions, success, outcomes)
        elif not recompute:
            record.curves[k] = Curve(fractions, success)
        if k in record.curves and data.get("split") in (TEST, VALIDATION):
            splits.add(data["split"])
    if splits - {record.split}:
        record.notes.append(f"learning curves are of {', '.join(sorted(splits))} episodes (eval.curve_split)")
