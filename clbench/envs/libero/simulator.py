"""LIBERO on states, "libero_state": the robot's and the objects' poses in, end-effector displacements out.

These observations are PRIVILEGED: a real robot, and every published LIBERO result, has camera images in place of the
objects' poses. They make a full suite trainable on a laptop; their success rates cannot be compared with any others.

State (89,) float32, lengths in metres, angles in radians:
    0..7    the robot as in LeRobot's LIBERO: end-effector xyz, its rotation as axis-angle (3), two finger positions
    8..63   eight movable objects, in the order of the task's BDDL file: xyz, quaternion xyzw; zeros where there is none
    64..84  three fixtures (cabinet, stove, …), likewise
    85..88  four joints of the fixtures (drawers, doors, knobs), in the order of the fixtures; zeros likewise
Action (7,) in [-1, 1]: end-effector displacement xyz (1 is 5 cm), rotation (1 is 0.5 rad), gripper (1 closes).

Initial states: a seed of EVAL_SEED_BASE + i (test episodes) starts from entry i modulo 50 of the initial states that
LIBERO publishes for the task, as its own evaluation does. A smaller seed (demonstrations), or one from
VALIDATION_SEED_BASE on (validation), draws a placement from the regions in the task's BDDL file, so nothing is trained
or chosen on a state that is reported. Either way the scene then settles while the robot holds still with its gripper
open.
"""

from __future__ import annotations

import codecs
import contextlib
import importlib
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from clbench.envs.base import EVAL_SEED_BASE, STATE_KEY, VALIDATION_SEED_BASE, Observation, SimulatorFamily, Step
from clbench.envs.libero import tasks as table
from clbench.envs.libero.assets import INSTALL, digest, import_libero, package
from clbench.envs.rendering import DEFAULT_FIDELITY, Renderer
from clbench.errors import UserError

FPS = 20  # control steps per simulated second
OBJECT_SLOTS, FIXTURE_SLOTS, JOINT_SLOTS = 8, 3, 4  # the most that any of the 130 tasks has
ROBOT_DIM = 8
STATE_DIM = ROBOT_DIM + 7 * (OBJECT_SLOTS + FIXTURE_SLOTS) + JOINT_SLOTS
ACTION_DIM = 7
PLACEMENTS = 100  # attempts to place a scene's objects

SETTLE_STEPS = 10
LONG_SETTLE_STEPS = 50
# In these scenes, objects start inside the table and are thrown up: after 10 steps they are still in the air.
LONG_SETTLE_SCENES = ("LIVING_ROOM_SCENE1_", "LIVING_ROOM_SCENE2_", "LIVING_ROOM_SCENE3_")
IDLE = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])  # hold still, gripper open


class LiberoState(SimulatorFamily):
    """LIBERO's 130 tasks on states: the robot's and the objects' poses (privileged)."""

    fps = FPS
    state_dim = STATE_DIM
    action_dim = ACTION_DIM
    max_steps = 1000  # LIBERO's own horizon; the suites' limits are in tasks.MAX_STEPS
    robot_type = "panda"
    needs = ("hf-libero", "robosuite", "mujoco", "bddl")
    python_variable = "LIBERO_PYTHON"
    gripper_opens = -1.0
    test_states = 50  # LIBERO's published ones, for every task
    privileged: str | None = "object poses instead of camera images"

    def make(self, task: str, render: Mapping[str, Any]) -> LiberoSimulator:
        """Return a simulator of `task`; UserError if the package or the assets are missing."""
        return LiberoSimulator(task)

    def tasks(self) -> list[str]:
        """Return the names of all 130 tasks, sorted; they are those of LIBERO's BDDL files."""
        return table.task_names()

    def instruction(self, task: str) -> str:
        """Return the instruction of `task` as LIBERO words it."""
        return table.task_instruction(task)

    def versions(self) -> dict[str, str]:
        """Return the versions of what decides the physics; "libero_assets" is a digest of the assets' physics files."""
        package()
        try:
            found = {name: version(name) for name in self.needs}
        except PackageNotFoundError as e:
            raise UserError(f"LIBERO is not installed as the package hf-libero: {e.name} is missing. {INSTALL}") from e
        return found | {"libero_assets": digest()}

    def suite_of(self, task: str) -> str:
        """Return the suite that a task belongs to."""
        return table.suite_of(task)

    def published_order(self, number: int, tasks: Sequence[str]) -> list[str]:
        """Return the tasks of a suite of ten in LIBERO's task order of that number."""
        return table.published_order(number, tasks)


@contextlib.contextmanager
def _global_numpy_seed(seed: int) -> Iterator[None]:
    """LIBERO draws placements from NumPy's global generator: seed it, and restore its state afterwards."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)


def settle_steps(task: str) -> int:
    """Return how many idle steps an episode of `task` starts with."""
    return LONG_SETTLE_STEPS if task.startswith(LONG_SETTLE_SCENES) else SETTLE_STEPS


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Return the rotation vector (3,) of a quaternion xyzw (4,), as LeRobot computes it (angle in [0, 2π])."""
    w = float(np.clip(quaternion[3], -1.0, 1.0))
    sine = np.sqrt(max(1.0 - w * w, 0.0))
    return np.zeros(3) if sine <= 1e-10 else quaternion[:3] / sine * (2.0 * np.arccos(w))


class LiberoSimulator:
    """One LIBERO task as a `Simulator`; `success` is LIBERO's own predicate at this step.

    Attributes:
        task: its name.
        env: LIBERO's ControlEnv around the robosuite environment; for experts, which are privileged.
    """

    def __init__(self, task: str) -> None:
        envs = import_libero()
        self.task = task
        self._suite = table.suite_of(task)
        with _global_numpy_seed(0):
            self.env: Any = envs.env_wrapper.ControlEnv(
                bddl_file_name=str(package() / "bddl_files" / self._suite / f"{task}.bddl"),
                use_camera_obs=False,
                has_offscreen_renderer=False,
                control_freq=FPS,
                ignore_done=True,
                hard_reset=False,
            )
        self._initial_states: np.ndarray | None = None
        self._view: Renderer | None = None
        self._find_slots()
        self._make_soft_resets_exact()
        self._skip_what_is_known()

    def _find_slots(self) -> None:
        """Which bodies and joints fill the state's slots."""
        inner, model = self.env.env, self.env.sim.model
        objects = [inner.obj_body_id[name] for name in inner.objects_dict]
        fixtures = [inner.obj_body_id[name] for name in inner.fixtures_dict]
        joints = [joint for fixture in inner.fixtures_dict.values() for joint in fixture.joints]
        if len(objects) > OBJECT_SLOTS or len(fixtures) > FIXTURE_SLOTS or len(joints) > JOINT_SLOTS:
            raise RuntimeError(
                f"{self.task} has {len(objects)} objects, {len(fixtures)} fixtures, {len(joints)} joints."
            )
        slots = [*range(len(objects)), *range(OBJECT_SLOTS, OBJECT_SLOTS + len(fixtures))]
        self._bodies = np.array([*objects, *fixtures], dtype=np.int64)
        self._slots = np.array(slots, dtype=np.int64)
        self._joints = np.array([model.get_joint_qpos_addr(joint) for joint in joints], dtype=np.int64)
        robot = self.env.robots[0]
        self._site = robot.eef_site_id
        self._hand = model.body_name2id(robot.robot_model.eef_name)
        self._fingers = np.array(robot._ref_gripper_joint_pos_indexes, dtype=np.int64)

    def _make_soft_resets_exact(self) -> None:
        """Make robosuite's soft reset, which keeps the compiled model, start like a new model.

        It lacks three things: fixtures stay where the last episode put them, which moves what is placed relative to
        them; nothing is computed before the controller reads the robot's position; and the gripper, whose command is
        integrated, remembers its last one.
        """
        inner, gripper = self.env.env, self.env.robots[0].gripper
        mujoco, sim = importlib.import_module("mujoco"), inner.sim
        command = np.copy(gripper.current_action)  # nothing has been commanded yet
        compiled = mujoco.MjModel.from_xml_string(inner.model.get_xml())
        position, quaternion = compiled.body_pos.copy(), compiled.body_quat.copy()

        def reset_sim() -> None:
            sim.model.body_pos[:], sim.model.body_quat[:] = position, quaternion
            gripper.current_action = command.copy()
            mujoco.mj_resetData(sim.model._model, sim.data._data)
            sim.forward()

        sim.reset = reset_sim

    def _skip_what_is_known(self) -> None:
        """Make a step compute nothing twice, with the same results bit for bit; this saves a third of the time.

        In each of the 25 substeps of a control step, robosuite computes the positions and velocities of everything
        three times (`forward`, the controller's own `forward`, `step`), although only the controls change in between;
        and it reads sixty observations, none of them used here.
        """
        inner, mujoco = self.env.env, importlib.import_module("mujoco")
        after_velocities = mujoco.mjtStage.mjSTAGE_VEL
        if inner.sim.model._model.opt.integrator != mujoco.mjtIntegrator.mjINT_EULER:
            raise RuntimeError(f"{self.task}: LIBERO's models are integrated by Euler's method, but this one is not.")
        known = False  # whether `data` is up to date with its positions and velocities; only a control step sets it

        def forward() -> None:
            nonlocal known
            model, data = inner.sim.model._model, inner.sim.data._data
            if known:
                mujoco.mj_forwardSkip(model, data, after_velocities, False)
            else:
                mujoco.mj_forward(model, data)
                known = True

        def step(with_udd: bool = True) -> None:
            nonlocal known
            model, data = inner.sim.model._model, inner.sim.data._data
            if known:  # what mj_step does from this point on
                mujoco.mj_checkPos(model, data)
                mujoco.mj_checkVel(model, data)
                mujoco.mj_forwardSkip(model, data, after_velocities, False)
                mujoco.mj_checkAcc(model, data)
                mujoco.mj_Euler(model, data)
            else:
                mujoco.mj_step(model, data)
            known = False

        control = inner.step

        def control_step(action: np.ndarray) -> Any:
            nonlocal known
            known = False  # outside a step anything may have been moved
            inner.sim.forward, inner.sim.step = forward, step
            try:
                return control(action)
            finally:
                del inner.sim.forward, inner.sim.step

        inner.step = control_step
        inner._update_observables = lambda force=False: None
        inner._get_observations = lambda force_update=False: {}

    def reset(self, seed: int) -> Observation:
        """Start the episode of `seed` (0 or more; see the module's docstring); nothing before it matters."""
        published = None
        if EVAL_SEED_BASE <= seed < VALIDATION_SEED_BASE:
            states = self.initial_states()
            seed = (int(seed) - EVAL_SEED_BASE) % len(states)  # also decides where the fixtures are
            published = states[seed]
        with _global_numpy_seed(int(seed)):
            self._place()
        if published is not None:
            self.env.set_init_state(published)
        for left in reversed(range(settle_steps(self.task))):
            self._apply(IDLE, look=left == 0)
        return self._observation()

    def _place(self) -> None:
        """Reset robosuite's environment, with new placements while objects do not fit.

        LIBERO's own `reset` does that too, but forever and for every exception.
        """
        randomization_error = importlib.import_module("robosuite.utils.errors").RandomizationError
        for _ in range(PLACEMENTS):
            try:
                self.env.env.reset()
                return
            except randomization_error:
                pass
        raise RuntimeError(f"{self.task}: found no placement of its objects in {PLACEMENTS} attempts.")

    def step(self, action: np.ndarray) -> Step:
        """Apply `action` (7,), clipped to [-1, 1]. Raises ValueError for a wrong shape, for NaN and infinity."""
        reward, success = self._apply(action, look=True)
        return Step(self._observation(), reward, success)

    def _apply(self, action: np.ndarray, look: bool) -> tuple[float, bool]:
        """One control step; returns its reward and whether the goal holds. `look`: `_observation` is called next."""
        action = np.asarray(action, dtype=np.float32)
        if action.shape != (ACTION_DIM,):
            raise ValueError(f"{self.task}: an action has shape ({ACTION_DIM},), not {action.shape}.")
        if not np.isfinite(action).all():
            raise ValueError(f"{self.task}: the action {action.tolist()} is not finite.")
        _, reward, success, _ = self.env.step(np.clip(action, -1.0, 1.0).astype(np.float64))
        return float(reward), bool(success)

    def initial_states(self) -> np.ndarray:
        """Return LIBERO's published initial states (50, 1 + nq + nv) of this task: time, positions, velocities."""
        if self._initial_states is None:
            self._initial_states = load_initial_states(self.task)
        return self._initial_states

    def _robot_state(self) -> np.ndarray:
        """The first ROBOT_DIM numbers of the state, float64."""
        data = self.env.sim.data
        rotation = axis_angle(data.body_xquat[self._hand][[1, 2, 3, 0]])
        return np.concatenate([data.site_xpos[self._site], rotation, data.qpos[self._fingers]])

    def _observation(self) -> Observation:
        data = self.env.sim.data
        state = np.zeros(STATE_DIM)
        state[:ROBOT_DIM] = self._robot_state()
        poses = state[ROBOT_DIM : STATE_DIM - JOINT_SLOTS].reshape(-1, 7)
        poses[self._slots, :3] = data.body_xpos[self._bodies]
        poses[self._slots, 3:] = data.body_xquat[self._bodies][:, [1, 2, 3, 0]]
        state[STATE_DIM - JOINT_SLOTS :][: len(self._joints)] = data.qpos[self._joints]
        return {STATE_KEY: state.astype(np.float32)}

    def render(self, width: int, height: int) -> np.ndarray:
        """Return the scene for viewing, uint8 (height, width, 3), the same way up as the cameras' images.

        UserError where there is no OpenGL.
        """
        if self._view is None or (self._view.width, self._view.height) != (width, height):
            if self._view is not None:
                self._view.close()
            self._view = self._renderer(width, height, DEFAULT_FIDELITY)
        return self._draw(self._view, "agentview")

    def _renderer(self, width: int, height: int, fidelity: str) -> Renderer:
        return Renderer(self.env.sim.model._model, width, height, fidelity, hidden=0)  # robosuite's collision shapes

    def _draw(self, renderer: Renderer, camera: str) -> np.ndarray:
        """What a camera sees, in the orientation of LeRobot's LIBERO data: the image turned by 180 degrees."""
        return np.ascontiguousarray(renderer.draw(self.env.sim.data._data, camera)[::-1, ::-1])

    def close(self) -> None:
        """Free the model and the renderer."""
        if self._view is not None:
            self._view.close()
            self._view = None
        if self.env is not None:
            self.env.close()
            self.env = None


def load_initial_states(task: str) -> np.ndarray:
    """Read LIBERO's published initial states of a task, (50, 1 + nq + nv) float64, from the installed package.

    They were saved by torch, as one array; reading it without torch takes half a second less.
    """
    path = package() / "init_files" / table.suite_of(task) / f"{task}.pruned_init"
    if not path.is_file():
        raise UserError(f"{path} is missing: install hf-libero again.")
    with zipfile.ZipFile(path) as file:
        (name,) = (n for n in file.namelist() if n.endswith("/data.pkl"))
        with file.open(name) as data:
            return np.asarray(_OneArray(data).load(), dtype=np.float64)


class _OneArray(pickle.Unpickler):
    """Unpickles an array of numbers as NumPy 1 wrote it (as in LIBERO's files), and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what an array's pickle may name."""
        parts = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
            ("_codecs", "encode"): codecs.encode,
        }
        if (module, name) not in parts:
            raise pickle.UnpicklingError(f"{module}.{name} is not part of an array of numbers.")
        return parts[module, name]
