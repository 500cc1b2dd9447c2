"""What a machine is short of is said in our words, and no fault of the program is taken for it."""

from __future__ import annotations

import errno

import pytest

from clbench import cli
from clbench.errors import shortage


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                      "tried to allocate 4000000 bytes. Error code 12 (Cannot allocate memory)"), "out of memory"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "out of memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), "the GPU is out of memory"),
        (RuntimeError("unable to write to file </torch_12_3_0>: No space left on device (28)"), "/dev/shm is full"),
        (RuntimeError("can't start new thread"), "no more threads or processes"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "no more threads or processes"),
        (OSError(errno.EMFILE, "Too many open files", "/x"), "too many files are open"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), "the disk is full (/data/x)"),
    ],
)  # fmt: skip
def test_what_the_machine_is_short_of(
    error: Exception, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(cli, "_list", fail)
    assert cli.main(["list"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("clbench: ") and says in err and "report it" not in err and "Error" not in err


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shapes do not match"), ValueError("memory"), OSError(errno.EACCES, "Permission denied", "/dev/shm")],
    ids=repr,
)
def test_other_errors_are_not_explained_away(error: Exception) -> None:
    assert shortage(error) is None
