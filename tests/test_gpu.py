"""A GPU trains what the CPU trains, and two GPUs what one trains: `python -m pytest -m gpu tests/test_gpu.py`.

fp32 without TF32, plain SGD (see tests/ranks.py). Other kernels sum in another order, hence a looser bound than
between CPU ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.ranks import RUNS, STRATEGIES, difference_and_move, train_alone, train_together

DEVICE = "cuda"
CPU_RUNS = [r for r in RUNS if r[0] in ("seqfft", "ewc", "er+ewc-lora")]
TOLERANCE = {"er-bf16": 1e-3}  # others: 1e-5, about a thousandth of what weights move
pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("gpu")]
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")


@pytest.fixture(scope="module", autouse=True)
def _no_tf32() -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def one_gpu(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, by one process on one GPU."""
    out = tmp_path_factory.mktemp("one_gpu")
    train_alone(RUNS, toy_data, out, DEVICE)
    return out


@pytest.fixture(scope="module")
def cpu(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the runs, by one process on the CPU."""
    out = tmp_path_factory.mktemp("cpu")
    train_alone(CPU_RUNS, toy_data, out)
    return out


@pytest.fixture(scope="module", params=STRATEGIES)
def two_gpus(
    request: pytest.FixtureRequest, one_gpu: Path, toy_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """All runs, by two ranks on a GPU each."""
    out = tmp_path_factory.mktemp(f"two_gpus_{request.param}")
    train_together(RUNS, toy_data, out, request.param, DEVICE)
    return request.param, out


def compare(what: str, label: str, one: Path, other: Path) -> None:
    difference, moved = difference_and_move(one / label, other / label)
    print(f"parity {what} {label}: largest difference {difference:.1e}, largest move {moved:.1e}")  # pytest -s
    assert moved > 1e-3
    assert difference < TOLERANCE.get(label, 1e-5), difference


@pytest.mark.parametrize("label", [r[0] for r in CPU_RUNS])
def test_a_gpu_trains_what_the_cpu_trains(label: str, cpu: Path, one_gpu: Path) -> None:
    compare("gpu and cpu", label, cpu, one_gpu)


@TWO_GPUS
@pytest.mark.parametrize("label", [r[0] for r in RUNS])
def test_two_gpus_train_what_one_trains(label: str, one_gpu: Path, two_gpus: tuple[str, Path]) -> None:
    strategy, out = two_gpus
    compare(f"two gpus, {strategy}", label, one_gpu, out)
