"""LIBERO's suites, task names and instructions, known without the simulator.

`tasks.json` holds, for each suite, its tasks in LIBERO's published order (task order 0) with their
instructions. It is made from the installed package by

    python -m clbench.envs.libero.tasks > clbench/envs/libero/tasks.json
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from clbench.envs.libero.assets import package
from clbench.errors import UserError, nearest

TABLE_FILE = Path(__file__).with_name("tasks.json")
ALIASES = {"libero_long": "libero_10"}
# LeRobot's step limits (its evaluation's TASK_SUITE_MAX_STEPS): a little above the longest human demonstration.
MAX_STEPS = {"libero_spatial": 280, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}


# LIBERO's published orders of a suite's ten tasks; its evaluations use order 0.
TASK_ORDERS = (
    (0, 1, 2, 3, 4, 5, 6, 7, 8, 9), (4, 6, 8, 7, 3, 1, 2, 0, 9, 5), (6, 3, 5, 0, 4, 2, 9, 1, 8, 7),
    (7, 4, 3, 0, 8, 1, 2, 5, 9, 6), (4, 5, 6, 3, 8, 0, 2, 7, 1, 9), (1, 2, 3, 0, 6, 9, 5, 7, 4, 8),
    (3, 7, 8, 1, 6, 2, 9, 4, 0, 5), (4, 2, 9, 7, 6, 8, 5, 1, 3, 0), (1, 8, 5, 4, 0, 9, 6, 7, 2, 3),
    (8, 3, 6, 4, 9, 5, 1, 2, 0, 7), (6, 9, 0, 5, 7, 1, 2, 8, 3, 4), (6, 8, 3, 1, 0, 2, 5, 9, 7, 4),
    (8, 0, 6, 9, 4, 1, 7, 3, 2, 5), (3, 8, 6, 4, 2, 5, 0, 7, 1, 9), (7, 1, 5, 6, 3, 2, 8, 9, 4, 0),
    (2, 0, 9, 5, 3, 6, 8, 7, 1, 4), (3, 5, 9, 6, 2, 4, 8, 7, 1, 0), (7, 6, 5, 9, 0, 3, 4, 2, 8, 1),
    (2, 5, 0, 9, 3, 1, 6, 4, 8, 7), (3, 5, 1, 2, 7, 8, 6, 0, 4, 9), (3, 4, 1, 9, 7, 6, 8, 2, 0, 5),
)  # fmt: skip


@cache
def _table() -> dict[str, dict[str, str]]:
    table: dict[str, dict[str, str]] = json.loads(TABLE_FILE.read_text())
    return table


@cache
def _suite_of_task() -> dict[str, str]:
    return {task: suite for suite, tasks in _table().items() for task in tasks}


def suites() -> list[str]:
    """Return the names of the suites."""
    return list(_table())


def suite_tasks(suite: str) -> list[str]:
    """Return a suite's tasks in LIBERO's order; "libero_long" is libero_10. UserError for an unknown suite."""
    name = ALIASES.get(suite, suite)
    if name not in _table():
        raise UserError(f"LIBERO has no suite '{suite}'.{nearest(suite, [*_table(), *ALIASES])}")
    return list(_table()[name])


def task_order(number: int) -> tuple[int, ...]:
    """Return LIBERO's published task order of that number, as indices into a suite of ten; UserError if none."""
    if not 0 <= number < len(TASK_ORDERS):
        raise UserError(f"LIBERO has task orders 0 to {len(TASK_ORDERS) - 1}, not {number}.")
    return TASK_ORDERS[number]


def published_order(number: int, tasks: Sequence[str]) -> list[str]:
    """Return the tasks of a suite of ten in LIBERO's task order of that number.

    Raises:
        UserError: `tasks` are not those of such a suite in its published order, or no order has that number.
    """
    order = task_order(number)
    of_ten = [name for name, suite in _table().items() if len(suite) == len(order)]
    if not any(list(tasks) == suite_tasks(name) for name in of_ten):
        raise UserError(
            f"dataset.libero_order counts the tasks of one of LIBERO's suites of {len(order)} ({', '.join(of_ten)}) in "
            f"their published order, but dataset.tasks lists {_what_else(tasks, of_ten)}. Leave dataset.tasks as in "
            "the suite's stream, or give your own order with dataset.task_order instead."
        )
    return [tasks[i] for i in order]


def _what_else(tasks: Sequence[str], of_ten: Sequence[str]) -> str:
    """What `tasks` are, if not a suite in its order."""
    same = [name for name in of_ten if sorted(tasks) == sorted(suite_tasks(name))]
    return f"those of {same[0]} in another order" if same else f"{len(tasks)} tasks that are not such a suite"


def task_names() -> list[str]:
    """Return the names of all 130 tasks, sorted."""
    return sorted(_suite_of_task())


def suite_of(task: str) -> str:
    """Return the suite a task belongs to; UserError when there is no such task."""
    if task not in _suite_of_task():
        raise UserError(f"LIBERO has no task '{task}'.{nearest(task, _suite_of_task())}")
    return _suite_of_task()[task]


def task_instruction(task: str) -> str:
    """Return a task's instruction as LIBERO and LeRobot word it; UserError when there is no such task."""
    return _table()[suite_of(task)][task]


def read_package() -> dict[str, dict[str, str]]:
    """Return the table of the installed package. Runs only its list of tasks, not the simulator."""
    path = package() / "benchmark" / "libero_suite_task_map.py"
    spec = importlib.util.spec_from_file_location("_libero_suite_task_map", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    listed: dict[str, list[str]] = module.libero_task_map
    return {suite: {task: _language(task) for task in listed[suite]} for suite in MAX_STEPS}


def _language(task: str) -> str:
    """The sentence in a task's name: without the scene, spaces for underscores (LIBERO's own rule)."""
    if task[0].isupper():
        task = task[task.find("SCENE") + (8 if "SCENE10" in task else 7) :]
    return task.replace("_", " ")


if __name__ == "__main__":
    print(json.dumps(read_package(), indent=1))
