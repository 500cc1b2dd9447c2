"""What a frozen image encoder makes of raw images, always in the same way: for keeping it on disk.

Images go through the policy's preprocessor (a centre crop, say) and its encoder, in batches of a fixed size and in
fp32 whatever the training's precision, so that a frame's features are the same whichever run makes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clbench.data.frames import Batch, unpacked

FORMAT = 1


class FrozenFeatures:
    """A `FrameEncoder` (data/frames.py) of a policy that has `frozen_cameras` and `image_encoder`."""

    def __init__(self, policy: Any, preprocessor: Callable[[Batch], Batch]) -> None:
        self.cameras: dict[str, str] = policy.frozen_cameras
        self._encoder, self._preprocessor = policy.image_encoder, preprocessor
        self.shape = (self._encoder.n_features, self._encoder.width)
        self._weights = ""

    @property
    def _device(self) -> torch.device:
        return next(self._encoder.parameters()).device

    def identity(self, camera: str) -> str:
        """sha256 of the encoder's weights and settings, the preprocessor's steps and its numbers for this camera."""
        if not self._weights:
            total = hashlib.sha256()
            for name, value in sorted(self._encoder.state_dict().items()):
                total.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
                total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            self._weights = total.hexdigest()
        steps: Any = self._preprocessor
        described = [[getattr(step, "_registry_name", type(step).__name__), step.get_config()] for step in steps.steps]
        numbers = {
            f"{i} {name}": value.tolist()
            for i, step in enumerate(steps.steps)
            for name, value in step.state_dict().items()
            if name.startswith(f"{camera}.")
        }
        known = [FORMAT, self._weights, self._encoder.settings(), self._device.type, described, numbers]
        return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()

    @torch.no_grad()
    def encode(self, camera: str, images: Tensor) -> Tensor:
        batch = self._preprocessor(unpacked({camera: images, "task": [""] * len(images)}, self._device))
        with torch.autocast(self._device.type, enabled=False):
            found: Tensor = self._encoder(batch[camera])
        return found.float().cpu()
