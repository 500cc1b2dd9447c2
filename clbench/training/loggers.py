"""Loggers: where a run's numbers go besides log.jsonl. Subclass `Logger` for another one.

An installed package names it in the entry point group `clbench.loggers`, and `log.loggers={NAME: {KEY: VALUE}}` turns
it on. clbench's own have separate keys: log.tensorboard, log.wandb, log.trackio.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True)
class LoggedRun:
    """What a logger is told about its run.

    Attributes:
        folder: the run's folder, which exists.
        run_id: the run's name.
        identity: drawn when the run starts, and kept for when it resumes; "" unless the logger `wants_identity`.
        project: log.project.
        settings: the logger's own, as in the configuration.
        about: the run's configuration, without secrets.
    """

    folder: Path
    run_id: str
    identity: str
    project: str
    settings: dict[str, Any]
    about: dict[str, Any]


class Logger:
    """Gets steps' numbers as they are logged, on rank 0. One that raises is reported and dropped; the run continues.

    A stopped run makes a new logger when it resumes; steps after its newest saved state are logged again.

    Attributes:
        needs: distributions that it needs, as a literal tuple: they are checked before the run starts.
        wants_identity: whether the service tells runs apart by an id that has to be kept (loggers.json).
    """

    needs: ClassVar[tuple[str, ...]] = ()
    wants_identity: ClassVar[bool] = False

    def __init__(self, run: LoggedRun) -> None:
        self.run = run

    def write(self, numbers: dict[str, Any], step: int) -> None:
        """Numbers of a step, by name; `step` counts all optimizer and forward-only steps of the run."""
        raise NotImplementedError(f"{type(self).__name__} must define write(numbers, step).")

    def checkpoint(self, k: int, folder: Path) -> None:
        """Visit k's checkpoint is complete, in `folder`."""

    def close(self) -> None:
        """The run ends: flush what is pending."""


class TensorBoard(Logger):
    """TensorBoard, in the run's folder."""

    needs = ("tensorboard",)

    def __init__(self, run: LoggedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(run)
        self._writer = SummaryWriter(str(run.folder / "tensorboard"))

    def write(self, numbers: dict[str, Any], step: int) -> None:
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb(Logger):
    """Weights & Biases.

    It puts links to the user's cache among its files, so they are kept next to the runs' folders and not in them:
    .loggers/wandb, or in $WANDB_DIR.
    """

    needs = ("wandb",)
    wants_identity = True

    def __init__(self, run: LoggedRun) -> None:
        import wandb

        super().__init__(run)
        settings, place = run.settings, None
        if not os.environ.get("WANDB_DIR"):
            place = run.folder.resolve().parent / ".loggers"
            place.mkdir(exist_ok=True)
        self._run = wandb.init(
            project=settings["project"] or run.project, entity=settings["entity"], group=settings["group"],
            tags=list(settings["tags"]) or None, name=run.run_id, id=run.identity, resume="allow", config=run.about,
            allow_val_change=True, dir=None if place is None else str(place),
        )  # fmt: skip
        self._artifact = wandb.Artifact if settings["artifacts"] else None

    def write(self, numbers: dict[str, Any], step: int) -> None:
        self._run.log(numbers, step=step)

    def checkpoint(self, k: int, folder: Path) -> None:
        if self._artifact is not None:
            name = re.sub(r"[^\w.-]", "_", f"{self.run.run_id}-{folder.name}", flags=re.ASCII)[:128]
            artifact = self._artifact(name, type="model", metadata={"run_id": self.run.run_id, "k": k})
            artifact.add_dir(str(folder))
            self._run.log_artifact(artifact)

    def close(self) -> None:
        self._run.finish()


class Trackio(Logger):
    """trackio, which distinguishes a project's runs only by name."""

    needs = ("trackio",)
    wants_identity = True

    def __init__(self, run: LoggedRun) -> None:
        import trackio  # type: ignore[import-not-found]

        super().__init__(run)
        self._trackio = trackio
        trackio.init(project=run.project, name=f"{run.run_id}-{run.identity}", resume="allow", config=run.about)

    def write(self, numbers: dict[str, Any], step: int) -> None:
        self._trackio.log(numbers)

    def close(self) -> None:
        self._trackio.finish()
