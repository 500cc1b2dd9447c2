"""LeRobot's own environments by their names (`env: {type: pusht}`), as simulators.

A name is one of LeRobot's environment types that LeRobot has an extra for with a package `gym-NAME` (aloha, pusht), so
that an episode's versions are known; clbench's own simulators come first. LeRobot's configuration
makes the environment, a gymnasium one; its tasks are the names that LeRobot's `task` takes. Observations are named as
LeRobot names them for its policies:

    pixels            uint8 → observation.image, or observation.images.NAME of several cameras
    agent_pos         → observation.state, float32
    environment_state → observation.environment_state, float32

Actions are in the environment's own units, clipped to its action space. An episode is decided by reset(seed), as far as
the environment keeps to it; it succeeds when `info["is_success"]` is true.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import numpy as np

from clbench import registry
from clbench.envs.base import STATE_KEY, Observation, SimulatorFamily, Step
from clbench.errors import UserError

CONFIGS = "lerobot.envs.configs"
REGISTERED = re.compile(r"register_subclass\((?:name=)?\"(\w+)\"\)")
EXTRA = re.compile(r"(gym-[\w-]+).*extra == \"([\w-]+)\"")
REQUIREMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@functools.cache
def lerobot_environments() -> tuple[str, ...]:
    """LeRobot's environment types, by its source: nothing is imported."""
    path = registry.source(CONFIGS)
    if path is None:
        return ()
    found = set(REGISTERED.findall(path.read_text(encoding="utf-8")))
    packages = {m.groups() for m in map(EXTRA.match, requires("lerobot") or ()) if m is not None}
    return tuple(sorted(name for name in found if (f"gym-{name}", name) in packages))


class LeRobotEnvironments(SimulatorFamily):
    """One of LeRobot's environment types."""

    fps = state_dim = action_dim = max_steps = 0  # of the instance, as LeRobot's configuration says
    normalised_actions = False
    own_tasks = False
    draws = False

    def __init__(self, name: str) -> None:
        super().__init__(name)
        config = self._config()
        kinds = {key: (config.features_map[key], f) for key, f in config.features.items()}
        self.fps, self.max_steps = int(config.fps), int(getattr(config, "episode_length", None) or 1000)
        self.state_dim = next((int(f.shape[0]) for key, f in kinds.values() if key == STATE_KEY), 0)
        self.action_dim = next(int(f.shape[0]) for key, f in kinds.values() if key == "action")
        self.cameras: Mapping[str, str] = {key: name for name, (key, f) in kinds.items() if f.type.value == "VISUAL"}
        self.robot_type = name
        self.needs = (f"gym-{name}",)
        self.install = f"Install it with: pip install 'lerobot[{name}]'"

    def _config(self) -> Any:
        from lerobot.envs.configs import EnvConfig

        return EnvConfig.get_choice_class(self.name)()

    def make(self, task: str, render: Mapping[str, Any]) -> LeRobotSimulator:
        config = self._config()
        config.task = task
        try:
            vector = next(iter(next(iter(config.create_envs(n_envs=1).values())).values()))
        except (ImportError, UserError) as e:
            raise UserError(f"'{self.name}' cannot be made: {e}. {self.install}") from e
        except Exception as e:  # gymnasium's, for a task that it does not know
            raise UserError(
                f"LeRobot's environment '{self.name}' has no task '{task}', or cannot be made: {type(e).__name__}: "
                f"{' '.join(str(e).split())}"
            ) from e
        return LeRobotSimulator(vector.envs[0])

    def tasks(self) -> list[str]:
        """No list: an environment knows its tasks when it is made."""
        return []

    def instruction(self, task: str) -> str:
        """The task's name; the wording that a policy reads is the data set's."""
        return task

    def versions(self) -> dict[str, str]:
        """Versions of the environment's distribution and of what that requires, as far as it is installed."""
        found = super().versions() | {"lerobot": version("lerobot")}
        for text in requires(self.needs[0]) or ():
            name = REQUIREMENT.match(text)
            if name is None or "extra ==" in text:
                continue
            try:
                found[name[0]] = version(name[0])
            except PackageNotFoundError:
                continue
        return found


class LeRobotSimulator:
    """One of LeRobot's environments, a gymnasium one."""

    def __init__(self, env: Any) -> None:
        self._env: Any = env
        self._low, self._high = np.asarray(env.action_space.low), np.asarray(env.action_space.high)
        self._ended: Step | None = None

    def reset(self, seed: int) -> Observation:
        self._ended = None
        observation, _ = self._env.reset(seed=seed)
        return _named(observation)

    def step(self, action: np.ndarray) -> Step:
        action = np.asarray(action, dtype=np.float32)
        if action.shape != self._low.shape or not np.isfinite(action).all():
            raise ValueError(f"an action has shape {self._low.shape} and finite numbers, not {action}")
        if self._ended is not None:  # the environment may not be stepped beyond its end: nothing changes any more
            return self._ended._replace(reward=0.0)
        observation, reward, terminated, truncated, info = self._env.step(np.clip(action, self._low, self._high))
        step = Step(_named(observation), float(reward), bool(info.get("is_success", False)))
        if terminated or truncated:
            self._ended = step
        return step

    def render(self, width: int, height: int) -> np.ndarray:
        raise NotImplementedError("LeRobot's environments draw at their own size only")

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None


def _named(observation: Mapping[str, Any]) -> Observation:
    """An environment's observation under LeRobot's names for policies."""
    named: Observation = {}
    for key, value in observation.items():
        if key == "pixels" and isinstance(value, Mapping):
            named |= {f"observation.images.{camera}": _image(image) for camera, image in value.items()}
        elif key == "pixels":
            named["observation.image"] = _image(value)
        elif key == "agent_pos":
            named[STATE_KEY] = np.asarray(value, dtype=np.float32)
        elif key == "environment_state":
            named["observation.environment_state"] = np.asarray(value, dtype=np.float32)
    return named


def _image(value: Any) -> np.ndarray:
    image = np.asarray(value)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"the environment's images are {image.dtype} {image.shape}, not uint8 (height, width, 3).")
    return np.ascontiguousarray(image)
