"""weight.bin: the numbers of an ML Program, one blob after another.

    offset 0     u32 number of blobs, u32 version 2, zeros to 64 bytes
    each blob    at a multiple of 64: u32 0xDEADBEEF, u32 type, u64 bytes, u64 offset of the data,
                 u64 unused bits of the last byte, zeros to 64 bytes
                 data at a multiple of 64, little-endian

Numbers of less than 8 bits are one stream of bits, row-major, the first number in the lowest
bits: int4 is two's complement, low nibble first; a uint3 may lie across two bytes. The program
refers to a blob by the offset of its 64-byte description.

Source: MILBlob/Blob/StorageFormat.hpp in github.com/apple/coremltools.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError

ALIGN = 64
_HEADER = struct.Struct("<II")
_RECORD = struct.Struct("<IIQQQ")
_SENTINEL, _VERSION = 0xDEADBEEF, 2


@dataclass(frozen=True)
class Kind:
    """A type of number in a blob.

    Args:
        name: MIL's name for it.
        code: its number in the file.
        bits: of each number.
        dtype: what `read` gives, and `Writer` takes; int8 or uint8 below 8 bits.
    """

    name: str
    code: int
    bits: int
    dtype: type[np.generic]


KINDS = {
    kind.name: kind
    for kind in (
        Kind("fp16", 1, 16, np.float16),
        Kind("fp32", 2, 32, np.float32),
        Kind("uint8", 3, 8, np.uint8),
        Kind("int8", 4, 8, np.int8),
        Kind("int16", 6, 16, np.int16),
        Kind("uint16", 7, 16, np.uint16),
        Kind("int4", 8, 4, np.int8),
        Kind("uint1", 9, 1, np.uint8),
        Kind("uint2", 10, 2, np.uint8),
        Kind("uint4", 11, 4, np.uint8),
        Kind("uint3", 12, 3, np.uint8),
        Kind("uint6", 13, 6, np.uint8),
        Kind("int32", 14, 32, np.int32),
        Kind("uint32", 15, 32, np.uint32),
    )
}
"""Types of blobs by their MIL name."""
_BY_CODE = {kind.code: kind for kind in KINDS.values()}


def pack_bits(values: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Numbers of fewer than 8 bits as a stream of bits, the first in the lowest bits.

    Args:
        values: integers of any shape; only the low ``bits`` bits of each are kept.
        bits: 1 to 7.

    Returns:
        uint8 [ceil(values.size * bits / 8)].
    """
    flat = values.reshape(-1).astype(np.uint8)
    if bits == 4:
        if flat.size % 2:
            flat = np.append(flat, np.uint8(0))
        low: NDArray[np.uint8] = flat[0::2] & np.uint8(15)
        return low | (flat[1::2] << np.uint8(4))
    planes = (flat[:, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(planes.reshape(-1), bitorder="little")


def unpack_bits(
    raw: NDArray[np.uint8], bits: int, count: int, signed: bool = False
) -> NDArray[Any]:
    """The inverse of `pack_bits`: uint8, or int8 if ``signed``, [count]."""
    if bits == 4:
        values = np.empty(raw.size * 2, np.uint8)
        values[0::2] = raw & 15
        values[1::2] = raw >> 4
        values = values[:count]
    else:
        planes = np.unpackbits(raw, count=count * bits, bitorder="little")
        values = np.zeros(count, np.uint8)
        for i in range(bits):
            values |= planes[i::bits] << np.uint8(i)
    if not signed:
        return values
    half = np.uint8(1 << (bits - 1))
    return ((values ^ half) - half).view(np.int8)


class Writer:
    """Writes weight.bin, blob by blob, each of them in pieces.

    Args:
        path: the file to make.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._file.write(bytes(ALIGN))
        self._count = 0

    def begin(self, kind: str, count: int) -> int:
        """Begin a blob of ``count`` numbers, and give the offset that refers to it.

        Follow with `write` until all are written.
        """
        bits = count * KINDS[kind].bits
        nbytes = -(-bits // 8)
        at = self._pad()
        record = _RECORD.pack(
            _SENTINEL, KINDS[kind].code, nbytes, at + ALIGN, (8 * nbytes - bits) % 8
        )
        self._file.write(record.ljust(ALIGN, b"\0"))
        self._kind = KINDS[kind]
        self._end = at + ALIGN + nbytes
        self._count += 1
        return at

    def write(self, values: NDArray[Any]) -> None:
        """Write the next numbers; of less than 8 bits, a whole number of bytes unless the last."""
        kind = self._kind
        if kind.bits < 8:
            raw = pack_bits(values, kind.bits)
        else:
            raw = np.ascontiguousarray(values, kind.dtype)
        if self._file.tell() + raw.nbytes > self._end:
            raise ValueError(f"more numbers than the blob of {kind.name} was begun with")
        self._file.write(raw.data)

    def close(self) -> None:
        """Complete the file and bring it to the disk."""
        end = self._file.tell()
        self._file.seek(0)
        self._file.write(_HEADER.pack(self._count, _VERSION))
        self._file.seek(end)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close the file as it is, after a failure."""
        self._file.close()

    def _pad(self) -> int:
        at = self._file.tell()
        if self._count and at != self._end:
            raise ValueError(f"a blob of {self._kind.name} was not written to its end")
        self._file.write(bytes(-at % ALIGN))
        return at + (-at % ALIGN)


@dataclass(frozen=True)
class Blob:
    """A blob of a file, read on demand.

    Args:
        kind: of its numbers.
        count: how many there are.
        raw: uint8, a view of the mapped file.
    """

    kind: Kind
    count: int
    raw: NDArray[np.uint8]

    def read(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Numbers ``start:stop`` in the type of the kind; a view where it can be."""
        kind = self.kind
        stop = self.count if stop is None else stop
        if kind.bits >= 8:
            size = kind.bits // 8
            return self.raw[start * size : stop * size].view(kind.dtype)
        first = start * kind.bits // 8
        skip = (start * kind.bits - first * 8) // kind.bits
        if (start * kind.bits - first * 8) % kind.bits:  # begins inside a byte: take from before
            return self.read(0, stop)[start:]
        raw = self.raw[first : -(-stop * kind.bits // 8)]
        signed = kind.dtype is np.int8
        return unpack_bits(raw, kind.bits, skip + stop - start, signed)[skip:]


class Reader:
    """A mapped weight.bin.

    Args:
        path: the file.

    Raises:
        FormatError: it is no such file, or of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            empty = path.stat().st_size < ALIGN
        except OSError as err:
            raise FormatError(f"{path} cannot be read: {err.strerror}") from err
        if empty:
            raise FormatError(f"{path} is too short for a Core ML weight file")
        self._data: NDArray[np.uint8] = np.asarray(np.memmap(path, np.uint8, "r"))
        self.count, version = _HEADER.unpack(self._data[: _HEADER.size].tobytes())
        if version != _VERSION:
            raise FormatError(
                f"{path} has weight file version {version}; edgeq reads version {_VERSION}"
            )

    def blob(self, offset: int, kind: str, count: int) -> Blob:
        """The blob described at ``offset``.

        Raises:
            FormatError: there is none, it is of another type or size, or runs past the end.
        """
        stored_kind, nbytes, start = self._record(offset)
        bits = count * KINDS[kind].bits
        if stored_kind != KINDS[kind]:
            raise FormatError(
                f"{self.path}: the blob at {offset} holds {stored_kind.name}, "
                f"the program says {kind}"
            )
        if nbytes != -(-bits // 8):
            raise FormatError(
                f"{self.path}: the blob at {offset} has {nbytes} bytes, "
                f"{count} numbers of {kind} take {-(-bits // 8)}"
            )
        return Blob(stored_kind, count, self._data[start : start + nbytes])

    def blobs(self) -> Iterator[tuple[int, str, int]]:
        """(offset, MIL name of the type, bytes) of every blob, in the order of the file."""
        at = ALIGN
        for _ in range(self.count):
            kind, nbytes, start = self._record(at)
            yield at, kind.name, nbytes
            at = -(-(start + nbytes) // ALIGN) * ALIGN

    def _record(self, offset: int) -> tuple[Kind, int, int]:
        raw = self._data[offset : offset + _RECORD.size].tobytes()
        if offset % ALIGN or len(raw) < _RECORD.size:
            raise FormatError(f"{self.path} has no blob at {offset}")
        sentinel, code, nbytes, start, _ = _RECORD.unpack(raw)
        if sentinel != _SENTINEL or code not in _BY_CODE:
            raise FormatError(f"{self.path} has no known blob at {offset}")
        if start + nbytes > self._data.size:
            raise FormatError(
                f"{self.path} is cut short: the blob at {offset} ends at {start + nbytes} "
                f"of {self._data.size} bytes"
            )
        return _BY_CODE[code], nbytes, start
