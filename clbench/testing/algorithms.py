"""What must hold for every algorithm, as tests: a plugin's author runs them on a new method.

    # tests/test_my_algo.py
    from clbench.testing import AlgorithmTests, Case


    class TestMyAlgo(AlgorithmTests):
        cases = [Case("my_algo", {"strength": 10.0}), Case(["er", "my_algo"], stores_exemplars=True)]

Each case trains a policy with 20 thousand parameters on three toy tasks for some seconds. The tests cannot know whether
the method's mathematics are right: compare those with something independent (docs/add_an_algorithm.md).
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from clbench import patience
from clbench.algorithms.build import build_algorithm
from clbench.algorithms.state import restore_state
from clbench.checkpoints.kept import kept_folder, kept_steps
from clbench.checkpoints.policy_io import LoadedPolicy, load_policy
from clbench.checkpoints.run_folder import checkpoint_folder
from clbench.checkpoints.state import load_state
from clbench.data.frames import StreamFrames
from clbench.errors import Interrupted, UserError
from clbench.evaluation.rows import Weights
from clbench.evaluation.worker import Job, Settings, actors
from clbench.io import read_json, read_jsonl
from clbench.policies.view import PolicyView
from clbench.seeding import generator
from clbench.stopping import Stop
from clbench.streams.stream import build_stream
from clbench.testing.cases import Case
from clbench.testing.same import assert_same_run, files
from clbench.testing.toy import STREAM, make_toy_root, toy_config
from clbench.training.trainer import train


def weights(folder: Path, k: int) -> dict[str, torch.Tensor]:
    """The policy's state after visit k of a run."""
    state: dict[str, torch.Tensor] = load_policy(checkpoint_folder(folder, k) / "policy").policy.state_dict()
    return state


class AlgorithmTests:
    """Subclass it, name it Test…, and list `cases`."""

    cases: ClassVar[Sequence[Case]] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Every test that trains runs once per case."""
        if "case" in metafunc.fixturenames:
            grouped = metafunc.config.pluginmanager.hasplugin("xdist")  # one worker trains a case once
            name = type(self).__name__
            params = [
                pytest.param(c, id=c.label, marks=[pytest.mark.xdist_group(f"{name}-{c.label}")] if grouped else [])
                for c in self.cases
            ]
            metafunc.parametrize("case", params, scope="class")

    @pytest.fixture(scope="class")
    @classmethod
    def toy_root(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """The folder of the toy data sets."""
        return make_toy_root(tmp_path_factory.mktemp("toy"))

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _own_bases(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        """Bases go to a temporary folder, and there are no messages about slow machines."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(patience, "FIRST_S", 1e6)
            patch.setenv("CLBENCH_CACHE_ROOT", str(tmp_path_factory.mktemp("cache")))
            yield

    @pytest.fixture(scope="class")
    @classmethod
    def run(cls, case: Case, toy_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """The folder of one uninterrupted run of the case, which also keeps weights within its tasks."""
        return cls.train(case, toy_root, tmp_path_factory.mktemp("runs"), "train.keep_weights_every_steps=3")

    @staticmethod
    def train(case: Case, toy_root: Path, out: Path, *overrides: str, resume: bool = False) -> Path:
        """Train a case into OUT/run_LABEL."""
        config = toy_config(toy_root, case.section, f"output_dir={out}", *overrides, *case.overrides)
        return train(config, f"run_{case.label}", resume=resume)

    # ---- the tests ------------------------------------------------------------------------------
    def test_leaves_what_a_run_must_leave(self, case: Case, run: Path) -> None:
        """A checkpoint per visit; parameters and exemplars as the case states."""
        manifest = read_json(run / "manifest.json")
        assert [v["task"] for v in manifest["visits"]] == STREAM
        assert len(manifest["checkpoints"]) == case.visits
        ends = [r for r in read_jsonl(run / "log.jsonl") if r["event"] == "task_end"]
        assert len(ends) == case.visits
        assert all(r["parameters_trainable"] > 0 for r in ends)
        assert (sum(r["parameters_added"] for r in ends) > 0) == case.adds_parameters
        assert (ends[-1]["exemplar_bytes"] > 0) == case.stores_exemplars

    def test_learns(self, case: Case, toy_root: Path, tmp_path: Path) -> None:
        """On fixed samples, noise and timesteps, the loss after the first task is below the base's."""
        folder = self.train(case, toy_root, tmp_path, "train.steps=60", "train.optimizer.lr=3e-3")
        base = load_policy(read_json(folder / "manifest.json")["base"]["path"])
        learned = load_policy(checkpoint_folder(folder, 0) / "policy")
        task = build_stream(toy_config(toy_root, case.section, *case.overrides).dataset).columns[0]
        frames = StreamFrames([(task,)], base.policy.config)
        batch = frames.fetch(torch.tensor([[0, i] for i in range(len(frames.parts(0)[0]))]))

        def loss(loaded: LoadedPolicy) -> float:
            view = PolicyView(loaded.policy, loaded.policy, loaded.preprocessor, nullcontext)
            with torch.no_grad():
                return float(view.per_sample(batch, view.draw(len(batch["task"]), generator("test"))).mean())

        assert loss(learned) < 0.95 * loss(base)

    def test_trains_what_it_says_and_nothing_else(self, case: Case, run: Path) -> None:
        """Exactly the parameters that match `case.trains` change; with `keeps_old` no later task changes them."""
        base = load_policy(read_json(run / "manifest.json")["base"]["path"]).policy.state_dict()
        after = weights(run, 0)
        moved = set()
        for name, value in after.items():
            plain = name.replace(".base_layer.", ".")
            if plain not in base or not torch.equal(value, base[plain]):
                moved.add(name)
        said = {name for name in after if re.fullmatch(case.trains, name)}
        assert said
        assert moved == said
        if case.keeps_old:
            last = weights(run, case.visits - 1)
            assert all(torch.equal(last[n], v) for n, v in after.items())
            assert len(last) > len(after)

    def test_same_command_twice_gives_the_same_bytes(
        self, case: Case, run: Path, toy_root: Path, tmp_path: Path
    ) -> None:
        """Every byte of every checkpoint is equal, though only one of the two runs keeps weights within tasks."""
        again = self.train(case, toy_root, tmp_path)
        assert files(run / "checkpoints") == files(again / "checkpoints")

    def test_resumed_equals_uninterrupted(self, case: Case, run: Path, toy_root: Path, tmp_path: Path) -> None:
        """A run whose later checkpoints are deleted makes the same ones again."""
        copy = tmp_path / run.name
        shutil.copytree(run, copy)
        for k in range(min(1, case.visits - 1), case.visits):
            shutil.rmtree(checkpoint_folder(copy, k))
        self.train(case, toy_root, tmp_path, resume=True)
        assert_same_run(run, copy)

    @pytest.mark.parametrize("every", [3])
    def test_stopped_anywhere_and_resumed_equals_uninterrupted(
        self, case: Case, run: Path, toy_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
    ) -> None:
        """Stopped repeatedly, every few steps: in every phase, at its first, middle and last steps."""
        asked = itertools.cycle([*[""] * (every - 1), "a test"])
        monkeypatch.setattr(Stop, "reason", property(lambda self: next(asked)))
        stopped = []
        for _ in range(200):
            try:
                self.train(case, toy_root, tmp_path, resume=True)
                break
            except Interrupted as e:
                stopped.append(str(e))
        assert sum("phase" in s for s in stopped) > (2 if every == 3 else 0)
        assert_same_run(run, tmp_path / run.name)

    def test_state_survives_saving_and_loading(self, case: Case, run: Path, toy_root: Path) -> None:
        """A loaded state is saved again identically; a state that is not the algorithm's is rejected."""
        checkpoint = checkpoint_folder(run, case.visits - 1)
        state = load_state(checkpoint, "algorithm")
        config = toy_config(toy_root, case.section, *case.overrides)
        policy = load_policy(checkpoint / "policy").policy
        algorithm = build_algorithm(config)
        algorithm.restore_structure(policy, checkpoint / "policy")
        restore_state(algorithm, state, policy)

        def flat(value: Any) -> str:
            return json.dumps(value, default=lambda t: t.tolist(), sort_keys=True)

        assert flat(algorithm.state_dict()) == flat(state)
        with pytest.raises(UserError, match="state"):
            restore_state(build_algorithm(config), {"nonsense": 1}, policy)

    def test_eval_view_restores_the_policy(self, case: Case, run: Path, toy_root: Path) -> None:
        """Every byte of it, even when an evaluation fails inside."""
        checkpoint = checkpoint_folder(run, case.visits - 1)
        policy = load_policy(checkpoint / "policy").policy
        algorithm = build_algorithm(toy_config(toy_root, case.section, *case.overrides))
        algorithm.restore_structure(policy, checkpoint / "policy")
        restore_state(algorithm, load_state(checkpoint, "algorithm"), policy)
        before = {k: v.clone() for k, v in policy.state_dict().items()}
        with pytest.raises(RuntimeError, match="inside"), algorithm.eval_view(policy, 0):
            raise RuntimeError("inside")
        after = policy.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) for k in before)

    def test_weights_kept_within_a_task_can_be_played(self, case: Case, run: Path, toy_root: Path) -> None:
        """The last weights that the run kept: an evaluation loads them with the method's state, and they act."""
        k = case.visits - 1
        kept = kept_folder(run, k, kept_steps(run, k)[-1])
        assert files(kept / "policy") != files(checkpoint_folder(run, k) / "policy")
        settings = Settings(toy_config(toy_root, case.section, *case.overrides), 2, 0, "cpu", threads=1)
        job = Job(0, Weights(str(kept / "policy"), str(kept), within=True), ())
        ((actor, view, _),) = actors(job, settings)
        observation = {"observation.state": np.zeros(39, dtype=np.float32)}
        with view():
            actions, _ = actor.act([observation], ["Push the puck to a goal"], [0], [0])
        assert np.isfinite(actions).all()

    def test_checkpoints_hold_no_pickle(self, case: Case, run: Path) -> None:
        """Only JSON and safetensors, which run no code when they are read."""
        for folder in (run / "checkpoints", run / "weights"):
            kinds = {p.suffix for p in folder.rglob("*") if p.is_file()}
            assert kinds <= {".json", ".safetensors"}
            for path in folder.rglob("*.safetensors"):
                load_file(path)
