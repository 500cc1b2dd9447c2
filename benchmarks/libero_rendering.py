"""How fast LIBERO runs with two cameras, drawn fast and in full, and how much memory a simulator takes.

One simulator after the other in this process, one thread (LP_NUM_THREADS=1 for Mesa); after the reset, idle actions.
Times are the median of a step's, in milliseconds of processor time and of the clock. Needs LIBERO and OpenGL.

    python benchmarks/libero_rendering.py
    python benchmarks/libero_rendering.py --tasks libero_spatial:0 libero_10:2 --sizes 256 128 64
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("LP_NUM_THREADS", "1")

import psutil
from common import run

from clbench.envs.base import Simulator
from clbench.envs.libero.simulator import IDLE
from clbench.envs.libero.tasks import suite_tasks
from clbench.envs.making import check_this_python, make_simulator
from clbench.envs.rendering import FIDELITIES, opengl_version


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tasks", nargs="+", default=["libero_object:0", "libero_spatial:0"], metavar="SUITE:NUMBER")
    p.add_argument("--sizes", nargs="+", type=int, default=[256, 128, 64], help="pixels (default 256 128 64)")
    p.add_argument("--steps", type=int, default=20, help="steps measured (default 20)")
    return p.parse_args()


def measure(simulator: Simulator, steps: int) -> tuple[float, float]:
    """Return the median processor and clock time of a step, in milliseconds."""
    simulator.reset(0)
    processor, clock = [], []
    for _ in range(steps):
        before = time.process_time(), time.perf_counter()
        simulator.step(IDLE)
        processor.append(time.process_time() - before[0])
        clock.append(time.perf_counter() - before[1])
    return 1e3 * statistics.median(processor), 1e3 * statistics.median(clock)


def megabytes() -> float:
    return float(psutil.Process().memory_info().rss) / 1e6


def main() -> None:
    args = arguments()
    for env_type in ("libero_state", "libero"):
        check_this_python(env_type)
    print(opengl_version())
    print(f"{'task':<18} {'images':<10} {'ms/step (CPU)':>14} {'ms/step':>9} {'steps/s (CPU)':>14} {'MB':>6}")
    make_simulator({"type": "libero_state", "task": suite_tasks("libero_object")[0]}).close()  # imports
    for name in args.tasks:
        suite, _, number = name.partition(":")
        task = suite_tasks(suite)[int(number or 0)]
        kinds: list[tuple[str, dict[str, Any]]] = [("none", {"type": "libero_state", "task": task})]
        kinds += [
            (f"{fidelity} {size}", {"type": "libero", "task": task, "render": {"fidelity": fidelity, "size": size}})
            for size in args.sizes
            for fidelity in FIDELITIES
        ]
        for label, spec in kinds:
            before = megabytes()
            simulator = make_simulator(spec)
            processor, clock = measure(simulator, args.steps)
            print(
                f"{name:<18} {label:<10} {processor:>14.1f} {clock:>9.1f} {1e3 / processor:>14.1f} "
                f"{megabytes() - before:>6.0f}",
                flush=True,
            )
            simulator.close()


if __name__ == "__main__":
    run(main)
