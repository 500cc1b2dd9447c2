"""Whether a data set that clbench made still holds what was made.

Its description (meta/clbench.json) has the size and sha256 of every file. At each start all sizes are compared, and the
checksums of as many files as fit into START_BYTES, the smallest first: in sets on states, these are all files. `full`
compares every byte, whatever it costs. A set of an earlier version has no checksums except its fingerprint, which is
recomputed at each start if that takes no images and no more than START_BYTES.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from clbench.data.info import INFO_FILE, DataInfo, fingerprint, fingerprint_with_images
from clbench.data.lerobot_set import read_columns
from clbench.envs.base import STATE_KEY
from clbench.envs.making import family
from clbench.errors import UserError
from clbench.io import sha256

ACTION_KEY = "action"
START_BYTES = 32 * 2**20  # a tenth of a second or two
_compared: dict[Path, tuple[int, int, str]] = {}  # in this process: file → size, time of change, checksum


def check_made(info: DataInfo, stream: str, full: bool = False) -> None:
    """Raise UserError if a set is no longer what was made. `stream`: the stream for `clbench data make`."""
    problem = damage(info, full)
    if problem is not None:
        raise UserError(
            f"the data set in {info.root} is damaged: {problem}. Make it again, with the same overrides as before: "
            f"clbench data make --force {stream}"
        )


def damage(info: DataInfo, full: bool = False) -> str | None:
    """What differs from when it was made, or None."""
    try:
        return _other_contents(info, full) if info.files is None else _other_files(info.root, info.files, full)
    except OSError as e:
        return f"{e.filename or 'a file'} cannot be read: {e.strerror or e}"


def changed_file(root: Path, files: dict[str, tuple[int, str]], full: bool = False) -> str | None:
    """What differs from `files` (path → bytes, sha256), or None."""
    try:
        return _other_files(root, files, full)
    except OSError as e:
        return f"{e.filename or 'a file'} cannot be read: {e.strerror or e}"


def file_sums(root: Path) -> dict[str, tuple[int, str]]:
    """Path below `root` → bytes, sha256, for all files except clbench's description."""
    paths = sorted(p for p in root.rglob("*") if p.is_file() and p != root / INFO_FILE)
    return {str(p.relative_to(root)): (p.stat().st_size, sha256(p)) for p in paths}


def _other_files(root: Path, files: dict[str, tuple[int, str]], full: bool) -> str | None:
    for name, (size, _) in files.items():
        path = root / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    for path in _tables(root):
        if str(path.relative_to(root)) not in files:
            return f"{path.relative_to(root)} does not belong there"
    left = START_BYTES
    for name, (size, digest) in sorted(files.items(), key=lambda item: item[1][0]):
        if size > left and not full:
            break
        left -= size
        path = root / name
        mark = size, path.stat().st_mtime_ns, digest
        if _compared.get(path) != mark and sha256(path) != digest:
            return f"{name} was changed"
        _compared[path] = mark
    return None


def _other_contents(info: DataInfo, full: bool) -> str | None:
    tables = _tables(info.root)
    seen = list(family(info.env_type).cameras)
    if not full and (seen or not tables or sum(p.stat().st_size for p in tables) > START_BYTES):
        return None
    if not tables:
        return "there are no frames in it"
    try:
        same = contents(info.root, info.env_type, info.episodes) == info.fingerprint
    except (ValueError, KeyError, IndexError, OSError) as e:  # pyarrow's errors
        return f"its frames cannot be read ({' '.join(str(e).split())[:300]})"
    return None if same else "its frames are not those that were made"


def _tables(root: Path) -> list[Path]:
    return sorted((root / "data").glob("*/*.parquet"))


def contents(root: Path, env_type: str, episodes: int) -> str:
    """The fingerprint of the contents of a set's files."""
    tables, simulators = _tables(root), family(env_type)
    shapes = {STATE_KEY: (simulators.state_dim,), ACTION_KEY: (simulators.action_dim,)}
    columns = read_columns(tables, {**shapes, "episode_index": (), "task_index": ()})
    images = image_digests(tables, list(simulators.cameras), episodes)
    return fingerprint_with_images(fingerprint(*columns.values()), images)


def image_digests(tables: Sequence[Path], seen: Sequence[str], episodes: int) -> list[str]:
    """The sha256 of every episode's pixels, one camera after the other."""
    if not seen:
        return []
    import pyarrow.parquet as pq

    from clbench.data.episode_images import decoded

    hashes = [[hashlib.sha256() for _ in seen] for _ in range(episodes)]
    for path in tables:
        for rows in pq.ParquetFile(path).iter_batches(batch_size=32, columns=["episode_index", *seen]):
            for row in rows.to_pylist():
                for camera, digest in zip(seen, hashes[row["episode_index"]], strict=True):
                    digest.update(decoded(row[camera]["bytes"]).tobytes())
    return [digest.hexdigest() for of_episode in hashes for digest in of_episode]
