"""Importing a recording: a survey of all of it, then a LeRobot v3 set, written to a temporary folder and renamed.

The set has the recording's frames in their order. Images are decoded and stored as PNG, as in sets that clbench makes;
state and action become float32.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from clbench.data.importing.card import is_imported, write_card
from clbench.data.importing.conventions import Gripper
from clbench.data.importing.layout import Layout, layout, unused
from clbench.data.importing.recording import Episode, Recording
from clbench.data.importing.survey import Conventions, Numbers, Survey, check_size, conventions, numbers, survey
from clbench.data.info import INFO_FILE, fingerprint, fingerprint_with_images
from clbench.data.lerobot_set import read_columns, read_set
from clbench.data.source import ACTION_KEY
from clbench.data.verify import file_sums, image_digests
from clbench.data.writing import finalizing, quiet_libraries, working_folder
from clbench.envs.base import STATE_KEY
from clbench.envs.making import family
from clbench.errors import UserError
from clbench.patience import patience
from clbench.terminal import tell

MAX_FPS = 10_000
CHANGED = "the files changed while they were imported. Give the command again."


@dataclass(frozen=True)
class Options:
    """What a user may say about a recording; None: what the format says, or what the data shows.

    Attributes:
        maps: feature of the set → feature of the recording (see layout.py).
        fps: frames a second.
        instruction: of episodes without one.
    """

    maps: Mapping[str, str]
    gripper: Gripper | None = None
    rotation: str | None = None
    fps: int | None = None
    instruction: str | None = None


@dataclass(frozen=True)
class Imported:
    """What an import wrote."""

    root: Path
    layout: Layout
    unused: list[str]
    conventions: dict[str, str]
    fps: int
    texts: dict[str, int]  # instruction → episodes that begin with it
    frames: int
    is_libero: bool


def check_place(root: Path, force: bool) -> None:
    """Raise UserError unless a set may be imported into `root`."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return
    if not is_imported(root):
        who = "by `clbench data make`" if (root / INFO_FILE).is_file() else "by something else"
        raise UserError(f"{root} was made {who}. Choose another --out, or move it away.")
    if not force:
        raise UserError(f"{root} already holds an imported data set. Choose another --out, or replace it with --force.")


def import_recording(recording: Recording, root: Path, options: Options, force: bool = False) -> Imported:
    """Write a recording as a LeRobot data set into folder `root`, whose name the set has.

    Raises:
        UserError: a file is damaged, a feature or convention cannot be determined, or `root` may not be replaced.
            Nothing is left behind then.
    """
    check_place(root, force)
    if options.fps is not None and not 1 <= options.fps <= MAX_FPS:
        raise UserError(f"--fps must be from 1 to {MAX_FPS} but is {options.fps}.")
    chosen = layout(recording, options.maps, options.instruction)
    found = survey(_shown(recording.read(check=True), recording, "checking"), chosen, options.instruction)
    settled, warnings = conventions(found, options.gripper, options.rotation)
    fps = options.fps or recording.defaults.fps or (family("libero").fps if settled.is_libero else None)
    if fps is None:
        raise UserError(f"the data in {recording.folder} does not say how many frames a second has: give --fps N.")
    for warning in warnings:
        tell(warning)
    with working_folder(root) as folder:
        check_place(root, force)
        new = folder / "dataset"
        writer = _Writer(new, root.name, fps, found, settled)
        with quiet_libraries():
            writer.write(_shown(recording.read(check=False), recording, "writing"), chosen, options.instruction)
            with patience("reading back what was written"):
                writer.check()
        notes = dict(recording.notes) | {
            "gripper": "as it is" if settled.gripper is None else str(settled.gripper),
            "rotation": settled.rotation,
        }
        description = {
            "imported_from": recording.format,
            "name": root.name,
            "source": {
                "folder": str(recording.folder),
                "files": {name: list(sums) for name, sums in recording.digests().items()},
            },
            "map": chosen.as_map(),
            "unused": unused(recording, chosen),
            "conventions": notes,
            "instruction": options.instruction,
            "fps": fps,
            "episodes": found.episodes,
            "frames": found.frames,
            "fingerprint": writer.fingerprint(),
            "versions": {name: version(name) for name in ("clbench", "numpy", "pillow", "lerobot")},
        }
        write_card(new, description, file_sums(new))
        if root.exists():
            os.replace(root, folder / "replaced")
        os.replace(new, root)
    return Imported(root, chosen, unused(recording, chosen), notes, fps, writer.texts, found.frames, settled.is_libero)


def _shown(episodes: Iterable[Episode], recording: Recording, what: str) -> Iterator[Episode]:
    """The same episodes, with progress: a bar on a terminal, a line now and then elsewhere."""
    from tqdm import tqdm

    done, total = 0, recording.episodes
    with tqdm(total=total, unit="episode", desc=what, disable=not sys.stderr.isatty()) as bar:
        with patience(f"{what} {recording.folder}", lambda: f"{done} of {total} episodes"):
            for episode in episodes:
                yield episode
                done += 1
                bar.update()


class _Writer:
    """Writes episodes with LeRobot, keeps what they must read back as, and compares."""

    def __init__(self, root: Path, name: str, fps: int, found: Survey, settled: Conventions) -> None:
        self.root, self.name, self._fps, self._found, self._settled = root, name, fps, found, settled
        self.texts: dict[str, int] = {}
        self._numbers: dict[str, int] = {}  # of the instructions: LeRobot's task_index
        self._states: list[np.ndarray] = []
        self._actions: list[np.ndarray] = []
        self._tasks: list[int] = []
        self._digests: list[str] = []

    def write(self, episodes: Iterable[Episode], chosen: Layout, instruction: str | None) -> None:
        """Write all episodes; LeRobot's files are complete afterwards."""
        with patience("loading LeRobot"):
            from lerobot.datasets.lerobot_dataset import LeRobotDataset

        dataset = LeRobotDataset.create(
            repo_id=self.name,
            fps=self._fps,
            features=self._features(),
            root=self.root,
            robot_type=family("libero").robot_type if self._settled.is_libero else None,
            use_videos=False,
        )
        with finalizing(dataset):
            for episode in episodes:
                read = numbers(episode, chosen, instruction)
                self._write_one(dataset, episode, read, chosen)
        shutil.rmtree(self.root / "images", ignore_errors=True)  # LeRobot's, by now empty
        if len(self._states) != self._found.episodes or sum(map(len, self._states)) != self._found.frames:
            raise UserError(CHANGED)

    def _write_one(self, dataset: Any, episode: Episode, read: Numbers, chosen: Layout) -> None:
        states = self._settled.states(read.states).astype(np.float32)
        actions = self._settled.actions(read.actions).astype(np.float32)
        digests = [hashlib.sha256() for _ in chosen.cameras]
        images = [episode.images(feature) for feature in chosen.cameras.values()]
        for i, text in enumerate(read.texts):
            frame: dict[str, Any] = {ACTION_KEY: actions[i], "task": text}
            if states.shape[1]:
                frame[STATE_KEY] = states[i]
            for (key, feature), stream, digest in zip(chosen.cameras.items(), images, digests, strict=True):
                image = next(stream, None)
                if image is None:
                    raise UserError(CHANGED)
                check_size(self._found.shapes[key], episode.where, feature, i, image)
                digest.update(image.tobytes())
                frame[key] = image
            dataset.add_frame(frame)
        distinct = list(dict.fromkeys(read.texts))
        dataset.meta.save_episode_tasks(distinct)  # LeRobot itself would number several in no fixed order
        dataset.save_episode()
        for text in distinct:
            self._numbers.setdefault(text, len(self._numbers))
        self.texts[distinct[0]] = self.texts.get(distinct[0], 0) + 1
        self._states.append(states)
        self._actions.append(actions)
        self._tasks += [self._numbers[text] for text in read.texts]
        self._digests += [digest.hexdigest() for digest in digests]

    def _features(self) -> dict[str, Any]:
        names = family("libero").names if self._settled.is_libero else {}
        state_dim = self._settled.states(np.zeros((0, self._found.state_dim))).shape[1]
        features: dict[str, Any] = {
            key: {"dtype": "image", "shape": shape, "names": ["height", "width", "channel"]}
            for key, shape in self._found.shapes.items()
        }
        if state_dim:
            features[STATE_KEY] = {"dtype": "float32", "shape": (state_dim,), "names": names.get(STATE_KEY)}
        features[ACTION_KEY] = {
            "dtype": "float32", "shape": (self._found.action_dim,), "names": names.get(ACTION_KEY)
        }  # fmt: skip
        return features

    def fingerprint(self) -> str:
        """The fingerprint of what was given to LeRobot."""
        lengths = [len(states) for states in self._states]
        rest = fingerprint(
            np.concatenate(self._states),
            np.concatenate(self._actions),
            np.repeat(np.arange(len(lengths)), lengths),
            np.array(self._tasks),
        )
        return fingerprint_with_images(rest, self._digests)

    def check(self) -> None:
        """Read the set back and compare it with what was given; RuntimeError where it differs."""
        there = read_set(self.root, "")
        counted = len(there.episodes), sum(e.frames for e in there.episodes)
        if counted != (self._found.episodes, self._found.frames):
            raise RuntimeError(
                f"{self.root}: wrote {self._found.episodes} episodes and {self._found.frames} frames, read back "
                f"{counted[0]} and {counted[1]}."
            )
        if there.texts != {index: text for text, index in self._numbers.items()}:
            raise RuntimeError(f"{self.root}: LeRobot numbered the tasks differently.")
        tables = sorted((self.root / "data").glob("*/*.parquet"))
        columns = {k: f["shape"] for k, f in there.features.items() if k in (STATE_KEY, ACTION_KEY)}
        read = read_columns(tables, {**columns, "episode_index": (), "task_index": ()})
        count = len(read["task_index"])
        rest = fingerprint(
            read.get(STATE_KEY, np.zeros((count, 0))), read[ACTION_KEY], read["episode_index"], read["task_index"]
        )
        images = image_digests(tables, list(self._found.shapes), self._found.episodes)
        if fingerprint_with_images(rest, images) != self.fingerprint():
            raise RuntimeError(f"{self.root}: the frames read back are not those written.")
