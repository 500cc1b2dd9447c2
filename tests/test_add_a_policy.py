"""docs/add_a_policy.md: its package is found as LeRobot finds it, trained, checkpointed, adapted and played."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from clbench import listing, registry
from clbench.adapters import lora
from clbench.adapters.clare import clare_layers
from clbench.checkpoints import trusted
from clbench.checkpoints.policy_io import load_policy
from clbench.checkpoints.run_folder import checkpoint_folder
from clbench.cli import main
from clbench.config import policy_types
from clbench.config.compose import compose
from clbench.config.schema import Config, LoraConfig
from clbench.errors import UserError
from clbench.evaluation.evaluate import evaluate, run_config
from clbench.io import read_json
from clbench.policies.view import PolicyView
from clbench.testing.toy import toy_config
from clbench.training.trainer import train
from tests.policy_package import NAME, PAGE, blocks, installed

SILENT = {"    from_files: ClassVar[bool] = True": "    pass"}


@pytest.fixture
def package(tmp_path: Path) -> Iterator[Path]:
    with installed(tmp_path / "site") as folder:
        yield folder


def config(data: Path, out: Path, *overrides: str, name: str = "er") -> Config:
    found = toy_config(data, {"name": name}, f"output_dir={out}", *overrides)
    found.policy = {"type": "perceptron", "chunk_size": 4, "n_action_steps": 2, "hidden": 16}
    return found


def test_it_is_found_without_being_imported(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (package / "__init__.py").write_text('raise RuntimeError("imported")\n')
    assert tomllib.loads(blocks("toml")[0])["project"]["name"] == NAME
    entry = registry.entries("policies")["perceptron"]
    assert entry.target == f"{NAME}.configuration_perceptron:PerceptronConfig" and entry.origin == f"{NAME} 0.1"
    item = next(i for i in listing.items("policies") if i.name == "perceptron")
    assert item.text == "Predicts a chunk of actions from the state with one hidden layer." and not item.needs
    composed, lines = compose(model="perceptron", algorithms=["er"], dataset="metaworld_quick")
    assert composed.policy == {"type": "perceptron"} and "policy type perceptron with its own defaults" in lines
    policy_types.check_fits(composed)
    trusted.check_start(composed.policy)
    assert main(["list", "policies"]) == 0
    assert "perceptron" in capsys.readouterr().out


def test_lerobot_finds_it_by_the_same_rule(package: Path) -> None:
    from lerobot.configs import PreTrainedConfig
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    assert "perceptron" in PreTrainedConfig.get_known_choices()


def test_it_trains_and_plays(package: Path, toy_data: Path, tmp_path: Path) -> None:
    folder = train(config(toy_data, tmp_path), "r")
    last = checkpoint_folder(folder, 2) / "policy"
    assert read_json(last / "config.json")["type"] == "perceptron"
    weights = load_policy(last).policy.state_dict()
    base = load_policy(read_json(folder / "manifest.json")["base"]["path"]).policy.state_dict()
    assert any(not torch.equal(weights[n], base[n]) for n in weights)
    played = run_config(folder)
    played.eval.cells = "last"
    evaluate(folder, played, progress=False)
    assert read_json(folder / "eval" / "matrix.json")["episodes"][2] == [1, 1, 1]


def test_its_losses_are_exact_and_rows_are_apart(package: Path, toy_data: Path, tmp_path: Path) -> None:
    loaded = load_policy(checkpoint_folder(train(config(toy_data, tmp_path), "r"), 0) / "policy")
    view = PolicyView(loaded.policy, loaded.policy, loaded.preprocessor, nullcontext)
    g = torch.Generator().manual_seed(0)
    batch: dict[str, Any] = {
        "observation.state": torch.randn(5, 39, generator=g), "action": torch.randn(5, 4, 4, generator=g),
        "action_is_pad": torch.tensor([[False, False, i > 2, i > 1] for i in range(5)]), "task": ["x"] * 5,
    }  # fmt: skip
    draw = view.draw(5, g)
    losses = view.per_sample(batch, draw)
    for i in range(5):
        one = {k: v[i : i + 1] for k, v in batch.items()}
        assert torch.allclose(loaded.policy(loaded.preprocessor(one))[0], losses[i], rtol=1e-5)
    assert torch.allclose(view.total(batch, draw), losses.sum())


def test_its_default_layers_for_lora(package: Path, toy_data: Path, tmp_path: Path) -> None:
    folder = train(config(toy_data, tmp_path, "lora.enabled=true", "lora.rank=2", name="seqfft"), "r")
    loaded = load_policy(checkpoint_folder(folder, 2) / "policy")
    assert list(lora.lora_layers(loaded.policy)) == ["net.0"]
    assert lora.targets(loaded.policy, LoraConfig()) == r"net\.0"
    trains = {n for n, p in loaded.policy.named_parameters() if p.requires_grad}
    assert {"head.weight", "head.bias"} < trains and all(".lora_" in n for n in trains - {"head.weight", "head.bias"})


def test_its_default_layers_for_clare(package: Path, toy_data: Path, tmp_path: Path) -> None:
    section = {"name": "clare", "adapter_hidden": 4, "discriminator_hidden": 4, "discriminator_latent": 2,
               "detect_steps": 1, "discriminator_steps": 2}  # fmt: skip
    clare = config(toy_data, tmp_path)
    clare.algorithm = section
    loaded = load_policy(checkpoint_folder(train(clare, "r"), 2) / "policy")
    assert [layer.name for layer in clare_layers(loaded.policy)] == ["net.0"]


def test_without_the_promise_it_needs_consent(toy_data: Path, tmp_path: Path) -> None:
    with installed(tmp_path / "site", **SILENT):
        assert policy_types.wants_trust("perceptron")
        assert any("--trust perceptron" in i.needs for i in listing.items("policies") if i.name == "perceptron")
        with pytest.raises(UserError, match=rf"'perceptron' comes from {NAME} 0\.1.*pass --trust perceptron"):
            train(config(toy_data, tmp_path), "r")
        with trusted.trusting(["perceptron"]):
            folder = train(config(toy_data, tmp_path), "r")
        policy = checkpoint_folder(folder, 2) / "policy"
        with pytest.raises(UserError, match=r"so it is not built from a file\. If you trust .* --trust"):
            load_policy(policy)
        with trusted.trusting([str(folder)]):
            assert load_policy(policy).policy.name == "perceptron"


def test_a_checkpoint_of_a_package_that_is_gone_is_refused_by_name(toy_data: Path, tmp_path: Path) -> None:
    with installed(tmp_path / "site"):
        policy = checkpoint_folder(train(config(toy_data, tmp_path), "r"), 2) / "policy"
    with pytest.raises(UserError, match="policy type 'perceptron' is not one that clbench knows"):
        load_policy(policy)


def test_two_packages_with_one_type_are_refused(package: Path, tmp_path: Path) -> None:
    other = package.parent / "lerobot_policy_other"
    other.mkdir()
    (other / "__init__.py").write_text('@PreTrainedConfig.register_subclass("perceptron")\nclass Other: ...\n')
    info = package.parent / "lerobot_policy_other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lerobot_policy_other\nVersion: 1.0\n")
    with pytest.raises(UserError, match=r"the policy type name 'perceptron' of .* is already taken by lerobot_policy_"):
        registry.entries("policies")


def test_the_preset_of_the_page(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs" / "models").mkdir(parents=True)
    (tmp_path / "configs" / "models" / "wide.yaml").write_text(blocks("yaml")[0])
    monkeypatch.chdir(tmp_path)
    composed, _ = compose(model="wide", algorithms=["er"], dataset="metaworld_quick")
    assert composed.policy == yaml.safe_load(blocks("yaml")[0])["policy"] == {"type": "perceptron", "hidden": 256}


def test_the_commands_of_the_page_are_commands(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line parses, and names what there is; training is tested above."""
    lines = [line.split() for line in blocks("bash")[0].splitlines()]
    assert [line[:2] for line in lines] == [["clbench", w] for w in ("list", "train", "eval")]
    assert main(lines[0][1:]) == 0
    given = dict(zip(lines[1], lines[1][1:], strict=False))
    compose(model=given["--model"], algorithms=[given["--algo"]], dataset=given["--dataset"], smoke=True)
    assert "pip install --no-deps -e lerobot_policy_perceptron" in PAGE
