"""Augmentation of camera images, for whole batches on the training device, and the centre crop that acting sees.

Every image of a sample is changed by uniform numbers u in [−1, 1], which are part of the sample's draw
(clbench.policies.view): so they are a function of (seed, visit, phase, step, slot), and fixed wherever a method
compares losses under one draw. With x and y in image widths, from the centre, and a colour c in [0, 1]³:

    where    (x, y) ← √crop · (x, y) + ((1 − √crop) / 2 + shift) · (u₁, u₂)     beyond the edge, the edge repeats
    colour   c ← b · c,                         b = 1 + brightness · u₃
             c ← ȳ + k (c − ȳ),                 k = 1 + contrast · u₄,    ȳ the image's mean luminance
             c ← y(c) + s (c − y(c)),           s = 1 + saturation · u₅,  y(c) its luminance
             c ← its chroma (I, Q of YIQ) turned by 2π · hue · u₆; then clipped to [0, 1]

Where nothing is cropped, shifts are whole pixels, so that no image is blurred. In acting only the crop remains: its
window is in the middle (`CentreCropProcessorStep`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lerobot.configs import PipelineFeatureType, PolicyFeature
from lerobot.processor import ObservationProcessorStep, ProcessorStepRegistry
from torch import Tensor

from clbench.config.schema import AugmentConfig
from clbench.data.frames import Batch, is_image

NUMBERS = 6  # uniform numbers per sample and camera
LUMINANCE = (0.299, 0.587, 0.114)
YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
CROP_STEP = "clbench_centre_crop"


class Augmentation:
    """Changes the images of processed samples by the numbers of a draw.

    Args:
        config: how strongly.
        cameras: keys of the images, in the order in which numbers are drawn.
    """

    def __init__(self, config: AugmentConfig, cameras: list[str]) -> None:
        self.config, self.cameras = config, sorted(cameras)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, cameras, 6) numbers, uniform in [−1, 1]."""
        return 2 * torch.rand(n, len(self.cameras), NUMBERS, generator=generator) - 1

    def __call__(self, batch: Batch, numbers: Tensor) -> Batch:
        """The batch with images (B, C, H, W) or (B, T, C, H, W) in [0, 1] changed; all of a sample's T alike."""
        out = dict(batch)
        for i, camera in enumerate(self.cameras):
            image = batch[camera]
            u = numbers[:, i].to(image.device, non_blocking=True)
            if image.ndim == 5:
                steps = image.shape[1]
                u = u.repeat_interleave(steps, 0)
                out[camera] = self._change(image.flatten(0, 1), u).unflatten(0, (-1, steps))
            else:
                out[camera] = self._change(image, u)
        return out

    def _change(self, x: Tensor, u: Tensor) -> Tensor:
        c = self.config
        if c.shift or c.crop < 1:
            side = math.sqrt(c.crop)
            moved = ((1 - side) / 2 + c.shift) * u[:, :2]
            if c.crop == 1:
                size = torch.tensor([x.shape[-1], x.shape[-2]], device=x.device)
                moved = (moved * size).round() / size
            x = window(x, side, moved)
        if c.brightness or c.contrast or c.saturation or c.hue:
            x = self._recolour(x, u)
        return x

    def _recolour(self, x: Tensor, u: Tensor) -> Tensor:
        c = self.config
        b, k, s = (1 + amount * u[:, i] for i, amount in ((2, c.brightness), (3, c.contrast), (4, c.saturation)))
        weights = torch.tensor(LUMINANCE, device=x.device)
        mean = torch.einsum("nchw,c->n", x, weights) / (x.shape[-1] * x.shape[-2])
        to_yiq = torch.tensor(YIQ, device=x.device)
        angle = 2 * math.pi * c.hue * u[:, 5]
        turn = torch.zeros(len(x), 3, 3, device=x.device)
        turn[:, 0, 0] = 1
        turn[:, 1, 1] = turn[:, 2, 2] = s * angle.cos()
        turn[:, 1, 2], turn[:, 2, 1] = -s * angle.sin(), s * angle.sin()
        colours = torch.linalg.inv(to_yiq) @ turn @ to_yiq  # saturation and hue leave luminance alone
        grey = ((1 - k) * b * mean)[:, None, None, None]
        changed = torch.einsum("nij,njhw->nihw", (b * k)[:, None, None] * colours, x)
        return (changed + grey).clamp(0, 1)


def window(x: Tensor, side: float, centre: Tensor) -> Tensor:
    """Images (B, C, H, W) as seen through a window of `side` × `side` widths, at their own size, bilinear.

    Args:
        centre: (B, 2) the window's centre, (x, y) from the images' centre, in widths and heights. Beyond the edge, the
            edge repeats.
    """
    theta = torch.zeros(len(x), 2, 3, device=x.device)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, :, 2] = 2 * centre
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


@dataclass
@ProcessorStepRegistry.register(name=CROP_STEP)
class CentreCropProcessorStep(ObservationProcessorStep):
    """Acting's view of a policy that was trained on random crops: the middle `area` of each image, at its size.

    `training`: do nothing, because augmentation crops; never saved.
    """

    area: float = 1.0
    training: bool = False

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        if self.training:
            return observation
        found = dict(observation)
        for key, image in observation.items():
            if is_image(key) and torch.is_tensor(image):
                flat = image.flatten(0, -4) if image.ndim > 4 else image.reshape(-1, *image.shape[-3:])
                middle = torch.zeros(len(flat), 2, device=image.device)
                found[key] = window(flat, math.sqrt(self.area), middle).reshape(image.shape)
        return found

    def get_config(self) -> dict[str, Any]:
        return {"area": self.area}

    def transform_features(
        self, features: dict[PipelineFeatureType, dict[str, PolicyFeature]]
    ) -> dict[PipelineFeatureType, dict[str, PolicyFeature]]:
        return features


def centre_crop(preprocessor: Any, area: float) -> None:
    """Have a policy's preprocessor crop images to their middle `area` in acting, as training on such crops needs."""
    steps = [s for s in preprocessor.steps if not isinstance(s, CentreCropProcessorStep)]
    preprocessor.steps = [CentreCropProcessorStep(area), *steps] if area < 1 else steps


def set_training(preprocessor: Any, training: bool) -> None:
    """Whether the preprocessor's centre crop stands aside for augmentation's."""
    for step in preprocessor.steps:
        if isinstance(step, CentreCropProcessorStep):
            step.training = training
