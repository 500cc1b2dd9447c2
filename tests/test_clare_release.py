"""CLARE as in its released code: kinds of adapters and discriminators, statistics, flags, and files that it wrote.

The files here have the released code's names; what the policy does with them is worked out by plain loops.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from clbench.adapters.clare import (
    ClareConfig,
    ClareLayer,
    clare_layers,
    inject,
    load_adapter,
    save_adapter,
    update_config,
    z_scores,
)
from clbench.adapters.clare_parts import DISCRIMINATORS
from clbench.algorithms.clare import CLARE, decide_expansion
from clbench.algorithms.hooks import Phase
from clbench.checkpoints.policy_io import load_policy
from clbench.checkpoints.run_folder import checkpoint_folder
from clbench.checkpoints.training_state import StateKeeper
from clbench.config.reading import read_overrides
from clbench.config.schema import Config
from clbench.testing.toy import toy_config
from clbench.training.trainer import train
from tests.algorithm_cases import SMALL_CLARE

D, H, Z, R, L = 6, 5, 3, 2, 4  # width, hidden, latent, rank, tokens


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.ReLU(), nn.Linear(2 * D, D))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Net(nn.Module):
    """Two blocks, each with a feed-forward that CLARE adapts, over (B, L, D), or (L, B, D) all the same."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def configuration(**changes: Any) -> dict[str, Any]:
    """The released JSON, small, with these changes; those of a section join it."""
    values: dict[str, Any] = {
        "peft_type": "CLARE", "task_type": None, "base_model_name_or_path": None, "revision": None,
        "auto_mapping": {"base_model_class": "PeftWrapperPolicy", "parent_library": "__main__"},
        "target_modules": r"(?P<layer_name>.+)\.(?P<layer_id>\d+)(?:\.[^.]+)*\.mlp", "inference_mode": True,
        "batch_first": True, "num_learned_task": 3, "feature_dim": D, "out_feature_dim": D,
        "use_trainable_copy": False, "add_zero_init_conv_layer": False,
        "structure": {"policy.layers.0": [2, 3], "policy.layers.1": [1, 3]},
        "discriminator_cfg": {
            "type": "autoencoder", "batch_first": True, "feature_dim": D, "feature_fusion": False,
            "fused_feature_dim": None, "hidden_dim": H, "latent_dim": Z, "num_tokens": L, "lora_rank": R,
            "lora_alpha": 3, "use_lora": False, "use_momentum": True, "momentum": 0.1, "max_batches_tracked": 2000,
        },
        "func_adapter_cfg": {"hidden_dim": 7, "lora_rank": R, "lora_alpha": 3, "use_lora": False},
    }  # fmt: skip
    for key, value in changes.items():
        values[key] = {**values[key], **value} if key.endswith("_cfg") else value
    return values


def linear(into: dict[str, Tensor], name: str, dim_in: int, dim_out: int, bias: bool = True) -> None:
    into[f"{name}.weight"] = torch.randn(dim_out, dim_in) / dim_in**0.5
    if bias:
        into[f"{name}.bias"] = torch.randn(dim_out) / 3


def discriminator(values: dict[str, Any], link: int) -> dict[str, Tensor]:
    """A discriminator's weights in the released names."""
    cfg, s = values["discriminator_cfg"], dict[str, Tensor]()
    d = D
    if cfg["feature_fusion"]:
        d = cfg["fused_feature_dim"]
        linear(s, "fusion_layer", L * D, d)
    if cfg["use_lora"]:
        for name, a, b in (("encoder_down", d, H), ("encoder_up", H, Z), ("decoder_down", Z, H), ("decoder_up", H, d)):
            linear(s, f"{name}_A", a, R, bias=False)
            linear(s, f"{name}_B", R, b)
    elif cfg["type"] == "autoencoder_small":
        linear(s, "encoder", d, H)
        linear(s, "decoder", H, d)
    else:
        linear(s, "encoder.0", d, H)
        if cfg["type"] == "vae":
            linear(s, "enc_mu", H, Z)
            linear(s, "enc_logvar", H, Z)
        else:
            linear(s, "encoder.2", H, Z)
        linear(s, "decoder.0", Z, H)
        linear(s, "decoder.2", H, d)
    statistics = {"running_mean": torch.rand(()), "running_std": torch.rand(()), "num_batches_tracked": torch.tensor(9)}
    numbers = {"task_id": link, "connected_adapter_task_id": link, "connected_adapter_indices": link}
    return {**s, **statistics, **{k: torch.tensor(v) for k, v in numbers.items()}}


def adapter(values: dict[str, Any]) -> dict[str, Tensor]:
    """An adapter's weights in the released names."""
    s: dict[str, Tensor] = {}
    if values["func_adapter_cfg"]["use_lora"]:
        for name, a, b in (("0", D, 2 * D), ("2", 2 * D, D)):
            linear(s, f"layer_wise_lora_adapters.{name}.lora_a", a, R, bias=False)
            linear(s, f"layer_wise_lora_adapters.{name}.lora_b", R, b, bias=False)
    elif values["use_trainable_copy"]:
        linear(s, "0", D, 2 * D)
        linear(s, "2", 2 * D, D)
        return s
    else:
        linear(s, "down_proj", D, 7)
        linear(s, "up_proj", 7, D)
    return {**s, "task_id": torch.tensor(0)}


LINKS = {"policy.layers.0.mlp": [0, 1, 0], "policy.layers.1.mlp": [0, 0, 0]}


def released(folder: Path, values: dict[str, Any], default: str = "") -> dict[str, Tensor]:
    """Write such a file; `default`: what stands behind `clare_func_adapters` in some of them."""
    torch.manual_seed(1)
    state: dict[str, Tensor] = {}
    for layer, links in LINKS.items():
        parts = [("func_adapters", i, adapter(values)) for i in range(max(links) + 1)]
        parts += [("discriminators", j, discriminator(values, a)) for j, a in enumerate(links)]
        for kind, i, weights in parts:
            state |= {f"base_model.model.{layer}.clare_{kind}{default}.{i}.{n}": w for n, w in weights.items()}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_file(state, folder / "adapter_model.safetensors")
    return state


def expected_error(s: dict[str, Tensor], cfg: dict[str, Any], x: Tensor) -> float:
    """e(x) of one discriminator for one sample x (L, D)."""

    def apply(name: str, h: Tensor) -> Tensor:
        if cfg["use_lora"]:
            return 1.5 * F.linear(F.linear(h, s[f"{name}_A.weight"]), s[f"{name}_B.weight"], s[f"{name}_B.bias"])
        return F.linear(h, s[f"{name}.weight"], s[f"{name}.bias"])

    if cfg["feature_fusion"]:
        x = F.linear(x.flatten(), s["fusion_layer.weight"], s["fusion_layer.bias"])
    if cfg["type"] == "autoencoder_small":
        return float((apply("decoder", apply("encoder", x).relu()) - x).square().mean())
    names = ("encoder_down", "encoder_up", "decoder_down", "decoder_up") if cfg["use_lora"] else (
        "encoder.0", "enc_mu" if cfg["type"] == "vae" else "encoder.2", "decoder.0", "decoder.2")  # fmt: skip
    h = apply(names[0], x).relu()
    z = apply(names[1], h)  # no ReLU at the latent
    error = float((apply(names[3], apply(names[2], z).relu()) - x).square().mean())
    if cfg["type"] == "vae":
        v = apply("enc_logvar", h)
        normal = torch.distributions.Normal(z, (0.5 * v).exp())
        kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(-1)
        error += float(kl.mean()) / x.shape[-1]
    return error


def expected_output(base: Any, s: dict[str, Tensor], values: dict[str, Any], x: Tensor) -> Tensor:
    """The layer's output for one sample x (L, D) with one adapter."""
    if values["func_adapter_cfg"]["use_lora"]:
        for i, m in ((0, base[0]), (2, base[2])):
            name = f"layer_wise_lora_adapters.{i}"
            weight = m.weight + 1.5 * s[f"{name}.lora_b.weight"] @ s[f"{name}.lora_a.weight"]
            x = F.linear(x if i == 0 else x.relu(), weight, m.bias)
        return x
    first, second = ("0", "2") if values["use_trainable_copy"] else ("down_proj", "up_proj")
    h = F.linear(x, s[f"{first}.weight"], s[f"{first}.bias"]).relu()
    return base(x) + F.linear(h, s[f"{second}.weight"], s[f"{second}.bias"])


LORA = {"use_lora": True}
KINDS = {
    "as in the README": {},
    "LoRA": {"func_adapter_cfg": LORA, "discriminator_cfg": LORA},
    "copies, small": {"use_trainable_copy": True, "discriminator_cfg": {"type": "autoencoder_small"}},
    "fusion": {"discriminator_cfg": {"feature_fusion": True, "fused_feature_dim": 3}},
    "vae": {"discriminator_cfg": {"type": "vae"}},
    "convolution, which it does not have": {"add_zero_init_conv_layer": True},
    "tokens first": {"batch_first": False, "discriminator_cfg": {"batch_first": False}},
    "tokens first, LoRA": {"batch_first": False, "func_adapter_cfg": LORA, "discriminator_cfg": {"batch_first": False}},
    "tokens first, copies": {"batch_first": False, "use_trainable_copy": True,
                             "discriminator_cfg": {"batch_first": False, "feature_fusion": True,
                                                   "fused_feature_dim": 4}},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_released_file_of_several_layers_does_what_its_weights_say(kind: str, tmp_path: Path) -> None:
    values = configuration(**KINDS[kind])
    state = released(tmp_path, values, ".default" if kind == "LoRA" else "")
    net, plain = Net(), Net()
    config = load_adapter(net, tmp_path)
    assert config.num_learned_task == 3 and config.discriminator_cfg["statistics"] == "zero_one"
    torch.manual_seed(2)
    x = 2 * torch.randn(30, L, D)
    used = set()
    for i, links in enumerate(LINKS.values()):
        layer: Any = net.get_submodule(f"layers.{i}.mlp")
        assert layer.links == links

        def part(name: str, i: int = i) -> dict[str, Tensor]:
            prefix = f"base_model.model.policy.layers.{i}.mlp.clare_{name}."
            flat = {k.replace(".default.", "."): v for k, v in state.items()}
            return {k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)}

        errors = [[expected_error(part(f"discriminators.{j}"), values["discriminator_cfg"], row) for j in range(3)]
                  for row in x]  # fmt: skip
        assert torch.allclose(layer.errors(x).T, torch.tensor(errors), rtol=1e-4, atol=1e-6)
        route = [links[min(range(3), key=lambda j: row[j])] for row in errors]
        want = torch.stack([expected_output(plain.get_submodule(f"layers.{i}.mlp"), part(f"func_adapters.{a}"), values,
                                            row) for a, row in zip(route, x, strict=True)])  # fmt: skip
        out = layer(x) if values["batch_first"] else layer(x.transpose(0, 1)).transpose(0, 1)
        assert torch.allclose(out, want, atol=1e-4) and layer.route.tolist() == route
        used |= {(i, a) for a in route}
        for a in {0, max(links)}:  # as in training, when one adapter is forced
            layer.forced = a
            forced = layer(x) if values["batch_first"] else layer(x.transpose(0, 1)).transpose(0, 1)
            base = plain.get_submodule(f"layers.{i}.mlp")
            assert torch.allclose(forced[0], expected_output(base, part(f"func_adapters.{a}"), values, x[0]), atol=1e-4)
            layer.forced = None
        newest = layer.discriminators[-1]
        assert torch.allclose(newest.error(x), layer.errors(x)[-1], atol=1e-5)
        assert float(newest.mean) == float(part("discriminators.2")["running_mean"]) and int(newest.batches) == 9
    assert used == {(0, 0), (0, 1), (1, 0)}
    again = Net()
    save_adapter(net, config, tmp_path / "ours", "somewhere")
    load_adapter(again, tmp_path / "ours")
    x = x if values["batch_first"] else x.transpose(0, 1)
    assert torch.equal(again(x), net(x))


def test_keys_without_groups_in_the_pattern_are_the_matched_names(tmp_path: Path) -> None:
    values = configuration(target_modules=r".*layers\.\d+\.mlp",
                           structure={"policy.layers.0.mlp.0": [2, 3], "policy.layers.1.mlp.0": [1, 3]})  # fmt: skip
    released(tmp_path, values)
    assert load_adapter(Net(), tmp_path).structure == {"layers.0.mlp.0": [2, 3], "layers.1.mlp.1": [1, 3]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"structure": {"policy.layers.0": [2, 3]}}, "structure has None for 'policy.layers.1'"),
        ({"structure": {"policy.layers.0": [3, 3], "policy.layers.1": [1, 3]}}, "are 2 adapters and 3"),
        ({"target_modules": "nothing"}, "does not match the layer"),
        ({"target_modules": {"x": {}}}, "one regular expression"),
        ({"use_trainable_copy": True}, "does not match its adapter_config.json"),
        ({"discriminator_cfg": {"type": "vae"}}, "does not fit the kinds"),
        ({"func_adapter_cfg": LORA}, "does not fit the kinds"),
    ],
)
def test_a_released_file_that_contradicts_itself_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    released(tmp_path, configuration())
    (tmp_path / "adapter_config.json").write_text(json.dumps(configuration(**change)))
    with pytest.raises(ValueError, match=message):
        load_adapter(Net(), tmp_path)


def test_a_released_file_for_another_policy_is_refused(tmp_path: Path) -> None:
    released(tmp_path, configuration())
    with pytest.raises(ValueError, match=r"'layers\.0\.mlp', which the base policy does not have"):
        load_adapter(nn.Sequential(nn.Linear(2, 2)), tmp_path)


def layers_with(net: nn.Module, pattern: str = r"layers\.\d+\.mlp", **changes: Any) -> list[ClareLayer]:
    kept = {k: v for k, v in configuration(**changes).items() if k in ClareConfig.__dataclass_fields__}
    config = ClareConfig(**{**kept, "target_modules": pattern, "structure": {}, "feature_dim": None,
                            "out_feature_dim": None, "auto_mapping": None})  # fmt: skip
    config.discriminator_cfg["feature_dim"] = None
    return inject(net, config)


def test_lora_in_every_linear_layer_has_as_many_parameters_as_released() -> None:
    ffn = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128))
    count = {}
    for where in ("whole", "linears"):
        cfg = {"use_lora": True, "lora_rank": 32, "lora_layers": where}
        adapter = layers_with(nn.ModuleDict({"ffn": ffn}), "ffn", func_adapter_cfg=cfg)[0].add_adapter()
        count[where] = sum(p.numel() for p in adapter.parameters())
        ffn = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128))
    assert count == {"whole": 8192, "linears": 24576}


@pytest.mark.parametrize("kind", [{}, {"use_trainable_copy": True}])
def test_new_adapters_with_a_zero_convolution_change_nothing_and_train(kind: dict[str, Any], tmp_path: Path) -> None:
    net, x = Net(), torch.randn(3, L, D)
    before = net(x)
    layers = layers_with(net, add_zero_init_conv_layer=True, **kind)
    for layer in layers:
        for _ in range(2):
            layer.add_adapter()
        layer.add_discriminator(0)
        layer.add_discriminator(1)
    assert torch.equal(net(x), before)
    torch.manual_seed(3)
    for layer in layers:
        for a in layer.adapters:
            nn.init.normal_(a.zero.weight)  # type: ignore[union-attr,arg-type]
    routed = layers[0](x)
    for row, a in enumerate(layers[0].route.tolist()):  # type: ignore[union-attr]
        one: Any = layers[0].adapters[a]
        inner = one.copy(x[row]) if kind else one.up(one.down(x[row]).relu())
        want = layers[0].base_layer(x[row]) + F.linear(inner, one.zero.weight, one.zero.bias)
        assert torch.allclose(routed[row], want, atol=1e-5)
    update_config(layers[0].config, layers, 2)
    save_adapter(net, layers[0].config, tmp_path, "somewhere")
    again = Net()
    load_adapter(again, tmp_path)
    assert torch.equal(again(x), net(x))


def test_a_copy_starts_as_the_base_layer() -> None:
    net, x = Net(), torch.randn(3, L, D)
    base = net.layers[0].mlp(x)  # type: ignore[operator,union-attr]
    layer = layers_with(net, use_trainable_copy=True)[0]
    layer.add_adapter()
    layer.forced = 0
    assert torch.allclose(layer(x), 2 * base)


def test_what_a_layer_cannot_do_is_an_error() -> None:
    fused = layers_with(Net(), discriminator_cfg={"feature_fusion": True, "num_tokens": 5})[0]
    fused.add_adapter()
    fused.forced = 0  # before there is a discriminator
    with pytest.raises(ValueError, match=r"the layer has 4 tokens of width 6\. Set num_tokens"):
        fused(torch.randn(3, L, D))
    inside = {"use_lora": True, "lora_layers": "linears"}
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(D, 2)})
    with pytest.raises(ValueError, match="MultiheadAttention"):
        layers_with(net, "attention", func_adapter_cfg=inside)


def statistics(momentum: float | None, batches: list[Tensor]) -> list[tuple[float, float]]:
    """μ and σ after every batch, starting from (0, 1)."""
    cfg = ClareConfig(
        discriminator_cfg={
            "hidden_dim": 3, "latent_dim": 2, "statistics": "zero_one", "use_momentum": momentum is not None,
            "momentum": momentum or 0.1,
        }
    ).discriminator_cfg  # fmt: skip
    d, found = DISCRIMINATORS["autoencoder"](D, cfg), []
    for batch in batches:
        d.track(batch)
        found.append((float(d.mean), float(d.std)))
    return found


def test_statistics_from_zero_and_one() -> None:
    torch.manual_seed(0)
    batches = [torch.rand(10) + i for i in range(6)]
    mean, std = 0.0, 1.0
    for got, b in zip(statistics(0.25, batches), batches, strict=True):
        mean, std = 0.75 * mean + 0.25 * float(b.mean()), 0.75 * std + 0.25 * float(b.std())
        assert got == pytest.approx((mean, std), rel=1e-5)
    means = torch.stack([b.mean() for b in batches])
    for n, got in enumerate(statistics(None, batches), 1):
        assert got == pytest.approx((float(means[:n].mean()), float(means[:n].std()) if n > 1 else 1.0), rel=1e-4)
    assert statistics(0.25, [torch.rand(1)]) == [(0.0, 1.0)]  # one sample has no deviation: not tracked


def test_absolute_z_scores_and_which_layers_expand() -> None:
    errors = torch.tensor([[1.0, 5.0]])
    assert z_scores(errors, torch.tensor([3.0]), torch.tensor([2.0])).tolist() == [0.0]
    assert z_scores(errors, torch.tensor([3.0]), torch.tensor([2.0]), absolute=True).tolist() == [1.0]
    z = [torch.tensor([v]) for v in (3.0, 1.0, 9.0, 5.0)]
    assert decide_expansion(z, 2.0, 1, 2, "shallowest") == [False, False, True, True]
    assert decide_expansion(z, 2.0, 1, 2, "shallowest", "shallowest") == [True, False, True, False]
    assert decide_expansion(z, 50.0, 1, None, "deepest") == [False, False, False, True]


def test_the_readmes_flags_are_read_as_our_keys(toy_data: Path, tmp_path: Path) -> None:
    flags = {
        "detect_distribution_shift_steps": ("detect_steps", 201),
        "train_discriminators_steps": ("discriminator_steps", 9),
        "detect_distribution_shift_batch_size": ("detect_batch_size", 33),
        "detect_distribution_shift_num_workers": ("detect_num_workers", 16),
        "detect_distribution_shift_log_freq": ("detect_log_every", 11),
        "train_discriminators_batch_size": ("discriminator_batch_size", 34),
        "train_discriminators_num_workers": ("discriminator_num_workers", 15),
        "train_discriminators_log_freq": ("discriminator_log_every", 51),
        "train_discriminators_eval_freq": ("discriminator_eval_every", 2000),
        "train_discriminators_save_freq": ("discriminator_save_every", 4),
        "expand_threshold": ("expand_threshold", 10.0), "maximum_expand": ("maximum_expand", 3),
    }  # fmt: skip
    read = read_overrides([f"--{flag}={value}" for flag, (_, value) in flags.items()], Config)
    assert read == {"algorithm": dict(flags.values())}
    config = toy_config(toy_data, {"name": "clare", **read["algorithm"]})
    algorithm = CLARE(CLARE.Config(**read["algorithm"]))
    algorithm.check(config)
    algorithm.ctx = type("Context", (), {"train": config.train, "k": 1})()  # type: ignore[assignment]
    detect, _, discriminators = algorithm.phases(algorithm.ctx)
    assert isinstance(detect, Phase)
    assert (detect.steps, detect.batch_size, detect.num_workers, detect.log_every) == (201, 33, 16, 11)
    assert (discriminators.steps, discriminators.batch_size, discriminators.num_workers) == (9, 34, 15)
    assert (discriminators.log_every, discriminators.save_every) == (51, 4)
    keeper = StateKeeper(tmp_path, 3, None)
    assert [s for s in range(1, 9) if keeper.due(100 + s, s, 4)] == [4, 8]
    assert [s for s in range(1, 9) if keeper.due(100 + s, s)] == [2, 5, 8]


def test_a_json_takes_the_released_behaviour_from_our_keys(toy_data: Path, tmp_path: Path) -> None:
    values = configuration(func_adapter_cfg=LORA, structure={})
    (tmp_path / "adapter_config.json").write_text(json.dumps({**values, "_module_configs": {}}))
    section: dict[str, Any] = {
        "peft_cfg_path": str(tmp_path), "adapter_lora_layers": "linears", "discriminator_statistics": "zero_one",
        "discriminator_latent_activation": "none",
    }  # fmt: skip
    algorithm = CLARE(CLARE.Config(**section))
    algorithm.check(toy_config(toy_data, {"name": "clare"}))
    config: Any = algorithm._peft
    assert config.func_adapter_cfg["lora_layers"] == "linears" and config.structure == {}
    assert config.discriminator_cfg["statistics"] == "zero_one"
    assert config.to_dict()["discriminator_cfg"]["latent_activation"] == "none"
    plain = CLARE(CLARE.Config(peft_cfg_path=str(tmp_path / "adapter_config.json")))
    plain.check(toy_config(toy_data, {"name": "clare"}))
    assert not {"statistics", "latent_activation", "beta"} & set(plain._peft.to_dict()["discriminator_cfg"])  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linears", "copies"])
def test_runs_with_the_released_behaviour(kind: str, toy_data: Path, tmp_path: Path) -> None:
    section = {"name": "clare", **SMALL_CLARE, "expand_threshold": -1e9, "discriminator_statistics": "zero_one",
               "discriminator_latent_activation": "none", "z_score": "absolute", "maximum_expand_keeps": "shallowest",
               "target_modules": r".*obs_encoder\.layers\.\d+\.ffn", "discriminator_save_every": 2}  # fmt: skip
    if kind == "linears":
        section |= {"adapter_lora": True, "adapter_lora_layers": "linears", "discriminator_momentum": None}
    else:
        values = {"peft_type": "CLARE", "target_modules": section["target_modules"], "use_trainable_copy": True,
                  "discriminator_cfg": {"type": "vae", "hidden_dim": 8, "latent_dim": 4}}  # fmt: skip
        (tmp_path / "clare.json").write_text(json.dumps(values))
        section["peft_cfg_path"] = str(tmp_path / "clare.json")
    folder = train(toy_config(toy_data, section, f"output_dir={tmp_path}"), "r")
    first, last = (load_policy(checkpoint_folder(folder, k) / "policy").policy for k in (0, 2))
    old, new = clare_layers(first)[0], clare_layers(last)[0]
    assert len(new.adapters) == len(new.discriminators) == 3
    kept, states = old.adapters[0].state_dict(), [a.state_dict() for a in new.adapters]
    assert all(torch.equal(v, states[0][n]) for n, v in kept.items())
    assert not any(torch.equal(states[1][n], states[2][n]) for n in kept)  # each has been trained
