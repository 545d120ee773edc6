"""Tensors that are another tensor's rows in another order, read from it row by row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.tensor import Tensor


@dataclass(frozen=True, eq=False)
class GatheredRows:
    """Rows of another tensor in another order.

    Args:
        data: the tensor they come from.
        index: int [N], the source row of each row; neighbors must come from near one another,
            because a range is read as one run of source rows.
    """

    data: Tensor
    index: NDArray[np.intp]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor they come from, but for the first axis."""
        return (len(self.index), *self.data.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of the source rows."""
        return self.data.nbytes * len(self.index) // max(self.data.shape[0], 1)

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows ``start:stop`` as float32 (a copy)."""
        index = self.index[start:stop]
        if not len(index):
            return self.data.rows(0, 0)
        first = int(index.min())
        run = self.data.rows(first, int(index.max()) + 1)
        picked: NDArray[np.float32] = run[index - first]
        return picked

    def numpy(self) -> NDArray[np.float32]:
        """The whole tensor as float32 (a copy)."""
        return self.rows(0, len(self.index))


def half_split(tensor: Tensor, heads: int, rotated: int | None = None) -> GatheredRows:
    """Bring the rows of a q or k projection from interleaved to half-split rotary order.

    Checkpoints of the original Llama code (llama2.c, GGUF's llama architecture) rotate the
    neighbors (2j, 2j+1) of a head; Hugging Face's rotate (j, j + D/2).

    Args:
        tensor: [heads * D, hidden], or a bias [heads * D].
        heads: how many heads it has.
        rotated: how many rows of a head rotate, from its first; all of them if None.
    """
    return GatheredRows(tensor, half_split_order(tensor.shape[0], heads, rotated))


def by_head_order(rows: int, heads: int, part: int, parts: int) -> NDArray[np.intp]:
    """Where the rows of one part lie in a tensor that holds all parts head by head, int [rows].

    Args:
        rows: how many rows the part has.
        heads: how many heads it has.
        part, parts: which of how many.

    Example:
        >>> from edgeq.importers.lazy import by_head_order
        >>> by_head_order(4, 2, 1, 2).tolist()
        [2, 3, 6, 7]
    """
    dim = rows // heads
    starts = (np.arange(heads) * parts + part) * dim
    order: NDArray[np.intp] = (starts[:, None] + np.arange(dim)).reshape(-1)
    return order


def half_split_order(rows: int, heads: int, rotated: int | None = None) -> NDArray[np.intp]:
    """The interleaved row that each row in half-split order is, int [rows].

    Example:
        >>> from edgeq.importers.lazy import half_split_order
        >>> half_split_order(6, 1, 4).tolist()
        [0, 2, 1, 3, 4, 5]
    """
    dim = rows // heads
    turning = dim if rotated is None else rotated
    within = np.arange(dim)
    within[:turning] = np.arange(turning).reshape(-1, 2).T.reshape(-1)  # 0 2 4 .. 1 3 5 ..
    order: NDArray[np.intp] = (np.arange(heads)[:, None] * dim + within).reshape(-1)
    return order
