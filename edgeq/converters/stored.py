"""What is read back from a target's file: rows of weights, and constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line reads the table of targets and needs no NumPy for it
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class StoredWeight:
    """Rows of a weight matrix as a target's file stores them, in terms that all targets share.

    The weight is ``scales * (levels - zero_points)``, or ``scales * levels + minimums``.

    Args:
        name: edgeq's name of the tensor.
        levels: int16 [N, K], unpadded: signed integers as they are multiplied by the scales, the
            fixed zero point of a symmetric scheme subtracted (-8 .. 7 for 4 bits); the entries of
            the table for a palette; with zero points, the unsigned codes.
        scales: float32 [N, G].
        zero_points: [N, G], or None for a symmetric scheme.
        minimums: float32 [N, G], or None where the file has none. Some files hold zero points so:
            then both are given.
        first: index of the first row, where a matrix is read in pieces of N rows.
    """

    name: str
    levels: NDArray[np.int16]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.int16] | None = None
    first: int = 0
    minimums: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class StoredConstant:
    """A constant as a file stores it.

    Args:
        name: ours where it is a tensor of the model, else the file's.
        values: as they are stored; often a view of the mapped file.
    """

    name: str
    values: NDArray[Any]
