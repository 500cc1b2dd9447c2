"""The mean camera images of a run's demonstrations: what a policy is shown in the view "blind"."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from clbench.errors import UserError
from clbench.io import read_bytes, write_bytes

FILE = "mean_images.safetensors"


def write_mean_images(folder: Path, images: dict[str, np.ndarray]) -> None:
    """Keep the images, uint8 (height, width, 3) by their features' names, in a run's folder."""
    write_bytes(folder / FILE, save(images))


def read_mean_images(folder: Path) -> dict[str, np.ndarray]:
    """Return the mean images of the run in `folder`.

    Raises:
        UserError: there are none: the run has no cameras, or is older than the view.
    """
    if not (folder / FILE).is_file():
        raise UserError(
            f"run {folder.name} has no {FILE}, which the view 'blind' shows the policy: it was trained by an earlier "
            "version. `clbench train --resume` of an unfinished run writes it; a finished one has to be trained again."
        )
    try:
        images: dict[str, np.ndarray] = load(read_bytes(folder / FILE))
    except (SafetensorError, KeyError, ValueError, TypeError) as e:
        raise UserError(f"cannot read {folder / FILE}: {e}. The file is damaged.") from e
    for key, image in images.items():
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UserError(f"{folder / FILE}: {key} is no image. The file is damaged.")
    return images
