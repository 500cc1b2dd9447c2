"""RLDS data sets as TFDS lays them out: dataset_info.json, features.json and TFRecord shards of one split.

A record is one episode: a tf.train.Example whose features are named by their path, "steps/observation/image", with the
values of all steps one after the other. Image features hold encoded files (JPEG, PNG), a step each.

The modified LIBERO sets of OpenVLA (libero_*_no_noops) hold observations made before the action of their step; images
that are already rotated by 180 degrees; the state as end-effector xyz, axis-angle and two finger positions; and
LIBERO's own actions.

Formats: TFDS's proto files (dataset_info.proto, feature.proto) and its naming of shards; the RLDS builder of the
modified LIBERO sets and regenerate_libero_dataset.py in OpenVLA's repository.
"""

from __future__ import annotations

import hashlib
import io
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as shown
from typing import Any

import numpy as np
from PIL import Image

from clbench.data.importing.example import Malformed, Values, parse_example, values
from clbench.data.importing.recording import (
    IMAGE,
    MAX_PIXELS,
    NUMBER,
    TEXT,
    Defaults,
    Episode,
    Feature,
    Orientation,
    turned,
)
from clbench.data.importing.tfrecord import AGAIN, records
from clbench.envs.making import family
from clbench.errors import UserError, nearest
from clbench.io import read_json

INFO, FEATURES = "dataset_info.json", "features.json"
STEPS = "steps"
CAMERAS = "observation.images."
TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
NUMBERS = re.compile(r"(?:float(?:16|32|64)|bfloat16|u?int(?:8|16|32|64)|bool)\Z")
STORED = {"none": "", "bytes": "bytes", "zlib": "zlib"}  # encodings of a tensor
LARGEST_VALUE = 2**20  # bytes of one step's tensor that is stored encoded
LARGEST_SIDE = 10**6
LIBERO_CAMERAS = ("observation/image", "observation/wrist_image")


@dataclass(frozen=True)
class _Column(Feature):
    """A feature with how its values are stored.

    Attributes:
        key: in a record.
        encoding: of a tensor: "" (numbers in the message), bytes or zlib.
        dtype: of a tensor's values.
        each_step: False: one value for the episode.
    """

    key: str = ""
    encoding: str = ""
    dtype: str = ""
    each_step: bool = True


class Rlds:
    """An RLDS data set as a `Recording`.

    Args:
        folder: of the set, of one version of it, or above it where there is only one.
        split: which one to read; None: the only one, else "train".
        orientation: how to turn images; None: not at all.

    Raises:
        UserError: there is no such set, a description or a shard is missing or damaged.
    """

    format = "rlds"

    def __init__(self, folder: Path, split: str | None = None, orientation: Orientation | None = None) -> None:
        self.folder = _version_folder(folder)
        self._orientation: Orientation = orientation or "as_is"
        self.features: Mapping[str, _Column] = _features(self.folder / FEATURES)
        self._info = read_json(self.folder / INFO)
        try:
            chosen, shards = _shards(self.folder, self._info, split)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            if isinstance(e, UserError):
                raise
            what = f"'{e.args[0]}' is missing" if isinstance(e, KeyError) else str(e)
            raise UserError(f"{self.folder / INFO} does not describe a TFDS data set: {what}. {AGAIN}") from e
        self._shards = shards
        self.files = tuple(path for path, _ in shards)
        self.episodes = sum(_records_in(path) if n is None else n for path, n in shards)
        if self.episodes == 0:
            raise UserError(f"the split '{chosen}' in {self.folder} has no episodes.")
        self.notes = {"split": chosen, "images": self._orientation}
        self.defaults = _defaults(self.features)
        self._sums: dict[str, tuple[int, str]] = {}

    def read(self, check: bool) -> Iterator[Episode]:
        """Yield all episodes, shard by shard."""
        for path, expected in self._shards:
            digest = hashlib.sha256()
            number = -1
            seen = (lambda _: None) if check else digest.update
            for number, payload in enumerate(records(path, check, seen)):
                yield _Record(f"record {number} of {path}", payload, self.features, self._orientation)
            if expected is not None and number + 1 != expected:
                raise UserError(f"{path} has {number + 1} records, and {INFO} says {expected}. {AGAIN}")
            if not check:
                self._sums[path.name] = path.stat().st_size, digest.hexdigest()

    def digests(self) -> dict[str, tuple[int, str]]:
        """Return name → bytes and sha256 of the descriptions and of the shards."""
        described = {}
        for name in (INFO, FEATURES):
            data = (self.folder / name).read_bytes()
            described[name] = len(data), hashlib.sha256(data).hexdigest()
        return described | self._sums


def _version_folder(folder: Path) -> Path:
    """The folder with the descriptions: the one given, or the only one up to two levels below it."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}.")
    found = [folder] if (folder / INFO).is_file() else []
    for pattern in ("*", "*/*"):
        found = found or sorted(p.parent for p in folder.glob(f"{pattern}/{INFO}"))
    if not found:
        raise UserError(
            f"{folder} is not an RLDS data set as TFDS writes it: there is no {INFO} in it or below it. Name the "
            "folder that holds dataset_info.json, features.json and the shards, often the version's (…/1.0.0)."
        )
    if len(found) > 1:
        listed = ", ".join(str(p.relative_to(folder)) for p in found[:8])
        raise UserError(f"there are {len(found)} data sets below {folder}: {listed}. Name one of them.")
    if not (found[0] / FEATURES).is_file():
        raise UserError(f"{found[0]} has no {FEATURES}, which says what the records hold. {AGAIN}")
    return found[0]


def _shards(folder: Path, info: Mapping[str, Any], split: str | None) -> tuple[str, list[tuple[Path, int | None]]]:
    """The split, and its shards with the number of records that each is said to have (None: not said)."""
    kind = str(info.get("fileFormat", "tfrecord"))
    if kind != "tfrecord":
        raise UserError(f"the data set in {folder} is stored as '{kind}'. Only TFRecord files can be imported.")
    splits = {str(s["name"]): s for s in info["splits"]}
    chosen = split or (next(iter(splits)) if len(splits) == 1 else "train")
    if chosen not in splits:
        raise UserError(f"the data set in {folder} has no split '{chosen}'.{nearest(chosen, splits)} Give --split.")
    name = _plain(info["name"])
    template = str(splits[chosen].get("filepathTemplate") or TEMPLATE)
    lengths: list[int | None] = [int(n) for n in splits[chosen].get("shardLengths", [])]
    if any(n is not None and n < 0 for n in lengths):
        raise ValueError("a shard has a negative number of records")

    def shard(at: str) -> Path:
        parts = {"DATASET": name, "SPLIT": _plain(chosen), "FILEFORMAT": kind, "SHARD_X_OF_Y": at}
        return folder / _plain(re.sub(r"\{(\w+)\}", lambda m: parts[m[1]], template))

    count = len(lengths) or _count(folder, shard("").name)
    wanted = [shard(f"{i:05d}-of-{count:05d}") for i in range(count)]
    missing = [path.name for path in wanted if not path.is_file()]
    if missing or not wanted:
        there = sorted(p.name for p in folder.iterdir() if ".tfrecord" in p.name)
        raise UserError(
            f"the data set in {folder} is incomplete: {len(missing) or 'all'} of its {count or ''} shards are missing, "
            f"first {(missing or [shard('…').name])[0]}"
            + (f" ({len(there)} are there, first {there[0]})" if there else "")
            + ". Copy them from where the data set came from, and give the command again."
        )
    return chosen, list(zip(wanted, lengths or [None] * count, strict=True))


def _plain(name: Any) -> str:
    """A part of a file's name; ValueError for one that leads elsewhere."""
    if not isinstance(name, str) or "/" in name or name in ("", ".", "..") or not name.isprintable():
        raise ValueError(f"{shown(name)} is not a file name")
    return name


def _count(folder: Path, prefix: str) -> int:
    """How many shards there must be, by the names of those that are there."""
    counts = {int(m[1]) for p in folder.iterdir() if p.name.startswith(prefix) and (m := _OF.search(p.name))}
    if len(counts) > 1:
        raise UserError(f"the shards in {folder} belong to several data sets: of {sorted(counts)} shards. {AGAIN}")
    return counts.pop() if counts else 0


_OF = re.compile(r"-of-(\d{5})\Z")


def _records_in(path: Path) -> int:
    return sum(1 for _ in records(path, check=False))


def _features(path: Path) -> dict[str, _Column]:
    """The features that a record has, by their path without "steps/"."""
    raw = read_json(path)
    found: dict[str, _Column] = {}
    try:
        if "featuresDict" not in raw and "type" in raw:
            raise UserError(f"{path} was written by a version of TFDS from before 2022, whose format cannot be read. "
                            "Load the set with a newer TFDS and save it again.")  # fmt: skip
        for key, node in raw["featuresDict"]["features"].items():
            if key == STEPS:
                _walk(node["sequence"]["feature"], "", f"{STEPS}", True, found)
            else:
                _walk(node, key, key, False, found)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        if isinstance(e, UserError):
            raise
        what = f"'{e.args[0]}' is missing" if isinstance(e, KeyError) else str(e)
        raise UserError(f"{path} does not describe features as TFDS does: {what}. {AGAIN}") from e
    if not any(column.each_step for column in found.values()):
        raise UserError(f"{path} describes no '{STEPS}': it is not an RLDS data set, whose records are episodes.")
    return found


def _walk(node: Mapping[str, Any], name: str, key: str, each_step: bool, found: dict[str, _Column]) -> None:
    if "featuresDict" in node:
        for child, below in node["featuresDict"]["features"].items():
            _walk(below, f"{name}/{child}" if name else child, f"{key}/{child}", each_step, found)
        return
    make = _Column
    if "image" in node:
        shape = _shape(node["image"])
        kind = IMAGE if node["image"].get("dtype", "uint8") == "uint8" and shape[2:] == (3,) else "other image"
        found[name] = make(kind, shape, key, each_step=each_step)
    elif "text" in node:
        found[name] = make(TEXT, (), key, each_step=each_step)
    elif "classLabel" in node:
        found[name] = make(NUMBER, (), key, "", "int64", each_step)
    elif "tensor" in node:
        tensor, shape = node["tensor"], _shape(node["tensor"])
        dtype = str(tensor["dtype"])
        encoding = str(tensor.get("encoding", "none")).lower()
        if dtype in ("string", "object") and not shape:
            found[name] = make(TEXT, (), key, each_step=each_step)
        elif NUMBERS.match(dtype) and encoding in STORED and not {-1, 0} & set(shape):
            found[name] = make(NUMBER, shape, key, STORED[encoding], dtype, each_step)
        else:
            found[name] = make(f"{dtype} tensor, {encoding}", shape, key, each_step=each_step)
    else:
        found[name] = make(str(node.get("pythonClassName", "unknown")).rpartition(".")[2], (), key, each_step=each_step)


def _shape(node: Mapping[str, Any]) -> tuple[int, ...]:
    shape = tuple(int(n) for n in node.get("shape", {}).get("dimensions", []))
    if any(n < -1 or n > LARGEST_SIDE for n in shape):
        raise ValueError(f"{shape} is not a shape")
    return shape


def _defaults(features: Mapping[str, _Column]) -> Defaults:
    """Images of the observation by their own names, or by those of LIBERO where there are LIBERO's two."""
    seen = [n for n, f in features.items() if f.kind == IMAGE and n.startswith("observation/") and f.each_step]
    names = {feature: CAMERAS + feature.removeprefix("observation/").replace("/", "_") for feature in seen}
    if set(LIBERO_CAMERAS) <= set(seen):
        names |= dict(zip(LIBERO_CAMERAS, family("libero").cameras, strict=True))
    return Defaults(
        cameras={key: feature for feature, key in names.items()},
        state=(("observation/state",), ("observation/proprio",)),
        action=(("action",),),
        task=("language_instruction", "observation/natural_language_instruction"),
    )


@dataclass
class _Record:
    """One episode."""

    where: str
    payload: bytes
    columns: Mapping[str, _Column]
    orientation: Orientation
    _parsed: dict[str, memoryview] | None = field(default=None, repr=False)

    def numbers(self, feature: str) -> np.ndarray:
        column = self.columns[feature]
        found = self._values(feature)
        if column.encoding:
            parts = [self._tensor(feature, value) for value in self._bytes(feature, found)]
            return np.stack(parts) if parts else np.zeros((0, column.width))
        if not isinstance(found, np.ndarray):
            raise self._damaged(f"'{feature}' holds bytes instead of numbers")
        if len(found) % column.width:
            raise self._damaged(f"'{feature}' has {len(found)} numbers, no multiple of {column.width}")
        return found.reshape(-1, column.width).astype(np.float64)

    def count(self, feature: str) -> int:
        return len(self._bytes(feature, self._values(feature)))

    def images(self, feature: str) -> Iterator[np.ndarray]:
        shape = self.columns[feature].shape
        for i, data in enumerate(self._bytes(feature, self._values(feature))):
            yield turned(self._decoded(feature, i, data, shape), self.orientation)

    def texts(self, feature: str, frames: int) -> list[str]:
        try:
            texts = [str(value, "utf-8") for value in self._bytes(feature, self._values(feature))]
        except UnicodeDecodeError as e:
            raise self._damaged(f"'{feature}' is not UTF-8") from e
        return texts if self.columns[feature].each_step or len(texts) != 1 else texts * frames

    def _decoded(self, feature: str, number: int, data: memoryview, shape: tuple[int, ...]) -> np.ndarray:
        try:
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
                size = image.height, image.width
                wrong = [n for n, wanted in zip(size, shape, strict=False) if wanted not in (n, -1)]
                if wrong or max(size) > MAX_PIXELS:
                    raise UserError(
                        f"{self.where}: image {number} of '{feature}' is {size[0]}×{size[1]} pixels; "
                        + (f"{FEATURES} says {shape[0]}×{shape[1]}." if wrong else f"at most {MAX_PIXELS} are read.")
                    )
                if image.mode not in ("RGB", "L"):
                    raise UserError(f"{self.where}: image {number} of '{feature}' is not RGB but {image.mode}.")
                return np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            if isinstance(e, UserError):
                raise
            raise self._damaged(f"image {number} of '{feature}' cannot be decoded") from e

    def _tensor(self, feature: str, value: memoryview) -> np.ndarray:
        column = self.columns[feature]
        dtype = np.dtype(column.dtype if column.dtype != "bfloat16" else "float16").newbyteorder("<")
        size = dtype.itemsize * column.width
        try:
            if column.dtype == "bfloat16" or size > LARGEST_VALUE:
                raise UserError(f"'{feature}' ({column.dtype} {column.shape}) cannot be imported. Leave it out.")
            data = zlib.decompressobj().decompress(bytes(value), size + 1) if column.encoding == "zlib" else value
            return np.frombuffer(data, dtype=dtype, count=column.width).astype(np.float64)
        except (zlib.error, ValueError) as e:
            if isinstance(e, UserError):
                raise
            raise self._damaged(f"a value of '{feature}' is not {column.dtype} {column.shape}") from e

    def _values(self, feature: str) -> Values:
        column = self.columns[feature]
        try:
            if self._parsed is None:
                self._parsed = parse_example(self.payload)
            if column.key not in self._parsed:
                raise UserError(
                    f"{self.where} has no '{column.key}', which {FEATURES} lists. It has "
                    f"{', '.join(sorted(self._parsed)[:20]) or 'nothing'}."
                )
            return values(self._parsed[column.key])
        except Malformed as e:
            raise self._damaged(str(e)) from e

    def _bytes(self, feature: str, found: Values) -> list[memoryview]:
        if isinstance(found, np.ndarray):
            if not len(found):  # an empty list of any kind
                return []
            raise self._damaged(f"'{feature}' holds numbers instead of bytes")
        return found

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.where} is damaged: {what}. {AGAIN}")
