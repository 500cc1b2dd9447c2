"""Memory of an evaluation on camera images over a 10 × 10 matrix: flat, or growing with rows and tasks?

Ten of Meta-World's tasks on camera images, one demonstration each, a policy with random weights and one training step
per task: a run whose evaluation has a hundred cells, but whose policy hardly succeeds, so nearly every episode is as
long as it may be. All is made in a temporary folder with the command line. While `clbench eval` plays, the resident
memory of its processes is noted every half second; rows are told apart by the records that appear.

Printed: for every checkpoint the largest sum over the evaluation's processes (shared pages are counted in each) in GB,
and the largest of the later rows' against the second's. The first has fewer simulators than the others at its start,
and of the last, processes may have ended when its first record is seen.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from common import machine, print_table, print_verdict, run

from clbench.errors import UserError

AIM = 1.05
TASKS = (
    "hammer-v3", "push-wall-v3", "faucet-close-v3", "push-back-v3", "stick-pull-v3", "handle-press-side-v3", "push-v3",
    "shelf-place-v3", "window-close-v3", "peg-unplug-side-v3",
)  # fmt: skip


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="dit_dec_small", help="preset (default dit_dec_small)")
    p.add_argument("--size", type=int, default=64, help="pixels of the images (default 64)")
    p.add_argument("--episodes", type=int, default=2, help="episodes per cell (default 2)")
    p.add_argument("--steps", type=int, default=60, help="steps of an episode (default 60)")
    p.add_argument("--workers", type=int, default=2, help="processes that play (default 2)")
    return p.parse_args()


def clbench(*arguments: str) -> list[str]:
    """A command line of ours."""
    return [sys.executable, "-m", "clbench.cli", *arguments]


def resident(root: psutil.Process) -> int:
    """Bytes that a process and its children hold."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # ended between listing and asking
            total += process.memory_info().rss
    return total


def main() -> None:
    args = arguments()
    print(machine(f"1 per process of {args.workers}"), flush=True)
    with tempfile.TemporaryDirectory(prefix="clbench-benchmark-") as name:
        folder = Path(name)
        env = {**os.environ, "CLBENCH_DATA_ROOT": str(folder / "data"), "CLBENCH_CACHE_ROOT": str(folder / "cache"),
               "CLBENCH_RESULTS_ROOT": str(folder / "results")}  # fmt: skip
        stream = [f"dataset.tasks=[{','.join(TASKS)}]", "dataset.pretrain=null", f"render.size={args.size}",
                  "dataset.make.demos_per_task=1", "dataset.make.ceiling_episodes=0"]  # fmt: skip
        common = ["--model", args.model, "--algo", "seqfft", "--dataset", "metaworld_pixels", "--run-id", "memory"]
        commands = [
            ["data", "make", "metaworld_pixels", "--", *stream],
            ["train", *common, "--", *stream, "train.steps=1", f"dataset.env.max_steps={args.steps}"],
        ]
        for command in commands:
            print(f"clbench {' '.join(command[:2])} …", file=sys.stderr, flush=True)
            done = subprocess.run(clbench(*command), env=env, capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"clbench {' '.join(command)} failed:\n{done.stderr[-2000:]}")
        played = ["eval", "--run-id", "memory", "--trials", str(args.episodes), "--workers", str(args.workers)]
        with subprocess.Popen(clbench(*played), env=env, stderr=subprocess.DEVNULL) as process:
            peaks = watched(psutil.Process(process.pid), process, folder / "results" / "memory" / "eval" / "cells")
        if process.returncode:
            raise UserError(f"the evaluation ended with status {process.returncode}.")
    print_table(["after task", "GB at most"], [[str(k + 1), f"{peaks[k] / 1e9:.2f}"] for k in sorted(peaks)])
    print_verdict(max(peaks[k] for k in peaks if k > 1) / peaks[1], AIM, at_least=False)
    print(machine("as above"))


def watched(root: psutil.Process, process: subprocess.Popen[bytes], cells: Path) -> dict[int, int]:
    """Row → the largest memory while it was the newest one with records."""
    peaks: dict[int, int] = {}
    while process.poll() is None:
        rows = [int(p.name[1:3]) for p in cells.glob("k[0-9]*_j*.jsonl")]
        with contextlib.suppress(psutil.NoSuchProcess):
            if rows:
                peaks[max(rows)] = max(peaks.get(max(rows), 0), resident(root))
        time.sleep(0.5)
    return peaks


if __name__ == "__main__":
    run(main)
