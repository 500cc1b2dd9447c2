"""What a LeRobot v3 data set says about itself, whoever made it, and whether its files agree.

Only meta/ and the low-dimensional columns are read: no image is decoded and LeRobot (10 s of imports) is not needed.
Everything that LeRobot would find missing, and then look for on a hub, is found here first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clbench.errors import UserError
from clbench.io import read_json

FORMAT = "v3.0"
INFO, TASKS, EPISODES = "meta/info.json", "meta/tasks.parquet", "meta/episodes"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
NUMBERS = ("float32", "float64", "float16", "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32")
BOOKKEEPING = ("index", "episode_index", "frame_index", "timestamp", "task_index")


@dataclass(frozen=True)
class Episode:
    """One episode: its instructions (usually one), its frames `start` to `stop` in the set, and their files."""

    index: int
    texts: tuple[str, ...]
    start: int
    stop: int
    files: tuple[str, ...]

    @property
    def frames(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class LeRobotSet:
    """A set's metadata. `texts` are its instructions by task index; `features` are LeRobot's, with `names` and all."""

    root: Path
    fps: float
    robot_type: str | None
    features: dict[str, dict[str, Any]]
    texts: dict[int, str]
    episodes: tuple[Episode, ...]

    def files(self, episodes: Collection[int]) -> list[str]:
        """The data and video files, relative to the root, that hold these episodes."""
        wanted = set(episodes)
        return sorted({f for e in self.episodes if e.index in wanted for f in e.files})


def has_set(root: Path) -> bool:
    """Whether there is a LeRobot data set in a folder (made by clbench or not)."""
    return (root / INFO).is_file()


def is_described(root: Path) -> bool:
    """Whether everything that `read_set` needs has been fetched. A damaged set, or one in another format, counts.

    The files of meta/ are fetched one by one, each completely, so an interrupted fetch leaves files missing: the tasks,
    or files of episodes, whose number is in info.json.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not has_set(root):
        return False
    try:
        info = read_json(root / INFO)
        if not str(info["codebase_version"]).startswith("v3."):
            return True
        listed = sum(pq.read_metadata(path).num_rows for path in (root / EPISODES).glob("*/*.parquet"))
        return (root / TASKS).is_file() and listed >= int(info["total_episodes"])
    except (UserError, KeyError, TypeError, ValueError, OSError, pa.ArrowException):  # `read_set` reports what is wrong
        return True


def read_set(root: Path, remedy: str) -> LeRobotSet:
    """Read a set's metadata.

    Args:
        remedy: a sentence for the messages: how to get the set again.

    Raises:
        UserError: a file is missing or damaged, or the set's format is not LeRobot v3.
    """
    info = read_json(root / INFO)
    version = info.get("codebase_version") if isinstance(info, dict) else None
    if not isinstance(version, str):
        raise UserError(f"{root / INFO} has no 'codebase_version': it does not describe a LeRobot data set. {remedy}")
    if not version.startswith("v3."):
        older = version.startswith(("v1.", "v2."))
        raise UserError(
            f"the data set in {root} has LeRobot's format {version}; clbench reads v3. "
            + ("Convert it with LeRobot's lerobot/scripts/convert_dataset_v21_to_v30.py, or use a set in format v3."
               if older else "Use a newer clbench.")
        )  # fmt: skip
    try:
        features = _features(info["features"])
        if info["data_path"] != DATA_PATH:
            raise ValueError(f"its data_path is {info['data_path']!r}, not LeRobot v3's")
        videos = [k for k, f in features.items() if f["dtype"] == "video"]
        if videos and info["video_path"] != VIDEO_PATH:
            raise ValueError(f"its video_path is {info['video_path']!r}, not LeRobot v3's")
        fps = float(info["fps"])
        if not 0 < fps < 10_000:
            raise ValueError(f"its fps is {fps}")
        found = LeRobotSet(
            root, fps, info.get("robot_type"), features, _texts(root / TASKS), _episodes(root / EPISODES, videos)
        )
        total = (info["total_episodes"], info["total_frames"])
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as e:
        if isinstance(e, UserError):
            raise
        what = f"'{e.args[0]}' is missing" if isinstance(e, KeyError) else " ".join(str(e).split())
        raise UserError(f"the data set in {root} is damaged: {what}. {remedy}") from e
    listed = (len(found.episodes), sum(e.frames for e in found.episodes))
    if listed != total:
        raise UserError(
            f"the data set in {root} is damaged or incomplete: {INFO} states {total[0]} episodes with {total[1]} "
            f"frames, but {EPISODES} lists {listed[0]} with {listed[1]}. {remedy}"
        )
    return found


def _features(raw: Any) -> dict[str, dict[str, Any]]:
    features: dict[str, dict[str, Any]] = {}
    for name, f in raw.items():
        if "/" in name or name in ("", ".", "..") or not name.isprintable():
            raise ValueError(f"{name!r} is not a feature name")
        shape = [int(n) for n in f["shape"]]
        features[name] = {**f, "dtype": str(f["dtype"]), "shape": shape}
    return features


def image_shape(feature: Mapping[str, Any]) -> tuple[int, ...]:
    """An image feature's (height, width, channels), in whichever order the set gives it."""
    shape, names = tuple(feature["shape"]), feature.get("names")
    first = str(names[0]) if isinstance(names, list | tuple) and names else ""
    channels_first = first.startswith("channel") or (not first and len(shape) == 3 and shape[0] == 3 != shape[2])
    return (*shape[1:], shape[0]) if channels_first else shape


def _texts(path: Path) -> dict[int, str]:
    import pyarrow.parquet as pq

    if not path.is_file():
        raise ValueError(f"{TASKS} is missing")
    table = pq.read_table(path)
    columns = [c for c in table.column_names if c != "task_index"]
    if len(columns) != 1 or "task_index" not in table.column_names:
        raise ValueError(f"{TASKS} has columns {table.column_names}")
    numbers, texts = table["task_index"].to_pylist(), table[columns[0]].to_pylist()
    if len(set(numbers)) != len(numbers) or not all(isinstance(t, str) for t in texts):
        raise ValueError(f"{TASKS} gives a task index twice or an instruction that is not a string")
    return {int(n): str(t) for n, t in zip(numbers, texts, strict=True)}


def _episodes(folder: Path, videos: Sequence[str]) -> tuple[Episode, ...]:
    import pyarrow.parquet as pq

    paths = sorted(folder.glob("*/*.parquet"))
    if not paths:
        raise ValueError(f"{EPISODES} is missing")
    places = ["data", *(f"videos/{v}" for v in videos)]
    columns = ["episode_index", "tasks", "length", "dataset_from_index", "dataset_to_index"]
    columns += [f"{place}/{part}" for place in places for part in ("chunk_index", "file_index")]
    episodes: list[Episode] = []
    for path in paths:
        names = set(pq.read_schema(path).names)
        absent = [c for c in columns if c not in names]
        if absent:
            raise ValueError(f"{path.name} of {EPISODES} lacks {absent[0]}")
        for row in pq.read_table(path, columns=columns).to_pylist():
            files = [DATA_PATH.format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])]
            for v in videos:
                chunk, file = row[f"videos/{v}/chunk_index"], row[f"videos/{v}/file_index"]
                files.append(VIDEO_PATH.format(video_key=v, chunk_index=chunk, file_index=file))
            start, stop = int(row["dataset_from_index"]), int(row["dataset_to_index"])
            if stop - start != row["length"] or start < 0 or stop <= start:
                raise ValueError(f"episode {row['episode_index']} has length {row['length']}, frames {start} to {stop}")
            episodes.append(Episode(int(row["episode_index"]), tuple(row["tasks"]), start, stop, tuple(files)))
    if [e.index for e in episodes] != list(range(len(episodes))):  # LeRobot looks up episodes by position
        raise ValueError(f"{EPISODES} does not list episodes 0 to {len(episodes) - 1} in order")
    return tuple(episodes)


def missing_files(found: LeRobotSet, episodes: Collection[int]) -> list[str]:
    """Which of the files that hold these episodes are missing or empty."""
    return [f for f in found.files(episodes) if not _is_there(found.root / f)]


def _is_there(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def read_columns(files: Iterable[Path], columns: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Read numeric columns of parquet files, in the order of the files.

    Args:
        columns: name → shape of one frame's value; () and (1,) give arrays of shape (frames,).

    Returns:
        Arrays (frames, *shape) with the types that the files have.

    Raises:
        ValueError, OSError (pyarrow's errors): a file is damaged, or lacks a column, or a value has another shape.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = [pq.ParquetFile(path).read(columns=list(columns)) for path in files]
    table = pa.concat_tables(parts)
    return {name: _as_array(name, table[name], shape) for name, shape in columns.items()}


def iter_columns(
    path: Path, columns: Mapping[str, Sequence[int]], rows: int = 65536
) -> Iterator[dict[str, np.ndarray]]:
    """`read_columns` of one file, at most `rows` frames at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for batch in pq.ParquetFile(path).iter_batches(batch_size=rows, columns=list(columns)):
        table = pa.Table.from_batches([batch])
        yield {name: _as_array(name, table[name], shape) for name, shape in columns.items()}


def _as_array(name: str, column: Any, shape: Sequence[int]) -> np.ndarray:
    """A column of a pyarrow table as an array (frames, *shape)."""
    import pyarrow as pa

    if column.null_count:
        raise ValueError(f"'{name}' has {column.null_count} empty values")
    flat = column.combine_chunks()
    while pa.types.is_nested(flat.type):
        flat = flat.flatten()
    if flat.null_count:
        raise ValueError(f"'{name}' has {flat.null_count} empty values")
    value = () if tuple(shape) == (1,) else tuple(shape)
    return np.ascontiguousarray(flat.to_numpy(zero_copy_only=False)).reshape(len(column), *value)


def check_frames(
    found: LeRobotSet, task_of: Mapping[int, int], names: Mapping[str, str], remedy: str
) -> tuple[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Compare the frames of some episodes with the metadata; return their fingerprint and each feature's range.

    Args:
        task_of: episode index → the task index that all of its frames must have.
        names: the low-dimensional features to read, at least a state or an action: name there → name in clbench.

    Returns:
        The fingerprint and, by clbench's names, the least and greatest values. The fingerprint is the sha256 (hex) of
        fps, names and shapes of the features, the instructions of these tasks, and, episode by episode in ascending
        order, episode and task index and all values of the features. Images are not read.

    Raises:
        UserError: a file is missing or damaged, or the frames differ from those that the metadata lists.
    """
    absent = missing_files(found, task_of)
    if absent:
        raise UserError(f"the data set in {found.root} is incomplete: {len(absent)} of the files that this stream "
                        f"needs are missing, e.g. {absent[0]}. {remedy}")  # fmt: skip
    low = {n: found.features[n]["shape"] for n in names}
    files = [f for f in found.files(task_of) if f.endswith(".parquet")]
    try:
        arrays = read_columns(
            [found.root / f for f in files], {**low, "index": (), "episode_index": (), "task_index": ()}
        )
    except (ValueError, KeyError, OSError) as e:
        raise UserError(f"the data set in {found.root} is damaged: {' '.join(str(e).split())}. {remedy}") from e
    digest = hashlib.sha256()
    texts = {k: found.texts[k] for k in sorted(set(task_of.values()))}
    shapes = {names[n]: list(shape) for n, shape in sorted(low.items())}
    digest.update(json.dumps([found.fps, shapes, texts], sort_keys=True).encode())
    order = np.argsort(arrays["index"], kind="stable")
    index = arrays["index"][order]
    ranges: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for episode in (e for e in found.episodes if e.index in task_of):  # in ascending order
        rows = order[np.searchsorted(index, episode.start) : np.searchsorted(index, episode.stop)]
        right = len(rows) == episode.frames and (arrays["episode_index"][rows] == episode.index).all()
        if not right or (arrays["index"][rows] != np.arange(episode.start, episode.stop)).any():
            raise UserError(
                f"the data set in {found.root} is damaged: the frames of episode {episode.index} are not those that "
                f"{EPISODES} lists. {remedy}"
            )
        if (arrays["task_index"][rows] != task_of[episode.index]).any():
            raise UserError(
                f"the data set in {found.root} is damaged: frames of episode {episode.index} have other tasks than "
                f"{EPISODES} says. {remedy}"
            )
        digest.update(np.array([episode.index, task_of[episode.index], episode.frames], dtype="<i8").tobytes())
        for name in sorted(low):
            with np.errstate(over="ignore"):  # to infinity, which is rejected
                values = arrays[name][rows].astype("<f4", copy=False)
            if not np.isfinite(values).all():
                raise UserError(f"the data set in {found.root} has values in '{name}' (episode {episode.index}) that "
                                f"are not finite. {remedy}")  # fmt: skip
            digest.update(np.ascontiguousarray(values).tobytes())
            low_end, high_end = ranges.get(names[name], (values[0], values[0]))
            ranges[names[name]] = np.minimum(low_end, values.min(0)), np.maximum(high_end, values.max(0))
    return digest.hexdigest(), ranges
