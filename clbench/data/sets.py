"""Streams of several LeRobot sets, and of sets whose tasks are not their instructions.

A partition says what a task is: by_task_index, all episodes with one instruction, whatever set they are in; by_dataset,
all episodes of a set; by_episodes, a range of episodes, counted over all sets one after the other. Within a task, a
policy reads each episode's own instruction.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from clbench.data.info import INFO_FILE, load_info
from clbench.data.lerobot_set import Episode, check_frames, missing_files
from clbench.data.matching import SHOWN, Unmatched, plain
from clbench.data.source import (
    ACTION_KEY,
    DataSource,
    Depth,
    OneSet,
    OpenSet,
    PartData,
    TaskData,
    check_one_text,
    data_folder,
    excluded_episodes,
    open_hub_set,
    open_local_set,
)
from clbench.envs.base import STATE_KEY
from clbench.errors import UserError, nearest

RANGE = re.compile(r"([0-9]{1,9})-([0-9]{1,9})")


class SetSettings(OneSet, Protocol):
    """The keys of one of several sets (config/schema.py)."""

    name: str
    exclude_episodes: list[int]
    weight: float


@dataclass
class _OneOfSeveral:
    """One set's keys, with those that are for all sets."""

    data: str
    repo_id: str | None
    revision: str | None
    rename: dict[str, str]
    exclude_episodes: list[int]
    name: str = ""
    weight: float = 1.0


@dataclass(frozen=True)
class Sets:
    """What says which sets a stream, or its base, learns from, and what its tasks are.

    Attributes:
        sets: at least one.
        rename: of all sets that have the feature.
        instructions: instruction → name of its task.
        partition: as in the configuration.
        count: `num_tasks`, into how many ranges by_episodes divides the episodes.
        key: where this is in the configuration, for messages.
        shaped: features that are brought to one shape (`resize`, `pad`), so that the sets may differ in it.
    """

    sets: Sequence[SetSettings]
    rename: Mapping[str, str] = field(default_factory=dict)
    instructions: Mapping[str, str] = field(default_factory=dict)
    partition: str = "auto"
    count: int | None = None
    key: str = "dataset"
    shaped: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Member:
    """A set, opened, with its episodes that are not left out."""

    opened: OpenSet
    name: str
    key: str
    weight: float
    episodes: tuple[Episode, ...]
    excluded: frozenset[int]


Tasks = dict[str, dict[tuple[int, str], list[Episode]]]  # task → (member, instruction) → episodes


def task_names(sets: Sets, depth: Depth = "meta") -> list[str]:
    """The names of all tasks that the data have, in their order. Reads (and of a hub's sets fetches) only meta/."""
    members = _open(sets, depth)
    return list(_tasks(sets, members))


def open_sets(sets: Sets, names: Sequence[str], depth: Depth = "all") -> DataSource:
    """Open all sets and find the tasks `names` in them.

    Returns:
        A source whose tasks have `parts`. Its fingerprint is the sha256 of those of the sets, in order, and of the
        partition; each set's is that of `check_frames`, over the episodes that are used.

    Raises:
        UserError: as `open_data`; the sets differ in what a policy would see or do; a task is not there.
    """
    members = _open(sets, depth)
    tasks = _tasks(sets, members, names)
    _check_names(names, tasks)
    found: dict[str, TaskData] = {}
    for name in names:
        parts = tuple(_part(members[i], text, episodes) for (i, text), episodes in tasks[name].items())
        said = {p.text for p in parts}
        found[name] = TaskData(
            name, said.pop() if len(said) == 1 else name, None, None,
            tuple(e for p in parts for e in p.episodes), sum(p.frames for p in parts), parts=parts,
        )  # fmt: skip
    described, prints = [], []
    for i, member in enumerate(members):
        one, used = member.opened, _used(i, tasks, names)
        task_of = {e.index: _index(member, e.texts[0]) for e in used}
        whole = one.get(missing_files(one.found, task_of)) if used else depth != "meta"
        about = {
            **one.origin, "root": str(one.found.root), "name": member.name, "fps": one.found.fps,
            "features": one.features, "features_unused": sorted(set(one.found.features) - set(one.features)),
            "episodes_unused": len(one.found.episodes) - len(used),
            **({"episodes_excluded": sorted(member.excluded)} if member.excluded else {}),
            **({"weight": member.weight} if member.weight != 1 else {}),
        }  # fmt: skip
        if used and whole:
            low = {there: here for there, here in one.features.items() if here in (STATE_KEY, ACTION_KEY)}
            about["fingerprint"] = check_frames(one.found, task_of, low, one.remedy)[0]
            prints.append(about["fingerprint"])
        described.append(about)
    first = members[0].opened
    partition = _partition(sets, members)
    together = {
        "kind": "several", "root": str(first.found.root), "fps": first.found.fps, "partition": partition,
        "sets": described, "features": first.features, "features_unused": described[0]["features_unused"],
        "tasks_unused": len(tasks) - len(found), "episodes_unused": sum(d["episodes_unused"] for d in described),
        **({"instructions": dict(sets.instructions)} if sets.instructions else {}),
    }  # fmt: skip
    if len(prints) < sum(bool(_used(i, tasks, names)) for i in range(len(members))):
        return DataSource(first.found.root, found, "", first.features, together)
    digest = hashlib.sha256(json.dumps([partition, list(names), prints]).encode()).hexdigest()
    return DataSource(first.found.root, found, digest, first.features, together | {"fingerprint": digest})


# ------------------------------------------------------------------------------------------------ the sets


def _open(sets: Sets, depth: Depth) -> list[_Member]:
    members = []
    several = len(sets.sets) > 1
    for i, one in enumerate(sets.sets):
        key = f"{sets.key}.sets[{i}]" if several else sets.key
        # Names that are for all sets are applied where a set has the feature; what none has is refused below.
        settings = _OneOfSeveral(one.data, one.repo_id, one.revision, dict(one.rename), list(one.exclude_episodes))
        settings = replace(settings, rename={**_those_there(settings, sets.rename, key, depth), **one.rename})
        opened = (
            open_hub_set(settings, None, key, depth) if one.repo_id else open_local_set(settings, None, key, depth, "")
        )
        left_out = excluded_episodes(opened.found, one.exclude_episodes, key)
        kept = tuple(e for e in opened.found.episodes if e.index not in left_out)
        check_one_text(opened.found, kept, key)
        name = one.name or Path(one.repo_id or one.data).name
        members.append(_Member(opened, name, key, one.weight, kept, left_out))
    twice = [r for r, n in Counter(m.opened.found.root.resolve() for m in members).items() if n > 1]
    if twice:
        raise UserError(f"{sets.key}.sets names the data set in {twice[0]} twice.")
    unknown = [old for old in sets.rename if not any(old in m.opened.found.features for m in members)]
    if unknown:
        known = {f for m in members for f in m.opened.found.features}
        raise UserError(f"{sets.key}.rename: none of the data sets has a feature '{unknown[0]}'."
                        f"{nearest(unknown[0], known)}")  # fmt: skip
    check_alike([(m.opened.found.root, m.opened) for m in members], sets.key, sets.shaped)
    return members


def _those_there(settings: _OneOfSeveral, rename: Mapping[str, str], key: str, depth: Depth) -> dict[str, str]:
    """Of the names that are for all sets, those of features that this set has."""
    if not rename:
        return {}
    from clbench.data.lerobot_set import has_set, read_set

    root = data_folder(settings.data)
    if settings.repo_id:  # its description is fetched once, and then on this machine
        root = open_hub_set(replace(settings, rename={}), None, key, "meta").found.root
    if not has_set(root):
        return {}  # said by whoever opens it
    found = read_set(root, f"Copy the full set into {root} again, or use another one.")
    return {old: new for old, new in rename.items() if old in found.features}


def check_alike(sets: Sequence[tuple[Path, OpenSet]], key: str, shaped: Collection[str] = ()) -> None:
    """Raise UserError where two sets differ in what a policy would see or do: one message, both sets, both shapes.

    `shaped`: features whose shapes may differ.
    """
    first_root, first = sets[0]
    for root, other in sets[1:]:
        problems = []
        if first.found.fps != other.found.fps:
            problems.append(f"frames a second: {first.found.fps:g} and {other.found.fps:g}")
        ours, theirs = _shapes(first), _shapes(other)
        for name in sorted(ours.keys() | theirs.keys()):
            both = name in ours and name in theirs
            if ours.get(name) != theirs.get(name) and not (both and name in shaped):
                problems.append(f"{name}: {ours.get(name, 'none')} and {theirs.get(name, 'none')}")
        if problems:
            raise UserError(
                f"the data sets in {first_root} and {root} cannot be one stream, they differ in {'; '.join(problems)}. "
                f"If only names differ, give them with rename, for all sets ({key}.rename) or for one ({key}.sets); if "
                "sizes of images do, with dataset.resize={CAMERA: PIXELS}; lengths of the state or the action, with "
                "dataset.pad={action: NUMBERS}. Otherwise use sets that are alike."
            )


def _shapes(one: OpenSet) -> dict[str, str]:
    from clbench.data.lerobot_set import image_shape

    found = {}
    for there, here in one.features.items():
        feature = one.found.features[there]
        images = feature["dtype"] in ("image", "video")
        found[here] = f"images {image_shape(feature)}" if images else f"{tuple(feature['shape'])}"
    return found


# ------------------------------------------------------------------------------------------------ tasks


def _partition(sets: Sets, members: Sequence[_Member]) -> str:
    """The partition, with `auto` decided."""
    if sets.partition != "auto":
        return sets.partition
    return "by_task_index" if len(_by_text(sets, members)) > 1 else "by_dataset"


def _tasks(sets: Sets, members: Sequence[_Member], names: Sequence[str] = ()) -> Tasks:
    """The tasks that the data have; by_episodes: those `names`, or as many as the configuration says."""
    partition = _partition(sets, members)
    if partition == "by_task_index":
        return _by_text(sets, members)
    if sets.instructions:
        raise UserError(f"{sets.key}.instructions name tasks that are instructions, but the partition is {partition}.")
    if partition == "by_dataset":
        twice = [n for n, count in Counter(m.name for m in members).items() if count > 1]
        if twice:
            raise UserError(f"two of the data sets are called '{twice[0]}': give them names ({sets.key}.sets, name).")
        return {m.name: _grouped([(i, e) for e in m.episodes]) for i, m in enumerate(members) if m.episodes}
    every = [(i, e) for i, m in enumerate(members) for e in m.opened.found.episodes]
    chosen = {name: _in_range(sets, members, name, every) for name in names or _ranges(sets, len(every))}
    for a, b in itertools.combinations(chosen, 2):  # one of them would be trained on what the other holds out
        if {(i, e.index) for i, e in chosen[a]} & {(i, e.index) for i, e in chosen[b]}:
            raise UserError(f"{sets.key}.tasks: the ranges '{a}' and '{b}' have episodes in common: separate them.")
    return {name: _grouped(found) for name, found in chosen.items()}


def _ranges(sets: Sets, total: int) -> list[str]:
    """Names of by_episodes' tasks, where the configuration lists none: equal ranges of all episodes."""
    if sets.count is None:
        return []
    if sets.count > total:
        raise UserError(f"{sets.key}.num_tasks={sets.count}: the data have only {total} episodes.")
    edges = [round(total * i / sets.count) for i in range(sets.count + 1)]
    return [f"{a}-{b - 1}" for a, b in itertools.pairwise(edges)]


def _in_range(
    sets: Sets, members: Sequence[_Member], name: str, every: Sequence[tuple[int, Episode]]
) -> list[tuple[int, Episode]]:
    found = RANGE.fullmatch(name)
    first, last = (int(found[1]), int(found[2])) if found else (1, 0)
    if first > last or last >= len(every):
        raise UserError(f"{sets.key}.tasks: with by_episodes a task is a range of episodes from 0 to {len(every) - 1}, "
                        f"such as '0-{min(9, len(every) - 1)}', not '{name}'.")  # fmt: skip
    chosen = [(i, e) for i, e in every[first : last + 1] if e.index not in members[i].excluded]
    if not chosen:
        raise UserError(f"{sets.key}.exclude_episodes leaves out all episodes of '{name}'.")
    return chosen


def _by_text(sets: Sets, members: Sequence[_Member]) -> Tasks:
    given = _given_names(sets, members)
    names: dict[str, str] = {}  # plain text → task
    found: dict[str, list[tuple[int, Episode]]] = defaultdict(list)
    for i, m in enumerate(members):
        for text in m.opened.found.texts.values():  # in the order of the set's tasks, not of its episodes
            of_text = [e for e in m.episodes if e.texts[0] == text]
            if not of_text:
                continue
            name = names.setdefault(plain(text), given.get(plain(text), text))
            if not name.strip():
                raise UserError(
                    f"the data set in {m.opened.found.root} has {len(of_text)} episodes with an empty instruction. "
                    f"Name their task ({sets.key}.instructions={{'': NAME}}), leave them out "
                    f"({m.key}.exclude_episodes), or divide the data by_dataset or by_episodes ({sets.key}.partition)."
                )
            found[name] += [(i, e) for e in of_text]
    return {name: _grouped(episodes) for name, episodes in found.items()}


def _given_names(sets: Sets, members: Sequence[_Member]) -> dict[str, str]:
    """Plain instruction → name of its task: the configuration's, and those of sets that clbench made."""
    given: dict[str, str] = {}
    for m in members:
        root = m.opened.found.root
        if (root / INFO_FILE).exists():
            given |= {plain(t.instruction): t.name for t in load_info(root).tasks}
    known = {plain(t): t for m in members for t in m.opened.found.texts.values()}
    for text, name in sets.instructions.items():
        if plain(text) not in known:
            raise UserError(f"{sets.key}.instructions: the data has no instruction '{text}'."
                            f"{nearest(text, known.values())}")  # fmt: skip
        given[plain(text)] = name
    twice = [n for n, count in Counter(given.values()).items() if count > 1]
    if twice:
        raise UserError(f"{sets.key}.instructions gives two instructions the name '{twice[0]}'.")
    return given


def _grouped(episodes: Sequence[tuple[int, Episode]]) -> dict[tuple[int, str], list[Episode]]:
    found: dict[tuple[int, str], list[Episode]] = defaultdict(list)
    for i, e in episodes:
        found[i, e.texts[0]].append(e)
    return dict(found)


def _check_names(names: Sequence[str], tasks: Tasks) -> None:
    absent = [n for n in names if n not in tasks]
    if absent:
        listed = "; ".join(f'"{t}"' for t in list(tasks)[:SHOWN]) + ("; …" if len(tasks) > SHOWN else "")
        raise Unmatched(
            f"the data has no task '{absent[0]}'.{nearest(absent[0], tasks)} It has {len(tasks)} tasks: {listed}.",
            absent,
        )


def _part(member: _Member, text: str, episodes: Sequence[Episode]) -> PartData:
    return PartData(
        member.opened.found.root, member.opened.features, _index(member, text), text,
        tuple(sorted(e.index for e in episodes)), sum(e.frames for e in episodes), member.weight,
    )  # fmt: skip


def _index(member: _Member, text: str) -> int:
    return next(i for i, t in member.opened.found.texts.items() if t == text)


def _used(i: int, tasks: Tasks, names: Sequence[str]) -> list[Episode]:
    """The episodes of set i that these tasks have."""
    found = {e.index: e for name in names for (j, _), episodes in tasks[name].items() if j == i for e in episodes}
    return [found[e] for e in sorted(found)]
