"""`python -m tests.faulty_simulator ARGUMENTS`: clbench with a simulator that fails on request, and a policy of noise.

$FAULTS names a folder. A file TASK-EPISODE in it makes that episode (counted from the evaluation range's start) fail in
a step, TASK-make the task's building: it holds what happens (raise, die, exit, hang; reset-raise, … for its reset) and
how often: "raise 2". Evaluation processes are forked from this one, and so have both as well; that policy spares them
the seconds that importing LeRobot takes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from clbench import processes, registry
from clbench.envs.base import SEEDS_PER_SPLIT, STATE_KEY, Observation, SimulatorFamily, Step
from clbench.envs.metaworld import INSTRUCTIONS
from clbench.errors import UserError
from clbench.evaluation import worker
from clbench.evaluation.seeds import RULE, EpisodeSeeds

STEP_S = 0.002


class Faulty(SimulatorFamily):
    """Meta-World's tasks with a simulator that fails on request."""

    fps, robot_type, state_dim, action_dim, max_steps = 80, "none", 39, 4, 500
    instructions = INSTRUCTIONS
    python_variable = "FAULTY_PYTHON"
    test_states = int(os.environ["TEST_STATES"]) if "TEST_STATES" in os.environ else None

    def make(self, task: str, render: Mapping[str, Any]) -> Simulator:
        return Simulator(task)

    def versions(self) -> dict[str, str]:
        """$PHYSICS, or what a machine without the simulator says."""
        if os.environ.get("PHYSICS") == "none":
            raise UserError("the simulator is not installed.")
        return {"physics": os.environ.get("PHYSICS", "1.0")}


class Simulator:
    """A point that actions push; success when its first coordinate is far enough. Remembers nothing across resets."""

    def __init__(self, task: str) -> None:
        self.task = task
        self._fail("make", "make")

    def reset(self, seed: int) -> Observation:
        first = EpisodeSeeds(RULE, "test", 0, self.task).of(0)
        self.episode, self.steps = (seed - first) % SEEDS_PER_SPLIT, 0
        self._fail(str(self.episode), "reset")
        self.x = np.random.default_rng([seed, len(self.task)]).normal(size=39).astype(np.float32)
        return {STATE_KEY: self.x.copy()}

    def step(self, action: np.ndarray) -> Step:
        time.sleep(STEP_S)
        self.steps += 1
        if self.steps == 3:
            self._fail(str(self.episode), "step")
        self.x[:4] += 0.1 * action
        return Step({STATE_KEY: self.x.copy()}, float(self.x[0]), bool(self.x[0] > 0.3))

    def close(self) -> None:
        """Nothing to free."""

    def _fail(self, episode: str, call: str) -> None:
        if "FAULTS" not in os.environ:
            return
        path = Path(os.environ["FAULTS"]) / f"{self.task}-{episode}"
        if not path.is_file():
            return
        what, times = path.read_text().split()
        if int(times) == 0 or (call == "reset") != what.startswith("reset-"):
            return
        path.write_text(f"{what} {int(times) - 1}")
        match what.removeprefix("reset-"):
            case "raise":
                raise RuntimeError("the physics blew up")
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                sys.exit(3)
            case "hang":
                time.sleep(3600)


class Noise:
    """Two actions at a time, drawn from the episode's own seed."""

    def __init__(self, stateful: bool = False) -> None:
        self.stateful, self.history = stateful, 1

    def reset(self) -> None:
        """Nothing to forget."""

    def act(
        self, observations: Sequence[Observation], instructions: Any, seeds: Sequence[int], calls: Sequence[int]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        rows = [np.random.default_rng([s, c]).normal(size=(2, 4)) for s, c in zip(seeds, calls, strict=True)]
        return np.stack(rows), {}


def actors(job: worker.Job, settings: worker.Settings) -> Iterator[Any]:
    yield Noise(), nullcontext, job.episodes


if __name__ in ("__main__", "__mp_main__"):  # the evaluation and its processes
    registry.OWN["simulators"]["metaworld"] = "tests.faulty_simulator:Faulty"
    worker.actors = actors
    processes.HEAVY = ()  # they would not be used

if __name__ == "__main__":
    from clbench.cli import main

    sys.exit(main())
