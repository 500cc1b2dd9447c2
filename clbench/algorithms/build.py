"""From the `algorithm` section of a configuration to a checked algorithm (or a composition of several)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from clbench.algorithms.guards import guard
from clbench.algorithms.hooks import (
    CLAIMS,
    CLAlgorithm,
    Context,
    GradientView,
    Phase,
    Plan,
    WeightView,
    check_hooks,
)
from clbench.config.reading import fit
from clbench.config.schema import CONTROL_VIEWS, Config
from clbench.data.frames import Batch
from clbench.errors import UserError, nearest
from clbench.registry import algorithm_class
from clbench.streams.stream import TaskStream


def build_algorithm(config: Config, check: bool = True) -> CLAlgorithm:
    """Build `config.algorithm`: {name: er | [er, ewc], …keys of their Config dataclasses}.

    `check=False` skips the algorithms' own checks of the whole configuration (to evaluate what was trained with it).

    Raises UserError for an unknown name or key, a value of the wrong type, a misspelt hook, or two algorithms that
    claim the same thing.
    """
    classes = algorithm_classes(config)
    names = [cls.name for cls in classes]
    section = {k: v for k, v in config.algorithm.items() if k != "name"}
    keys = {f.name: i for i, cls in enumerate(classes) for f in dataclasses.fields(cls.Config)}
    for key in section:
        if key not in keys:
            raise UserError(f"unknown key 'algorithm.{key}' for {', '.join(names)}.{nearest(key, keys)}")
    parts = []
    for cls in classes:
        own = {k: v for k, v in section.items() if k in {f.name for f in dataclasses.fields(cls.Config)}}
        parts.append(cls(_typed(cls, own)))
    for part in parts if check else ():
        part.check(config)
    for view in set(config.eval.views) - set(CONTROL_VIEWS) if check else ():
        view_overrides(config, view)
    if config.lora.enabled:
        for part in parts:
            if "structure" in part.claims:
                raise UserError(f"{part.name} adds modules of its own to the policy: set lora.enabled=false.")
    if len(parts) == 1:
        return parts[0]
    for claim in CLAIMS:
        owners = [type(p).name or type(p).__name__ for p in parts if claim in p.claims]
        if len(owners) > 1:
            raise UserError(
                f"{' and '.join(owners)} cannot be combined: both claim '{claim}' "
                f"({', '.join(CLAIMS)} may each be owned by one algorithm)."
            )
    protecting = [p.name for p in parts if p.protects_parameters]
    renewing = [p.name for p in parts if p.trains_new_parameters]
    if len(protecting) > 1:
        raise UserError(f"{' and '.join(protecting)} cannot be combined: each protects weights in its own way.")
    plain = [p.name for p in parts if p.assumes_plain_steps]
    editing = [p.name for p in parts if "gradient_edits" in p.claims]
    if plain and editing:
        raise UserError(
            f"{plain[0]} and {editing[0]} cannot be combined: {plain[0]} judges samples by a plain gradient step, "
            f"which {editing[0]} changes."
        )
    if protecting and renewing:
        raise UserError(
            f"{protecting[0]} and {renewing[0]} cannot be combined: {renewing[0]} trains new parameters for every "
            f"task, so {protecting[0]} would find nothing to protect."
        )
    return ComposedAlgorithm(parts)


def algorithm_classes(config: Config) -> list[type[CLAlgorithm]]:
    """The classes that `config.algorithm.name` names, checked for misspelt hooks."""
    names = config.algorithm["name"]
    if not isinstance(names, str) and not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
        raise UserError(f"algorithm.name must be a name or a list of names but is {names!r}.")
    names = [names] if isinstance(names, str) else names
    if not names or len(set(names)) != len(names):
        raise UserError(f"algorithm.name must be one name or a list of different names but is {names}.")
    classes: list[type[CLAlgorithm]] = []
    for name in names:
        cls = algorithm_class(str(name))
        if not (isinstance(cls, type) and issubclass(cls, CLAlgorithm)):
            raise UserError(f"algorithm '{name}' ({cls!r}) is not a subclass of clbench.algorithms.hooks.CLAlgorithm.")
        if cls.name != name:
            raise UserError(f"algorithm '{name}' is registered under a name other than its own, '{cls.name}'.")
        check_hooks(cls)
        classes.append(cls)
    return classes


def view_overrides(config: Config, name: str) -> dict[str, Any]:
    """The `algorithm` keys that evaluation view `name` sets; raises UserError when no algorithm of the run has it."""
    known: dict[str, dict[str, Any]] = {}
    for cls in algorithm_classes(config):
        known |= cls.views
    if name not in known:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise UserError(
            f"eval.views names '{name}', which is not a view of {config.algorithm['name']}: {has}. Every policy has "
            f"{' and '.join(CONTROL_VIEWS)}."
        )
    return known[name]


def _typed(cls: type[CLAlgorithm], values: dict[str, Any]) -> Any:
    hints = get_type_hints(cls.Config)
    values = {k: fit(v, hints[k], f"algorithm.{k}") for k, v in values.items()}
    try:
        node = OmegaConf.merge(OmegaConf.structured(cls.Config), values)
        return OmegaConf.to_object(node)
    except OmegaConfBaseException as e:
        raise UserError(f"algorithm.{getattr(e, 'full_key', None) or '?'} has a value of the wrong kind.") from e


class ComposedAlgorithm(CLAlgorithm):
    """Several algorithms as one: hooks in configuration order, `after_*` in reverse, penalties added."""

    name = "composed"

    def __init__(self, parts: Sequence[CLAlgorithm]) -> None:
        super().__init__(None)
        self.parts = list(parts)
        self.claims = frozenset().union(*(p.claims for p in parts))  # type: ignore[misc]

    def bind(self, ctx: Context) -> None:
        super().bind(ctx)
        for p in self.parts:
            p.bind(ctx)

    def _owner(self, claim: str) -> CLAlgorithm | None:
        return next((p for p in self.parts if claim in p.claims), None)

    def transform_stream(self, stream: TaskStream) -> TaskStream:
        for p in self.parts:
            stream = p.transform_stream(stream)
        return stream

    def on_task_start(self, ctx: Context) -> None:
        for p in self.parts:
            p.on_task_start(ctx)

    def phases(self, ctx: Context) -> Sequence[Phase]:
        return (self._owner("phases") or self.parts[0]).phases(ctx)

    def plan_batch(self, ctx: Context, step: int) -> Plan | None:
        owner = self._owner("batch_mix")
        return owner.plan_batch(ctx, step) if owner else None

    def observe(self, batch: Batch, task_id: int) -> None:
        for p in self.parts:
            p.observe(batch, task_id)

    def modify_batch(self, batch: Batch, task_id: int) -> Batch:
        for p in self.parts:
            batch = p.modify_batch(batch, task_id)
        return batch

    def compute_penalty(self, model: nn.Module) -> Tensor | None:
        penalties = list(self.penalties(model).values())
        return sum(penalties[1:], penalties[0]) if penalties else None

    def penalties(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: value for p in self.parts for name, value in p.penalties(model).items()}

    def after_backward(self, model: nn.Module, grads: GradientView) -> None:
        for p in reversed(self.parts):
            p.after_backward(model, guard(grads, p, "gradient_edits"))

    def after_step(self, model: nn.Module, weights: WeightView) -> None:
        for p in reversed(self.parts):
            p.after_step(model, guard(weights, p, "weight_edits"))

    def on_task_end(self, ctx: Context) -> None:
        for p in self.parts:
            p.on_task_end(ctx)

    def parameter_groups(self, ctx: Context) -> list[tuple[dict[str, nn.Parameter], float]] | None:
        found = [(p.name, g) for p in self.parts if (g := p.parameter_groups(ctx)) is not None]
        if len(found) > 1:
            raise UserError(f"{' and '.join(n for n, _ in found)} both set parameter groups; use one of them.")
        return found[0][1] if found else None

    def exemplar_bytes(self) -> int:
        return sum(p.exemplar_bytes() for p in self.parts)

    def state_bytes(self) -> int:
        return sum(p.state_bytes() for p in self.parts)

    def state_dict(self) -> dict[str, Any]:
        return {p.name: p.state_dict() for p in self.parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        want = {p.name for p in self.parts}
        if set(state) != want:
            raise UserError(f"the checkpoint has the state of {sorted(state)}; the run is composed of {sorted(want)}.")
        for p in self.parts:
            p.load_state_dict(state[p.name])

    def save_policy(self, policy: nn.Module, folder: Any, base_path: str) -> bool:
        owner = self._owner("structure")
        return owner.save_policy(policy, folder, base_path) if owner else False

    def restore_structure(self, policy: nn.Module, folder: Any) -> None:
        owner = self._owner("structure")
        if owner:
            owner.restore_structure(policy, folder)

    def view_key(self, task_id: int) -> str:
        return "|".join(p.view_key(task_id) for p in self.parts)

    def eval_view(self, policy: nn.Module, task_id: int) -> AbstractContextManager[None]:
        with ExitStack() as building:
            for p in self.parts:
                building.enter_context(p.eval_view(policy, task_id))
            return building.pop_all()  # type: ignore[return-value]

    def eval_diagnostics(self, policy: nn.Module) -> dict[str, Tensor]:
        merged: dict[str, Tensor] = {}
        for p in self.parts:
            merged.update(p.eval_diagnostics(policy))
        return merged
