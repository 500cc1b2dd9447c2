"""Evaluation processes and the jobs they share: a lost process is replaced, and its episodes are played again.

An episode's outcome depends only on the checkpoint, the task and its seed, so playing it again changes nothing. Each
process has its own pipe: one that is killed while it sends or receives stops no other.
"""

from __future__ import annotations

import mmap
import multiprocessing as mp
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import IO, Any

from tqdm import tqdm

from clbench.errors import Interrupted, UserError
from clbench.evaluation.worker import BEAT_BYTES, CALL, CALLS, COUNT, EPISODE, Beat, Job, Settings, work
from clbench.processes import Child, server, start
from clbench.slots import Slots
from clbench.stopping import Stop, how_ended
from clbench.terminal import printable, tell

POLL_S = 0.5
END_S = 2.0  # for a process to exit by itself, or after it was killed
MAKE_FACTOR = 10  # building a simulator may import, compile or load from a slow disk

Cell = tuple[int, int]  # k, j


@dataclass
class _Worker:
    """A process, its job, and how long it has been seen in one call of a simulator."""

    process: Child
    pipe: Connection
    beat: Beat
    ready: bool = False
    job: Job | None = None
    left: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)  # (j, episode): not recorded yet
    count: int = 0
    stuck_s: float = 0.0
    slot: IO[bytes] | None = None  # the slot it runs in, if it is one more than `workers`

    def call(self) -> tuple[dict[str, Any], str] | None:
        """The episode whose simulator is being called, or was when the process ended, and which call it is."""
        number = self.beat[EPISODE]
        if self.job is None or not number:
            return None
        return self.job.episodes[number - 1], CALLS[self.beat[CALL]]


class WorkerPool:
    """Plays jobs. `record` gets every finished episode's row; `failed` has the abandoned cells, and why.

    Args:
        workers: maximum number of processes, plus one for each slot that a sweep has free (slots.py).
        stop: checked between messages.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        settings: Settings,
        workers: int,
        record: Callable[[dict[str, Any]], None],
        stop: Stop,
    ) -> None:
        e = settings.config.eval
        self.settings, self.workers, self.record, self.stop = settings, workers, record, stop
        self.retries, self.timeout_s = int(e.retries), float(e.step_timeout_s)
        self.todo = deque(jobs)
        self.running: list[_Worker] = []
        self.tries: Counter[Cell] = Counter()
        self.failed: dict[Cell, dict[str, Any]] = {}
        self.slots = Slots.shared()
        self.lost = 0  # processes that died outside simulators since the last finished episode

    def play(self) -> None:
        """Play all jobs.

        Raises:
            UserError: a process failed for a reason other than its simulators, or a record cannot be written.
            Interrupted: a signal asked to stop.
        """
        before = time.monotonic()
        try:
            while self.todo or any(w.job for w in self.running):
                self.stop.check("Finished episodes are kept: run the same command again to continue.")
                self._share_out()
                for pipe in wait([w.pipe for w in self.running], timeout=POLL_S):
                    self._read(next(w for w in self.running if w.pipe is pipe))
                now = time.monotonic()
                self._look_after(min(now - before, 2 * POLL_S))  # if more, all processes were suspended
                before = now
        except Interrupted:
            for w in self.running:
                self._read(w)  # what they have finished in the meantime
            raise
        finally:
            self._end()

    def _share_out(self) -> None:
        for w in self.running:
            while w.ready and self.todo:
                job = self.todo.popleft()
                episodes = tuple(e for e in job.episodes if (job.k, e["j"]) not in self.failed)
                if episodes:
                    w.ready, w.job = False, replace(job, episodes=episodes)
                    w.left = {(e["j"], e["episode"]): e for e in episodes}
                    self._send(w, w.job)
        for w in list(self.running):
            if w.ready and w.slot is not None:  # nothing is left for it to do
                self.running.remove(w)
                self._send(w, None)
                self._close(w)
        busy = sum(w.job is not None for w in self.running)
        for _ in range(len(self.todo) + busy - len(self.running)):
            own = sum(w.slot is None for w in self.running) < self.workers
            slot = self.slots.take() if self.slots is not None and not own else None
            if not own and slot is None:
                break
            self.running.append(_start(self.settings, slot))

    def _send(self, w: _Worker, job: Job | None) -> None:
        try:
            w.pipe.send(job)
        except OSError:  # it is dead: _look_after will notice
            w.stuck_s = 0.0

    def _read(self, w: _Worker) -> None:
        """Receive all messages that a process has sent."""
        try:
            while w.pipe.poll():
                self._take(w, w.pipe.recv())
        except (EOFError, OSError):  # it has ended: nothing more will come
            w.process.wait(END_S)

    def _take(self, w: _Worker, message: tuple[Any, ...]) -> None:
        kind = message[0]
        if kind == "ready":
            self._done(w)
            w.ready = True
        elif kind == "episode":
            row = message[1]
            self.record(row)
            w.left.pop((row["j"], row["episode"]), None)
            self.lost = 0
        elif kind == "failed":
            _, j, episode, reason = message
            assert w.job is not None
            self._failed(w.job.k, w.left[j, episode], reason)
        else:
            if os.environ.get("CLBENCH_DEBUG"):
                tell(*message[2].splitlines())
            raise UserError(f"an evaluation process failed: {message[1].rstrip('.')}. Finished episodes are kept.")

    def _done(self, w: _Worker) -> None:
        """A job or its process has ended: what is left of the job is queued again."""
        if w.job is not None:
            left = tuple(e for (j, _), e in w.left.items() if (w.job.k, j) not in self.failed)
            if left:
                self.todo.appendleft(replace(w.job, episodes=left))
        w.job, w.left = None, {}

    def _failed(self, k: int, episode: dict[str, Any], reason: str) -> None:
        """An episode failed because of its simulator: it is played again, or its cell is abandoned."""
        j = episode["j"]
        self.tries[k, j] += 1
        tries = self.tries[k, j]
        where = f"k={k} j={j} episode {episode['episode']}"
        if tries <= self.retries:
            _note(f"{where}: {reason}; playing it again (retry {tries} of {self.retries})")
        elif (k, j) not in self.failed:
            _note(f"{where}: {reason}; giving up on this cell")
            self.failed[k, j] = {
                "k": k,
                "j": j,
                "task": episode["env"]["task"],
                "episode": episode["episode"],
                "seed": episode["seed"],
                "reason": reason,
                "attempts": tries,
            }

    def _look_after(self, passed_s: float) -> None:
        """Replace processes that have ended, or have been in one call of a simulator for too long."""
        for w in list(self.running):
            if w.process.poll() is not None:
                self._read(w)
                self._lose(w, how_ended(w.process.returncode))
                continue
            call = w.call()
            if call is None or w.beat[COUNT] != w.count:
                w.count, w.stuck_s = w.beat[COUNT], 0.0
                continue
            w.stuck_s += passed_s
            limit_s = self.timeout_s * (MAKE_FACTOR if call[1] == "make" else 1)
            if w.stuck_s > limit_s:
                w.process.kill()
                w.process.wait(END_S)
                self._read(w)
                self._lose(w, f"did not return within {limit_s:g} s")

    def _lose(self, w: _Worker, how: str) -> None:
        """A process is gone: blame the simulator that it was calling, if any."""
        self.running.remove(w)
        call = w.call()
        if call is not None and w.job is not None:
            self._failed(w.job.k, call[0], f"the simulator's {call[1]} {how}")
        else:
            self.lost += 1
            if self.lost > self.retries:
                raise UserError(
                    f"an evaluation process {how}. Finished episodes are kept: run the same command again, with "
                    "--workers 1 if memory is short."
                )
            _note(f"an evaluation process {how}; starting another one")
        self._done(w)
        self._close(w)

    def _close(self, w: _Worker) -> None:
        w.pipe.close()
        if w.slot is not None:
            w.process.wait(END_S)
            w.slot.close()

    def _end(self) -> None:
        """End all processes; those that do not exit by themselves are killed."""
        for w in self.running:
            if w.ready:
                self._send(w, None)
        deadline = time.monotonic() + END_S
        for w in self.running:
            if w.ready:
                w.process.wait(deadline - time.monotonic())
            w.process.kill()
        for w in self.running:
            w.process.wait(END_S)
            self._close(w)


def _start(settings: Settings, slot: IO[bytes] | None = None) -> _Worker:
    server()
    here, there = mp.Pipe()
    memory = os.memfd_create("clbench-beat")
    try:
        os.ftruncate(memory, BEAT_BYTES)
        beat: Any = memoryview(mmap.mmap(memory, BEAT_BYTES)).cast("q")
        process = start(work, settings, fds=[there.fileno(), memory], threads=settings.threads)
    finally:
        os.close(memory)
        there.close()  # else the pipe would outlive the process
    return _Worker(process, here, beat, slot=slot)


def _note(text: str) -> None:
    tqdm.write(printable(f"note: {text}"), file=sys.stderr)  # without breaking the progress bar
