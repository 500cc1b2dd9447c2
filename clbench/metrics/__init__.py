"""Metrics of continual learning: one raw record (success matrix and its episodes), many named formulas."""

from __future__ import annotations

from clbench.metrics.compute import aggregate, bootstrap_draws, compute_metrics, wilson
from clbench.metrics.definitions import METRICS, Metric, Missing, all_metrics, metric
from clbench.metrics.paired import Difference, compare, mcnemar
from clbench.metrics.record import Curve, Record, load_record

__all__ = [
    "METRICS",
    "Curve",
    "Difference",
    "Metric",
    "Missing",
    "Record",
    "aggregate",
    "all_metrics",
    "bootstrap_draws",
    "compare",
    "compute_metrics",
    "load_record",
    "mcnemar",
    "metric",
    "wilson",
]
