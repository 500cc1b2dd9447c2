"""Every metric of a record with its interval; the same over several seeds."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from clbench import registry
from clbench.errors import UserError
from clbench.metrics.definitions import METRICS, FloatArray, Metric, Missing, all_metrics
from clbench.metrics.record import BASE_ROW, Curve, Record

Z_95 = 1.959963984540054
HALVES = ("even", "odd")
PER_VISIT = ("auc_clare", "fwt_clare", "nbt_clare", "nbt_libero", "asr", "bwt_gem", "nbt_final", "forgetting",
             "forgetting_corrected")  # fmt: skip
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
    prefixes: Sequence[Record] = (),
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
        prefixes: multitask runs on the record's first tasks, one for each number of them (`joint` is one, too), for
            `intransigence_prefixes`.
        assume_zero_base: take the success before any learning as 0 where it was not measured.
        bootstrap: number of resamplings; 0 for no intervals.

    Raises:
        UserError: `joint` or `single` does not have the record's tasks.
    """
    asked = record
    record, joint, single, prefixes = _as_rates(record, joint, single, prefixes, assume_zero_base)
    inputs = _gather(record, joint, single, prefixes, assume_zero_base)
    drawn = _resample(record, joint, single, prefixes, inputs, bootstrap, seed)
    result: dict[str, dict[str, Any]] = {}
    for name, metric in all_metrics().items():
        entry: dict[str, Any] = {"value": None}
        try:
            value = _evaluate(record, name, metric, inputs)
        except Missing as reason:
            entry["missing"] = in_words(str(reason), asked)
        else:
            values = _centred(name, metric, drawn, value, _bounds(asked, metric))
            sign = _sign(asked, metric)
            entry["value"], entry["low"], entry["high"] = sign * value, None, None
            if isinstance(values, str):
                entry["no_interval"] = in_words(values, asked)
            else:
                entry["low"], entry["high"] = _percentiles(sign * values)
        entry["definition"] = in_words(metric.definition, asked) + _remark(record, name, assume_zero_base)
        if not asked.is_rate:
            entry["definition"] += " [R: the error]" if metric.of_errors == "level" else " [R: minus the error]"
            entry |= {"quantity": asked.label, "unit": asked.unit, "direction": direction(metric, asked)}
        entry["source"] = metric.source
        result[name] = entry
    return result


def bootstrap_draws(
    record: Record,
    *,
    joint: Record | None = None,
    single: Record | None = None,
    prefixes: Sequence[Record] = (),
    assume_zero_base: bool = False,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, FloatArray]:
    """{metric: (B,) values under resampled episodes}, for the metrics that have an interval.

    Draws of runs on the same tasks and episode seeds are paired: draw b of each uses the same episodes.
    """
    asked = record
    record, joint, single, prefixes = _as_rates(record, joint, single, prefixes, assume_zero_base)
    inputs = _gather(record, joint, single, prefixes, assume_zero_base)
    drawn = _resample(record, joint, single, prefixes, inputs, bootstrap, seed)
    draws: dict[str, FloatArray] = {}
    for name, metric in all_metrics().items():
        try:
            value = _evaluate(record, name, metric, inputs)
        except Missing:
            continue
        values = _centred(name, metric, drawn, value, _bounds(asked, metric))
        if not isinstance(values, str):
            draws[name] = _sign(asked, metric) * values
    return draws


def higher_is_better(metric: Metric, record: Record) -> bool:
    """Which way a metric of this record is better: a level of errors is an error."""
    return metric.higher_is_better if record.is_rate or metric.of_errors != "level" else not metric.higher_is_better


def direction(metric: Metric, record: Record) -> str:
    return "higher is better" if higher_is_better(metric, record) else "lower is better"


def in_words(text: str, record: Record) -> str:
    """A text about success rates, for a record of errors."""
    return text if record.is_rate else text.replace("success rate", "error").replace("success", "error")


def aggregate(
    metrics: Sequence[Mapping[str, Mapping[str, Any]]],
    draws: Sequence[Mapping[str, FloatArray]] | None = None,
    *,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Mean of every metric over runs that differ in their seed alone, with its interval.

    Each entry is {"value": mean, "sd": standard deviation over the runs or None for n = 1, "n", "low", "high",
    "definition", "source"},
    or {"value": None, "missing", "n": 0, …}. A metric missing in some runs is averaged over the others;
    "missing_in" says in how many. The interval resamples runs and then episodes, from the runs'
    `bootstrap_draws`; for one run it is that run's own. What resampling runs shows of their spread is widened by
    √(n/(n−1)).
    """
    if not metrics:
        raise ValueError("no runs to aggregate")
    rng = np.random.default_rng(seed)
    result: dict[str, dict[str, Any]] = {}
    for name, metric in all_metrics().items():
        entries = [m[name] for m in metrics]
        have = [i for i, e in enumerate(entries) if e["value"] is not None]
        shown = entries[have[0] if have else 0]
        about = {"definition": shown["definition"], "source": metric.source}
        about |= {key: shown[key] for key in ("quantity", "unit", "direction") if key in shown}
        if not have:
            result[name] = {"value": None, "missing": entries[0]["missing"], "n": 0, **about}
            continue
        values = np.array([entries[i]["value"] for i in have], dtype=float)
        n = len(values)
        entry: dict[str, Any] = {"value": float(values.mean()), "n": n, "low": None, "high": None}
        entry["sd"] = float(values.std(ddof=1)) if n > 1 else None
        if n == 1:
            entry["low"], entry["high"] = entries[have[0]].get("low"), entries[have[0]].get("high")
        elif draws is not None and all(name in draws[i] for i in have):
            length = min(len(draws[i][name]) for i in have)
            if length > 1:
                table = np.stack([draws[i][name][:length] for i in have])  # (n, B)
                entry["low"], entry["high"] = _percentiles(over_runs(values, table, rng)[1])
        if n < len(entries):
            entry["missing_in"] = len(entries) - n
        result[name] = entry | about
    return result


def over_runs(values: FloatArray, table: FloatArray, rng: np.random.Generator) -> tuple[float, FloatArray]:
    """The mean of n runs' values (n,), and (B,) draws of it from theirs, (n, B): runs first, then episodes.

    Drawing n runs with replacement shows (n − 1)/n of their variance: that part is widened by √(n/(n−1)).
    """
    n = len(values)
    if n == 1:
        return float(values[0]), table[0]
    chosen = rng.integers(n, size=table.shape)
    drawn = np.take_along_axis(table, chosen, axis=0).mean(axis=0)
    drawn += (math.sqrt(n / (n - 1)) - 1) * (values[chosen].mean(axis=0) - values.mean())
    return float(values.mean()), drawn


# ---------------------------------------------------------------------------------------------- errors


def _as_rates(
    record: Record, joint: Record | None, single: Record | None, prefixes: Sequence[Record], assume_zero_base: bool
) -> tuple[Record, Record | None, Record | None, Sequence[Record]]:
    """The records with −errors in the place of errors, so that more is better, as the formulas have it."""
    for other in (joint, single, *prefixes):
        if other is not None and (other.quantity, other.criterion) != (record.quantity, record.criterion):
            raise UserError(f"{other.source} is of {other.label}, and {record.source} of {record.label}.")
    if record.is_rate:
        return record, joint, single, prefixes
    if assume_zero_base:
        raise UserError("--assume-zero-base is for rates: before any learning, an error is not 0.")
    return (
        _negated(record), None if joint is None else _negated(joint), None if single is None else _negated(single),
        [_negated(p) for p in prefixes],
    )  # fmt: skip


def _negated(record: Record) -> Record:
    outcomes = {cell: {s: -v for s, v in found.items()} for cell, found in record.outcomes.items()}
    base, random = (None if row is None else -row for row in (record.base, record.random))
    return replace(record, success=-record.success, base=base, random=random, outcomes=outcomes)


def _sign(record: Record, metric: Metric) -> int:
    """What turns a metric of −errors into one of errors."""
    return -1 if not record.is_rate and metric.of_errors == "level" else 1


def _bounds(record: Record, metric: Metric) -> tuple[float, float]:
    """Of a metric's values as computed."""
    if record.is_rate:
        return metric.bounds
    known = metric.of_errors == "level" and record.criterion != "loss"  # a likelihood's may be negative
    return (-np.inf, 0.0) if known else (-np.inf, np.inf)


def _student(degrees: int) -> float:
    """t/z: Student's 97.5 % quantile with so many degrees of freedom over the normal one.

    T = √ν tan θ with a density of θ proportional to cos^{ν−1} θ, which is integrated numerically.
    """
    if degrees > 1000:
        return 1.0
    angle = np.linspace(0.0, math.pi / 2, 20_001)
    density = np.cos(angle) ** (degrees - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    at = np.interp(0.95, below / below[-1], angle)
    return math.sqrt(degrees) * math.tan(at) / Z_95


# ---------------------------------------------------------------------------------------------- inputs


def _gather(
    record: Record, joint: Record | None, single: Record | None, prefixes: Sequence[Record], assume_zero_base: bool
) -> Inputs:
    """The metrics' inputs by name; a string says why one is absent."""
    n = len(record.tasks)
    inputs: Inputs = {"success": record.success, "final": _final_row(record)}
    inputs["task"] = np.array([record.tasks.index(t) for t in record.tasks])
    inputs["even"], inputs["odd"] = (_half(record, part) for part in range(len(HALVES)))
    if record.base is not None:
        inputs["base"] = record.base
    elif assume_zero_base:
        inputs["base"] = np.zeros(n)
    else:
        inputs["base"] = "the base was not evaluated before the stream (--assume-zero-base takes it as 0)"
    if not record.is_rate and record.base is None:
        inputs["base"] = "the base was not evaluated before the stream (clbench eval --base)"
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
    for other in (*prefixes, *([joint] if joint else [])):
        if len(other.rows) != 1 or other.mode not in (None, "multitask"):
            what = f"{len(other.rows)} rows" + (f" of a {other.mode} run" if other.mode else "")
            raise UserError(f"--joint {other.source}: expected the single row of a multitask run, got {what}.")
        if record.split and other.split and record.split != other.split:
            raise UserError(f"--joint {other.source}: it has {other.split} episodes, and this run {record.split} ones.")
    if joint is not None:
        inputs["joint"] = joint.success[-1, _columns(record, joint, "--joint")]
    found = _prefixes(record, joint, prefixes)
    if isinstance(found, str):
        inputs["prefixes"] = found
    else:
        last = [p.success[-1, p.tasks.index(t)] for p, t in zip(found, record.tasks, strict=True)]
        inputs["prefixes"] = np.array(last)
    return inputs


def _prefixes(record: Record, joint: Record | None, prefixes: Sequence[Record]) -> list[Record] | str:
    """For each k, the joint run on tasks 0…k, or why there is none."""
    found = []
    for k in range(len(record.tasks)):
        same = [p for p in (*prefixes, *([joint] if joint else [])) if set(p.tasks) == set(record.tasks[: k + 1])]
        if not same:
            missing = "task 0 alone" if k == 0 else f"tasks 0 to {k}"
            return f"needs joint training on the first tasks (--joint RUN, once for each number), here on {missing}"
        found.append(same[0])
    return found


def _half(record: Record, part: int) -> FloatArray | str:
    """(K, N) rates over every second episode of a cell, by their seeds, from the first (0) or the second (1) on."""
    rates = np.full(record.success.shape, np.nan)
    for i, k in enumerate(record.rows):
        for j in range(len(record.tasks)):
            if math.isnan(record.success[i, j]):
                continue
            outcomes = record.outcomes.get((k, j), {})
            if len(outcomes) < 2:
                return f"fewer than two episodes recorded at k={k} j={j}: no halves to choose and to judge by"
            rates[i, j] = np.mean([outcomes[s] for s in sorted(outcomes)[part::2]])
    return rates


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
    if not record.is_rate and metric.of_errors is None:
        raise Missing("it makes sense for rates in [0, 1] alone, and these are errors")
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
        raise Missing(f"it failed, which {_package(name)} has to fix: {type(e).__name__}: {e}") from e


def _package(name: str) -> str:
    return registry.entries("metrics")[name].origin


def _remark(record: Record, name: str, assume_zero_base: bool) -> str:
    """What the definition must add for this record."""
    if name in PER_VISIT and len(set(record.tasks)) < len(record.tasks):
        return " [a task counts once per visit]"
    if name == "fwt_gem" and record.base is None and assume_zero_base:
        return " [base assumed 0]"
    if name == "forgetting" and record.success.shape[0] == record.success.shape[1]:
        skipped = int(np.isnan(record.success[:-1, :-1]).sum())
        if skipped:
            return f" [{skipped} cells not evaluated, skipped in the max]"
    return ""


# ------------------------------------------------------------------------------------------- bootstrap


def _resample(
    record: Record,
    joint: Record | None,
    single: Record | None,
    prefixes: Sequence[Record],
    inputs: Inputs,
    bootstrap: int,
    seed: int,
) -> Inputs:
    """The inputs with a leading axis of B draws; a string says why an input has none.

    A Bayesian bootstrap (Rubin 1981) with Jeffreys' prior: a draw gives every episode seed a weight from Exp(1), and
    every cell half a success and half a failure, on average, of its own; so a cell's rate has the posterior
    Beta(s + ½, f + ½) of s successes and f failures, which is never of width 0. A seed has one weight in all rows and
    all tasks, the base and the joint run: an episode starts alike in each row, and tasks that share seeds may, too.
    """
    if not 0 <= bootstrap <= MAX_BOOTSTRAP:
        raise UserError(f"--bootstrap {bootstrap}: expected a number from 0 (no intervals) to {MAX_BOOTSTRAP}.")
    drawn: Inputs = dict.fromkeys(inputs, "no interval was asked for")
    if bootstrap == 0:
        return drawn
    for name in ("fractions", "task"):  # known, not measured
        if not isinstance(inputs[name], str):
            drawn[name] = inputs[name]

    draws = _Draws(bootstrap, seed)
    drawn["curves"] = inputs["curves"] if isinstance(inputs["curves"], str) else draws.curves(
        record, list(range(len(record.tasks)))
    )  # fmt: skip
    drawn["single"] = inputs["single"] if isinstance(inputs["single"], str) or single is None else draws.curves(
        single, _columns(record, single, "--single")
    )  # fmt: skip
    drawn["success"] = drawn["final"] = success = draws.rows(record, record.rows, record.success)
    if not isinstance(success, str):
        drawn["final"] = success[:, -1]
    for part, name in enumerate(HALVES):
        drawn[name] = inputs[name] if isinstance(inputs[name], str) else draws.rows(
            record, record.rows, record.success, part
        )  # fmt: skip
    if record.base is None:
        drawn["base"] = inputs["base"]  # absent, or assumed 0 and then not random
    else:
        base = draws.rows(record, [BASE_ROW], record.base[None])
        drawn["base"] = base if isinstance(base, str) else base[:, 0]
    if joint is not None:
        rows = draws.rows(joint, joint.rows, joint.success)
        where = _columns(record, joint, "--joint")
        drawn["joint"] = rows if isinstance(rows, str) else rows[:, -1, where]
    found = _prefixes(record, joint, prefixes)
    drawn["prefixes"] = found if isinstance(found, str) else draws.columns(found, record.tasks)
    if record.heldout is not None:
        held = record.heldout
        rows = draws.rows(held, held.rows, held.success)
        drawn["heldout"] = rows if isinstance(rows, str) else rows[:, -1]
    return drawn


def _key(record: Record, *more: str) -> int:
    """A number that tells runs apart, the same wherever a run's folder is."""
    parts = [] if record.source is None else list(record.source.parts)
    if "eval" in parts:  # RUN/eval/…
        at = len(parts) - 1 - parts[::-1].index("eval")
        name = record.manifest.get("run_id") or "".join(parts[:at][-1:])
        place = [str(name), *parts[at + 1 :]]
    else:
        place = parts[-1:]
    return zlib.crc32("/".join([*place, *more]).encode())


class _Draws:
    """B draws of rates. Those of runs whose episodes have the same seeds are paired: draw b weighs a seed alike."""

    def __init__(self, bootstrap: int, seed: int) -> None:
        self.bootstrap, self.seed = bootstrap, seed
        self._wider: dict[int, float] = {}
        self._weights: dict[int, FloatArray] = {}

    def _of(self, episode_seed: int) -> FloatArray:
        """(B,) the weights of an episode seed."""
        if episode_seed not in self._weights:
            rng = np.random.default_rng([self.seed, episode_seed])
            self._weights[episode_seed] = rng.exponential(size=self.bootstrap)
        return self._weights[episode_seed]

    def rows(self, record: Record, rows: Sequence[int], rates: FloatArray, part: int | None = None) -> FloatArray | str:
        """(B, len(rows), N) drawn rates, NaN where not evaluated, or why there are none. `part`: of a half, 0 or 1."""
        drawn = np.full((self.bootstrap, *rates.shape), np.nan)
        run = _key(record)
        for i, k in enumerate(rows):
            for j in range(len(record.tasks)):
                if np.isnan(rates[i, j]):
                    continue
                outcomes = record.outcomes.get((k, j))
                if outcomes is None:
                    return "no episode records" if not record.outcomes else f"no episode records of k={k} j={j}"
                if len(outcomes) < 2:
                    return f"one episode at k={k} j={j}: nothing to resample"
                seeds = sorted(outcomes)[slice(part, None, 1 if part is None else 2)]
                if not record.is_rate:
                    if len(seeds) < 2:
                        return f"fewer than two episodes in each half at k={k} j={j}: nothing to resample"
                    drawn[:, i, j] = self._mean({s: outcomes[s] for s in seeds}, _degrees(record))
                    continue
                first = record.tasks.index(record.tasks[j])  # a repeated task's columns have the same episodes
                prior = [run, k + 1, first, 2 if part is None else part]
                drawn[:, i, j] = self._rate({s: outcomes[s] for s in seeds}, prior)
        return drawn

    def columns(self, records: Sequence[Record], tasks: Sequence[str]) -> FloatArray | str:
        """(B, N) drawn rates of the last row of record i on task i, or why there are none."""
        drawn = []
        for record, task in zip(records, tasks, strict=True):
            rows = self.rows(record, record.rows, record.success)
            if isinstance(rows, str):
                return rows
            drawn.append(rows[:, -1, record.tasks.index(task)])
        return np.stack(drawn, axis=1)

    def curves(self, record: Record, columns: Sequence[int]) -> FloatArray | str:
        """(B, N, E) drawn rates of the learning curves of these tasks, or why there are none."""
        run = _key(record, "curves")
        drawn = []
        for k in columns:
            points = record.curves[k].outcomes
            if points is None:
                return f"no episode records of the learning curve of task k={k}"
            if any(len(outcomes) < 2 for outcomes in points):
                return f"one episode at a point of the learning curve of task k={k}: nothing to resample"
            drawn.append(np.stack([self._rate(o, [run, k, i]) for i, o in enumerate(points)], axis=1))
        return np.stack(drawn, axis=1)

    def _mean(self, values: Mapping[int, float], degrees: int) -> FloatArray:
        """(B,) draws of the mean of one cell's errors: a Bayesian bootstrap without a prior.

        Its variance is that of the S values over (S + 1), with S in the denominator of both; that of a mean is theirs
        with S − 1, over S. What S values say of their own spread is uncertain too, which the factor from the normal to
        Student's distribution adds, with the degrees of freedom of all tasks' episodes together.
        """
        seeds = list(values)
        weight = np.stack([self._of(s) for s in seeds], axis=1)  # (B, S)
        mean = weight @ np.array([values[s] for s in seeds], dtype=float) / weight.sum(axis=1)
        if degrees not in self._wider:
            self._wider[degrees] = _student(degrees)
        wider = math.sqrt((len(seeds) + 1) / (len(seeds) - 1)) * self._wider[degrees]
        return np.asarray(mean.mean() + wider * (mean - mean.mean()))

    def _rate(self, outcomes: Mapping[int, float], prior: Sequence[int]) -> FloatArray:
        """(B,) drawn rates of one cell. `prior`: what its own half success and half failure are drawn from."""
        seeds = list(outcomes)
        weight = np.stack([self._of(s) for s in seeds], axis=1)  # (B, S)
        success, failure = np.random.default_rng([self.seed, *prior]).gamma(0.5, size=(2, self.bootstrap))
        hits = weight @ np.array([outcomes[s] for s in seeds], dtype=float)
        rate = (hits + success) / (weight.sum(axis=1) + success + failure)
        # The posterior's variance is p(1 − p)/(S + 2), and p(1 − p) of S episodes (S − 1)/S of the true one.
        wider = math.sqrt((len(seeds) + 2) / max(1, len(seeds) - 1))
        return np.asarray(rate.mean() + wider * (rate - rate.mean()))


def _degrees(record: Record) -> int:
    """Degrees of freedom of the errors of all tasks together: Σ over tasks of (episodes − 1), at least 1."""
    counts: dict[str, int] = {}
    for (_, j), found in record.outcomes.items():
        counts[record.tasks[j]] = min(len(found), counts.get(record.tasks[j], len(found)))
    return max(1, sum(n - 1 for n in counts.values()))


def _draws_of(name: str, metric: Metric, drawn: Inputs) -> FloatArray | str:
    """(B,) draws of one metric, or why there are none."""
    arguments = []
    for key in metric.inputs:
        value = drawn[key]
        if isinstance(value, str):
            return value
        arguments.append(value)
    try:
        return np.atleast_1d(_computed(name, metric, arguments))
    except Missing as reason:
        return f"{name} has no value for some draws: {reason}"


def _percentiles(values: FloatArray) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _centred(
    name: str, metric: Metric, drawn: Inputs, value: float, bounds: tuple[float, float]
) -> FloatArray | str:
    """(B,) draws of one metric, moved to have `value` as their mean, or why there are none.

    The prior pulls every cell towards ½; over many cells that would add up. So draws tell how far the value may be off,
    and not where it is.
    """
    if metric.no_interval is not None:
        return metric.no_interval
    values = _draws_of(name, metric, drawn)
    return values if isinstance(values, str) else (values - values.mean() + value).clip(*bounds)
