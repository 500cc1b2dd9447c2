"""Rollouts: outcomes depend on the episode alone; evaluation leaves no cell half done and touches no random state."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from clbench.checkpoints.policy_io import load_policy
from clbench.checkpoints.run_folder import checkpoint_folder
from clbench.envs.base import Step
from clbench.evaluation.evaluate import evaluate, wanted_cells
from clbench.evaluation.records import CellFile, build_matrix
from clbench.evaluation.seeds import RULE, EpisodeSeeds
from clbench.io import read_json, read_jsonl
from clbench.rollout.actors import PolicyActor, RandomActor
from clbench.rollout.rollout import Episode, SimulatorPool, run_episodes
from clbench.seeding import generator, seeded
from clbench.testing.toy import toy_config
from clbench.training.trainer import train
from tests import tiny_policies


class Drift:
    """A point that actions push; success when its first coordinate passes 1. Remembers nothing across resets."""

    made = 0

    def __init__(self, spec: dict[str, Any]) -> None:
        type(self).made += 1
        self.offset = float(len(spec["task"]))

    def reset(self, seed: int) -> dict[str, np.ndarray]:
        self.x = np.random.default_rng(seed).normal(size=39).astype(np.float32) * 0.1
        self.x[1] = self.offset
        return {"observation.state": self.x.copy()}

    def step(self, action: np.ndarray) -> Step:
        self.x[:4] += 0.1 * action
        return Step({"observation.state": self.x.copy()}, float(action[0]), bool(self.x[0] > 0.3))

    def render(self, width: int, height: int) -> np.ndarray:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing to free."""


def episodes(n: int, tasks: Sequence[str] = ("a", "bb"), max_steps: int = 15) -> list[Episode]:
    return [Episode((t, i), 100 + i, {"type": "x", "task": t}, f"do {t}", max_steps) for t in tasks for i in range(n)]


def outcomes(actor: Any, todo: list[Episode], slots: int, after: int = 0) -> dict[Any, tuple[Any, ...]]:
    found = run_episodes(actor, todo, SimulatorPool(Drift), slots, after)  # type: ignore[arg-type]
    return {o.episode.key: (o.success_once, o.success_at_end, o.length, round(o.total_reward, 5)) for o in found}


@pytest.fixture(scope="module", params=[1, 3])
def run(toy_data: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A run of a policy with one observation step, and of one with three."""
    out = tmp_path_factory.mktemp("run")
    steps = f"policy.n_obs_steps={request.param}"
    return train(toy_config(toy_data, {"name": "seqfft"}, f"output_dir={out}", steps), "r")


def test_an_episode_does_not_depend_on_its_companions_or_order(run: Path) -> None:
    loaded = load_policy(checkpoint_folder(run, 0) / "policy")
    todo = episodes(6)
    want = outcomes(PolicyActor(loaded, 5), todo, 5)
    assert len(want) == 12 and len(set(want.values())) > 6
    assert outcomes(PolicyActor(loaded, 5), list(reversed(todo)), 5) == want
    assert outcomes(PolicyActor(loaded, 5), todo[:1], 5) == {todo[0].key: want[todo[0].key]}
    assert outcomes(PolicyActor(loaded, 5), todo, 3) == want  # fewer at once, the same padded batch


def test_every_slot_is_used_and_simulators_are_shared() -> None:
    Drift.made = 0
    assert len(outcomes(RandomActor(4), episodes(20), 4)) == 40
    assert Drift.made <= 8


def test_no_more_simulators_are_kept_than_asked_for() -> None:
    class Counted:
        def __init__(self, spec: dict[str, Any]) -> None:
            self.task, self.closed = spec["task"], 0

        def close(self) -> None:
            self.closed += 1

    made: list[Counted] = []

    def make(spec: dict[str, Any]) -> Counted:
        made.append(Counted(spec))
        return made[-1]

    pool = SimulatorPool(make, max_idle=2)  # type: ignore[arg-type]
    first, second, third = (pool.take({"task": task}) for task in ("a", "b", "c"))
    for task, simulator in (("a", first), ("b", second)):
        pool.give_back({"task": task}, simulator)
    assert pool.take({"task": "a"}) is first
    pool.give_back({"task": "a"}, first)
    pool.give_back({"task": "c"}, third)  # b was used least recently
    assert [s.closed for s in made] == [0, 1, 0]
    assert pool.take({"task": "b"}) is not second and pool.take({"task": "c"}) is third
    pool.close()
    assert [s.closed for s in made] == [1, 1, 0, 0]


def test_steps_after_success_decide_success_at_the_end() -> None:
    class Push:
        stateful, history = False, 1

        def reset(self) -> None:
            """Stateless."""

        def act(self, observations: Any, instructions: Any, seeds: Any, calls: Sequence[int]) -> Any:
            up = np.array([1.0, 0, 0, 0], dtype=np.float32)
            chunks = [np.stack([up, up]) if c < 3 else np.stack([-up, -up]) for c in calls]
            return np.stack(chunks), {"choice": np.array([c % 2 for c in calls])}

    todo = episodes(4, ("a",), max_steps=30)
    at_once = outcomes(Push(), todo, 2)
    assert all(o[0] and o[1] and o[2] <= 6 for o in at_once.values())
    later = outcomes(Push(), todo, 2, after=12)
    assert all(o[0] and not o[1] for o in later.values())  # it moved away again
    assert {k: o[2] for k, o in later.items()} == {k: o[2] for k, o in at_once.items()}
    found = list(run_episodes(Push(), todo, SimulatorPool(Drift), 2, 0))  # type: ignore[arg-type]
    assert all(sum(o.diagnostics["choice"].values()) == -(-o.length // 2) for o in found)


def test_an_actor_with_a_history_sees_the_last_steps_and_only_these_are_drawn() -> None:
    class Seen(Drift):
        """Counts its steps, and says which of them nobody looked at."""

        unseen: ClassVar[list[int]] = []

        def reset(self, seed: int) -> dict[str, np.ndarray]:
            self.at = 0
            return {"at": np.array([0])}

        def step(self, action: np.ndarray) -> Step:
            self.at += 1
            return Step({"at": np.array([self.at])}, 0.0, False)

        def step_unseen(self, action: np.ndarray) -> Step:
            self.unseen.append(self.at + 1)
            return Step({}, self.step(action).reward, False)

    class Watching:
        stateful, history = False, 3

        def __init__(self, chunk: int) -> None:
            self.chunk, self.seen = chunk, []  # type: ignore[var-annotated]

        def reset(self) -> None:
            """Stateless."""

        def act(self, observations: Any, *rest: Any) -> Any:
            self.seen += [o["at"][:, 0].tolist() for o in observations]
            return np.zeros((len(observations), self.chunk, 4)), {}

    def played(chunk: int) -> list[list[int]]:
        Seen.unseen.clear()
        actor = Watching(chunk)
        list(run_episodes(actor, episodes(1, ("a",), 8), SimulatorPool(Seen), 1))  # type: ignore[arg-type]
        return actor.seen

    assert played(4) == [[0, 0, 0], [2, 3, 4]]
    assert Seen.unseen == [1, 5]
    assert played(2) == [[0, 0, 0], [0, 1, 2], [2, 3, 4], [4, 5, 6]]
    assert Seen.unseen == []


def test_act_with_a_mean_over_time_acts_step_by_step(tmp_path: Path) -> None:
    """Its action depends on the chunks of earlier steps, which no observation has."""
    actor = PolicyActor(tiny_policies.load("act", tmp_path, temporal_ensemble_coeff=0.01, n_action_steps=1), 3)
    assert actor.stateful and actor.steps == 1
    assert not PolicyActor(tiny_policies.load("act", tmp_path), 3).stateful


@pytest.mark.filterwarnings("ignore:To evaluate in the environment")  # VQ-BeT's codes are random here
@pytest.mark.parametrize("kind", ["diffusion", "multi_task_dit", "vqbet"])
def test_lerobots_policies_with_a_history_act_as_they_do_step_by_step(kind: str, tmp_path: Path) -> None:
    """Chunks from the last observations of every episode are what `select_action` plays, without its queues."""
    loaded = tiny_policies.load(kind, tmp_path)
    policy, config = loaded.policy.eval(), loaded.policy.config
    with torch.no_grad():
        for p in policy.parameters():  # some layers start at zero and ignore what is seen
            p.add_(0.05 * torch.randn_like(p))
    actor = PolicyActor(loaded, 3)
    assert not actor.stateful and actor.history == config.n_obs_steps == 2
    steps = [tiny_policies.batch(config, 3, seed) for seed in range(actor.steps + 1)]
    now = [actor.pre({k: v if k == "task" else v[:, -1] for k, v in b.items() if k == "task" or (k.startswith("observ")
                      and not k.endswith("_is_pad"))}) for b in steps]  # fmt: skip

    def at(i: int) -> dict[str, Any]:
        pairs = (now[max(i - 1, 0)], now[i])
        return {k: torch.stack([p[k] for p in pairs], 1) if k in config.input_features else v
                for k, v in now[i].items()}  # fmt: skip

    with torch.inference_mode():
        chunks = [actor.chunk(at(i), [1, 2, 3], [i] * 3)[:, : actor.steps] for i in (0, actor.steps)]
        policy.reset()
        for i, seen in enumerate(now):
            first = i - i % actor.steps
            inputs = dict(seen)
            with seeded("action-noise", 1, 2, 3, *[first] * 3):
                if actor._draw is None:
                    action = policy.select_action(inputs)
                else:
                    noise = torch.cat([actor._draw(1, generator("action-noise", s, first))["noise"] for s in (1, 2, 3)])
                    action = policy.select_action(inputs, noise=noise)
            assert torch.allclose(action, chunks[i // actor.steps][:, i % actor.steps], atol=1e-6), i
    assert (actor._draw is not None) == (kind == "diffusion")


class History:
    """A policy that remembers more than its observations: its action depends on how often it acted since reset."""

    class config:
        n_obs_steps = 2

    def __init__(self) -> None:
        self.calls, self.resets = 0, 0

    def predict_action_chunk(self, batch: dict[str, Any]) -> torch.Tensor:
        raise NotImplementedError

    def eval(self) -> None:
        """Nothing to switch."""

    def reset(self) -> None:
        self.calls, self.resets = 0, self.resets + 1

    def select_action(self, batch: dict[str, Any]) -> torch.Tensor:
        self.calls += 1
        assert batch["observation.state"].shape == (3, 39)
        return torch.full((3, 4), 1.0 / self.calls) + 0.01 * torch.randn(3, 4)


def test_a_policy_with_history_acts_in_lockstep() -> None:
    """All slots start together after a reset, and act one step at a time; repeatable although it draws globally."""

    class Loaded:
        policy = History()
        preprocessor = postprocessor = staticmethod(lambda x: x)

    actor = PolicyActor(Loaded(), 3)
    assert actor.stateful
    Loaded.policy.resets = 0
    todo = episodes(4, max_steps=6)
    found = list(run_episodes(actor, todo, SimulatorPool(Drift), 3))  # type: ignore[arg-type]
    assert Loaded.policy.resets == 3  # eight episodes, three at a time
    again = list(run_episodes(actor, todo, SimulatorPool(Drift), 3))  # type: ignore[arg-type]
    assert len(found) == 8
    assert [o.total_reward for o in found] == [o.total_reward for o in again]
    failed = [o for o in found if not o.success_once]  # pushed by 1 + 1/2 + … + 1/6 on the way
    assert failed and all(abs(o.total_reward - sum(1 / i for i in range(1, 7))) < 0.2 for o in failed)


@pytest.mark.parametrize(
    ("mode", "cells", "count"),
    [("sequential", "full", 9), ("sequential", "lower", 6), ("sequential", "last", 3), ("sequential", "diagonal", 3),
     ("singletask", "full", 3), ("multitask", "lower", 9)],
)  # fmt: skip
def test_which_cells(mode: str, cells: str, count: int) -> None:
    assert len(wanted_cells(mode, cells, 3, 3)) == count


def test_evaluation_in_the_real_simulator_continues_and_repeats_nothing(
    run: Path, toy_data: Path, tmp_path: Path
) -> None:
    """Meta-World in worker processes; records, matrix, extra rows; then more episodes; then nothing to do."""
    config = toy_config(toy_data, {"name": "seqfft"}, "eval.episodes=1", "eval.base_row=true", "eval.random_row=true")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    matrix = evaluate(run, config, tmp_path, progress=False)
    assert torch.equal(state, torch.get_rng_state())
    assert matrix["tasks"] == ["hammer-v3", "push-v3", "window-close-v3"]
    assert matrix["episodes"] == [[1, 1, 1]] * 3
    assert len(matrix["base"]) == len(matrix["random"]) == 3
    cell = tmp_path / "eval" / "cells" / "k01_j02.jsonl"
    (record,) = read_jsonl(cell)
    assert (record["k"], record["j"], record["episode"]) == (1, 2, 0)
    assert record["seed"] == EpisodeSeeds(RULE, "test", 0, matrix["tasks"][2]).of(0)
    assert record["length"] == 20 or record["success_once"]

    more = dataclasses.replace(
        config, eval=dataclasses.replace(config.eval, episodes=2, cells="last", base_row=False, random_row=False)
    )
    evaluate(run, more, tmp_path, progress=False)
    last = tmp_path / "eval" / "cells" / "k02_j00.jsonl"
    assert [r["episode"] for r in read_jsonl(last)] == [0, 1]
    assert read_jsonl(cell) == [record]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "eval").glob("summary.json")}
    evaluate(run, more, tmp_path, progress=False)
    assert {p: p.stat().st_mtime_ns for p in before} == before

    changed = dataclasses.replace(config, eval=dataclasses.replace(config.eval, steps_after_success=3))
    with pytest.raises(ValueError, match="other settings"):
        evaluate(run, changed, tmp_path, progress=False)


def test_repeated_tasks_share_their_episodes(toy_data: Path, tmp_path: Path) -> None:
    config = toy_config(
        toy_data, {"name": "seqfft"}, f"output_dir={tmp_path}", "dataset.task_order=[2,0,2]", "eval.cells=last"
    )
    folder = train(config, "r")
    evaluate(folder, config, progress=False)
    a, b = (read_jsonl(folder / "eval" / "cells" / f"k02_j{j:02d}.jsonl")[0] for j in (0, 2))
    assert {**a, "j": 2} == b
    assert read_json(folder / "eval" / "summary.json")["episodes"] == 2


def test_torn_records_are_redone_and_matrices_skip_empty_cells(tmp_path: Path) -> None:
    cell = CellFile(tmp_path, 0, 1)
    for e in (1, 0):
        cell.append({"k": 0, "j": 1, "episode": e, "seed": e, "success_once": e == 0, "success_at_end": False})
    with cell.path.open("a") as f:
        f.write('{"k": 0, "j": 1, "epis')
    again = CellFile(tmp_path, 0, 1)
    assert sorted(again.rows) == [0, 1]
    again.append({"k": 0, "j": 1, "episode": 2, "seed": 2, "success_once": True, "success_at_end": False})
    assert [r["episode"] for r in read_jsonl(cell.path)] == [0, 1, 2]
    matrix = build_matrix(tmp_path, ["a", "b"], [0])
    assert matrix["success"] == [[None, 2 / 3]] and matrix["episodes"] == [[0, 3]] and matrix["base"] is None


def test_an_evaluation_is_bound_to_its_checkpoints(toy_data: Path, tmp_path: Path) -> None:
    """Episodes of a run that was trained anew under the same name are not taken for the new run's."""
    import shutil

    config = toy_config(toy_data, {"name": "seqfft"}, f"output_dir={tmp_path}", "train.steps=1", "eval.cells=last")
    folder = train(config, "r")
    evaluate(folder, config, tmp_path / "elsewhere", progress=False)
    evaluate(folder, config, tmp_path / "elsewhere", progress=False)
    shutil.rmtree(folder)
    other = toy_config(toy_data, {"name": "seqfft"}, f"output_dir={tmp_path}", "train.steps=2", "eval.cells=last")
    with pytest.raises(ValueError, match=r"other settings or weights \(checkpoints\)"):
        evaluate(train(other, "r"), other, tmp_path / "elsewhere", progress=False)
