"""Inference cost of CLARE as tasks accumulate: `select_action` with 1, 10 and 40 tasks' adapters and discriminators.

The policy is dit_dec_tiny with random weights on Meta-World's dimensions, batch 32; every layer that CLARE targets
gets one adapter and one discriminator per task (the costliest case: every layer expands on every task). The policy is
reset before each call, so that each call predicts a chunk: encodes, routes every sample, integrates. Normalisation is
not part of it. The variants take turns, a few calls each, and every turn gives one ratio to the same turn's 1 task.

Two tables: the sizes of configs/recipes/dit_dec_tiny.yaml, and the paper's (adapter 1024, discriminator
256 → 128).
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from common import machine, print_table, print_verdict, run, spread, tiny_config

AIM = 1.5
BATCH = 32


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tasks", type=int, nargs="+", default=[1, 10, 40], help="the first is the ratios' denominator")
    p.add_argument("--repeats", type=int, default=30, help="turns of every variant (default 30)")
    p.add_argument("--calls", type=int, default=5, help="calls per turn; the fastest counts (default 5)")
    p.add_argument("--threads", type=int, default=1, help="torch threads, as evaluation has them (default 1)")
    p.add_argument("--profile", action="store_true", help="also print where the last variant's time goes")
    return p.parse_args()


def sizes() -> dict[str, dict[str, Any]]:
    """Adapter and discriminator widths by table."""
    a = tiny_config("metaworld_quick", "clare").algorithm
    recipe = {
        "func_adapter_cfg": {"hidden_dim": a["adapter_hidden"]},
        "discriminator_cfg": {"hidden_dim": a["discriminator_hidden"], "latent_dim": a["discriminator_latent"]},
    }
    paper = {
        "func_adapter_cfg": {"hidden_dim": 1024},
        "discriminator_cfg": {"hidden_dim": 256, "latent_dim": 128},
    }
    return {"recipe of dit_dec_tiny": recipe, "paper": paper}


def build(tasks: int, size: dict[str, Any]) -> Any:
    """A policy with `tasks` adapters and discriminators in every targeted layer; 0 = the plain policy."""
    import torch
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.factory import get_policy_class

    from clbench.adapters.clare import ClareConfig, inject
    from clbench.checkpoints.policy_io import policy_config
    from clbench.config.policy_types import clare_targets
    from clbench.envs.metaworld import Metaworld

    config = policy_config(tiny_config("metaworld_quick").policy, "cpu")
    config.input_features = {"observation.state": PolicyFeature(FeatureType.STATE, (Metaworld.state_dim,))}
    config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (Metaworld.action_dim,))}
    torch.manual_seed(0)
    policy: Any = get_policy_class(config.type)(config)  # type: ignore[call-arg]
    if tasks:
        for layer in inject(policy, ClareConfig(target_modules=clare_targets("dit_dec"), **size)):
            for i in range(tasks):
                layer.add_adapter()
                layer.add_discriminator(i)
    policy.requires_grad_(False)
    return policy.eval()


def batches(policy: Any, count: int) -> list[dict[str, Any]]:
    """Processed observations; different ones, so that routing varies."""
    import torch
    from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS

    c = policy.config
    found = []
    for i in range(count):
        gen = torch.Generator().manual_seed(i)
        ids = torch.randint(1, c.text_vocab_size, (BATCH, c.text_max_words), generator=gen)
        found.append(
            {
                "observation.state": torch.randn(BATCH, c.robot_state_feature.shape[0], generator=gen),
                OBS_LANGUAGE_TOKENS: ids,
                OBS_LANGUAGE_ATTENTION_MASK: torch.ones_like(ids, dtype=torch.bool),
            }
        )
    return found


def turn(policy: Any, inputs: list[dict[str, Any]]) -> float:
    """Seconds of the fastest call."""
    import torch

    best = float("inf")
    for batch in inputs:
        policy.reset()
        began = time.perf_counter()
        with torch.inference_mode():
            policy.select_action(batch)
        best = min(best, time.perf_counter() - began)
    return best


def measure(name: str, size: dict[str, Any], args: argparse.Namespace) -> float:
    """Print one table; returns the median ratio of the most tasks to the fewest."""
    from clbench.adapters.clare import clare_layers

    counts = [0, *args.tasks]
    policies = {n: build(n, size) for n in counts}
    inputs = batches(policies[0], args.calls)
    for policy in policies.values():
        turn(policy, inputs)  # warm up: weights are stacked at the first call
    seconds: dict[int, list[float]] = {n: [] for n in counts}
    for i in range(args.repeats):
        for n in counts if i % 2 else counts[::-1]:
            seconds[n].append(turn(policies[n], inputs))
    first = seconds[args.tasks[0]]
    rows = []
    for n in counts:
        ratios = [a / b for a, b in zip(seconds[n], first, strict=True)]
        used = {int(i) for layer in clare_layers(policies[n]) if layer.route is not None for i in layer.route}
        label = f"{n} task{'s' if n > 1 else ''}" if n else "no CLARE"
        rows.append([label, f"{1e3 * statistics.median(seconds[n]):.2f}", *spread(ratios), str(len(used))])
    print(f"\n{name}: adapter {size['func_adapter_cfg']}, discriminator {size['discriminator_cfg']}")
    head = ["variant", "ms per call", f"ratio to {args.tasks[0]}: min", "median", "max", "adapters in use"]
    print_table(head, rows)
    if args.profile:
        profile(policies[counts[-1]], inputs)
    return statistics.median([a / b for a, b in zip(seconds[counts[-1]], first, strict=True)])


def profile(policy: Any, inputs: list[dict[str, Any]]) -> None:
    """Print the functions with the most time of their own."""
    import cProfile
    import pstats

    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(10):
        turn(policy, inputs)
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(15)


def main() -> None:
    args = arguments()
    import torch

    torch.set_num_threads(args.threads)
    print(machine(str(args.threads)))
    for name, size in sizes().items():
        print_verdict(measure(name, size, args), AIM, at_least=False)
    print(machine(str(args.threads)))


if __name__ == "__main__":
    run(main)
