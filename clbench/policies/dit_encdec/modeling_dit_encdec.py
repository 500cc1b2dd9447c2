"""DiT-EncDec: encoder over observation and word tokens; decoder over action tokens with cross-attention."""

from __future__ import annotations

from torch import Tensor, nn

from clbench.config.dit import PAPER
from clbench.policies.dit.configuration import DitConfig
from clbench.policies.dit.flow_policy import FlowMatchingModel, FlowMatchingPolicy
from clbench.policies.dit.layers import ActionTokens, AdaLNBlock, ObservationEncoder, TimeEmbedding, run_block
from clbench.policies.dit_encdec.configuration_dit_encdec import DitEncDecConfig
from clbench.policies.dit_encdec.modeling_paper import DitEncDecPaperModel


class CrossVelocityNet(nn.Module):
    """Decoder over action tokens: time enters through AdaLN, the observation through cross-attention."""

    def __init__(self, config: DitConfig, action_dim: int) -> None:
        super().__init__()
        d = config.d_model
        self.time = TimeEmbedding(d)
        self.actions = ActionTokens(config, action_dim)
        self.blocks = nn.ModuleList(
            AdaLNBlock(d, config.n_heads, config.ffn_mult, cross=True) for _ in range(config.decoder_layers)
        )
        self.recompute = config.gradient_checkpointing

    def forward(self, x_BHA: Tensor, t_B: Tensor, tokens_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        c_BD = self.time(t_B)
        x_BPD = self.actions.embed(x_BHA)
        for block in self.blocks:
            x_BPD = run_block(block, self.recompute, x_BPD, c_BD, tokens_BLD, mask_BL)
        return self.actions.predict(x_BPD)


class DitEncDecModel(FlowMatchingModel):
    """`encode` gives encoder tokens (B, L, D) and their mask (B, L), computed once per action chunk."""

    def __init__(self, config: DitConfig, action_dim: int) -> None:
        super().__init__()
        self.obs_encoder = ObservationEncoder(config, pooled_text=False)
        self.velocity_net = CrossVelocityNet(config, action_dim)

    def encode(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.obs_encoder(batch)

    def velocity(self, x_BHA: Tensor, t_B: Tensor, context: tuple[Tensor, Tensor]) -> Tensor:
        return self.velocity_net(x_BHA, t_B, *context)

    def features(self, context: tuple[Tensor, Tensor]) -> Tensor:
        """The mean of the tokens that the decoder attends to, (B, D)."""
        tokens_BLD, mask_BL = context
        keep_BL1 = mask_BL[..., None].to(tokens_BLD.dtype)
        return (tokens_BLD * keep_BL1).sum(1) / keep_BL1.sum(1).clamp(min=1)


class DitEncDecPolicy(FlowMatchingPolicy):
    """LeRobot policy `dit_encdec`."""

    config_class = DitEncDecConfig
    name = "dit_encdec"

    def build_model(self) -> FlowMatchingModel:
        model = DitEncDecPaperModel if self.config.layout == PAPER else DitEncDecModel
        return model(self.config, self.action_dim)
