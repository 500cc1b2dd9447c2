"""Evaluation without a simulator: a policy's action errors, and its loss, on episodes that were never trained on.

The policy is shown every frame t of a held-out episode (every `eval.stride`-th), predicts an action chunk â_t, and is
compared with what was done, a. With σ_d the standard deviation of action dimension d over all the stream's training
frames (1 where it is constant), and over those of the H steps of a chunk that lie within the episode:

    chunk_error = mean over t, h, d of |â_{t,h,d} − a_{t+h,d}| / σ_d
    first_error = mean over t, d of |â_{t,0,d} − a_{t,d}| / σ_d
    loss        = mean over t of ℓ(θ; x_t), the policy's own training loss

Both errors are also kept per dimension, in these units and in the data's; dimensions that were added (dataset.pad) do
not count, and are null. All that is random (a policy's noise, the
loss's draw) is a function of the episode and the frame, so that checkpoints and methods are compared under the same.

The files are those of an evaluation in simulators: eval/cells/k00_j03.jsonl has one record per held-out episode,
eval/matrix.json the mean over them. Episodes that are recorded are not evaluated again.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from clbench.checkpoints.run_folder import finished_visits, moved
from clbench.checkpoints.statistics import check_run
from clbench.checkpoints.trusted import check_checkpoint, given
from clbench.config.schema import Config
from clbench.data.statistics import of_tasks
from clbench.data.task import Task
from clbench.errors import UserError
from clbench.evaluation.evaluate import (
    SETTINGS,
    about_run,
    add_summary,
    check_settings,
    row_lock,
    wanted_cells,
)
from clbench.evaluation.records import BASE, OFFLINE, TEST, CellFile, build_matrix, counted, eval_folder
from clbench.evaluation.rows import Checkpoints
from clbench.evaluation.worker import Job, Settings, actors
from clbench.io import write_json
from clbench.lock import held
from clbench.patience import patience
from clbench.seeding import derive_seed
from clbench.stopping import Stop
from clbench.streams.stream import build_stream
from clbench.terminal import tell

if TYPE_CHECKING:
    import torch

    from clbench.data.frames import Batch, StreamFrames
    from clbench.rollout.actors import PolicyActor

BATCH = 64  # frames that a policy sees at once; part of what decides the last bits of a result
DIMENSIONS = ("chunk_error", "first_error")


@dataclass(frozen=True)
class HeldOut:
    """One held-out episode.

    Attributes:
        j: its task's column.
        number: its place among the task's held-out episodes.
        seed: names it in records, and seeds what is random: a hash of the task's name, the set's place among those
            that it holds out of, and the episode's index.
        piece: the instruction and set, with this episode alone.
    """

    j: int
    number: int
    seed: int
    piece: Task


def held_out_episodes(columns: Sequence[Task], at_most: int) -> list[HeldOut]:
    """The held-out episodes of every column, in order; at most so many of each."""
    found = []
    for j, task in enumerate(columns):
        roots = list(dict.fromkeys(p.root for p in task.held_out))  # the same at every visit of the task
        every = [p.only(lambda _, x, e=e: x == e) for p in task.held_out for e in p.episodes]  # type: ignore[misc]
        for number, piece in enumerate(every[:at_most]):
            seed = derive_seed("held-out episode", task.name, roots.index(piece.root), piece.episodes[0]) % 2**53
            found.append(HeldOut(j, number, seed, piece))
    return found


def action_scale(columns: Sequence[Task]) -> np.ndarray:
    """σ (A,): the standard deviation of every action dimension over all training frames; 1 where it is constant."""
    stats = of_tasks([p for t in columns for p in t.pieces], quantiles=False)["action"]
    return np.where(stats["max"] > stats["min"], stats["std"], 1.0)


def evaluate_offline(
    folder: Path, manifest: dict[str, Any], config: Config, output: Path | None, progress: bool, stop: Stop
) -> dict[str, Any]:
    """Evaluate a run on its held-out episodes: writes what is missing of its records, and the matrix; returns it.

    Raises:
        UserError: nothing was held out, the data are not those of the run, or a setting that needs a simulator.
        Interrupted: SIGINT or SIGTERM; finished episodes are kept.
    """
    config, e = moved(config, folder), config.eval
    for wrong, what in ((bool(e.views), "eval.views"), (e.random_row, "eval.random_row"),
                        (e.split != TEST, f"eval.split={e.split}")):  # fmt: skip
        if wrong:
            raise UserError(f"{what} is for streams with a simulator; run {folder.name} has none (dataset.env: null).")
    if not config.dataset.holdout:
        raise UserError(
            f"run {folder.name} learned a stream without a simulator (dataset.env: null) and held out no episodes, so "
            "there is nothing to evaluate it on. Train with dataset.holdout=0.1."
        )
    rows = finished_visits(folder)
    if rows == 0:
        raise UserError(f"run {folder.name} has no whole checkpoint yet: train it first (--resume continues it).")
    if rows < len(manifest["checkpoints"]):
        tell(f"warning: run {folder.name} has {rows} of {len(manifest['checkpoints'])} checkpoints; evaluating those.")
    with patience("opening the data"):
        stream = build_stream(config.dataset, sequential=False)
    if stream.fingerprint != manifest.get("data_fingerprint"):
        raise UserError(
            f"the data of the stream are not those that run {folder.name} was trained on (their fingerprints differ): "
            "its held-out episodes may not be held out. Put the data back, or train a new run."
        )
    columns = list(stream.columns)
    names = [c.name for c in columns]
    episodes = held_out_episodes(columns, e.episodes)
    few = list(dict.fromkeys(c.name for c in columns if sum(len(p.episodes) for p in c.held_out) == 1))
    if few:
        tell(f"note: one episode is held out of {', '.join(few)}: metrics of the matrix will have no intervals.")
    whole = eval_folder(output or folder)
    with ExitStack() as stack:
        stack.enter_context(held(whole, "evaluation"))
        for k in range(rows):
            stack.enter_context(held(whole, row_lock(k)))
        for left in whole.rglob(".*.tmp"):  # of an evaluation that was killed while it wrote a file
            left.unlink()
        checkpoints = Checkpoints(folder, manifest, rows)
        with patience("reading the actions"):
            scale = action_scale(columns)
        asked = {
            "quantity": OFFLINE.name, "unit": OFFLINE.unit, "direction": OFFLINE.direction, "stride": e.stride,
            "scale": [float(np.float32(s)) for s in scale], "held_out": _listed(columns),
        }  # fmt: skip
        digests = checkpoints.digests()
        write_json(whole / SETTINGS, check_settings(whole, folder, digests, asked))
        cells = wanted_cells(manifest["mode"], e.cells, rows, len(columns))
        cells += [(BASE, j) for j in range(len(columns))] if e.base_row else []
        files = {(k, j): CellFile(whole, k, j) for k, j in cells}
        _check_seeds(files, held_out_episodes(columns, 2**31))
        first = {name: names.index(name) for name in names}
        missing: dict[int, list[HeldOut]] = {}
        for one in episodes:
            for k in sorted({k for k, j in cells if j == one.j}):
                again = first[names[one.j]] != one.j and (k, first[names[one.j]]) in files  # copied below
                if not again and one.number not in files[k, one.j].rows:
                    missing.setdefault(k, []).append(one)
        with patience("comparing the policies' statistics with the data"):
            check_run(folder, manifest, config, [checkpoints.weights(k).policy for k in sorted(missing)])
        for k in missing:
            with patience(f"checking {checkpoints.place(k)}"):
                checkpoints.check(k)
        count = sum(len(found) for found in missing.values())
        if count:
            tell(f"evaluating {count} held-out episodes → {whole}")
            with patience("loading LeRobot and the libraries it uses", at_once=True):
                importlib.import_module("clbench.data.frames")
            began, done = time.monotonic(), 0
            bar = tqdm(total=count, desc="held-out episodes", unit="ep", disable=not progress, mininterval=1)
            try:
                for k in sorted(missing):
                    for record in _evaluate_row(k, missing[k], checkpoints, config, scale):
                        files[k, record["j"]].append(record)
                        done += 1
                        bar.update()
                        stop.check("Finished episodes are kept; the same command continues.")
            finally:
                bar.close()
                add_summary(whole, time.monotonic() - began, done, 1)
        for k, j in cells:
            source = first[names[j]]
            if source != j and (k, source) in files:
                files[k, j].rows = {n: {**r, "j": j} for n, r in files[k, source].rows.items()}
            files[k, j].sort()
        matrix = build_matrix(
            whole, names, range(rows), OFFLINE.criteria[0], about=about_run(manifest), quantity=OFFLINE
        )  # fmt: skip
        matrix |= _more(whole, names, rows)
        write_json(whole / "matrix.json", matrix)
        if rows == len(manifest["checkpoints"]):  # for `clbench sweep`: what was asked for is there
            asked_for = {"cells": e.cells, "episodes": e.episodes, "views": [], "heldout_episodes": 0}
            write_json(whole / "complete.json", asked_for)
    return matrix


def _listed(columns: Sequence[Task]) -> list[list[list[int]]]:
    """For each column, the held-out episodes of each of its pieces."""
    return [[list(p.episodes) for p in task.held_out] for task in columns]


def _check_seeds(files: dict[tuple[int, int], CellFile], episodes: Sequence[HeldOut]) -> None:
    known = {(one.j, one.number): one.seed for one in episodes}
    for (_, j), file in files.items():
        for number, row in file.rows.items():
            if row.get("seed") != known.get((j, number)):
                raise UserError(f"{file.path}: episode {number} is not the one that is held out. Move the file away.")


def _more(out: Path, names: list[str], rows: int) -> dict[str, Any]:
    """The other matrices: first action, loss, and every dimension; null = not evaluated."""

    def cells(k: int) -> list[list[dict[str, Any]]]:
        return [[dict(r) for r in counted(CellFile(out, k, j).rows.values())] for j in range(len(names))]

    table = [cells(k) for k in range(rows)]

    def mean(found: list[dict[str, Any]], *keys: str) -> Any:
        values = []
        for record in found:
            value: Any = record
            for key in keys:
                value = value[key]
            values.append(value)
        if not values or any(v is None for v in values):
            return None
        if not isinstance(values[0], list):
            return float(np.mean(values))
        known = [[v for v in dimension if v is not None] for dimension in zip(*values, strict=True)]
        return [float(np.mean(of)) if of else None for of in known]

    others = {c: [[mean(cell, c) for cell in row] for row in table] for c in OFFLINE.criteria[1:]}
    dimensions = {
        name: {units: [[mean(cell, "dimensions", name, units) for cell in row] for row in table]
               for units in ("normalised", "data")}
        for name in DIMENSIONS
    }  # fmt: skip
    horizons = sorted({r["horizon"] for row in table for cell in row for r in cell if "horizon" in r})
    return {"horizon": horizons[0] if len(horizons) == 1 else None, "others": others, "dimensions": dimensions}


# ------------------------------------------------------------------------------------------------ one row


def _evaluate_row(
    k: int, episodes: Sequence[HeldOut], checkpoints: Checkpoints, config: Config, scale: np.ndarray
) -> Iterator[dict[str, Any]]:
    """Records of one checkpoint's missing episodes, in order of their tasks."""
    from clbench.data.frames import StreamFrames

    weights = checkpoints.weights(k)
    assert weights.policy is not None  # no random actions here
    check_checkpoint(Path(weights.policy))
    how = Settings(config, config.eval.slots, 0, config.train.device, threads=1, trust=given())
    of = {(one.j, one.number): one for one in episodes}
    asked = tuple({"j": one.j, "task_id": one.j, "episode": one.number} for one in episodes)
    for actor, view, chosen in actors(Job(k, weights, asked), how):
        mine = [of[c["j"], c["episode"]] for c in chosen]
        frames = StreamFrames([(one.piece,) for one in mine], actor.policy.config, config.train.frame_cache_gb)
        for place, one in enumerate(mine):
            began = time.monotonic()
            with view():
                found = measure(actor, frames, place, one.seed, scale, config.eval.stride)
            yield {
                "k": k, "j": one.j, "episode": one.number, "seed": one.seed, "data_episode": one.piece.episodes[0],
                **found, "seconds": round(time.monotonic() - began, 3),
            }  # fmt: skip


def measure(
    actor: PolicyActor, frames: StreamFrames, place: int, seed: int, scale: np.ndarray, stride: int
) -> dict[str, Any]:
    """A policy's errors and loss on visit `place` of `frames`, one episode: the equations are above. The loss is None
    where computing it would change the policy (draws.refusal).

    Raises:
        UserError: one of them is not finite.
    """
    import torch

    from clbench.policies.draws import refusal
    from clbench.policies.view import PolicyView, without_dropout
    from clbench.seeding import generator

    part = frames.parts(place)[0]
    index = torch.arange(0, len(part), stride)
    view = PolicyView(actor.policy, actor.policy, actor.pre, nullcontext)
    chunks, firsts, losses = [], [], []  # (sum over steps (A,), steps) of batches; (n, A); (n,)
    for at, some in enumerate(index.split(BATCH)):
        batch = frames.fetch(torch.stack([torch.full_like(some, place), some], 1))
        with torch.inference_mode():
            predicted = _chunks(actor, batch, seed, some)
        steps = list(range(predicted.shape[1]))
        true, pad = part.table.window("action", part.frames[some], steps)
        error = (predicted - true).double().abs()
        chunks.append(((error * ~pad[..., None]).sum((0, 1)), int((~pad).sum())))
        firsts.append(error[:, 0])
        with torch.no_grad(), without_dropout(actor.policy):
            draw = view.draw(len(some), generator("held-out loss", seed, at))
            if refusal(actor.policy) is None:
                losses.append(view.per_sample(batch, draw).double().cpu())
    chunk = (torch.stack([c for c, _ in chunks]).sum(0) / sum(n for _, n in chunks)).numpy()
    first = torch.cat(firsts).mean(0).numpy()
    there = np.ones(len(scale), dtype=bool) if part.padded is None else ~part.padded.numpy()
    dimensions = {
        name: {units: [float(v) if real else None for v, real in zip(values / by, there, strict=True)]
               for units, by in (("normalised", scale), ("data", 1.0))}
        for name, values in (("chunk_error", chunk), ("first_error", first))
    }  # fmt: skip
    found = {"chunk_error": float((chunk / scale)[there].mean()), "first_error": float((first / scale)[there].mean())}
    found |= {"loss": float(torch.cat(losses).mean())} if losses else {}
    for name, value in found.items():
        if not np.isfinite(value):
            raise UserError(f"the policy's {name} on held-out episodes is not finite: its weights are damaged.")
    return {"frames": len(index), "horizon": predicted.shape[1], "loss": None, **found, "dimensions": dimensions}


def _chunks(actor: PolicyActor, batch: Batch, seed: int, frames: torch.Tensor) -> torch.Tensor:
    """Predicted action chunks (n, H, A) in the data's units, on the CPU."""
    from clbench.data.frames import unpacked

    seen = {k: v for k, v in unpacked(batch).items() if k == "task" or _is_observation(k)}
    inputs = actor.pre(seen)
    actor.reset()  # nothing is left of other frames
    return actor.post(actor.predicted(inputs, [seed] * len(frames), frames.tolist())).float().cpu()


def _is_observation(key: str) -> bool:
    return key.startswith("observation.") and not key.endswith("_is_pad")
