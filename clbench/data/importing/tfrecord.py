"""The records of a TFRecord file, compared with their checksums.

A record is the payload's length (uint64, little-endian), the length's masked CRC-32C (uint32), the payload, and the
payload's masked CRC-32C. Format: TensorFlow's documentation, "TFRecord and tf.train.Example".
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from clbench.data.importing.crc32c import masked_crc32c
from clbench.errors import UserError

AGAIN = "Copy the file again from where it came from, and give the command again."
_HEAD = struct.Struct("<QI")
_SUM = struct.Struct("<I")


def records(path: Path, check: bool = True, read: Callable[[bytes], None] = lambda _: None) -> Iterator[bytes]:
    """Yield the payloads of a file's records.

    Args:
        check: compare payloads with their checksums. Lengths always are.
        read: given all bytes of the file, as they are read.

    Raises:
        UserError: the file cannot be read, ends within a record, or a checksum differs.
    """
    try:
        left = path.stat().st_size
        with path.open("rb") as file:
            number = 0
            while head := file.read(_HEAD.size):
                read(head)
                where = f"record {number} of {path}"
                if len(head) < _HEAD.size:
                    raise UserError(f"{path} is truncated: it ends within the length of record {number}. {AGAIN}")
                length, expected = _HEAD.unpack(head)
                if masked_crc32c(head[:8]) != expected:
                    raise UserError(
                        f"{where} is damaged: its length does not match its checksum (or this is not a TFRecord "
                        f"file, or a compressed one). {AGAIN}"
                    )
                left -= _HEAD.size + length + _SUM.size
                if left < 0:
                    raise UserError(f"{path} is truncated: record {number} lacks {-left} bytes. {AGAIN}")
                payload, tail = file.read(length), file.read(_SUM.size)
                read(payload)
                read(tail)
                if len(tail) < _SUM.size:
                    raise UserError(f"{path} became shorter while it was read. {AGAIN}")
                if check and masked_crc32c(payload) != _SUM.unpack(tail)[0]:
                    raise UserError(f"{where} is damaged: its contents do not match their checksum. {AGAIN}")
                yield payload
                number += 1
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}.") from e
