"""Restoring an algorithm's state from a checkpoint: on the right device, with the right keys and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clbench.errors import UserError

if TYPE_CHECKING:
    from clbench.algorithms.protocol import CLAlgorithm


def restore_state(algorithm: CLAlgorithm, state: Mapping[str, Any], policy: nn.Module) -> None:
    """Load a saved state, with tensors that belong to parameters on the parameters' devices.

    A mapping whose keys are all names of `policy`'s parameters must hold tensors of their shapes; these go to the
    parameters' devices. All other tensors stay on the CPU.

    Raises:
        UserError: a shape differs from its parameter's, or the algorithm does not keep what the state holds.
    """
    parameters = dict(policy.named_parameters())
    placed = _placed(state, parameters, algorithm.name)
    try:
        algorithm.load_state_dict(placed)
    except KeyError as e:
        raise UserError(f"the checkpoint's state of {algorithm.name} has no {e}; it holds {sorted(state)}.") from e
    kept = algorithm.state_dict()
    if _keys(kept) != _keys(placed):
        odd = sorted(map(str, kept.keys() ^ placed.keys())) or ["their contents"]
        raise UserError(
            f"the checkpoint's state of {algorithm.name} holds {sorted(state)}, but the algorithm keeps "
            f"{sorted(kept)}: they differ in {', '.join(odd)}."
        )


def _placed(value: Any, parameters: Mapping[str, nn.Parameter], name: str) -> Any:
    if not isinstance(value, dict):
        return value
    if value and value.keys() <= parameters.keys() and all(torch.is_tensor(v) for v in value.values()):
        return {n: _like(parameters[n], v, n, name) for n, v in value.items()}
    return {k: _placed(v, parameters, name) for k, v in value.items()}


def _like(parameter: nn.Parameter, value: Tensor, key: str, name: str) -> Tensor:
    if value.shape != parameter.shape:
        raise UserError(
            f"the checkpoint's state of {name} has {key} of shape {tuple(value.shape)}, but the policy's has shape "
            f"{tuple(parameter.shape)}: they do not belong together."
        )
    return value.to(parameter.device)


def _keys(value: Any) -> Any:
    """The nested keys of a state."""
    return {k: _keys(v) for k, v in value.items()} if isinstance(value, Mapping) else None
