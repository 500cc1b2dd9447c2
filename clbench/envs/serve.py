"""The process that has the simulators, under its own interpreter; `remote.py` starts it and sends requests.

Only the standard library, numpy and what the simulators need are imported here. The clbench modules that are imported
(`clbench.envs`, `data.experts`, `errors`, `io`, `paths`, `registry`, `stopping`, `launch`) are written for Python 3.10:
ruff checks them for it. Families of simulators and experts are named by the other process as "module:attribute".

A request is {"do": what, "forget": simulators that are no longer in use, ...}; see `Server` for the rest. An answer is
{"result": value}, or {"error": type, "message": text, "trace": text, "user": whether it is a UserError}.
"""

from __future__ import annotations

import faulthandler
import os
import platform
import socket
import traceback
from typing import Any

import numpy as np

from clbench.envs import base, wire
from clbench.errors import UserError
from clbench.registry import import_target
from clbench.stopping import belong_to


class Server:
    """The simulators of one other process. Every public method answers a request of its name."""

    def __init__(self) -> None:
        self._simulators: dict[int, base.Simulator] = {}
        self._tasks: dict[int, str] = {}
        self._experts: dict[int, base.Expert] = {}
        self._made = 0

    def versions(self, family: str, name: str) -> dict[str, str]:
        """The versions that decide an episode, including this interpreter's and numpy's."""
        own = {f"{base.INTERPRETER}python": platform.python_version(), f"{base.INTERPRETER}numpy": np.__version__}
        found: dict[str, str] = import_target(family)(name).versions()
        return found | own

    def make(self, family: str, name: str, task: str, render: dict[str, Any]) -> int:
        """Build a simulator of a family, which has the name of its environment type; returns the simulator's number."""
        simulator = import_target(family)(name).make(task, render)
        self._made += 1
        self._simulators[self._made], self._tasks[self._made] = simulator, task
        return self._made

    def reset(self, number: int, seed: int) -> base.Observation:
        return self._simulators[number].reset(seed)

    def step(self, number: int, action: np.ndarray) -> tuple[Any, ...]:
        return tuple(self._simulators[number].step(action))

    def step_unseen(self, number: int, action: np.ndarray) -> tuple[Any, ...]:
        """Like `step`, by the simulator's own method of this name if it has one: it draws no images."""
        return tuple(base.step_unseen(self._simulators[number], action))

    def render(self, number: int, width: int, height: int) -> np.ndarray:
        return self._simulators[number].render(width, height)

    def expert(self, number: int, experts: str, observation: base.Observation, first: bool) -> np.ndarray:
        """The expert's action; `first`: from a new expert for a new episode, which replaces the one before."""
        if first:
            made = import_target(experts)().expert(self._tasks[number], self._simulators[number])
            self._experts[number] = made
        return self._experts[number](observation)

    def close(self, number: int) -> None:
        self._simulators[number].close()
        self.forget(number)

    def forget(self, number: int) -> None:
        """Drop a simulator as it is: it may have failed, so none of its methods is called."""
        for kept in (self._simulators, self._tasks, self._experts):
            kept.pop(number, None)


def serve(connection: socket.socket) -> None:
    """Answer requests until the other process closes its end."""
    server = Server()
    while True:
        try:
            request = wire.receive(connection)
        except (EOFError, ConnectionError):
            return
        try:
            for number in request.pop("forget"):
                server.forget(number)
            answer = wire.pack({"result": getattr(server, request.pop("do"))(**request)})
        except Exception as e:  # noqa: BLE001 (the other process raises it again)
            trace = traceback.format_exc()
            said = {"error": type(e).__name__, "message": str(e), "trace": trace, "user": isinstance(e, UserError)}
            answer = wire.pack(said)
        try:
            wire.send(connection, answer)
        except ConnectionError:
            return


def main(parent: int, connection_fd: int, stderr_fd: int) -> None:
    """Serve the process `parent` over an inherited socket, until it ends.

    What simulators print goes to `stderr_fd`, like the parent's errors; until now it was kept, to be reported if this
    process could not start.
    """
    belong_to(parent)
    faulthandler.enable(stderr_fd)
    connection = socket.socket(fileno=connection_fd)
    hello = {"protocol": wire.PROTOCOL, "python": platform.python_version(), "numpy": np.__version__}
    wire.send(connection, wire.pack(hello))
    for fd in (1, 2):
        os.dup2(stderr_fd, fd)
    serve(connection)
    os._exit(0)  # nothing here is worth the time that libraries take to shut down
