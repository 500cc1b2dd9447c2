"""A-GEM: the projection's algebra, and a run against a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clbench.algorithms import agem
from clbench.algorithms.build import build_algorithm
from clbench.algorithms.memory import Memory
from clbench.errors import UserError
from clbench.seeding import generator
from clbench.testing import PLAIN_SGD, PlainRun, toy_config
from clbench.training.trainer import train

SECTION = {"name": "agem", "buffer_size_per_task": 10, "reference_batch_size": 6}


def test_what_is_left_is_orthogonal_and_shorter_by_pythagoras() -> None:
    """One product over two tensors, of which one alone does not conflict."""
    g = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([[0.5]])}
    r = {"a": torch.tensor([-1.0, 1.0]), "b": torch.tensor([[2.0]])}
    scale = agem.conflict(g, r)
    assert scale == pytest.approx((-1 - 2 + 1) / (1 + 1 + 4))
    left = {n: g[n] - scale * r[n] for n in g}
    assert sum(float((left[n] * r[n]).sum()) for n in g) == pytest.approx(0.0, abs=1e-6)
    norm = sum(float(v.square().sum()) for v in left.values())
    assert norm == pytest.approx(5.25 - 2.0**2 / 6.0, rel=1e-6)
    assert agem.conflict(g, {n: -v for n, v in r.items()}) == 0.0  # they agree: nothing is taken away
    assert agem.conflict(g, {n: torch.zeros_like(v) for n, v in r.items()}) == 0.0


def test_a_run_is_a_plain_loop(toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some steps conflict and some do not; the second task's weights are those of the equation, written out."""
    drawn: list[torch.Tensor] = []
    sample = Memory.sample
    monkeypatch.setattr(Memory, "sample", lambda *a, **k: drawn.append(sample(*a, **k)) or drawn[-1])
    steps = ("train.steps=12", "train.optimizer.lr=0.05")
    run = PlainRun(train(toy_config(toy_data, SECTION, f"output_dir={tmp_path}", *PLAIN_SGD, *steps), "r"))
    assert len(drawn) == 24 and all((refs[:, 0] == 0).all() for refs in drawn[:12])
    assert len({tuple(refs[:, 1].tolist()) for refs in drawn[:12]}) > 6  # each step draws its own
    policy, conflicts = run.policy_before(1), []
    names = [n for n, _ in policy.named_parameters()]
    for step, (batch, noise) in enumerate(run.steps(1)):
        parameters = list(policy.parameters())
        g = torch.autograd.grad(run.losses(policy, batch, noise).mean(), parameters)
        draw = run.draw(6, generator(0, 1, "train", "agem-draw", step))
        policy.eval()
        r = torch.autograd.grad(run.losses(policy, run.frames.fetch(drawn[step]), draw).mean(), parameters)
        policy.train()
        g, r = torch.cat([v.flatten() for v in g]), torch.cat([v.flatten() for v in r])
        conflicts.append(bool(g @ r < 0))
        if g @ r < 0:
            g = g - (g @ r) / (r @ r) * r
        with torch.no_grad():
            for p, part in zip(parameters, g.split([p.numel() for p in parameters]), strict=True):
                p -= 0.05 * part.view_as(p)
    assert any(conflicts) and not all(conflicts)
    want = run.weights_after(1)
    for name, p in zip(names, policy.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), want[name], rtol=1e-5, atol=1e-6)


def test_impossible_settings_are_refused(toy_data: Path) -> None:
    for key in ("buffer_size_per_task", "reference_batch_size"):
        section: dict[str, Any] = {"name": "agem", key: 0}
        with pytest.raises(UserError, match=f"algorithm.{key} must be at least 1 but is 0"):
            build_algorithm(toy_config(toy_data, section))
