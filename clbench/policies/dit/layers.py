"""Transformer pieces. Shape suffixes: B batch, L tokens, D model width, H action chunk, A action dimension,
P action tokens (H / action_patch).

T observation steps, oldest first (`n_obs_steps`; with T = 1 an observation may lack this dimension).

Every layer keeps rows of the batch independent (no batch statistics), so an episode's actions do not depend
on what else is evaluated with it.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from lerobot.utils.constants import OBS_ENV_STATE, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clbench.config.dit import IMAGE, OWN, TEXT
from clbench.policies.dit.configuration import DitConfig
from clbench.policies.dit.encoders import ImageEncoder, TextEncoder, feature_key, frozen
from clbench.policies.dit.text import frozen_word_table

LANGUAGE = "observation.language"


def run_block(block: nn.Module, recompute: bool, *inputs: Any) -> Tensor:
    """block(*inputs); with `recompute` its activations are not kept for the backward pass but recomputed there."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)  # type: ignore[no-any-return]
    return block(*inputs)  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """Linear → GELU → Linear. `in_features` and `out_features` let adapters read its shape like a Linear's."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.in_features = self.out_features = dim
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BLD), approximate="tanh"))


class Attention(nn.Module):
    """Multi-head attention of queries over `context` (itself by default); `mask_BL` is True where attended."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x_BLD: Tensor, context_BMD: Tensor | None = None, mask_BM: Tensor | None = None) -> Tensor:
        context = x_BLD if context_BMD is None else context_BMD
        B, L, D = x_BLD.shape
        q = self.q(x_BLD).view(B, L, self.heads, -1).transpose(1, 2)
        k, v = self.kv(context).view(B, context.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        mask = None if mask_BM is None else mask_BM[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(out.transpose(1, 2).reshape(B, L, D))


class EncoderLayer(nn.Module):
    """Pre-norm transformer encoder layer."""

    def __init__(self, dim: int, heads: int, ffn_mult: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.ffn = FeedForward(dim, ffn_mult * dim)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        x_BLD = x_BLD + self.attention(self.norm1(x_BLD), mask_BM=mask_BL)
        return x_BLD + self.ffn(self.norm2(x_BLD))


class AdaLNBlock(nn.Module):
    """Transformer block whose norms are shifted, scaled and gated by a condition (AdaLN-zero, Peebles & Xie 2023).

    With `cross=True` a cross-attention over encoder tokens comes between self-attention and feed-forward.
    """

    def __init__(self, dim: int, heads: int, ffn_mult: int, cross: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False)
        self.attention = Attention(dim, heads)
        self.cross_norm = nn.LayerNorm(dim) if cross else None
        self.cross_attention = Attention(dim, heads) if cross else None
        self.ffn = FeedForward(dim, ffn_mult * dim)
        self.modulation = nn.Linear(dim, 6 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(
        self, x_BPD: Tensor, c_BD: Tensor, context_BLD: Tensor | None = None, mask_BL: Tensor | None = None
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c_BD))[:, None].chunk(6, dim=-1)
        x_BPD = x_BPD + gate1 * self.attention(self.norm1(x_BPD) * (1 + scale1) + shift1)
        if self.cross_attention is not None and self.cross_norm is not None:
            x_BPD = x_BPD + self.cross_attention(self.cross_norm(x_BPD), context_BLD, mask_BL)
        return x_BPD + gate2 * self.ffn(self.norm2(x_BPD) * (1 + scale2) + shift2)


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of the flow time t in [0, 1], then a two-layer MLP: (B,) → (B, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t_B: Tensor) -> Tensor:
        half = self.dim // 2
        freqs = torch.exp(torch.arange(half, device=t_B.device) * (-math.log(1e4) / half))
        angles = 1e3 * t_B[:, None].float() * freqs
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1))


class ActionTokens(nn.Module):
    """Action chunk (B, H, A) ↔ decoder tokens (B, P, D): `action_patch` consecutive actions share a token."""

    def __init__(self, config: DitConfig, action_dim: int) -> None:
        super().__init__()
        width = config.action_patch * action_dim
        n_tokens = config.chunk_size // config.action_patch
        self.proj_in = nn.Linear(width, config.d_model)
        self.position = nn.Parameter(torch.randn(n_tokens, config.d_model) * 0.02)
        self.norm = nn.LayerNorm(config.d_model)
        self.proj_out = nn.Linear(config.d_model, width)
        self.action_dim, self.n_tokens = action_dim, n_tokens

    def embed(self, x_BHA: Tensor) -> Tensor:
        return self.proj_in(x_BHA.reshape(x_BHA.shape[0], self.n_tokens, -1)) + self.position

    def predict(self, x_BPD: Tensor) -> Tensor:
        return self.proj_out(self.norm(x_BPD)).reshape(x_BPD.shape[0], -1, self.action_dim)


def in_steps(values: Tensor, ndim: int, steps: int, key: str) -> Tensor:
    """Observations (B, T, …), of which each has `ndim` dimensions, from (B, T, …) or, where T is 1, (B, …).

    Raises:
        ValueError: there are not `steps` of them.
    """
    values = values[:, None] if values.ndim == ndim + 1 else values
    if values.shape[1] != steps:
        raise ValueError(f"{key} has {values.shape[1]} observation steps, and the policy takes {steps} (n_obs_steps).")
    return values


class StateTokens(nn.Module):
    """A low-dimensional observation → one token per step."""

    of_steps = True

    def __init__(self, key: str, dim_in: int, dim: int, clip: float, steps: int) -> None:
        super().__init__()
        self.key, self.clip = key, clip
        self.proj = nn.Linear(dim_in, dim)
        self.n_tokens = steps

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        state = in_steps(batch[self.key], 1, self.n_tokens, self.key)
        tokens = self.proj(state.clamp(-self.clip, self.clip).flatten(0, 1)).unflatten(0, state.shape[:2])
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


class LanguageTokens(nn.Module):
    """Hashed words → frozen random embedding → linear: one token per word, or their mean as one token (`pooled`)."""

    of_steps = False

    def __init__(self, config: DitConfig, pooled: bool) -> None:
        super().__init__()
        self.pooled = pooled
        self.n_tokens = 1 if pooled else config.text_max_words
        table = frozen_word_table(config.text_vocab_size, config.text_dim)
        self.register_buffer("table", table, persistent=False)  # a function of its shape: not saved
        self.proj = nn.Linear(config.text_dim, config.d_model)
        self.position = None if pooled else nn.Parameter(torch.randn(config.text_max_words, config.d_model) * 0.02)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        ids_BL, mask_BL = batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK]
        words_BLT = self.get_buffer("table")[ids_BL]
        if self.pooled:
            count = mask_BL.sum(1, keepdim=True).clamp(min=1)
            tokens = self.proj(words_BLT.sum(1) / count.sqrt())[:, None]
            return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return self.proj(words_BLT) + self.position, mask_BL


class ImageTokens(nn.Module):
    """One camera image (B, C, height, width) in [0, 1] → `side`² tokens per step by 3 × 3 convolutions and pooling.

    The first three of `layers` halve the image; each is followed by group normalisation, so rows stay independent.
    """

    of_steps = True

    def __init__(self, key: str, channels: int, dim: int, side: int, layers: int, steps: int) -> None:
        super().__init__()
        self.key, self.steps, self.n_tokens = key, steps, steps * side * side
        widths = [channels, *(dim // 4, dim // 2)[: max(0, layers - 1)], *[dim] * max(1, layers - 2)]
        stem: list[nn.Module] = []
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            stem += [nn.Conv2d(a, b, 3, stride=2 if i < 3 else 1, padding=1), nn.GroupNorm(4, b), nn.SiLU()]
        self.stem = nn.Sequential(*stem, nn.AdaptiveAvgPool2d(side))
        self.position = nn.Parameter(torch.randn(side * side, dim) * 0.02)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        images = in_steps(batch[self.key], 3, self.steps, self.key)
        tokens = self.stem(images.flatten(0, 1) - 0.5).flatten(2).transpose(1, 2) + self.position
        tokens = tokens.unflatten(0, images.shape[:2]).flatten(1, 2)
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


class FeatureTokens(nn.Module):
    """An encoder's features of an input, which the batch has, → as many tokens.

    Those of a text have shape (B, n, E), and their tokens are masked as its words; those of images (B, T n, E).
    """

    def __init__(self, key: str, encoder: ImageEncoder | TextEncoder, dim: int, text: bool, steps: int = 1) -> None:
        super().__init__()
        n = encoder.n_features
        self.key, self.of_steps, self.steps = feature_key(key), not text, steps
        self.n_tokens, self.masked = steps * n, text and n > 1
        self.proj = nn.Linear(encoder.width, dim)
        self.position = None if text or n == 1 else nn.Parameter(torch.randn(n, dim) * 0.02)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        features = batch[self.key]
        if features.shape[1] != self.n_tokens:
            raise ValueError(f"{self.key} has {features.shape[1]} vectors, and the policy takes {self.n_tokens}.")
        tokens = self.proj(features)
        if self.position is not None:
            tokens = tokens + self.position.repeat(self.steps, 1)
        if self.masked:
            return tokens, batch[OBS_LANGUAGE_ATTENTION_MASK]
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


class InputEncoders(nn.Module):
    """What every network of ours has of its inputs: the encoders of images and text, if any.

    Attributes:
        cameras: the keys of the images.
        encoders: the image and the text model, by IMAGE and TEXT.
        frozen: which of them are not trained.
    """

    cameras: list[str]
    encoders: nn.ModuleDict
    frozen: list[str]

    def with_features(self, batch: dict[str, Tensor], frozen_only: bool = False) -> dict[str, Tensor]:
        """The batch with the encoders' features that it lacks, without the images that were encoded."""
        kinds = [kind for kind in self.encoders if kind in self.frozen or not frozen_only]
        if not kinds:
            return batch
        found = dict(batch)
        for camera in self.cameras if IMAGE in kinds else ():
            image = found.pop(camera, None)
            if image is not None and feature_key(camera) not in found:
                found[feature_key(camera)] = self.encoders[IMAGE](image)
        if TEXT in kinds and feature_key(LANGUAGE) not in found:
            tokens, mask = found[OBS_LANGUAGE_TOKENS], found[OBS_LANGUAGE_ATTENTION_MASK]
            found[feature_key(LANGUAGE)] = self.encoders[TEXT](tokens, mask)
        return found


class ObservationEncoder(InputEncoders):
    """Every input becomes tokens (B, n, D) with a mask; a transformer encoder mixes them.

    A new kind of input is one more tokeniser with this interface: `forward(batch) -> (tokens, mask)`, `n_tokens`, and
    `of_steps`: whether it has tokens of each observation step, step by step. To these, with several steps, a learned
    embedding of the step is added.
    `encoders` has the image and the text model whose features the tokenisers of cameras and language take, if any.
    """

    def __init__(self, config: DitConfig, pooled_text: bool) -> None:
        super().__init__()
        d, steps = config.d_model, config.n_obs_steps
        self.tokenizers = nn.ModuleDict()
        if config.robot_state_feature is not None:
            n = config.robot_state_feature.shape[0]
            self.tokenizers["state"] = StateTokens(OBS_STATE, n, d, config.state_clip, steps)
        if config.env_state_feature is not None:
            n = config.env_state_feature.shape[0]
            self.tokenizers["env_state"] = StateTokens(OBS_ENV_STATE, n, d, config.state_clip, steps)
        self.cameras = list(config.image_features)
        self.encoders = nn.ModuleDict()
        self.frozen = [kind for kind in (IMAGE, TEXT) if frozen(config, kind)]
        if self.cameras and config.image_encoder != OWN[IMAGE]:
            image_encoder = ImageEncoder(config, [tuple(f.shape) for f in config.image_features.values()])
            self.encoders[IMAGE] = image_encoder
        for key, feature in config.image_features.items():
            name = key.replace(".", "_")
            if IMAGE in self.encoders:
                self.tokenizers[name] = FeatureTokens(key, image_encoder, d, text=False, steps=steps)
                continue
            self.tokenizers[name] = ImageTokens(
                key, feature.shape[0], d, config.image_tokens_side, config.image_layers, steps
            )
        if config.text_encoder != OWN[TEXT]:
            text_encoder = TextEncoder(config)
            if pooled_text and text_encoder.n_features > 1:
                raise ValueError("text_encoder_output: tokens is of dit_encdec; use mean or pooled.")
            self.encoders[TEXT] = text_encoder
            self.tokenizers["language"] = FeatureTokens(LANGUAGE, text_encoder, d, text=True)
        else:
            self.tokenizers["language"] = LanguageTokens(config, pooled_text)
        self.kind = nn.Parameter(torch.randn(len(self.tokenizers), d) * 0.02)
        self.step = None if steps == 1 else nn.Parameter(torch.randn(steps, d) * 0.02)
        self.layers = nn.ModuleList(
            EncoderLayer(d, config.n_heads, config.ffn_mult) for _ in range(config.encoder_layers)
        )
        self.norm = nn.LayerNorm(d)
        self.recompute = config.gradient_checkpointing

    @property
    def n_tokens(self) -> int:
        counts: list[Any] = [t.n_tokens for t in self.tokenizers.values()]
        return sum(counts)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return tokens (B, L, D) and their mask (B, L), True for actual tokens."""
        batch = self.with_features(batch)
        parts, masks = [], []
        for i, tokenizer in enumerate(self.tokenizers.values()):
            tokens, mask = tokenizer(batch)
            tokens = tokens + self.kind[i]
            if self.step is not None and tokenizer.of_steps:
                tokens = tokens + self.step.repeat_interleave(tokens.shape[1] // len(self.step), 0)
            parts.append(tokens)
            masks.append(mask)
        x_BLD, mask_BL = torch.cat(parts, 1), torch.cat(masks, 1)
        attention_mask = None if self.n_tokens == len(self.tokenizers) else mask_BL
        for layer in self.layers:
            x_BLD = run_block(layer, self.recompute, x_BLD, attention_mask)
        return self.norm(x_BLD), mask_BL
