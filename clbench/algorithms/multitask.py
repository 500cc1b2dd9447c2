"""Joint training on the data of all tasks at once, the upper bound.

As many optimizer steps as the whole sequence takes, over the union of the data; one checkpoint, one matrix row.
Chaudhry et al. 2018 (arXiv 1801.10112) measure intransigence against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from clbench.algorithms.hooks import CLAlgorithm, Context, Phase, stands_alone, training_phase
from clbench.errors import UserError
from clbench.streams.stream import TaskStream


class Multitask(CLAlgorithm):
    """One visit with all tasks' data."""

    name = "multitask"
    claims = frozenset({"stream", "phases"})

    @dataclass
    class Config:
        """Keys of `algorithm`.

        Attributes:
            steps_per_task: optimizer steps per task of the stream; null = train.steps.
        """

        steps_per_task: int | None = None

    def check(self, config: Any) -> None:
        stands_alone(self.name, config)
        steps = self.config.steps_per_task
        if steps is not None and steps < 1:
            raise UserError(f"algorithm.steps_per_task must be at least 1 (or null) but is {steps}.")

    def transform_stream(self, stream: TaskStream) -> TaskStream:
        return stream.joint()

    def phases(self, ctx: Context) -> Sequence[Phase]:
        per_task = ctx.train.steps if self.config.steps_per_task is None else self.config.steps_per_task
        return [replace(training_phase(ctx), steps=per_task * len(ctx.stream.columns))]
