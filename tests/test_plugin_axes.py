"""Metrics, loggers and streams of plugins: what is wrong with one is said, and takes nothing else with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clbench import registry
from clbench.config.compose import compose
from clbench.config.schema import LogConfig, WandbConfig
from clbench.errors import UserError
from clbench.io import read_jsonl, write_json
from clbench.listing import listing
from clbench.metrics import METRICS, compute_metrics, load_record, metric
from clbench.streams.stream import checked_order
from clbench.training.log import RunLog, wanted_loggers
from clbench.training.loggers import LoggedRun, Logger


@pytest.fixture
def known() -> Iterator[Any]:
    """`registry.register`, whose names are taken away afterwards."""
    names = []

    def register(axis: str, name: str, thing: Any) -> None:
        names.append((axis, name))
        registry.register(axis, name, thing)

    yield register
    for axis, name in names:
        registry.register(axis, name, None)


def record(folder: Path) -> Any:
    write_json(folder / "m.json", {"tasks": ["a", "b"], "success": [[0.5, 0.25], [0.75, 0.5]]})
    return load_record(folder / "m.json")


def test_a_plugins_metric_stands_beside_ours(known: Any, tmp_path: Path) -> None:
    @metric(("success",), "largest cell", "me", higher_is_better=True)
    def largest(success: Any) -> Any:
        """max R."""
        return success.max(axis=(-2, -1))

    known("metrics", "largest", largest)
    found = compute_metrics(record(tmp_path))
    assert list(found) == [*METRICS, "largest"] and found["largest"]["value"] == 0.75
    assert found["largest"]["definition"] == "largest cell" and found["largest"]["source"] == "me"
    assert "max R." in "\n".join(listing("metrics"))


def test_one_that_fails_is_missing_and_named(known: Any, tmp_path: Path) -> None:
    @metric(("final",), "x", "me", higher_is_better=True)
    def broken(final: Any) -> Any:
        raise KeyError("oops")

    known("metrics", "broken", broken)
    found = compute_metrics(record(tmp_path))
    assert found["broken"]["value"] is None
    assert found["broken"]["missing"] == "it failed, which this process has to fix: KeyError: 'oops'"
    assert found["asr"]["value"] == 0.625
    with pytest.raises(ValueError, match=r"a metric takes success, .*; not matrix"):
        metric(("matrix",), "x", "me", higher_is_better=True)
    known("metrics", "bare", np.mean)
    with pytest.raises(UserError, match=r"the metric 'bare' of this process .* is no metric: make it one with"):
        compute_metrics(record(tmp_path))


def test_a_plugins_logger_gets_what_is_logged(known: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []

    class Kept(Logger):
        wants_identity = True

        def __init__(self, run: LoggedRun) -> None:
            super().__init__(run)
            seen.append((run.run_id, run.settings, len(run.identity), run.about))

        def write(self, numbers: dict[str, Any], step: int) -> None:
            seen.append((step, numbers))
            if step == 2:
                raise OSError("gone")

        def close(self) -> None:
            seen.append("closed")

    known("loggers", "kept", Kept)
    log = RunLog(tmp_path, LogConfig(loggers={"kept": {"a": 1}}), "r", about={"seed": 3})
    for step in (1, 2, 3):
        log.event("step", loss=0.5, total=step)
    log.close()
    assert seen == [("r", {"a": 1}, 16, {"seed": 3}), (1, {"loss": 0.5}), (2, {"loss": 0.5})]
    assert "kept failed (gone); continuing without it" in capsys.readouterr().err
    assert [r["total"] for r in read_jsonl(tmp_path / "log.jsonl")] == [1, 2, 3]


def test_loggers_that_cannot_be_are_refused() -> None:
    assert wanted_loggers(LogConfig()) == {}
    assert list(wanted_loggers(LogConfig(wandb=WandbConfig(enabled=True), tensorboard=True))) == [
        "tensorboard",
        "wandb",
    ]
    for loggers, words in (
        ({"tensorbord": {}}, "Did you mean 'tensorboard'"),
        ({"wandb": {}}, r"have separate keys: log\.wandb"),
    ):
        with pytest.raises(UserError, match=words):
            wanted_loggers(LogConfig(loggers=loggers))
    with pytest.raises(UserError, match=r"log\.trackio needs the package `trackio`"):
        wanted_loggers(LogConfig(trackio=True))


def points() -> dict[str, Any]:
    """Two tasks of mine."""
    tasks = ["push-v3", "reach-v3"]
    return {"dataset": {"name": "mine", "data": "x", "env": {"type": "metaworld"}, "tasks": tasks, "task_order": tasks}}


def composed(name: str) -> Any:
    return compose(model="dit_dec_tiny", algorithms=["seqfft"], dataset=name, registered=["seqfft"])


def test_a_stream_of_code_is_what_its_file_would_be(
    known: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known("streams", "mine", points)
    config, files = composed("mine")
    assert checked_order(config.dataset) == ["push-v3", "reach-v3"] and "this process: stream mine" in files
    assert any(
        line.split() == ["mine", "this", "process", "Two", "tasks", "of", "mine."] for line in listing("streams")
    )
    monkeypatch.chdir(tmp_path)  # a file of the user's counts first
    (tmp_path / "configs" / "datasets").mkdir(parents=True)
    (tmp_path / "configs" / "datasets" / "mine.yaml").write_text(
        "dataset: {name: other, data: x, env: {type: metaworld}, tasks: [push-v3, hammer-v3]}\n"
    )
    assert composed("mine")[0].dataset.name == "other"


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: ["push-v3"], "the stream 'mine' of this process .* must hold a mapping"),
        (lambda: {"dataset": {"taks": []}}, "taks"),
        (lambda: {"dataset": {"name": object()}}, "cannot be read: RepresenterError"),
        (lambda: 1 / 0, "cannot be read: ZeroDivisionError: division by zero"),
    ],
)
def test_code_that_returns_no_stream_is_named(known: Any, made: Any, words: str) -> None:
    known("streams", "mine", made)
    with pytest.raises(UserError, match=words):
        composed("mine")


def test_a_name_that_a_shipped_file_has_is_refused(known: Any) -> None:
    known("streams", "metaworld_quick", points)
    with pytest.raises(
        UserError, match=r"is provided by clbench \(datasets/metaworld_quick\.yaml\) and by this process"
    ):
        composed("metaworld_quick")
