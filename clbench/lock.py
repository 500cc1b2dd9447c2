"""One writer per folder: a lock that is freed when its holder dies, and names its holder. Standard library only.

    with held(run_folder / "eval", "evaluation"):
        ...

FOLDER/.evaluation.lock is locked by the operating system (`flock`) and names its holder: host, process, time, command.
When released, it is removed. A killed holder leaves the file behind, but not the lock, so the next one takes over.
Where a file system has no `flock` (ENOLCK, EOPNOTSUPP, ENOSYS; some network mounts), the file alone is the lock: its
holder counts as dead when its process is gone from this machine. A holder on another machine cannot be checked there,
nor where `flock` works only within one machine: its file is respected until someone removes it.

A run's folder may come from somebody else, and a lock file with it: what it says is checked before it is believed, and
a link is never followed, because the file is overwritten.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import shlex
import socket
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clbench.errors import UserError
from clbench.io import parse_json, remove_if_empty
from clbench.redaction import redact_command, secrets_of
from clbench.terminal import printable, tell

NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}
TRIES = 100  # at a file that is just being taken or released
DAY_S = 86400
MAX_BYTES = 1 << 20  # of a lock file that is read
MAX_TEXT = 500  # characters of it in a message
SETTLE_S = 0.1  # without flock: longer than two processes need to find the same dead holder

_held: dict[int, int] = {}  # descriptors of lock files held by this process → its pid


@contextlib.contextmanager
def held(folder: Path | str, what: str) -> Iterator[None]:
    """Be the only `what` ("training", "evaluation") in `folder`, which is made if needed, while the block runs.

    A process started inside the block does not hold the lock, so nothing that outlives this process keeps it. A folder
    that was made only for the lock is removed with it.

    Raises:
        UserError: another process holds it (the message says who, since when, what to do), or the folder is not
            writable.
    """
    path = Path(folder) / f".{what}.lock"
    _hook_forks()
    new = not path.parent.exists()
    try:
        descriptor = _take(path, what)
    except OSError as e:
        if new:
            remove_if_empty(path.parent)
        if e.errno == errno.ELOOP or path.is_symlink():
            raise UserError(f"{path} is a link, not a lock. Remove it: rm {shlex.quote(str(path))}") from e
        raise UserError(f"cannot write {path}: {e.strerror}. Choose a writable folder with free space.") from e
    _held[descriptor] = os.getpid()
    try:
        yield
    finally:
        if _held.pop(descriptor, None) == os.getpid():  # a forked child that gets here holds nothing
            if _same_file(descriptor, path):
                path.unlink(missing_ok=True)
            os.close(descriptor)
            if new:
                remove_if_empty(path.parent)


@functools.cache
def _hook_forks() -> None:
    """A forked child (a loader process) closes its copies; otherwise a lock would outlive this process in it."""
    os.register_at_fork(after_in_child=_let_go)


def _let_go() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


def sign(descriptor: int) -> None:
    """Name this process in a lock file that it has locked by other means."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(_owner()) + "\n").encode(), 0)


def holder(descriptor: int) -> str:
    """Who has a lock file locked, "process 7 on HOST, since …": according to the file, or to Linux."""
    owner, number = _read(descriptor), _lock_owner(descriptor)
    if number is not None and owner.get("pid") != number and not (owner and not _is_here(owner)):
        owner = {"pid": number, "host": socket.gethostname()}  # the file says nothing, or names an earlier holder
    return f"{_name(owner)}{_since(owner)}" if owner else "an unknown process"


def taken_by(folder: Path, what: str) -> str | None:
    """Who holds `what` in `folder` now, as far as Linux lists it; None: nobody. Nothing is locked to find out."""
    try:
        descriptor = os.open(folder / f".{what}.lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return None if _lock_owner(descriptor) is None else holder(descriptor)
    finally:
        os.close(descriptor)


def _lock_owner(descriptor: int) -> int | None:
    """The process that has the file locked, if it is on this machine and Linux lists it."""
    file = os.fstat(descriptor)
    place = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}:{file.st_ino}"
    try:
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for fields in (line.split() for line in lines):  # 1: FLOCK ADVISORY WRITE 1234 fe:00:567 0 EOF
        if len(fields) == 8 and fields[1] == "FLOCK" and fields[5] == place and int(fields[4]) > 0:
            return int(fields[4])
    return None


def _take(path: Path, what: str) -> int:
    """Return the descriptor of the lock file, locked and with this process named in it. Makes its folder."""
    for _ in range(TRIES):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor, new = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
        except FileNotFoundError:
            continue  # its folder was made for another lock, which is just being released
        except FileExistsError:
            try:
                descriptor, new = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK), False
            except FileNotFoundError:
                continue
        try:
            if _try(descriptor, path, what, new):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        time.sleep(0.01)
    raise UserError(f"{path} keeps changing hands: another {what} is running here. Try again when it has ended.")


def _try(descriptor: int, path: Path, what: str, new: bool) -> bool:
    """Lock the open lock file; False if it was removed meanwhile. Raises UserError if another process holds it."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise UserError(f"{path} is not a regular file, so not a lock. Remove it: rm {shlex.quote(str(path))}")
    locked = _flock(descriptor)
    owner = _read(descriptor)
    if locked is False or (owner and not _is_gone(owner, locked is True)) or (locked is None and not (owner or new)):
        if not _same_file(descriptor, path):
            return False
        raise UserError(_refusal(path, what, owner))
    if not _same_file(descriptor, path):
        return False
    if os.fstat(descriptor).st_nlink > 1:  # writing it would overwrite another file
        raise UserError(f"{path} is another file's second name, not a lock. Remove it: rm {shlex.quote(str(path))}")
    if owner:
        tell(f"note: {_name(owner)} is gone and left {path} behind; taking over.")
    if locked is None and not new:
        path.unlink(missing_ok=True)  # then make a new one, which only one process can do
        return False
    _write(descriptor, path)
    if locked is None:
        time.sleep(SETTLE_S)  # for a process that mistook this file for the dead holder's, and removes it
    return _same_file(descriptor, path)


def _flock(descriptor: int) -> bool | None:
    """True: locked; False: another process holds it; None: this file system has no such locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:
        if e.errno in NO_LOCKS:
            return None
        raise
    return True


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        there, here = path.stat(), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def _write(descriptor: int, path: Path) -> None:
    """Name this process in the file. A file that cannot be written is not left behind."""
    try:
        sign(descriptor)
        os.fsync(descriptor)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _owner() -> dict[str, Any]:
    """What distinguishes this process from all others."""
    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "pid": os.getpid(),
        "started": _start_of(os.getpid()),
        "time": time.time(),
        "command": shlex.join(redact_command(sys.orig_argv, secrets_of())),
    }


def _read(descriptor: int) -> dict[str, Any]:
    """The holder that the file names; {} if it is new, its writer was killed midway, or it names no holder."""
    try:
        owner = parse_json(os.pread(descriptor, MAX_BYTES, 0).decode())
    except (ValueError, RecursionError):
        return {}
    if not isinstance(owner, dict) or type(owner.get("pid")) is not int or not isinstance(owner.get("host"), str):
        return {}
    return owner if 0 < owner["pid"] < 2**31 else {}  # others are not processes, and `kill -1` would end them all


def _is_gone(owner: dict[str, Any], locked: bool) -> bool:
    """Whether the holder that the file names has ended. `locked`: we have the file's lock, so nobody here has it."""
    if not _is_here(owner):
        return owner.get("host") == socket.gethostname()  # this machine, before it was restarted
    if locked:
        return True
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False  # another user's
    return _start_of(owner["pid"]) != owner.get("started")  # the same number, given to another process since


def _is_here(owner: dict[str, Any]) -> bool:
    """Whether the holder ran on this machine since its last start."""
    boot = _boot()
    return owner.get("boot") == boot if boot else owner.get("host") == socket.gethostname()


def _boot() -> str | None:
    """What distinguishes this machine, since its last start, from others. Its containers share it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


def _start_of(pid: int) -> int | None:
    """When a process started, in clock ticks since the machine did; None if that cannot be read."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])  # field 22; field 2, the program's name, may hold anything


def _name(owner: dict[str, Any]) -> str:
    return f"process {owner['pid']} on {_text(owner['host'])}"


def _text(value: Any) -> str:
    """A lock file's text, for a message."""
    text = printable(value)
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " …"


def _refusal(path: Path, what: str, owner: dict[str, Any]) -> str:
    """Who holds the lock, since when, and what to do about it."""
    if not owner:
        return (
            f"{path.parent} is in use by another {what} that is just starting: wait for it to end. If there is none, "
            f"remove the lock: rm {shlex.quote(str(path))}"
        )
    text = f"{path.parent} is in use by another {what}: {_name(owner)}{_since(owner)} ({_text(owner.get('command'))}). "
    if _is_here(owner):
        return text + f"Wait for it to end, or end it: kill {owner['pid']}"
    return (
        text + "This machine cannot see whether it is still running there. If not, remove the lock: "
        f"rm {shlex.quote(str(path))}"
    )


def _since(owner: dict[str, Any]) -> str:
    """ ", since …" if the file says so."""
    began, now = owner.get("time"), time.time()
    if not isinstance(began, int | float) or not 0 <= began <= now + DAY_S:  # clocks of machines differ
        return ""
    age = max(0.0, now - began)
    unit, size = next(((u, s) for u, s in (("days", DAY_S), ("h", 3600), ("min", 60)) if age >= 2 * s), ("s", 1))
    return f", since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(began))}, {age / size:.0f} {unit} ago"
