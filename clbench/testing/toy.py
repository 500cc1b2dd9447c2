"""What tests train: LeRobot data sets made without a simulator, and a policy that trains in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from clbench.config.schema import Config
from clbench.data.info import FORMAT, INFO_FILE, fingerprint
from clbench.io import write_json

TASKS = {
    "hammer-v3": "Hammer a screw on the wall",
    "push-v3": "Push the puck to a goal",
    "window-close-v3": "Push and close a window",
    "reach-v3": "Reach a goal position",
    "door-open-v3": "Open a door",
}
STREAM, PRETRAIN = list(TASKS)[:3], list(TASKS)[3:]


def make_toy_data(root: Path, tasks: list[str], episodes: int = 3, length: int = 20, images: bool = False) -> Path:
    """Write a LeRobotDataset whose states cluster by task, with clbench's own description."""
    from lerobot.datasets import LeRobotDataset

    features: dict[str, Any] = {
        "observation.state": {"dtype": "float32", "shape": (39,), "names": None},
        "action": {"dtype": "float32", "shape": (4,), "names": None},
    }
    if images:
        features["observation.images.top"] = {
            "dtype": "image", "shape": (32, 32, 3), "names": ["height", "width", "channel"],
        }  # fmt: skip
    dataset = LeRobotDataset.create(root.name, fps=80, features=features, root=root, use_videos=False)
    rng = np.random.default_rng(0)
    records, states, actions, episode_index, task_index = [], [], [], [], []
    number = 0
    for t, name in enumerate(tasks):
        center = 0.5 * np.random.default_rng(sum(map(ord, name))).normal(size=39)
        numbers = []
        for _ in range(episodes):
            state = (center + 0.1 * rng.normal(size=(length, 39))).astype(np.float32)
            action = np.tanh(state[:, :4] + state[:, 4:8] + 0.1 * rng.normal(size=(length, 4))).astype(np.float32)
            for i in range(length):
                frame = {"observation.state": state[i], "action": action[i], "task": TASKS[name]}
                if images:
                    frame["observation.images.top"] = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                dataset.add_frame(frame)
            dataset.save_episode()
            states.append(state)
            actions.append(action)
            episode_index += [number] * length
            task_index += [t] * length
            numbers.append(number)
            number += 1
        records.append(
            {
                "name": name, "instruction": TASKS[name], "task_index": t, "episodes": numbers,
                "frames": episodes * length, "expert_attempts": 20, "expert_successes": 20, "expert_success_rate": 1.0,
                "demo_attempts": episodes, "demo_successes": episodes, "demo_success_rate": 1.0,
            }
        )  # fmt: skip
    dataset.finalize()
    print_ = fingerprint(np.concatenate(states), np.concatenate(actions), np.array(episode_index), np.array(task_index))
    write_json(
        root / INFO_FILE,
        {
            "format": FORMAT, "name": root.name, "env_type": "metaworld", "seed": 0, "action_noise": 0.1,
            "tail_steps": 0, "max_steps": 200, "demos_per_task": episodes, "ceiling_episodes": 20, "tasks": records,
            "fingerprint": print_, "versions": {},
        },
    )  # fmt: skip
    return root


def make_toy_root(root: Path) -> Path:
    """Write what `toy_config` reads into a folder: stream/ (three tasks) and pretrain/ (two others)."""
    make_toy_data(root / "stream", STREAM)
    make_toy_data(root / "pretrain", PRETRAIN)
    return root


def toy_config(data: Path, algorithm: dict[str, Any], *overrides: str) -> Config:
    """A run over the toy data: two blocks of width 16, a few steps per task. `data` holds stream/ and pretrain/."""
    from omegaconf import OmegaConf

    from clbench.config.compose import to_config

    base = {
        "model": "toy",
        "policy": {
            "type": "dit_dec", "chunk_size": 4, "n_action_steps": 2, "action_patch": 2, "d_model": 16, "n_heads": 2,
            "encoder_layers": 1, "decoder_layers": 1, "num_inference_steps": 2, "text_vocab_size": 64, "text_dim": 8,
        },
        "algorithm": algorithm,
        "dataset": {
            "name": "toy", "data": str(data / "stream"), "env": {"type": "metaworld", "max_steps": 20},
            "tasks": STREAM, "pretrain": {"data": str(data / "pretrain"), "tasks": PRETRAIN},
        },
        "train": {"steps": 4, "batch_size": 8, "device": "cpu", "threads": 1, "log_every": 1, "num_workers": 0},
        "pretrain": {"steps": 60, "batch_size": 8, "optimizer": {"lr": 3e-3, "warmup_steps": 5}},
        "eval": {"episodes": 1, "slots": 4, "workers": 1},
        "log": {"progress": "quiet"},
    }  # fmt: skip
    merged = OmegaConf.merge(OmegaConf.structured(Config), base, OmegaConf.from_dotlist(list(overrides)))
    return to_config(merged)
