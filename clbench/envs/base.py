"""The simulator protocol, and what a family of simulators declares about itself.

Only the standard library and numpy are imported here, and nothing else of `envs`, so that a worker under another
interpreter can use it. `making.py` finds families by their names and makes their simulators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple, Protocol

import numpy as np

from clbench.errors import UserError

# Episodes that evaluate a policy have seeds from here on; demonstrations have seeds below it. So no policy is
# ever tested on an initial state that it was shown. Validation seeds come after the test seeds, so no policy is chosen
# by an initial state that it is reported on.
EVAL_SEED_BASE = 1_000_000
VALIDATION_SEED_BASE = 2_000_000
SPLITS = {"test": EVAL_SEED_BASE, "validation": VALIDATION_SEED_BASE}  # eval.split → its first seed
SEEDS_PER_SPLIT = 1_000_000

INTERPRETER = "simulator_"  # prefix of the versions of another interpreter that has the simulators, and of its numpy

STATE_KEY = "observation.state"  # LeRobot's name for the robot's (low-dimensional) state

Observation = dict[str, np.ndarray]
Expert = Callable[[Observation], np.ndarray]


class Step(NamedTuple):
    """The result of one action. `observation` has LeRobot's keys; "observation.state" is float32, images are uint8."""

    observation: Observation
    reward: float
    success: bool


class Simulator(Protocol):
    """One task in one simulator. `reset(seed)` alone decides an episode, whatever was done before it.

    A simulator with cameras may also have a method `step_unseen(action)`: it is `step` without camera images in the
    observation, and saves the time of drawing them.
    """

    def reset(self, seed: int) -> Observation:
        """Start the episode of `seed` and return its first observation."""
        ...

    def step(self, action: np.ndarray) -> Step:
        """Apply `action` (action_dim,), clipped to [-1, 1]; ValueError for a wrong shape, NaN or inf."""
        ...

    def render(self, width: int, height: int) -> np.ndarray:
        """Return the scene as uint8 (height, width, 3). Optional: NotImplementedError where it is missing."""
        ...

    def close(self) -> None:
        """Free what the simulator holds. It cannot be used afterwards; closing twice is harmless."""
        ...


def step_unseen(simulator: Simulator, action: np.ndarray) -> Step:
    """Return `simulator.step(action)`, without camera images where the simulator can leave them out."""
    return getattr(simulator, "step_unseen", simulator.step)(action)  # type: ignore[no-any-return]


class SimulatorFamily:
    """The simulators of one environment type, the `env.type` of a stream: a simulator for each of its tasks.

    A subclass sets what differs from the defaults here, and offers `make`. It is registered under the name of its
    environment type (see `clbench.registry`, axis "simulators"). Only `make`, `versions` and what they return may
    import the simulator's own packages: names, instructions and sizes are needed without them.

    Attributes:
        name: the environment type's; given when the family is made.
        fps: control steps per simulated second; data sets record it as frames per second.
        state_dim: numbers in `observation.state`, a float32 vector of shape (state_dim,).
        action_dim: numbers in an action, a vector of shape (action_dim,) in [-1, 1].
        max_steps: the longest episode that the simulators allow, in control steps.
        robot_type: the robot's name in data sets.
        instructions: task → the sentence that a policy is given; what `tasks` and `instruction` return.
        needs: the distributions whose versions decide an episode, as a literal tuple: `clbench list` reads it from the
            source.
        install: a sentence on how these are installed.
        python_variable: the environment variable that may name another interpreter which has the simulator (see
            remote.py). None: simulators are always made in this process.
        cameras: key of a camera image in the observations → the simulator's name for the camera. Images are uint8 of
            shape (size, size, 3). Empty: there are none.
        names: what data sets call the dimensions of the state and the action, by their keys.
        gripper_opens: the value of an action's last number that opens the gripper; None: unspecified.
        gripper_idle: tasks that can be done without commanding it to open.
        test_states: how many initial states there are for test episodes, if their seeds cycle through a fixed list. All
            other seeds draw other states. None: each seed has its own.
        privileged: what the observations hold that no robot would see, in words: data sets, manifests and reports carry
            it as a label. None: nothing.
        normalised_actions: whether actions are in [-1, 1]; otherwise in the simulator's own units.
        own_tasks: whether it has a list of tasks with their wording; otherwise a task may have any name, and its
            wording is the data's.
        draws: whether cameras draw at any size (`render`); otherwise at their own.
        hub_data: a data set on the Hugging Face hub, in LeRobot's format, with these observations. None: none known.
    """

    fps: int
    state_dim: int
    action_dim: int
    max_steps: int
    robot_type: str = "unknown"
    instructions: Mapping[str, str] = {}
    needs: tuple[str, ...] = ()
    install: str = ""
    python_variable: str | None = None
    cameras: Mapping[str, str] = {}
    names: Mapping[str, list[str]] = {}
    gripper_opens: float | None = None
    gripper_idle: frozenset[str] = frozenset()
    test_states: int | None = None
    privileged: str | None = None
    normalised_actions: bool = True
    own_tasks: bool = True
    draws: bool = True
    hub_data: str | None = None

    def __init__(self, name: str) -> None:
        self.name = name
        lacking = [key for key in ("fps", "state_dim", "action_dim", "max_steps") if not hasattr(self, key)]
        if lacking:
            raise UserError(f"the simulator family {type(self).__name__} ('{name}') does not set {', '.join(lacking)}.")

    def make(self, task: str, render: Mapping[str, Any]) -> Simulator:
        """Return a new simulator of `task`, one of `tasks()`.

        Args:
            render: how the cameras draw, {"fidelity": fast | full, "size": pixels}; empty where there are none.

        Raises:
            UserError: what it needs is not installed.
        """
        raise NotImplementedError(f"{type(self).__name__} must define make(task, render).")

    def tasks(self) -> list[str]:
        """Return the names of all tasks, sorted."""
        return sorted(self.instructions)

    def knows(self, task: str) -> bool:
        """Return whether there may be a task of that name."""
        return not self.own_tasks or task in self.tasks()

    def instruction(self, task: str) -> str:
        """Return the instruction that a policy is given for `task`, one of `tasks()`."""
        return self.instructions[task]

    def versions(self) -> dict[str, str]:
        """Return the versions of what decides an episode; UserError if any of it is not installed."""
        try:
            return {name: version(name) for name in self.needs}
        except PackageNotFoundError as e:
            raise UserError(f"'{self.name}' needs {e.name}, which is not installed. {self.install}".rstrip()) from e

    def suite_of(self, task: str) -> str:
        """Return the suite that a task belongs to, if there are several; else ""."""
        return ""

    def published_order(self, number: int, tasks: Sequence[str]) -> list[str]:
        """Return the tasks of a suite in the order that its authors published under that number.

        Raises:
            UserError: there are no published orders, none with that number, or `tasks` are not a suite that has them.
        """
        raise UserError(
            f"dataset.libero_order is for LIBERO's suites: '{self.name}' has no published task orders. Give your own "
            "order with dataset.task_order instead."
        )

    def gripper_command(self, tasks: Sequence[str]) -> float | None:
        """Return `gripper_opens`; None if all of `tasks` can be done without it."""
        return None if set(tasks) <= self.gripper_idle else self.gripper_opens
