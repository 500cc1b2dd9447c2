"""LoRA and SeqLoRA: merging against the unmerged forward, ordinary PEFT checkpoints, what may be combined."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from clbench.adapters import lora
from clbench.algorithms.build import build_algorithm
from clbench.checkpoints.policy_io import LoadedPolicy, load_policy
from clbench.checkpoints.run_folder import checkpoint_folder
from clbench.config.schema import LoraConfig
from clbench.errors import UserError
from clbench.io import read_json
from clbench.policies.view import PolicyView
from clbench.testing.toy import toy_config
from clbench.training.trainer import train
from tests.test_policies import TYPES, build, raw_batch


def losses(loaded: LoadedPolicy) -> torch.Tensor:
    measure = PolicyView(loaded.policy, loaded.policy, loaded.preprocessor, nullcontext)
    with torch.no_grad():
        return measure.per_sample(raw_batch(8), measure.draw(8, torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("kind", TYPES)
def test_merged_equals_unmerged(kind: str, toy_data: Path) -> None:
    loaded = build(kind, toy_data)
    plain = losses(loaded)
    names = set(loaded.policy.state_dict())
    lora.inject(loaded.policy, LoraConfig(rank=4, alpha=8))
    assert torch.equal(losses(loaded), plain)  # B starts at zero
    trainable = {n for n, p in loaded.policy.named_parameters() if p.requires_grad}
    assert trainable and all(".lora_" in n for n in trainable)
    with torch.no_grad():
        for n, p in loaded.policy.named_parameters():
            if n in trainable:
                p.add_(0.05 * torch.randn_like(p))
    adapted = losses(loaded)
    assert not torch.allclose(adapted, plain, rtol=1e-3)
    lora.merge(loaded.policy)
    assert torch.allclose(losses(loaded), adapted, rtol=1e-5)
    assert set(loaded.policy.state_dict()) == names and not lora.lora_layers(loaded.policy)
    lora.inject(loaded.policy, LoraConfig(rank=4))  # and again, for the next task
    assert torch.allclose(losses(loaded), adapted, rtol=1e-5)


def test_carried_adapter_is_an_ordinary_peft_checkpoint(toy_data: Path, tmp_path: Path) -> None:
    config = toy_config(
        toy_data, {"name": "seqlora", "merge": False}, f"output_dir={tmp_path}", "lora.rank=2",
        "train.optimizer.lr=1e-2",
    )  # fmt: skip
    folder = train(config, "r")
    checkpoint = checkpoint_folder(folder, 2) / "policy"
    described = read_json(checkpoint / "adapter_config.json")
    assert described["peft_type"] == "LORA" and described["r"] == 2
    assert not (checkpoint / "model.safetensors").exists()
    ours = load_policy(checkpoint)
    base = load_policy(read_json(folder / "manifest.json")["base"]["path"])
    theirs = PeftModel.from_pretrained(base.policy, str(checkpoint))
    want = {n.replace("base_model.model.", ""): v for n, v in theirs.state_dict().items()}
    have = ours.policy.state_dict()
    assert want.keys() == have.keys() and all(torch.equal(want[n], v) for n, v in have.items())


def test_every_task_of_seqlora_has_its_own_adapter_merged(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The change of one task has the adapter's rank, in every targeted layer, and starts from numbers of its own."""
    config = toy_config(
        toy_data, {"name": "seqlora"}, f"output_dir={tmp_path}", "lora.rank=1", "train.optimizer.lr=1e-2"
    )
    first: list[torch.Tensor] = []
    inject = lora.inject

    def seen(policy: torch.nn.Module, settings: LoraConfig) -> None:
        inject(policy, settings)
        first.append(next(p.detach().clone() for n, p in policy.named_parameters() if ".lora_A." in n))

    monkeypatch.setattr(lora, "inject", seen)
    folder = train(config, "r")
    assert len(first) == 3 and all(a.any() for a in first)
    assert not any(torch.equal(first[i], first[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    a, b = (load_policy(checkpoint_folder(folder, k) / "policy").policy.state_dict() for k in (0, 1))
    name = "model.velocity_net.cond_proj.weight"
    values = torch.linalg.svdvals((b[name] - a[name]).double())
    assert values[0] > 1e-4 and values[1] < 1e-5 * max(1.0, float(values[0]))


@pytest.mark.parametrize("kind", TYPES)
def test_our_policies_have_default_targets(kind: str, toy_data: Path) -> None:
    policy = build(kind, toy_data).policy
    lora.inject(policy, LoraConfig(rank=2))
    layers = lora.lora_layers(policy)
    assert any("attention" in n for n in layers) and any("ffn" in n for n in layers)


def test_targets_that_cannot_be_are_refused(toy_data: Path) -> None:
    policy = build("dit_dec", toy_data).policy
    with pytest.raises(UserError, match="matches no module"):
        lora.inject(policy, LoraConfig(target_modules="nothing"))
    with pytest.raises(UserError, match="not a regular expression"):
        lora.inject(policy, LoraConfig(target_modules="(("))
    with pytest.raises(ValueError, match=r"lora.target_modules is not a regular expression"):
        toy_config(toy_data, {"name": "er"}, "lora.target_modules='(('")
    with pytest.raises(UserError, match="has no default layers"):
        lora.inject(torch.nn.Linear(2, 2), LoraConfig())


@pytest.mark.parametrize(
    ("names", "keys", "overrides", "words"),
    [
        ("clare", {}, ["lora.enabled=true"], "clare adds modules of its own"),
        ("seqlora", {}, ["lora.enabled=true"], "seqlora adds modules of its own"),
        ("seqlora", {}, ["train.optimizer_across_tasks=carried"], "must be fresh"),
        (["er", "mir"], {}, [], "er and mir cannot be combined: both claim 'batch_mix'"),
        (["packnet", "clare"], {}, [], "packnet and clare cannot be combined: both claim 'phases'"),
        (["clare", "seqlora"], {}, [], "clare and seqlora cannot be combined: both claim 'structure'"),
        (["ewc", "packnet"], {}, [], "ewc and packnet cannot be combined: each protects"),
        (["ewc", "clare"], {}, [], "ewc and clare cannot be combined: clare trains new parameters"),
        (["ewc", "seqlora"], {}, [], "ewc and seqlora cannot be combined: seqlora trains new parameters"),
        (["mir", "packnet"], {}, [], "mir and packnet cannot be combined: mir judges samples by a plain gradient"),
        (["ewc", "multitask"], {}, [], "multitask cannot be combined"),
    ],
)
def test_impossible_combinations_are_refused_by_name(
    names: Any, keys: dict[str, Any], overrides: list[str], words: str, toy_data: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        build_algorithm(toy_config(toy_data, {"name": names, **keys}, *overrides))


def test_a_carried_adapter_can_be_protected(toy_data: Path) -> None:
    build_algorithm(toy_config(toy_data, {"name": ["ewc", "seqlora"], "merge": False}))
