"""Our simulators as LeRobot environments, `clbench_metaworld` and `clbench_metaworld_pixels`, for its command lines:

    lerobot-eval --env.discover_packages_path=clbench.envs.lerobot_env --env.type=clbench_metaworld \\
        --env.task=push-v3 --policy.path=... --seed=1000000

LeRobot's own `metaworld` environment gives only pixels, of its own size; the first gives the 39-d state as
`observation.state`, the second what a camera policy of clbench sees. Both give the same episode for the same seed as
clbench's evaluation. This is a package because LeRobot's plugin discovery lists the submodules of what it is given, and
a plain module has none to list.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.envs.utils import freeze_after_episode_end
from lerobot.utils.constants import ACTION, OBS_STATE

from clbench.envs.base import STATE_KEY, Observation, Simulator
from clbench.envs.making import check_task, family, instruction, make_simulator
from clbench.envs.metaworld import IMAGE_KEY, Metaworld
from clbench.envs.rendering import DEFAULT_FIDELITY, check_render
from clbench.errors import UserError


class SimulatorEnv(gym.Env):
    """A `Simulator` as a Gymnasium environment with the names LeRobot looks for.

    An episode ends (`terminated`) at the first success, and is truncated after `episode_length` steps. The
    simulator is built at the first reset: in the worker process, and only for tasks that are really run.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": Metaworld.fps}  # noqa: RUF012 (as in Gymnasium)

    def __init__(self, spec: dict[str, Any], episode_length: int, width: int, height: int) -> None:
        """`spec`: the environment type, its task and, of one with a camera, how it draws (`render`)."""
        self.task = spec["task"]
        self.task_description = instruction(spec)
        self.render_mode = "rgb_array"
        self._max_episode_steps = episode_length
        self._spec = spec
        self._size = (width, height)
        self._simulator: Simulator | None = None
        self._steps = 0
        kind = family(spec["type"])
        seen: dict[str, spaces.Space[Any]] = {"agent_pos": spaces.Box(-np.inf, np.inf, (kind.state_dim,), np.float32)}
        if kind.cameras:
            size = spec["render"]["size"]
            seen["pixels"] = spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.observation_space = spaces.Dict(seen)
        self.action_space = spaces.Box(-1.0, 1.0, (kind.action_dim,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start the episode of `seed`; without one, an episode drawn from this environment's generator."""
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        if self._simulator is None:
            self._simulator = make_simulator(self._spec)
        self._steps = 0
        return self._shown(self._simulator.reset(seed)), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Apply `action` (4,), clipped to [-1, 1]."""
        if self._simulator is None:
            raise RuntimeError("reset() comes before the first step().")
        observation, reward, success = self._simulator.step(action)
        self._steps += 1
        truncated = not success and self._steps >= self._max_episode_steps
        info: dict[str, Any] = {"is_success": success}
        if success or truncated:
            info["final_info"] = {"is_success": success}  # where LeRobot's rollout reads it
        return self._shown(observation), reward, success, truncated, info

    def render(self) -> np.ndarray:
        """Return the scene, uint8 (height, width, 3); needs OpenGL (MUJOCO_GL=egl without a display)."""
        if self._simulator is None:
            raise RuntimeError("reset() comes before the first render().")
        return self._simulator.render(*self._size)

    def close(self) -> None:
        """Free the simulator."""
        if self._simulator is not None:
            self._simulator.close()
            self._simulator = None

    @staticmethod
    def _shown(observation: Observation) -> dict[str, np.ndarray]:
        names = {STATE_KEY: "agent_pos", IMAGE_KEY: "pixels"}
        return {names[key]: value for key, value in observation.items()}


@EnvConfig.register_subclass("clbench_metaworld")
@dataclass
class ClbenchMetaworldEnv(EnvConfig):
    """Meta-World on states. `task` is one task, or several separated by commas, numbered in that order."""

    task: str | None = "push-v3"
    fps: int = Metaworld.fps
    episode_length: int = 200
    visualization_width: int = 256
    visualization_height: int = 256
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {ACTION: PolicyFeature(FeatureType.ACTION, (Metaworld.action_dim,))}
    )
    features_map: dict[str, str] = field(
        default_factory=lambda: {ACTION: ACTION, "agent_pos": OBS_STATE, "pixels": IMAGE_KEY}
    )

    def spec(self, task: str) -> dict[str, Any]:
        """What makes the simulator of a task."""
        return {"type": "metaworld", "task": task}

    def __post_init__(self) -> None:
        if not 1 <= self.episode_length <= Metaworld.max_steps:
            raise UserError(f"episode_length must be from 1 to {Metaworld.max_steps}, not {self.episode_length}.")
        if not self.task_names:
            raise UserError("env.task names no task. Example: --env.task=push-v3")
        for task in self.task_names:
            check_task(self.spec(task)["type"], task)
        state_dim = family(self.spec("")["type"]).state_dim
        self.features["agent_pos"] = PolicyFeature(FeatureType.STATE, (state_dim,))

    @property
    def task_names(self) -> list[str]:
        """The tasks named in `task`."""
        return [name.strip() for name in (self.task or "").split(",") if name.strip()]

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """The arguments of `SimulatorEnv` besides the task."""
        return {
            "episode_length": self.episode_length,
            "width": self.visualization_width,
            "height": self.visualization_height,
        }

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, gym.vector.VectorEnv]]:
        """Return {the type: {number of the task: vector environment of n_envs}}.

        An environment whose episode has ended stays as it is until a reset with LeRobot's new-rollout option.
        """
        vectors: dict[int, gym.vector.VectorEnv] = {}
        for number, task in enumerate(self.task_names):
            one = freeze_after_episode_end(partial(SimulatorEnv, self.spec(task), **self.gym_kwargs))
            if use_async_envs and n_envs > 1:
                vectors[number] = gym.vector.AsyncVectorEnv([one] * n_envs, context="forkserver")
            else:
                vectors[number] = gym.vector.SyncVectorEnv([one] * n_envs)
        return {self.type: vectors}


@EnvConfig.register_subclass("clbench_metaworld_pixels")
@dataclass
class ClbenchMetaworldPixelsEnv(ClbenchMetaworldEnv):
    """Meta-World on camera images, drawn as `render_size` and `render_fidelity` say (clbench/envs/rendering.py)."""

    render_size: int = 64
    render_fidelity: str = DEFAULT_FIDELITY

    def __post_init__(self) -> None:
        super().__post_init__()
        check_render(self.spec("")["render"])
        shape = (self.render_size, self.render_size, 3)
        self.features["pixels"] = PolicyFeature(FeatureType.VISUAL, shape)

    def spec(self, task: str) -> dict[str, Any]:
        """What makes the simulator of a task."""
        return {
            "type": "metaworld_pixels",
            "task": task,
            "render": {"size": self.render_size, "fidelity": self.render_fidelity},
        }
