"""Stopping cleanly: the first SIGINT or SIGTERM is noted, so that work can end where nothing is lost."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from clbench.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
AGAIN_S = 0.1  # after which a signal that came during an import is looked at again
SAME_S = 0.5  # signals so close together are one request: terminals and launchers signal a process and its children


def say(line: str) -> None:
    """Print a line from a signal's handler. No print(): the signal may have come in the middle of one."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{line}\n".encode())


class Stop:
    """Whether a signal asked to stop. The kernel also sends one when the parent has ended (processes.py)."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._since = 0.0

    @property
    def reason(self) -> str:
        """The reason to stop, or ""."""
        return "" if self.signal is None else self.signal.name

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: note the first; a later one ends the process at once."""
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), now
            say(f"{self.signal.name}: stopping cleanly; again to stop at once.")
        elif now - self._since > SAME_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def check(self, kept: str) -> None:
        """Raise Interrupted, whose message ends with `kept`, when a signal asked to stop."""
        if self.signal is not None:
            raise Interrupted(f"stopped by {self.signal.name}. {kept}")


@contextlib.contextmanager
def stoppable() -> Iterator[Stop]:
    """Note signals while the block runs. Signals that are ignored (`nohup`, a script's background job) stay ignored."""
    stop = Stop()
    before = {}
    if threading.current_thread() is threading.main_thread():  # other threads cannot, and get no signals
        wanted = [s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
        before = {s: signal.signal(s, stop.note) for s in wanted}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Interrupt:
    """Handles signals by raising KeyboardInterrupt, once no import is under way; a second signal ends the process.

    Libraries swallow what is raised while they are imported, or make another error of it: they catch everything, or
    Python is in a callback of its own, where it only prints "Exception ignored".
    """

    def __init__(self) -> None:
        self._since = 0.0  # when a signal came in the middle of an import; 0: none waits to be acted on
        self._again = False  # the next signal is our own

    def __call__(self, number: int, frame: FrameType | None) -> None:
        again, self._again = self._again, False
        if again and not self._since:
            return  # it has been acted on
        if not _importing(frame):
            self._since = 0.0
            raise KeyboardInterrupt
        now = time.monotonic()
        if not self._since:
            self._since = now
            say(f"{signal.Signals(number).name}: stopping once the libraries are loaded; again to stop at once.")
        elif not again:
            if now - self._since > SAME_S:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return  # one that waits already
        timer = threading.Timer(AGAIN_S, self._once_more, (number,))
        timer.daemon = True
        timer.start()

    def _once_more(self, number: int) -> None:
        self._again = True
        main = threading.main_thread().ident
        assert main is not None  # it runs
        signal.pthread_kill(main, number)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def interruptible(*also: signal.Signals) -> Iterator[None]:
    """Make SIGINT, and the signals `also`, raise KeyboardInterrupt, but not in the middle of an import.

    Signals that are handled otherwise already, or ignored, stay so.
    """
    handler = _Interrupt()
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, *also):
            usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            if signal.getsignal(number) is usual:
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def clearing_away() -> contextlib.AbstractContextManager[None]:
    """Make SIGTERM raise KeyboardInterrupt, as SIGINT does: what the block has begun to write is removed."""
    return interruptible(signal.SIGTERM)


def belong_to(parent: int) -> None:
    """Leave signals to the process `parent`, which may get them too, and die when it dies, even in an endless call."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # blocked by the parent while this process started
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it has died already


def how_ended(status: int | None) -> str:
    """Return in words how a process ended, from its exit status (-number: by a signal)."""
    if status is not None and status < 0:
        name = signal.Signals(-status).name
        often = {"SIGKILL": " (often: out of memory)", "SIGBUS": " (often: /dev/shm is full)"}
        return f"was killed by {name}{often.get(name, '')}"
    return f"ended its process (exit status {status})"
