"""`lora.also_train`: modules that train completely beside a LoRA adapter, and are saved, loaded and merged with it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from clbench.adapters import lora
from clbench.checkpoints.policy_io import load_policy
from clbench.checkpoints.run_folder import checkpoint_folder
from clbench.config.schema import LoraConfig
from clbench.errors import UserError
from clbench.io import read_json
from clbench.testing.toy import toy_config
from clbench.training.trainer import train
from tests import tiny_policies
from tests.test_policies import build


@pytest.fixture(scope="module")
def head(toy_data: Path) -> str:
    """The linear layer that makes dit_dec's actions."""
    policy = build("dit_dec", toy_data).policy
    return next(n for n, _ in policy.named_modules() if n.endswith("proj_out"))


@pytest.mark.parametrize("algorithm", [{"name": "seqfft"}, {"name": "seqlora", "merge": False}])
def test_a_head_is_part_of_an_ordinary_peft_adapter(
    algorithm: dict[str, object], head: str, toy_data: Path, tmp_path: Path
) -> None:
    more = ["lora.enabled=true"] if algorithm["name"] == "seqfft" else []
    config = toy_config(
        toy_data, dict(algorithm), f"output_dir={tmp_path}", "lora.rank=2", "train.optimizer.lr=1e-2", *more
    )
    config.lora.also_train = head.replace(".", r"\.")
    folder = train(config, "r")
    checkpoint = checkpoint_folder(folder, 2) / "policy"
    described = read_json(checkpoint / "adapter_config.json")
    assert described["modules_to_save"] == [head] and not (checkpoint / "model.safetensors").exists()
    ours = load_policy(checkpoint).policy
    base = load_policy(read_json(folder / "manifest.json")["base"]["path"])
    changed = [n for n, v in base.policy.state_dict().items() if not torch.equal(v, _plain(ours)[n])]
    assert changed and all(n.startswith(f"{head}.") for n in changed)  # of the base's own weights the head alone
    theirs = PeftModel.from_pretrained(base.policy, str(checkpoint)).merge_and_unload()
    lora.merge(ours)
    want, have = theirs.state_dict(), ours.state_dict()
    assert want.keys() == have.keys()
    assert all(torch.allclose(want[n], have[n], rtol=1e-5, atol=1e-7) for n in want)


def _plain(policy: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights by the names that they had before LoRA layers were added."""
    return {n.replace(".base_layer", ""): v for n, v in policy.state_dict().items() if ".lora_" not in n}


def test_a_merged_run_resumes_with_its_head(head: str, toy_data: Path, tmp_path: Path) -> None:
    """Stopped in the middle of a task, the head is in the state; the weights are those of a run that went through."""
    from clbench.errors import Interrupted
    from clbench.stopping import Stop

    def config(name: str) -> object:
        found = toy_config(
            toy_data, {"name": "seqlora"}, f"output_dir={tmp_path / name}", "lora.rank=2", "train.save_every_steps=1"
        )
        found.lora.also_train = head.replace(".", r"\.")
        return found

    whole = train(config("a"), "r")  # type: ignore[arg-type]
    stop = Stop()
    inject, count = lora.inject, [0]

    def stopping(*args: object) -> None:
        inject(*args)  # type: ignore[arg-type]
        count[0] += 1
        if count[0] == 2:
            stop.signal = signal.SIGINT

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "inject", stopping)
        with pytest.raises(Interrupted):
            train(config("b"), "r", stop=stop)  # type: ignore[arg-type]
    again = train(config("b"), "r", resume=True)  # type: ignore[arg-type]
    a, b = (load_policy(checkpoint_folder(f, 2) / "policy").policy.state_dict() for f in (whole, again))
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    base = load_policy(read_json(whole / "manifest.json")["base"]["path"]).policy.state_dict()
    assert not torch.equal(base[f"{head}.weight"], a[f"{head}.weight"])


@pytest.mark.parametrize("kind", tiny_policies.BUILT)
def test_defaults_of_lerobots_policies(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    policy = tiny_policies.load(kind, tmp_path_factory.mktemp("models")).policy
    lora.inject(policy, LoraConfig(rank=2, alpha=2))
    whole = lora.also_trained(policy, LoraConfig())
    trains = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert bool(whole) == (kind != "smolvla")
    beside = {n for n in trains if ".lora_" not in n}
    assert beside == {n for n, _ in policy.named_parameters() if any(n.startswith(f"{w}.") for w in whole)}
    plain = {n: v.clone() for n, v in _plain(policy).items()}
    with torch.no_grad():
        for p in (p for n, p in policy.named_parameters() if n in trains):
            p.add_(0.01)
    lora.merge(policy)
    merged = policy.state_dict()
    assert merged.keys() == plain.keys() and any(not torch.equal(merged[n], plain[n]) for n in merged)


def test_our_two_policies_train_nothing_else(toy_data: Path) -> None:
    for kind in ("dit_dec", "dit_encdec"):
        policy = build(kind, toy_data).policy
        assert lora.also_trained(policy, LoraConfig()) == []
        lora.inject(policy, LoraConfig(rank=2))
        assert policy.peft_config["default"].modules_to_save is None
        assert all(".lora_" in n for n, p in policy.named_parameters() if p.requires_grad)


def test_what_cannot_be_is_refused(head: str, toy_data: Path, tmp_path: Path) -> None:
    policy = build("dit_dec", toy_data).policy
    with pytest.raises(UserError, match="matches no module of the policy that has weights"):
        lora.inject(policy, LoraConfig(also_train="nothing"))
    with pytest.raises(UserError, match=r"would have a LoRA adapter .* and train completely .*: choose one"):
        lora.inject(policy, LoraConfig(also_train=r"model\.obs_encoder"))
    with pytest.raises(ValueError, match=r"lora.also_train is not a regular expression"):
        toy_config(toy_data, {"name": "er"}, "lora.also_train='(('")
    config = toy_config(
        toy_data, {"name": "seqfft"}, f"output_dir={tmp_path}", "lora.enabled=true", "lora.also_train=x"
    )
    with pytest.raises(UserError, match=r"lora.also_train 'x' matches no module of the policy"):
        train(config, "r")


def test_none_is_said_by_an_empty_pattern() -> None:
    policy = torch.nn.Sequential(torch.nn.Linear(2, 2))
    policy.config = type("C", (), {"type": "act"})()
    assert lora.also_trained(policy, LoraConfig(also_train="")) == []
