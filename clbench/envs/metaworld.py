"""Meta-World (v3 tasks): on states, "metaworld": 39 numbers in, 4 out, the goal observable; and on camera images,
"metaworld_pixels": one camera and the robot's own state in.

Environments are built directly rather than through `gym.make`, which costs ten times as much. Observations
are those of Meta-World's own multi-task benchmarks (the goal observable); the random vector that places
objects and goal is drawn from the seed, from the task's full space instead of fifty fixed vectors.

State (39,), metres: hand xyz, gripper opening in [0, 1], object 1 xyz + quaternion, object 2 xyz + quaternion
(zeros where there is none); the same 18 numbers one step earlier; goal xyz.
Action (4,) in [-1, 1]: hand displacement xyz (1 is a centimetre), gripper effort (1 closes).

On camera images the physics, seeds and success are those of the states, bit for bit. Observations have LeRobot's names:

    observation.image    uint8 (size, size, 3): its "corner2" camera, opposite the robot, at LeRobot's position
    observation.state    float32 (4,): the first four numbers of the state: hand xyz and gripper opening

Neither objects' poses nor the goal are observed. What a task draws of its goal (a coloured sphere, in some tasks) is in
the image, as in Meta-World's own renderings.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from clbench.envs.base import STATE_KEY, Observation, SimulatorFamily, Step
from clbench.envs.rendering import DEFAULT_FIDELITY, Renderer, check_render, gl_context, opengl_version
from clbench.errors import UserError

IMAGE_KEY = "observation.image"
CAMERA, CAMERA_POSITION = "corner2", (0.75, 0.075, 0.7)  # metres: where LeRobot puts it
ROBOT_DIM = 4  # leading numbers of the state that are the robot's own

INSTALL = "Install it with scripts/bootstrap.sh, or pip install -e '.[metaworld]' in the checkout."
GRIPPER_IDLE = frozenset({  # tasks whose expert does not both open and close the gripper, which is open at the start
    "assembly-v3", "box-close-v3", "button-press-topdown-v3", "button-press-topdown-wall-v3", "button-press-v3",
    "coffee-button-v3", "dial-turn-v3", "disassemble-v3", "door-close-v3", "door-lock-v3", "door-open-v3",
    "door-unlock-v3", "drawer-close-v3", "drawer-open-v3", "faucet-close-v3", "faucet-open-v3", "hammer-v3",
    "hand-insert-v3", "handle-press-side-v3", "handle-press-v3", "handle-pull-side-v3", "handle-pull-v3",
    "lever-pull-v3", "pick-out-of-hole-v3", "pick-place-v3", "pick-place-wall-v3", "plate-slide-back-side-v3",
    "plate-slide-back-v3", "plate-slide-side-v3", "plate-slide-v3", "push-back-v3", "push-v3", "push-wall-v3",
    "reach-v3", "reach-wall-v3", "soccer-v3", "window-close-v3", "window-open-v3",
})  # fmt: skip

# LeRobot's wording, except for push-back: there LeRobot repeats that of push, and two tasks of a benchmark must never
# share an instruction.
INSTRUCTIONS: dict[str, str] = {
    "assembly-v3": "Pick up a nut and place it onto a peg",
    "basketball-v3": "Dunk the basketball into the basket",
    "bin-picking-v3": "Grasp the puck from one bin and place it into another bin",
    "box-close-v3": "Grasp the cover and close the box with it",
    "button-press-topdown-v3": "Press a button from the top",
    "button-press-topdown-wall-v3": "Bypass a wall and press a button from the top",
    "button-press-v3": "Press a button",
    "button-press-wall-v3": "Bypass a wall and press a button",
    "coffee-button-v3": "Push a button on the coffee machine",
    "coffee-pull-v3": "Pull a mug from a coffee machine",
    "coffee-push-v3": "Push a mug under a coffee machine",
    "dial-turn-v3": "Rotate a dial 180 degrees",
    "disassemble-v3": "Pick a nut out of a peg",
    "door-close-v3": "Close a door with a revolving joint",
    "door-lock-v3": "Lock the door by rotating the lock clockwise",
    "door-open-v3": "Open a door with a revolving joint",
    "door-unlock-v3": "Unlock the door by rotating the lock counter-clockwise",
    "drawer-close-v3": "Push and close a drawer",
    "drawer-open-v3": "Open a drawer",
    "faucet-close-v3": "Rotate the faucet clockwise",
    "faucet-open-v3": "Rotate the faucet counter-clockwise",
    "hammer-v3": "Hammer a screw on the wall",
    "hand-insert-v3": "Insert the gripper into a hole",
    "handle-press-side-v3": "Press a handle down sideways",
    "handle-press-v3": "Press a handle down",
    "handle-pull-side-v3": "Pull a handle up sideways",
    "handle-pull-v3": "Pull a handle up",
    "lever-pull-v3": "Pull a lever down 90 degrees",
    "peg-insert-side-v3": "Insert a peg sideways",
    "peg-unplug-side-v3": "Unplug a peg sideways",
    "pick-out-of-hole-v3": "Pick up a puck from a hole",
    "pick-place-v3": "Pick and place a puck to a goal",
    "pick-place-wall-v3": "Pick a puck, bypass a wall and place the puck",
    "plate-slide-back-side-v3": "Get a plate from the cabinet sideways",
    "plate-slide-back-v3": "Get a plate from the cabinet",
    "plate-slide-side-v3": "Slide a plate into a cabinet sideways",
    "plate-slide-v3": "Slide a plate into a cabinet",
    "push-back-v3": "Pull the puck back to a goal",
    "push-v3": "Push the puck to a goal",
    "push-wall-v3": "Bypass a wall and push a puck to a goal",
    "reach-v3": "Reach a goal position",
    "reach-wall-v3": "Bypass a wall and reach a goal",
    "shelf-place-v3": "Pick and place a puck onto a shelf",
    "soccer-v3": "Kick a soccer into the goal",
    "stick-pull-v3": "Grasp a stick and pull a box with the stick",
    "stick-push-v3": "Grasp a stick and push a box using the stick",
    "sweep-into-v3": "Sweep a puck into a hole",
    "sweep-v3": "Sweep a puck off the table",
    "window-close-v3": "Push and close a window",
    "window-open-v3": "Push and open a window",
}


class Metaworld(SimulatorFamily):
    """Meta-World's fifty v3 tasks on states, with the goal observable."""

    fps = 80
    state_dim = 39
    action_dim = 4
    max_steps = 500  # the environments refuse further steps without a reset
    robot_type = "sawyer"
    instructions: Mapping[str, str] = INSTRUCTIONS
    needs = ("metaworld", "mujoco", "gymnasium")
    install = INSTALL
    gripper_opens = -1.0
    gripper_idle = GRIPPER_IDLE

    def make(self, task: str, render: Mapping[str, Any]) -> MetaworldSimulator:
        """Return a simulator of `task`; UserError if Meta-World cannot be imported."""
        return MetaworldSimulator(task)


class MetaworldPixels(Metaworld):
    """Meta-World's fifty v3 tasks on camera images: one camera and the robot's own state."""

    state_dim = ROBOT_DIM
    needs = ("metaworld", "mujoco", "gymnasium")
    cameras: Mapping[str, str] = {IMAGE_KEY: CAMERA}

    def make(self, task: str, render: Mapping[str, Any]) -> MetaworldPixelsSimulator:
        """Return a simulator of `task`; UserError where Meta-World cannot be imported, or nothing can draw."""
        return MetaworldPixelsSimulator(task, *check_render(render))

    def versions(self) -> dict[str, str]:
        """Return the versions of what decides physics and images; UserError where nothing can draw."""
        return {"opengl": opengl_version()} | super().versions()


def import_metaworld(module: str) -> Any:
    """Import and return a module of Meta-World or MuJoCo; UserError where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise UserError(f"Meta-World cannot be imported ({e}). {INSTALL}") from e


class MetaworldSimulator:
    """One Meta-World task as a `Simulator`; `success` is the task's own criterion at this step."""

    def __init__(self, task: str) -> None:
        env = import_metaworld("metaworld.env_dict").ALL_V3_ENVIRONMENTS[task]()
        env._partially_observable = False
        del env.sawyer_observation_space  # step() clips to it; the constructor cached it with the goal hidden
        env._freeze_rand_vec = False
        env.seeded_rand_vec = True
        env._set_task_called = True
        self.task = task
        self._env: Any = env
        self._view: Renderer | None = None
        self.state = np.zeros(Metaworld.state_dim, np.float32)

    def reset(self, seed: int) -> Observation:
        """Start the episode of `seed` (0 or more); nothing done before it in this simulator matters."""
        self._env.seed(int(seed))
        state, _ = self._env.reset()
        self.state = state.astype(np.float32)
        return self._observation()

    def step(self, action: np.ndarray) -> Step:
        """Apply `action` (4,), clipped to [-1, 1].

        Raises ValueError for a wrong shape, for NaN or infinity, and after `max_steps` steps without a reset.
        """
        reward, success = self._apply(action)
        return Step(self._observation(), reward, success)

    def _apply(self, action: np.ndarray) -> tuple[float, bool]:
        action = np.asarray(action, dtype=np.float32)
        if action.shape != (Metaworld.action_dim,):
            raise ValueError(f"{self.task}: an action has shape ({Metaworld.action_dim},), not {action.shape}.")
        if not np.isfinite(action).all():
            raise ValueError(f"{self.task}: the action {action.tolist()} is not finite.")
        state, reward, _, _, info = self._env.step(np.clip(action, -1.0, 1.0))
        self.state = state.astype(np.float32)
        return float(reward), bool(info["success"])

    def _observation(self) -> Observation:
        return {STATE_KEY: self.state}

    def render(self, width: int, height: int) -> np.ndarray:
        """Return the scene from LeRobot's viewpoint for these tasks, uint8 (height, width, 3).

        UserError if there is no OpenGL.
        """
        if self._view is None or (self._view.width, self._view.height) != (width, height):
            if self._view is not None:
                self._view.close()
            self._view = self._renderer(width, height, DEFAULT_FIDELITY)
        return self._draw(self._view)

    def _renderer(self, width: int, height: int, fidelity: str) -> Renderer:
        self._env.model.cam(CAMERA).pos = CAMERA_POSITION
        return Renderer(self._env.model, width, height, fidelity)

    def _draw(self, renderer: Renderer) -> np.ndarray:
        return np.ascontiguousarray(renderer.draw(self._env.data, CAMERA)[:, ::-1])  # it is mounted upside down

    def close(self) -> None:
        """Free the model and what it was drawn with."""
        if self._view is not None:
            self._view.close()
            self._view = None
        if self._env is not None:
            self._env.close()
            self._env = None


class MetaworldPixelsSimulator(MetaworldSimulator):
    """One Meta-World task as a `Simulator` with a camera. `state` still has all 39 numbers, for experts."""

    def __init__(self, task: str, fidelity: str, size: int) -> None:
        gl_context()  # where there is none, this is said before Meta-World is imported
        super().__init__(task)
        self._camera = self._renderer(size, size, fidelity)

    def step_unseen(self, action: np.ndarray) -> Step:
        """As `step`, without the image."""
        reward, success = self._apply(action)
        return Step({STATE_KEY: self.state[:ROBOT_DIM]}, reward, success)

    def _observation(self) -> Observation:
        return {IMAGE_KEY: self._draw(self._camera), STATE_KEY: self.state[:ROBOT_DIM]}

    def close(self) -> None:
        """Free the model and what it was drawn with."""
        self._camera.close()
        super().close()
