"""What plays the rows of a matrix: the run's checkpoints, weights kept within tasks, its base, or random actions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clbench.checkpoints.base import find_base
from clbench.checkpoints.kept import kept_folder
from clbench.checkpoints.run_folder import as_argument, checkpoint_damage, checkpoint_folder, read_checkpoint
from clbench.checkpoints.whole import DESCRIPTION, damage
from clbench.errors import UserError
from clbench.evaluation.records import BASE, RANDOM


@dataclass(frozen=True)
class Weights:
    """A policy to be played.

    Attributes:
        policy: its folder; None = random actions.
        state: the folder with the algorithm's state; None = the policy is played as it is, without an algorithm.
        within: it is from the middle of a task, and is played as it trains: without the algorithm's evaluation view.
    """

    policy: str | None
    state: str | None = None
    within: bool = False


class Checkpoints:
    """Row k is the checkpoint after visit k; BASE and RANDOM are the rows before the stream.

    Args:
        folder: the run's folder.
        count: how many checkpoints there are, counted from the first.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], count: int) -> None:
        self.folder, self.manifest, self.count = folder, manifest, count

    def weights(self, row: int) -> Weights:
        if row == RANDOM:
            return Weights(None)
        if row == BASE:
            return Weights(str(find_base(self.manifest["base"], self.folder, f"run {self.folder.name} is")))
        checkpoint = checkpoint_folder(self.folder, row)
        return Weights(f"{checkpoint}/policy", str(checkpoint))

    def check(self, row: int) -> None:
        """Raise UserError if any byte of a row's weights has changed since it was saved."""
        reason = checkpoint_damage(self.folder, row) if row >= 0 else None
        if reason is not None:
            here = checkpoint_folder(self.folder, row)
            raise UserError(
                f"{here} is damaged ({reason}). Restore the file from a copy, or remove the checkpoints from "
                f"{here.name} on and make them again: clbench train --resume {as_argument(self.folder)}"
            )

    def place(self, row: int) -> str:
        """The row's weights, as named in messages."""
        return str(checkpoint_folder(self.folder, row))

    def digests(self) -> list[str | None]:
        """What identifies each row's weights; None = not known."""
        return [read_checkpoint(checkpoint_folder(self.folder, k)).get("digest") for k in range(self.count)]


class Kept(Checkpoints):
    """Row r is visit k after s of its steps, (k, s) = `places[r]`: s = 0 is the checkpoint before it, s = `steps[k]`
    its own."""

    def __init__(
        self, folder: Path, manifest: dict[str, Any], places: Sequence[tuple[int, int]], steps: dict[int, int]
    ) -> None:
        super().__init__(folder, manifest, len(places))
        self.places, self.steps = list(places), steps

    def _checkpoint(self, row: int) -> int | None:
        """The checkpoint behind a row; BASE = the base; None = weights within a task."""
        k, step = self.places[row]
        if step == self.steps[k]:
            return k
        if step:
            return None
        return BASE if self.manifest["mode"] == "singletask" else k - 1  # also BASE, for visit 0

    def _folder(self, row: int) -> Path:
        return kept_folder(self.folder, *self.places[row])

    def there(self, row: int) -> bool:
        """Whether the row's weights are on disk."""
        checkpoint = self._checkpoint(row)
        if checkpoint == BASE:
            return True
        folder = self._folder(row) if checkpoint is None else checkpoint_folder(self.folder, checkpoint)
        return (folder / DESCRIPTION).is_file()

    def weights(self, row: int) -> Weights:
        checkpoint = self._checkpoint(row)
        if checkpoint is not None:
            return super().weights(checkpoint)
        return Weights(f"{self._folder(row)}/policy", str(self._folder(row)), within=True)

    def check(self, row: int) -> None:
        checkpoint = self._checkpoint(row)
        if checkpoint is not None:
            super().check(checkpoint)
            return
        reason = damage(self._folder(row))
        if reason is not None:
            raise UserError(
                f"{self._folder(row)} is damaged ({reason}). Restore the file from a copy, or remove that folder: "
                "without these weights, the learning curve that needs them stays incomplete."
            )

    def place(self, row: int) -> str:
        checkpoint = self._checkpoint(row)
        return super().place(checkpoint) if checkpoint is not None else str(self._folder(row))

    def digests(self) -> list[str | None]:
        found: list[str | None] = []
        for row in range(self.count):
            checkpoint = self._checkpoint(row)
            folder = self._folder(row) if checkpoint is None else checkpoint_folder(self.folder, checkpoint)
            known = checkpoint != BASE and (folder / DESCRIPTION).is_file()
            found.append(read_checkpoint(folder).get("digest") if known else None)
        return found
