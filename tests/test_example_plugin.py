"""docs/example_plugin, as its author would use it: built, installed, listed, and each of its parts at work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clbench.io import read_json
from tests.conftest import ROOT

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
EXPERIMENT = """
name: mine
dataset: example_points
algorithms: [seqfft, example_average]
executor: example_one_by_one
smoke: true
overrides: [eval.episodes=2]
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the package's wheel is installed into."""
    source, out = tmp_path_factory.mktemp("source") / "plugin", tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "docs" / "example_plugin", source, ignore=shutil.ignore_patterns("__pycache__", "build"))
    run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out), str(source)], source)
    (wheel,) = out.glob("*.whl")
    site = out / "site"
    run([*PIP, "install", "--no-deps", "--no-index", "--no-compile", "--target", str(site), str(wheel)], source)
    return site


def run(command: list[str], cwd: Path, **variables: str) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def clbench(site: Path, here: Path, *arguments: str) -> str:
    roots = {f"CLBENCH_{name}_ROOT": str(here / name.lower()) for name in ("DATA", "RESULTS", "CACHE")}
    path = os.pathsep.join((str(site), str(ROOT)))
    return run([sys.executable, "-P", "-m", "clbench.cli", *arguments], here, PYTHONPATH=path, **roots)


def test_every_part_of_the_package_is_found(site: Path, tmp_path: Path) -> None:
    listed = " ".join(clbench(site, tmp_path, "list").split())
    for said in (
        "example_average clbench-example 1.0 Average the weights from before and after each task.",
        "example_point clbench-example 1.0 A point in the plane that is pushed to a goal. [needs numpy]",
        "example_point clbench-example 1.0 Moves straight to the goal.",
        "example_points clbench-example 1.0 A point in the plane goes left, then right",
        "example_points_reversed clbench-example 1.0 The points' two tasks, the right one first.",
        "example_worst_task clbench-example 1.0 min_j R[N−1, j]",
        "example_csv clbench-example 1.0 One line per step and number",
        "example_one_by_one clbench-example 1.0 Runs one command after the other.",
    ):
        assert said in listed, said
    (tmp_path / "matrix.json").write_text('{"tasks": ["a", "b"], "success": [[0.5, 0.25], [0.75, 0.5]]}')
    metrics = clbench(site, tmp_path, "metrics", "matrix.json")
    (row,) = [line.split() for line in metrics.splitlines() if line.startswith("example_worst_task")]
    assert row[1] == "0.500" and "clbench's example plugin" in " ".join(row)


@pytest.mark.slow
def test_its_algorithm_trains_its_stream_with_its_recipe_and_logger(site: Path, tmp_path: Path) -> None:
    clbench(site, tmp_path, "data", "make", "example_points")
    started = clbench(
        site, tmp_path, "train", "--smoke", "--algo", "example_average", "--dataset", "example_points_reversed",
        "--run-id", "reversed", "--", "log.loggers={example_csv: {separator: ;}}", "train.log_every=1",
    )  # fmt: skip
    assert "clbench-example 1.0: stream example_points_reversed" in started
    assert "clbench-example 1.0: recipes/dit_dec_tiny.yaml" in started and "share=0.8" in started
    manifest = read_json(tmp_path / "results" / "reversed" / "manifest.json")
    assert manifest["checkpoints"] == ["go-right", "go-left"]
    rows = [line.split(";") for line in (tmp_path / "results/reversed/numbers.csv").read_text().splitlines()]
    assert {r[1] for r in rows} >= {"loss", "lr"} and [r[0] for r in rows if r[1] == "loss"] == ["1", "2", "3", "4"]


@pytest.mark.slow
def test_its_executor_runs_a_sweep_with_its_stream(site: Path, tmp_path: Path) -> None:
    clbench(site, tmp_path, "data", "make", "example_points")
    (tmp_path / "mine.yaml").write_text(EXPERIMENT)
    graph = clbench(site, tmp_path, "sweep", "mine.yaml", "--dry-run")
    assert "left  evaluate mine_example_average_s0" in graph
    assert "2 of 2 runs: " in clbench(site, tmp_path, "sweep", "mine.yaml").replace("report of ", "")
    metrics = clbench(site, tmp_path, "metrics", "results/mine_seqfft_s0")
    (row,) = [line.split() for line in metrics.splitlines() if line.startswith("example_worst_task")]
    rates = read_json(tmp_path / "results" / "mine_seqfft_s0" / "eval" / "matrix.json")["success"]
    assert row[1] == f"{min(rates[-1]):.3f}" and "clbench's example plugin" in " ".join(row)


@pytest.mark.slow
def test_the_packages_own_tests_pass(site: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "docs" / "example_plugin" / "tests" / "test_average.py", tmp_path)
    path = os.pathsep.join((str(site), str(ROOT)))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_average.py"]
    assert " passed" in run(command, tmp_path, PYTHONPATH=path)
