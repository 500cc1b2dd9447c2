"""What a learner sees of any policy: losses, what they compare, features, gradients.

A *draw* is everything random in a loss, augmentation of images included (key AUGMENT, which the policy does not see).
A policy with `sample_draw` and `forward(batch, reduction="none", draw=…)` gives exact per-sample losses under a given
draw, and so do those of LeRobot with an adapter (draws.py). For any other policy a draw is one integer per sample: its
forward runs under the global generator seeded from them, and per-sample losses come from a loop over single samples.

A policy that names its other results in `outputs` (`clbench.policies.dit.flow_policy`: prediction, target, mask,
features) takes `forward(…, want=NAMES)` and returns those by name along with its loss.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from clbench.data.frames import Batch, batch_size, select, unpacked
from clbench.errors import UserError
from clbench.policies.augment import Augmentation
from clbench.policies.draws import adapter_of, refusal
from clbench.seeding import seeded

# Per-sample gradients held at once, in numbers (256 MB in fp32).
GRADIENT_CHUNK = 2**26

# What draws, or changes with each batch, in training mode. MultiheadAttention has its own dropout, not a layer for it.
STOCHASTIC = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm, nn.MultiheadAttention)


@contextmanager
def without_dropout(policy: nn.Module) -> Iterator[None]:
    """The policy with its training loss (some policies lose terms of it in evaluation mode), but no dropout and no
    updates of batch statistics."""
    modes = {m: m.training for m in policy.modules()}
    policy.train()
    for m in modes:
        if isinstance(m, STOCHASTIC):
            m.eval()
    try:
        yield
    finally:
        for m, training in modes.items():
            m.training = training


@dataclass(frozen=True)
class Outputs:
    """What a policy computes on n samples under a draw; null = not requested.

    Attributes:
        loss: ℓ(θ; x), (n,).
        prediction, target: what the loss compares, unreduced, of equal shapes (n, …); for flow matching the velocities
            v_θ and u, (n, chunk, action).
        mask: (n, …) true where the loss counts: the leading dimensions of `prediction`.
        features: (n, d), the observation as the policy's head sees it.
    """

    loss: Tensor | None = None
    prediction: Tensor | None = None
    target: Tensor | None = None
    mask: Tensor | None = None
    features: Tensor | None = None


AUGMENT = "augment"  # key of a draw: numbers of clbench.policies.augment

NAMES = tuple(f.name for f in fields(Outputs))


class PolicyView:
    """A policy on raw batches: processes them, runs it (`module`: the policy, or its compiled form)."""

    def __init__(
        self,
        policy: nn.Module,
        module: nn.Module,
        processor: Callable[[Batch], Batch],
        autocast: Callable[[], AbstractContextManager[Any]],
        augmentation: Augmentation | None = None,
    ) -> None:
        self.policy, self.module = policy, module
        self.processor, self.autocast, self.augmentation = processor, autocast, augmentation
        self.adapter = None if hasattr(policy, "sample_draw") else adapter_of(policy)
        self.takes_draw = hasattr(policy, "sample_draw") or self.adapter is not None

    def processed(self, batch: Batch, draw: dict[str, Tensor]) -> tuple[Batch, dict[str, Tensor]]:
        """A raw batch as the policy takes it (images in [0, 1], augmented, normalised, on its device) and the rest of
        the draw, the policy's own."""
        batch = unpacked(batch, self.device)
        if self.augmentation is not None and AUGMENT in draw:
            batch = self.augmentation(batch, draw[AUGMENT])
        return self.processor(batch), {n: v for n, v in draw.items() if n != AUGMENT}

    @property
    def device(self) -> torch.device | None:
        """The policy's."""
        return next((p.device for p in self.policy.parameters()), None)

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw for n samples from `generator`."""
        if self.adapter is not None:
            own = self.adapter.sample(n, generator)
        elif self.takes_draw:
            own = self.policy.sample_draw(n, generator)  # type: ignore[operator]
        else:
            own = {"seed": torch.randint(2**31, (n,), generator=generator)}
        return own if self.augmentation is None else {**own, AUGMENT: self.augmentation.draw(n, generator)}

    def outputs(self, batch: Batch, draw: dict[str, Tensor], want: Collection[str] = ("loss",)) -> Outputs:
        """The outputs named by `want` for a raw batch under `draw`, in one forward pass if the policy takes draws.

        Nothing else is computed: without "loss", "prediction", "target" and "mask" no action is predicted.

        Raises:
            UserError: the policy has no such output (most LeRobot policies have only their loss).
        """
        for name in want:
            if name not in NAMES:
                raise ValueError(f"there is no output '{name}'; outputs are {', '.join(NAMES)}.")
        own = getattr(self.policy, "outputs", ())
        lacking = [n for n in want if n != "loss" and n not in own]
        if lacking:
            kind = getattr(getattr(self.policy, "config", None), "type", type(self.policy).__name__)
            raise UserError(
                f"policy '{kind}' has no {lacking[0]} that a method could use"
                + (f"; it has {', '.join(['loss', *own])}." if own else ": it gives only its loss.")
            )
        if not set(want) - {"loss"}:
            return Outputs(loss=self.per_sample(batch, draw)) if want else Outputs()
        inputs, draw = self.processed(batch, draw)
        with self.autocast():
            loss, found = self.module(inputs, reduction="none", draw=draw, want=tuple(want))
        return Outputs(loss=loss, **found)

    def per_sample(self, batch: Batch, draw: dict[str, Tensor]) -> Tensor:
        """ℓ(θ; x) of every sample, (n,). UserError if computing it would change the policy."""
        if self.takes_draw:
            inputs, draw = self.processed(batch, draw)
            with self.autocast():
                if self.adapter is not None:
                    return self.adapter.losses(self.module, inputs, draw)
                return self.module(inputs, reduction="none", draw=draw)[0]
        self._check_comparable()
        rows = [torch.tensor([i]) for i in range(batch_size(batch))]
        return torch.stack([self.total(select(batch, i), {n: v[i] for n, v in draw.items()}) for i in rows])

    def total(self, batch: Batch, draw: dict[str, Tensor]) -> Tensor:
        """Σ ℓ over the batch, in one forward for every policy."""
        if self.takes_draw:
            return self.per_sample(batch, draw).sum()
        inputs, draw = self.processed(batch, draw)
        with seeded(*draw["seed"].tolist()), self.autocast():
            return self.module(inputs)[0] * batch_size(batch)

    def _check_comparable(self) -> None:
        """Raise UserError if the policy's loss cannot be computed for a comparison alone."""
        reason = refusal(self.policy)
        if reason is not None:
            raise UserError(f"policy '{self.policy.config.type}': {reason}.")  # type: ignore[union-attr]

    def mean_gradient(
        self, batch: Batch, draw: dict[str, Tensor], parameters: Mapping[str, nn.Parameter], parts: int = 1
    ) -> dict[str, Tensor]:
        """∇ mean ℓ over the batch, by name; computed in `parts` micro-batches. Leaves `.grad` alone."""
        self._check_comparable()
        n = batch_size(batch)
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for i in range(parts):
            rows = torch.arange(n * i // parts, n * (i + 1) // parts)
            loss = self.total(select(batch, rows), {k: v[rows] for k, v in draw.items()}) / n
            _accumulate(total, loss, parameters)
        return total

    def squared_gradients(
        self,
        batch: Batch,
        draw: dict[str, Tensor],
        parameters: Mapping[str, nn.Parameter],
        vectorized: bool | None = None,
    ) -> dict[str, Tensor]:
        """Σ_n (∂ℓ(θ; x_n) / ∂θ_i)², by name, in fp32: gradients are squared per sample, then summed.

        `vectorized` (default: if the policy takes its draw itself, without an adapter, keeps its activations and trains
        no encoder of transformers) differentiates many samples in one call of torch.func.vmap; otherwise one sample
        after the other. Leaves `.grad` alone.
        """
        self._check_comparable()
        total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        n = batch_size(batch)
        if vectorized is None:  # vmap cannot look into activation checkpointing or these models
            config = getattr(self.policy, "config", None)
            opaque = ("gradient_checkpointing", "image_encoder_trained", "text_encoder_trained")
            own = self.takes_draw and self.adapter is None
            vectorized = own and not any(getattr(config, name, False) for name in opaque)
        if vectorized:
            processed, draw = self.processed(batch, draw)
            if hasattr(self.policy, "with_frozen_features"):  # nor into what makes them
                processed = self.policy.with_frozen_features(processed)  # type: ignore[operator]
            inputs = {k: v for k, v in processed.items() if torch.is_tensor(v) and v.shape[:1] == (n,)}
            values = {name: p.detach() for name, p in parameters.items()}

            def one(values: dict[str, Tensor], row: Batch, row_draw: dict[str, Tensor]) -> Tensor:
                kwargs = {"reduction": "none", "draw": {k: v[None] for k, v in row_draw.items()}}
                return functional_call(self.policy, values, ({k: v[None] for k, v in row.items()},), kwargs)[0][0]

            chunk = max(1, GRADIENT_CHUNK // max(1, sum(p.numel() for p in parameters.values())))
            gradients = vmap(grad(one), in_dims=(None, 0, 0), randomness="error")
            for a in range(0, n, chunk):
                rows = slice(a, a + chunk)
                with sdpa_kernel(SDPBackend.MATH):  # vmap has no batching rule for the fused attention kernels
                    found = gradients(
                        values, {k: v[rows] for k, v in inputs.items()}, {k: v[rows] for k, v in draw.items()}
                    )
                for name, g in found.items():
                    total[name] += g.float().square().sum(0)
            return total
        for i in range(n):
            row = torch.tensor([i])
            single = {name: torch.zeros_like(p) for name, p in parameters.items()}
            _accumulate(single, self.total(select(batch, row), {k: v[row] for k, v in draw.items()}), parameters)
            for name, g in single.items():
                total[name] += g.float().square()
        return total


def _accumulate(total: dict[str, Tensor], loss: Tensor, parameters: Mapping[str, nn.Parameter]) -> None:
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for name, g in zip(parameters, found, strict=True):
        if g is not None:
            total[name] += g
