"""Trainer: the visits of a stream, each with its phases, then its checkpoint. Read this with algorithms/protocol.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clbench.adapters import lora
from clbench.algorithms.hooks import CLAlgorithm, Context, Phase
from clbench.algorithms.state import restore_state
from clbench.checkpoints.base import write_adapter_base
from clbench.checkpoints.kept import WeightKeeper
from clbench.checkpoints.mean_images import write_mean_images
from clbench.checkpoints.policy_io import LoadedPolicy, keep_in_dtype, load_policy, pick_device, save_policy
from clbench.checkpoints.run_folder import checkpoint_folder, save_checkpoint
from clbench.checkpoints.state import load_state, save_state
from clbench.checkpoints.training_state import Position, StateKeeper
from clbench.checkpoints.whole import DESCRIPTION
from clbench.config.compose import to_dict
from clbench.config.policy_types import BF16, kept_in
from clbench.config.schema import Config
from clbench.data.frames import StreamFrames
from clbench.errors import Interrupted, UserError
from clbench.io import read_json
from clbench.patience import patience
from clbench.policies import draws
from clbench.policies.augment import Augmentation, centre_crop, set_training
from clbench.policies.features import FrozenFeatures
from clbench.policies.view import PolicyView
from clbench.seeding import seed_everything, seeded
from clbench.stopping import Stop
from clbench.streams.stream import TaskStream
from clbench.tensor_files import tensor_bytes
from clbench.training import log as run_log
from clbench.training.backend import Backend, count, say
from clbench.training.loop import PhaseRunner, Resumed
from clbench.training.saving import OptimizerState, save_if_due

Start = Callable[[], tuple[LoadedPolicy, StreamFrames | None]]  # the policy to start from, and frames if it read them


class Trainer:
    """Runs the visits of a stream from a position on.

    Args:
        folder: where log, checkpoints and training states go.
        start: makes the policy that a run, or each visit of independent ones, starts from.
        base_path: folder of that policy.
        again: how to go on after a stop, for the message.
        place: what is trained, for the message; null = the task and phase.
        mean_images: keep the mean camera images of the demonstrations in `folder`, for evaluation's view "blind".
    """

    def __init__(
        self,
        config: Config,
        algorithm: CLAlgorithm,
        stream: TaskStream,
        folder: Path,
        run_id: str,
        backend: Backend,
        base_path: Path,
        keeper: StateKeeper,
        stop: Stop,
        start: Start,
        again: str,
        place: str | None = None,
        mean_images: bool = False,
    ) -> None:
        self.config, self.algorithm, self.stream = config, algorithm, stream
        self.folder, self.run_id, self.backend, self.base_path = folder, run_id, backend, base_path
        self.keeper, self.stop, self.start, self.again = keeper, stop, start, again
        self.place, self.keeps_mean_images = place, mean_images
        self.total_steps = 0
        # Seconds of earlier sessions, and of them in the task under way.
        self.seconds = self.task_seconds = 0.0
        self.weights = WeightKeeper(folder, config.train.eval_during_training, config.train.keep_weights_every_steps)
        if stream.mode == "multitask":  # no task is trained on its own
            self.weights = WeightKeeper(folder, None, config.train.keep_weights_every_steps)
        self.steps_before = 0  # of the task's phases that train the policy, those before the present one
        self.trained = 0  # parameters that a phase of the task under way trains, at most

    def run(self, start: Position) -> Path:
        """Train from `start` to the end; returns the run folder."""
        self.began = time.monotonic()
        self.log = run_log.RunLog(self.folder, self.config.log, self.run_id, self.backend.is_main, to_dict(self.config))
        try:
            with patience("reading policy and data"):
                training = self._load(start.source, within=bool(start.phase))
            for k in range(start.k, len(self.stream.visits)):
                if self.stream.mode == "singletask" and k != start.k:
                    self._load(None)
                resumed = training if k == start.k and start.phase else None
                self._visit(k, start if resumed else None, resumed)
                if k + 1 < len(self.stream.visits):
                    self._stop_if_asked(f"after task {k + 1} of {len(self.stream.visits)}")
            self.log.event("run_end", seconds=round(self.spent(), 2), saving_seconds=round(self.keeper.seconds, 2))
        finally:
            self.log.close()
        if self.backend.is_main:
            self.keeper.remove()
        return self.folder

    def spent(self) -> float:
        return self.seconds + time.monotonic() - self.began

    def _load(self, source: Path | None, within: bool = False) -> dict[str, Any]:
        """Build policy, context and runner, from the base or from a checkpoint or training state.

        Args:
            within: `source` is a state in the middle of a task.

        Returns:
            The counters saved in `source`.
        """
        fresh = source is None or (self.stream.mode == "singletask" and not within)
        device = pick_device(self.config.train.device)
        frames: StreamFrames | None = None
        self.loaded: LoadedPolicy
        if fresh:
            self.loaded, frames = self.start()
        else:
            assert source is not None
            self.loaded = load_policy(source / "policy", device)
        policy = self.loaded.policy
        self.parameters_before = count(policy.parameters())
        if self.config.lora.enabled and fresh:
            with seeded("lora", self.config.seed):
                lora.inject(policy, self.config.lora)
        frames = frames or StreamFrames(
            [v.tasks for v in self.stream.visits], policy.config, self.config.train.frame_cache_gb
        )
        reason = draws.refusal(policy)
        if reason is not None and (self.config.lora.enabled or "structure" in self.algorithm.claims):
            raise UserError(f"adapters cannot be added to policy '{policy.config.type}' yet: {reason}.")
        loss = PolicyView(policy, policy, self.loaded.preprocessor, self.backend.autocast, self._augmentation(frames))
        if self.keeps_mean_images and frames.cameras and self.backend.is_main:
            write_mean_images(self.folder, frames.mean_images())
        self._keep_features(frames)
        self.ctx = Context(
            stream=self.stream, policy=policy, frames=frames, train=self.config.train, seed=self.config.seed,
            device=self.backend.device, view=loss,
            log=self._event, base_path=str(self.base_path), rank=self.backend.rank,
            world_size=self.backend.world_size, collective=self.backend,
        )  # fmt: skip
        self.runner = PhaseRunner(self.ctx, self.algorithm, self.backend, loss, self.log)
        self.runner.progress_mode = self.config.log.progress if self.backend.is_main else "quiet"
        self.runner.total_steps = self.total_steps
        self.runner.after_step = self._after_step
        self.algorithm.bind(self.ctx)
        training: dict[str, Any] = {}
        if source is not None:
            described = read_json(source / DESCRIPTION)
            training = {**load_state(source, "training"), "task_seconds": described.get("task_seconds", 0.0)}
            if self.backend.is_main:
                self.log.cut(described.get("log_bytes"), described["k"])
            self.total_steps = self.runner.total_steps = int(training["total_steps"])
            self.seconds = float(described.get("seconds", 0.0))
            self.runner.carried_state = None if fresh else training["carried"] if within else training["optimizer"]
            self.runner.skipped = 0 if fresh else int(training.get("skipped", 0))
        elif self.backend.is_main and self.total_steps == 0:
            self.log.cut(0, -1)
        if not fresh:
            assert source is not None
            draws.resumed(policy, self.total_steps * self.config.train.gradient_accumulation)
            self.algorithm.restore_structure(policy, source / "policy")
            if "frozen" in training:
                frozen = set(training["frozen"])
                for name, p in policy.named_parameters():
                    p.requires_grad_(name not in frozen)
            restore_state(self.algorithm, load_state(source, "algorithm"), policy)
            keep_in_dtype(policy, self.config)
        return training

    def _keep_features(self, frames: StreamFrames) -> None:
        """Give the features of a frozen image encoder in the place of images, where that is possible."""
        train, policy = self.config.train, self.loaded.policy
        if not getattr(policy, "frozen_cameras", None) or train.feature_cache_gb == 0:
            return
        if self.config.augment.active:
            say(self.backend, "note: the image encoder is frozen, but its features cannot be kept: augment.… changes "
                              "the images in every step.")  # fmt: skip
            return
        if kept_in(self.config) == BF16:  # evaluation computes them with rounded weights
            say(self.backend, "note: features of the frozen image encoder are not kept with policy.dtype=bfloat16.")
            return
        frames.keep_features(FrozenFeatures(policy, self.loaded.preprocessor), train.feature_cache_gb)

    def _augmentation(self, frames: StreamFrames) -> Augmentation | None:
        """What changes images in training; the preprocessor then crops in acting alone."""
        config, pre = self.config.augment, self.loaded.preprocessor
        if not (config.active and frames.cameras):
            return None
        centre_crop(pre, config.crop)
        set_training(pre, True)
        return Augmentation(config, frames.cameras)

    def _task(self, k: int) -> str:
        return f"task {k + 1}/{len(self.stream.visits)} {self.stream.visits[k].task}"

    def _event(self, event: str, /, **fields: Any) -> None:
        self.log.event(event, k=self.ctx.k, task=self.ctx.visit.task, **fields)

    def _visit(self, k: int, position: Position | None, resumed: dict[str, Any] | None) -> None:
        """Train visit k, from its start, or from `position` in it with the counters saved there."""
        ctx, algorithm, policy = self.ctx, self.algorithm, self.loaded.policy
        began = time.monotonic()
        ctx.k, ctx.phase, ctx.step = k, "", 0
        if position is None or resumed is None:
            self.task_seconds, self.trained = 0.0, 0
            self._event("task_start", samples=ctx.frames.length(k))
            seed_everything("task_start", ctx.seed, k)
            with patience(f"{self._task(k)}: preparing it"):
                algorithm.on_task_start(ctx)
            keep_in_dtype(policy, self.config)
        else:
            self.task_seconds, self.trained = float(resumed["task_seconds"]), int(resumed["trained"])
            self.parameters_before = int(resumed["parameters_before"])
        self.task_began = began
        phases = list(algorithm.phases(ctx))
        names = [p.name for p in phases]
        assert len(set(names)) == len(names), f"phases of one task need different names: {names}"
        first = 0
        if position is not None and resumed is not None:
            if position.phase not in names:
                raise UserError(
                    f"{position.source} is in phase '{position.phase}', but this run's phases are {', '.join(names)}: "
                    "another version of the algorithm wrote it. Remove that folder to go on from the last checkpoint."
                )
            first = names.index(position.phase)
        steps = [p.steps if p.policy_training and p.optimizer is not None else 0 for p in phases]
        done = None
        if position is not None and resumed is not None:
            done = sum(steps[:first]) + min(position.step, steps[first])
        self.weights.begin(k, sum(steps), done, write=self.backend.is_main)
        for i, phase in enumerate(phases[first:], first):
            within = None
            if resumed and position and i == first:
                within = Resumed(position.step, resumed["optimizer"], resumed.get("source", {}))
            self.steps_before = sum(steps[:i])
            self.runner.run(phase, within)
            if not self.runner.trained and steps[i]:  # nothing to train: no step was taken
                self._keep_weights(self.steps_before, self.steps_before + steps[i])
            self.trained = max(self.trained, count(self.runner.trained.values()))
        ctx.phase, ctx.step = "", 0
        seed_everything("task_end", ctx.seed, k)
        with patience(f"{self._task(k)}: consolidating what it taught"):
            algorithm.on_task_end(ctx)
        policy.eval()
        total = count(policy.parameters())
        numbers = {
            "parameters_total": total,
            "parameters_added": total - self.parameters_before,
            "parameters_trainable": self.trained,
            "exemplar_bytes": algorithm.exemplar_bytes(),
            "state_bytes": algorithm.state_bytes(),
            "peak_memory_mb": round(self.backend.peak_memory_mb(), 1),
        }
        self.parameters_before = total
        self.total_steps = self.runner.total_steps
        # Before the checkpoint, which says how long the log was: a run that is killed in between goes on with both.
        self._event("task_end", seconds=round(self.task_seconds + time.monotonic() - began, 2), **numbers)
        if self.backend.is_main:
            began = time.monotonic()
            memory = {n: v for n, v in numbers.items() if n != "peak_memory_mb"}  # not a function of the seed
            carried = None if self.runner.carried is None else self.runner.carried.state_dict()

            def fill(folder: Path) -> dict[str, Any]:
                adapter = self._save(folder, {"optimizer": carried})
                return {"task": ctx.visit.task, "adapter": adapter, **memory, **self._progress()}

            with patience(f"{self._task(k)}: saving its checkpoint"):
                save_checkpoint(self.folder, k, fill, lambda: self._bytes(carried))
            self.keeper.saved(began)
            self.log.checkpoint(k, checkpoint_folder(self.folder, k))
        self.backend.barrier()

    # ---- saving ---------------------------------------------------------------------------------
    def _after_step(self, phase: Phase, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        self.total_steps = self.runner.total_steps
        if phase.policy_training and optimizer is not None:
            self._keep_weights(self.steps_before + step - 1, self.steps_before + step)

        def fill(folder: Path, moments: OptimizerState) -> dict[str, Any]:
            carried = self.runner.carried
            counters = {
                "trained": max(self.trained, count(self.runner.trained.values())),
                "parameters_before": self.parameters_before,
                "carried": None if carried is None or carried is optimizer else carried.state_dict(),
            }
            source = self.runner.source.state_dict()
            if source:
                counters["source"] = source
            self._save(folder, {"optimizer": moments, **counters})
            seconds = self.task_seconds + time.monotonic() - self.task_began
            return {**self._progress(), "task_seconds": round(seconds, 3)}

        place = self.ctx.k, phase.name, step
        total, every = self.total_steps, phase.save_every
        if save_if_due(self.backend, self.keeper, self.stop, place, total, optimizer, fill, self._bytes, every):
            where = self.place or f"in task {self.ctx.k + 1}, phase {phase.name}"
            self._stop_if_asked(f"{where}, after step {step}", sure=True)

    def _keep_weights(self, first: int, last: int) -> None:
        """Keep the weights that are due at one of the task's steps in (first, last]."""
        for step in self.weights.due(first, last):
            if self.backend.is_main:
                with patience("keeping the weights"):
                    self.weights.keep(
                        step, lambda folder: {"adapter": self._save(folder, {})}, lambda: self._bytes(None)
                    )
            self.backend.barrier()

    def _stop_if_asked(self, where: str, sure: bool = False) -> None:
        if sure or self.backend.any(bool(self.stop.reason))[0]:
            why = self.stop.reason or "a signal to another rank"
            raise Interrupted(f"stopped by {why} {where}; saved. {self.again}")

    def _progress(self) -> dict[str, Any]:
        """What describes a checkpoint or state without being a function of the seed."""
        return {"log_bytes": self.log.flushed(), "seconds": round(self.spent(), 3)}

    def _save(self, folder: Path, training: dict[str, Any]) -> bool:
        """Write policy, algorithm state and `training`; returns whether the policy is an adapter over its base."""
        policy_folder = folder / "policy"
        policy_folder.mkdir()
        adapter = self.algorithm.save_policy(self.loaded.policy, policy_folder, str(self.base_path))
        if self.config.lora.enabled:
            lora.save(self.loaded.policy, policy_folder, str(self.base_path))
            adapter = True
        if adapter:
            write_adapter_base(policy_folder, self.base_path)
        save_policy(self.loaded, policy_folder, adapter_only=adapter)
        save_state(folder, "algorithm", self.algorithm.state_dict())
        frozen = [n for n, p in self.loaded.policy.named_parameters() if not p.requires_grad]
        counters = {"total_steps": self.total_steps, "skipped": self.runner.skipped, "frozen": frozen}
        save_state(folder, "training", {**counters, **training})
        return adapter

    def _bytes(self, optimizer: dict[str, Any] | None) -> int:
        """About how large a checkpoint or training state is."""
        parts = [self.loaded.policy.state_dict(), self.algorithm.state_dict(), optimizer]
        return sum(tensor_bytes(p if p is None or isinstance(p, dict) else dict(p)) for p in parts)
