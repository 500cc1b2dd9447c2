"""Starts one process per rank on this machine, and ends them all when one fails.

Ranks find each other through the environment that torchrun, `accelerate launch` and SLURM scripts also set (RANK,
LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). Several machines are started by those; see docs/multi_gpu.md.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from clbench.errors import RESUME_EXIT
from clbench.terminal import tell

EXPECTED_RANKS = "CLBENCH_RANKS"  # how many processes there must be; read by training/backend.py
LAUNCHER = "CLBENCH_LAUNCHER"  # the process that started the ranks: without it they stop
GRACE_S = 10.0  # between asking the other ranks to end and ending them


def launched() -> bool:
    """Whether this process is one of several ranks already."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def launch(arguments: Sequence[str], ranks: int, port: int | None = None) -> int:
    """Run `clbench ARGUMENTS` as `ranks` processes.

    Returns 0, or the exit status of the rank that failed first, or RESUME_EXIT when they were asked to stop.
    """
    shared = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port or free_port()),
        EXPECTED_RANKS: str(ranks),
        LAUNCHER: str(os.getpid()),
    }
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    processes: list[subprocess.Popen[bytes]] = []
    signals: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        for p in processes:
            if p.poll() is None:
                p.send_signal(number)

    before = {s: signal.signal(s, forward) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        for rank in range(ranks):
            if signals:
                break
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            environment = {"OMP_NUM_THREADS": threads, **os.environ, **shared, **own}
            command = [sys.executable, "-m", "clbench.cli", *arguments]
            # A session of their own: a signal reaches them once, through `forward`, and not from the terminal as well.
            processes.append(subprocess.Popen(command, env=environment, start_new_session=True))
        return _wait(processes, signals) if len(processes) == ranks else _end(processes)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def _wait(processes: Sequence[subprocess.Popen[bytes]], signals: Sequence[int]) -> int:
    """Wait for all; when one fails, end the others, which would wait for it in vain.

    A rank that a passed-on signal ended before it could listen has lost nothing: that counts as stopped.
    """
    while True:
        codes = [p.poll() for p in processes]
        failed = [(rank, c) for rank, c in enumerate(codes) if c not in (None, 0, RESUME_EXIT)]
        if failed:
            rank, code = failed[0]
            assert code is not None
            if -code in signals:
                return _end(processes)
            how = f"was ended by signal {-code}" if code < 0 else f"failed (exit status {code})"
            tell(f"rank {rank} {how}; ending the other ranks.")
            _end(processes)
            return code if code > 0 else 1
        if None not in codes:
            return max(c or 0 for c in codes)
        time.sleep(0.2)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """End all that still run, and wait for them."""
    for p in processes:
        if p.poll() is None:
            p.terminate()
    deadline = time.monotonic() + GRACE_S
    for p in processes:
        try:
            p.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            p.kill()
            p.wait()
    return RESUME_EXIT
