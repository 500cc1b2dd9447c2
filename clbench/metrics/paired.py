"""Paired comparison of runs that played the same episodes: the difference has its own, narrower interval."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from clbench.errors import UserError
from clbench.metrics.compute import bootstrap_draws, compute_metrics, higher_is_better, over_runs
from clbench.metrics.definitions import FloatArray, all_metrics
from clbench.metrics.record import Record

LEVEL = 0.05
COMPARED = ("auc_clare", "fwt_clare", "nbt_clare", "asr", "forgetting_corrected", "zero_shot")


@dataclass(frozen=True)
class Difference:
    """One metric of `first` minus that of `second`.

    Attributes:
        low, high: its 95 % interval, from draws that weigh each episode alike in both.
        p: two-sided, of the hypothesis that it is 0: a normal approximation with the draws' standard deviation.
        holm: p after Holm's correction over the pairs that are compared (Holm 1979).
        n: training seeds that both have.
        higher_is_better: which way the metric is better, for what these runs were evaluated by; None: as for rates.
    """

    first: str
    second: str
    metric: str
    value: float
    low: float
    high: float
    p: float
    holm: float = 1.0
    n: int = 1
    higher_is_better: bool | None = None

    @property
    def verdict(self) -> str:
        """What the test says, in words."""
        if self.holm >= LEVEL:
            return "no difference seen"
        higher = self.higher_is_better
        higher = all_metrics()[self.metric].higher_is_better if higher is None else higher
        return f"{self.first if (self.value > 0) == higher else self.second} is better"


def compare(
    groups: Mapping[str, Sequence[Record]], *, names: Sequence[str] = COMPARED, bootstrap: int = 1000, seed: int = 0
) -> list[Difference]:
    """All pairs of some runs or methods, for every metric that both have.

    Args:
        groups: name → its runs, which differ in their training seed alone. Runs of one training seed are paired; a seed
            that one side lacks is left out.

    Raises:
        UserError: two of them did not learn the same tasks, or did not play the same episodes.
    """
    every = [r for runs in groups.values() for r in runs]
    for other in every[1:]:
        check_paired(every[0], other)
    draws = {id(r): bootstrap_draws(r, bootstrap=bootstrap, seed=seed) for r in every}
    values = {id(r): compute_metrics(r, bootstrap=0) for r in every}
    found = []
    for name in names:
        pairs = []
        for (a, first), (b, second) in combinations(groups.items(), 2):
            both = [(x, y) for x, y in _by_seed(first, second) if name in draws[id(x)] and name in draws[id(y)]]
            if both:
                value = [values[id(x)][name]["value"] - values[id(y)][name]["value"] for x, y in both]
                drawn = np.stack([draws[id(x)][name] - draws[id(y)][name] for x, y in both])
                higher = higher_is_better(all_metrics()[name], every[0])
                pairs.append(_difference(a, b, name, np.array(value), drawn, seed, higher))
        found += _holm(pairs)
    return found


def check_paired(a: Record, b: Record) -> None:
    """Raise UserError where two runs cannot be compared episode by episode."""
    if a.tasks != b.tasks or a.rows != b.rows:
        raise UserError(f"{a.source} and {b.source} do not have the same tasks in the same order: nothing pairs them.")
    if a.quantity != b.quantity:
        raise UserError(f"{a.source} is of {a.label}, and {b.source} of {b.label}: they cannot be compared.")
    for what, one, other in (("split", a.split, b.split), ("criterion", a.criterion, b.criterion)):
        if one != other:
            raise UserError(f"{a.source} and {b.source} differ in their {what}: {one} and {other}.")
    _check_errors(a, b)
    for (k, j), outcomes in a.outcomes.items():
        if k >= 0 and (k, j) in b.outcomes and set(outcomes) != set(b.outcomes[k, j]):
            if not a.is_rate:
                raise UserError(
                    f"{a.source} and {b.source} were not evaluated on the same held-out episodes at k={k} j={j}: they "
                    "need the same data, dataset.holdout, dataset.holdout_seed and eval.episodes."
                )
            raise UserError(
                f"{a.source} and {b.source} did not play the same episodes at k={k} j={j}: evaluate both with the same "
                "eval.episodes and eval.seed (and the same version's rule for episode seeds)."
            )


def _check_errors(a: Record, b: Record) -> None:
    """Raise UserError where the errors of two runs do not measure the same."""
    if a.is_rate:
        return
    which = f"{a.source} and {b.source}"
    if a.criterion == "loss" and a.manifest.get("policy") != b.manifest.get("policy"):
        raise UserError(f"{which} are of different policies, whose losses are not the same function.")
    for key, advice in (
        ("stride", "evaluate both with the same eval.stride"),
        ("scale", "their data differ"),
        ("horizon", "action chunks of different lengths: compare --quantity first_error"),
    ):
        one, other = a.asked.get(key), b.asked.get(key)
        if one != other and not (key == "horizon" and a.criterion != "chunk_error"):
            shown = "" if key == "scale" else f" ({one} and {other})"
            raise UserError(f"{which} were computed with another {key}{shown}: {advice}.")


def _by_seed(first: Sequence[Record], second: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Runs of one training seed; one run against one needs none."""
    if len(first) == len(second) == 1:
        return [(first[0], second[0])]
    of = {r.manifest.get("seed"): r for r in second}
    return [(r, of[r.manifest.get("seed")]) for r in first if r.manifest.get("seed") in of]


def _difference(a: str, b: str, metric: str, values: FloatArray, drawn: FloatArray, seed: int,
                higher: bool) -> Difference:  # fmt: skip
    """`values` (n,) and `drawn` (n, B) of each training seed."""
    mean, draws = over_runs(values, drawn, np.random.default_rng(seed))
    low, high = np.percentile(draws, [2.5, 97.5])
    spread = float(draws.std())
    p = math.erfc(abs(mean) / (spread * math.sqrt(2))) if spread > 0 else float(mean == 0)
    return Difference(a, b, metric, mean, float(low), float(high), p, n=len(values), higher_is_better=higher)


def _holm(pairs: Sequence[Difference]) -> list[Difference]:
    """With p-values corrected over these pairs: the i-th smallest of m times m − i, never falling, at most 1."""
    order = sorted(range(len(pairs)), key=lambda i: pairs[i].p)
    corrected, least = dict.fromkeys(order, 1.0), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, pairs[i].p * (len(pairs) - rank)))
        corrected[i] = least
    return [Difference(**{**vars(d), "holm": corrected[i]}) for i, d in enumerate(pairs)]


def mcnemar(a: Mapping[int, float], b: Mapping[int, float]) -> float:
    """Exact two-sided p of McNemar's test (1947): of the episodes that only one solved, half are the first one's.

    `a`, `b`: episode seed → 1 or 0.
    """
    only_a = sum(a[s] > b[s] for s in a.keys() & b.keys())
    only_b = sum(a[s] < b[s] for s in a.keys() & b.keys())
    n, fewer = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(fewer + 1)) / 2**n)


def differing_cells(a: Record, b: Record) -> list[tuple[int, int, float]]:
    """(k, j, p) of the cells that differ by McNemar's test, with Holm's correction over all cells."""
    cells = sorted(c for c in a.outcomes.keys() & b.outcomes.keys() if c[0] >= 0)
    ps = sorted((mcnemar(a.outcomes[c], b.outcomes[c]), c) for c in cells)
    found, least = [], 0.0
    for rank, (p, (k, j)) in enumerate(ps):
        least = max(least, min(1.0, p * (len(ps) - rank)))
        if least < LEVEL:
            found.append((k, j, least))
    return sorted(found)


def p_text(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def lines(found: Sequence[Difference], runs: Mapping[str, Sequence[Record]] | None = None) -> Iterator[str]:
    """The comparison as text; with single runs, also the cells that differ."""
    pairs = len({(d.first, d.second) for d in found})
    yield (
        "paired differences over the same episodes, 95 % intervals; p after Holm's correction over "
        f"{pairs} pair{'s' if pairs != 1 else ''}"
    )
    names = [f"{d.first} − {d.second}" for d in found]
    first, second = max((len(d.metric) for d in found), default=0), max(map(len, names), default=0)
    for d, name in zip(found, names, strict=True):
        seeds = f", {d.n} training seeds" if d.n > 1 else ""
        yield (
            f"{d.metric:<{first}}  {name:<{second}}  {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]  p {p_text(d.holm)}  "
            f"{d.verdict}{seeds}"
        )
    for (a, one), (b, other) in combinations((runs or {}).items(), 2):
        if len(one) == len(other) == 1 and one[0].is_rate:
            cells = differing_cells(one[0], other[0])
            text = ", ".join(f"k={k} j={j} (p {p_text(p)})" for k, j, p in cells) or "none"
            yield f"cells in which {a} and {b} differ (McNemar, Holm over all cells): {text}"
