"""The metrics' mathematics, against a worked example and against plain loops that share no code with them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from clbench.errors import UserError
from clbench.metrics import METRICS, Curve, Record, aggregate, bootstrap_draws, compute_metrics, wilson

EXAMPLE = [[0.8, 0.1, 0.0], [0.6, 0.9, 0.2], [0.4, 0.5, 0.7]]
EXPECTED = {
    "auc_clare": 2 / 3,
    "fwt_clare": 0.8,
    "nbt_clare": 0.35,
    "nbt_libero": 0.7 / 3,
    "asr": 1.6 / 3,
    "bwt_gem": -0.4,
    "nbt_final": 0.4,
    "fwt_gem": 0.15,
    "forgetting": 0.4,
    "zero_shot": 0.1,
}


def record(success, **kwargs) -> Record:
    matrix = np.array([[math.nan if v is None else v for v in row] for row in success], dtype=float)
    kwargs.setdefault("tasks", [f"t{j}" for j in range(matrix.shape[1])])
    return Record(success=matrix, rows=list(range(len(matrix))), **kwargs)


def with_episodes(outcomes: np.ndarray, base: np.ndarray | None = None, **kwargs) -> Record:
    """A record from outcomes (K, N, S) of 0 and 1; episode seeds are 100, 101, …"""
    cells = {
        (k, j): {100 + s: float(v) for s, v in enumerate(outcomes[k, j])}
        for k in range(outcomes.shape[0])
        for j in range(outcomes.shape[1])
    }
    if base is not None:
        cells |= {(-1, j): {100 + s: float(v) for s, v in enumerate(b)} for j, b in enumerate(base)}
        kwargs["base"] = base.mean(axis=-1)
    counts = np.full(outcomes.shape[:2], outcomes.shape[2], dtype=np.int64)
    return record(outcomes.mean(axis=-1), outcomes=cells, episodes=counts, **kwargs)


# --------------------------------------------------------------------------------------------- values


def test_worked_example() -> None:
    metrics = compute_metrics(record(EXAMPLE), assume_zero_base=True)
    assert list(metrics) == list(METRICS)
    for name, m in metrics.items():
        if name in EXPECTED:
            assert m["value"] == pytest.approx(EXPECTED[name]), name
        else:
            assert m["value"] is None and m["missing"], name
    assert "assumed 0" in metrics["fwt_gem"]["definition"]


def plain_loops(
    r: list[list[float]], b: list[float], joint: list[float], prefix: list[float], curves, single
) -> dict[str, float]:
    n = len(r)
    out: dict[str, float] = {}
    total = 0.0
    for j in range(n):
        column = 0.0
        for m in range(j, n):
            column += r[m][j]
        total += column / (n - j)
    out["auc_clare"] = total / n
    out["fwt_clare"] = sum(r[j][j] for j in range(n)) / n
    out["asr"] = sum(r[n - 1]) / n
    total = 0.0
    for j in range(n - 1):
        drop = 0.0
        for m in range(j + 1, n):
            drop += r[j][j] - r[m][j]
        total += drop / (n - 1 - j)
    out["nbt_clare"], out["nbt_libero"] = total / (n - 1), total / n
    out["bwt_gem"] = sum(r[n - 1][j] - r[j][j] for j in range(n - 1)) / (n - 1)
    out["nbt_final"] = -out["bwt_gem"]
    out["fwt_gem"] = sum(r[j - 1][j] - b[j] for j in range(1, n)) / (n - 1)
    out["forgetting"] = sum(max(r[m][j] for m in range(n - 1)) - r[n - 1][j] for j in range(n - 1)) / (n - 1)
    upper = [r[k][j] for k in range(n) for j in range(n) if j > k]
    out["zero_shot"] = sum(upper) / len(upper)
    out["intransigence"] = sum(joint[k] - r[k][k] for k in range(n)) / n
    out["intransigence_prefixes"] = sum(prefix[k] - r[k][k] for k in range(n)) / n
    held = []
    for curve in curves:
        best = max(curve)
        at = curve.index(best)
        held.append(sum(best if e >= at else curve[e] for e in range(11)) / 11)
    out["fwt_libero"] = sum(held) / n
    total = 0.0
    for k in range(n):
        total += (held[k] + sum(r[m][k] for m in range(k + 1, n))) / (n - k)
    out["auc_libero"] = total / n
    total = 0.0
    for a, s in zip(curves, single, strict=True):
        area_a = sum((a[e] + a[e + 1]) / 2 * 0.1 for e in range(10))
        area_s = sum((s[e] + s[e + 1]) / 2 * 0.1 for e in range(10))
        total += (area_a - area_s) / (1 - area_s)
    out["ft_cw"] = total / n
    return out


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_against_plain_loops(n: int) -> None:
    rng = np.random.default_rng(n)
    r, b, joint = rng.random((n, n)), rng.random(n), rng.random(n)
    curves, single = rng.random((n, 11)), rng.random((n, 11))
    steps = np.linspace(0, 1, 11)
    firsts = [*(rng.random(k).tolist() for k in range(1, n)), joint.tolist()]

    def curve_dict(c: np.ndarray) -> dict[int, Curve]:
        return {k: Curve(steps, c[k]) for k in range(n)}

    metrics = compute_metrics(
        record(r, base=b, curves=curve_dict(curves)),
        joint=record(joint[None], mode="multitask"),
        single=record(r, mode="singletask", curves=curve_dict(single)),
        prefixes=[record(np.array([row]), mode="multitask") for row in firsts[:-1]],
    )
    reference = plain_loops(
        r.tolist(), b.tolist(), joint.tolist(), [row[-1] for row in firsts], curves.tolist(), single.tolist()
    )
    got = {name: m["value"] for name, m in metrics.items() if m["value"] is not None}
    assert got == pytest.approx(reference)
    assert metrics["nbt_libero"]["value"] == pytest.approx(metrics["nbt_clare"]["value"] * (n - 1) / n)


def test_libero_curve_is_held_at_its_first_best() -> None:
    curve = np.array([0, 0.2, 0.8, 0.1, 0.8, 0, 0, 0, 0, 0, 0])
    m = compute_metrics(record([[0.3]], curves={0: Curve(np.linspace(0, 1, 11), curve)}))
    assert m["fwt_libero"]["value"] == pytest.approx((0 + 0.2 + 9 * 0.8) / 11)
    assert m["auc_libero"]["value"] == pytest.approx(m["fwt_libero"]["value"])


def test_two_tasks() -> None:
    m = compute_metrics(record([[1.0, 0.2], [0.5, 0.8]], base=np.array([0.0, 0.1])))
    assert m["nbt_clare"]["value"] == pytest.approx(0.5)
    assert m["bwt_gem"]["value"] == pytest.approx(-0.5)
    assert m["fwt_gem"]["value"] == pytest.approx(0.1)
    assert m["auc_clare"]["value"] == pytest.approx((0.75 + 0.8) / 2)


def test_heldout_tasks_are_the_last_row_of_their_own_record() -> None:
    m = compute_metrics(record(EXAMPLE, heldout=record([[0.25, 0.75]])))
    assert m["zero_shot_heldout"]["value"] == pytest.approx(0.5)


# ---------------------------------------------------------------------------------- missing, never 0


def present(metrics) -> set[str]:
    assert all((m["value"] is None) == ("missing" in m) for m in metrics.values())
    return {name for name, m in metrics.items() if m["value"] is not None}


def test_one_task() -> None:
    metrics = compute_metrics(record([[0.6]], base=np.array([0.1])))
    assert present(metrics) == {"auc_clare", "fwt_clare", "asr"}
    assert "one task" in metrics["nbt_clare"]["missing"]


@pytest.mark.parametrize(
    ("success", "have"),
    [
        ([[0.8, None], [0.6, 0.9]], set(EXPECTED) - {"fwt_gem", "zero_shot"}),  # lower triangle
        ([[None, None], [0.6, 0.9]], {"asr"}),  # last row only
        ([[0.8, 0.1], [None, None]], {"zero_shot", "fwt_gem"}),  # stopped after the first task
        ([[None, None], [None, None]], set()),
    ],
)
def test_unevaluated_cells_make_metrics_missing(success, have: set[str]) -> None:
    metrics = compute_metrics(record(success), assume_zero_base=True)
    assert present(metrics) == have
    assert all("not evaluated" in metrics[n]["missing"] for n in {"auc_clare", "zero_shot"} - have)


def test_reason_names_the_cells() -> None:
    reason = compute_metrics(record([[0.8, 0, 0], [None, 0.9, 0], [0.4, 0.5, 0.7]]))["auc_clare"]["missing"]
    assert "k=1 j=0" in reason


def test_forgetting_skips_unevaluated_cells_and_says_so() -> None:
    m = compute_metrics(record([[0.8, None, None], [0.9, 0.9, None], [0.4, 0.5, 0.7]]))["forgetting"]
    assert m["value"] == pytest.approx((0.5 + 0.4) / 2)
    assert "1 cells not evaluated" in m["definition"]


def test_base_row_decides_fwt_gem() -> None:
    assert "base" in compute_metrics(record(EXAMPLE))["fwt_gem"]["missing"]
    measured = record(EXAMPLE, base=np.array([0.3, 0.05, 0.1]))
    for zero in (False, True):  # a measured base wins over the assumption
        m = compute_metrics(measured, assume_zero_base=zero)["fwt_gem"]
        assert m["value"] == pytest.approx(0.075) and "assumed" not in m["definition"]
    first_unknown = record(EXAMPLE, base=np.array([math.nan, 0.05, 0.1]))
    assert compute_metrics(first_unknown)["fwt_gem"]["value"] == pytest.approx(0.075)
    other_unknown = record(EXAMPLE, base=np.array([0.3, math.nan, 0.1]))
    assert "j=1" in compute_metrics(other_unknown)["fwt_gem"]["missing"]


def test_joint_and_independent_policies_have_no_sequence() -> None:
    assert present(compute_metrics(record([[0.5, 0.7]]))) == {"asr"}
    assert present(compute_metrics(record([[0.5, 0.7]], mode="multitask"))) == {"asr"}
    assert present(compute_metrics(record([[0.5]], mode="multitask"))) == {"asr"}
    assert present(compute_metrics(record([[0.5, 0.7]], mode="sequential"))) == set()  # 1 of 2 tasks learned
    assert present(compute_metrics(record(EXAMPLE, mode="singletask"))) == {"fwt_clare"}
    assert "2 of 3" in compute_metrics(record(EXAMPLE[:2]))["asr"]["missing"]


def test_curves_that_do_not_fit_are_missing() -> None:
    five = {k: Curve(np.linspace(0, 1, 5), np.zeros(5)) for k in range(3)}
    assert "11 equal steps" in compute_metrics(record(EXAMPLE, curves=five))["fwt_libero"]["missing"]
    ones = {k: Curve(np.linspace(0, 1, 5), np.ones(5)) for k in range(3)}
    m = compute_metrics(record(EXAMPLE, curves=five), single=record(EXAMPLE, curves=ones))["ft_cw"]
    assert "division by zero" in m["missing"]
    partial = compute_metrics(record(EXAMPLE, curves={0: five[0]}))["fwt_libero"]
    assert "k=1" in partial["missing"]


def test_joint_columns_are_matched_by_name() -> None:
    ours = record([[0.5, 0.0], [0.0, 0.5]], tasks=["a", "b"])
    joint = record([[0.9, 0.6]], tasks=["b", "a"])
    assert compute_metrics(ours, joint=joint)["intransigence"]["value"] == pytest.approx(0.25)
    assert compute_metrics(ours, joint=record([[0.5, 0.7]], named=False))["intransigence"]["value"] is not None
    with pytest.raises(UserError, match="no task 'b'"):
        compute_metrics(ours, joint=record([[0.5, 0.7]], tasks=["a", "c"]))
    for wrong in (ours, record([[0.9, 0.6]], tasks=["b", "a"], mode="sequential")):
        with pytest.raises(UserError, match="single row"):
            compute_metrics(ours, joint=wrong)
    with pytest.raises(UserError, match="singletask"):
        compute_metrics(ours, single=record([[0.9, 0.6]], tasks=["b", "a"], mode="multitask"))


# ---------------------------------------------------------------------------------------- uncertainty


def test_wilson() -> None:
    low, high = wilson(5, 10)
    assert (low, high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert wilson(0, 5)[0] == 0 and wilson(0, 5)[1] == pytest.approx(0.4345, abs=1e-4)
    assert wilson(5, 5)[1] == 1
    assert (wilson(2.5, 5)[1] - wilson(2.5, 5)[0]) / 2 == pytest.approx(0.33, abs=0.005)
    with pytest.raises(ValueError):
        wilson(3, 0)


def width(m: dict[str, Any]) -> float:
    return float(m["high"] - m["low"])


def test_perfectly_paired_rows_make_differences_narrow_but_not_certain() -> None:
    column = np.random.default_rng(0).integers(0, 2, size=(1, 4, 20))
    metrics = compute_metrics(with_episodes(np.repeat(column, 4, axis=0)))
    for name in ("nbt_clare", "nbt_libero", "bwt_gem", "nbt_final"):
        assert metrics[name]["low"] < 0 < metrics[name]["high"] and metrics[name]["value"] == pytest.approx(0), name
        assert 0 < width(metrics[name]) < 0.5 * width(metrics["asr"]), name
    assert width(metrics["asr"]) > 0.1


def test_no_interval_has_width_zero() -> None:
    """60 failures of 60, and 60 successes: Jeffreys' bound of a rate that never failed in 60 is 0.959."""
    for outcome in (0.0, 1.0):
        metrics = compute_metrics(with_episodes(np.full((2, 2, 60), outcome)), bootstrap=4000)
        assert all(width(m) > 0 for m in metrics.values() if m.get("low") is not None)
        one = metrics["fwt_clare"]
        assert one["value"] == outcome and one["low"] <= outcome <= one["high"]
        far = one["low"] if outcome else 1 - one["high"]
        assert 0.959 < far < 0.99  # the mean of two cells is known better than one


def test_forgetting_is_not_seen_where_nothing_is_forgotten() -> None:
    """0.9 everywhere, 10 × 10: the maximum of noisy cells says 0.08; chosen and judged by other episodes it is gone."""
    rng = np.random.default_rng(0)
    found = [compute_metrics(with_episodes((rng.random((10, 10, 10)) < 0.9).astype(float)), bootstrap=200)
             for _ in range(40)]  # fmt: skip
    assert 0.07 < np.mean([m["forgetting"]["value"] for m in found]) < 0.1
    assert all(m["forgetting"]["low"] is None for m in found)
    assert "forgetting_corrected" in found[0]["forgetting"]["no_interval"]
    corrected = [m["forgetting_corrected"] for m in found]
    assert abs(np.mean([m["value"] for m in corrected])) < 0.02
    assert np.mean([m["low"] <= 0 <= m["high"] for m in corrected]) >= 0.9


def test_forgetting_corrected_by_hand() -> None:
    """Two tasks, four episodes: even ones are 0 and 2. Task 0: R[0] = 1 0 1 1, R[1] = 0 0 1 0."""
    outcomes = np.array([[[1, 0, 1, 1], [0, 0, 0, 0]], [[0, 0, 1, 0], [1, 1, 1, 1]]], dtype=float)
    m = compute_metrics(with_episodes(outcomes))
    assert m["forgetting_corrected"]["value"] == pytest.approx(((1 - 0.5) + (0.5 - 0)) / 2)
    assert m["forgetting"]["value"] == pytest.approx(0.75 - 0.25)
    assert "no halves" in compute_metrics(record(EXAMPLE))["forgetting_corrected"]["missing"]


def test_a_revisited_task_is_not_a_new_one() -> None:
    """A B C A B C, everything is remembered, nothing transfers: nothing is seen of tasks that were not learned."""
    tasks = ["A", "B", "C", "A", "B", "C"]
    matrix = [[1.0 if t in tasks[: k + 1] else 0.0 for t in tasks] for k in range(6)]
    m = compute_metrics(record(matrix, tasks=tasks, base=np.zeros(6)))
    assert m["zero_shot"]["value"] == 0.0 and m["fwt_gem"]["value"] == 0.0
    for name in ("asr", "nbt_clare", "bwt_gem"):
        assert m[name]["definition"].endswith("[a task counts once per visit]")
    assert m["asr_tasks"]["value"] == 1.0 and m["nbt_clare_tasks"]["value"] == 0.0
    once = compute_metrics(record(EXAMPLE))
    assert once["asr_tasks"]["missing"].startswith("every task is visited once")
    assert "per visit" not in once["asr"]["definition"]
    with_one = compute_metrics(record([[1.0, 1.0], [1.0, 1.0]], tasks=["A", "A"]))
    assert "one task" in with_one["zero_shot"]["missing"]


def test_each_task_once() -> None:
    """A twice and B once: B weighs as much as both visits of A."""
    matrix = [[0.8, 0.0, 0.8], [0.6, 1.0, 0.6], [0.7, 0.4, 0.7]]
    m = compute_metrics(record(matrix, tasks=["A", "B", "A"]))
    assert m["asr"]["value"] == pytest.approx((0.7 + 0.4 + 0.7) / 3)
    assert m["asr_tasks"]["value"] == pytest.approx((0.7 + 0.4) / 2)
    assert m["bwt_gem_tasks"]["value"] == pytest.approx(((0.7 - 0.8) + (0.4 - 1.0)) / 2)
    assert m["nbt_clare_tasks"]["value"] == pytest.approx(((0.8 - 0.65) + (1.0 - 0.4)) / 2)


def test_a_task_visited_twice_resamples_its_episodes_once() -> None:
    outcomes = np.random.default_rng(0).integers(0, 2, size=(1, 2, 20))
    twice = with_episodes(np.repeat(np.concatenate([outcomes[:, :1]] * 2, axis=1), 2, axis=0), tasks=["a", "a"])
    m = compute_metrics(twice)
    assert (m["asr"]["low"], m["asr"]["high"]) == (m["asr_tasks"]["low"], m["asr_tasks"]["high"])  # never differ


def test_interval_agrees_with_theory_and_is_reproducible() -> None:
    rng = np.random.default_rng(3)
    one = with_episodes((rng.random((3, 3, 50)) < 0.5).astype(float))
    m = compute_metrics(one, bootstrap=4000)["asr"]
    by_seed = np.mean([[one.outcomes[2, j][100 + s] for s in range(50)] for j in range(3)], axis=0)
    expected = 2 * 1.96 * by_seed.std(ddof=1) / math.sqrt(50)  # a seed is the same in all tasks
    assert m["high"] - m["low"] == pytest.approx(expected, rel=0.08)
    assert m["low"] < m["value"] < m["high"]
    assert compute_metrics(one, bootstrap=4000)["asr"] == m
    assert (bootstrap_draws(one)["asr"] != bootstrap_draws(one, seed=1)["asr"]).any()


def test_base_and_joint_are_paired_with_the_rows() -> None:
    rng = np.random.default_rng(1)
    column = rng.integers(0, 2, size=(1, 2, 30)).astype(float)
    ours = with_episodes(np.repeat(column, 2, axis=0), base=column[0])
    joint = with_episodes(column, mode="multitask")
    metrics = compute_metrics(ours, joint=joint)
    for name in ("fwt_gem", "intransigence"):
        assert metrics[name]["value"] == pytest.approx(0)
        assert 0 < width(metrics[name]) < 0.5 * width(metrics["asr"]), name


def test_no_interval_says_why() -> None:
    m = compute_metrics(record(EXAMPLE))["asr"]
    assert m["low"] is None and m["high"] is None and m["no_interval"] == "no episode records"
    assert "one episode" in compute_metrics(with_episodes(np.ones((2, 2, 1))))["asr"]["no_interval"]
    assert compute_metrics(with_episodes(np.ones((2, 2, 4))), bootstrap=0)["asr"]["low"] is None
    some = with_episodes(np.ones((2, 2, 4)))
    del some.outcomes[1, 0]
    assert "k=1 j=0" in compute_metrics(some)["asr"]["no_interval"]
    with pytest.raises(UserError, match="--bootstrap"):
        compute_metrics(some, bootstrap=-1)


def test_cells_with_different_episode_counts() -> None:
    full = with_episodes(np.random.default_rng(2).integers(0, 2, size=(2, 2, 12)).astype(float))
    full.outcomes[1, 0] = {s: v for s, v in full.outcomes[1, 0].items() if s < 102}  # two episodes of twelve
    full.success[1, 0] = np.mean(list(full.outcomes[1, 0].values()))
    m = compute_metrics(full)["asr"]
    assert 0 <= m["low"] <= m["value"] <= m["high"] <= 1


def test_aggregate_over_seeds() -> None:
    rng = np.random.default_rng(0)
    runs = [with_episodes((rng.random((3, 3, 20)) < p).astype(float)) for p in (0.3, 0.5, 0.7)]
    metrics = [compute_metrics(r) for r in runs]
    total = aggregate(metrics, [bootstrap_draws(r) for r in runs])
    values = [m["asr"]["value"] for m in metrics]
    assert total["asr"]["value"] == pytest.approx(np.mean(values)) and total["asr"]["n"] == 3
    assert total["asr"]["sd"] == pytest.approx(np.std(values, ddof=1))
    # between seeds the rates differ by far more than within one, so the interval must be wider
    assert total["asr"]["high"] - total["asr"]["low"] > metrics[1]["asr"]["high"] - metrics[1]["asr"]["low"]
    assert total["ft_cw"] == {k: total["ft_cw"][k] for k in ("value", "missing", "n", "definition", "source")}
    alone = aggregate(metrics[:1])["asr"]
    assert alone["sd"] is None and alone["low"] == metrics[0]["asr"]["low"]


def test_aggregate_counts_runs_that_lack_a_metric() -> None:
    both = aggregate([compute_metrics(record(EXAMPLE)), compute_metrics(record([*EXAMPLE[:2], [None] * 3]))])
    assert both["asr"]["n"] == 1 and both["asr"]["missing_in"] == 1
