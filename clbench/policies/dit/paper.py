"""Pieces of layout `paper`: the networks of CLARE's released code (arXiv 2601.09512), written anew.

What both have in common, with c_B the condition of a sample (observation and time) and D = `d_model`:

    time       w_i = period^(−i / (half − 1)),  i < half = time_dim / 2
               τ(t) = W₂ SiLU(W₁ [cos(t w), sin(t w)])
    actions    x = W₄ GELU(W₃ a) + position
    block      x ← x + g₁(c) ⊙ attention(m₁(norm₁(x), c)),   x ← x + g₂(c) ⊙ ffn(m₂(norm₂(x), c))
               m(x, c) = x ⊙ (offset + scale(SiLU c)) + shift(SiLU c),   g(c) = gate(SiLU c)
    output     shift, scale = W₅ SiLU(c);   W₆ (x ⊙ (offset + scale) + shift), without a norm before it

where scale, shift and gate are linear layers of their own, and offset is 1 in DiT-Dec and 0 in DiT-EncDec. In training
`dropout` of the activations in a feed-forward block, after attention and feed-forward blocks, and of attention's
weights are dropped.

Images and the instruction are one vector each, of encoders; one linear layer serves all cameras. Shape suffixes: B
batch, T observation steps, C cameras, L tokens, D model width, H action chunk, A action dimension.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from lerobot.utils.constants import OBS_ENV_STATE, OBS_STATE
from torch import Tensor, nn

from clbench.config.dit import IMAGE, TEXT
from clbench.policies.dit.configuration import DitConfig
from clbench.policies.dit.encoders import ImageEncoder, TextEncoder, feature_key, frozen
from clbench.policies.dit.layers import LANGUAGE, InputEncoders, in_steps, run_block


class FeedForward(nn.Module):
    """Linear → GELU → dropout → Linear. `in_features`, `out_features` let adapters read its shape like a Linear's."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.in_features = self.out_features = dim
        self.linear1 = nn.Linear(dim, hidden)
        self.drop = nn.Dropout(dropout)
        self.linear2 = nn.Linear(hidden, dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.linear2(self.drop(F.gelu(self.linear1(x_BLD), approximate="tanh")))


class SelfAttention(nn.Module):
    """Multi-head self-attention. Positions (L, D) are added to what queries and keys are made of, not to values."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.drop = nn.Dropout(dropout)  # of the weights; it says how much, and whether
        self.qk = nn.Linear(dim, 2 * dim)
        self.v = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x_BLD: Tensor, position_LD: Tensor | None = None) -> Tensor:
        B, L, D = x_BLD.shape
        placed = x_BLD if position_LD is None else x_BLD + position_LD
        q, k = self.qk(placed).view(B, L, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        v = self.v(x_BLD).view(B, L, self.heads, -1).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.drop.p if self.drop.training else 0.0)
        return self.out(out.transpose(1, 2).reshape(B, L, D))

    def draw_weights(self) -> None:
        """As if queries, keys and values came from one matrix."""
        bound = math.sqrt(6 / (4 * self.v.in_features))
        for layer in (self.qk, self.v):
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.out.weight)
        nn.init.zeros_(self.out.bias)


def draw_weights(block: nn.Module) -> None:
    """Xavier's uniform distribution for every matrix of a block; the biases of attention are zero."""
    for layer in block.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
    for layer in block.modules():
        if isinstance(layer, SelfAttention):
            layer.draw_weights()


class EncoderLayer(nn.Module):
    """Post-norm layer: x ← norm₁(x + attention(x)), x ← norm₂(x + ffn(x))."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        d = config.d_model
        self.attention = SelfAttention(d, config.n_heads, config.dropout)
        self.ffn = FeedForward(d, config.ffn_mult * d, config.dropout)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.drop = nn.Dropout(config.dropout)
        draw_weights(self)

    def forward(self, x_BLD: Tensor, position_LD: Tensor) -> Tensor:
        x_BLD = self.norm1(x_BLD + self.drop(self.attention(x_BLD, position_LD)))
        return self.norm2(x_BLD + self.drop(self.ffn(x_BLD)))


class Modulation(nn.Module):
    """m(x, c) of the module's description, for SiLU(c) (B, D). With offset 1 it starts as the identity."""

    def __init__(self, dim: int, offset: int) -> None:
        super().__init__()
        self.offset = offset
        self.scale, self.shift = nn.Linear(dim, dim), nn.Linear(dim, dim)
        for layer in (self.scale, self.shift):
            if offset:
                nn.init.zeros_(layer.weight)
            else:
                nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x_BHD: Tensor, active_BD: Tensor) -> Tensor:
        return x_BHD * (self.offset + self.scale(active_BD)[:, None]) + self.shift(active_BD)[:, None]


class Block(nn.Module):
    """Decoder block over action tokens. Its gates start at zero."""

    def __init__(self, config: DitConfig, offset: int, eps: float) -> None:
        super().__init__()
        d = config.d_model
        self.attention = SelfAttention(d, config.n_heads, config.dropout)
        self.ffn = FeedForward(d, config.ffn_mult * d, config.dropout)
        self.norm1, self.norm2 = nn.LayerNorm(d, eps=eps), nn.LayerNorm(d, eps=eps)
        self.drop = nn.Dropout(config.dropout)
        draw_weights(self)
        self.modulate1, self.modulate2 = Modulation(d, offset), Modulation(d, offset)
        self.gate1, self.gate2 = nn.Linear(d, d), nn.Linear(d, d)
        for gate in (self.gate1, self.gate2):
            nn.init.zeros_(gate.weight)
            nn.init.zeros_(gate.bias)

    def forward(self, x_BHD: Tensor, c_BD: Tensor) -> Tensor:
        active_BD = F.silu(c_BD)
        change = self.attention(self.modulate1(self.norm1(x_BHD), active_BD))
        x_BHD = x_BHD + self.drop(change) * self.gate1(active_BD)[:, None]
        change = self.ffn(self.modulate2(self.norm2(x_BHD), active_BD))
        return x_BHD + self.drop(change) * self.gate2(active_BD)[:, None]


def frequencies(half: int, period: float) -> Tensor:
    """w of the module's description, (half,)."""
    return torch.exp(torch.arange(half) * (-math.log(period) / max(1, half - 1)))


def sinusoids(length: int, dim: int) -> Tensor:
    """(length, dim): sin(p / 10000^(2i / dim)) in even columns 2i, the cosine in the odd ones."""
    angles = torch.arange(length)[:, None] * torch.exp(torch.arange(0, dim, 2) * (-math.log(1e4) / dim))
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :dim]


class TimeNet(nn.Module):
    """τ of the module's description: (B,) → (B, D)."""

    def __init__(self, config: DitConfig, period: float) -> None:
        super().__init__()
        self.register_buffer("w", frequencies(config.time_dim // 2, period), persistent=False)
        self.mlp = nn.Sequential(
            nn.Linear(config.time_dim, config.d_model), nn.SiLU(), nn.Linear(config.d_model, config.d_model)
        )

    def forward(self, t_B: Tensor) -> Tensor:
        angles = t_B[:, None].float() * self.get_buffer("w")
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


class ActionNet(nn.Module):
    """Action chunk, condition → what the objective predicts of every action.

    `final_BD` is the condition of the output; by default that of the blocks.
    """

    def __init__(self, config: DitConfig, action_dim: int, *, offset: int, eps: float, period: float) -> None:
        super().__init__()
        d = config.d_model
        self.offset, self.recompute = offset, config.gradient_checkpointing
        self.time = TimeNet(config, period)
        self.proj_in = nn.Sequential(
            nn.Linear(action_dim, action_dim), nn.GELU(approximate="tanh"), nn.Linear(action_dim, d)
        )
        bound = math.sqrt(6 / (d * (config.chunk_size + 1)))
        position_HD = torch.empty(config.chunk_size, d).uniform_(-bound, bound)
        if offset:
            self.position = nn.Parameter(position_HD)
        else:  # the released DiT-EncDec does not train it
            self.register_buffer("position", position_HD)
        self.blocks = nn.ModuleList(Block(config, offset, eps) for _ in range(config.decoder_layers))
        self.modulation = nn.Linear(d, 2 * d)
        self.proj_out = nn.Linear(d, action_dim)

    def forward(self, x_BHA: Tensor, c_BD: Tensor, final_BD: Tensor | None = None) -> Tensor:
        x_BHD = self.proj_in(x_BHA) + self.position
        for block in self.blocks:
            x_BHD = run_block(block, self.recompute, x_BHD, c_BD)
        active_BD = F.silu(c_BD if final_BD is None else final_BD)
        shift_B1D, scale_B1D = self.modulation(active_BD)[:, None].chunk(2, -1)
        return self.proj_out(x_BHD * (self.offset + scale_B1D) + shift_B1D)


class PaperInputs(InputEncoders):
    """Inputs as the networks take them: the instruction and each image as one vector, states as they are."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.steps, self.cameras = config.n_obs_steps, list(config.image_features)
        self.frozen = [kind for kind in (IMAGE, TEXT) if frozen(config, kind)]
        self.encoders = nn.ModuleDict()
        if self.cameras:
            image_encoder = ImageEncoder(config, [tuple(f.shape) for f in config.image_features.values()])
            self.encoders[IMAGE] = image_encoder
            self.image_proj = nn.Linear(image_encoder.width, config.d_model)
        text_encoder = TextEncoder(config)
        self.encoders[TEXT] = text_encoder
        self.text_proj = nn.Linear(text_encoder.width, config.d_model)
        known = ((OBS_STATE, config.robot_state_feature), (OBS_ENV_STATE, config.env_state_feature))
        self.states = {key: feature.shape[0] for key, feature in known if feature is not None}

    def text(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, D)."""
        return self.text_proj(batch[feature_key(LANGUAGE)][:, 0])

    def images(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, T · C, D), the cameras of one step after those of the step before."""
        found = [batch[feature_key(camera)] for camera in self.cameras]
        for camera, vectors in zip(self.cameras, found, strict=True):
            if vectors.shape[1] != self.steps:
                raise ValueError(
                    f"{camera} has {vectors.shape[1]} observation steps, and the policy takes {self.steps}."
                )
        return self.image_proj(torch.stack(found, 2).flatten(1, 2))

    def state(self, batch: dict[str, Tensor], key: str) -> Tensor:
        """(B, T, dimension)."""
        return in_steps(batch[key], 1, self.steps, key)
