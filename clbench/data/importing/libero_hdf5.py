"""LIBERO's own demonstrations: one HDF5 file per task, in robomimic's layout.

    data                      attributes problem_info, macros_image_convention, num_demos, …
    data/demo_I/actions       (T, 7)
    data/demo_I/obs/…         agentview_rgb, eye_in_hand_rgb (T, H, W, 3); ee_states (T, 6), or ee_pos and ee_ori;
                              gripper_states (T, 2); joint_states (T, 7)
    data/demo_I/states        (T, …) the simulator's state before the action: time, positions (joints first), velocities

Three things differ from what clbench's simulator shows:

- Images are as OpenGL has them, the lowest row first ("opengl"), or the right way up ("opencv"): the attribute
  macros_image_convention says which, and without it they are robosuite's default, "opengl". The simulator shows the
  first kind rotated by 180 degrees.
- LIBERO's create_dataset.py stores each observation next to the action that led to it. Here an observation belongs
  to the action that follows, so observation t is paired with action t + 1. OpenVLA's regenerated files already pair
  them that way. `joint_states` shows which of the two a file does: they equal the joints in `states` of the next row,
  or of the same one.
- The instruction in problem_info is that of the BDDL file, which for 29 of the 130 tasks is worded differently from
  the task's name. Benchmarks use the name, so the file's name decides if it is that of a LIBERO task.

Sources: LIBERO's scripts/create_dataset.py; OpenVLA's regenerate_libero_dataset.py.
"""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clbench.data.importing.recording import (
    IMAGE,
    MAX_PIXELS,
    NUMBER,
    ORIENTATIONS,
    TEXT,
    Defaults,
    Episode,
    Feature,
    Orientation,
    turned,
)
from clbench.envs.libero.tasks import task_instruction, task_names
from clbench.envs.making import family
from clbench.errors import UserError
from clbench.io import parse_json, sha256

AGAIN = "Copy the file again from where it came from, and give the command again."
INSTALL = "pip install 'clbench[hdf5]'"
INSTRUCTION = "language_instruction"
ACTIONS = "actions"
Observed = Literal["before", "after"]
OBSERVED: tuple[Observed, ...] = ("before", "after")
CLEARLY = 3.0  # how many times nearer the joints must be to one row than to the other
JOINTS = 7
MAX_NUMBERS = 20_000_000  # of one feature in an episode
_DAMAGED = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError)  # what h5py raises


class LiberoHdf5:
    """A folder of LIBERO's HDF5 files, or one of them, as a `Recording`.

    Args:
        folder: with files *.hdf5, in it or below it.
        observed: whether an observation was made before or after the action in its row; None: found out.
        orientation: how to turn images; None: as the files say.

    Raises:
        UserError: h5py is not installed, there are no such files, or one is damaged.
    """

    format = "libero_hdf5"

    def __init__(self, folder: Path, observed: Observed | None = None, orientation: Orientation | None = None) -> None:
        self._h5py = _h5py()
        if not folder.exists():
            raise UserError(f"there is no {folder}.")
        single = folder.is_file()
        self.folder = folder.parent if single else folder
        self.files = (folder,) if single else tuple(sorted(folder.rglob("*.hdf5"), key=_natural))
        if not self.files:
            raise UserError(f"there are no files *.hdf5 in {folder} or below it.")
        self._told = [self._look(path, observed, orientation) for path in self.files]
        first = self._told[0]
        self.features: Mapping[str, Feature] = first.features
        self.episodes = sum(len(told.demos) for told in self._told)
        self.notes = {
            "images": ", ".join(sorted({told.orientation for told in self._told})),
            "observed": ", ".join(sorted({told.observed for told in self._told})) + " the action in its row",
        }
        cameras = ("obs/agentview_rgb", "obs/eye_in_hand_rgb")
        self.defaults = Defaults(
            cameras=dict(zip(family("libero").cameras, cameras, strict=True)),
            state=(
                ("obs/ee_states", "obs/gripper_states"),
                ("obs/ee_pos", "obs/ee_ori", "obs/gripper_states"),
            ),
            action=((ACTIONS,),),
            task=(INSTRUCTION,),
            fps=family("libero").fps,
        )

    def read(self, check: bool) -> Iterator[Episode]:
        """Yield all episodes, file by file."""
        for told in self._told:
            with self._open(told.path) as file:
                for name in told.demos:
                    where = f"{name} of {told.path}"
                    with _damage(where):
                        group = _item(self._h5py, file, f"data/{name}")
                    yield _Demo(where, group, told, self._h5py)

    def digests(self) -> dict[str, tuple[int, str]]:
        """Return path → bytes and sha256 of the files."""
        return {str(p.relative_to(self.folder)): (p.stat().st_size, sha256(p)) for p in self.files}

    def _open(self, path: Path) -> Any:
        try:
            return self._h5py.File(path, "r")
        except OSError as e:
            about = " ".join(str(e).split())
            raise UserError(f"{path} cannot be read as HDF5, it is damaged or truncated: {about}. {AGAIN}") from e

    def _look(self, path: Path, observed: Observed | None, orientation: Orientation | None) -> _Told:
        """What a file says about itself."""
        with self._open(path) as file:
            with _damage(str(path)):
                if "data" not in file:
                    raise UserError(f"{path} is not a file of LIBERO demonstrations: it has no group 'data'.")
                data = _item(self._h5py, file, "data")
                demos = sorted(filter(partial(_is_group, self._h5py, data), data.keys()), key=_natural_name)
                said = data.attrs.get("num_demos")
                said = None if said is None else int(said)
                convention = data.attrs.get("macros_image_convention")
                instruction = _instruction(path, data.attrs.get("problem_info"))
                features = _features(self._h5py, data[demos[0]]) if demos else {}
            if not demos or said not in (None, len(demos)):
                raise UserError(f"{path} is incomplete: it has {len(demos)} demonstrations"
                                + (f" and says it has {said}" if said is not None else "") + f". {AGAIN}")  # fmt: skip
            told = _Told(path, tuple(demos), features, instruction, _orientation(path, convention, orientation))
            with _damage(str(path)):
                told.observed = observed or self._find_out(told, data)
        return told

    def _find_out(self, told: _Told, data: Any) -> Observed:
        """Whether observations were made before or after the action in their row."""
        same = following = 0.0
        for name in told.demos:
            if not {"states", "obs/joint_states"} <= set(_features(self._h5py, data[name])):
                break
            demo = _Demo(f"{name} of {told.path}", data[name], told, self._h5py)
            states, joints = demo.raw("states"), demo.raw("obs/joint_states")
            if len(states) != len(joints) or joints.shape[1:] != (JOINTS,) or states.shape[1] <= JOINTS:
                break
            states = states[:, 1 : 1 + JOINTS]
            same += float(np.abs(joints[:-1] - states[:-1]).sum())
            following += float(np.abs(joints[:-1] - states[1:]).sum())
        if same > CLEARLY * following:
            return "after"
        if following > CLEARLY * same:
            return "before"
        raise UserError(
            f"{told.path} does not show whether an observation was made before or after the action in its row, because "
            "'states' or 'obs/joint_states' is missing or fits neither. It was made after the action in LIBERO's own "
            "files, and before it in OpenVLA's regenerated ones (no_noops). Give --observed after or --observed before."
        )


@dataclass
class _Told:
    """What is known about one file before its episodes are read."""

    path: Path
    demos: tuple[str, ...]
    features: dict[str, Feature]
    instruction: str
    orientation: Orientation
    observed: Observed = "before"


@dataclass
class _Demo:
    """One episode. Observation t is paired with the action that follows it."""

    where: str
    group: Any
    told: _Told
    h5py: Any

    def numbers(self, feature: str) -> np.ndarray:
        return self._aligned(feature, self.raw(feature))

    def count(self, feature: str) -> int:
        return max(len(self._dataset(feature)) - (self.told.observed == "after"), 0)

    def images(self, feature: str) -> Iterator[np.ndarray]:
        dataset = self._dataset(feature)
        shape = dataset.shape
        if len(shape) != 4 or shape[3] != 3 or max(shape[1:3]) > MAX_PIXELS or dataset.dtype != np.uint8:
            raise UserError(
                f"{self.where}: '{feature}' is {dataset.dtype} {shape}, not uint8 images (frames, height, width, 3)."
            )
        for i in range(self.count(feature)):
            with _damage(f"'{feature}' in {self.where}"):
                image = dataset[i]
            yield turned(image, self.told.orientation)

    def texts(self, feature: str, frames: int) -> list[str]:
        return [self.told.instruction] * frames

    def raw(self, feature: str) -> np.ndarray:
        """A NUMBER's values as they are stored, (frames, width)."""
        dataset = self._dataset(feature)
        shape = dataset.shape
        if not 1 <= len(shape) <= 2 or dataset.dtype.kind not in "fiub":
            raise UserError(f"{self.where}: '{feature}' is {dataset.dtype} {shape}, not numbers (frames, width).")
        if np.prod(shape, dtype=np.float64) > MAX_NUMBERS:
            raise UserError(f"{self.where}: '{feature}' has {shape} numbers, too many for an episode.")
        with _damage(f"'{feature}' in {self.where}"):
            return np.asarray(dataset[()], dtype=np.float64).reshape(shape[0], -1)

    def _aligned(self, feature: str, rows: np.ndarray) -> np.ndarray:
        if self.told.observed == "before":
            return rows
        return rows[:-1] if feature.startswith("obs/") else rows[1:]

    def _dataset(self, feature: str) -> Any:
        with _damage(f"'{feature}' in {self.where}"):
            if feature not in self.group:
                has = ", ".join(_features(self.h5py, self.group)) or "nothing"
                raise UserError(f"{self.where} has no '{feature}'. It has {has}.")
            found = _item(self.h5py, self.group, feature)
            if not isinstance(found, self.h5py.Dataset) or found.shape is None:
                raise UserError(f"{self.where}: '{feature}' is not an array.")
            found.dtype  # noqa: B018 (a damaged type shows here)
        return found


@contextlib.contextmanager
def _damage(what: str) -> Iterator[None]:
    """Report `what` as damaged if h5py cannot read something in the block."""
    try:
        yield
    except _DAMAGED as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{what} is damaged: {' '.join(str(e).split())[:300]}. {AGAIN}") from e


def _h5py() -> Any:
    try:
        return importlib.import_module("h5py")
    except ImportError as e:
        raise UserError(f"HDF5 files are read by h5py, which is not installed. Install it: {INSTALL}") from e


def _item(h5py: Any, group: Any, path: str) -> Any:
    """What is at `path` in a group. Nothing is read from other files, whatever the file links to."""
    for part in path.split("/"):
        if part in group and not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise UserError(f"{group.file.filename}: '{path}' is a link, which is not followed.")
        group = group[part]
    if isinstance(group, h5py.Dataset) and (group.is_virtual or group.external):
        raise UserError(f"{group.file.filename}: '{path}' has its values in another file, which is not read.")
    return group


def _is_group(h5py: Any, group: Any, name: str) -> bool:
    return isinstance(group.get(name, getlink=True), h5py.HardLink) and isinstance(group[name], h5py.Group)


def _features(h5py: Any, demo: Any) -> dict[str, Feature]:
    """The arrays of a demonstration, and the instruction, which every file has."""
    found: dict[str, Feature] = {}

    def add(group: Any, prefix: str, depth: int) -> None:
        for name in sorted(group.keys()):
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                continue
            item = group[name]
            if isinstance(item, h5py.Dataset):
                found[prefix + name] = _feature(item)
            elif depth < 3:
                add(item, f"{prefix}{name}/", depth + 1)

    add(demo, "", 0)
    return found | {INSTRUCTION: Feature(TEXT)}


def _feature(dataset: Any) -> Feature:
    shape = tuple(dataset.shape or ())
    if len(shape) == 4 and shape[3] == 3 and dataset.dtype == np.uint8:
        return Feature(IMAGE, shape[1:])
    if 1 <= len(shape) <= 2 and dataset.dtype.kind in "fiub":
        return Feature(NUMBER, shape[1:])
    return Feature(f"{dataset.dtype} array", shape[1:])


def _orientation(path: Path, convention: Any, given: Orientation | None) -> Orientation:
    if given is not None:
        return given
    convention = convention.decode("utf-8", "replace") if isinstance(convention, bytes) else convention
    known: dict[Any, Orientation] = {None: "rotate", "opengl": "rotate", "opencv": "mirror"}
    if convention not in known:
        raise UserError(
            f"{path} says that its images are '{convention}', which is neither opengl nor opencv. State what turns "
            f"them into what LIBERO's simulator shows: --images {', '.join(ORIENTATIONS)}."
        )
    return known[convention]


def _instruction(path: Path, problem_info: Any) -> str:
    """The instruction: that of the LIBERO task which the file is named after, if any, else the one in the file."""
    task = path.stem.removesuffix("_demo")
    if task in task_names():
        return task_instruction(task)
    if isinstance(problem_info, bytes | str):
        text = problem_info.decode("utf-8") if isinstance(problem_info, bytes) else problem_info
        said = parse_json(text).get(INSTRUCTION, "")
        return " ".join(map(str, said)) if isinstance(said, list) else str(said)
    return ""


def _natural(path: Path) -> list[Any]:
    return [_natural_name(part) for part in path.parts]


def _natural_name(name: str) -> list[Any]:
    """For sorting: demo_2 before demo_10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]
