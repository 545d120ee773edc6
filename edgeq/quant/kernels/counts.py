"""Counts of values in bins, and the error of rounding them, whose bits depend on nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.quant.kernels.library import function

_LANES = 8


def count_in_bins(
    x: NDArray[np.float32], edges: NDArray[np.float32], counts: NDArray[np.int64]
) -> None:
    """Add the numbers of values in bins of about equal width to ``counts``.

    Args:
        x: float32, any shape.
        edges: float32 [bins + 1], ascending; as in `numpy.histogram`, a bin holds its lower end,
            the last one both, and what lies outside is left out.
        counts: int64 [bins], contiguous.
    """
    flat = np.ascontiguousarray(x, np.float32)
    assert (edges.dtype, counts.dtype) == (np.dtype(np.float32), np.dtype(np.int64))
    assert len(edges) == len(counts) + 1
    function("edgeq_histogram")(
        flat.ctypes.data, flat.size, edges.ctypes.data, len(counts), counts.ctypes.data
    )


def rounding_sums(
    counts: NDArray[np.float64],
    lower: NDArray[np.float64],
    upper: NDArray[np.float64],
    ranges: Sequence[tuple[float, float]],
    levels: int,
) -> NDArray[np.float64]:
    """Sums over bins of counts times the integral of (u - nearest level)^2, u in steps of a range.

    Args:
        counts: float64 [bins].
        lower, upper: float64 [bins], where the bins begin and end.
        ranges: low <= 0 <= high, not both 0; zero is a level.
        levels: steps from end to end.

    Returns:
        float64 [ranges].
    """
    arrays = [_padded(v) for v in (counts, lower, upper)]
    pairs = np.array(ranges, np.float64).reshape(-1, 2)
    sums = np.zeros(len(pairs))
    function("edgeq_rounding_errors")(
        *(v.ctypes.data for v in arrays), len(arrays[0]), pairs.ctypes.data, len(pairs),
        sums.ctypes.data, levels,
    )  # fmt: skip
    return sums


def _padded(x: NDArray[Any]) -> NDArray[np.float64]:
    out = np.zeros(-(-x.size // _LANES) * _LANES)
    out[: x.size] = x
    return out
