"""Where a phase's samples come from.

A source says which samples every step gets; the loop splits each global batch among ranks, adds planned samples and
draws noise. A run's position remains (visit, phase, step), so what a source gives may depend only on that, the seed,
its saved state and, unless it is read ahead, the current weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from clbench.data.frames import Batch
from clbench.errors import UserError

if TYPE_CHECKING:
    from clbench.algorithms.context import Context
    from clbench.algorithms.memory import Memory
    from clbench.algorithms.protocol import Phase


class Source:
    """Samples for the steps of a phase. Subclasses define `references`, or `batch` if no samples are stored.

    Attributes:
        ahead: whether loaders may read the samples of coming steps: true for stored ones; false for samples that
            depend on the current weights, which are requested when their step begins.
    """

    ahead: ClassVar[bool] = True

    def begin(self, ctx: Context, phase: Phase) -> None:
        """Called before a phase's first step, and before the first one after a resumption."""

    def references(self, ctx: Context, phase: Phase, step: int) -> Tensor:
        """References (visit, index) of a step's global batch, (phase.batch_size, 2); the same on every rank."""
        raise NotImplementedError(f"{type(self).__name__} must define references, or batch with ahead = False.")

    def batch(self, ctx: Context, phase: Phase, step: int, rows: slice) -> Batch:
        """Rows `rows` of a step's global batch, raw, with the keys that `ctx.frames.fetch` gives.

        A row must not depend on which others are requested, so that several ranks train as one would.
        """
        return ctx.frames.fetch(self.references(ctx, phase, step)[rows])

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides (visit, phase, step); as in `CLAlgorithm.state_dict`."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`, after `begin`."""
        if state:
            raise UserError(f"{type(self).__name__} keeps no state, but the training state has {sorted(state)}.")


class Demonstrations(Source):
    """The current visit's demonstrations, reshuffled every epoch. The default."""

    def begin(self, ctx: Context, phase: Phase) -> None:
        self._order = ctx.frames.order(ctx.k, ctx.seed, ctx.k, phase.name)

    def references(self, ctx: Context, phase: Phase, step: int) -> Tensor:
        index = self._order.take(step * phase.batch_size, phase.batch_size)
        return torch.stack([torch.full_like(index, ctx.k), index], 1)


class FromMemory(Source):
    """Samples from a memory only, drawn afresh for every step: past tasks', never the current one's."""

    def __init__(self, memory: Memory, balanced: bool = True) -> None:
        self.memory, self.balanced = memory, balanced

    def references(self, ctx: Context, phase: Phase, step: int) -> Tensor:
        gen = ctx.generator("from-memory", phase.name, step)
        return self.memory.sample(ctx, phase.batch_size, gen, balanced=self.balanced)
