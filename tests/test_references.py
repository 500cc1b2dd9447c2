"""The references that a sequence is compared with: one joint training run, and a run of its own for every task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clbench.io import read_json, read_jsonl
from clbench.testing import PLAIN_SGD, PlainRun, toy_config
from clbench.training.trainer import train


def test_singletask_starts_every_visit_from_the_base(toy_data: Path, tmp_path: Path) -> None:
    """The third visit against a plain loop that starts from the base; the second is a loop of its own, too."""
    run = PlainRun(train(toy_config(toy_data, {"name": "singletask"}, f"output_dir={tmp_path}", *PLAIN_SGD), "r"))
    assert read_json(run.folder / "manifest.json")["mode"] == "singletask"
    base = {n: p.detach().clone() for n, p in run.policy_before(0).named_parameters()}
    for k in (1, 2):
        policy = run.policy_before(0)
        for batch, noise in run.steps(k):
            gradients = torch.autograd.grad(run.losses(policy, batch, noise).mean(), list(policy.parameters()))
            with torch.no_grad():
                for p, gradient in zip(policy.parameters(), gradients, strict=True):
                    p -= 0.01 * gradient
        want = run.weights_after(k)
        for name, p in policy.named_parameters():
            torch.testing.assert_close(p.detach(), want[name], rtol=1e-5, atol=1e-6)
        assert max(float((want[n] - base[n]).abs().max()) for n in base) > 1e-3


@pytest.mark.parametrize(("section", "steps"), [({}, 4 * 3), ({"steps_per_task": 2}, 2 * 3)])
def test_multitask_takes_the_steps_of_all_tasks(
    section: dict[str, Any], steps: int, toy_data: Path, tmp_path: Path
) -> None:
    """In one visit with the samples of all of them."""
    folder = train(toy_config(toy_data, {"name": "multitask", **section}, f"output_dir={tmp_path}"), "r")
    taken = [r for r in read_jsonl(folder / "log.jsonl") if r["event"] == "step"]
    assert [r["step"] for r in taken] == list(range(steps)) and {r["k"] for r in taken} == {0}
    assert (folder / "checkpoints" / "task_00").is_dir() and not (folder / "checkpoints" / "task_01").exists()
