"""What making and importing data sets share: a working folder that becomes the set or vanishes, and LeRobot's ways."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from clbench.errors import UserError
from clbench.stopping import clearing_away


@contextlib.contextmanager
def working_folder(root: Path) -> Iterator[Path]:
    """A working folder next to `root`, gone afterwards, whatever happens; SIGTERM clears it away, too.

    It is locked while in use; folders of makes that were killed hold no lock, and are removed first.
    """
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        for stale in sorted(root.parent.glob(f".{glob.escape(root.name)}.partial-*")):
            with _lock(stale) as free:
                if not free:
                    number = stale.name.rpartition("-")[2]
                    raise UserError(
                        f"another process is making {root}. Wait for it to end, or end it: kill {number}"
                    )
                shutil.rmtree(stale)
        folder = root.parent / f".{root.name}.partial-{os.getpid()}"
        folder.mkdir()
    except OSError as e:
        raise UserError(f"cannot write next to {root}: {e.strerror}. Choose a writable folder.") from e
    try:
        with clearing_away(), _lock(folder) as free:
            if not free:  # another make treated it as stale before it was locked
                raise UserError(f"another process is making {root}. Wait for it to end.")
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # what remains is removed by the next make


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Hold `folder`'s lock if it is free, and yield whether it was. A dead process holds none."""
    file: IO[str]
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Suppress a progress bar per episode, and a page about video decoders (there are no videos here)."""
    import datasets

    logger = logging.getLogger("lerobot.utils.import_utils")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def finalizing(dataset: Any) -> Iterator[None]:
    """Complete the LeRobotDataset that the block writes to.

    Also after an exception: when it is collected it would complete itself, in a folder that is gone by then.
    """
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):  # the first one counts
            dataset.finalize()
        raise
    dataset.finalize()
