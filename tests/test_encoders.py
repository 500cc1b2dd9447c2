"""Encoders of transformers in the DiT policies: random, from folders, frozen and trained, in checkpoints."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies import make_pre_post_processors
from lerobot.policies.factory import get_policy_class

from clbench.adapters import clare, lora
from clbench.checkpoints import trusted
from clbench.checkpoints.policy_io import LoadedPolicy, load_policy, policy_config, save_policy
from clbench.config.dit import IMAGE, MODEL_TYPES, TEXT, check_policy
from clbench.config.schema import LoraConfig
from clbench.errors import UserError
from clbench.io import read_json, write_json
from clbench.policies.dit.encoders import TextEncoder, build_model, byte_tokenizer, feature_key, parsed_tokenizer
from clbench.policies.view import PolicyView
from clbench.seeding import seeded

SMALL = {"chunk_size": 4, "n_action_steps": 2, "d_model": 32, "n_heads": 2, "encoder_layers": 1, "decoder_layers": 1}
DINO = {
    "model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56,
    "patch_size": 14,
}  # fmt: skip
CLIP = {
    "model_type": "clip_text_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "vocab_size": 300, "bos_token_id": 298, "eos_token_id": 299, "projection_dim": 16,
}  # fmt: skip
VIT = {
    "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "image_size": 56, "patch_size": 14,
}  # fmt: skip
BERT = {
    "model_type": "bert", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "vocab_size": 300,
}  # fmt: skip
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
CAMERA = "observation.images.top"
BOTH = {
    "image_encoder": "transformers", "image_encoder_config": DINO, "text_encoder": "transformers",
    "text_encoder_config": CLIP, "text_encoder_output": "pooled", "text_max_words": 32,
}  # fmt: skip


def build(kind: str = "dit_dec", **changes: Any) -> LoadedPolicy:
    """A policy for one camera and a state, moved away from AdaLN-zero's start, which ignores what it sees."""
    config = policy_config({"type": kind, **SMALL, **BOTH, **changes}, "cpu")
    config.input_features = {
        "observation.state": PolicyFeature(FeatureType.STATE, (3,)),
        CAMERA: PolicyFeature(FeatureType.VISUAL, (3, 56, 56)),
    }
    config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (4,))}
    with seeded("encoders", 0):
        policy = get_policy_class(kind)(config)
        with torch.no_grad():
            for name, p in policy.named_parameters():
                if ".encoders." not in name:
                    p.add_(0.1 * torch.randn_like(p))
    stats = {k: {"mean": torch.zeros(n), "std": torch.ones(n)} for k, n in (("observation.state", 3), ("action", 4))}
    return LoadedPolicy(policy, *make_pre_post_processors(config, dataset_stats=stats), "")


def raw_batch(n: int, seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    return {
        "observation.state": torch.randn(n, 3, generator=g),
        CAMERA: torch.rand(n, 3, 56, 56, generator=g),
        "action": torch.randn(n, 4, 4, generator=g),
        "task": [("Push the puck to a goal", "Open a door")[i % 2] for i in range(n)],
    }


def acts(loaded: LoadedPolicy, batch: dict[str, Any]) -> torch.Tensor:
    n = len(batch["task"])
    noise = torch.randn(n, 4, 4, generator=torch.Generator().manual_seed(9))
    return loaded.policy.predict_action_chunk(loaded.preprocessor(dict(batch)), noise=noise)


# ---- policies -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("dit_dec", {}),
        ("dit_dec", {"image_encoder_output": "pooled", "text_encoder_config": BERT, "text_encoder_output": "mean"}),
        ("dit_dec", {"image_encoder_config": RESNET, "image_encoder_trained": True, "text_encoder_trained": True}),
        ("dit_encdec", {"text_encoder_output": "tokens"}),
        ("dit_encdec", {"text_encoder": "words", "text_encoder_config": None, "text_encoder_output": "mean"}),
    ],
)  # fmt: skip
def test_a_policy_with_encoders_sees_and_listens_and_its_checkpoint_needs_nothing_else(
    kind: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build(kind, **changes)
    batch = raw_batch(4)
    seen = acts(built, batch)
    assert not torch.allclose(seen, acts(built, {**batch, CAMERA: 1 - batch[CAMERA]}), atol=1e-4)
    assert not torch.allclose(seen, acts(built, {**batch, "task": batch["task"][::-1]}), atol=1e-4)
    save_policy(built, tmp_path / "p")
    written = read_json(tmp_path / "p" / "config.json")
    assert written["image_encoder_config"]["model_type"] == built.policy.config.image_encoder_config["model_type"]
    for name in ("AutoModel", "AutoConfig"):  # nothing is looked up by a name or path
        monkeypatch.setattr(f"transformers.{name}.from_pretrained", lambda *_, **__: pytest.fail("was read"))
    again = load_policy(tmp_path / "p")
    assert torch.equal(seen, acts(again, batch))
    for (n, p), (m, q) in zip(built.policy.named_parameters(), again.policy.named_parameters(), strict=True):
        assert n == m and p.requires_grad == q.requires_grad and torch.equal(p, q)


def test_a_frozen_encoder_gets_no_gradient_and_a_trained_one_does() -> None:
    for trained in (False, True):
        built = build(image_encoder_trained=trained, text_encoder_trained=trained)
        policy = built.policy.train()
        policy.per_sample_loss(built.preprocessor(raw_batch(2)), policy.sample_draw(2)).sum().backward()
        for kind in (IMAGE, TEXT):
            inside = {n: p for n, p in policy.named_parameters() if f".encoders.{kind}." in n}
            assert inside and all(p.requires_grad is trained for p in inside.values())
            got = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in inside.values()]
            assert any(got) is trained
            assert not policy.get_submodule(f"model.obs_encoder.encoders.{kind}").training
        others = [p for n, p in policy.named_parameters() if ".encoders." not in n and "state" not in n]
        assert all(p.grad is not None for p in others)


@pytest.mark.parametrize("model", [DINO, RESNET])
def test_rows_do_not_depend_on_their_companions(model: dict[str, Any]) -> None:
    built = build(image_encoder_config=model, image_encoder_trained=True)
    built.policy.train()  # batch normalisation goes by its running statistics even so
    first, second = raw_batch(4, 0), raw_batch(4, 1)
    for key in ("observation.state", CAMERA):
        second[key][0] = first[key][0]
    second["task"] = ["Push the puck to a goal", "A", "B", "C"]
    encoder = built.policy.model.obs_encoder
    one, two = (encoder(built.preprocessor(dict(b)))[0][0] for b in (first, second))
    assert torch.equal(one, two)


def test_a_frozen_text_encoder_reads_every_text_once_and_by_itself() -> None:
    built = build()
    encoder = built.policy.model.obs_encoder.encoders[TEXT]
    assert isinstance(encoder, TextEncoder)
    calls = []
    encoder.model.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        acts(built, raw_batch(6))
    policy = built.policy
    for _ in range(3):  # what inference mode found serves training
        policy.per_sample_loss(built.preprocessor(raw_batch(6)), policy.sample_draw(6)).sum().backward()
    assert len(calls) == 2
    batch = built.preprocessor(raw_batch(6))
    ids, mask = batch["observation.language.tokens"], batch["observation.language.attention_mask"]
    assert torch.allclose(encoder(ids, mask), encoder.features(ids, mask), atol=1e-5)


def test_grid_features_are_the_patches_in_their_places() -> None:
    """With one token per patch, what a patch shows changes its own token most."""
    built = build(image_tokens_side=4)
    encoder = built.policy.model.obs_encoder.encoders[IMAGE]
    images = torch.full((1, 3, 56, 56), 0.5)
    changed = images.clone()
    changed[:, :, 14:28, 28:42] = 1.0  # row 1, column 2
    moved = (encoder(changed) - encoder(images)).norm(dim=-1)[0]
    assert moved.shape == (16,) and int(moved.argmax()) == 6
    patches = encoder.model(pixel_values=(changed - encoder.mean) / encoder.std).last_hidden_state[:, 1:]
    assert torch.allclose(encoder(changed), patches, atol=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_squared_gradients_are_those_of_single_samples(trained: bool) -> None:
    built = build(image_encoder_trained=trained, text_encoder_trained=trained)
    policy = built.policy
    view = PolicyView(policy, policy, built.preprocessor, nullcontext)
    parameters = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    batch, draw = raw_batch(3), view.draw(3, torch.Generator().manual_seed(0))
    found = view.squared_gradients(batch, draw, parameters)
    single = view.squared_gradients(batch, draw, parameters, vectorized=False)
    for n in parameters:
        assert torch.allclose(found[n], single[n], rtol=1e-3, atol=1e-9), n


# ---- folders ------------------------------------------------------------------------------------
def write_folder(kind: str, described: dict[str, Any], folder: Path) -> torch.nn.Module:
    with seeded("folder", 1):
        model = build_model(kind, described)
    model.save_pretrained(folder)  # type: ignore[operator]
    if kind == TEXT:
        (folder / "tokenizer.json").write_text(byte_tokenizer(described), encoding="utf-8")
    else:
        write_json(folder / "preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]})
    return model.eval()


def test_a_policy_starts_from_folders_and_its_checkpoint_does_not_name_them(tmp_path: Path) -> None:
    models = {k: write_folder(k, d, tmp_path / k) for k, d in ((IMAGE, DINO), (TEXT, CLIP))}
    paths = {f"{k}_encoder_path": str(tmp_path / k) for k in models}
    built = build(**paths, image_encoder_config=None, text_encoder_config=None)
    encoders = built.policy.model.obs_encoder.encoders
    for kind, model in models.items():
        for name, value in model.state_dict().items():
            assert torch.equal(value, encoders[kind].model.state_dict()[name])
    assert built.policy.config.image_encoder_config["patch_size"] == 14
    assert built.policy.config.image_encoder_mean == [0.1, 0.2, 0.3]
    seen = acts(built, raw_batch(3))
    save_policy(built, tmp_path / "p")
    assert built.policy.config.image_encoder_path == paths["image_encoder_path"]
    written = read_json(tmp_path / "p" / "config.json")
    assert written["image_encoder_path"] is None and written["text_encoder_path"] is None
    for kind in models:
        (tmp_path / kind).rename(tmp_path / f"{kind}-gone")
    again = load_policy(tmp_path / "p")
    assert torch.equal(seen, acts(again, raw_batch(3)))
    assert again.policy.config.image_encoder_std == [0.5, 0.6, 0.7]


def test_the_image_part_of_a_model_for_both_is_taken(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 56, "patch_size": 14}  # fmt: skip
    text = {k: v for k, v in CLIP.items() if k != "model_type"}
    both = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    both.save_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / "tokenizer.json").write_text(byte_tokenizer(CLIP), encoding="utf-8")
    path = str(tmp_path / "clip")
    built = build(image_encoder_path=path, image_encoder_config=None, text_encoder_path=path, text_encoder_config=None)
    config, encoders = built.policy.config, built.policy.model.obs_encoder.encoders
    assert config.image_encoder_config["model_type"] == "clip_vision_model"
    assert config.text_encoder_config["model_type"] == "clip_text_model"
    images = torch.rand(2, 3, 56, 56)
    found = both.eval().vision_model(pixel_values=(images - encoders[IMAGE].mean) / encoders[IMAGE].std)
    assert torch.allclose(encoders[IMAGE](images), found.last_hidden_state[:, 1:], atol=1e-5)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: [p.rename(p.with_suffix(".bin")) for p in f.glob("*.safetensors")], "no .safetensors file"),
        (lambda f: _describe(f, model_type="detr"), "'detr' is no image model that is built"),
        (lambda f: _describe(f, hidden_size=64), "has no fitting weights"),
        (lambda f: _describe(f, num_hidden_layers=3), "has no fitting weights for encoder.layer.2"),
        (lambda f: next(f.glob("*.safetensors")).write_bytes(b"x" * 99), "cannot be read"),
    ],
)
def test_a_folder_that_is_not_what_it_should_be_is_one_message(spoil: Any, message: str, tmp_path: Path) -> None:
    write_folder(IMAGE, DINO, tmp_path / "m")
    spoil(tmp_path / "m")
    with pytest.raises(UserError, match=message):
        build(image_encoder_path=str(tmp_path / "m"), image_encoder_config=None)


@pytest.mark.parametrize(
    ("kind", "described", "others"), [(IMAGE, VIT, "grid"), (TEXT, BERT, "mean or tokens")], ids=str
)
def test_what_pools_is_not_made_up(kind: str, described: dict[str, Any], others: str, tmp_path: Path) -> None:
    """A model that was stored without that layer has one of random weights: only its other outputs are used."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(**described)
    AutoModel.from_config(config, add_pooling_layer=False).save_pretrained(tmp_path / "m")
    if kind == TEXT:
        (tmp_path / "m" / "tokenizer.json").write_text(byte_tokenizer(described), encoding="utf-8")
    own = {f"{kind}_encoder_path": str(tmp_path / "m"), f"{kind}_encoder_config": None}
    with pytest.raises(UserError, match=rf"without the layer that pools .*{kind}_encoder_output must be {others}"):
        build(**own, **{f"{kind}_encoder_output": "pooled"})
    build(**own, **{f"{kind}_encoder_output": others.split()[0]})


def _describe(folder: Path, **changes: Any) -> None:
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, **changes}))


def test_a_model_other_than_the_configuration_says_is_refused(tmp_path: Path) -> None:
    write_folder(IMAGE, DINO, tmp_path / "m")
    with pytest.raises(UserError, match=r"says hidden_size: 768, but the model in .* has 32"):
        build(image_encoder_path=str(tmp_path / "m"), image_encoder_config={"model_type": "dinov2", "hidden_size": 768})


def test_without_a_hub_a_name_there_is_one_line() -> None:
    with pytest.raises(UserError, match=r"facebook/dinov2-base cannot be read: .* give its folder"):
        build(image_encoder_path="facebook/dinov2-base", image_encoder_config=None)
    section = {"type": "dit_dec", "image_encoder": "transformers", "image_encoder_path": "facebook/dinov2-base"}
    assert "facebook/dinov2-base is fetched from the hub" in str(trusted.fetched(section, images=True))


# ---- what is refused ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_encoder": "efficientnet_lite0"}, "image_encoder_config is of image_encoder: transformers"),
        ({"image_encoder": "cnn"}, "image_encoder must be one of conv, transformers"),
        ({"image_encoder_output": "cls"}, "image_encoder_output must be one of grid, pooled"),
        ({"image_encoder": "conv"}, "image_encoder_config is of image_encoder: transformers"),
        ({"image_encoder_config": None}, "needs image_encoder_path"),
        ({"image_encoder_config": {"model_type": "dino"}}, "Did you mean 'dinov2'"),
        ({"image_encoder_config": {**DINO, "auto_map": {"AutoModel": "x.Y"}}}, "'auto_map', which names code"),
        ({"image_encoder_config": {**DINO, "_attn_implementation": "a/b"}}, "'_attn_implementation', which names"),
        ({"image_encoder_config": {**DINO, "x": [{"backbone": "resnet"}]}}, "'backbone', which names"),
        ({"image_encoder_std": [0.1, 0.1, 0]}, "three numbers above 0"),
        ({"image_encoder_size": 0}, "number of pixels"),
        ({"image_encoder_path": "nowhere/at/all"}, "neither a folder here"),
        ({"text_encoder_config": {"model_type": "llama"}}, "is no text model that is built"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_imported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_policy({"type": "dit_dec", **SMALL, **BOTH, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_encoder_output": "tokens"}, "tokens is of dit_encdec"),
        ({"text_max_words": 200}, "does not take text_max_words=200"),
        ({"text_encoder_config": {**CLIP, "vocab_size": 200, "bos_token_id": 198, "eos_token_id": 199}}, "no room"),
        ({"image_encoder_config": {**DINO, "model_type": "vit", "image_size": 28}}, "image_encoder_size=N resizes"),
        ({"image_encoder_config": RESNET | {"num_channels": 1}}, "does not take images of shape"),
    ],
)
def test_what_does_not_fit_together_is_refused_when_it_is_built(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_resizing_makes_images_fit() -> None:
    vit = {**DINO, "model_type": "vit", "image_size": 28, "patch_size": 14}
    built = build(image_encoder_config=vit, image_encoder_size=28, image_tokens_side=2)
    assert built.policy.model.obs_encoder.encoders[IMAGE](torch.rand(2, 3, 56, 56)).shape == (2, 4, 32)


def test_adapters_in_a_frozen_encoder_are_refused() -> None:
    inside = r".*encoders\.image.*\.query"
    with pytest.raises(UserError, match="is in a frozen encoder"):
        lora.inject(build().policy, LoraConfig(target_modules=inside))
    with pytest.raises(UserError, match="is in a frozen encoder"):
        clare.inject(build().policy, clare.ClareConfig(target_modules=inside))
    lora.inject(build(image_encoder_trained=True).policy, LoraConfig(target_modules=inside))
    policy = build().policy
    lora.inject(policy, LoraConfig())
    assert lora.lora_layers(policy) and not any(".encoders." in n for n in lora.lora_layers(policy))


# ---- files from somebody else -------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_encoder_path": "some/where"}, "with image_encoder_path reads a model from another place"),
        ({"image_encoder_config": {**DINO, "num_hidden_layers": 10**9}}, "claims more weights"),
        ({"image_encoder_config": {**DINO, "hidden_size": 10**6}}, "claims more weights"),
        ({"image_encoder_config": {**DINO, "hidden_size": 64}}, "claims more weights"),
        ({"text_encoder_config": {**CLIP, "vocab_size": 10**9}}, "a vocabulary of 1000000000 is beyond"),
        ({"text_encoder_config": {**CLIP, "vocab_size": 400}}, "no step 'clbench_tokenizer' with 'vocab_size' = 300"),
        ({"text_encoder_config": {**CLIP, "hidden_size": 64}}, "claims more weights"),
        ({"image_encoder_config": {**DINO, "attn_implementation": "a/b"}}, "names code or other models"),
        ({"image_encoder_config": {**DINO, "model_type": "timm_wrapper"}}, "is no image model that is built"),
    ],
)
def test_a_checkpoint_that_claims_another_encoder_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_policy(build(), tmp_path / "p")
    file = tmp_path / "p" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(UserError, match=message):
        load_policy(tmp_path / "p")


def test_a_damaged_or_foreign_tokenizer_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_policy(build(), tmp_path / "p")
    (state,) = (tmp_path / "p").glob("policy_preprocessor*tokenizer*.safetensors")
    text = load_file(state)["tokenizer"].numpy().tobytes()
    large = json.loads(text)
    large["model"]["vocab"]["é"] = 5000
    for wrong, message in ((text[:-100], "not a tokenizer's JSON"), (json.dumps(large).encode(), "ids up to 5000")):
        save_file({"tokenizer": torch.frombuffer(bytearray(wrong), dtype=torch.uint8)}, state)
        with pytest.raises(UserError, match=message):
            load_policy(tmp_path / "p")


# ---- models and tokenizers ----------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, names in MODEL_TYPES.items() for n in names])
def test_building_a_listed_model_reads_and_fetches_nothing(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it contacts a host"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("it fetches a file"))
    with torch.device("meta"):
        assert next(build_model(kind, {"model_type": name}).parameters()).is_meta


def test_byte_tokens_stand_between_the_models_marks() -> None:
    tokenizer = parsed_tokenizer(byte_tokenizer(CLIP), 8)
    found = tokenizer.encode("aé")  # one byte and two
    assert found.ids[0] == 298 and found.ids[4] == 299 and found.ids[5:] == [1, 1, 1]
    assert found.attention_mask == [1, 1, 1, 1, 1, 0, 0, 0] and len(set(found.ids[1:4])) == 3
    assert tokenizer.encode("a" * 50).ids[-1] == 299  # cut, but ended
    assert feature_key("observation.images.top") == "observation.features.images.top"
