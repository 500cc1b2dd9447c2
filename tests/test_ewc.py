"""EWC: the Fisher against closed forms, the penalty against plain sums, and what it does to a run."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clbench.algorithms.build import build_algorithm
from clbench.algorithms.ewc import EWC
from clbench.algorithms.state import restore_state
from clbench.checkpoints.policy_io import load_policy
from clbench.checkpoints.run_folder import checkpoint_folder
from clbench.checkpoints.state import load_state
from clbench.data.frames import SampleOrder, StreamFrames
from clbench.io import read_jsonl
from clbench.policies.view import PolicyView
from clbench.seeding import generator
from clbench.streams.stream import build_stream
from clbench.testing.toy import toy_config
from clbench.training.trainer import train
from tests.test_policies import TYPES, build, raw_batch


class LinearGaussian(nn.Module):
    """y = w·x + σ ε with loss ½ (y − w·x)², whose Fisher at the true w is σ² E[x_i²]."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w.clone())

    def sample_draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {}

    def forward(self, batch: dict[str, Tensor], reduction: str = "none", draw: Any = None) -> tuple[Tensor, None]:
        return 0.5 * (batch["y"] - batch["x"] @ self.w).square(), None


def test_fisher_of_a_linear_gaussian_model_is_the_closed_form() -> None:
    gen = torch.Generator().manual_seed(0)
    w, scale, sigma, n = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([1.0, 2.0, 0.1]), 0.7, 20_000
    x = torch.randn(n, 3, generator=gen) * scale
    y = x @ w + sigma * torch.randn(n, generator=gen)
    model = LinearGaussian(w)
    loss = PolicyView(model, model, lambda b: b, nullcontext)
    parameters = dict(model.named_parameters())
    fisher = loss.squared_gradients({"x": x, "y": y}, {}, parameters)["w"] / n
    residual = y - x @ w
    assert torch.allclose(fisher, (residual[:, None] * x).square().mean(0), rtol=1e-4)
    assert torch.allclose(fisher, sigma**2 * scale**2, rtol=0.05)
    # Squaring batch gradients, a common mistake, is off by about the batch size.
    batches = (residual[:, None] * x).view(-1, 8, 3).mean(1).square().mean(0)
    assert (batches / fisher).max() < 0.2


@pytest.mark.parametrize("kind", TYPES)
def test_vectorized_and_single_samples_agree(kind: str, toy_data: Path) -> None:
    loaded = build(kind, toy_data)
    loaded.policy.eval()
    loss = PolicyView(loaded.policy, loaded.policy, loaded.preprocessor, nullcontext)
    batch = raw_batch(6)
    draw = loss.draw(6, torch.Generator().manual_seed(1))
    parameters = dict(loaded.policy.named_parameters())
    fast = loss.squared_gradients(batch, draw, parameters, vectorized=True)
    slow = loss.squared_gradients(batch, draw, parameters, vectorized=False)
    assert fast.keys() == slow.keys()
    for name, value in slow.items():
        assert torch.allclose(fast[name], value, rtol=1e-3, atol=1e-7), name
    mean = loss.mean_gradient(batch, draw, parameters, parts=2)
    for name, g in _autograd(loss, batch, draw, parameters).items():
        assert torch.allclose(mean[name], g, atol=1e-6), name
    assert all(p.grad is None for p in parameters.values())


def _autograd(loss: PolicyView, batch: Any, draw: Any, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss.total(batch, draw) / 6, list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}


@pytest.mark.parametrize("online", [True, False])
def test_penalty_is_the_sum_over_tasks(online: bool) -> None:
    """Value and gradient against a plain loop over three tasks."""
    gen = torch.Generator().manual_seed(0)
    lam, gamma = 3.0, 0.5 if online else 1.0
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    algorithm = EWC(EWC.Config(ewc_lambda=lam, ewc_gamma=gamma, ewc_online=online))
    algorithm.ctx = type("C", (), {"device": torch.device("cpu")})()
    assert algorithm.compute_penalty(model) is None
    names = [n for n, _ in model.named_parameters()]
    history = []
    for _ in range(3):
        fisher = {n: torch.rand(p.shape, generator=gen) * (torch.rand(p.shape, generator=gen) > 0.3)
                  for n, p in model.named_parameters()}  # fmt: skip
        anchor = {n: torch.randn(p.shape, generator=gen) for n, p in model.named_parameters()}
        history.append((fisher, anchor))
        algorithm.consolidate(dict(fisher), dict(anchor))
    value = algorithm.compute_penalty(model)
    assert value is not None
    value.backward()
    parameters = dict(model.named_parameters())
    want = torch.zeros(())
    for age, (fisher, anchor) in enumerate(reversed(history)):
        center = history[-1][1] if online else anchor
        for n in names:
            want = want + 0.5 * lam * gamma**age * (fisher[n] * (parameters[n] - center[n]).square()).sum()
    assert torch.allclose(value, want, rtol=1e-5)
    wanted = torch.autograd.grad(want, list(parameters.values()))
    for (name, p), g in zip(parameters.items(), wanted, strict=True):
        assert p.grad is not None and torch.allclose(p.grad, g, rtol=1e-4, atol=1e-6), name


def test_bf16_parameters_get_a_bf16_pull() -> None:
    model = nn.Linear(3, 2).to(torch.bfloat16)
    algorithm = EWC(EWC.Config(ewc_lambda=2.0))
    algorithm.ctx = type("C", (), {"device": torch.device("cpu")})()
    anchor = {n: torch.zeros(p.shape) for n, p in model.named_parameters()}
    algorithm.consolidate({n: torch.ones(p.shape) for n, p in model.named_parameters()}, anchor)
    value = algorithm.compute_penalty(model)
    assert value is not None and value.dtype == torch.float32
    value.backward()
    assert torch.allclose(model.weight.grad, 2 * model.weight, rtol=1e-2)


def test_a_resumed_state_is_consolidated_where_the_policy_is() -> None:
    policy = nn.Linear(3, 2).to("meta")  # stands for another device than the checkpoint's
    algorithm = EWC(EWC.Config())
    kept = {n: torch.ones(p.shape) for n, p in policy.named_parameters()}
    restore_state(algorithm, {"fisher": kept, "center": kept, "rest": 0.0}, policy)
    new = {n: torch.ones_like(p) for n, p in policy.named_parameters()}
    algorithm.consolidate(new, new)
    assert {f.device.type for f in algorithm.fisher.values()} == {"meta"}
    assert {f.device.type for f in algorithm._flat or ()} <= {"meta"}


def test_holds_what_matters_and_logs_its_penalty(toy_data: Path, tmp_path: Path) -> None:
    def drift(name: str, **algorithm: Any) -> float:
        config = toy_config(
            toy_data, {"name": "seqfft" if not algorithm else "ewc", **algorithm}, f"output_dir={tmp_path}",
            "train.steps=20", "dataset.task_order=[0,1]",
        )  # fmt: skip
        folder = train(config, name)
        old, new = (load_policy(checkpoint_folder(folder, k) / "policy").policy.state_dict() for k in (0, 1))
        return float(sum((new[n] - v).square().sum() for n, v in old.items()))

    free, held = drift("free"), drift("held", ewc_lambda=1e6, fisher_batches=2)
    assert held < 0.3 * free
    steps = [r for r in read_jsonl(tmp_path / "held" / "log.jsonl") if r["event"] == "step"]
    assert all("loss/ewc" not in r for r in steps if r["k"] == 0)
    assert all(r["loss/ewc"] >= 0 for r in steps if r["k"] == 1) and steps[-1]["loss/ewc"] > 0
    (consolidation, _) = [r for r in read_jsonl(tmp_path / "held" / "log.jsonl") if r["event"] == "ewc_fisher"]
    assert 0 < consolidation["mean"] <= consolidation["largest"]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"ewc_lambda": -1.0}, "ewc_lambda must not be negative"),
        ({"ewc_gamma": 1.5}, "ewc_gamma must be in"),
        ({"ewc_gamma": 0.5, "ewc_online": False}, "belongs to the online form"),
        ({"fisher_batches": 0}, "fisher_batches must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(keys: dict[str, Any], words: str, toy_data: Path) -> None:
    with pytest.raises(ValueError, match=words):
        build_algorithm(toy_config(toy_data, {"name": "ewc", **keys}))


def test_the_fisher_is_of_the_task_that_was_just_learned(toy_data: Path, tmp_path: Path) -> None:
    """After the second task, with one forgotten: the mean over its own samples of squared gradients, one at a time."""
    config = toy_config(
        toy_data, {"name": "ewc", "ewc_gamma": 0.0, "fisher_batches": 2}, f"output_dir={tmp_path}",
        "dataset.task_order=[0,1]",
    )  # fmt: skip
    checkpoint = checkpoint_folder(train(config, "r"), 1)
    fisher = load_state(checkpoint, "algorithm")["fisher"]
    loaded = load_policy(checkpoint / "policy")
    frames = StreamFrames([(task,) for task in build_stream(config.dataset).columns], loaded.policy.config)
    view = PolicyView(loaded.policy, loaded.policy, loaded.preprocessor, nullcontext)
    order, size = SampleOrder(frames.length(1), "ewc-fisher", 0, 1), config.train.batch_size
    parameters = dict(loaded.policy.named_parameters())
    want = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for i in range(2):
        draw = view.draw(size, generator(0, 1, "", "ewc-fisher", i))
        for row, index in enumerate(order.take(i * size, size).tolist()):
            own = {name: value[row : row + 1] for name, value in draw.items()}
            loss = view.per_sample(frames.fetch(torch.tensor([[1, index]])), own).sum()
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, g in zip(parameters, found, strict=True):
                if g is not None:
                    want[name] += g.square() / (2 * size)
    for name, value in fisher.items():
        assert torch.allclose(value, want[name], rtol=1e-3, atol=1e-9), name
