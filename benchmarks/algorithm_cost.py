"""Cost of a training step and peak memory of every algorithm, as ratios to seqfft, at the second and the last task.

Every algorithm trains dit_dec_tiny (`--model`: another preset) on the same stream in a process of its own. All tasks
but two are cut to a few steps; in those two the processes take turns of a few steps (A B C … A B C …), so that whatever
else the machine does hits all of them alike; on the CPU they share one core meanwhile, and with `--device cuda` one
GPU, which is waited for before a clock is read. A turn's ratio is its time over seqfft's in the same round. `cost` is
the ratio of the sums over rounds, which also holds what happens rarely (mir's choices); rounds in which any algorithm
took more than 1.5 times its own median were disturbed from outside and are left out. `growth` is cost at the last task
over cost at the second.

Peak memory is the process's, between tasks included: resident, or what torch allocated on the GPU.

The measured phase is the one that trains the policy (clare: adapters; packnet: train, with other tasks' weights held).
Algorithms run at their defaults. What happens between tasks (Fisher, pruning, detection) is not part of it; minutes per
run are in docs/results. Needs `clbench data make metaworld_cw10`.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import (
    add_device_arguments,
    add_model_argument,
    check_device,
    machine,
    policy_size,
    print_table,
    random_encoders,
    run,
    spread,
    stream_config,
    wait_for,
)

ALGORITHMS = ["seqfft", "seqlora", "er", "mir", "ewc", "packnet", "clare"]
AIMS = {"er": 1.05, "mir": 1.15, "ewc": 1.10, "packnet": 1.05, "clare": 1.0}
GROWTH_AIM = 1.05


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", default="metaworld_cw10", help="stream (default metaworld_cw10)")
    p.add_argument("--algorithms", nargs="+", default=ALGORITHMS, help="compared ones; seqfft is always among them")
    p.add_argument("--rounds", type=int, default=12, help="turns of every algorithm at each measured task (default 12)")
    p.add_argument("--steps", type=int, default=20, help="optimizer steps of a turn (default 20)")
    p.add_argument("--warm-up", type=int, default=10, help="steps before the first turn (default 10)")
    p.add_argument("--batch-size", type=int, help="samples per step (default: the preset's)")
    add_device_arguments(p)
    add_model_argument(p)
    return p.parse_args()


def work(name: str, args: argparse.Namespace, folder: str, pipe: Any) -> None:
    """One algorithm's process: trains the stream, and waits for its turn at the measured tasks."""
    import torch

    torch.set_num_threads(1)
    from clbench.algorithms.build import build_algorithm
    from clbench.algorithms.hooks import Phase
    from clbench.checkpoints.training_state import Position, StateKeeper
    from clbench.config.compose import compose
    from clbench.stopping import Stop
    from clbench.streams.stream import build_stream
    from clbench.training.backend import Backend
    from clbench.training.loop import PhaseRunner, Resumed
    from clbench.training.pretrain import ensure_base, load_base
    from clbench.training.visits import Trainer

    measured_steps = args.warm_up + args.rounds * args.steps

    class Paced(PhaseRunner):
        """Cuts phases short; at the measured tasks it runs `steps` steps per turn and reports their time."""

        def run(self, phase: Phase, resumed: Resumed | None = None) -> None:
            self.paced = phase.policy_training and phase.name != "retrain" and self.ctx.k in (1, last)
            self.done, self.began = -args.warm_up, 0.0
            cores = os.sched_getaffinity(0)
            if self.paced and args.device == "cpu":
                os.sched_setaffinity(0, {max(cores)})
            super().run(replace(phase, steps=measured_steps if self.paced else 2), resumed)
            if self.paced:
                wait_for(args.device)
                pipe.send(time.perf_counter() - self.began)
                os.sched_setaffinity(0, cores)

        def _train_step(self, *a: Any, **k: Any) -> dict[str, float]:
            if self.paced and self.done >= 0 and self.done % args.steps == 0:
                wait_for(args.device)
                pipe.send(time.perf_counter() - self.began if self.done else None)
                pipe.recv()
                self.began = time.perf_counter()
            self.done += 1
            return super()._train_step(*a, **k)

    class PacedTrainer(Trainer):
        def _load(self, source: Path | None, within: bool = False) -> dict[str, Any]:
            counters = super()._load(source, within)
            self.runner.__class__ = Paced
            return counters

    config, _ = compose(
        model=args.model, algorithms=[name], dataset=args.dataset, registered=[name],
        overrides=["pretrain.steps=1", f"train.device={args.device}", "train.threads=1", "log.progress=quiet",
                   *([f"train.batch_size={args.batch_size}"] if args.batch_size else []),
                   *(f"policy.{k}={v}" for k, v in {**random_encoders(args.model), **policy_size(args.width)}.items()),
                   *(["algorithm.fisher_batches=1"] if name == "ewc" else [])],
    )  # fmt: skip
    algorithm = build_algorithm(config)
    stream = build_stream(config.dataset, render=config.render)
    last = len(stream.visits) - 1
    backend = Backend(config.train)
    stop = Stop()
    base, _ = ensure_base(config, backend, stop, "quiet")
    out = Path(folder) / name
    out.mkdir(parents=True)
    keeper = StateKeeper(out, every_steps=None, every_minutes=None)
    trainer = PacedTrainer(
        config, algorithm, stream, out, name, backend, base, keeper, stop,
        start=lambda: (load_base(base, config), None), again="",
    )  # fmt: skip
    trainer.run(Position())
    pipe.send(backend.peak_memory_mb())


def main() -> None:
    args = arguments()
    names = ["seqfft", *(a for a in args.algorithms if a != "seqfft")]
    check_device(args.device)
    stream_config(args.dataset, args.model)  # is the data there?
    print(machine("1", args.device), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CLBENCH_CACHE_ROOT"] = f"{folder}/cache"  # a base of one step, not to be kept
        context = mp.get_context("spawn")
        pipes, processes = {}, []
        for name in names:
            pipes[name], theirs = context.Pipe()
            processes.append(context.Process(target=work, args=(name, args, f"{folder}/runs", theirs), daemon=True))
            processes[-1].start()
            if name == "seqfft":
                pipes[name].poll(None)  # it has made the base that the others share
        totals: dict[str, list[float]] = {n: [] for n in names}
        for place in ("second", "last"):
            for pipe in pipes.values():
                receive(pipe)  # everybody stands before its first turn
            seconds: dict[str, list[float]] = {n: [] for n in names}
            for i in range(args.rounds):
                for name in names if i % 2 else names[::-1]:
                    pipes[name].send("go")
                    seconds[name].append(receive(pipes[name]))
                if i == args.rounds - 1:
                    break
            print(f"\n{place} task: time of {args.steps} steps relative to seqfft's in the same round")
            quiet = [i for i in range(args.rounds) if all(s[i] <= 1.5 * statistics.median(s) for s in seconds.values())]
            print(f"{args.rounds - len(quiet)} of {args.rounds} rounds were disturbed and are left out")
            rows = []
            for name in names:
                seconds[name] = [seconds[name][i] for i in quiet]
            for name in names:
                ratios = [a / b for a, b in zip(seconds[name], seconds["seqfft"], strict=True)]
                totals[name].append(sum(seconds[name]) / sum(seconds["seqfft"]))
                ms = 1000 * statistics.median(seconds[name]) / args.steps
                rows.append([name, f"{ms:.1f}", *spread(ratios), f"{totals[name][-1]:.3f}"])
            print_table(["algorithm", "ms per step", "min", "median", "max", "cost"], rows)
        memory = {name: receive(pipe) for name, pipe in pipes.items()}
        for process in processes:
            process.join()
    print("\nsummary, last task")
    rows = []
    for name in names:
        ratio, growth = totals[name][1], totals[name][1] / totals[name][0]
        aim, mb = AIMS.get(name), memory[name]
        verdict = "–" if aim is None else f"≤ {aim:.2f} {'met' if ratio <= aim else 'MISSED'}"
        grown = f"{growth:.3f} {'' if growth <= GROWTH_AIM else f'(aim ≤ {GROWTH_AIM} MISSED)'}".strip()
        rows.append([name, f"{ratio:.3f}", verdict, grown, f"{mb:.0f}", f"{mb / memory['seqfft']:.3f}"])
    print_table(["algorithm", "cost", "aim", "growth from task 2", "peak MB", "peak memory"], rows)


def receive(pipe: Any) -> Any:
    """The next message; a process that died is an error, not a hang."""
    try:
        return pipe.recv()
    except EOFError:
        raise SystemExit("an algorithm's process died; its error stands above.") from None


if __name__ == "__main__":
    run(main)
