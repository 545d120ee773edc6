"""Memory whose addresses compiled code keeps: aligned, zeroed, and alive as long as its owner."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector."""


class EngineMemory:
    """Keeps arrays alive whose addresses are in records of `edgeq.runtime.kernels.abi`.

    Attributes:
        scratch_bytes: of all arrays from `scratch`, and of what callers add.
    """

    def __init__(self) -> None:
        self.scratch_bytes = 0
        self._arrays: list[NDArray[Any]] = []

    def zeros(self, count: int, dtype: Any) -> NDArray[Any]:
        """A zeroed, aligned vector (untouched pages take no memory)."""
        nbytes = count * np.dtype(dtype).itemsize
        raw = np.zeros(nbytes + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        part: NDArray[Any] = raw[start : start + nbytes].view(dtype)
        self._arrays.append(part)
        return part

    def array(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Zeroed memory of a shape that is not scratch."""
        return self.zeros(math.prod(shape), dtype).reshape(shape)

    def scratch(self, shape: tuple[int, ...]) -> NDArray[Any]:
        """Zeroed float32 scratch of a shape, counted in `scratch_bytes`."""
        array = self.array(shape, np.float32)
        self.scratch_bytes += array.nbytes
        return array

    def address(self, array: NDArray[Any], alignment: int = ALIGNMENT) -> int:
        """The address of a contiguous array so aligned; the array is copied only if it is not."""
        if not array.flags.c_contiguous or array.ctypes.data % alignment:
            copy = self.zeros(array.nbytes, np.uint8).view(array.dtype).reshape(array.shape)
            copy[...] = array
            array = copy
        self._arrays.append(array)
        return int(array.ctypes.data)
