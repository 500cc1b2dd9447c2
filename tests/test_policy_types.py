"""Models by name: what clbench knows of LeRobot's policy types, the presets of some, and policies on a hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies import make_pre_post_processors
from lerobot.policies.factory import get_policy_class

import clbench.policies  # noqa: F401 (registers what LeRobot has)
from clbench.adapters.clare import capturing, inject
from clbench.algorithms.clare import CLARE
from clbench.checkpoints import hub, trusted
from clbench.checkpoints.policy_io import LoadedPolicy, load_policy, policy_config, save_policy
from clbench.cli import main
from clbench.config import policy_types
from clbench.config.compose import compose
from clbench.config.policy_types import LEROBOT
from clbench.errors import UserError
from clbench.io import read_json, write_json
from clbench.policies.draws import ADAPTERS
from clbench.policies.view import PolicyView, without_dropout
from clbench.testing.toy import toy_config
from clbench.training.trainer import train
from tests import tiny_policies
from tests.hub_sets import COMMIT, served
from tests.test_hub_data import online  # noqa: F401 (a fixture)
from tests.test_policies import build

SEES = {"observation.image": PolicyFeature(FeatureType.VISUAL, (3, 64, 64))}
FEELS = {"observation.state": PolicyFeature(FeatureType.STATE, (4,))}
ACTS = {"action": PolicyFeature(FeatureType.ACTION, (4,))}
PRESETS = ("act_small", "diffusion_small", "vqbet_small")
MODEL = "someone/policy"


# ---- facts ---------------------------------------------------------------------------------------


def test_the_table_names_lerobots_types() -> None:
    assert set(PreTrainedConfig.get_known_choices()) >= set(LEROBOT)
    assert set(PreTrainedConfig.get_known_choices()) - set(policy_types.types()) <= {"toy", "perceptron"}
    assert {f.extra for f in LEROBOT.values()} - {""} <= set(metadata("lerobot").get_all("Provides-Extra") or ())


@pytest.mark.parametrize("kind", sorted(LEROBOT))
def test_what_refuses_states_alone_is_said_to_want_cameras(kind: str) -> None:
    """The other way round does not hold: some accept the features and fail when they run."""
    try:
        config = PreTrainedConfig.get_choice_class(kind)()
    except OSError:
        pytest.skip("its configuration alone asks the hub")
    config.input_features, config.output_features = dict(FEELS), dict(ACTS)
    try:
        config.validate_features()
    except ValueError:
        assert LEROBOT[kind].cameras


def test_what_learns_from_rewards_is_refused_before_anything_is_made() -> None:
    for kind in ("tdmpc", "gaussian_actor"):
        with pytest.raises(UserError, match=f"'{kind}' .*demonstrations have no rewards: it cannot be trained here"):
            policy_types.check_fits(compose(model=kind, algorithms=["er"], dataset="metaworld_quick")[0])


# ---- presets -------------------------------------------------------------------------------------


def preset(name: str, **changes: object) -> LoadedPolicy:
    """A preset of a LeRobot policy for one camera at 64 pixels, with random weights."""
    section = compose(model=name, algorithms=["seqfft"], dataset="metaworld_pixels")[0].policy
    if policy_types.missing(section["type"]):
        pytest.skip(f"{section['type']} needs {policy_types.missing(section['type'])}")
    config = policy_config({**section, **changes}, "cpu")
    config.input_features, config.output_features = {**FEELS, **SEES}, dict(ACTS)
    torch.manual_seed(0)
    policy = get_policy_class(config.type)(config)
    stats = {k: {"mean": torch.zeros(4), "std": torch.ones(4), "min": -torch.ones(4), "max": torch.ones(4)}
             for k in ("observation.state", "action")}  # fmt: skip
    return LoadedPolicy(policy, *make_pre_post_processors(config, dataset_stats=stats), "")


def camera_batch(config: PreTrainedConfig, n: int, seed: int = 0) -> dict[str, object]:
    """A raw batch of n samples for a preset."""
    g = torch.Generator().manual_seed(seed)
    steps = config.observation_delta_indices
    lead = (n,) if steps is None else (n, len(steps))
    length = len(config.action_delta_indices)
    pad = torch.arange(length) >= length - torch.arange(n)[:, None] % 3
    return {
        "observation.state": torch.randn(*lead, 4, generator=g),
        "observation.image": torch.rand(*lead, 3, 64, 64, generator=g),
        "action": torch.rand(n, length, 4, generator=g) * 2 - 1,
        "action_is_pad": pad,
        "task": [("Push it", "Open a door")[i % 2] for i in range(n)],
    }


@pytest.mark.parametrize("name", PRESETS)
def test_presets_train_save_and_load(name: str, tmp_path: Path) -> None:
    loaded = preset(name)
    policy, batch = loaded.policy, camera_batch(loaded.policy.config, 2)
    loss = policy(loaded.preprocessor(batch))[0]
    loss.backward()
    assert torch.isfinite(loss) and any(p.grad is not None and p.grad.any() for p in policy.parameters())
    assert sum(p.numel() for p in policy.parameters()) < 15e6
    save_policy(loaded, tmp_path / "p")
    again = load_policy(tmp_path / "p")  # without --trust: no preset fetches or runs anything
    assert all(torch.equal(v, again.policy.state_dict()[n]) for n, v in policy.state_dict().items())


# ---- policies on a hub ---------------------------------------------------------------------------


@pytest.fixture
def model(toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A policy as a folder on a hub, with files that are not fetched; the client's cache is a temporary folder."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    save_policy(build("dit_dec", toy_data), tmp_path / "model")
    (tmp_path / "model" / "code.py").write_text("raise RuntimeError\n")
    (tmp_path / "model" / "checkpoints").mkdir()
    (tmp_path / "model" / "checkpoints" / "model.safetensors").write_bytes(b"x" * 100)
    return tmp_path / "model"


def test_a_base_from_a_hub_is_fetched_once_and_is_that_model(
    model: Path,
    toy_data: Path,
    tmp_path: Path,
    online: Callable[[str], None],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = toy_config(toy_data, {"name": "seqfft"}, f"output_dir={tmp_path / 'runs'}")
    config.policy = {"path": MODEL}
    with served({MODEL: model}, tags=("main", "v2")) as (url, asked):
        online(url)
        found = hub.with_local_base(config)
        assert f"fetching the policy {MODEL}, revision main, from the hub" in capsys.readouterr().err
        asked.clear()
        assert hub.with_local_base(config) == found and asked == [] and capsys.readouterr().err == ""
        config.policy = {"path": f"{MODEL}@none"}
        with pytest.raises(UserError, match=f"the hub's {MODEL} has no revision 'none'"):
            hub.with_local_base(config)
        config.policy = {"path": "someone/other"}
        with pytest.raises(UserError, match="the hub has no model someone/other, or it is private"):
            hub.with_local_base(config)
    base = Path(found.policy["path"])
    assert base.name == COMMIT and {p.suffix for p in base.rglob("*") if p.is_file()} == {".json", ".safetensors"}
    assert not (base / "checkpoints").exists()
    manifest = read_json(train(found, "r") / "manifest.json")
    assert manifest["base"]["kind"] == "given" and COMMIT in manifest["base"]["path"]


def test_what_the_cache_lacks_of_a_policy_is_fetched(
    model: Path,
    toy_data: Path,
    tmp_path: Path,
    online: Callable[[str], None],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    """LeRobot itself, or a fetch that was interrupted, may have left a part of it."""
    config = toy_config(toy_data, {"name": "seqfft"}, f"output_dir={tmp_path / 'runs'}")
    config.policy = {"path": MODEL}
    with served({MODEL: model}, tags=("main",)) as (url, _):
        online(url)
        folder = Path(hub.with_local_base(config).policy["path"])
        names = {p.name for p in folder.iterdir()}
        lost = sorted(n for n in names if "processor" in n)
        assert any(n.endswith(".safetensors") for n in lost)
        for name in lost:
            (folder / name).unlink()
            capsys.readouterr()
            hub.with_local_base(config)
            assert "fetching the policy" in capsys.readouterr().err
            assert {p.name for p in folder.iterdir()} == names


def test_a_hub_that_cannot_be_reached_is_one_message(
    toy_data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    line = ["train", "--model", "checkpoint", "--algo", "er", "--dataset", "metaworld_quick", "--run-id", "x"]
    assert main([*line, "--", f"policy.path={MODEL}"]) == 2
    said = capsys.readouterr().err
    assert f"{MODEL} (revision main) is not complete on this machine and the hub cannot be reached" in said
    assert "policy.path=FOLDER" in said and "clbench data make" not in said


def test_a_model_of_a_hub_is_trusted_by_its_name(
    model: Path,
    toy_data: Path,
    online: Callable[[str], None],  # noqa: F811
) -> None:
    write_json(model / "config.json", {**read_json(model / "config.json"), "type": "smolvla"})
    config = toy_config(toy_data, {"name": "seqfft"})
    config.policy = {"path": MODEL}
    with served({MODEL: model}, tags=("main",)) as (url, _):
        online(url)
        local = hub.with_local_base(config).policy
        with pytest.raises(UserError, match="policy type 'smolvla' fetches models"):
            trusted.check_start(local)
        with trusted.trusting([MODEL]):
            trusted.check_start(hub.with_local_base(config).policy)
        trusted_no_more = pytest.raises(UserError, match="policy type 'smolvla'")
        with trusted_no_more:
            trusted.check_start(local)


def test_a_folder_of_that_name_is_not_asked_of_a_hub(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(MODEL).mkdir(parents=True)
    assert hub.named(MODEL) is None and hub.named("name") is None and hub.named("/a/b") is None
    assert hub.named("a/b@v2") == ("a/b", "v2") and hub.named("a/b/c") is None


# ---- facts that only the classes show ------------------------------------------------------------


def test_which_losses_come_from_one_pass() -> None:
    assert {kind for kind, facts in LEROBOT.items() if facts.one_pass} == set(ADAPTERS)


@pytest.mark.parametrize("kind", ["molmoact2", "pi0", "pi05", "smolvla"])
def test_default_layers_for_lora_are_lerobots_own(kind: str) -> None:
    keys = {"lora_rank": 1, "lora_alpha": 1, "lora_dropout": 0, "lora_bias": "none", "enable_lora_action_expert": False}
    config = SimpleNamespace(**keys)
    cls = get_policy_class(kind)
    policy = SimpleNamespace(config=config)
    policy._lora_target_modules = lambda prefix: cls._lora_target_modules(policy, prefix=prefix)
    assert cls._get_default_peft_targets(policy)["target_modules"] == LEROBOT[kind].lora


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_default_layers_of_what_is_too_large_to_build(kind: str) -> None:
    """On the meta device, where weights take no memory."""
    config = policy_config({"type": kind}, "cpu")
    config.input_features, config.output_features, config.device = {**FEELS, **SEES}, dict(ACTS), "meta"
    with torch.device("meta"):
        names = [n for n, _ in get_policy_class(kind)(config).named_modules()]
    found = [n for n in names if re.fullmatch(LEROBOT[kind].clare, n)]
    assert len(found) == 8 and found[-1].endswith("language_model.layers.16.mlp")
    assert sum(n.endswith("language_model.layers.17.mlp") for n in names) == 1
    assert any(re.fullmatch(LEROBOT[kind].lora, n) for n in names)


@pytest.mark.parametrize("kind", tiny_policies.BUILT)
def test_clares_default_layers_see_no_noise(kind: str, tmp_path: Path) -> None:
    """What is drawn for the same sample does not change what enters them; the noise level and ACT's latent may."""
    loaded = tiny_policies.load(kind, tmp_path)
    policy = loaded.policy
    if kind == "vqbet":
        policy.vqbet.action_head.vqvae_model.discretized.fill_(True)
    algorithm = CLARE(CLARE.Config(adapter_hidden=4, discriminator_hidden=4, discriminator_latent=2))
    layers = inject(policy, algorithm._peft_config(kind))
    view = PolicyView(policy, policy, loaded.preprocessor, nullcontext)
    batch = tiny_policies.batch(policy.config, 4)
    inputs = []
    for seed in (0, 1):
        draw = view.draw(4, torch.Generator().manual_seed(seed))
        if "time" in draw:
            draw["time"] = torch.full_like(draw["time"], 1)
        with torch.no_grad(), without_dropout(policy), capturing(layers) as capture:
            view.total(batch, draw)
        inputs.append(capture.inputs)
    for layer in layers:
        a, b = inputs[0][layer.name], inputs[1][layer.name]
        assert a.shape[0] == 4, "samples come first"
        if kind == "smolvla":  # images, words, state; what is computed at padded words is used by nobody
            words = loaded.preprocessor(batch)["observation.language.attention_mask"].bool()
            used = torch.cat([words.new_ones(4, a.shape[1] - words.shape[1] - 1), words, words.new_ones(4, 1)], 1)
            a, b = a[used], b[used]
        assert torch.equal(a, b) or kind == "act"
    for layer in layers:
        layer.add_adapter()
        layer.add_discriminator(0)
    with torch.no_grad(), without_dropout(policy):
        view.total(batch, view.draw(4, torch.Generator().manual_seed(0)))
    assert all(layer.route is not None and layer.route.shape == (4,) for layer in layers)


def test_lists_of_a_file_become_the_tuples_that_lerobot_writes(tmp_path: Path) -> None:
    """Where a field may also be null, draccus cannot write a list."""
    changes = {"resize_shape": [48, 48], "crop_shape": [40, 40], "crop_is_random": False}
    loaded = preset("diffusion_small", **changes)
    assert loaded.policy.config.resize_shape == (48, 48) and loaded.policy.config.down_dims == (64, 128)
    save_policy(loaded, tmp_path / "p")
    assert read_json(tmp_path / "p" / "config.json")["resize_shape"] == [48, 48]
    assert load_policy(tmp_path / "p").policy.config == loaded.policy.config
