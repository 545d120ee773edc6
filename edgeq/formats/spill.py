"""A temporary file for tensors and arrays, so that they do not take memory."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import EdgeqError
from edgeq.core.files import no_room
from edgeq.formats.mapped_file import release
from edgeq.formats.tensor import FloatTensor, QuantTensor, Tensor, part_shapes


class Spill:
    """A temporary file that tensors and arrays are put into and mapped from.

    It has no name and is gone when the process ends. On leaving the context it is closed; what
    was put there stays readable as long as it is referred to.

    Args:
        folder: where it lies; the system's folder for temporary files if None.
        what: it holds, in the words of an error.
    """

    def __init__(self, folder: Path | None = None, what: str = "rounded tensors") -> None:
        self._folder, self._what = folder, what
        self._file: Any = None

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def put(self, tensor: Tensor) -> Tensor:
        """The same tensor, mapped from the file; tensors of other kinds are given back as is.

        Raises:
            EdgeqError: the file cannot be written, as on a full disk.
        """
        if isinstance(tensor, FloatTensor):
            (data,) = self.arrays([tensor.data])
            return FloatTensor(tensor.dtype, data)
        if not isinstance(tensor, QuantTensor):
            return tensor
        parts = list(part_shapes(tensor.scheme, tensor.shape))
        arrays = self.arrays([getattr(tensor, part) for part in parts])
        return QuantTensor(tensor.scheme, tensor.shape, **dict(zip(parts, arrays, strict=True)))

    def arrays(self, arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """The same arrays, mapped from the file together.

        Raises:
            EdgeqError: the file cannot be written, as on a full disk.
        """
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="edgeq-", dir=self._folder)  # noqa: SIM115
            end = self._file.seek(0, os.SEEK_END)
            start = -(-end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
            self._file.seek(start)
            offsets, size = [], 0
            for array in arrays:
                offsets.append(size)
                self._file.write(np.ascontiguousarray(array).data)
                size += array.nbytes
            self._file.flush()
            mapped = mmap.mmap(
                self._file.fileno(), max(size, 1), access=mmap.ACCESS_READ, offset=start
            )
        except OSError as err:
            if full := no_room(self._what, err):
                raise full from err
            raise EdgeqError(
                f"a temporary file of {self._what} cannot be written: {err.strerror or err}"
            ) from err
        views = [
            np.frombuffer(mapped, array.dtype, math.prod(array.shape), at).reshape(array.shape)
            for array, at in zip(arrays, offsets, strict=True)
        ]
        release(mapped)
        return views
