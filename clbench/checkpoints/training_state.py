"""Training states: what a run needs to resume in the middle of a task as if it had never stopped.

    training_state/<k>-<phase>-<step>/     `step` steps of that phase of visit k are done; the last two are kept
        policy/                            as in a checkpoint
        algorithm.json, .safetensors       the algorithm's state_dict
        training.json, .safetensors        optimizer moments and counters
        checkpoint.json                    position, checksums of all files, length of log.jsonl, seconds so far
    training_state/LATEST                  the newest one's name

Random numbers need no state: every draw is a function of (seed, k, phase, step).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clbench.checkpoints.whole import DESCRIPTION, damage, write_whole
from clbench.errors import UserError
from clbench.io import read_json, read_text, write_text
from clbench.terminal import tell

FOLDER = "training_state"
LATEST = "LATEST"
KEEP = 2


@dataclass(frozen=True)
class Position:
    """How far a run has got.

    Attributes:
        k: the visit that is under way, or comes next.
        source: what holds policy and state: a training state, or the checkpoint before visit k; None = the base.
        phase, step: the phase under way and its steps done; "" = visit k has not begun.
    """

    k: int = 0
    source: Path | None = None
    phase: str = ""
    step: int = 0


class StateKeeper:
    """Decides when a state is due, writes it, and keeps the last two."""

    def __init__(self, folder: Path, every_steps: int | None, every_minutes: float | None) -> None:
        self.folder = folder / FOLDER
        self.every_steps, self.every_minutes = every_steps, every_minutes
        self.seconds = 0.0  # spent on saving
        self._damaged: list[Path] = []
        self._last = time.monotonic()

    def due(self, total_steps: int, step: int = 0, every: int | None = None) -> bool:
        """Whether it is time to save, after `total_steps` steps of the run and `step` of a phase.

        `every`: steps of the phase between states; None = the run's setting for all phases.
        """
        steps, every = (total_steps, self.every_steps) if every is None else (step, every)
        if every is not None and steps % every == 0:
            return True
        return self.every_minutes is not None and time.monotonic() - self._last >= 60 * self.every_minutes

    def saved(self, began: float) -> None:
        """Something newer was saved just now, from `began` (time.monotonic) on."""
        self._last = time.monotonic()
        self.seconds += self._last - began

    def save(
        self, k: int, phase: str, step: int, total: int, fill: Callable[[Path], dict[str, Any]], size: Callable[[], int]
    ) -> Path:
        """Let `fill` write a state and return what else describes it; then drop all but the last two."""
        began = time.monotonic()
        name = _name(k, phase, step)

        def describe(folder: Path) -> dict[str, Any]:
            return {"k": k, "phase": phase, "step": step, "total_steps": total, **fill(folder)}

        write_whole(self.folder / name, describe, size)
        write_text(self.folder / LATEST, name + "\n")
        others = sorted((p for p in self._all() if p.name != name), key=_total, reverse=True)
        for old in others[KEEP - 1 :]:
            shutil.rmtree(old, ignore_errors=True)
        self.saved(began)
        return self.folder / name

    def clear(self, position: Position) -> None:
        """Drop what is useless when the run resumes at `position`: later and damaged states, leftovers of kills."""
        if not self.folder.is_dir():
            return
        now = (position.k, _total(position.source) if position.phase and position.source else -1)
        for path in self.folder.iterdir():
            if path.name == LATEST:
                continue
            if not path.is_dir():
                path.unlink()
            elif path.name.startswith(".") or path in self._damaged or (_visit(path), _total(path)) > now:
                shutil.rmtree(path)

    def remove(self) -> None:
        """The run is complete: no state is needed any more."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def newest(self, k: int) -> Position | None:
        """The newest complete state of visit k. Damaged ones are reported and left out."""
        states = sorted(self._all(), key=_total, reverse=True)
        try:
            latest = read_text(self.folder / LATEST, limit=1000).strip()
        except UserError:
            latest = ""  # then the newest one by its description
        states.sort(key=lambda p: p.name != latest)
        for folder in states:
            reason = damage(folder)
            d = {} if reason else read_json(folder / DESCRIPTION)
            kinds = {"k": int, "phase": str, "step": int, "total_steps": int}
            if reason is None and not all(isinstance(d.get(key), kind) for key, kind in kinds.items()):
                reason = f"{DESCRIPTION} does not describe a training state"
            if reason is None and folder.name != _name(d["k"], d["phase"], d["step"]):
                reason = f"it is a copy of {_name(d['k'], d['phase'], d['step'])}"
            if reason is not None:
                self._damaged.append(folder)
                tell(f"warning: training state {folder} is damaged ({reason}); using what was saved before it.")
                continue
            if d["k"] == k:
                return Position(d["k"], folder, d["phase"], d["step"])
        return None

    def _all(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [p for p in self.folder.iterdir() if p.is_dir() and not p.name.startswith(".")]


def _name(k: int, phase: str, step: int) -> str:
    return f"{k:02d}-{phase}-{step:06d}"


def _total(folder: Path) -> int:
    return _number(folder, "total_steps")


def _visit(folder: Path) -> int:
    return _number(folder, "k")


def _number(folder: Path, key: str) -> int:
    try:
        return int(read_json(folder / DESCRIPTION)[key])
    except (UserError, KeyError, TypeError, ValueError):
        return -1
