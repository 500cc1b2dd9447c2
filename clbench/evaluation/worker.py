"""An evaluation process: takes rows of the matrix, plays their episodes, sends back records."""

from __future__ import annotations

import functools
import os
import traceback
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """Episodes of one row. `policy` is a checkpoint folder, a base's folder, or None for random actions."""

    k: int
    policy: str | None
    checkpoint: str | None
    episodes: tuple[dict[str, Any], ...]  # {"j", "task_id", "episode", "seed", "env", "instruction", "max_steps"}


@dataclass(frozen=True)
class Settings:
    """The same for all jobs of an evaluation."""

    config: Any
    slots: int
    steps_after_success: int
    device: str
    threads: int


def work(jobs: Any, results: Any, settings: Settings) -> None:
    """Play jobs until None comes. Sends ("episode", record), ("done", k) and ("error", message, traceback)."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(settings.threads)
    try:
        import torch

        torch.set_num_threads(settings.threads)
        from clbench.rollout.rollout import SimulatorPool

        pool = SimulatorPool()
        results.put(("ready", os.getpid()))
        while (job := jobs.get()) is not None:
            for record in play(job, settings, pool):
                results.put(("episode", record))
            results.put(("done", job.k))
        pool.close()
        results.put(("end", os.getpid()))
    except KeyboardInterrupt:
        results.put(("error", "interrupted", ""))
    except Exception as e:  # noqa: BLE001 (the parent raises it)
        results.put(("error", str(e) or type(e).__name__, traceback.format_exc()))


def play(job: Job, settings: Settings, pool: Any) -> Any:
    """Play one job's episodes; yields a record per episode as it ends."""
    from clbench.rollout.rollout import Episode, run_episodes

    for actor, view, chosen in _actors(job, settings):
        episodes = [
            Episode((e["j"], e["episode"]), e["seed"], e["env"], e["instruction"], e["max_steps"]) for e in chosen
        ]
        with view():
            for o in run_episodes(actor, episodes, pool, settings.slots, settings.steps_after_success):
                yield _record(job.k, o)


def _record(k: int, o: Any) -> dict[str, Any]:
    j, episode = o.episode.key
    record = {
        "k": k,
        "j": j,
        "episode": episode,
        "seed": o.episode.seed,
        "success_once": o.success_once,
        "success_at_end": o.success_at_end,
        "length": o.length,
        "return": round(o.total_reward, 4),
        "seconds": round(o.seconds, 3),
    }
    return {**record, "routing": o.diagnostics} if o.diagnostics else record


def _actors(job: Job, settings: Settings) -> Any:
    """(actor, view to act in, its episodes): one, unless the algorithm's view differs between tasks."""
    from clbench.rollout.actors import PolicyActor, RandomActor

    if job.policy is None:
        from clbench.envs.base import backend

        yield RandomActor(backend(job.episodes[0]["env"]["type"]).ACTION_DIM), nullcontext, job.episodes
        return
    from clbench.algorithms.build import build_algorithm
    from clbench.algorithms.hooks import CLAlgorithm
    from clbench.checkpoints.policy_io import load_policy, pick_device
    from clbench.checkpoints.state import load_state

    loaded = load_policy(job.policy, pick_device(settings.device))
    algorithm = CLAlgorithm(None)
    if job.checkpoint is not None:
        algorithm = build_algorithm(settings.config, check=False)
        algorithm.restore_structure(loaded.policy, Path(job.policy))
        algorithm.load_state_dict(load_state(Path(job.checkpoint), "algorithm"))
    groups: dict[str, list[dict[str, Any]]] = {}
    for e in job.episodes:
        groups.setdefault(algorithm.view_key(e["task_id"]), []).append(e)
    for chosen in groups.values():
        view = functools.partial(algorithm.eval_view, loaded.policy, chosen[0]["task_id"])
        yield PolicyActor(loaded, settings.slots, algorithm.eval_diagnostics), view, chosen
