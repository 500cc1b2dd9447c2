"""`train`: where a run stands, what it starts from, what may have changed; then its visits (visits.py)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from clbench.algorithms.build import build_algorithm
from clbench.checkpoints import trusted
from clbench.checkpoints.base import ADAPTER, find_base, identity
from clbench.checkpoints.changes import changes
from clbench.checkpoints.kept import curves_lack
from clbench.checkpoints.run_folder import (
    PEFT_COPY,
    absolute_paths,
    as_argument,
    checkpoint_folder,
    clear_leftovers,
    new_run_folder,
    read_checkpoint,
    read_manifest,
    results_folder,
    whole_checkpoints,
    write_description,
)
from clbench.checkpoints.statistics import check_base
from clbench.checkpoints.training_state import Position, StateKeeper
from clbench.config.compose import to_yaml
from clbench.config.schema import Config, LogConfig
from clbench.data.source import check_every_byte, fps_note
from clbench.envs.making import check_other_python
from clbench.errors import UserError
from clbench.io import read_jsonl, remove_if_empty, write_text
from clbench.lock import held
from clbench.paths import bases_root
from clbench.patience import patience
from clbench.processes import server
from clbench.stopping import Stop, stoppable
from clbench.streams.stream import TaskStream, build_stream
from clbench.training import log as run_log
from clbench.training.backend import Backend, ranks_together, say
from clbench.training.curve_player import playing_curves
from clbench.training.pretrain import check_inputs, ensure_base, load_base
from clbench.training.saving import same_on_all
from clbench.training.visits import Trainer


@ranks_together()
def train(
    config: Config,
    run_id: str,
    *,
    resume: bool = False,
    allow_change: Sequence[str] = (),
    command: list[str] | None = None,
    files: list[str] | None = None,
    stop: Stop | None = None,
    play_curves: bool = True,
) -> Path:
    """Train a run and return its folder. Everything that a configuration can show to be wrong is raised first.

    Args:
        allow_change: keys that may differ from those a resumed run was started with, beside FREE_ON_RESUME.
        stop: says when to stop; null = when a signal comes from here on.
        play_curves: play the learning curves that train.eval_during_training asks for beside the training; otherwise
            their weights are kept for `clbench eval`.

    Raises:
        UserError: bad configuration, missing data or base, an existing run, a loss that is not finite; or training is
            complete and learning curves could not be played.
        Interrupted: a signal asked to stop; the state is saved.
    """
    config = absolute_paths(config)
    algorithm = build_algorithm(config)
    sequential = "stream" not in algorithm.claims
    stream = algorithm.transform_stream(build_stream(config.dataset, sequential=sequential, render=config.render))
    drawn = (stream.columns[0].env or {}).get("render")
    if drawn is not None:  # the base's images, too, are to be like that
        config = replace(config, render=replace(config.render, **drawn))
    wanted = play_curves and config.train.eval_during_training is not None and stream.mode != "multitask"
    if wanted and os.environ.get("RANK", "0") == "0":
        server()  # while this process has one thread
    backend = Backend(config.train)
    folder, new = results_folder(run_id, config.output_dir), False
    with ExitStack() as stack:
        if backend.is_main:
            check_other_python(config.dataset.env_type)
            new = not new_run_folder(run_id, config.output_dir, resume)[1]
            if new:
                stack.callback(remove_if_empty, folder)
            stack.enter_context(held(folder, "training"))
            clear_leftovers(folder)
        backend.barrier()
        stop = stop or stack.enter_context(stoppable())
        keeper = StateKeeper(folder, config.train.save_every_steps, config.train.save_every_minutes)
        with patience(f"checking what is in {folder}"):
            found = _position(folder, keeper) if backend.is_main else Position()
        position = same_on_all(found, backend)
        changed = {} if position == Position() else changes(folder, config, stream, allow_change)
        if backend.is_main and position != Position():
            check_every_byte(stream.columns[0].root, stream.data, config.dataset.name)
        backend.barrier()  # every rank has read what rank 0 now writes anew
        if note := fps_note(stream.data):
            say(backend, note)
        if resume:
            say(backend, f"resuming run '{run_id}' {_where(position, len(stream.visits))}")
        if position.k == len(stream.visits):
            meant = [key for key in allow_change if key in changed]
            if meant:
                raise UserError(f"run '{run_id}' is complete: nothing is left to train with another {meant[0]}.")
            if backend.is_main:
                write_text(folder / "config.yaml", to_yaml(config))  # its eval and log sections may be new
                _end_log(folder, run_id, position)
                keeper.remove()
                visits = len(stream.visits)
                with playing_curves(folder, visits, wanted and curves_lack(folder, visits)) as player:
                    if player is not None:
                        player.wait(stop)
            say(backend, f"run '{run_id}' is complete: {folder}")
            return folder
        base_path, base = _base_of(config, folder, stream, position, changed, backend, stop)
        if (base_path / "config.json").is_file():
            check_inputs(base_path, stream.columns[0])
            if position == Position():
                check_base(base_path, config, [t for v in stream.visits for t in v.tasks])
        if config.train.threads is None and backend.device.type == "cpu" and (os.cpu_count() or 1) > backend.world_size:
            say(backend, "note: training with one thread, whatever the cores, for the same weights everywhere; "
                         "train.threads=N uses more")  # fmt: skip
        if backend.is_main:
            keeper.clear(position)
            session = {"command": command or [], "k": position.k, "phase": position.phase, "step": position.step,
                       "ranks": backend.world_size, "threads": torch.get_num_threads(), "changed": changed}  # fmt: skip
            write_description(folder, run_id, config, stream, base=base, session=session, files=files or [])
        again = f"Go on with: clbench train --resume {as_argument(folder)}{_ranks(backend)}"
        trainer = Trainer(
            config, algorithm, stream, folder, run_id, backend, base_path, keeper, stop,
            start=lambda: (load_base(base_path, config), None), again=again, mean_images=True,
        )  # fmt: skip
        if config.train.eval_during_training is not None and stream.mode == "multitask":
            say(backend, "note: joint training has no learning curves of tasks: train.eval_during_training is ignored.")
        with playing_curves(folder, len(stream.visits), wanted and backend.is_main) as player:
            try:
                trainer.run(position)
            except Exception:
                if new:
                    _forget_unless_begun(folder)
                raise
            say(backend, f"trained: {folder}")
            if player is not None:
                player.wait(stop)
        return folder


def _ranks(backend: Backend) -> str:
    """The flag with which as many processes go on."""
    if backend.world_size == 1:
        return ""
    return f" --{'nproc' if backend.device.type == 'cpu' else 'gpus'} {backend.world_size}"


def _base_of(
    config: Config,
    folder: Path,
    stream: TaskStream,
    position: Position,
    changed: dict[str, list[Any]],
    backend: Backend,
    stop: Stop,
) -> tuple[Path, dict[str, Any]]:
    """The base's folder and its description: of a run that goes on, those it began with, wherever the base is now."""
    if position == Position() or any(k.startswith(("policy.", "pretrain.", "dataset.pretrain.")) for k in changed):
        return ensure_base(config, backend, stop, config.log.progress)
    base = read_manifest(folder)["base"]
    try:
        path = find_base(base, folder, f"run {folder.name} is")
        if path.parent.resolve() == bases_root().resolve() and config.policy.get("type") in trusted.given().types:
            trusted.trust_also(path)  # made on this machine, from such a configuration
        return path.absolute(), {**base, "path": str(path.absolute()), **identity(path)}
    except UserError:
        assert position.source is not None
        if stream.mode != "singletask" and not (position.source / "policy" / ADAPTER).is_file():
            return Path(str(base.get("path"))), base  # all is in the checkpoint: it is not needed any more
        if base.get("kind") == "given":
            raise
    path, again = ensure_base(config, backend, stop, config.log.progress)
    if base.get("sha256") not in (None, again["sha256"]):
        raise UserError(
            f"the base of run {folder.name} is nowhere, and {path}, made with the same settings, has other weights: "
            f"sha256 {again['sha256'][:12]}…, not {base['sha256'][:12]}…. Copy the run's own base to {path}."
        )
    return path, again


def _position(folder: Path, keeper: StateKeeper) -> Position:
    """Where the run in `folder` stands: after its newest whole state or checkpoint."""
    done = whole_checkpoints(folder)
    return keeper.newest(done) or Position(done, checkpoint_folder(folder, done - 1) if done else None)


def _forget_unless_begun(folder: Path) -> None:
    """Remove what a start wrote that failed before its first step, so that the same command can be given again."""
    rows = read_jsonl(folder / run_log.FILE) if (folder / run_log.FILE).is_file() else []
    if all(row.get("event") == "task_start" for row in rows):
        for name in ("config.yaml", "manifest.json", PEFT_COPY, run_log.FILE, run_log.IDS):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)


def _end_log(folder: Path, run_id: str, position: Position) -> None:
    """Write the last event of a run that was killed between its last checkpoint and the end."""
    lines = (folder / run_log.FILE).read_bytes().splitlines(keepends=True) if (folder / run_log.FILE).is_file() else []
    if lines and lines[-1].endswith(b"\n") and b'"event": "run_end"' in lines[-1]:
        return
    assert position.source is not None
    described = read_checkpoint(position.source)
    log = run_log.RunLog(folder, LogConfig(), run_id)
    log.cut(described.get("log_bytes"), position.k - 1)
    log.event("run_end", seconds=round(float(described.get("seconds", 0.0)), 2), saving_seconds=0.0)
    log.close()


def _where(position: Position, visits: int) -> str:
    if position.phase:
        return f"in task {position.k + 1} of {visits}, phase {position.phase}, after step {position.step}"
    return f"after task {position.k} of {visits}" if position.k else "from the start: there is nothing to resume"
