"""Quantized tensors of checkpoints that others wrote, packed when they are needed.

A `KeptTensor` lies in its file in the layout of the program that wrote it. Its integers are those
of one of edgeq's schemes, bit for bit, so packing is a rearrangement of bytes and rounds nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.mapped_file import release
from edgeq.formats.packing import TILE
from edgeq.formats.schemes import FLOAT_TAGS, QuantScheme
from edgeq.formats.tensor import (
    CACHED_ELEMENTS,
    FloatTensor,
    QuantTensor,
    Tensor,
    part_nbytes,
    part_shapes,
    row_blocks,
)

Take = Callable[[tuple[int, ...], Any], NDArray[Any]]
"""(shape, dtype) -> memory for an array."""


@dataclass(frozen=True, eq=False)
class KeptTensor(ABC):
    """A matrix whose integers are kept; an importer has a class for each layout.

    Args:
        source_type: what its format calls its type, as "Q4_K".
        scheme: the scheme that stands for the same values.
        shape: (N, K).
        nbytes: bytes in the file.
    """

    source_type: str
    scheme: QuantScheme
    shape: tuple[int, int]
    nbytes: int

    @property
    def source_format(self) -> str:
        """What the format is called: the first word of its types, as "GPTQ"."""
        return self.source_type.partition(" ")[0]

    @abstractmethod
    def quantized(self, start: int, stop: int) -> QuantTensor:
        """Rows ``start:stop``, packed; no others are read."""

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows ``start:stop`` as float32; no others are read."""
        out = np.empty((max(min(stop, self.shape[0]) - start, 0), self.shape[1]), np.float32)
        for piece in row_blocks(out.shape, CACHED_ELEMENTS):
            part = self.quantized(start + piece.start, start + piece.stop)
            with np.errstate(all="ignore"):  # whoever uses the values checks for NaN
                out[piece] = part.numpy()
        return out

    def numpy(self) -> NDArray[np.float32]:
        """The whole matrix as float32."""
        return self.rows(0, self.shape[0])


def packed(tensor: KeptTensor, take: Take = np.empty) -> QuantTensor:
    """The whole tensor, packed in pieces of bounded memory; pages of its file are given back.

    Args:
        tensor: the tensor.
        take: allocates the arrays.
    """
    parts = {
        name: take(shape, dtype)
        for name, (dtype, shape) in part_shapes(tensor.scheme, tensor.shape).items()
    }
    for piece in row_blocks(tensor.shape, multiple=TILE):
        rows = tensor.quantized(piece.start, piece.stop)
        tiles = slice(piece.start // TILE, -(-piece.stop // TILE))
        for name, array in parts.items():
            array[... if name == "palette" else tiles] = getattr(rows, name)
        release(tensor)
    return QuantTensor(tensor.scheme, tensor.shape, **parts)


def packed_nbytes(tensor: KeptTensor) -> int:
    """Bytes that the tensor takes once it is packed."""
    return sum(part_nbytes(tensor.scheme, tensor.shape))


def stored_type(tensor: Tensor) -> str:
    """How a tensor is stored, in words; of one that rearranges another, how that one is.

    Returns:
        the text form of a scheme ("w4-g32"), another format's name of a type ("Q4_1"), a float
        type ("f16"), or "float" for what is computed when it is read.
    """
    if isinstance(tensor, QuantTensor):
        return str(tensor.scheme)
    if isinstance(tensor, KeptTensor):
        return tensor.source_type
    if isinstance(tensor, FloatTensor):
        return FLOAT_TAGS[tensor.dtype]
    rearranged: Any = getattr(tensor, "data", None)
    return stored_type(rearranged) if hasattr(rearranged, "rows") else "float"
