"""Devices, precision, backward and step. The only file that imports Accelerate."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from clbench.config.schema import TrainConfig
from clbench.errors import UserError


def autocast_precision(config: TrainConfig) -> str:
    """Accelerate's word for `train.mixed_precision`."""
    return "no" if config.mixed_precision == "fp32" else config.mixed_precision


class LocalGradients:
    """GradientView over `.grad` of one process."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self._parameters = parameters

    def names(self) -> Sequence[str]:
        return list(self._parameters)

    def get(self, name: str) -> Tensor | None:
        return self._parameters[name].grad

    def set(self, name: str, value: Tensor) -> None:
        p = self._parameters[name]
        if p.grad is None:
            p.grad = value.to(p).clone()
        else:
            p.grad.copy_(value)


class LocalWeights:
    """WeightView over the parameters of one process."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self._parameters = parameters

    def names(self) -> Sequence[str]:
        return list(self._parameters)

    def get(self, name: str) -> Tensor:
        return self._parameters[name].detach()

    @torch.no_grad()
    def set(self, name: str, value: Tensor) -> None:
        self._parameters[name].copy_(value)

    @torch.no_grad()
    def set_where(self, name: str, mask: Tensor, value: Tensor) -> None:
        p = self._parameters[name]
        torch.where(mask, value, p, out=p)


class Backend:
    """Accelerate behind the few verbs that training needs."""

    def __init__(self, config: TrainConfig) -> None:
        if config.device == "cuda" and not torch.cuda.is_available():
            raise UserError("train.device is cuda, but torch sees no CUDA device. Use train.device=cpu or auto.")
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        cpu = config.device == "cpu" or not torch.cuda.is_available()
        AcceleratorState._reset_state()  # a process may train several runs, each with its own precision
        self.accelerator = Accelerator(mixed_precision=autocast_precision(config), cpu=cpu)
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if self.accelerator.num_processes != world:
            raise UserError(f"{world} processes were launched but this one sees {self.accelerator.num_processes}.")
        if world > 1:
            raise UserError("this version trains in one process; start it without accelerate launch or torchrun.")
        self.device = self.accelerator.device
        self.parameters: dict[str, nn.Parameter] = {}

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world_size(self) -> int:
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def autocast(self) -> AbstractContextManager[Any]:
        return self.accelerator.autocast()

    def own(self, parameters: dict[str, nn.Parameter]) -> None:
        """Say which parameters the coming steps train."""
        self.parameters = parameters

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def gradients(self) -> LocalGradients:
        return LocalGradients(self.parameters)

    def weights(self) -> LocalWeights:
        return LocalWeights(self.parameters)

    def clip(self, max_norm: float) -> float:
        """Clip the global gradient norm to `max_norm` (0 = only measure it); returns the norm before."""
        limit = max_norm if max_norm > 0 else float("inf")
        return float(torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), limit))

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def peak_memory_mb(self) -> float:
        """Peak memory of this process so far: allocated on the device, else resident, in MB."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e6
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
