"""`clbench metrics PATH`: print every metric of a run or of any success matrix."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clbench.arguments import whole
from clbench.errors import UserError
from clbench.evaluation.packed import unpacked
from clbench.evaluation.records import OFFLINE, TEST
from clbench.metrics.compute import compute_metrics, higher_is_better, in_words, wilson
from clbench.metrics.definitions import all_metrics
from clbench.metrics.paired import compare, lines
from clbench.metrics.record import CRITERIA, Record, load_record
from clbench.paths import results_root
from clbench.terminal import show, tell

NOT_COMPARABLE = (
    "auc_*, fwt_* and nbt_* of CLARE, LIBERO and GEM are different quantities under like names and not "
    "comparable across papers: compare a number only where the definition is the same. LIBERO also reports "
    "each task's best epoch; here every cell is the checkpoint at the end of a task."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `clbench metrics`."""
    parser.add_argument("path", metavar="PATH", nargs="+", help="a run, its eval folder, or a matrix as JSON, CSV, "
                        ".npy or .npz; several runs, or packed ones: their paired differences")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--joint", metavar="RUN", action="append", default=[], help="multitask run on the same tasks, for "
        "intransigence; again for each on the first tasks alone, for intransigence_prefixes"
    )  # fmt: skip
    parser.add_argument("--single", metavar="RUN", help="single-task run on the same tasks, for ft_cw")
    parser.add_argument(
        "--assume-zero-base", action="store_true", help="fwt_gem: success before any learning is 0 if unknown"
    )
    parser.add_argument("--bootstrap", type=whole, default=1000, metavar="N", help="resamplings (0: none)")
    parser.add_argument(
        "--at-end", action="store_true", help="count success at the end of an episode, which goes on for "
        "eval.steps_after_success steps after the first success, instead of success at any time"
    )
    parser.add_argument(
        "--quantity", choices=OFFLINE.criteria, help="of a run without a simulator: error of the whole action chunk "
        "(the default), of the first action, or the policy's loss"
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Print the metrics of `args.path`; raises UserError."""
    named = [default_run(path) for path in args.path]
    with unpacked(named) as paths:
        return _run(args, paths)


def _run(args: argparse.Namespace, paths: Sequence[Path]) -> int:
    criterion = CRITERIA[1] if args.at_end else args.quantity
    if len(paths) > 1:
        return _compare(args, paths, criterion)
    record = load_record(paths[0], criterion=criterion)
    joints = [load_record(default_run(path), criterion=criterion) for path in args.joint]
    all_tasks = [j for j in joints if len(set(j.tasks)) >= len(set(record.tasks))]
    first_tasks = [j for j in joints if len(set(j.tasks)) < len(set(record.tasks))]
    if len(all_tasks) > 1:
        raise UserError("several of the runs that --joint names are on all tasks: name one of them.")
    metrics = compute_metrics(
        record,
        joint=all_tasks[0] if all_tasks else None,
        single=load_record(default_run(args.single), criterion=criterion) if args.single else None,
        prefixes=first_tasks,
        assume_zero_base=args.assume_zero_base,
        bootstrap=args.bootstrap,
    )
    if args.json:
        show(*json.dumps({"about": record.about, "metrics": metrics}, indent=1, allow_nan=False).split("\n"))
    else:
        show(*format_text(record, metrics, str(args.path[0])))
    return 0


def _compare(args: argparse.Namespace, paths: Sequence[Path], criterion: str | None) -> int:
    """Print the paired differences of several runs."""
    if args.joint or args.single or args.assume_zero_base:
        raise UserError("--joint, --single and --assume-zero-base are for one run; several are compared in pairs.")
    if args.bootstrap < 2:
        raise UserError("a comparison needs draws: --bootstrap 2 or more.")
    runs = {path.name: [load_record(path, criterion=criterion)] for path in paths}
    if len(runs) < len(paths):
        raise UserError("two of the runs have one name: a comparison tells them apart by it.")
    found = compare(runs, bootstrap=args.bootstrap)
    if args.json:
        rows = [{**vars(d), "verdict": d.verdict} for d in found]
        show(*json.dumps({"differences": rows}, indent=1, allow_nan=False).split("\n"))
    elif found:
        show(*lines(found, runs))
    else:
        raise UserError("the runs have no metric with an interval in common: episode records are needed.")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of scripts/compute_cl_matrix_metrics.py; 2 and one line on stderr for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="compute_cl_matrix_metrics.py",
        description="Print every continual-learning metric of a run, its eval folder, or a success matrix "
        "(rows: after each task; columns: tasks; rates in [0, 1]; null or empty: not evaluated).",
    )
    add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    try:
        status = run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader (head, less) has seen enough; Python must not flush again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as e:
        if args.debug:
            raise
        tell("error: " + " ".join(str(e).split()))
        return 2


# ------------------------------------------------------------------------------------------------ text


def format_text(record: Record, metrics: dict[str, dict[str, Any]], title: str) -> list[str]:
    """The matrix, an aligned table of metrics, and what to know about them."""
    lines = [f"{title}: {_facts(record)}", "", *_matrix_lines(record), ""]
    rows = [("metric", "value", "95 % interval", "better", "definition (source)")]
    known = all_metrics()
    for name, m in metrics.items():
        better = "higher" if higher_is_better(known[name], record) else "lower"
        about = f"{m['definition']} ({m['source']})"
        if m["value"] is None:
            rows.append((name, "-", "-", better, f"missing: {m['missing']} | {about}"))
        else:
            interval = "-" if m["low"] is None else f"[{m['low']:z.3f}, {m['high']:z.3f}]"
            rows.append((name, f"{m['value']:z.3f}", interval, better, about))
    widths = [max(len(r[i]) for r in rows) for i in range(4)]
    lines += ["  ".join([*(c.ljust(w) for c, w in zip(r, widths, strict=False)), r[4]]).rstrip() for r in rows]
    played = [f"episodes were played in {record.played_with}"] if record.played_with else []
    notes = [NOT_COMPARABLE, *width_notes(record, metrics), *played, *record.notes]
    lines += ["", *(f"note: {n}" for n in notes)]
    return lines


def width_notes(record: Record, metrics: dict[str, dict[str, Any]]) -> list[str]:
    """How much the numbers can be trusted, in words."""
    notes = []
    counts = evaluated_counts(record)
    if counts:
        low, high = min(counts), max(counts)
        lower, upper = wilson(low / 2, low)
        span = f"{low}" if low == high else f"{low} to {high}"
        notes.append(
            f"{span} held-out episodes a cell; intervals use Student's distribution"
            if not record.is_rate
            else f"{span} episodes a cell: a success rate near 0.5 is known to about "
            f"±{100 * (upper - lower) / 2:.0f} points (95 % Wilson, {low} episodes)"
        )
    reasons = {m["no_interval"] for m in metrics.values() if m.get("no_interval")}
    notes += [f"some or all intervals are left out: {r}" for r in sorted(reasons)]
    if any(m.get("low") is not None for m in metrics.values()):
        notes.append(
            in_words("intervals are about the success rates of these very checkpoints: they weigh the episodes of this "
                     "run anew, the same ones in every row, and leave out the spread between training seeds", record)
        )  # fmt: skip
    return notes


def evaluated_counts(record: Record) -> list[int]:
    """Episode counts of the evaluated cells whose count is known."""
    if record.episodes is None:
        return []
    pairs = zip(record.success.ravel(), record.episodes.ravel(), strict=True)
    return [int(n) for rate, n in pairs if not math.isnan(rate) and n > 0]


def _facts(record: Record) -> str:
    m = record.manifest
    known = [str(m[key]) for key in ("policy", "algorithm", "dataset") if m.get(key)]
    if m.get("seed") is not None:
        known.append(f"seed {m['seed']}")
    if m.get("privileged"):
        known.append(f"privileged observations ({m['privileged']})")
    if record.split not in (None, TEST):
        known.append(f"{record.split} episodes")
    size = f"{len(record.rows)} x {len(record.tasks)}"
    if not record.is_rate:
        unit = f" in {record.unit}" if record.unit else ""
        return ", ".join([*known, size, f"{record.label}{unit}, {record.quantity.direction}"])
    return ", ".join([*known, f"{size}, success = {record.criterion}"])


def _matrix_lines(record: Record) -> list[str]:
    rows = [("random", record.random), ("base", record.base)]
    label = "joint" if record.one_row else "after {}"
    rows += [(label.format(k), r) for k, r in zip(record.rows, record.success, strict=True)]
    names = [f"{j}:{name if len(name) <= 12 else name[:11] + '…'}" for j, name in enumerate(record.tasks)]
    widths = [max(len(n), 5) for n in names]
    head = "success" if record.is_rate else "error"
    lines = [head.ljust(10) + "  ".join(n.rjust(w) for n, w in zip(names, widths, strict=True))]
    for name, rates in rows:
        if rates is not None:
            cells = ["-" if math.isnan(v) else f"{v:.2f}" if record.is_rate else f"{v:.3f}" for v in rates]
            lines.append(name.ljust(10) + "  ".join(c.rjust(w) for c, w in zip(cells, widths, strict=True)))
    return lines


def default_run(path: str | Path) -> Path:
    """`path` itself, or the run of that name among the results when only that exists."""
    run = results_root() / path
    return run if not os.path.exists(path) and os.path.isdir(run) else Path(path)  # no error for a name too long
