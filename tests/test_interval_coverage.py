"""A small version of benchmarks/interval_coverage.py: the intervals that tables print hold the truth often enough."""

from __future__ import annotations

import math

import pytest

from benchmarks.interval_coverage import SHOWN, Setting, coverage

RUNS = 80
# Three standard errors below 95 %. The percentile bootstrap that was used before held asr in 0.78 of such tables near
# 1, and in 0.76 of those whose tasks share episode seeds (0.59 at 10 x 10).
LEAST = 0.95 - 3 * math.sqrt(0.95 * 0.05 / RUNS)


@pytest.mark.parametrize(
    "setting",
    [
        Setting(4, 20, 0.98, 0.0),
        Setting(10, 10, 0.9, 0.0),
        Setting(4, 20, 0.5, 0.3, shared=True),
        Setting(4, 20, 0.7, 0.3, shared=True, seeds=3, spread=0.05),
    ],
    ids=lambda s: s.name,
)
def test_intervals_cover(setting: Setting) -> None:
    found = coverage(setting, RUNS, 200)
    assert set(found) == set(SHOWN)
    for name, (share, width) in found.items():
        assert share >= LEAST, (name, share)
        assert width > 0
