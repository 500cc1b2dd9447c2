"""The simulator protocol, and the one place that knows which simulators exist.

Only the standard library and numpy are imported here, so that a worker under another interpreter can use it.
A backend is a module of this package, named in `BACKENDS`, that offers

    make(task: str) -> Simulator          a simulator for one task; with CAMERAS: make(task, render)
    tasks() -> list[str]                  the names it knows, sorted; imports no simulator
    instruction(task: str) -> str         the sentence a policy is given; imports no simulator
    expert(task: str) -> Expert           optional: a scripted expert, a pure function of observations
    expert_for(simulator) -> Expert       optional, instead: one for a single episode of this simulator, made after its
                                          reset, which may remember and may look into the simulator (privileged)
    NO_DEMONSTRATIONS: dict[str, str]     optional: tasks that its expert cannot do, and why
    versions() -> dict[str, str]          the versions of the packages that decide its physics
    FPS, ROBOT_TYPE, STATE_DIM, ACTION_DIM, MAX_STEPS
    PYTHON_VARIABLE: str                  optional: the environment variable that may name another interpreter, one that
                                          has the simulator (see remote.py); only make, expert_for and versions need it
    GRIPPER_OPENS: float                  optional: the value of an action's last number that opens the gripper
    GRIPPER_IDLE: frozenset[str]          optional: tasks that can be done without commanding it to open
    suite_of(task: str) -> str            optional: the suite a task belongs to, where its tasks come in several
    published_order(number: int, tasks: list[str]) -> list[str]
                                          optional: the tasks of a suite in the order that its authors published under
                                          that number; UserError where `tasks` are not such a suite in its first order
    CAMERAS: dict[str, str]               optional: the camera images among its observations, uint8 (size, size, 3), and
                                          what the simulator calls the cameras. `make` is told how to draw them:
                                          {"fidelity": fast | full, "size": pixels}
    NAMES: dict[str, list[str]]           optional: what data sets call the dimensions of state and action
    TEST_STATES: int                      optional: how many initial states there are for test episodes, where their
                                          seeds go through a fixed list; all other seeds draw other states
    PRIVILEGED: str                       optional: what its observations hold that no robot would see; data sets,
                                          manifests and reports carry it as a label
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np

from clbench.errors import UserError, nearest

# Episodes that evaluate a policy have seeds from here on; demonstrations have seeds below it. So no policy is
# ever tested on an initial state that it was shown. Those that policies are chosen by come behind those of the test, so
# none is chosen by an initial state that it is reported on.
EVAL_SEED_BASE = 1_000_000
VALIDATION_SEED_BASE = 2_000_000
SPLITS = {"test": EVAL_SEED_BASE, "validation": VALIDATION_SEED_BASE}  # eval.split → its first seed
SEEDS_PER_SPLIT = 1_000_000

INTERPRETER = "simulator_"  # so begin the versions of another interpreter that has the simulators, and of its numpy

STATE_KEY = "observation.state"  # LeRobot's name for the robot's (low-dimensional) state

BACKENDS: dict[str, str] = {
    "metaworld": "clbench.envs.metaworld",
    "libero": "clbench.envs.libero.images",
    "libero_state": "clbench.envs.libero.simulator",
}

# Hub data sets in LeRobot's format whose features are those of an environment type.
HUB_DATA = {"libero": "HuggingFaceVLA/libero"}

Observation = dict[str, np.ndarray]
Expert = Callable[[Observation], np.ndarray]


class Step(NamedTuple):
    """What one action led to. `observation` has LeRobot's keys; "observation.state" is float32, images are uint8."""

    observation: Observation
    reward: float
    success: bool


class Simulator(Protocol):
    """One task in one simulator. `reset(seed)` alone decides an episode, whatever was done before it."""

    def reset(self, seed: int) -> Observation:
        """Start the episode that `seed` names and return its first observation."""
        ...

    def step(self, action: np.ndarray) -> Step:
        """Apply `action` (ACTION_DIM,), clipped to [-1, 1]; ValueError for a wrong shape, NaN or inf."""
        ...

    def step_unseen(self, action: np.ndarray) -> Step:
        """As `step`, without camera images in the observation, for who does not look. Optional; only saves time."""
        ...

    def render(self, width: int, height: int) -> np.ndarray:
        """Return the scene as uint8 (height, width, 3). Optional: NotImplementedError where it is missing."""
        ...

    def close(self) -> None:
        """Free what the simulator holds. It cannot be used afterwards; closing twice is harmless."""
        ...


def backend(env_type: str) -> ModuleType:
    """Return the module behind an environment type; UserError for an unknown one."""
    if env_type not in BACKENDS:
        raise UserError(f"unknown environment type '{env_type}'.{nearest(env_type, BACKENDS)}")
    return importlib.import_module(BACKENDS[env_type])


def check_task(env_type: str, task: str) -> None:
    """Raise UserError when `env_type` has no task of that name."""
    known = backend(env_type).tasks()
    if task not in known:
        raise UserError(f"{env_type} has no task '{task}'.{nearest(task, known)}")


def available_tasks(env_type: str) -> list[str]:
    """Return the names of all tasks of an environment type, sorted, without importing its simulator."""
    return list(backend(env_type).tasks())


def make_simulator(spec: Mapping[str, Any]) -> Simulator:
    """Build the simulator that `spec`, e.g. {"type": "metaworld", "task": "push-v3"}, describes.

    It is in this process, or in a child of it where the user names another interpreter for its type (see remote.py).
    A type with cameras also takes "render", {"fidelity": fast | full, "size": pixels}.

    Raises UserError for a missing or unknown key, an unknown type, or an unknown task.
    """
    env_type, task = _split(spec)
    variable = other_python(env_type)
    if variable is not None:
        from clbench.envs import remote

        return remote.make(variable, dict(spec))
    if cameras(env_type):
        return backend(env_type).make(task, dict(spec.get("render", {})))
    return backend(env_type).make(task)


def other_python(env_type: str) -> str | None:
    """Return the environment variable that names another interpreter for an environment type; None: it is this one."""
    variable: str | None = getattr(backend(env_type), "PYTHON_VARIABLE", None)
    return variable if variable is not None and os.environ.get(variable) else None


def simulator_versions(env_type: str) -> dict[str, str]:
    """Return the versions of the packages that decide an environment type's physics, from where its simulators are.

    Raises UserError, naming the variable, where another interpreter is named that cannot have them.
    """
    variable = other_python(env_type)
    if variable is not None:
        from clbench.envs import remote

        return remote.versions(variable, env_type)
    found: dict[str, str] = backend(env_type).versions()
    return found


def physics_versions(env_type: str) -> dict[str, str]:
    """As `simulator_versions`, the same wherever the simulators are: without what only another interpreter adds."""
    return {k: v for k, v in simulator_versions(env_type).items() if not k.startswith(INTERPRETER)}


def check_other_python(env_type: str) -> None:
    """Raise UserError where another interpreter is named for an environment type that cannot have its simulators."""
    if other_python(env_type) is not None:
        simulator_versions(env_type)


def check_this_python(env_type: str) -> None:
    """Raise UserError where another interpreter is named: for programs that look into simulators, or measure them."""
    variable = other_python(env_type)
    if variable is not None:
        raise UserError(
            f"{variable} names another interpreter, into whose simulators this program cannot look. Unset it, and run "
            "this where clbench and the simulator are both installed."
        )


def step_unseen(simulator: Simulator, action: np.ndarray) -> Step:
    """`simulator.step` for who does not look at what it leads to: no camera image is drawn where one can do without."""
    return getattr(simulator, "step_unseen", simulator.step)(action)  # type: ignore[no-any-return]


def make_expert(spec: Mapping[str, Any]) -> Expert:
    """Return the scripted expert of a task, a pure function from an observation to an action (not clipped).

    Raises UserError for a bad `spec` (as `make_simulator`) and where the type has no experts.
    """
    env_type, task = _split(spec)
    module = backend(env_type)
    if not hasattr(module, "expert"):
        raise UserError(f"environment type '{env_type}' has no scripted experts.")
    return module.expert(task)


def episode_expert(spec: Mapping[str, Any], simulator: Simulator) -> Expert:
    """Return the scripted expert for the next episode of `simulator`; call it from that episode's first observation on.

    Raises UserError for a bad `spec` (as `make_simulator`) and where the type has no experts.
    """
    from clbench.envs.remote import RemoteSimulator

    module = backend(_split(spec)[0])
    if isinstance(simulator, RemoteSimulator):
        return simulator.expert()
    if not hasattr(module, "expert_for"):
        return make_expert(spec)
    made: list[Expert] = []

    def act(observation: Observation) -> np.ndarray:
        if not made:  # only now has the episode begun
            made.append(module.expert_for(simulator))
        return made[0](observation)

    return act


def without_demonstrations(env_type: str) -> dict[str, str]:
    """Return the tasks of an environment type that its expert cannot do, and why."""
    return dict(getattr(backend(env_type), "NO_DEMONSTRATIONS", {}))


def privileged(env_type: str) -> str | None:
    """Return what an environment type's observations hold that no robot would see, in words; None where nothing."""
    return getattr(backend(env_type), "PRIVILEGED", None)


def count_test_states(env_type: str) -> int | None:
    """Return how many initial states an environment type has for test episodes; None: each seed has its own."""
    return getattr(backend(env_type), "TEST_STATES", None)


def suite_of(env_type: str, task: str) -> str:
    """Return the suite that a task belongs to; "" for simulators without suites."""
    module = backend(env_type)
    return str(module.suite_of(task)) if hasattr(module, "suite_of") else ""


def published_order(env_type: str, number: int, tasks: Sequence[str]) -> list[str]:
    """Return the tasks of a suite in the order that its authors published under that number.

    Raises:
        UserError: the type has no published orders, none of that number, or `tasks` are not a suite that has them.
    """
    module = backend(env_type)
    if not hasattr(module, "published_order"):
        raise UserError(
            f"dataset.libero_order is for LIBERO's suites: '{env_type}' has no published task orders. Give an order of "
            "your own with dataset.task_order instead."
        )
    return list(module.published_order(number, list(tasks)))


def cameras(env_type: str) -> list[str]:
    """Return the names of the camera images among an environment type's observations; empty where there are none."""
    return list(getattr(backend(env_type), "CAMERAS", {}))


def state_size(env_type: str) -> int:
    """Return how many numbers the state of an environment type has."""
    return int(backend(env_type).STATE_DIM)


def action_size(env_type: str) -> int:
    """Return how many numbers an action of an environment type has."""
    return int(backend(env_type).ACTION_DIM)


def gripper_opens(env_type: str, tasks: Sequence[str]) -> float | None:
    """Return the value of an action's last number that opens the gripper; None where the type does not say it, or all
    of the tasks can be done without."""
    module = backend(env_type)
    if set(tasks) <= getattr(module, "GRIPPER_IDLE", frozenset()):
        return None
    return getattr(module, "GRIPPER_OPENS", None)


def steps_per_second(env_type: str) -> float:
    """Return how many steps of an environment type are a simulated second."""
    return float(backend(env_type).FPS)


def hub_data(env_type: str) -> str | None:
    """Return a hub data set that has demonstrations with the observations of an environment type; None: none known."""
    return HUB_DATA.get(env_type)


def instruction(spec: Mapping[str, Any]) -> str:
    """Return the instruction of a task in words, without importing its simulator."""
    env_type, task = _split(spec)
    return backend(env_type).instruction(task)


def _split(spec: Mapping[str, Any]) -> tuple[str, str]:
    for key in spec:
        if key not in ("type", "task", "render"):
            raise UserError(f"unknown environment key '{key}'.{nearest(key, ('type', 'task', 'render'))}")
    for key in ("type", "task"):
        if key not in spec:
            raise UserError(f"an environment needs '{key}', e.g. {{type: metaworld, task: push-v3}}.")
    env_type, task = str(spec["type"]), str(spec["task"])
    check_task(env_type, task)
    render = spec.get("render", {})
    if not isinstance(render, Mapping) or (render and not cameras(env_type)):
        raise UserError(f"environment type '{env_type}' cannot be rendered as {render!r}.")
    return env_type, task
