"""How often the 95 % intervals hold the truth: simulated runs whose success rates are known.

    python benchmarks/interval_coverage.py [--runs 400] [--draws 400]

Each episode's outcome is a threshold on a normal number: a share of its variance belongs to the episode's seed (and is
common to all tasks if they share seeds, and to all checkpoints), the rest to the cell. Prints one line per setting and
metric: coverage, with its own standard error, and the mean width. docs/metrics.md shows the table.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from clbench.metrics import METRICS, Record, aggregate, bootstrap_draws, compute_metrics

Floats = npt.NDArray[np.float64]
SHOWN = ("auc_clare", "fwt_clare", "nbt_clare", "asr", "bwt_gem", "forgetting_corrected", "zero_shot")
ACROSS_TASKS, ACROSS_ROWS = 0.5, 0.3  # shares of the variance that belong to the seed, and to the seed and the task


@dataclass(frozen=True)
class Setting:
    """A kind of runs.

    Attributes:
        level: success on a task that has just been learned.
        forgets: how much of it is lost by the end.
        shared: whether all tasks have the same episode seeds, and what a seed draws is common to them.
        seeds: training seeds; their rates differ by a standard deviation of `spread` each.
    """

    tasks: int
    episodes: int
    level: float
    forgets: float
    shared: bool = False
    seeds: int = 1
    spread: float = 0.0

    @property
    def name(self) -> str:
        kind = "shared seeds" if self.shared else "own seeds"
        return (f"{self.tasks} x {self.episodes}, level {self.level:g}, loses {self.forgets:g}, {kind}, "
                f"{self.seeds} training seed{'s' if self.seeds > 1 else ''}")  # fmt: skip

    def rates(self) -> Floats:
        """(N, N) true success of the method."""
        n = self.tasks
        k, j = np.indices((n, n))
        lost = self.forgets * np.clip(k - j, 0, None) / max(1, n - 1)
        return np.where(k >= j, self.level - lost, 0.3 * self.level).clip(0.0, 1.0)


def truth(rates: Floats) -> dict[str, float]:
    """The metrics of known rates."""
    record = Record(tasks=[f"t{j}" for j in range(len(rates))], success=rates, rows=list(range(len(rates))))
    found = {n: m["value"] for n, m in compute_metrics(record, bootstrap=0).items() if m["value"] is not None}
    earlier = rates[:-1, :-1]
    return found | {"forgetting_corrected": float((earlier.max(axis=0) - rates[-1, :-1]).mean())}


def simulate(setting: Setting, rates: Floats, rng: np.random.Generator) -> Record:
    """A record of one run with these rates."""
    n, episodes = setting.tasks, setting.episodes
    common = rng.normal(size=episodes) if setting.shared else rng.normal(size=(n, episodes))
    common = np.broadcast_to(common, (n, episodes))
    own, rest = rng.normal(size=(n, episodes)), rng.normal(size=(n, n, episodes))
    share = 1 - ACROSS_TASKS - ACROSS_ROWS
    noise = math.sqrt(ACROSS_TASKS) * common + math.sqrt(ACROSS_ROWS) * own + math.sqrt(share) * rest
    bound = np.vectorize(NormalDist().inv_cdf)(rates.clip(1e-9, 1 - 1e-9))
    outcomes = (noise < bound[..., None]).astype(float)
    first = [0 if setting.shared else 1000 * j for j in range(n)]
    cells = {
        (k, j): {first[j] + s: float(outcomes[k, j, s]) for s in range(episodes)} for k in range(n) for j in range(n)
    }
    return Record(
        tasks=[f"t{j}" for j in range(n)], success=outcomes.mean(axis=-1), rows=list(range(n)), outcomes=cells,
        episodes=np.full((n, n), episodes, dtype=np.int64), manifest={"run_id": str(rng.integers(1 << 60))},
    )  # fmt: skip


def intervals(setting: Setting, rng: np.random.Generator, draws: int) -> dict[str, tuple[float, float]]:
    """The intervals that one simulated table prints."""
    runs = []
    for _ in range(setting.seeds):
        rates = setting.rates()
        if setting.seeds > 1:
            rates = (rates + setting.spread * rng.normal(size=(1, setting.tasks))).clip(0.0, 1.0)
        runs.append(simulate(setting, rates, rng))
    seed = int(rng.integers(1 << 30))
    metrics = [compute_metrics(r, bootstrap=draws, seed=seed) for r in runs]
    found = metrics[0]
    if setting.seeds > 1:
        found = aggregate(metrics, [bootstrap_draws(r, bootstrap=draws, seed=seed) for r in runs], seed=seed)
    return {n: (found[n]["low"], found[n]["high"]) for n in SHOWN if found[n].get("low") is not None}


def coverage(setting: Setting, runs: int, draws: int, seed: int = 0) -> dict[str, tuple[float, float]]:
    """metric → (share of intervals that hold the truth, mean width)."""
    rng, want = np.random.default_rng(seed), truth(setting.rates())
    held: dict[str, list[tuple[bool, float]]] = {}
    for _ in range(runs):
        for name, (low, high) in intervals(setting, rng, draws).items():
            held.setdefault(name, []).append((low - 1e-12 <= want[name] <= high + 1e-12, high - low))
    return {n: (float(np.mean([h for h, _ in v])), float(np.mean([w for _, w in v]))) for n, v in held.items()}


SETTINGS = [
    Setting(tasks, episodes, level, forgets, shared)
    for tasks, episodes in ((4, 20), (10, 10), (4, 50))
    for level, forgets in ((0.05, 0.0), (0.5, 0.3), (0.9, 0.0), (0.98, 0.0))
    for shared in (False, True)
] + [Setting(4, 20, 0.7, 0.3, shared, seeds, 0.05) for seeds in (2, 3, 5) for shared in (False, True)]


def lines(runs: int, draws: int) -> Iterator[str]:
    assert set(SHOWN) <= set(METRICS)
    yield f"coverage of 95 % intervals, {runs} simulated tables a setting (± {math.sqrt(0.95 * 0.05 / runs):.3f})"
    yield "| setting | " + " | ".join(SHOWN) + " |"
    yield "|---" * (1 + len(SHOWN)) + "|"
    for setting in SETTINGS:
        found = coverage(setting, runs, draws)
        cells = [f"{found[n][0]:.2f} ({found[n][1]:.3f})" if n in found else "-" for n in SHOWN]
        yield f"| {setting.name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Coverage of the intervals that tables print.")
    parser.add_argument("--runs", type=int, default=400)
    parser.add_argument("--draws", type=int, default=400)
    arguments = parser.parse_args()
    for line in lines(arguments.runs, arguments.draws):
        print(line, flush=True)
