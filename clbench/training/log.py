"""The run's log: log.jsonl always, TensorBoard / W&B / trackio when asked.

W&B puts links to the user's cache among its files, so they are kept beside the runs' folders and not in them:
.loggers/wandb, or where $WANDB_DIR says. The run's folder has loggers.json, under which id each service knows the run.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clbench.config.schema import LogConfig
from clbench.errors import UserError
from clbench.io import read_json, read_jsonl, write_json, write_jsonl
from clbench.redaction import redact, secrets_of
from clbench.terminal import tell

FILE = "log.jsonl"
IDS = "loggers.json"  # logger → the run's id there
LOGGERS = ("tensorboard", "wandb", "trackio")


def wanted_loggers(config: LogConfig) -> list[str]:
    """Which loggers beside log.jsonl are asked for; UserError where one's package is not installed."""
    wanted = [n for n in LOGGERS if (config.wandb.enabled if n == "wandb" else getattr(config, n))]
    for name in wanted:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"log.{name} needs the package `{name}` (extra: loggers).")
    return wanted


class RunLog:
    """Appends one JSON object per event. Numbers of "step" events also go to the optional loggers, which are told the
    configuration `about`."""

    def __init__(
        self, folder: Path, config: LogConfig, run_id: str, enabled: bool = True, about: dict[str, Any] | None = None
    ) -> None:
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
        makers: dict[str, Any] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio}
        for name in wanted_loggers(config):
            identity = "" if name == "tensorboard" else _identity(folder, name, run_id)
            try:
                self._sinks.append(makers[name](folder, config, run_id, identity, about or {}))
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
                self._try(sink, lambda s: s.write(numbers, int(fields.get("total", self._steps))))

    def checkpoint(self, k: int, folder: Path) -> None:
        """Visit k's checkpoint is in `folder`: loggers that were asked to keep it get it."""
        for sink in list(self._sinks):
            self._try(sink, lambda s: s.checkpoint(k, folder))

    def _try(self, sink: _Sink, use: Callable[[_Sink], None]) -> None:
        try:
            use(sink)
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

    def checkpoint(self, k: int, folder: Path) -> None:
        """Keep a copy of visit k's checkpoint, where that was asked for."""

    def close(self) -> None:
        """Flush what is pending."""


def _identity(folder: Path, name: str, run_id: str) -> str:
    """The run's id with a logger: drawn when it starts, so that no two runs share it, and kept for when it goes on."""
    path = folder / IDS
    known = read_json(path) if path.is_file() else {}
    if not isinstance(known, dict) or not all(isinstance(v, str) and v.isprintable() for v in known.values()):
        raise UserError(f"{path} is damaged: it does not hold ids. Remove it, and the run gets new ones.")
    if name not in known:
        # Earlier versions of clbench logged to W&B under the run's name, from the run's folder.
        known[name] = run_id if name == "wandb" and (folder / "wandb").is_dir() else secrets.token_hex(8)
        write_json(path, known)
    return str(known[name])


class _TensorBoard(_Sink):
    name = "tensorboard"

    def __init__(self, folder: Path, config: LogConfig, run_id: str, identity: str, about: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, numbers: dict[str, Any], step: int) -> None:
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb(_Sink):
    name = "wandb"

    def __init__(self, folder: Path, config: LogConfig, run_id: str, identity: str, about: dict[str, Any]) -> None:
        import wandb

        settings, place = config.wandb, None
        if not os.environ.get("WANDB_DIR"):
            place = folder.resolve().parent / ".loggers"
            place.mkdir(exist_ok=True)
        self._run = wandb.init(
            project=settings.project or config.project, entity=settings.entity, group=settings.group,
            tags=list(settings.tags) or None, name=run_id, id=identity, resume="allow", config=about,
            allow_val_change=True, dir=None if place is None else str(place),
        )  # fmt: skip
        self._artifact = wandb.Artifact if settings.artifacts else None
        self._run_id = run_id

    def write(self, numbers: dict[str, Any], step: int) -> None:
        self._run.log(numbers, step=step)

    def checkpoint(self, k: int, folder: Path) -> None:
        if self._artifact is not None:
            name = re.sub(r"[^\w.-]", "_", f"{self._run_id}-{folder.name}", flags=re.ASCII)[:128]
            artifact = self._artifact(name, type="model", metadata={"run_id": self._run_id, "k": k})
            artifact.add_dir(str(folder))
            self._run.log_artifact(artifact)

    def close(self) -> None:
        self._run.finish()


class _Trackio(_Sink):
    name = "trackio"

    def __init__(self, folder: Path, config: LogConfig, run_id: str, identity: str, about: dict[str, Any]) -> None:
        import trackio  # type: ignore[import-not-found]

        self._trackio = trackio
        # It tells a project's runs apart by their names alone.
        trackio.init(project=config.project, name=f"{run_id}-{identity}", resume="allow", config=about)

    def write(self, numbers: dict[str, Any], step: int) -> None:
        self._trackio.log(numbers)

    def close(self) -> None:
        self._trackio.finish()
