"""LIBERO on camera images, "libero": two cameras and the robot's own state in, end-effector displacements out.

The simulator, its seeds, initial states, experts and success are those of simulator.py, bit for bit; only the
observations differ. They are those of LeRobot's LIBERO environment after its processors, and of the data sets on the
Hugging Face hub:

    observation.images.image    uint8 (size, size, 3): the camera in front of the robot ("agentview")
    observation.images.image2   uint8 (size, size, 3): the camera in its hand ("robot0_eye_in_hand")
    observation.state           float32 (8,): end-effector xyz, its rotation as axis-angle (3), two finger positions

Images are MuJoCo's, turned by 180 degrees, as in those sets: upright, but left and right are exchanged.

Images and state are as old as LeRobot's: once an initial state is set, robosuite senses after the 24th of a control
step's 25 substeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from clbench.envs.base import STATE_KEY, Observation, Step
from clbench.envs.libero import assets
from clbench.envs.libero.simulator import ROBOT_DIM, LiberoSimulator, LiberoState
from clbench.envs.rendering import check_render, gl_context, opengl_version

SENSING_SUBSTEP = 24


class Libero(LiberoState):
    """LIBERO's 130 tasks on camera images: two cameras and the robot's own state."""

    state_dim = ROBOT_DIM
    needs = ("hf-libero", "robosuite", "mujoco", "bddl")
    cameras: Mapping[str, str] = {
        "observation.images.image": "agentview",
        "observation.images.image2": "robot0_eye_in_hand",
    }
    names: Mapping[str, list[str]] = {STATE_KEY: ["state"], "action": ["actions"]}  # as in the hub's sets
    privileged = None
    hub_data = "HuggingFaceVLA/libero"

    def make(self, task: str, render: Mapping[str, Any]) -> LiberoImageSimulator:
        """Return a simulator of `task`; UserError if the package, the assets or OpenGL are missing."""
        return LiberoImageSimulator(task, *check_render(render))

    def versions(self) -> dict[str, str]:
        """Return the versions of what decides physics and images; UserError if nothing can draw."""
        return {"opengl": opengl_version()} | super().versions() | {"libero_looks": assets.looks_digest()}


class LiberoImageSimulator(LiberoSimulator):
    """One LIBERO task as a `Simulator` with two cameras."""

    def __init__(self, task: str, fidelity: str, size: int) -> None:
        gl_context()  # if there is none, report it before LIBERO is imported
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
            cameras = Libero.cameras if self._looks else {}
            images = {key: self._draw(self._cameras, name) for key, name in cameras.items()}
            self._sensed = images | {STATE_KEY: self._robot_state().astype(np.float32)}

    def _observation(self) -> Observation:
        return self._sensed

    def close(self) -> None:
        """Free the model and the renderer."""
        self._cameras.close()
        super().close()
