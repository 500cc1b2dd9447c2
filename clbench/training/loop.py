"""The training loop of one phase: batches → hooks → loss → backward → hooks → step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from clbench.algorithms.guards import guard
from clbench.algorithms.hooks import CLAlgorithm, Context, Phase, Plan, iterate_named
from clbench.algorithms.sources import Demonstrations, Source
from clbench.config.schema import OptimizerConfig
from clbench.data.frames import Batch, batch_size, concat, load_batches, select
from clbench.errors import UserError
from clbench.policies.view import PolicyView
from clbench.seeding import seed_everything
from clbench.training.backend import Backend
from clbench.training.log import RunLog
from clbench.training.progress import Progress

ADVICE = "Lower the learning rate (train.optimizer.lr) or clip harder (train.optimizer.grad_clip)"
MAX_SKIPPED = 20  # steps left out in a row after which something else must be wrong


@dataclass(frozen=True)
class Resumed:
    """Where a phase goes on: after `step` steps, with the states that its optimizer and its source had then."""

    step: int
    optimizer: dict[str, Any] | None
    source: dict[str, Any] = field(default_factory=dict)


class NonFiniteLossError(UserError):
    """The loss or gradient is NaN or infinite."""


def build_optimizer(
    config: OptimizerConfig, groups: list[tuple[dict[str, nn.Parameter], float]]
) -> torch.optim.Optimizer:
    """Optimizer over groups of (parameters, factor on the learning rate)."""
    settings = [{"params": list(p.values()), "lr": config.lr * f, "factor": f} for p, f in groups]
    if config.name == "adamw":
        betas = (config.betas[0], config.betas[1])
        return torch.optim.AdamW(settings, lr=config.lr, betas=betas, weight_decay=config.weight_decay)
    return torch.optim.SGD(settings, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


def schedule_factor(config: OptimizerConfig, step: int, steps: int) -> float:
    """Factor on the learning rate at `step` of `steps`: linear warm-up, then cosine (or constant)."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.final_lr_ratio + (1 - config.final_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def _shares(plan: Plan, slots: Tensor, current: int) -> Tensor:
    """Factors on the losses of samples in `slots` (n,): 1 / B for the B current ones, w_i / m for m planned ones."""
    m = len(plan.refs)
    weight = torch.as_tensor(plan.weight, dtype=torch.float32).expand(m)
    return torch.where(slots < current, 1 / current, weight[(slots - current).clamp(min=0)] / m)


class PhaseRunner:
    """Runs phases; keeps the optimizer from task to task where that is asked for."""

    def __init__(self, ctx: Context, algorithm: CLAlgorithm, backend: Backend, loss: PolicyView, log: RunLog) -> None:
        self.ctx, self.algorithm, self.backend, self.loss, self.log = ctx, algorithm, backend, loss, log
        self.carried: torch.optim.Optimizer | None = None
        self._carried_names: list[str] = []
        self.carried_state: dict[str, object] | None = None  # of a resumed run, until its optimizer is built
        self.total_steps = 0
        self.trained: dict[str, nn.Parameter] = {}  # what the present (or last) phase trains
        self.source = Source()  # of the present (or last) phase
        self.progress_mode = "auto"
        # Called after every step with the phase, its steps done so far and its optimizer; may raise to stop there.
        self.after_step: Callable[[Phase, int, torch.optim.Optimizer | None], None] = lambda *_: None
        self.skipped = 0  # steps left out in a row, because of on_nonfinite skip

    # ---- what a phase trains ----------------------------------------------------------------------
    def _select_parameters(self, phase: Phase) -> list[tuple[dict[str, nn.Parameter], float]]:
        policy = self.ctx.policy
        if phase.parameters is not None:
            chosen = phase.parameters()
            policy.requires_grad_(False)
            for p in chosen.values():
                p.requires_grad_(True)
            return [(chosen, 1.0)]
        groups = self.algorithm.parameter_groups(self.ctx) if phase.policy_training else None
        return groups or [(dict(iterate_named(policy)), 1.0)]

    def _optimizer(self, phase: Phase) -> torch.optim.Optimizer | None:
        assert phase.optimizer is not None
        groups = self._select_parameters(phase)
        names = [n for g, _ in groups for n in g]
        if not names:
            return None  # nothing to train (e.g. no layer expanded)
        self.trained = {n: p for g, _ in groups for n, p in g.items()}
        if self.ctx.train.optimizer_across_tasks == "carried" and phase.name == "train":
            if self.carried is None:
                self.carried, self._carried_names = build_optimizer(phase.optimizer, groups), names
                if self.carried_state is not None:
                    self.carried.load_state_dict(self.carried_state)
                    self.carried_state = None
            elif names != self._carried_names:
                raise UserError(
                    "train.optimizer_across_tasks is carried, but the trained parameters change between tasks: "
                    "use fresh."
                )
            return self.carried
        return build_optimizer(phase.optimizer, groups)

    # ---- data -------------------------------------------------------------------------------------
    def _share(self, phase: Phase) -> tuple[int, int]:
        """The positions low … high of the global batch that are this rank's."""
        B, ctx = phase.batch_size, self.ctx
        return B * ctx.rank // ctx.world_size, B * (ctx.rank + 1) // ctx.world_size

    def _planned(self, phase: Phase, step: int, plans: dict[int, Plan | None]) -> Tensor | None:
        """This rank's references of a step's planned samples. Notes the plan in `plans`."""
        plan = self.algorithm.plan_batch(self.ctx, step) if phase.policy_training else None
        plans[step] = plan
        if plan is None or plan.shared:
            return None if plan is None else plan.refs
        m, B = len(plan.refs), phase.batch_size
        low, high = self._share(phase)
        return plan.refs[m * low // B : m * high // B]

    def _references(self, phase: Phase, source: Source, start: int, plans: dict[int, Plan | None]) -> Iterator[Tensor]:
        """This rank's references of every step: current samples, then planned ones. Fills `plans` as it goes."""
        mine = slice(*self._share(phase))
        for step in range(start, phase.steps):
            refs = source.references(self.ctx, phase, step)[mine]
            planned = self._planned(phase, step, plans)
            yield refs if planned is None else torch.cat([refs, planned])

    def _batches(self, phase: Phase, source: Source, start: int, plans: dict[int, Plan | None]) -> Iterator[Batch]:
        """This rank's samples of every step: current ones, then planned ones. Fills `plans` as it goes."""
        ctx = self.ctx
        if source.ahead:
            workers = ctx.train.num_workers if phase.num_workers is None else phase.num_workers
            return load_batches(ctx.frames, self._references(phase, source, start, plans), workers)
        return self._present_batches(phase, source, start, plans)

    def _present_batches(
        self, phase: Phase, source: Source, start: int, plans: dict[int, Plan | None]
    ) -> Iterator[Batch]:
        """The same, each asked for when the step before it is done: it may depend on the weights."""
        ctx, mine = self.ctx, slice(*self._share(phase))
        for step in range(start, phase.steps):
            ctx.step = step
            seed_everything("source", ctx.seed, ctx.k, phase.name, step)
            batch = source.batch(ctx, phase, step, mine)
            planned = self._planned(phase, step, plans)
            yield batch if planned is None else concat([batch, ctx.frames.fetch(planned)])

    # ---- the loop ---------------------------------------------------------------------------------
    def run(self, phase: Phase, resumed: Resumed | None = None) -> None:
        """Run one phase of the current visit, from its start or from where it was `resumed`."""
        ctx = self.ctx
        start = 0 if resumed is None else resumed.step
        ctx.phase, ctx.step = phase.name, start
        seed_everything("enter", ctx.seed, ctx.k, phase.name)
        (phase.on_enter if resumed is None else phase.on_resume)(ctx)
        ranks = ctx.world_size * (ctx.train.gradient_accumulation if phase.policy_training else 1)
        if phase.batch_size % ranks:
            raise UserError(
                f"phase {phase.name}: a batch of {phase.batch_size} cannot be shared equally by {ctx.world_size} "
                f"processes × {ranks // ctx.world_size} micro-batches; choose a multiple of {ranks}."
            )
        self.trained = {}
        optimizer = None if phase.optimizer is None else self._optimizer(phase)
        if optimizer is not None:
            self.backend.prepare(ctx.policy, optimizer, self.trained)
            if resumed is not None and resumed.optimizer is not None:
                self.backend.load_optimizer_state(optimizer, resumed.optimizer)
        compiles = ctx.train.compile and phase.policy_training
        self.loss.module = self.backend.compiled(ctx.policy) if compiles else ctx.policy
        progress = Progress(f"task {ctx.k + 1}/{len(ctx.stream.visits)} {ctx.visit.task} · {phase.name}", phase.steps,
                            self.progress_mode, start)  # fmt: skip
        last: float | None = None
        ctx.policy.train()
        ctx.policy.zero_grad(set_to_none=True)
        self.source = phase.source or Demonstrations()
        if phase.optimizer is None or optimizer is not None:
            plans: dict[int, Plan | None] = {}
            self.source.begin(ctx, phase)
            if resumed is not None:
                self.source.load_state_dict(resumed.source)
            batches = self._batches(phase, self.source, start, plans)
            log_every = phase.log_every or ctx.train.log_every
            with closing(progress.each(batches, start)) as steps:
                for step, batch in steps:
                    ctx.step = step
                    plan = plans.pop(step)
                    extra = 0 if plan is None else max(len(plan.refs), plan.added)
                    # All ranks' draws: see "slot".
                    draw = self.loss.draw(phase.batch_size + extra, ctx.generator("draw", step))
                    if optimizer is None:
                        low, high = self._share(phase)
                        numbers = self._forward_only(phase, batch, {n: v[low:high] for n, v in draw.items()})
                    else:
                        numbers = self._train_step(phase, optimizer, batch, plan, draw)
                        last = numbers.get("loss", last)
                    self.total_steps += 1
                    if numbers and (step % log_every == 0 or step == phase.steps - 1):
                        numbers = self.backend.mean_numbers(numbers)
                        self.log.event(
                            "step" if optimizer else "batch",
                            k=ctx.k,
                            task=ctx.visit.task,
                            phase=phase.name,
                            step=step,
                            **numbers,
                            total=self.total_steps,
                        )
                    progress.update(step + 1, last)
                    self.after_step(phase, step + 1, optimizer)
        self.backend.release()
        seed_everything("exit", ctx.seed, ctx.k, phase.name)
        phase.on_exit(ctx)
        progress.close(last)

    def _forward_only(self, phase: Phase, batch: Batch, draw: dict[str, Tensor]) -> dict[str, float]:
        assert phase.on_batch is not None
        self.ctx.policy.eval()
        with torch.no_grad():
            return phase.on_batch(self.ctx, batch, draw) or {}

    def _train_step(
        self,
        phase: Phase,
        optimizer: torch.optim.Optimizer,
        batch: Batch,
        plan: Plan | None,
        draw: dict[str, Tensor],
    ) -> dict[str, float]:
        ctx, algorithm = self.ctx, self.algorithm
        seed_everything("step", ctx.seed, ctx.k, phase.name, ctx.step, ctx.rank)  # dropout's draws, if any
        B = phase.batch_size
        planned = 0 if plan is None else len(plan.refs)
        # A sample that replaces a current one takes over its slot of the draw; an added one has its own.
        samples = B if plan is None else B + plan.added
        parts = ctx.train.gradient_accumulation if phase.policy_training else 1
        ctx.global_batch, ctx.planned_total = B, planned
        begin, end = self._share(phase)
        own = end - begin  # rows of the batch that are current samples; planned ones follow
        ctx.step_batch = select(batch, torch.arange(own)) if batch_size(batch) > own else batch
        factor = schedule_factor(phase.optimizer, ctx.step, phase.steps)  # type: ignore[arg-type]
        for group in optimizer.param_groups:
            group["lr"] = phase.optimizer.lr * group["factor"] * factor  # type: ignore[union-attr]
        policy_loss, penalties, bad = 0.0, dict[str, float](), ""
        for i in range(parts):
            low, high = begin + own * i // parts, begin + own * (i + 1) // parts
            ctx.positions = torch.arange(low, high)
            micro = select(batch, ctx.positions - begin)
            micro["slot"] = ctx.positions
            if plan is not None and plan.shared:
                stored, first = torch.arange(planned), 0
            else:
                stored, first = torch.arange(planned * low // B, planned * high // B), planned * begin // B
            ctx.planned = {**select(batch, own + stored - first), "slot": B + stored} if len(stored) else None
            if phase.policy_training:
                algorithm.observe(micro, ctx.k)
                micro = algorithm.modify_batch(micro, ctx.k)
            slots = micro.pop("slot")
            micro_draw = {name: value[slots] for name, value in draw.items()}
            if plan is not None and plan.weight is not None:
                each = self._each(phase, micro, micro_draw)
                loss = (each * _shares(plan, slots, B).to(each)).sum() * ctx.world_size
            else:
                if phase.loss is None:
                    loss = self.loss.total(micro, micro_draw)
                else:
                    loss = self._each(phase, micro, micro_draw).sum()
                loss = loss * ctx.world_size / samples  # gradients are averaged over ranks
            policy_loss += float(loss.detach())
            if phase.policy_training and i == parts - 1:
                for name, value in algorithm.penalties(ctx.policy).items():
                    penalties[name] = float(value.detach())
                    loss = loss + value
            if not loss.requires_grad:
                raise UserError(
                    f"phase {phase.name}: what trains ({', '.join(list(self.trained)[:3])}, …) has no influence on the "
                    "loss. Choose layers whose output the policy's actions depend on (target_modules)."
                )
            bad = bad or self._not_finite(float(loss.detach()), phase, "loss")
            self.backend.backward(loss, last=i == parts - 1)
        if ctx.train.on_nonfinite == "skip" and self.backend.any(bool(bad))[0]:
            ctx.planned, ctx.step_batch = None, {}
            return self._skip(optimizer, phase, bad or "the loss is not finite on another rank")
        if phase.policy_training:
            rows = torch.arange(own, batch_size(batch))  # planned samples, now those of the whole step
            if len(rows):
                first = 0 if plan is not None and plan.shared else planned * begin // B
                ctx.planned = {**select(batch, rows), "slot": B + first + torch.arange(len(rows))}
            algorithm.after_backward(ctx.policy, guard(self.backend.gradients(), algorithm, "gradient_edits"))
        ctx.planned, ctx.step_batch = None, {}
        norm = self.backend.clip(phase.optimizer.grad_clip)  # type: ignore[union-attr]
        bad = self._not_finite(norm, phase, "gradient")
        if bad:
            return self._skip(optimizer, phase, bad)
        self.skipped = 0
        self.backend.step(optimizer)
        if phase.policy_training:
            algorithm.after_step(ctx.policy, guard(self.backend.weights(), algorithm, "weight_edits"))
        return {
            "loss": policy_loss + sum(penalties.values()),
            "lr": float(optimizer.param_groups[0]["lr"]),
            "grad_norm": norm,
            **{f"loss/{n}": v for n, v in ({"policy": policy_loss, **penalties} if penalties else {}).items()},
        }

    def _each(self, phase: Phase, batch: Batch, draw: dict[str, Tensor]) -> Tensor:
        """Per-sample losses (n,) of a raw batch: the phase's own, or the policy's."""
        if phase.loss is None:
            return self.loss.per_sample(batch, draw)
        with self.backend.autocast():
            return phase.loss(self.ctx, batch, draw)

    def _not_finite(self, value: float, phase: Phase, what: str) -> str:
        """What is wrong with a loss or gradient norm, or ""; raises when such a thing is to end the run."""
        if math.isfinite(value):
            return ""
        ctx = self.ctx
        text = f"the {what} is {value} at task {ctx.k + 1} ({ctx.visit.task}), phase {phase.name}, step {ctx.step}"
        if ctx.train.on_nonfinite == "stop":
            raise NonFiniteLossError(f"{text}. {ADVICE}, or leave such steps out (train.on_nonfinite=skip).")
        return text

    def _skip(self, optimizer: torch.optim.Optimizer, phase: Phase, why: str) -> dict[str, float]:
        """Leave this step out: neither weights nor moments change. Raises when too many in a row are left out."""
        ctx = self.ctx
        self.backend.skip(optimizer)
        self.skipped += 1
        at = {"k": ctx.k, "task": ctx.visit.task, "phase": phase.name, "step": ctx.step}
        self.log.event("nonfinite", **at, reason=why, in_a_row=self.skipped)
        if self.skipped >= MAX_SKIPPED:
            raise NonFiniteLossError(f"{why}, and so it was for {MAX_SKIPPED} steps in a row. {ADVICE}.")
        return {}
