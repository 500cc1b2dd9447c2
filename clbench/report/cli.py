"""`clbench report RUN [RUN ...]`: write the report of one run, or compare several."""

from __future__ import annotations

import argparse
from pathlib import Path

from clbench.arguments import whole
from clbench.evaluation.packed import SUFFIX, is_packed, unpacked
from clbench.evaluation.records import TEST, VALIDATION
from clbench.metrics.cli import default_run
from clbench.report.build import build_report
from clbench.terminal import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `clbench report`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, names under results/, or packed results")
    parser.add_argument("--name", help="name of a report of several runs (default: the data set)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write to")
    parser.add_argument("--split", choices=(TEST, VALIDATION), default=TEST, help="which episodes (default: test)")
    parser.add_argument("--bootstrap", type=whole, default=1000, metavar="N", help="resamples (0: none)")


def run(args: argparse.Namespace) -> int:
    """Write the report and print where it is; raises UserError."""
    named = [default_run(r) for r in args.runs]
    packed = next((path for path in named if is_packed(path)), None)
    out = args.out
    if out is None and packed is not None:  # next to the file: its runs are in a temporary folder
        out = packed.with_name(packed.name.removesuffix(SUFFIX) + "_report")
    with unpacked(named) as runs:
        show(build_report(runs, out, name=args.name, bootstrap=args.bootstrap, split=args.split))
    return 0
