"""What starting costs: processor seconds to the first training step, and a whole sweep, against another checkout.

    python benchmarks/startup.py --against ../clbench-before      # a checkout with an environment of its own (.venv)

Alternately, this checkout and the other, each with folders of its own for runs and bases, on the same demonstrations:

    first step   `clbench train --smoke` from its start to the first line about a step in log.jsonl
    sweep        `clbench sweep quickstart_smoke`: base, three trainings and evaluations, report, with almost no steps
    quickstart   with --quickstart: `clbench sweep quickstart` from nothing, minutes each

Processor seconds are user and system time of a command and everything that it started. Needs `clbench data make
metaworld_quick`. Without --against the figures of this checkout are printed alone.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from common import machine, print_table, run, stream_config

from clbench.errors import UserError
from clbench.paths import PROJECT_ROOT, data_root

TIMEOUT_S = 3600.0
Figures = tuple[float, float]  # processor seconds, seconds


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--against", metavar="CHECKOUT", help="another checkout of clbench, with its .venv")
    p.add_argument("--repeats", type=int, default=3, help="how often each is measured (default 3)")
    p.add_argument("--quickstart", action="store_true", help="also the whole quickstart's sweep, once each")
    p.add_argument("--only", choices=("first step", "sweep", "quickstart"), help="this part alone")
    return p.parse_args()


class Checkout:
    """A checkout, its interpreter, and where what it makes goes."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root.resolve(), folder
        self.python = self.root / ".venv" / "bin" / "python"
        if root.resolve() == PROJECT_ROOT:
            self.python = Path(sys.executable)
        if not self.python.is_file():
            raise UserError(f"{self.root} has no .venv: run `bash {self.root}/scripts/bootstrap.sh` there.")
        self.folder.mkdir()

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "CLBENCH_RESULTS_ROOT": str(self.folder / "results"),
            "CLBENCH_CACHE_ROOT": str(self.folder / "cache"),
            "CLBENCH_DATA_ROOT": str(data_root()),
        }
        with (self.folder / "log.txt").open("ab") as log:
            started = [str(self.python), "-P", "-m", "clbench.cli", *command]
            return subprocess.Popen(started, env=environment, stdout=log, stderr=log, cwd=self.root)

    def whole(self, *command: str) -> Figures:
        """What a command costs from its start to its end."""
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        if (code := self.start(*command).wait(TIMEOUT_S)) != 0:
            raise UserError(f"`clbench {' '.join(command)}` of {self.root} failed ({code}): see {self.folder}/log.txt")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, time.monotonic() - began

    def first_step(self) -> Figures:
        """What it costs to come to the first training step; the base is there."""
        log = self.folder / "results" / "first" / "log.jsonl"
        shutil.rmtree(log.parent, ignore_errors=True)
        began = time.monotonic()
        process = self.start("train", "--algo", "seqfft", "--smoke", "--run-id", "first", "--", "train.log_every=1")
        try:
            while not (log.is_file() and b'"event": "step"' in log.read_bytes()):
                if process.poll() is not None:
                    raise UserError(f"the training of {self.root} ended before a step: see {self.folder}/log.txt")
                time.sleep(0.01)
            seconds, tree = time.monotonic() - began, psutil.Process(process.pid)
            return sum(_time(p) for p in [tree, *tree.children(recursive=True)]), seconds
        finally:
            process.kill()
            process.wait()

    def sweep(self, experiment: str, keep_base: bool) -> Figures:
        shutil.rmtree(self.folder / "results", ignore_errors=True)
        if not keep_base:
            shutil.rmtree(self.folder / "cache", ignore_errors=True)
        return self.whole("sweep", experiment)


def _time(process: psutil.Process) -> float:
    t = process.cpu_times()
    return t.user + t.system + t.children_user + t.children_system


def main() -> None:
    args = arguments()
    stream_config("metaworld_quick")
    print(machine("as commands choose"))
    with tempfile.TemporaryDirectory(prefix="clbench-startup-") as folder:
        names = ["this"] if args.against is None else ["this", "other"]
        roots = [PROJECT_ROOT] if args.against is None else [PROJECT_ROOT, Path(args.against)]
        sides = [Checkout(root, Path(folder) / name) for name, root in zip(names, roots, strict=True)]
        parts = [args.only] if args.only else ["first step", "sweep", *(["quickstart"] if args.quickstart else [])]
        if "first step" in parts:
            for side in sides:
                side.whole("pretrain", "--smoke")
        rows = []
        for part in parts:
            found: list[list[Figures]] = [[] for _ in sides]
            for i in range(1 if part == "quickstart" else args.repeats):
                for n in (range(len(sides)), reversed(range(len(sides))))[i % 2]:
                    if part == "first step":
                        figures = sides[n].first_step()
                    else:
                        figures = sides[n].sweep("quickstart" + "_smoke" * (part == "sweep"), keep_base=False)
                    print(f"{part}, {names[n]}: {figures[0]:.1f} processor seconds, {figures[1]:.1f} s", flush=True)
                    found[n].append(figures)
            for what, column in (("processor seconds", 0), ("seconds", 1)):
                medians = [statistics.median(f[column] for f in side) for side in found]
                ratio = f"{medians[0] / medians[1]:.2f}" if len(medians) == 2 else "–"
                rows.append([part, what, *(f"{m:.1f}" for m in medians), ratio])
    print_table(["", "", *names, "ratio"], rows)


if __name__ == "__main__":
    run(main)
