"""Two ranks against one: steps per second at the same batch per rank (weak scaling), and memory per rank under DDP and
ZeRO-2. On CPUs or, with `--device cuda`, on a GPU per rank.

One rank with a batch of B, then two with 2 B under `ddp` and under `zero2`, in turn (A B C C B A …), each in fresh
processes with one torch thread. Speed is steps per second from step `--skip` to the last; a GPU is waited for at each
step's end. Efficiency is the two ranks' speed over the one rank's: 1 would be perfect. Memory is a rank's resident peak
over its resident size before the policy was built, or the peak of what torch allocated on its GPU; AdamW's moments are
its largest part, which ZeRO-2 divides among ranks. `--only "1 rank"` measures one process alone, for instance how fast
and in how much memory a large policy trains. Needs `clbench data make metaworld_quick`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import (
    add_device_arguments,
    check_device,
    machine,
    policy_size,
    print_table,
    run,
    stream_config,
    wait_for,
)

SETTINGS = {"1 rank": (1, "ddp"), "2 ranks, ddp": (2, "ddp"), "2 ranks, zero2": (2, "zero2")}


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeats", type=int, default=3, help="rounds (default 3)")
    p.add_argument("--steps", type=int, default=60, help="optimizer steps of each training (default 60)")
    p.add_argument("--skip", type=int, default=20, help="first steps left out (default 20)")
    p.add_argument("--batch-size", type=int, default=64, help="samples per rank (default 64)")
    add_device_arguments(p, width=512)
    p.add_argument("--encoder-layers", type=int, default=2, help="default 2")
    p.add_argument("--decoder-layers", type=int, default=3, help="default 3: with width 512, 16 M parameters")
    p.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="train.mixed_precision (default fp32)")
    p.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), help="default: all three")
    p.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--out", help=argparse.SUPPRESS)
    p.add_argument("--strategy", help=argparse.SUPPRESS)
    args = p.parse_args()
    if not 0 <= args.skip < args.steps - 1:
        p.error("--skip must leave at least two steps.")
    return args


def train_as_rank(args: argparse.Namespace) -> None:
    """One rank's training of one task; writes its memory and the moments at which steps ended."""
    import resource

    import psutil
    import torch

    from clbench.algorithms.hooks import CLAlgorithm, Context, training_phase
    from clbench.checkpoints.policy_io import policy_config
    from clbench.config.compose import compose
    from clbench.data.frames import StreamFrames
    from clbench.policies.view import PolicyView
    from clbench.streams.stream import build_stream
    from clbench.training.backend import Backend, count
    from clbench.training.log import RunLog
    from clbench.training.loop import PhaseRunner
    from clbench.training.pretrain import new_policy

    times: list[float] = []

    class Timed(PhaseRunner):
        """Notes when each step has ended."""

        def _train_step(self, *a: Any, **k: Any) -> dict[str, float]:
            numbers = super()._train_step(*a, **k)
            wait_for(args.device)
            times.append(time.perf_counter())
            return numbers

    ranks = int(os.environ["WORLD_SIZE"])
    size = policy_size(args.width) | {"encoder_layers": args.encoder_layers, "decoder_layers": args.decoder_layers}
    config, _ = compose(
        model="dit_dec_tiny", algorithms=["seqfft"], dataset="metaworld_quick", registered=["seqfft"],
        overrides=[f"train.batch_size={args.batch_size * ranks}", f"train.steps={args.steps}",
                   f"train.strategy={args.strategy}", f"train.device={args.device}", "train.threads=1",
                   f"train.mixed_precision={args.precision}", "log.progress=quiet",
                   *(f"policy.{key}={value}" for key, value in size.items())],
    )  # fmt: skip
    backend = Backend(config.train)
    stream = build_stream(config.dataset, render=config.render)
    frames = StreamFrames([v.tasks for v in stream.visits], policy_config(config.policy, args.device))
    frames.length(0)
    before = psutil.Process().memory_info().rss
    loaded = new_policy(config.policy, frames, args.device, 0)
    loss = PolicyView(loaded.policy, loaded.policy, loaded.preprocessor, backend.autocast)
    log = RunLog(Path(args.out), config.log, "bench", backend.is_main)
    ctx = Context(
        stream=stream, policy=loaded.policy, frames=frames, train=config.train, seed=0, device=backend.device,
        view=loss, log=log.event, rank=backend.rank, world_size=backend.world_size, collective=backend,
    )  # fmt: skip
    algorithm = CLAlgorithm(None)
    algorithm.bind(ctx)
    runner = Timed(ctx, algorithm, backend, loss, log)
    runner.progress_mode = "quiet"
    held = [0.0]  # after the last step

    def after_step(*_: object) -> None:
        rss = psutil.Process().memory_info().rss - before
        held[0] = (rss if args.device == "cpu" else torch.cuda.memory_allocated()) / 1e6

    runner.after_step = after_step
    runner.run(training_phase(ctx))
    log.close()
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = (peak - before) / 1e6 if args.device == "cpu" else backend.peak_memory_mb()
    record = {"memory_mb": memory, "held_mb": held[0], "parameters": count(loaded.policy.parameters()), "times": times}
    (Path(args.out) / f"rank{backend.rank}.json").write_text(json.dumps(record))


def measure(ranks: int, strategy: str, args: argparse.Namespace, folder: Path) -> tuple[float, float, float, int]:
    """Steps per second, the larger rank's peak memory and memory between steps in MB, and the policy's parameters."""
    from clbench.launch import free_port

    folder.mkdir(parents=True)
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}  # fmt: skip
    own = ["--rank", "--out", str(folder), "--strategy", strategy]
    for name in ("device", "steps", "skip", "batch_size", "width", "encoder_layers", "decoder_layers", "precision"):
        own += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *own], stdout=subprocess.DEVNULL,
            env={**os.environ, **shared, "RANK": str(r), "LOCAL_RANK": str(r)},
        )
        for r in range(ranks)
    ]  # fmt: skip
    if any(p.wait() for p in processes):
        raise SystemExit(f"a rank of '{ranks} ranks, {strategy}' failed; its error stands above.")
    found = [json.loads((folder / f"rank{r}.json").read_text()) for r in range(ranks)]
    times = found[0]["times"]
    speed = (len(times) - 1 - args.skip) / (times[-1] - times[args.skip])
    peak, held = (max(f[key] for f in found) for key in ("memory_mb", "held_mb"))
    return speed, peak, held, found[0]["parameters"]


def main() -> None:
    args = arguments()
    if args.rank:
        train_as_rank(args)
        return
    check_device(args.device, max(SETTINGS[n][0] for n in args.only))
    stream_config("metaworld_quick")  # is the data there?
    print(machine("1 per rank", args.device), flush=True)
    names = [n for n in SETTINGS if n in args.only]
    speeds: dict[str, list[float]] = {n: [] for n in names}
    memory: dict[str, list[float]] = {n: [] for n in names}
    helds: dict[str, list[float]] = {n: [] for n in names}
    parameters = 0
    with tempfile.TemporaryDirectory() as folder:
        for i in range(args.repeats):
            for name in names if i % 2 == 0 else names[::-1]:
                speed, mb, held, parameters = measure(*SETTINGS[name], args, Path(folder) / f"{i}-{name}")
                speeds[name].append(speed)
                memory[name].append(mb)
                helds[name].append(held)
                print(f"round {i + 1}, {name}: {speed:.2f} steps/s, {mb:.0f} MB ({held:.0f} between steps)", flush=True)
    where = f"{args.precision}, AdamW, {args.device}"
    print(f"\npolicy of {parameters / 1e6:.1f} M parameters, {args.batch_size} samples per rank, {where}")
    rows = []
    for name in names:
        ratios = [a / b for a, b in zip(speeds[name], speeds[names[0]], strict=True)]
        samples = statistics.median(speeds[name]) * SETTINGS[name][0] * args.batch_size
        rows.append([
            name, f"{statistics.median(speeds[name]):.2f}", f"{samples:.1f}", f"{statistics.median(ratios):.2f}",
            f"{statistics.median(memory[name]):.0f}", f"{statistics.median(helds[name]):.0f}",
        ])  # fmt: skip
    print_table(["setting", "steps/s", "samples/s", "efficiency", "peak MB per rank", "between steps"], rows)


if __name__ == "__main__":
    run(main)
