"""Data sets without a simulator, as a lab records them: written with LeRobot, in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Value = Callable[[int, int], np.ndarray]  # (episode, frame) → what a feature has there


def make_lab_set(
    root: Path,
    texts: Sequence[str],
    *,
    lengths: Sequence[int] | int = 6,
    state: int = 6,
    action: int = 3,
    fps: int = 10,
    names: tuple[str, str] = ("observation.state", "action"),
    features: Mapping[str, tuple[dict[str, Any], Value]] | None = None,
    actions: Value | None = None,
) -> Path:
    """Write one episode for each of `texts`, which are instructions; states and actions are functions of both.

    Args:
        lengths: frames of each episode.
        names: of the state and the action.
        features: further ones: name → (LeRobot's description, values).
        actions: (episode, frame) → action (A,), in the place of those made up here.
    """
    from lerobot.datasets import LeRobotDataset

    described: dict[str, Any] = {
        names[0]: {"dtype": "float32", "shape": (state,), "names": None},
        names[1]: {"dtype": "float32", "shape": (action,), "names": None},
        **{name: feature for name, (feature, _) in (features or {}).items()},
    }
    dataset = LeRobotDataset.create(root.name, fps=fps, features=described, root=root, use_videos=False)
    rng = np.random.default_rng(len(texts) + state)
    tasks = list(dict.fromkeys(texts))
    for episode, text in enumerate(texts):
        length = lengths if isinstance(lengths, int) else lengths[episode]
        for i in range(length):
            seen = (tasks.index(text) + 0.1 * rng.normal(size=state)).astype(np.float32)
            done = np.tanh(seen[:1] + np.linspace(-1, 1, action)).astype(np.float32)
            frame: dict[str, Any] = {names[0]: seen, names[1]: done if actions is None else actions(episode, i)}
            frame |= {name: value(episode, i) for name, (_, value) in (features or {}).items()}
            dataset.add_frame({**frame, "task": text})
        dataset.save_episode()
    dataset.finalize()
    return root


def lab_config(*sets: Path, **dataset: Any) -> dict[str, Any]:
    """The mapping of a YAML file: a stream of these sets without a simulator, and with nothing held out."""
    return {"dataset": {"name": "lab", "data": [str(s) for s in sets], "env": None, "holdout": 0.0, **dataset}}
