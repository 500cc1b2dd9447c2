"""Statistics of data sets: the values, data sets that differ, runs whose statistics are wrong and their repair."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clbench.data.statistics import QUANTILES, compute, of_tasks
from clbench.data.task import Task
from clbench.errors import UserError


def odd_values(n: int) -> np.ndarray:
    """(n, 6): normal, constant, two values, zeros of both signs, ties, values far apart."""
    rng = np.random.default_rng(n)
    columns = [
        rng.normal(size=n), np.full(n, -0.3), np.where(rng.random(n) > 0.5, 1.0, -1.0), rng.choice([0.0, -0.0], n),
        rng.integers(-3, 3, n) * 1e-3, rng.normal(size=n) * 10.0 ** rng.integers(-30, 30, n),
    ]  # fmt: skip
    return np.stack(columns, 1).astype(np.float32)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("size", [1, 7, 300])
def test_values_are_numpys_however_the_frames_come(n: int, size: int) -> None:
    values = odd_values(n)
    found = compute(lambda: ({"x": values[i : i + size]} for i in range(0, n, size)))["x"]
    exact = values.astype(np.float64)
    scale = np.abs(exact).max(0)
    for name, want in {
        "mean": exact.mean(0), "std": exact.std(0), "min": exact.min(0), "max": exact.max(0),
        **{name: np.quantile(exact, q, axis=0) for name, q in QUANTILES.items()},
    }.items():  # fmt: skip
        assert found[name].shape == (6,)
        assert (np.abs(found[name] - want) <= 1e-12 * scale).all(), name
    assert found["count"].tolist() == [n]
    assert found["binary"].tolist() == [len(np.unique(column)) == 2 for column in values.T]


def test_one_number_a_frame_has_statistics_of_one_number() -> None:
    found = compute(lambda: [{"x": np.arange(5.0)}], quantiles=False)["x"]
    assert {name: v.tolist() for name, v in found.items()} == {
        "mean": [2.0], "std": [pytest.approx(2**0.5)], "min": [0.0], "max": [4.0], "count": [5],
    }  # fmt: skip


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(UserError, match="feature 'x' has values that are not finite"):
        compute(lambda: [{"x": np.array([[0.0], [bad]])}])


def task(root: Path, episodes: tuple[int, ...], features: dict[str, str] | None = None) -> Task:
    return Task("t", "do it", root, episodes, None, 0, features=features)


def test_episodes_of_several_sets_count_once_each(toy_data: Path) -> None:
    """The tasks' episodes and no others, whichever task they are listed for."""
    from clbench.data.lerobot_set import read_columns

    tasks = [task(toy_data / "stream", (0, 1)), task(toy_data / "stream", (1, 4)), task(toy_data / "pretrain", (3,))]
    found = of_tasks(tasks)
    assert set(found) == {"observation.state", "action"}
    values = []
    for name, episodes in (("stream", (0, 1, 4)), ("pretrain", (3,))):
        columns = read_columns(
            sorted((toy_data / name / "data").rglob("*.parquet")), {"action": (4,), "episode_index": ()}
        )
        values.append(columns["action"][np.isin(columns["episode_index"], episodes)])
    every = np.concatenate(values).astype(np.float64)
    assert found["action"]["count"].tolist() == [len(every)] == [80]
    np.testing.assert_allclose(found["action"]["mean"], every.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found["action"]["q10"], np.quantile(every, 0.1, axis=0), rtol=1e-12)


def test_sets_that_differ_are_named_with_both_shapes(toy_data: Path) -> None:
    only_state = {"observation.state": "action"}
    with pytest.raises(UserError, match=r"differ in the feature 'action': .*stream has \(4,\), .*pretrain has \(39,\)"):
        of_tasks([task(toy_data / "stream", (0,), {"action": "action"}), task(toy_data / "pretrain", (0,), only_state)])
    with pytest.raises(UserError, match=r"'observation.state': .*stream has none, .*pretrain has \(39,\)"):
        of_tasks([task(toy_data / "stream", (0,), {"action": "action"}), task(toy_data / "pretrain", (0,))])
