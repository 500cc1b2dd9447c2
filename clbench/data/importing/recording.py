"""What the reader of a format provides for an import: features by name, and episodes with their values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

IMAGE, NUMBER, TEXT = "image", "number", "text"
Orientation = Literal["as_is", "rotate", "flip", "mirror"]
ORIENTATIONS: tuple[Orientation, ...] = ("as_is", "rotate", "flip", "mirror")
MAX_PIXELS = 4096  # along a side of an image


@dataclass(frozen=True)
class Feature:
    """A feature of a recording.

    Attributes:
        kind: IMAGE (3 channels, uint8), NUMBER or TEXT, which can be mapped; anything else says why it cannot.
        shape: of one frame's value; -1 where that is not known.
    """

    kind: str
    shape: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind} {self.shape}" if self.shape else self.kind

    @property
    def width(self) -> int:
        """How many numbers one frame has."""
        return int(np.prod(self.shape, dtype=np.int64))


class Episode(Protocol):
    """One episode. Every method raises UserError where its file is damaged or lacks the feature.

    Attributes:
        where: file and place in it, for messages.
    """

    where: str

    def numbers(self, feature: str) -> np.ndarray:
        """Return a NUMBER's values, (frames, width) float64."""

    def count(self, feature: str) -> int:
        """Return how many frames an IMAGE has."""

    def images(self, feature: str) -> Iterator[np.ndarray]:
        """Yield an IMAGE's frames, uint8 (height, width, 3), oriented as a policy is to see them."""

    def texts(self, feature: str, frames: int) -> list[str]:
        """Return a TEXT's values, one for each of the episode's frames."""


@dataclass(frozen=True)
class Defaults:
    """What becomes what unless a user says otherwise: features by their names in the recording.

    Attributes:
        cameras: name of the image in the new set → feature.
        state, action: alternatives, of which the first one counts whose features are all there.
        task: likewise, for the instruction.
        fps: frames a second; None: the format does not say.
    """

    cameras: Mapping[str, str]
    state: tuple[tuple[str, ...], ...]
    action: tuple[tuple[str, ...], ...]
    task: tuple[str, ...]
    fps: int | None = None


class Recording(Protocol):
    """A folder of recorded episodes in some format."""

    @property
    def format(self) -> str:
        """Its name for `--from`."""

    @property
    def folder(self) -> Path:
        """What the names of files are relative to."""

    @property
    def features(self) -> Mapping[str, Feature]:
        """What every frame has."""

    @property
    def defaults(self) -> Defaults:
        """What becomes what."""

    @property
    def episodes(self) -> int:
        """How many there are."""

    @property
    def notes(self) -> Mapping[str, str]:
        """Name → what was found about the format's own conventions, for the card."""

    def read(self, check: bool) -> Iterator[Episode]:
        """Yield all episodes in order. `check`: compare the files with their own checksums, where they have some."""

    def digests(self) -> dict[str, tuple[int, str]]:
        """Return path below `folder` → bytes and sha256 of all that was read, after a complete `read(check=False)`."""


def turned(image: np.ndarray, orientation: Orientation) -> np.ndarray:
    """Return an image (height, width, 3) as it is, rotated by 180°, upside down, or with left and right exchanged."""
    if orientation == "as_is":
        return image
    rows = -1 if orientation in ("rotate", "flip") else 1
    columns = -1 if orientation in ("rotate", "mirror") else 1
    return np.ascontiguousarray(image[::rows, ::columns])
