"""CLARE: its mathematics against plain loops, its configuration files, its three phases, linking on a revisit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from clbench.adapters.clare import (
    ClareConfig,
    ClareLayer,
    capturing,
    clare_layers,
    inject,
    load_adapter,
    save_adapter,
    update_config,
    z_scores,
)
from clbench.adapters.clare_parts import Autoencoder
from clbench.algorithms.build import build_algorithm
from clbench.algorithms.clare import CLARE, decide_expansion
from clbench.checkpoints.policy_io import load_policy
from clbench.checkpoints.run_folder import checkpoint_folder
from clbench.io import read_json, read_jsonl
from clbench.testing.toy import toy_config
from clbench.training.trainer import train
from tests.algorithm_cases import SMALL_CLARE

# As in the CLARE repository's README, with the layer of our DiT-Dec.
README_JSON: dict[str, Any] = {
    "peft_type": "CLARE",
    "task_type": None,
    "auto_mapping": {"base_model_class": "PeftWrapperPolicy", "parent_library": "__main__"},
    "base_model_name_or_path": None,
    "revision": None,
    "target_modules": ".*velocity_net.cond_proj",
    "inference_mode": True,
    "batch_first": True,
    "num_learned_task": 1,
    "feature_dim": 32,
    "out_feature_dim": 16,
    "use_trainable_copy": False,
    "add_zero_init_conv_layer": False,
    "structure": {"model.velocity_net.cond_proj.0": [1, 1]},
    "discriminator_cfg": {
        "type": "autoencoder",
        "batch_first": True,
        "feature_dim": 32,
        "feature_fusion": False,
        "fused_feature_dim": None,
        "hidden_dim": 256,
        "latent_dim": 128,
        "num_tokens": 16,
        "lora_rank": 32,
        "lora_alpha": 32,
        "use_lora": False,
        "use_momentum": True,
        "momentum": 0.1,
        "max_batches_tracked": 2000,
    },
    "func_adapter_cfg": {"hidden_dim": 1024, "lora_rank": 32, "lora_alpha": 32, "use_lora": False},
}


class Net(nn.Module):
    """Two layers to adapt: one over tokens, one over vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        self.head = nn.Linear(6, 3)
        self.after = 0

    def forward(self, x: Tensor) -> Tensor:
        out = self.head(self.ffn(x).mean(1))
        self.after += 1
        return out


def adapted(
    lora: bool = False, adapters: int = 3, links: tuple[int, ...] = (0, 1, 2, 1)
) -> tuple[Net, list[ClareLayer]]:
    torch.manual_seed(0)
    net = Net()
    config = ClareConfig(
        target_modules="ffn|head",
        discriminator_cfg={"hidden_dim": 5, "latent_dim": 2},
        func_adapter_cfg={"hidden_dim": 4, "use_lora": lora, "lora_rank": 2, "lora_alpha": 3},
    )
    layers = inject(net, config)
    for layer in layers:
        for _ in range(adapters):
            adapter = layer.add_adapter()
            if lora:
                nn.init.normal_(adapter.up.weight)
        for link in links:
            layer.add_discriminator(link)
    return net, layers


@pytest.mark.parametrize("lora", [False, True])
def test_routing_equals_a_loop_over_samples_and_discriminators(lora: bool) -> None:
    _, layers = adapted(lora)
    torch.manual_seed(1)
    for layer, x in zip(layers, (torch.randn(40, 5, 6), torch.randn(40, 6)), strict=True):
        chosen = []
        expected = []
        for row in x:
            errors = [float((row - d(row)).square().mean().detach()) for d in layer.discriminators]
            j = min(range(len(errors)), key=lambda i: errors[i])
            a = layer.adapters[layer.links[j]]
            h = a.down(row)
            h = h if lora else h.relu()
            expected.append(layer.base_layer(row[None])[0] + (1.5 if lora else 1.0) * a.up(h))
            chosen.append(layer.links[j])
        out = layer(x)
        assert layer.route is not None and layer.route.tolist() == chosen
        assert len(set(chosen)) > 1
        assert torch.allclose(out, torch.stack(expected), atol=1e-5)


def test_rows_are_routed_independently() -> None:
    _, layers = adapted()
    x = torch.randn(8, 5, 6)
    whole = layers[0](x)
    other = x.clone()
    other[1:] = torch.randn(7, 5, 6)
    assert torch.equal(layers[0](other)[0], whole[0])


def test_stacked_weights_follow_training() -> None:
    _, layers = adapted()
    x = torch.randn(4, 6)
    before = layers[1](x)
    with torch.no_grad():
        for a in layers[1].adapters:
            a.up.bias.add_(1.0)  # type: ignore[union-attr]
    assert torch.allclose(layers[1](x), before + 1.0, atol=1e-5)


def test_z_scores_equal_a_loop() -> None:
    errors = torch.rand(3, 50)
    mean, std = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.1, 0.5])
    loop = [
        sum((float(e) - float(m)) / float(s) for e in row) / 50 for row, m, s in zip(errors, mean, std, strict=True)
    ]
    assert torch.allclose(z_scores(errors, mean, std), torch.tensor(loop), atol=1e-4)


def test_running_statistics_follow_the_momentum_rule() -> None:
    cfg = ClareConfig(discriminator_cfg={"hidden_dim": 3, "latent_dim": 2, "max_batches_tracked": 4}).discriminator_cfg
    d = Autoencoder(6, cfg)
    batches = [torch.rand(10) for _ in range(6)]
    mean = std = 0.0
    for i, b in enumerate(batches):
        d.track(b)
        if i < 4:  # later batches are not tracked
            m = 1.0 if i == 0 else 0.1
            mean, std = (1 - m) * mean + m * float(b.mean()), (1 - m) * std + m * float(b.std())
    assert float(d.mean) == pytest.approx(mean, rel=1e-5)
    assert float(d.std) == pytest.approx(std, rel=1e-5)
    assert int(d.batches) == 4


def brute_force(z: list[list[float]], gamma: float, at_least: int, at_most: int | None, force: str) -> list[bool]:
    """The rule as one would say it, layer by layer."""
    n = len(z)
    if all(not v for v in z):
        return [True] * n
    want = [all(x > gamma for x in v) for v in z]
    ranked = sorted(range(n), key=lambda i: min(z[i]), reverse=True)
    candidates = list(range(n)) if force == "shallowest" else ranked
    while sum(want) < min(at_least, n):
        want[next(i for i in candidates if not want[i])] = True
    if at_most is not None:
        while sum(want) > at_most:
            want[[i for i in ranked if want[i]][-1]] = False
    return want


def test_expansion_equals_the_plain_rule_on_random_cases() -> None:
    g = torch.Generator().manual_seed(0)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=g))

    kinds = set()
    for _ in range(500):
        n, d = integer(1, 6), integer(0, 4)
        z = [(4 * torch.randn(d, generator=g)).tolist() for _ in range(n)]
        at_least = integer(0, 3)
        at_most = None if integer(0, 2) else integer(max(at_least, 1), 6)
        force = ("shallowest", "most_novel")[integer(0, 2)]
        got = decide_expansion([torch.tensor(v) for v in z], 2.5, at_least, at_most, force)
        assert got == brute_force(z, 2.5, at_least, at_most, force), (z, at_least, at_most, force)
        kinds.add(sum(got))
    assert {0, 1, 2, 3} <= kinds


def test_a_single_known_discriminator_prevents_expansion() -> None:
    assert decide_expansion([torch.tensor([50.0, 2.0])], 2.5, 0, None, "shallowest") == [False]
    assert decide_expansion([torch.tensor([50.0, 3.0])], 2.5, 0, None, "shallowest") == [True]
    assert decide_expansion([torch.tensor([-50.0])], 2.5, 0, None, "shallowest") == [False]  # signed


def test_capture_stops_after_the_last_layer_and_restores() -> None:
    net, layers = adapted()
    x = torch.randn(2, 5, 6)
    with capturing(layers) as capture:
        net(x)
    assert torch.equal(capture.inputs["ffn"], x) and capture.inputs["head"].shape == (2, 6)
    assert net.after == 0
    net(x)
    assert net.after == 1 and all(layer.capturing is None for layer in layers)
    with pytest.raises(ValueError, match="never reached head"), capturing(layers):
        net.ffn(x)


def test_reads_the_readmes_json_and_writes_it_back(toy_data: Path, tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(README_JSON))
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(tmp_path))  # unmodified PEFT finds our class by peft_type
    assert isinstance(config, ClareConfig)
    assert config.links == {"model.velocity_net.cond_proj.0": [0]}
    config.save_pretrained(str(tmp_path / "again"))
    written = read_json(tmp_path / "again" / "adapter_config.json")
    assert {k: written[k] for k in README_JSON} == README_JSON


def test_a_run_can_take_its_sizes_from_such_a_file(toy_data: Path, tmp_path: Path) -> None:
    path = tmp_path / "clare.json"
    small = copy.deepcopy(README_JSON)
    small["discriminator_cfg"].update(hidden_dim=8, latent_dim=4)
    small["func_adapter_cfg"].update(hidden_dim=6)
    path.write_text(json.dumps(small))
    section = {"name": "clare", "peft_cfg_path": str(path), "discriminator_steps": 2, "detect_steps": 2}
    folder = train(toy_config(toy_data, section, f"output_dir={tmp_path}", "train.steps=1"), "r")
    written = read_json(checkpoint_folder(folder, 1) / "policy" / "adapter_config.json")
    assert written["structure"] == {"model.velocity_net.cond_proj.0": [2, 2]}
    assert written["num_learned_task"] == 2 and written["func_adapter_cfg"]["hidden_dim"] == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_trainable_copy": "yes"}, "use_trainable_copy must be true or false"),
        ({"use_trainable_copy": True, "func_adapter_cfg": {"use_lora": True}}, "exclude each other"),
        ({"batch_first": False}, "set both alike"),
        ({"target_modules": [{"pattern": "x"}]}, "join several patterns by"),
        ({"discriminator_cfg": {"type": "rnd"}}, "must be one of autoencoder, autoencoder_small, vae"),
        ({"discriminator_cfg": {"type": "vae", "use_lora": True}}, "for type autoencoder, not vae"),
        ({"discriminator_cfg": {"feature_fusion": True}}, "needs num_tokens"),
        (
            {"add_zero_init_conv_layer": True, "func_adapter_cfg": {"use_lora": True, "lora_layers": "linears"}},
            "needs an adapter beside the layer",
        ),
        ({"discriminator_cfg": {"hiden_dim": 3}}, "Did you mean 'hidden_dim'"),
        ({"func_adapter_cfg": {"hidden_dim": 0}}, "positive integer"),
        ({"structure": {"x.0": [2, 1]}}, "do not fit together"),
        ({"structure": {"x.0": [1, 1]}, "links": {"x.0": [1]}}, "do not fit together"),
    ],
)
def test_what_is_not_supported_is_an_error(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClareConfig(**{"target_modules": "x", **change})


def test_wrong_dimensions_or_targets_are_errors() -> None:
    with pytest.raises(ValueError, match="feature_dim is 7, layer 'head' has 6"):
        inject(Net(), ClareConfig(target_modules="head", feature_dim=7))
    with pytest.raises(ValueError, match="matches no module"):
        inject(Net(), ClareConfig(target_modules="nothing"))
    with pytest.raises(ValueError, match="not a regular expression"):
        inject(Net(), ClareConfig(target_modules="("))


def test_saved_adapters_load_here_and_through_peft(tmp_path: Path) -> None:
    net, layers = adapted()
    config = layers[0].config
    update_config(config, layers, 3)
    save_adapter(net, config, tmp_path, "somewhere")
    x = torch.randn(9, 5, 6)
    want = net(x)
    torch.manual_seed(0)
    ours, theirs = Net(), None
    load_adapter(ours, tmp_path)
    assert torch.equal(ours(x), want)
    torch.manual_seed(0)
    theirs = PeftModel.from_pretrained(Net(), str(tmp_path))
    assert torch.equal(theirs(x), want)
    assert [layer.links for layer in clare_layers(ours)] == [layer.links for layer in layers]


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    return [r for r in read_jsonl(folder / "log.jsonl") if r["event"] == name]


@pytest.fixture(scope="module")
def revisited(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hammer → push → hammer again with fresh demonstrations; discriminators trained until they know their task."""
    section = {"name": "clare", **SMALL_CLARE, "discriminator_steps": 300, "discriminator_lr": 5e-3,
               "discriminator_hidden": 32, "discriminator_latent": 16, "expand_threshold": 8.0,
               "at_least_expand": 0}  # fmt: skip
    out = tmp_path_factory.mktemp("revisit")
    config = toy_config(
        toy_data, section, f"output_dir={out}", "dataset.task_order=[0,1,0]", "dataset.fresh_on_revisit=true"
    )
    return train(config, "r")


def test_phases_run_in_the_papers_order(revisited: Path) -> None:
    rows = events(revisited, "step")
    order = list(dict.fromkeys((r["k"], r["phase"]) for r in rows))
    assert order == [(k, p) for k in (0, 1) for p in ("adapters", "discriminators")] + [(2, "discriminators")]
    assert len(events(revisited, "clare_expansion")) == 3


def test_a_revisited_task_links_to_its_old_adapter(revisited: Path) -> None:
    first, new, again = events(revisited, "clare_expansion")
    assert all(first["expanded"].values()) and all(new["expanded"].values())
    assert not any(again["expanded"].values())  # no layer is novel: nothing trains in the adapters phase
    assert all(a == 0 for a in again["adapter"].values())
    structure = events(revisited, "clare_structure")[-1]
    for layer, links in structure["links"].items():
        assert links == [0, 1, 0]
        assert structure["adapters"][layer] == 2 and structure["discriminators"][layer] == 3
    z_new, z_again = (min(min(v) for v in e["z"].values()) for e in (new, again))
    assert z_new > 8 > z_again


def test_forced_expansion_of_the_shallowest_layer(toy_data: Path, tmp_path: Path) -> None:
    section = {"name": "clare", **SMALL_CLARE, "expand_threshold": 1e9}
    folder = train(toy_config(toy_data, section, f"output_dir={tmp_path}"), "r")
    for event in events(folder, "clare_expansion")[1:]:
        assert list(event["expanded"].values()) == [True, False]
    ends = events(folder, "task_end")
    assert ends[0]["parameters_added"] > ends[1]["parameters_added"] > 0


def test_adapters_phase_moves_only_the_new_adapters(toy_data: Path, tmp_path: Path) -> None:
    section = {"name": "clare", **SMALL_CLARE, "expand_threshold": -1e9}
    folder = train(toy_config(toy_data, section, f"output_dir={tmp_path}"), "r")
    states = [load_policy(checkpoint_folder(folder, k) / "policy").policy.state_dict() for k in range(3)]
    base = load_policy(read_json(folder / "manifest.json")["base"]["path"]).policy.state_dict()
    for k, state in enumerate(states):
        for name, value in state.items():
            plain = name.replace(".base_layer.", ".")
            if plain in base:
                assert torch.equal(value, base[plain])
            elif k and name in states[k - 1]:
                assert torch.equal(value, states[k - 1][name])


def test_settings_that_cannot_work_are_refused(toy_data: Path) -> None:
    for change, message in (
        ({"force_expand": "widest"}, "one of shallowest, deepest, most_novel"),
        ({"discriminator_eval_every": 10}, "evaluated after all its phases"),
        ({"discriminator_num_workers": -1}, "must not be negative"),
        ({"at_least_expand": 3, "maximum_expand": 2}, "maximum_expand"),
        ({"detect_steps": 0}, "at least 1"),
        ({"peft_cfg_path": "/nowhere.json"}, "does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            build_algorithm(toy_config(toy_data, {"name": "clare", **change}))
    carried = toy_config(toy_data, {"name": "clare"}, "train.optimizer_across_tasks=carried")
    with pytest.raises(ValueError, match="must be fresh"):
        build_algorithm(carried)
    other = toy_config(toy_data, {"name": "clare"}, "policy.type=xvla")
    with pytest.raises(ValueError, match="no default layers for policy 'xvla'"):
        CLARE(CLARE.Config()).check(other)
