"""Our policies: found by LeRobot, saved and loaded, exact draws, independent rows, causal normalisation."""

from __future__ import annotations

import copy
import dataclasses
import math
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.policies import make_policy, make_pre_post_processors

import clbench.policies  # noqa: F401
from clbench.checkpoints.policy_io import LoadedPolicy, load_policy, policy_config, save_policy
from clbench.config import dit
from clbench.policies.dit.layers import FeatureTokens
from clbench.policies.dit.text import frozen_word_table, word_ids
from clbench.policies.view import PolicyView, without_dropout

TYPES = ("dit_dec", "dit_encdec")
SMALL = {"chunk_size": 4, "n_action_steps": 2, "d_model": 32, "n_heads": 2, "encoder_layers": 1, "decoder_layers": 2}


def test_keys_that_are_checked_before_lerobot_is_imported_are_those_of_the_policies() -> None:
    for kind in dit.TYPES:
        names = {f.name for f in dataclasses.fields(PreTrainedConfig.get_choice_class(kind))}
        assert names == {f.name for f in dataclasses.fields(dit.DitSettings)} | set(dit.OF_LEROBOT)


def build(
    kind: str, toy_data: Path, images: bool = False, small: dict[str, Any] = SMALL, **changes: Any
) -> LoadedPolicy:
    config = policy_config({"type": kind, **small, **changes}, "cpu")
    meta = LeRobotDatasetMetadata("stream", root=toy_data / "stream")
    if images:
        config.input_features = {
            "observation.state": PolicyFeature(FeatureType.STATE, (39,)),
            "observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
        }
        config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (4,))}
        from lerobot.policies.factory import get_policy_class

        policy = get_policy_class(kind)(config)
    else:
        policy = make_policy(config, ds_meta=meta)
    with torch.no_grad():  # AdaLN-zero starts with gates at zero: a fresh policy ignores what it sees
        for p in policy.parameters():
            p.add_(0.1 * torch.randn_like(p))
    pre, post = make_pre_post_processors(config, dataset_stats=meta.stats)
    return LoadedPolicy(policy, pre, post, "")


def raw_batch(n: int, seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    return {
        "observation.state": torch.randn(n, 39, generator=g),
        "action": torch.randn(n, 4, 4, generator=g),
        "action_is_pad": torch.zeros(n, 4, dtype=torch.bool),
        "task": [("Push the puck to a goal", "Open a door")[i % 2] for i in range(n)],
    }


@pytest.mark.parametrize("kind", TYPES)
def test_saves_and_loads_the_same_policy(
    kind: str, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build(kind, toy_data)
    save_policy(built, tmp_path / "policy")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    again = load_policy(tmp_path / "policy")
    assert list(temporary.iterdir()) == []
    assert again.policy.config == replace(built.policy.config, device="cpu")
    batch, noise = raw_batch(5), torch.randn(5, 4, 4)
    built.policy.eval()
    a = built.postprocessor(built.policy.predict_action_chunk(built.preprocessor(batch), noise=noise))
    b = again.postprocessor(again.policy.predict_action_chunk(again.preprocessor(batch), noise=noise))
    assert torch.equal(a, b)
    assert PreTrainedConfig.from_pretrained(tmp_path / "policy").type == kind


@pytest.mark.parametrize("kind", TYPES)
def test_observation_and_instruction_matter(kind: str, toy_data: Path) -> None:
    built = build(kind, toy_data)
    noise = torch.randn(1, 4, 4).expand(4, 4, 4)
    batch = raw_batch(4)
    batch["observation.state"] = batch["observation.state"][:1].repeat(4, 1)
    batch["observation.state"][3] += 0.5
    batch["task"] = ["Open a door", "Open a door", "Push the puck to a goal", "Open a door"]
    chunk = built.policy.predict_action_chunk(built.preprocessor(batch), noise=noise)
    assert torch.allclose(chunk[0], chunk[1], atol=1e-6)
    assert not torch.allclose(chunk[0], chunk[2], atol=1e-3)
    assert not torch.allclose(chunk[0], chunk[3], atol=1e-3)


@pytest.mark.parametrize("kind", TYPES)
def test_rows_do_not_depend_on_their_companions(kind: str, toy_data: Path) -> None:
    built = build(kind, toy_data)
    noise = torch.randn(6, 4, 4)
    first = raw_batch(6, seed=0)
    second = raw_batch(6, seed=1)
    second["observation.state"][0], second["task"][0] = first["observation.state"][0], first["task"][0]
    chunks = [built.policy.predict_action_chunk(built.preprocessor(b), noise=noise)[0] for b in (first, second)]
    assert torch.equal(chunks[0], chunks[1])


@pytest.mark.parametrize("kind", TYPES)
def test_loss_is_the_flow_matching_formula_and_exact_under_a_draw(kind: str, toy_data: Path) -> None:
    built = build(kind, toy_data)
    policy = built.policy
    batch = raw_batch(6)
    batch["action_is_pad"][0, 2:] = True
    processed = built.preprocessor(batch)
    draw = policy.sample_draw(6, torch.Generator().manual_seed(1))
    losses = policy.per_sample_loss(processed, draw)
    for i in range(6):  # by hand, one sample at a time
        t, noise, action = draw["time"][i], draw["noise"][i], processed["action"][i]
        x = (1 - t) * noise + t * action
        one = {k: v[i : i + 1] for k, v in processed.items() if torch.is_tensor(v)}
        v = policy.model.velocity(x[None], t[None], policy.model.encode(one))[0]
        kept = 2 if i == 0 else 4
        assert torch.allclose(losses[i], (v - (action - noise)).square()[:kept].mean(), rtol=1e-4)
    measure = PolicyView(policy, policy, built.preprocessor, torch.no_grad)
    rows = {k: v[2:4] for k, v in draw.items()}
    part = {k: v[2:4] for k, v in batch.items()}
    assert torch.allclose(measure.per_sample(part, rows), losses[2:4], rtol=1e-4)
    assert torch.allclose(measure.total(batch, draw), losses.sum(), rtol=1e-4)


def test_a_lerobot_policy_gets_per_sample_losses_from_a_loop(toy_data: Path) -> None:
    """A policy without draws: single samples under a fixed seed; repeatable, and different seeds differ."""

    class Scalar(torch.nn.Module):
        def forward(self, batch: dict[str, Any]) -> tuple[torch.Tensor, None]:
            return (batch["action"] * torch.randn(())).square().mean(), None

    policy = Scalar()
    measure = PolicyView(policy, policy, lambda b: b, torch.no_grad)
    draw = measure.draw(3, torch.Generator().manual_seed(0))
    batch = raw_batch(3)
    state = torch.get_rng_state()
    first, second = measure.per_sample(batch, draw), measure.per_sample(batch, draw)
    assert first.shape == (3,) and torch.equal(first, second)
    assert not torch.equal(first, measure.per_sample(batch, measure.draw(3, torch.Generator().manual_seed(1))))
    assert torch.equal(state, torch.get_rng_state())


class TwoTerms(torch.nn.Module):
    """Like LeRobot's ACT: a term of the loss exists in training mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(4), torch.nn.Dropout1d(0.5))
        self.attention = torch.nn.MultiheadAttention(4, 1, dropout=0.5)  # whose dropout is not a layer
        self.frozen = torch.nn.BatchNorm1d(4).eval()  # a part in evaluation mode stays in it afterwards

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss = self.net(x).square().sum() + self.attention(x, x, x)[0].square().sum()
        return loss + 100 if self.training else loss


@pytest.mark.parametrize("training", [True, False])
def test_without_dropout_keeps_the_training_loss_and_draws_nothing(training: bool) -> None:
    policy = TwoTerms()
    policy.train(training)
    policy.frozen.eval()
    modes = {n: m.training for n, m in policy.named_modules()}
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    statistics = {n: b.clone() for n, b in policy.named_buffers()}
    with without_dropout(policy):
        first, second = policy(x), policy(x)
    assert torch.equal(first, second)  # no dropout
    normalised = x / (1 + 1e-5) ** 0.5  # by the running statistics: mean 0, variance 1
    attended = copy.deepcopy(policy.attention).eval()(x, x, x)[0]
    assert torch.allclose(first, normalised.square().sum() + attended.square().sum() + 100)  # of the training mode
    assert all(torch.equal(statistics[n], b) for n, b in policy.named_buffers())
    assert {n: m.training for n, m in policy.named_modules()} == modes
    with pytest.raises(RuntimeError, match="broken"), without_dropout(policy):
        raise RuntimeError("broken")
    assert {n: m.training for n, m in policy.named_modules()} == modes


@pytest.mark.parametrize("kind", TYPES)
def test_select_action_plays_its_chunk(kind: str, toy_data: Path) -> None:
    built = build(kind, toy_data)
    policy = built.policy
    processed = built.preprocessor(raw_batch(2))
    noise = torch.randn(2, 4, 4)
    policy.reset()
    chunk = policy.predict_action_chunk(processed, noise=noise)
    assert torch.equal(policy.select_action(processed, noise=noise), chunk[:, 0])
    assert torch.equal(policy.select_action(processed), chunk[:, 1])


@pytest.mark.parametrize("kind", TYPES)
def test_images_enter_through_the_same_tokens(kind: str, toy_data: Path) -> None:
    built = build(kind, toy_data, images=True)
    batch = built.preprocessor({**raw_batch(2), "observation.images.top": torch.rand(2, 3, 32, 32)})
    draw = built.policy.sample_draw(2)
    built.policy.per_sample_loss(batch, draw).sum().backward()
    stem = [p for n, p in built.policy.named_parameters() if "images_top" in n]
    assert stem and all(p.grad is not None and p.grad.abs().sum() > 0 for p in stem)


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("kind", TYPES)
def test_several_observation_steps_are_seen(kind: str, images: bool, toy_data: Path) -> None:
    """Each of them counts, in its order; `select_action` remembers them; losses stay per sample and differentiable."""
    built = build(kind, toy_data, images=images, n_obs_steps=3)
    policy = built.policy.eval()
    g = torch.Generator().manual_seed(3)
    states = torch.randn(2, 5, 39, generator=g)
    pictures = torch.rand(2, 5, 3, 32, 32, generator=g)

    def at(steps: list[int], squeeze: bool = False) -> dict[str, Any]:
        batch = {**raw_batch(2), "observation.state": states[:, steps]}
        if images:
            batch["observation.images.top"] = pictures[:, steps]
        if squeeze:
            batch |= {k: v[:, 0] for k, v in batch.items() if k.startswith("observation")}
        return built.preprocessor(batch)

    noise = torch.randn(2, 4, 4, generator=g)
    chunks = [policy.predict_action_chunk(at(s), noise=noise)
              for s in ([0, 1, 2], [3, 1, 2], [0, 3, 2], [0, 1, 3], [2, 1, 0])]  # fmt: skip
    for other in chunks[1:]:
        assert not torch.allclose(chunks[0], other, atol=1e-4)
    with pytest.raises(ValueError, match=r"1 observation steps, and the policy takes 3|takes 3"):
        policy.predict_action_chunk(at([0], squeeze=True), noise=noise)

    policy.reset()
    played = [policy.select_action(at([i], squeeze=True), noise=noise) for i in range(3)]
    first = policy.predict_action_chunk(at([0, 0, 0]), noise=noise)
    second = policy.predict_action_chunk(at([0, 1, 2]), noise=noise)
    for action, expected in zip(played, (first[:, 0], first[:, 1], second[:, 0]), strict=True):
        assert torch.allclose(action, expected, atol=1e-6)
    policy.reset()  # another episode, of which nothing was seen
    anew = policy.predict_action_chunk(at([3, 3, 3]), noise=noise)[:, 0]
    assert torch.allclose(policy.select_action(at([3], squeeze=True), noise=noise), anew, atol=1e-6)

    processed, draw = at([0, 1, 2]), policy.sample_draw(2, g)
    losses = policy.per_sample_loss(processed, draw)
    one = {k: v[1:] for k, v in processed.items() if torch.is_tensor(v)}
    alone = policy.per_sample_loss(one, {k: v[1:] for k, v in draw.items()})
    assert torch.allclose(losses[1:], alone, rtol=1e-4)
    view = PolicyView(policy, policy, lambda b: b, nullcontext)
    raw = {k: v for k, v in processed.items() if torch.is_tensor(v)}
    parameters = dict(policy.named_parameters())
    assert "model.obs_encoder.step" in parameters
    fast = view.squared_gradients(raw, draw, parameters, vectorized=True)
    slow = view.squared_gradients(raw, draw, parameters, vectorized=False)
    assert fast["model.obs_encoder.step"].abs().sum() > 0
    for name, g2 in fast.items():
        assert torch.allclose(g2, slow[name], rtol=1e-3, atol=1e-8), name


def test_tokens_of_a_step_are_together_and_know_their_step(toy_data: Path) -> None:
    built = build("dit_dec", toy_data, images=True, n_obs_steps=2)
    encoder = built.policy.model.obs_encoder
    batch = built.preprocessor({**raw_batch(2), "observation.state": torch.randn(2, 2, 39),
                                "observation.images.top": torch.rand(2, 2, 3, 32, 32)})  # fmt: skip
    seen: list[torch.Tensor] = []
    handle = encoder.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    encoder(batch)
    handle.remove()
    at = list(encoder.tokenizers).index("observation_images_top")
    tokenizer = encoder.tokenizers["observation_images_top"]
    first = sum(t.n_tokens for t in list(encoder.tokenizers.values())[:at])
    per = tokenizer.n_tokens // 2
    for step in range(2):  # each image by itself, in the place of both steps
        image = batch["observation.images.top"][:, step : step + 1].expand(-1, 2, -1, -1, -1)
        alone = tokenizer({"observation.images.top": image})[0][:, :per]
        want = alone + encoder.kind[at] + encoder.step[step]
        found = seen[0][:, first + step * per : first + (step + 1) * per]
        assert torch.allclose(found, want, atol=1e-5)
    features = FeatureTokens("observation.images.top", SimpleNamespace(n_features=3, width=5), 8, False, steps=2)
    found = features({features.key: torch.zeros(1, 6, 5)})[0][0] - features.proj.bias
    assert torch.allclose(found, torch.cat([features.position] * 2), atol=1e-6)


def test_normalisation_is_stable_on_unseen_data(toy_data: Path) -> None:
    """Constant dimensions pass through raw, small deviations are floored, and the model clips the rest."""
    config = policy_config({"type": "dit_dec", **SMALL}, "cpu")
    config.input_features = {"observation.state": PolicyFeature(FeatureType.STATE, (3,))}
    config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (1,))}
    stats = {
        "observation.state": {"mean": torch.tensor([1.0, 2.0, 3.0]), "std": torch.tensor([0.0, 0.01, 2.0])},
        "action": {"mean": torch.zeros(1), "std": torch.ones(1)},
    }
    pre, _ = make_pre_post_processors(config, dataset_stats=stats)
    out = pre({"observation.state": torch.tensor([[1.5, 2.5, 5.0]]), "task": ["x"]})["observation.state"][0]
    assert torch.allclose(out, torch.tensor([1.5, 0.5 / 0.05, 1.0]), rtol=1e-4)
    built = build("dit_dec", toy_data)
    noise = torch.randn(2, 4, 4)
    processed = built.preprocessor(raw_batch(2))
    processed["observation.state"] = torch.full((2, 39), 5.0)
    a = built.policy.predict_action_chunk(processed, noise=noise)
    processed["observation.state"] = torch.full((2, 39), 500.0)
    assert torch.equal(a, built.policy.predict_action_chunk(processed, noise=noise))


def test_words_are_hashed_the_same_everywhere() -> None:
    assert word_ids("Push the puck", 4096, 5) == word_ids("push, the PUCK!", 4096, 5)
    ids = word_ids("Push the puck", 4096, 5)
    assert len(set(ids[:3])) == 3 and ids[3:] == (0, 0) and all(0 < i < 4096 for i in ids[:3])
    assert ids == (3133, 2506, 967, 0, 0)  # checkpoints rely on it
    table = frozen_word_table(64, 8)
    assert torch.equal(table, frozen_word_table(64, 8)) and not table[0].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_action_steps": 9}, "chunk_size"),
        ({"d_model": 30, "n_heads": 4}, "multiple"),
        ({"action_patch": 3}, "divide"),
        ({"n_obs_steps": 0}, "n_obs_steps must be a positive integer"),
        ({"objective": "ddpm"}, "objective must be one of flow, ddim"),
        ({"objective": "ddim", "num_inference_steps": 8}, "must divide diffusion_steps"),
        ({"d_modle": 32}, "Did you mean 'd_model'"),
        ({"type": "dit_deck"}, "Did you mean 'dit_dec'"),
    ],
)
def test_bad_policy_sections_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy_config({"type": "dit_dec", **SMALL, **changes}, "cpu")


def test_a_damaged_checkpoint_is_one_clear_error(toy_data: Path, tmp_path: Path) -> None:
    save_policy(build("dit_dec", toy_data), tmp_path / "p")
    weights = tmp_path / "p" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot load the policy"):
        load_policy(tmp_path / "p")
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_policy(tmp_path)


@pytest.mark.parametrize("kind", TYPES)
def test_gradient_checkpointing_recomputes_and_changes_nothing(kind: str, toy_data: Path) -> None:
    kept, recomputed = build(kind, toy_data), build(kind, toy_data, gradient_checkpointing=True)
    recomputed.policy.load_state_dict(kept.policy.state_dict())
    calls = {"kept": 0, "recomputed": 0}
    gradients, fishers = {}, {}
    for name, loaded in (("kept", kept), ("recomputed", recomputed)):
        policy = loaded.policy.train()
        for block in [*policy.model.obs_encoder.layers, *policy.model.velocity_net.blocks]:
            block.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
        measure = PolicyView(policy, policy, loaded.preprocessor, nullcontext)
        draw = measure.draw(6, torch.Generator().manual_seed(0))
        measure.total(raw_batch(6), draw).backward()
        gradients[name] = {n: p.grad.clone() for n, p in policy.named_parameters()}
        fishers[name] = measure.squared_gradients(raw_batch(6), draw, dict(policy.named_parameters()))
    blocks = SMALL["encoder_layers"] + SMALL["decoder_layers"]
    # kept: the loss once, the Fisher once (vmap); recomputed: the loss and its backward, and so for each of 6 samples
    assert calls == {"kept": 2 * blocks, "recomputed": 2 * blocks * (1 + 6)}
    for n, g in gradients["kept"].items():
        assert torch.equal(g, gradients["recomputed"][n]), n
        assert torch.allclose(fishers["kept"][n], fishers["recomputed"][n], rtol=1e-3, atol=1e-9), n


@pytest.mark.parametrize("kind", TYPES)
def test_ddim_predicts_the_noise_and_finds_the_action_that_it_hides(
    kind: str, toy_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a network that knows the answer: its loss is zero, and acting gives back its action."""
    built = build(kind, toy_data, objective="ddim", num_inference_steps=10)
    policy, n = built.policy, 100
    action = torch.rand(6, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    kept, product = [], 1.0  # the schedule by its definition
    for i in range(n):
        f = [math.cos(math.pi / 2 * (s / n + 0.008) / 1.008) ** 2 for s in (i, i + 1)]
        product *= 1 - min(1 - f[1] / f[0], 0.999)
        kept.append(product)

    view = PolicyView(policy, policy, built.preprocessor, nullcontext)
    parameters = {n: p for n, p in policy.named_parameters() if "velocity_net" in n}
    fast, slow = (
        view.squared_gradients(raw_batch(3), view.draw(3, torch.Generator().manual_seed(2)), parameters, vectorized=v)
        for v in (True, False)
    )
    assert all(torch.allclose(fast[name], slow[name], rtol=1e-3, atol=1e-8) for name in fast)
    seen: list[int] = []

    def knows(x: torch.Tensor, t: torch.Tensor, context: Any) -> torch.Tensor:
        levels = (t * n).round().long().tolist()
        seen.append(levels[0])
        rows = [(x[i] - kept[k] ** 0.5 * action[i]) / (1 - kept[k]) ** 0.5 for i, k in enumerate(levels)]
        return torch.stack(rows)

    monkeypatch.setattr(policy.model, "velocity", knows)
    processed = {**built.preprocessor(raw_batch(6)), "action": action}
    draw = policy.sample_draw(6, torch.Generator().manual_seed(1))
    draw["time"][0] = 1 - 1e-9  # the last level, not one beyond
    found = policy.forward(processed, draw=draw, want=("loss", "target"))
    assert torch.allclose(found[0], torch.zeros(6), atol=1e-4) and torch.equal(found[1]["target"], draw["noise"])
    seen.clear()
    assert torch.allclose(policy.predict_action_chunk(processed, noise=draw["noise"]), action, atol=1e-3)
    assert seen == [90, 80, 70, 60, 50, 40, 30, 20, 10, 0]
    policy.config.clip_sample = 0.25
    assert policy.predict_action_chunk(processed, noise=draw["noise"]).abs().max() <= 0.25


@pytest.mark.parametrize("kind", TYPES)
def test_euler_steps_are_clipped_each(kind: str, toy_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = build(kind, toy_data, num_inference_steps=4, clip_sample=1.0).policy
    steps = iter([8.0, 0.0, 0.0, -2.0])  # out at first, and back from the edge at last
    monkeypatch.setattr(policy.model, "encode", lambda _: None)
    monkeypatch.setattr(policy.model, "velocity", lambda x, *_: torch.full_like(x, next(steps)))
    noise = torch.zeros(2, 4, 4)
    chunk = policy.predict_action_chunk({"observation.state": torch.zeros(2, 39)}, noise=noise)
    assert torch.equal(chunk, torch.full((2, 4, 4), 0.5))
