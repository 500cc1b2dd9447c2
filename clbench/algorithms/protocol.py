"""The protocol between the trainer and continual-learning algorithms.

    for k, visit in enumerate(stream):
        algorithm.on_task_start(ctx)                           # once per visit, on every rank
        for phase in algorithm.phases(ctx):                    # default: one, "train", the policy's own loss
            phase.on_enter(ctx)                                # structure may change; the optimizer is built after it
            for step in range(phase.steps):                    # samples come from phase.source
                for micro_batch in accumulation:
                    algorithm.observe(batch, task_id)          # read only
                    batch = algorithm.modify_batch(batch, task_id)      # raw samples; planned ones are in ctx.planned
                    loss = phase.loss(ctx, batch) + Σ algorithm.compute_penalty(model)
                    backward(loss)
                algorithm.after_backward(model, grads)         # before clipping and stepping; mean gradients
                step()
                algorithm.after_step(model, weights)           # re-freeze, average
            phase.on_exit(ctx)
        algorithm.on_task_end(ctx)                             # fill buffers, consolidate
        checkpoint(k)

A run may stop after any step and resume from there (checkpoints/training_state.py): on_task_start and on_enter are not
called again, but the contents of state_dict are restored, and phases(ctx) is called again.

The per-step hooks (`observe`, `modify_batch`, `compute_penalty`, `after_backward`, `after_step`) run only in phases
marked `policy_training`. Every hook is a no-op by default. `task_id` is the visit index k. `model` is the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from clbench.algorithms.context import Context
from clbench.algorithms.sources import Source
from clbench.config.schema import OptimizerConfig
from clbench.data.frames import Batch
from clbench.errors import UserError
from clbench.streams.stream import TaskStream
from clbench.tensor_files import tensor_bytes


class GradientView(Protocol):
    """Gradients between backward and step, averaged over ranks and micro-batches. Every rank must make the same calls.

    Writing takes the claim "gradient_edits"; without it `get` gives copies and `set` raises UserError.
    """

    def names(self) -> Sequence[str]: ...
    def get(self, name: str) -> Tensor | None: ...
    def set(self, name: str, value: Tensor) -> None: ...


class WeightView(Protocol):
    """Weights after the step. `set` writes every copy that training keeps; `set_where` only where `mask` is true.

    Writing takes the claim "weight_edits"; without it `get` gives copies and `set` raises UserError.
    """

    def names(self) -> Sequence[str]: ...
    def get(self, name: str) -> Tensor: ...
    def set(self, name: str, value: Tensor) -> None: ...
    def set_where(self, name: str, mask: Tensor, value: Tensor) -> None: ...


@dataclass(frozen=True)
class Plan:
    """Stored samples that a step needs, and by how much its batch grows.

    Attributes:
        refs: (m, 2) references (visit, index); read with the batch, they arrive in `ctx.planned`.
        added: samples that modify_batch adds to the global batch (0 = it replaces current ones).
        weight: null = planned samples count like current ones: the loss is the mean over all. Otherwise a factor w, or
            one for each planned sample (m,), and the loss is  mean over current ones of ℓ + mean over i of w_i ℓ_i
            (all planned samples must then be added).
        shared: every micro-batch gets all of them, not just its share (for a choice made once among all of them).
    """

    refs: Tensor
    added: int = 0
    shared: bool = False
    weight: float | Tensor | None = None

    def __post_init__(self) -> None:
        if self.weight is None:
            return
        if self.added != len(self.refs) or self.shared:
            raise ValueError("planned samples with weights must be added, each by its own rank: set added=len(refs).")
        if torch.is_tensor(self.weight) and self.weight.shape != (len(self.refs),):
            raise ValueError(f"{len(self.refs)} planned samples have weights of shape {tuple(self.weight.shape)}.")


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
        on_resume: called instead of on_enter when a run resumes in the middle of this phase, after structure, weights
            and the algorithm's state_dict are restored; for what can be derived from those.
        log_every: steps between log lines; null = the run's.
        num_workers: loader processes; null = the run's.
        save_every: steps of this phase between training states; null = the run's train.save_every_steps.
        source: where the samples come from (sources.py); null = the visit's demonstrations.
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
    num_workers: int | None = None
    save_every: int | None = None
    source: Source | None = None


def training_phase(ctx: Context) -> Phase:
    """The default phase: the policy's own loss with the run's training settings."""
    return Phase("train", ctx.train.steps, ctx.train.batch_size, ctx.train.optimizer)


class CLAlgorithm:
    """Base class: every hook is a no-op. See the module's docstring for the order of calls.

    Subclasses set `name`, `Config` (a dataclass: its fields are the algorithm's YAML keys), `claims`, and in `state`
    the attributes that checkpoints hold.
    `self.config` holds the checked configuration, `self.ctx` the context (from the first hook on).
    """

    name: ClassVar[str] = ""
    claims: ClassVar[frozenset[str]] = frozenset()
    # The attributes that make up the algorithm's state: what state_dict returns and load_state_dict sets.
    state: ClassVar[tuple[str, ...]] = ()
    # Overrides of `algorithm` under which a run can also be evaluated, by name (see evaluation/evaluate.py).
    views: ClassVar[dict[str, dict[str, Any]]] = {}
    # Does it protect parameters from task to task? Then every task must train the same ones.
    protects_parameters: ClassVar[bool] = False
    # Does it assume steps along the plain gradient? Then no other algorithm may edit gradients.
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

        Must depend only on (ctx.seed, ctx.k, ctx.phase, step) and state fixed during a phase: it is called ahead of
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

    def penalties(self, model: nn.Module) -> dict[str, Tensor]:
        """`compute_penalty` by the algorithm's name, for the log."""
        value = self.compute_penalty(model)
        return {} if value is None else {self.name: value}

    def after_backward(self, model: nn.Module, grads: GradientView) -> None:
        """Once per optimizer step, before clipping; mean gradients (claim "gradient_edits" to write them)."""

    def after_step(self, model: nn.Module, weights: WeightView) -> None:
        """Once per optimizer step, after it (claim "weight_edits" to write weights)."""

    def on_task_end(self, ctx: Context) -> None:
        """Once per visit, after its phases and before its checkpoint."""

    # ---- what trains, what is stored ------------------------------------------------------------
    def parameter_groups(self, ctx: Context) -> list[tuple[dict[str, nn.Parameter], float]] | None:
        """Groups of named parameters, each with a learning-rate factor; null = one group of all."""
        return None

    def exemplar_bytes(self) -> int:
        """Bytes of past data that the algorithm keeps (or refers to), uncompressed."""
        return 0

    def state_bytes(self) -> int:
        """Bytes that the algorithm keeps beside the policy and its exemplars: anchors, masks, references."""
        return tensor_bytes(self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings and nested dicts/lists of them: all that resuming and evaluating need.

        Called after a task and, for a training state, after any step in the middle of one. The default: the attributes
        that `state` names.
        """
        return {name: getattr(self, name) for name in self.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`. A missing or unknown key is an error.

        Tensors kept under parameters' names have been checked against their shapes and moved to their devices
        (state.py); all other tensors are on the CPU.
        """
        if set(state) != set(self.state):
            keeps = f"should hold {sorted(self.state)}" if self.state else "should be empty"
            raise UserError(f"the checkpoint's state of {self.name} {keeps} but holds {sorted(state)}.")
        for name in self.state:
            setattr(self, name, state[name])

    def save_policy(self, policy: nn.Module, folder: Any, base_path: str) -> bool:
        """Write the policy as an adapter over its base into `folder`; False = save all of its weights instead.

        All weights are saved without LoRA layers; an algorithm that has any in the middle of a task adds them here.
        """
        return False

    def restore_structure(self, policy: nn.Module, folder: Any) -> None:
        """Rebuild what the algorithm added to the policy from the checkpoint in `folder`, with its weights."""

    # ---- evaluation -----------------------------------------------------------------------------
    def view_key(self, task_id: int) -> str:
        """A key: episodes of two tasks can share an evaluation batch only if their keys are equal."""
        return ""

    def eval_view(self, policy: nn.Module, task_id: int) -> AbstractContextManager[None]:
        """The policy as it is to be evaluated on column `task_id`; restored on exit.

        Tasks outside the stream have a `task_id` past every column.
        """
        return nullcontext()

    def eval_diagnostics(self, policy: nn.Module) -> dict[str, Tensor]:
        """After a policy call: named integers per row (n,), counted per episode (e.g. the chosen adapter)."""
        return {}
