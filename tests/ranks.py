"""What the parity tests share (test_ranks.py on CPU ranks, test_gpu.py on GPUs): the runs, and ways to train them.

fp32 and plain SGD: under AdamW, parameters whose true gradient is zero amplify rounding.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from clbench.checkpoints.policy_io import load_policy
from clbench.checkpoints.run_folder import checkpoint_folder
from clbench.errors import Interrupted
from clbench.io import read_json
from clbench.launch import free_port
from clbench.policies.view import PolicyView
from clbench.stopping import Stop
from clbench.testing.toy import toy_config
from clbench.training.loop import PhaseRunner
from clbench.training.trainer import train
from tests.algorithm_cases import MEMORY, SMALL_CLARE, SMALL_MIR
from tests.children import Process, run_module
from tests.learners import registered

ROOT = Path(__file__).resolve().parents[1]
PLAIN = (
    "train.optimizer.name=sgd", "train.optimizer.lr=0.05", "train.optimizer.weight_decay=0", "dataset.task_order=[0,1]",
)  # fmt: skip
LORA = ("lora.enabled=true", "lora.rank=2")
HALVES = ("train.gradient_accumulation=2",)
ParityRun = tuple[str, dict[str, Any], tuple[str, ...]]  # label, algorithm section, own overrides
RUNS: list[ParityRun] = [
    ("seqfft", {"name": "seqfft"}, HALVES),
    ("seqlora", {"name": "seqlora"}, ("lora.rank=2",)),
    ("er", {"name": "er", **MEMORY}, HALVES),
    ("er-append", {"name": "er", **MEMORY, "mode": "append"}, ()),
    ("mir", {"name": "mir", **SMALL_MIR, "mir_refresh_interval": 2}, HALVES),
    ("agem", {"name": "agem", "buffer_size_per_task": 10, "reference_batch_size": 6}, HALVES),
    ("ewc", {"name": "ewc", "ewc_lambda": 10.0, "fisher_batches": 2}, HALVES),
    ("packnet", {"name": "packnet", "prune_ratio": 0.5}, HALVES),
    ("clare", {"name": "clare", **SMALL_CLARE}, ()),
    ("multitask", {"name": "multitask"}, ()),
    ("singletask", {"name": "singletask"}, ()),
    ("er+ewc-lora", {"name": ["er", "ewc"], **MEMORY, "ewc_lambda": 10.0, "fisher_batches": 2}, LORA),
    ("er-bf16", {"name": "er", **MEMORY}, ("train.mixed_precision=bf16",)),
    ("er-nan", {"name": "er", **MEMORY}, ("train.on_nonfinite=skip",)),  # see poisoned
    ("rehearsal", {"name": "rehearsal"}, HALVES),
    ("onpolicy", {"name": "onpolicy"}, ()),
    ("weighted", {"name": "weighted"}, HALVES),
    ("er-stopped", {"name": "er", **MEMORY}, ("train.optimizer.momentum=0.9",)),  # see stopped
]
STRATEGIES = ["ddp", pytest.param("zero2", marks=pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed"))]  # fmt: skip


@contextmanager
def poisoned(label: str) -> Iterator[None]:
    """With a label that ends in "nan": rank 0's loss at step 2 of the first task is NaN."""
    if not label.endswith("nan"):
        yield
        return
    step, total, now = PhaseRunner._train_step, PolicyView.total, [False]

    def watched(self: PhaseRunner, *args: Any) -> dict[str, float]:
        ctx = self.ctx
        now[0] = (ctx.stream.mode, ctx.k, ctx.step, ctx.rank) == ("sequential", 0, 2, 0)
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PhaseRunner, "_train_step", watched)
        patch.setattr(PolicyView, "total", lambda self, *a: total(self, *a) * (float("nan") if now[0] else 1.0))
        yield


@contextmanager
def stopped(label: str) -> Iterator[None]:
    """With a label that ends in "stopped": asked to stop after step 2 of the second task; one process goes on."""
    if not label.endswith("stopped"):
        yield
        return
    asked = itertools.chain([""] * 6, itertools.repeat("a test"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stop, "reason", property(lambda _: next(asked)))
        with pytest.raises(Interrupted, match="in task 2, phase train, after step 2"):
            yield


def overrides(own: Sequence[str], device: str = "cpu") -> list[str]:
    return [*PLAIN, f"train.device={device}", *own]


def train_alone(runs: Sequence[ParityRun], toy_data: Path, out: Path, device: str = "cpu") -> None:
    """The runs, by this process."""
    for label, section, own in runs:
        with poisoned(label), registered():
            train(toy_config(toy_data, section, f"output_dir={out}", *overrides(own, device)), label)


def train_together(runs: Sequence[ParityRun], toy_data: Path, out: Path, strategy: str, device: str = "cpu") -> None:
    """The runs, by one pair of ranks."""
    listed = json.dumps([(label, section, overrides(own, device)) for label, section, own in runs])
    port = free_port()
    out.mkdir(parents=True, exist_ok=True)
    ranks = [_start(r, port, out, [str(toy_data), str(out), strategy, listed]) for r in range(2)]
    printed = [p.finish(600) for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0], "\n".join(printed)


def _start(rank: int, port: int, out: Path, arguments: list[str]) -> Process:
    environment = {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CLBENCH_RANKS": "2",
    }  # fmt: skip
    printed = out.parent / f"{out.name}-rank-{rank}.txt"
    return Process(printed, run_module, "tests.rank_worker", arguments, env=environment)


def weights(folder: Path, k: int) -> dict[str, torch.Tensor]:
    return load_policy(checkpoint_folder(folder, k) / "policy").policy.state_dict()


def difference_and_move(one: Path, other: Path) -> tuple[float, float]:
    """The largest difference between two runs' last weights, and the largest move of one of them from its base."""
    manifest = read_json(one / "manifest.json")
    last = len(manifest["checkpoints"]) - 1
    a, b = weights(one, last), weights(other, last)
    base = load_policy(manifest["base"]["path"]).policy.state_dict()
    assert a.keys() == b.keys()
    difference = max(float((a[n] - b[n]).abs().max()) for n in a)
    return difference, max(float((a[n] - base[n]).abs().max()) if n in base else 1.0 for n in a)
