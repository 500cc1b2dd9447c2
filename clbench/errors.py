"""The exceptions that mean "the user can fix this" and "stopped, to be continued"."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable

# The exit status of a command that a signal stopped cleanly: run again, it continues. This is EX_TEMPFAIL of
# sysexits.h, which schedulers can use to requeue.
RESUME_EXIT = 75

# The exit status of a rank that ends because another one, which is to blame, is gone or does not answer. This is
# EX_UNAVAILABLE of sysexits.h.
LOST_EXIT = 69


class UserError(ValueError):
    """Something a user can get wrong: the message says what is wrong and what to do about it.

    The command line prints only the message and exits with status 2; `--debug` adds the traceback.
    """


class RankLost(UserError):
    """Another rank is gone, or does not answer. The command line exits with LOST_EXIT."""


class Interrupted(KeyboardInterrupt):
    """A signal asked to stop; what was done is kept. The command line prints the message, exits with RESUME_EXIT."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest known name, else a list of the known ones."""
    known = sorted(str(k) for k in known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known: {', '.join(known)}." if known else ""


MEMORY = (
    "out of memory: the machine's, or what a limit allows (ulimit -v, a container's, a job's). Lower "
    "train.batch_size (or split it with train.gradient_accumulation), train.num_workers, eval.slots or the number "
    "of processes"
)
SHARED_MEMORY = (
    "/dev/shm is full (processes pass data through it). Make it larger (docker run --shm-size=8g), or set "
    "train.num_workers=0, which does not use it"
)
# What libraries say when a machine runs out of something → what it means.
_SHORTAGES = (
    (r"</torch_|Bus error", SHARED_MEMORY),
    (
        r"CUDA out of memory|CUDA error: out of memory",
        "the GPU is out of memory. Lower train.batch_size, or split it with train.gradient_accumulation; "
        "train.mixed_precision=bf16 also takes less",
    ),
    (
        r"can't allocate memory|[Cc]annot allocate memory|not enough memory|std::bad_alloc|failed to map segment",
        MEMORY,
    ),
    (
        r"can't start new thread|pthread_create|Resource temporarily unavailable",
        "no more threads or processes can be started here: raise the limit (ulimit -u, a container's pids limit), or "
        "use fewer processes (train.num_workers, --workers, --nproc) and train.threads=1",
    ),
    (
        r"Too many open files",
        "too many files are open: raise the limit (ulimit -n 65536), or use fewer processes (train.num_workers, "
        "--workers)",
    ),
)


def shortage(error: BaseException) -> str | None:
    """Say what the machine is short of if that is what a library's exception means; else None."""
    if isinstance(error, MemoryError):
        return f"{MEMORY}."
    text = str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" ({error.filename})" if error.filename else ""
        return f"the disk is full{where}: make space there, or choose other folders (clbench doctor names them)."
    if not isinstance(error, OSError | RuntimeError | ImportError):
        return None
    return next((f"{meaning}." for pattern, meaning in _SHORTAGES if re.search(pattern, text)), None)
