"""Keys of clbench's own policies (dit_dec, dit_encdec). No torch: wrong values are reported before it is imported."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from clbench.config.reading import fit
from clbench.config.schema import BASE_KEYS
from clbench.errors import UserError, nearest
from clbench.paths import model_root, named_folder

TYPES = ("dit_dec", "dit_encdec")

# DitConfig's other keys: those that every LeRobot policy has, and those that LeRobot's own tools read.
OF_LEROBOT = (
    "input_features", "output_features", "device", "use_amp", "use_peft", "push_to_hub", "repo_id", "private", "tags",
    "license", "pretrained_path", "pretrained_revision", "normalization_mapping", "optimizer_lr",
    "optimizer_weight_decay", "scheduler_warmup_steps", "scheduler_decay_steps",
)  # fmt: skip

POSITIVE = (
    "n_obs_steps", "chunk_size", "n_action_steps", "action_patch", "d_model", "n_heads", "encoder_layers",
    "decoder_layers", "ffn_mult", "num_inference_steps", "text_vocab_size", "text_dim", "text_max_words",
    "image_tokens_side", "image_layers", "diffusion_steps", "time_dim",
)  # fmt: skip

IMAGE, TEXT = "image", "text"  # what an encoder encodes; the beginning of its keys
TRANSFORMERS = "transformers"
LITE, MINILM = "efficientnet_lite0", "minilm"  # pretrained, of the extra `encoders` (policies/dit/packaged.py)
OWN = {IMAGE: "conv", TEXT: "words"}  # learned from scratch
ENCODERS = {IMAGE: (OWN[IMAGE], TRANSFORMERS, LITE), TEXT: (OWN[TEXT], TRANSFORMERS, MINILM)}
# What `…_encoder_config` of those is.
PACKAGED: dict[str, dict[str, Any]] = {
    LITE: {"model_type": LITE},
    MINILM: {
        "model_type": "bert", "vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6,
        "num_attention_heads": 12, "intermediate_size": 1536, "max_position_embeddings": 512, "pad_token_id": 0,
    },
}  # fmt: skip
OUTPUTS = {IMAGE: ("grid", "pooled"), TEXT: ("mean", "pooled", "tokens")}
# Types of transformers' models that are built: their construction reads and fetches nothing (tests/test_encoders.py).
# Detectors, whose backbones are fetched, and models that draw random numbers in evaluation are not among them.
MODEL_TYPES = {
    IMAGE: (
        "aimv2_vision_model", "beit", "bit", "clip_vision_model", "convnext", "convnextv2", "data2vec-vision", "deit",
        "dinov2", "dinov2_with_registers", "dinov3_convnext", "dinov3_vit", "efficientnet", "focalnet", "hiera",
        "ijepa", "levit", "mobilenet_v1", "mobilenet_v2", "mobilevit", "mobilevitv2", "poolformer", "pvt", "pvt_v2",
        "regnet", "resnet", "segformer", "siglip_vision_model", "swiftformer", "swin", "swinv2", "vit", "vit_msn",
    ),
    TEXT: (
        "albert", "bert", "clip_text_model", "deberta", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet",
        "mt5", "roberta", "t5", "umt5", "xlm-roberta",
    ),
}  # fmt: skip
# Settings of a transformers configuration that name code, kernels or other models.
FOREIGN = re.compile(r"_.*|attn_implementation|auto_map|backbone.*|experts_implementation|.*kernel.*config|peft_.*|"
                     r"quantization_config|use_.*backbone|custom_.*")  # fmt: skip
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # mean and std of colours, in [0, 1]

FLOW, DDIM = "flow", "ddim"
CLBENCH, PAPER = "clbench", "paper"
TIME_DIM = 256
PAPERS_OBJECTIVE = {"dit_dec": FLOW, "dit_encdec": DDIM}
MEAN_STD = "mean_std"
RANGES = {"quantiles": ("q01", "q99"), "min_max": ("min", "max")}  # normalisation to [−1, 1] → what becomes ±1


@dataclass
class DitSettings:
    """Sizes and options of a flow-matching diffusion transformer (presets live in configs/models/).

    Attributes:
        layout: clbench | paper, the networks: small ones of ours, or those of CLARE's released code at any size
            (policies/dit/paper.py). The latter takes each image and the instruction as one vector of an encoder
            (`image_encoder`, `text_encoder`), has no action patches, and its objective is flow in dit_dec and ddim in
            dit_encdec. Its chunk starts `n_obs_steps` − 1 steps ago.
        n_obs_steps: observations that are seen, the present one and those of the steps before it; at an episode's start
            the first one stands for what is not there.
        chunk_size: predicted actions per call, in environment steps.
        n_action_steps: actions executed before the policy is asked again; at most a chunk's from the present step on.
        action_patch: consecutive actions that share one decoder token; divides `chunk_size`.
        d_model: token width; a multiple of `n_heads`.
        encoder_layers, decoder_layers: transformer blocks. (dit_dec of layout paper has no encoder.)
        ffn_mult: hidden width of a feed-forward block, in multiples of `d_model`.
        num_inference_steps: Euler steps from noise (t = 0) to action (t = 1), or DDIM's; a divisor of diffusion_steps.
        objective: flow | ddim, what the network predicts of a noisy action chunk: the velocity to the action (flow
            matching), or the noise (denoising diffusion, acting by DDIM); policies/dit/flow_policy.py.
        diffusion_steps: levels of noise in training, of ddim.
        clip_sample: in acting, actions (under ddim the predicted ones) are clipped to ± this in every step; 0 = not.
            For actions that normalization brings into [−1, 1].
        dropout: of layout paper: share of activations that training drops in transformer blocks.
        state_dropout: of layout paper, dit_encdec: share of the state's entries that training drops.
        time_dim: of layout paper: numbers that encode the time before the network reads it; even.
        mask_padding: steps of a chunk outside of the episode do not count in the loss; false: they count as others.
        text_vocab_size, text_dim: hashed-word language input (see text.py).
        text_max_words: words, or tokens of `text_encoder`, that are read of an instruction.
        image_tokens_side: each camera becomes `image_tokens_side`² tokens (with `image_encoder_output: pooled`, one).
        image_layers: convolutions of each camera's encoder; the first three halve the image.
        image_encoder: conv (a small convolution net per camera, trained from scratch) | transformers (one image model
            for all cameras, policies/dit/encoders.py) | efficientnet_lite0 (the same, pretrained: packaged.py).
        image_encoder_path: the model to start from: a local folder as `save_pretrained` writes it, or OWNER/NAME on a
            hub; null = random weights. Checkpoints hold the weights themselves and name no path.
        image_encoder_config: transformers' configuration of it, with `model_type`; read from the path where null.
        image_encoder_trained: train it too; otherwise it is frozen, and linear layers after it are trained.
        image_encoder_output: grid (patch features, averaged over `image_tokens_side`² squares) | pooled (one vector).
        image_encoder_size: pixels to which images are resized for it; null = as they come.
        image_encoder_mean, image_encoder_std: of colours in [0, 1], which it expects removed; null = as stored beside
            the model, else ImageNet's.
        text_encoder: words (hashed) | transformers | minilm (pretrained).
        text_encoder_path, text_encoder_config, text_encoder_trained: likewise. Without a path the tokens are bytes.
        text_encoder_output: mean (over tokens) | pooled (the model's own vector) | tokens (dit_encdec).
        normalization: mean_std | quantiles | min_max. The last two map q01 to q99, or all of the data's range, to
            [−1, 1] and clip (policies/normalization.py); `std_floor` and `raw_below` are of the first.
        state_clip: normalised state is clipped to ± this, in standard deviations.
        std_floor: smallest standard deviation used for normalising.
        raw_below: dimensions whose standard deviation is below this pass through un-normalised.
        gradient_checkpointing: transformer blocks keep no activations and recompute them in the backward pass.
    """

    layout: str = CLBENCH
    n_obs_steps: int = 1
    chunk_size: int = 8
    n_action_steps: int = 4
    action_patch: int = 2

    d_model: int = 128
    n_heads: int = 4
    encoder_layers: int = 2
    decoder_layers: int = 3
    ffn_mult: int = 2
    num_inference_steps: int = 8
    objective: str = FLOW
    diffusion_steps: int = 100
    clip_sample: float = 0.0
    dropout: float = 0.0
    state_dropout: float = 0.0
    time_dim: int = TIME_DIM
    mask_padding: bool = True

    text_vocab_size: int = 4096
    text_dim: int = 64
    text_max_words: int = 12
    image_tokens_side: int = 4
    image_layers: int = 3

    image_encoder: str = "conv"
    image_encoder_path: str | None = None
    image_encoder_config: dict[str, Any] | None = None
    image_encoder_trained: bool = False
    image_encoder_output: str = "grid"
    image_encoder_size: int | None = None
    image_encoder_mean: list[float] | None = None
    image_encoder_std: list[float] | None = None
    text_encoder: str = "words"
    text_encoder_path: str | None = None
    text_encoder_config: dict[str, Any] | None = None
    text_encoder_trained: bool = False
    text_encoder_output: str = "mean"

    normalization: str = MEAN_STD
    state_clip: float = 5.0
    std_floor: float = 0.05
    raw_below: float = 1e-3
    gradient_checkpointing: bool = False

    def check(self, kind: str) -> None:
        """Raise ValueError for values that are invalid or do not fit together, in a policy of type `kind`."""
        for name in POSITIVE:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer but is {value!r}.")
        for name in ("state_clip", "std_floor", "raw_below", "clip_sample"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
                raise ValueError(f"{name} must be a non-negative number but is {value!r}.")
        if self.normalization not in (MEAN_STD, *RANGES):
            known = ", ".join((MEAN_STD, *RANGES))
            raise ValueError(f"normalization must be one of {known} but is {self.normalization!r}.")
        if self.objective not in (FLOW, DDIM):
            raise ValueError(f"objective must be one of {FLOW}, {DDIM} but is {self.objective!r}.")
        if self.objective == DDIM and self.diffusion_steps % self.num_inference_steps:
            raise ValueError(
                f"num_inference_steps ({self.num_inference_steps}) must divide diffusion_steps "
                f"({self.diffusion_steps}) under objective: ddim."
            )
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model ({self.d_model}) must be a multiple of n_heads ({self.n_heads}).")
        if self.n_action_steps > self.chunk_size:
            raise ValueError(
                f"n_action_steps ({self.n_action_steps}) must be between 1 and chunk_size ({self.chunk_size})."
            )
        if self.chunk_size % self.action_patch:
            raise ValueError(f"action_patch ({self.action_patch}) must divide chunk_size ({self.chunk_size}).")
        for what in (IMAGE, TEXT):
            self._check_encoder(what)
        self._check_layout(kind)
        size = self.image_encoder_size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= 4096):
            raise ValueError(f"image_encoder_size must be null or a number of pixels up to 4096 but is {size!r}.")
        for name, least in (("mean", None), ("std", 0)):
            found = getattr(self, f"image_encoder_{name}")
            if found is not None and not _three_numbers(found, least):
                above = "" if least is None else " above 0"
                raise ValueError(
                    f"image_encoder_{name} must be null or a list of three numbers{above} but is {found!r}."
                )

    def _check_layout(self, kind: str) -> None:
        if self.layout not in (CLBENCH, PAPER):
            raise ValueError(f"layout must be one of {CLBENCH}, {PAPER} but is {self.layout!r}.")
        for name in ("dropout", "state_dropout"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1) but is {value!r}.")
        if self.layout == CLBENCH:
            unused = {"dropout": 0, "state_dropout": 0, "time_dim": TIME_DIM}
            for name in (n for n, value in unused.items() if getattr(self, n) != value):
                raise ValueError(f"{name} is of layout: {PAPER}, but layout is {CLBENCH}.")
            return
        wrong = [
            f"{name}: {' or '.join(map(str, fits))} (it is {getattr(self, name)})"
            for name, fits in (
                ("action_patch", (1,)),
                ("objective", (PAPERS_OBJECTIVE.get(kind, self.objective),)),
                ("text_encoder", ENCODERS[TEXT][1:]),
                ("text_encoder_output", ("pooled", "mean")),
                ("image_encoder_output", ("pooled",) if self.image_tokens_side > 1 else OUTPUTS[IMAGE]),
            )
            if getattr(self, name) not in fits
        ]
        if self.time_dim % 2:
            wrong.append(f"an even time_dim (it is {self.time_dim})")
        if kind == "dit_dec" and self.state_dropout:
            wrong.append(f"state_dropout: 0 in dit_dec (it is {self.state_dropout})")
        left = self.chunk_size - self.n_obs_steps + 1
        if left < 1:
            raise ValueError(f"n_obs_steps ({self.n_obs_steps}) must be at most chunk_size ({self.chunk_size}).")
        if self.n_action_steps > left:
            wrong.append(
                f"n_action_steps of at most {left}, as its chunk starts {self.n_obs_steps - 1} steps ago (it is "
                f"{self.n_action_steps})"
            )
        if wrong:
            raise ValueError(f"layout: {PAPER} of {kind} needs {'; '.join(wrong)}.")

    def _check_encoder(self, kind: str) -> None:
        key = f"{kind}_encoder"
        name, path, described = (getattr(self, key + end) for end in ("", "_path", "_config"))
        if name not in ENCODERS[kind]:
            raise ValueError(f"{key} must be one of {', '.join(ENCODERS[kind])} but is {name!r}.")
        output = getattr(self, f"{key}_output")
        if output not in OUTPUTS[kind]:
            raise ValueError(f"{key}_output must be one of {', '.join(OUTPUTS[kind])} but is {output!r}.")
        if name in PACKAGED:
            if path is not None or described not in (None, PACKAGED[name]):
                wrong = "_config" if path is None else "_path"
                raise ValueError(f"{key}{wrong} is of {key}: transformers; {name} has its own.")
            return
        if name != TRANSFORMERS:
            given = [f"{key}{end}" for end, v in (("_path", path), ("_config", described)) if v is not None]
            if given or getattr(self, f"{key}_trained"):
                raise ValueError(f"{(given or [f'{key}_trained'])[0]} is of {key}: transformers, but it is {name}.")
            return
        if path is None and described is None:
            raise ValueError(
                f"{key}: transformers needs {key}_path (a local folder, or OWNER/NAME on a hub) or {key}_config "
                "(random weights)."
            )
        if described is not None:
            check_model(kind, described)


def _three_numbers(value: Any, least: float | None) -> bool:
    numbers = isinstance(value, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
    return numbers and len(value) == 3 and (least is None or all(v > least for v in value))


def check_model(kind: str, described: Any) -> None:
    """Raise ValueError unless a transformers configuration is of a model that is built, and names nothing else."""
    key = f"{kind}_encoder_config"
    name = described.get("model_type") if isinstance(described, dict) else None
    if not isinstance(name, str):
        raise ValueError(f"{key} must be a mapping with model_type but is {described!r:.200}.")
    if name not in MODEL_TYPES[kind]:
        raise ValueError(
            f"{key}: {name!r:.100} is no {kind} model that is built.{nearest(name, MODEL_TYPES[kind])} Those are "
            f"{', '.join(MODEL_TYPES[kind])}."
        )
    for where in _mappings(described):
        for found in where:
            if FOREIGN.fullmatch(str(found)):
                raise ValueError(f"{key} has {found!r:.100}, which names code or other models: remove it.")


def _mappings(value: Any) -> Iterator[dict[Any, Any]]:
    if isinstance(value, dict):
        yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _mappings(child)


def model_folder(path: str) -> Path | None:
    """The local folder that a `…_encoder_path` names; None: it is a name on a hub.

    Raises:
        UserError: it is neither, or the folder has no configuration or no safetensors file.
    """
    folder = named_folder(path, model_root())
    if not folder.is_dir():
        if REPO_ID.fullmatch(path) and not path.startswith("."):
            return None
        raise UserError(f"{path} is neither a folder here (nor in {model_root()}) nor OWNER/NAME on a hub.")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: it is not a folder that transformers' save_pretrained wrote.")
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} has no .safetensors file, and files of other kinds, which may run code, are not read."
        )
    return folder


def check_policy(section: dict[str, Any]) -> None:
    """Raise UserError for unknown keys and wrong values in the `policy` section of a fresh policy of ours."""
    kind = section.get("type")
    if kind not in TYPES or section.get("path"):
        return
    hints = get_type_hints(DitSettings)
    known = [*(f.name for f in fields(DitSettings)), *OF_LEROBOT]
    values = {}
    for key, value in section.items():
        if key in ("type", "dtype", *BASE_KEYS):
            continue
        if key not in known:
            raise UserError(f"unknown key 'policy.{key}' for {kind}.{nearest(key, known)}")
        if key in hints:
            values[key] = fit(value, hints[key], f"policy.{key}")
    try:
        settings = DitSettings(**values)
        settings.check(kind)
        for what in (IMAGE, TEXT):
            path = getattr(settings, f"{what}_encoder_path")
            if path is not None:
                model_folder(path)
    except UserError as e:
        raise UserError(f"the policy section is not valid: {e}") from e
    except ValueError as e:
        raise UserError(f"the policy section is not valid: {e}") from e
