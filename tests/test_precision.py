"""policy.dtype=bfloat16: what never trains is kept in bf16, adapters and heads in fp32, and files stay as they are."""

from __future__ import annotations

import re
import shutil
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from clbench.adapters import lora
from clbench.adapters.clare import ClareConfig, clare_layers, inject
from clbench.checkpoints import policy_io
from clbench.checkpoints.policy_io import load_policy
from clbench.checkpoints.run_folder import checkpoint_folder
from clbench.config import policy_types
from clbench.config.compose import compose
from clbench.config.policy_types import LEROBOT, kept_in, own_keys
from clbench.config.schema import Config, LoraConfig
from clbench.errors import UserError
from clbench.evaluation import worker
from clbench.evaluation.evaluate import evaluate, run_config
from clbench.io import read_json
from clbench.policies import precision
from clbench.policies.precision import keep_frozen
from clbench.policies.view import PolicyView, without_dropout
from clbench.testing.toy import toy_config
from clbench.training.pretrain import base_folder, pretraining_tasks
from clbench.training.trainer import train
from tests import tiny_policies

CLARE = {"name": "clare", "adapter_hidden": 4, "discriminator_hidden": 4, "discriminator_latent": 2, "detect_steps": 1,
         "discriminator_steps": 2}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("kind", tiny_policies.BUILT)
def test_an_adapted_policy_computes_nearly_the_same(kind: str, models: Path) -> None:
    loaded = tiny_policies.load(kind, models)
    policy = loaded.policy
    if kind == "vqbet":
        policy.vqbet.action_head.vqvae_model.discretized.fill_(True)
    lora.inject(policy, LoraConfig(rank=2, alpha=2))
    view = PolicyView(policy, policy, loaded.preprocessor, nullcontext)
    batch, draw = tiny_policies.batch(policy.config, 4), view.draw(4, torch.Generator().manual_seed(0))
    trains = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    with without_dropout(policy):
        before = view.per_sample(batch, draw)
        rounded = keep_frozen(policy, torch.bfloat16)
        assert rounded > 0 and keep_frozen(policy, torch.bfloat16) == 0
        after = view.per_sample(batch, draw)
        gradients = torch.autograd.grad(after.sum(), list(trains.values()), allow_unused=True)
    assert after.dtype == torch.float32
    assert not torch.equal(before, after) and torch.isfinite(after).all()
    if kind != "vqbet":  # which compares with codes that its head draws
        assert torch.allclose(before, after, rtol=0.1, atol=0.02)
    assert all(p.dtype == torch.float32 for p in trains.values())
    assert any(g is not None and g.abs().sum() > 0 and g.dtype == torch.float32 for g in gradients)
    kept = sum(p.numel() for p in policy.parameters() if p.dtype == torch.bfloat16)
    assert kept == rounded
    policy.reset()
    del batch["action"]
    with torch.no_grad():  # acting too
        actions = policy.select_action(loaded.preprocessor(
            {k: v if not torch.is_tensor(v) or v.ndim < 3 or policy.config.n_obs_steps == 1 else v[:, -1]
             for k, v in batch.items()}
        ))  # fmt: skip
    assert torch.isfinite(actions).all()


def test_what_others_read_and_what_trains_stays_as_it_is() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.tied = nn.Linear(4, 5, bias=False)
            self.own = nn.Parameter(torch.ones(5, 4))
            self.tied.weight = self.own
            self.attention, self.norm = nn.MultiheadAttention(4, 1), nn.LayerNorm(4)
            self.trains, self.lora_a = nn.Linear(4, 4), nn.Linear(4, 4)

    net = Net().requires_grad_(False)
    net.trains.requires_grad_(True)
    assert keep_frozen(net, torch.bfloat16) == 5 * 4 + 4 * 5
    bf16 = {n for n, p in net.named_parameters() if p.dtype == torch.bfloat16}
    assert bf16 == {"embed.weight", "out.weight"}
    x = net.embed(torch.tensor([[1, 2]]))
    assert x.dtype == torch.float32 and net.out(x).dtype == torch.float32
    assert net.out(x.double()).dtype == torch.float64
    assert torch.equal(net.out(x), (x.bfloat16() @ net.out.weight.T).float())
    net.attention(x, x, x)


@pytest.mark.parametrize("algorithm", [{"name": "er"}, CLARE, {"name": "seqlora", "merge": False}])
def test_files_are_in_fp32_and_evaluation_rounds_as_training_did(
    algorithm: dict[str, object], toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def watched(policy: nn.Module, dtype: torch.dtype) -> int:
        seen.append(keep_frozen(policy, dtype))
        return seen[-1]

    monkeypatch.setattr(precision, "keep_frozen", watched)
    more = ["lora.enabled=true", "lora.rank=2"] if algorithm["name"] == "er" else []
    given = [f"output_dir={tmp_path}", *more, "policy.dtype=bfloat16"]
    config = toy_config(toy_data, dict(algorithm), *given)
    folder = train(config, "r")
    assert seen[0] > 0 and set(seen[1:]) == {0}
    plain = toy_config(toy_data, {"name": "er"})
    base = Path(read_json(folder / "manifest.json")["base"]["path"])
    assert base == base_folder(plain, pretraining_tasks(plain.dataset, plain.render)[1]).absolute()
    for k in range(3):
        policy = load_policy(checkpoint_folder(folder, k) / "policy").policy
        assert all(p.dtype == torch.float32 for p in policy.parameters())
    run = run_config(folder)
    assert kept_in(run) == "bfloat16"
    weights = worker.Weights(str(checkpoint_folder(folder, 2) / "policy"), str(checkpoint_folder(folder, 2)))
    seen.clear()
    job = worker.Job(2, weights, ({"j": 0, "task_id": 0},))
    list(worker.actors(job, worker.Settings(run, 2, 0, "cpu", 1)))
    assert len(seen) == 1 and seen[0] > 0
    run.eval.cells = "last"
    evaluate(folder, run, progress=False)
    assert read_json(folder / "eval" / "matrix.json")["episodes"][2] == [1, 1, 1]


def test_a_resumed_run_rounds_too(toy_data: Path, tmp_path: Path) -> None:
    def config(name: str) -> Config:
        return toy_config(toy_data, dict(CLARE), f"output_dir={tmp_path / name}", "policy.dtype=bfloat16")

    whole, again = train(config("a"), "r"), train(config("b"), "r")
    shutil.rmtree(checkpoint_folder(again, 2))
    train(config("b"), "r", resume=True)
    a, b = (load_policy(checkpoint_folder(f, 2) / "policy").policy.state_dict() for f in (whole, again))
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_what_trains_cannot_be_kept_in_bf16(toy_data: Path, tmp_path: Path) -> None:
    for algorithm in ({"name": "er"}, {"name": "seqlora"}, {"name": ["er", "ewc"]}):
        config = toy_config(toy_data, algorithm, "policy.dtype=bfloat16")
        with pytest.raises(
            UserError, match=r"is for weights that do not train, below adapters, and (er|seqlora|er\+ewc)"
        ):
            policy_types.check_fits(config)
    with pytest.raises(UserError, match=r"policy.dtype is 'bf16' but must be float32 or bfloat16"):
        policy_types.check_fits(toy_config(toy_data, dict(CLARE), "policy.dtype=bf16"))
    policy_types.check_fits(toy_config(toy_data, dict(CLARE), "policy.dtype=bfloat16"))
    policy = tiny_policies.load("act", tmp_path).policy
    layers = inject(policy, ClareConfig(target_modules=r"model\.encoder\.layers\.0\.linear1", use_trainable_copy=True))
    keep_frozen(policy, torch.bfloat16)
    assert clare_layers(policy) == layers
    with pytest.raises(UserError, match=r"use_trainable_copy trains copies .* set policy.dtype=float32"):
        layers[0].add_adapter()


def test_some_types_have_a_setting_of_that_name() -> None:
    from dataclasses import fields

    from lerobot.configs import PreTrainedConfig

    for kind, facts in LEROBOT.items():
        names = {f.name for f in fields(PreTrainedConfig.get_choice_class(kind))}
        assert facts.dtype == ("dtype" in names), kind
    assert own_keys({"type": "pi0", "dtype": "bfloat16", "path": "x"}) == {"type": "pi0", "dtype": "bfloat16"}
    assert own_keys({"type": "smolvla", "dtype": "bfloat16"}) == {"type": "smolvla"}
    config = compose(model="pi0", algorithms=["er"], dataset="libero_goal")[0]
    config.policy["dtype"] = "bfloat16"
    assert kept_in(config) == "float32" and precision.FROZEN


# ---- attention -----------------------------------------------------------------------------------


@dataclass
class Attending:
    """A policy configuration with a setting for attention."""

    attn_implementation: str | None = None


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_io, "_warned", [])


def test_flash_attention_that_is_absent_falls_back_with_one_warning(
    said: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        config = policy_io.with_attention(Attending("flash_attention_2"))  # type: ignore[arg-type]
        assert config.attn_implementation == "sdpa"  # type: ignore[attr-defined]
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "warning: policy.attn_implementation=flash_attention_2: the package flash_attn is not installed; sdpa is used "
        "instead."
    ]
    for other in ("sdpa", "eager", None):
        assert policy_io.with_attention(Attending(other)).attn_implementation == other  # type: ignore
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("source", "cuda", "words"),
    [
        ("raise ImportError('undefined symbol: _ZN3c10')", True, r"cannot be imported \(undefined symbol"),
        ("x = 1", False, "it needs a CUDA device"),
        ("x = 1", True, None),
    ],
)
def test_flash_attention_that_is_broken(
    said: None,
    source: str,
    cuda: bool,
    words: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "flash_attn.py").write_text(source + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    config = policy_io.with_attention(Attending("flash_attention_2"))  # type: ignore[arg-type]
    err = capsys.readouterr().err
    sys.modules.pop("flash_attn", None)
    if words is None:
        assert config.attn_implementation == "flash_attention_2" and err == ""  # type: ignore[attr-defined]
    else:
        assert config.attn_implementation == "sdpa" and re.search(words, err)  # type: ignore[attr-defined]
