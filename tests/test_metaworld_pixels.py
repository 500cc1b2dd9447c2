"""Meta-World on camera images: the physics of the states, what is seen, and evaluation blind and deaf."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clbench.checkpoints.mean_images import FILE, read_mean_images
from clbench.config.compose import check_values, compose
from clbench.data.experts.base import episode_expert
from clbench.data.info import load_info
from clbench.data.make import make_dataset
from clbench.envs.base import STATE_KEY, step_unseen
from clbench.envs.making import family, make_simulator
from clbench.envs.metaworld import IMAGE_KEY
from clbench.envs.rendering import libraries
from clbench.errors import UserError
from clbench.evaluation.evaluate import deaf, evaluate, run_config
from clbench.testing.toy import toy_config
from clbench.training.trainer import train

pytestmark = pytest.mark.skipif(not libraries(), reason="nothing can draw here: neither EGL nor OSMesa is installed")
TASK = "window-close-v3"
SPEC = {"type": "metaworld_pixels", "task": TASK, "render": {"size": 32}}


def test_physics_is_that_of_the_states_and_the_camera_looks_when_asked() -> None:
    seen, states = make_simulator(SPEC), make_simulator({"type": "metaworld", "task": TASK})
    expert, other = episode_expert(SPEC, seen), episode_expert({"type": "metaworld", "task": TASK}, states)
    a, b = seen.reset(7), states.reset(7)
    first = a[IMAGE_KEY]
    assert first.shape == (32, 32, 3) and first.dtype == np.uint8 and first.std() > 10
    for i in range(60):
        action = other(b)
        np.testing.assert_array_equal(expert(a), action)  # it sees the state that the policy does not
        x, y = (step_unseen(seen, action) if i % 4 else seen.step(action)), states.step(action)
        assert (x.reward, x.success) == (y.reward, y.success)
        assert (IMAGE_KEY in x.observation) == (i % 4 == 0)
        np.testing.assert_array_equal(x.observation[STATE_KEY], y.observation[STATE_KEY][:4])
        a, b = x.observation, y.observation
    last = seen.step(np.zeros(4)).observation[IMAGE_KEY]
    assert np.abs(last.astype(int) - first).mean() > 1  # the arm has moved
    again = seen.reset(7)
    np.testing.assert_array_equal(again[IMAGE_KEY], first)
    assert not np.array_equal(seen.reset(8)[IMAGE_KEY], first)
    seen.close()
    seen.close()
    states.close()


def test_the_camera_is_lerobots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own environment draws the same scene: same camera, place and way up; with shadows, at its own size."""
    pytest.importorskip("lerobot.envs.metaworld")
    from clbench.envs.rendering import backend_name

    monkeypatch.setenv("MUJOCO_GL", backend_name())  # theirs does not look for what is installed
    from lerobot.envs.configs import MetaworldEnv as Config
    from lerobot.envs.metaworld import MetaworldEnv

    config = Config(task=f"metaworld-{TASK}")
    assert config.features_map["pixels/top"] == IMAGE_KEY and config.features_map["agent_pos"] == STATE_KEY
    theirs = MetaworldEnv(task=TASK, obs_type="pixels_agent_pos", observation_width=64, observation_height=64)
    found, _ = theirs.reset(seed=3)
    ours = make_simulator({**SPEC, "render": {"size": 480, "fidelity": "full"}})
    here = ours.reset(3)
    assert found["agent_pos"].shape == here[STATE_KEY].shape
    image = found["pixels"]
    mine = here[IMAGE_KEY]
    if image.shape != mine.shape:
        ratio = image.shape[0] // mine.shape[0] or 1
        image = image[::ratio, ::ratio]
    grey = [np.asarray(x, float).mean(-1) for x in (image, mine)]
    close = np.corrcoef(grey[0].ravel(), grey[1].ravel())[0, 1]
    flipped = [np.corrcoef(grey[0].ravel(), g.ravel())[0, 1] for g in (grey[1][::-1], grey[1][:, ::-1])]
    assert close > 0.9 > max(flipped), (close, flipped)
    theirs.close()
    ours.close()


def test_demonstrations_hold_images_and_the_robots_own_state(tmp_path: Path) -> None:
    root = make_dataset(
        tmp_path / "two", name="two", env_type="metaworld_pixels", tasks=[TASK], demos_per_task=1, seed=0,
        ceiling_episodes=0, workers=1, progress=False, render={"size": 16},
    )  # fmt: skip
    info = load_info(root)
    assert info.render == {"fidelity": "fast", "size": 16} and "opengl" in info.versions
    features = json.loads((root / "meta/info.json").read_text())["features"]
    assert features[IMAGE_KEY]["shape"] == [16, 16, 3] and features[STATE_KEY]["shape"] == [4]


def test_streams_share_no_task_between_stream_validation_and_pretraining() -> None:
    main, val = (compose(model="dit_dec_small", algorithms=["seqfft"], dataset=name)[0].dataset for name in NAMES)
    assert main.pretrain is not None and val.pretrain is not None
    parts = [set(main.tasks), set(val.tasks), set(main.pretrain.tasks)]
    assert main.pretrain.tasks == val.pretrain.tasks
    assert sum(map(len, parts)) == len(set.union(*parts)) == 16
    assert not set.union(*parts) - set(family("metaworld_pixels").tasks())


NAMES = ("metaworld_pixels", "metaworld_pixels_val")


@pytest.fixture(scope="module")
def camera_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two tasks on images, trained a few steps."""
    root = tmp_path_factory.mktemp("camera")
    tasks = [TASK, "faucet-open-v3"]
    make_dataset(
        root / "stream", name="stream", env_type="metaworld_pixels", tasks=tasks, demos_per_task=1, seed=0,
        ceiling_episodes=0, workers=1, progress=False, render={"size": 16},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLBENCH_CACHE_ROOT", str(root / "cache"))
        return train(camera_config(root), "r")


def camera_config(root: Path, *overrides: str) -> Any:
    return toy_config(
        root, {"name": "seqfft"}, "dataset.env.type=metaworld_pixels", "dataset.pretrain=null", "render.size=16",
        f"output_dir={root}/runs", f"dataset.tasks=[{TASK},faucet-open-v3]", "eval.cells=last", *overrides,
    )  # fmt: skip


def test_blind_and_deaf_are_views_of_every_camera_policy(camera_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[np.ndarray, list[str]]] = []
    from clbench.rollout.actors import PolicyActor

    act = PolicyActor.act

    config = run_config(camera_run)
    config.eval.views = ["blind", "deaf"]
    config.eval.episodes = 1
    evaluate(camera_run, config, progress=False)
    for view in ("blind", "deaf"):
        matrix = json.loads((camera_run / f"eval/views/{view}/matrix.json").read_text())
        assert matrix["success"][1] != [None, None] and matrix["episodes"][1] == [1, 1]

    # what a worker is given, in this process
    from clbench.envs.making import make_simulator as make
    from clbench.evaluation.rows import Weights
    from clbench.evaluation.worker import Job, Settings, play
    from clbench.rollout.rollout import SimulatorPool

    def watched(self: Any, observations: Any, *rest: Any) -> Any:
        out = act(self, observations, *rest)
        shown.append((np.stack([self.shown.get(IMAGE_KEY, o[IMAGE_KEY]) for o in observations]), list(rest[0])))
        return out

    monkeypatch.setattr(PolicyActor, "act", watched)
    columns = json.loads((camera_run / "manifest.json").read_text())["visits"]
    images = read_mean_images(camera_run)
    episode = {
        "j": 0,
        "task_id": 0,
        "episode": 0,
        "seed": 1_000_000,
        "max_steps": 8,
        "env": {**SPEC, "render": {"size": 16}},
    }
    weights = Weights(str(camera_run / "checkpoints/task_01/policy"), str(camera_run / "checkpoints/task_01"))
    for there, given in ((columns, None), (columns, images), (deaf(columns), None)):
        job = Job(1, weights, ({**episode, "instruction": there[0]["instruction"]},))
        list(play(job, Settings(config, 2, 0, "cpu", 1, shown=given), SimulatorPool(make)))
    calls = len(shown) // 3
    assert all(np.array_equal(x[0][0], images[IMAGE_KEY]) for x in shown[calls : 2 * calls])
    assert not any(np.array_equal(x[0][0], images[IMAGE_KEY]) for x in shown[:calls])
    assert {x[1][0] for x in shown[:calls]} == {columns[0]["instruction"]}
    assert {x[1][0] for x in shown[2 * calls :]} == {columns[1]["instruction"]}


def test_the_mean_image_is_that_of_the_demonstrations(camera_run: Path) -> None:
    import torch

    from clbench.checkpoints.policy_io import policy_config
    from clbench.data.frames import StreamFrames
    from clbench.streams.stream import build_stream

    config = run_config(camera_run)
    stream = build_stream(config.dataset, render=config.render)
    frames = StreamFrames([v.tasks for v in stream.visits], policy_config(dict(config.policy), "cpu"), cache_gb=0)
    every = [frames.fetch(torch.tensor([[k, i]])) for k in range(2) for i in range(frames.length(k))]
    mean = np.concatenate([b[IMAGE_KEY].numpy() for b in every]).mean(0).transpose(1, 2, 0)
    found = read_mean_images(camera_run)[IMAGE_KEY]
    assert found.shape == (16, 16, 3) and np.abs(found - mean).max() <= 0.51


def test_a_deaf_policy_needs_two_instructions_and_a_blind_one_cameras_and_images(
    camera_run: Path, toy_data: Path, tmp_path: Path
) -> None:
    columns = [{"instruction": "a"}, {"instruction": "b"}, {"instruction": "a"}, {"instruction": "c"}]
    assert [c["instruction"] for c in deaf(columns)] == ["b", "c", "b", "a"]
    with pytest.raises(UserError, match="has only one"):
        deaf(columns[:1])
    with pytest.raises(UserError, match="'metaworld' has none"):
        check_values(toy_config(toy_data, {"name": "seqfft"}, "eval.views=[blind]"))
    with pytest.raises(UserError, match=f"has no {FILE}"):
        read_mean_images(tmp_path)
    (tmp_path / FILE).write_bytes(b"\x08" + bytes(20))
    with pytest.raises(UserError, match="The file is damaged"):
        read_mean_images(tmp_path)


def test_lerobots_tools_are_given_the_same_images() -> None:
    from lerobot.configs.parser import load_plugin
    from lerobot.envs import make_env, make_env_config
    from lerobot.envs.utils import preprocess_observation

    load_plugin("clbench.envs.lerobot_env")
    config = make_env_config("clbench_metaworld_pixels", task=TASK, episode_length=3, render_size=16)
    env = make_env(config, n_envs=1)["clbench_metaworld_pixels"][0]
    observation, _ = env.reset(seed=[1_000_000])
    simulator = make_simulator({"type": "metaworld_pixels", "task": TASK, "render": {"size": 16, "fidelity": "fast"}})
    reference = simulator.reset(1_000_000)
    for _ in range(2):
        assert set(preprocess_observation(observation)) == {IMAGE_KEY, STATE_KEY}
        assert np.array_equal(observation["pixels"][0], reference[IMAGE_KEY])
        assert np.array_equal(observation["agent_pos"][0], reference[STATE_KEY])
        observation, *_ = env.step(np.ones((1, 4), np.float32))
        reference = simulator.step(np.ones(4, np.float32)).observation
    assert config.features_map["pixels"] == IMAGE_KEY and config.features["pixels"].shape == (16, 16, 3)
    env.close()
    simulator.close()
    with pytest.raises(UserError, match=r"render\.size must be a whole number"):
        make_env_config("clbench_metaworld_pixels", task=TASK, render_size=4)
