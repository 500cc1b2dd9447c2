"""What a scripted expert is, and the expert of an environment type.

Experts act where the simulators are: in a child process if those are under another interpreter. So this package is
written for Python 3.10, like clbench.envs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from clbench import registry
from clbench.envs.base import Expert, Observation, Simulator
from clbench.envs.remote import RemoteSimulator
from clbench.errors import UserError


class Experts:
    """The scripted experts of one environment type.

    A subclass offers `expert`. It is registered under the name of the environment type (see `clbench.registry`, axis
    "experts").

    Attributes:
        cannot: tasks that they cannot do, and why. No demonstrations are made for these.
    """

    cannot: Mapping[str, str] = {}

    def expert(self, task: str, simulator: Simulator) -> Expert:
        """Return the expert for one episode, a function from an observation to an action (action_dim,), not clipped.

        It is requested after the episode's reset. It may remember what it saw, and look into the simulator, which makes
        it privileged.
        """
        raise NotImplementedError(f"{type(self).__name__} must define expert(task, simulator).")


def experts(env_type: str) -> Experts:
    """Return the experts of an environment type; UserError if it has none."""
    if env_type not in registry.names("experts"):
        raise UserError(f"environment type '{env_type}' has no scripted experts.")
    found: Experts = registry.load("experts", env_type)()
    return found


def episode_expert(spec: Mapping[str, Any], simulator: Simulator) -> Expert:
    """Return the scripted expert for the next episode of `simulator`; call it from that episode's first observation on.

    Args:
        spec: what the simulator was made from, see `make_simulator`.

    Raises:
        UserError: the environment type has no experts.
    """
    found = experts(spec["type"])
    if isinstance(simulator, RemoteSimulator):
        return simulator.expert(registry.target_of(type(found)))
    made: list[Expert] = []

    def act(observation: Observation) -> np.ndarray:
        if not made:  # only now has the episode begun
            made.append(found.expert(spec["task"], simulator))
        return made[0](observation)

    return act
