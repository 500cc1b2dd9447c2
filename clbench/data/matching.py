"""Matching a data set's tasks to the simulator's by their instructions, one to one."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from clbench.envs.making import family
from clbench.errors import UserError, nearest

SHOWN = 8  # problems named in one message


def plain(text: str) -> str:
    """An instruction for comparison: lower case, single spaces, no full stop at the end. Nothing else is changed."""
    return " ".join(text.casefold().split()).rstrip(".").rstrip()


class Unmatched(UserError):
    """The data does not have all the tasks that are looked for; `tasks` are the missing ones."""

    def __init__(self, message: str, tasks: Iterable[str]) -> None:
        super().__init__(message)
        self.tasks = frozenset(tasks)


def named_tasks(env_type: str | None, given: Mapping[str, str], texts: Mapping[int, str], key: str) -> dict[str, int]:
    """Return the data's task index for each task to which a configuration assigns one of the data's instructions.

    Args:
        env_type: the simulator's; None: there is none, and a task may have any name.
        given: instruction of the data → task of the simulator.
        texts: task index → instruction, all of the data set's.
        key: where `given` is in the configuration.

    Raises:
        UserError: an instruction is not in the data, a task not in the simulator, or one of them occurs twice.
    """
    found: dict[str, int] = {}
    known = family(env_type).tasks()
    for text, task in given.items():
        if env_type is not None and not family(env_type).knows(task):
            raise UserError(f"{key}: {env_type} has no task '{task}'.{nearest(task, known)}")
        indices = [i for i, t in texts.items() if plain(t) == plain(text)]
        if len(indices) != 1:
            what = "has no" if not indices else f"has {len(indices)} times the"
            raise UserError(f"{key}: the data {what} instruction '{text}'.{nearest(text, texts.values())}")
        if task in found or indices[0] in found.values():
            raise UserError(f"{key} must give each instruction one task and each task one instruction: '{text}' or "
                            f"{task} occurs twice.")  # fmt: skip
        found[task] = indices[0]
    return found


def match_tasks(
    env_type: str | None,
    tasks: Sequence[str],
    texts: Mapping[int, str],
    counts: Mapping[int, int],
    named: Mapping[str, int] | None = None,
    key: str = "dataset.instructions",
    partial: bool = False,
) -> dict[str, int]:
    """Return the data's task index for each of `tasks`.

    Without a simulator, the name of a task that is not `named` is its instruction.

    An instruction shared by several of the simulator's scenes does not tell which scene is meant. Suites decide which
    scenes a set could hold: those of the wanted tasks, and every other suite of which the set has an instruction that
    no other suite has.

    Args:
        tasks: the simulator's tasks that are looked for, distinct.
        texts: task index → instruction, all of the data set's.
        counts: task index → its number of episodes.
        named: task → task index, for tasks that need no matching (see `named_tasks`).
        key: where a configuration can name them, for messages.
        partial: leave out tasks that do not match; of several with one instruction, all but the first.

    Raises:
        Unmatched: an instruction is not in the data, occurs twice, has no episodes, or belongs to several of the
            simulator's tasks that the data may hold; all problems are in one message.
    """
    named = named or {}
    simulators = family(env_type)
    there: dict[str, list[int]] = defaultdict(list)
    for index, text in texts.items():
        if index not in named.values():
            there[plain(text)].append(index)
    sharing: dict[str, list[str]] = defaultdict(list)
    for name in simulators.tasks():
        sharing[plain(simulators.instruction(name))].append(name)
    suites = {text: {simulators.suite_of(n) for n in names} for text, names in sharing.items()}
    held = {next(iter(s)) for text, s in suites.items() if text in there and len(s) == 1}
    found: dict[str, int] = {}
    problems: list[str] = []
    for name in tasks:
        said = name if env_type is None else simulators.instruction(name)
        text = plain(said)
        own = simulators.suite_of(name)
        rivals = [n for n in sharing[text] if n != name and simulators.suite_of(n) in held | {own}]
        indices = there.get(text, [])
        if name in named:
            if counts.get(named[name]):
                found[name] = named[name]
            else:
                problems.append(f'{name}: "{texts[named[name]]}" has no episodes')
        elif not indices:
            close = difflib.get_close_matches(text, there, n=3, cutoff=0.5)
            near = " or ".join(f'"{texts[there[c][0]]}"' for c in close)
            problems.append(f'{name}: "{said}" is missing' + (f" (nearest: {near})" if near else ""))
        elif partial and set(indices) & set(found.values()):
            problems.append(f'{name}: "{said}" is that of another task')
        elif rivals and not partial:
            problems.append(
                f'{name}: "{said}" is also the instruction of {", ".join(rivals)}, and the data does not say '
                "which of them its demonstrations show"
            )
        elif len(indices) > 1:
            listed = ", ".join(f'{i} ("{texts[i]}")' for i in indices)
            problems.append(f"{name}: several tasks of the data have its instruction: {listed}")
        elif not counts.get(indices[0]):
            problems.append(f'{name}: "{said}" has no episodes')
        else:
            found[name] = indices[0]
    if problems and (not partial or not found):
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        has = "; ".join(f'"{t}"' for t in list(texts.values())[:SHOWN]) + ("; …" if len(texts) > SHOWN else "")
        raise Unmatched(
            f"the data's tasks and the stream's cannot be matched one to one by their instructions. {len(found)} of "
            f"{len(tasks)} match, but: {'; '.join(problems[:SHOWN])}{more}. The data has {len(texts)} tasks: {has}. "
            f"State each instruction's task ('{key}={{TEXT: TASK}}'), use a data set of this suite, or leave those "
            "tasks out.",
            [name for name in tasks if name not in found],
        )
    return found
