"""A process alongside a training run that measures its learning curves: `clbench eval --curves --follow`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clbench.checkpoints.kept import CURVES
from clbench.checkpoints.run_folder import as_argument
from clbench.checkpoints.trusted import given
from clbench.errors import UserError
from clbench.processes import Child, start_command
from clbench.stopping import Stop
from clbench.terminal import last_line, tell

LOG = "curves.log"
EVERY_S = 10.0  # between two lines about what is still to be measured
END_S = 30.0  # for a player that was asked to stop, to record the episodes that have ended


class CurvePlayer:
    """The process. Training continues whatever happens to it; `wait` reports its failure."""

    def __init__(self, run: Path, visits: int) -> None:
        self.run, self.visits, self.log = run, visits, run / LOG
        trust = [f"--trust={name}" for name in (*given().folders, *given().types)]
        arguments = ["eval", "--run-id", str(run), "--curves", "--follow", "--workers", "1", *trust]
        with self.log.open("a", encoding="utf-8") as log:
            self.process: Child = start_command(arguments, log=log, session=True)
        tell(f"learning curves are measured alongside training, with the output in {self.log}")

    def wait(self, stop: Stop) -> None:
        """Wait until all curves are measured.

        Raises:
            UserError: they were not, although training has ended.
            Interrupted: a signal asked to stop; finished episodes are kept.
        """
        again = f"Measure what is missing with: clbench eval --run-id {as_argument(self.run)} --curves"
        asked = time.monotonic()
        while self.process.poll() is None:
            stop.check(f"Training is complete, and finished episodes are kept. {again}")
            if time.monotonic() - asked >= EVERY_S:
                asked = time.monotonic()
                done = sum((self.run / CURVES / f"k{k:02d}.json").is_file() for k in range(self.visits))
                tell(f"  learning curves: {done} of {self.visits} tasks are measured; {last_line(self.log)}")
            time.sleep(0.1)
        if self.process.returncode:
            why = last_line(self.log) or "their process failed"
            raise UserError(
                f"training is complete, but its learning curves are not: {why} (its output is in {self.log}). {again}"
            )

    def end(self) -> None:
        """End it, whatever it is doing."""
        if self.process.poll() is None:
            self.process.terminate()
            if self.process.wait(END_S) is None:
                self.process.kill()
                self.process.wait()


@contextmanager
def playing_curves(run: Path, visits: int, wanted: bool) -> Iterator[CurvePlayer | None]:
    """If `wanted`, a player of a run's curves, one per visit, while the block runs; it ends with the block."""
    player = CurvePlayer(run, visits) if wanted else None
    try:
        yield player
    finally:
        if player is not None:
            player.end()
