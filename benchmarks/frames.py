"""Reading batches of camera images: kept decoded, against decoding them for every batch through LeRobot.

Samples of the stream's tasks, the same ones in all three ways, in turn (A B C A B C …), with one torch thread:

- kept: indexing decoded images that are mapped from disk (clbench/data/frame_cache.py);
- again: LeRobotDataset's own item access in this process;
- workers: the same in two loader processes, which read ahead.

    clbench data make metaworld_pixels && python benchmarks/frames.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator

import torch
from common import machine, print_table, stream_config

from clbench.checkpoints.policy_io import policy_config
from clbench.data.frames import StreamFrames, load_batches
from clbench.errors import UserError
from clbench.seeding import generator
from clbench.streams.stream import build_stream

WARM_UP = 3


def references(frames: StreamFrames, batch: int, count: int, key: str) -> Iterator[torch.Tensor]:
    """`count` batches of references, each of one visit."""
    visits = len(frames._parts)
    for i in range(count):
        index = torch.randint(frames.length(i % visits), (batch,), generator=generator("frames", key, i))
        yield torch.stack([torch.full_like(index, i % visits), index], 1)


def seconds(frames: StreamFrames, workers: int, batch: int, count: int, key: str) -> float:
    """Seconds per batch, after a few that are not counted."""
    batches = load_batches(frames, references(frames, batch, count + WARM_UP, key), workers)
    for _ in range(WARM_UP):
        next(batches)
    began = time.perf_counter()
    read = sum(1 for _ in batches)
    return (time.perf_counter() - began) / read


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", default="metaworld_pixels", help="a stream with cameras (default metaworld_pixels)")
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--batches", type=int, default=20, help="of each way and round (default 20)")
    p.add_argument("--rounds", type=int, default=3)
    args = p.parse_args()
    torch.set_num_threads(1)
    try:
        config = stream_config(args.dataset)
        stream = build_stream(config.dataset, render=config.render)
        policy = policy_config(dict(config.policy), "cpu")
        visits = [v.tasks for v in stream.visits]
        kept, again = StreamFrames(visits, policy), StreamFrames(visits, policy, cache_gb=0)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    if not again.decoded:
        print(f"error: {args.dataset} has no cameras.", file=sys.stderr)
        return 2
    found: dict[str, list[float]] = {"kept": [], "again": [], "workers": []}
    for r in range(args.rounds):
        for name, frames, workers in (("kept", kept, 0), ("again", again, 0), ("workers", again, 2)):
            found[name].append(seconds(frames, workers, args.batch_size, args.batches, str(r)))
    rows = []
    for name, values in found.items():
        ratios = [v / k for v, k in zip(values, found["kept"], strict=True)]
        rows.append([name, f"{1000 * statistics.median(values):.2f}", f"{statistics.median(ratios):.1f}"])
    print_table(["images", f"ms a batch of {args.batch_size}", "times kept"], rows)
    print(machine("1"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
