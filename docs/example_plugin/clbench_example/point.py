"""A point in the plane that is pushed to a goal."""

import numpy as np

from clbench.data.experts.base import Experts
from clbench.envs.base import STATE_KEY, SimulatorFamily, Step

SIDES = {"go-left": -1.0, "go-right": 1.0}


class PointSimulator:
    """State (4,): the point's x and y, the goal's x and y, in metres. Action (2,): 1 moves the point by 10 cm."""

    def __init__(self, side):
        self.side = side

    def reset(self, seed):
        rng = np.random.default_rng(seed)  # the seed alone determines the episode
        self.point = np.array([0.0, rng.uniform(-0.5, 0.5)])
        self.goal = np.array([self.side, rng.uniform(-0.5, 0.5)])
        return self._observation()

    def step(self, action):
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (2,) or not np.isfinite(action).all():
            raise ValueError(f"an action is two finite numbers, not {action}.")
        self.point += 0.1 * np.clip(action, -1.0, 1.0)
        distance = float(np.linalg.norm(self.goal - self.point))
        return Step(self._observation(), reward=-distance, success=distance < 0.05)

    def render(self, width, height):
        raise NotImplementedError("the point is not drawn.")

    def close(self):
        pass

    def _observation(self):
        return {STATE_KEY: np.concatenate([self.point, self.goal]).astype(np.float32)}


class Point(SimulatorFamily):
    """A point in the plane that is pushed to a goal."""

    fps = 10
    state_dim = 4
    action_dim = 2
    max_steps = 100
    instructions = {"go-left": "Move to the goal on the left", "go-right": "Move to the goal on the right"}
    needs = ("numpy",)

    def make(self, task, render):
        return PointSimulator(SIDES[task])


class PointExperts(Experts):
    """Moves straight to the goal."""

    def expert(self, task, simulator):
        def act(observation):
            state = observation[STATE_KEY]
            return 10.0 * (state[2:] - state[:2])

        return act
