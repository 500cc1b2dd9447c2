"""Nested state of numbers, strings and tensors as one JSON and one safetensors file: nothing loaded can run code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from clbench.errors import UserError
from clbench.io import read_json, write_json


def save_state(folder: Path, name: str, state: Any) -> None:
    """Write `state` (dicts with str or int keys, lists, tuples, numbers, strings, None, tensors) under `name`."""
    tensors: dict[str, Tensor] = {}
    tree = _encode(state, "", tensors)
    write_json(folder / f"{name}.json", tree)
    save_file(tensors, folder / f"{name}.safetensors")


def load_state(folder: Path, name: str) -> Any:
    """Read what `save_state` wrote; raises UserError when a file is missing or damaged."""
    tree = read_json(folder / f"{name}.json")
    path = folder / f"{name}.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as e:
        raise UserError(f"cannot read {path}: {e}. The checkpoint is incomplete or damaged.") from e
    try:
        return _decode(tree, tensors)
    except (KeyError, TypeError, IndexError, ValueError) as e:
        raise UserError(f"{folder / name}.json does not fit its tensors ({e}): the checkpoint is damaged.") from e


def tensor_bytes(state: Any) -> int:
    """Bytes of all tensors in `state`."""
    if torch.is_tensor(state):
        return state.numel() * state.element_size()
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(map(tensor_bytes, values))


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if torch.is_tensor(value):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {"t": path}
    if isinstance(value, dict):
        return {"d": [[k, _encode(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {"l": [_encode(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"v": value}
    raise TypeError(f"state at '{path}' has a {type(value).__name__}; only tensors, numbers and strings are saved")


def _decode(node: Any, tensors: dict[str, Tensor]) -> Any:
    ((kind, value),) = node.items()
    if kind == "t":
        return tensors[value]
    if kind == "d":
        return {k: _decode(v, tensors) for k, v in value}
    if kind == "l":
        return [_decode(v, tensors) for v in value]
    if kind == "v":
        return value
    raise ValueError(f"unknown node '{kind}'")
