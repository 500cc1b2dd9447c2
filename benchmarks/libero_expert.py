"""How often the scripted expert of LIBERO succeeds, in how many steps and how fast: a table with a row per task.

Every episode runs as the data maker runs it: noise is added to what is executed. Seeds below 1000000 start from
placements that the simulator samples, those from 1000000 on from LIBERO's published initial states. Needs LIBERO and
its assets. Times are of one processor core, whatever else the machine does.

    python benchmarks/libero_expert.py --suites libero_object libero_goal --episodes 20
    python benchmarks/libero_expert.py --suites libero_10 --tasks 0 1 2 --noise 0
    python benchmarks/libero_expert.py --first-seed 1000000 --episodes 50 --json figures.json
    python benchmarks/libero_expert.py --compare figures.json others.json

With --json, each task's figures are written to the file as soon as they are there. The same command again measures only
what is missing, and prints the whole table; --again measures what is named anew.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import run

from clbench.data.experts.libero import LiberoExpert
from clbench.data.make import run_episode
from clbench.envs.libero.tasks import MAX_STEPS, suite_tasks
from clbench.envs.making import check_this_python, make_simulator, simulator_versions
from clbench.errors import UserError
from clbench.io import read_json, write_json
from clbench.metrics import wilson

SUITES = ["libero_spatial", "libero_goal", "libero_object", "libero_10"]
DEMONSTRATIONS = 50  # the time for so many is shown
SETTINGS = ("episodes", "first_seed", "noise", "max_steps")  # figures made with other ones are not the wanted ones

Row = dict[str, Any]  # one task's: suite, index, SETTINGS, steps of each success, seeds of failures, processor seconds


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--suites", nargs="+", default=SUITES, help=f"suites (default {' '.join(SUITES)})")
    p.add_argument("--tasks", nargs="+", type=int, help="numbers of tasks within each suite (default all)")
    p.add_argument("--episodes", type=int, default=20, help="episodes per task (default 20)")
    p.add_argument("--first-seed", type=int, default=0, help="seed of the first episode (default 0)")
    p.add_argument("--noise", type=float, default=0.1, help="standard deviation of the action noise (default 0.1)")
    p.add_argument("--max-steps", type=int, help="the longest episode (default the suite's own limit)")
    p.add_argument("--json", type=Path, metavar="FILE", help="keep the figures in FILE, and go on from what it holds")
    p.add_argument("--again", action="store_true", help="measure also what FILE holds already")
    p.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="print two files' figures side by side")
    args = p.parse_args()
    if args.episodes < 1:
        p.error("--episodes must be 1 or more.")
    return args


def measure(task: str, seeds: range, noise: float, max_steps: int) -> Row:
    """Run the expert from every seed: `steps` of each success, seeds that `failed`, processor `seconds` of it all."""
    simulator = make_simulator({"type": "libero_state", "task": task})
    start = time.process_time()
    steps, failed = [], []
    try:
        for seed in seeds:
            expert, rng = LiberoExpert(simulator), np.random.default_rng(seed)
            _, actions, success = run_episode(simulator, expert, seed, max_steps, 0, noise, rng)
            if success:
                steps.append(len(actions))
            else:
                failed.append(seed)
    finally:
        simulator.close()
    return {"steps": steps, "failed": failed, "seconds": round(time.process_time() - start, 1)}


def median(row: Row) -> str:
    return f"{statistics.median(row['steps']):.0f}" if row["steps"] else "-"


def minutes(rows: list[Row]) -> str:
    """Minutes for as many demonstrations of each of the tasks, failed attempts included."""
    if not all(row["steps"] for row in rows):
        return "-"
    return f"{sum(DEMONSTRATIONS * row['seconds'] / len(row['steps']) for row in rows) / 60.0:.1f}"


def rate(row: Row) -> str:
    successes, episodes = len(row["steps"]), row["episodes"]
    low, high = wilson(successes, episodes)
    return f"{successes}/{episodes} [{low:.2f}, {high:.2f}]"


def load(path: Path) -> dict[str, Any]:
    """Read a file that --json wrote; UserError for another one."""
    found: dict[str, Any] = read_json(path)
    if not isinstance(found, dict) or not {"versions", "tasks"} <= set(found):
        raise UserError(f"{path} was not written by this script's --json.")
    return found


def print_versions(found: dict[str, str]) -> None:
    print("Simulator: " + ", ".join(f"{name} {version[:12]}" for name, version in found.items()) + "\n", flush=True)


def measure_all(args: argparse.Namespace) -> None:
    check_this_python("libero_state")
    installed = simulator_versions("libero_state") | {"numpy": importlib.metadata.version("numpy")}
    figures: dict[str, Any] = {"versions": installed, "tasks": {}}
    if args.json is not None and args.json.exists():
        figures = load(args.json)
        if figures["versions"] != installed:
            raise UserError(f"{args.json} was measured with {figures['versions']}, not {installed}: name another file.")
    seeds = range(args.first_seed, args.first_seed + args.episodes)
    print_versions(installed)
    print(f"| suite | # | task | success | median steps | most | min per {DEMONSTRATIONS} | failed seeds |")
    print("|---|---|---|---|---|---|---|---|")
    for suite in args.suites:
        names = suite_tasks(suite)
        rows = []
        for index in range(len(names)) if args.tasks is None else args.tasks:
            task, limit = names[index], args.max_steps or MAX_STEPS[suite]
            wanted = dict(zip(SETTINGS, (args.episodes, args.first_seed, args.noise, limit), strict=True))
            row = figures["tasks"].get(task)
            if args.again or row is None or any(row[key] != wanted[key] for key in SETTINGS):
                row = {"suite": suite, "index": index, **wanted, **measure(task, seeds, args.noise, limit)}
                figures["tasks"][task] = row
                if args.json is not None:
                    write_json(args.json, figures, indent=None)
            print(
                f"| {suite} | {index} | {task} | {rate(row)} | {median(row)} | {max(row['steps'], default='-')} "
                f"| {minutes([row])} | {', '.join(map(str, row['failed'])) or '-'} |",
                flush=True,
            )
            rows.append(row)
        succeeded, episodes = sum(len(row["steps"]) for row in rows), sum(row["episodes"] for row in rows)
        print(f"| **{suite}** | | | **{succeeded}/{episodes}** | | | **{minutes(rows)}** | |", flush=True)


def compare(first: Path, second: Path) -> None:
    """Print the tasks that two files have in common, with 95 % Wilson intervals."""
    files = [load(first), load(second)]
    for name, figures in zip("AB", files, strict=True):
        print(f"{name}: ", end="")
        print_versions(figures["versions"])
    print("| suite | # | task | A | B | B − A | median steps: A | B |")
    print("|---|---|---|---|---|---|---|---|")
    totals: dict[str, list[list[Row]]] = {}
    for task, a in files[0]["tasks"].items():
        b = files[1]["tasks"].get(task)
        if b is None:
            continue
        differing = [key for key in SETTINGS if a[key] != b[key]]
        if differing:
            raise UserError(f"{task}: the files differ in {', '.join(differing)}; measure both alike.")
        difference = (len(b["steps"]) - len(a["steps"])) / a["episodes"]
        print(
            f"| {a['suite']} | {a['index']} | {task} | {rate(a)} | {rate(b)} | {difference:+.2f} "
            f"| {median(a)} | {median(b)} |"
        )
        totals.setdefault(a["suite"], []).append([a, b])
    for suite, pairs in totals.items():
        sums = [
            f"{sum(len(row['steps']) for row in rows)}/{sum(row['episodes'] for row in rows)}"
            for rows in zip(*pairs, strict=True)
        ]
        print(f"| **{suite}** | | {len(pairs)} tasks | **{sums[0]}** | **{sums[1]}** | | | |")


def main() -> None:
    args = arguments()
    if args.compare is not None:
        compare(*args.compare)
    else:
        measure_all(args)


if __name__ == "__main__":
    run(main)
