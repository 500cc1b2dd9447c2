"""One rank of the parity tests: trains every listed run, in the order of the list. Started by tests/ranks.py.

Leaves `collectives-RANK.json`: for every run the collective calls of this rank in their order, each as
[function, numbers, type]; `null` where the call has no tensor.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

COLLECTIVES = (
    "all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object", "all_reduce",
    "all_reduce_coalesced", "all_to_all", "all_to_all_single", "barrier", "broadcast", "broadcast_object_list",
    "gather", "gather_object", "monitored_barrier", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter",
)  # fmt: skip
Call = tuple[str, int | None, str | None]


def record_collectives() -> list[Call]:
    """Make torch.distributed note every collective call; before DeepSpeed is imported, which keeps references."""
    import torch.distributed as dist
    from torch import Tensor

    calls: list[Call] = []

    def tensors(values: Iterable[Any]) -> Iterable[Tensor]:
        for v in values:
            if isinstance(v, Tensor):
                yield v
            elif isinstance(v, list | tuple):
                yield from tensors(v)

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            found = list(tensors([*args, *kwargs.values()]))
            calls.append((name, sum(t.numel() for t in found), str(found[0].dtype)) if found else (name, None, None))
            return function(*args, **kwargs)

        return call

    for name in COLLECTIVES:
        if hasattr(dist, name):
            setattr(dist, name, noted(name, getattr(dist, name)))
    return calls


def main() -> None:
    data, out, strategy, runs = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
    calls = record_collectives()
    import torch

    from clbench.testing.toy import toy_config
    from clbench.training.trainer import train
    from tests.learners import registered
    from tests.ranks import poisoned, stopped

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    recorded: dict[str, list[Call]] = {}
    for label, section, overrides in runs:
        own = [f"output_dir={out}", f"train.strategy={strategy}", *overrides]
        with poisoned(label), stopped(label), registered():
            train(toy_config(Path(data), section, *own), label)
        recorded[label] = calls.copy()
        calls.clear()
    (Path(out) / f"collectives-{os.environ['RANK']}.json").write_text(json.dumps(recorded))


if __name__ == "__main__":
    main()
