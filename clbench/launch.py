"""Starts one process per rank on this machine, and ends them all when one fails.

Ranks find each other through the variables that torchrun, `accelerate launch` and SLURM scripts also set (RANK,
LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). Use those for several machines; see docs/multi_gpu.md.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from collections.abc import Sequence
from types import FrameType

from clbench.errors import LOST_EXIT, RESUME_EXIT, UserError
from clbench.processes import Child, start_command
from clbench.stopping import how_ended
from clbench.terminal import tell

EXPECTED_RANKS = "CLBENCH_RANKS"  # how many processes there must be; read by training/backend.py
GRACE_S = 10.0  # between asking the other ranks to end and killing them
SETTLE_S = 3.0  # for a rank to have ended after others report that it is gone


def launched() -> bool:
    """Whether this process is one of several ranks already."""
    return world_size() > 1


def world_size() -> int:
    """How many ranks there are according to a launcher; 1 without one."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or text == "0":
        raise UserError(f"WORLD_SIZE={text} in the environment is not a number of ranks: unset it, or give 1 or more.")
    return int(text)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def check_port(port: int) -> None:
    """Raise UserError unless ranks can meet at a port on this machine."""
    try:
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as ranks do: a port just released is free
            s.bind(("", port))
            s.listen()
    except OSError as e:
        why = "in use by another program" if e.errno == errno.EADDRINUSE else f"not available ({e.strerror})"
        raise UserError(f"--port {port} is {why}. Choose another one, or omit --port for a free one.") from e


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
    }
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    processes: list[Child] = []
    signals: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        signals.append(number)  # nothing else: this may come in the middle of a message from or to the ranks' server

    before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        for rank in range(ranks):
            if signals:
                break
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads), **shared, **own}
            # In their own session: a signal reaches them once, through `_wait`, and not from the terminal as well.
            processes.append(start_command(arguments, env=environment, session=True))
        return _wait(processes, signals) if len(processes) == ranks else _end(processes)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def _wait(processes: Sequence[Child], signals: Sequence[int]) -> int:
    """Wait for all, passing on signals; when one fails, end the others, which would wait for it in vain.

    A rank that a passed-on signal ended before it could listen has lost nothing and counts as stopped.
    """
    lost_since: float | None = None
    passed = 0
    while True:
        for number in signals[passed:]:
            passed += 1
            for p in processes:
                p.send_signal(number)
        codes = [p.poll() for p in processes]
        failed = {rank: c for rank, c in enumerate(codes) if c not in (None, 0, RESUME_EXIT)}
        blamed = {rank: c for rank, c in failed.items() if c != LOST_EXIT}  # the others say that one is gone
        lost_since = lost_since or (time.monotonic() if failed else None)
        if blamed or (lost_since is not None and time.monotonic() - lost_since > SETTLE_S):
            rank, code = min((blamed or failed).items(), key=lambda item: (item[1] > 0, item[0]))  # killed ones first
            if -code in signals:
                return _end(processes)
            tell(f"{_blame(rank, code, codes)}; ending the other ranks.")
            _end(processes)
            return code if code > 0 else 1
        if None not in codes:
            return max(c or 0 for c in codes)
        time.sleep(0.2)


def _blame(rank: int, code: int, codes: Sequence[int | None]) -> str:
    """Which rank ended the run, and how: `rank` with status `code`, or one that still runs and does not answer."""
    if code == LOST_EXIT:
        hung = [str(r) for r, c in enumerate(codes) if c is None]
        return f"rank {', '.join(hung)} did not answer" if hung else "the ranks lost each other"
    return f"rank {rank} {how_ended(code) if code < 0 else f'failed (exit status {code})'}"


def _end(processes: Sequence[Child]) -> int:
    """End all that are still running, and wait for them."""
    for p in processes:
        if p.poll() is None:
            p.terminate()
    deadline = time.monotonic() + GRACE_S
    for p in processes:
        if p.wait(max(0.1, deadline - time.monotonic())) is None:
            p.kill()
            p.wait()
    return RESUME_EXIT
