"""An evaluation process: takes rows of the matrix, plays their episodes, sends back records.

A simulator that raises costs one try of its episode. One that kills the process, or never returns, is named in shared
memory, where the parent (pool.py) finds it.
"""

from __future__ import annotations

import functools
import mmap
import os
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from clbench.checkpoints.trusted import NOTHING, Trust, trust
from clbench.envs.remote import SimulatorDied
from clbench.errors import shortage
from clbench.evaluation.rows import Weights
from clbench.stopping import belong_to

if TYPE_CHECKING:
    from clbench.rollout.rollout import Episode


@dataclass(frozen=True)
class Job:
    """Episodes of one row."""

    k: int
    weights: Weights
    episodes: tuple[dict[str, Any], ...]  # {"j", "task_id", "episode", "seed", "env", "instruction", "max_steps"}


@dataclass(frozen=True)
class Settings:
    """What is the same for all jobs of an evaluation."""

    config: Any
    slots: int
    steps_after_success: int
    device: str
    threads: int
    trust: Trust = NOTHING  # what the command line trusts
    shown: dict[str, Any] | None = None  # images in the place of what cameras see (view "blind")


class Beat(Protocol):
    """Three numbers in memory shared by this process and its parent: what a parent sees of a hung process."""

    def __getitem__(self, i: int) -> int: ...

    def __setitem__(self, i: int, value: int) -> None: ...


BEAT_BYTES = 3 * 8
COUNT, EPISODE, CALL = range(3)  # simulator calls so far; 1 + the current call's episode, 0 = none; which call
CALLS = ("make", "reset", "step")


class Reporter:
    """Tells the parent through shared memory which simulator is being called, and through the pipe which failed."""

    def __init__(self, job: Job, beat: Beat, send: Callable[[tuple[Any, ...]], None], retries: int) -> None:
        self.beat, self.send, self.retries, self.episodes = beat, send, retries, job.episodes
        self.numbers = {(e["j"], e["episode"]): i + 1 for i, e in enumerate(job.episodes)}
        self.failures: Counter[int] = Counter()

    def before(self, episode: Episode, call: str) -> None:
        self.beat[CALL] = CALLS.index(call)
        self.beat[COUNT] += 1
        self.beat[EPISODE] = self.numbers[episode.key]

    def after(self) -> None:
        self.beat[EPISODE] = 0

    def failed(self, episode: Episode, error: Exception) -> bool:
        """Report it; drop the task when the parent, which sees at least as many failures, gives up on it too."""
        j, number = episode.key
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        self.send(("failed", j, number, f"the simulator raised {reason}"))
        self.failures[j] += 1
        return self.failures[j] > self.retries

    def died(self, how: str) -> None:
        """Report the episode whose simulator was being called when the simulators' own process ended."""
        e = self.episodes[self.beat[EPISODE] - 1]
        self.send(("failed", e["j"], e["episode"], f"the simulator's {CALLS[self.beat[CALL]]} {how}"))
        self.after()


def work(descriptors: list[int], settings: Settings) -> None:
    """Play jobs from a pipe until None arrives. `descriptors`: of the pipe, and of the memory for `Beat`.

    Sends ("ready",) before each job, ("episode", record), ("failed", j, episode, reason) when a simulator raised, and
    ("error", message, traceback) before it ends for any other exception.
    """
    belong_to(os.getppid())
    pipe = Connection(descriptors[0])
    beat: Any = memoryview(mmap.mmap(descriptors[1], BEAT_BYTES)).cast("q")
    try:
        from clbench.rollout.rollout import SimulatorPool

        pool = SimulatorPool(max_idle=2 * settings.slots)
        pipe.send(("ready",))
        while (job := pipe.recv()) is not None:
            watch = Reporter(job, beat, pipe.send, settings.config.eval.retries)
            try:
                for record in play(job, settings, pool, watch):
                    pipe.send(("episode", record))
            except SimulatorDied as e:  # it had all the simulators: the rest of the job is played with new ones
                watch.died(e.how)
                pool = SimulatorPool(max_idle=2 * settings.slots)
            pipe.send(("ready",))
        pool.close()
    except Exception as e:  # noqa: BLE001 (the parent raises it again)
        pipe.send(("error", shortage(e) or str(e) or type(e).__name__, traceback.format_exc()))


def play(job: Job, settings: Settings, pool: Any, watch: Any = None) -> Any:
    """Play one job's episodes; yields a record per episode as it ends."""
    from clbench.rollout.rollout import Episode, run_episodes

    for actor, view, chosen in actors(job, settings):
        episodes = [
            Episode((e["j"], e["episode"]), e["seed"], e["env"], e["instruction"], e["max_steps"]) for e in chosen
        ]
        with view():
            for o in run_episodes(actor, episodes, pool, settings.slots, settings.steps_after_success, watch):
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


def actors(job: Job, settings: Settings) -> Any:
    """(actor, view to act in, its episodes): one, unless the algorithm's view differs between tasks."""
    import torch

    from clbench.rollout.actors import PolicyActor, RandomActor

    torch.set_num_threads(settings.threads)
    w = job.weights
    if w.policy is None:
        from clbench.envs.making import family

        yield RandomActor(family(job.episodes[0]["env"]["type"]).action_dim), nullcontext, job.episodes
        return
    from clbench.algorithms.build import build_algorithm
    from clbench.algorithms.hooks import CLAlgorithm
    from clbench.algorithms.state import restore_state
    from clbench.checkpoints.policy_io import keep_in_dtype, load_policy, pick_device
    from clbench.checkpoints.state import load_state

    trust(settings.trust)
    loaded = load_policy(w.policy, pick_device(settings.device))
    algorithm = CLAlgorithm(None)
    if w.state is not None:
        algorithm = build_algorithm(settings.config, check=False)
        algorithm.restore_structure(loaded.policy, Path(w.policy))
        restore_state(algorithm, load_state(Path(w.state), "algorithm"), loaded.policy)
        keep_in_dtype(loaded.policy, settings.config)
    if w.within:
        actor = PolicyActor(loaded, settings.slots, algorithm.eval_diagnostics, settings.shown)
        yield actor, nullcontext, job.episodes
        return
    groups: dict[str, list[dict[str, Any]]] = {}
    for e in job.episodes:
        groups.setdefault(algorithm.view_key(e["task_id"]), []).append(e)
    for chosen in groups.values():
        view = functools.partial(algorithm.eval_view, loaded.policy, chosen[0]["task_id"])
        yield PolicyActor(loaded, settings.slots, algorithm.eval_diagnostics, settings.shown), view, chosen
