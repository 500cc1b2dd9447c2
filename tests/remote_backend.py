"""Simulators and experts for tests, under the interpreter in $REMOTE_PYTHON; their tasks say what goes wrong."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clbench.data.experts.base import Experts
from clbench.envs.base import STATE_KEY, Expert, Observation, SimulatorFamily, Step
from clbench.errors import UserError

TASKS = ["plain", "images", "noisy", "missing", "odd"]


class Fake(SimulatorFamily):
    """A point that actions push."""

    fps, robot_type, state_dim, action_dim, max_steps = 80, "none", 39, 4, 500
    python_variable = "REMOTE_PYTHON"

    def make(self, task: str, render: Mapping[str, Any]) -> Simulator:
        if task == "missing":
            raise UserError("the simulator is not installed. Install it.")
        return Simulator(task)

    def tasks(self) -> list[str]:
        return sorted(TASKS)

    def instruction(self, task: str) -> str:
        return f"do {task}"

    def versions(self) -> dict[str, str]:
        if "LACKS" in os.environ:
            raise UserError("the simulator is not installed. Install it.")
        return {"physics": "1.0"}


class FakeExperts(Experts):
    """Experts that go back to the origin."""

    def expert(self, task: str, simulator: Any) -> Expert:
        """Counts its calls, of which nobody knows outside of the simulator's process."""
        calls = 0

        def act(observation: Observation) -> np.ndarray:
            nonlocal calls
            calls += 1
            return -simulator.x[:4].astype(np.float64) * 1.1 + 1e-3 * calls

        return act


class Simulator:
    """A point that actions push."""

    def __init__(self, task: str) -> None:
        self.task, self.closed = task, False

    def reset(self, seed: int) -> Observation:
        self.rng = np.random.default_rng([seed, len(self.task)])
        self.x = self.rng.normal(size=39).astype(np.float32)
        return self._observation()

    def step(self, action: np.ndarray) -> Step:
        if action.shape != (4,):
            raise ValueError(f"an action has shape (4,), not {action.shape}.")
        if self.task == "noisy":
            print("noise" * 1000, flush=True)
            os.write(1, b"noise on the descriptor")
        if self.task == "odd":
            self._odd(int(action[0]))
        self.x[:4] += np.float32(0.1) * action + self.rng.normal(size=4).astype(np.float32) * np.float32(0.01)
        distance = float(np.linalg.norm(self.x[:4].astype(np.float64)))
        return Step(self._observation(), -distance / 3, distance < 0.7)

    def step_unseen(self, action: np.ndarray) -> Step:
        step = self.step(action)
        return step._replace(observation={STATE_KEY: step.observation[STATE_KEY]})

    def render(self, width: int, height: int) -> np.ndarray:
        if self.task != "images":
            raise NotImplementedError(f"{self.task} has no pictures.")
        return self.rng.integers(0, 255, (height, width, 3), dtype=np.uint8)

    def close(self) -> None:
        if self.closed:
            raise RuntimeError("closed twice")
        self.closed = True

    def _observation(self) -> Observation:
        found = {STATE_KEY: self.x.copy()}
        if self.task == "images":
            found["observation.images.top"] = self.rng.integers(0, 255, (256, 200, 3), dtype=np.uint8)
            found["observation.flipped"] = self.x[::-1]  # not contiguous
            found["observation.empty"] = np.empty((0, 3), np.int16)
            found["observation.scalar"] = np.array(2.5)
        return found

    def _odd(self, what: int) -> Any:
        match what:
            case 1:
                raise KeyError("the physics blew up")
            case 2:
                os.kill(os.getpid(), signal.SIGSEGV)
            case 3:
                sys.exit(3)
            case 4:
                time.sleep(3600)
            case 5:
                Path(os.environ["WHERE"]).write_text(repr((sys.executable, sys.path, sys.flags.no_user_site)))
            case 6:
                assert importlib.util.find_spec("pytest") is None
