"""DiT-Dec of layout `paper`: instruction, states, images, environment's states → `velocity_net.cond_proj` → blocks."""

from __future__ import annotations

import torch
from lerobot.utils.constants import OBS_ENV_STATE, OBS_STATE
from torch import Tensor, nn

from clbench.policies.dit.configuration import DitConfig
from clbench.policies.dit.flow_policy import FlowMatchingModel
from clbench.policies.dit.paper import ActionNet, PaperInputs


class VelocityNet(ActionNet):
    """v(x_t, t | c), c = cond_proj(observation) + time; time is in [0, 1]."""

    def __init__(self, config: DitConfig, action_dim: int, cond_dim: int) -> None:
        super().__init__(config, action_dim, offset=1, eps=1e-6, period=1000)
        self.cond_proj = nn.Linear(cond_dim, config.d_model)


class DitDecPaperModel(FlowMatchingModel):
    """`encode` gives the projected condition (B, D), computed once per action chunk."""

    def __init__(self, config: DitConfig, action_dim: int) -> None:
        super().__init__()
        self.obs_encoder: PaperInputs = PaperInputs(config)
        self.velocity_net = VelocityNet(config, action_dim, config.condition_dim)

    def encode(self, batch: dict[str, Tensor]) -> Tensor:
        inputs = self.obs_encoder
        batch = inputs.with_features(batch)
        parts = [inputs.text(batch)]
        if OBS_STATE in inputs.states:
            parts.append(inputs.state(batch, OBS_STATE).flatten(1))
        if inputs.cameras:
            parts.append(inputs.images(batch).flatten(1))
        if OBS_ENV_STATE in inputs.states:
            parts.append(inputs.state(batch, OBS_ENV_STATE).flatten(1))
        return self.velocity_net.cond_proj(torch.cat(parts, 1))

    def velocity(self, x_BHA: Tensor, t_B: Tensor, context: Tensor) -> Tensor:
        return self.velocity_net(x_BHA, context + self.velocity_net.time(t_B))

    def features(self, context: Tensor) -> Tensor:
        """The condition, (B, D)."""
        return context
