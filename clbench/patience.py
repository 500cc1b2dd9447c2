"""No long silence: what takes more than a few seconds is reported on stderr, and again every ten seconds.

    with patience("loading LeRobot"):
        import lerobot

Lines come from a thread, which exists only within such blocks. It also ends before this process is forked (os.fork,
multiprocessing's "fork"), so that no child inherits a lock that the thread holds, and restarts in the parent later.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from clbench.terminal import printable, tell

FIRST_S = 5.0  # until something counts as long
EVERY_S = 10.0  # between two lines

quiet = False  # whether nothing is printed: log.progress=quiet


@dataclass(eq=False)
class Patience:
    """What is going on, since when."""

    what: str
    more: Callable[[], str] | None
    say: Callable[[str], None]
    began: float

    def now(self, what: str) -> None:
        """From now on, something else is going on."""
        self.what, self.began = what, time.monotonic()


_under_way: list[Patience] = []  # the last one is what is going on now, nested in those before it
_change = threading.Condition()
_thread: threading.Thread | None = None
_last_line = -EVERY_S  # when the last line was printed, about anything


def say_line(line: str) -> None:
    """Print to stderr, above the progress bar if there is one."""
    if "tqdm" in sys.modules:  # else there is no bar, and importing it takes a while
        from tqdm import tqdm

        tqdm.write(printable(line), file=sys.stderr)
        sys.stderr.flush()
    else:
        tell(line)


@contextlib.contextmanager
def patience(
    what: str,
    more: Callable[[], str] | None = None,
    *,
    at_once: bool = False,
    say: Callable[[str], None] = say_line,
) -> Iterator[Patience]:
    """Report that `what` is going on if the block takes long, unless `quiet`. Of several ranks, only the first reports.

    Args:
        more: called for each line: how far it is ("" = not known).
        at_once: report at the start, too.
        say: prints a line, or draws a progress bar anew.
    """
    global _last_line
    here = Patience(what, more, say, time.monotonic())
    if quiet or os.environ.get("RANK", "0") != "0":
        yield here
        return
    if at_once:
        say(f"{what} …")
        _last_line = here.began
    with _change:
        _under_way.append(here)
        _start()
    try:
        yield here
    finally:
        with _change:
            if here in _under_way:  # not in a child that was forked within the block
                _under_way.remove(here)
            thread = None if _under_way else _let_go()
        if thread is not None:
            thread.join()


def _start() -> None:
    """Make the thread run; for the holder of `_change`."""
    global _thread
    if _thread is None:
        _thread = threading.Thread(target=_watch, name="patience", daemon=True)
        _thread.start()


def _watch() -> None:
    global _last_line
    me = threading.current_thread()
    while True:
        with _change:
            now = time.monotonic()
            if _thread is not me:
                return
            here = _under_way[-1]
            left = max(here.began + FIRST_S, _last_line + EVERY_S) - now
            if left > 0:  # what starts in the meantime is due even later
                _change.wait(left)
                continue
            _last_line, what, seconds = now, here.what, now - here.began
        text = f"{what} … {f'{seconds:.0f} s' if seconds < 120 else f'{seconds / 60:.1f} min'}"
        more = "" if here.more is None else here.more()
        try:
            here.say(f"{text}: {more}" if more else text)
        except (OSError, ValueError):  # nobody reads stderr any more
            return


def _let_go() -> threading.Thread | None:
    """Make the thread end, and return it; for the holder of `_change`."""
    global _thread
    thread, _thread = _thread, None
    _change.notify_all()
    return thread


def _before_fork() -> None:
    with _change:
        thread = _let_go()
    if thread is not None:
        thread.join()


def _in_parent() -> None:
    with _change:
        if _under_way:
            _start()


def _in_child() -> None:
    global _change
    _change = threading.Condition()
    _under_way.clear()


os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
