"""A unit of work as plain data: one clbench command, what it needs, what it produces. Standard library only.

A graph of units can be printed, written as JSON, and run twice without harm: every command keeps what is done, resumes
where it was stopped, and leaves the same bytes whatever admissible order units are run in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from clbench.stopping import Stop

KINDS = ("demonstrations", "base", "train", "evaluate", "report")


@dataclass(frozen=True)
class Unit:
    """One command.

    Attributes:
        name: unique in its graph.
        kind: one of KINDS.
        arguments: arguments of `clbench`.
        log: the file that its output is appended to.
        outputs: what it produces, a folder.
        after: names of the units that must have succeeded.
        anyway: units before it may also have failed: it works with what exists.
        order: among units that can be started, smaller values come first.
        cores: how many it uses; 0 = all of the machine's: nothing else runs at the same time.
        about: what it works on, for messages; the same for several units of a run.
    """

    name: str
    kind: str
    arguments: tuple[str, ...]
    log: Path
    outputs: Path
    after: tuple[str, ...] = ()
    anyway: bool = False
    order: tuple[float, ...] = ()
    cores: int = 1
    about: str = ""


Statuses = dict[str, int | None]  # exit status of ended units, by name; None = it was left out


class Executor(Protocol):
    """Runs the units of a graph, each once those before it have ended."""

    def run(self, units: Sequence[Unit], stop: Stop) -> Statuses:
        """Run the units and return their exit statuses by name; None for those that are left out, after a failed one.

        Raises:
            Interrupted: `stop` requested it; commands under way were asked to stop, and have ended.
        """
        ...


def admissible(units: Sequence[Unit], statuses: Statuses) -> list[Unit]:
    """Those of `units` that can be started, in their order."""
    return [u for u in units if all(a in statuses and (u.anyway or statuses[a] == 0) for a in u.after)]


def leave_out(units: Sequence[Unit], statuses: Statuses) -> list[Unit]:
    """Note in `statuses` which `units` can never start because a unit before them failed; returns the others."""
    while True:
        lost = [u for u in units if not u.anyway and any(a in statuses and statuses[a] != 0 for a in u.after)]
        if not lost:
            return list(units)
        statuses.update({u.name: None for u in lost})
        units = [u for u in units if u not in lost]


def check(units: Sequence[Unit]) -> None:
    """Raise ValueError for a graph that cannot be run: a duplicate name, an unknown one, a cycle."""
    names = [u.name for u in units]
    if len(set(names)) != len(names):
        raise ValueError(f"two units have the same name: {sorted(n for n in set(names) if names.count(n) > 1)}")
    unknown = {a for u in units for a in u.after} - set(names)
    if unknown:
        raise ValueError(f"units come after {sorted(unknown)}, which do not exist")
    done: Statuses = {}
    while len(done) < len(units):
        ready = [u.name for u in admissible(units, done) if u.name not in done]
        if not ready:
            raise ValueError(f"units wait for each other: {sorted(set(names) - set(done))}")
        done |= dict.fromkeys(ready, 0)
