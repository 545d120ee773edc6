"""Content-defined chunking: files are cut into blocks at positions that their content decides.

A block ends wherever the rolling hash of the last 32 bytes has 17 bits that are zero. Bytes that
are changed or inserted in the middle of a file therefore change only the blocks that they touch,
and the blocks before and after stay the same. Two versions of a model have the blocks of their
unchanged tensors in common, in every file format.

Source: Xia et al. 2016, "FastCDC" (USENIX ATC): the gear hash. The hash is computed for all
positions at once: the hash of 2 n bytes is the hash of the last n bytes plus the hash of the n
bytes before them, shifted by n.
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
"""A file of at most this many bytes is a single block."""
LEAST, MOST = 32 << 10, 512 << 10
"""Length of the shortest and of the longest block, in bytes; the last block of a file may be
shorter."""
_BITS = 17
"""The hash ends a block every ``2**_BITS`` bytes on average."""
_WINDOW = 32
"""Number of bytes that the rolling hash covers: one for each of its 32 bits."""
_PIECE = 4 << 20
"""Number of bytes that are hashed at once."""


@dataclass(frozen=True)
class FileBlock:
    """A block of a file.

    Args:
        sha256: SHA-256 of the block's bytes, in hexadecimal.
        nbytes: length of the block in bytes.
    """

    sha256: str
    nbytes: int


def _gears() -> NDArray[np.uint32]:
    """The table of the gear hash: a pseudo-random number for each of the 256 values of a byte."""
    digests = b"".join(hashlib.sha256(bytes((byte,))).digest()[:4] for byte in range(256))
    return np.frombuffer(digests, "<u4").astype(np.uint32)


_GEARS = _gears()


def _candidates(data: NDArray[np.uint8]) -> Iterator[int]:
    """Positions at which a block may end, in ascending order."""
    mask = np.uint32(((1 << _BITS) - 1) << (_WINDOW - _BITS))
    for start in range(0, data.size, _PIECE):
        first = max(0, start - _WINDOW + 1)
        hashes = _GEARS[data[first : start + _PIECE]]
        for shift in (1, 2, 4, 8, 16):
            # the right side is a new array, computed from the hashes before this step
            hashes[shift:] += hashes[:-shift] << np.uint32(shift)
        ends = np.flatnonzero((hashes & mask) == 0) + first + 1
        yield from ends[ends > start].tolist()


def digest_and_blocks(path: Path) -> tuple[str, tuple[FileBlock, ...]]:
    """Hash a file and its blocks in one pass over its content.

    Args:
        path: an existing file.

    Returns:
        the SHA-256 of the file in hexadecimal, and its blocks in order. An empty file has no
        blocks.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    if not path.stat().st_size:
        return digest.hexdigest(), ()
    blocks = []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        data = np.frombuffer(mapped, np.uint8)
        try:
            for start, end in _spans(data):
                block = mapped[start:end]
                digest.update(block)
                blocks.append(FileBlock(hashlib.sha256(block).hexdigest(), end - start))
        finally:
            del data  # a mapping with a view cannot be closed
    return digest.hexdigest(), tuple(blocks)


def _spans(data: NDArray[np.uint8]) -> Iterator[tuple[int, int]]:
    """Start and end of each block, in bytes."""
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
