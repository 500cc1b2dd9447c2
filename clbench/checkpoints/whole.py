"""Folders that exist completely or not at all, and whose every byte can be checked.

A folder is filled under a temporary name next to its own, flushed to disk, described in `checkpoint.json` (each
file's size and sha256; `seal`, the sha256 of the description itself), and renamed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from clbench.errors import UserError
from clbench.io import read_json, seal, sha256, sync_folder, write_json

DESCRIPTION = "checkpoint.json"


def write_whole(final: Path, fill: Callable[[Path], dict[str, Any]], size: Callable[[], int]) -> None:
    """Let `fill` write a temporary folder and return its description, then rename it to `final` (replacing that).

    Args:
        size: approximate bytes that the folder needs; called when there is no space for it.

    Raises:
        UserError: the disk is full or cannot be written. `final` is unchanged.
    """
    temporary = final.with_name(f".{final.name}.partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        description = fill(temporary)
        files = _files(temporary)
        for name in files:
            _flush(temporary / name)
        described = {**description, "digest": _digest(files), "files": files}
        write_json(temporary / DESCRIPTION, {**described, "seal": seal(described)})
        for folder in {temporary, *(p.parent for p in map(temporary.joinpath, files))}:
            sync_folder(folder)
        _replace(temporary, final)
        sync_folder(final.parent)
    except (OSError, SafetensorError, UserError) as e:
        shutil.rmtree(temporary, ignore_errors=True)
        cause = e.__cause__ if isinstance(e, UserError) else e
        if not isinstance(cause, OSError | SafetensorError):
            raise
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
        raise UserError(f"cannot save {final} ({reason}): {_space(final.parent, size())} {_ADVICE}") from e
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


_ADVICE = "Everything saved before is intact: make space there, then continue with --resume."


def _space(folder: Path, need: int) -> str:
    try:
        free = f"{shutil.disk_usage(folder).free:,} are free"
    except OSError:
        return f"it needs about {need:,} bytes."
    return f"it needs about {need:,} bytes, {free}."


def _replace(temporary: Path, final: Path) -> None:
    aside = final.with_name(f".{final.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        os.replace(final, aside)
    try:
        os.replace(temporary, final)
    except OSError:
        if aside.exists():
            os.rename(aside, final)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def damage(folder: Path, apart: Collection[str] = ()) -> str | None:
    """Why the folder is not what `write_whole` wrote, or None when every byte is.

    `apart`: files that are not looked at; those of an earlier version, which knows no files one by one, are.
    """
    try:
        described = read_json(folder / DESCRIPTION)
    except UserError as e:
        return str(e)
    if not isinstance(described, dict) or not _is_list_of_files(described.get("files", {})):
        return f"{DESCRIPTION} is not a description"
    try:
        if "seal" not in described:  # from an earlier version, with a digest of all files
            return None if described.get("digest") == _digest(_files(folder)) else "its files are not the saved ones"
        if described.pop("seal") != seal(described):
            return f"{DESCRIPTION} was changed"
        return _difference(folder, described.get("files", {}), apart)
    except OSError as e:
        return f"{e.filename or 'a file'} cannot be read: {e.strerror}"


def _difference(folder: Path, want: dict[str, list[Any]], apart: Collection[str] = ()) -> str | None:
    """The first difference from `want`: name → [bytes, sha256]."""
    want = {name: about for name, about in want.items() if name not in apart}
    have = {p: (folder / p).stat().st_size for p in _names(folder) if p not in apart}
    for name in sorted(want.keys() | have.keys()):
        if name not in have:
            return f"{name} is missing"
        if name not in want:
            if _of_a_file_manager(Path(name).name):
                continue
            return f"{name} does not belong there"
        if have[name] != want[name][0]:
            return f"{name} has {have[name]} bytes instead of {want[name][0]}"
    for name, (_, digest) in want.items():
        if sha256(folder / name) != digest:
            return f"{name} was changed"
    return None


def _of_a_file_manager(name: str) -> bool:
    """Whether it is a file that browsing or copying a folder may leave there, and that nothing reads."""
    return name in (".DS_Store", "Thumbs.db", "desktop.ini", ".directory") or name.startswith(("._", ".nfs"))


def _is_list_of_files(files: Any) -> bool:
    return isinstance(files, dict) and all(
        isinstance(v, list) and len(v) == 2 and isinstance(v[0], int) and isinstance(v[1], str) for v in files.values()
    )


def _names(folder: Path) -> list[str]:
    """All files except the description, by their path in the folder."""
    found = (p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    return sorted(str(p.relative_to(folder)) for p in found if p != folder / DESCRIPTION)


def _files(folder: Path) -> dict[str, list[Any]]:
    """name → [bytes, sha256]."""
    return {name: [(folder / name).stat().st_size, sha256(folder / name)] for name in _names(folder)}


def _digest(files: dict[str, list[Any]]) -> str:
    """One sha256 over all names and contents, which identifies what was evaluated."""
    digest = hashlib.sha256()
    for name in sorted(files, key=Path):
        digest.update(name.encode() + b"\0" + bytes.fromhex(files[name][1]))
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
