"""Processes for tests that need LeRobot in one: forked by the server of this test session instead of importing anew."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clbench import processes

ROOT = Path(__file__).resolve().parents[1]


class Process:
    """A process whose output goes to a file."""

    def __init__(
        self, out: Path, function: Callable[..., Any], *args: Any, env: Mapping[str, str] | None = None
    ) -> None:
        self.out = out
        with out.open("ab") as file:
            descriptors = [file.fileno()]
            self.child = processes.start(_run, function, args, dict(env or {}), fds=descriptors, threads=1)

    def finish(self, seconds: float) -> str:
        """What it printed, when it has ended; it is killed when it has not after `seconds`."""
        if self.child.wait(seconds) is None:
            self.child.kill()
            self.child.wait()
        return self.out.read_text(errors="replace")

    @property
    def returncode(self) -> int | None:
        return self.child.returncode


def run_module(name: str, arguments: Sequence[str]) -> None:
    """`python -m NAME ARGUMENTS`, in a process that was started."""
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _run(descriptors: list[int], function: Callable[..., Any], args: tuple[Any, ...], env: dict[str, str]) -> None:
    os.dup2(descriptors[0], 1)
    os.dup2(descriptors[0], 2)
    os.environ.update(env)
    os.chdir(ROOT)
    function(*args)
