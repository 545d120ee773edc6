"""GPTQ of many small matrices at once: the groups of a convolution.

A depthwise convolution has hundreds of matrices of a few rows and columns, each with a Hessian of
its own. They are rounded side by side, as `edgeq.quant.rounders.gptq` rounds each of them, a column
of all matrices at a time. With all columns in one block no other errors remain that a second pass
could make up for, so there is none.

Source: as for `edgeq.quant.rounders.gptq`.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import UsageError
from edgeq.formats.schemes import QuantScheme
from edgeq.quant.rounders.gptq import NEAR_ROWS
from edgeq.quant.rounders.gptq_block import Array, Grid
from edgeq.quant.rounders.hessian import ridge
from edgeq.quant.rounders.mse import fit_mse
from edgeq.quant.rounders.qparams import (
    QuantRows,
    Scratch,
    WeightParams,
    group_view,
    snap_scales,
    to_codes,
)

MOST_COLUMNS = 128
"""Columns of a matrix that is rounded in one block."""


def round_stack_of_matrices(
    w: Array,
    scheme: QuantScheme,
    hessians: Array,
    *,
    damping: float = 0.01,
    name: str = "weights",
    params: WeightParams | None = None,
    palette: NDArray[np.int8] | None = None,
) -> QuantRows:
    """Quantize the rows of all matrices for the least error of their outputs.

    Args:
        w: float32 [M * R, K], finite: the R rows of each of M matrices, K at most `MOST_COLUMNS`.
        scheme: of granularity "channel", or "tensor" with params.
        hessians: second moments of the matrices' inputs, float32 [M, K, K].
        damping: added to each Hessian's diagonal, in parts of its mean.
        name: the tensor, for messages.
        params: the scale of the tensor, where there is only one.
        palette: int8 [2**bits], if the scheme has a codebook.

    Raises:
        SchemeError: a scale is beyond float16.
        UsageError: a Hessian that is too singular for the damping.
    """
    m, k = hessians.shape[:2]
    padded = group_view(w, scheme)
    rows = len(w) // m
    diagonal = np.diagonal(hessians, axis1=1, axis2=2)
    order = np.argsort(-diagonal, axis=1, kind="stable")
    mix, pivots = _factors(hessians, order, damping, name)
    scales, zeros = _scales(padded, scheme, diagonal, name, params, palette)
    # [K, M, tried, R], columns in the order of rounding
    target = np.take_along_axis(w.reshape(m, rows, k), order[:, None, :], axis=2)
    target = np.ascontiguousarray(target.transpose(2, 0, 1))[:, :, None, :]
    grid = Grid(scheme, palette, name)
    levels, cost = _rounded(target, mix, pivots, grid, scales, zeros)
    best = cost.argmin(axis=1)[:, None, :]
    levels = np.take_along_axis(levels, best[None], axis=2)[:, :, 0, :]
    ordered = np.empty((m, rows, k), np.float32)
    np.put_along_axis(ordered, order[:, None, :], levels.transpose(1, 2, 0), axis=2)
    chosen = params
    if chosen is None:
        of_rows = np.take_along_axis(scales, best, axis=1).reshape(-1, 1)
        of_zeros = None
        if zeros is not None:
            of_zeros = np.take_along_axis(zeros, best, axis=1).reshape(-1, 1).astype(np.uint8)
        chosen = WeightParams(of_rows, of_zeros, palette)
    codes = to_codes(group_view(ordered.reshape(len(w), k), scheme), chosen, scheme)
    return QuantRows(codes[:, :k], chosen)


def _factors(
    hessians: Array, order: NDArray[np.intp], damping: float, name: str
) -> tuple[Array, Array]:
    """Factors of each damped Hessian ``M D M^T``: M^T float32 [M, K, K], D's diagonal [M, K]."""
    k = hessians.shape[1]
    matrices = hessians.astype(np.float64)
    extra = np.array([ridge(matrix, damping) for matrix in hessians])
    matrices[:, np.arange(k), np.arange(k)] += extra[:, None]
    matrices = np.take_along_axis(matrices, order[:, :, None], axis=1)
    matrices = np.take_along_axis(matrices, order[:, None, :], axis=2)
    try:
        roots = np.linalg.cholesky(matrices[:, ::-1, ::-1])[:, ::-1, ::-1]
    except np.linalg.LinAlgError as err:
        raise UsageError(
            f"a Hessian of {name}'s inputs is too singular for a damping of {damping}; "
            "use a larger one (0.01 is usual), or more samples"
        ) from err
    diagonal = np.diagonal(roots, axis1=1, axis2=2)
    mix = (roots / diagonal[:, None, :]).astype(np.float32)
    return np.ascontiguousarray(mix.transpose(0, 2, 1)), np.square(diagonal).astype(np.float32)


def _scales(
    groups: Array,
    scheme: QuantScheme,
    diagonal: Array,
    name: str,
    params: WeightParams | None,
    palette: NDArray[np.int8] | None,
) -> tuple[Array, Array | None]:
    """Scales and zero points that are tried, float32 [M, tried, R] each."""
    m = len(diagonal)
    rows = len(groups) // m
    if params is not None:
        one = np.full((m, 1, rows), params.scales.item(), np.float32)
        zero = params.zero_points
        return one, None if zero is None else np.full_like(one, zero.item())
    # a weight that no input ever met must not be without any say in its scale
    most = diagonal.max(axis=1, keepdims=True)
    live = np.maximum(diagonal, np.where(most > 0, np.float32(1e-6) * most, np.float32(1)))
    importance = group_view(np.ascontiguousarray(live), scheme).reshape(1, m, -1)
    side_by_side = groups.reshape(m, rows, -1).transpose(1, 0, 2)
    fitted = fit_mse(
        [np.ascontiguousarray(side_by_side)], scheme, name, Scratch(),
        importance=importance, palette=palette,
    )  # fmt: skip
    tried = [fitted.scales, *(snap_scales(fitted.scales * np.float32(f), name) for f in NEAR_ROWS)]
    scales = np.ascontiguousarray(np.stack(tried).transpose(2, 0, 1))
    zeros = None
    if fitted.zero_points is not None:
        of_rows = fitted.zero_points.T.astype(np.float32)[:, None, :]
        zeros = np.ascontiguousarray(np.broadcast_to(of_rows, scales.shape))
    return scales, zeros


def _rounded(
    target: Array, mix: Array, pivots: Array, grid: Grid, scales: Array, zeros: Array | None
) -> tuple[Array, Array]:
    """Levels, float32 [K, M, tried, R], and what their errors cost, [M, tried, R]."""
    k, shape = len(target), scales.shape
    levels, error = np.empty((2, k, *shape), np.float32)
    cost, steps = np.zeros(shape, np.float32), np.empty(shape, np.float32)
    nearest = grid.rounding(shape)
    for column in range(k):
        value = np.einsum("mj,jmtr->mtr", mix[:, column, :column], error[:column])
        value += target[column]
        nearest(value, scales, zeros, levels[column])
        np.multiply(levels[column], scales, out=steps)
        np.subtract(target[column], steps, out=error[column])
        value -= steps
        value *= value
        value *= pivots[:, column, None, None]
        cost += value
    return levels, cast(Array, cost)
