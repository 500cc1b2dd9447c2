"""Evaluation speed: clbench's evaluator against the loop that one would write first, or against LeRobot's.

- evaluator: clbench.evaluation with `--workers` processes of one torch thread each; in each, up to `slots` episodes
  advance together and one batched policy call serves them all. Records are written to disk as always.
- loop: one process with torch's default threads; for every episode, one simulator and `policy.select_action` at every
  step (the policy itself keeps its chunk), with LeRobot's pre- and postprocessor around it.
- `--peer lerobot`: what `lerobot-eval` calls, LeRobot's `eval_policy`, unmodified and without its videos: a vector
  environment of `eval.slots` of our simulators per task (in this process, or with `--async-envs` a process each), which
  draw an image after every step, and one policy call per step for all of them. It waits for the longest of `slots`
  episodes, and draws action noise from the global generator: only rates of success can be compared.

Same checkpoint, tasks, episode seeds, step limit and stop rule. In turn (A B A B …), each in fresh processes. Speed =
episodes per second from the start of the first episode to the end of the last; "with start-up" counts from the start
of the first process to the end of the last, imports and loading included.

The evaluator and the loop take an episode's action noise from the same generator (clbench.seeding), so outcomes should
agree, episode by episode. Arithmetic differs in the last bits between batch sizes, and contacts amplify that: agreement
is counted.

Without --policy, the stream's cached base acts on the tasks it was trained on. `--policy random` takes random weights:
few episodes succeed, so most are as long as they may be.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import machine, print_table, print_verdict, run, spread

from clbench.checkpoints.policy_io import policy_config
from clbench.config.compose import compose
from clbench.config.schema import Config
from clbench.envs.base import EVAL_SEED_BASE
from clbench.errors import UserError
from clbench.evaluation.evaluate import _jobs, _play
from clbench.evaluation.records import BASE, CellFile
from clbench.evaluation.rows import Checkpoints
from clbench.evaluation.worker import Settings
from clbench.stopping import Stop
from clbench.streams.stream import Task, build_stream, pretraining_tasks

AIMS = {"loop": 1.8, "lerobot": 5.0}

Key = tuple[int, int]  # task's column, episode


@dataclass
class Played:
    """What one side did: times on the system's monotonic clock, and (succeeded, length) per episode."""

    first_start: float = float("inf")
    last_end: float = 0.0
    whole: float = 0.0
    outcomes: dict[Key, tuple[bool, int]] = field(default_factory=dict)

    @property
    def speed(self) -> float:
        return len(self.outcomes) / (self.last_end - self.first_start)

    @property
    def speed_with_startup(self) -> float:
        return len(self.outcomes) / self.whole


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", default="metaworld_quick", help="stream (default metaworld_quick)")
    p.add_argument("--model", default="dit_dec_tiny", help="preset of the base or of the random weights")
    p.add_argument("--policy", type=Path, help="checkpoint folder, or random (default: the stream's cached base)")
    p.add_argument("--peer", choices=tuple(AIMS), default="loop", help="what the evaluator is compared with")
    p.add_argument("--async-envs", action="store_true", help="LeRobot's simulators in processes of their own")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of the configuration")
    p.add_argument("--tasks", choices=("pretrain", "stream"), default="pretrain", help="which of its tasks are played")
    p.add_argument("--episodes", type=int, default=20, help="episodes per task (default 20)")
    p.add_argument("--repeats", type=int, default=3, help="pairs (default 3)")
    p.add_argument("--workers", type=int, default=2, help="processes of the evaluator (default 2)")
    p.add_argument("--loop-threads", type=int, default=0, help="torch threads of the loop; 0 = torch's default")
    return p.parse_args()


def base_policy(config: Config, dataset: str) -> Path:
    """The cached base of the stream."""
    from clbench.training.pretrain import base_folder

    folder = base_folder(config, pretraining_tasks(config.dataset, config.render)[1])
    if not (folder / "base.json").is_file():
        raise UserError(
            f"there is no base in {folder}: run `clbench pretrain --model {config.model} --dataset {dataset}`, or give "
            "a checkpoint with --policy."
        )
    return folder


def episode_list(tasks: Sequence[Task], count: int) -> list[dict[str, Any]]:
    """Episodes as the evaluator's jobs describe them."""
    return [
        {
            "j": j,
            "task_id": j,
            "episode": n,
            "seed": EVAL_SEED_BASE + n,
            "env": task.env,
            "instruction": task.instruction,
            "max_steps": task.max_steps,
        }
        for j, task in enumerate(tasks)
        for n in range(count)
    ]


# ---- the evaluator ----------------------------------------------------------------------------------
class TimedCell(CellFile):
    """A cell's records that notes when episodes started and ended."""

    def __init__(self, folder: Path, k: int, j: int, played: Played) -> None:
        super().__init__(folder, k, j)
        self.played = played

    def append(self, row: dict[str, Any]) -> None:
        super().append(row)
        now = time.monotonic()
        self.played.first_start = min(self.played.first_start, now - row["seconds"])
        self.played.last_end = now
        self.played.outcomes[row["j"], row["episode"]] = (row["success_once"], row["length"])


def evaluator(config: Config, policy: Path, episodes: list[dict[str, Any]], workers: int) -> Played:
    """Play the episodes as clbench plays the row of a base."""
    played = Played()
    columns = {e["j"] for e in episodes}
    settings = Settings(config, config.eval.slots, config.eval.steps_after_success, "cpu", 1)
    with tempfile.TemporaryDirectory(prefix="clbench-benchmark-") as name:
        files: dict[tuple[int, int], CellFile] = {(BASE, j): TimedCell(Path(name), BASE, j, played) for j in columns}
        began = time.monotonic()
        rows = Checkpoints(Path(name), {"base": {"path": str(policy)}}, 0)
        jobs = _jobs({BASE: episodes}, rows, workers)
        _play(jobs, settings, workers, files, {}, len(episodes), False, Stop())
        played.whole = time.monotonic() - began
    return played


# ---- the loop ---------------------------------------------------------------------------------------
def loop(policy_folder: str, episodes: list[dict[str, Any]], steps_after_success: int, threads: int, out: Any) -> None:
    """Play the episodes one after another; runs in a process of its own."""
    import torch

    from clbench.checkpoints.policy_io import load_policy
    from clbench.envs.making import make_simulator
    from clbench.seeding import generator

    if threads:
        torch.set_num_threads(threads)
    loaded = load_policy(policy_folder, "cpu")
    policy: Any = loaded.policy
    policy.eval()
    played = Played(first_start=time.monotonic())
    simulator, task = None, None
    for e in episodes:
        if e["env"] != task:
            simulator, task = make_simulator(e["env"]), e["env"]
        assert simulator is not None
        observation = simulator.reset(e["seed"])
        policy.reset()
        first_success: int | None = None
        for step in range(e["max_steps"]):
            batch: dict[str, Any] = {k: torch.from_numpy(v)[None] for k, v in observation.items()}
            batch["task"] = [e["instruction"]]
            chunk, phase = divmod(step, policy.config.n_action_steps)
            noise = None if phase else policy.sample_draw(1, generator("action-noise", e["seed"], chunk))["noise"]
            with torch.inference_mode():
                action = loaded.postprocessor(policy.select_action(loaded.preprocessor(batch), noise=noise))
            observation, _, success = simulator.step(action[0].numpy())
            if success and first_success is None:
                first_success = step + 1
            if first_success is not None and step + 1 >= first_success + steps_after_success:
                break
        length = first_success if first_success is not None else step + 1
        played.outcomes[e["j"], e["episode"]] = (first_success is not None, length)
    played.last_end = time.monotonic()
    out.put((played, torch.get_num_threads()))


# ---- LeRobot's evaluation ---------------------------------------------------------------------------
def lerobot(
    policy_folder: str, episodes: list[dict[str, Any]], slots: int, threads: int, apart: bool, out: Any
) -> None:
    """Play the episodes as lerobot-eval does, task by task; runs in a process of its own."""
    import torch
    from lerobot.configs.parser import load_plugin
    from lerobot.envs import make_env, make_env_config, make_env_pre_post_processors
    from lerobot.scripts.lerobot_eval import eval_policy

    from clbench.checkpoints.policy_io import load_policy

    if threads:
        torch.set_num_threads(threads)
    load_plugin("clbench.envs.lerobot_env")
    loaded = load_policy(policy_folder, "cpu")
    loaded.policy.eval()
    tasks = {e["j"]: e["env"] for e in episodes}
    first = episodes[0]
    drawn = {f"render_{key}": value for key, value in first["env"].get("render", {}).items()}
    names = ",".join(env["task"] for env in tasks.values())
    config = make_env_config(f"clbench_{first['env']['type']}", task=names, episode_length=first["max_steps"], **drawn)
    envs = make_env(config, n_envs=slots, use_async_envs=apart)[config.type]
    before, after = make_env_pre_post_processors(env_cfg=config, policy_cfg=loaded.policy.config)
    played = Played(first_start=time.monotonic())
    for number, j in enumerate(tasks):
        count = sum(e["j"] == j for e in episodes)
        with torch.no_grad():
            found = eval_policy(
                envs[number], loaded.policy, before, after, loaded.preprocessor, loaded.postprocessor, count,
                start_seed=first["seed"],
            )  # fmt: skip
        for n, episode in enumerate(found["per_episode"]):
            played.outcomes[j, n] = (bool(episode["success"]), 0)
        envs[number].close()
    played.last_end = time.monotonic()
    out.put((played, torch.get_num_threads()))


def run_peer(
    args: argparse.Namespace, config: Config, policy: Path, episodes: list[dict[str, Any]]
) -> tuple[Played, int]:
    """Run the peer in a fresh process; returns what it played and its torch threads."""
    context = mp.get_context("spawn")
    out = context.Queue()
    began = time.monotonic()
    given: tuple[Any, ...] = (str(policy), episodes, config.eval.steps_after_success, args.loop_threads, out)
    if args.peer == "lerobot":
        given = (str(policy), episodes, config.eval.slots, args.loop_threads, args.async_envs, out)
    process = context.Process(target=lerobot if args.peer == "lerobot" else loop, args=given)
    process.start()
    while process.is_alive() and out.empty():
        time.sleep(0.05)
    if out.empty():
        raise RuntimeError(f"the peer ended with status {process.exitcode}")
    played, used = out.get()
    process.join()
    played.whole = time.monotonic() - began
    return played, used


def main() -> None:
    args = arguments()
    config, _ = compose(model=args.model, algorithms=["seqfft"], dataset=args.dataset, registered=["seqfft"],
                        overrides=args.set)  # fmt: skip
    if args.tasks == "pretrain":
        tasks = pretraining_tasks(config.dataset, config.render)[0]
    else:
        tasks = list({t.name: t for t in build_stream(config.dataset, render=config.render).columns}.values())
    if args.policy == Path("random"):
        with tempfile.TemporaryDirectory(prefix="clbench-benchmark-") as name:
            compared(args, config, tasks, random_policy(config, tasks, Path(name) / "random"))
    else:
        compared(args, config, tasks, args.policy.resolve() if args.policy else base_policy(config, args.dataset))


def random_policy(config: Config, tasks: Sequence[Task], folder: Path) -> Path:
    """A policy of the preset with random weights and the statistics of the tasks' data, saved in `folder`."""
    from clbench.checkpoints.policy_io import save_policy
    from clbench.data.frames import StreamFrames
    from clbench.training.pretrain import new_policy

    frames = StreamFrames([tuple(tasks)], policy_config(dict(config.policy), "cpu"), 0)
    save_policy(new_policy(dict(config.policy), frames, "cpu", config.pretrain.seed), folder)
    return folder


def compared(args: argparse.Namespace, config: Config, tasks: Sequence[Task], policy: Path) -> None:
    """Play both sides in turn, and print the figures."""
    episodes = episode_list(tasks, args.episodes)
    print(machine(f"1 per evaluator process, {args.loop_threads or 'default'} in the {args.peer}"))
    print(f"{len(tasks)} tasks × {args.episodes} episodes, policy {policy.name}", flush=True)
    ours: list[Played] = []
    theirs: list[Played] = []
    rows: list[list[str]] = []
    for i in range(args.repeats):
        played, used = run_peer(args, config, policy, episodes)
        theirs.append(played)
        ours.append(evaluator(config, policy, episodes, args.workers))
        a, b = ours[-1], theirs[-1]
        cells = [a.speed, b.speed, a.speed_with_startup, b.speed_with_startup]
        rows.append([str(i + 1), *(f"{v:.2f}" for v in cells)])
    print(f"\nepisodes/s ({args.workers} evaluator processes of one torch thread; {args.peer}: {used})")
    print_table(["pair", "evaluator", args.peer, "evaluator with start-up", f"{args.peer} with start-up"], rows)
    ratios = [a.speed / b.speed for a, b in zip(ours, theirs, strict=True)]
    whole = [a.speed_with_startup / b.speed_with_startup for a, b in zip(ours, theirs, strict=True)]
    print()
    print_table(
        [f"ratio evaluator / {args.peer}", "min", "median", "max"],
        [["episodes/s", *spread(ratios)], ["episodes/s with start-up", *spread(whole)]],
    )
    print_verdict(statistics.median(ratios), AIMS[args.peer], at_least=True)
    if args.peer == "loop":
        print_agreement(ours, theirs)
    else:
        rates = [statistics.mean(o[0] for p in side for o in p.outcomes.values()) for side in (ours, theirs)]
        print(f"success: evaluator {rates[0]:.3f}, {args.peer} {rates[1]:.3f}")
    print(machine("as above"))


def print_agreement(ours: Sequence[Played], theirs: Sequence[Played]) -> None:
    """Count the episodes with the same outcome on both sides, and over the repeats of each side."""
    a, b = ours[0].outcomes, theirs[0].outcomes
    assert a.keys() == b.keys()
    success = sum(a[e][0] == b[e][0] for e in a)
    length = sum(a[e] == b[e] for e in a)
    print(f"\nsame success in {success} of {len(a)} episodes, same success and length in {length}")
    rates = [sum(o[0] for o in side.values()) / len(side) for side in (a, b)]
    print(f"success rate: evaluator {rates[0]:.3f}, loop {rates[1]:.3f}")
    for name, runs in (("evaluator", ours), ("loop", theirs)):
        same = all(r.outcomes == runs[0].outcomes for r in runs)
        print(f"{name}: outcomes of the {len(runs)} repeats {'are identical' if same else 'DIFFER'}")


if __name__ == "__main__":
    run(main)
