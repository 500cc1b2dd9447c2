"""Reading safetensors files, which can only hold tensors; the tensors' sizes are checked against the file's.

`tensor_bytes` counts the bytes of tensors in memory.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from clbench.errors import UserError


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; UserError when it is missing or damaged."""
    try:
        _check_regular(path)
        return load_file(path)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as e:
        raise _damaged(path, e) from e


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, without reading its tensors; raises as `read_tensors`."""
    try:
        _check_regular(path)
        with safe_open(path, framework="pt") as f:
            return {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as e:
        raise _damaged(path, e) from e


def tensor_bytes(state: Any) -> int:
    """Bytes of all tensors in `state`."""
    if torch.is_tensor(state):
        return state.numel() * state.element_size()
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(map(tensor_bytes, values))


def _check_regular(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a regular file")  # a pipe would block forever


def _damaged(path: Path, e: Exception) -> UserError:
    what = e.strerror if isinstance(e, OSError) and e.strerror else e
    return UserError(f"cannot read {path}: {what}. The checkpoint is incomplete or damaged.")
