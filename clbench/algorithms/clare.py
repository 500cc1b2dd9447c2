"""CLARE: autonomous adapter routing and expansion (Römer, Zhang, Schoellig 2026, arXiv 2601.09512).

The pretrained base is frozen. Each visit has three phases:

    detect          forward only. Per layer, z_j = mean (e_j(x) - μ_j) / σ_j of every discriminator on the new data.
                    First task: every layer expands. Later, a layer expands iff all its z_j > γ. If fewer than
                    `at_least_expand` layers do, more are forced; `maximum_expand` bounds how many may.
    adapters        the policy's loss trains the new adapters alone. A layer that did not expand uses the adapter of
                    its most similar discriminator (least mean error), which is not trained again.
    discriminators  every layer gets a new discriminator, linked to its new or its most similar adapter, and trained
                    to reconstruct the layer's input.

Acting needs no task label: per layer and sample, the discriminator with the least error picks the adapter.
Layers, errors and routing are in clbench/adapters/clare.py.

Departures from the released code, and the options that undo them: docs/algorithms/clare.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clbench.adapters.clare import (
    ClareConfig,
    ClareLayer,
    capturing,
    clare_layers,
    inject,
    load_adapter,
    read_config,
    save_adapter,
    update_config,
    z_scores,
)
from clbench.algorithms.hooks import CLAlgorithm, Context, Phase, training_phase
from clbench.config import policy_types
from clbench.config.schema import OptimizerConfig
from clbench.data.frames import Batch
from clbench.errors import UserError
from clbench.seeding import seeded

# Keys of a CLARE JSON that the paper's repository does not have, and ours that say them.
OWN_KEYS = {
    "lora_layers": "adapter_lora_layers",
    "latent_activation": "discriminator_latent_activation",
    "statistics": "discriminator_statistics",
}


def decide_expansion(
    z: Sequence[Tensor], gamma: float, at_least: int, at_most: int | None, force: str, keep: str = "most_novel"
) -> list[bool]:
    """Which layers expand. `z[l]` holds one z-score per discriminator of layer l (empty: first task).

    A layer wants to expand iff it has no discriminator or all z > γ. Fewer than `at_least` wanting layers: more are
    forced, the first ones (`force` = "shallowest"), the last ones ("deepest"), or those with the largest least z
    ("most_novel"). More than `at_most`: those with the largest least z stay (`keep` = "most_novel"), or the first ones
    ("shallowest").
    """
    novelty = [float(v.min()) if len(v) else float("inf") for v in z]
    expand = [n > gamma for n in novelty]
    by_novelty = sorted(range(len(z)), key=lambda i: -novelty[i])
    in_order = list(range(len(z)))
    order = {"shallowest": in_order, "deepest": in_order[::-1], "most_novel": by_novelty}[force]
    for i in order:
        if sum(expand) >= min(at_least, len(z)):
            break
        expand[i] = True
    first_task = all(len(v) == 0 for v in z)
    if at_most is not None and not first_task:
        for i in reversed(by_novelty if keep == "most_novel" else in_order):
            if sum(expand) <= at_most:
                break
            expand[i] = False
    return expand


class CLARE(CLAlgorithm):
    """Expanding, routed adapters on a frozen base."""

    name = "clare"
    claims = frozenset({"phases", "structure", "eval_view"})

    @dataclass
    class Config:
        """Keys of `algorithm`.

        Attributes:
            target_modules: regular expression of the layers that may expand; null = a default for known policies.
            peft_cfg_path: a CLARE JSON as in the paper's repository, or its folder; its sizes, kinds and targets
                replace the keys here.
            adapter_hidden: hidden width of an adapter.
            adapter_lora, adapter_lora_rank, adapter_lora_alpha: low-rank adapters instead.
            adapter_lora_layers: whole | linears, one low-rank product beside the layer, or one in every linear layer
                inside it, as released. Also for a JSON that does not say so.
            discriminator_hidden, discriminator_latent: widths of the autoencoders.
            discriminator_latent_activation: relu | none, before the decoder (released: none). Also for such a JSON.
            discriminator_momentum, max_batches_tracked: of the running μ and σ; null momentum = the mean of all.
            discriminator_statistics: first_batch | zero_one, what μ and σ start from (released: zero_one, and without
                momentum σ is the deviation of the batch means). Also for such a JSON.
            z_score: signed | absolute, of each sample before the mean (released: absolute).
            expand_threshold: γ.
            at_least_expand, maximum_expand: least and most layers that expand on a task (null = no bound).
            force_expand: shallowest | deepest | most_novel, which layers are forced.
            maximum_expand_keeps: most_novel | shallowest, which ones expand where more want to (released: shallowest).
            detect_steps, detect_batch_size: batches of the detection phase; null batch size = train.batch_size.
            adapter_steps, adapter_lr: of the adapters phase; null = train.steps, train.optimizer.lr.
            discriminator_steps, discriminator_batch_size, discriminator_lr, discriminator_weight_decay,
            discriminator_grad_clip: of the discriminators phase.
            detect_num_workers, discriminator_num_workers: loader processes; null = train.num_workers.
            discriminator_save_every: steps between training states; null = train.save_every_steps.
            discriminator_eval_every: 0, null, or at least discriminator_steps: a task is evaluated after its phases.
            detect_log_every, discriminator_log_every: steps between log lines.
        """

        target_modules: str | None = None
        peft_cfg_path: str | None = None
        adapter_hidden: int = 1024
        adapter_lora: bool = False
        adapter_lora_rank: int = 32
        adapter_lora_alpha: int = 32
        adapter_lora_layers: str = "whole"
        discriminator_hidden: int = 256
        discriminator_latent: int = 128
        discriminator_latent_activation: str = "relu"
        discriminator_momentum: float | None = 0.1
        discriminator_statistics: str = "first_batch"
        max_batches_tracked: int = 2000
        z_score: str = "signed"
        expand_threshold: float = 2.5
        at_least_expand: int = 1
        maximum_expand: int | None = None
        force_expand: str = "shallowest"
        maximum_expand_keeps: str = "most_novel"
        detect_steps: int = 200
        detect_batch_size: int | None = None
        detect_num_workers: int | None = None
        adapter_steps: int | None = None
        adapter_lr: float | None = None
        discriminator_steps: int = 2000
        discriminator_batch_size: int | None = None
        discriminator_lr: float = 5e-4
        discriminator_weight_decay: float = 0.01
        discriminator_grad_clip: float = 10.0
        discriminator_num_workers: int | None = None
        discriminator_save_every: int | None = None
        discriminator_eval_every: int | None = None
        detect_log_every: int = 10
        discriminator_log_every: int = 50

    @dataclass
    class _Detection:
        """Sums over the detection batches: per layer, z (J,) and mean error (J,)."""

        batches: int = 0
        z: list[Tensor] = field(default_factory=list)
        error: list[Tensor] = field(default_factory=list)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.learned = 0
        self._peft: ClareConfig | None = None
        self._layers: list[ClareLayer] = []
        self._in_task = False
        self._found = self._Detection()
        self._expanded: list[bool] = []

    @property
    def trains_new_parameters(self) -> bool:
        return True

    def check(self, config: Any) -> None:
        c = self.config
        for name in (
            "detect_steps", "discriminator_steps", "adapter_steps", "detect_batch_size", "adapter_hidden",
            "adapter_lora_rank", "discriminator_hidden", "discriminator_latent", "max_batches_tracked",
            "detect_log_every", "discriminator_log_every", "discriminator_save_every",
        ):  # fmt: skip
            value = getattr(c, name)
            if value is not None and value < 1:
                raise UserError(f"algorithm.{name} must be at least 1 but is {value}.")
        for name in ("detect_num_workers", "discriminator_num_workers", "discriminator_eval_every"):
            value = getattr(c, name)
            if value is not None and value < 0:
                raise UserError(f"algorithm.{name} must not be negative but is {value}.")
        if c.discriminator_eval_every and c.discriminator_eval_every < c.discriminator_steps:
            raise UserError(
                f"algorithm.discriminator_eval_every is {c.discriminator_eval_every}, and a task is evaluated after "
                "all its phases (clbench eval): in the middle of this one the new discriminators cannot route yet. Set "
                f"it to null, 0, or at least algorithm.discriminator_steps ({c.discriminator_steps})."
            )
        if c.discriminator_batch_size is not None and c.discriminator_batch_size < 2:
            raise UserError("algorithm.discriminator_batch_size must be at least 2: the errors' deviation is tracked.")
        for name in ("adapter_lr", "discriminator_lr"):
            value = getattr(c, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"algorithm.{name} must be positive but is {value}.")
        for name in ("discriminator_weight_decay", "discriminator_grad_clip"):
            if not 0 <= getattr(c, name) < math.inf:
                raise UserError(f"algorithm.{name} must not be negative but is {getattr(c, name)}.")
        if not math.isfinite(c.expand_threshold):
            raise UserError(f"algorithm.expand_threshold must be a finite number but is {c.expand_threshold}.")
        if c.at_least_expand < 0 or (c.maximum_expand is not None and c.maximum_expand < c.at_least_expand):
            raise UserError(
                f"algorithm.at_least_expand ({c.at_least_expand}) must be at least 0 and at most "
                f"algorithm.maximum_expand ({c.maximum_expand})."
            )
        for name, known in (
            ("force_expand", ("shallowest", "deepest", "most_novel")),
            ("maximum_expand_keeps", ("most_novel", "shallowest")),
            ("z_score", ("signed", "absolute")),
            ("adapter_lora_layers", ("whole", "linears")),
            ("discriminator_latent_activation", ("relu", "none")),
            ("discriminator_statistics", ("first_batch", "zero_one")),
        ):
            value = getattr(c, name)
            if value not in known:
                raise UserError(f"algorithm.{name} is '{value}' but must be one of {', '.join(known)}.")
        if config.train.optimizer_across_tasks == "carried":
            raise UserError("clare trains new parameters for every task: train.optimizer_across_tasks must be fresh.")
        self._peft = self._peft_config(policy_types.type_of(config.policy) or "")

    def _peft_config(self, policy_type: str) -> ClareConfig:
        c = self.config
        if c.peft_cfg_path is not None:
            config = read_config(Path(c.peft_cfg_path))
            for section, key, value in (
                (config.func_adapter_cfg, "lora_layers", c.adapter_lora_layers),
                (config.discriminator_cfg, "latent_activation", c.discriminator_latent_activation),
                (config.discriminator_cfg, "statistics", c.discriminator_statistics),
            ):
                section[key] = value if value != getattr(self.Config, OWN_KEYS[key]) else section[key]
            return replace(config)  # checks it again
        target = c.target_modules or policy_types.clare_targets(policy_type)
        if not target:
            raise UserError(
                f"clare has no default layers for policy '{policy_type}': set algorithm.target_modules to a regular "
                f"expression over module names. Known: {', '.join(policy_types.with_clare())}."
            )
        batch_first = bool(c.target_modules) or not policy_types.time_first(policy_type)
        return ClareConfig(
            target_modules=target,
            batch_first=batch_first,
            discriminator_cfg={
                "batch_first": batch_first,
                "hidden_dim": c.discriminator_hidden,
                "latent_dim": c.discriminator_latent,
                "latent_activation": c.discriminator_latent_activation,
                "use_momentum": c.discriminator_momentum is not None,
                "momentum": 0.1 if c.discriminator_momentum is None else c.discriminator_momentum,
                "statistics": c.discriminator_statistics,
                "max_batches_tracked": c.max_batches_tracked,
            },
            func_adapter_cfg={
                "hidden_dim": c.adapter_hidden,
                "use_lora": c.adapter_lora,
                "lora_rank": c.adapter_lora_rank,
                "lora_alpha": c.adapter_lora_alpha,
                "lora_layers": c.adapter_lora_layers,
            },
        )

    # ---- training -------------------------------------------------------------------------------
    def on_task_start(self, ctx: Context) -> None:
        if not self._layers:
            assert self._peft is not None  # made by check
            self._layers = inject(ctx.policy, self._peft)
        self._in_task, self._found, self._expanded = True, self._Detection(), []

    def phases(self, ctx: Context) -> Sequence[Phase]:
        c = self.config
        train = training_phase(ctx)
        assert train.optimizer is not None
        adapters = replace(
            train,
            name="adapters",
            steps=train.steps if c.adapter_steps is None else c.adapter_steps,
            optimizer=replace(train.optimizer, lr=train.optimizer.lr if c.adapter_lr is None else c.adapter_lr),
            parameters=lambda: self._new_parameters("adapters"),
            on_enter=self._expand,
        )
        discriminators = Phase(
            "discriminators",
            c.discriminator_steps,
            train.batch_size if c.discriminator_batch_size is None else c.discriminator_batch_size,
            OptimizerConfig(
                lr=c.discriminator_lr,
                weight_decay=c.discriminator_weight_decay,
                grad_clip=c.discriminator_grad_clip,
                schedule="constant",
                warmup_steps=0,
            ),
            policy_training=False,
            loss=self._reconstruction,
            parameters=lambda: self._new_parameters("discriminators"),
            on_enter=self._add_discriminators,
            on_exit=self._finish,
            log_every=c.discriminator_log_every,
            num_workers=c.discriminator_num_workers,
            save_every=c.discriminator_save_every,
        )
        if ctx.k == 0 and not any(layer.discriminators for layer in self._layers):
            return [adapters, discriminators]  # nothing to compare the first task with
        detect = Phase(
            "detect",
            c.detect_steps,
            train.batch_size if c.detect_batch_size is None else c.detect_batch_size,
            None,
            policy_training=False,
            on_batch=self._detect,
            log_every=c.detect_log_every,
            num_workers=c.detect_num_workers,
        )
        return [detect, adapters, discriminators]

    def _inputs(self, ctx: Context, batch: Batch, draw: dict[str, Tensor]) -> dict[str, Tensor]:
        ctx.policy.eval()
        with torch.no_grad(), capturing(self._layers) as capture:
            ctx.forward(batch, draw)
        return capture.inputs

    def _detect(self, ctx: Context, batch: Batch, draw: dict[str, Tensor]) -> dict[str, float]:
        inputs = self._inputs(ctx, batch, draw)
        found = self._found
        for i, layer in enumerate(self._layers):
            errors_JB = ctx.gather(layer.errors(inputs[layer.name]).T).T  # of the global batch
            mean = torch.stack([d.mean for d in layer.discriminators])  # type: ignore[misc]
            std = torch.stack([d.std for d in layer.discriminators])  # type: ignore[misc]
            error = errors_JB.mean(1)
            z = z_scores(errors_JB, mean, std, self.config.z_score == "absolute")
            if found.batches == 0:
                found.z.append(z)
                found.error.append(error)
            else:  # after a stop the sums are on the CPU
                found.z[i] = found.z[i].to(z) + z
                found.error[i] = found.error[i].to(error) + error
        found.batches += 1
        return {"novelty": max(float(z.min()) for z in found.z) / found.batches}

    def _expand(self, ctx: Context) -> None:
        c, found, layers = self.config, self._found, self._layers
        n = max(found.batches, 1)
        z = [v / n for v in found.z] if found.batches else [torch.empty(0) for _ in layers]
        self._expanded = decide_expansion(z, c.expand_threshold, c.at_least_expand, c.maximum_expand, c.force_expand,
                                          c.maximum_expand_keeps)  # fmt: skip
        with seeded(ctx.seed, ctx.k, "clare-adapters"):
            for i, layer in enumerate(layers):
                if self._expanded[i]:
                    layer.add_adapter()
                    layer.forced = len(layer.adapters) - 1
                else:
                    layer.forced = layer.links[int(found.error[i].argmin())]
        ctx.log(
            "clare_expansion",
            z={layer.name: v.tolist() for layer, v in zip(layers, z, strict=True)},
            expanded={layer.name: e for layer, e in zip(layers, self._expanded, strict=True)},
            adapter={layer.name: layer.forced for layer in layers},
        )

    def _add_discriminators(self, ctx: Context) -> None:
        with seeded(ctx.seed, ctx.k, "clare-discriminators"):
            for layer in self._layers:
                assert layer.forced is not None  # set by _expand
                layer.add_discriminator(layer.forced)

    def _new_parameters(self, kind: str) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for i, layer in enumerate(self._layers):
            if kind == "adapters" and not self._expanded[i]:
                continue
            newest = getattr(layer, kind)[-1]
            found |= {f"{layer.name}.{kind}.{n}": p for n, p in newest.named_parameters()}
        return found

    def _reconstruction(self, ctx: Context, batch: Batch, draw: dict[str, Tensor]) -> Tensor:
        """Σ over layers of the new discriminator's error, per sample (B,); folds the errors into its μ and σ."""
        inputs = self._inputs(ctx, batch, draw)
        total: Tensor | None = None
        for layer in self._layers:
            newest: Any = layer.discriminators[-1]
            error_B = newest.training_loss(inputs[layer.name].float())
            newest.track(ctx.gather(error_B.detach()))
            total = error_B if total is None else total + error_B
        assert total is not None
        return total

    def _finish(self, ctx: Context) -> None:
        for layer in self._layers:
            layer.forced = None

    def on_task_end(self, ctx: Context) -> None:
        self.learned += 1
        self._in_task = False
        ctx.policy.requires_grad_(False)
        ctx.log(
            "clare_structure",
            adapters={layer.name: len(layer.adapters) for layer in self._layers},
            discriminators={layer.name: len(layer.discriminators) for layer in self._layers},
            links={layer.name: list(layer.links) for layer in self._layers},
            error_mean={
                layer.name: [float(d.mean) for d in layer.discriminators]  # type: ignore[arg-type]
                for layer in self._layers
            },
            error_std={
                layer.name: [float(d.std) for d in layer.discriminators]  # type: ignore[arg-type]
                for layer in self._layers
            },
        )

    # ---- checkpoints and evaluation -------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"learned": self.learned}
        if self._in_task:
            found = {"batches": self._found.batches, "z": self._found.z, "error": self._found.error}
            forced = [layer.forced for layer in self._layers]
            state["task"] = {"found": found, "expanded": self._expanded, "forced": forced}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state) - {"task"} != {"learned"}:
            raise UserError(f"the checkpoint's state of clare should hold 'learned', holds {sorted(state)}.")
        self.learned = int(state["learned"])
        if "task" in state:  # in the middle of one
            self._in_task, self._expanded = True, list(state["task"]["expanded"])
            found = state["task"]["found"]
            self._found = self._Detection(found["batches"], list(found["z"]), list(found["error"]))
            for layer, forced in zip(self._layers, state["task"]["forced"], strict=True):
                layer.forced = forced

    def save_policy(self, policy: nn.Module, folder: Any, base_path: str) -> bool:
        if not self._layers or self._peft is None:
            return False
        update_config(self._peft, self._layers, self.learned)
        save_adapter(policy, self._peft, Path(folder), base_path)
        return True

    def restore_structure(self, policy: nn.Module, folder: Any) -> None:
        if (Path(folder) / "adapter_config.json").is_file():
            if not clare_layers(policy):
                self._peft = load_adapter(policy, Path(folder))
            self._layers = clare_layers(policy)

    @contextmanager
    def eval_view(self, policy: nn.Module, task_id: int) -> Iterator[None]:
        forced = [layer.forced for layer in self._layers]
        for layer in self._layers:
            layer.forced = None
        try:
            yield
        finally:
            for layer, f in zip(self._layers, forced, strict=True):
                layer.forced = f

    def eval_diagnostics(self, policy: nn.Module) -> dict[str, Tensor]:
        return {layer.name: layer.route for layer in clare_layers(policy) if layer.route is not None}
