"""The kernels of GPTQ's blocks for NumPy arrays; see `edgeq.quant.rounders.gptq_block`.

Arrays are columns first, float32, and have a multiple of 16 rows of the matrix along the last axis.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edgeq.quant.kernels.library import function, registers
from edgeq.quant.kernels.parallel import ranges, run_pieces, thread_count

ROWS = 16
"""Rows of the matrix that lie in one vector."""
_SMALL = 1 << 15

Array = NDArray[np.float32]


def round_columns(
    target: Array,
    mix: Array,
    pivots: Array,
    scales: Array,
    zeros: Array | None,
    *,
    grid: str,
    limits: tuple[float, float] = (0.0, 0.0),
    table: Array | None = None,
    by_column: bool = False,
) -> tuple[Array, Array, NDArray[np.int32]]:
    """Round columns one after the other, with the cheapest of several scales for each row.

    Args:
        target: [C, R].
        mix: M^T, [C, C] without gaps.
        pivots: [C].
        scales, zeros: [trials, R] of a group, or [C, R] if ``by_column``.
        grid: of `shapes.GRIDS`.
        limits: the lowest and highest level; of codes where there are zero points.
        table: the palette's number for each half step, [508].
        by_column: each column has a scale of its own, and there is one trial.

    Returns:
        levels [C, R], what they cost [R], and which scale was taken, int32 [R]: the first where
        two cost the same.
    """
    c, r = target.shape
    levels, cost = np.empty((c, r), np.float32), np.empty(r, np.float32)
    winner = np.empty(r, np.int32)
    edges = np.array(limits, np.float32)
    trials, stride = (1, 0) if by_column else (len(scales), scales.strides[0])
    call = function(f"edgeq_round_{grid}")

    def piece(first: int, last: int) -> None:
        scratch = np.empty(2 * c * ROWS * registers().rows + ROWS, np.float32)
        call(
            target.ctypes.data, target.strides[0], levels.ctypes.data, levels.strides[0],
            scales.ctypes.data, stride, scales.strides[0] if by_column else 0,
            0 if zeros is None else zeros.ctypes.data, mix.ctypes.data, pivots.ctypes.data,
            c, trials, first, last, 0 if table is None else table.ctypes.data, edges.ctypes.data,
            cost.ctypes.data, winner.ctypes.data, scratch.ctypes.data + -scratch.ctypes.data % 64,
        )  # fmt: skip

    _over_rows(piece, r, c * c * trials)
    return levels, cost, winner


def cost_columns(target: Array, mix: Array, pivots: Array, levels: Array, scales: Array) -> Array:
    """What given levels cost, [R].

    Args:
        target, levels: [C, R].
        mix, pivots: as for `round_columns`.
        scales: [1, R] or [C, R].
    """
    c, r = target.shape
    cost = np.empty(r, np.float32)
    step = scales.strides[0] if len(scales) > 1 else 0

    def piece(first: int, last: int) -> None:
        scratch = np.empty(c * ROWS * registers().rows + ROWS, np.float32)
        function("edgeq_cost")(
            target.ctypes.data, target.strides[0], levels.ctypes.data, levels.strides[0],
            scales.ctypes.data, step, mix.ctypes.data, pivots.ctypes.data, c, first, last,
            cost.ctypes.data, scratch.ctypes.data + -scratch.ctypes.data % 64,
        )  # fmt: skip

    _over_rows(piece, r, c * c)
    return cost


def fit_columns(target: Array, mix: Array, pivots: Array, levels: Array) -> tuple[Array, Array]:
    """Products of levels with targets and of levels with themselves, as errors count: [R] each."""
    c, r = target.shape
    along, square = np.empty((2, r), np.float32)

    def piece(first: int, last: int) -> None:
        function("edgeq_fit")(
            target.ctypes.data, target.strides[0], levels.ctypes.data, levels.strides[0],
            mix.ctypes.data, pivots.ctypes.data, c, first, last,
            along.ctypes.data, square.ctypes.data,
        )  # fmt: skip

    _over_rows(piece, r, 2 * c * c)
    return along, square


def _over_rows(piece: Callable[[int, int], None], rows: int, work: int) -> None:
    """Call for ranges of rows, side by side."""
    assert rows % ROWS == 0
    threads = thread_count() if rows * work > _SMALL else 1
    step = ROWS * registers().rows
    run_pieces([lambda a=a, b=b: piece(a, b) for a, b in ranges(rows, step, threads)])  # type: ignore[misc]
