"""Layout paper: the networks of CLARE's released code, and reading what that code wrote.

The files are written here, with the released names and small sizes; what the policies compute is compared with the
released computation written once more in plain functions of the file's tensors, without any of our modules.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies import make_pre_post_processors
from lerobot.policies.factory import get_policy_class
from safetensors.torch import load_file, save_file
from torch import Tensor

from clbench.adapters import clare, lora
from clbench.adapters.clare import load_adapter
from clbench.checkpoints import released
from clbench.checkpoints.policy_io import LoadedPolicy, load_policy, policy_config, save_policy
from clbench.checkpoints.released import in_our_form
from clbench.checkpoints.statistics import fault
from clbench.config.dit import check_policy
from clbench.config.policy_types import clare_targets
from clbench.config.schema import LoraConfig
from clbench.errors import UserError
from clbench.policies.dit.encoders import build_model, byte_tokenizer
from clbench.policies.dit.paper import SelfAttention
from clbench.policies.view import PolicyView, without_dropout
from clbench.seeding import seeded
from tests.hub_sets import served
from tests.test_hub_data import online  # noqa: F401 (a fixture)

D, H, A, S, HEADS, FFN, TIME, BLOCKS = 64, 8, 3, 5, 4, 128, 16, 2
STEPS = {"ditflow_mt": 2, "dit_mt": 3}
CAMERAS = ("observation.images.front", "observation.images.wrist")
NAME = "openai/clip-vit-base-patch32"
DINO = {
    "model_type": "dinov2", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28,
    "patch_size": 14, "mlp_ratio": 2,
}  # fmt: skip
CLIP = {
    "model_type": "clip_text_model", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 1, "vocab_size": 300, "max_position_embeddings": 40, "bos_token_id": 298,
    "eos_token_id": 299,
}  # fmt: skip


# ---- files of the released code -----------------------------------------------------------------
def features() -> dict[str, Any]:
    visual = {key: {"type": "VISUAL", "shape": [3, 28, 28]} for key in CAMERAS}
    return {
        "input_features": {**visual, "observation.state": {"type": "STATE", "shape": [S]}},
        "output_features": {"action": {"type": "ACTION", "shape": [A]}},
        "normalization_mapping": {"VISUAL": "MEAN_STD", "STATE": "MIN_MAX", "ACTION": "MIN_MAX"},
    }


def configuration(kind: str, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "type": kind, "n_obs_steps": STEPS[kind], "horizon": H, "n_action_steps": 4, **features(), "dropout": 0.1,
        "language_model_name": NAME, "vit_name": "facebook/dinov2-base", "dim_feedforward": FFN, "clip_sample": True,
        "clip_sample_range": 1.0, "do_mask_loss_for_padding": False, "drop_n_last_frames": 7, "optimizer_lr": 1e-4,
    }  # fmt: skip
    if kind == "ditflow_mt":
        values |= {"hidden_dim": D, "num_blocks": BLOCKS, "num_heads": HEADS, "frequency_embedding_dim": TIME,
                   "num_inference_steps": 10, "training_noise_sampling": "uniform"}  # fmt: skip
    else:
        values |= {"dim_model": D, "n_encoder_layers": BLOCKS, "n_heads": HEADS, "time_dim": TIME,
                   "num_inference_steps": 10, "num_train_timesteps": 100, "prediction_type": "epsilon",
                   "noise_scheduler_type": "DDIM", "beta_schedule": "squaredcos_cap_v2"}  # fmt: skip
    return {k: v for k, v in {**values, **changes}.items() if v is not ...}


def weights(kind: str) -> dict[str, Tensor]:
    flow = kind == "ditflow_mt"
    top, net = ("dit_flow", "dit_flow.velocity_net") if flow else ("model", "model.noise_net")
    s: dict[str, Tensor] = {}

    def linear(name: str, n: int, m: int) -> None:
        s[f"{name}.weight"], s[f"{name}.bias"] = torch.randn(m, n) / n**0.5, torch.randn(m) / 4

    def norm(name: str) -> None:
        s[f"{name}.weight"], s[f"{name}.bias"] = 1 + torch.randn(D) / 4, torch.randn(D) / 4

    def layer(name: str) -> None:
        s[f"{name}.self_attn.in_proj_weight"] = torch.randn(3 * D, D) / D**0.5
        s[f"{name}.self_attn.in_proj_bias"] = torch.randn(3 * D) / 4
        linear(f"{name}.self_attn.out_proj", D, D)
        linear(f"{name}.mlp.linear1", D, FFN)
        linear(f"{name}.mlp.linear2", FFN, D)
        norm(f"{name}.norm1")
        norm(f"{name}.norm2")

    for what, described, place in (("image", DINO, "pretrained_rgb_encoder._model"),
                                   ("text", CLIP, "language_encoder.clip_model")):  # fmt: skip
        model = build_model(what, described)
        for name, p in model.state_dict().items():
            s[f"{top}.{place}.{name}"] = p + 0.1 * torch.randn_like(p)
    linear(f"{top}.language_embedding_projection", 64, D)
    linear(f"{top}.rgb_embedding_projection", 64, D)
    linear(f"{net}.ac_proj.0", A, A)
    linear(f"{net}.ac_proj.2", A, D)
    s[f"{net}.dec_pos"] = torch.randn(H, 1, D)
    half = TIME // 2
    s[f"{net}.time_net.w"] = torch.exp(-math.log(1e3 if flow else 1e4) * torch.arange(half) / (half - 1))
    linear(f"{net}.time_net.out_net.0", TIME, D)
    linear(f"{net}.time_net.out_net.2", D, D)
    linear(f"{net}.eps_out.adaLN_modulation.1", D, 2 * D)
    linear(f"{net}.eps_out.linear", D, A)
    for i in range(BLOCKS):
        block = f"{net}.decoder.layers.{i}"
        layer(block)
        names = ("attn_modulate.scale", "attn_modulate.shift", "attn_gate.scale", "mlp_modulate.scale",
                 "mlp_modulate.shift", "mlp_gate.scale")  # fmt: skip
        if not flow:
            names = ("attn_mod1.scale", "attn_mod1.shift", "attn_mod2.scale", "mlp_mod1.scale", "mlp_mod1.shift",
                     "mlp_mod2.scale")  # fmt: skip
            layer(f"{net}.encoder.layers.{i}")
        for name in names:
            linear(f"{block}.{name}", D, D)
    if flow:
        linear(f"{net}.cond_proj", D + STEPS[kind] * (S + len(CAMERAS) * D), D)
    else:
        linear(f"{top}.robot_state_encoder.1", S, D)
        place = torch.arange(5000)[:, None] / 1e4 ** (torch.arange(0, D, 2) / D)
        pe = torch.zeros(5000, 1, D)
        pe[:, 0, 0::2], pe[:, 0, 1::2] = place.sin(), place.cos()
        s[f"{net}.enc_pos.pe"] = pe
    for key in CAMERAS:
        name = f"normalize_inputs.buffer_{key.replace('.', '_')}"
        s[f"{name}.mean"], s[f"{name}.std"] = torch.rand(3, 1, 1), 0.2 + torch.rand(3, 1, 1)
    s["normalize_inputs.buffer_observation_state.min"] = -1 - torch.rand(S)
    s["normalize_inputs.buffer_observation_state.max"] = 1 + torch.rand(S)
    for side in ("normalize_targets", "unnormalize_outputs"):
        s[f"{side}.buffer_action.min"] = torch.tensor([-1.0, -2, 0])
        s[f"{side}.buffer_action.max"] = torch.tensor([1.0, 3, 0.5])
    return {k: v.clone().contiguous() for k, v in s.items()}


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of this test alone, with the tokenizer where a user puts it."""
    for name in ("CACHE", "MODEL"):
        monkeypatch.setenv(f"CLBENCH_{name}_ROOT", str(tmp_path / name.lower()))
    place = tmp_path / "model" / "clip-vit-base-patch32"
    place.mkdir(parents=True)
    (place / "tokenizer.json").write_text(byte_tokenizer(CLIP))
    return tmp_path


def write(folder: Path, kind: str, state: dict[str, Tensor] | None = None, **changes: Any) -> dict[str, Tensor]:
    folder.mkdir(exist_ok=True)
    if state is None:
        with seeded("released", 0):
            state = weights(kind)
    (folder / "config.json").write_text(json.dumps(configuration(kind, **changes)))
    save_file(state, folder / "model.safetensors")
    return state


# ---- the released computation, in plain functions of the file's tensors --------------------------
def lin(s: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]


def normed(s: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * s[f"{name}.weight"] + s[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attended(s: dict[str, Tensor], name: str, x: Tensor, pos: Tensor | float = 0.0) -> Tensor:
    """torch's own function for nn.MultiheadAttention, which wants (L, B, D)."""
    placed, x = (x + pos).transpose(0, 1), x.transpose(0, 1)
    out, _ = F.multi_head_attention_forward(
        placed, placed, x, D, HEADS, s[f"{name}.in_proj_weight"], s[f"{name}.in_proj_bias"], None, None, False, 0.0,
        s[f"{name}.out_proj.weight"], s[f"{name}.out_proj.bias"], training=False,
    )  # fmt: skip
    return out.transpose(0, 1)


def mlp(s: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return lin(s, f"{name}.linear2", gelu(lin(s, f"{name}.linear1", x)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def part(s: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in s.items() if k.startswith(prefix)}


def encoded(s: dict[str, Tensor], top: str, raw: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Text (B, D), images (B, T, C, D), states (B, T, S), from raw inputs."""
    from tokenizers import Tokenizer

    models = {}
    for what, described, place in (("image", DINO, "pretrained_rgb_encoder._model"),
                                   ("text", CLIP, "language_encoder.clip_model")):  # fmt: skip
        models[what] = build_model(what, described).eval()
        models[what].load_state_dict(part(s, f"{top}.{place}."))
    tokenizer = Tokenizer.from_str(byte_tokenizer(CLIP))
    rows = []
    for text in raw["task"]:
        found = models["text"](input_ids=torch.tensor([tokenizer.encode(text).ids]))
        rows.append(found.pooler_output[0])
    text = lin(s, f"{top}.language_embedding_projection", torch.stack(rows))
    images = []
    for key in CAMERAS:
        of = part(s, f"normalize_inputs.buffer_{key.replace('.', '_')}.")
        x = (raw[key] - of["mean"]) / (of["std"] + 1e-8)
        vectors = models["image"](pixel_values=x.flatten(0, 1)).pooler_output
        images.append(lin(s, f"{top}.rgb_embedding_projection", vectors).unflatten(0, x.shape[:2]))
    of = part(s, "normalize_inputs.buffer_observation_state.")
    state = (raw["observation.state"] - of["min"]) / (of["max"] - of["min"] + 1e-8) * 2 - 1
    return text, torch.stack(images, 2), state


def time_of(s: dict[str, Tensor], net: str, t: Tensor) -> Tensor:
    angles = t[:, None] * s[f"{net}.time_net.w"]
    x = torch.cat([angles.cos(), angles.sin()], 1)
    return lin(s, f"{net}.time_net.out_net.2", silu(lin(s, f"{net}.time_net.out_net.0", x)))


def plain_dec(s: dict[str, Tensor], raw: dict[str, Any], x: Tensor, t: Tensor) -> Tensor:
    text, images, state = encoded(s, "dit_flow", raw)
    net = "dit_flow.velocity_net"
    condition = lin(s, f"{net}.cond_proj", torch.cat([text, state.flatten(1), images.flatten(1)], 1))
    c = silu(condition + time_of(s, net, t))[:, None]
    x = lin(s, f"{net}.ac_proj.2", gelu(lin(s, f"{net}.ac_proj.0", x))) + s[f"{net}.dec_pos"][:, 0]
    for i in range(BLOCKS):
        n = f"{net}.decoder.layers.{i}"
        y = normed(s, f"{n}.norm1", x, 1e-6)
        y = y * (1 + lin(s, f"{n}.attn_modulate.scale", c)) + lin(s, f"{n}.attn_modulate.shift", c)
        x = x + attended(s, f"{n}.self_attn", y) * lin(s, f"{n}.attn_gate.scale", c)
        y = normed(s, f"{n}.norm2", x, 1e-6)
        y = y * (1 + lin(s, f"{n}.mlp_modulate.scale", c)) + lin(s, f"{n}.mlp_modulate.shift", c)
        x = x + mlp(s, f"{n}.mlp", y) * lin(s, f"{n}.mlp_gate.scale", c)
    shift, scale = lin(s, f"{net}.eps_out.adaLN_modulation.1", c).chunk(2, -1)
    return lin(s, f"{net}.eps_out.linear", x * (1 + scale) + shift)


def plain_encdec(s: dict[str, Tensor], raw: dict[str, Any], x: Tensor, level: Tensor) -> Tensor:
    text, images, state = encoded(s, "model", raw)
    net = "model.noise_net"
    z = torch.cat([text[:, None], images.flatten(1, 2), lin(s, "model.robot_state_encoder.1", state)], 1)
    pos = s[f"{net}.enc_pos.pe"][: z.shape[1], 0]
    for i in range(BLOCKS):
        n = f"{net}.encoder.layers.{i}"
        z = normed(s, f"{n}.norm1", z + attended(s, f"{n}.self_attn", z, pos), 1e-5)
        z = normed(s, f"{n}.norm2", z + mlp(s, f"{n}.mlp", z), 1e-5)
    time = time_of(s, net, level.float())
    c, last = silu(z.mean(1) + time)[:, None], silu(z[:, -1] + time)[:, None]
    x = lin(s, f"{net}.ac_proj.2", gelu(lin(s, f"{net}.ac_proj.0", x))) + s[f"{net}.dec_pos"][:, 0]
    for i in range(BLOCKS):
        n = f"{net}.decoder.layers.{i}"
        y = normed(s, f"{n}.norm1", x, 1e-5)
        y = y * lin(s, f"{n}.attn_mod1.scale", c) + lin(s, f"{n}.attn_mod1.shift", c)
        x = x + attended(s, f"{n}.self_attn", y) * lin(s, f"{n}.attn_mod2.scale", c)
        y = normed(s, f"{n}.norm2", x, 1e-5)
        y = y * lin(s, f"{n}.mlp_mod1.scale", c) + lin(s, f"{n}.mlp_mod1.shift", c)
        x = x + mlp(s, f"{n}.mlp", y) * lin(s, f"{n}.mlp_mod2.scale", c)
    shift, scale = lin(s, f"{net}.eps_out.adaLN_modulation.1", last).chunk(2, -1)
    return lin(s, f"{net}.eps_out.linear", x * scale + shift)


def acted(kind: str, s: dict[str, Tensor], raw: dict[str, Any], noise: Tensor) -> Tensor:
    """The actions from the present step on, in the data's units."""
    x = noise
    if kind == "ditflow_mt":
        for i in range(10):
            x = (x + plain_dec(s, raw, x, torch.full((len(x),), i / 10)) / 10).clamp(-1, 1)
    else:
        diffusers = pytest.importorskip("diffusers")
        scheduler = diffusers.DDIMScheduler(
            num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", clip_sample=True, clip_sample_range=1.0,
            prediction_type="epsilon",
        )  # fmt: skip
        scheduler.set_timesteps(10)
        for k in scheduler.timesteps:
            x = scheduler.step(plain_encdec(s, raw, x, k.repeat(len(x))), k, x).prev_sample
    low, high = (s[f"unnormalize_outputs.buffer_action.{n}"] for n in ("min", "max"))
    return ((x + 1) / 2 * (high - low) + low)[:, STEPS[kind] - 1 :]


def raw_batch(steps: int, n: int = 3, seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    return {
        **{key: torch.rand(n, steps, 3, 28, 28, generator=g) for key in CAMERAS},
        "observation.state": 2 * torch.randn(n, steps, S, generator=g),  # also outside of the data's range
        "action": torch.randn(n, H, A, generator=g),
        "action_is_pad": torch.arange(H).repeat(n, 1) > 5,
        "task": ["Push the puck", "Open a door", "Push the puck"][:n],
    }


# ---- reading ------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", STEPS)
@torch.no_grad()
def test_a_released_policy_computes_and_acts_as_its_file_says(kind: str, roots: Path) -> None:
    state = write(roots / "theirs", kind)
    loaded = load_policy(in_our_form(str(roots / "theirs")))
    raw = raw_batch(STEPS[kind])
    batch = loaded.preprocessor(dict(raw))
    g = torch.Generator().manual_seed(5)
    x, policy = torch.randn(3, H, A, generator=g), loaded.policy
    context = policy.model.encode(batch)
    if kind == "ditflow_mt":
        t = torch.rand(3, generator=g)
        found, want = policy.model.velocity(x, t, context), plain_dec(state, raw, x, t)
    else:
        level = torch.tensor([0, 29, 99])
        found, want = policy.model.velocity(x, level / 100, context), plain_encdec(state, raw, x, level)
    assert want.std() > 0.1
    assert torch.allclose(found, want, atol=1e-5, rtol=1e-5)
    noise = torch.randn(3, H, A, generator=g)
    chunk = loaded.postprocessor(policy.predict_action_chunk(batch, noise=noise))
    want = acted(kind, state, raw, noise)
    assert chunk.shape == want.shape == (3, H - STEPS[kind] + 1, A)
    assert torch.allclose(chunk, want, atol=1e-4)
    low, high = (state[f"normalize_targets.buffer_action.{n}"] for n in ("min", "max"))
    normal = (raw["action"] - low) / (high - low + 1e-8) * 2 - 1
    assert torch.allclose(batch["action"], normal, atol=1e-5)
    # the loss is the plain mean over all steps
    draw = policy.sample_draw(3, torch.Generator().manual_seed(1))
    out = policy._flow(batch, draw, {"loss", "prediction", "target", "mask"})
    assert torch.allclose(out["loss"], (out["prediction"] - out["target"]).square().flatten(1).mean(1))
    assert out["mask"].all() and not loaded.policy.config.mask_padding


@pytest.mark.parametrize("kind", STEPS)
def test_it_is_read_once_into_a_whole_folder_of_ours(kind: str, roots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(roots / "theirs", kind)
    before = sorted(p.name for p in (roots / "theirs").iterdir())
    made = Path(in_our_form(str(roots / "theirs")))
    assert made.parent == roots / "cache" / "bases" and fault(made) is None
    assert sorted(p.name for p in (roots / "theirs").iterdir()) == before
    assert not any(name.startswith("normalize") for name in load_file(made / "model.safetensors"))
    config = load_policy(made).policy.config
    assert config.action_delta_indices == list(range(1 - STEPS[kind], 1 - STEPS[kind] + H))
    assert (config.clip_sample, config.dropout, config.num_inference_steps) == (1.0, 0.1, 10)
    with monkeypatch.context() as patch:
        patch.setattr(released, "_built", lambda *_: pytest.fail("it was read again"))
        assert in_our_form(str(roots / "theirs")) == str(made)
    (made / "config.json").write_text("{}")  # damaged: made again
    assert in_our_form(str(roots / "theirs")) == str(made) and fault(made) is None
    load_policy(made)
    assert in_our_form(str(made)) == str(made)
    other = write(roots / "theirs", kind)
    net = "dit_flow.velocity_net" if kind == "ditflow_mt" else "model.noise_net"
    write(roots / "theirs", kind, {**other, f"{net}.dec_pos": torch.zeros(H, 1, D)})
    assert in_our_form(str(roots / "theirs")) != str(made)


def test_commands_go_on_with_what_was_made(roots: Path) -> None:
    from clbench.checkpoints.hub import with_local_base
    from clbench.config.compose import compose

    write(roots / "theirs", "ditflow_mt")
    config, _ = compose(model="checkpoint", algorithms=["seqfft"], dataset="metaworld_pixels",
                        overrides=[f"policy.path={roots / 'theirs'}"])  # fmt: skip
    assert with_local_base(config).policy["path"] == in_our_form(str(roots / "theirs"))


def test_a_hub_gives_the_policy_and_its_tokenizer_once(
    roots: Path,
    online: Callable[[str], None],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    from clbench.checkpoints.hub import with_local_base
    from clbench.config.compose import compose

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(roots / "hub"))
    write(roots / "theirs", "dit_mt")
    here = in_our_form(str(roots / "theirs"))
    clip = (roots / "model" / "clip-vit-base-patch32").rename(roots / "clip")
    config, _ = compose(model="checkpoint", algorithms=["seqfft"], dataset="metaworld_pixels",
                        overrides=["policy.path=someone/dit"])  # fmt: skip
    with served({"someone/dit": roots / "theirs", NAME: clip}, tags=("main",)) as (url, asked):
        online(url)
        assert with_local_base(config).policy["path"] == here
        assert any(NAME in path and "tokenizer.json" in path for path in asked)
        asked.clear()
        assert with_local_base(config).policy["path"] == here
        assert asked == []


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("ditflow_mt", {"training_noise_sampling": "beta"}, "training_noise_sampling is 'beta'.* not built"),
        ("dit_mt", {"prediction_type": "sample", "noise_scheduler_type": "DDPM"},
         "prediction_type is 'sample', noise_scheduler_type is 'DDPM'"),
        ("dit_mt", {"activation": "relu"}, "activation is 'relu'"),
        ("ditflow_mt", {"hidden_dim": 32}, "hidden_dim 32, and the weights 64"),
        ("ditflow_mt", {"horizon": 16}, "horizon 16, and the weights 8"),
        ("dit_mt", {"n_encoder_layers": 6}, "n_encoder_layers 6, and the weights 2"),
        ("ditflow_mt", {"n_obs_steps": 3}, r"cond_proj\.weight has shape|claims more than the weights"),
        ("ditflow_mt", {"n_obs_steps": 10**6}, "n_obs_steps 1000000"),
        ("ditflow_mt", {"num_heads": 5}, "must be a multiple of n_heads"),
        ("ditflow_mt", {"input_features": {}}, "not one of CLARE's released ones"),
        ("ditflow_mt", {"output_features": ...}, "describes no features"),
        ("dit_mt", {"normalization_mapping": {"STATE": "QUANTILES"}}, "normalization_mapping is"),
        ("dit_mt", {"language_model_name": None}, "names no language model"),
        ("dit_mt", {"language_model_name": "someone/else"}, "tokenizer of someone/else, and there is no such folder"),
        ("dit_mt", {"clip_sample_range": "wide"}, "clip_sample"),
        ("ditflow_mt", {"normalization_mapping": {"STATE": ["MIN_MAX"]}}, "describes no features"),
        ("ditflow_mt", {"normalization_mapping": {"FOO": "MIN_MAX"}}, "normalization_mapping has 'FOO'"),
        ("ditflow_mt", {"input_features": {"observation.state": {"type": "REWARD", "shape": [2]}}}, "of type REWARD"),
        ("ditflow_mt", {"input_features": {"observation.state": {"type": "STATE", "shape": []}}}, "of type STATE"),
        ("ditflow_mt", {"language_model_name": "a/.."}, "names no language model"),
        ("ditflow_mt", {"language_model_name": "a" * 5000}, "names no language model"),
        ("ditflow_mt", {"clip_sample": None}, "clip_sample is None"),
        ("ditflow_mt", {"do_mask_loss_for_padding": "false"}, "do_mask_loss_for_padding is 'false'"),
    ],
)  # fmt: skip
def test_what_is_not_built_is_refused(kind: str, change: dict[str, Any], message: str, roots: Path) -> None:
    write(roots / "theirs", kind, **change)
    with pytest.raises(UserError, match=message):
        in_our_form(str(roots / "theirs"))
    assert not list((roots / "cache").glob("bases/*"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dit_flow.resnet.conv.weight", torch.zeros(2), "belongs to nothing that is built"),
        ("dit_flow.velocity_net.decoder.layers.0.norm1.bias", None, r"no weights for .*norm1\.bias"),
        ("dit_flow.velocity_net.decoder.layers.1.mlp.linear2.bias", torch.zeros(D + 1), "has shape"),
        ("dit_flow.velocity_net.time_net.w", torch.ones(TIME // 2), "frequencies of time"),
        ("dit_flow.velocity_net.dec_pos", None, "no weights for model.velocity_net.position"),
        ("normalize_inputs.buffer_observation_state.max", torch.full((S,), torch.inf), "no statistics of shape"),
        ("unnormalize_outputs.buffer_action.min", torch.zeros(A), "normalize_targets.* is not what"),
        ("normalize_inputs.buffer_observation_images_wrist.std", None, "images_wrist.std has no statistics"),
        ("dit_flow.language_encoder.clip_model.text_model.final_layer_norm.bias", None, "claims more"),
    ],
)
def test_foreign_weights_are_refused(name: str, value: Tensor | None, message: str, roots: Path) -> None:
    with seeded("released", 0):
        state = weights("ditflow_mt")
    state = {k: v for k, v in {**state, name: value}.items() if v is not None}
    write(roots / "theirs", "ditflow_mt", state)
    with pytest.raises(UserError, match=message):
        in_our_form(str(roots / "theirs"))


def test_a_configuration_that_names_no_language_model_means_clip(
    roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(roots / "theirs", "dit_mt", language_model_name=..., pre_norm=True)
    assert Path(in_our_form(str(roots / "theirs"))).is_dir()
    assert "settings that are not known here, and have no effect: pre_norm." in capsys.readouterr().err


def test_damaged_files_and_missing_tokenizers_are_one_line(roots: Path) -> None:
    write(roots / "theirs", "dit_mt")
    path = roots / "theirs" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="incomplete or damaged"):
        in_our_form(str(roots / "theirs"))
    path.unlink()
    here = roots / "model" / "clip-vit-base-patch32"
    kept = (here / "tokenizer.json").rename(roots / "tokenizer.json")
    with pytest.raises(UserError, match="cannot read"):  # before any hub is asked for the tokenizer
        in_our_form(str(roots / "theirs"))
    kept.rename(here / "tokenizer.json")
    write(roots / "theirs", "dit_mt")
    (here / "tokenizer.json").write_text(byte_tokenizer({**CLIP, "eos_token_id": 297}))
    with pytest.raises(UserError, match=r"ends a text with token \[297\], and the text model pools 299"):
        in_our_form(str(roots / "theirs"))
    (here / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer's JSON"):
        in_our_form(str(roots / "theirs"))
    (here / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=rf"hub does not give it.*put it into {here}"):
        in_our_form(str(roots / "theirs"))


# ---- adapters of the released code ---------------------------------------------------------------
LAYERS = {
    "ditflow_mt": ("_policy.dit_flow.velocity_net.cond_proj", "model.velocity_net.cond_proj",
                   r".*velocity_net.cond_proj"),
    "dit_mt": ("_policy.model.noise_net.encoder.layers.1.mlp", "model.obs_encoder.layers.1.ffn", r".*layers\.1\.mlp"),
}  # fmt: skip


@pytest.mark.parametrize("kind", STEPS)
@torch.no_grad()
def test_adapters_of_the_released_code_attach(kind: str, roots: Path) -> None:
    write(roots / "theirs", kind)
    policy = load_policy(in_our_form(str(roots / "theirs"))).policy
    theirs, ours, pattern = LAYERS[kind]
    base: Any = policy.get_submodule(ours)
    n, m = base.in_features, base.out_features
    s, stem = dict[str, Tensor](), f"base_model.model.{theirs}"
    sizes = {
        "func_adapters.0.down_proj": (n, 6), "func_adapters.0.up_proj": (6, m),
        "discriminators.0.encoder.0": (n, 5), "discriminators.0.encoder.2": (5, 2),
        "discriminators.0.decoder.0": (2, 5), "discriminators.0.decoder.2": (5, n),
    }  # fmt: skip
    for name, (a, b) in sizes.items():
        name = f"clare_{name}"
        s[f"{stem}.{name}.weight"], s[f"{stem}.{name}.bias"] = torch.randn(b, a) / 8, torch.randn(b)
    for name, value in (("running_mean", 1.0), ("running_std", 1.0), ("num_batches_tracked", 3)):
        s[f"{stem}.clare_discriminators.0.{name}"] = torch.tensor(value)
    s[f"{stem}.clare_discriminators.0.connected_adapter_indices"] = torch.tensor(0)
    save_file(s, roots / "adapter_model.safetensors")
    (roots / "adapter_config.json").write_text(json.dumps({
        "peft_type": "CLARE", "target_modules": pattern, "num_learned_task": 1, "batch_first": True, "feature_dim": n,
        "out_feature_dim": m, "structure": {f"{theirs}.0": [1, 1]}, "use_trainable_copy": False,
        "discriminator_cfg": {"type": "autoencoder", "hidden_dim": 5, "latent_dim": 2, "feature_dim": n},
        "func_adapter_cfg": {"hidden_dim": 6, "use_lora": False},
    }))  # fmt: skip
    load_adapter(policy, roots)
    x = torch.randn(2, n) if kind == "ditflow_mt" else torch.randn(2, 4, n)
    h = lin(s, f"{stem}.clare_func_adapters.0.down_proj", x).relu()
    want = base(x) + lin(s, f"{stem}.clare_func_adapters.0.up_proj", h)
    assert torch.allclose(policy.get_submodule(ours)(x), want, atol=1e-5)


# ---- policies of this layout ----------------------------------------------------------------------
SMALL: dict[str, Any] = {
    "layout": "paper", "n_obs_steps": 2, "chunk_size": 6, "n_action_steps": 4, "action_patch": 1, "d_model": 32,
    "n_heads": 2, "encoder_layers": 2, "decoder_layers": 2, "ffn_mult": 2, "time_dim": 8, "mask_padding": False,
    "num_inference_steps": 5, "diffusion_steps": 20, "clip_sample": 1.0, "image_encoder": "transformers",
    "image_encoder_config": DINO, "image_encoder_output": "pooled", "text_encoder": "transformers",
    "text_encoder_config": CLIP, "text_encoder_output": "pooled", "text_max_words": 20, "normalization": "min_max",
    "dropout": 0.1,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {"dit_dec": {}, "dit_encdec": {"objective": "ddim", "state_dropout": 0.2}}


def build(kind: str, cameras: int = 2, env: int = 0, **changes: Any) -> LoadedPolicy:
    config = policy_config({"type": kind, **SMALL, **KINDS[kind], **changes}, "cpu")
    config.input_features = {
        "observation.state": PolicyFeature(FeatureType.STATE, (S,)),
        **({"observation.environment_state": PolicyFeature(FeatureType.ENV, (env,))} if env else {}),
        **{key: PolicyFeature(FeatureType.VISUAL, (3, 28, 28)) for key in CAMERAS[:cameras]},
    }
    config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (A,))}
    with seeded("paper", 0):
        policy = get_policy_class(kind)(config)
        with torch.no_grad():  # gates start at zero
            for name, p in policy.named_parameters():
                if ".encoders." not in name:
                    p.add_(0.1 * torch.randn_like(p))
    sizes = (("observation.state", S), ("observation.environment_state", env), ("action", A))
    stats = {k: {"min": -3 * torch.ones(n), "max": 3 * torch.ones(n)} for k, n in sizes}
    return LoadedPolicy(policy, *make_pre_post_processors(config, dataset_stats=stats), "")


def raw(n: int = 3, seed: int = 0, env: int = 0) -> dict[str, Any]:
    batch = raw_batch(2, n, seed)
    extra = {"observation.environment_state": torch.randn(n, 2, env)} if env else {}
    return {**batch, "action": batch["action"][:, :6], "action_is_pad": batch["action_is_pad"][:, :6], **extra}


def view(loaded: LoadedPolicy) -> PolicyView:
    from contextlib import nullcontext

    return PolicyView(loaded.policy, loaded.policy, loaded.preprocessor, nullcontext)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_trains_and_checkpoints_are_the_same_policy(kind: str, tmp_path: Path) -> None:
    loaded = build(kind, env=3)
    policy, batch = loaded.policy.train(), raw(env=3)
    policy.forward(loaded.preprocessor(dict(batch)))[0].backward()
    lacking = [n for n, p in policy.named_parameters() if p.requires_grad and p.grad is None]
    assert not lacking and all(not p.requires_grad for n, p in policy.named_parameters() if ".encoders." in n)
    assert ("model.velocity_net.position" in dict(policy.named_parameters())) is (kind == "dit_dec")
    save_policy(loaded, tmp_path / "p")
    again = load_policy(tmp_path / "p")
    noise = torch.randn(3, 6, A)
    one, two = (p.policy.predict_action_chunk(p.preprocessor(dict(batch)), noise=noise) for p in (loaded, again))
    assert torch.equal(one, two) and one.shape == (3, 5, A) and one.abs().max() <= 1
    for what in ("observation.state", "observation.environment_state", *CAMERAS, "task"):
        changed = batch["task"][::-1] if what == "task" else batch[what].flip(0)
        other = {**batch, what: ["x", *changed[1:]] if what == "task" else changed}
        seen = again.policy.model.features(again.policy.model.encode(again.preprocessor(dict(other))))
        same = again.policy.model.features(again.policy.model.encode(again.preprocessor(dict(batch))))
        assert not torch.allclose(seen[0], same[0], atol=1e-4), what


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_draws_are_independent_and_only_training_drops(kind: str) -> None:
    loaded = build(kind)
    policy, learner = loaded.policy, view(loaded)
    draw = policy.sample_draw(3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        policy.train()
        assert not torch.equal(learner.per_sample(raw(), draw), learner.per_sample(raw(), draw))
        with without_dropout(policy):
            all_three = learner.per_sample(raw(), draw)
            assert torch.equal(all_three, learner.per_sample(raw(), draw))
        assert policy.training
        policy.eval()
        one = {k: v[1:2] for k, v in raw().items()}
        single = learner.per_sample(one, {k: v[1:2] for k, v in draw.items()})
    assert torch.allclose(single[0], all_three[1], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_squared_gradients_of_many_samples_at_once_are_those_of_a_loop(kind: str) -> None:
    loaded = build(kind)
    trained = {n: p for n, p in loaded.policy.named_parameters() if p.requires_grad}
    draw = loaded.policy.sample_draw(3, torch.Generator().manual_seed(0))
    with without_dropout(loaded.policy):
        many, loop = (view(loaded).squared_gradients(raw(), draw, trained, vectorized=v) for v in (None, False))
    for name in trained:
        assert torch.allclose(many[name], loop[name], rtol=1e-3, atol=1e-8), name


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_activations_give_the_same_gradients(kind: str) -> None:
    found = []
    for recompute in (False, True):
        loaded = build(kind, gradient_checkpointing=recompute)
        with seeded("drops", 1):
            loaded.policy.train().forward(loaded.preprocessor(raw()))[0].backward()
        found.append({n: p.grad for n, p in loaded.policy.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and all(torch.allclose(g, found[1][n]) for n, g in found[0].items())


@pytest.mark.parametrize("kind", KINDS)
def test_lora_and_clare_find_their_layers(kind: str) -> None:
    loaded = build(kind)
    lora.inject(loaded.policy, LoraConfig(enabled=True))
    adapted = {n.split(".lora_A")[0] for n, p in loaded.policy.named_parameters() if ".lora_A." in n}
    assert not any(".encoders." in n for n in adapted)
    ends = {n.rsplit(".", 1)[1] for n in adapted}
    assert ends == {"qk", "v", "out", "linear1", "linear2"} | ({"cond_proj"} if kind == "dit_dec" else set())
    loaded = build(kind)
    layers = clare.inject(loaded.policy, clare.ClareConfig(target_modules=clare_targets(kind)))
    assert len(layers) == (1 if kind == "dit_dec" else 2)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_kept_features_and_merged_adapters_are_the_same_policy(kind: str) -> None:
    loaded = build(kind)
    policy = loaded.policy.eval()
    draw = policy.sample_draw(3, torch.Generator().manual_seed(0))
    batch = loaded.preprocessor(raw())
    kept = policy.with_frozen_features(batch)
    assert kept.keys() != batch.keys()
    assert torch.allclose(policy.per_sample_loss(kept, draw), policy.per_sample_loss(batch, draw), atol=1e-5)
    lora.inject(policy, LoraConfig(enabled=True))
    for name, p in policy.named_parameters():
        if ".lora_B." in name:  # they start at zero
            p.normal_(0, 0.1)
    before = view(loaded).per_sample(raw(), draw)
    lora.merge(policy)
    assert not any(".lora_" in name for name, _ in policy.named_parameters())
    assert torch.allclose(view(loaded).per_sample(raw(), draw), before, atol=1e-5)


def test_one_vector_of_any_encoder_will_do_and_states_alone_too() -> None:
    for changes in ({"image_encoder_output": "grid", "image_tokens_side": 1}, {"text_encoder_output": "mean"}):
        policy = build("dit_dec", **changes).policy
        assert policy.model.obs_encoder.encoders["image"].n_features == 1
    loaded = build("dit_dec", cameras=0, image_encoder="conv", image_encoder_config=None, n_obs_steps=1)
    batch = {k: v[:, -1] if k.startswith("observation") else v for k, v in raw().items() if k not in CAMERAS}
    assert loaded.policy.model.encode(loaded.preprocessor(batch)).shape == (3, 32)
    with pytest.raises(ValueError, match=r"layout: paper takes images as vectors"):
        build("dit_dec", image_encoder="conv", image_encoder_config=None)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("dit_dec", {"layout": "papers"}, "layout must be one of clbench, paper"),
        ("dit_dec", {"layout": "clbench"}, "dropout is of layout: paper"),
        ("dit_dec", {"layout": "clbench", "dropout": 0.0}, "time_dim is of layout: paper"),
        ("dit_dec", {"action_patch": 2, "objective": "ddim"},
         r"layout: paper of dit_dec needs action_patch: 1 \(it is 2\); objective: flow \(it is ddim\)\."),
        ("dit_encdec", {"objective": "flow"}, r"needs objective: ddim \(it is flow\)"),
        ("dit_dec", {"text_encoder": "words", "text_encoder_config": None}, "text_encoder: transformers or minilm"),
        ("dit_encdec", {"text_encoder_output": "tokens"}, "text_encoder_output: pooled or mean"),
        ("dit_dec", {"image_encoder_output": "grid"}, r"image_encoder_output: pooled \(it is grid\)"),
        ("dit_dec", {"n_action_steps": 6}, "n_action_steps of at most 5, as its chunk starts 1 steps ago"),
        ("dit_dec", {"state_dropout": 0.1}, "state_dropout: 0 in dit_dec"),
        ("dit_dec", {"time_dim": 7}, "even time_dim"),
        ("dit_dec", {"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_together(kind: str, changes: dict[str, Any], message: str) -> None:
    section = {"type": kind, **SMALL, **KINDS[kind], **changes}
    with pytest.raises(UserError, match=message):
        check_policy(section)
    with pytest.raises(UserError, match=message):
        policy_config(section, "cpu")


def test_attentions_weights_are_dropped_in_training_alone() -> None:
    torch.manual_seed(0)
    layer, x = SelfAttention(16, 2, 0.5), torch.randn(3, 5, 16)
    whole = layer.eval()(x)
    assert torch.equal(layer(x), whole)
    layer.train()
    assert not torch.equal(layer(x), layer(x)) and not torch.allclose(layer(x), whole, atol=1e-3)
    with without_dropout(layer):
        assert torch.equal(layer(x), whole)


def test_states_are_dropped_before_they_become_tokens() -> None:
    policy = build("dit_encdec", env=3).policy.eval()
    encoder, batch = policy.model.obs_encoder, build("dit_encdec", env=3).preprocessor(raw(env=3))
    other = {**batch, "observation.state": -batch["observation.state"],
             "observation.environment_state": -batch["observation.environment_state"]}  # fmt: skip
    assert not torch.allclose(encoder(batch), encoder(other), atol=1e-3)
    encoder.drop.train()
    encoder.drop.p = 1.0
    assert torch.equal(encoder(batch), encoder(other))
