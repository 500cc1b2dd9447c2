"""The benchmarks run; what they measure is for people to look at."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "parts"), [((), ["2/5", "3/5", "4/5", "5/5"]), (("--paper",), ["1/3", "2/3", "3/3"])]
)
def test_what_needs_a_gpu_runs_on_a_cpu(options: tuple[str, ...], parts: list[str], tmp_path: Path) -> None:
    """Tiny sizes, so that a GPU's rented time is not spent on finding out that a command is broken."""
    done = subprocess.run(
        ["benchmarks/gpu.sh", "--device", "cpu", "--tiny", *options, "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "CLBENCH_RESULTS_ROOT": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert (tmp_path / "log.txt").read_text() == done.stdout
    for part in (*parts, "done in"):
        assert f"\n==== {part}" in done.stdout
