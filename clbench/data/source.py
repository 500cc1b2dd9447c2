"""Where a stream's demonstrations come from: a set that clbench made, another LeRobot v3 set, or one from the hub.

`open_data` finds the set and the stream's tasks in it, and checks everything that does not require decoding images.
Nothing is fetched unless a configuration names a `repo_id`.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from clbench.data import hub
from clbench.data.importing.card import REMEDY, is_imported, load_card
from clbench.data.info import INFO_FILE, load_info
from clbench.data.lerobot_set import (
    INFO,
    NUMBERS,
    Episode,
    LeRobotSet,
    check_frames,
    has_set,
    image_shape,
    missing_files,
    read_set,
)
from clbench.data.matching import match_tasks, named_tasks
from clbench.data.verify import changed_file, check_made
from clbench.envs.base import STATE_KEY
from clbench.envs.making import family, instruction
from clbench.errors import UserError, nearest
from clbench.paths import data_root, named_folder
from clbench.terminal import tell

ACTION_KEY = "action"
IMAGES = "observation.images."
Depth = Literal["all", "size", "meta"]
ROUNDING = 1e-3  # an action this close to [-1, 1] is only a rounding error outside


class DataSettings(Protocol):
    """The keys of `dataset` and of `dataset.pretrain` that say which data set (config/schema.py)."""

    data: str
    repo_id: str | None
    revision: str | None
    rename: dict[str, str]
    instructions: dict[str, str]
    exclude_episodes: list[int]


class NoData(UserError):
    """There is nothing where a data set should be; it has not been made yet."""


@dataclass(frozen=True)
class TaskData:
    """One task's demonstrations in a data set.

    Attributes:
        name: the simulator's task.
        instruction: what a policy reads.
        task_index, text: the task in the data, with the instruction as written there.
        episodes: indices of its episodes.
        frames: number of frames in all its episodes.
        expert_success: the scripted expert's success rate, if the set states it.
        parts: what a task consists of that is not one instruction in one set (data/sets.py); empty = itself.
    """

    name: str
    instruction: str
    task_index: int | None
    text: str | None
    episodes: tuple[int, ...]
    frames: int
    expert_success: float | None = None
    parts: tuple[PartData, ...] = ()


@dataclass(frozen=True)
class PartData:
    """Episodes of one instruction in one of several sets.

    Attributes:
        root, features: the set's folder, and its features → their names in clbench.
        task_index, text: the task in that set, with its instruction.
        weight: that of the set.
    """

    root: Path
    features: dict[str, str]
    task_index: int
    text: str
    episodes: tuple[int, ...]
    frames: int
    weight: float = 1.0


@dataclass(frozen=True)
class DataSource:
    """A data set with the requested tasks.

    Attributes:
        features: the set's → their names in clbench; one that is not listed is not used. None = all, unchanged.
        fingerprint: sha256 of the training data; for a set that clbench did not make, without images.
        description: for manifest.json.
        render: how its camera images were drawn, {"fidelity", "size"}; None without images.
    """

    root: Path
    tasks: dict[str, TaskData]
    fingerprint: str
    features: dict[str, str] | None = None
    description: dict[str, Any] = field(default_factory=dict)
    render: dict[str, Any] | None = None


def data_folder(data: str) -> Path:
    """A bare name is a folder under the data root; anything with a slash is a path."""
    return named_folder(data, data_root())


def open_data(
    settings: DataSettings,
    env_type: str | None,
    names: Sequence[str],
    *,
    stream: str,
    key: str = "dataset",
    depth: Depth = "all",
    partial: bool = False,
) -> DataSource:
    """Open a data set for some of the simulator's tasks.

    Args:
        env_type: the simulator's; None: there is none, and the data set's contents decide.
        names: the tasks.
        stream: the stream's name, quoted for a shell, for messages: `clbench data make STREAM` makes its data.
        key: where `settings` are in the configuration, for messages.
        depth: how far to go. all: fetch what is missing from a hub set. size: only print, on stderr, how much that is,
            and return without a fingerprint. meta: read and fetch only the set's description. Except with meta, a
            set that clbench made is compared with its checksums as far as that is cheap.
        partial: leave out tasks that the set does not have; the description lists them as `tasks_left_out`.

    Raises:
        NoData: there is no data set.
        UserError: it is damaged, incomplete, too old, or does not fit the simulator; its
            tasks are not the stream's; the hub cannot be reached.
    """
    if settings.repo_id:
        opened = open_hub_set(settings, env_type, key, depth)
        return _foreign(opened, settings, env_type, names, key, partial)
    root = data_folder(settings.data)
    if (root / INFO_FILE).exists():
        for name in ("rename", "instructions"):
            if getattr(settings, name):
                raise UserError(f"{key}.{name} is for data sets that clbench did not make; it made {root}.")
        return _made(root, names, settings, key, stream, depth, partial)
    opened = open_local_set(settings, env_type, key, depth, stream)
    return _foreign(opened, settings, env_type, names, key, partial)


@dataclass(frozen=True)
class OpenSet:
    """A data set in LeRobot's format whose description has been read.

    Attributes:
        features: of the set → names in clbench.
        origin: where it comes from, for the manifest.
        get: fetches the files that are missing; False: frames are not to be read.
        remedy: a sentence for messages: how to get the set again.
    """

    found: LeRobotSet
    features: dict[str, str]
    origin: dict[str, Any]
    get: Callable[[list[str]], bool]
    remedy: str


class OneSet(Protocol):
    """The keys that say where one data set is, and what its features are called."""

    data: str
    repo_id: str | None
    revision: str | None
    rename: dict[str, str]


def open_local_set(settings: OneSet, env_type: str | None, key: str, depth: Depth, stream: str) -> OpenSet:
    """Open the set in a folder. `stream`, `key`, `depth`: as in `open_data`. Raises as it does."""
    root = data_folder(settings.data)
    if not has_set(root):
        if (root / "meta").is_dir():
            raise UserError(f"{root} is not a complete data set: it has no {INFO}. {_remedy(root)}")
        raise NoData(f"there is no data set in {root}. {_two_ways(env_type, stream, key)}")
    origin: dict[str, Any] = {"kind": "lerobot"}
    if (root / INFO_FILE).exists():
        origin["kind"] = "made"
        if depth != "meta":
            check_made(load_info(root), stream)
    elif is_imported(root):
        origin["imported"] = load_card(root).origin
        if depth != "meta":
            _check_imported(root)
    found = read_set(root, _remedy(root))
    features = _features(found, settings.rename, env_type, key)
    return OpenSet(found, features, origin, lambda _: depth != "meta", _remedy(root))


def _check_imported(root: Path, full: bool = False) -> None:
    """Raise UserError if a set differs from what was imported."""
    problem = changed_file(root, load_card(root).files, full)
    if problem is not None:
        raise UserError(f"the data set in {root} is damaged: {problem}. {REMEDY}")


def is_here(settings: OneSet) -> bool:
    """Whether a data set, if it is one of the hub, is on this machine: opened with depth "size", it asks no hub."""
    folder = data_folder(settings.data).absolute() if "/" in settings.data else None
    return not settings.repo_id or hub.local_copy(settings.repo_id, settings.revision, folder) is not None


def _two_ways(env_type: str | None, stream: str, key: str) -> str:
    if env_type is None:
        return f"Give the folder of a LeRobot data set ({key}.data), or one on the hub ({key}.repo_id)."
    make = f"Make it with: clbench data make {stream}"
    if key != "dataset":
        return f"{make} — or give a base with policy.path=FOLDER"
    known = family(env_type).hub_data
    return f"{make} — or take it from the hub: -- {key}.repo_id={known}" if known else make


def _remedy(root: Path) -> str:
    return f"Copy the full set into {root} again, or use another one."


def _made(
    root: Path, names: Sequence[str], settings: DataSettings, key: str, stream: str, depth: Depth, partial: bool
) -> DataSource:
    info = load_info(root)
    missing = [n for n in names if n not in {t.name for t in info.tasks}] if partial else []
    if missing and len(missing) < len(names):
        names = [n for n in names if n not in missing]
    if depth != "meta":
        check_made(info, stream)
    left_out: dict[int, int] = {}  # episode → frames
    if settings.exclude_episodes:
        found = read_set(root, _remedy(root))
        gone = excluded_episodes(found, settings.exclude_episodes, key)
        left_out = {e.index: e.frames for e in found.episodes if e.index in gone}
    tasks = {}
    for name in names:
        t = info.task(name)
        episodes = tuple(e for e in t.episodes if e not in left_out)
        frames = t.frames - sum(left_out.get(e, 0) for e in t.episodes)
        tasks[name] = TaskData(
            name, t.instruction, t.task_index, t.instruction, episodes, frames, t.expert_success_rate
        )
        if not episodes:
            raise UserError(f"{key}.exclude_episodes leaves out all episodes of {name}.")
    described = {
        "kind": "made", "root": str(root), "fingerprint": info.fingerprint,
        "tasks_unused": len(info.tasks) - len(tasks), "episodes_unused": info.episodes - _episodes(tasks),
        **_left_out(left_out), **_not_there(missing),
    }  # fmt: skip
    return DataSource(root, tasks, info.fingerprint, None, described, info.render)


def excluded_episodes(found: LeRobotSet, episodes: Sequence[int], key: str) -> frozenset[int]:
    """The episodes that are left out; UserError for one that the set does not have."""
    known = len(found.episodes)
    for e in episodes:
        if not 0 <= e < known:
            raise UserError(f"{key}.exclude_episodes has {e}, but the data set in {found.root} has episodes 0 to "
                            f"{known - 1}.")  # fmt: skip
    return frozenset(episodes)


def _left_out(episodes: Collection[int]) -> dict[str, list[int]]:
    """For the manifest."""
    return {"episodes_excluded": sorted(episodes)} if episodes else {}


def _not_there(tasks: Collection[str]) -> dict[str, list[str]]:
    """For the manifest."""
    return {"tasks_left_out": list(tasks)} if tasks else {}


def check_every_byte(root: Path, description: Mapping[str, Any], stream: str) -> None:
    """Compare all of a set that clbench made or imported with its checksums; UserError for damage. May be slow.

    `description`: as in a `DataSource`. Other sets have no checksums.
    """
    if description["kind"] == "made":
        check_made(load_info(root), shlex.quote(stream), full=True)
    elif description["kind"] == "several":
        for one in description["sets"]:
            check_every_byte(Path(one["root"]), one, stream)
    elif "imported" in description:
        _check_imported(root, full=True)


def _episodes(tasks: dict[str, TaskData]) -> int:
    return sum(len(t.episodes) for t in tasks.values())


def open_hub_set(settings: OneSet, env_type: str | None, key: str, depth: Depth) -> OpenSet:
    """Open a set of the hub, fetching its description if it is missing. Raises as `open_data`."""
    assert settings.repo_id is not None
    folder = data_folder(settings.data).absolute() if "/" in settings.data else None  # a name: a made set
    if folder is not None and (folder / INFO_FILE).exists():
        raise UserError(f"{folder} holds a data set that clbench made, not a copy of {settings.repo_id}: name "
                        f"another folder, or omit {key}.repo_id.")  # fmt: skip
    copy = hub.local_copy(settings.repo_id, settings.revision, folder)
    if copy is None:
        copy = hub.fetch_description(settings.repo_id, settings.revision, folder)
    remedy = f"Remove {copy.root} and run this again to fetch it again."
    found = read_set(copy.root, remedy)
    origin = {"kind": "hub", "repo_id": copy.repo_id, "revision": copy.revision, "commit": copy.commit}
    at = copy

    def get(files: list[str]) -> bool:
        if depth == "meta" or not files:
            return depth != "meta"
        if depth == "all":
            hub.fetch_files(at, files, in_cache=folder is None)
            return True
        size = hub.size_of(at, files, in_cache=folder is None)
        tell(f"to be fetched: {len(files)} files ({size / 1e6:.1f} MB) of {at.repo_id}")
        return False

    return OpenSet(found, _features(found, settings.rename, env_type, key), origin, get, remedy)


def _foreign(
    opened: OpenSet, settings: DataSettings, env_type: str | None, names: Sequence[str], key: str, partial: bool = False
) -> DataSource:
    """A set that clbench did not make."""
    found, features, origin, get, remedy = opened.found, opened.features, opened.origin, opened.get, opened.remedy
    left_out = excluded_episodes(found, settings.exclude_episodes, key)
    of_task: dict[str, list[Any]] = {}
    for e in (e for e in found.episodes if e.index not in left_out):
        for text in e.texts:
            of_task.setdefault(text, []).append(e)
    counts = {i: len(of_task.get(text, [])) for i, text in found.texts.items()}
    named = named_tasks(env_type, settings.instructions, found.texts, f"{key}.instructions")
    matched = match_tasks(env_type, names, found.texts, counts, named, f"{key}.instructions", partial)
    tasks: dict[str, TaskData] = {}
    for name, index in matched.items():
        text = found.texts[index]
        check_one_text(found, of_task[text], key)
        own = env_type is not None and family(env_type).own_tasks
        said = instruction({"type": env_type, "task": name}) if own else text
        episodes = of_task[text]
        tasks[name] = TaskData(
            name, said, index, text, tuple(e.index for e in episodes), sum(e.frames for e in episodes)
        )
    task_of = {e: matched[name] for name, t in tasks.items() for e in t.episodes}
    fetched = get(missing_files(found, task_of))
    described = {
        **origin,
        "root": str(found.root),
        "fps": found.fps,
        **({} if env_type is None else {"simulator_steps_per_second": float(family(env_type).fps)}),
        "features": features,
        "features_unused": sorted(set(found.features) - set(features)),
        "tasks_unused": len(found.texts) - len(tasks),
        "episodes_unused": len(found.episodes) - len(task_of),
        **({"instructions": dict(settings.instructions)} if settings.instructions else {}),
        **_left_out(left_out),
        **_not_there([name for name in names if name not in matched]),
    }
    drawn = _size_of_images(found, features, env_type)
    if not fetched:
        return DataSource(found.root, tasks, "", features, described, drawn)
    low = {there: here for there, here in features.items() if here in (STATE_KEY, ACTION_KEY)}
    fingerprint, ranges = check_frames(found, task_of, low, remedy)
    _check_actions(found.root, env_type, names, *ranges[ACTION_KEY])
    return DataSource(found.root, tasks, fingerprint, features, described | {"fingerprint": fingerprint}, drawn)


def check_one_text(found: LeRobotSet, episodes: Sequence[Episode], key: str) -> None:
    """Raise UserError for an episode with several instructions."""
    for e in episodes:
        if len(e.texts) != 1:
            raise UserError(
                f"episode {e.index} of the data set in {found.root} has several instructions "
                f"({', '.join(e.texts)}): in clbench an episode has one task. Leave out all such episodes "
                f"({key}.exclude_episodes), or use another data set."
            )


def _size_of_images(found: LeRobotSet, features: dict[str, str], env_type: str | None) -> dict[str, Any] | None:
    """How the images of a set that clbench did not make were drawn: with full fidelity, at their size."""
    seen = [there for there, here in features.items() if here in family(env_type).cameras and family(env_type).draws]
    return {"fidelity": "full", "size": int(image_shape(found.features[seen[0]])[0])} if seen else None


def fps_note(data: dict[str, Any]) -> str | None:
    """A note about a data set (given its description) whose frame rate is not the simulator's."""
    fps, steps = data.get("fps"), data.get("simulator_steps_per_second")
    if fps is None or steps in (None, fps):  # None: there is no simulator
        return None
    return (f"note: the data set in {data['root']} has {fps:g} frames a second, but the simulator takes {steps:g} "
            "steps: each frame is used as one step.")  # fmt: skip


def _check_actions(root: Path, env_type: str | None, names: Sequence[str], low: np.ndarray, high: np.ndarray) -> None:
    """Raise UserError if the simulator could not execute the actions (A,), from `low` to `high`, as they are."""
    if env_type is None or not family(env_type).normalised_actions:
        return
    if low.min() < -1 - ROUNDING or high.max() > 1 + ROUNDING:
        raise UserError(
            f"the actions of the data set in {root} go from {low.min():.3g} to {high.max():.3g}, but the simulator "
            f"'{env_type}' takes [-1, 1]: they mean something else (e.g. poses instead of displacements). Use "
            "another data set."
        )
    opens = family(env_type).gripper_command(names)
    if opens is not None and (opens < 0 <= low[-1] or high[-1] <= 0 < opens):
        raise UserError(
            f"the gripper of the data set in {root}, the last number of an action, goes from {low[-1]:.3g} to "
            f"{high[-1]:.3g} and never opens: the simulator '{env_type}' opens it at {opens:+.0f}. The set uses "
            "another convention. Use another data set."
        )


def _features(found: LeRobotSet, rename: dict[str, str], env_type: str | None, key: str) -> dict[str, str]:
    """Which features are used, and as what: exactly the simulator's observations, and the action.

    Without a simulator: the action, the state and all camera images in the data set.

    Raises:
        UserError: one is missing or differs in kind from the simulator's.
    """
    for old in rename:
        if old not in found.features:
            raise UserError(f"{key}.rename: the data set in {found.root} has no feature '{old}'."
                            f"{nearest(old, found.features)}")  # fmt: skip
    named = {rename.get(old, old): old for old in found.features}
    if len(named) != len(found.features):
        twice = [n for n, k in Counter(rename.get(old, old) for old in found.features).items() if k > 1]
        raise UserError(f"{key}.rename: the data set in {found.root} would have two features {twice[0]}.")
    if env_type is None:
        return _own_features(found, named, key)
    simulators = family(env_type)
    numbers = {STATE_KEY: simulators.state_dim, ACTION_KEY: simulators.action_dim}
    wanted = [*simulators.cameras, *numbers]
    problems = []
    for name in wanted:
        if name not in named:
            problems.append(f"{name} is missing")
            continue
        feature = found.features[named[name]]
        if name in numbers:
            shape: tuple[int, ...] = tuple(feature["shape"])
            right = feature["dtype"] in ("float32", "float64") and shape == (numbers[name],)  # read as float32
            should = f"float32 ({numbers[name]},)"
        else:
            shape = image_shape(feature)
            right = feature["dtype"] in ("image", "video") and len(shape) == 3 and shape[2] == 3
            right = right and (shape[0] == shape[1] or not simulators.draws)
            should = "square images with 3 channels" if simulators.draws else "images with 3 channels"
        if not right:
            problems.append(f"{name} is {feature['dtype']} {shape}, not {should}")
    if problems:
        has = ", ".join(f"{n} {f['dtype']} {tuple(f['shape'])}" for n, f in found.features.items())
        raise UserError(
            f"the data set in {found.root} does not have the observations and actions of the simulator '{env_type}': "
            f"{'; '.join(problems)}. It has {has}. If only a name differs, give it with {key}.rename, as in "
            f"'{key}.rename={{observation.images.wrist_image: observation.images.image2}}'."
        )
    return {named[name]: name for name in wanted}


def _own_features(found: LeRobotSet, named: Mapping[str, str], key: str) -> dict[str, str]:
    """What a policy can learn from without a simulator: action (A,), state (S,), images (H, W, 3).

    Numbers of any kind are read as float32, true and false as 1 and 0.

    Args:
        named: name in clbench → feature of the set.

    Raises:
        UserError: there is no action, or there are no observations.
    """
    vectors = [
        name
        for name in (STATE_KEY, ACTION_KEY)
        if name in named
        and found.features[named[name]]["dtype"] in NUMBERS
        and len(found.features[named[name]]["shape"]) == 1
    ]
    images = [
        name
        for name, there in named.items()
        if name.startswith(IMAGES) and found.features[there]["dtype"] in ("image", "video")
        and image_shape(found.features[there])[2:] == (3,)
    ]  # fmt: skip
    seen = [*(n for n in vectors if n == STATE_KEY), *images]
    if ACTION_KEY not in vectors or not seen:
        has = ", ".join(f"{n} {f['dtype']} {tuple(f['shape'])}" for n, f in found.features.items())
        raise UserError(
            f"the data set in {found.root} has no {'observations' if ACTION_KEY in vectors else 'actions'}: a policy "
            f"learns from {ACTION_KEY} (numbers, one dimension) and from {STATE_KEY} (the same) or {IMAGES}* (images "
            f"with 3 channels). It has {has}. If only a name differs, give it with {key}.rename={{OLD: NEW}}."
        )
    return {named[name]: name for name in [*seen, ACTION_KEY]}
