"""DiT-EncDec of layout `paper`: tokens → post-norm encoder; its mean conditions blocks over action tokens.

    tokens     instruction, images (T · C), states (T), the environment's states (T)
    blocks     c = mean over the encoded tokens + τ(k)
    output     c = the last encoded token + τ(k)

There is no cross-attention. The released code averages the last token over the batch, too, so that a sample's
prediction depends on its companions; here it is the sample's own, which is the same at batch size 1.
"""

from __future__ import annotations

import torch
from lerobot.utils.constants import OBS_ENV_STATE, OBS_STATE
from torch import Tensor, nn

from clbench.policies.dit.configuration import DitConfig
from clbench.policies.dit.flow_policy import FlowMatchingModel
from clbench.policies.dit.layers import run_block
from clbench.policies.dit.paper import ActionNet, EncoderLayer, PaperInputs, sinusoids


class PaperEncoder(PaperInputs):
    """Tokens (B, L, D), encoded."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__(config)
        d = config.d_model
        self.drop = nn.Dropout(config.state_dropout)
        if OBS_STATE in self.states:
            self.state_proj = nn.Linear(self.states[OBS_STATE], d)
        if OBS_ENV_STATE in self.states:
            self.env_state_proj = nn.Linear(self.states[OBS_ENV_STATE], d)
        length = 1 + self.steps * (len(self.cameras) + len(self.states))
        self.register_buffer("position", sinusoids(length, d), persistent=False)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.recompute = config.gradient_checkpointing

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        batch = self.with_features(batch)
        parts = [self.text(batch)[:, None]]
        if self.cameras:
            parts.append(self.images(batch))
        if OBS_STATE in self.states:
            parts.append(self.state_proj(self.drop(self.state(batch, OBS_STATE))))
        if OBS_ENV_STATE in self.states:
            parts.append(self.env_state_proj(self.drop(self.state(batch, OBS_ENV_STATE))))
        x_BLD = torch.cat(parts, 1)
        for layer in self.layers:
            x_BLD = run_block(layer, self.recompute, x_BLD, self.get_buffer("position"))
        return x_BLD


class DitEncDecPaperModel(FlowMatchingModel):
    """`encode` gives the encoded tokens (B, L, D), computed once per action chunk."""

    def __init__(self, config: DitConfig, action_dim: int) -> None:
        super().__init__()
        self.levels = config.diffusion_steps
        self.obs_encoder: PaperEncoder = PaperEncoder(config)
        self.velocity_net = ActionNet(config, action_dim, offset=0, eps=1e-5, period=10_000)

    def encode(self, batch: dict[str, Tensor]) -> Tensor:
        return self.obs_encoder(batch)

    def velocity(self, x_BHA: Tensor, t_B: Tensor, context: Tensor) -> Tensor:
        time_BD = self.velocity_net.time((t_B * self.levels).round())  # the level k itself
        return self.velocity_net(x_BHA, self.features(context) + time_BD, context[:, -1] + time_BD)

    def features(self, context: Tensor) -> Tensor:
        """The mean of the encoded tokens, (B, D)."""
        return context.mean(1)
