"""docs/add_a_stream.md: its streams are read, those without a simulator recorded, checked, trained and evaluated."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from clbench import cli
from clbench.config.compose import compose
from clbench.errors import UserError
from clbench.io import read_json
from clbench.listing import listing
from clbench.streams.stream import build_stream
from clbench.sweep import load_experiment, units
from clbench.testing import files, toy_config
from clbench.training.trainer import train
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "add_a_stream.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data sets that the page's programs record."""
    folder = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for program in blocks("python"):
            exec(compile(program, "record.py", "exec"), {})
    return folder


@pytest.fixture
def here(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the page's streams and recordings."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "configs" / "datasets"
    folder.mkdir(parents=True)
    for text in blocks("yaml"):
        (folder / f"{yaml.safe_load(text)['dataset']['name']}.yaml").write_text(text)
    for name in ("my_lab", "my_drawer"):
        shutil.copytree(recorded / name, tmp_path / name)
    monkeypatch.setenv("CLBENCH_RESULTS_ROOT", str(tmp_path / "results"))
    return tmp_path


SHORT = ["train.batch_size=8", "policy.d_model=16", "policy.n_heads=2", "train.device=cpu"]


def shortened(command: list[str]) -> list[str]:
    """A command of the page without its program; a training with a smaller policy and fewer steps."""
    if "train" not in command:
        return command[1:]
    assert command[-1] == "train.steps=200"
    return [*command[1:-1], "train.steps=4", *SHORT]


def test_the_pages_streams_train(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, _ = compose(model="dit_dec_tiny", algorithms=["seqfft"], dataset="my_three", registered=["seqfft"])
    assert config.dataset.env_type == "metaworld" and len(config.dataset.tasks) == 3
    listed = "\n".join(listing("streams"))
    assert "My lab's cups" in listed and "no simulator: evaluated by action errors" in " ".join(listed.split())
    commands = [line.split() for line in blocks("bash")[0].splitlines()]
    check, training, evaluation, report = (shortened(c) for c in commands if c[0] == "clbench")
    assert commands[0] == ["python", "record.py"]
    assert cli.main(check) == 0
    said = capsys.readouterr().out
    assert "task   0    10 episodes     300 frames  left: Move the cup to the left" in said
    assert "there is no simulator" in said and "not used: 0 tasks, 0 episodes" in said
    assert cli.main(training) == 0
    manifest = read_json(here / "results" / "cups" / "manifest.json")
    assert [v["task"] for v in manifest["visits"]] == ["left", "right"]
    assert [v["instruction"] for v in manifest["visits"]] == ["Move the cup to the left", "Move the cup to the right"]
    assert [v["env"] for v in manifest["visits"]] == [None, None] and manifest["privileged"] is None
    assert (here / "results" / "cups" / "checkpoints" / "task_01" / "checkpoint.json").is_file()
    assert [len(v["held_out"][0]["episodes"]) for v in manifest["visits"]] == [2, 2]
    capsys.readouterr()
    assert cli.main(["eval", "--run-id", "cups", "--curves"]) == 2
    assert "without a simulator (dataset.env: null): there is nothing to play" in capsys.readouterr().err
    assert cli.main(["report", str(here / "results" / "cups")]) == 2
    assert "nothing has been evaluated there yet" in capsys.readouterr().err
    assert cli.main(evaluation) == 0 and cli.main(report) == 0
    assert "offline action error" in capsys.readouterr().out
    assert (here / "results" / "cups" / "report" / "index.html").is_file()
    (here / "results" / "cups" / "checkpoints" / "task_01" / "policy" / "model.safetensors").unlink()
    assert cli.main(["train", "--resume", "cups"]) == 0
    assert cli.main(["data", "make", "my_lab"]) == 2
    assert "no demonstrations can be made for it" in capsys.readouterr().err


def test_the_pages_stream_of_two_data_sets(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [shlex.split(line, comments=True) for line in blocks("bash")[1].splitlines()]
    assert commands[0] == ["python", "record_drawer.py"]
    for command in commands[1:]:
        assert cli.main(shortened(command)) == 0, command
    said = capsys.readouterr().out
    assert "2 data sets, by_dataset" in said and "observation.robot as observation.state" in said
    assert "paired differences over the same episodes" in said and "success" not in said
    matrix = read_json(here / "results" / "days" / "eval" / "matrix.json")
    assert matrix["tasks"] == ["my_lab", "my_drawer"] and len(matrix["error"]) == 2 and matrix["base"] is not None
    manifest = read_json(here / "results" / "days" / "manifest.json")
    assert [p["instruction"] for p in manifest["visits"][0]["parts"]] == [
        "Move the cup to the left", "Move the cup to the right",
    ]  # fmt: skip
    assert "offline action error" in (here / "results" / "reports" / "two_days" / "index.html").read_text()


def without_simulator(data: Path, *overrides: str) -> Any:
    return toy_config(data, {"name": "seqfft"}, "dataset.env=null", *overrides)


def test_what_is_learned_does_not_depend_on_the_simulator(toy_data: Path, tmp_path: Path) -> None:
    """A set that clbench made: the same tasks, episodes, base and bytes with `env: null` as with its simulator."""
    one = toy_config(toy_data, {"name": "seqfft"}, f"output_dir={tmp_path}/one")
    two = without_simulator(toy_data, f"output_dir={tmp_path}/two")
    a, b = build_stream(one.dataset), build_stream(two.dataset)
    assert [(t.name, t.instruction, t.episodes) for t in a.columns] == [
        (t.name, t.instruction, t.episodes) for t in b.columns
    ]
    assert a.fingerprint == b.fingerprint and all(t.env is None for t in b.columns)
    runs = [train(c, "r") for c in (one, two)]
    bases = [read_json(r / "manifest.json")["base"] for r in runs]
    assert bases[0] == bases[1]
    assert files(runs[0] / "checkpoints") == files(runs[1] / "checkpoints")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["dataset.libero_order=0"], "this stream has no simulator"),
        (["dataset.tasks=[hammer-v3,no-such]"], "no-such"),
    ],
)
def test_streams_that_cannot_be_are_refused(toy_data: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_stream(without_simulator(toy_data, *overrides).dataset)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("render.size=64", "say how a simulator draws"),
        ("eval.heldout_episodes=5", "are played in a simulator"),
    ],
)
def test_settings_about_a_simulator_are_refused(toy_data: Path, override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        without_simulator(toy_data, override)


def test_a_foreign_sets_tasks_are_its_instructions(here: Path) -> None:
    text = (here / "configs" / "datasets" / "my_lab.yaml").read_text()
    plain = yaml.safe_load(text)
    del plain["dataset"]["instructions"]
    names = ["Move the cup to the right", "Move the cup to the left"]
    plain["dataset"] |= {"tasks": names, "name": "plain", "holdout": 0.0}
    (here / "configs" / "datasets" / "plain.yaml").write_text(yaml.safe_dump(plain))

    def stream(dataset: str, *overrides: str) -> Any:
        config, _ = compose(
            model="dit_dec_tiny", algorithms=["seqfft"], dataset=dataset, registered=["seqfft"], overrides=overrides
        )
        return build_stream(config.dataset)

    assert [(t.name, t.episodes[0], len(t.episodes)) for t in stream("plain").columns] == [
        (names[0], 10, 10), (names[1], 0, 10),
    ]  # fmt: skip
    with pytest.raises(UserError, match=r'up: "up" is missing.*The data has 2 tasks: "Move the cup to the left"'):
        stream("plain", "dataset.tasks=[Move the cup to the left, up]")
    with pytest.raises(UserError, match="has no actions: a policy learns from action"):
        stream("plain", "dataset.rename={action: other}")
    with pytest.raises(UserError, match=r"there is no data set in .*nowhere.*dataset\.data"):
        stream("plain", "dataset.data=./nowhere")


def test_a_sweep_does_not_evaluate_where_nothing_is_held_out(toy_data: Path, here: Path) -> None:
    path = here / "mine.yaml"
    path.write_text(
        "name: mine\nmodel: dit_dec_tiny\ndataset: my_lab\nalgorithms: [seqfft, er]\n"
        "overrides: [train.steps=2, dataset.holdout=0]\n"
    )
    experiment, runs = load_experiment(str(path))
    graph = units(experiment, runs, here / "logs", (), str(path))
    assert [u.kind for u in graph] == ["base", "train", "train"]
