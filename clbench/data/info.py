"""The description of a data set that clbench made: `meta/clbench.json`, next to LeRobot's own metadata.

Standard library and numpy only, so that listing data sets costs nothing.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as shown
from typing import Any

import numpy as np

from clbench.errors import UserError, nearest
from clbench.io import read_json, seal

FORMAT = 1
INFO_FILE = "meta/clbench.json"


@dataclass(frozen=True)
class TaskInfo:
    """One task's part of a data set.

    `expert_*` were measured without noise on separate episodes: the rate is the ceiling for a policy that imitates
    the expert. `demo_*` count the noisy attempts behind the demonstrations.
    """

    name: str
    instruction: str
    task_index: int
    episodes: tuple[int, ...]
    frames: int
    expert_attempts: int
    expert_successes: int
    expert_success_rate: float | None  # None if no ceiling was measured
    demo_attempts: int
    demo_successes: int
    demo_success_rate: float


@dataclass(frozen=True)
class DataInfo:
    """A data set: how it was made, its tasks in order, and a fingerprint of its contents.

    `files`: path → bytes and sha256 of every other file in the set (verify.py); None in a set of an earlier version.
    `render`: how its camera images were drawn, {"fidelity", "size"}; None without images, or if not known.
    `left_out`: tasks that were to be in it, and why they are not.
    """

    root: Path
    format: int
    name: str
    env_type: str
    seed: int
    action_noise: float
    tail_steps: int
    max_steps: int
    demos_per_task: int
    ceiling_episodes: int
    tasks: tuple[TaskInfo, ...]
    fingerprint: str
    versions: dict[str, str]
    render: dict[str, Any] | None = None
    files: dict[str, tuple[int, str]] | None = None
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def episodes(self) -> int:
        """The number of episodes of all tasks."""
        return sum(len(t.episodes) for t in self.tasks)

    @property
    def frames(self) -> int:
        """The number of frames of all tasks."""
        return sum(t.frames for t in self.tasks)

    def task(self, name: str) -> TaskInfo:
        """Return the task of that name; UserError when the data set has none."""
        for t in self.tasks:
            if t.name == name:
                return t
        names = [t.name for t in self.tasks]
        why = f" It was left out: {self.left_out[name]}." if name in self.left_out else nearest(name, names)
        raise UserError(f"data set '{self.name}' has no task '{name}'.{why}")


def load_info(root: Path | str) -> DataInfo:
    """Read the description of the data set in folder `root`.

    Raises UserError if there is none, if it cannot be read, or if a newer clbench wrote it.
    """
    root = Path(root)
    path = root / INFO_FILE
    if not path.is_file():
        if (root / "meta").is_dir():
            raise UserError(f"{root} is a data set that clbench did not make: it has no {INFO_FILE}.")
        raise UserError(f"there is no data set in {root}. Make it with: clbench data make {shlex.quote(root.name)}")
    raw = read_json(path)
    found = raw.get("format") if isinstance(raw, dict) else None
    if type(found) is not int:
        raise UserError(f"{path} has no 'format': it is damaged. Make the set again with --force.")
    if found > FORMAT:
        raise UserError(f"{path} has format {found}; this clbench reads up to {FORMAT}. Use a newer clbench.")
    try:
        info = _parse(root, raw)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
        what = f"'{e.args[0]}' is missing" if isinstance(e, KeyError) else str(e)
        raise UserError(f"{path} is damaged: {what}. Make the set again with --force.") from e
    if "seal" in raw and raw.pop("seal") != seal(raw):
        raise UserError(f"{path} is damaged: it was changed since the set was made. Make the set again with --force.")
    return info


def fingerprint(state: np.ndarray, action: np.ndarray, episode_index: np.ndarray, task_index: np.ndarray) -> str:
    """Return the sha256 of a data set's contents in order, as hex.

    Args: state (frames, S) and action (frames, A), taken as little-endian float32; episode_index and
    task_index (frames,), taken as little-endian int64.
    """
    digest = hashlib.sha256()
    for array, dtype in ((state, "<f4"), (action, "<f4"), (episode_index, "<i8"), (task_index, "<i8")):
        digest.update(np.ascontiguousarray(array, dtype=dtype).tobytes())
    return digest.hexdigest()


def fingerprint_with_images(rest: str, digests: Sequence[str]) -> str:
    """Return the fingerprint of a set with cameras, as hex; without, `rest`.

    Args: rest, `fingerprint` of the other columns; digests, the sha256 (hex) of the pixels of each episode's frames,
    uint8 (frames, height, width, 3), for every episode in order and for every camera of it in order.
    """
    return hashlib.sha256("\n".join([rest, *digests]).encode()).hexdigest() if digests else rest


def _parse(root: Path, raw: dict[str, Any]) -> DataInfo:
    return DataInfo(
        root=root,
        format=raw["format"],
        name=_text(raw["name"]),
        env_type=_text(raw["env_type"]),
        seed=_whole(raw["seed"]),
        action_noise=_number(raw["action_noise"]),
        tail_steps=_whole(raw["tail_steps"]),
        max_steps=_whole(raw["max_steps"]),
        demos_per_task=_whole(raw["demos_per_task"]),
        ceiling_episodes=_whole(raw["ceiling_episodes"]),
        tasks=tuple(
            TaskInfo(
                name=_text(t["name"]),
                instruction=_text(t["instruction"]),
                task_index=_whole(t["task_index"]),
                episodes=tuple(_whole(e) for e in t["episodes"]),
                frames=_whole(t["frames"]),
                expert_attempts=_whole(t["expert_attempts"]),
                expert_successes=_whole(t["expert_successes"]),
                expert_success_rate=_number_or_none(t["expert_success_rate"]),
                demo_attempts=_whole(t["demo_attempts"]),
                demo_successes=_whole(t["demo_successes"]),
                demo_success_rate=_number(t["demo_success_rate"]),
            )
            for t in raw["tasks"]
        ),
        fingerprint=_text(raw["fingerprint"]),
        versions={str(k): str(v) for k, v in raw["versions"].items()},
        render=_render(raw.get("render")),
        files=sums_of_files(raw.get("files")),
        left_out={_text(task): _text(why) for task, why in raw.get("left_out", {}).items()},
    )


def _render(value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or set(value) != {"fidelity", "size"}:
        raise ValueError(f"{shown(value)} does not describe how images were drawn")
    return {"fidelity": _text(value["fidelity"]), "size": _whole(value["size"])}


def sums_of_files(value: Any) -> dict[str, tuple[int, str]] | None:
    """Return path → bytes and sha256, as a description lists the set's files; ValueError or TypeError for others."""
    if value is None:
        return None
    files = {_text(name): (_whole(size), _text(digest)) for name, (size, digest) in value.items()}
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{shown(name)} is not a file of the set")
    return files


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{shown(value)} is not a whole number")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{shown(value)} is not a number")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{shown(value)} is not a string")
    return value


def _number_or_none(value: Any) -> float | None:
    return None if value is None else _number(value)
