"""Decoded camera images, and what a frozen encoder makes of them, kept on disk: a file per task and camera, mapped.

A frame is decoded once, whatever the number of runs, epochs and processes that read it; after that, sampling images is
indexing, as it is for states. Files lie in the cache root:

    frames/SET-KEY/CAMERA-KEY.uint8    n × height × width × channels bytes, frames in the order of the task's episodes
    frames/SET-KEY/CAMERA-KEY.float32  n × tokens × width features, likewise; the key has the encoder's weights in it
    frames/SET-KEY/CAMERA-KEY.json     their shape and CRC-32, written last

The set's key is the sha256 of its files' sums, where clbench made it, and else of their names, sizes and times. A file
that is not whole, or is not what was written, is made again. Files can be removed at any time when no run is training.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clbench.data.info import INFO_FILE, load_info
from clbench.errors import UserError
from clbench.io import read_json, write_json
from clbench.paths import cache_root
from clbench.patience import patience
from clbench.terminal import tell

FORMAT = 1
BLOCK = 2**24  # bytes that are read at once for a checksum


def frames_root() -> Path:
    """Where decoded images are kept."""
    return cache_root() / "frames"


def cache_folder(root: Path) -> Path:
    """The folder of the decoded images of the data set in `root`."""
    known = load_info(root).files if (root / INFO_FILE).is_file() else None
    if known is not None:
        mark: Any = sorted((name, digest) for name, (_, digest) in known.items())
    else:
        files = sorted(p for part in ("data", "videos", "images") for p in (root / part).rglob("*") if p.is_file())
        mark = [str(root.resolve())]
        mark += [(str(p.relative_to(root)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return frames_root() / f"{_plain(root.name)}-{_digest(mark)}"


def cached_images(
    folder: Path,
    camera: str,
    episodes: Iterable[int],
    shape: tuple[int, int, int, int],
    decode: Callable[[], Iterator[np.ndarray]],
    what: str,
) -> np.ndarray:
    """Return one camera's images of some episodes, uint8 (n, height, width, channels), read-only and mapped from disk.

    Args:
        folder: of the data set, from `cache_folder`.
        shape: of the images; a frame of another is a UserError.
        decode: yields the images in order, uint8 (height, width, channels); called only where they are not kept yet.
        what: whose images they are, for messages.

    Raises:
        UserError: nothing can be written there.
    """
    path = folder / f"{_plain(camera)}-{_digest([camera, list(episodes), list(shape)])}.uint8"
    return _cached(path, shape, IMAGES, decode, what)


def cached_features(
    folder: Path,
    camera: str,
    encoder: str,
    episodes: Iterable[int],
    shape: tuple[int, int, int],
    encode: Callable[[], Iterator[np.ndarray]],
    what: str,
) -> np.ndarray:
    """Return an encoder's features of one camera's images of some episodes, float32 (n, tokens, width), as
    `cached_images`.

    Args:
        encoder: identifies the encoder and all that is done to images before it.
        encode: yields the features in order, float32 (tokens, width); called only where they are not kept yet.
    """
    path = folder / f"{_plain(camera)}-{_digest([camera, encoder, list(episodes), list(shape)])}.float32"
    return _cached(path, shape, FEATURES, encode, what)


class _Kind(NamedTuple):
    """What is kept: its type, and the words for it in messages."""

    dtype: Any
    noun: str
    making: str
    instead: str


IMAGES = _Kind(np.uint8, "decoded images", "decoding", "train.frame_cache_gb=0 to decode them again for every batch")
FEATURES = _Kind(np.float32, "features", "encoding", "train.feature_cache_gb=0 to encode them again in every step")


def _cached(
    path: Path, shape: tuple[int, ...], kind: _Kind, make: Callable[[], Iterator[np.ndarray]], what: str
) -> np.ndarray:
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock"), kind, what):
            problem = _problem(path, shape, kind, what)
            if problem:
                tell(f"warning: {path} {problem}; {kind.making} the images again.")
            if problem is not None:
                _write(path, shape, kind, make, what)
    except OSError as e:
        raise UserError(
            f"{kind.noun} cannot be kept in {folder}: {e.strerror or e}. Set CLBENCH_CACHE_ROOT to a folder with "
            f"room, or {kind.instead}."
        ) from e
    return np.memmap(path, dtype=kind.dtype, mode="r", shape=shape)


def _problem(path: Path, shape: tuple[int, ...], kind: _Kind, what: str) -> str | None:
    """None: the file is whole. "": it was never written. Else what is wrong with it."""
    described = path.with_suffix(".json")
    if not described.is_file():
        return ""
    try:
        found = read_json(described)
    except UserError:
        return "has a damaged description"
    if not isinstance(found, dict) or found.get("format") != FORMAT or found.get("shape") != list(shape):
        return "is of another kind"
    if not path.is_file() or path.stat().st_size != int(np.prod(shape)) * np.dtype(kind.dtype).itemsize:
        return "is not whole"
    with patience(f"checking the {kind.noun} of {what}"):
        return None if found.get("crc32") == _crc32(path) else "is damaged"


def _crc32(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            total = zlib.crc32(block, total)
    return total


def _write(
    path: Path, shape: tuple[int, ...], kind: _Kind, make: Callable[[], Iterator[np.ndarray]], what: str
) -> None:
    path.with_suffix(".json").unlink(missing_ok=True)
    temporary = path.with_suffix(f".partial-{os.getpid()}")
    done, total = 0, 0
    try:
        with (
            temporary.open("wb") as file,
            patience(
                f"{kind.making} the images of {what}, once", lambda: f"{done} of {shape[0]} frames → {path.parent}"
            ),
        ):
            for image in make():
                if image.shape != shape[1:] or image.dtype != kind.dtype:
                    assert kind is IMAGES, f"an encoder gave {image.shape} {image.dtype}, not {shape[1:]}"
                    raise UserError(
                        f"frame {done} of {what} has an image of shape {image.shape}, the data set says {shape[1:]}: "
                        "it is damaged. Get it again."
                    )
                pixels = np.ascontiguousarray(image).tobytes()
                file.write(pixels)
                total = zlib.crc32(pixels, total)
                done += 1
            file.flush()
            os.fsync(file.fileno())
        if done != shape[0]:
            raise UserError(f"{what} has {done} images, the data set says {shape[0]}: it is damaged. Get it again.")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    write_json(path.with_suffix(".json"), {"format": FORMAT, "shape": list(shape), "crc32": total})


@contextmanager
def _locked(path: Path, kind: _Kind, what: str) -> Iterator[None]:
    """One process at a time: whoever comes second waits, and finds the images there."""
    with path.open("w") as file:
        with patience(f"waiting for another process that is {kind.making} the images of {what}"):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def decoded_images(values: Iterable[dict[str, Any]], root: Path) -> Iterator[np.ndarray]:
    """The pixels (height, width, 3) of a parquet column of images, in its order; decoded by as many threads as cores.

    `values`: each {"bytes": PNG or JPEG, "path": relative to `root`, where there are no bytes}.
    """
    from PIL import Image

    def pixels(value: dict[str, Any]) -> np.ndarray:
        data = value["bytes"] if value["bytes"] is not None else (root / value["path"]).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))

    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        waiting: list[Any] = []
        for value in values:
            waiting.append(threads.submit(pixels, value))
            if len(waiting) >= 256:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", name) or "_"
