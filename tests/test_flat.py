"""A long evaluation needs no more memory and open files in the end than at its beginning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from clbench.config.compose import compose
from clbench.evaluation.pool import WorkerPool
from clbench.evaluation.rows import Weights
from clbench.evaluation.worker import Job, Settings
from clbench.seeding import seeded
from clbench.stopping import Stop
from clbench.testing.toy import toy_config

ROWS = 8
# After the second row; 3 MB when measured (1177 to 1179 MB), and 263 MB before freed memory was given back.
MAX_GROWTH_MB = 30.0


@pytest.fixture
def base(toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The toy base, barely trained."""
    from clbench.training.backend import Backend
    from clbench.training.pretrain import ensure_base

    monkeypatch.setenv("CLBENCH_CACHE_ROOT", str(tmp_path))
    torch.set_num_threads(1)
    config = toy_config(toy_data, {"name": "seqfft"}, "pretrain.steps=2")
    with seeded("flat", 0):
        yield ensure_base(config, Backend(config.train), Stop(), "quiet")[0]


def usage(pid: int) -> tuple[float, int]:
    """Resident memory in MB and the number of open files of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 1e6, len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.mark.slow
def test_memory_and_open_files_stay_flat_over_ten_tasks_and_many_rows(toy_data: Path, base: Path) -> None:
    stream = compose(model="dit_dec_tiny", algorithms=["seqfft"], dataset="metaworld_cw10", registered=["seqfft"])[0]
    tasks = stream.dataset.tasks
    assert len(tasks) == 10
    config = toy_config(toy_data, {"name": "seqfft"}, "eval.slots=4")
    jobs = []
    for k in range(ROWS):
        episodes = [
            {"j": j, "task_id": j, "episode": e, "seed": 1_000_000 + e, "env": {"type": "metaworld", "task": task},
             "instruction": task, "max_steps": 5}
            for j, task in enumerate(tasks) for e in range(2)
        ]  # fmt: skip
        jobs.append(Job(k, Weights(str(base)), tuple(episodes)))
    rows: dict[int, tuple[float, int]] = {}  # after the last episode of each row

    def record(row: dict[str, Any]) -> None:
        (worker,) = pool.running
        assert worker.process.pid is not None
        rows[row["k"]] = usage(worker.process.pid)

    pool = WorkerPool(jobs, Settings(config, 4, 0, "cpu", threads=1), 1, record, Stop())
    pool.play()
    for k, (megabytes, files) in rows.items():
        print(f"row {k:2}: {megabytes:7.1f} MB resident, {files} open files")  # pytest -s
    assert len(rows) == ROWS
    assert rows[ROWS - 1][1] <= rows[1][1]
    assert rows[ROWS - 1][0] - rows[1][0] < MAX_GROWTH_MB
