"""Every summary metric as one pure function of the success matrix, under the name of its definition.

Shapes: `success` is (..., K, N), row k = after visit k, column j = evaluated task; NaN = not evaluated.
Leading axes are bootstrap draws, so the same function serves a single matrix and a thousand resampled ones.
Curves are (N, E): the success on task k at E points of its own training.

Published papers use "FWT" and "NBT" for different quantities, hence the suffix in each name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from clbench import registry
from clbench.errors import UserError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
LIBERO_POINTS = 11  # learning curves at 0, 0.1, …, 1 of a task's training


class Missing(Exception):
    """The record lacks what a metric needs; the message says what."""


@dataclass(frozen=True)
class Metric:
    """A metric: a function of arrays, and how to print it. Calling it calls the function.

    Attributes:
        function: of its inputs, each a float64 array; returns a number, or (...) where `success` has leading axes.
            Raises Missing where it cannot be computed.
        inputs: names of INPUTS, in the order of the function's parameters.
        definition: the equation, in a line of plain text.
        source: the paper.
        of: what of a matrix it is of: "final row" is all that a jointly trained policy has, "diagonal" all that
            independent policies have.
        no_interval: why its value has no interval; None = it has one.
        bounds: the least and the greatest value that it can have.
    """

    function: Callable[..., Any]
    inputs: tuple[str, ...]
    definition: str
    source: str
    higher_is_better: bool
    of: str = "matrix"
    no_interval: str | None = None
    bounds: tuple[float, float] = (-np.inf, np.inf)

    def __post_init__(self) -> None:
        object.__setattr__(self, "__doc__", self.function.__doc__)

    @property
    def of_errors(self) -> str | None:
        """What it is of a matrix of errors e, computed with R = −e: a "level" (its value is then negated: an error), or
        a "difference" of levels, which keeps its sign and direction. None = it makes sense for rates alone.

        A metric in [0, 1] is a level, one in [−1, 1] a difference.
        """
        return {RATE: "level", DIFFERENCE: "difference"}.get(self.bounds)

    def __call__(self, *inputs: Any) -> Any:
        return self.function(*inputs)


# What a metric may ask for, N tasks: name → shape and meaning.
INPUTS = {
    "success": "(..., N, N), row k after visit k, column j task j",
    "task": "(N,), which task a column is of: columns of one task have one number",
    "even": "(..., N, N), as success, of every second episode of a cell",
    "odd": "(..., N, N), of the other episodes",
    "final": "(..., N), the last row",
    "base": "(..., N), the base before the stream",
    "heldout": "(..., M), the last checkpoint on tasks outside the stream",
    "joint": "(..., N), a multitask run",
    "prefixes": "(..., N), entry k is the success on task k of joint training on tasks 0…k",
    "curves": "(..., N, E), success at E points of each task's own training",
    "fractions": "(E,), those points, from 0 to 1",
    "single": "(..., N, E), the curves of single-task runs",
}
OF = ("matrix", "final row", "diagonal")
RATE, DIFFERENCE = (0.0, 1.0), (-1.0, 1.0)


def metric(
    inputs: tuple[str, ...],
    definition: str,
    source: str,
    *,
    higher_is_better: bool,
    of: str = "matrix",
    no_interval: str | None = None,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> Callable[[Callable[..., Any]], Metric]:
    """Make a metric of a function: see `Metric`. A plugin names it in the entry point group `clbench.metrics`.

    Raises:
        ValueError: an input that is not among INPUTS, or an `of` that is not among OF.
    """
    unknown = [name for name in inputs if name not in INPUTS]
    if unknown or of not in OF:
        wrong = unknown[0] if unknown else of
        raise ValueError(f"a metric takes {', '.join(INPUTS)}, of {' | '.join(OF)}; not {wrong}.")
    return lambda function: Metric(function, inputs, definition, source, higher_is_better, of, no_interval, bounds)


_CLARE, _LIBERO = "CLARE, arXiv 2601.09512", "LIBERO, arXiv 2306.03310"
_HELD = "a curve held at its best takes a maximum of noisy rates, which is biased upwards"
_BIASED = "forgetting takes a maximum of noisy rates, which is biased upwards: see forgetting_corrected"
_GEM, _CHAUDHRY = "Lopez-Paz & Ranzato 2017 (GEM)", "Chaudhry et al. 2018"
_HU, _CW = "Hu et al. 2026, arXiv 2603.11653", "Continual World, arXiv 2105.10919"


# ---------------------------------------------------------------------------------------------- checks


def _tasks(success: FloatArray, at_least: int = 1) -> int:
    """Return N of an N x N matrix; raises Missing when it is not square or has too few tasks."""
    n_rows, n = success.shape[-2:]
    if n_rows == 1 and n > 1:
        raise Missing(f"one row for {n} tasks: there is no sequence of checkpoints to compare")
    if n_rows != n:
        raise Missing(f"{n_rows} of {n} checkpoints have a row")
    if n < at_least:
        raise Missing("one task: nothing comes before or after it")
    return n


def _need(cells: FloatArray, used: npt.NDArray[np.bool_], prefix: str = "success") -> None:
    """Raise Missing naming the first cells marked in `used` that were not evaluated."""
    unknown = np.isnan(cells).reshape(-1, *used.shape).any(axis=0) & used
    if not unknown.any():
        return
    where = [tuple(int(i) for i in index) for index in np.argwhere(unknown)]
    axes = ("k", "j") if used.ndim == 2 else ("j",)
    first = "; ".join(" ".join(f"{a}={i}" for a, i in zip(axes, index, strict=True)) for index in where[:3])
    more = f" and {len(where) - 3} more" if len(where) > 3 else ""
    raise Missing(f"{prefix} not evaluated at {first}{more}")


def _first_visits(task: IntArray) -> npt.NDArray[np.bool_]:
    """(N,) whether a column is the first of its task."""
    return np.array([t not in task[:j] for j, t in enumerate(task)])


def _by_task(terms: dict[int, FloatArray], task: IntArray) -> Any:
    """The mean over tasks of the mean over their columns. `terms`: column → (...)."""
    if _first_visits(task).all():
        raise Missing("every task is visited once: it is the same as the one without _tasks")
    of: dict[int, list[FloatArray]] = {}
    for j, term in terms.items():
        of.setdefault(int(task[j]), []).append(term)
    return np.mean([np.mean(found, axis=0) for found in of.values()], axis=0)


def _lower(n: int) -> npt.NDArray[np.bool_]:
    return np.tri(n, dtype=bool)  # diagonal included


def _last_and_diagonal(n: int) -> npt.NDArray[np.bool_]:
    used = np.eye(n, dtype=bool)
    used[-1] = True
    return used


def _curve_means(curves: FloatArray, fractions: FloatArray) -> FloatArray:
    """Mean of each learning curve (N,), each held at its best value from the point that reached it."""
    even = np.linspace(0.0, 1.0, LIBERO_POINTS)
    if fractions.shape != even.shape or not np.allclose(fractions, even, atol=1e-6):
        raise Missing(f"the learning curves are not at {LIBERO_POINTS} equal steps from 0 to 1")
    _need_curves(curves)
    held = np.array(curves, dtype=float)
    for curve in held:
        best = int(np.argmax(curve))
        curve[best:] = curve[best]
    return np.asarray(held.mean(axis=-1))


def _need_curves(curves: FloatArray) -> None:
    unknown = np.flatnonzero(np.isnan(curves).any(axis=-1))
    if unknown.size:
        raise Missing(f"learning curve of task k={int(unknown[0])} has points that were not evaluated")


# --------------------------------------------------------------------------------------------- metrics


@metric(
    ("success",), "mean over tasks n of mean R[m][n], m >= n", _CLARE,
    higher_is_better=True, bounds=RATE,
)  # fmt: skip
def auc_clare(success: FloatArray) -> Any:
    """1/N Σ_n mean_{m≥n} R[m, n]: success on each task since it was learned. CLARE, 2601.09512."""
    n = _tasks(success)
    _need(success, _lower(n))
    return np.mean([success[..., j:, j].mean(axis=-1) for j in range(n)], axis=0)


@metric(
    ("success",), "mean R[n][n] (diagonal: ability to learn, not transfer)", _CLARE,
    higher_is_better=True, bounds=RATE, of="diagonal",
)  # fmt: skip
def fwt_clare(success: FloatArray) -> Any:
    """1/N Σ_n R[n, n]: success when a task has just been learned; no transfer. CLARE, 2601.09512."""
    n = _tasks(success)
    _need(success, np.eye(n, dtype=bool))
    return np.mean([success[..., j, j] for j in range(n)], axis=0)


@metric(
    ("success",), "mean over n < N-1 of mean (R[n][n] - R[m][n]), m > n", _CLARE,
    higher_is_better=False, bounds=DIFFERENCE,
)  # fmt: skip
def nbt_clare(success: FloatArray) -> Any:
    """1/(N−1) Σ_{n<N−1} mean_{m>n} (R[n, n] − R[m, n]): loss since learning. CLARE, 2601.09512."""
    n = _tasks(success, at_least=2)
    _need(success, _lower(n))
    lost = [success[..., j, j, None] - success[..., j + 1 :, j] for j in range(n - 1)]
    return np.mean([of_task.mean(axis=-1) for of_task in lost], axis=0)  # exactly 0 where nothing is lost


@metric(
    ("success",), "nbt_clare * (N-1)/N (the last task counts as 0)", _LIBERO,
    higher_is_better=False, bounds=DIFFERENCE,
)  # fmt: skip
def nbt_libero(success: FloatArray) -> Any:
    """`nbt_clare`·(N−1)/N: the last task counts as a loss of 0. LIBERO, arXiv 2306.03310.

    Deviation: the paper's R[k, k] is the best epoch's success, chosen on the states it reports; here it is
    the checkpoint at the end of the task.
    """
    n = _tasks(success, at_least=2)
    return nbt_clare(success) * (n - 1) / n


@metric(
    ("curves", "fractions"), "mean of each task's 11-point learning curve, held at its best", _LIBERO,
    higher_is_better=True, bounds=RATE, of="diagonal", no_interval=_HELD,
)  # fmt: skip
def fwt_libero(curves: FloatArray, fractions: FloatArray) -> Any:
    """Mean of each task's learning curve at 11 equal steps, held at its best. LIBERO, 2306.03310."""
    return np.mean(_curve_means(curves, fractions))


@metric(
    ("success", "curves", "fractions"), "mean over k of (curve mean of k + sum R[m][k], m > k) / (N-k)", _LIBERO,
    higher_is_better=True, bounds=RATE, no_interval=_HELD,
)  # fmt: skip
def auc_libero(success: FloatArray, curves: FloatArray, fractions: FloatArray) -> Any:
    """Mean over k of (FWT_k + Σ_{m>k} R[m, k])/(N−k), FWT_k the mean of k's curve. LIBERO, 2306.03310."""
    n = _tasks(success)
    means = _curve_means(curves, fractions)
    _need(success, _lower(n) & ~np.eye(n, dtype=bool))
    return np.mean([(means[k] + success[..., k + 1 :, k].sum(axis=-1)) / (n - k) for k in range(n)], axis=0)


@metric(
    ("final",), "mean of the last row (ACC in GEM)", 'AlphaBrain; ' + _GEM,
    higher_is_better=True, bounds=RATE, of="final row",
)  # fmt: skip
def asr(final: FloatArray) -> Any:
    """mean_j R[N−1, j]: success of the last checkpoint over all tasks ("ACC" in Lopez-Paz & Ranzato 2017)."""
    _need(final, np.ones(final.shape[-1], dtype=bool), "final success")
    return final.mean(axis=-1)


@metric(
    ("success",), "mean (R[N-1][j] - R[j][j]), j < N-1; negative = forgetting", _GEM,
    higher_is_better=True, bounds=DIFFERENCE,
)  # fmt: skip
def bwt_gem(success: FloatArray) -> Any:
    """1/(N−1) Σ_{j<N−1} (R[N−1, j] − R[j, j]); negative = forgetting. Lopez-Paz & Ranzato 2017 (GEM)."""
    n = _tasks(success, at_least=2)
    _need(success, _last_and_diagonal(n))
    return np.mean([success[..., -1, j] - success[..., j, j] for j in range(n - 1)], axis=0)


@metric(
    ("success", "task"), "nbt_clare, each task once: the mean over tasks of the mean over their visits", _CLARE,
    higher_is_better=False, bounds=DIFFERENCE,
)  # fmt: skip
def nbt_clare_tasks(success: FloatArray, task: IntArray) -> Any:
    """mean_t mean_{n<N−1 of t} mean_{m>n} (R[n, n] − R[m, n]): `nbt_clare` with each task counted once."""
    n = _tasks(success, at_least=2)
    _need(success, _lower(n))
    lost = {j: (success[..., j, j, None] - success[..., j + 1 :, j]).mean(axis=-1) for j in range(n - 1)}
    return _by_task(lost, task)


@metric(
    ("success", "task"), "bwt_gem, each task once: the mean over tasks of the mean over their visits", _GEM,
    higher_is_better=True, bounds=DIFFERENCE,
)  # fmt: skip
def bwt_gem_tasks(success: FloatArray, task: IntArray) -> Any:
    """mean_t mean_{j<N−1 of t} (R[N−1, j] − R[j, j]): `bwt_gem` with each task counted once."""
    n = _tasks(success, at_least=2)
    _need(success, _last_and_diagonal(n))
    return _by_task({j: success[..., -1, j] - success[..., j, j] for j in range(n - 1)}, task)


@metric(
    ("final", "task"), "asr, each task once", "AlphaBrain; " + _GEM,
    higher_is_better=True, bounds=RATE, of="final row",
)  # fmt: skip
def asr_tasks(final: FloatArray, task: IntArray) -> Any:
    """mean_t R[N−1, t]: `asr` with each task counted once."""
    _need(final, np.ones(final.shape[-1], dtype=bool), "final success")
    return _by_task({j: final[..., j] for j in range(final.shape[-1])}, task)


@metric(
    ("success",), "-bwt_gem (loss at the last checkpoint)", _HU,
    higher_is_better=False, bounds=DIFFERENCE,
)  # fmt: skip
def nbt_final(success: FloatArray) -> Any:
    """−`bwt_gem`: the loss seen by the last checkpoint alone. NBT in Hu et al. 2026, arXiv 2603.11653."""
    return -bwt_gem(success)


@metric(
    ("success", "base", "task"), "mean over first visits j >= 1 of (R[j-1][j] - base[j])", _GEM,
    higher_is_better=True, bounds=DIFFERENCE,
)  # fmt: skip
def fwt_gem(success: FloatArray, base: FloatArray, task: IntArray) -> Any:
    """Mean over j ≥ 1 of R[j−1, j] − b[j], b = success before any learning. Lopez-Paz & Ranzato 2017 (GEM).

    Deviations: b is the pretrained base's success; GEM starts from a random initialisation. A column whose task was
    visited before has been learned, and does not count; GEM's streams visit each task once.
    """
    n = _tasks(success, at_least=2)
    used = _first_visits(task)
    used[0] = False
    if not used.any():
        raise Missing("the stream has one task: nothing is learned before another")
    _need(success, np.eye(n, k=1, dtype=bool) & used)
    _need(base, used, "base success")
    return np.mean([success[..., j - 1, j] - base[..., j] for j in np.flatnonzero(used)], axis=0)


@metric(
    ("success",), "mean over j < N-1 of (max R[l][j] - R[N-1][j]), evaluated l < N-1", _CHAUDHRY,
    higher_is_better=False, bounds=DIFFERENCE, no_interval=_BIASED,
)  # fmt: skip
def forgetting(success: FloatArray) -> Any:
    """1/(N−1) Σ_{j<N−1} (max_{l<N−1} R[l, j] − R[N−1, j]), over evaluated cells. Chaudhry et al. 2018."""
    n = _tasks(success, at_least=2)
    used = np.zeros((n, n), dtype=bool)
    used[-1, :-1] = True
    _need(success, used)
    earlier = success[..., :-1, :-1]
    empty = np.isnan(earlier).all(axis=-2).reshape(-1, n - 1).any(axis=0)
    if empty.any():
        raise Missing(f"task j={int(np.flatnonzero(empty)[0])} was not evaluated before the last checkpoint")
    return (np.nanmax(earlier, axis=-2) - success[..., -1, :-1]).mean(axis=-1)


@metric(
    ("even", "odd"), "forgetting, with the best l chosen by half of the episodes and judged by the other half",
    "after " + _CHAUDHRY, higher_is_better=False, bounds=DIFFERENCE,
)  # fmt: skip
def forgetting_corrected(even: FloatArray, odd: FloatArray) -> Any:
    """mean_{j<N−1} ½ Σ_{(A,B)} (A[l*, j] − A[N−1, j]), l* = argmax_{l<N−1} B[l, j], over both halves as A, B the other.

    What chooses the best checkpoint does not judge it, so there is no bias upwards: 0 on average where nothing is
    forgotten. Where several checkpoints are nearly equal the chosen one may not be the best; the bias is then
    downwards, by less than their differences.
    """
    n = _tasks(even, at_least=2)
    forgetting(even), forgetting(odd)  # raises Missing where the cells are not there
    return np.mean([_lost_since(chosen, judged, n) for chosen, judged in ((even, odd), (odd, even))], axis=0)


def _lost_since(chosen: FloatArray, judged: FloatArray, n: int) -> Any:
    """Mean over tasks of what `judged` lost since the checkpoint that is best in `chosen`; both (..., N, N)."""
    earlier = chosen[..., :-1, :-1]
    best = np.argmax(np.where(np.isnan(earlier), -np.inf, earlier), axis=-2)[..., None, :]  # (..., 1, N-1)
    then = np.take_along_axis(judged[..., :-1, :-1], best, axis=-2)[..., 0, :]
    return (then - judged[..., -1, :-1]).mean(axis=-1)


@metric(
    ("success", "task"), "mean R[k][j] over tasks that were not yet visited", _HU,
    higher_is_better=True, bounds=RATE,
)  # fmt: skip
def zero_shot(success: FloatArray, task: IntArray) -> Any:
    """Mean of R[k, j] where j's task was not visited up to k. Hu et al. 2026, arXiv 2603.11653.

    Where every task is visited once these are the cells j > k.
    """
    n = _tasks(success, at_least=2)
    used = np.array([[task[j] not in task[: k + 1] for j in range(n)] for k in range(n)])
    if not used.any():
        raise Missing("the stream has one task: there is none that was not visited")
    _need(success, used)
    return success[..., used].mean(axis=-1)


@metric(
    ("heldout",), "mean last-checkpoint success on tasks outside the stream", _HU,
    higher_is_better=True, bounds=RATE, of="final row",
)  # fmt: skip
def zero_shot_heldout(heldout: FloatArray) -> Any:
    """Mean success of the last checkpoint on tasks outside the stream. Hu et al. 2026, arXiv 2603.11653."""
    _need(heldout, np.ones(heldout.shape[-1], dtype=bool), "held-out success")
    return heldout.mean(axis=-1)


@metric(
    ("success", "joint"), "mean (R_joint[k] - R[k][k]), joint on all tasks", "after " + _CHAUDHRY,
    higher_is_better=False, bounds=DIFFERENCE, of="diagonal",
)  # fmt: skip
def intransigence(success: FloatArray, joint: FloatArray) -> Any:
    """mean_k (R_joint[k] − R[k, k]): the cost of learning in sequence. After Chaudhry et al. 2018.

    Deviation: one joint run on all N tasks is the reference of every k; Chaudhry's is joint training on tasks 1…k.
    """
    n = _tasks(success)
    _need(success, np.eye(n, dtype=bool))
    _need(joint, np.ones(n, dtype=bool), "the joint run's success")
    return np.mean([joint[..., k] - success[..., k, k] for k in range(n)], axis=0)


@metric(
    ("success", "prefixes"), "mean (R_prefix[k] - R[k][k]), R_prefix from joint training on tasks 0..k",
    "Chaudhry 2018, arXiv 1801.10112", higher_is_better=False, bounds=DIFFERENCE, of="diagonal",
)  # fmt: skip
def intransigence_prefixes(success: FloatArray, prefixes: FloatArray) -> Any:
    """mean_k (a*_k − R[k, k]), a*_k the success on task k of joint training on tasks 0…k. Chaudhry et al. 2018."""
    n = _tasks(success)
    _need(success, np.eye(n, dtype=bool))
    _need(prefixes, np.ones(n, dtype=bool), "the success of joint training on the first tasks")
    return np.mean([prefixes[..., k] - success[..., k, k] for k in range(n)], axis=0)


@metric(
    ("curves", "fractions", "single"), "mean (A[k] - A1[k]) / (1 - A1[k]), areas under curves", _CW,
    higher_is_better=True,
)  # fmt: skip
def ft_cw(curves: FloatArray, fractions: FloatArray, single: FloatArray) -> Any:
    """mean_k (A_k − A_k^single)/(1 − A_k^single), A = area under a curve. Continual World, 2105.10919."""
    if fractions.size < 2 or not np.isclose(fractions[0], 0.0) or not np.isclose(fractions[-1], 1.0):
        raise Missing("the learning curves do not span the whole of each task's training")
    _need_curves(curves)
    _need_curves(single)
    steps = np.diff(fractions)  # trapezoidal rule
    area, area_single = (((c[..., 1:] + c[..., :-1]) / 2 * steps).sum(axis=-1) for c in (curves, single))
    if (area_single >= 1.0 - 1e-12).any():
        raise Missing("a single-task curve is 1 throughout: nothing is left to transfer (division by zero)")
    return np.mean((area - area_single) / (1.0 - area_single), axis=-1)


METRICS: dict[str, Metric] = {name: globals()[name] for name in registry.OWN["metrics"]}


def all_metrics() -> dict[str, Metric]:
    """clbench's own metrics, and those of plugins, by name.

    Raises:
        UserError: a plugin's cannot be imported, or is no metric.
    """
    found = dict(METRICS)
    for name, entry in registry.entries("metrics").items():
        if name not in METRICS:
            found[name] = registry.load("metrics", name)
            if not isinstance(found[name], Metric):
                raise UserError(
                    f"the metric '{name}' of {entry.origin} ({entry.target}) is no metric: make it one with "
                    "@clbench.metrics.metric(inputs, definition, source, higher_is_better=…)."
                )
    return found
