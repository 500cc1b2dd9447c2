"""Nested state of numbers, strings and tensors as one JSON and one safetensors file: loading cannot run code."""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from clbench.errors import UserError
from clbench.io import read_json, write_json
from clbench.tensor_files import read_tensors


def save_state(folder: Path, name: str, state: Any) -> None:
    """Write `state` (dicts with str or int keys, lists, tuples, numbers, strings, None, tensors) under `name`."""
    tensors: dict[str, Tensor] = {}
    tree = _encode(state, "", tensors)
    path = folder / f"{name}.safetensors"
    save_file(tensors, path)
    write_json(folder / f"{name}.json", {"state": tree, "sha256": _digest(tree, path)})


def load_state(folder: Path, name: str) -> Any:
    """Read what `save_state` wrote.

    Raises:
        UserError: a file is missing or damaged (a checksum covers both), or the two do not belong together.
    """
    path, description = folder / f"{name}.safetensors", folder / f"{name}.json"
    stored = read_json(description)
    tree = stored
    if isinstance(stored, dict) and "state" in stored:  # states of clbench 0.1 had no checksum
        tree = stored["state"]
        if stored.keys() != {"state", "sha256"} or stored["sha256"] != _digest(tree, path):
            raise UserError(f"{description} and {path.name} do not match their checksum: the checkpoint is damaged.")
    tensors = read_tensors(path)
    left = dict(tensors)
    try:
        state = _decode(tree, left)
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"{description} does not match its tensors ({str(e)[:200]}): the checkpoint is damaged.") from e
    if left:
        raise UserError(f"{description} does not match its tensors ({min(left)[:200]!r} is not in it): it is damaged.")
    return state


def _digest(tree: Any, tensors: Path) -> str:
    digest = hashlib.sha256(json.dumps(tree, separators=(",", ":")).encode())
    try:
        with open(tensors, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    except OSError as e:
        raise UserError(f"cannot read {tensors}: {e.strerror}. The checkpoint is incomplete or damaged.") from e
    return digest.hexdigest()


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if torch.is_tensor(value):
        if path in tensors:
            raise TypeError(f"state has two tensors that would be saved as '{path}'; use other keys")
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {"t": path}
    if isinstance(value, dict):
        return {"d": [[k, _encode(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {"l": [_encode(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"v": value}
    raise TypeError(f"state at '{path}' has a {type(value).__name__}; only tensors, numbers and strings are saved")


def _decode(node: Any, left: dict[str, Tensor]) -> Any:
    """The state of a node. Takes its tensors out of `left`: every tensor occurs once."""
    if not isinstance(node, dict) or len(node) != 1:
        raise ValueError(f"{reprlib.repr(node)} is not a node")
    ((kind, value),) = node.items()
    if kind == "t" and isinstance(value, str):
        return left.pop(value)
    if kind == "l" and isinstance(value, list):
        return [_decode(v, left) for v in value]
    if kind == "d" and isinstance(value, list):
        state = {}
        for k, v in value:
            if type(k) not in (str, int) or k in state:
                raise ValueError(f"key {reprlib.repr(k)} is not a name, or occurs twice")
            state[k] = _decode(v, left)
        return state
    if kind == "v" and (value is None or isinstance(value, bool | int | float | str)):
        return value
    raise ValueError(f"{reprlib.repr(node)} is not a node")
