"""A strict reader of GGUF files: header, metadata and where each tensor lies.

    "GGUF"  u32 version (2 or 3)  u64 tensors  u64 keys
    keys    string name, u32 type, value            string = u64 length, bytes; array = u32 type,
                                                    u64 length, values
    tensors string name, u32 dims, u64 each (innermost first), u32 type, u64 offset
    padding to general.alignment (32), then the tensors' bytes

Every length is compared with what is left of the file before it is used: a damaged file gives a
FormatError, never a crash or an allocation of a size that the file chooses.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.formats.mapped_file import MappedFile

_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4

TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
"""Readable tensor types: number -> (name, weights of a block, bytes of a block)."""
_OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S",
    22: "IQ2_S", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M",
}  # fmt: skip


@dataclass(frozen=True)
class GgufEntry:
    """Where a tensor lies.

    Args:
        type: name of the type, as "Q4_K".
        shape: dimensions, outermost first.
        start: position of its first byte in the file.
        row_bytes: bytes of one row (of the innermost dimension).
    """

    type: str
    shape: tuple[int, ...]
    start: int
    row_bytes: int


@dataclass(frozen=True)
class GgufFile:
    """An open file.

    Args:
        mapping: its bytes.
        metadata: the keys; arrays are lists.
        tensors: name -> where it lies.
    """

    mapping: MappedFile
    metadata: dict[str, Any]
    tensors: dict[str, GgufEntry]


def open_gguf(path: Path) -> GgufFile:
    """Open a file and check all of its header.

    Raises:
        FormatError: it cannot be read, is not GGUF, is truncated, or a count, length, type or
            offset in it is impossible.
        UnsupportedError: an unknown version, or a tensor type edgeq cannot read.
    """
    try:
        mapping = MappedFile(path)
    except OSError as err:
        raise FormatError(f"{path} cannot be read: {err.strerror or err}") from err
    reader = _Reader(path, mapping)
    if reader.take(4) != b"GGUF":
        raise FormatError(f"{path} is not a GGUF file: it does not start with 'GGUF'")
    version = reader.number("I")
    if version not in (2, 3):
        raise UnsupportedError(f"{path} is GGUF version {version}; edgeq reads 2 and 3")
    n_tensors, n_keys = reader.number("Q"), reader.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = reader.string()
        if key in metadata:
            raise FormatError(f"{path} holds the key {key!r} twice")
        metadata[key] = reader.value(reader.number("I"))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment % 8:
        raise FormatError(f"{path}: general.alignment is {alignment!r}; expected a multiple of 8")
    infos = [reader.tensor_info() for _ in range(n_tensors)]
    base = -(-reader.at // alignment) * alignment
    tensors: dict[str, GgufEntry] = {}
    for name, shape, number, offset in infos:
        if name in tensors:
            raise FormatError(f"{path} holds the tensor {name} twice")
        tensors[name] = _entry(f"{path}: tensor {name}", shape, number, base + offset, mapping.size)
        if offset % alignment:
            raise FormatError(
                f"{path}: tensor {name} starts at {offset}, not at a multiple of {alignment}"
            )
    _check_overlap(path, tensors)
    return GgufFile(mapping, metadata, tensors)


def _entry(where: str, shape: tuple[int, ...], number: int, start: int, size: int) -> GgufEntry:
    if number not in TENSOR_TYPES:
        raise UnsupportedError(
            f"{where} has type {_OTHER_TYPES.get(number, number)}; edgeq reads "
            f"{', '.join(name for name, _, _ in TENSOR_TYPES.values())}"
        )
    kind, block, block_bytes = TENSOR_TYPES[number]
    if not shape or shape[-1] % block:
        raise FormatError(f"{where} {list(shape)} does not hold whole {kind} blocks of {block}")
    row_bytes = shape[-1] // block * block_bytes
    stop = start + math.prod(shape[:-1]) * row_bytes
    if stop > size:
        raise FormatError(
            f"{where} ends at byte {stop} of a file of {size}: "
            "the file is truncated or its offsets are out of range; fetch it again"
        )
    return GgufEntry(kind, shape, start, row_bytes)


def _check_overlap(path: Path, tensors: dict[str, GgufEntry]) -> None:
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].start):
        if entry.start < end:
            raise FormatError(f"{path}: tensor {name} overlaps the tensor before it")
        end = entry.start + math.prod(entry.shape[:-1]) * entry.row_bytes


class _Reader:
    """A position in the file, moved on by each read."""

    def __init__(self, path: Path, mapping: MappedFile) -> None:
        self.path = path
        self.mapping = mapping
        self.at = 0

    def take(self, count: int) -> bytes:
        if count > self.mapping.size - self.at:
            raise FormatError(
                f"{self.path} is truncated or damaged: {count} bytes expected at {self.at}, "
                f"{self.mapping.size - self.at} left; fetch it again"
            )
        self.at += count
        return self.mapping.bytes(self.at - count, self.at)

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        at = self.at
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError as err:
            raise FormatError(f"{self.path}: the string at byte {at} is not UTF-8") from err

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise FormatError(f"{self.path}: unknown metadata type {kind} at byte {self.at}")
        inner, count = self.number("I"), self.number("Q")
        if inner == _STRING:
            return [self.string() for _ in self._times(count, 8)]
        if inner not in _SCALARS:
            raise FormatError(f"{self.path}: an array of type {inner} at byte {self.at}")
        size = struct.calcsize("<" + _SCALARS[inner])
        return list(
            struct.unpack(
                f"<{len(self._times(count, size))}{_SCALARS[inner]}", self.take(count * size)
            )
        )

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, n_dims = self.string(), self.number("I")
        if n_dims > _MAX_DIMS:
            raise FormatError(f"{self.path}: tensor {name} has {n_dims} dimensions; at most 4")
        dims = tuple(self.number("Q") for _ in range(n_dims))
        return name, dims[::-1], self.number("I"), self.number("Q")

    def _times(self, count: int, size: int) -> range:
        """``range(count)``, once the file is known to be long enough for it."""
        if count * size > self.mapping.size - self.at:
            raise FormatError(
                f"{self.path} is truncated or damaged: {count} values expected at byte {self.at}, "
                f"{self.mapping.size - self.at} bytes left; fetch it again"
            )
        return range(count)
