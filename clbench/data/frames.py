"""Training samples of tasks: the same dictionaries LeRobotDataset gives, fetched a batch at a time.

A sample is one frame with its action chunk. Numbers are held as tensors and indexed (about 100 times faster than
per-item reads); camera images are decoded once, kept on disk (frame_cache.py) and indexed as well. Only where they
would take too much room do samples with images go through LeRobotDataset's own item access, in loader workers.
Batches are raw: LeRobot keys, not normalised, with `task` texts; images are uint8 (n, channels, height, width), or
(n, steps, channels, height, width) for a policy that looks at several.
"""

from __future__ import annotations

import bisect
import itertools
import os
import re
import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from clbench.data.frame_cache import cache_folder, cached_features, cached_images, decoded_images
from clbench.data.lerobot_set import BOOKKEEPING, image_shape, read_columns
from clbench.data.task import Task
from clbench.envs.base import STATE_KEY
from clbench.errors import UserError
from clbench.io import read_json
from clbench.seeding import generator
from clbench.stopping import belong_to, how_ended
from clbench.terminal import tell

Batch = dict[str, Any]
Deltas = dict[str, list[int]]  # feature → frame offsets, e.g. {"action": [0, …, 7]}

# LeRobot asks the hub for a set in which it finds anything missing, even a folder for its cache. What is read here is
# complete on this machine: this is not a valid name on a hub, so the request fails before it is sent.
NO_HUB = "on this machine"
NOT_NUMBERS = ("string", "language", "image", "video")
ENCODED_AT_ONCE = 32  # images
ACTION_PADDED = "action_dim_is_pad"  # key of a batch: (n, A), which numbers of the actions were added (dataset.pad)
CACHE_GB = 20.0  # of decoded images of a stream, unless train.frame_cache_gb says otherwise


class FrameEncoder(Protocol):
    """What turns images into features, always in the same way (clbench.policies.features).

    Attributes:
        cameras: keys of the images → keys of their features in a batch.
        shape: (tokens, width) of an image's features.
    """

    cameras: dict[str, str]
    shape: tuple[int, int]

    def identity(self, camera: str) -> str:
        """Identifies the encoder's weights and all that is done to a camera's images before it."""
        ...

    def encode(self, camera: str, images: Tensor) -> Tensor:
        """Features (n, tokens, width), float32 on the CPU, of images (n, channels, height, width), uint8."""
        ...


def frame_deltas(policy: PreTrainedConfig, features: dict[str, Any]) -> Deltas:
    """Return the frame offsets that a policy needs of each feature (its history and its action chunk)."""
    deltas: Deltas = {}
    for key in features:
        if key == "action" and policy.action_delta_indices is not None:
            deltas[key] = list(policy.action_delta_indices)
        elif key.startswith("observation.") and policy.observation_delta_indices is not None:
            deltas[key] = list(policy.observation_delta_indices)
    return deltas


@dataclass
class FrameTable:
    """All low-dimensional columns of one data set as tensors, with each frame's episode bounds.

    Rows are in the order of the files. If only some of a set's files are here, the rows are those files' frames; column
    "index" has a frame's number in the full set.
    """

    columns: dict[str, Tensor]
    episode_from: Tensor  # (N,) first row of the frame's episode
    episode_to: Tensor  # (N,) one past its last row
    episode_start: dict[int, tuple[int, int]]

    @staticmethod
    def load(root: Path, names: dict[str, str] | None = None, pad: Mapping[str, int] | None = None) -> FrameTable:
        """Read the table from the parquet files; no image is read.

        Args:
            names: features to read → their names here; None = all, under their own names.
            pad: name here → numbers that each of its vectors is lengthened to, with zeros.
        """
        features = read_json(root / "meta" / "info.json")["features"]
        names = all_names(names, features)
        low = {k: f["shape"] for k, f in features.items() if k in names and f["dtype"] not in NOT_NUMBERS}
        try:
            arrays = read_columns(sorted((root / "data").glob("*/*.parquet")), low)
        except (ValueError, KeyError, OSError) as e:
            raise UserError(f"the data set in {root} is damaged: {' '.join(str(e).split())}. Get it again.") from e
        columns: dict[str, Tensor] = {}
        for key, array in arrays.items():
            real = array.dtype in (np.float64, np.float16) or names[key] in (STATE_KEY, "action")
            columns[names[key]] = torch.tensor(array, dtype=torch.float32 if real else None)
        for name, width in (pad or {}).items():
            columns[name] = lengthened(columns[name].reshape(len(columns[name]), -1), width)
        episode = columns["episode_index"]
        edges = [0, *((episode[1:] != episode[:-1]).nonzero()[:, 0] + 1).tolist(), len(episode)]
        start = {int(episode[a]): (a, b) for a, b in itertools.pairwise(edges)}
        if len(start) != len(edges) - 1:
            raise UserError(f"the data set in {root} is damaged: an episode's frames are scattered. Get it again.")
        lengths = torch.tensor(edges).diff()
        episode_from = torch.repeat_interleave(torch.tensor(edges[:-1]), lengths)
        return FrameTable(columns, episode_from, episode_from + torch.repeat_interleave(lengths, lengths), start)

    def window(self, key: str, frames: Tensor, offsets: list[int]) -> tuple[Tensor, Tensor]:
        """Return values (n, len(offsets), …) and padding (n, len(offsets)): outside an episode its edge repeats."""
        rows, pad = self.rows(frames, offsets)
        return self.columns[key][rows], pad

    def rows(self, frames: Tensor, offsets: list[int]) -> tuple[Tensor, Tensor]:
        """Return which rows (n, len(offsets)) such a window has, and where it is padded."""
        want = frames[:, None] + torch.tensor(offsets)
        low, high = self.episode_from[frames][:, None], self.episode_to[frames][:, None] - 1
        return want.clamp(low, high), (want < low) | (want > high)


def lengthened(values: Tensor, width: int) -> Tensor:
    """Vectors (..., D) with zeros at their end, (..., width)."""
    return torch.nn.functional.pad(values, (0, width - values.shape[-1]))


def used_features(task: Task, described: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """LeRobot's description of each feature that is used of a task's data, by its name here, as batches have it."""
    names = all_names(task.features, described)
    found = {here: described_feature(described[there], here) for there, here in names.items()}
    for camera, size in (task.resize or {}).items():
        found[camera] = {**found[camera], "shape": (size, size, 3)}
    for name, width in (task.pad or {}).items():
        found[name] = {**found[name], "shape": (width,), "names": None}
    return found


def _stretched(image: np.ndarray, size: int) -> np.ndarray:
    """An image, uint8 (height, width, 3), stretched to (size, size, 3): bilinear, averaging where it shrinks."""
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


def all_names(names: dict[str, str] | None, features: Iterable[str]) -> dict[str, str]:
    """Each used feature's name here, with the bookkeeping columns."""
    return {k: k for k in features} if names is None else {**{k: k for k in BOOKKEEPING}, **names}


class TaskFrames:
    """The samples of one task. `len` counts frames; `fetch(indices)` returns a raw batch.

    Attributes:
        features: LeRobot's description of each used feature, by its name here.
        decoded: whether each batch's images are decoded again; otherwise they are kept decoded, or there are none.
        cameras: name here → name in the data set.
    """

    def __init__(
        self,
        task: Task,
        policy: PreTrainedConfig,
        tables: dict[Path, FrameTable],
        metas: dict[Path, LeRobotDatasetMetadata],
    ) -> None:
        """`tables` and `metas` hold what was read of each data set so far; most tasks share theirs with others."""
        self.task = task
        self._policy = policy
        self._tables = tables
        if task.root not in metas:
            metas[task.root] = opened(task.root)
        self.meta = metas[task.root]
        self._names = all_names(task.features, self.meta.features)
        self.features = used_features(task, self.meta.features)
        width = int(self.meta.features[self._there("action")]["shape"][0]) if (task.pad or {}).get("action") else None
        self._padded = None if width is None else torch.arange(int(self.features["action"]["shape"][0])) >= width
        images = ("image", "video")
        self.cameras = {here: n for n, here in self._names.items() if self.features[here]["dtype"] in images}
        self.decoded = bool(self.cameras)
        self._kept: dict[str, Tensor] = {}
        self._features: dict[str, tuple[str, Tensor]] = {}  # camera → key in a batch, features of all frames
        self.deltas = frame_deltas(policy, self.features)

    def _there(self, here: str) -> str:
        """A feature's name in the data set."""
        return next(there for there, name in self._names.items() if name == here)

    @property
    def padded(self) -> Tensor | None:
        """(A,) which numbers of an action were added (dataset.pad); None where none can be."""
        return self._padded

    @property
    def table(self) -> FrameTable:
        if self.task.root not in self._tables:
            self._tables[self.task.root] = FrameTable.load(self.task.root, self.task.features, self.task.pad)
        return self._tables[self.task.root]

    @cached_property
    def _lerobot(self) -> tuple[LeRobotDataset, dict[int, int]]:
        """LeRobot's view of the task's episodes, and each frame's position in it, by its number in the full set."""
        there = {here: name for name, here in self._names.items()}
        seconds = {there[k]: [d / self.meta.fps for d in v] for k, v in self.deltas.items()}
        try:
            dataset = LeRobotDataset(
                repo_id=NO_HUB,
                root=self.task.root,
                episodes=sorted(self.task.episodes),
                delta_timestamps=seconds or None,
                video_backend=None if self.meta.video_keys else "pyav",  # not searched for without videos
            )
        except Exception as e:
            raise _unreadable(self.task.root, e) from e
        numbers = dataset.hf_dataset.with_format("numpy")["index"][:]
        return dataset, {int(n): i for i, n in enumerate(numbers)}

    @cached_property
    def frames(self) -> Tensor:
        """(n,) rows of the task's episodes in `table`."""
        starts = self.table.episode_start
        missing = [e for e in self.task.episodes if e not in starts]
        if missing:
            raise UserError(f"{self.task.root} has no episode {missing[0]}, which its own record lists. Make it again.")
        return torch.cat([torch.arange(*starts[e]) for e in self.task.episodes])

    @cached_property
    def _place(self) -> Tensor:
        """(N,) where each row of `table` stands in `frames`; −1 where it does not."""
        place = torch.full((len(self.table.episode_from),), -1)
        place[self.frames] = torch.arange(len(self.frames))
        return place

    def __len__(self) -> int:
        return len(self.frames)

    @cached_property
    def episode_of(self) -> Tensor:
        """(n,) which of the task's episodes (0-based) each sample belongs to."""
        bounds = self.table.episode_start
        lengths = torch.tensor([bounds[e][1] - bounds[e][0] for e in self.task.episodes])
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths)

    def sample_bytes(self) -> int:
        """Bytes of one stored sample: every feature the policy is given, with its history or chunk, uncompressed."""
        total = 0
        for key, feature in self.features.items():
            if key in BOOKKEEPING:
                continue
            size = 1 if feature["dtype"] in ("image", "video", "bool") else 4
            total += size * int(np.prod(feature["shape"])) * len(self.deltas.get(key, [0]))
        return total

    def image_bytes(self) -> int:
        """Bytes that all decoded images of the task take."""
        shapes = [self.features[camera]["shape"] for camera in self.cameras]
        return len(self) * sum(int(np.prod(shape)) for shape in shapes)

    def keep_decoded(self) -> None:
        """From now on index images that are decoded and kept on disk; they are decoded now where they are not yet."""
        folder = cache_folder(self.task.root)
        for here, there in self.cameras.items():
            height, width, channels = self.features[here]["shape"]
            what = f"{self.task.name}, {here}"
            shape = (len(self), height, width, channels)
            decode = partial(self._images, here)
            self._kept[here] = _read_only(cached_images(folder, there, self.task.episodes, shape, decode, what))
        self.decoded = False

    def keep_features(self, encoder: FrameEncoder) -> None:
        """From now on give a frozen encoder's features, kept on disk, in the place of all cameras' images; they are
        made now where they are not there yet."""
        folder = cache_folder(self.task.root)
        for here, there in self.cameras.items():
            size = (self.task.resize or {}).get(here)
            identity = encoder.identity(here) + ("" if size is None else f", of images of {size} x {size}")
            kept = cached_features(
                folder, there, identity, self.task.episodes, (len(self), *encoder.shape),
                partial(self._encoded, here, encoder), f"{self.task.name}, {here}",
            )  # fmt: skip
            self._features[here] = encoder.cameras[here], _read_only(kept)
        self.decoded = False

    def _encoded(self, camera: str, encoder: FrameEncoder) -> Iterator[np.ndarray]:
        """The features of a camera's images, in the order of `frames`."""
        images = iter(self._kept[camera].numpy()) if camera in self._kept else self._images(camera)
        while some := list(itertools.islice(images, ENCODED_AT_ONCE)):
            yield from encoder.encode(camera, torch.from_numpy(np.stack(some)).movedim(-1, -3)).numpy()

    def _images(self, camera: str) -> Iterator[np.ndarray]:
        """A camera's images as the task has them, in the order of `frames`."""
        there, size = self.cameras[camera], (self.task.resize or {}).get(camera)
        video = self.features[camera]["dtype"] == "video"
        images = (self._video_frames if video else self._image_frames)(there)
        return images if size is None else (_stretched(image, size) for image in images)

    def _image_frames(self, column: str) -> Iterator[np.ndarray]:
        """A column's images, in the order of `frames`; read file by file."""
        import pyarrow.parquet as pq

        wanted = set(self.task.episodes)
        place = {int(n): i for i, n in enumerate(self.table.columns["index"][self.frames].tolist())}
        ahead: dict[int, np.ndarray] = {}  # not their turn yet: the files' order of episodes may differ
        turn = 0

        columns = ["index", "episode_index", column]

        def values() -> Iterator[tuple[int, dict[str, Any]]]:
            for path in sorted((self.task.root / "data").glob("*/*.parquet")):
                for rows in pq.ParquetFile(path).iter_batches(batch_size=64, columns=columns):
                    for row in rows.to_pylist():
                        if row["episode_index"] in wanted:
                            yield place[row["index"]], row[column]

        places, images = itertools.tee(values())
        for (at, _), image in zip(places, decoded_images((v for _, v in images), self.task.root), strict=True):
            ahead[at] = image
            while turn in ahead:
                yield ahead.pop(turn)
                turn += 1

    def _video_frames(self, camera: str) -> Iterator[np.ndarray]:
        """A camera's frames, in the order of `frames`; decoded episode by episode."""
        from lerobot.datasets.video_utils import decode_video_frames

        table, meta = self.table, self.meta
        for e in self.task.episodes:
            path = self.task.root / meta.get_video_file_path(e, camera)
            start = float(meta.episodes[e][f"videos/{camera}/from_timestamp"])
            times = table.columns["timestamp"][slice(*table.episode_start[e])].double() + start
            for some in times.split(64):
                images = decode_video_frames(path, some.tolist(), 1e-4, return_uint8=True)
                yield from images.permute(0, 2, 3, 1).numpy()

    def fetch(self, indices: Tensor) -> Batch:
        """Return the samples at `indices` (n,), each in [0, len)."""
        if self.decoded:
            return packed(default_collate([self._item(int(i)) for i in indices]))
        frames = self.frames[indices]
        table = self.table
        batch: Batch = {}
        for key, column in table.columns.items():
            if key in self.deltas:
                batch[key], batch[f"{key}_is_pad"] = table.window(key, frames, self.deltas[key])
            else:
                batch[key] = column[frames]
        for key, (name, features) in self._features.items():
            if key in self.deltas:
                rows, batch[f"{key}_is_pad"] = table.rows(frames, self.deltas[key])
                batch[name] = features[self._place[rows]].flatten(1, 2)
            else:
                batch[name] = features[indices]
        for key, images in self._kept.items():
            if key in self._features:
                continue
            if key in self.deltas:
                rows, batch[f"{key}_is_pad"] = table.rows(frames, self.deltas[key])
                batch[key] = images[self._place[rows]].movedim(-1, -3)
            else:
                batch[key] = images[indices].movedim(-1, -3)
        if self._padded is not None:
            batch[ACTION_PADDED] = self._padded.expand(len(frames), -1)
        batch["task"] = [self.task.instruction] * len(frames)
        return batch

    def _item(self, i: int) -> dict[str, Any]:
        dataset, place = self._lerobot
        item = dataset[place[int(self.table.columns["index"][self.frames[i]])]]
        named = {}
        for there, here in self._names.items():
            value = item[there]
            real = here in (STATE_KEY, "action") or (torch.is_tensor(value) and value.dtype == torch.float64)
            named[here] = value.float() if real else value
            if here in (self.task.resize or {}):
                named[here] = _resized(named[here], self.task.resize[here])  # type: ignore[index]
            if here in (self.task.pad or {}):
                steps = [len(self.deltas[here])] if here in self.deltas else []  # LeRobot drops a dimension of 1
                named[here] = lengthened(named[here].reshape(*steps, -1), self.task.pad[here])  # type: ignore[index]
            if here in self.deltas:
                named[f"{here}_is_pad"] = item[f"{there}_is_pad"]
        if self._padded is not None:
            named[ACTION_PADDED] = self._padded
        named["task"] = self.task.instruction
        return named


def opened(root: Path) -> LeRobotDatasetMetadata:
    """LeRobot's description of the data set in a folder. UserError where it is not complete or not readable."""
    for part in ("meta/info.json", "meta/tasks.parquet", "meta/episodes", "data"):
        if not (root / part).exists():  # LeRobot would look for it on a hub
            raise UserError(
                f"there is no complete LeRobot data set in {root} ({part} is missing): run `clbench data make "
                f"{root.name}`."
            )
    try:
        return LeRobotDatasetMetadata(repo_id=NO_HUB, root=root)
    except Exception as e:  # LeRobot treats any missing file as a missing set
        raise _unreadable(root, e) from e


def _read_only(array: np.ndarray) -> Tensor:
    """A mapped array as a tensor, to which nobody may write."""
    with warnings.catch_warnings():  # torch warns of arrays that cannot be written
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


def _resized(images: Tensor, size: int) -> Tensor:
    """Images in [0, 1], (..., 3, height, width), that came from bytes, as `_stretched` makes them."""
    as_bytes = (images * 255).round().to(torch.uint8).movedim(-3, -1)
    flat = as_bytes.reshape(-1, *as_bytes.shape[-3:]).numpy()
    stretched = torch.from_numpy(np.stack([_stretched(image, size) for image in flat]))
    return stretched.reshape(*as_bytes.shape[:-3], size, size, 3).movedim(-1, -3).float() / 255


def _unreadable(root: Path, e: Exception) -> UserError:
    """Reports what LeRobot found missing, rather than the failure of asking a hub for it."""
    first: BaseException = e
    while first.__context__ is not None:
        first = first.__context__
    text = " ".join(str(first).split()) or type(first).__name__
    return UserError(f"LeRobot cannot open the data set in {root}: {text}.")


def described_feature(feature: dict[str, Any], name: str = "") -> dict[str, Any]:
    """A feature as LeRobot describes it, by its `name` here; an image's shape is (height, width, channels), with these
    names, and states and actions are float32, whatever numbers the set has."""
    if feature["dtype"] not in ("image", "video"):
        return {**feature, "dtype": "float32"} if name in (STATE_KEY, "action") else feature
    return {**feature, "shape": image_shape(feature), "names": ["height", "width", "channels"]}


class StreamFrames:
    """The samples of several visits. A reference is a row (visit, index) of an int64 tensor (n, 2)."""

    def __init__(
        self, visits: Sequence[tuple[Task, ...]], policy: PreTrainedConfig, cache_gb: float = CACHE_GB
    ) -> None:
        """`cache_gb`: keep decoded images on disk while they take no more than this; else decode for every batch."""
        self._tables: dict[Path, FrameTable] = {}
        metas: dict[Path, LeRobotDatasetMetadata] = {}
        self._parts = [[TaskFrames(t, policy, self._tables, metas) for t in tasks] for tasks in visits]
        self._copies: dict[int, tuple[Tensor, Batch]] = {}
        self._keep_decoded(cache_gb)

    def _keep_decoded(self, cache_gb: float) -> None:
        seen = [p for parts in self._parts for p in parts if p.cameras]
        if not seen or cache_gb == 0:
            return
        needed = sum({(p.task.root, p.task.episodes): p.image_bytes() for p in seen}.values())
        if needed > cache_gb * 1e9:
            tell(
                f"note: the decoded images would take {needed / 1e9:.1f} GB, more than train.frame_cache_gb="
                f"{cache_gb:g}: they are decoded again for every batch, by train.num_workers processes."
            )
            return
        for part in seen:
            part.keep_decoded()

    def keep_features(self, encoder: FrameEncoder, cache_gb: float) -> bool:
        """From now on give a frozen encoder's features in the place of images, if they take no more than `cache_gb`.

        Returns:
            whether that is so; if not, why not is said.
        """
        parts = [p for parts in self._parts for p in parts]
        if set(self.cameras) != set(encoder.cameras):
            tell("note: the policy does not encode all cameras of the data: features are made again in every step.")
            return False
        each = 4 * int(np.prod(encoder.shape)) * len(encoder.cameras)
        needed = sum({(p.task.root, p.task.episodes): len(p) for p in parts}.values()) * each
        if needed > cache_gb * 1e9:
            tell(
                f"note: the features of the frozen image encoder would take {needed / 1e9:.1f} GB, more than "
                f"train.feature_cache_gb={cache_gb:g}: they are made again in every step."
            )
            return False
        for part in parts:
            part.keep_features(encoder)
        return True

    @property
    def decoded(self) -> bool:
        return any(f.decoded for parts in self._parts for f in parts)

    @property
    def cameras(self) -> list[str]:
        """Keys of the camera images."""
        return list(self._parts[0][0].cameras)

    def parts(self, k: int) -> list[TaskFrames]:
        """The tasks of visit k (one, except under joint training)."""
        return self._parts[k]

    def length(self, k: int) -> int:
        return sum(len(p) for p in self._parts[k])

    def order(self, k: int, *key: int | str) -> SampleOrder:
        """The order in which a phase of visit k goes through its samples, a function of `key`."""
        weights = [p.task.weight for p in self._parts[k]]
        if len(set(weights)) == 1:
            return SampleOrder(self.length(k), *key)
        of_frame = torch.cat([torch.full((len(p),), w, dtype=torch.float64)
                              for p, w in zip(self._parts[k], weights, strict=True)])  # fmt: skip
        return WeightedOrder(of_frame, *key)

    def mean_images(self, at_most: int = 2048) -> dict[str, np.ndarray]:
        """Each camera's mean image over all visits, uint8 (height, width, 3); of `at_most` frames, evenly spaced."""
        counts = [self.length(k) for k in range(len(self._parts))]
        refs = torch.cat([torch.stack([torch.full((n,), k), torch.arange(n)], 1) for k, n in enumerate(counts)])
        refs = refs[torch.linspace(0, len(refs) - 1, min(at_most, len(refs))).long()]
        sums: dict[str, Tensor] = {}
        for some in refs.split(256):
            batch = unpacked(self.fetch(some))
            for key in self._parts[0][0].cameras:
                images = batch[key][:, -1] if batch[key].ndim == 5 else batch[key]
                sums[key] = sums.get(key, torch.zeros(())) + images.double().sum(0)
        return {
            key: (255 * total / len(refs)).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
            for key, total in sums.items()
        }

    def use_copy(self, k: int, indices: Tensor, samples: Batch) -> None:
        """Take visit k's samples at `indices` (m,), ascending, from packed `samples` from now on, not its data set."""
        self._copies[k] = indices, samples

    def _copied(self, k: int, index: Tensor) -> Batch | None:
        """Samples of visit k if all are in its copy; else None."""
        if k not in self._copies:
            return None
        indices, samples = self._copies[k]
        rows = torch.searchsorted(indices, index).clamp(max=len(indices) - 1)
        if not torch.equal(indices[rows], index):
            return None
        return select(samples, rows)

    def fetch(self, refs: Tensor) -> Batch:
        """Return the referenced samples, in the order of `refs`."""
        groups: list[Batch] = []
        order: list[Tensor] = []
        for k in refs[:, 0].unique().tolist():
            rows = (refs[:, 0] == k).nonzero()[:, 0]
            index = refs[rows, 1]
            copied = self._copied(k, index)
            if copied is not None:
                groups.append(copied)
                order.append(rows)
                continue
            offset = 0
            for part in self._parts[k]:
                inside = (index >= offset) & (index < offset + len(part))
                if inside.any():
                    groups.append(part.fetch(index[inside] - offset))
                    order.append(rows[inside])
                offset += len(part)
        if len(groups) == 1 and torch.equal(order[0], torch.arange(len(refs))):
            return groups[0]
        return select(concat(groups), torch.cat(order).argsort())


def packed(batch: Batch) -> Batch:
    """The same samples with images as bytes, if they came from bytes: exact, and a quarter of the size."""
    out: Batch = {}
    for key, value in batch.items():
        out[key] = value
        if is_image(key) and torch.is_tensor(value) and value.dtype == torch.float32:
            as_bytes = (value * 255).round().to(torch.uint8)
            if torch.equal(as_bytes.float() / 255, value):
                out[key] = as_bytes
    return out


def unpacked(batch: Batch, device: torch.device | None = None) -> Batch:
    """The samples as a policy's processors take them: images in [0, 1]. On `device` images are made there."""
    return {
        k: v.to(device or v.device).float() / 255
        if torch.is_tensor(v) and v.dtype == torch.uint8 and is_image(k)
        else v
        for k, v in batch.items()
    }


def is_image(key: str) -> bool:
    """Whether a feature of this name is a camera image (LeRobot's names)."""
    return key.startswith("observation.image") and not key.endswith("_is_pad")


def concat(batches: Sequence[Batch]) -> Batch:
    """Join batches with the same keys along the batch dimension."""
    if len(batches) == 1:
        return batches[0]
    if any(is_image(k) and len({b[k].dtype for b in batches if k in b}) > 1 for k in batches[0]):
        batches = [unpacked(b) for b in batches]  # images of some that came from bytes, and of others that did not
    keys = batches[0].keys()
    for b in batches[1:]:
        if b.keys() != keys:
            raise UserError(
                f"the tasks' data have different features: {sorted(set(b) ^ set(keys))}. A stream needs one schema."
            )
    return {
        k: torch.cat([b[k] for b in batches]) if torch.is_tensor(batches[0][k]) else [v for b in batches for v in b[k]]
        for k in keys
    }


def select(batch: Batch, rows: Tensor) -> Batch:
    """Return the rows of a batch."""
    listed = rows.tolist()
    return {k: v[rows] if torch.is_tensor(v) else [v[i] for i in listed] for k, v in batch.items()}


def batch_size(batch: Batch) -> int:
    """The number of samples in a batch."""
    return next(len(v) for v in batch.values())


class SampleOrder:
    """Shuffled epochs as one endless sequence: a pure function of (seed, visit, epoch), with random access to steps."""

    def __init__(self, n: int, *key: int | str) -> None:
        self.n, self.key = n, key
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = torch.randperm(self.n, generator=generator("order", *self.key, epoch))
        return self._permutation

    def take(self, start: int, count: int) -> Tensor:
        """Return positions start … start + count of the endless sequence."""
        parts = []
        while count > 0:
            epoch, offset = divmod(start, self.n)
            part = self.permutation(epoch)[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return torch.cat(parts)


class WeightedOrder(SampleOrder):
    """Shuffled epochs in which sample i occurs w_i times on average, w_i = weight_i / the greatest weight.

    In the first E epochs it occurs ⌊E w_i + u_i⌋ times, u_i ~ U(0, 1) drawn once from `key`: between E w_i − 1 and
    E w_i + 1 times, whatever E is.
    """

    def __init__(self, weights: Tensor, *key: int | str) -> None:
        super().__init__(len(weights), *key)
        self.weights = weights.double() / weights.max()
        self.offsets = torch.rand(len(weights), dtype=torch.float64, generator=generator("weights", *key))
        self._starts = [0]  # of the epochs so far, in the endless sequence

    def permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            counts = self._upto(epoch + 1) - self._upto(epoch)
            chosen = torch.repeat_interleave(torch.arange(self.n), counts)
            self._permutation = chosen[torch.randperm(len(chosen), generator=generator("order", *self.key, epoch))]
            self._epoch = epoch
        return self._permutation

    def _upto(self, epochs: int) -> Tensor:
        """How often each sample occurs in so many epochs."""
        return torch.floor(epochs * self.weights + self.offsets).long()

    def take(self, start: int, count: int) -> Tensor:
        parts: list[Tensor] = []
        while count > 0:
            while self._starts[-1] <= start:
                epochs = len(self._starts)
                self._starts.append(int(self._upto(epochs).sum()))
            epoch = bisect.bisect_right(self._starts, start) - 1
            part = self.permutation(epoch)[start - self._starts[epoch] :][:count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return torch.cat(parts)


MAX_DEATHS = 3  # of data-loading processes, with no batch in between


class _Referenced(Dataset[Batch]):
    """Adapts StreamFrames for a loader whose sampler yields reference tensors."""

    def __init__(self, frames: StreamFrames) -> None:
        self.frames = frames

    def __getitem__(self, refs: Tensor) -> Batch:
        return self.frames.fetch(refs)


def _begin(worker: int) -> None:
    """A signal to the process group is for the training process, which stops its workers after saving."""
    belong_to(os.getppid())


def _quietly_watched(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """The loader's batches. A worker that dies raises RuntimeError here, when its batch is requested.

    torch's own SIGCHLD handler would raise it wherever the main thread is, even in the middle of a training step; torch
    also notices a dead worker while it waits for a batch.
    """
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    signal.signal(signal.SIGCHLD, before)
    return batches


def load_batches(frames: StreamFrames, refs: Iterator[Tensor], workers: int) -> Iterator[Batch]:
    """Yield the batch of every reference tensor, in order. Data that must be decoded is read ahead by `workers`.

    A worker process that dies is replaced, and its batches are read again. Raises UserError if workers keep dying.
    """
    if not frames.decoded or workers == 0:
        yield from map(frames.fetch, refs)
        return
    asked: deque[Tensor] = deque()  # references whose batches have not arrived yet

    def asking() -> Iterator[Tensor]:
        yield from list(asked)  # of workers that died
        for r in refs:
            asked.append(r)
            yield r

    deaths, how = 0, ""
    while deaths < MAX_DEATHS:
        loader = DataLoader(
            _Referenced(frames), batch_size=None, sampler=asking(), num_workers=workers, worker_init_fn=_begin,  # type: ignore[arg-type]
        )  # fmt: skip
        batches = _quietly_watched(loader)
        try:
            for batch in batches:
                asked.popleft()
                deaths = 0
                yield batch
            return
        except RuntimeError as e:
            if re.search(r"DataLoader worker \(pid", str(e)) is None:  # an error in reading, not a death
                raise
            deaths += 1
            how = _how_one_died(batches)
            tell(f"warning: a data-loading process {how}; starting new ones.")
    raise UserError(
        f"data-loading processes died {MAX_DEATHS} times in a row; the last one {how}. Often memory is short: lower "
        "train.num_workers (0 reads the data in the training process itself), or make /dev/shm, through which they "
        "pass data, larger (docker run --shm-size=8g)."
    )


def _how_one_died(batches: Iterator[Batch]) -> str:
    """How the first of a loader's processes to die ended; torch does not report it."""
    codes = [process.exitcode for process in getattr(batches, "_workers", [])]
    return next((how_ended(code) for code in codes if code), "ended")
