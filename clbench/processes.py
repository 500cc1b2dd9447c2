"""Starts the Python processes that clbench consists of: ranks, a sweep's commands, evaluation processes.

LeRobot's package imports all its policies, with torch, transformers and datasets: 15 s of processor time where this was
written, in every process. So there is a server: one process that has imported what the others need, has one thread and
has not used any device, and forks itself for each of them, which takes hundredths of a second.

    child = start(function, 1, 2)                   # function(1, 2) in its own process
    child = start_command(["train", …], log=file)   # the command `clbench train …`
    child.wait()

A server is made at the first call: by forking this process if it has one thread, else by starting an interpreter. A
process that was forked by a server gets its own server as soon as it starts others, without importing anything again.
Whatever is started this way ends with the process that requested it, however that ended: the server sees its connection
closed and exits; the kernel then kills workers, and asks commands to stop (SIGTERM), so that training runs save.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import ctypes
import errno
import gc
import importlib
import math
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import spawn
from typing import IO, Any, NoReturn

from clbench.errors import UserError
from clbench.patience import patience
from clbench.terminal import tell

# Modules that most processes import sooner or later, and are worth sharing.
HEAVY: tuple[str, ...] = ("clbench.training.trainer", "clbench.rollout.actors")

# Threads that libraries start when they are imported, which a process that forks must not have.
NO_THREADS = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
MAX_FDS = 16
POLL_S = 0.05
IMPORT_S = 600.0  # for a server to import everything, from a slow disk


class Child:
    """A process that a server forked, used like a Popen object. `returncode`: None = running, -n = by signal n."""

    def __init__(self, server: _Server, pid: int) -> None:
        self.pid = pid
        self._server = server
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.status(self.pid)
        return self.returncode

    def wait(self, timeout: float = math.inf) -> int | None:
        """Wait for the end, at most `timeout` seconds; returns the exit status, None if it is still running."""
        deadline, pause = time.monotonic() + timeout, 0.001
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(2 * pause, POLL_S)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            self._server.tell(("signal", self.pid, int(number)))

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    function: Callable[..., Any],
    *args: Any,
    fds: Sequence[int] = (),
    threads: int | None = None,
    modules: Sequence[str] | None = None,
) -> Child:
    """Run `function(*args)` in its own process, which is killed when this one ends.

    Args:
        function: at a module's top level; it and `args` are pickled.
        fds: descriptors that the process gets, passed to `function` as a list before `args`.
        threads: for torch's operations and the programs that it starts; None = as here.
        modules: the slow imports that it needs; None = HEAVY.
    """
    work = pickle.dumps((function, args))
    env = {} if threads is None else dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    return server(modules).fork({"work": work, "kind": "worker", "threads": threads, "env": env}, fds)


def start_command(
    arguments: Sequence[str], *, log: IO[Any] | None = None, env: Mapping[str, str] | None = None, session: bool = False
) -> Child:
    """Run `clbench ARGUMENTS` in its own process, which gets SIGTERM when this one ends.

    Args:
        log: where its output goes; None = where this process's goes.
        env: variables in addition to this process's. Those that libraries read at import come too late, except
            OMP_NUM_THREADS.
        session: give it its own session, out of reach of the terminal's Ctrl-C.
    """
    out = [1, 2] if log is None else [log.fileno()] * 2
    request = {"arguments": list(arguments), "kind": "command", "env": dict(env or {}), "session": session}
    return server().fork(request, out)


# ------------------------------------------------------------------------------------------- this process's server

_servers: dict[tuple[str, ...], _Server] = {}  # by what they import
_lock = threading.Lock()


def server(modules: Sequence[str] | None = None) -> _Server:
    """This process's server that has imported `modules` (None = HEAVY); made when there is none yet.

    It inherits what is open: call this before opening anything that must end with this process.
    """
    names = tuple(HEAVY if modules is None else modules)
    with _lock:
        found = _servers.get(names)
        if found is None or found.owner != os.getpid() or not found.alive:
            found = _servers[names] = _forked() if _may_fork(names) else _spawned(names)
            atexit.register(found.close)
        return found


def _may_fork(modules: Sequence[str]) -> bool:
    """Whether this process can be forked into a server: all is imported, it has one thread and used no device."""
    if not _alone():
        return False
    load(modules)
    torch = sys.modules.get("torch")
    return _alone() and not (torch is not None and torch.cuda.is_initialized())


def _alone() -> bool:
    """Whether this process has one thread, not counting the one that ends before each fork (patience.py)."""
    for _ in range(100):
        waiting = sum(t.name == "patience" for t in threading.enumerate())
        if len(os.listdir("/proc/self/task")) - waiting == 1:
            return True
        if threading.active_count() - waiting > 1:
            return False
        time.sleep(0.01)  # a thread that has ended stays visible for a moment
    return False


def no_threads() -> None:
    """Keep libraries that are imported from now on from starting threads; what they compute is the same."""
    for name, value in NO_THREADS.items():
        os.environ.setdefault(name, value)


def load(modules: Sequence[str] | None = None) -> None:
    """Import `modules` (None = HEAVY), leaving no thread behind.

    Without the garbage collector, which would repeatedly scan everything loaded: this saves a tenth of the time.
    """
    names = HEAVY if modules is None else modules
    if all(name in sys.modules for name in names):
        return
    no_threads()
    collecting = gc.isenabled()
    gc.disable()
    try:
        with patience("loading LeRobot and the libraries it uses", at_once=True):
            for name in names:
                importlib.import_module(name)
    finally:
        if collecting:
            gc.enable()


class _Server:
    """This process's end of the connection to a server."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self.owner, self.alive, self.pid = os.getpid(), True, pid
        self._connection = connection
        self._lock = threading.RLock()
        self._ended: dict[int, int] = {}
        self._answers: list[tuple[Any, ...]] = []

    def fork(self, request: dict[str, Any], fds: Sequence[int]) -> Child:
        """Request a process and return it."""
        with _flushed(), self._lock:
            here = {"cwd": os.getcwd(), "env": {**os.environ, **request.get("env", {})}}
            if not self.tell(("fork", {**request, **here}), fds):
                raise UserError("a process could not be started: the process that starts them has ended. Try again.")
            while not self._answers:
                if not self._read(IMPORT_S):
                    raise UserError(
                        "a process could not be started: the process that starts them "
                        + ("has ended (out of memory?)." if not self.alive else f"did not answer in {IMPORT_S:g} s.")
                    )
            kind, value = self._answers.pop(0)
        if kind == "failed":
            raise UserError(f"a process could not be started: {value}")
        return Child(self, value)

    def close(self) -> None:
        """Let the server end and wait for it, so that its time counts as this process's children's."""
        if self.alive and self.owner == os.getpid():
            with contextlib.suppress(OSError):  # the server has just ended
                self._connection.shutdown(socket.SHUT_RDWR)  # ends it, whoever has a copy of the descriptor
            self._connection.close()
            self._lost()

    def abandon(self) -> None:
        """Close this process's copy of the connection, inherited from the process that it was forked from."""
        self.alive = False
        self._connection.close()

    def tell(self, message: tuple[Any, ...], fds: Sequence[int] = ()) -> bool:
        """Send a message; returns whether the server was there to receive it."""
        data = pickle.dumps(message)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            with self._lock:
                self._connection.sendmsg([len(data).to_bytes(8, "little")], ancillary)
                self._connection.sendall(data)
        except OSError as e:
            if e.errno not in (errno.EPIPE, errno.ECONNRESET):
                raise
            self._lost()
        return self.alive

    def _lost(self) -> None:
        self.alive = False
        with contextlib.suppress(ChildProcessError):  # waited for already
            os.waitpid(self.pid, 0)

    def status(self, pid: int) -> int | None:
        """The exit status of a process, None while it runs. Without its server it has been killed."""
        with self._lock:
            while self.alive and self._read(0.0):
                pass
            return self._ended.get(pid, None if self.alive else -signal.SIGKILL)

    def _read(self, timeout: float) -> bool:
        """Take one message, waiting at most `timeout` seconds; returns whether there was one."""
        self._connection.settimeout(timeout)
        try:
            size = _exactly(self._connection, 8, peeked=timeout == 0.0)
            self._connection.settimeout(None)
            message = pickle.loads(_exactly(self._connection, int.from_bytes(size, "little")))
        except (TimeoutError, BlockingIOError):
            return False
        except (EOFError, ConnectionError):
            self._lost()
            return False
        finally:
            self._connection.settimeout(None)
        if message[0] == "ended":
            self._ended[message[1]] = message[2]
        else:
            self._answers.append(message)
        return True


def _exactly(connection: socket.socket, size: int, peeked: bool = False) -> bytes:
    """Receive `size` bytes. `peeked`: only if all have arrived already."""
    if peeked and len(connection.recv(size, socket.MSG_PEEK)) not in (0, size):
        raise BlockingIOError
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


@contextlib.contextmanager
def _flushed() -> Any:
    """Flush, so that what this process has printed comes before what its children print."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed or missing: nothing to flush
            stream.flush()
    yield


def _forked() -> _Server:
    here, there = socket.socketpair()
    with _flushed():
        pid = os.fork()
    if pid == 0:
        here.close()
        _serve_and_end(there)
    there.close()
    return _Server(here, pid)


def _spawned(modules: Sequence[str]) -> _Server:
    here, there = socket.socketpair()
    code = "import sys; from clbench.processes import main; main(int(sys.argv[1]), sys.argv[2:])"
    command = [sys.executable, "-P", "-c", code, str(there.fileno()), *modules]
    with there:
        process = subprocess.Popen(
            command, pass_fds=[there.fileno()], env={**os.environ, **NO_THREADS}, stdin=subprocess.DEVNULL
        )
        process.returncode = 0  # it is waited for by its number
    made = _Server(here, process.pid)
    made.tell(("prepare", _preparation()))
    return made


def _preparation() -> dict[str, Any]:
    """What a new interpreter needs to be like this one, as passed to multiprocessing's spawned processes."""
    data = spawn.get_preparation_data("clbench")
    return {k: data[k] for k in data if k not in ("dir", "authkey", "start_method")}


# ----------------------------------------------------------------------------------------------------- the server


def main(descriptor: int, modules: Sequence[str]) -> None:
    """A server in its own interpreter; the processes it forks import nothing more before they fork in turn."""
    global HEAVY
    HEAVY = tuple(modules)
    connection = socket.socket(fileno=descriptor)
    load(modules)
    assert _alone(), "a library started a thread when it was imported"
    _serve_and_end(connection)


def _serve_and_end(connection: socket.socket) -> NoReturn:
    """Be a server, and in its children what was requested; then end the process, whatever happened.

    Further down the stack is the work of the process that was forked: nothing may return or raise into that.
    """
    code, work = 1, None
    try:
        work = _serve(connection)
        code = 0 if work is None else work()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    except BaseException:  # noqa: BLE001 (this process has no other place to show it)
        tell(*traceback.format_exc().splitlines())
    if work is not None:
        with contextlib.suppress(BaseException):  # as the interpreter does at its end; what fails there changes nothing
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
    with _flushed():
        os._exit(code)


def _serve(connection: socket.socket) -> Callable[[], int] | None:
    """Fork what is requested. Returns None in the server, once it is not needed; in a child, the child's work."""
    global _lock
    _lock = threading.Lock()  # it was held by the process that forked this one
    for other in _servers.values():
        other.abandon()
    _servers.clear()
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False  # what it would remove, e.g. a temporary folder, belongs to this process's parent
    # Signals to the process group (a terminal's, a scheduler's) are for the others. Children have them blocked until
    # they can handle them.
    old = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    gc.collect()
    gc.freeze()  # else the first collection in every child would copy all objects' memory
    wake, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    handler = signal.signal(signal.SIGCHLD, lambda *_: None)
    waking = signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    preparation: dict[str, Any] = {}
    children: set[int] = set()
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        selector.register(wake, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select()]
            if wake in ready:
                os.read(wake, 65536)
                _reap(children, connection)
            if connection not in ready:
                continue
            try:
                message, fds = _receive(connection)
            except (EOFError, ConnectionError):
                return None
            if message[0] == "prepare":
                preparation = message[1]
            elif message[0] == "signal":
                if message[1] in children:  # else it has ended, and its number may be another process's
                    os.kill(message[1], message[2])
            else:
                parent = os.getpid()
                try:
                    pid = os.fork()
                except OSError as e:
                    _send(connection, ("failed", f"{e.strerror}."))
                    pid = -1
                if pid == 0:
                    selector.close()
                    connection.close()
                    signal.set_wakeup_fd(waking)
                    signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
                    os.close(wake)
                    os.close(woken)
                    return _work(message[1], fds, parent, preparation, old)
                if pid > 0:
                    children.add(pid)
                    _send(connection, ("forked", pid))
            for fd in fds:
                os.close(fd)


def _reap(children: set[int], connection: socket.socket) -> None:
    for pid in list(children):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            children.discard(pid)
            _send(connection, ("ended", pid, os.waitstatus_to_exitcode(status)))


def _send(connection: socket.socket, message: tuple[Any, ...]) -> None:
    data = pickle.dumps(message)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the next read finds the connection's end
        connection.sendall(len(data).to_bytes(8, "little") + data)


def _receive(connection: socket.socket) -> tuple[Any, list[int]]:
    size, fds, _, _ = socket.recv_fds(connection, 8, MAX_FDS)
    if not size:
        raise EOFError
    length = int.from_bytes(size + _exactly(connection, 8 - len(size)), "little")
    return pickle.loads(_exactly(connection, length)), list(fds)


# -------------------------------------------------------------------------------------------------------- a child


def _work(
    request: dict[str, Any], fds: list[int], parent: int, preparation: dict[str, Any], mask: set[Any]
) -> Callable[[], int]:
    """Turn this process, just forked, into the one that was requested; returns its work."""
    command = request["kind"] == "command"
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM if command else signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # the server has ended already
    if request.get("session"):
        os.setsid()
    os.chdir(request["cwd"])
    threads = request.get("threads")
    if request["env"].get("OMP_NUM_THREADS") != os.environ.get("OMP_NUM_THREADS"):
        threads = int(request["env"].get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    os.environ.clear()
    os.environ.update(request["env"])
    if threads is not None and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, a script's background job
            signal.signal(number, usual)
    if preparation:
        spawn.prepare(preparation)  # type: ignore[arg-type]
    if command:
        for fd, target in zip(fds, (1, 2), strict=True):
            os.dup2(fd, target)
            os.close(fd)
        arguments = request["arguments"]
        sys.argv = ["clbench", *arguments]
        sys.orig_argv = list(sys.argv)

        def run() -> int:
            from clbench.cli import main as clbench

            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            return clbench(arguments)

        return run
    function, args = pickle.loads(request["work"])

    def work() -> int:
        if fds:
            function(fds, *args)
        else:
            function(*args)
        return 0

    return work
