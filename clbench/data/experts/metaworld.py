"""Meta-World's own scripted policies, one per task: functions of the whole state, which camera streams do not show."""

from __future__ import annotations

import warnings

import numpy as np

from clbench.data.experts.base import Experts
from clbench.envs.base import STATE_KEY, Expert, Observation, Simulator
from clbench.envs.metaworld import MetaworldPixelsSimulator, import_metaworld


class MetaworldExperts(Experts):
    """Meta-World's own scripted policies."""

    def expert(self, task: str, simulator: Simulator) -> Expert:
        """Return the policy of `task`: observation -> action (4,) float32, not clipped.

        It takes the state from the observation; with cameras from the simulator, for there the observation lacks it.
        """
        policy = import_metaworld("metaworld.policies").ENV_POLICY_MAP[task]()

        def act(observation: Observation) -> np.ndarray:
            with warnings.catch_warnings():  # "Constant(s) may be too high": the actions are clipped anyway
                warnings.simplefilter("ignore", UserWarning)
                state = simulator.state if isinstance(simulator, MetaworldPixelsSimulator) else observation[STATE_KEY]
                return np.asarray(policy.get_action(state), dtype=np.float32)

        return act
