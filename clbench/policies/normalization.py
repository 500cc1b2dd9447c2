"""Ranges of the data → [−1, 1], clipped, with a mask: two processor steps that any policy may have.

With the range [lo, hi] of each dimension, q01 to q99 (`quantiles`) or least to greatest value (`min_max`),

    x' = clip(2 (x − lo) / (hi − lo) − 1, −1, 1),   0 where lo = hi;   x = (x' + 1) / 2 · (hi − lo) + lo

and x' = x = unchanged where the mask is set. So unnormalise(normalise(x)) = clip(x, lo, hi). A policy's outputs are not
clipped: beyond ±1, actions go on in a straight line. LeRobot's own QUANTILES and MIN_MAX are the same without clip and
mask, except that they divide by 1e-8 where lo = hi.

The mask is set where the data has two values only, both in [−1, 1] and at least a half apart: a gripper's commands
(`unscaled` in data/statistics.py). They are learned as they are executed, and rare ones are not clipped away with the
outermost hundredths.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from lerobot.configs import FeatureType, PipelineFeatureType, PolicyFeature
from lerobot.lerobot_types import EnvTransition, TransitionKey
from lerobot.processor import ProcessorStep, ProcessorStepRegistry
from lerobot.utils.constants import ACTION
from torch import Tensor

from clbench.config.dit import RANGES
from clbench.data.statistics import unscaled

KEPT = ("min", "max", "q01", "q99", "mask")  # what a checkpoint holds of a feature's statistics


@dataclass
class _Ranges(ProcessorStep):
    """What both steps hold.

    Attributes:
        features: those that are scaled, with the shape of one frame's value.
        mode: quantiles | min_max, which statistics lo and hi are.
        stats: feature → "q01" and "q99", or "min" and "max", and "mask" or "binary" (both may be missing: no mask).
    """

    features: dict[str, PolicyFeature] = field(default_factory=dict)
    mode: str = "quantiles"
    stats: dict[str, dict[str, Any]] | None = None
    _kept: dict[str, dict[str, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.mode not in RANGES:
            raise ValueError(f"mode must be one of {', '.join(RANGES)}, is {self.mode!r}.")
        self.features = {
            k: PolicyFeature(FeatureType(f["type"]), tuple(f["shape"])) if isinstance(f, dict) else f
            for k, f in self.features.items()
        }
        for key, values in (self.stats or {}).items():
            if key in self.features:
                mask = values["mask"] if "mask" in values else unscaled(values)
                kept = {n: torch.as_tensor(values[n], dtype=torch.float32) for n in KEPT[:-1] if n in values}
                kept["mask"] = torch.as_tensor(mask).bool()
                self._kept[key] = {n: v.reshape(1) if v.ndim == 0 else v for n, v in kept.items()}
        self._check()

    def _check(self) -> None:
        for key, values in self._kept.items():
            shape = tuple(self.features[key].shape)
            for name in (*RANGES[self.mode], "mask"):
                if name not in values:
                    raise ValueError(f"the statistics of '{key}' have no {name}, which mode {self.mode} needs.")
                if tuple(values[name].shape) != shape:
                    raise ValueError(f"the {name} of '{key}' has shape {tuple(values[name].shape)}, not {shape}.")

    def get_config(self) -> dict[str, Any]:
        described = {k: {"type": f.type.value, "shape": list(f.shape)} for k, f in self.features.items()}
        return {"features": described, "mode": self.mode}

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{key}.{name}": v.cpu() for key, values in self._kept.items() for name, v in values.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._kept = {}
        for name, value in state.items():
            key, statistic = name.rsplit(".", 1)
            if key not in self.features or statistic not in KEPT:
                raise ValueError(f"'{name}' is no statistic of a feature that is normalised.")
            self._kept.setdefault(key, {})[statistic] = value
        self._check()

    def transform_features(
        self, features: dict[PipelineFeatureType, dict[str, PolicyFeature]]
    ) -> dict[PipelineFeatureType, dict[str, PolicyFeature]]:
        return features

    def _range(self, key: str, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """lo, hi − lo and mask, on the device and of the type of `like`."""
        if key not in self._kept:
            raise ValueError(f"there are no statistics of '{key}': it cannot be normalised.")
        values = self._kept[key]
        if values["mask"].device != like.device:
            self._kept[key] = values = {n: v.to(like.device) for n, v in values.items()}
        low, high = (values[name].to(like.dtype) for name in RANGES[self.mode])
        return low, high - low, values["mask"]

    def normalised(self, key: str, x: Tensor) -> Tensor:
        low, width, mask = self._range(key, x)
        there = width != 0
        scaled = 2 * (x - low) / torch.where(there, width, 1) - 1
        return torch.where(mask, x, torch.where(there, scaled.clamp(-1, 1), 0))

    def unnormalised(self, key: str, x: Tensor) -> Tensor:
        low, width, mask = self._range(key, x)
        return torch.where(mask, x, (x + 1) / 2 * width + low)


@dataclass
@ProcessorStepRegistry.register(name="clbench_normalizer")
class RangeNormalizerStep(_Ranges):
    """Normalise observations and, where the batch has them, actions (…, *shape)."""

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        new = transition.copy()
        observation = dict(new.get(TransitionKey.OBSERVATION) or {})
        for key in self.features.keys() & observation.keys():
            observation[key] = self.normalised(key, torch.as_tensor(observation[key]))
        if observation:
            new[TransitionKey.OBSERVATION] = observation
        action = new.get(TransitionKey.ACTION)
        if action is not None and ACTION in self.features:
            new[TransitionKey.ACTION] = self.normalised(ACTION, torch.as_tensor(action))
        return new


@dataclass
@ProcessorStepRegistry.register(name="clbench_unnormalizer")
class RangeUnnormalizerStep(_Ranges):
    """Turn a policy's actions (…, A) into the data's units."""

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        new = transition.copy()
        action = new.get(TransitionKey.ACTION)
        if action is not None:
            new[TransitionKey.ACTION] = self.unnormalised(ACTION, torch.as_tensor(action))
        return new
