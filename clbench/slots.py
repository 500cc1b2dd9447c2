"""N slots shared by the commands of a sweep, each for one busy process. Standard library only.

A slot is a file that is locked (`flock`) by its user, so it is free again if the user is killed. The sweep holds all
slots for the commands it runs, and releases those that it has nothing to start in; an evaluation takes these for
further processes while it has episodes left. So no core is idle while the last runs are evaluated.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from clbench.lock import NO_LOCKS

VARIABLE = "CLBENCH_SLOTS"  # the folder, for commands that a sweep starts


class Slots:
    """Slots 0 to count − 1 in `folder`, which has a file for each."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (folder / str(i)).touch()

    @classmethod
    def shared(cls) -> Slots | None:
        """The slots of the sweep that started this process, or None if none did."""
        folder = Path(os.environ.get(VARIABLE, ""))
        return cls(folder, sum(1 for _ in folder.iterdir())) if os.environ.get(VARIABLE) and folder.is_dir() else None

    def take(self) -> IO[bytes] | None:
        """Take a slot that nobody uses, until it is closed; None when there is none."""
        for i in range(self.count):
            slot = open(self.folder / str(i), "rb")  # noqa: SIM115 (open for as long as it is used)
            try:
                fcntl.flock(slot, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return slot
            except OSError as e:  # in use, or on a file system without locks, where nothing can be shared
                slot.close()
                if not isinstance(e, BlockingIOError) and e.errno not in NO_LOCKS:
                    raise
        return None
