"""Trainer: the stream's visits, each with its phases, then its checkpoint. Read this with algorithms/hooks.py."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from clbench.adapters import lora
from clbench.algorithms.build import build_algorithm
from clbench.algorithms.hooks import CLAlgorithm, Context
from clbench.checkpoints.policy_io import LoadedPolicy, load_policy, pick_device, save_policy
from clbench.checkpoints.run_folder import (
    changed_keys,
    checkpoint_folder,
    finished_visits,
    new_run_folder,
    read_manifest,
    results_folder,
    save_checkpoint,
    write_description,
)
from clbench.checkpoints.state import load_state, save_state
from clbench.config.compose import to_yaml
from clbench.config.schema import Config
from clbench.data.frames import StreamFrames
from clbench.errors import UserError
from clbench.io import write_text
from clbench.policies.loss import PolicyLoss
from clbench.seeding import seeded
from clbench.streams.stream import TaskStream, build_stream
from clbench.training import log as run_log
from clbench.training.backend import Backend, count, say
from clbench.training.loop import PhaseRunner
from clbench.training.pretrain import ensure_base, load_base

# What may differ when a run is resumed: it changes no weight (threads, ranks and devices change last bits of sums).
FREE_ON_RESUME = (
    "log.", "eval.", "output_dir", "train.threads", "train.num_workers", "train.log_every", "train.strategy",
    "train.collective_timeout_s", "train.device",
)  # fmt: skip


def train(
    config: Config,
    run_id: str,
    *,
    resume: bool = False,
    command: list[str] | None = None,
    files: list[str] | None = None,
) -> Path:
    """Train a run and return its folder. Everything that a configuration can show to be wrong is raised first.

    Raises:
        UserError: bad configuration, missing data or base, an existing run, a loss that is not finite.
    """
    algorithm = build_algorithm(config)
    sequential = "stream" not in algorithm.claims
    stream = algorithm.transform_stream(build_stream(config.dataset, sequential=sequential))
    backend = Backend(config.train)
    if backend.is_main:
        new_run_folder(run_id, config.output_dir, resume)
    backend.barrier()
    folder = results_folder(run_id, config.output_dir)
    done = finished_visits(folder)
    if done:
        changed = changed_keys(folder, config, FREE_ON_RESUME)
        if read_manifest(folder).get("data_fingerprint") != stream.fingerprint:
            changed.append(f"the data in {config.dataset.data}")
        if changed:
            raise UserError(
                f"run '{run_id}' was started with other settings; these differ: {', '.join(changed)}. Use the old "
                "ones, or another --run-id."
            )
    if resume:
        where = f"after task {done} of {len(stream.visits)}" if done else "from the start: there is nothing to resume"
        say(backend, f"resuming run '{run_id}' {where}")
    if done == len(stream.visits):
        if backend.is_main:
            write_text(folder / "config.yaml", to_yaml(config))  # its eval and log sections may be new
        say(backend, f"run '{run_id}' is complete: {folder}")
        return folder
    base_path, base = ensure_base(config, backend, config.log.progress)
    if backend.is_main:
        write_description(folder, run_id, config, stream, base=base, command=command or [], files=files or [])
    return Trainer(config, algorithm, stream, folder, run_id, backend, base_path).run(done)


class Trainer:
    """Runs the visits of a stream from visit `start` on."""

    def __init__(
        self,
        config: Config,
        algorithm: CLAlgorithm,
        stream: TaskStream,
        folder: Path,
        run_id: str,
        backend: Backend,
        base_path: Path,
    ) -> None:
        self.config, self.algorithm, self.stream = config, algorithm, stream
        self.folder, self.run_id, self.backend, self.base_path = folder, run_id, backend, base_path
        self.total_steps = 0

    def run(self, start: int = 0) -> Path:
        """Train visits start … end; returns the run folder."""
        began = time.monotonic()
        if self.backend.is_main:
            run_log.truncate(self.folder, start - 1)
        self.log = run_log.RunLog(self.folder, self.config.log, self.run_id, self.backend.is_main)
        try:
            self._load(start)
            for k in range(start, len(self.stream.visits)):
                if self.stream.mode == "singletask" and k != start:
                    self._load(0)
                self._visit(k)
            self.log.event("run_end", seconds=round(time.monotonic() - began, 2))
        finally:
            self.log.close()
        say(self.backend, f"trained: {self.folder}")
        return self.folder

    def _load(self, start: int) -> None:
        """Build policy, context and runner, from the base or from the checkpoint before visit `start`."""
        fresh = start == 0 or self.stream.mode == "singletask"
        previous = checkpoint_folder(self.folder, start - 1)
        device = pick_device(self.config.train.device)
        self.loaded: LoadedPolicy = (
            load_base(self.base_path, self.config) if fresh else load_policy(previous / "policy", device)
        )
        policy = self.loaded.policy
        self.parameters_before = count(policy.parameters())
        if self.config.lora.enabled and fresh:
            with seeded("lora", self.config.seed):
                lora.inject(policy, self.config.lora)
        frames = StreamFrames([v.tasks for v in self.stream.visits], policy.config)
        loss = PolicyLoss(policy, policy, self.loaded.preprocessor, self.backend.autocast)
        self.ctx = Context(
            stream=self.stream, policy=policy, frames=frames, train=self.config.train, seed=self.config.seed,
            device=self.backend.device, policy_loss=loss,
            log=self._event, base_path=str(self.base_path), rank=self.backend.rank,
            world_size=self.backend.world_size, collective=self.backend,
        )  # fmt: skip
        self.runner = PhaseRunner(self.ctx, self.algorithm, self.backend, loss, self.log)
        self.runner.progress_mode = self.config.log.progress if self.backend.is_main else "quiet"
        self.runner.total_steps = self.total_steps
        self.algorithm.bind(self.ctx)
        if start:
            training = load_state(previous, "training")
            self.runner.total_steps = int(training["total_steps"])
            self.runner.carried_state = None if fresh else training["optimizer"]
        if not fresh:
            self.algorithm.restore_structure(policy, previous / "policy")
            self.algorithm.load_state_dict(load_state(previous, "algorithm"))

    def _event(self, event: str, /, **fields: Any) -> None:
        self.log.event(event, k=self.ctx.k, task=self.ctx.visit.task, **fields)

    def _visit(self, k: int) -> None:
        ctx, algorithm, policy = self.ctx, self.algorithm, self.loaded.policy
        began = time.monotonic()
        ctx.k, ctx.phase, ctx.step = k, "", 0
        self._event("task_start", samples=ctx.frames.length(k))
        algorithm.on_task_start(ctx)
        trained = 0
        for phase in algorithm.phases(ctx):
            self.runner.run(phase)
            trained = max(trained, count(self.runner.trained.values()))
        ctx.phase, ctx.step = "", 0
        algorithm.on_task_end(ctx)
        policy.eval()
        total = count(policy.parameters())
        numbers = {
            "parameters_total": total,
            "parameters_added": total - self.parameters_before,
            "parameters_trainable": trained,
            "exemplar_bytes": algorithm.exemplar_bytes(),
            "state_bytes": algorithm.state_bytes(),
            "peak_memory_mb": round(self.backend.peak_memory_mb(), 1),
        }
        self.parameters_before = total
        if self.backend.is_main:
            save_checkpoint(self.folder, k, lambda temporary: self._save(temporary, numbers))
        self.backend.barrier()
        self.total_steps = self.runner.total_steps
        self._event("task_end", seconds=round(time.monotonic() - began, 2), **numbers)

    def _save(self, folder: Path, numbers: dict[str, Any]) -> dict[str, Any]:
        policy_folder = folder / "policy"
        policy_folder.mkdir()
        adapter = self.algorithm.save_policy(self.loaded.policy, policy_folder, str(self.base_path))
        if self.config.lora.enabled:
            lora.save(self.loaded.policy, policy_folder, str(self.base_path))
            adapter = True
        save_policy(self.loaded, policy_folder, adapter_only=adapter)
        save_state(folder, "algorithm", self.algorithm.state_dict())
        carried = self.runner.carried
        save_state(
            folder,
            "training",
            {
                "total_steps": self.runner.total_steps,
                "optimizer": None if carried is None else carried.state_dict(),
            },
        )
        memory = {k: v for k, v in numbers.items() if k != "peak_memory_mb"}  # not a function of the seed
        return {"task": self.ctx.visit.task, "adapter": adapter, **memory}
