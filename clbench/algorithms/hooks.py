"""The protocol between the trainer and continual-learning algorithms.

    for k, visit in enumerate(stream):
        algorithm.on_task_start(ctx)                           # once per visit, on every rank
        for phase in algorithm.phases(ctx):                    # default: one, "train", the policy's own loss
            phase.on_enter(ctx)                                # structure may change; the optimizer is built after it
            for step in range(phase.steps):
                for micro_batch in accumulation:
                    algorithm.observe(batch, task_id)          # read only
                    batch = algorithm.modify_batch(batch, task_id)      # raw samples; planned ones are in ctx.planned
                    loss = phase.loss(ctx, batch) + Σ algorithm.compute_penalty(model)
                    backward(loss)
                algorithm.after_backward(model, grads)         # before clipping and stepping; mean gradients, writable
                step()
                algorithm.after_step(model, weights)           # re-freeze, average
            phase.on_exit(ctx)
        algorithm.on_task_end(ctx)                             # fill buffers, consolidate
        checkpoint(k)

A run may stop after any step and go on from there (checkpoints/training_state.py): on_task_start and on_enter are not
called again, but state_dict's contents are back, and phases(ctx) is asked anew.

The per-step hooks (`observe`, `modify_batch`, `compute_penalty`, `after_backward`, `after_step`) run only in phases
marked `policy_training`. Every hook is a no-op by default. `task_id` is the visit index k. `model` is the policy.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from clbench.checkpoints.state import tensor_bytes
from clbench.config.schema import OptimizerConfig, TrainConfig
from clbench.data.frames import Batch, StreamFrames
from clbench.errors import UserError
from clbench.policies.loss import PolicyLoss
from clbench.seeding import generator
from clbench.streams.stream import TaskStream, Visit

# Overriding such a method is claiming what it decides.
CLAIMED_BY = {
    "phases": "phases",
    "plan_batch": "batch_mix",
    "transform_stream": "stream",
    "save_policy": "structure",
    "restore_structure": "structure",
    "eval_view": "eval_view",
}

# What an algorithm may own alone. Two algorithms of a composition that claim the same thing are refused.
CLAIMS = ("batch_mix", "gradient_edits", "phases", "structure", "eval_view", "stream")


class GradientView(Protocol):
    """Gradients between backward and step, averaged over ranks and micro-batches. Every rank must make equal calls."""

    def names(self) -> Sequence[str]: ...
    def get(self, name: str) -> Tensor | None: ...
    def set(self, name: str, value: Tensor) -> None: ...


class WeightView(Protocol):
    """Weights after the step. `set` writes every copy that training keeps; `set_where` only where `mask` is true."""

    def names(self) -> Sequence[str]: ...
    def get(self, name: str) -> Tensor: ...
    def set(self, name: str, value: Tensor) -> None: ...
    def set_where(self, name: str, mask: Tensor, value: Tensor) -> None: ...


class Collective(Protocol):
    """What ranks do together. Every rank must make equal calls; with one process nothing happens."""

    def sum(self, tensors: Sequence[Tensor]) -> None: ...
    def gather(self, tensor: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Plan:
    """Stored samples that a step needs, and by how much its batch grows.

    Attributes:
        refs: (m, 2) references (visit, index); read with the batch, they arrive in `ctx.planned`.
        added: samples that modify_batch adds to the global batch (0 = it replaces current ones).
        shared: every micro-batch is given all of them, not its share (for what is chosen from them once).
    """

    refs: Tensor
    added: int = 0
    shared: bool = False


@dataclass
class Context:
    """What a hook may know. Read only: the trainer updates it, hooks do not.

    Attributes:
        stream, visit, k: the stream, the current visit and its index.
        phase, step: name of the phase and optimizer step in it.
        policy: the (unwrapped) policy.
        frames: samples of all visits (`fetch`, `length`).
        train: training settings.
        seed: the run's seed.
        rank, world_size, device: where this process stands.
        planned: this micro-batch's planned samples, raw, or None.
        positions: (n,) positions of this micro-batch's samples in the step's global batch.
        global_batch: current samples of the step over all ranks and micro-batches.
        policy_loss: the policy's losses and gradients (clbench.policies.loss).
        planned_total: planned samples of the whole step.
        step_batch: this rank's current samples of the whole step, raw.
        collective: sums and gathers over ranks.
        base_path: folder of the policy the run started from.
        log: write one event to the run's log.
    """

    stream: TaskStream
    policy: nn.Module
    frames: StreamFrames
    train: TrainConfig
    seed: int
    device: torch.device
    policy_loss: PolicyLoss
    log: Callable[..., None]
    base_path: str = ""
    rank: int = 0
    world_size: int = 1
    k: int = 0
    phase: str = ""
    step: int = 0
    planned: Batch | None = None
    positions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    global_batch: int = 0
    planned_total: int = 0
    step_batch: Batch = field(default_factory=dict)
    collective: Collective | None = None

    @property
    def visit(self) -> Visit:
        return self.stream.visits[self.k]

    def generator(self, *purpose: int | str) -> torch.Generator:
        """A generator that depends on (seed, k, phase, purpose) alone. Add the step where it matters."""
        return generator(self.seed, self.k, self.phase, *purpose)

    def draw(self, n: int, gen: torch.Generator) -> dict[str, Tensor]:
        """Noise and timesteps for n samples, from `gen`."""
        return self.policy_loss.draw(n, gen)

    def loss(self, batch: Batch, draw: dict[str, Tensor]) -> Tensor:
        """The policy's per-sample loss (n,) on a raw batch under `draw`."""
        return self.policy_loss.per_sample(batch, draw)

    def forward(self, batch: Batch, draw: dict[str, Tensor]) -> Tensor:
        """The policy's loss summed over a raw batch, in one forward pass whatever the policy."""
        return self.policy_loss.total(batch, draw)

    def share(self, n: int) -> slice:
        """This rank's part of n things that all ranks divide among them."""
        return slice(n * self.rank // self.world_size, n * (self.rank + 1) // self.world_size)

    def gather(self, tensor: Tensor) -> Tensor:
        """All ranks' tensors (of equal shapes), joined along dimension 0 in the order of the global batch."""
        return tensor if self.collective is None else self.collective.gather(tensor)

    def mean_gradient(self, gen: torch.Generator, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """∇ of the mean loss of the step's current samples (all ranks'), by name, under a draw from `gen`."""
        mine = self.share(self.global_batch)
        draw = {n: v[mine] for n, v in self.draw(self.global_batch, gen).items()}
        parts = self.train.gradient_accumulation
        found = self.policy_loss.mean_gradient(self.step_batch, draw, parameters, parts)
        if self.collective is not None:
            self.collective.sum(list(found.values()))
        return {n: g / self.world_size for n, g in found.items()}

    def squared_gradients(
        self, refs: Tensor, gen: torch.Generator, parameters: Mapping[str, nn.Parameter]
    ) -> dict[str, Tensor]:
        """Σ over the samples `refs` (n, 2) of the squared per-sample gradient, by name (fp32).

        Under a draw from `gen`. Ranks divide the samples among them and all get the sum.
        """
        mine = self.share(len(refs))
        draw = {n: v[mine] for n, v in self.draw(len(refs), gen).items()}
        found = self.policy_loss.squared_gradients(self.frames.fetch(refs[mine]), draw, parameters)
        if self.collective is not None:
            self.collective.sum(list(found.values()))
        return found


def _nothing(ctx: Context) -> None:
    """A phase that does nothing on entering or leaving."""


@dataclass
class Phase:
    """A stretch of steps with one objective.

    Attributes:
        name: shown in logs and used in random seeds; unique within a task.
        steps: optimizer steps (or batches of a forward-only phase).
        batch_size: samples per step over all ranks.
        optimizer: learning rate, schedule, clipping; null for a forward-only phase.
        policy_training: the algorithm's per-step hooks run here.
        loss: `(ctx, batch, draw) -> (n,)` per-sample losses; null = the policy's own.
        on_batch: `(ctx, batch, draw)`, what a forward-only phase does instead of a loss and a step; may return numbers
            to log.
        parameters: names → parameters that train; null = every parameter that requires a gradient.
        on_enter, on_exit: structure changes go into on_enter; the optimizer is built after it.
        on_resume: called instead of on_enter when a run goes on in the middle of this phase, after structure, weights
            and the algorithm's state_dict are back; for what can be worked out from those.
        log_every: steps between log lines; null = the run's.
    """

    name: str
    steps: int
    batch_size: int
    optimizer: OptimizerConfig | None
    policy_training: bool = True
    loss: Callable[[Context, Batch, dict[str, Tensor]], Tensor] | None = None
    on_batch: Callable[[Context, Batch, dict[str, Tensor]], dict[str, float] | None] | None = None
    parameters: Callable[[], dict[str, nn.Parameter]] | None = None
    on_enter: Callable[[Context], None] = _nothing
    on_exit: Callable[[Context], None] = _nothing
    on_resume: Callable[[Context], None] = _nothing
    log_every: int | None = None


def training_phase(ctx: Context) -> Phase:
    """The default phase: the policy's own loss with the run's training settings."""
    return Phase("train", ctx.train.steps, ctx.train.batch_size, ctx.train.optimizer)


class CLAlgorithm:
    """Base class: every hook is a no-op. See the module's docstring for the order of calls.

    Subclasses set `name`, `Config` (a dataclass: its fields are the algorithm's YAML keys) and `claims`.
    `self.config` holds the checked configuration, `self.ctx` the context (from the first hook on).
    """

    name: ClassVar[str] = ""
    claims: ClassVar[frozenset[str]] = frozenset()
    # Overrides of `algorithm` under which a run can also be evaluated, by name (see evaluation/evaluate.py).
    views: ClassVar[dict[str, dict[str, Any]]] = {}
    # Does it protect parameters from task to task? Then every task must train the same ones.
    protects_parameters: ClassVar[bool] = False
    # Does it reckon with steps along the plain gradient? Then nobody else may edit gradients.
    assumes_plain_steps: ClassVar[bool] = False

    @dataclass
    class Config:
        """No keys."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.ctx: Context

    @property
    def trains_new_parameters(self) -> bool:
        """Whether every task trains parameters of its own, which no later task changes."""
        return False

    # ---- before anything is built ---------------------------------------------------------------
    def check(self, config: Any) -> None:
        """Raise UserError for settings that cannot work together; `config` is the whole run's (clbench.config)."""

    def transform_stream(self, stream: TaskStream) -> TaskStream:
        """Return the stream to train on (claim "stream")."""
        return stream

    def bind(self, ctx: Context) -> None:
        """Called once, before the first hook."""
        self.ctx = ctx

    # ---- the hooks ------------------------------------------------------------------------------
    def on_task_start(self, ctx: Context) -> None:
        """Once per visit, before its phases."""

    def phases(self, ctx: Context) -> Sequence[Phase]:
        """The phases of this visit (claim "phases" to change them)."""
        return [training_phase(ctx)]

    def plan_batch(self, ctx: Context, step: int) -> Plan | None:
        """Stored samples that `step` will mix in (claim "batch_mix").

        Must depend on (ctx.seed, ctx.k, ctx.phase, step) and state fixed during a phase only: it is asked ahead of
        time, so that loaders can prefetch.
        """
        return None

    def observe(self, batch: Batch, task_id: int) -> None:
        """See each micro-batch of current samples before anything is mixed in. Read only."""

    def modify_batch(self, batch: Batch, task_id: int) -> Batch:
        """Return the micro-batch to train on. Row i of the result is the sample for slot `batch["slot"][i]`."""
        return batch

    def compute_penalty(self, model: nn.Module) -> Tensor | None:
        """A scalar added to the loss, once per optimizer step; None = no penalty."""
        return None

    def after_backward(self, model: nn.Module, grads: GradientView) -> None:
        """Once per optimizer step, before clipping; mean gradients, readable and writable."""

    def after_step(self, model: nn.Module, weights: WeightView) -> None:
        """Once per optimizer step, after it."""

    def on_task_end(self, ctx: Context) -> None:
        """Once per visit, after its phases and before its checkpoint."""

    # ---- what trains, what is stored ------------------------------------------------------------
    def parameter_groups(self, ctx: Context) -> list[tuple[dict[str, nn.Parameter], float]] | None:
        """Groups of named parameters with a factor on the learning rate each; null = one group of all."""
        return None

    def exemplar_bytes(self) -> int:
        """Bytes of past data that the algorithm keeps (or refers to), uncompressed."""
        return 0

    def state_bytes(self) -> int:
        """Bytes that the algorithm keeps beside the policy and its exemplars: anchors, masks, references."""
        return tensor_bytes(self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings and nested dicts/lists of them: all that resuming and evaluating need.

        Asked after a task and, for a training state, after any step in the middle of one.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`. A missing or unknown key is an error."""
        if state:
            raise UserError(f"algorithm '{self.name}' keeps no state, but the checkpoint has {sorted(state)}.")

    def save_policy(self, policy: nn.Module, folder: Any, base_path: str) -> bool:
        """Write the policy as an adapter over its base into `folder`; False = save all of its weights instead.

        All weights are saved without LoRA layers; an algorithm that has such in the middle of a task adds them here.
        """
        return False

    def restore_structure(self, policy: nn.Module, folder: Any) -> None:
        """Rebuild what the algorithm added to the policy from the checkpoint in `folder`, with its weights."""

    # ---- evaluation -----------------------------------------------------------------------------
    def view_key(self, task_id: int) -> str:
        """What must be equal for episodes of two tasks to be evaluated in one batch."""
        return ""

    def eval_view(self, policy: nn.Module, task_id: int) -> AbstractContextManager[None]:
        """The policy as it is to be evaluated on column `task_id`; restores it on leaving.

        Tasks outside the stream have a `task_id` past every column.
        """
        return nullcontext()

    def eval_diagnostics(self, policy: nn.Module) -> dict[str, Tensor]:
        """After a policy call: named integers per row (n,), counted per episode (e.g. the chosen adapter)."""
        return {}


HOOKS = frozenset(n for n, f in vars(CLAlgorithm).items() if callable(f) and not n.startswith("_") and n != "Config")


def check_hooks(cls: type[CLAlgorithm]) -> None:
    """Raise UserError for a method that looks like a misspelt hook, or a hook with other parameters.

    A public method that is no hook is a mistake if its name is close to one or starts like one; helpers are free
    to have any other name, and any name with a leading underscore.
    """
    for owner in cls.__mro__:
        if owner in (CLAlgorithm, object) or not issubclass(owner, CLAlgorithm):
            continue
        for name, value in vars(owner).items():
            if name.startswith("_") or not inspect.isfunction(value):
                continue
            if name not in HOOKS:
                close = difflib.get_close_matches(name, HOOKS, n=1, cutoff=0.75)
                if close or name.startswith(("on_", "before_", "after_", "modify_", "compute_")):
                    hint = f" Did you mean '{close[0]}'?" if close else f" Hooks: {', '.join(sorted(HOOKS))}."
                    raise UserError(
                        f"{owner.__name__}.{name} is not a hook and would never be called.{hint} "
                        "(A helper's name may start with an underscore.)"
                    )
                continue
            claim = CLAIMED_BY.get(name)
            if claim is not None and claim not in cls.claims:
                raise UserError(f"{owner.__name__} overrides {name} and so must claim '{claim}' in `claims`.")
            want = list(inspect.signature(getattr(CLAlgorithm, name)).parameters)
            have = list(inspect.signature(value).parameters)
            if have != want:
                raise UserError(
                    f"{owner.__name__}.{name}({', '.join(have)}) must take ({', '.join(want)}), as it is called."
                )


def stands_alone(name: str, config: Any) -> None:
    """Raise UserError when a stream transform is combined with other algorithms: there is no sequence to act on."""
    names = config.algorithm.get("name")
    if not isinstance(names, str) and len(names) > 1:
        raise UserError(f"{name} cannot be combined with other algorithms ({', '.join(map(str, names))}).")


def iterate_named(policy: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Named parameters that train."""
    return ((n, p) for n, p in policy.named_parameters() if p.requires_grad)
