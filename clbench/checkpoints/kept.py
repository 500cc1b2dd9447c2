"""Weights that are kept during a task's training, to be evaluated later.

    weights/task_00/curve.json          {"steps": all of the task's, "points": [0, 30, …, steps]}
    weights/task_00/step_000030/        policy/, algorithm.*, training.*, checkpoint.json: as in a checkpoint

Steps are those of the phases that train the policy, counted from the task's start. `points` are those of the learning
curve. Point 0 is the checkpoint before the task (or the base) and the last point the task's own checkpoint: neither is
kept twice. Weights that only a learning curve needs are removed when it has been measured (evaluation/curves.py).
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clbench.checkpoints.whole import DESCRIPTION, write_whole
from clbench.errors import UserError
from clbench.io import read_json, write_json

FOLDER = "weights"
CURVE = "curve.json"
CURVES = Path("eval") / "curves"  # in a run: curves that have been measured


def curve_points(steps: int, parts: int | None, every: int | None) -> list[int]:
    """Steps at which a learning curve over `steps` steps is measured: 0, the ends of `parts` equal parts or every
    `every` steps, and `steps`."""
    if parts is not None:
        return [(2 * i * steps + parts) // (2 * parts) for i in range(parts + 1)]
    return [*range(0, steps, every or steps), steps]


def kept_folder(run: Path, k: int, step: int) -> Path:
    """Where the weights after `step` steps of visit k are."""
    return run / FOLDER / f"task_{k:02d}" / f"step_{step:06d}"


def read_points(run: Path, k: int) -> list[int] | None:
    """The steps at which visit k's learning curve is measured, including 0 and the last; None = it has none.

    Raises UserError when the file is damaged.
    """
    path = run / FOLDER / f"task_{k:02d}" / CURVE
    if not path.is_file():
        return None
    found = read_json(path)
    points = found.get("points") if isinstance(found, dict) else None
    points = points if isinstance(points, list) else []
    good = len(points) >= 2 and all(type(p) is int for p in points) and points[0] == 0
    if not good or any(a >= b for a, b in itertools.pairwise(points)):
        raise UserError(f"{path} is damaged: its points are not increasing steps from 0. Remove it to go without.")
    return list(points)


def curves_lack(run: Path, visits: int) -> bool:
    """Whether the learning curve of any of the run's visits has not been fully measured."""
    return not all((run / CURVES / f"k{k:02d}.json").is_file() for k in range(visits))


def kept_steps(run: Path, k: int) -> list[int]:
    """Steps of visit k whose weights are stored."""
    return sorted(int(p.parent.name.removeprefix("step_")) for p in kept_folder(run, k, 0).parent.glob(
        f"step_*/{DESCRIPTION}") if p.parent.name.removeprefix("step_").isdecimal())  # fmt: skip


class WeightKeeper:
    """Decides which steps of a task are kept, and keeps them.

    Args:
        parts: train.eval_during_training.
        every: train.keep_weights_every_steps.
    """

    def __init__(self, run: Path, parts: int | None, every: int | None) -> None:
        self.run, self.parts, self.every = run, parts, every
        self._due: set[int] = set()
        self._k = 0

    def begin(self, k: int, steps: int, done: int | None, write: bool) -> None:
        """Training of visit k (`steps` steps) begins, from its start (None) or after `done` steps.

        Args:
            write: this process writes, and removes what an earlier session kept of steps that are repeated.

        Raises:
            UserError: the task has fewer steps than the learning curve has parts.
        """
        self._k, self._due = k, set()
        if write:
            self._forget(k, done)
        if not steps or (self.parts is None and self.every is None):
            return
        if self.parts is not None and self.parts > steps:
            raise UserError(
                f"train.eval_during_training ({self.parts}) divides a task's steps, but this one trains for {steps}."
            )
        within = None if done is None else read_points(self.run, k)
        points = within or curve_points(steps, self.parts, self.every)
        self._due = set(points if within or self.parts is not None else ())
        if self.every is not None:
            self._due |= set(range(self.every, steps, self.every))
        self._due -= {0, steps}
        if write and within is None:
            write_json(kept_folder(self.run, k, 0).parent / CURVE, {"steps": steps, "points": points})

    def _forget(self, k: int, done: int | None) -> None:
        """Remove what an earlier session kept of what is trained again, with other settings maybe."""
        for folder in (self.run / FOLDER).glob("task_*"):
            number = folder.name.removeprefix("task_")
            if number.isdecimal() and (int(number) > k or (int(number) == k and done is None)):
                shutil.rmtree(folder)
        for step in kept_steps(self.run, k):
            if done is not None and step > done:
                shutil.rmtree(kept_folder(self.run, k, step))

    def due(self, first: int, last: int) -> list[int]:
        """The steps in (first, last] to keep."""
        return sorted(s for s in self._due if first < s <= last)

    def keep(self, step: int, fill: Callable[[Path], dict[str, Any]], size: Callable[[], int]) -> None:
        """Let `fill` write the weights after `step` steps and return what else describes them."""
        write_whole(
            kept_folder(self.run, self._k, step),
            lambda folder: {"k": self._k, "step": step, **fill(folder)},
            size,
        )
