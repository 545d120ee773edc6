"""Files cut into blocks whose borders follow from their content.

A border lies behind each place where the last 32 bytes have a certain hash, so a change in the
middle of a file, or bytes that are put in, leave all blocks alike but those that are touched. Two
versions of a model have the blocks of their unchanged tensors in common, whatever the format.

Source: Xia et al. 2016, "FastCDC" (USENIX ATC): the gear hash. It is computed for all places at
once: the hash over 2 n bytes is that over the last n plus that over the n before, shifted by n.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

WHOLE = 256 << 10
"""Bytes up to which a file is one block."""
LEAST, MOST = 32 << 10, 512 << 10
"""Shortest and longest block, in bytes; the last of a file may be shorter."""
_BITS = 17
"""A border is expected every ``2**_BITS`` bytes."""
_WINDOW = 32
"""Bytes that the hash is over: one for each of its bits."""
_PIECE = 4 << 20
"""Bytes that are hashed at once."""


@dataclass(frozen=True)
class FileBlock:
    """A part of a file.

    Args:
        sha256: of its bytes, in hexadecimal.
        nbytes: its length.
    """

    sha256: str
    nbytes: int


def _gears() -> NDArray[np.uint32]:
    """A random number for each value of a byte."""
    digests = b"".join(hashlib.sha256(bytes((byte,))).digest()[:4] for byte in range(256))
    return np.frombuffer(digests, "<u4").astype(np.uint32)


_GEARS = _gears()


def _candidates(data: NDArray[np.uint8]) -> Iterator[int]:
    """Places behind which a border may lie, ascending."""
    mask = np.uint32(((1 << _BITS) - 1) << (_WINDOW - _BITS))
    for start in range(0, data.size, _PIECE):
        first = max(0, start - _WINDOW + 1)
        found = _GEARS[data[first : start + _PIECE]]
        for shift in (1, 2, 4, 8, 16):
            # the right side is a new array, made of the hashes before this step
            found[shift:] += found[:-shift] << np.uint32(shift)
        ends = np.flatnonzero((found & mask) == 0) + first + 1
        yield from ends[ends > start].tolist()


def blocks_of(path: Path) -> tuple[FileBlock, ...]:
    """The blocks of a file, in order; none of an empty file.

    Args:
        path: an existing file.

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if not size:
        return ()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        data = np.frombuffer(mapped, np.uint8)
        try:
            return tuple(
                FileBlock(hashlib.sha256(mapped[start:end]).hexdigest(), end - start)
                for start, end in _spans(data)
            )
        finally:
            del data  # a mapping with a view cannot be closed


def _spans(data: NDArray[np.uint8]) -> Iterator[tuple[int, int]]:
    """Beginning and end of each block."""
    start, size = 0, int(data.size)
    if size > WHOLE:
        for end in (*_candidates(data), size):
            while end - start > MOST:
                yield start, start + MOST
                start += MOST
            if end - start >= LEAST and end < size:
                yield start, end
                start = end
    if start < size:
        yield start, size
