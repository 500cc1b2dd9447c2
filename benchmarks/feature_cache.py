"""Training steps with a frozen image encoder: its features kept on disk, against made in every step.

The same policy, samples and batch in both ways, in turn (A B A B …), with one torch thread; a step is reading a batch,
the loss, its gradient and AdamW. Keeping the features is timed apart: it is paid once per stream.

    clbench data make metaworld_pixels && python benchmarks/feature_cache.py
    python benchmarks/feature_cache.py --encoder '{model_type: dinov2}' --size 224
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from unittest import mock

import torch
import yaml
from common import add_device_arguments, check_device, machine, print_table, stream_config, wait_for

from clbench.checkpoints.policy_io import LoadedPolicy, policy_config
from clbench.data.frames import StreamFrames
from clbench.errors import UserError
from clbench.policies.features import FrozenFeatures
from clbench.policies.view import PolicyView
from clbench.seeding import generator
from clbench.streams.stream import build_stream
from clbench.training.pretrain import new_policy

WARM_UP = 2
SMALL = "{model_type: dinov2, hidden_size: 192, num_hidden_layers: 6, num_attention_heads: 3, image_size: 112}"


def seconds(frames: StreamFrames, loaded: LoadedPolicy, batch: int, steps: int, key: str, device: str) -> float:
    """Seconds per training step, after a few that are not counted."""
    view = PolicyView(loaded.policy, loaded.policy, loaded.preprocessor, nullcontext)
    optimizer = torch.optim.AdamW(loaded.policy.get_optim_params(), lr=1e-4)
    began = 0.0
    for i in range(steps + WARM_UP):
        if i == WARM_UP:
            wait_for(device)
            began = time.perf_counter()
        g = generator("features", key, i)
        index = torch.randint(frames.length(0), (batch,), generator=g)
        samples = frames.fetch(torch.stack([torch.zeros_like(index), index], 1))
        (view.total(samples, view.draw(batch, g)) / batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    wait_for(device)
    return (time.perf_counter() - began) / steps


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", default="metaworld_pixels", help="a stream with cameras (default metaworld_pixels)")
    p.add_argument("--encoder", default=SMALL, help=f"its image_encoder_config (default {SMALL}), or a name")
    p.add_argument("--size", type=int, default=112, help="image_encoder_size (default 112)")
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--steps", type=int, default=10, help="of each way and round (default 10)")
    p.add_argument("--rounds", type=int, default=3)
    add_device_arguments(p)
    args = p.parse_args()
    torch.set_num_threads(1)
    try:
        check_device(args.device)
        config = stream_config(args.dataset)
        encoder = yaml.safe_load(args.encoder)
        named = {"image_encoder": encoder} if isinstance(encoder, str) else {
            "image_encoder": "transformers", "image_encoder_config": encoder}  # fmt: skip
        section = {**config.policy, **named, "image_encoder_size": args.size}
        visits = [v.tasks for v in build_stream(config.dataset, render=config.render).visits]
        policy = policy_config(section, args.device)
        made, kept = StreamFrames(visits[:1], policy), StreamFrames(visits[:1], policy)
        loaded = new_policy(section, made, args.device, 0)
        with tempfile.TemporaryDirectory() as folder, mock.patch.dict("os.environ", CLBENCH_CACHE_ROOT=folder):
            began = time.perf_counter()
            kept.keep_features(FrozenFeatures(loaded.policy, loaded.preprocessor), 100)
            once = time.perf_counter() - began
            found: dict[str, list[float]] = {"made": [], "kept": []}
            for r in range(args.rounds):
                for name, frames in (("made", made), ("kept", kept)):
                    found[name].append(seconds(frames, loaded, args.batch_size, args.steps, str(r), args.device))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    rows = []
    for name, values in found.items():
        ratios = [m / v for m, v in zip(found["made"], values, strict=True)]
        rows.append([name, f"{1 / statistics.median(values):.2f}", f"{statistics.median(ratios):.1f}"])
    print_table(["features", f"steps/s at batch {args.batch_size}", "times made"], rows)
    print(f"keeping the features of {made.length(0)} frames took {once:.1f} s, once")
    print(machine("1", args.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
