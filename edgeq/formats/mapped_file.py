"""Files mapped read-only, and giving the pages under an array back to the system."""

from __future__ import annotations

import math
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError
from edgeq.core.memory import Anonymous


class MappedFile:
    """A file mapped read-only; arrays are views of it, and its pages can be given back.

    The mapping lives as long as any array over it does.

    Raises:
        FormatError: the file is empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            try:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError as err:
                raise FormatError(f"{path} is empty") from err
        self.size = len(self._map)
        # np.frombuffer keeps the mapping exported while views live; np.ndarray(buffer=) does not,
        # and closing would then pull the memory from under them.
        self._bytes: NDArray[np.uint8] | None = np.frombuffer(self._map, np.uint8)

    def bytes(self, start: int, stop: int) -> bytes:
        """A copy of some bytes."""
        return self._map[start:stop]

    def array(self, dtype: Any, shape: tuple[int, ...], start: int) -> NDArray[Any]:
        """A read-only view as ``dtype``, C order, from byte ``start`` on."""
        if self._bytes is None:
            raise ValueError(f"{self.path} is closed")
        kind = np.dtype(dtype)
        stop = start + math.prod(shape) * kind.itemsize
        view: NDArray[Any] = self._bytes[start:stop].view(kind).reshape(shape)
        return view

    def release(self) -> None:
        """Give resident pages back to the system; they are read again when touched again."""
        _give_back(self._map)

    def close(self) -> None:
        """Unmap now if no array is left over the mapping; otherwise when the last one goes."""
        self._bytes = None
        try:
            self._map.close()
        except BufferError:
            self.release()


def release(what: object) -> None:
    """Give the resident pages of the file under a tensor or array back to the system.

    Args:
        what: a `MappedFile`, a lazy tensor or a NumPy view; anything not mapped is left alone.
    """
    mapped = mapping_under(what)
    if isinstance(mapped, MappedFile):
        mapped.release()
    elif mapped is not None:
        _give_back(mapped)


def mapping_under(what: object) -> mmap.mmap | MappedFile | None:
    """The mapping that a tensor or array is a view of, or None if it is in no file."""
    while what is not None and not isinstance(what, MappedFile | mmap.mmap):
        if isinstance(what, memoryview):
            what = what.obj
        elif isinstance(what, np.ndarray):
            what = what.base
        else:
            # a float tensor's array, or the largest of a quantized tensor's
            what = getattr(what, "data", getattr(what, "packed", None))
    return None if isinstance(what, Anonymous) else what


def _give_back(mapped: mmap.mmap) -> None:
    if hasattr(mapped, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)
