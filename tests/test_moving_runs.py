"""Runs that moved: other roots, another working folder, another machine; and bases that are not the run's own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from clbench.checkpoints.base import ADAPTER_BASE, find_base
from clbench.checkpoints.policy_io import load_policy
from clbench.checkpoints.run_folder import checkpoint_folder, finished_visits, read_manifest
from clbench.cli import main
from clbench.errors import UserError
from clbench.io import read_json
from clbench.testing.same import files
from clbench.testing.toy import STREAM, make_toy_data, toy_config
from clbench.training.pretrain import _images_learned_from
from clbench.training.trainer import train
from tests.algorithm_cases import SMALL_CLARE

ROOTS = ("DATA", "CACHE", "RESULTS", "MODEL")


def set_roots(patch: pytest.MonkeyPatch, home: Path) -> None:
    for name in ROOTS:
        patch.setenv(f"CLBENCH_{name}_ROOT", str(home / name.lower()))


@pytest.fixture(scope="module")
def first_home(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two runs that were started with relative paths, in a folder that is gone afterwards."""
    home = tmp_path_factory.mktemp("first")
    shutil.copytree(toy_data, home / "data")
    with pytest.MonkeyPatch.context() as patch:
        set_roots(patch, home)
        patch.chdir(home)
        for name, section in (("clare", SMALL_CLARE), ("seqfft", {})):
            small = ("train.steps=2", "pretrain.steps=2", "dataset.task_order=[0,1]", "eval.base_row=true")
            train(toy_config(Path("data"), {"name": name, **section}, *small), name)
    home.rename(home.with_name("kept"))
    yield home.with_name("kept")


@pytest.fixture
def home(first_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same on another machine, as it were."""
    there = tmp_path / "second"
    shutil.copytree(first_home, there)
    set_roots(monkeypatch, there)
    monkeypatch.chdir(tmp_path)
    return there


def base_of(home: Path) -> Path:
    (base,) = (home / "cache" / "bases").glob("dit*")
    return base


@pytest.mark.parametrize("name", ["clare", "seqfft"])
def test_a_run_that_moved_is_resumed_to_the_same_bytes(home: Path, name: str) -> None:
    run = home / "results" / name
    last = checkpoint_folder(run, 1)
    want = files(last)
    shutil.rmtree(last)
    if name == "seqfft":  # nothing of these is needed any more
        shutil.rmtree(home / "cache")
        shutil.rmtree(home / "data" / "pretrain")
    assert main(["train", "--resume", name]) == 0
    have = files(last)
    for file in want.keys() - {"checkpoint.json", "policy/adapter_config.json"}:  # time; where the base is
        assert have[file] == want[file], file
    assert len(read_manifest(run)["heldout"]) == 2


def test_an_adapter_finds_its_base_by_name(home: Path) -> None:
    policy = checkpoint_folder(home / "results" / "clare", 1) / "policy"
    weights = {k: v.clone() for k, v in load_policy(policy).policy.state_dict().items()}
    os.rename(base_of(home), home / "model_of_old")
    (home / "model").mkdir()
    named = read_json(policy / ADAPTER_BASE)["name"]
    os.rename(home / "model_of_old", home / "model" / named)
    (policy / ADAPTER_BASE).unlink()  # as an earlier version wrote it
    again = load_policy(policy).policy.state_dict()
    assert weights.keys() == again.keys() and all((weights[k] == again[k]).all() for k in weights)


def test_another_or_a_damaged_base_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = checkpoint_folder(home / "results" / "clare", 1) / "policy"
    weights = base_of(home) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match=r"a different one or damaged \(model.safetensors was changed\)"):
        load_policy(policy)
    (base_of(home) / "checkpoint.json").unlink()  # another base of that name, say
    with pytest.raises(UserError, match="its weights are not the ones used in training: sha256 "):
        load_policy(policy)
    assert main(["eval", "--run-id", "clare"]) == 2
    assert "weights are not the ones" in capsys.readouterr().err
    assert not (home / "results" / "clare" / "eval").exists()
    shutil.rmtree(base_of(home))
    with pytest.raises(UserError, match=rf"was not found\. Looked at .*{home}/cache/bases/.*CLBENCH_MODEL_ROOT"):
        load_policy(policy)


def test_a_base_that_is_another_runs_checkpoint_is_found_beside_the_run(home: Path, tmp_path: Path) -> None:
    policy = checkpoint_folder(home / "results" / "seqfft", 0) / "policy"
    hint = {"path": "/gone/results/seqfft/checkpoints/task_00/policy", "name": "policy"}
    assert find_base(hint, tmp_path, "a run is") == policy  # by the results' root
    os.rename(home / "results", tmp_path / "copied")
    assert find_base(hint, tmp_path / "copied" / "clare", "a run is").is_dir()


def test_a_given_base_may_be_anywhere(home: Path, tmp_path: Path) -> None:
    assert _images_learned_from(Path("/ckpt")) is None  # which has no three folders above it
    shutil.copytree(checkpoint_folder(home / "results" / "seqfft", 1) / "policy", tmp_path / "given")
    section = {"name": "clare", **SMALL_CLARE, "target_modules": r".*obs_encoder\.layers\.\d+\.ffn"}
    config = toy_config(home / "data", section, "train.steps=2", "dataset.task_order=[0,1]")
    config.policy = {"path": "./given"}
    run = train(config, "given")
    os.rename(tmp_path / "given", tmp_path / "models")
    (home / "model").mkdir()
    os.rename(tmp_path / "models", home / "model" / "given")
    shutil.rmtree(checkpoint_folder(run, 1))
    assert main(["train", "--resume", "given"]) == 0
    assert finished_visits(run) == 2


def test_paths_may_differ_where_what_they_name_is_the_same(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = home / "results" / "seqfft"
    shutil.rmtree(checkpoint_folder(run, 1))
    shutil.copytree(home / "data", home / "elsewhere")
    at = [f"dataset.data={home}/elsewhere/stream", f"dataset.pretrain.data={home}/elsewhere/pretrain"]
    other = make_toy_data(home / "elsewhere" / "other", STREAM, episodes=2)
    assert main(["train", "--resume", "seqfft", "--", f"dataset.data={other}"]) == 2
    assert "started with other settings: dataset.data" in capsys.readouterr().err
    assert main(["train", "--resume", "seqfft", "--", *at]) == 0
    assert read_manifest(run)["sessions"][-1]["changed"] == {}
