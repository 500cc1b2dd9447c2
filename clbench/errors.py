"""The exception type that means "the user can mend this", and the one that means "stopped, to be continued"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# The exit status of a command that a signal stopped in good order: run again, it continues. This is EX_TEMPFAIL of
# sysexits.h, on which schedulers can requeue.
RESUME_EXIT = 75


class UserError(ValueError):
    """Something a user can get wrong: the message says what is wrong and what to do about it.

    The command line prints the message alone and exits with status 2; `--debug` adds the traceback.
    """


class Interrupted(KeyboardInterrupt):
    """A signal asked to stop; what was done is kept. The command line prints the message, exits with RESUME_EXIT."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest known name, else a list of the known ones."""
    known = sorted(str(k) for k in known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known: {', '.join(known)}." if known else ""
