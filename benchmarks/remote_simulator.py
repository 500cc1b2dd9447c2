"""What a simulator costs that lives in a child process (LIBERO_PYTHON), against the same one in this process.

A: LIBERO's steps here and in a child, alternately, with the same actions; the states are compared. Needs LIBERO here;
the child is under $LIBERO_PYTHON, or else this interpreter. B: what a step's messages cost, without a simulator.

    python benchmarks/remote_simulator.py --rounds 5
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import time

import numpy as np
import psutil
from common import run

from clbench.envs import making, wire
from clbench.envs.base import STATE_KEY, Simulator

VARIABLE = "LIBERO_PYTHON"
ACTION_DIM, STATE_DIM = 7, 89


def processor_s() -> float:
    """Processor seconds of this process and its children so far."""
    own = psutil.Process()
    return sum(p.cpu_times().user + p.cpu_times().system for p in (own, *own.children()))


def play(simulator: Simulator, actions: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Returns seconds and processor seconds per step, and the states (steps, STATE_DIM)."""
    simulator.reset(3)
    start, used = time.perf_counter(), processor_s()
    states = [simulator.step(action).observation[STATE_KEY] for action in actions]
    used, passed = processor_s() - used, time.perf_counter() - start
    return passed / len(actions), used / len(actions), np.stack(states)


def steps_of_libero(task: str, steps: int, rounds: int) -> None:
    """A."""
    spec = {"type": "libero_state", "task": task}
    python = os.environ.pop(VARIABLE, sys.executable)
    here = making.make_simulator(spec)
    os.environ[VARIABLE] = python
    there = making.make_simulator(spec)
    print(f"child: {making.simulator_versions('libero_state')}")
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, ACTION_DIM)).astype(np.float32)
    rows: list[tuple[float, ...]] = []
    for i in range(rounds):
        found = {s: play(s, actions) for s in ((here, there) if i % 2 else (there, here))}
        if not np.array_equal(found[here][2], found[there][2]):
            raise RuntimeError("the child's states differ from this process's")
        rows.append((*found[here][:2], *found[there][:2]))
    for i, what in enumerate(("time", "processor time")):
        ms = [1e3 * statistics.median(row[column] for row in rows) for column in (i, i + 2)]
        ratio = statistics.median(row[i + 2] / row[i] for row in rows)
        print(f"{what} of a step: {ms[0]:.2f} ms here, {ms[1]:.2f} ms in a child; median ratio {ratio:.3f}")


def messages(size: int, count: int) -> None:
    """B: a step of `count`, with two pictures of `size` pixels' side."""
    shown: dict[str, np.ndarray] = {STATE_KEY: np.zeros(STATE_DIM, np.float32)}
    for name in ("image", "image2") if size else ():
        shown[f"observation.images.{name}"] = np.full((size, size, 3), 7, np.uint8)
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        for _ in range(count):
            wire.receive(theirs)
            wire.send(theirs, wire.pack({"result": (shown, 0.0, False)}))
        os._exit(0)
    action, start = np.zeros(ACTION_DIM, np.float32), time.perf_counter()
    for _ in range(count):
        wire.send(ours, wire.pack({"do": "step", "forget": [], "number": 1, "action": action}))
        wire.receive(ours)
    seconds = time.perf_counter() - start
    os.waitpid(child, 0)
    pictures = f"and two pictures of {size}x{size}" if size else "alone"
    print(f"messages of a step, the state {pictures}: {1e6 * seconds / count:.0f} µs", flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=5, help="times that both are measured (default 5)")
    p.add_argument("--steps", type=int, default=200, help="steps of each time (default 200)")
    p.add_argument("--task", default="pick_up_the_alphabet_soup_and_place_it_in_the_basket", help="LIBERO's task")
    a = p.parse_args()
    for size in (0, 128, 256):
        messages(size, 2000)
    steps_of_libero(a.task, a.steps, a.rounds)


if __name__ == "__main__":
    run(main)
