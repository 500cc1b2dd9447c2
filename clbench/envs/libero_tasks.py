"""LIBERO's suites, task names and instructions, known without the simulator.

`libero_tasks.json` holds, for each suite, its tasks in LIBERO's published order (task order 0) with their
instructions. It is made from the installed package by

    python -m clbench.envs.libero_tasks > clbench/envs/libero_tasks.json
"""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path

from clbench.envs.libero_assets import package
from clbench.errors import UserError, nearest

TABLE_FILE = Path(__file__).with_name("libero_tasks.json")
ALIASES = {"libero_long": "libero_10"}
# LeRobot's step limits (its evaluation's TASK_SUITE_MAX_STEPS): a little above the longest human demonstration.
MAX_STEPS = {"libero_spatial": 280, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}


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
    """Return the table as the installed package has it. Runs its list of tasks alone, not the simulator."""
    path = package() / "benchmark" / "libero_suite_task_map.py"
    spec = importlib.util.spec_from_file_location("_libero_suite_task_map", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    listed: dict[str, list[str]] = module.libero_task_map
    return {suite: {task: _language(task) for task in listed[suite]} for suite in MAX_STEPS}


def _language(task: str) -> str:
    """The sentence in a task's name: without the scene, words for underscores (LIBERO's own rule)."""
    if task[0].isupper():
        task = task[task.find("SCENE") + (8 if "SCENE10" in task else 7) :]
    return task.replace("_", " ")


if __name__ == "__main__":
    print(json.dumps(read_package(), indent=1))
