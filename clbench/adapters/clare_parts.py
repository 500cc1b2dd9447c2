"""What a CLARE layer holds: adapters, discriminators, and the running statistics of their errors.

Kinds of adapters, for a layer with input x of width D_in and output of width D_out:

    Adapter          out = base(x) + W_up · ReLU(W_down x + b) + b', or low-rank: base(x) + (α / r) · B A x
    CopyAdapter      out = base(x) + copy(x), the copy starting equal to the base layer
    LinearsAdapter   (α / r) · B A added to every linear layer inside the base layer (`func_adapter_cfg.lora_layers:
                     linears`, what the released code calls `use_lora`)

With `add_zero_init_conv_layer`, what the first two add passes through a 1 × 1 convolution over tokens (a linear map of
each token) that starts at zero (Zhang et al. 2023, arXiv 2302.05543): a new adapter changes nothing.

`DISCRIMINATORS` are the kinds that `discriminator_cfg.type` may name: chains of linear layers and ReLUs that
reconstruct their input. With `feature_fusion` they reconstruct W_f [x_1; …; x_L], one vector for all L tokens.
Shape suffixes: B samples, L tokens, D features.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clbench.errors import UserError

DISCRIMINATORS: dict[str, type[Discriminator]] = {}


def registered(name: str) -> Callable[[type[Discriminator]], type[Discriminator]]:
    """Let `discriminator_cfg.type` name the decorated class."""

    def add(cls: type[Discriminator]) -> type[Discriminator]:
        DISCRIMINATORS[name] = cls
        return cls

    return add


# ---- adapters -----------------------------------------------------------------------------------
def _zero_convolution(width: int, wanted: bool) -> nn.Linear | None:
    if not wanted:
        return None
    layer = nn.Linear(width, width)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Adapter(nn.Module):
    """W_up · ReLU(W_down x + b) + b'  (or LoRA: α/r · B A x). Initialised like any Linear, not to zero."""

    def __init__(self, dim_in: int, dim_out: int, cfg: dict[str, Any], zero: bool = False) -> None:
        super().__init__()
        lora = bool(cfg["use_lora"])
        hidden = cfg["lora_rank"] if lora else cfg["hidden_dim"]
        self.down = nn.Linear(dim_in, hidden, bias=not lora)
        self.up = nn.Linear(hidden, dim_out, bias=not lora)
        self.relu, self.scale = not lora, (cfg["lora_alpha"] / cfg["lora_rank"] if lora else 1.0)
        if lora:
            nn.init.zeros_(self.up.weight)
        self.zero = _zero_convolution(dim_out, zero)

    @property
    def dtype(self) -> torch.dtype:
        return self.down.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(x)
        out = self.scale * self.up(F.relu(h) if self.relu else h)
        return out if self.zero is None else self.zero(out)


class CopyAdapter(nn.Module):
    """A trainable copy of the base layer."""

    def __init__(self, base: nn.Module, dim_out: int, zero: bool = False) -> None:
        super().__init__()
        if any(p.dtype == torch.bfloat16 for p in base.parameters()):
            raise UserError(
                "CLARE's use_trainable_copy trains copies of the base's layers, which policy.dtype=bfloat16 keeps in "
                "bf16: set policy.dtype=float32."
            )
        self.copy = copy.deepcopy(base)
        self.zero = _zero_convolution(dim_out, zero)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.copy.parameters()).dtype

    def forward(self, x: Tensor) -> Tensor:
        out = self.copy(x)
        return out if self.zero is None else self.zero(out)


class LinearsAdapter(nn.Module):
    """One pair (A, B) for every linear layer inside the base layer, in the order of its modules; B starts at zero."""

    def __init__(self, linears: list[nn.Linear], cfg: dict[str, Any]) -> None:
        super().__init__()
        rank = cfg["lora_rank"]
        self.down = nn.ModuleList([nn.Linear(m.in_features, rank, bias=False) for m in linears])
        self.up = nn.ModuleList([nn.Linear(rank, m.out_features, bias=False) for m in linears])
        self.scale = cfg["lora_alpha"] / rank
        for m in self.up:
            nn.init.zeros_(m.weight)  # type: ignore[arg-type]

    def added(self, i: int, x: Tensor) -> Tensor:
        """What is added to the output of inner linear layer i with input x (…, D_in), (…, D_out)."""
        return self.scale * self.up[i](self.down[i](x))


# ---- discriminators -----------------------------------------------------------------------------
class LowRankLinear(nn.Module):
    """s · (B A x + b) with s = α / r: a linear layer of a discriminator with `use_lora`."""

    def __init__(self, dim_in: int, dim_out: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.a = nn.Linear(dim_in, rank, bias=False)
        self.b = nn.Linear(rank, dim_out)
        self.scale = alpha / rank

    @property
    def weight(self) -> Tensor:
        """s · B A (D_out, D_in)."""
        return self.scale * (self.b.weight @ self.a.weight)

    @property
    def bias(self) -> Tensor:
        """s · b (D_out,)."""
        return self.scale * self.b.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.b(self.a(x))


class Discriminator(nn.Module, ABC):
    """A chain of linear layers and ReLUs, with the running mean μ and standard deviation σ of its error on its task.

    Subclasses define the widths of the chain and which of its layers have a ReLU before them.
    """

    mean: Tensor
    std: Tensor
    batches: Tensor
    widths: ClassVar[tuple[str, ...]]  # keys of discriminator_cfg, between input and output

    def __init__(self, dim: int, cfg: dict[str, Any]) -> None:
        super().__init__()
        self.fusion: nn.Linear | None = None
        if cfg["feature_fusion"]:
            self.fusion = nn.Linear(cfg["num_tokens"] * dim, cfg["fused_feature_dim"] or dim)
            dim = self.fusion.out_features
        widths = [dim, *(cfg[key] for key in self.widths), dim]
        self.layers = nn.ModuleList([_linear(*ends, cfg) for ends in pairwise(widths)])
        self.relus = self.activations(cfg)
        self.momentum = cfg["momentum"] if cfg["use_momentum"] else None
        self.max_batches = cfg["max_batches_tracked"]
        self.from_zero_one = cfg["statistics"] == "zero_one"
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    @staticmethod
    @abstractmethod
    def activations(cfg: dict[str, Any]) -> tuple[bool, ...]:
        """Whether there is a ReLU before each layer."""

    def forward(self, x: Tensor) -> Tensor:
        for layer, relu in zip(self.layers, self.relus, strict=True):
            x = layer(F.relu(x) if relu else x)
        return x

    def features(self, x: Tensor) -> Tensor:
        """What is reconstructed: x (B, …, D), or the fused tokens (B, D_fused)."""
        return x if self.fusion is None else self.fusion(fusable(x, self.fusion.in_features))

    def error(self, x: Tensor) -> Tensor:
        """e(x) per sample (B,), for x (B, …, D)."""
        x = self.features(x)
        return (x - self(x)).square().flatten(1).mean(1)

    def training_loss(self, x: Tensor) -> Tensor:
        """What is minimized, per sample (B,); μ and σ track its mean and deviation."""
        return self.error(x)

    @torch.no_grad()
    def track(self, error_B: Tensor) -> None:
        """Fold one batch of errors into μ and σ, unless they already have `max_batches_tracked`.

        With momentum m: μ ← (1-m) μ + m·mean, σ ← (1-m) σ + m·std, the first batch setting both; without: the means
        of all batches' means and deviations. With `statistics: zero_one`, as in the released code, the first batch is
        treated like the others, on top of (0, 1), and without momentum μ and σ are the mean and deviation of the batch
        means, with σ staying 1 until there are two.
        """
        if int(self.batches) >= self.max_batches:
            return
        error_B = error_B.float()
        if self.from_zero_one:
            self._track_from_zero_one(error_B)
            return
        self.batches += 1
        m = 1.0 / int(self.batches) if self.momentum is None or int(self.batches) == 1 else self.momentum
        self.mean.lerp_(error_B.mean(), m)
        self.std.lerp_(error_B.std() if len(error_B) > 1 else error_B.new_zeros(()), m)

    def _track_from_zero_one(self, error_B: Tensor) -> None:
        if len(error_B) < 2:
            return
        self.batches += 1
        n, value = int(self.batches), error_B.mean()
        if self.momentum is not None:
            self.mean.lerp_(value, self.momentum)
            self.std.lerp_(error_B.std(), self.momentum)
            return
        squares = self.std.square() * (n - 2) if n > 2 else torch.zeros_like(self.std)  # Σ (value - mean)² before
        off = value - self.mean
        self.mean += off / n
        if n > 1:
            self.std.copy_(((squares + off * (value - self.mean)) / (n - 1)).sqrt())


def _linear(dim_in: int, dim_out: int, cfg: dict[str, Any]) -> nn.Module:
    if cfg["use_lora"]:
        return LowRankLinear(dim_in, dim_out, cfg["lora_rank"], cfg["lora_alpha"])
    return nn.Linear(dim_in, dim_out)


def fusable(x: Tensor, width: int) -> Tensor:
    """x (B, …, D) as (B, L·D); UserError if that is not as wide as the fusion layer."""
    x_BF = x.flatten(1)
    if x_BF.shape[1] != width:
        raise UserError(
            f"CLARE configuration: discriminator_cfg.num_tokens makes a fusion layer of input width {width}, but the "
            f"layer has {x_BF.shape[1] // x.shape[-1]} tokens of width {x.shape[-1]}. Set num_tokens to that number."
        )
    return x_BF


@registered("autoencoder")
class Autoencoder(Discriminator):
    """d → hidden → latent → hidden → d with ReLU; with `latent_activation: none`, as released, not at the latent."""

    widths = ("hidden_dim", "latent_dim", "hidden_dim")

    @staticmethod
    def activations(cfg: dict[str, Any]) -> tuple[bool, ...]:
        return False, True, cfg["latent_activation"] == "relu", True


@registered("autoencoder_small")
class SmallAutoencoder(Discriminator):
    """d → hidden → d with ReLU."""

    widths = ("hidden_dim",)

    @staticmethod
    def activations(cfg: dict[str, Any]) -> tuple[bool, ...]:
        return False, True


@registered("vae")
class VariationalAutoencoder(Discriminator):
    """q(z|x) = N(μ_z, diag e^v) with μ_z = W_μ h, v = W_v h, h = ReLU(W x + b); the decoder is latent → hidden → d.

    e(x) = mean (x - D(z))² + β/d · KL(q ‖ N(0, I)), both averaged over tokens if there are several; z = μ_z,
    in training drawn from q (Kingma and Welling 2014, arXiv 1312.6114).
    """

    widths = ("hidden_dim", "latent_dim", "hidden_dim")

    def __init__(self, dim: int, cfg: dict[str, Any]) -> None:
        super().__init__(dim, cfg)
        self.logvar = nn.Linear(cfg["hidden_dim"], cfg["latent_dim"])
        self.beta = float(cfg["beta"])

    @staticmethod
    def activations(cfg: dict[str, Any]) -> tuple[bool, ...]:
        return False, True, False, True

    def error(self, x: Tensor) -> Tensor:
        return self._loss(x, draw=False)

    def training_loss(self, x: Tensor) -> Tensor:
        return self._loss(x, draw=True)

    def _loss(self, x: Tensor, draw: bool) -> Tensor:
        x = self.features(x)
        h = F.relu(self.layers[0](x))
        z, logvar = self.layers[1](h), self.logvar(h)
        kl = kl_to_standard_normal(z, logvar)
        if draw:
            z = z + torch.randn_like(z) * (0.5 * logvar).exp()
        out = self.layers[3](F.relu(self.layers[2](z)))
        return (x - out).square().flatten(1).mean(1) + self.beta / x.shape[-1] * kl.reshape(len(x), -1).mean(1)


def kl_to_standard_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, diag e^logvar) ‖ N(0, I)) over the last axis."""
    return -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum(-1)
