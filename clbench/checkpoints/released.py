"""Policies that CLARE's released code wrote (`ditflow_mt`, `dit_mt`), as policies of ours of layout paper.

Such a folder (or model on a hub) has a `config.json` and one `model.safetensors`, in LeRobot's old form: the statistics
that normalise are buffers among the weights (`normalize_inputs.buffer_KEY.mean`, …), and the frozen encoders' weights
are there, too. It is read once, into an ordinary policy folder beside the pretrained bases, named by what it was made
of; everything else works on that folder. Only JSON and safetensors are read.

- Sizes follow from the weights' shapes, and what `config.json` says of them must agree. It may ask for more than was
  built here (other encoders, other activations): `VARIANTS` has what is known of that, anything else is noticed by its
  weights, and is refused.
- The networks' weights are the same numbers under our names (adapters/clare_release.py). The matrix that makes queries,
  keys and values is cut in two; tables of sines are computed, and compared with those in the file.
- Images are normalised by each camera's own mean and standard deviation, states and actions by their least and greatest
  value, in LeRobot's own steps: not clipped, as in the released code.
- The tokenizer is not in the file. It is `tokenizer.json` in the folder that `language_model_name` names, or in
  $CLBENCH_MODEL_ROOT/LAST PART OF THE NAME; of OpenAI's CLIP it is fetched from the hub where neither is there.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clbench.checkpoints.base import WEIGHTS, file_digest
from clbench.checkpoints.whole import DESCRIPTION, damage, write_whole
from clbench.config.dit import DDIM, FLOW, PAPER, TRANSFORMERS
from clbench.data.hub import asked
from clbench.errors import UserError
from clbench.io import read_json, read_text
from clbench.lock import held
from clbench.paths import bases_root, model_root, named_folder
from clbench.terminal import tell

TYPES = {"ditflow_mt": "dit_dec", "dit_mt": "dit_encdec"}
FORMAT = 1  # of what is made: another number makes it anew
NAMED = "openai/clip-vit-base-patch32"  # where config.json names none: `dit_mt` does not store it
CLIP = re.compile(r"openai/clip-vit-[a-z0-9-]{1,40}")  # whose tokenizer is fetched
TOKENIZER = "tokenizer.json"
HEAD = 64  # width of a head of both encoders
TOLERANCE = 1e-5  # for tables of sines, and for statistics that are stored twice

# Setting → the values that mean what was built.
VARIANTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "ditflow_mt": {"training_noise_sampling": ("uniform",)},
    "dit_mt": {
        "prediction_type": ("epsilon",), "noise_scheduler_type": ("DDIM",), "beta_schedule": ("squaredcos_cap_v2",),
        "use_pretrained_dino": (True,), "set_alpha_to_one": (True,), "steps_offset": (0,),
    },
}  # fmt: skip
FOR_BOTH: dict[str, tuple[Any, ...]] = {
    "activation": ("gelu",), "feedforward_activation": ("gelu",), "crop_shape": (None,), "resize_shape": (None,),
    "use_separate_rgb_encoder_per_camera": (False,), "clip_sample": (True, False),
    "do_mask_loss_for_padding": (True, False),
}  # fmt: skip
# Settings without an effect on what is read: of training, of LeRobot, and of encoders that are not built.
WITHOUT = frozenset((
    "avg_pool", "beta_end", "beta_start", "device", "drop_n_last_frames", "freeze_language_pretrained", "license",
    "pretrained_backbone_weights", "private", "push_to_hub", "repo_id", "scheduler_name", "scheduler_warmup_steps",
    "tags", "tokenizer_max_length", "type", "use_amp", "use_film", "vision_backbone_norm_name",
    "vision_backbone_norm_num_groups", "vision_backbone_size", "vit_name",
))  # fmt: skip
READ = frozenset((
    "n_obs_steps", "n_action_steps", "num_heads", "n_heads", "num_inference_steps", "num_train_timesteps",
    "clip_sample_range", "dropout", "input_features", "output_features", "normalization_mapping", "language_model_name",
))  # fmt: skip
# Our key → theirs, of which a file has at most one; what it must say if it is there is known from the weights.
SIZES = {
    "d_model": ("hidden_dim", "dim_model"), "decoder_layers": ("num_blocks", "n_decoder_layers"),
    "encoder_layers": ("n_encoder_layers",), "ffn": ("dim_feedforward",), "chunk_size": ("horizon",),
    "time_dim": ("frequency_embedding_dim", "time_dim"),
}  # fmt: skip


def is_released(folder: Path) -> bool:
    """Whether a folder's configuration is of such a policy."""
    path = folder / "config.json"
    described = read_json(path) if path.is_file() else None
    return isinstance(described, dict) and isinstance(described.get("type"), str) and described["type"] in TYPES


def in_our_form(path: str) -> str:
    """A `policy.path`, where it names a released policy the folder of what was made of it, which is made if needed.

    Raises:
        UserError: the folder is damaged, or its policy is not one that is built; its tokenizer is nowhere.
    """
    folder = named_folder(path, model_root())
    if not is_released(folder):
        return path
    described = read_json(folder / "config.json")
    weights = file_digest(folder / WEIGHTS)
    tokenizer = _tokenizer(described, folder)
    made_of = [FORMAT, described, weights, hashlib.sha256(tokenizer.encode()).hexdigest()]
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    final = bases_root() / f"{TYPES[described['type']]}-released-{digest[:12]}"
    if not _is_whole(final):
        with held(bases_root(), final.name):
            if not _is_whole(final):
                tell(f"reading the released policy {folder} → {final}")
                _write(described, folder, tokenizer, final)
    return str(final)


def _is_whole(final: Path) -> bool:
    return (final / DESCRIPTION).is_file() and damage(final) is None


def _write(described: dict[str, Any], folder: Path, tokenizer: str, final: Path) -> None:
    from clbench.checkpoints.policy_io import save_policy

    loaded = _built(described, folder, tokenizer)

    def fill(where: Path) -> dict[str, Any]:
        save_policy(loaded, where)
        return {"released": described["type"], "weights": file_digest(folder / WEIGHTS)}

    write_whole(final, fill, lambda: (folder / WEIGHTS).stat().st_size)


# ---- the tokenizer ------------------------------------------------------------------------------
def _tokenizer(described: Mapping[str, Any], folder: Path) -> str:
    """Its JSON."""
    name = described.get("language_model_name", NAMED)
    if not isinstance(name, str) or not name or "\0" in name:
        raise UserError(f"{folder / 'config.json'} names no language model (language_model_name is {name!r:.100}).")
    last = Path(name).name
    if last in ("", "..") or len(last) > 255:
        raise UserError(f"{folder / 'config.json'} names no language model (language_model_name is {name!r:.100}).")
    here = model_root() / last
    for place in (Path(name).expanduser(), here) if len(name) < 1000 else (here,):
        if (place / TOKENIZER).is_file():
            return read_text(place / TOKENIZER)
    why = "there is no such folder, and only OpenAI's CLIP models are asked for on the hub"
    if CLIP.fullmatch(name):
        import huggingface_hub

        cached = huggingface_hub.try_to_load_from_cache(name, TOKENIZER)
        if isinstance(cached, str):
            return read_text(Path(cached))
        try:
            return read_text(asked(name, "main", lambda: huggingface_hub.hf_hub_download(name, TOKENIZER), "tokenizer"))
        except UserError as e:
            why = f"the hub does not give it ({e})"
    raise UserError(
        f"the policy in {folder} reads instructions with the tokenizer of {name}, and {why}. Fetch {TOKENIZER} of "
        f"{name} elsewhere, and put it into {here}."
    )


# ---- the policy ---------------------------------------------------------------------------------
def _built(described: dict[str, Any], folder: Path, tokenizer: str) -> Any:
    import torch
    from lerobot.policies import make_pre_post_processors
    from lerobot.policies.factory import get_policy_class

    from clbench.checkpoints.policy_io import LoadedPolicy
    from clbench.policies.dit.text import TokenizerStep
    from clbench.tensor_files import read_tensors

    state = {name: tensor.float() for name, tensor in read_tensors(folder / WEIGHTS).items()}
    weights = _weights({n: v for n, v in state.items() if ".buffer_" not in n}, folder)
    config = _configuration(described, weights, folder)
    _leave_out_tables(weights, config, folder)
    if not config.check_weights({name: tuple(v.shape) for name, v in weights.items()}):
        raise _foreign(folder, "config.json claims more than the weights are")
    try:
        with torch.random.fork_rng(devices=[]):
            policy: Any = get_policy_class(config.type)(config)  # type: ignore[call-arg]
    except UserError:
        raise
    except Exception as e:
        raise _foreign(folder, " ".join(str(e).split())[:300]) from e
    own = {name: tuple(v.shape) for name, v in policy.state_dict().items()}
    for name, tensor in weights.items():
        if name not in own:
            raise _foreign(folder, f"{name} belongs to nothing that is built (another encoder, say)")
        if own[name] != tuple(tensor.shape):
            raise _foreign(folder, f"{name} has shape {tuple(tensor.shape)}, and config.json means {own[name]}")
    missing = sorted(own.keys() - weights.keys())
    if missing:
        raise _foreign(folder, f"there are no weights for {missing[0]}")
    damaged = next((name for name, tensor in weights.items() if not tensor.isfinite().all()), None)
    if damaged is not None:
        raise _foreign(folder, f"{damaged} has numbers that are not finite")
    policy.load_state_dict(weights)
    pre, post = make_pre_post_processors(config, dataset_stats=_statistics(state, config, folder))
    step = next(s for s in pre.steps if isinstance(s, TokenizerStep))
    try:
        step.load_state_dict({"tokenizer": torch.frombuffer(bytearray(tokenizer.encode()), dtype=torch.uint8)})
    except ValueError as e:
        raise UserError(f"the tokenizer of the policy in {folder}: {e}") from e
    _check_end(step, config, folder)
    return LoadedPolicy(policy, pre, post, "")


def _foreign(folder: Path, why: str) -> UserError:
    return UserError(f"the policy in {folder} is not one of CLARE's released ones that can be read: {why}.")


def _weights(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The networks' weights under our names."""
    from clbench.adapters.clare_release import converted_name

    found: dict[str, Any] = {}
    for name, tensor in state.items():
        ours = converted_name(name)
        if ours.endswith(".position_ids"):
            continue  # 0, 1, 2, …: older versions of transformers stored them
        joint = re.fullmatch(r"(.+\.attention)\.in_proj_(weight|bias)", ours)
        if joint is None:
            found[ours] = (
                tensor.flatten(0, 1) if ours.endswith("velocity_net.position") and tensor.ndim == 3 else tensor
            )
            continue
        if not tensor.ndim or tensor.shape[0] % 3:
            raise _foreign(folder, f"{name} has shape {tuple(tensor.shape)}")
        cut = tensor.shape[0] // 3 * 2
        found[f"{joint[1]}.qk.{joint[2]}"] = tensor[:cut].clone()
        found[f"{joint[1]}.v.{joint[2]}"] = tensor[cut:].clone()
    return found


def _leave_out_tables(weights: dict[str, Any], config: Any, folder: Path) -> None:
    """Take tables of sines out of the weights; UserError where they are not those of the networks that are built."""
    from clbench.policies.dit.paper import frequencies, sinusoids

    period = 1000 if config.type == "dit_dec" else 10_000
    w = weights.pop("model.velocity_net.time_net.w", None)
    if w is not None and not _close(w.flatten(), frequencies(config.time_dim // 2, period)):
        raise _foreign(folder, "its frequencies of time are others (time_net.w)")
    position = weights.pop("model.velocity_net.enc_pos.pe", None)
    if position is not None:
        table = position.reshape(-1, position.shape[-1] if position.ndim else 1)[:512]
        if not _close(table, sinusoids(len(table), config.d_model), 1e-3):  # angles up to 512, in fp32
            raise _foreign(folder, "its table of positions is another (enc_pos.pe)")


def _close(a: Any, b: Any, tolerance: float = TOLERANCE) -> bool:
    return bool(a.shape == b.shape and (a - b).abs().max() <= tolerance)


def _configuration(described: dict[str, Any], weights: Mapping[str, Any], folder: Path) -> Any:
    """Ours, checked against the weights' shapes."""
    from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature

    from clbench.checkpoints.policy_io import policy_config

    kind = described["type"]
    _check_variant(described, kind, folder)
    sizes = _sizes(weights, folder)
    for ours, theirs in SIZES.items():
        for key in theirs:
            said = described.get(key)
            if said is not None and ours in sizes and said != sizes[ours]:
                raise _foreign(folder, f"config.json says {key} {said!r:.50}, and the weights {sizes[ours]}")
    flow = kind == "ditflow_mt"
    levels = _number(described, "num_train_timesteps", 100, folder)
    clips = described.get("clip_sample", True)
    section = {
        "type": TYPES[kind], "layout": PAPER, "objective": FLOW if flow else DDIM, "action_patch": 1,
        "n_obs_steps": _number(described, "n_obs_steps", 2 if flow else 5, folder),
        "n_action_steps": _number(described, "n_action_steps", 8, folder),
        "n_heads": _number(described, ("num_heads", "n_heads"), 16 if flow else 8, folder),
        "num_inference_steps": _number(described, "num_inference_steps", 100 if flow else 10, folder),
        "diffusion_steps": levels,
        "clip_sample": described.get("clip_sample_range", 1.0) if clips else 0.0,
        "dropout": described.get("dropout", 0.1), "state_dropout": 0.0 if flow else 0.2,
        "mask_padding": bool(described.get("do_mask_loss_for_padding", False)),
        **{k: sizes[k] for k in ("chunk_size", "d_model", "decoder_layers", "ffn_mult", "time_dim")},
        **({} if flow else {"encoder_layers": sizes["encoder_layers"]}),
        "image_encoder_output": "pooled", "text_encoder": TRANSFORMERS, "text_encoder_output": "pooled",
        "text_encoder_config": _clip(weights, folder), "std_floor": 0.0, "raw_below": 0.0,
    }  # fmt: skip
    section["text_max_words"] = section["text_encoder_config"]["max_position_embeddings"]
    image = _dinov2(weights, folder)
    if image is not None:  # it gets what the preprocessor made of the colours
        section |= {"image_encoder": TRANSFORMERS, "image_encoder_config": image, "image_encoder_mean": [0.0] * 3,
                    "image_encoder_std": [1.0] * 3}  # fmt: skip
    try:
        features = {
            side: {
                key: PolicyFeature(FeatureType(f["type"]), tuple(int(n) for n in f["shape"]))
                for key, f in described[f"{side}_features"].items()
            }
            for side in ("input", "output")
        }
        kinds = ("VISUAL", "STATE", "ENV", "ACTION")
        for found in (f for side in features.values() for f in side.values()):
            if found.type.value not in kinds or len(found.shape) != (3 if found.type.value == "VISUAL" else 1):
                raise ValueError(f"a feature of type {found.type.value} has shape {found.shape}")
        modes = {**dict.fromkeys(kinds, "IDENTITY"), **described["normalization_mapping"]}
        if not set(modes) <= set(kinds):
            raise ValueError(f"normalization_mapping has {sorted(set(modes) - set(kinds))[0]!r:.50}")
        known_modes = set(modes.values()) <= {"IDENTITY", "MEAN_STD", "MIN_MAX"}
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise _foreign(folder, f"config.json describes no features ({type(e).__name__} {e})") from e
    if not known_modes:
        raise _foreign(folder, f"normalization_mapping is {modes}")
    try:
        config: Any = policy_config(section, "cpu")
    except UserError as e:
        raise _foreign(folder, str(e)) from e
    config.input_features, config.output_features = features["input"], features["output"]
    config.normalization_mapping = {kind: NormalizationMode(mode) for kind, mode in modes.items()}
    return config


def _check_variant(described: Mapping[str, Any], kind: str, folder: Path) -> None:
    wrong = [
        f"{key} is {described[key]!r:.50}"
        for key, fits in {**VARIANTS[kind], **FOR_BOTH}.items()
        if key in described and described[key] not in fits
    ]
    if wrong:
        raise _foreign(folder, f"{', '.join(wrong)} in config.json, which is not built")
    sizes = {key for keys in SIZES.values() for key in keys}
    known = {*VARIANTS[kind], *FOR_BOTH, *WITHOUT, *READ, *sizes}
    unknown = sorted(k for k in described if k not in known and not k.startswith("optimizer_"))
    if unknown:
        tell(f"note: {folder / 'config.json'} has settings that are not known here, and have no effect: "
             f"{', '.join(unknown)[:500]}.")  # fmt: skip


def _number(described: Mapping[str, Any], key: str | tuple[str, ...], default: int, folder: Path) -> int:
    keys = (key,) if isinstance(key, str) else key
    found = next((described[k] for k in keys if described.get(k) is not None), default)
    if not isinstance(found, int) or isinstance(found, bool) or not 1 <= found <= 65_536:
        raise _foreign(folder, f"config.json says {keys[0]} {found!r:.50}")
    return found


def _shape(weights: Mapping[str, Any], name: str, ndim: int, folder: Path) -> tuple[int, ...]:
    if name not in weights or weights[name].ndim != ndim:
        raise _foreign(folder, f"there are no weights for {name}")
    return tuple(weights[name].shape)


def _count(weights: Mapping[str, Any], prefix: str) -> int:
    """How many numbered modules follow a prefix."""
    found = {re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in weights}
    return len({match[1] for match in found if match is not None})


def _sizes(weights: Mapping[str, Any], folder: Path) -> dict[str, int]:
    net = "model.velocity_net"
    length, d = _shape(weights, f"{net}.position", 2, folder)
    hidden, _ = _shape(weights, f"{net}.blocks.0.ffn.linear1.weight", 2, folder)
    time_dim = _shape(weights, f"{net}.time.mlp.0.weight", 2, folder)[1]
    if not d or hidden % d:
        raise _foreign(folder, f"a feed-forward block is {hidden} wide, which is no multiple of {d}")
    return {
        "d_model": d, "chunk_size": length, "ffn": hidden, "ffn_mult": hidden // d, "time_dim": time_dim,
        "decoder_layers": _count(weights, f"{net}.blocks"),
        "encoder_layers": _count(weights, "model.obs_encoder.layers"),
    }  # fmt: skip


def _clip(weights: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """transformers' configuration of the text model. The vocabulary's last token ends a text, and is what is pooled."""
    prefix = "model.obs_encoder.encoders.text.model.text_model"
    size, width = _shape(weights, f"{prefix}.embeddings.token_embedding.weight", 2, folder)
    length, _ = _shape(weights, f"{prefix}.embeddings.position_embedding.weight", 2, folder)
    hidden, _ = _shape(weights, f"{prefix}.encoder.layers.0.mlp.fc1.weight", 2, folder)
    return {
        "model_type": "clip_text_model", "vocab_size": size, "hidden_size": width, "intermediate_size": hidden,
        "num_hidden_layers": _count(weights, f"{prefix}.encoder.layers"), "num_attention_heads": _heads(width, folder),
        "max_position_embeddings": length, "bos_token_id": size - 2, "eos_token_id": size - 1,
    }  # fmt: skip


def _dinov2(weights: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """transformers' configuration of the image model; None: there is none."""
    prefix = "model.obs_encoder.encoders.image.model"
    if not any(name.startswith(f"{prefix}.") for name in weights):
        return None
    width, channels, patch, _ = _shape(weights, f"{prefix}.embeddings.patch_embeddings.projection.weight", 4, folder)
    places = _shape(weights, f"{prefix}.embeddings.position_embeddings", 3, folder)[1] - 1
    hidden, _ = _shape(weights, f"{prefix}.encoder.layer.0.mlp.fc1.weight", 2, folder)
    side = math.isqrt(places)
    if side * side != places or not width or hidden % width:
        raise _foreign(folder, f"its image model has {places} positions and a feed-forward block of {hidden}")
    return {
        "model_type": "dinov2", "hidden_size": width, "num_hidden_layers": _count(weights, f"{prefix}.encoder.layer"),
        "num_attention_heads": _heads(width, folder), "mlp_ratio": hidden // width, "num_channels": channels,
        "patch_size": patch, "image_size": side * patch,
    }  # fmt: skip


def _heads(width: int, folder: Path) -> int:
    if not width or width % HEAD:
        raise _foreign(folder, f"an encoder is {width} wide, which is no multiple of {HEAD}")
    return width // HEAD


def _statistics(state: Mapping[str, Any], config: Any, folder: Path) -> dict[str, dict[str, Any]]:
    """What the processors normalise by, from the buffers among the weights."""
    found: dict[str, dict[str, Any]] = {}
    sides = (("normalize_inputs", config.input_features), ("unnormalize_outputs", config.output_features))
    needs = {"MEAN_STD": ("mean", "std"), "MIN_MAX": ("min", "max"), "IDENTITY": ()}
    for side, features in sides:
        for key, feature in features.items():
            mode = config.normalization_mapping[feature.type.value]
            for name in needs[mode.value]:
                buffer = f"buffer_{key.replace('.', '_')}.{name}"
                value = state.get(f"{side}.{buffer}")
                shape = (feature.shape[0], 1, 1) if feature.type.value == "VISUAL" else tuple(feature.shape)
                if value is None or tuple(value.shape) != shape or not value.isfinite().all():
                    raise _foreign(folder, f"{side}.{buffer} has no statistics of shape {shape}")
                twin = state.get(f"normalize_targets.{buffer}")
                if side == "unnormalize_outputs" and twin is not None and not _close(twin, value):
                    raise _foreign(folder, f"normalize_targets.{buffer} is not what unnormalize_outputs has")
                found.setdefault(key, {})[name] = value
    return found


def _check_end(step: Any, config: Any, folder: Path) -> None:
    """Raise UserError unless the tokenizer ends a text with the token whose features the model gives as the text's."""
    encoded = step._parsed.encode("a")
    last = [i for i, there in zip(encoded.ids, encoded.attention_mask, strict=True) if there][-1:]
    end = config.text_encoder_config["eos_token_id"]
    if last != [end]:
        raise UserError(
            f"the tokenizer of the policy in {folder} ends a text with token {last}, and the text model pools "
            f"{end}: it is another model's."
        )
