"""EWC: elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796; online: Schwarz et al. 2018,
arXiv 1805.06370).

After task k, the diagonal of the empirical Fisher information says how much each parameter matters to it:

    F_k,i = E_x [ (∂ℓ(θ; x) / ∂θ_i)² ],      gradients of single samples, squared, then averaged.

Later tasks pay for moving parameters that matter:

    online         F ← γ F + F_k,  θ* ← θ        penalty = λ/2 Σ_i F_i (θ_i − θ*_i)²
    ewc_online: false, one anchor per task       penalty = λ/2 Σ_k Σ_i F_k,i (θ_i − θ*_k,i)²

The second sum is kept as one quadratic with the same value: Σ_k F_k (θ − θ*_k)² = F (θ − c)² + r with F = Σ F_k,
c = Σ F_k θ*_k / F and r = Σ F_k θ*_k² − F c². So memory and cost do not grow with the number of tasks.

The expectation is over the task's samples, noise and timesteps. ℓ is the policy's training loss (for flow matching, not
a log-likelihood), so λ has the loss's scale and has to be tuned. Only trainable parameters have a Fisher.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clbench.algorithms.hooks import CLAlgorithm, Context, iterate_named
from clbench.errors import UserError
from clbench.policies.view import without_dropout


class _Penalty(torch.autograd.Function):
    """λ/2 Σ F (θ − c)² over flat vectors; its gradient λ F (θ − c) is a by-product of the value."""

    @staticmethod
    def forward(ctx: Any, scale: float, fisher: Tensor, center: Tensor, *parameters: Tensor) -> Tensor:
        move = torch.cat([p.detach().reshape(-1).float() for p in parameters]).sub_(center)
        pull = move * fisher
        ctx.scale, ctx.sizes, ctx.types = scale, [p.shape for p in parameters], [p.dtype for p in parameters]
        ctx.save_for_backward(pull)
        return 0.5 * scale * torch.dot(pull, move)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (pull,) = ctx.saved_tensors
        pieces = (pull * (ctx.scale * grads[0])).split([math.prod(s) for s in ctx.sizes])
        return None, None, None, *(v.view(s).to(t) for v, s, t in zip(pieces, ctx.sizes, ctx.types, strict=True))


class EWC(CLAlgorithm):
    """A quadratic pull towards the parameters that earlier tasks rely on."""

    name = "ewc"
    state = ("fisher", "center", "rest")
    protects_parameters = True

    @dataclass
    class Config:
        """Keys of `algorithm`.

        Attributes:
            ewc_lambda: λ, strength of the penalty.
            ewc_gamma: γ in [0, 1], how much of the older tasks' Fisher stays (online).
            ewc_online: true = one running Fisher and the latest anchor; false = one anchor per task.
            fisher_batches: batches of train.batch_size samples that the Fisher is estimated from.
        """

        ewc_lambda: float = 1e4
        ewc_gamma: float = 1.0
        ewc_online: bool = True
        fisher_batches: int = 50

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.fisher: dict[str, Tensor] = {}
        self.center: dict[str, Tensor] = {}
        self.rest = 0.0  # r of the module's docstring
        self._flat: tuple[Tensor, Tensor] | None = None

    def check(self, config: Any) -> None:
        c = self.config
        if not 0 <= c.ewc_lambda < math.inf:
            raise UserError(f"algorithm.ewc_lambda must not be negative but is {c.ewc_lambda}.")
        if not 0 <= c.ewc_gamma <= 1:
            raise UserError(f"algorithm.ewc_gamma must be in [0, 1] but is {c.ewc_gamma}.")
        if c.ewc_gamma != 1 and not c.ewc_online:
            raise UserError("algorithm.ewc_gamma belongs to the online form: set ewc_online=true or ewc_gamma=1.")
        if c.fisher_batches < 1:
            raise UserError(f"algorithm.fisher_batches must be at least 1 but is {c.fisher_batches}.")

    # ---- the penalty ----------------------------------------------------------------------------
    def compute_penalty(self, model: nn.Module) -> Tensor | None:
        if not self.fisher:
            return None
        parameters = dict(model.named_parameters())
        if self._flat is None:
            self._flat = (
                torch.cat([self.fisher[n].reshape(-1) for n in self.fisher]),
                torch.cat([self.center[n].reshape(-1) for n in self.fisher]),
            )
        trained = [parameters[n] for n in self.fisher]
        quadratic: Tensor = _Penalty.apply(self.config.ewc_lambda, *self._flat, *trained)  # type: ignore[assignment]
        return quadratic + 0.5 * self.config.ewc_lambda * self.rest

    # ---- consolidation --------------------------------------------------------------------------
    def on_task_end(self, ctx: Context) -> None:
        parameters = dict(iterate_named(ctx.policy))
        if self.fisher and parameters.keys() != self.fisher.keys():
            odd = sorted(parameters.keys() ^ self.fisher.keys())[0]
            raise UserError(f"ewc needs the same trainable parameters in every task; {odd} does not train in all.")
        fisher = self._estimate(ctx, parameters)
        anchor = {n: p.detach().float().clone() for n, p in parameters.items()}
        self.consolidate(fisher, anchor)
        ctx.log(
            "ewc_fisher",
            mean=float(sum(f.sum() for f in fisher.values()) / sum(f.numel() for f in fisher.values())),
            largest=max(float(f.max()) for f in fisher.values()),
        )

    def consolidate(self, fisher: dict[str, Tensor], anchor: dict[str, Tensor]) -> None:
        """Fold a task's Fisher and parameters into the penalty."""
        if not self.fisher:
            self.fisher, self.center = fisher, anchor
        elif self.config.ewc_online:
            self.fisher = {n: self.config.ewc_gamma * self.fisher[n] + f for n, f in fisher.items()}
            self.center = anchor
        else:
            for n, new in fisher.items():
                old, center = self.fisher[n].double(), self.center[n].double()
                total = old + new.double()
                # Completing the square: the anchors' disagreement moves into the constant r.
                self.rest += float((old * new / total.clamp(min=1e-300) * (center - anchor[n]).square()).sum())
                mixed = (old * center + new * anchor[n]) / total.clamp(min=1e-300)
                self.center[n] = torch.where(total > 0, mixed, anchor[n].double()).float()
                self.fisher[n] = total.float()
        self._flat = None

    def _estimate(self, ctx: Context, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """F_k: the mean over samples of squared per-sample gradients."""
        size = ctx.train.batch_size
        order = ctx.frames.order(ctx.k, "ewc-fisher", ctx.seed, ctx.k)
        total = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in parameters.items()}
        with without_dropout(ctx.policy):
            for i in range(self.config.fisher_batches):
                index = order.take(i * size, size)
                refs = torch.stack([torch.full_like(index, ctx.k), index], 1)
                for n, v in ctx.squared_gradients(refs, ctx.generator("ewc-fisher", i), parameters).items():
                    total[n] += v
        samples = self.config.fisher_batches * size
        return {n: v / samples for n, v in total.items()}

    # ---- checkpoints ----------------------------------------------------------------------------
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if self.fisher.keys() != self.center.keys():
            raise UserError("the checkpoint's state of ewc has a Fisher and a center for different parameters.")
        self._flat = None
