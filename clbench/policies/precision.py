"""Weights that never train kept in bf16: `policy.dtype=bfloat16`, for adapters on a large frozen base.

The weights of frozen linear layers, convolutions and embeddings are rounded to bf16 in memory, in training and in
evaluation alike, which halves what they take. Each such layer computes in bf16 and hands on its result in the type of
its input (an embedding: fp32), so everything between them, the adapters and the modules that train along stay in fp32.
On disk nothing changes: checkpoints are adapters in fp32 over the base as it was.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

FROZEN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
ADDED = ("lora_", "clare_")  # how the names of adapters' modules begin


def keep_frozen(policy: nn.Module, dtype: torch.dtype) -> int:
    """Round the weights of layers that do not train to `dtype`; returns how many numbers were.

    A layer stays as it is if any of its parameters trains, if it belongs to an adapter, or if its weight is read by
    another module (of an attention layer of torch, or one tied to a layer that stays).
    """
    chosen = {name: m for name, m in policy.named_modules() if isinstance(m, FROZEN) and _frozen(name, m)}
    others = {id(p) for name, m in policy.named_modules() if name not in chosen for p in m.parameters(recurse=False)}
    rounded = 0
    for layer in chosen.values():
        parameters = list(layer.parameters(recurse=False))
        if any(id(p) in others for p in parameters) or all(p.dtype == dtype for p in parameters):
            continue
        for p in parameters:
            p.data = p.data.to(dtype)
            rounded += p.numel()
        if not isinstance(layer, nn.Embedding):
            layer.register_forward_pre_hook(_rounded)
        layer.register_forward_hook(_back, with_kwargs=False)
    return rounded


def _frozen(name: str, layer: nn.Module) -> bool:
    if isinstance(layer, NonDynamicallyQuantizableLinear) or any(part.startswith(ADDED) for part in name.split(".")):
        return False
    return not any(p.requires_grad for p in layer.parameters())


def _rounded(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    layer._given = args[0].dtype  # type: ignore[assignment]
    return (args[0].to(layer.weight.dtype), *args[1:])  # type: ignore[arg-type]


def _back(layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
    return out.to(getattr(layer, "_given", torch.float32))
