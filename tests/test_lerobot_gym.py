"""LeRobot's environments by name: found without importing anything; PushT is played where it is installed."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clbench.config.compose import compose
from clbench.envs.lerobot_gym import LeRobotEnvironments, lerobot_environments
from clbench.envs.making import family, make_simulator
from clbench.errors import UserError
from clbench.evaluation.evaluate import evaluate
from clbench.listing import listing
from clbench.streams.stream import build_stream
from clbench.testing import toy_config
from clbench.training.trainer import train
from tests.lab_sets import make_lab_set

needs_pusht = pytest.mark.skipif(find_spec("gym_pusht") is None, reason="needs gym-pusht: pip install 'lerobot[pusht]'")
SPEC = {"type": "pusht", "task": "PushT-v0"}
IMAGE = "observation.image"


def test_names_are_lerobots_and_clbenchs_own_come_first() -> None:
    assert lerobot_environments() == ("aloha", "pusht")
    listed = [line.split()[:2] for line in listing("simulators")]
    assert ["pusht", "lerobot"] in listed and ["aloha", "lerobot"] in listed
    pusht, aloha = family("pusht"), family("aloha")
    assert isinstance(pusht, LeRobotEnvironments) and family("pusht") is pusht
    assert (pusht.fps, pusht.state_dim, pusht.action_dim, pusht.max_steps) == (10, 2, 2, 300)
    assert dict(pusht.cameras) == {IMAGE: "pixels"} and dict(aloha.cameras) == {"observation.images.top": "pixels/top"}
    assert (aloha.state_dim, aloha.action_dim) == (14, 14)
    assert not isinstance(family("metaworld"), LeRobotEnvironments)
    with pytest.raises(UserError, match="unknown environment type 'pushd'"):
        family("pushd")


def test_an_environment_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(self: Any, n_envs: int) -> None:
        raise ModuleNotFoundError("Package 'gym_aloha' required for env 'aloha' not found.")

    config = family("aloha")._config()  # type: ignore[attr-defined]
    monkeypatch.setattr(type(config), "create_envs", absent)
    with pytest.raises(
        UserError, match=r"'aloha' cannot be made: .*gym_aloha.* Install it with: pip install 'lerobot\[aloha\]'"
    ):
        make_simulator({"type": "aloha", "task": "AlohaInsertion-v0"})


@needs_pusht
def test_pusht_is_decided_by_its_seed() -> None:
    first, used = make_simulator(SPEC), make_simulator(SPEC)
    used.reset(7)
    for action in np.random.default_rng(0).uniform(0, 512, (5, 2)):
        used.step(action)
    start, again = first.reset(3), used.reset(3)
    assert {k: (v.shape, v.dtype.name) for k, v in start.items()} == {
        IMAGE: ((96, 96, 3), "uint8"), "observation.state": ((2,), "float32"),
    }  # fmt: skip
    for key in start:
        assert np.array_equal(start[key], again[key])
    for action in np.random.default_rng(1).uniform(-100, 700, (8, 2)):  # some outside: clipped
        one, other = first.step(action), used.step(action)
        assert all(np.array_equal(one.observation[k], other.observation[k]) for k in start)
        assert (one.reward, one.success) == (other.reward, other.success) and not one.success
    with pytest.raises(ValueError, match="finite numbers"):
        first.step(np.array([np.nan, 0]))
    with pytest.raises(UserError, match="has no task 'PushT-v9'"):
        make_simulator({**SPEC, "task": "PushT-v9"})
    assert "pymunk" in family("pusht").versions()
    first.close()
    first.close()


@needs_pusht
def test_a_stream_of_pusht_is_trained_and_played(tmp_path: Path) -> None:
    """Two visits to one task, on a recording with the environment's own features."""
    text = "Push the T-shaped block onto the T-shaped target."
    simulator = make_simulator(SPEC)
    frames = {e: [simulator.reset(e)] + [
        simulator.step(np.random.default_rng([e, t]).uniform(0, 512, 2)).observation for t in range(5)
    ] for e in range(2)}  # fmt: skip
    image = {"dtype": "image", "shape": (96, 96, 3), "names": ["height", "width", "channel"]}
    make_lab_set(
        tmp_path / "pusht", [text] * 2, state=2, action=2, features={IMAGE: (image, lambda e, i: frames[e][i][IMAGE])},
        actions=lambda e, i: np.random.default_rng([e, i]).uniform(0, 512, 2).astype(np.float32),
    )  # fmt: skip
    stream = {
        "name": "my_pusht", "data": str(tmp_path / "pusht"), "env": {"type": "pusht", "max_steps": 12},
        "instructions": {text: "PushT-v0"}, "tasks": ["PushT-v0"], "task_order": [0, 0],
    }  # fmt: skip
    (tmp_path / "my_pusht.yaml").write_text(json.dumps({"dataset": stream}))
    made = compose(model="dit_dec_tiny", algorithms=["seqfft"], dataset=str(tmp_path / "my_pusht.yaml"), registered=[])
    config = toy_config(tmp_path, {"name": "seqfft"}, f"output_dir={tmp_path}", "train.steps=2", "eval.cells=last")
    config.dataset = made[0].dataset
    task = build_stream(config.dataset).columns[0]
    assert (task.instruction, task.env) == (text, {"type": "pusht", "task": "PushT-v0"})
    folder = train(config, "r")
    matrix = evaluate(folder, config, progress=False)
    assert matrix["success"] == [[None, None], [0.0, 0.0]] and matrix["episodes"] == [[0, 0], [1, 1]]
    config.eval.random_row = True
    with pytest.raises(UserError, match="units of their own"):
        evaluate(folder, config, progress=False)
