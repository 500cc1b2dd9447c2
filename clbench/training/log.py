"""The run's log: log.jsonl always, and the requested loggers (loggers.py).

loggers.json in the run's folder holds the id by which each service knows the run.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clbench import registry
from clbench.config.schema import LogConfig, WandbConfig
from clbench.errors import UserError, nearest
from clbench.io import read_json, read_jsonl, write_json, write_jsonl
from clbench.redaction import redact, secrets_of
from clbench.terminal import tell
from clbench.training.loggers import LoggedRun, Logger

FILE = "log.jsonl"
IDS = "loggers.json"  # logger → the run's id there


def wanted_loggers(config: LogConfig) -> dict[str, dict[str, Any]]:
    """Which loggers besides log.jsonl are requested, with their settings. Nothing is imported.

    Raises:
        UserError: no logger has that name, or a package that it needs is not installed.
    """
    own = registry.OWN["loggers"]
    wanted = {n: asdict(config.wandb) if n == "wandb" else {} for n in own if _is_on(getattr(config, n))}
    known = registry.entries("loggers")
    for name, settings in config.loggers.items():
        if name in own:
            raise UserError(f"log.loggers.{name}: clbench's own loggers have separate keys: log.{name}.")
        if name not in known:
            raise UserError(f"log.loggers names '{name}'.{nearest(name, known)}")
        if not (settings is None or isinstance(settings, dict)):
            raise UserError(f"log.loggers.{name} must be the logger's settings, as in {{{name}: {{}}}}.")
        wanted[name] = settings or {}
    for name in wanted:
        for package in registry.describe(known[name]).missing:
            extra = " (extra: loggers)" if name in own else ""
            raise UserError(f"log.{name if name in own else f'loggers.{name}'} needs the package `{package}`{extra}.")
    return wanted


def _is_on(setting: Any) -> bool:
    return bool(setting.enabled if isinstance(setting, WandbConfig) else setting)


class RunLog:
    """Appends one JSON object per event. Numbers of "step" events also go to the optional loggers, which get the
    configuration `about`."""

    def __init__(
        self, folder: Path, config: LogConfig, run_id: str, enabled: bool = True, about: dict[str, Any] | None = None
    ) -> None:
        self.enabled = enabled
        self._secrets = secrets_of()
        self._loggers: dict[str, Logger] = {}
        self._file: Any = None
        self._steps = 0
        if not enabled:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / FILE).open("ab", buffering=0)
        except OSError as e:
            raise UserError(f"cannot write into {folder}: {e.strerror}.") from e
        for name, settings in wanted_loggers(config).items():
            made = registry.load("loggers", name)
            identity = _identity(folder, name, run_id) if made.wants_identity else ""
            try:
                run = LoggedRun(folder, run_id, identity, config.project, settings, about or {})
                self._loggers[name] = made(run)
            except Exception as e:  # noqa: BLE001 (a logger that is down must not keep a run from starting)
                tell(f"warning: {name} cannot be reached ({e}); continuing without it.")

    def event(self, event: str, /, **fields: Any) -> None:
        """Write {"event": …, fields…, "time": seconds since the epoch}."""
        if not self.enabled:
            return
        row = {"event": event, **redact(_plain(fields), self._secrets), "time": round(time.time(), 3)}
        self._write(json.dumps(row, allow_nan=False).encode() + b"\n")
        if event == "step":
            self._steps += 1
            numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k not in ("time", "total")}
            for name in list(self._loggers):
                self._try(name, lambda s: s.write(numbers, int(fields.get("total", self._steps))))

    def checkpoint(self, k: int, folder: Path) -> None:
        """Visit k's checkpoint is in `folder`: pass it to loggers that were asked to keep it."""
        for name in list(self._loggers):
            self._try(name, lambda s: s.checkpoint(k, folder))

    def _try(self, name: str, use: Callable[[Logger], None]) -> None:
        try:
            use(self._loggers[name])
        except Exception as e:  # noqa: BLE001 (a logger that is down must not end the run)
            tell(f"warning: {name} failed ({e}); continuing without it.")
            del self._loggers[name]

    def _write(self, line: bytes) -> None:
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as e:
            raise UserError(
                f"cannot write {self._file.name}: {e.strerror}. Make space there, then continue with --resume."
            ) from e

    def flushed(self) -> int:
        """Flush what was written to disk; returns the file's length."""
        os.fsync(self._file.fileno())
        return int(os.fstat(self._file.fileno()).st_size)

    def cut(self, length: int | None, last_k: int) -> None:
        """Drop what was written after a checkpoint or training state, when the log had `length` bytes.

        A resumed run writes those events again. `length` None (saved by an earlier version): events of visits after
        `last_k` are dropped. A log that is shorter than `length` has lost lines, which gives a warning.
        """
        path = Path(self._file.name)
        if length is None:
            self._file.close()
            rows = read_jsonl(path)
            if not all(isinstance(r, dict) and isinstance(r.get("k", 0), int) for r in rows):
                raise UserError(f"{path} holds lines that are not events; move the file away.")
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
        for name, logger in self._loggers.items():
            try:
                logger.close()
            except Exception as e:  # noqa: BLE001 (a logger that is down must not end the run)
                tell(f"warning: {name} could not be closed ({e}).")


def _plain(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite becomes its name."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _identity(folder: Path, name: str, run_id: str) -> str:
    """The run's id with a logger: drawn when it starts, so that no two runs share it, and kept for when it resumes."""
    path = folder / IDS
    known = read_json(path) if path.is_file() else {}
    if not isinstance(known, dict) or not all(isinstance(v, str) and v.isprintable() for v in known.values()):
        raise UserError(f"{path} is damaged: it does not hold ids. Remove it to give the run new ones.")
    if name not in known:
        # Earlier versions of clbench logged to W&B under the run's name, from the run's folder.
        known[name] = run_id if name == "wandb" and (folder / "wandb").is_dir() else secrets.token_hex(8)
        write_json(path, known)
    return str(known[name])
