"""Independent policies: every task is learned from the base, nothing is carried over.

The reference for what a task costs and reaches on its own (Continual World's single-task runs, arXiv 2105.10919).
"""

from __future__ import annotations

from typing import Any

from clbench.algorithms.hooks import CLAlgorithm, stands_alone
from clbench.streams.stream import TaskStream


class SingleTask(CLAlgorithm):
    """Every visit starts from the base."""

    name = "singletask"
    claims = frozenset({"stream"})

    def check(self, config: Any) -> None:
        stands_alone(self.name, config)

    def transform_stream(self, stream: TaskStream) -> TaskStream:
        return stream.independent()
