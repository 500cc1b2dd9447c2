"""Keys of clbench's own policies (dit_dec, dit_encdec). No torch: wrong values are reported before it is imported."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from clbench.config.reading import fit
from clbench.config.schema import BASE_KEYS
from clbench.errors import UserError, nearest

TYPES = ("dit_dec", "dit_encdec")

# DitConfig's other keys: those that every LeRobot policy has, and those that LeRobot's own tools read.
OF_LEROBOT = (
    "input_features", "output_features", "device", "use_amp", "use_peft", "push_to_hub", "repo_id", "private", "tags",
    "license", "pretrained_path", "pretrained_revision", "normalization_mapping", "optimizer_lr",
    "optimizer_weight_decay", "scheduler_warmup_steps", "scheduler_decay_steps",
)  # fmt: skip

POSITIVE = (
    "chunk_size", "n_action_steps", "action_patch", "d_model", "n_heads", "encoder_layers", "decoder_layers",
    "ffn_mult", "num_inference_steps", "text_vocab_size", "text_dim", "text_max_words", "image_tokens_side",
    "image_layers",
)  # fmt: skip

MEAN_STD = "mean_std"
RANGES = {"quantiles": ("q01", "q99"), "min_max": ("min", "max")}  # normalisation to [−1, 1] → what becomes ±1


@dataclass
class DitSettings:
    """Sizes and options of a flow-matching diffusion transformer (presets live in configs/models/).

    Attributes:
        chunk_size: predicted actions per call, in environment steps.
        n_action_steps: actions executed before the policy is asked again; at most `chunk_size`.
        action_patch: consecutive actions that share one decoder token; divides `chunk_size`.
        d_model: token width; a multiple of `n_heads`.
        encoder_layers, decoder_layers: transformer blocks.
        ffn_mult: hidden width of a feed-forward block, in multiples of `d_model`.
        num_inference_steps: Euler steps from noise (t = 0) to action (t = 1).
        text_vocab_size, text_dim, text_max_words: hashed-word language input (see text.py).
        image_tokens_side: each camera becomes `image_tokens_side`² tokens.
        image_layers: convolutions of each camera's encoder; the first three halve the image.
        normalization: mean_std | quantiles | min_max. The last two map q01 to q99, or all of the data's range, to
            [−1, 1] and clip (policies/normalization.py); `std_floor` and `raw_below` are of the first.
        state_clip: normalised state is clipped to ± this, in standard deviations.
        std_floor: smallest standard deviation used for normalising.
        raw_below: dimensions whose standard deviation is below this pass through un-normalised.
        gradient_checkpointing: transformer blocks keep no activations and recompute them in the backward pass.
    """

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

    text_vocab_size: int = 4096
    text_dim: int = 64
    text_max_words: int = 12
    image_tokens_side: int = 4
    image_layers: int = 3

    normalization: str = MEAN_STD
    state_clip: float = 5.0
    std_floor: float = 0.05
    raw_below: float = 1e-3
    gradient_checkpointing: bool = False

    def check(self) -> None:
        """Raise ValueError for values that are invalid or do not fit together."""
        for name in POSITIVE:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer but is {value!r}.")
        for name in ("state_clip", "std_floor", "raw_below"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
                raise ValueError(f"{name} must be a non-negative number but is {value!r}.")
        if self.normalization not in (MEAN_STD, *RANGES):
            known = ", ".join((MEAN_STD, *RANGES))
            raise ValueError(f"normalization must be one of {known} but is {self.normalization!r}.")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model ({self.d_model}) must be a multiple of n_heads ({self.n_heads}).")
        if self.n_action_steps > self.chunk_size:
            raise ValueError(
                f"n_action_steps ({self.n_action_steps}) must be between 1 and chunk_size ({self.chunk_size})."
            )
        if self.chunk_size % self.action_patch:
            raise ValueError(f"action_patch ({self.action_patch}) must divide chunk_size ({self.chunk_size}).")
        if self.n_obs_steps != 1:
            raise ValueError("the DiT policies take one observation step (n_obs_steps: 1).")


def check_policy(section: dict[str, Any]) -> None:
    """Raise UserError for unknown keys and wrong values in the `policy` section of a fresh policy of ours."""
    kind = section.get("type")
    if kind not in TYPES or section.get("path"):
        return
    hints = get_type_hints(DitSettings)
    known = [*(f.name for f in fields(DitSettings)), *OF_LEROBOT]
    values = {}
    for key, value in section.items():
        if key in ("type", *BASE_KEYS):
            continue
        if key not in known:
            raise UserError(f"unknown key 'policy.{key}' for {kind}.{nearest(key, known)}")
        if key in hints:
            values[key] = fit(value, hints[key], f"policy.{key}")
    try:
        DitSettings(**values).check()
    except ValueError as e:
        raise UserError(f"the policy section is not valid: {e}") from e
