"""Simulators under another Python interpreter: they look like any other, and live in a child process.

A family may name an environment variable (`python_variable`); a user sets it to an interpreter that has the simulator,
e.g. LIBERO_PYTHON=/opt/conda/envs/libero/bin/python. Every process that makes such simulators then starts one child,
which has all of them and ends with its parent. The child uses none of this process's packages, only its own and
clbench, which is loaded from the same folder as here.

An episode is the same as in one process, bit for bit, if the versions are. Failures are reported as follows:
    UserError, ValueError, NotImplementedError     as they were raised there
    RemoteError                                    any other exception, its traceback in a note
    SimulatorDied                                  the child has ended; all its simulators are lost, others can be made
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any

import numpy as np

import clbench
from clbench.envs import base, wire
from clbench.errors import UserError
from clbench.registry import target_of
from clbench.stopping import how_ended

OLDEST_PYTHON = (3, 10)
STARTUP_S = 120.0  # for an interpreter to import numpy and answer, from a slow disk
END_S = 5.0  # for a process to be gone after it closed its socket or was killed

# What the child runs. Its first lines must work in any Python. clbench is loaded by its path alone: with its parent
# folder on sys.path, all packages next to it would be found there, too.
BOOT = f"""
import sys
if sys.version_info < {OLDEST_PYTHON}:
    sys.exit("it is Python %d.%d, and {".".join(map(str, OLDEST_PYTHON))} or newer is needed" % sys.version_info[:2])
try:
    sys.path[:] = [p for p in sys.path if p]
    import numpy
except ImportError as e:
    sys.exit("numpy cannot be imported (%s); install it there" % e)
from importlib.util import module_from_spec, spec_from_file_location
parent, connection, stderr, folder = sys.argv[1:]
import os
if os.getppid() != int(parent):
    sys.exit("a program between it and clbench started it; let a script end in: exec PYTHON \\"$@\\"")
spec = spec_from_file_location("clbench", folder + "/__init__.py", submodule_search_locations=[folder])
package = sys.modules["clbench"] = module_from_spec(spec)
spec.loader.exec_module(package)
from clbench.envs.serve import main
main(int(parent), int(connection), int(stderr))
"""


class RemoteError(RuntimeError):
    """A simulator in another process raised this."""


class SimulatorDied(RuntimeError):
    """The process that had the simulators has ended. `how`: "was killed by SIGSEGV", "ended its process (…)"."""

    def __init__(self, how: str, who: str) -> None:
        super().__init__(how, who)
        self.how, self.who = how, who

    def __str__(self) -> str:
        return f"the simulators' process ({self.who}) {self.how}"


def interpreter(variable: str) -> str | None:
    """Return the interpreter that an environment variable names, or None if it is not set.

    Raises UserError when there is no such program.
    """
    value = os.environ.get(variable)
    if not value:
        return None
    found = shutil.which(os.path.expanduser(value))
    if found is None:
        what = "is a folder" if Path(value).expanduser().is_dir() else "is not a program that can be started"
        raise UserError(
            f"{variable}={value} {what}. Name the Python interpreter that has the simulator, e.g. "
            "/opt/conda/envs/libero/bin/python."
        )
    return os.path.abspath(found)  # not resolved: a virtual environment's interpreter is a link


class Child:
    """A process with simulators, under `python`; `variable` is the variable that the user set to choose it.

    Raises UserError, naming the variable, when it cannot be started.
    """

    def __init__(self, python: str, variable: str) -> None:
        self.variable, self.who = variable, f"{variable}={python}"
        self.forgotten: list[int] = []  # simulators that were dropped without being closed; list.append is atomic
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._process, self._ended = self._start(python)
        self.alive = True

    def _start(self, python: str) -> tuple[subprocess.Popen[bytes], threading.Thread]:
        here, there = socket.socketpair()
        self._socket = here
        with there, tempfile.TemporaryFile() as said, _copy_of_stderr() as stderr:
            folder = str(Path(clbench.__file__).resolve().parent)
            fds = (there.fileno(), stderr)
            command = [python, "-c", BOOT, str(self._owner), *map(str, fds), folder]
            try:
                process, ended = _spawn(command, fds, said, self.variable)
            except OSError as e:
                raise self._cannot(f"cannot be started: {e.strerror}") from e
            there.close()  # else this end would stay open without the child
            here.settimeout(STARTUP_S)
            try:
                hello = wire.receive(here)
            except TimeoutError as e:
                _reap(process, ended, 0.0)
                raise self._cannot(f"did not answer within {STARTUP_S:g} s{_last_line(said)}") from e
            except (EOFError, OSError, ValueError) as e:
                _reap(process, ended, 1.0)
                why = _last_line(said) or f": it {how_ended(process.returncode)}"
                raise self._cannot(f"cannot be used{why}") from e
            here.settimeout(None)
        if hello.get("protocol") != wire.PROTOCOL:
            _reap(process, ended, 0.0)
            raise self._cannot("runs different clbench files than this process: they changed; restart this")
        return process, ended

    def _cannot(self, why: str) -> UserError:
        self._socket.close()
        return UserError(f"{self.who} {why}.")

    def ask(self, do: str, **values: Any) -> Any:
        """Call `Server.do` there and return its result; for what is raised, see this module's docstring."""
        if self._owner != os.getpid():
            raise RuntimeError("this simulator was made in another process, before a fork.")
        with self._lock:
            if not self.alive:
                raise SimulatorDied(how_ended(self._process.returncode), self.who)
            forget = [self.forgotten.pop() for _ in range(len(self.forgotten))]
            request = wire.pack({"do": do, "forget": forget, **values})
            try:
                wire.send(self._socket, request)
                answer = wire.receive(self._socket)
            except (EOFError, ConnectionError) as e:
                self._end()
                raise SimulatorDied(how_ended(self._process.returncode), self.who) from e
            except BaseException:  # an interrupt, say: this answer would be mistaken for the next one
                self._end(patience_s=0.0)
                raise
        if "error" in answer:
            raise _as_raised(answer, self.who)
        return answer["result"]

    def end(self) -> None:
        """End the process; its simulators cannot be used any more."""
        with self._lock:
            self._end()

    def _end(self, patience_s: float = END_S) -> None:
        """Give it time to exit by itself, as it does once the socket is closed and no call is in progress."""
        self.alive = False
        self._socket.close()
        _reap(self._process, self._ended, patience_s)


class RemoteSimulator:
    """A simulator of a `Child`, as a `Simulator`. `asked`: see `Server.make`."""

    def __init__(self, child: Child, **asked: Any) -> None:
        self._child = child
        self._number: int | None = child.ask("make", **asked)
        self._drop = weakref.finalize(self, child.forgotten.append, self._number)

    def reset(self, seed: int) -> base.Observation:
        """Start the episode of `seed` and return its first observation."""
        observation: base.Observation = self._ask("reset", seed=int(seed))
        return observation

    def step(self, action: np.ndarray) -> base.Step:
        """Apply `action`; ValueError for a wrong shape, NaN or inf."""
        return base.Step(*self._ask("step", action=np.asarray(action)))

    def step_unseen(self, action: np.ndarray) -> base.Step:
        """As `step`, for callers that do not need the observation: no image is rendered unless it must be."""
        return base.Step(*self._ask("step_unseen", action=np.asarray(action)))

    def render(self, width: int, height: int) -> np.ndarray:
        """Return the scene as uint8 (height, width, 3); NotImplementedError where the simulator does not offer it."""
        image: np.ndarray = self._ask("render", width=width, height=height)
        return image

    def expert(self, experts: str) -> base.Expert:
        """Return the scripted expert for the next episode; it acts in the child, where it can inspect the simulator.

        Its first call restarts it, so only one is used at a time. `experts`: "module:attribute" of the class whose
        `expert(task, simulator)` returns it.
        """
        calls = itertools.count()

        def act(observation: base.Observation) -> np.ndarray:
            action: np.ndarray = self._ask(
                "expert", experts=experts, observation=observation, first=next(calls) == 0
            )
            return action

        return act

    def close(self) -> None:
        """Free what the simulator holds. It cannot be used afterwards; closing twice is harmless."""
        if self._number is None:
            return
        number, self._number = self._number, None
        self._drop.detach()
        with contextlib.suppress(SimulatorDied):  # then nothing is left to free
            self._child.ask("close", number=number)

    def _ask(self, do: str, **values: Any) -> Any:
        if self._number is None:
            raise RuntimeError("this simulator is closed.")
        return self._child.ask(do, number=self._number, **values)


_children: dict[tuple[str, str], Child] = {}
_children_lock = threading.Lock()


def _forget_children() -> None:
    """After a fork: children belong to the other process. Close copies of its sockets, so that they end with it."""
    global _children_lock
    _children_lock = threading.Lock()
    for child in _children.values():
        child._socket.close()
    _children.clear()


os.register_at_fork(after_in_child=_forget_children)


def shared_child(variable: str) -> Child:
    """Return this process's child under the interpreter that `variable` names; starts it if needed."""
    python = interpreter(variable)
    assert python is not None
    with _children_lock:
        child = _children.get((variable, python))
        if child is None or not child.alive:
            child = _children[variable, python] = Child(python, variable)
        return child


def make(variable: str, family: base.SimulatorFamily, task: str, render: dict[str, Any]) -> RemoteSimulator:
    """Build a simulator of a family under the interpreter that `variable` names."""
    return RemoteSimulator(shared_child(variable), **_named(variable, family), task=task, render=render)


def _named(variable: str, family: base.SimulatorFamily) -> dict[str, str]:
    """How the child finds a family. UserError for one that is not in a module, e.g. from a notebook cell."""
    target = target_of(type(family))
    if target.startswith("__main__:") or "<" in target:
        raise UserError(f"{variable} names another interpreter, which cannot import {target}: put it into a module.")
    return {"family": target, "name": family.name}


def versions(variable: str, family: base.SimulatorFamily) -> dict[str, str]:
    """Return the versions that decide an episode there, with those of Python and numpy; leaves no process behind.

    Raises UserError when the interpreter cannot be used, or lacks the simulator.
    """
    python = interpreter(variable)
    assert python is not None
    child = Child(python, variable)
    try:
        found: dict[str, str] = child.ask("versions", **_named(variable, family))
        return found
    finally:
        child.end()


def _spawn(
    command: list[str], fds: tuple[int, ...], said: IO[bytes], variable: str
) -> tuple[subprocess.Popen[bytes], threading.Thread]:
    """Start the child from a thread that waits for its end.

    The child asks Linux to be killed with its parent, that is, with the thread that started it. So that thread lives as
    long as the child does.
    """
    env = {k: v for k, v in os.environ.items() if k not in (variable, "PYTHONPATH", "PYTHONHOME")}
    future: Future[subprocess.Popen[bytes]] = Future()

    def run() -> None:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, pass_fds=fds, env=env
            )
        except BaseException as e:  # noqa: BLE001 (the caller raises it)
            future.set_exception(e)
        else:
            future.set_result(process)
            process.wait()

    thread = threading.Thread(target=run, name="simulators", daemon=True)
    thread.start()
    return future.result(), thread


def _reap(process: subprocess.Popen[bytes], ended: threading.Thread, patience_s: float) -> None:
    ended.join(patience_s)
    if ended.is_alive():
        process.kill()
        ended.join(END_S)


@contextlib.contextmanager
def _copy_of_stderr() -> Iterator[int]:
    fd = os.dup(2)
    try:
        yield fd
    finally:
        os.close(fd)


def _last_line(said: IO[bytes]) -> str:
    """ ": " and the last line that a process printed before it could answer, or ""."""
    said.seek(0)
    lines = [line for line in said.read().decode(errors="replace").splitlines() if line.strip()]
    return f": {lines[-1].strip()[:300]}" if lines else ""


def _as_raised(answer: dict[str, Any], who: str) -> Exception:
    """The exception that an answer reports."""
    kind, message = answer["error"], answer["message"]
    if answer["user"]:
        return UserError(f"{who}: {message}")
    error: Exception
    if kind in ("ValueError", "NotImplementedError"):  # part of the protocol
        error = ValueError(message) if kind == "ValueError" else NotImplementedError(message)
    else:
        error = RemoteError(f"{kind}: {message}")
    error.add_note(f"In {who}:\n{answer['trace']}")
    return error
