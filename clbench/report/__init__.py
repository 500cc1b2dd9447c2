"""Reports of one run or of several side by side: an HTML page, figures, and tables for a paper."""

from __future__ import annotations

from clbench.report.build import build_report

__all__ = ["build_report"]
