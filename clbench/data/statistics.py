"""Statistics of a data set's columns, as LeRobot's stats.json has them, streaming: memory does not grow with the set.

Mean and standard deviation are sums in float64, merged batch by batch (Chan, Golub, LeVeque 1983). Quantiles are exact:
a float32's bits, read as an integer, are ordered as the numbers are, so the k-th smallest one is found digit by digit,
each digit by counting in one pass over the data (a radix selection). No image is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clbench.data.lerobot_set import BOOKKEEPING, LeRobotSet, iter_columns, read_set
from clbench.data.task import Task
from clbench.errors import UserError

Stats = dict[str, dict[str, np.ndarray]]  # feature → "mean", "std", …: values of one frame's shape; "count" (1,)
Chunks = Callable[[], Iterable[Mapping[str, np.ndarray]]]  # the data anew for each pass: feature → (frames, *shape)

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
DIGITS = (11, 11, 10)  # bits of a float32, the highest first
NOT_NUMBERS = ("string", "language", "image", "video")


def compute(chunks: Chunks, quantiles: bool = True) -> Stats:
    """Statistics of every feature over all frames.

    Args:
        chunks: called once for each pass over the data (four with quantiles, else one). Values are taken as float32.

    Returns:
        For each feature "mean", "std" (of the population: divided by the number of frames n), "min" and "max", and
        "count" = [n]. With `quantiles` also "q01" to "q99", as numpy's `quantile` (linear between the two frames around
        (n − 1) q), and "binary": where a dimension has exactly two different values.

    Raises:
        UserError: a value is not finite, or there are no frames.
    """
    moments: dict[str, _Moments] = {}
    for chunk in chunks():
        for name, values in chunk.items():
            moments.setdefault(name, _Moments()).add(_float32(values), name)
    if not moments or any(m.n == 0 for m in moments.values()):
        raise UserError("there are no frames to compute statistics of.")
    stats = {name: m.result() for name, m in moments.items()}
    if quantiles:
        selections = {name: _Selection(m.n, m.low, m.high) for name, m in moments.items()}
        for bits in DIGITS:
            for chunk in chunks():
                for name, values in chunk.items():
                    selections[name].count(_float32(values), bits)
            for selection in selections.values():
                selection.settle(bits)
        for name, selection in selections.items():
            stats[name] |= selection.result()
    return stats


def unscaled(stats: Mapping[str, Any]) -> np.ndarray:
    """Which dimensions of a feature policies/normalization.py leaves as they are, by "min", "max" and "binary".

    Those with two values, both in [−1, 1] and at least a half apart. None where "binary" is missing: nothing says then
    which values there are.
    """
    low, high = np.asarray(stats["min"]), np.asarray(stats["max"])
    binary = np.asarray(stats["binary"] if "binary" in stats else np.zeros_like(low)).astype(bool)
    return binary & (low >= -1) & (high <= 1) & (high - low >= 0.5)


def _float32(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # to infinity, which is refused
        return values.astype(np.float32, copy=False) + np.float32(0)  # −0 is 0


class _Moments:
    """Number, mean, sum of squared deviations, least and greatest of the values so far."""

    def __init__(self) -> None:
        self.n = 0

    def add(self, values: np.ndarray, name: str) -> None:
        n = len(values)
        if n == 0:
            return
        if not np.isfinite(values).all():
            raise UserError(f"feature '{name}' has values that are not finite: no statistics can be computed of it.")
        exact = values.astype(np.float64)
        mean = exact.mean(0)
        squares = np.square(exact - mean).sum(0)
        if self.n == 0:
            self.n, self.mean, self.squares = n, mean, squares
            self.low, self.high = values.min(0), values.max(0)
            return
        total, step = self.n + n, mean - self.mean
        self.squares = self.squares + squares + np.square(step) * (self.n * n / total)
        self.mean = self.mean + step * (n / total)
        self.n = total
        self.low, self.high = np.minimum(self.low, values.min(0)), np.maximum(self.high, values.max(0))

    def result(self) -> dict[str, np.ndarray]:
        return {
            "mean": np.atleast_1d(self.mean),
            "std": np.atleast_1d(np.sqrt(self.squares / self.n)),
            "min": np.atleast_1d(self.low.astype(np.float64)),
            "max": np.atleast_1d(self.high.astype(np.float64)),
            "count": np.array([self.n]),
        }


class _Selection:
    """The values of given ranks in every dimension, found one digit of their bits after the other.

    `prefix` (D, R): the bits that are known, `known` of them, of each dimension's value of each rank. `rank` (D, R):
    its rank among the values with that prefix, from 0.
    """

    def __init__(self, n: int, low: np.ndarray, high: np.ndarray) -> None:
        self.n, self.low, self.high = n, low, high
        places = np.array(list(QUANTILES.values())) * (n - 1)
        below = np.floor(places).astype(np.int64)
        self.share = places - below
        ranks = np.concatenate([below, np.minimum(below + 1, n - 1)])
        self.prefix = np.zeros((low.size, len(ranks)), dtype=np.uint32)
        self.rank = np.tile(ranks, (low.size, 1))
        self.known = 0
        self.at_ends = np.zeros(low.shape, dtype=np.int64)  # how many values are the least or the greatest one
        self.counts: dict[tuple[int, int], np.ndarray] = {}  # dimension, prefix → how often each next digit follows

    def count(self, values: np.ndarray, bits: int) -> None:
        """Count the next digit, of `bits` bits, of values (frames, *shape)."""
        if self.known == 0:
            self.at_ends += ((values == self.low) | (values == self.high)).sum(0)
        mask = np.uint32((1 << bits) - 1)
        for d, keys in enumerate(np.ascontiguousarray(_keys(values.reshape(len(values), -1)).T)):
            digits = ((keys >> np.uint32(32 - self.known - bits)) & mask).astype(np.int64)
            prefixes = keys >> np.uint32(32 - self.known) if self.known else np.zeros_like(keys)
            for prefix in np.unique(self.prefix[d]):
                found = np.bincount(digits[prefixes == prefix], minlength=1 << bits)
                self.counts[d, int(prefix)] = self.counts.get((d, int(prefix)), 0) + found

    def settle(self, bits: int) -> None:
        """All values have been counted: one more digit of each rank's value is known."""
        for d, r in np.ndindex(self.prefix.shape):
            upto = np.cumsum(self.counts[d, int(self.prefix[d, r])])
            digit = int(np.searchsorted(upto, self.rank[d, r], side="right"))
            self.rank[d, r] -= upto[digit - 1] if digit else 0
            self.prefix[d, r] = (int(self.prefix[d, r]) << bits) | digit
        self.counts = {}
        self.known += bits

    def result(self) -> dict[str, np.ndarray]:
        below, above = np.split(_values(self.prefix).astype(np.float64), 2, axis=1)  # (D, quantiles)
        found = below + self.share * (above - below)
        shape = self.low.shape or (1,)
        binary = (self.at_ends == self.n) & (self.low < self.high)
        quantiles = {name: found[:, i].reshape(shape) for i, name in enumerate(QUANTILES)}
        return {**quantiles, "binary": np.atleast_1d(binary)}


def _keys(values: np.ndarray) -> np.ndarray:
    """The bits of float32 values as integers in the values' order: all flipped if negative, else the sign alone."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(1 << 31))


def _values(keys: np.ndarray) -> np.ndarray:
    """Undo `_keys`."""
    return np.where(keys >> np.uint32(31), keys & np.uint32((1 << 31) - 1), ~keys).view(np.float32)


# ------------------------------------------------------------------------------------------------ of data sets


def of_tasks(tasks: Sequence[Task], quantiles: bool = True) -> Stats:
    """Statistics of all frames of some tasks, which may be in several sets, each frame once.

    Every column of numbers that is used counts, but for bookkeeping (BOOKKEEPING).

    Raises:
        UserError: a set is damaged, or two sets differ in their features.
    """
    return compute(chunks(tasks), quantiles)


def chunks(tasks: Sequence[Task]) -> Chunks:
    """The columns of some tasks' frames, set by set."""
    sets: dict[Path, _Part] = {}
    for task in tasks:
        if task.root not in sets:
            found = read_set(task.root, "Get it anew.")
            names = task.features or {k: k for k in found.features}
            sets[task.root] = _Part(found, _numbers(found, names), task.pad or {})
        sets[task.root].episodes.update(task.episodes)
    parts = list(sets.values())
    _check_alike(parts)

    def read() -> Iterator[Mapping[str, np.ndarray]]:
        for part in parts:
            yield from part.read()

    return read


class _Part:
    """Some episodes of one data set. `names`: columns of numbers that are used → their names in clbench. `pad`: name in
    clbench → numbers that its vectors are lengthened to, with zeros."""

    def __init__(self, found: LeRobotSet, names: dict[str, str], pad: Mapping[str, int]) -> None:
        self.found, self.names, self.pad = found, names, pad
        self.episodes: set[int] = set()

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self.pad:
            return (self.pad[name],)
        there = next(t for t, here in self.names.items() if here == name)
        return tuple(self.found.features[there]["shape"])

    def read(self) -> Iterator[dict[str, np.ndarray]]:
        columns = {there: self.found.features[there]["shape"] for there in self.names} | {"episode_index": ()}
        wanted = np.array(sorted(self.episodes))
        seen = 0
        for file in self.found.files(self.episodes):
            if not file.endswith(".parquet"):
                continue
            try:
                for arrays in iter_columns(self.found.root / file, columns):
                    rows = np.isin(arrays["episode_index"], wanted)
                    seen += int(rows.sum())
                    yield {here: self._lengthened(here, arrays[there][rows]) for there, here in self.names.items()}
            except (ValueError, KeyError, OSError) as e:
                if isinstance(e, UserError):
                    raise
                raise UserError(
                    f"the data set in {self.found.root} is damaged: {' '.join(str(e).split())}. Get it anew."
                ) from e
        listed = sum(e.frames for e in self.found.episodes if e.index in self.episodes)
        if seen != listed:
            raise UserError(
                f"the data set in {self.found.root} is damaged or not whole: its files have {seen} frames of these "
                f"episodes, its description lists {listed}. Get it anew."
            )

    def _lengthened(self, name: str, values: np.ndarray) -> np.ndarray:
        if name not in self.pad:
            return values
        values = values[:, None] if values.ndim == 1 else values
        return np.pad(values, ((0, 0), (0, self.pad[name] - values.shape[1])))


def _numbers(found: LeRobotSet, names: Mapping[str, str]) -> dict[str, str]:
    return {
        there: here
        for there, here in names.items()
        if there not in BOOKKEEPING and found.features[there]["dtype"] not in NOT_NUMBERS
    }


def _check_alike(parts: Sequence[_Part]) -> None:
    """Raise UserError where two sets do not have the same features, of the same shapes."""
    first = parts[0]
    for other in parts[1:]:
        for name in sorted({*first.names.values(), *other.names.values()}):
            shapes = [p.shape(name) if name in p.names.values() else None for p in (first, other)]
            if shapes[0] != shapes[1]:
                there = [f"{p.found.root} has {'none' if s is None else s}"
                         for p, s in zip((first, other), shapes, strict=True)]  # fmt: skip
                raise UserError(
                    f"the data sets differ in the feature '{name}': {there[0]}, {there[1]}. Statistics of both need "
                    "the same features in all sets (dataset.rename changes names)."
                )
