"""Configuration shared by the diffusion-transformer policies."""

from __future__ import annotations

from dataclasses import dataclass, field

from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.optim import AdamWConfig, CosineDecayWithWarmupSchedulerConfig

POSITIVE = (
    "chunk_size", "n_action_steps", "action_patch", "d_model", "n_heads", "encoder_layers", "decoder_layers",
    "ffn_mult", "num_inference_steps", "text_vocab_size", "text_dim", "text_max_words", "image_tokens_side",
)  # fmt: skip


@dataclass
class DitConfig(PreTrainedConfig):
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
        state_clip: normalised state is clipped to ± this, in standard deviations.
        std_floor: smallest standard deviation used for normalising.
        raw_below: dimensions whose standard deviation is below this pass through un-normalised.
        gradient_checkpointing: transformer blocks keep no activations and compute them again in the backward pass.
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

    state_clip: float = 5.0
    std_floor: float = 0.05
    raw_below: float = 1e-3
    gradient_checkpointing: bool = False

    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode.MEAN_STD,
            "ENV": NormalizationMode.MEAN_STD,
            "ACTION": NormalizationMode.MEAN_STD,
        }
    )

    optimizer_lr: float = 1e-3
    optimizer_weight_decay: float = 1e-4
    scheduler_warmup_steps: int = 100
    scheduler_decay_steps: int = 2500
    push_to_hub: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in POSITIVE:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, is {value!r}.")
        for name in ("state_clip", "std_floor", "raw_below"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
                raise ValueError(f"{name} must be a number that is not negative, is {value!r}.")
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

    def validate_features(self) -> None:
        """Raise ValueError unless there is an action and something to observe."""
        if self.action_feature is None:
            raise ValueError("the policy needs an `action` output feature.")
        if not (self.robot_state_feature or self.env_state_feature or self.image_features):
            raise ValueError("the policy needs a state or an image input feature.")

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> AdamWConfig:
        return AdamWConfig(lr=self.optimizer_lr, weight_decay=self.optimizer_weight_decay, grad_clip_norm=1.0)

    def get_scheduler_preset(self) -> CosineDecayWithWarmupSchedulerConfig:
        return CosineDecayWithWarmupSchedulerConfig(
            num_warmup_steps=self.scheduler_warmup_steps,
            num_decay_steps=self.scheduler_decay_steps,
            peak_lr=self.optimizer_lr,
            decay_lr=0.0,
        )
