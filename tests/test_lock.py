"""One writer per folder: the second is told who holds it, the holder's death frees it, other machines are respected."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clbench.errors import UserError
from clbench.lock import held, sign
from clbench.lock import holder as holder_of

HOLDER = "import sys, time; from clbench.lock import held\nwith held(sys.argv[1], 'job'): print('has it', flush=True); "
Holder = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(params=["flock", "no flock"])
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With and without a file system that has flock (here: for this process alone)."""
    if request.param == "no flock":

        def refuse(descriptor: int, operation: int) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)
    return str(request.param)


@pytest.fixture
def holder() -> Iterator[Holder]:
    """Start a process that holds the lock and then runs `then`."""
    processes = []

    def start(folder: Path, then: str = "time.sleep(60)") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER + then, str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None and process.stdout.readline() == "has it\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


def lock_file(folder: Path) -> Path:
    return folder / ".job.lock"


def test_a_second_holder_is_told_who_since_when_and_what_to_do(tmp_path: Path, holder: Holder, locks: str) -> None:
    folder = tmp_path / "new"
    process = holder(folder)
    with pytest.raises(UserError) as e:
        with held(folder, "job"):
            pytest.fail("two holders")
    text = str(e.value)
    assert f"process {process.pid} on " in text and f"kill {process.pid}" in text and "s ago" in text
    assert str(folder) in text and "another job" in text and HOLDER[:20] in text
    with held(folder, "other"):
        assert lock_file(folder).is_file()


def test_the_holders_death_frees_it(
    tmp_path: Path, holder: Holder, locks: str, capsys: pytest.CaptureFixture[str]
) -> None:
    process = holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert lock_file(tmp_path).is_file()
    with held(tmp_path, "job"):
        assert json.loads(lock_file(tmp_path).read_text())["pid"] == os.getpid()
    assert not lock_file(tmp_path).exists()
    assert f"process {process.pid}" in capsys.readouterr().err


def test_it_is_given_back_and_taken_again(tmp_path: Path, locks: str, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), held(tmp_path, "job"):
            with pytest.raises(UserError, match=f"process {os.getpid()} on"), held(tmp_path, "job"):
                pytest.fail("two holders in one process")
            raise KeyError
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().err == ""


def test_a_forked_child_does_not_keep_it(tmp_path: Path, holder: Holder) -> None:
    """As a loader process of a killed training would: it lives on, and the lock is free."""
    process = holder(tmp_path, "import os; os.fork() or print(os.getpid(), flush=True); time.sleep(60)")
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        process.kill()
        process.wait()
        with held(tmp_path, "job"):
            os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_forked_child_that_leaves_the_block_frees_nothing(tmp_path: Path, holder: Holder) -> None:
    process = holder(tmp_path, "import os; pid = os.fork(); pid and (os.wait(), print('child left', flush=True), "
                     "time.sleep(60))")  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "child left\n"
    with pytest.raises(UserError, match="in use"), held(tmp_path, "job"):
        pytest.fail("two holders")


def named(folder: Path, **values: Any) -> None:
    """Leave a lock file behind, as a process that is named like this would."""
    with held(folder, "job"):
        owner = json.loads(lock_file(folder).read_text())
    lock_file(folder).write_text(json.dumps({**owner, **values}))


def test_another_machines_lock_is_respected_until_it_is_removed(tmp_path: Path, locks: str) -> None:
    named(tmp_path, host="elsewhere", boot="another", time=time.time() - 3 * 3600)
    with pytest.raises(UserError, match=r"on elsewhere, since .*, 3 h ago .*: rm ") as e, held(tmp_path, "job"):
        pytest.fail("taken over")
    subprocess.run(str(e.value).rpartition(": ")[2], shell=True, check=True)
    with held(tmp_path, "job"):
        assert lock_file(tmp_path).is_file()


@pytest.mark.parametrize("change", [{"started": 1}, {"boot": "before the restart"}], ids=str)
def test_a_process_number_in_use_again_is_not_its_old_holder(tmp_path: Path, locks: str, change: Any) -> None:
    named(tmp_path, **change)
    with held(tmp_path, "job"):
        assert lock_file(tmp_path).is_file()


@pytest.mark.parametrize("content", ["", '{"pid"', "[]"])
def test_a_half_written_file(tmp_path: Path, locks: str, content: str) -> None:
    """Its writer was killed over it (flock tells), or is about to go on (without flock nothing tells)."""
    lock_file(tmp_path).write_text(content)
    if locks == "flock":
        with held(tmp_path, "job"):
            return
    with pytest.raises(UserError, match=r"just starting.* rm "), held(tmp_path, "job"):
        pytest.fail("taken over")


def test_many_at_once_and_one_at_a_time(tmp_path: Path) -> None:
    """Eight processes take it whenever they can; none ever meets another one inside."""
    code = (
        "import os, sys, time; from clbench.lock import held; from clbench.errors import UserError; n = 0\n"
        "end = time.monotonic() + 20\n"
        "while n < 25 and time.monotonic() < end:\n"
        "    try:\n"
        "        with held(sys.argv[1], 'job'):\n"
        "            os.mkdir(sys.argv[1] + '/inside'); os.rmdir(sys.argv[1] + '/inside'); n += 1\n"
        "    except UserError: time.sleep(0.001)\n"
        "sys.exit(0 if n == 25 else 3)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(8)]
    assert [p.wait() for p in processes] == [0] * 8


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"), held(tmp_path / "file", "job"):
        pytest.fail("held")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(UserError, match=r"cannot write .*No space"), held(tmp_path, "job"):
            pytest.fail("held")
    assert list(tmp_path.iterdir()) == []


OTHERS = {"host": "h", "boot": "b", "pid": 7, "started": 1, "time": 1, "command": "x"}


@pytest.mark.parametrize(
    "change",
    [
        {"time": 1e300}, {"time": -1e308}, {"time": 10**400}, {"time": "soon"}, {"boot": ["b"]},
        {"command": "x\x1b]0;mine\x07\u202e\n"}, {"command": ["y"] * 5000}, {"host": "h\x1b[2J"},
    ],
    ids=str,
)  # fmt: skip
def test_odd_contents_are_one_plain_message(tmp_path: Path, change: dict[str, Any], locks: str) -> None:
    """A run's folder may come from somebody else, its lock files with it."""
    lock_file(tmp_path).write_text(json.dumps({**OTHERS, **change}))
    with pytest.raises(UserError, match=r"process 7 on h.*: rm ") as e, held(tmp_path, "job"):
        pytest.fail("taken over")
    assert str(e.value).isprintable() and len(str(e.value)) < 1500


@pytest.mark.parametrize(
    "content",
    ["[" * 200_000, json.dumps({**OTHERS, "time": float("nan")}), '{"host": "h", "pid": ' + "9" * 400 + "}",
     *(json.dumps({**OTHERS, **c}) for c in ({"pid": -1}, {"pid": 0}, {"pid": True}, {"pid": 2**31}, {"host": ["h"]})),
     '{"host": "\\ud800", "pid": 7}', '{"host": "h", "pid": 7, "pid": 8}'],
)  # fmt: skip
def test_what_names_no_holder_is_a_half_written_file(tmp_path: Path, locks: str, content: str) -> None:
    """No advice is made of it: `kill -1` would end everything."""
    test_a_half_written_file(tmp_path, locks, content)


@pytest.mark.parametrize("kind", ["link", "second name", "pipe"])
def test_no_other_file_is_overwritten(tmp_path: Path, kind: str) -> None:
    other = tmp_path / "config.yaml"
    other.write_text("seed: 1\n")
    lock = lock_file(tmp_path)
    {"link": lambda: lock.symlink_to(other), "second name": lambda: lock.hardlink_to(other),
     "pipe": lambda: os.mkfifo(lock)}[kind]()  # fmt: skip
    with pytest.raises(UserError, match=r"not a lock\. Remove it: rm "), held(tmp_path, "job"):
        pytest.fail("held")
    assert other.read_text() == "seed: 1\n"


def test_who_holds_a_lock_of_another_kind(tmp_path: Path) -> None:
    """The base's: named by its file, and where that says nothing, or what is left of an earlier holder, by Linux."""
    path = tmp_path / "own.lock"
    with path.open("w+") as file:
        assert holder_of(file.fileno()) == "an unknown process"
        fcntl.flock(file, fcntl.LOCK_EX)
        assert re.fullmatch(rf"process {os.getpid()} on \S+", holder_of(file.fileno()))
        sign(file.fileno())
        assert re.match(rf"process {os.getpid()} on \S+, since 20", holder_of(file.fileno()))
        owner = json.loads(path.read_text())
        path.write_text(json.dumps({**owner, "pid": 1}))
        assert re.fullmatch(rf"process {os.getpid()} on \S+", holder_of(file.fileno()))
        path.write_text(json.dumps({**owner, "pid": 1, "host": "elsewhere", "boot": "another"}))
        assert holder_of(file.fileno()).startswith("process 1 on elsewhere, since 20")
