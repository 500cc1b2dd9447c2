"""PackNet (Mallya and Lazebnik, CVPR 2018, arXiv 1711.05769).

Every weight of every matrix belongs to a task or is free. Per task:

    train      the free weights, with the policy's loss
    prune      per matrix, keep the largest |w| of the free weights; the others are set to 0 and stay free
    retrain    the kept weights alone; then they belong to this task and never change again

`prune_ratio` is the share of the free weights that is released (paper: 0.5 to 0.75); `capacity: equal` keeps
1 / (remaining tasks) of them instead, as Continual World does (arXiv 2105.10919). Biases, norms and embeddings train
in the first task only.

Zero gradients do not hold a weight still (weight decay and old momentum move it), so after every step the weights that
must not move are written back, and each phase starts with fresh optimizer moments.

At test time the paper masks the weights of later tasks, which requires the task's identity (`eval_with_task_id`);
without it all weights act, as in CLARE's comparison (arXiv 2601.09512). Both can be evaluated from one run
(eval.views). A task that is visited again gets new weights of its own, and is then evaluated with them.

Departure from the paper: it starts from a network whose pretraining counts as task 1. Here the base's weights are free
when task 1 starts, as in CLARE's baseline, so pruning costs part of what the base knew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clbench.algorithms.hooks import CLAlgorithm, Context, GradientView, Phase, WeightView, training_phase
from clbench.errors import UserError

FREE = 0
MAX_VISITS = 255  # owners are bytes


def keep_largest(weight: Tensor, free: Tensor, share: float) -> Tensor:
    """Mask of the round(share · free) free entries with the largest magnitude; on a tie the earlier entry."""
    count = round(share * int(free.sum()))
    magnitude = torch.where(free, weight.detach().abs(), -1.0).flatten()
    kept = torch.zeros_like(magnitude, dtype=torch.bool)
    kept[magnitude.sort(descending=True, stable=True).indices[:count]] = True
    return kept.view_as(weight)


def matrices(policy: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable weights of linear, convolution and attention layers, by name."""
    kinds = {
        nn.Linear: ("weight",),
        nn.modules.conv._ConvNd: ("weight",),
        nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
    }
    names = {
        f"{name}.{weight}"
        for name, module in policy.named_modules()
        for kind, weights in kinds.items()
        if isinstance(module, kind)
        for weight in weights
    }
    return {n: p for n, p in policy.named_parameters() if n in names and p.requires_grad}


class PackNet(CLAlgorithm):
    """Give every task a share of the weights and freeze it."""

    name = "packnet"
    claims = frozenset({"phases", "gradient_edits", "weight_edits", "eval_view"})
    state = ("owner", "tasks")
    protects_parameters = True
    views: ClassVar[dict[str, dict[str, Any]]] = {
        "task_id": {"eval_with_task_id": True},
        "no_task_id": {"eval_with_task_id": False},
    }

    @dataclass
    class Config:
        """Keys of `algorithm`.

        Attributes:
            prune_ratio: share of the free weights that each task releases again (capacity: ratio).
            capacity: ratio (see prune_ratio) | equal (every task of the stream gets the same share).
            retrain_steps: optimizer steps after pruning; null = train.steps.
            eval_with_task_id: evaluate each task with later tasks' weights masked.
        """

        prune_ratio: float = 0.75
        capacity: str = "ratio"
        retrain_steps: int | None = None
        eval_with_task_id: bool = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.owner: dict[str, Tensor] = {}  # matrix → uint8: 0 free, v + 1 belongs to visit v
        self.tasks: list[str] = []  # the task of every visit learned so far
        self._frozen: dict[str, Tensor] = {}  # matrix → mask of what must not move in this phase
        self._values: dict[str, Tensor] = {}  # its values

    def check(self, config: Any) -> None:
        c = self.config
        if not 0 < c.prune_ratio < 1:
            raise UserError(f"algorithm.prune_ratio must be between 0 and 1 but is {c.prune_ratio}.")
        if c.capacity not in ("ratio", "equal"):
            raise UserError(f"algorithm.capacity is '{c.capacity}' but must be ratio or equal.")
        if c.retrain_steps is not None and c.retrain_steps < 1:
            raise UserError(f"algorithm.retrain_steps must be at least 1 (or null) but is {c.retrain_steps}.")
        if config.train.optimizer_across_tasks == "carried":
            raise UserError("packnet needs fresh optimizer moments: train.optimizer_across_tasks must be fresh.")

    def bind(self, ctx: Context) -> None:
        super().bind(ctx)
        if len(ctx.stream.visits) > MAX_VISITS:
            raise UserError(f"packnet supports at most {MAX_VISITS} visits; the stream has {len(ctx.stream.visits)}.")

    # ---- training -------------------------------------------------------------------------------
    def phases(self, ctx: Context) -> Sequence[Phase]:
        train = training_phase(ctx)
        steps = train.steps if self.config.retrain_steps is None else self.config.retrain_steps
        trains = self._matrices if ctx.k > 0 else None  # None: everything that trains
        both = replace(train, parameters=trains)
        retrain = replace(both, name="retrain", steps=steps, on_enter=self._prune, on_exit=self._release)
        return [
            replace(both, on_enter=self._hold_owned, on_resume=self._hold_owned),
            replace(retrain, on_resume=self._hold_all_but_new),
        ]

    def _matrices(self) -> dict[str, nn.Parameter]:
        parameters = dict(self.ctx.policy.named_parameters())
        return {n: parameters[n] for n in self.owner}

    def _hold_owned(self, ctx: Context) -> None:
        if not self.owner:  # not earlier: another algorithm may add trainable layers
            self.owner = {n: torch.zeros_like(p, dtype=torch.uint8) for n, p in matrices(ctx.policy).items()}
            if not self.owner:
                raise UserError("packnet found no trainable matrix in this policy.")
        self._hold({n: o != FREE for n, o in self.owner.items()})

    def _hold_all_but_new(self, ctx: Context) -> None:
        self._hold({n: o != ctx.k + 1 for n, o in self.owner.items()})

    def _hold(self, frozen: dict[str, Tensor]) -> None:
        parameters = self._matrices()
        self._frozen = {n: m for n, m in frozen.items() if bool(m.any())}
        self._values = {n: parameters[n].detach().clone() for n in self._frozen}

    def _prune(self, ctx: Context) -> None:
        remaining = len(ctx.stream.visits) - ctx.k
        share = 1 / remaining if self.config.capacity == "equal" else 1 - self.config.prune_ratio
        parameters = self._matrices()
        for name, owner in self.owner.items():
            free = owner == FREE
            kept = keep_largest(parameters[name], free, share)
            owner[kept] = ctx.k + 1
            with torch.no_grad():
                parameters[name].masked_fill_(free & ~kept, 0.0)
        self._hold_all_but_new(ctx)
        total = sum(o.numel() for o in self.owner.values())
        ctx.log(
            "packnet_capacity",
            kept=sum(int((o == ctx.k + 1).sum()) for o in self.owner.values()) / total,
            free=sum(int((o == FREE).sum()) for o in self.owner.values()) / total,
        )

    def _release(self, ctx: Context) -> None:
        self._frozen, self._values = {}, {}

    def after_backward(self, model: nn.Module, grads: GradientView) -> None:
        """Frozen weights count neither in the norm that clipping sees nor in the optimizer's moments."""
        for name, frozen in self._frozen.items():
            gradient = grads.get(name)
            if gradient is not None:
                grads.set(name, gradient.masked_fill_(frozen, 0.0))

    def after_step(self, model: nn.Module, weights: WeightView) -> None:
        for name, frozen in self._frozen.items():
            weights.set_where(name, frozen, self._values[name])

    def on_task_end(self, ctx: Context) -> None:
        self.tasks.append(ctx.visit.task)

    # ---- checkpoints and evaluation -------------------------------------------------------------
    def _newest(self, task_id: int) -> int:
        """The last learned visit of column `task_id`'s task; the very last visit if it has not been learned yet."""
        last = len(self.tasks) - 1
        if task_id > last:
            return last
        return max(v for v, task in enumerate(self.tasks) if task == self.tasks[task_id])

    def view_key(self, task_id: int) -> str:
        return str(self._newest(task_id)) if self.config.eval_with_task_id else ""

    @contextmanager
    def eval_view(self, policy: nn.Module, task_id: int) -> Iterator[None]:
        newest = self._newest(task_id)
        if not self.config.eval_with_task_id or newest == len(self.tasks) - 1:
            yield
            return
        parameters = dict(policy.named_parameters())
        kept = {n: parameters[n].detach().clone() for n in self.owner}
        try:
            with torch.no_grad():
                for name, owner in self.owner.items():
                    parameters[name].masked_fill_(owner > newest + 1, 0.0)
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    parameters[name].copy_(value)
