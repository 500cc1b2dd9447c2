"""LIBERO on camera images, "libero": two cameras and the robot's own state in, end-effector displacements out.

The simulator, its seeds, initial states, experts and success are those of simulator.py, bit for bit; only what
is seen differs. Observations are those of LeRobot's LIBERO environment behind its processors, and of the data sets on
the Hugging Face hub:

    observation.images.image    uint8 (size, size, 3): the camera before the robot ("agentview")
    observation.images.image2   uint8 (size, size, 3): the camera in its hand ("robot0_eye_in_hand")
    observation.state           float32 (8,): end-effector xyz, its rotation as axis-angle (3), two finger positions

Images are what MuJoCo draws turned by 180 degrees, as in those sets: upright, but left and right are exchanged.

Images and state are as old as LeRobot's: robosuite, once an initial state was set, senses after the 24th of a control
step's 25 substeps.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from clbench.envs.base import STATE_KEY, Observation, Step, check_task
from clbench.envs.libero import assets
from clbench.envs.libero import simulator as libero
from clbench.envs.rendering import check_render, gl_context, opengl_version

ACTION_DIM, FPS, MAX_STEPS, ROBOT_TYPE = libero.ACTION_DIM, libero.FPS, libero.MAX_STEPS, libero.ROBOT_TYPE
NO_DEMONSTRATIONS = libero.NO_DEMONSTRATIONS
GRIPPER_OPENS, TEST_STATES, suite_of = libero.GRIPPER_OPENS, libero.TEST_STATES, libero.suite_of
tasks, instruction, expert_for = libero.tasks, libero.instruction, libero.expert_for
published_order = libero.published_order

STATE_DIM = libero.ROBOT_DIM
PYTHON_VARIABLE = libero.PYTHON_VARIABLE
CAMERAS = {"observation.images.image": "agentview", "observation.images.image2": "robot0_eye_in_hand"}
SENSING_SUBSTEP = 24
NAMES = {STATE_KEY: ["state"], "action": ["actions"]}  # what the hub's sets call the dimensions


def versions() -> dict[str, str]:
    """Return the versions of what decides physics and images; UserError where nothing can draw."""
    return {"opengl": opengl_version()} | libero.versions() | {"libero_looks": assets.looks_digest()}


def make(task: str, render: dict[str, Any]) -> LiberoImageSimulator:
    """Return a simulator for `task` whose images are drawn as `render` ({"fidelity", "size"}) says.

    UserError when there is no such task, package, assets or OpenGL.
    """
    check_task("libero", task)
    return LiberoImageSimulator(task, *check_render(render))


class LiberoImageSimulator(libero.LiberoSimulator):
    """One LIBERO task as a `Simulator` with two cameras."""

    def __init__(self, task: str, fidelity: str, size: int) -> None:
        gl_context()  # where there is none, this is said before LIBERO is imported
        super().__init__(task)
        self._cameras = self._renderer(size, size, fidelity)
        self._sensed: Observation = {}
        self._looks, self._substeps = False, 0  # since the control step began
        self.env.env._update_observables = self._sense  # robosuite calls it after every substep

    def step_unseen(self, action: np.ndarray) -> Step:
        """As `step`, without images."""
        reward, success = self._apply(action, look=False)
        return Step(self._observation(), reward, success)

    def _apply(self, action: np.ndarray, look: bool) -> tuple[float, bool]:
        self._looks, self._substeps = look, 0
        return super()._apply(action, look)

    def _sense(self, force: bool = False) -> None:
        self._substeps += 1
        if self._substeps == SENSING_SUBSTEP:
            images = {key: self._draw(self._cameras, name) for key, name in CAMERAS.items()} if self._looks else {}
            self._sensed = images | {STATE_KEY: self._robot_state().astype(np.float32)}

    def _observation(self) -> Observation:
        return self._sensed

    def close(self) -> None:
        """Free the model and what it was drawn with."""
        self._cameras.close()
        super().close()
