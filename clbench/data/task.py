"""What a task is: its text, its demonstrations and its simulator. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Task:
    """One task: its text, its demonstrations (episodes of a LeRobot data set) and its simulator.

    Attributes:
        name: unique within a stream, e.g. "push-v3".
        instruction: what the policy reads.
        root: the LeRobot data set's folder.
        episodes: indices of this task's episodes in it.
        env: simulator spec, {"type": ..., "task": ...}; None without a simulator.
        max_steps: an episode not solved after this many steps has failed; 0 without a simulator.
        expert_success: the scripted expert's own success rate in [0, 1], the demonstrations' ceiling.
        features: the data set's features → names in clbench; others are not used. None = all, under their own names.
        task_index, text: the task in the data set and its instruction there.
        frames: number of frames in all the data set's episodes of this task.
    """

    name: str
    instruction: str
    root: Path
    episodes: tuple[int, ...]
    env: dict[str, Any] | None
    max_steps: int
    expert_success: float | None = None
    features: dict[str, str] | None = None
    task_index: int | None = None
    text: str | None = None
    frames: int | None = None
