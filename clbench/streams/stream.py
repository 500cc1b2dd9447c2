"""Task, Visit and TaskStream, and how a configuration becomes one. Imports no torch.

A stream is a list of visits. Visit k trains on the data of its tasks; evaluation columns j are also the visits, so
a task visited twice has two columns. Two transforms serve as references for the sequence: `joint` (one visit
with the data of all tasks) and `independent` (every visit starts from the base again).
"""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clbench.config.schema import DatasetConfig, PretrainDataConfig, RenderConfig, SetConfig
from clbench.data.lerobot_set import INFO
from clbench.data.matching import Unmatched
from clbench.data.sets import Sets, open_sets, task_names
from clbench.data.source import DataSource, Depth, PartData, TaskData, open_data
from clbench.data.task import Task
from clbench.envs.making import check_task, family
from clbench.envs.rendering import DEFAULT_FIDELITY, DEFAULT_SIZE
from clbench.errors import UserError, nearest
from clbench.io import read_json
from clbench.seeding import derive_seed


@dataclass(frozen=True)
class Visit:
    """Training on the data of `tasks`: the task's pieces (one, if it has no parts), or all tasks' under joint training.
    `task` names it."""

    k: int
    task: str
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class TaskStream:
    """The visits in order, and the tasks evaluated (`columns`, index j).

    `data` describes the data set (manifest.json).
    `mode`: sequential | multitask (one joint visit) | singletask (each visit starts from the base).
    """

    name: str
    visits: tuple[Visit, ...]
    columns: tuple[Task, ...]
    mode: str = "sequential"
    fingerprint: str = ""
    data: dict[str, Any] = field(default_factory=dict)

    def joint(self) -> TaskStream:
        """One visit with the data of all distinct tasks; the columns stay."""
        distinct = {t.name: t for t in _union_episodes(self.columns)}.values()
        pieces = tuple(piece for t in distinct for piece in t.pieces)
        return replace(self, visits=(Visit(0, "joint", pieces),), mode="multitask")

    def independent(self) -> TaskStream:
        """The same visits, each from the base."""
        return replace(self, mode="singletask")


def _union_episodes(tasks: Sequence[Task]) -> list[Task]:
    """Tasks with the episodes of all their visits combined."""
    if any(t.parts for t in tasks):
        return [_union(t, [other for other in tasks if other.name == t.name]) for t in tasks]
    episodes: dict[str, set[int]] = {}
    for t in tasks:
        episodes.setdefault(t.name, set()).update(t.episodes)
    return [replace(t, episodes=tuple(sorted(episodes[t.name]))) for t in tasks]


def _union(task: Task, same: Sequence[Task]) -> Task:
    """A task with the parts, or episodes, that all its visits have."""
    found: dict[tuple[Any, ...], Task] = {}
    for piece in (p for t in same for p in t.pieces):
        key = piece.root, piece.text
        there = found.get(key)
        found[key] = piece if there is None else replace(
            there, episodes=tuple(sorted({*there.episodes, *piece.episodes}))
        )  # fmt: skip
    if not task.parts:
        return next(iter(found.values()))
    parts = tuple(found.values())
    return replace(task, parts=parts, episodes=tuple(e for p in parts for e in p.episodes))


_RANGE = re.compile(r"([0-9]{1,6})-([0-9]{1,6})")


def known_tasks(
    config: DatasetConfig | PretrainDataConfig, env_type: str | None = None, shaped: Collection[str] = ()
) -> list[str]:
    """The names of the tasks that `task_order` has indices of. Without a simulator and a list of them, the data decide.

    `shaped`: features that the stream brings to one shape, of a base's data as well.

    Raises:
        UserError: there are none, one occurs twice, or the data cannot be read.
    """
    tasks = list(config.tasks)
    if not tasks and env_type is None:
        stream = isinstance(config, DatasetConfig)
        sets = _sets(config, "dataset" if stream else "dataset.pretrain")
        tasks = task_names(replace(sets, shaped=sets.shaped | frozenset(shaped)))
        if not tasks:
            by_episodes = isinstance(config, DatasetConfig) and config.partition == "by_episodes"
            raise UserError(
                "dataset.partition=by_episodes needs tasks, ranges of episodes such as [0-9, 10-19], or num_tasks."
                if by_episodes
                else "the data set has no episodes that are not left out: a stream needs tasks."
            )
    if len(set(tasks)) != len(tasks):
        twice = [t for t, n in Counter(tasks).items() if n > 1]
        raise UserError(
            f"dataset.tasks lists {', '.join(twice)} more than once; repeat tasks with dataset.task_order instead."
        )
    if not tasks:
        raise UserError("dataset.tasks is empty: a stream needs tasks.")
    return tasks


def _sets(config: DatasetConfig | PretrainDataConfig, key: str) -> Sets:
    """The sets of a stream or a base, as data/sets.py takes them."""
    one = SetConfig(
        data=config.data, repo_id=config.repo_id, revision=config.revision, exclude_episodes=config.exclude_episodes
    )
    partition, count = ("auto", None)
    if isinstance(config, DatasetConfig):
        partition, count = config.partition, config.num_tasks
    shaped = frozenset({*config.resize, *config.pad}) if isinstance(config, DatasetConfig) else frozenset()
    return Sets(config.sets or [one], config.rename, config.instructions, partition, count, key, shaped)


def _in_parts(config: DatasetConfig | PretrainDataConfig, env_type: str | None) -> bool:
    """Whether tasks may be more than one instruction in one set."""
    if env_type is not None:
        return False
    if config.sets or not isinstance(config, DatasetConfig):
        return bool(config.sets)
    if config.partition == "auto" and not config.tasks:
        return len(task_names(replace(_sets(config, "dataset"), partition="by_task_index"))) < 2
    return config.partition in ("by_dataset", "by_episodes")


def _as_indices(item: Any, tasks: Sequence[str]) -> list[Any]:
    """An entry of `task_order`, with a range of indices written out."""
    found = _RANGE.fullmatch(item) if isinstance(item, str) and item not in tasks else None
    if found is None:
        return [item]
    first, last = int(found[1]), int(found[2])
    if first > last:
        raise UserError(f"dataset.task_order has the range '{item}', which goes down: list the indices instead.")
    return list(range(first, min(last, len(tasks)) + 1))  # one too many is reported as an index


def visit_order(config: DatasetConfig) -> list[str]:
    """Return the task names in visiting order; raises UserError for an unknown, empty or impossible order.

    One of LIBERO's orders covers a full suite; it permutes those of its tasks that `task_order` names (null: all).
    """
    tasks = known_tasks(config, config.env_type)
    if config.task_order is None:
        order = tasks
    else:
        order = []
        for item in (i for given in config.task_order for i in _as_indices(given, tasks)):
            if isinstance(item, int) and not isinstance(item, bool):
                if not 0 <= item < len(tasks):
                    raise UserError(
                        f"dataset.task_order has index {item}, but the stream's tasks have indices 0 to "
                        f"{len(tasks) - 1}."
                    )
                order.append(tasks[item])
            elif str(item) in tasks:
                order.append(str(item))
            else:
                raise UserError(f"dataset.task_order names '{item}'.{nearest(str(item), tasks)}")
    if not order:
        raise UserError("dataset.task_order is empty: a stream needs tasks.")
    if config.num_tasks is not None and config.partition != "by_episodes":
        if config.num_tasks > len(order):
            raise UserError(f"dataset.num_tasks={config.num_tasks}: the stream has only {len(order)} tasks.")
        order = order[: config.num_tasks]
    if config.libero_order is None:
        return order
    if len(set(order)) != len(order):
        raise UserError(
            f"dataset.libero_order is for tasks that are each visited once: dataset.task_order has {len(order)} visits "
            f"to {len(set(order))} tasks."
        )
    return [t for t in family(config.env_type).published_order(config.libero_order, tasks) if t in order]


def drawing(
    env_type: str | None, render: RenderConfig | None = None, data: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """Return how a simulator should draw camera images, {"fidelity", "size"}; None for one without cameras.

    What `render` leaves open is taken from `data`, which is what is known about the training data.
    """
    if not family(env_type).cameras or not family(env_type).draws:
        return None
    render, data = render or RenderConfig(), data or {}
    fidelity = render.fidelity or data.get("fidelity") or DEFAULT_FIDELITY
    return {"fidelity": fidelity, "size": render.size or data.get("size") or DEFAULT_SIZE}


def _check_drawing(env_type: str | None, data: DataSource, render: RenderConfig | None) -> None:
    """Raise UserError if a policy would learn from images that differ from those it is tested on."""
    wanted, found = drawing(env_type, render, data.render), data.render
    if wanted is None or found is None or found == wanted or (render is not None and render.mismatch == "allow"):
        return
    raise UserError(
        f"the images in {data.root} were drawn {_in_words(found)}, but the simulator would draw them "
        f"{wanted['fidelity']} at {wanted['size']}: a policy would be tested on images unlike those "
        f"it learned from. Set render.fidelity={found['fidelity']} render.size={found['size']}, make the data "
        "again (clbench data make NAME --force), or set render.mismatch=allow."
    )


def build_stream(config: DatasetConfig, *, sequential: bool = True, render: RenderConfig | None = None) -> TaskStream:
    """Build the stream from its configuration and its data set's description; may fetch the set from the hub.

    Raises:
        UserError: the order is impossible, a sequence of one task is requested, or the data set is missing, lacks a
            task, does not fit the simulator, or its images were not drawn as `render` says.
    """
    order = checked_order(config)
    if sequential and len(order) < 2:
        raise UserError(
            f"stream '{config.name}' has one task ({order[0]}): continual learning needs at least two. "
            "Add tasks (dataset.tasks, dataset.task_order) or use --algo singletask."
        )
    data = stream_data(config, render)
    seen: Counter[str] = Counter()
    totals = Counter(order)
    tasks = []
    for name in order:
        task = with_held_out(make_task(config, data, name, render), config)
        if config.fresh_on_revisit and totals[name] > 1:
            every = [(p.root, e) for p in task.pieces for e in p.episodes]
            share = every[seen[name] :: totals[name]]
            if not share:
                raise UserError(
                    f"dataset.fresh_on_revisit: {name} is visited {totals[name]} times but has only "
                    f"{len(task.episodes)} demonstrations."
                )
            chosen = set(share)
            task = task.only(lambda root, e, chosen=chosen: (root, e) in chosen)  # type: ignore[misc]
        seen[name] += 1
        tasks.append(task)
    visits = tuple(Visit(k, t.name, t.pieces) for k, t in enumerate(tasks))
    return TaskStream(config.name, visits, tuple(tasks), fingerprint=data.fingerprint, data=data.description)


def checked_order(config: DatasetConfig) -> list[str]:
    """The task names in visiting order; UserError for an impossible order and for tasks that the simulator lacks."""
    order = visit_order(config)
    for name in order:
        check_task(config.env_type, name)
    return order


def check_images(config: DatasetConfig, render: RenderConfig, base: bool = True) -> None:
    """Check how the images of the stream's and the base's data were drawn, according to their descriptions (meta/).

    Nothing else of a hub set is fetched, so this comes before anything that opens the data.

    Args:
        base: the base is pretrained on the tasks of `config.pretrain`; False: it comes from elsewhere.

    Raises:
        UserError: a policy would learn from images unlike those it is tested on or was pretrained on; a data set is
            missing or lacks the tasks.
    """
    if not family(config.env_type).cameras or not family(config.env_type).draws:
        return
    sets = {stream_data: config.repo_id is not None}
    if base and config.pretrain is not None:
        sets[pretraining_data] = config.pretrain.repo_id is not None
    found = {opened: opened(config, render, "meta") for opened in sorted(sets, key=sets.__getitem__)}  # the hub's last
    data, pretrain = found[stream_data], found.get(pretraining_data)
    wanted = drawing(config.env_type, render, data.render)
    if pretrain is None or pretrain.render in (None, wanted) or render.mismatch == "allow":
        return
    assert wanted is not None and pretrain.render is not None
    assert config.pretrain is not None
    make = "" if config.pretrain.repo_id else (
        f" (clbench data make {_base_of(config)} dataset.pretrain.data=NAME render.fidelity={wanted['fidelity']} "
        f"render.size={wanted['size']} makes it; give that name to the training run as well)"
    )  # fmt: skip
    raise UserError(
        f"the images of the base's tasks in {pretrain.root} were drawn {_in_words(pretrain.render)}, those of the "
        f"stream in {data.root} {_in_words(wanted)}: a policy would be pretrained on images unlike those it learns "
        f"from. Use a set for the base that was drawn like the stream's{make}, or set render.mismatch=allow."
    )


def _in_words(render: Mapping[str, Any]) -> str:
    return f"{render['fidelity']} at {render['size']} pixels"


def _base_of(config: DatasetConfig) -> str:
    """Arguments with which `clbench data make` makes only the base's data, if the stream's come from a hub."""
    repo = f" {shlex.quote(f'dataset.repo_id={config.repo_id}')}" if config.repo_id else ""
    return f"{shlex.quote(config.name)} --{repo}"


def without(stream: DatasetConfig, part: DatasetConfig | PretrainDataConfig, tasks: Collection[str]) -> str:
    """Return the override with which a training run omits some tasks of the stream, or of its base (`part`)."""
    if part is not stream:
        return f"dataset.pretrain.tasks=[{','.join(t for t in part.tasks if t not in tasks)}]"
    known = known_tasks(stream, stream.env_type)
    visits = [str(known.index(t)) for t in visit_order(stream) if t not in tasks]
    return f"dataset.task_order=[{','.join(visits)}]"


def _open(
    stream: DatasetConfig, part: DatasetConfig | PretrainDataConfig, names: list[str], make: str, key: str, depth: Depth
) -> DataSource:
    """`open_data`, with advice on how to go without the tasks that the data lacks."""
    try:
        if _in_parts(part, stream.env_type):
            shaped = frozenset({*stream.resize, *stream.pad})
            return open_sets(replace(_sets(part, key), shaped=shaped), names, depth)
        partial = isinstance(part, PretrainDataConfig) and part.partial
        return open_data(part, stream.env_type, names, stream=make, key=key, depth=depth, partial=partial)
    except Unmatched as e:
        if set(names) <= e.tasks:
            raise
        raise UserError(f"{e} To go without them: -- {shlex.quote(without(stream, part, e.tasks))}") from e


def stream_data(config: DatasetConfig, render: RenderConfig | None = None, depth: Depth = "all") -> DataSource:
    """The stream's data set, with the tasks that it visits. `depth`: see `open_data`."""
    names = list(dict.fromkeys(checked_order(config)))
    data = _open(config, config, names, shlex.quote(config.name), "dataset", depth)
    _check_shaped(config, data)
    _check_drawing(config.env_type, data, render)
    return data


def _check_shaped(config: DatasetConfig, data: DataSource) -> None:
    """Raise UserError where what is to be resized or padded is not there, or is longer."""
    if not (config.resize or config.pad):
        return
    roots = list(dict.fromkeys([data.root, *(p.root for t in data.tasks.values() for p in t.parts)]))
    for root in roots:
        features = read_json(root / INFO)["features"]
        names = next((p.features for t in data.tasks.values() for p in t.parts if p.root == root), data.features)
        named = {here: features[there] for there, here in (names or {k: k for k in features}).items()}
        for key, wanted in (("resize", config.resize), ("pad", config.pad)):
            for name, size in wanted.items():
                if name not in named or (named[name]["dtype"] in ("image", "video")) != (key == "resize"):
                    raise UserError(f"dataset.{key}: the data set in {root} has no such feature '{name}'."
                                    f"{nearest(name, named)}")  # fmt: skip
                there = int(named[name]["shape"][0])
                if key == "pad" and there > size:
                    raise UserError(f"dataset.pad: '{name}' of the data set in {root} has {there} numbers, more than "
                                    f"{size}.")  # fmt: skip


def pretraining_data(config: DatasetConfig, render: RenderConfig | None = None, depth: Depth = "all") -> DataSource:
    """The data set of the base's tasks; UserError when the stream names none. `depth`: see `open_data`."""
    if config.pretrain is None:
        raise UserError(
            f"stream '{config.name}' names no pretraining tasks (dataset.pretrain): give a base with policy.path=DIR."
        )
    names = known_tasks(config.pretrain, config.env_type, (*config.resize, *config.pad))
    make = shlex.quote(config.name)
    if config.pretrain.stream and not config.repo_id:
        make += f" -- {shlex.quote(f'dataset.pretrain={config.pretrain.stream}')}"
    if config.repo_id:  # makes only this set, and draws its images like the hub's
        make = _base_of(config) + (" render.fidelity=full" if family(config.env_type).cameras else "")
    for name in names:
        check_task(config.env_type, name)
    data = _open(config, config.pretrain, names, make, "dataset.pretrain", depth)
    _check_shaped(config, data)
    _check_drawing(config.env_type, data, render)
    if config.env is None:  # a simulator's tasks are known by name: config/compose.py
        _check_apart(_episodes(stream_data(config, render, "meta")), _episodes(data))
    return data


def _episodes(data: DataSource) -> dict[tuple[Path, int], str]:
    """Set and index of every episode of the tasks, and its task."""
    parts = [(t.name, p.root, p.episodes) for t in data.tasks.values() for p in t.parts]
    parts += [(t.name, data.root, t.episodes) for t in data.tasks.values() if not t.parts]
    return {(root.resolve(), e): name for name, root, episodes in parts for e in episodes}


def _check_apart(stream: dict[tuple[Path, int], str], base: dict[tuple[Path, int], str]) -> None:
    """Raise UserError where the base would learn from episodes of the stream, those that it holds out among them."""
    both = sorted(stream.keys() & base.keys())
    if both:
        root, index = both[0]
        raise UserError(
            f"{len(both)} episodes are in the stream and in its base's data, such as episode {index} of {root} (task "
            f"'{stream[both[0]]}'): a base must not know the stream. Name other tasks in dataset.tasks or "
            "dataset.pretrain.tasks, or other data."
        )


def make_task(config: DatasetConfig, data: DataSource, name: str, render: RenderConfig | None = None) -> Task:
    """Build one Task from its data set's description."""
    entry = data.tasks[name]
    shaped: dict[str, Any] = {"resize": dict(config.resize) or None, "pad": dict(config.pad) or None}
    if entry.parts:
        parts = tuple(replace(_part(entry, p), **shaped) for p in entry.parts)
        return Task(
            name=name, instruction=entry.instruction, root=parts[0].root, episodes=entry.episodes, env=None,
            max_steps=0, features=parts[0].features, frames=entry.frames, parts=parts, **shaped,
        )  # fmt: skip
    drawn = drawing(config.env_type, render, data.render)
    return Task(
        name=name,
        instruction=entry.instruction,
        root=data.root,
        episodes=entry.episodes,
        env=None if config.env is None else {"type": config.env.type, "task": name, **_render(drawn)},
        max_steps=0 if config.env is None else config.env.max_steps,
        expert_success=entry.expert_success,
        features=data.features,
        task_index=entry.task_index,
        text=entry.text,
        frames=entry.frames,
        **shaped,
    )


def with_held_out(task: Task, config: DatasetConfig) -> Task:
    """The task without the share of its episodes that `dataset.holdout` keeps from training; they are its `held_out`.

    Of n episodes, min(max(2, ⌈share n⌉), ⌊n/2⌋): those with the least hashes of (holdout_seed, the task's name, the
    set's place among the task's sets, the episode's index).

    Raises:
        UserError: there is only one episode.
    """
    if not config.holdout:
        return task
    roots = list(dict.fromkeys(p.root for p in task.pieces))
    every = [(p.root, e) for p in task.pieces for e in p.episodes]
    if len(every) < 2:
        raise UserError(
            f"task '{task.name}' has one episode, so none can be held out. Record more, leave the task out, or train "
            "on all episodes with dataset.holdout=0 (without a simulator nothing is then evaluated)."
        )
    count = min(max(2, math.ceil(config.holdout * len(every))), len(every) // 2)
    order = sorted(every, key=lambda x: derive_seed("holdout", config.holdout_seed, task.name, roots.index(x[0]), x[1]))
    held = set(order[:count])
    rest = task.only(lambda root, e: (root, e) not in held)
    return replace(rest, held_out=task.only(lambda root, e: (root, e) in held).pieces)


def _part(entry: TaskData, part: PartData) -> Task:
    return Task(
        name=entry.name, instruction=part.text, root=part.root, episodes=part.episodes, env=None, max_steps=0,
        features=part.features, task_index=part.task_index, text=part.text, frames=part.frames, weight=part.weight,
    )  # fmt: skip


def _render(drawn: dict[str, Any] | None) -> dict[str, Any]:
    return {"render": drawn} if drawn else {}


def pretraining_tasks(
    config: DatasetConfig, render: RenderConfig | None = None, depth: Depth = "all"
) -> tuple[list[Task], DataSource]:
    """Return the base's tasks and their data. Their episodes are as long as when demonstrations are made."""
    data = pretraining_data(config, render, depth)
    assert config.pretrain is not None
    tasks = [piece for n in data.tasks for piece in make_task(config, data, n, render).pieces]
    return [replace(t, max_steps=config.pretrain.make.max_steps) for t in tasks], data


def stream_tasks(
    config: DatasetConfig, render: RenderConfig | None = None, depth: Depth = "all"
) -> tuple[list[Task], DataSource]:
    """Return the stream's own tasks (their pieces), each once with all its demonstrations, and their data."""
    data = stream_data(config, render, depth)
    names = dict.fromkeys(checked_order(config))
    tasks = [with_held_out(make_task(config, data, name, render), config) for name in names]
    return [piece for task in tasks for piece in task.pieces], data
