"""Looks up simulator families by name, and makes simulators in this process or in a child under another interpreter."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from clbench import registry
from clbench.envs import remote
from clbench.envs.base import INTERPRETER, Simulator, SimulatorFamily
from clbench.envs.lerobot_gym import LeRobotEnvironments, lerobot_environments
from clbench.errors import UserError, nearest

_families: dict[str, SimulatorFamily] = {}


class NoSimulator(SimulatorFamily):
    """Stands in for a simulator where a stream has none: no cameras, no rules for data, nothing to make."""

    fps = state_dim = action_dim = max_steps = 0

    def make(self, task: str, render: Mapping[str, Any]) -> Simulator:
        raise UserError(f"the stream has no simulator (dataset.env: null): '{task}' cannot be played.")

    def published_order(self, number: int, tasks: Sequence[str]) -> list[str]:
        raise UserError(
            "dataset.libero_order is for LIBERO's suites, but this stream has no simulator (dataset.env: null). Give "
            "your own order with dataset.task_order instead."
        )


NO_SIMULATOR = NoSimulator("none")


def family(env_type: str | None) -> SimulatorFamily:
    """Return the simulators behind an environment type, clbench's, a plugin's or LeRobot's; `NO_SIMULATOR` for None.

    Raises:
        UserError: no such type, or what is registered under its name cannot be imported or is not a family.
    """
    if env_type is None:
        return NO_SIMULATOR
    made = _families.get(env_type)
    if env_type not in registry.names("simulators") and env_type in lerobot_environments():
        if made is None:
            made = _families[env_type] = LeRobotEnvironments(env_type)
        return made
    registered = registry.load("simulators", env_type)
    if made is None or type(made) is not registered:
        if not (isinstance(registered, type) and issubclass(registered, SimulatorFamily)):
            raise UserError(f"the environment type '{env_type}' is {registered!r}, not a subclass of SimulatorFamily.")
        made = _families[env_type] = registered(env_type)
    return made


def check_task(env_type: str | None, task: str) -> None:
    """Raise UserError if `env_type` has no task of that name. Without a simulator, the data decide (matching.py)."""
    if env_type is None:
        return
    known = family(env_type).tasks()
    if not family(env_type).knows(task):
        raise UserError(f"{env_type} has no task '{task}'.{nearest(task, known)}")


def instruction(spec: Mapping[str, Any]) -> str:
    """Return the instruction of a task in words, without importing its simulator."""
    found, task = _split(spec)
    return found.instruction(task)


def make_simulator(spec: Mapping[str, Any]) -> Simulator:
    """Build the simulator described by `spec`, e.g. {"type": "metaworld", "task": "push-v3"}.

    It is in this process, or in a child process if the user names another interpreter for its type (see remote.py).
    A type with cameras also takes "render", {"fidelity": fast | full, "size": pixels}.

    Raises UserError for a missing or unknown key, an unknown type, or an unknown task.
    """
    found, task = _split(spec)
    render = dict(spec.get("render", {}))
    variable = other_python(found.name)
    return found.make(task, render) if variable is None else remote.make(variable, found, task, render)


def other_python(env_type: str | None) -> str | None:
    """Return the environment variable that names another interpreter for an environment type; None: none is set."""
    variable = family(env_type).python_variable
    return variable if variable is not None and os.environ.get(variable) else None


def simulator_versions(env_type: str | None) -> dict[str, str]:
    """Return the versions of the packages that decide an environment type's physics, from where its simulators run.

    Raises UserError, naming the variable, if it names another interpreter that cannot have them.
    """
    variable = other_python(env_type)
    return family(env_type).versions() if variable is None else remote.versions(variable, family(env_type))


def physics_versions(env_type: str) -> dict[str, str]:
    """Like `simulator_versions`, but the same wherever simulators run: without what another interpreter adds."""
    return {k: v for k, v in simulator_versions(env_type).items() if not k.startswith(INTERPRETER)}


def check_other_python(env_type: str | None) -> None:
    """Raise UserError if another interpreter is named for an environment type but cannot have its simulators."""
    if other_python(env_type) is not None:
        simulator_versions(env_type)


def check_this_python(env_type: str) -> None:
    """Raise UserError if another interpreter is named: for programs that look into simulators, or measure them."""
    variable = other_python(env_type)
    if variable is not None:
        raise UserError(
            f"{variable} names another interpreter, whose simulators this program cannot inspect. Unset it, and run "
            "this where clbench and the simulator are both installed."
        )


def _split(spec: Mapping[str, Any]) -> tuple[SimulatorFamily, str]:
    """The family and the task named by `spec`, which is checked."""
    for key in spec:
        if key not in ("type", "task", "render"):
            raise UserError(f"unknown environment key '{key}'.{nearest(key, ('type', 'task', 'render'))}")
    for key in ("type", "task"):
        if key not in spec:
            raise UserError(f"an environment needs '{key}', e.g. {{type: metaworld, task: push-v3}}.")
    env_type, task = str(spec["type"]), str(spec["task"])
    check_task(env_type, task)
    found, render = family(env_type), spec.get("render", {})
    if not isinstance(render, Mapping) or (render and not found.cameras):
        raise UserError(f"environment type '{env_type}' cannot be rendered as {render!r}.")
    return found, task
