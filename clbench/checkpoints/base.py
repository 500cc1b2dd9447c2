"""Which base a run or an adapter builds on, and where that base is now.

A base is identified by its name and the sha256 of its weights. Where it was when a run started is only a hint: folders
move, and runs are copied to other machines. So it is looked for where it was, among this machine's pretrained bases,
among its models and, if it is a checkpoint of another run, among its runs; a different base is never used instead.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clbench.checkpoints.whole import DESCRIPTION, damage
from clbench.errors import UserError
from clbench.io import read_json, write_json
from clbench.paths import bases_root, model_root, results_root

WEIGHTS = "model.safetensors"
ADAPTER = "adapter_config.json"
ADAPTER_BASE = "adapter_base.json"  # beside an adapter: the identity of its base


def identity(base: Path) -> dict[str, str]:
    """What identifies a base: {"name", "sha256" of its weights}."""
    return {"name": base.name, "sha256": weights_digest(base)}


def weights_digest(base: Path) -> str:
    return file_digest(base / WEIGHTS)


def file_digest(path: Path) -> str:
    """The sha256 of a file; UserError if it cannot be read."""
    try:
        status = path.stat()
        return _digest(path, status.st_size, status.st_mtime_ns)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}.") from e


@functools.lru_cache(maxsize=16)
def _digest(path: Path, size: int, time: int) -> str:
    """Cached as long as the file is unchanged: each process reads a large base once."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_adapter_base(folder: Path, base: Path) -> None:
    """Record next to an adapter which base it belongs to."""
    write_json(folder / ADAPTER_BASE, identity(base))


def adapter_base(folder: Path) -> Path:
    """Where the base of the adapter in `folder` is; UserError as `find_base`. Earlier versions stored no digest."""
    described = read_json(folder / ADAPTER)
    hint = described.get("base_model_name_or_path") if isinstance(described, dict) else None
    if not isinstance(hint, str) or not hint:
        raise UserError(f"{folder / ADAPTER} names no base.")
    known = read_json(folder / ADAPTER_BASE) if (folder / ADAPTER_BASE).is_file() else {}
    return find_base({"path": hint, **(known if isinstance(known, dict) else {})}, folder, f"{folder} is an adapter")


def find_base(base: dict[str, Any], near: Path, what: str) -> Path:
    """Where a base is now.

    Args:
        base: its "path" when it was used and, where known, its "name" and "sha256".
        near: a folder of the run that needs it: other runs may be next to it.
        what: what needs it, for the message.

    Raises:
        UserError: it is not found, is damaged, or is a different one.
    """
    hint, digest = Path(str(base.get("path") or "")), base.get("sha256")
    name = base.get("name") if isinstance(base.get("name"), str) and "/" not in str(base["name"]) else hint.name
    seen, wrong = [], []
    for folder in dict.fromkeys(_places(hint, str(name), near)):
        seen.append(str(folder))
        if not (folder / "config.json").is_file():
            continue
        reason = damage(folder) if (folder / DESCRIPTION).is_file() else None
        if reason is None and digest is not None and weights_digest(folder) != digest:
            reason = f"its weights are not the ones used in training: sha256 {weights_digest(folder)[:12]}…, not "
            reason += f"{str(digest)[:12]}…"
        if reason is None:
            return folder
        wrong.append(f"{folder} is a different one or damaged ({reason})")
    found = f"{'; '.join(wrong)}. " if wrong else ""
    raise UserError(
        f"{what} built on the base '{name}', which was not found. {found}Looked at {', '.join(seen)}. Put its folder "
        f"into {bases_root()}, or into a folder that CLBENCH_MODEL_ROOT names; CLBENCH_CACHE_ROOT says where "
        "pretrained bases are."
    )


def _places(hint: Path, name: str, near: Path) -> Iterator[Path]:
    if hint.is_absolute() or hint.parts:
        yield hint
    if name not in ("", ".", ".."):
        yield bases_root() / name
        yield model_root() / name
    if hint.parts[-3:-2] == ("checkpoints",) and len(hint.parts) >= 4:  # RUN/checkpoints/K/policy
        tail = Path(*hint.parts[-4:])
        yield results_root() / tail
        for above in list(near.absolute().parents)[:5]:  # RUNS/RUN/checkpoints/K/policy
            if (above / "manifest.json").is_file():
                yield above.parent / tail
        if (near / "manifest.json").is_file():
            yield near.parent / tail
