"""Simulators: what an episode depends on, what a policy sees, and LeRobot's view of them."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clbench.data.experts.base import episode_expert
from clbench.envs.base import EVAL_SEED_BASE, STATE_KEY, Simulator
from clbench.envs.making import family, instruction, make_simulator
from clbench.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def spec(task: str) -> dict[str, Any]:
    return {"type": "metaworld", "task": task}


def play(simulator: Simulator, task: str, seed: int, steps: int, noise: float) -> np.ndarray:
    """Returns (steps + 1, 41): state, reward, success of an episode of the expert, disturbed by noise."""
    expert = episode_expert(spec(task), simulator)
    rng = np.random.default_rng(1)
    observation = simulator.reset(seed)
    rows = [np.append(observation[STATE_KEY], [0.0, 0.0])]
    for _ in range(steps):
        action = expert(observation)
        observation, reward, success = simulator.step(action + rng.normal(0, noise, action.shape))
        rows.append(np.append(observation[STATE_KEY], [reward, success]))
    return np.stack(rows)


def check_seed_decides(task: str) -> None:
    fresh, used = make_simulator(spec(task)), make_simulator(spec(task))
    want = play(fresh, task, 5, 60, 0.1)
    play(used, task, 6, 150, 0.1)
    play(used, task, 7, 100, 1.0)  # as a bad policy would: whatever it broke is mended by reset
    for _ in range(2):
        np.testing.assert_array_equal(play(used, task, 5, 60, 0.1), want, err_msg=task)
    goal = want[:, 36:39]
    assert (goal != 0).any() and (goal[1:] == goal[1]).all(), f"{task}: the goal must be visible and stay: {goal}"
    np.testing.assert_allclose(goal[0], goal[1], err_msg=task)
    assert not np.array_equal(used.reset(8)[STATE_KEY], want[0, :39].astype(np.float32))
    fresh.close()
    used.close()


@pytest.mark.parametrize("task", ["push-v3", "door-open-v3", "peg-insert-side-v3", "window-close-v3"])
def test_the_seed_alone_decides_an_episode(task: str) -> None:
    check_seed_decides(task)


@pytest.mark.slow
def test_the_seed_alone_decides_an_episode_in_every_task() -> None:
    for task in family("metaworld").tasks():
        check_seed_decides(task)


def test_another_process_sees_the_same_episode() -> None:
    code = (
        "import hashlib, test_envs as t\n"
        "s = t.make_simulator(t.spec('hammer-v3'))\n"
        "print(hashlib.sha256(t.play(s, 'hammer-v3', 3, 80, 0.1).tobytes()).hexdigest())\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    other = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, env=environment, check=True)
    mine = play(make_simulator(spec("hammer-v3")), "hammer-v3", 3, 80, 0.1)
    assert other.stdout.strip() == hashlib.sha256(mine.tobytes()).hexdigest()


@pytest.mark.parametrize("task", ["push-v3", "shelf-place-v3", "faucet-close-v3"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_observations_are_those_of_the_official_benchmark(task: str) -> None:
    import gymnasium as gym
    import metaworld  # noqa: F401  (registers Meta-World/MT1)

    official = gym.make("Meta-World/MT1", env_name=task, seed=1)
    state, _ = official.reset(seed=1)
    ours: Any = make_simulator(spec(task))
    ours._env._last_rand_vec = official.unwrapped._last_rand_vec  # type: ignore[attr-defined]
    ours._env._freeze_rand_vec = True
    np.testing.assert_array_equal(ours.reset(0)[STATE_KEY], state.astype(np.float32))
    assert (state[36:] != 0).any()
    rng = np.random.default_rng(0)
    for _ in range(40):
        action = rng.uniform(-1, 1, 4).astype(np.float32)
        state, reward, _, _, info = official.step(action)
        step = ours.step(action)
        np.testing.assert_array_equal(step.observation[STATE_KEY], state.astype(np.float32))
        assert step.reward == reward and step.success == bool(info["success"])
    official.close()


def test_experts_solve_tasks_and_success_is_seen() -> None:
    rows = play(make_simulator(spec("handle-press-side-v3")), "handle-press-side-v3", 0, 80, 0.0)
    assert rows[0, 40] == 0 and rows[:, 40].any()


def test_actions_are_clipped_and_checked() -> None:
    a, b = make_simulator(spec("reach-v3")), make_simulator(spec("reach-v3"))
    assert a.reset(0)[STATE_KEY].dtype == np.float32
    b.reset(0)
    wild = a.step(np.array([9.0, -9.0, 0.5, 3.0]))
    tame = b.step(np.array([1.0, -1.0, 0.5, 1.0], dtype=np.float32))
    np.testing.assert_array_equal(wild.observation[STATE_KEY], tame.observation[STATE_KEY])
    assert wild.reward == tame.reward
    with pytest.raises(ValueError, match="shape"):
        a.step(np.zeros(3))
    with pytest.raises(ValueError, match="not finite"):
        a.step(np.array([0.0, np.nan, 0.0, 0.0]))
    a.close()
    a.close()


def test_no_two_tasks_share_an_instruction_and_they_are_lerobots() -> None:
    sentences = {task: instruction(spec(task)) for task in family("metaworld").tasks()}
    assert len(sentences) == len(set(sentences.values())) == 50
    package = importlib.util.find_spec("lerobot")
    assert package is not None and package.origin is not None
    table = json.loads((Path(package.origin).parent / "envs" / "metaworld_config.json").read_text())
    differing = {task for task, text in table["TASK_DESCRIPTIONS"].items() if sentences[task] != text}
    assert differing == {"push-back-v3"}


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"unknown environment type 'metawrold'. Did you mean 'metaworld'"):
        make_simulator({"type": "metawrold", "task": "push-v3"})
    with pytest.raises(UserError, match=r"no task 'push-v2'. Did you mean 'push-v3'"):
        make_simulator(spec("push-v2"))
    with pytest.raises(UserError, match=r"unknown environment key 'tsak'. Did you mean 'task'"):
        make_simulator({"type": "metaworld", "tsak": "push-v3"})
    with pytest.raises(UserError, match="needs 'task'"):
        make_simulator({"type": "metaworld"})


def test_nothing_heavy_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys, clbench.envs.metaworld, clbench.data.info, clbench.data.make\n"
        "clbench.envs.making.instruction({'type': 'metaworld', 'task': 'push-v3'})\n"
        "heavy = {'torch', 'lerobot', 'mujoco', 'metaworld', 'gymnasium', 'datasets'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"


def test_no_import_of_envs_goes_up_or_round() -> None:
    """Not inside of functions either."""
    imports: dict[str, set[str]] = {}
    for path in (ROOT / "clbench" / "envs").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found = imports.setdefault(module, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
    below = ("envs", "errors", "io", "launch", "lock", "paths", "registry", "stopping")
    for module, found in imports.items():
        wrong = [n for n in found if n.startswith("clbench.") and n.split(".")[1] not in below]
        assert not wrong, f"{module} imports {wrong}"
    while imports:
        free = [m for m, found in imports.items() if not (found & set(imports)) - {m}]
        assert free, f"these import each other: {sorted(imports)}"
        for module in free:
            del imports[module]


def test_rendering() -> None:
    code = (
        "from clbench.envs.making import make_simulator\n"
        "from clbench.errors import UserError\n"
        "s = make_simulator({'type': 'metaworld', 'task': 'push-v3'})\n"
        "first = s.reset(0)['observation.state']\n"
        "try: image = s.render(96, 64)\n"
        "except UserError as e: print('no OpenGL:', e); raise SystemExit\n"
        "assert (s.reset(0)['observation.state'] == first).all()\n"
        "s.close()\n"
        "print(image.shape, image.dtype, image.std() > 10)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MUJOCO_GL": "egl"}
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, env=environment)
    if (done.returncode != 0 and "EGL" in done.stderr) or done.stdout.startswith("no OpenGL"):
        pytest.skip("no EGL on this machine")
    assert done.stdout.strip() == "(64, 96, 3) uint8 True", done.stderr


def test_lerobot_makes_our_environment_and_sees_our_episodes() -> None:
    from lerobot.configs.parser import load_plugin
    from lerobot.envs import make_env, make_env_config
    from lerobot.envs.utils import NEW_ROLLOUT_OPTION, check_env_attributes_and_types, preprocess_observation

    load_plugin("clbench.envs.lerobot_env")
    config = make_env_config("clbench_metaworld", task="reach-v3, handle-press-side-v3", episode_length=60)
    vectors = make_env(config, n_envs=2)["clbench_metaworld"]
    assert sorted(vectors) == [0, 1]
    env = vectors[1]
    check_env_attributes_and_types(env)
    assert env.call("task_description") == ("Press a handle down sideways",) * 2
    assert env.call("_max_episode_steps") == (60, 60)
    assert env.metadata["render_fps"] == 80

    seed = EVAL_SEED_BASE
    observation, info = env.reset(seed=[seed, seed + 1], options={NEW_ROLLOUT_OPTION: True})
    assert not info["is_success"].any()
    state = preprocess_observation(observation)[STATE_KEY]
    assert tuple(state.shape) == (2, 39)
    same = make_simulator(spec("handle-press-side-v3"))
    expert = episode_expert(spec("handle-press-side-v3"), same)
    reference = same.reset(seed)
    idle = np.zeros(4, np.float32)
    solved = False
    for step in range(60):
        np.testing.assert_array_equal(observation["agent_pos"][0], reference[STATE_KEY])
        action = np.clip(expert(reference), -1, 1)
        observation, _, terminated, truncated, info = env.step(np.stack([action, idle]))
        reference, _, solved = same.step(action)
        assert bool(terminated[0]) == solved and not terminated[1] and not truncated[0]
        assert bool(truncated[1]) == (step == 59)
        if solved:
            break
    assert solved, "the expert solves it within 60 steps"
    assert info["final_info"]["is_success"].tolist() == [True, False]
    last = observation["agent_pos"][0].copy()
    for _ in range(step + 1, 60):  # the first has ended: it waits for the second, its last state and success kept
        observation, _, terminated, truncated, info = env.step(np.stack([idle, idle]))
        np.testing.assert_array_equal(observation["agent_pos"][0], last)
    assert truncated.tolist() == [False, True] and info["final_info"]["is_success"].tolist()[1] is False
    again, _ = env.reset(seed=[seed, seed], options={NEW_ROLLOUT_OPTION: True})
    np.testing.assert_array_equal(again["agent_pos"], np.stack([same.reset(seed)[STATE_KEY]] * 2))
    for vector in vectors.values():
        vector.close()


def test_lerobots_environment_checks_its_configuration() -> None:
    from clbench.envs.lerobot_env import ClbenchMetaworldEnv

    with pytest.raises(UserError, match="no task 'pusch-v3'"):
        ClbenchMetaworldEnv(task="pusch-v3")
    with pytest.raises(UserError, match="names no task"):
        ClbenchMetaworldEnv(task=" , ")
    with pytest.raises(UserError, match="episode_length"):
        ClbenchMetaworldEnv(episode_length=501)
