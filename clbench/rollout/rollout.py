"""Many episodes at once in one process: every round, one batched policy call serves all running episodes.

A round asks the actor for the next few actions of every slot, plays them in each slot's simulator, and gives slots
whose episode ended a new one. Simulators are kept from episode to episode (`SimulatorPool`).
"""

from __future__ import annotations

import ctypes
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from clbench.envs.base import Observation, Simulator, step_unseen
from clbench.envs.making import make_simulator
from clbench.envs.remote import SimulatorDied
from clbench.errors import UserError

if TYPE_CHECKING:
    from clbench.rollout.actors import Actor


@dataclass(frozen=True)
class Episode:
    """One episode to be played. `key` identifies it for the caller."""

    key: tuple[Any, ...]
    seed: int
    env: dict[str, Any]
    instruction: str
    max_steps: int


@dataclass
class Outcome:
    """What happened. `length`: steps to the first success, else all steps. `diagnostics`: name → value → count."""

    episode: Episode
    success_once: bool
    success_at_end: bool
    length: int
    total_reward: float
    seconds: float
    diagnostics: dict[str, dict[str, int]] = field(default_factory=dict)


class SimulatorPool:
    """Idle simulators, so that the cost of building one (up to seconds) is not paid for every episode.

    At most `max_idle` are kept (None: all that ever ran); the least recently used are closed first. A simulator may
    hold a hundred megabytes, and a row of the matrix has all tasks.
    """

    def __init__(
        self, make: Callable[[dict[str, Any]], Simulator] = make_simulator, max_idle: int | None = None
    ) -> None:
        self._make, self._max_idle = make, max_idle
        self._idle: list[tuple[str, Simulator]] = []  # most recently used last

    def take(self, spec: dict[str, Any]) -> Simulator:
        key = repr(sorted(spec.items()))
        for i in reversed(range(len(self._idle))):
            if self._idle[i][0] == key:
                return self._idle.pop(i)[1]
        return self._make(spec)

    def give_back(self, spec: dict[str, Any], simulator: Simulator) -> None:
        self._idle.append((repr(sorted(spec.items())), simulator))
        while self._max_idle is not None and len(self._idle) > self._max_idle:
            self._idle.pop(0)[1].close()
            _return_memory()

    def close(self) -> None:
        for _, simulator in self._idle:
            simulator.close()
        self._idle.clear()


def _return_memory() -> None:
    """Make the C library return freed memory: in the gaps that simulators leave, the next ones do not fit."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others do it themselves
    if trim is not None:
        trim(0)


class Watch:
    """Is notified before and after every simulator call, and when one raises. This one lets the exception pass."""

    def before(self, episode: Episode, call: str) -> None:
        """The simulator of `episode` is called next; `call`: make, reset or step."""

    def after(self) -> None:
        """The call has ended."""

    def failed(self, episode: Episode, error: Exception) -> bool:
        """`episode` was dropped because its simulator raised `error`. True: drop its task's waiting episodes, too."""
        raise error


class _SimulatorError(Exception):
    """Carries what a simulator raised."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class _Slot:
    """A running episode."""

    def __init__(self, episode: Episode, pool: SimulatorPool, watch: Watch, history: int) -> None:
        self.episode, self.watch = episode, watch
        self.simulator = self._call("make", pool.take, episode.env)
        self.start = time.monotonic()
        first: Observation = self._call("reset", self.simulator.reset, episode.seed)
        self._seen = deque([first] * history, maxlen=history)
        self.calls = self.steps = 0
        self.first_success: int | None = None
        self.success = self.done = False
        self.error: Exception | None = None
        self.total_reward = 0.0
        self.counts: dict[str, Counter[str]] = {}

    @property
    def observation(self) -> Observation:
        """The last one; of an actor with a history, those of the last steps, oldest first, along a first axis."""
        if self._seen.maxlen == 1:
            return self._seen[-1]
        return {key: np.stack([o[key] for o in self._seen]) for key in self._seen[-1]}

    def _call[T](self, name: str, function: Callable[..., T], *arguments: Any) -> T:
        """Call the simulator. If the process ends in it (SystemExit included), the watch stays at this call; likewise
        if the process that holds it ends, which also loses all other simulators of this process."""
        self.watch.before(self.episode, name)
        try:
            result = function(*arguments)
        except (UserError, SimulatorDied):  # UserError is not this episode's fault: e.g. something is not installed
            raise
        except Exception as e:
            self.watch.after()
            raise _SimulatorError(e) from e
        self.watch.after()
        return result

    def play(self, actions: np.ndarray, steps_after_success: int) -> None:
        """Play actions (steps, A) until they, the episode or its simulator end."""
        self.calls += 1
        unseen = len(actions) - len(self._seen)  # after the others, the policy observes
        for i, action in enumerate(actions):
            if self.done:
                return
            try:
                if i < unseen:
                    step = self._call("step", step_unseen, self.simulator, action)
                else:
                    step = self._call("step", self.simulator.step, action)
            except _SimulatorError as e:
                self.error, self.done = e.error, True
                return
            if not math.isfinite(step.reward):
                self.error, self.done = ValueError(f"a step's reward is {step.reward}"), True
                return
            if i >= unseen:
                self._seen.append(step.observation)
            self.steps += 1
            self.total_reward += float(step.reward)
            self.success = bool(step.success)
            if self.success and self.first_success is None:
                self.first_success = self.steps
            solved = self.first_success is not None and self.steps >= self.first_success + steps_after_success
            self.done = solved or self.steps >= self.episode.max_steps

    def outcome(self) -> Outcome:
        once = self.first_success is not None
        return Outcome(
            episode=self.episode,
            success_once=once,
            success_at_end=self.success,
            length=self.first_success if self.first_success is not None else self.steps,
            total_reward=self.total_reward,
            seconds=time.monotonic() - self.start,
            diagnostics={name: dict(sorted(c.items())) for name, c in self.counts.items()},
        )


def run_episodes(
    actor: Actor,
    episodes: Iterable[Episode],
    pool: SimulatorPool,
    slots: int,
    steps_after_success: int = 0,
    watch: Watch | None = None,
) -> Iterator[Outcome]:
    """Play all episodes, at most `slots` at a time, and yield each outcome as it ends.

    Raises what a simulator raises, unless `watch` handles it: then its episode has no outcome, its simulator is not
    used again (nor closed: its state is unknown), and the others continue.
    """
    watch = watch or Watch()
    queues: dict[str, deque[Episode]] = {}
    for e in episodes:
        queues.setdefault(repr(sorted(e.env.items())), deque()).append(e)
    running: list[_Slot] = []
    preferred: deque[str] = deque()  # tasks whose simulators have just become free
    while queues or running:
        if not (actor.stateful and running):
            if actor.stateful:
                actor.reset()
            while queues and len(running) < slots:
                task = preferred.popleft() if preferred else ""
                if task not in queues:
                    busy = Counter(repr(sorted(s.episode.env.items())) for s in running)
                    task = max(queues, key=lambda t: len(queues[t]) / (1 + busy[t]))
                episode = queues[task].popleft()
                if not queues[task]:
                    del queues[task]
                try:
                    running.append(_Slot(episode, pool, watch, actor.history))
                except _SimulatorError as e:
                    if watch.failed(episode, e.error):
                        queues.pop(task, None)
        if running:
            _round(actor, running, steps_after_success)
        still: list[_Slot] = []
        keep_all = actor.stateful and not all(s.done for s in running)
        for slot in running:
            if keep_all or not slot.done:
                still.append(slot)
                continue
            if slot.error is not None:
                if watch.failed(slot.episode, slot.error):
                    queues.pop(repr(sorted(slot.episode.env.items())), None)
                continue
            pool.give_back(slot.episode.env, slot.simulator)
            preferred.append(repr(sorted(slot.episode.env.items())))
            yield slot.outcome()
        running = still


def _round(actor: Actor, running: Sequence[_Slot], steps_after_success: int) -> None:
    actions, diagnostics = actor.act(
        [s.observation for s in running],
        [s.episode.instruction for s in running],
        [s.episode.seed for s in running],
        [s.calls for s in running],
    )
    for i, slot in enumerate(running):
        if slot.done:  # a stateful actor's companions are still running
            continue
        for name, values in diagnostics.items():
            slot.counts.setdefault(name, Counter())[str(int(values[i]))] += 1
        slot.play(actions[i], steps_after_success)
