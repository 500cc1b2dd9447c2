"""SIGTERM and SIGINT: the first asks to save and stop, the second stops at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

from clbench.launch import LAUNCHER

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Listens inside a `with` block; `reason` says why to stop, or is empty."""

    def __init__(self) -> None:
        self._signal = ""
        self._before: dict[signal.Signals, Any] = {}
        self._launcher = int(os.environ.get(LAUNCHER, "0"))

    @property
    def reason(self) -> str:
        if self._launcher and os.getppid() != self._launcher:
            return self._signal or "the end of what started the ranks"
        return self._signal

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only there Python handles signals
            for s in SIGNALS:
                if signal.getsignal(s) is not signal.SIG_IGN:
                    self._before[s] = signal.signal(s, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal:
            self.__exit__()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._signal = signal.Signals(number).name
        if os.environ.get("RANK", "0") == "0":  # no print(): this may have come in the middle of one
            os.write(2, f"{self._signal}: saving after this step, then stopping; again to stop at once.\n".encode())
