"""DiT-Dec: observation tokens → encoder → concatenate → `velocity_net.cond_proj` → AdaLN blocks over action tokens."""

from __future__ import annotations

from torch import Tensor, nn

from clbench.config.dit import PAPER
from clbench.policies.dit.configuration import DitConfig
from clbench.policies.dit.flow_policy import FlowMatchingModel, FlowMatchingPolicy
from clbench.policies.dit.layers import ActionTokens, AdaLNBlock, ObservationEncoder, TimeEmbedding, run_block
from clbench.policies.dit_dec.configuration_dit_dec import DitDecConfig
from clbench.policies.dit_dec.modeling_paper import DitDecPaperModel


class VelocityNet(nn.Module):
    """AdaLN transformer over action tokens: v(x_t, t | c), c = cond_proj(observation) + time embedding."""

    def __init__(self, config: DitConfig, cond_dim: int, action_dim: int) -> None:
        super().__init__()
        d = config.d_model
        self.cond_proj = nn.Linear(cond_dim, d)
        self.time = TimeEmbedding(d)
        self.actions = ActionTokens(config, action_dim)
        self.blocks = nn.ModuleList(
            AdaLNBlock(d, config.n_heads, config.ffn_mult) for _ in range(config.decoder_layers)
        )
        self.recompute = config.gradient_checkpointing

    def forward(self, x_BHA: Tensor, t_B: Tensor, cond_BD: Tensor) -> Tensor:
        c_BD = cond_BD + self.time(t_B)
        x_BPD = self.actions.embed(x_BHA)
        for block in self.blocks:
            x_BPD = run_block(block, self.recompute, x_BPD, c_BD)
        return self.actions.predict(x_BPD)


class DitDecModel(FlowMatchingModel):
    """`encode` gives the projected condition (B, D), computed once per action chunk."""

    def __init__(self, config: DitConfig, action_dim: int) -> None:
        super().__init__()
        self.obs_encoder = ObservationEncoder(config, pooled_text=True)
        self.velocity_net = VelocityNet(config, self.obs_encoder.n_tokens * config.d_model, action_dim)

    def encode(self, batch: dict[str, Tensor]) -> Tensor:
        tokens_BLD, _ = self.obs_encoder(batch)
        return self.velocity_net.cond_proj(tokens_BLD.flatten(1))

    def velocity(self, x_BHA: Tensor, t_B: Tensor, context: Tensor) -> Tensor:
        return self.velocity_net(x_BHA, t_B, context)

    def features(self, context: Tensor) -> Tensor:
        """The condition, (B, D)."""
        return context


class DitDecPolicy(FlowMatchingPolicy):
    """LeRobot policy `dit_dec`."""

    config_class = DitDecConfig
    name = "dit_dec"

    def build_model(self) -> FlowMatchingModel:
        model = DitDecPaperModel if self.config.layout == PAPER else DitDecModel
        return model(self.config, self.action_dim)
