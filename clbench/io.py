"""Reading and writing small files so that a reader never sees half of one."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from clbench.errors import UserError

MAX_JSON_BYTES = 256 * 1024 * 1024


def write_text(path: Path | str, text: str) -> None:
    """Write `text` to `path` atomically: temporary name in the same folder, flush, rename."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write `data` to `path` atomically: temporary name in the same folder, flush, rename."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, tmp = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}. Choose a writable folder with free space.") from e
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(tmp, 0o644)
        os.replace(tmp, path)
    except OSError as e:
        Path(tmp).unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({len(data)} bytes): {e.strerror}.") from e
    except BaseException:
        Path(tmp).unlink(missing_ok=True)
        raise


def write_json(path: Path | str, obj: Any, indent: int | None = 1) -> None:
    """Write `obj` as strict JSON (no NaN or Infinity), atomically."""
    write_text(path, json.dumps(obj, indent=indent, allow_nan=False) + "\n")


def write_jsonl(path: Path | str, rows: Iterable[Any]) -> None:
    """Write one strict JSON object a line, atomically."""
    write_text(path, "".join(json.dumps(r, allow_nan=False) + "\n" for r in rows))


def read_json(path: Path | str) -> Any:
    """Read a JSON file; raises UserError that names the file when it is missing, too large or not JSON."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path} is larger than {MAX_JSON_BYTES} bytes; refusing to parse it.")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UserError(f"{path} does not exist.") from e
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}.") from e
    except (ValueError, RecursionError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{path} is not valid JSON: {e}.") from e


def read_jsonl(path: Path | str) -> list[Any]:
    """Read a JSON-lines file. A torn last line (a write that was cut off) is dropped; any other bad line raises."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path} is larger than {MAX_JSON_BYTES} bytes; refusing to parse it.")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as e:
        raise UserError(f"{path} does not exist.") from e
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path}: {e}.") from e
    lines = text.split("\n")
    rows = []
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as e:
            if i == len(lines) - 1:  # no newline after it: the write was cut off
                break
            raise UserError(f"{path}, line {i + 1}, is not valid JSON: {e}.") from e
    return rows
