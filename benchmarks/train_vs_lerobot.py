"""Training speed: `clbench pretrain` against the unmodified `lerobot-train`, on the same data with the same settings.

Both commands train a fresh dit_dec (tiny preset, or another: `--model`) on all frames of the stream's pretraining data,
as subprocesses, in turn (A B A B …), and only one at a time. What is the same: policy, data, batch size, loader
processes, AdamW with its learning rate, weight decay, clipping and cosine schedule without warm-up (where the two
schedules are one formula), torch threads. On a GPU (`--device cuda`) lerobot-train switches TF32 matrix products on;
clbench leaves that to the user, so the environment switches it on for both. Features of frozen encoders are kept by
clbench, as is its default; `--no-feature-cache` has it make them in every step, as lerobot-train does.

Steady-state speed = steps per second from step `--skip` to the last, so imports, opening the data set, starting loader
processes and the first steps are left out on both sides. The clock:

- lerobot-train: the moment at which each of its log lines ("step:… loss:… updt_s:…") reaches this process. Nothing in
  LeRobot is patched or wrapped. Its own meters (updt_s + data_s of the same lines) are printed as a check.
- clbench: the time stamps in the base's log.jsonl, which is written at every step here (a cost on clbench's side).

Both have read the step's loss from the device before they write, so the device has done what is counted.

A second figure hardly depends on what else the machine is doing: processor seconds per step, loader processes
included, read from the processes' own accounts at the first and last step of the same stretch. Where there are more
cores than loaders need, the wall clock sees less of the difference than this.

Loss curves: LeRobot prints the mean loss of each window of steps; the same windows are averaged from log.jsonl. The
two programs draw different random numbers, so curves are averaged over the pairs (each its own seed) and compared
with the spread between seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import (
    CpuSampler,
    add_device_arguments,
    add_model_argument,
    check_device,
    machine,
    policy_size,
    print_table,
    print_verdict,
    random_encoders,
    run,
    spread,
    stream_config,
)

from clbench.config.schema import Config
from clbench.data.source import data_folder
from clbench.errors import UserError

AIMS = {"cpu": 3.0, "cuda": 1.0}
LOG_LINE = re.compile(r"step:\S+ smpl:.* loss:([\d.]+) .*updt_s:([\d.]+) data_s:([\d.]+)")


@dataclass(frozen=True)
class Curve:
    """One training: steady-state steps/s, processor seconds per step, seconds before step `skip`, mean loss per window,
    steps/s by the program's own meters."""

    speed: float
    cpu: float
    startup: float
    loss: tuple[float, ...]
    meters: float | None = None


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", default="metaworld_quick", help="stream whose pretraining data is used")
    p.add_argument("--repeats", type=int, default=3, help="pairs (default 3)")
    p.add_argument("--steps", type=int, default=300, help="optimizer steps of each training (default 300)")
    p.add_argument("--skip", type=int, default=50, help="first steps left out of the speed (default 50)")
    p.add_argument("--window", type=int, default=25, help="steps per log line and loss window (default 25)")
    p.add_argument("--batch-size", type=int, default=128)
    add_device_arguments(p)
    add_model_argument(p)
    p.add_argument("--no-feature-cache", action="store_true", help="frozen encoders run in every step of clbench, too")
    p.add_argument("--workers", type=int, default=2, help="loader processes (clbench: used for camera data only)")
    p.add_argument("--threads", type=int, default=0, help="torch threads of both; 0 = one a core (default 0)")
    args = p.parse_args()
    if args.steps % args.window or args.skip % args.window or not 0 < args.skip < args.steps:
        raise UserError("--steps and --skip must be multiples of --window, and 0 < skip < steps.")
    return args


def environment(args: argparse.Namespace, cache: Path) -> dict[str, str]:
    """The subprocesses' environment: threads, no network, bases in a temporary folder."""
    env = {**os.environ, "CLBENCH_CACHE_ROOT": str(cache), "HF_HUB_OFFLINE": "1"}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        env.pop(name, None)
        if args.threads:
            env[name] = str(args.threads)
    return env


def train_lerobot(config: Config, args: argparse.Namespace, folder: Path, seed: int) -> Curve:
    """Run lerobot-train and time its log lines as they arrive."""
    assert config.dataset.pretrain is not None
    data, o = data_folder(config.dataset.pretrain.data), config.pretrain.optimizer
    policy = {
        **{k: json.dumps(v) if isinstance(v, dict) else "null" if v is None else v for k, v in config.policy.items()},
        **policy_size(args.width),
        "discover_packages_path": "clbench.policies",
        "device": args.device,
        "push_to_hub": "false",
        "optimizer_lr": o.lr,
        "optimizer_weight_decay": o.weight_decay,
        "scheduler_warmup_steps": 0,
        "scheduler_decay_steps": args.steps,
    }
    settings = {
        "dataset.repo_id": data.name,
        "dataset.root": data,
        **{f"policy.{k}": v for k, v in policy.items()},
        "batch_size": args.batch_size,
        "num_workers": args.workers,
        "steps": args.steps,
        "log_freq": args.window,
        "seed": seed,
        "save_checkpoint": "false",
        "env_eval_freq": 0,
        "output_dir": folder / f"lerobot_{seed}",
    }
    command = [sys.executable, "-m", "lerobot.scripts.lerobot_train", *(f"--{k}={v}" for k, v in settings.items())]
    began, times, found, lines = time.monotonic(), list[float](), list[tuple[float, ...]](), list[str]()
    with (
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(args, folder),
            cwd=folder,
        ) as process,
        CpuSampler(process.pid) as cpu,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if match := LOG_LINE.search(line):
                times.append(time.monotonic())
                found.append(tuple(map(float, match.groups())))
    if process.returncode or len(times) != args.steps // args.window:
        raise RuntimeError(f"lerobot-train ended with status {process.returncode}:\n{''.join(lines[-30:])}")
    first = args.skip // args.window
    meters = statistics.mean(update + data for _, update, data in found[first:])
    return Curve(
        speed=(args.steps - args.skip) / (times[-1] - times[first - 1]),
        cpu=cpu.between(times[first - 1], times[-1]) / (args.steps - args.skip),
        startup=times[first - 1] - began,
        loss=tuple(loss for loss, _, _ in found),
        meters=1 / meters,
    )


def train_clbench(config: Config, args: argparse.Namespace, folder: Path, seed: int) -> Curve:
    """Run `clbench pretrain` and read the time stamps and losses of its log."""
    cache = folder / f"clbench_{seed}"
    settings = {
        "pretrain.steps": args.steps,
        "pretrain.batch_size": args.batch_size,
        "pretrain.seed": seed,
        "pretrain.log_every": 1,
        "pretrain.optimizer.warmup_steps": 0,
        "train.num_workers": args.workers,
        "train.device": args.device,
        "train.threads": args.threads or os.cpu_count() or 1,  # as LeRobot has them: a base's own default is 2
        "train.tf32": "true",  # as lerobot-train
        **({"train.feature_cache_gb": 0} if args.no_feature_cache else {}),
        **{f"policy.{k}": v for k, v in {**random_encoders(args.model), **policy_size(args.width)}.items()},
    }
    command = [sys.executable, "-m", "clbench.cli", "pretrain", "--model", args.model, "--dataset", args.dataset]
    command += ["--", *(f"{k}={v}" for k, v in settings.items())]
    began, offset = time.time(), time.monotonic() - time.time()
    with (
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(args, cache),
            cwd=folder,
        ) as process,
        CpuSampler(process.pid) as cpu,
    ):
        text = process.communicate()[0]
    logs = list(cache.glob("bases/*/log.jsonl"))
    if process.returncode or len(logs) != 1:
        raise RuntimeError(f"clbench pretrain ended with status {process.returncode}:\n{text[-3000:]}")
    rows = [r for r in map(json.loads, logs[0].read_text().splitlines()) if r["event"] == "step"]
    times, losses = [r["time"] for r in rows], [r["loss"] for r in rows]
    assert len(rows) == args.steps
    return Curve(
        speed=(args.steps - args.skip) / (times[-1] - times[args.skip - 1]),
        cpu=cpu.between(times[args.skip - 1] + offset, times[-1] + offset) / (args.steps - args.skip),
        startup=times[args.skip - 1] - began,
        loss=tuple(statistics.mean(losses[i : i + args.window]) for i in range(0, args.steps, args.window)),
    )


def compare_losses(ours: Sequence[Curve], theirs: Sequence[Curve], window: int) -> None:
    """Print both mean curves, their largest relative difference, and the spread between seeds beside it."""

    def mean(curves: Sequence[Curve]) -> list[float]:
        return [statistics.mean(values) for values in zip(*(c.loss for c in curves), strict=True)]

    def between_seeds(curves: Sequence[Curve]) -> float:
        return max(abs(v / m - 1) for c in curves for v, m in zip(c.loss, mean(curves), strict=True))

    rows = [
        [f"{i * window + 1}-{(i + 1) * window}", f"{a:.4f}", f"{b:.4f}", f"{a / b - 1:+.1%}"]
        for i, (a, b) in enumerate(zip(mean(ours), mean(theirs), strict=True))
    ]
    print(f"\nmean loss over {window} steps and {len(ours)} seeds")
    print_table(["steps", "clbench", "lerobot-train", "difference"], rows)
    largest = max(abs(a / b - 1) for a, b in zip(mean(ours), mean(theirs), strict=True))
    print(f"largest relative difference of the mean curves: {largest:.1%}")
    if len(ours) > 1:
        print(
            "for comparison, the largest deviation of one seed from its own program's mean curve: "
            f"clbench {between_seeds(ours):.1%}, lerobot-train {between_seeds(theirs):.1%}"
        )


def compare_statistics(config: Config) -> None:
    """Print how far LeRobot's recorded statistics are from those of exactly the frames that are trained on."""
    import torch
    from lerobot.datasets import LeRobotDatasetMetadata

    import clbench.policies
    from clbench.data.frames import StreamFrames
    from clbench.streams.stream import pretraining_tasks
    from clbench.training.pretrain import frame_statistics

    tasks, _ = pretraining_tasks(config.dataset, config.render)
    exact = frame_statistics(StreamFrames([tuple(tasks)], clbench.policies.DitDecConfig(device="cpu")))
    recorded = LeRobotDatasetMetadata(repo_id=tasks[0].root.name, root=tasks[0].root).stats
    for key in ("observation.state", "action"):
        a = {n: exact[key][n].double() for n in ("mean", "std")}
        b = {n: torch.as_tensor(recorded[key][n]).double() for n in ("mean", "std")}
        varying = a["std"] > 1e-3  # the others pass through raw in both
        mean = ((a["mean"] - b["mean"]).abs() / a["std"])[varying].max()
        std = (b["std"] / a["std"] - 1)[varying].abs().max()
        print(f"statistics of {key}: means differ by ≤ {mean:.1e} standard deviations, deviations by ≤ {std:.1e}")


def main() -> None:
    args = arguments()
    check_device(args.device)
    config = stream_config(args.dataset, args.model)
    print(machine(str(args.threads or "default"), args.device), flush=True)
    compare_statistics(config)
    ours: list[Curve] = []
    theirs: list[Curve] = []
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory(prefix="clbench-benchmark-") as name:
        for seed in range(args.repeats):
            theirs.append(train_lerobot(config, args, Path(name), seed))
            ours.append(train_clbench(config, args, Path(name), seed))
            a, b = ours[-1], theirs[-1]
            cells = [a.speed, b.speed, b.meters or 0, 1e3 * a.cpu, 1e3 * b.cpu, a.startup, b.startup]
            rows.append([str(seed + 1), *(f"{v:.1f}" for v in cells)])
            print(f"pair {seed + 1}: {a.speed:.2f} against {b.speed:.2f} steps/s", file=sys.stderr, flush=True)
    what = f"steps {args.skip + 1} to {args.steps}, batch {args.batch_size}, {args.device}"
    print(f"\n{what}: steps/s, processor ms per step, start-up")
    head = ["pair", "clbench", "lerobot", "lerobot's meters", "clbench ms", "lerobot ms"]
    print_table([*head, f"clbench s to step {args.skip}", f"lerobot s to step {args.skip}"], rows)
    ratios = [a.speed / b.speed for a, b in zip(ours, theirs, strict=True)]
    work = [b.cpu / a.cpu for a, b in zip(ours, theirs, strict=True)]
    print()
    per_s = [args.batch_size * statistics.median(c.speed for c in curves) for curves in (ours, theirs)]
    print(f"median samples/s: clbench {per_s[0]:.0f}, lerobot-train {per_s[1]:.0f}")
    print_table(
        ["ratio clbench / lerobot-train", "min", "median", "max"],
        [["steps/s", *spread(ratios)], ["steps per processor second", *spread(work)]],
    )
    print_verdict(statistics.median(ratios), AIMS[args.device], at_least=True)
    compare_losses(ours, theirs, args.window)
    print(machine(str(args.threads or "default"), args.device))


if __name__ == "__main__":
    run(main)
