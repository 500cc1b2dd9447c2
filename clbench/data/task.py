"""What a task is: its text, its demonstrations and its simulator. Standard library only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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
        weight: how often a frame is drawn, relative to other tasks' that the same visit learns from.
        parts: what a task consists of that is not all episodes of one instruction in one set: each with an instruction,
            a set and episodes of its own. Empty = the task itself.
        resize: camera → pixels, height and width, that its images are stretched to; None = as they are.
        pad: state or action → numbers that it is lengthened to, with zeros; None = as they are.
        held_out: pieces with the task's episodes that are not trained on, and are not among `episodes`.
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
    weight: float = 1.0
    resize: dict[str, int] | None = None
    pad: dict[str, int] | None = None
    parts: tuple[Task, ...] = ()
    held_out: tuple[Task, ...] = ()

    @property
    def pieces(self) -> tuple[Task, ...]:
        """The parts, or the task itself: each is one instruction in one set."""
        return self.parts or (self,)

    def only(self, keep: Callable[[Path, int], bool]) -> Task:
        """The task with those of its episodes (set's folder, index) for which `keep` holds; parts without any go."""
        if not self.parts:
            return replace(self, episodes=tuple(e for e in self.episodes if keep(self.root, e)))
        parts = tuple(part for p in self.parts if (part := p.only(keep)).episodes)
        return replace(self, parts=parts, episodes=tuple(e for p in parts for e in p.episodes))
