"""Whether two runs left the same files: every byte of checkpoints, every event, apart from time stamps."""

from __future__ import annotations

import json
from pathlib import Path

from clbench.io import read_json, read_jsonl

TIMES = ("time", "seconds", "saving_seconds", "peak_memory_mb")


def files(folder: Path) -> dict[str, bytes]:
    """Name → contents of all files below a folder; for a checkpoint's description, without time stamps."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    for name in found:
        if name.endswith("checkpoint.json"):
            described = read_json(folder / name)
            kept = {k: v for k, v in described.items() if k not in ("seal", "log_bytes", "seconds", "task_seconds")}
            found[name] = json.dumps(kept).encode()
    return found


def events(run: Path) -> list[str]:
    """The run's log."""
    rows = [{k: v for k, v in r.items() if k not in TIMES} for r in read_jsonl(run / "log.jsonl")]
    return [json.dumps(r) for r in rows]


def assert_same_run(run: Path, other: Path) -> None:
    assert files(run / "checkpoints") == files(other / "checkpoints")
    assert events(run) == events(other)
    assert not (other / "training_state").exists()
