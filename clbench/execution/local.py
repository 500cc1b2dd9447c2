"""The executor for one machine: each command is a process, `parallel` at once."""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from clbench.errors import RESUME_EXIT
from clbench.execution.units import Statuses, Unit, admissible, leave_out
from clbench.processes import Child, server, start_command
from clbench.slots import VARIABLE, Slots
from clbench.stopping import Stop
from clbench.terminal import last_line, show

KEPT = "What is done is kept: run the same command again."
PROGRESS_SECONDS = 10.0


@dataclass
class _Running:
    """A unit whose command is under way."""

    unit: Unit
    process: Child
    slot: IO[bytes] | None
    said: str = ""


class LocalExecutor:
    """Runs commands on this machine.

    Running evaluations share the slots that nothing else needs (slots.py), so that no core is idle at the end.

    Args:
        parallel: number of commands at once.
        folder: where the slots' files are while it runs.
    """

    def __init__(self, parallel: int, folder: Path) -> None:
        self.parallel, self.folder = parallel, folder

    def run(self, units: Sequence[Unit], stop: Stop) -> Statuses:
        server()
        began: dict[str, float] = {}
        statuses: Statuses = {}
        with tempfile.TemporaryDirectory(prefix=".slots-", dir=self.folder) as folder:
            slots = Slots(Path(folder), self.parallel)
            held = {id(slot): slot for slot in iter(slots.take, None)}
            running: list[_Running] = []
            todo, asked, told = sorted(units, key=lambda u: u.order), time.monotonic(), False
            while todo or running:
                for job in list(running):
                    status = job.process.poll()
                    if status is None:
                        continue
                    running.remove(job)
                    statuses[job.unit.name] = status
                    if job.slot is not None:
                        held[id(job.slot)] = job.slot
                    if status in (130, RESUME_EXIT):  # stopped by someone else, or by the terminal
                        stop.signal = stop.signal or signal.SIGTERM
                    if stop.signal is None:
                        _tell_end(job.unit, status, units, began)
                if stop.signal is not None and not told:
                    for job in running:
                        job.process.terminate()
                    told, todo = True, []
                todo = leave_out(todo, statuses)
                for unit in admissible(todo, statuses):
                    alone = unit.cores == 0 or any(job.unit.cores == 0 for job in running)
                    if len(running) >= self.parallel or (alone and running):
                        break
                    todo.remove(unit)
                    slot = held.pop(next(iter(held))) if held else slots.take()
                    unit.log.parent.mkdir(parents=True, exist_ok=True)
                    with unit.log.open("a", encoding="utf-8") as log:
                        process = start_command(unit.arguments, log=log, env={VARIABLE: folder})
                    began.setdefault(unit.about, time.monotonic())
                    running.append(_Running(unit, process, slot))
                if not admissible(todo, statuses):
                    for free in held.values():  # for the evaluations that are running
                        free.close()
                    held.clear()
                if time.monotonic() - asked >= PROGRESS_SECONDS:
                    asked = time.monotonic()
                    _tell_progress(running)
                time.sleep(0.1)
            stop.check(KEPT)
        return statuses


def _tell_end(unit: Unit, status: int, units: Sequence[Unit], began: dict[str, float]) -> None:
    """Report that a run has ended: after its last command, or one that failed."""
    last = not any(u.about == unit.about and unit.name in u.after for u in units)
    if unit.kind in ("train", "evaluate") and (last or status):
        minutes = (time.monotonic() - began[unit.about]) / 60
        show(f"{'FAILED' if status else 'done'}: {unit.about} in {minutes:.1f} min")


def _tell_progress(running: Sequence[_Running]) -> None:
    for job in running:
        line = last_line(job.unit.log)
        if line and line != job.said:
            show(f"  {job.unit.about}: {line}")
            job.said = line
