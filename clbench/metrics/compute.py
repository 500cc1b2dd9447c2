"""Every metric of a record with its interval; the same over several seeds."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from clbench import registry
from clbench.errors import UserError
from clbench.metrics.definitions import METRICS, FloatArray, Metric, Missing, all_metrics
from clbench.metrics.record import BASE_ROW, Curve, Record

Z_95 = 1.959963984540054
MAX_BOOTSTRAP = 100_000

Inputs = dict[str, "FloatArray | str"]  # a string is the reason why the input is absent


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a binomial rate. Wilson 1927.

    (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n), p = successes/n, z = 1.96.

    Raises:
        ValueError: n is not positive or `successes` is not in [0, n].
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} episodes")
    p = successes / n
    centre = p + Z_95**2 / (2 * n)
    spread = Z_95 * math.sqrt(p * (1 - p) / n + Z_95**2 / (4 * n * n))
    scale = 1 + Z_95**2 / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def compute_metrics(
    record: Record,
    *,
    joint: Record | None = None,
    single: Record | None = None,
    assume_zero_base: bool = False,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Return every metric by name, plugins' included.

    A metric is {"value", "low", "high", "definition", "source"}; `low` and `high` bound 95 % of the bootstrap
    over episodes and are None, with the reason under "no_interval", where there are no episode records. One
    that cannot be computed is {"value": None, "missing": reason, "definition", "source"}.

    Args:
        joint: the multitask run on the same tasks, for `intransigence`.
        single: the single-task run on the same tasks, for `ft_cw`.
        assume_zero_base: take the success before any learning as 0 where it was not measured.
        bootstrap: number of resamplings; 0 for no intervals.

    Raises:
        UserError: `joint` or `single` does not have the record's tasks.
    """
    inputs = _gather(record, joint, single, assume_zero_base)
    drawn = _resample(record, joint, inputs, bootstrap, seed)
    result: dict[str, dict[str, Any]] = {}
    for name, metric in all_metrics().items():
        entry: dict[str, Any] = {"value": None}
        try:
            entry["value"] = _evaluate(record, name, metric, inputs)
        except Missing as reason:
            entry["missing"] = str(reason)
        else:
            low_high, no_interval = _interval(name, metric, drawn)
            entry["low"], entry["high"] = low_high
            if no_interval:
                entry["no_interval"] = no_interval
        entry["definition"] = metric.definition + _remark(record, name, assume_zero_base)
        entry["source"] = metric.source
        result[name] = entry
    return result


def bootstrap_draws(
    record: Record,
    *,
    joint: Record | None = None,
    assume_zero_base: bool = False,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, FloatArray]:
    """{metric: (B,) values under resampled episodes}, for the metrics that have an interval.

    Draws of runs on the same tasks and episode seeds are paired: draw b of each uses the same episodes.
    """
    inputs = _gather(record, joint, None, assume_zero_base)
    drawn = _resample(record, joint, inputs, bootstrap, seed)
    draws: dict[str, FloatArray] = {}
    for name, metric in all_metrics().items():
        try:
            _evaluate(record, name, metric, inputs)
        except Missing:
            continue
        values = _draws_of(name, metric, drawn)
        if not isinstance(values, str):
            draws[name] = values
    return draws


def aggregate(
    metrics: Sequence[Mapping[str, Mapping[str, Any]]],
    draws: Sequence[Mapping[str, FloatArray]] | None = None,
    *,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Mean and standard error of every metric over runs that differ in their seed alone.

    Each entry is {"value": mean, "se": s/√n or None for n = 1, "n", "low", "high", "definition", "source"},
    or {"value": None, "missing", "n": 0, …}. A metric missing in some runs is averaged over the others;
    "missing_in" says in how many. The interval resamples runs and then episodes, from the runs'
    `bootstrap_draws`; for one run it is that run's own.
    """
    if not metrics:
        raise ValueError("no runs to aggregate")
    rng = np.random.default_rng(seed)
    result: dict[str, dict[str, Any]] = {}
    for name, metric in all_metrics().items():
        entries = [m[name] for m in metrics]
        have = [i for i, e in enumerate(entries) if e["value"] is not None]
        about = {"definition": entries[have[0] if have else 0]["definition"], "source": metric.source}
        if not have:
            result[name] = {"value": None, "missing": entries[0]["missing"], "n": 0, **about}
            continue
        values = np.array([entries[i]["value"] for i in have], dtype=float)
        n = len(values)
        entry: dict[str, Any] = {"value": float(values.mean()), "n": n, "low": None, "high": None}
        entry["se"] = float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else None
        if n == 1:
            entry["low"], entry["high"] = entries[have[0]].get("low"), entries[have[0]].get("high")
        elif draws is not None and all(name in draws[i] for i in have):
            length = min(len(draws[i][name]) for i in have)
            if length > 1:
                table = np.stack([draws[i][name][:length] for i in have])  # (n, B)
                chosen = rng.integers(n, size=(n, length))  # resample the runs
                entry["low"], entry["high"] = _percentiles(np.take_along_axis(table, chosen, axis=0).mean(axis=0))
        if n < len(entries):
            entry["missing_in"] = len(entries) - n
        result[name] = entry | about
    return result


# ---------------------------------------------------------------------------------------------- inputs


def _gather(record: Record, joint: Record | None, single: Record | None, assume_zero_base: bool) -> Inputs:
    """The metrics' inputs by name; a string says why one is absent."""
    n = len(record.tasks)
    inputs: Inputs = {"success": record.success, "final": _final_row(record)}
    if record.base is not None:
        inputs["base"] = record.base
    elif assume_zero_base:
        inputs["base"] = np.zeros(n)
    else:
        inputs["base"] = "the base was not evaluated before the stream (--assume-zero-base takes it as 0)"
    inputs["heldout"] = "no held-out tasks were evaluated"
    if record.heldout is not None:
        inputs["heldout"] = record.heldout.success[-1]

    fractions, curves = _curves(record, list(range(n)), "")
    inputs["fractions"], inputs["curves"] = fractions, curves
    inputs["single"] = "needs single-task learning curves (--single RUN; in a report, a singletask run beside it)"
    if single is not None:
        if single.mode not in (None, "singletask"):
            raise UserError(f"--single {single.source}: expected a singletask run, this is a {single.mode} one.")
        where = _columns(record, single, "--single")
        their_fractions, inputs["single"] = _curves(single, where, "the single-task run: ")
        both = not isinstance(fractions, str) and not isinstance(their_fractions, str)
        if both and not np.array_equal(fractions, their_fractions):
            inputs["single"] = "the single-task learning curves are at other fractions than these"

    inputs["joint"] = "needs joint training (--joint RUN; in a report, a multitask run beside it)"
    if joint is not None:
        if len(joint.rows) != 1 or joint.mode not in (None, "multitask"):
            what = f"{len(joint.rows)} rows" + (f" of a {joint.mode} run" if joint.mode else "")
            raise UserError(f"--joint {joint.source}: expected the single row of a multitask run, got {what}.")
        inputs["joint"] = joint.success[-1, _columns(record, joint, "--joint")]
    return inputs


def _final_row(record: Record) -> FloatArray | str:
    """The row of the final checkpoint."""
    if record.one_row or record.rows[-1] == len(record.tasks) - 1:
        return record.success[-1]
    return f"the last task's checkpoint has no row: {len(record.rows)} of {len(record.tasks)} do"


def _columns(record: Record, other: Record, flag: str) -> list[int]:
    """For each of the record's tasks, its column in `other`; raises UserError when tasks or splits differ."""
    if record.split and other.split and record.split != other.split:
        raise UserError(f"{flag} {other.source}: it has {other.split} episodes, and this run {record.split} ones.")
    n = len(record.tasks)
    if record.tasks == other.tasks or (len(other.tasks) == n and not (record.named and other.named)):
        return list(range(n))
    absent = [t for t in record.tasks if t not in other.tasks]
    if absent:
        raise UserError(f"{flag} {other.source}: it has no task {absent[0]!r}; both runs need the same tasks.")
    return [other.tasks.index(t) for t in record.tasks]


def _curves(record: Record, columns: list[int], prefix: str) -> tuple[FloatArray | str, FloatArray | str]:
    """(fractions (E,), curves (N, E)) of the given tasks, or twice the reason why they are absent."""
    absent = [k for k in columns if k not in record.curves]
    if absent:
        which = "no learning curve was" if len(absent) == len(columns) else f"the curve of task k={absent[0]} was not"
        reason = f"{prefix}{which} measured"
        return reason, reason
    curves: list[Curve] = [record.curves[k] for k in columns]
    if any(not np.array_equal(c.fractions, curves[0].fractions) for c in curves):
        reason = f"{prefix}the learning curves are at different fractions"
        return reason, reason
    return curves[0].fractions, np.stack([c.success for c in curves])


def _evaluate(record: Record, name: str, metric: Metric, inputs: Inputs) -> float:
    """One metric's value; raises Missing."""
    if record.one_row and metric.of != "final row":
        raise Missing("one policy was trained on all tasks at once: there is no sequence of checkpoints")
    if record.mode == "singletask" and metric.of != "diagonal":
        raise Missing("one independent policy per task: there is no sequence of checkpoints")
    arguments = []
    for key in metric.inputs:
        value = inputs[key]
        if isinstance(value, str):
            raise Missing(value)
        arguments.append(value)
    return float(_computed(name, metric, arguments))


def _computed(name: str, metric: Metric, arguments: Sequence[Any]) -> Any:
    """The metric's function of its arguments. A plugin's that fails leaves the others standing: it is missing."""
    if name in METRICS:
        return metric(*arguments)
    try:
        return metric(*arguments)
    except Missing:
        raise
    except Exception as e:
        raise Missing(f"it failed, which {_package(name)} has to mend: {type(e).__name__}: {e}") from e


def _package(name: str) -> str:
    return registry.entries("metrics")[name].origin


def _remark(record: Record, name: str, assume_zero_base: bool) -> str:
    """What the definition must add for this record."""
    if name == "fwt_gem" and record.base is None and assume_zero_base:
        return " [base assumed 0]"
    if name == "forgetting" and record.success.shape[0] == record.success.shape[1]:
        skipped = int(np.isnan(record.success[:-1, :-1]).sum())
        if skipped:
            return f" [{skipped} cells not evaluated, skipped in the max]"
    return ""


# ------------------------------------------------------------------------------------------- bootstrap


def _resample(record: Record, joint: Record | None, inputs: Inputs, bootstrap: int, seed: int) -> Inputs:
    """The inputs with a leading axis of B draws; a string says why an input has none.

    A draw gives every episode seed of a task a weight (a multinomial of as many episodes). The weights serve
    all rows of that task's column, the base and the joint run too: an episode starts alike in each.
    """
    if not 0 <= bootstrap <= MAX_BOOTSTRAP:
        raise UserError(f"--bootstrap {bootstrap}: expected a number from 0 (no intervals) to {MAX_BOOTSTRAP}.")
    drawn: Inputs = dict.fromkeys(inputs, "no interval was asked for")
    if bootstrap == 0:
        return drawn
    drawn["curves"] = drawn["single"] = "learning curves keep no episode records"
    if not isinstance(inputs["fractions"], str):
        drawn["fractions"] = inputs["fractions"]

    records = [record] + ([joint] if joint is not None else [])
    weights = _episode_weights(records, bootstrap, seed)
    drawn["success"] = drawn["final"] = success = _resampled_rows(record, record.rows, record.success, weights)
    if not isinstance(success, str):
        drawn["final"] = success[:, -1]
    if record.base is None:
        drawn["base"] = inputs["base"]  # absent, or assumed 0 and then not random
    else:
        base = _resampled_rows(record, [BASE_ROW], record.base[None], weights)
        drawn["base"] = base if isinstance(base, str) else base[:, 0]
    if joint is not None:
        rows = _resampled_rows(joint, joint.rows, joint.success, weights)
        where = _columns(record, joint, "--joint")
        drawn["joint"] = rows if isinstance(rows, str) else rows[:, -1, where]
    if record.heldout is not None:
        held = record.heldout
        rows = _resampled_rows(held, held.rows, held.success, _episode_weights([held], bootstrap, seed))
        drawn["heldout"] = rows if isinstance(rows, str) else rows[:, -1]
    return drawn


def _episode_weights(
    records: Sequence[Record], bootstrap: int, seed: int
) -> dict[str, tuple[dict[int, int], npt.NDArray[np.int64]]]:
    """{task: ({episode seed: column}, weights (B, S))}; a task visited twice has one set of episodes."""
    seeds: dict[str, set[int]] = {}
    for record in records:
        for (_, j), outcomes in record.outcomes.items():
            seeds.setdefault(record.tasks[j], set()).update(outcomes)
    weights = {}
    for task, known in seeds.items():
        rng = np.random.default_rng([seed, zlib.crc32(task.encode())])
        column = {s: i for i, s in enumerate(sorted(known))}
        weights[task] = (
            column,
            rng.multinomial(len(column), np.full(len(column), 1 / len(column)), size=bootstrap),
        )
    return weights


def _resampled_rows(
    record: Record,
    rows: Sequence[int],
    rates: FloatArray,
    weights: Mapping[str, tuple[dict[int, int], npt.NDArray[np.int64]]],
) -> FloatArray | str:
    """(B, len(rows), N) resampled rates, NaN where not evaluated, or why there are none."""
    bootstrap = len(next(iter(weights.values()))[1]) if weights else 0
    drawn = np.full((bootstrap, *rates.shape), np.nan)
    for i, k in enumerate(rows):
        for j, task in enumerate(record.tasks):
            if np.isnan(rates[i, j]):
                continue
            outcomes = record.outcomes.get((k, j))
            if outcomes is None:
                return "no episode records" if not record.outcomes else f"no episode records of k={k} j={j}"
            if len(outcomes) < 2:
                return f"one episode at k={k} j={j}: nothing to resample"
            column, weight = weights[task]
            chosen = weight[:, [column[s] for s in outcomes]]
            total = chosen.sum(axis=1)
            hits = chosen @ np.fromiter(outcomes.values(), dtype=float)
            # A cell with few of its column's seeds may come out empty: that draw is left out.
            drawn[:, i, j] = np.divide(hits, total, out=np.full(bootstrap, np.inf), where=total > 0)
    return drawn


def _draws_of(name: str, metric: Metric, drawn: Inputs) -> FloatArray | str:
    """(B,) draws of one metric, or why there are none."""
    arguments = []
    for key in metric.inputs:
        value = drawn[key]
        if isinstance(value, str):
            return value
        arguments.append(value)
    with np.errstate(invalid="ignore"):  # inf - inf in the draws that are left out
        values = np.atleast_1d(_computed(name, metric, arguments))
    return values[np.isfinite(values)]


def _percentiles(values: FloatArray) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _interval(name: str, metric: Metric, drawn: Inputs) -> tuple[tuple[float | None, float | None], str | None]:
    values = _draws_of(name, metric, drawn)
    if isinstance(values, str):
        return (None, None), values
    if len(values) < 2:
        return (None, None), "too few draws had an episode in every cell"
    return _percentiles(values), None
