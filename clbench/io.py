"""Reading and writing small files: a reader never sees half of one, and what is read is treated as hostile.

Parsed files are bounded in size and in nesting; only regular files are opened (a pipe would block forever).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import re
import stat
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from clbench.errors import UserError

MAX_JSON_BYTES = 64 * 1024 * 1024
MAX_DEPTH = 64  # of nested lists and objects
# What clbench reads and writes in a run's folder, besides names that begin with a dot (locks, temporary files).
OF_A_RUN = ("config.yaml", "manifest.json", "peft_config.json", "log.jsonl", "loggers.json", "tensorboard",
            "checkpoints", "training_state", "weights", "curves.log", "eval", "report")  # fmt: skip
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def write_text(path: Path | str, text: str) -> None:
    """Write `text` to `path` atomically (see `write_bytes`). What UTF-8 cannot encode becomes "?"."""
    write_bytes(path, text.encode("utf-8", "replace"))


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write `data` to `path` atomically and durably: temporary file next to it, flush, rename, flush the folder.

    Raises:
        UserError: it could not be written; the old file is unchanged and no temporary file stays.
    """
    path = Path(path)
    tmp = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, tmp = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(fd, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(tmp, 0o644)
        os.replace(tmp, path)
        tmp = None
        sync_folder(path.parent)
    except (OSError, ValueError) as e:  # ValueError: a NUL in the path
        what = e.strerror if isinstance(e, OSError) else str(e)
        raise UserError(
            f"cannot write {path} ({len(data)} bytes needed): {what}. Choose a writable folder with free space."
        ) from e
    finally:
        if tmp is not None:
            with contextlib.suppress(OSError):  # the first error says it all
                os.unlink(tmp)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, if the file system can."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync folders
            raise
    finally:
        os.close(fd)


def write_json(path: Path | str, obj: Any, indent: int | None = 1) -> None:
    """Write `obj` as strict JSON (no NaN or Infinity), atomically."""
    write_text(path, json.dumps(obj, indent=indent, allow_nan=False) + "\n")


def write_jsonl(path: Path | str, rows: Iterable[Any]) -> None:
    """Write one strict JSON object per line, atomically."""
    write_text(path, "".join(json.dumps(r, allow_nan=False) + "\n" for r in rows))


def read_bytes(path: Path | str, limit: int = MAX_JSON_BYTES) -> bytes:
    """Read a full regular file of at most `limit` bytes; UserError for anything else."""
    path = Path(path)
    try:
        with open(path, "rb", opener=_open) as f:
            if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):
                raise UserError(f"cannot read {path}: it is not a regular file.")
            data = f.read(limit + 1)
    except FileNotFoundError as e:
        raise UserError(f"{path} does not exist.") from e
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}.") from e
    except ValueError as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"cannot read {str(path)!r}: {e}.") from e
    if len(data) > limit:
        raise UserError(f"{path} is larger than {limit} bytes; refusing to parse it.")
    return data


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe without a writer must not block


def read_text(path: Path | str, limit: int = MAX_JSON_BYTES) -> str:
    """Read a full UTF-8 file of at most `limit` bytes (a byte order mark is dropped); UserError for anything else."""
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"cannot read {path} as text: it is not UTF-8 (byte {e.start}).") from e


def read_json(path: Path | str, limit: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file.

    Raises:
        UserError: that names the file if it is missing, larger than `limit`, nested too deeply, or not strict JSON:
            NaN, Infinity, numbers that overflow, duplicate keys and halves of characters are rejected.
    """
    try:
        return parse_json(read_text(path, limit))
    except (ValueError, RecursionError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{path} is not valid JSON: {e}.") from e


def read_jsonl(path: Path | str) -> list[Any]:
    """Read a JSON-lines file. A torn last line (a write that was cut off) is dropped; any other bad line raises."""
    lines = read_text(path).split("\n")
    rows = []
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            rows.append(parse_json(line))
        except (ValueError, RecursionError) as e:
            if i == len(lines) - 1:  # no newline after it: the write was cut off
                break
            raise UserError(f"{path}, line {i + 1}, is not valid JSON: {e}.") from e
    return rows


def sha256(path: Path) -> str:
    """The sha256 of a file's bytes, as hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def seal(description: dict[str, Any]) -> str:
    """The sha256 of a JSON object, whatever the order of its keys and the white space in its file, as hex."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def refuse_links(folder: Path) -> None:
    """Raise UserError for a symbolic link in a run's folder that leads out of it: writing there would go elsewhere.

    The folder itself, and those above it, may be links. What does not belong to clbench (`is_foreign`) is not checked,
    so a link that leads there also counts as leading out.
    """
    root = folder.resolve()
    for own in (p for p in root.iterdir() if not is_foreign(p.name)):
        inside = (Path(parent, name) for parent, folders, files in os.walk(own) for name in (*folders, *files))
        for path in itertools.chain([own], inside):
            if path.is_symlink() and not _is_own(path.resolve(), root):
                raise UserError(
                    f"{folder / path.relative_to(root)} is a link to {os.readlink(path)}, outside the run's "
                    "folder or what clbench keeps in it. Replace it with what it points to; to keep runs elsewhere, "
                    "set CLBENCH_RESULTS_ROOT."
                )


def _is_own(path: Path, root: Path) -> bool:
    """Whether a path is in the part of the run's folder `root` that clbench reads and writes."""
    return path.is_relative_to(root) and path != root and not is_foreign(path.relative_to(root).parts[0])


def is_foreign(name: str) -> bool:
    """Whether clbench neither reads nor writes a file or folder of that name in a run's folder."""
    return name not in OF_A_RUN and not name.startswith(".")


def remove_if_empty(folder: Path) -> None:
    """Remove a folder if it is empty."""
    with contextlib.suppress(OSError):  # it holds something, or is gone
        folder.rmdir()


def parse_json(text: str) -> Any:
    """Parse strict JSON with the bounds of `read_json`; ValueError or RecursionError for anything else."""
    value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            c
            for v in level
            if isinstance(v, dict | list)
            for c in (v.values() if isinstance(v, dict) else v)
            if isinstance(c, dict | list)
        ]
        if not level:
            break
    else:
        raise ValueError(f"more than {MAX_DEPTH} levels of nesting")
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()  # half a character (\ud800) could not be printed
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {twice[:60]!r} occurs twice in one object")
    return result


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number; write null for a cell or value that is not known")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:60]} is larger than any number")
    return value
