"""Making demonstrations: scripted experts act in a simulator, and their episodes are stored in LeRobot's format.

For each task, attempt i runs the episode of seed `episode_seed(seed, env_type, task, "demo", i)`:

    label    = clip(expert(observation), -1, 1)                  recorded with the observation it answers
    executed = clip(expert(observation) + N(0, action_noise²))   what the simulator is given

The noise shows the policy states slightly off the expert's path together with the way back. An attempt that
succeeds within `max_steps` is kept, up to `tail_steps` steps after its first success; others are dropped.
Attempts continue until there are `demos_per_task`. A task of which too few succeed ends the command, or is left out.

The contents are a pure function of the parameters: worker processes collect whole tasks, and this process writes them
in the given order, each as soon as it arrives. Camera images pass through files, one per episode. Everything is written
next to the final folder and renamed into place at the end, so a folder with the set's name is always complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import queue
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import numpy as np

from clbench.data.episode_images import EpisodeImages, read_images
from clbench.data.experts.base import episode_expert, experts
from clbench.data.info import FORMAT, INFO_FILE, DataInfo, fingerprint, fingerprint_with_images, load_info
from clbench.data.verify import contents, damage, file_sums
from clbench.data.writing import quiet_libraries, working_folder
from clbench.envs.base import EVAL_SEED_BASE, STATE_KEY, Expert, Observation, Simulator, SimulatorFamily, step_unseen
from clbench.envs.making import (
    check_other_python,
    check_task,
    family,
    instruction,
    make_simulator,
    simulator_versions,
)
from clbench.envs.rendering import check_render
from clbench.errors import UserError, shortage
from clbench.io import seal, write_json
from clbench.patience import patience
from clbench.processes import Child, server, start
from clbench.stopping import belong_to, how_ended
from clbench.terminal import tell

ACTION_KEY = "action"
ATTEMPTS_PER_DEMO = 10  # give up on a task after this many attempts for each demonstration wanted
ATTEMPTS_IN_VAIN = 50  # or after this many without a single success
ROLES = ("demo", "ceiling")
SIMULATOR_ONLY = ()  # imports that its processes share: none, as LeRobot takes longer to import than a task to collect
END_S = 5.0  # for a process to be gone once its pipe has ended
_SEEDS_PER_ROLE = EVAL_SEED_BASE // len(ROLES)
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class TaskPlan:
    """What one worker needs to collect one task.

    `render`: how cameras draw, `images`: how the paths of their files begin; None without cameras. `leave_out`: too few
    successes are no error.
    """

    env_type: str
    task: str
    seed: int
    demos: int
    action_noise: float
    tail_steps: int
    max_steps: int
    ceiling_episodes: int
    render: dict[str, Any] | None = None
    images: str | None = None
    leave_out: bool = False

    @property
    def spec(self) -> dict[str, Any]:
        """The simulator's, for `make_simulator`."""
        drawn = {} if self.render is None else {"render": self.render}
        return {"type": self.env_type, "task": self.task, **drawn}


@dataclass
class Recorded:
    """One demonstration: states (T, S) and labels (T, A), both float32; its images' file and their digests."""

    states: np.ndarray
    labels: np.ndarray
    images: Path | None = None
    digests: tuple[str, ...] = ()


@dataclass
class Collected:
    """One task's demonstrations, or why there are none: `left_out`."""

    episodes: list[Recorded]
    attempts: int
    ceiling_successes: int
    left_out: str = ""


class OtherSet(UserError):
    """The folder where a set is to be made holds one with other parameters."""


def demonstrable(env_type: str, tasks: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return those of `tasks` for which demonstrations can be made, in order, and why not for the others.

    Raises:
        UserError: none can be made.
    """
    known = experts(env_type).cannot
    cannot = {task: known[task] for task in tasks if task in known}
    if cannot and len(cannot) == len(set(tasks)):
        raise UserError(_impossible(cannot))
    return [task for task in tasks if task not in cannot], cannot


def _impossible(cannot: Mapping[str, str]) -> str:
    listed = "; ".join(f"{task}: {why}" for task, why in cannot.items())
    return f"no demonstrations can be made for {listed}. Leave {'it' if len(cannot) == 1 else 'them'} out."


def episode_seed(seed: int, env_type: str, task: str, role: str, attempt: int) -> int:
    """Return the simulator seed of one attempt, in [0, EVAL_SEED_BASE).

    An affine permutation of the range, drawn from (seed, env_type, task): within a task no two attempts, in
    either role ("demo", "ceiling"), share a seed, and evaluation's seeds are never used.
    """
    if not 0 <= attempt < _SEEDS_PER_ROLE:
        raise ValueError(f"attempt {attempt} is outside [0, {_SEEDS_PER_ROLE}).")
    digest = hashlib.sha256(f"{seed}/{env_type}/{task}".encode()).digest()
    offset = int.from_bytes(digest[:8], "little")
    factor = 10 * int.from_bytes(digest[8:16], "little") + 7  # prime to 10, hence to EVAL_SEED_BASE
    return (factor * (ROLES.index(role) * _SEEDS_PER_ROLE + attempt) + offset) % EVAL_SEED_BASE


def run_episode(
    simulator: Simulator,
    expert: Expert,
    seed: int,
    max_steps: int,
    tail_steps: int,
    action_noise: float,
    rng: np.random.Generator,
    see: Callable[[Observation], None] | None = None,
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Let the expert act through one episode.

    Returns states (T, S) and clean clipped labels (T, A), both float32, and whether it succeeded. T is at
    most `max_steps`, and at most `tail_steps` more than the first success took. `see` is called with every observation
    that is recorded; without it no camera image is drawn.
    """
    observation = simulator.reset(seed)
    states: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    last = max_steps
    success = False
    while len(states) < last:
        action = expert(observation)
        if see is not None:
            see(observation)
        states.append(observation[STATE_KEY])
        labels.append(np.clip(action, -1.0, 1.0).astype(np.float32))
        if action_noise > 0:
            action = action + rng.normal(0.0, action_noise, action.shape)
        executed = np.clip(action, -1.0, 1.0)
        observation, _, succeeded = step_unseen(simulator, executed) if see is None else simulator.step(executed)
        if succeeded and not success:
            success = True
            last = min(max_steps, len(states) + tail_steps)
    return np.stack(states), np.stack(labels), success


def collect_task(plan: TaskPlan) -> Collected:
    """Collect one task's demonstrations and measure its expert; a pure function of `plan`.

    Raises UserError when too few attempts succeed, unless the plan says to leave the task out.
    """
    simulator = make_simulator(plan.spec)

    def attempt(
        role: str, i: int, tail_steps: int, noise: float, see: Callable[[Observation], None] | None = None
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        seed = episode_seed(plan.seed, plan.env_type, plan.task, role, i)
        rng = np.random.default_rng((plan.seed, seed))
        expert = episode_expert(plan.spec, simulator)
        return run_episode(simulator, expert, seed, plan.max_steps, tail_steps, noise, rng, see)

    def demonstrate(i: int, number: int) -> Recorded | None:
        """Attempt i, kept as demonstration `number` when it succeeds."""
        if plan.images is None:
            states, labels, success = attempt("demo", i, plan.tail_steps, plan.action_noise)
            return Recorded(states, labels) if success else None
        images = EpisodeImages(Path(f"{plan.images}-{number:06d}.zip"), list(family(plan.env_type).cameras))
        states, labels, success = attempt("demo", i, plan.tail_steps, plan.action_noise, images.add)
        if not success:
            images.discard()
            return None
        return Recorded(states, labels, images.path, tuple(images.close()))

    try:
        episodes: list[Recorded] = []
        attempts = 0
        while len(episodes) < plan.demos:
            if attempts == ATTEMPTS_PER_DEMO * plan.demos or (attempts == ATTEMPTS_IN_VAIN and not episodes):
                few = (
                    f"the expert of '{plan.task}' succeeded in {len(episodes)} of {attempts} attempts "
                    f"({len(episodes) / attempts:.0%}), too few for {plan.demos} demonstration{'s' * (plan.demos > 1)}"
                )
                if plan.leave_out:
                    return Collected([], attempts, 0, few)
                raise UserError(
                    f"{few}. Raise max_steps (now {plan.max_steps}), lower action_noise (now {plan.action_noise}), "
                    "or leave the task out (--leave-out-failing leaves out every such task)."
                )
            recorded = demonstrate(attempts, len(episodes))
            attempts += 1
            if recorded is not None:
                episodes.append(recorded)
        successes = sum(attempt("ceiling", i, 0, 0.0)[2] for i in range(plan.ceiling_episodes))
    finally:
        simulator.close()
    return Collected(episodes, attempts, successes)


def make_dataset(
    root: Path,
    *,
    name: str,
    env_type: str,
    tasks: list[str],
    demos_per_task: int,
    seed: int,
    action_noise: float = 0.1,
    tail_steps: int = 10,
    max_steps: int = 200,
    ceiling_episodes: int = 20,
    workers: int = 2,
    progress: bool = True,
    force: bool = False,
    render: Mapping[str, Any] | None = None,
    leave_out: bool = False,
    only_check: bool = False,
) -> Path:
    """Make the data set `name` in folder `root`, as one LeRobotDataset v3, and return `root`.

    Args:
        root: the data set's own folder; its parent is made where missing.
        name: the set's name; its LeRobot `repo_id`.
        env_type, tasks: the simulator and its tasks, in the order that numbers them (task_index).
        demos_per_task: successful episodes kept per task.
        seed: determines every episode, together with the task's name; the number of workers has no effect.
        action_noise: standard deviation of the noise on executed actions (actions span [-1, 1]).
        tail_steps: steps kept after the first success.
        max_steps: the longest episode, in control steps.
        ceiling_episodes: noiseless episodes per task that measure the expert; 0 measures none.
        workers: processes; never more than there are tasks.
        progress: report on stderr: a bar on a terminal, otherwise a line per task.
        force: replace an existing set that differs, or is damaged.
        render: for a simulator with cameras, how they draw: {"fidelity": fast | full, "size": pixels}.
        leave_out: leave out, and list in the description, tasks that their expert cannot do, unless it can do none.
        only_check: raise what forbids making it, and make nothing.

    An existing set with the same parameters is left as it is. Raises UserError for a bad parameter, an
    existing set with other parameters, a folder that clbench may not replace, and a task that its expert
    cannot do.
    """
    root = Path(root)
    simulators = family(env_type)
    drawn: dict[str, Any] | None = None
    if simulators.cameras:
        drawn = dict(zip(("fidelity", "size"), check_render(render or {}), strict=True))
    elif render is not None:
        raise UserError(f"environment type '{env_type}' has no cameras to render.")
    plans = [
        TaskPlan(
            env_type,
            task,
            seed,
            demos_per_task,
            float(action_noise),
            tail_steps,
            max_steps,
            ceiling_episodes,
            drawn,
            leave_out=leave_out,
        )
        for task in tasks
    ]
    _check(plans, workers, simulators.max_steps)
    wanted = {
        "name": name,
        "env_type": env_type,
        "seed": seed,
        "action_noise": float(action_noise),
        "tail_steps": tail_steps,
        "max_steps": max_steps,
        "demos_per_task": demos_per_task,
        "ceiling_episodes": ceiling_episodes,
        "tasks": list(tasks),
        **({"render": drawn} if drawn else {}),
    }
    if only_check:
        _is_made(root, wanted, force, leave_out)
        return root
    with working_folder(root) as folder:
        if _is_made(root, wanted, force, leave_out):
            _tell(progress, f"{root} already holds '{name}' with these parameters; nothing to do.")
            return root
        check_other_python(env_type)
        if drawn is not None:
            simulator_versions(env_type)  # reports at once if images cannot be drawn here
            (folder / "images").mkdir()
            plans = [replace(plan, images=str(folder / "images" / f"{k:04d}")) for k, plan in enumerate(plans)]
        new = folder / "dataset"
        with _collecting(plans, workers, progress) as collected, quiet_libraries():
            _write(new, name, simulators, plans, collected, wanted)
        with quiet_libraries(), patience("reading back what was written"):
            info = _verify(new)
        if root.exists():
            os.replace(root, folder / "replaced")
        os.replace(new, root)
    _tell(
        progress,
        f"{root}: {len(info.tasks)} task{'s' * (len(info.tasks) > 1)}, {info.episodes} episodes, {info.frames} frames.",
    )
    return root


def _check(plans: list[TaskPlan], workers: int, longest: int) -> None:
    if not plans:
        raise UserError("a data set needs at least one task.")
    names = [plan.task for plan in plans]
    repeated = sorted({task for task in names if names.count(task) > 1})
    if repeated:
        raise UserError(f"tasks named more than once: {', '.join(repeated)}.")
    for plan in plans:
        check_task(plan.env_type, plan.task)
    cannot = demonstrable(plans[0].env_type, names)[1]
    if cannot:
        raise UserError(_impossible(cannot))
    said: dict[str, str] = {}
    for plan in plans:
        first = said.setdefault(instruction({"type": plan.env_type, "task": plan.task}), plan.task)
        if first != plan.task and not family(plan.env_type).cameras:  # a camera shows which scene it is
            raise UserError(f"{first} and {plan.task} have the same instruction: a data set can hold only one of them.")
    plan = plans[0]
    limits = (
        ("demos_per_task", plan.demos, 1, _SEEDS_PER_ROLE // ATTEMPTS_PER_DEMO),
        ("seed", plan.seed, 0, 2**63 - 1),
        ("tail_steps", plan.tail_steps, 0, longest),
        ("max_steps", plan.max_steps, 1, longest),
        ("ceiling_episodes", plan.ceiling_episodes, 0, _SEEDS_PER_ROLE),
        ("workers", workers, 1, 1024),
    )
    for key, value, low, high in limits:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise UserError(f"{key} must be a whole number from {low} to {high}, not {value!r}.")
    if not (math.isfinite(plan.action_noise) and plan.action_noise >= 0):
        raise UserError(f"action_noise must be 0 or more, not {plan.action_noise!r}.")


def _is_made(root: Path, wanted: dict[str, Any], force: bool, leave_out: bool) -> bool:
    """Whether `root` holds the wanted set; False: it has to be made there; UserError: it must not be.

    With `leave_out`, one that was made with it lacks the tasks that it left out.
    """
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    if not (root / INFO_FILE).is_file():
        raise UserError(f"{root} exists and was not made by clbench. Move it away, or choose another name.")
    try:
        info = load_info(root)
    except UserError:
        if force:
            return False
        raise
    if leave_out:
        wanted = wanted | {"tasks": [name for name in wanted["tasks"] if name not in info.left_out]}
    found = {key: getattr(info, key) for key in wanted} | {"tasks": [t.name for t in info.tasks]}
    differing = [f"{key} is {found[key]}, wanted {wanted[key]}" for key in wanted if found[key] != wanted[key]]
    if differing and not force:
        raise OtherSet(
            f"{root} already holds a data set with other parameters: {'; '.join(differing)}. "
            "Use another name, or --force to replace it."
        )
    if differing:
        return False
    problem = damage(info, full=True)
    if problem is not None and not force:
        raise UserError(f"the data set in {root} is damaged: {problem}. --force makes it again.")
    return problem is None


@contextlib.contextmanager
def _collecting(plans: list[TaskPlan], workers: int, progress: bool) -> Iterator[Iterator[Collected]]:
    """Let worker processes collect all plans; yields the results in the order of `plans`, each as it arrives.

    Each process has a pipe, and a thread that sends it plans. ProcessPoolExecutor would leave named semaphores in
    /dev/shm when all of a make's processes are killed together, and would not report how a process ended.
    """
    count = min(workers, len(plans))
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    started: list[_Worker] = []
    threads = ThreadPoolExecutor(count)
    try:
        with _one_thread():
            server(SIMULATOR_ONLY)  # before any pipe is opened
            while len(started) < count:
                started.append(_start_worker())
                idle.put(started[-1])
        futures = [threads.submit(_collect, idle, plan) for plan in plans]
        with _reporting(plans, futures, progress):
            yield _in_order(futures)
    finally:
        for w in started:  # idle, unless this was ended by an exception
            w.process.kill()
        threads.shutdown(wait=True, cancel_futures=True)
        for w in started:
            w.process.wait()
            w.pipe.close()


@dataclass
class _Worker:
    """A process that collects tasks, and this process's end of its pipe."""

    process: Child
    pipe: Connection


def _start_worker() -> _Worker:
    here, there = Pipe()
    process = start(_work, fds=[there.fileno()], modules=SIMULATOR_ONLY)
    there.close()  # else the pipe would outlive the process
    return _Worker(process, here)


def _work(descriptors: list[int]) -> None:
    """In a worker: collect plans from a pipe, until killed; signals are left to its parent."""
    belong_to(os.getppid())
    pipe: Connection[Any, Any] = Connection(descriptors[0])
    while True:
        plan = pipe.recv()
        try:
            pipe.send((collect_task(plan), None, ""))
        except UserError as e:
            pipe.send((None, str(e), ""))
        except Exception as e:  # noqa: BLE001 (the parent raises it again)
            pipe.send((None, shortage(e) or "", traceback.format_exc()))


def _collect(idle: queue.SimpleQueue[_Worker], plan: TaskPlan) -> Collected:
    """In a thread of the parent: let the next idle process collect one task."""
    w = idle.get()
    try:
        w.pipe.send(plan)
        collected, message, trace = w.pipe.recv()
    except (EOFError, OSError) as e:
        w.process.wait(END_S)
        raise UserError(
            f"a process that made the demonstrations of {plan.task} {how_ended(w.process.returncode)}. Nothing was "
            "written. Run the command again, with --workers 1 if memory is short."
        ) from e
    finally:
        idle.put(w)
    if collected is not None:
        return collected  # type: ignore[no-any-return]
    error: Exception = UserError(message) if message else RuntimeError(trace.strip().splitlines()[-1])
    if trace:
        error.add_note(trace)
    raise error


def _in_order(futures: list[Future[Collected]]) -> Iterator[Collected]:
    """Yield the results in order; raises what any of them raised as soon as it did."""
    waiting = set(futures)
    for future in futures:
        while not future.done():
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for other in done:
                other.result()
        yield future.result()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Make processes that are started in the block compute with one thread each."""
    before = {key: os.environ.get(key) for key in _ONE_THREAD}
    os.environ.update(dict.fromkeys(_ONE_THREAD, "1"))
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


@contextlib.contextmanager
def _reporting(plans: list[TaskPlan], futures: list[Future[Collected]], progress: bool) -> Iterator[None]:
    """Report tasks as they end: a bar on a terminal, a line each elsewhere."""
    from tqdm import tqdm

    on_terminal = progress and sys.stderr.isatty()
    done = 0
    with tqdm(total=len(plans), unit="task", desc="demonstrations", disable=not on_terminal) as bar:

        def ended(plan: TaskPlan, future: Future[Collected]) -> None:
            nonlocal done
            if future.cancelled() or future.exception() is not None:
                return
            result = future.result()
            done += 1
            bar.update()
            if result.left_out:
                _tell(progress, f"[{done}/{len(plans)}] {plan.task} is left out: {result.left_out}")
            elif not on_terminal:
                frames = sum(len(e.states) for e in result.episodes)
                _tell(
                    progress,
                    f"[{done}/{len(plans)}] {plan.task}: {len(result.episodes)} of {result.attempts} attempts "
                    f"kept, {frames} frames; without noise {result.ceiling_successes}/{plan.ceiling_episodes}",
                )

        def far(line: str) -> None:
            if on_terminal:
                bar.refresh()
            else:
                _tell(progress, line)

        for plan, future in zip(plans, futures, strict=True):
            future.add_done_callback(partial(ended, plan))
        with patience("making demonstrations", lambda: f"{done} of {len(plans)} tasks collected", say=far):
            yield


def _features(simulators: SimulatorFamily, size: int) -> dict[str, Any]:
    """LeRobot's description of what is recorded, in the order of LIBERO's sets on the Hugging Face hub."""
    names = simulators.names
    image = {"dtype": "image", "shape": (size, size, 3), "names": ["height", "width", "channel"]}
    return {
        **{camera: dict(image) for camera in simulators.cameras},
        STATE_KEY: {"dtype": "float32", "shape": (simulators.state_dim,), "names": names.get(STATE_KEY)},
        ACTION_KEY: {"dtype": "float32", "shape": (simulators.action_dim,), "names": names.get(ACTION_KEY)},
    }


def _write(
    folder: Path,
    name: str,
    simulators: SimulatorFamily,
    plans: list[TaskPlan],
    collected: Iterator[Collected],
    wanted: dict[str, Any],
) -> None:
    """Write the episodes, task by task, and the description. Image files are removed once they are written."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    seen = list(simulators.cameras)
    dataset = LeRobotDataset.create(
        repo_id=name,
        fps=simulators.fps,
        features=_features(simulators, (plans[0].render or {}).get("size", 0)),
        root=folder,
        robot_type=simulators.robot_type,
        use_videos=False,
    )
    described = []
    left_out: dict[str, str] = {}
    marks = _Fingerprint()
    numbers: dict[str, int] = {}  # of instructions: LeRobot's task_index
    episode = 0
    for plan, result in zip(plans, collected, strict=True):
        if result.left_out:
            left_out[plan.task] = result.left_out
            continue
        sentence = instruction(plan.spec)
        task_index = numbers.setdefault(sentence, len(numbers))
        for recorded in result.episodes:
            length = len(recorded.states)
            path = recorded.images
            images: Iterator[dict[str, np.ndarray]] = (
                iter([{}] * length) if path is None else read_images(path, seen, length)
            )
            for state, label, image in zip(recorded.states, recorded.labels, images, strict=True):
                dataset.add_frame({**image, STATE_KEY: state, ACTION_KEY: label, "task": sentence})
            dataset.save_episode()
            marks.add(recorded, task_index)
            if path is not None:
                path.unlink()
        measured = plan.ceiling_episodes
        described.append(
            {
                "name": plan.task,
                "instruction": sentence,
                "task_index": task_index,
                "episodes": list(range(episode, episode + len(result.episodes))),
                "frames": sum(len(e.states) for e in result.episodes),
                "expert_attempts": measured,
                "expert_successes": result.ceiling_successes,
                "expert_success_rate": result.ceiling_successes / measured if measured else None,
                "demo_attempts": result.attempts,
                "demo_successes": len(result.episodes),
                "demo_success_rate": len(result.episodes) / result.attempts,
            }
        )
        episode += len(result.episodes)
    if not described:
        raise UserError(
            f"no demonstrations can be made for '{name}' under these settings: the expert can do none of its tasks. "
            f"Raise max_steps (now {plans[0].max_steps}) or lower action_noise (now {plans[0].action_noise})."
        )
    dataset.finalize()
    if seen:
        shutil.rmtree(folder / "images", ignore_errors=True)  # LeRobot's, now empty
    label = simulators.privileged
    info = {
        "format": FORMAT,
        **wanted,
        **({"privileged": label} if label else {}),
        "tasks": described,
        **({"left_out": left_out} if left_out else {}),
        "fingerprint": marks.value(),
        "versions": simulator_versions(plans[0].env_type) | {"numpy": version("numpy"), "lerobot": version("lerobot")},
    }
    info["files"] = file_sums(folder)
    write_json(folder / INFO_FILE, info | {"seal": seal(info)})


class _Fingerprint:
    """The fingerprint of what is written, episode by episode."""

    def __init__(self) -> None:
        self._states: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._tasks: list[int] = []
        self._digests: list[str] = []

    def add(self, recorded: Recorded, task_index: int) -> None:
        self._states.append(recorded.states)
        self._labels.append(recorded.labels)
        self._tasks.append(task_index)
        self._digests += recorded.digests

    def value(self) -> str:
        lengths = [len(states) for states in self._states]
        rest = fingerprint(
            np.concatenate(self._states),
            np.concatenate(self._labels),
            np.repeat(np.arange(len(lengths)), lengths),
            np.repeat(self._tasks, lengths),
        )
        return fingerprint_with_images(rest, self._digests)


def _verify(folder: Path) -> DataInfo:
    """Read a written set back and compare it with its description; RuntimeError when they disagree."""
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata

    info = load_info(folder)
    meta = LeRobotDatasetMetadata(info.name, root=folder)
    if (meta.total_episodes, meta.total_frames) != (info.episodes, info.frames):
        raise RuntimeError(
            f"{folder}: wrote {info.episodes} episodes and {info.frames} frames, "
            f"read back {meta.total_episodes} and {meta.total_frames}."
        )
    written = {str(sentence): int(row["task_index"]) for sentence, row in meta.tasks.iterrows()}
    if written != {t.instruction: t.task_index for t in info.tasks}:
        raise RuntimeError(f"{folder}: LeRobot numbered the tasks differently: {written}.")
    if contents(folder, info.env_type, info.episodes) != info.fingerprint:
        raise RuntimeError(f"{folder}: the frames read back are not those written.")
    problem = damage(info, full=True)
    if problem is not None:
        raise RuntimeError(f"{folder}: {problem}.")
    return info


def _tell(progress: bool, line: str) -> None:
    if progress:
        tell(line)
