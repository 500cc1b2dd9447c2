"""What a file from somebody else could try: code, paths that lead elsewhere, bombs, pipes. And failing writes."""

from __future__ import annotations

import ast
import errno
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from clbench import cli, io
from clbench.checkpoints.run_folder import (
    new_run_folder,
    read_manifest,
    results_folder,
    run_folder,
    save_checkpoint,
    whole_checkpoints,
)
from clbench.checkpoints.state import load_state, save_state
from clbench.checkpoints.training_state import StateKeeper
from clbench.config.compose import compose, compose_files, load_yaml, override, to_yaml
from clbench.config.policy_types import BUILT
from clbench.errors import UserError
from clbench.evaluation import pool
from clbench.evaluation.evaluate import run_config
from clbench.evaluation.records import CellFile
from clbench.io import read_json, read_jsonl, read_text, write_json, write_text
from clbench.metrics import load_record
from clbench.metrics.cli import main as metrics_main
from clbench.report import build_report
from clbench.report.tables import escape_latex
from clbench.training.progress import Progress
from tests.foreign import unwatched, watched
from tests.test_report import write_run


@pytest.fixture(autouse=True)
def _nothing_foreign() -> Iterator[None]:
    """No file in these tests makes clbench run its code, load a pickle or use the network, caught or not."""
    with watched() as found:
        yield
    assert not found


# ------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"success": [[0.1]], "success": [[0.9]]}', "occurs twice"),
        (b"[[NaN]]", "null for a cell"),
        (b"[[1e999]]", "larger than any number"),
        (b"[[" + b"1" * 5000 + b"]]", "not valid JSON"),
        (b"[" * 70 + b"]" * 70, "levels of nesting"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"tasks": ["\\ud800"], "success": [[1]]}', "not valid JSON"),
        (b'{"tasks": ["a\0"], "success": [[1]]}', "not valid JSON"),
        (b"\xff\xfe[\0[\0001\0]\0]\0", "not UTF-8"),
    ],
)
def test_json_that_is_refused(tmp_path: Path, content: bytes, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_record(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 500
    assert metrics_main([str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_byte_order_mark_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_bytes(b"\xef\xbb\xbf[[0.5]]")
    assert load_record(tmp_path / "m.json").success.tolist() == [[0.5]]


def test_too_large_files_are_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for read, name in ((read_json, "a.json"), (read_jsonl, "a.jsonl"), (load_record, "m.csv"), (load_yaml, "c.yaml")):
        path = tmp_path / name
        with path.open("wb") as f:
            f.truncate(2**40)  # sparse: a terabyte that takes no space
        with pytest.raises(UserError, match="larger than"):
            read(path)  # type: ignore[operator]


@pytest.mark.parametrize("read", [read_json, read_jsonl, read_text, load_record, load_yaml])
def test_only_regular_files_are_opened(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    """A pipe without a writer would block for ever; a folder, a device and an odd name are errors too."""
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "loop.json").symlink_to("loop.json")
    (tmp_path / "folder.json").mkdir()
    odd = [tmp_path / n for n in ("pipe.json", "loop.json", "folder.json", "x" * 300, "nul\0.json", "nowhere.json")]
    for path in [*odd, Path("/dev/zero")]:
        with pytest.raises(UserError):
            read(path)


def test_matrices_have_bounds(tmp_path: Path) -> None:
    wide = tmp_path / "m.json"
    wide.write_text(json.dumps([[0.5] * 1001]))
    with pytest.raises(UserError, match="more than 1000"):
        load_record(wide)
    wide.write_text("[[1" + "0" * 4000 + "]]")
    with pytest.raises(UserError, match="outside") as caught:
        load_record(wide)
    assert len(str(caught.value)) < 400  # not all of its digits


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("k,a,b\n1,0.5,0.5\n0,0.1,0.1\n", "not in order"),
        ("k,a,b\nbase,0.5,0.5\nbase,0.1,0.1\n0,0.5,0.5\n", "more than one base"),
        ("0.1_2,0.5\n0.5,0.5\n", "not a number"),
    ],
)
def test_csv_that_would_give_a_wrong_number(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        load_record(tmp_path / "m.csv")


def test_numpy_files_hold_numbers_and_no_more_than_their_size(tmp_path: Path) -> None:
    """Nothing is unpickled, and no memory is taken for what a header or an archive only claims."""

    class Marks:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(tmp_path / "was_here"), "w")

    path = tmp_path / "m.npy"
    np.save(path, np.array([[Marks()]], dtype=object))
    with pytest.raises(UserError, match="not loaded"):
        load_record(path)
    np.savez(tmp_path / "m.npz", success=np.array([[Marks()]], dtype=object))
    with pytest.raises(UserError, match="not loaded"):
        load_record(tmp_path / "m.npz")
    assert not (tmp_path / "was_here").exists()
    np.save(path, np.full((2, 2), 0.5))
    whole = path.read_bytes()
    tall = whole.replace(b"(2, 2), }" + b" " * 12, b"(2, 999999999999), }" + b" ")
    for data, message in (
        (tall, "at most 1000"),
        (whole.replace(b"(2, 2)", b"(9, 9)"), "bytes of 648"),
        (whole.replace(b"(2, 2), }" + b" " * 6, b"(True, True), }"), "at most 1000"),
        (whole[:-1], "31 bytes of 32"),
        (whole.replace(b"(2, 2)", b"((((("), "damaged"),
        (whole.replace(b"'<f8'", b"'<f9'"), "damaged"),
        (whole[:20], "damaged"),
        (b"PK\x03\x04 and no more", "damaged"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=message):
            load_record(path)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as f:
        for _ in range(65):
            f.write(bytes(2**20))
    assert (tmp_path / "bomb.npz").stat().st_size < 2**18
    with pytest.raises(UserError, match="larger than"):
        load_record(tmp_path / "bomb.npz")
    with zipfile.ZipFile(tmp_path / "bomb.npz", "a") as archive:
        archive.writestr("success.npy", whole)
    assert load_record(tmp_path / "bomb.npz").success.tolist() == [[0.5, 0.5]] * 2  # what is not used is not unpacked
    with zipfile.ZipFile(tmp_path / "bomb.npz", "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("success.npy", tall)
    with pytest.raises(UserError, match="several called success"):
        load_record(tmp_path / "bomb.npz")


# --------------------------------------------------------------------------------------------- configurations

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "alias"),
        ("algorithm: &a\n  b: *a\n", "alias"),
        ("train: {steps: !!python/object/apply:os.system ['true']}\n", "tag"),
        ("train: !!int 5\n", "tag"),
        ("log: {project: '${oc.env:PATH}'}\n", "refers to another value"),
        ("train: {steps: '${pretrain.steps}'}\n", "refers to another value"),
        ("log: {'${oc.env:PATH}': 1}\n", "refers to another value"),
        ("algorithm: " + "{a: " * 30 + "1" + "}" * 30, "levels of nesting"),
        ("algorithm: " + "[" * 50_000, "levels of nesting"),
        ("train: {steps: " + "9" * 5000 + "}", "5000 digits"),
        ("train: {steps: 0x" + "f" * 9000 + "}", "digits"),
        ("train: {steps: " + "9" * 500 + "}", "train.steps"),
        ("algorithm: {strength: .nan}", "algorithm.strength"),
        ('output_dir: "a\\0b"\n', "not allowed in text"),
        ('output_dir: "\\ud800"\n', "not allowed in text|invalid Unicode character"),
        ("seed: 1\0\n", "not valid YAML"),
        ("dataset: {tasks: [[a], b]}\n", "dataset.tasks must be a list of names"),
        ("dataset: {pretrain: {tasks: [{a: 1}]}}\n", "list of names"),
        ("eval: {views: [[a]]}\n", "eval.views"),
        ("train: {optimizer: {betas: [[], []]}}\n", "list of numbers"),
        ("false\n", "mapping"),
        ("just text\n", "mapping"),
    ],
)
def test_configuration_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    whole, path = tmp_path / "whole.yaml", tmp_path / "c.yaml"
    whole.write_text(to_yaml(compose(model="dit_dec_tiny", algorithms=["er"], dataset="metaworld_quick")[0]))
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        compose_files([str(whole), str(path)])
    assert len(str(caught.value)) < 1000
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError):
        run_config(tmp_path)


def test_the_command_line_may_refer_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Overrides are the user's own words; a secret is still not written down."""
    monkeypatch.setenv("CLBENCH_PROJECT", "mine")
    config, _ = compose(model="dit_dec_tiny", algorithms=["er"], dataset="metaworld_quick")
    assert override(config, ["log.project=${oc.env:CLBENCH_PROJECT}"]).log.project == "mine"
    assert override(config, ["train.steps=${pretrain.steps}"]).train.steps == config.pretrain.steps
    for bad in ("train.steps=*a", "train.steps=!!python/name:os.system", "log.project=${", "a=" + "[" * 5000):
        with pytest.raises(UserError):
            override(config, [bad])


def test_an_experiment_cannot_write_elsewhere(tmp_path: Path) -> None:
    from clbench.sweep import load_experiment

    path = tmp_path / "e.yaml"
    for text in (
        "name: ../../evil\nalgorithms: [er]\n",
        "name: e\nalgorithms: [{algo: er, label: ../../evil}]\n",
        "name: e\nalgorithms: [{algo: er, overrides: 'seed=1'}]\n",
        "name: e\nalgorithms: [er]\noverrides: [[a]]\n",
        "name: e\nalgorithms: [er]\noverrides: ['log.project=${oc.env:PATH}']\n",
    ):
        path.write_text(text)
        with pytest.raises(UserError):
            load_experiment(str(path))


@pytest.mark.parametrize(
    "overrides",
    [
        """overrides: ['log.project="x-\\x24{oc.env:SECRET_OF_MINE}"']""",
        """algorithms: [{algo: er, overrides: ['log.project="x-\\x24{oc.env:SECRET_OF_MINE}"']}]""",
        """overrides: ['policy={note: ["\\u0024{oc.env:SECRET_OF_MINE}"]}']""",
        "overrides:\n- |-\n  log.project=\"x$\\\n  {oc.env:SECRET_OF_MINE}\"",
        """overrides: ['algorithm.name="\\x24{model}"']""",
    ],
)
def test_an_experiment_cannot_read_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: str
) -> None:
    """An override is YAML inside of YAML: what is no reference in the file may be one when it is read again."""
    from clbench.sweep import load_experiment

    monkeypatch.setenv("SECRET_OF_MINE", "do-not-tell")
    path = tmp_path / "e.yaml"
    path.write_text("name: e\n" + ("" if "algorithms" in overrides else "algorithms: [er]\n") + overrides + "\n")
    with pytest.raises(UserError, match="refers to another value") as e:
        load_experiment(str(path))
    assert "do-not-tell" not in str(e.value)


# ------------------------------------------------------------------------------------------------ run folders


@pytest.mark.parametrize(
    "run_id", ["", ".", "..", "../x", "a/b", "a\\b", "a\0b", "a\nb", "\x1b[2J", "x" * 300, "é" * 150]
)
def test_run_ids_are_plain_names(run_id: str) -> None:
    with pytest.raises(UserError, match="plain folder name"):
        results_folder(run_id, None)


@pytest.mark.parametrize("run_id", ["reports", "sweeps", "Reports"])
def test_runs_are_not_called_like_other_folders(run_id: str) -> None:
    with pytest.raises(UserError, match="folder of that name is for"):
        results_folder(run_id, None)


def test_links_that_leave_a_run_are_refused(tmp_path: Path) -> None:
    """Appending an episode, a log line or a report would otherwise write to where they point."""
    run = write_run(tmp_path)
    (run / "inside").symlink_to("log.jsonl")
    assert run_folder(run) == run
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (run / "wandb").mkdir()
    (run / "wandb" / "debug-core.log").symlink_to(victim)  # others' files are not looked at
    (run / "up").symlink_to(Path("../.."))
    assert run_folder(run) == run
    for place, target in (
        ("eval/cells/k09_j09.jsonl", victim), ("report", tmp_path), ("checkpoints", Path("../..")),
        (".training.lock", victim),
        ("eval/views", Path("../wandb")), ("checkpoints", Path(".")),  # by way of others' files, in the folder or not
    ):  # fmt: skip
        link = run / place
        link.symlink_to(target)
        for use in (
            lambda: run_folder(run),
            lambda: build_report([run]),
            lambda: new_run_folder(run.name, str(tmp_path), True),
        ):
            with pytest.raises(UserError, match="outside the run's folder"):
                use()
        link.unlink()
    (tmp_path / "elsewhere").symlink_to(run)  # the run's folder itself may be a link
    assert run_folder(tmp_path / "elsewhere").resolve() == run
    assert victim.read_text() == "mine"


COLUMN = {"task": "a", "instruction": "do a", "env": {"type": "metaworld", "task": "a", "max_steps": 200}}
MANIFEST = {"visits": [COLUMN], "checkpoints": ["a"], "mode": "sequential", "base": {"path": "/b"}}


@pytest.mark.parametrize(
    "change",
    [
        {"visits": [3]},
        {"visits": [{**COLUMN, "env": {}}]},
        {"visits": [{**COLUMN, "task": None}]},
        {"visits": [{**COLUMN, "env": {"type": "metaworld", "task": "a", "max_steps": 10**12}}]},
        {"visits": [{**COLUMN, "env": {"type": "metaworld", "task": "a", "max_steps": True}}]},
        {"visits": [COLUMN] * 1001},
        {"heldout": [{}]},
        {"mode": "diagonal"},
        {"base": {"path": 5}},
        {"base": {"path": "a\0b"}},
    ],
)
def test_manifests_are_checked_before_they_are_used(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    assert read_manifest(tmp_path) == MANIFEST
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST | change))
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        read_manifest(tmp_path)


def test_manifests_say_the_order_of_their_visits(tmp_path: Path) -> None:
    columns = [{**COLUMN, "k": k, "task": t} for k, t in enumerate("ab")]
    good = MANIFEST | {"visits": columns, "checkpoints": ["a", "b"]}
    swapped = columns[::-1]
    for change, message in (
        ({}, ""),
        ({"visits": swapped}, "'visits' are out of order: 'b' is in place 0 but says that it is number 1"),
        ({"heldout": swapped}, "'heldout' are out of order"),
        ({"checkpoints": ["b", "a"]}, "in different orders"),
        ({"visits": [{n: v for n, v in c.items() if n != "k"} for c in swapped]}, "in different orders"),
    ):
        (tmp_path / "manifest.json").write_text(json.dumps(good | change))
        if message:
            with pytest.raises(UserError, match=message):
                read_manifest(tmp_path)
        else:
            read_manifest(tmp_path)


@pytest.fixture
def three_checkpoints(tmp_path: Path) -> Path:
    """A run folder as far as checkpoints are found and checked in it."""
    columns = [{**COLUMN, "k": k, "task": t} for k, t in enumerate("abc")]
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST | {"visits": columns, "checkpoints": list("abc")}))
    for k in range(3):

        def fill(folder: Path, k: int = k) -> dict[str, Any]:
            (folder / "policy").mkdir()
            (folder / "policy" / "config.json").write_text('{"type": "dit_dec"}')
            return {"task": "abc"[k], "number": k}

        save_checkpoint(tmp_path, k, fill, lambda: 0)
    return tmp_path


def test_checkpoints_in_anothers_place_are_refused(
    three_checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = three_checkpoints
    task = [run / "checkpoints" / f"task_{k:02d}" for k in range(3)]
    assert whole_checkpoints(run) == 3 and cli._init_from(f"{run}:0") == str(task[0] / "policy")
    shutil.move(task[0], run / "kept")
    shutil.copytree(task[2], task[0])
    for use in (lambda: whole_checkpoints(run), lambda: cli._init_from(f"{run}:0")):
        with pytest.raises(UserError, match=r"task_00 is damaged \(it is a copy of task_02\)"):
            use()
    shutil.rmtree(task[0])
    shutil.move(run / "kept", task[0])
    shutil.rmtree(task[2])
    shutil.copytree(task[1], task[2])  # the last one is made again
    assert whole_checkpoints(run) == 2 and "(it is a copy of task_01); it will be made again" in capsys.readouterr().err
    shutil.rmtree(task[2])
    save_checkpoint(run, 2, lambda folder: {"task": "b"}, lambda: 0)  # of a run in another order
    assert whole_checkpoints(run) == 2 and "it learned b, but visit 2 is c" in capsys.readouterr().err


def test_training_states_in_anothers_place_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keeper = StateKeeper(tmp_path, None, None)
    for step in (4, 8):
        keeper.save(1, "train", step, step, lambda folder: {}, lambda: 0)
    states = tmp_path / "training_state"
    shutil.rmtree(states / "01-train-000008")
    shutil.copytree(states / "01-train-000004", states / "01-train-000008")
    (states / "LATEST").unlink()
    os.mkfifo(states / "LATEST")  # must not block
    found = keeper.newest(1)
    assert found is not None and found.step == 4
    assert "000008 is damaged (it is a copy of 01-train-000004)" in capsys.readouterr().err
    shutil.rmtree(states / "01-train-000004")
    assert keeper.newest(1) is None


@pytest.mark.parametrize(
    "row", [{}, {"episode": 0}, {"episode": 0, "success_once": "yes"}, {"episode": True, "success_once": 1}]
)
def test_episode_records_are_checked(tmp_path: Path, row: dict[str, Any]) -> None:
    path = tmp_path / "cells/k00_j00.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="not an episode record"):
        CellFile(tmp_path, 0, 0)


# ------------------------------------------------------------------------------------------------ checkpoints


def test_every_changed_bit_of_a_state_is_noticed(tmp_path: Path) -> None:
    save_state(tmp_path, "s", {"a": torch.arange(3), 1: [None, 2.5]})
    for name in ("s.json", "s.safetensors"):
        good = (tmp_path / name).read_bytes()
        for i in range(len(good)):
            if good[i : i + 1].isspace():
                continue  # white space of JSON
            (tmp_path / name).write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :])
            with pytest.raises(UserError):
                load_state(tmp_path, "s")
        (tmp_path / name).write_bytes(good)
    state = load_state(tmp_path, "s")
    assert state["a"].tolist() == [0, 1, 2] and state[1] == [None, 2.5]


def test_a_state_without_a_checksum_is_still_read(tmp_path: Path) -> None:
    save_state(tmp_path, "s", {"a": torch.arange(3)})
    (tmp_path / "s.json").write_text('{"d": [["a", {"t": "/a"}]]}')
    assert load_state(tmp_path, "s")["a"].tolist() == [0, 1, 2]
    for bad in (
        '{"d": []}',
        '{"d": [["a", {"t": "/a"}], ["b", {"t": "/a"}]]}',
        '{"v": [1]}',
        "[]",
        '{"d": [[[], {"v": 1}]]}',
    ):
        (tmp_path / "s.json").write_text(bad)
        with pytest.raises(UserError, match="does not match"):
            load_state(tmp_path, "s")


def test_a_header_cannot_claim_more_than_its_file(tmp_path: Path) -> None:
    save_state(tmp_path, "s", {})
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**9, 10**3], "data_offsets": [0, 4 * 10**12]}}).encode()
    (tmp_path / "s.json").write_text('{"t": "a"}')
    for data in (len(header).to_bytes(8, "little") + header, (10**15).to_bytes(8, "little"), b""):
        (tmp_path / "s.safetensors").write_bytes(data)
        with pytest.raises(UserError, match=r"s\.safetensors"):
            load_state(tmp_path, "s")
    (tmp_path / "s.safetensors").unlink()
    os.mkfifo(tmp_path / "s.safetensors")
    with pytest.raises(UserError, match="not a regular file"):
        load_state(tmp_path, "s")


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory: pytest.TempPathFactory, toy_data: Path) -> Path:
    from clbench.checkpoints.policy_io import save_policy
    from tests.test_policies import build

    folder = tmp_path_factory.mktemp("policy")
    save_policy(build("dit_dec", toy_data), folder)
    return folder


def test_a_checkpoint_cannot_run_programs(policy_folder: Path, tmp_path: Path) -> None:
    """LeRobot imports and calls what a processor step's "class" names."""
    from clbench.checkpoints.policy_io import load_policy

    load_policy(policy_folder)
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        folder = tmp_path / name
        shutil.copytree(policy_folder, folder)
        described = json.loads((folder / name).read_text())
        proof = tmp_path / "it-ran"
        step = {"class": "subprocess.Popen", "config": {"args": ["touch", str(proof)]}}
        for steps in ([step], [{**step, "registry_name": "device_processor"}], [{"registry_name": 3}], 5):
            (folder / name).write_text(json.dumps(described | {"steps": steps}))
            with pytest.raises(UserError, match=name):
                load_policy(folder)
        described["steps"][0]["state_file"] = "../elsewhere.safetensors"
        (folder / name).write_text(json.dumps(described))
        with pytest.raises(UserError, match="state_file"):
            load_policy(folder)
        assert not proof.exists()


@pytest.mark.parametrize(
    "content", ["[]", "5", "{", '{"type": "dit_dec", "d_model": "wide"}', '{"type": 5}', "null", "[" * 5000]
)
def test_a_damaged_policy_configuration_is_one_message(policy_folder: Path, tmp_path: Path, content: str) -> None:
    from clbench.checkpoints.policy_io import load_policy

    folder = tmp_path / "p"
    shutil.copytree(policy_folder, folder)
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError):
        load_policy(folder)


def test_an_adapter_cannot_claim_memory_or_bring_a_pickle(policy_folder: Path, tmp_path: Path) -> None:
    from clbench.checkpoints.policy_io import load_policy

    folder = tmp_path / "adapter"
    shutil.copytree(policy_folder, folder)
    (folder / "model.safetensors").unlink()
    weights = folder / "adapter_model.safetensors"
    lora = {"peft_type": "LORA", "base_model_name_or_path": str(policy_folder), "target_modules": ".*ffn.*", "r": 4}
    clare = {"peft_type": "CLARE", "base_model_name_or_path": str(policy_folder), "target_modules": ".*ffn"}

    def refused(config: Any, message: str) -> None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=message):
            load_policy(folder)

    torch.save({}, folder / "adapter_model.bin")
    refused(lora, "adapter_model.safetensors")  # not the pickle beside it
    tensors = {f"base_model.model.{n}.lora_A.weight": torch.zeros(4, 8) for n in "xy"}
    save_file(tensors, weights)
    refused(lora | {"r": 10**12}, "claims a rank")
    refused(lora | {"rank_pattern": {"x": 10**12}}, "claims a rank")
    refused(clare | {"structure": {"ffn.0": [10**12, 10**12]}}, "two counts")
    refused(clare | {"structure": {"ffn.0": [9000, 9000]}}, "claims more")
    refused(clare | {"structure": {"ffn.0": [1, 1]}, "func_adapter_cfg": {"hidden_dim": 10**9}}, "claims more")
    refused(clare | {"structure": {"ffn.0": 5}}, "two counts")
    refused([], "not a JSON object")
    refused(lora | {"base_model_name_or_path": 5}, "names no base")
    refused(lora | {"base_model_name_or_path": "../nowhere"}, "was not found")


def test_a_policy_cannot_claim_memory(policy_folder: Path, tmp_path: Path) -> None:
    from clbench.checkpoints.policy_io import load_policy

    folder = tmp_path / "p"
    shutil.copytree(policy_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    for change in ({"d_model": 40_000}, {"decoder_layers": 60_000}, {"text_vocab_size": 10**9}, {"chunk_size": 10**9}):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError):
            load_policy(folder)
    assert load_file(folder / "model.safetensors")


def test_the_guard_of_these_tests_sees_what_it_should(policy_folder: Path, tmp_path: Path) -> None:
    import pickle
    import socket

    from transformers import AutoTokenizer

    code = tmp_path / "theirs.py"
    code.write_text("1")
    (tmp_path / "p.pkl").write_bytes(pickle.dumps(Path))
    torch.save({}, tmp_path / "t.pt")
    attempts: list[Callable[[], object]] = [
        lambda: exec(compile(code.read_text(), code, "exec")),
        lambda: pickle.loads((tmp_path / "p.pkl").read_bytes()),
        lambda: torch.load(tmp_path / "t.pt", weights_only=False),
        lambda: socket.create_connection(("localhost", 9)),
        lambda: subprocess.run(["true"], check=True),
        lambda: AutoTokenizer.from_pretrained(str(tmp_path), trust_remote_code=True),
    ]
    for attempt in attempts:
        with watched() as found, pytest.raises(PermissionError):
            attempt()
        assert len(found) == 1
    assert torch.load(tmp_path / "t.pt") == {}


STEPS: list[tuple[str, dict[str, Any], str]] = [
    ("action_tokenizer_processor", dict.fromkeys(("action_tokenizer_name", "paligemma_tokenizer_name"), "HERE"),
     "has no step"),
    ("tokenizer_processor", {"tokenizer_name": "someone/tokenizer"}, "has no step"),
    ("reward_classifier_processor", {"pretrained_path": "HERE"}, "has no step"),
    ("clbench_hashed_words", {"max_words": 10**9}, "with 'max_words' = 1000000000"),
    ("device_processor", {"device": "cpu", "tokenizer_name": "HERE"}, "with 'tokenizer_name' = "),
]  # fmt: skip


@pytest.mark.parametrize(("step", "settings", "message"), STEPS)
def test_only_steps_of_the_policys_own_factory_are_built(
    policy_folder: Path, tmp_path: Path, step: str, settings: dict[str, Any], message: str
) -> None:
    from clbench.checkpoints.policy_io import load_policy

    folder = copied(policy_folder, tmp_path / "p")
    settings = {k: str(folder / "model") if v == "HERE" else v for k, v in settings.items()}
    with_code(folder / "model")
    file = folder / "policy_preprocessor.json"
    described = json.loads(file.read_text())
    described["steps"].append({"registry_name": step, "config": settings})
    file.write_text(json.dumps(described))
    with pytest.raises(UserError, match=message) as caught:
        load_policy(folder)
    assert str(file) in str(caught.value) and f"--trust {folder}" in str(caught.value)


def copied(folder: Path, to: Path, **changes: Any) -> Path:
    """A copy of a policy folder, with other settings in its config.json."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | changes))
    return to


def with_code(folder: Path) -> None:
    """Make a folder that transformers, when it trusts it, takes Python code from."""
    folder.mkdir()
    (folder / "theirs.py").write_text("raise SystemError('imported')\n")
    maps = dict.fromkeys(("AutoConfig", "AutoModel", "AutoProcessor", "AutoTokenizer"), "theirs.T")
    for name in ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps({"model_type": "theirs", "processor_class": "T", "auto_map": maps}))


# Types and the settings that lead to code or a hub; the last is of no type at all.
TYPES: list[dict[str, Any]] = [
    {"type": "gaussian_actor", "vision_encoder_name": "HERE"},
    {"type": "pi0_fast", "action_tokenizer_name": "HERE", "text_tokenizer_name": "HERE"},
    {"type": "eo1", "vlm_base": "HERE"},
    {"type": "multi_task_dit"},
    {"type": "groot", "base_model_path": "HERE"},
    {"type": "smolvla", "vlm_model_name": "HERE"},
    {"type": "of_a_plugin"},
]


def foreign(policy_folder: Path, to: Path, settings: dict[str, Any]) -> Path:
    folder = copied(policy_folder, to)
    with_code(folder / "model")
    features = {
        "input_features": {"observation.state": {"type": "STATE", "shape": [39]},
                           "observation.image": {"type": "VISUAL", "shape": [3, 64, 64]}},
        "output_features": {"action": {"type": "ACTION", "shape": [4]}},
    }  # fmt: skip
    settings = {k: str(folder / "model") if v == "HERE" else v for k, v in settings.items()}
    (folder / "config.json").write_text(json.dumps({**features, **settings}))
    return folder


@pytest.mark.parametrize("settings", TYPES, ids=lambda s: s["type"])
def test_a_policy_type_that_may_run_or_fetch_anything_wants_trust(
    policy_folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    from clbench.checkpoints.policy_io import load_policy

    folder = foreign(policy_folder, tmp_path / "p", settings)
    with pytest.raises(UserError, match=settings["type"]) as caught:
        load_policy(folder)
    assert f"--trust {folder}" in str(caught.value)


def test_trust_is_for_the_folder_that_the_user_names(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then, and only then, does LeRobot get to do what such a type does."""
    from clbench.checkpoints.policy_io import load_policy
    from clbench.checkpoints.trusted import given, trusting

    mine = foreign(policy_folder, tmp_path / "mine", TYPES[0])
    other = foreign(policy_folder, tmp_path / "mine-not", TYPES[0])
    with trusting([str(mine)]):
        with pytest.raises(UserError, match="--trust"):
            load_policy(other)
        with watched() as found, pytest.raises(UserError, match="cannot load the policy"):
            load_policy(mine)
        assert found and "trust_remote_code" in found[0]
    with trusting(["gaussian_actor"]), pytest.raises(UserError, match="--trust"):  # that is for fresh policies
        load_policy(mine)
    (tmp_path / "smolvla").mkdir()
    monkeypatch.chdir(tmp_path)
    with trusting(["smolvla"]):  # it can mean either
        assert given().types == ("smolvla",) and given().folders == (str(tmp_path / "smolvla"),)
    assert not given().folders and not given().types
    for bad in ("nowhere", "", "smolvl", "dit_dec"):
        with pytest.raises(UserError, match="no checkpoint folder, run or policy type"), trusting([bad]):
            pass


def test_no_file_can_say_what_is_trusted(policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clbench.checkpoints.policy_io import load_policy

    folder = foreign(policy_folder, tmp_path / "p", TYPES[0] | {"trust": "p", "trust_remote_code": True})
    monkeypatch.setenv("CLBENCH_TRUST", str(folder))
    monkeypatch.setenv("HF_TRUST_REMOTE_CODE", "1")
    with pytest.raises(UserError, match="--trust"):
        load_policy(folder)
    with pytest.raises(UserError, match="unknown key"):
        compose(model="dit_dec_tiny", algorithms=["er"], dataset="metaworld_quick", overrides=[f"trust={folder}"])


def test_an_adapter_is_built_over_no_base_that_wants_trust(policy_folder: Path, tmp_path: Path) -> None:
    """The adapter's configuration decides the type of both, so trusting the adapter is not enough."""
    from clbench.checkpoints.policy_io import load_policy
    from clbench.checkpoints.trusted import trusting

    adapter = foreign(policy_folder, tmp_path / "adapter", TYPES[1])
    described = {"peft_type": "LORA", "base_model_name_or_path": str(policy_folder), "target_modules": ".*ffn.*"}
    (adapter / "adapter_config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=f"--trust {adapter}"):
        load_policy(adapter)
    with trusting([str(adapter)]), pytest.raises(UserError, match=f"--trust {policy_folder}"):
        load_policy(adapter)


@pytest.mark.parametrize(
    "settings",
    [
        {"peft_type": "LORA", "megatron_config": {"a": 1}, "megatron_core": "transformers.theirs"},
        {"peft_type": "LORA", "arrow_config": {"task_adapter_names": ["someone/adapter"]}},
        {"peft_type": "LORA", "init_lora_weights": "lora_ga", "lora_ga_config": {}},
        {"peft_type": "LORA", "corda_config": {"cache_file": "pickle"}},
        {"peft_type": "XLORA", "adapters": {"0": "someone/adapter"}},
        {"peft_type": "PROMPT_TUNING", "tokenizer_name_or_path": "someone/tokenizer"},
        {"peft_type": ["LORA"]},
        {},
    ],
    ids=str,
)
def test_an_adapter_cannot_import_or_load_other_files(
    policy_folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    from clbench.checkpoints.policy_io import load_policy

    folder = copied(policy_folder, tmp_path / "p")
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(4, 8)}, folder / "adapter_model.safetensors")
    described = {"base_model_name_or_path": str(policy_folder), "target_modules": ".*ffn.*", "r": 4, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="--trust"):
        load_policy(folder)


def test_pefts_own_loader_needs_nothing_but_the_folder(policy_folder: Path, tmp_path: Path) -> None:
    """A LoRA that names whole modules by the ends of their names goes through PeftModel.from_pretrained."""
    import peft

    from clbench.checkpoints.policy_io import load_policy
    from clbench.checkpoints.trusted import LORA_DEFAULTS, LORA_SETTINGS

    base = load_policy(policy_folder).policy
    linear = [n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)]
    config = peft.LoraConfig(r=2, target_modules=[linear[0]], modules_to_save=[linear[-1].split(".", 1)[1]])
    adapted = peft.PeftModel(base, config)  # type: ignore[arg-type]
    folder = copied(policy_folder, tmp_path / "adapter", use_peft=True)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    described = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(described | {"base_model_name_or_path": str(policy_folder)}))
    (folder / "model.safetensors").unlink()
    assert type(load_policy(folder).policy) is peft.PeftModel
    for key, value in described.items():  # what PEFT writes by default is allowed, in this version of it too
        fine = key in LORA_SETTINGS or not value or LORA_DEFAULTS.get(key) == value
        assert fine or (key, value) == ("init_lora_weights", True), key


def test_types_that_are_built_make_steps_without_loaders_and_null_settings() -> None:
    """What `BUILT` promises, of the installed LeRobot: see tests/test_loaders.py for the rest."""
    from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
    from lerobot.policies import make_pre_post_processors

    from clbench.checkpoints import trusted
    from tests.test_loaders import GUARDS

    loaders = {place.rsplit(":")[1].split(".")[0] for place in GUARDS}
    weights = set()
    for kind, null in BUILT.items():
        config = PreTrainedConfig.get_choice_class(kind)()
        config.input_features = {"observation.state": PolicyFeature(FeatureType.STATE, (39,))}
        config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (4,))}
        for pipeline in make_pre_post_processors(config):
            assert all(type(step).__name__ not in loaders for step in pipeline.steps), kind
        assert all(getattr(config, key) is None for key in null), kind
        weights |= {(kind, getattr(config, trusted.BACKBONE_WEIGHTS, None))}
    assert {kind for kind, named in weights if named is not None} == set(trusted.BACKBONE_TYPES)
    assert {named for _, named in weights} == {None, trusted.BACKBONE_DEFAULT}


def test_a_checkpoint_with_a_backbone_fetches_no_weights(toy_data: Path, tmp_path: Path) -> None:
    """LeRobot's default names torchvision's weights, which the checkpoint's own replace."""
    from clbench.checkpoints.policy_io import load_policy, save_policy
    from tests.test_policies import build

    small = {"chunk_size": 4, "n_action_steps": 2, "dim_model": 32, "n_heads": 2, "dim_feedforward": 32,
             "n_encoder_layers": 1, "n_decoder_layers": 1, "n_vae_encoder_layers": 1, "latent_dim": 4}  # fmt: skip
    saved = build("act", toy_data, images=True, small=small, pretrained_backbone_weights=None)
    save_policy(saved, tmp_path / "act")
    described = json.loads((tmp_path / "act" / "config.json").read_text())
    named = {"pretrained_backbone_weights": "ResNet18_Weights.IMAGENET1K_V1"}
    (tmp_path / "act" / "config.json").write_text(json.dumps(described | named))
    loaded = load_policy(tmp_path / "act")
    assert loaded.policy.config.pretrained_backbone_weights == "ResNet18_Weights.IMAGENET1K_V1"  # as it was written
    a, b = saved.policy.state_dict(), loaded.policy.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize(
    ("policy", "images", "line"),
    [
        ({"type": "dit_dec"}, True, None),
        ({"type": "act"}, False, None),
        ({"type": "act", "pretrained_backbone_weights": None}, True, None),
        ({"type": "act", "pretrained_backbone_weights": "W"}, True, "W is fetched from download.pytorch.org"),
        ({"type": "act"}, True, UserError),
        ({"type": "smolvla"}, True, "policy type 'smolvla' fetches"),
    ],
    ids=str,
)
def test_what_a_fresh_policy_fetches_is_named_or_said(policy: dict[str, Any], images: bool, line: Any) -> None:
    from clbench.checkpoints.trusted import check_start, fetched, trusting

    with trusting(["smolvla"]):
        check_start(policy)
        if line is UserError:
            with pytest.raises(UserError, match="pretrained_backbone_weights=null"):
                fetched(policy, images)
        else:
            said = fetched(policy, images)
            assert said == line if line is None else said is not None and said.startswith(line)
    if policy["type"] == "smolvla":
        with pytest.raises(UserError, match="--trust smolvla"):
            check_start(policy)


def test_a_fresh_policy_of_a_trusted_type_is_built_and_what_it_fetches_said(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from clbench.checkpoints.trusted import trusting
    from clbench.stopping import stoppable
    from clbench.testing.toy import toy_config
    from clbench.training.backend import Backend
    from clbench.training.pretrain import ensure_base

    monkeypatch.setenv("CLBENCH_CACHE_ROOT", str(tmp_path))
    config = toy_config(toy_data, {"name": "seqfft"})
    config.policy = {"type": "eo1", "vlm_base": "someone/model"}
    backend = Backend(config.train)
    with stoppable() as stop:
        with pytest.raises(UserError, match="--trust eo1"):
            ensure_base(config, backend, stop)
        with trusting(["eo1"]), watched() as found, pytest.raises(UserError, match=r"not valid.*someone/model"):
            ensure_base(config, backend, stop)
    assert len(found) == 1 and "someone/model" in found[0]
    assert "policy type 'eo1' fetches models" in "".join(capsys.readouterr())


@pytest.fixture
def strangers_run(policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose last checkpoint, sealed as it should be, is of a type that runs code."""
    from clbench.checkpoints.run_folder import finished_visits, save_checkpoint

    run = write_run(tmp_path)
    monkeypatch.setenv("CLBENCH_RESULTS_ROOT", str(tmp_path))
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    config, _ = compose(model="dit_dec_tiny", algorithms=["er"], dataset="metaworld_quick")
    (run / "config.yaml").write_text(to_yaml(config))
    (run / "manifest.json").write_text(json.dumps(MANIFEST))
    shutil.rmtree(run / "eval")

    def fill(to: Path) -> dict[str, Any]:
        foreign(policy_folder, to / "policy", TYPES[0])
        return {}

    save_checkpoint(run, 0, fill, lambda: 0)
    assert finished_visits(run) == 1
    return run


def test_no_command_builds_a_strangers_policy(strangers_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from clbench.cli import main

    run, policy = strangers_run, strangers_run / "checkpoints" / "task_00" / "policy"
    base = ["--model", "checkpoint", "--dataset", "metaworld_quick"]
    fresh = ["policy.type=pi0_fast", f"policy.action_tokenizer_name={policy / 'model'}"]
    for command in (
        ["train", "--init-from", run.name],
        ["train", *base, "--", f"policy.path={policy}"],
        ["pretrain", *base, "--", f"policy.path={policy}"],
        ["pretrain", *base, "--", *fresh],
        ["train", *base, "--", *fresh],
        ["eval", "--run-id", run.name],
    ):
        assert main(command) == 2, command
        said = capsys.readouterr().err
        assert ("--trust pi0_fast" if fresh[0] in command else f"--trust {run}") in said, command


def test_a_training_state_is_built_like_any_checkpoint(strangers_run: Path) -> None:
    """Resuming loads it through the same function; the message names the run."""
    from clbench.checkpoints.policy_io import load_policy

    state = strangers_run / "training_state" / "00-train-000002"
    shutil.copytree(strangers_run / "checkpoints" / "task_00" / "policy", state / "policy")
    with pytest.raises(UserError, match=f"--trust {strangers_run}$"):
        load_policy(state / "policy")


def test_an_evaluation_process_trusts_what_its_command_does(strangers_run: Path) -> None:
    from clbench.checkpoints.trusted import given, trust, trusting
    from clbench.evaluation.rows import Weights
    from clbench.evaluation.worker import Job, Settings, play

    policy = strangers_run / "checkpoints" / "task_00" / "policy"
    job = Job(0, Weights(str(policy)), ())
    with trusting([strangers_run.name]):
        told = given()
    before = torch.get_num_threads()
    try:
        with pytest.raises(UserError, match="--trust"):
            list(play(job, Settings(None, 1, 0, "cpu", before), None))
        with watched() as found, pytest.raises(UserError, match="cannot load the policy"):
            list(play(job, Settings(None, 1, 0, "cpu", before, trust=told), None))
        assert found and "trust_remote_code" in found[0]
    finally:
        trust(type(told)())


# ----------------------------------------------------------------------------------------------------- reports

HOSTILE = """<script>alert(1)</script>"'><img src=x onerror=a()> \
\\input{/etc/passwd} % $ _ & # ~ ^ {x} `b` \x00\x1b[31m\u202e\u2028"""


class Page(html.parser.HTMLParser):
    """All tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def hostile_run(tmp_path: Path) -> Path:
    """Hostile text in every place that a report prints."""
    tasks = [HOSTILE, HOSTILE + "2"]
    run = write_run(tmp_path, routing=True, tasks=tasks)
    m = json.loads((run / "manifest.json").read_text())
    m |= dict.fromkeys(("run_id", "algorithm", "policy", "dataset", "git_revision", "data_fingerprint"), HOSTILE)
    m |= {"versions": {HOSTILE: HOSTILE}, "base": {HOSTILE: [HOSTILE]}, "command": [HOSTILE]}
    m |= {"algorithm_config": {HOSTILE: HOSTILE}, "lora": {"enabled": False, HOSTILE: HOSTILE}}
    for v in m["visits"]:
        v |= {"instruction": HOSTILE, "data": HOSTILE, "env": {HOSTILE: HOSTILE}}
    (run / "manifest.json").write_text(json.dumps(m))
    cell = run / "eval/cells/k01_j01.jsonl"
    rows = [json.loads(line) | {"routing": {HOSTILE: {"0": 3}}} for line in cell.read_text().splitlines()]
    cell.write_text("".join(json.dumps(r) + "\n" for r in rows))
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for e in log:
        e |= {"phase": HOSTILE} if e["event"] == "step" else {}
    (run / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in log))
    policy = run / "checkpoints" / "task_00" / "policy"  # which no report has to build
    policy.mkdir(parents=True, exist_ok=True)
    with_code(policy / "model")
    described = {"type": "pi0_fast", "action_tokenizer_name": str(policy / "model")}
    (policy / "config.json").write_text(json.dumps(described))
    named = run.with_name("<i>er\x1b$x$%_")  # a run id of the file system's own
    return run.rename(named)


@pytest.mark.parametrize("several", [False, True])
def test_nothing_in_a_report_is_interpreted(hostile_run: Path, several: bool) -> None:
    runs = [hostile_run]
    if several:
        runs.append(hostile_run.with_name("second"))
        shutil.copytree(*runs)
    index = build_report(runs, bootstrap=20, name=HOSTILE, command=HOSTILE)
    text = index.read_text()
    assert all(c.isprintable() or c == "\n" for c in text)
    page = Page(text)
    known = (
        "html head meta title style body h1 h2 p div table thead tbody tr th td figure img figcaption ul li b details"
    )
    assert {tag for tag, _ in page.tags} <= {*known.split(), "summary", "pre"}
    allowed = {"lang", "charset", "http-equiv", "content", "name", "class", "alt", "title", "src", "open"}
    for tag, attributes in page.tags:
        assert set(attributes) <= allowed, (tag, attributes)
        assert tag != "img" or str(attributes["src"]).startswith("data:image/png;base64,")
    assert page.text.count("<script>alert(1)</script>") >= 10  # there, as text
    latex = (index.parent / "table.tex").read_text()
    body = [line for line in latex.splitlines() if not line.startswith("%")]
    commands = set(re.findall(r"\\([A-Za-z]+)", "\n".join(body)))
    assert commands <= {
        *(
            "begin",
            "end",
            "toprule",
            "midrule",
            "bottomrule",
            "pm",
            "rightarrow",
            "textbackslash",
            "textless",
            "textgreater",
        ),
        *("textasciitilde", "textasciicircum", "textasciigrave", "textbar", "ldots"),
    }
    assert "input" in latex and all(c.isprintable() for line in body for c in line)
    markdown = (index.parent / "table.md").read_text()
    assert "<" not in markdown and all(c.isprintable() for line in markdown.splitlines() for c in line)
    read_json(index.parent / "metrics.json")


def test_latex_specials_are_text() -> None:
    special = '\\ { } $ & # ^ _ ~ % < > | " ` [ ] * – − → …'
    out = escape_latex(special)
    plain = re.sub(r"\\[A-Za-z]+\{\}|\\[&%$#_{}]|\$\\?[a-z-]+\$|\{[\[\]*]\}|''|--", "", out)
    assert plain.strip() == "", plain


@pytest.mark.parametrize(
    "change",
    [
        {"event": "step", "k": 10**30, "step": 1, "loss": 1.0},
        {"event": "step", "k": 0, "step": -(10**400), "loss": 1.0},
        {"event": "step", "k": 0, "step": 1, "loss": 10**400},
        {"event": "step", "k": 0, "step": 1, "loss": -1.7e308},
        {"event": "step", "k": True, "step": 1, "loss": 1},
        {"event": "task_end", "k": 0, "seconds": 1e308, "peak_memory_mb": 1e308, "parameters_added": 10**400},
        {"event": "task_end", "k": 0, "seconds": "x", "peak_memory_mb": None, "parameters_added": []},
    ],
)
def test_odd_numbers_in_a_log_are_left_out(tmp_path: Path, change: dict[str, Any]) -> None:
    run = write_run(tmp_path)
    with (run / "log.jsonl").open("a") as f:
        f.write(json.dumps(change) + "\n")
    text = build_report([run], bootstrap=0).read_text()
    assert "inf" not in re.findall(r"<td>([^<]*)</td>", text)


@pytest.mark.parametrize(
    "routing", [{"a": {"999999999": 1}}, {"a": {"0": -1}}, {"a": {"0": "x"}}, {"a": {"٣": 1}}, {"a": 5}]
)
def test_odd_routing_is_refused(tmp_path: Path, routing: Any) -> None:
    run = write_run(tmp_path)
    cell = run / "eval/cells/k03_j00.jsonl"
    rows = [json.loads(line) | {"routing": routing} for line in cell.read_text().splitlines()]
    cell.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(UserError, match="routing"):
        build_report([run], bootstrap=0)


@pytest.mark.parametrize("change", [{"seed": [1]}, {"seed": 1.5}, {"mode": ["sequential"]}, {"mode": "other"}])
def test_odd_manifests_are_refused_by_reports(tmp_path: Path, change: dict[str, Any]) -> None:
    run = write_run(tmp_path)
    path = run / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=r"manifest\.json"):
        build_report([run], bootstrap=0)


# --------------------------------------------------------------------------------------------------- terminal

STEER = "\x1b]0;mine\x07\u202e\x9b2J\r"


def test_everything_is_printed_through_one_function() -> None:
    """`print` is called in clbench/terminal.py alone; a file that is a program (libero_*) prints for itself."""
    package = Path(io.__file__).parent
    found = []
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "print(" not in text and "print_exc" not in text:
            continue
        tree = ast.parse(text)
        programs = {id(n) for node in tree.body if isinstance(node, ast.If) for n in ast.walk(node)}
        for n in ast.walk(tree):
            called = isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "print"
            if called and id(n) not in programs:
                found.append(str(path.relative_to(package)))
            if isinstance(n, ast.Attribute) and n.attr == "print_exc":
                found.append(f"{path.relative_to(package)} (a traceback)")
    assert found == ["terminal.py"] * 2


def test_a_sweep_shows_no_escape_sequences_of_its_runs(tmp_path: Path) -> None:
    from clbench.terminal import last_line

    (tmp_path / "log").write_text(f"{STEER[:-1]}step 3\n", encoding="utf-8")
    assert last_line(tmp_path / "log").strip() == "]0;mine   2Jstep 3"


def no_steering(captured: Any) -> str:
    text = str(captured.out + captured.err)
    assert text and all(line.isprintable() for line in text.split("\n"))
    return text


def test_names_do_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    matrix = {"tasks": [f"push{STEER}\nk=0 1.00"], "split": f"test{STEER}", "run": {"privileged": f"poses{STEER}"},
              "random": None, "base": None, "success": [[0.5]]}  # fmt: skip
    cli._print_matrix(matrix)
    assert no_steering(capsys.readouterr()).count("\n") == 4  # a line break in a name makes no line
    for command, name, text in (
        ("train --yaml", "c.yaml", '"se\\e]0;mine\\aed": 1\n'),
        ("train --yaml", "v.yaml", 'train: {steps: "\\e[2J"}\n'),
        ("sweep", "e.yaml", 'name: e\nalgorithms: ["er\\e]0;mine\\a"]\n'),
        ("sweep", "o.yaml", 'name: e\nalgorithms: [er]\noverrides: ["tra\\ein=3"]\n'),
        ("metrics", "m.json", json.dumps({"success": [[0.5]], "criterion": STEER})),
        ("metrics", "m.csv", f"0.5,{STEER[:-1]}\n0.5,0.5"),
        ("report", f"run{STEER}", None),
    ):
        path = tmp_path / name
        if text is not None:
            path.write_text(text)
        for debug in ((), ("--debug",)):
            assert cli.main([*command.split(), str(path), *debug]) == 2
            no_steering(capsys.readouterr())


def test_notes_of_an_evaluation_and_progress_do_not_steer_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool._note(f"the simulator raised {STEER}")
    monkeypatch.setattr(Progress, "SECONDS", 0.0)
    for mode in ("bar", "lines"):
        progress = Progress(f"task 1 of 3 {STEER[:-1]}", 2, mode)
        progress.update(1, 0.5)
        progress.close(0.5)
    out = capsys.readouterr().err
    assert out.count("task 1 of 3") >= 3 and "\x1b]" not in out and "\x07" not in out and "\u202e" not in out


# ----------------------------------------------------------------------------------------------------- writing


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "replace", "chmod", "write"])
def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        if call == "write":

            class Full:
                def __init__(self, fd: int) -> None:
                    self.fd = fd

                def __enter__(self) -> Full:
                    return self

                def __exit__(self, *_: Any) -> None:
                    os.close(self.fd)

                write = fail

            patch.setattr(io.os, "fdopen", lambda fd, mode: Full(fd))
        else:
            patch.setattr(io.os, call, fail)
        with pytest.raises(UserError, match=r"a\.json \(14 bytes needed\): " + re.escape(os.strerror(code))):
            write_json(path, {"new": 2})
    assert read_json(path) == {"old": 1} and leftovers(tmp_path) == ["a.json"]


def test_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file/a.json", tmp_path / ("x" * 300), tmp_path / "nul\0", tmp_path):
        with pytest.raises(UserError, match="5 bytes needed"):
            write_text(path, "12345")
    with monkeypatch.context() as patch:  # a read-only folder; chmod would not stop root
        patch.setattr(
            io.tempfile, "mkstemp", lambda **_: os.open("/proc/version", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        )
        with pytest.raises(UserError, match="bytes needed"):
            write_text(tmp_path / "b", "12345")
    assert leftovers(tmp_path) == ["file"]


def test_the_folder_is_flushed_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a power cut can undo a rename that was reported as done."""
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(fd: int) -> None:
        order.append("folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "file")
        fsync(fd)
        if order[-1] == "folder" and cannot:
            raise OSError(errno.EINVAL, "this file system syncs no folders")

    def renamed(*paths: Any) -> None:
        order.append("rename")
        replace(*paths)

    monkeypatch.setattr(io.os, "fsync", synced)
    monkeypatch.setattr(io.os, "replace", renamed)
    for cannot in (False, True):  # noqa: B007 (read by `synced`)
        order.clear()
        write_text(tmp_path / "a", "x")
        assert order == ["file", "rename", "folder"]


def test_a_file_size_limit(tmp_path: Path) -> None:
    """RLIMIT_FSIZE, as a full disk: one message with the size, the old file, no temporary file."""
    code = (
        "import resource, sys\n"
        "from clbench.io import write_text\n"
        "from clbench.errors import UserError\n"
        "write_text(sys.argv[1], 'old')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "try:\n"
        "    write_text(sys.argv[1], 'x' * 50_000)\n"
        "except UserError as e:\n"
        "    print(e)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a")]
    with unwatched():
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "(50000 bytes needed): File too large" in done.stdout and done.stdout.count("\n") == 1
    assert (tmp_path / "a").read_text() == "old" and leftovers(tmp_path) == ["a"]
