"""Losses of LeRobot's policies under draws from outside, against their own forward on one sample after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lerobot.configs import FeatureType, PolicyFeature
from torch import Tensor, nn

from clbench.data.frames import select
from clbench.errors import UserError
from clbench.policies import draws
from clbench.policies.draws import ADAPTERS, adapter_of
from clbench.policies.view import PolicyView, without_dropout
from tests import tiny_policies

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "act": ("act", {}),
    "act-plain": ("act", {"use_vae": False}),
    "diffusion": ("diffusion", {}),
    "diffusion-sample-masked": ("diffusion", {"prediction_type": "sample", "do_mask_loss_for_padding": True}),
    "multi_task_dit": ("multi_task_dit", {}),
    "multi_task_dit-flow": ("multi_task_dit", {"objective": "flow_matching", "sigma_min": 0.01,
                                               "do_mask_loss_for_padding": True}),
    "smolvla": ("smolvla", {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def alone(policy: Any, one: dict[str, Any], draw: dict[str, Tensor], patch: pytest.MonkeyPatch) -> Tensor:
    """The policy's own loss of one processed sample when what it draws is `draw` (rows of length 1)."""
    kind, noise, time = policy.config.type, draw["noise"], draw.get("time")
    if kind == "smolvla":
        return policy(one, noise=noise, time=time)[0]
    with patch.context() as m:
        for name in ("randn", "randn_like"):
            m.setattr(torch, name, lambda *a, **k: noise)
        m.setattr(torch, "randint", lambda *a, **k: time)
        if kind == "multi_task_dit":
            m.setattr(type(policy.objective), "_sample_timesteps", lambda *a: time, raising=False)
        return policy(one)[0]


@pytest.mark.parametrize("case", CASES)
def test_one_pass_gives_the_loss_of_each_sample_alone(case: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, changes = CASES[case]
    loaded = tiny_policies.load(kind, models, **changes)
    policy, adapter = loaded.policy, adapter_of(loaded.policy)
    assert adapter is not None
    draw = adapter.sample(6, torch.Generator().manual_seed(1))
    batch = loaded.preprocessor(tiny_policies.batch(policy.config, 6))
    batch = {k: v for k, v in batch.items() if torch.is_tensor(v) and v.shape[:1] == (6,)}
    parameters = [p for p in policy.parameters() if p.requires_grad]
    with without_dropout(policy):
        together = adapter.losses(policy, batch, draw)
        gradient = torch.autograd.grad(together[3], parameters, allow_unused=True)
        for i in range(6):
            one, row = select(batch, torch.tensor([i])), {n: v[i : i + 1] for n, v in draw.items()}
            loss = alone(policy, one, row, monkeypatch)
            assert float(loss) == pytest.approx(float(together[i]), rel=1e-5, abs=1e-6), i
            if i == 3:
                again = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert len(set(together.tolist())) == 6
    size = max(float(g.abs().max()) for g in gradient if g is not None)
    for a, b in zip(gradient, again, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-4, atol=1e-5 * size))


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_the_samplers_of_pi0_are_replaced_for_one_loss(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its network is fixed in size, so another stands in its place; forward and samplers are LeRobot's."""
    import importlib

    module = importlib.import_module(f"lerobot.policies.{kind}.modeling_{kind}")
    name = {"pi0": "PI0", "pi05": "PI05"}[kind]
    config = getattr(importlib.import_module(f"lerobot.policies.{kind}.configuration_{kind}"), f"{name}Config")(
        chunk_size=4, n_action_steps=2, max_action_dim=8, max_state_dim=8, image_resolution=(32, 32), device="cpu"
    )
    config.input_features = {"observation.image": PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
                             "observation.state": PolicyFeature(FeatureType.STATE, (4,))}  # fmt: skip
    config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (4,))}
    theirs = getattr(module, f"{name}Pytorch")

    class Network(nn.Module):
        sample_noise, sample_time = theirs.sample_noise, theirs.sample_time

        def __init__(self) -> None:
            super().__init__()
            self.config, self.layer = config, nn.Linear(9, 8)

        def forward(self, *args: Any) -> Tensor:
            actions, noise, time = args[-3:]
            t = time[:, None, None]
            x = t * noise + (1 - t) * actions
            v = self.layer(torch.cat([x, t.expand(-1, x.shape[1], 1)], -1))
            return F.mse_loss(v, noise - actions, reduction="none")

    policy = getattr(module, f"{name}Policy").__new__(getattr(module, f"{name}Policy"))
    nn.Module.__init__(policy)
    policy.config, policy.model = config, Network()
    n = 5
    batch = {
        **tiny_policies.batch(config, n), "observation.language.tokens": torch.ones(n, 3, dtype=torch.int64),
        "observation.language.attention_mask": torch.ones(n, 3, dtype=torch.bool),
    }  # fmt: skip
    adapter = adapter_of(policy)
    assert adapter is not None
    draw = adapter.sample(n, torch.Generator().manual_seed(2))
    assert draw["noise"].shape == (n, 4, 8) and bool(((draw["time"] > 0) & (draw["time"] <= 1)).all())
    together = adapter.losses(policy, batch, draw)
    assert "sample_noise" not in vars(policy.model)
    for i in range(n):
        monkeypatch.setattr(module, "sample_noise", lambda *a, i=i: draw["noise"][i : i + 1])
        monkeypatch.setattr(module, "sample_time_beta", lambda *a, i=i, **k: draw["time"][i : i + 1])
        loss = policy(select(batch, torch.tensor([i])))[0]
        assert float(loss) == pytest.approx(float(together[i]), rel=1e-5)
    with pytest.raises(RuntimeError), adapter._drawing(draw):  # type: ignore[attr-defined]
        raise RuntimeError
    assert "sample_noise" not in vars(policy.model)


@pytest.mark.parametrize("case", CASES)
def test_draws_are_a_function_of_the_generator_alone(case: str, models: Path) -> None:
    kind, changes = CASES[case]
    adapter = adapter_of(tiny_policies.load(kind, models, **changes).policy)
    assert adapter is not None
    state = torch.get_rng_state()
    first, second, other = (adapter.sample(400, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    for name, value in first.items():
        assert len(value) == 400 and torch.equal(value, second[name]) and not torch.equal(value, other[name])
    assert abs(float(first["noise"].mean())) < 0.05 and abs(float(first["noise"].std()) - 1) < 0.05


@pytest.mark.parametrize("kind", ["act", "smolvla"])
def test_a_step_does_not_depend_on_its_micro_batches(kind: str, models: Path) -> None:
    loaded = tiny_policies.load(kind, models)
    policy = loaded.policy
    view = PolicyView(policy, policy, loaded.preprocessor, nullcontext)
    assert view.takes_draw
    batch, draw = tiny_policies.batch(policy.config, 6), view.draw(6, torch.Generator().manual_seed(0))
    parameters = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    with without_dropout(policy):
        losses = view.per_sample(batch, draw)
        assert torch.allclose(view.total(batch, draw), losses.sum())
        whole = view.mean_gradient(batch, draw, parameters)
        parts = view.mean_gradient(batch, draw, parameters, parts=3)
        two, rows = select(batch, torch.arange(2)), {n: v[:2] for n, v in draw.items()}
        squares = view.squared_gradients(two, rows, parameters)
        by_hand = {n: torch.zeros_like(p) for n, p in parameters.items()}
        for i in range(2):
            found = torch.autograd.grad(view.per_sample(batch, draw)[i], list(parameters.values()), allow_unused=True)
            for name, g in zip(parameters, found, strict=True):
                by_hand[name] += 0 if g is None else g.square()
    size = max(float(g.abs().max()) for g in whole.values())
    assert all(torch.allclose(whole[n], parts[n], rtol=1e-4, atol=1e-5 * size) for n in parameters)
    assert all(torch.allclose(squares[n], by_hand[n], rtol=1e-3, atol=1e-5 * size**2) for n in parameters)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("diffusion", {"use_group_norm": False, "resize_shape": [64, 64]}, "batch normalisation"),
        ("diffusion", {"crop_shape": [24, 24]}, "one random crop"),
        ("multi_task_dit", {"image_resize_shape": [40, 40], "image_crop_shape": [32, 32]}, "one random crop"),
    ],
)
def test_settings_that_tie_samples_together_are_run_one_by_one(
    kind: str, changes: dict[str, Any], words: str, models: Path
) -> None:
    loaded = tiny_policies.load(kind, models, **changes)
    assert words in str(ADAPTERS[kind].why_not(loaded.policy.config)) and adapter_of(loaded.policy) is None
    view = PolicyView(loaded.policy, loaded.policy, loaded.preprocessor, nullcontext)
    assert not view.takes_draw
    batch, draw = tiny_policies.batch(loaded.policy.config, 3), view.draw(3, torch.Generator().manual_seed(0))
    assert list(draw) == ["seed"]
    with without_dropout(loaded.policy):
        assert torch.equal(view.per_sample(batch, draw), view.per_sample(batch, draw))


@pytest.fixture
def vqbet(models: Path) -> Iterator[Any]:
    yield tiny_policies.load("vqbet", models)


def test_a_loss_that_trains_is_not_compared(vqbet: Any) -> None:
    policy = vqbet.policy
    view = PolicyView(policy, policy, vqbet.preprocessor, nullcontext)
    batch, draw = tiny_policies.batch(policy.config, 3), view.draw(3, torch.Generator().manual_seed(0))
    codes = {n: b.clone() for n, b in policy.named_buffers()}
    parameters = dict(policy.named_parameters())
    for call in (
        lambda: view.per_sample(batch, draw),
        lambda: view.mean_gradient(batch, draw, parameters),
        lambda: view.squared_gradients(batch, draw, parameters),
    ):
        with pytest.raises(UserError, match=r"policy 'vqbet': VQ-BeT changes its codes .* first 2 steps"):
            call()
    assert all(torch.equal(codes[n], b) for n, b in policy.named_buffers())
    for _ in range(2):
        view.total(batch, draw)
    assert draws.refusal(policy) is None
    with without_dropout(policy):
        assert torch.equal(view.per_sample(batch, draw), view.per_sample(batch, draw))


def test_a_resumed_vqbet_knows_how_many_steps_its_codes_had(vqbet: Any) -> None:
    """LeRobot counts them in an attribute that is not saved."""
    draws.resumed(vqbet.policy, losses=1)
    view = PolicyView(vqbet.policy, vqbet.policy, vqbet.preprocessor, nullcontext)
    batch = tiny_policies.batch(vqbet.policy.config, 3)
    view.total(batch, view.draw(3, torch.Generator().manual_seed(0)))
    assert bool(vqbet.policy.vqbet.action_head.vqvae_model.discretized)
