"""Runs that are killed with SIGKILL, again and again, end with the bytes of runs that never stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.algorithm_cases import CASES, SMALL_CLARE
from tests.children import Process, run_module

ROOT = Path(__file__).resolve().parents[1]
SHORT = ("train.steps=5", "pretrain.steps=5")


Row = tuple[str, dict[str, Any], tuple[str, ...]]  # label, algorithm section, own overrides


def killed(
    data: Path, out: Path, runs: list[Row], kills: int, ranks: int = 1, also: list[dict[str, Any]] | None = None
) -> dict[str, dict[str, int]]:
    """Run the harness; returns its tallies. Each run is killed first while it writes another of the harness's places.

    `also`: further runs of the plan.
    """
    plan = out / "plan.json"
    rows = [
        {"label": label, "section": section, "overrides": [*SHORT, *own], "ranks": ranks, "kills": kills,
         "first": i % 4}
        for i, (label, section, own) in enumerate(runs)
    ]  # fmt: skip
    plan.write_text(json.dumps({"data": str(data), "out": str(out), "seed": 0, "runs": [*rows, *(also or [])]}))
    harness = Process(out / "printed.txt", run_module, "tests.kill_harness", [str(plan)])
    said = harness.finish(3600)
    assert harness.returncode == 0, said[-6000:]
    last = next(line for line in reversed(said.splitlines()) if line.startswith("{"))
    found: dict[str, dict[str, int]] = json.loads(last)
    print(json.dumps(found, indent=1))  # pytest -s
    assert all(found[label]["kills"] >= kills for label, _, _ in runs)
    return found


def of_ranks(strategy: str, kills: int, first: int) -> dict[str, Any]:
    """A short run of two ranks, as a row of the harness's plan."""
    own = ["train.steps=2", "pretrain.steps=2", f"train.strategy={strategy}", "dataset.task_order=[0,1]"]
    section = {"name": "packnet", "prune_ratio": 0.5}
    return {"label": strategy, "section": section, "overrides": own, "ranks": 2, "kills": kills, "first": first}


def test_killed_runs_end_as_if_never_stopped(toy_data: Path, tmp_path: Path) -> None:
    """A composition with new layers and memory, masks, and two ranks; an unmerged adapter is among the slow tests.

    Killed in pretraining, while the base is written, in a checkpoint of one process and of several ranks.
    """
    labels = ("er+clare", "packnet")
    runs = [(c.label, c.section, c.overrides) for c in CASES if c.label in labels]
    found = killed(toy_data, tmp_path, runs, kills=2, also=[of_ranks("ddp", kills=1, first=2)])
    assert all(sum(t[place] for t in found.values()) > 0 for place in ("pretraining", "base", "checkpoint"))
    assert sum(t["resumed_within_a_task"] for t in found.values()) > 0
    assert found["ddp"]["checkpoint"] == 1


@pytest.mark.slow
def test_every_algorithm_survives_kills(toy_data: Path, tmp_path: Path) -> None:
    found = killed(toy_data, tmp_path, [(c.label, c.section, c.overrides) for c in CASES], kills=8)
    assert sum(t["kills"] for t in found.values()) >= 100
    assert all(sum(t[place] for t in found.values()) >= 4 for place in ("pretraining", "base", "checkpoint", "state"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_killed_ranks_end_as_if_never_stopped(toy_data: Path, tmp_path: Path, strategy: str) -> None:
    pytest.importorskip("deepspeed")
    own = (f"train.strategy={strategy}", "dataset.task_order=[0,1]")
    runs: list[Row] = [
        ("ewc", {"name": "ewc", "ewc_lambda": 10.0, "fisher_batches": 2}, own),
        ("packnet", {"name": "packnet", "prune_ratio": 0.5}, own),
        ("clare", {"name": "clare", **SMALL_CLARE}, own),
        ("seqlora", {"name": "seqlora"}, (*own, "lora.rank=2")),
    ]
    found = killed(toy_data, tmp_path, runs, kills=4, ranks=2)
    for place in ("pretraining", "base", "checkpoint", "state"):
        assert sum(t[place] for t in found.values()) > 0, place
