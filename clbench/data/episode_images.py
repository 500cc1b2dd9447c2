"""Camera images on their way from the simulator to a data set: one archive of PNG files per episode.

A full set does not fit in memory (two cameras at 256 pixels: 0.4 MB a step), so images are written as they are taken.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from clbench.envs.base import Observation


class EpisodeImages:
    """Writes one episode's images to `path`. Call `add` for every observation, then `close` or `discard`."""

    def __init__(self, path: Path, cameras: Sequence[str]) -> None:
        self.path, self.cameras = path, list(cameras)
        self._archive = zipfile.ZipFile(path, "w")  # stored: PNG files are compressed already
        self._digests = {camera: hashlib.sha256() for camera in cameras}
        self._frames = 0

    def add(self, observation: Observation) -> None:
        """Write the images of one observation, uint8 (height, width, 3)."""
        for camera in self.cameras:
            image = observation[camera]
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG", compress_level=1)
            self._archive.writestr(_entry(camera, self._frames), buffer.getvalue())
            self._digests[camera].update(image.tobytes())
        self._frames += 1

    def close(self) -> list[str]:
        """Complete the file; returns the sha256 of each camera's pixels, in the order of the cameras."""
        self._archive.close()
        return [self._digests[camera].hexdigest() for camera in self.cameras]

    def discard(self) -> None:
        """Remove the file."""
        self._archive.close()
        self.path.unlink()


def _entry(camera: str, frame: int) -> str:
    return f"{camera}/{frame:06d}.png"


def read_images(path: Path, cameras: Sequence[str], frames: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield the images of each of an episode's `frames` steps, as they were given to `EpisodeImages`."""
    with zipfile.ZipFile(path) as archive:
        for frame in range(frames):
            yield {camera: decoded(archive.read(_entry(camera, frame))) for camera in cameras}


def decoded(png: bytes) -> np.ndarray:
    """Return the pixels (height, width, 3) of a PNG file, uint8."""
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB"))
