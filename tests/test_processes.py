"""The processes that clbench starts: forked by a server, and never outliving what asked for them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clbench import processes
from clbench.slots import Slots


@pytest.fixture(scope="module", autouse=True)
def light() -> Iterator[None]:
    """A server that imports nothing, for it would take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "HEAVY", ())
        # A fork of this process would hold these tests' pipes open, and print where pytest has this one print.
        patch.setattr(processes, "_may_fork", lambda _: False)
        yield


def wait_until_gone(*pids: int) -> None:
    """Wait for processes to end; one that nobody reaps yet has ended."""
    deadline = time.monotonic() + 20
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                assert time.monotonic() < deadline
                time.sleep(0.01)


def tell(fds: list[int], text: str) -> None:
    os.write(fds[0], f"{text} {os.getpid()} {os.getppid()}".encode())


def fail() -> None:
    raise RuntimeError("on purpose")


def nest(fds: list[int]) -> None:
    """Start a process from one that was started."""
    sys.exit(processes.start(tell, "inner", fds=fds).wait())


def received(function: object, *args: object) -> tuple[str, int | None, processes.Child]:
    read, write = os.pipe()
    child = processes.start(function, *args, fds=[write])  # type: ignore[arg-type]
    os.close(write)
    code = child.wait(20)
    with os.fdopen(read) as f:
        return f.read(), code, child


def test_a_function_runs_in_another_process() -> None:
    text, code, child = received(tell, "hello")
    assert code == 0 and text.split()[0] == "hello"
    assert int(text.split()[1]) == child.pid != os.getpid()


def test_a_process_that_was_started_starts_others_from_a_server_of_its_own() -> None:
    text, code, child = received(nest)
    assert code == 0 and text.split()[0] == "inner"
    assert int(text.split()[2]) not in (child.pid, os.getpid(), processes.server().pid)


FORKS = """
import os, sys
from clbench import processes
from tests.test_processes import nest
processes.HEAVY = ()
sys.exit(processes.start(nest, fds=[1]).wait(20))
"""


def test_so_does_one_whose_server_was_forked() -> None:
    """By a process of one thread, as commands are when they begin; this one has more."""
    command = [sys.executable, "-c", FORKS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[1])
    assert done.returncode == 0 and done.stdout.split()[0] == "inner", done.stderr


class Unreadable:
    """Pickled, but not to be read again."""

    def __reduce__(self) -> tuple[object, tuple[()]]:
        return fail, ()


FORKED = """
import os, sys, tempfile
from clbench import processes
from tests.test_processes import Unreadable
processes.HEAVY = ()
me = os.getpid()
with tempfile.TemporaryDirectory() as folder:
    try:
        assert processes.start(print, Unreadable()).wait(20) == 1
        assert processes.start(print, "done").wait(20) == 0
    finally:
        assert os.getpid() == me, "here is another process"
    assert os.path.isdir(folder), "another process removed it"
copy = os.dup(processes.server()._connection.fileno())
processes.server().close()
print("closed")
"""


def test_a_forked_process_does_nothing_that_is_left_to_do_for_the_one_it_is_a_copy_of() -> None:
    """Neither what is on its stack nor what is for its end; and who has a copy of the connection delays no end."""
    command = [sys.executable, "-c", FORKED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stdout) == (0, "done\nclosed\n"), done.stderr
    assert done.stderr.count("RuntimeError: on purpose") == 1 and "another process" not in done.stderr


def threads_of_programs(fds: list[int]) -> None:
    os.write(fds[0], " ".join(os.environ[n] for n in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")).encode())


def test_what_it_starts_has_as_many_threads() -> None:
    read, write = os.pipe()
    assert processes.start(threads_of_programs, fds=[write], threads=3).wait(20) == 0
    os.close(write)
    with os.fdopen(read) as f:
        assert f.read() == "3 3"


@pytest.mark.parametrize(("function", "args", "code"), [(sys.exit, (3,), 3), (fail, (), 1), (os.abort, (), -6)])
def test_how_it_ended_is_told(function: object, args: tuple[object, ...], code: int) -> None:
    assert processes.start(function, *args).wait(20) == code  # type: ignore[arg-type]


def test_one_that_is_killed_and_one_that_is_waited_for_in_vain() -> None:
    child = processes.start(time.sleep, 60)
    assert child.wait(0.1) is None and child.returncode is None
    child.kill()
    assert child.wait(20) == -signal.SIGKILL


def test_a_server_that_was_killed_is_replaced_and_its_workers_end() -> None:
    child = processes.start(time.sleep, 60)
    os.kill(processes.server().pid, signal.SIGKILL)
    assert child.wait(20) == -signal.SIGKILL
    wait_until_gone(child.pid)
    assert processes.start(sys.exit, 5).wait(20) == 5


def test_a_command_gets_its_variables_and_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the folder that it is started in hides no package."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "omegaconf.py").write_text("raise RuntimeError('mine')")
    with (tmp_path / "log").open("w") as log:
        child = processes.start_command(["list"], log=log, env={"CLBENCH_ENV_FILE": ""})
        assert child.wait(60) == 0
    assert "seqfft" in (tmp_path / "log").read_text()
    with (tmp_path / "log").open("w") as log:
        assert processes.start_command(["list", "--nonsense"], log=log).wait(60) == 2
    assert "--nonsense" in (tmp_path / "log").read_text()


SCRIPT = """
import os, signal, sys, time
from clbench import cli, processes
processes.HEAVY = ()
def note(*_):
    os.write(1, b"asked\\n")
    os._exit(0)
def command(arguments):
    signal.signal(signal.SIGTERM, note)
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(60)
cli.main = command
if __name__ == "__main__":
    processes.start_command([])
    worker = processes.start(time.sleep, 60)
    os.write(1, b"%d\\n" % worker.pid)
    time.sleep(60)
"""


def test_all_end_with_what_asked_for_them(tmp_path: Path) -> None:
    """Killed, it takes its workers with it; commands are asked to stop, so that training runs save."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(process.stdout.readline()) for _ in range(2)]
        process.kill()
        assert process.stdout.read() == "asked\n"
    wait_until_gone(*pids)


def test_a_slot_is_free_again_when_its_user_lets_go_or_dies(tmp_path: Path) -> None:
    slots = Slots(tmp_path, 2)
    first, second = slots.take(), slots.take()
    assert first is not None and second is not None and slots.take() is None
    second.close()
    code = "from clbench.slots import Slots; s = Slots.shared().take(); print(s is not None, flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                             env={**os.environ, "CLBENCH_SLOTS": str(tmp_path)})  # fmt: skip
    with other:
        assert other.stdout is not None and other.stdout.readline() == "True\n" and slots.take() is None
        other.kill()
        other.wait()
        assert slots.take() is not None
