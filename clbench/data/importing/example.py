"""A reader of tf.train.Example messages: the part of protobuf's wire format that they are written in.

    Example  { Features features = 1 }
    Features { map<string, Feature> feature = 1 }          map entry: key = 1, value = 2
    Feature  { BytesList = 1 | FloatList = 2 | Int64List = 3 }, each with repeated values = 1; numbers packed or not

Format: protobuf.dev, "Encoding"; TensorFlow's example.proto and feature.proto.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_BYTES, _FLOATS, _INTS = 1, 2, 3
_LONGEST = 10  # bytes of a varint

Values = list[memoryview] | np.ndarray


class Malformed(ValueError):
    """Bytes that are not such a message."""


def parse_example(payload: bytes) -> dict[str, memoryview]:
    """Return an Example's features by name, each as the bytes of its Feature message; `Malformed` for other bytes."""
    found: dict[str, memoryview] = {}
    for features in _messages(memoryview(payload), 1):
        for entry in _messages(features, 1):
            key, value = "", memoryview(b"")
            for number, wire, item in _fields(entry):
                if wire == _LENGTH and number in (1, 2):
                    assert isinstance(item, memoryview)
                    if number == 2:
                        value = item
                        continue
                    try:
                        key = str(item, "utf-8")
                    except UnicodeDecodeError as e:
                        raise Malformed("the name of a feature is not UTF-8") from e
            found[key] = value
    return found


def values(feature: memoryview) -> Values:
    """Return a Feature's values: byte strings, or an array (n,) of float32 or int64. `Malformed` for other bytes."""
    kind, parts = 0, []
    for number, wire, item in _fields(feature):
        if number not in (_BYTES, _FLOATS, _INTS):
            continue
        if wire != _LENGTH or number != (kind or number):
            raise Malformed("a feature has values of several kinds")
        assert isinstance(item, memoryview)
        kind = number
        parts.append(item)
    if kind == _BYTES:
        return [value for part in parts for value in _messages(part, 1)]
    arrays = [array for part in parts for array in (_floats(part) if kind == _FLOATS else _ints(part))]
    return np.concatenate([np.zeros(0, dtype="<f4" if kind == _FLOATS else "<i8"), *arrays])


def _messages(buffer: memoryview, wanted: int) -> Iterator[memoryview]:
    for number, wire, item in _fields(buffer):
        if number == wanted:
            if wire != _LENGTH:
                raise Malformed("a number stands where a message is expected")
            assert isinstance(item, memoryview)
            yield item


def _floats(part: memoryview) -> Iterator[np.ndarray]:
    for number, wire, item in _fields(part):
        if number != 1:
            continue
        if wire not in (_LENGTH, _FIXED32):
            raise Malformed("a list of floats holds other values")
        assert isinstance(item, memoryview)
        if len(item) % 4:
            raise Malformed("a list of floats ends within one")
        yield np.frombuffer(item, dtype="<f4")


def _ints(part: memoryview) -> Iterator[np.ndarray]:
    for number, wire, item in _fields(part):
        if number != 1:
            continue
        if wire == _LENGTH:
            assert isinstance(item, memoryview)
            yield _varints(item)
        elif wire == _VARINT:
            yield np.array([item], dtype="<u8").astype("<i8")
        else:
            raise Malformed("a list of integers holds other values")


def _varints(buffer: memoryview) -> np.ndarray:
    """The int64 values (n,) of varints that follow each other: seven bits a byte, the lowest first."""
    data = np.frombuffer(buffer, dtype=np.uint8)
    ends = np.flatnonzero(data < 0x80)
    if len(data) == 0 or ends.size == 0 or ends[-1] != len(data) - 1:
        if len(data) == 0:
            return np.zeros(0, dtype="<i8")
        raise Malformed("a list of integers ends within one")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _LONGEST:
        raise Malformed("an integer is too long")
    place = np.arange(len(data)) - np.repeat(starts, lengths)
    parts = (data & 0x7F).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.add.reduceat(parts, starts).astype("<i8")


def _fields(buffer: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """Yield (field number, wire type, value) of a message: an int for varints, else the bytes."""
    at = 0
    while at < len(buffer):
        tag, at = _varint(buffer, at)
        wire = tag & 7
        if wire == _VARINT:
            value, at = _varint(buffer, at)
            yield tag >> 3, wire, value
            continue
        if wire == _LENGTH:
            length, at = _varint(buffer, at)
        elif wire in (_FIXED64, _FIXED32):
            length = 8 if wire == _FIXED64 else 4
        else:
            raise Malformed(f"there is no wire type {wire}")
        if length > len(buffer) - at:
            raise Malformed("a field is longer than its message")
        yield tag >> 3, wire, buffer[at : at + length]
        at += length


def _varint(buffer: memoryview, at: int) -> tuple[int, int]:
    """The varint that begins at `at`, and where it ends."""
    value = 0
    for i in range(_LONGEST):
        if at + i >= len(buffer):
            raise Malformed("the message ends within a number")
        byte = buffer[at + i]
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value & (1 << 64) - 1, at + i + 1
    raise Malformed("an integer is too long")
