"""Between two steps: save a training state when it is due, on all ranks together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clbench.checkpoints.training_state import Position, StateKeeper
from clbench.patience import patience
from clbench.stopping import Stop
from clbench.training.backend import Backend

OptimizerState = dict[str, Any] | None  # an optimizer's full state; None without an optimizer


def same_on_all(position: Position, backend: Backend) -> Position:
    """Rank 0's position, on every rank."""
    told = backend.tell([position.k, str(position.source or ""), position.phase, position.step])
    return Position(told[0], Path(told[1]) if told[1] else None, told[2], told[3])


def save_if_due(
    backend: Backend,
    keeper: StateKeeper,
    stop: Stop,
    place: tuple[int, str, int],
    total_steps: int,
    optimizer: torch.optim.Optimizer | None,
    fill: Callable[[Path, OptimizerState], dict[str, Any]],
    size: Callable[[OptimizerState], int],
    every: int | None = None,
) -> bool:
    """Save when a state is due or a stop was requested; returns whether to stop, the same on every rank.

    Args:
        place: visit, phase, and steps done in it.
        fill: writes a state's files into a folder and returns what else describes it.
        size: approximate bytes that this takes.
        every: steps of this phase between states; None = the run's setting for all phases.
    """
    due = backend.is_main and keeper.due(total_steps, place[2], every)
    stopping, due = backend.any(bool(stop.reason), due)
    if stopping or due:
        with patience("saving the training state"):
            moments = None if optimizer is None else backend.optimizer_state(optimizer)  # every rank's part of it
            if backend.is_main:
                keeper.save(*place, total_steps, lambda folder: fill(folder, moments), lambda: size(moments))
            backend.barrier()
    return stopping
