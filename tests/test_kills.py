"""Runs that are killed with SIGKILL, again and again, end with the bytes of runs that never stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.algorithm_cases import CASES, SMALL_CLARE

ROOT = Path(__file__).resolve().parents[1]
SHORT = ("train.steps=5", "pretrain.steps=5")


def killed(
    data: Path, out: Path, runs: list[tuple[str, dict[str, Any], tuple[str, ...]]], kills: int, ranks: int = 1
) -> dict[str, dict[str, int]]:
    """Run the harness; returns its tallies."""
    plan = out / "plan.json"
    rows = [(label, section, [*SHORT, *own]) for label, section, own in runs]
    plan.write_text(
        json.dumps({"data": str(data), "out": str(out), "kills": kills, "seed": 0, "ranks": ranks, "runs": rows})
    )
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill_harness", str(plan)], cwd=ROOT, text=True, capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    found: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found, indent=1))  # pytest -s
    assert all(t["kills"] >= kills for t in found.values())
    return found


def test_killed_runs_end_as_if_never_stopped(toy_data: Path, tmp_path: Path) -> None:
    """One of each kind of state: a composition with new layers and memory, masks, an unmerged adapter."""
    labels = ("er+clare", "packnet", "seqlora")
    runs = [(c.label, c.section, c.overrides) for c in CASES if c.label in labels]
    found = killed(toy_data, tmp_path, runs, kills=3)
    assert sum(t["in_saving"] for t in found.values()) > 0
    assert sum(t["resumed_within_a_task"] for t in found.values()) > 0


@pytest.mark.slow
def test_every_algorithm_survives_kills(toy_data: Path, tmp_path: Path) -> None:
    found = killed(toy_data, tmp_path, [(c.label, c.section, c.overrides) for c in CASES], kills=8)
    assert sum(t["kills"] for t in found.values()) >= 100


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_killed_ranks_end_as_if_never_stopped(toy_data: Path, tmp_path: Path, strategy: str) -> None:
    pytest.importorskip("deepspeed")
    own = (f"train.strategy={strategy}", "dataset.task_order=[0,1]")
    runs: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
        ("ewc", {"name": "ewc", "ewc_lambda": 10.0, "fisher_batches": 2}, own),
        ("packnet", {"name": "packnet", "prune_ratio": 0.5}, own),
        ("clare", {"name": "clare", **SMALL_CLARE}, own),
    ]
    killed(toy_data, tmp_path, runs, kills=4, ranks=2)
