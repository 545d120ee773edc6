"""Quantized tensors of checkpoints that others wrote, packed when they are needed.

A `KeptTensor` lies in its file in the layout of the program that wrote it. Its integers are those
of one of edgeq's schemes, bit for bit, so packing is a rearrangement of bytes and rounds nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.mapped_file import release
from edgeq.formats.packing import TILE
from edgeq.formats.schemes import QuantScheme
from edgeq.formats.tensor import QuantTensor, Tensor, part_shapes, row_blocks

Take = Callable[[tuple[int, ...], Any], NDArray[Any]]
"""(shape, dtype) -> memory for an array."""


@runtime_checkable
class KeptTensor(Tensor, Protocol):
    """A matrix whose integers are kept; an importer has a class for each layout."""

    @property
    def scheme(self) -> QuantScheme:
        """The scheme that stands for the same values."""

    @property
    def source_type(self) -> str:
        """What its format calls its type, as "Q4_K"."""

    def quantized(self, start: int, stop: int) -> QuantTensor:
        """Rows ``start:stop``, packed."""


def packed(tensor: KeptTensor, take: Take = np.empty) -> QuantTensor:
    """The whole tensor, packed in pieces of bounded memory; pages of its file are given back.

    Args:
        tensor: the tensor.
        take: allocates the arrays.
    """
    n, k = tensor.shape
    parts = {
        name: take(shape, dtype)
        for name, (dtype, shape) in part_shapes(tensor.scheme, (n, k)).items()
    }
    for piece in row_blocks(tensor.shape, multiple=TILE):
        rows = tensor.quantized(piece.start, piece.stop)
        tiles = slice(piece.start // TILE, -(-piece.stop // TILE))
        for name, array in parts.items():
            array[... if name == "palette" else tiles] = getattr(rows, name)
        release(tensor)
    return QuantTensor(tensor.scheme, (n, k), **parts)


def packed_nbytes(tensor: KeptTensor) -> int:
    """Bytes that the tensor takes once it is packed."""
    n, k = tensor.shape
    return sum(
        np.dtype(dtype).itemsize * int(np.prod(shape))
        for dtype, shape in part_shapes(tensor.scheme, (n, k)).values()
    )
