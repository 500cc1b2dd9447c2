"""Configuration shared by the diffusion-transformer policies."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.optim import AdamWConfig, CosineDecayWithWarmupSchedulerConfig

from clbench.config.dit import IMAGE, MEAN_STD, OWN, PAPER, TEXT, DitSettings
from clbench.policies.dit import encoders


@dataclass
class DitConfig(DitSettings, PreTrainedConfig):
    """`DitSettings` as a LeRobot policy configuration, with what LeRobot's own classes describe."""

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
        self.check(self.type)
        if self.normalization != MEAN_STD:  # LeRobot's own step is left with the images
            for kind in ("STATE", "ENV", "ACTION"):
                mode = self.normalization_mapping.get(kind)
                if mode not in (None, NormalizationMode.MEAN_STD, NormalizationMode.IDENTITY):
                    raise ValueError(
                        f"normalization_mapping has {NormalizationMode(mode).value} for {kind}, and normalization is "
                        f"{self.normalization}: choose one of the two keys."
                    )
                self.normalization_mapping[kind] = NormalizationMode.IDENTITY

    def check_weights(self, shapes: dict[str, tuple[int, ...]]) -> bool:
        """Whether weights of these shapes fit these sizes: checked before memory is allocated for them."""
        widest = max((n for shape in shapes.values() for n in shape), default=0)
        fits = self.d_model * self.ffn_mult <= widest and self.text_vocab_size * self.text_dim <= 2**26
        fits &= self.encoder_layers + self.decoder_layers <= len(shapes) and self.image_tokens_side <= 256
        if self.layout == PAPER:
            fits &= max(self.time_dim, self.condition_dim if self.type == "dit_dec" else 0) <= widest
        fits &= encoders.fits(self, shapes, "model.obs_encoder.encoders.")
        counted = (
            self.chunk_size, self.text_max_words, self.num_inference_steps, self.diffusion_steps, self.n_obs_steps,
        )  # fmt: skip
        return fits and max(counted) <= 65_536

    @property
    def condition_dim(self) -> int:
        """Width of what conditions layout paper's dit_dec: the instruction, and of each step states and cameras."""
        states = [f.shape[0] for f in (self.robot_state_feature, self.env_state_feature) if f is not None]
        return self.d_model + self.n_obs_steps * (sum(states) + len(self.image_features) * self.d_model)

    def _save_pretrained(self, save_directory: Path) -> None:
        """As LeRobot's, without the paths of encoders: their weights are in the checkpoint."""
        paths = {f"{kind}_encoder_path": getattr(self, f"{kind}_encoder_path") for kind in (IMAGE, TEXT)}
        try:
            for key in paths:
                setattr(self, key, None)
            super()._save_pretrained(save_directory)
        finally:
            for key, path in paths.items():
                setattr(self, key, path)

    def validate_features(self) -> None:
        """Raise ValueError unless there is an action and something to observe."""
        if self.action_feature is None:
            raise ValueError("the policy needs an `action` output feature.")
        if not (self.robot_state_feature or self.env_state_feature or self.image_features):
            raise ValueError("the policy needs a state or an image input feature.")
        if self.image_encoder != OWN[IMAGE] and not self.image_features:
            raise ValueError(f"image_encoder is {self.image_encoder}, but there are no camera images.")
        if self.layout == PAPER and self.image_features and self.image_encoder == OWN[IMAGE]:
            raise ValueError(
                f"layout: {PAPER} takes images as vectors of an encoder: image_encoder cannot be {OWN[IMAGE]}."
            )

    @property
    def observation_delta_indices(self) -> list[int] | None:
        return None if self.n_obs_steps == 1 else list(range(1 - self.n_obs_steps, 1))

    @property
    def chunk_start(self) -> int:
        """The step of a chunk's first action, from the present one."""
        return 1 - self.n_obs_steps if self.layout == PAPER else 0

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.chunk_start, self.chunk_start + self.chunk_size))

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
