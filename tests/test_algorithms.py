"""What holds for every algorithm, driven by the table in tests/algorithm_cases.py."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clbench.algorithms.build import build_algorithm
from clbench.checkpoints.policy_io import LoadedPolicy, load_policy
from clbench.checkpoints.run_folder import checkpoint_folder
from clbench.checkpoints.state import load_state
from clbench.data.frames import StreamFrames
from clbench.errors import Interrupted
from clbench.io import read_json, read_jsonl
from clbench.policies.loss import PolicyLoss
from clbench.registry import ALGORITHMS
from clbench.seeding import generator
from clbench.stopping import Stop
from clbench.streams.stream import build_stream
from clbench.training.trainer import train
from tests.algorithm_cases import CASES, Case
from tests.same import assert_same_run, files
from tests.toy import toy_config


@pytest.fixture(
    scope="module",
    params=[pytest.param(c, marks=pytest.mark.xdist_group(f"algorithms-{c.label}")) for c in CASES],
    ids=[c.label for c in CASES],
)
def trained(
    request: pytest.FixtureRequest, toy_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Case, Path]:
    """One uninterrupted run of each case."""
    case: Case = request.param
    out = tmp_path_factory.mktemp("runs")
    config = toy_config(toy_data, case.section, f"output_dir={out}", *case.overrides)
    return case, train(config, f"run_{case.label}")


def weights(folder: Path, k: int) -> dict[str, torch.Tensor]:
    return load_policy(checkpoint_folder(folder, k) / "policy").policy.state_dict()


def test_every_registered_algorithm_has_a_case() -> None:
    assert set(ALGORITHMS) == {c.name for c in CASES if isinstance(c.name, str)}


def test_leaves_what_a_run_must_leave(trained: tuple[Case, Path]) -> None:
    case, folder = trained
    manifest = read_json(folder / "manifest.json")
    assert [v["task"] for v in manifest["visits"]] == ["hammer-v3", "push-v3", "window-close-v3"]
    assert len(manifest["checkpoints"]) == case.visits
    ends = [r for r in read_jsonl(folder / "log.jsonl") if r["event"] == "task_end"]
    assert len(ends) == case.visits
    assert all(r["parameters_trainable"] > 0 for r in ends)
    assert (sum(r["parameters_added"] for r in ends) > 0) == case.adds_parameters
    assert (ends[-1]["exemplar_bytes"] > 0) == case.stores_exemplars


def test_learns(trained: tuple[Case, Path], toy_data: Path, tmp_path: Path) -> None:
    """On fixed samples, noise and timesteps, the loss after the first task is below the base's."""
    case, _ = trained
    config = toy_config(
        toy_data, case.section, f"output_dir={tmp_path}", "train.steps=60", "train.optimizer.lr=3e-3", *case.overrides
    )
    folder = train(config, "long")
    base = load_policy(read_json(folder / "manifest.json")["base"]["path"])
    learned = load_policy(checkpoint_folder(folder, 0) / "policy")
    task = build_stream(config.dataset).columns[0]
    frames = StreamFrames([(task,)], base.policy.config)
    batch = frames.fetch(torch.tensor([[0, i] for i in range(len(frames.parts(0)[0]))]))

    def loss(loaded: LoadedPolicy) -> float:
        measure = PolicyLoss(loaded.policy, loaded.policy, loaded.preprocessor, nullcontext)
        with torch.no_grad():
            return float(measure.per_sample(batch, measure.draw(len(batch["task"]), generator("test"))).mean())

    assert loss(learned) < 0.95 * loss(base)


def test_trains_what_it_says_and_nothing_else(trained: tuple[Case, Path]) -> None:
    case, folder = trained
    base = load_policy(read_json(folder / "manifest.json")["base"]["path"]).policy.state_dict()
    after = weights(folder, 0)
    moved = set()
    for name, value in after.items():
        plain = name.replace(".base_layer.", ".")
        if plain not in base or not torch.equal(value, base[plain]):
            moved.add(name)
    said = {name for name in after if re.fullmatch(case.trains, name)}
    assert said
    assert moved == said
    if case.keeps_old:
        last = weights(folder, case.visits - 1)
        assert all(torch.equal(last[n], v) for n, v in after.items())
        assert len(last) > len(after)


def test_same_command_twice_gives_the_same_bytes(trained: tuple[Case, Path], toy_data: Path, tmp_path: Path) -> None:
    case, folder = trained
    again = train(toy_config(toy_data, case.section, f"output_dir={tmp_path}", *case.overrides), folder.name)
    assert files(folder / "checkpoints") == files(again / "checkpoints")


def test_resumed_equals_uninterrupted(trained: tuple[Case, Path], toy_data: Path, tmp_path: Path) -> None:
    case, folder = trained
    shutil.copytree(folder, tmp_path / folder.name)
    copy = tmp_path / folder.name
    for k in range(1, case.visits):
        shutil.rmtree(checkpoint_folder(copy, k))
    if case.visits == 1:
        shutil.rmtree(checkpoint_folder(copy, 0))
    train(toy_config(toy_data, case.section, f"output_dir={tmp_path}", *case.overrides), folder.name, resume=True)
    assert_same_run(folder, copy)


VARIANTS = [c.label for c in CASES if c.label != c.name]  # of settings, and combinations


@pytest.mark.slow_for(*VARIANTS)
@pytest.mark.parametrize("every", [7, pytest.param(3, marks=pytest.mark.slow)])
def test_stopped_anywhere_and_resumed_equals_uninterrupted(
    trained: tuple[Case, Path], toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """Asked to stop again and again, every few steps: in every phase, at its first steps, middle and last."""
    case, folder = trained
    asked = itertools.cycle([*[""] * (every - 1), "a test"])
    monkeypatch.setattr(Stop, "reason", property(lambda self: next(asked)))
    config = toy_config(toy_data, case.section, f"output_dir={tmp_path}", *case.overrides)
    stopped = []
    for _ in range(200):
        try:
            train(config, folder.name, resume=True)
            break
        except Interrupted as e:
            stopped.append(str(e))
    assert sum("phase" in s for s in stopped) > (2 if every == 3 else 0)
    assert_same_run(folder, tmp_path / folder.name)


def test_state_survives_saving_and_loading(trained: tuple[Case, Path], toy_data: Path) -> None:
    case, folder = trained
    state = load_state(checkpoint_folder(folder, case.visits - 1), "algorithm")
    algorithm = build_algorithm(toy_config(toy_data, case.section, *case.overrides))
    algorithm.load_state_dict(state)
    again = algorithm.state_dict()

    def flat(value: object) -> str:
        return json.dumps(value, default=lambda t: t.tolist(), sort_keys=True)

    assert flat(again) == flat(state)
    with pytest.raises(ValueError, match="state"):
        algorithm.load_state_dict({"nonsense": 1})


def test_eval_view_restores_the_policy(trained: tuple[Case, Path], toy_data: Path) -> None:
    case, folder = trained
    checkpoint = checkpoint_folder(folder, case.visits - 1)
    policy = load_policy(checkpoint / "policy").policy
    algorithm = build_algorithm(toy_config(toy_data, case.section, *case.overrides))
    algorithm.restore_structure(policy, checkpoint / "policy")
    algorithm.load_state_dict(load_state(checkpoint, "algorithm"))
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    with pytest.raises(RuntimeError, match="inside"), algorithm.eval_view(policy, 0):
        raise RuntimeError("inside")
    after = policy.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_checkpoints_hold_no_pickle(trained: tuple[Case, Path]) -> None:
    _, folder = trained
    kinds = {p.suffix for p in (folder / "checkpoints").rglob("*") if p.is_file()}
    assert kinds <= {".json", ".safetensors"}
    for path in (folder / "checkpoints").rglob("*.safetensors"):
        load_file(path)
