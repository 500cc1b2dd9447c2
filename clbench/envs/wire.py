"""Messages between a process and the one that has its simulators: values and arrays over a socket, without pickle.

A message is a mark and the length of its head, the head in JSON, and the bytes of its arrays one after another. In the
head, {"$array": i} stands for array i and {"$tuple": [...]} for a tuple, so that a value keeps its type.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

PROTOCOL = 2  # changes with the messages: a process may have started before its files changed
_PREFIX = struct.Struct("<4sI")
_MARK = b"clb\n"
_MAX_HEAD = 64 * 1024 * 1024
_KINDS = "biufc"  # of arrays: numbers and booleans
_JOINED = 1 << 16  # bytes: smaller messages are sent in one call


def pack(value: Any) -> list[memoryview]:
    """Return the parts of `value`'s message: dicts with string keys, lists, tuples, arrays of numbers, plain values.

    Raises TypeError for anything else.
    """
    arrays: list[np.ndarray] = []
    body = _plain(value, arrays)
    head = json.dumps({"body": body, "arrays": [[a.dtype.str, list(a.shape)] for a in arrays]}).encode()
    if len(head) > _MAX_HEAD:
        raise TypeError(f"a message's head has {len(head)} bytes, more than {_MAX_HEAD}: send arrays, not lists.")
    parts: list[Any] = [_PREFIX.pack(_MARK, len(head)), head]
    parts += [np.ascontiguousarray(a).reshape(-1).view(np.uint8).data for a in arrays]
    return [memoryview(p) for p in parts]


def send(connection: socket.socket, parts: list[memoryview]) -> None:
    """Send a message made by `pack`. Raises OSError when the other end is gone."""
    if sum(len(p) for p in parts) <= _JOINED:
        connection.sendall(b"".join(parts))
    else:
        for part in parts:
            connection.sendall(part)


def receive(connection: socket.socket) -> Any:
    """Return the next message's value. Raises EOFError at the end, ValueError for anything but a message."""
    mark, length = _PREFIX.unpack(_read(connection, bytearray(_PREFIX.size)))
    if mark != _MARK or length > _MAX_HEAD:
        raise ValueError(f"{mark!r} does not begin a message.")
    head = json.loads(bytes(_read(connection, bytearray(length))))
    arrays = []
    for text, shape in head["arrays"]:
        dtype = np.dtype(text)
        if dtype.kind not in _KINDS:
            raise ValueError(f"an array of {dtype}.")
        array = np.empty(shape, dtype)
        _read(connection, array.reshape(-1).view(np.uint8).data)
        arrays.append(array)
    return _value(head["body"], arrays)


def _read(connection: socket.socket, buffer: Any) -> Any:
    """Fill `buffer`."""
    rest = memoryview(buffer)
    while rest:
        count = connection.recv_into(rest)
        if count == 0:
            raise EOFError("the other process has ended.")
        rest = rest[count:]
    return buffer


def _plain(value: Any, arrays: list[np.ndarray]) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in _KINDS:
            raise TypeError(f"an array of {value.dtype} cannot be sent to another process.")
        arrays.append(value)
        return {"$array": len(arrays) - 1}
    if isinstance(value, tuple):
        return {"$tuple": [_plain(v, arrays) for v in value]}
    if isinstance(value, list):
        return [_plain(v, arrays) for v in value]
    if isinstance(value, Mapping) and all(isinstance(k, str) and not k.startswith("$") for k in value):
        return {k: _plain(v, arrays) for k, v in value.items()}
    raise TypeError(f"{value!r} ({type(value).__name__}) cannot be sent to another process.")


def _value(body: Any, arrays: list[np.ndarray]) -> Any:
    if isinstance(body, list):
        return [_value(v, arrays) for v in body]
    if not isinstance(body, dict):
        return body
    if "$array" in body:
        return arrays[body["$array"]]
    if "$tuple" in body:
        return tuple(_value(v, arrays) for v in body["$tuple"])
    return {k: _value(v, arrays) for k, v in body.items()}
