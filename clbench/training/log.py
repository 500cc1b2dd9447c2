"""The run's log: log.jsonl always, TensorBoard / W&B / trackio when asked."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from clbench.config.schema import LogConfig
from clbench.errors import UserError
from clbench.io import read_jsonl, write_jsonl
from clbench.redaction import redact, secrets_of
from clbench.terminal import tell

FILE = "log.jsonl"


class RunLog:
    """Appends one JSON object per event. Numbers of "step" events also go to the optional loggers."""

    def __init__(self, folder: Path, config: LogConfig, run_id: str, enabled: bool = True) -> None:
        self.enabled = enabled
        self._secrets = secrets_of()
        self._sinks: list[_Sink] = []
        self._file: Any = None
        self._steps = 0
        if not enabled:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / FILE).open("ab", buffering=0)
        except OSError as e:
            raise UserError(f"cannot write into {folder}: {e.strerror}.") from e
        makers = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio}
        for name, maker in makers.items():
            if config.wandb.enabled if name == "wandb" else getattr(config, name):
                try:
                    self._sinks.append(maker(folder, config.project, run_id))
                except UserError:  # not installed
                    raise
                except Exception as e:  # noqa: BLE001 (a logger that is down must not keep a run from starting)
                    tell(f"warning: {name} cannot be reached ({e}); going on without it.")

    def event(self, event: str, /, **fields: Any) -> None:
        """Write {"event": …, fields…, "time": seconds since the epoch}."""
        if not self.enabled:
            return
        row = {"event": event, **redact(_plain(fields), self._secrets), "time": round(time.time(), 3)}
        self._write(json.dumps(row, allow_nan=False).encode() + b"\n")
        if event == "step":
            self._steps += 1
            numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k not in ("time", "total")}
            for sink in list(self._sinks):
                try:
                    sink.write(numbers, int(fields.get("total", self._steps)))
                except Exception as e:  # noqa: BLE001 (a logger that is down must not end the run)
                    tell(f"warning: {sink.name} failed ({e}); going on without it.")
                    self._sinks.remove(sink)

    def _write(self, line: bytes) -> None:
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as e:
            raise UserError(
                f"cannot write {self._file.name}: {e.strerror}. Make space there, then continue with --resume."
            ) from e

    def flushed(self) -> int:
        """Bring what was written to the disk; returns the file's length."""
        os.fsync(self._file.fileno())
        return int(os.fstat(self._file.fileno()).st_size)

    def cut(self, length: int | None, last_k: int) -> None:
        """Drop what was written after a checkpoint or training state, when the log had `length` bytes.

        A resumed run writes those events anew. `length` None (saved by an earlier version): events of visits after
        `last_k` are dropped. A log that is shorter than that has lost lines: a warning says so.
        """
        path = Path(self._file.name)
        if length is None:
            self._file.close()
            rows = read_jsonl(path)
            if not all(isinstance(r, dict) and isinstance(r.get("k", 0), int) for r in rows):
                raise UserError(f"{path} holds lines that are no events; move the file away.")
            write_jsonl(path, [r for r in rows if r.get("k", 0) <= last_k and r.get("event") != "run_end"])
            self._file = path.open("ab", buffering=0)
            return
        if self.flushed() < length:
            tell(f"warning: {path} has lost lines: it is shorter than when the state was saved.")
            return
        os.ftruncate(self._file.fileno(), length)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as e:  # noqa: BLE001 (a logger that is down must not end the run)
                tell(f"warning: {sink.name} could not be closed ({e}).")


def _plain(value: Any) -> Any:
    """JSON can hold no NaN: a number that is not finite becomes its name."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


class _Sink:
    name = ""

    def write(self, numbers: dict[str, Any], step: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Flush what is pending."""


class _TensorBoard(_Sink):
    name = "tensorboard"

    def __init__(self, folder: Path, project: str, run_id: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise UserError("log.tensorboard needs the package `tensorboard` (extra: loggers).") from e
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, numbers: dict[str, Any], step: int) -> None:
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb(_Sink):
    name = "wandb"

    def __init__(self, folder: Path, project: str, run_id: str) -> None:
        try:
            import wandb
        except ImportError as e:
            raise UserError("log.wandb needs the package `wandb` (extra: loggers).") from e
        self._run = wandb.init(project=project, name=run_id, id=run_id, dir=str(folder), resume="allow")

    def write(self, numbers: dict[str, Any], step: int) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio(_Sink):
    name = "trackio"

    def __init__(self, folder: Path, project: str, run_id: str) -> None:
        try:
            import trackio  # type: ignore[import-not-found]
        except ImportError as e:
            raise UserError("log.trackio needs the package `trackio` (extra: loggers).") from e
        self._trackio = trackio
        trackio.init(project=project, name=run_id, resume="allow")

    def write(self, numbers: dict[str, Any], step: int) -> None:
        self._trackio.log(numbers)

    def close(self) -> None:
        self._trackio.finish()
