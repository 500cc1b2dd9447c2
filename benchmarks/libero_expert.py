"""How often the scripted expert of LIBERO succeeds, and in how many steps: a table with a row per task.

Every episode starts from a placement that the simulator samples for its seed (not from LIBERO's published initial
states), and runs as the data maker runs it: noise is added to what is executed. Needs LIBERO and its assets.

    python benchmarks/libero_expert.py --suites libero_object libero_goal --episodes 20
    python benchmarks/libero_expert.py --suites libero_10 --tasks 0 1 2 --noise 0
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import numpy as np

from clbench.data.make import run_episode
from clbench.envs.base import make_simulator
from clbench.envs.libero_expert import LiberoExpert
from clbench.envs.libero_tasks import MAX_STEPS, suite_tasks

SUITES = ["libero_object", "libero_spatial", "libero_goal", "libero_10"]


@dataclass(frozen=True)
class Row:
    """One task's figures: the steps of each success, the seeds of failures, seconds for all episodes."""

    steps: list[int]
    failed: list[int]
    seconds: float

    @property
    def episodes(self) -> int:
        return len(self.steps) + len(self.failed)


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--suites", nargs="+", default=SUITES, help=f"suites (default {' '.join(SUITES)})")
    p.add_argument("--tasks", nargs="+", type=int, help="numbers of tasks within each suite (default all)")
    p.add_argument("--episodes", type=int, default=20, help="episodes per task (default 20)")
    p.add_argument("--first-seed", type=int, default=0, help="seed of the first episode (default 0)")
    p.add_argument("--noise", type=float, default=0.1, help="standard deviation of the action noise (default 0.1)")
    p.add_argument("--max-steps", type=int, help="the longest episode (default the suite's own limit)")
    return p.parse_args()


def measure(task: str, seeds: range, noise: float, max_steps: int) -> Row:
    """Run the expert from every seed."""
    start = time.perf_counter()
    simulator = make_simulator({"type": "libero_state", "task": task})
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
    return Row(steps, failed, time.perf_counter() - start)


def main() -> None:
    args = arguments()
    seeds = range(args.first_seed, args.first_seed + args.episodes)
    print("| suite | # | task | success | steps: median | max | s/episode | failed seeds |")
    print("|---|---|---|---|---|---|---|---|")
    for suite in args.suites:
        names = suite_tasks(suite)
        succeeded = total = 0
        for index in range(len(names)) if args.tasks is None else args.tasks:
            row = measure(names[index], seeds, args.noise, args.max_steps or MAX_STEPS[suite])
            median = f"{statistics.median(row.steps):.0f}" if row.steps else "-"
            print(
                f"| {suite} | {index} | {names[index]} | {len(row.steps)}/{row.episodes} | {median} "
                f"| {max(row.steps, default='-')} | {row.seconds / row.episodes:.1f} "
                f"| {', '.join(map(str, row.failed)) or '-'} |",
                flush=True,
            )
            succeeded, total = succeeded + len(row.steps), total + row.episodes
        print(f"| **{suite}** | | | **{succeeded}/{total}** | | | | |", flush=True)


if __name__ == "__main__":
    main()
