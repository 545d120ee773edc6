"""Some columns of a matrix rounded together, each making up for those before it.

All arrays are transposed: columns [C] first, rows of the matrix [R] along the last axis. A block's
Hessian is ``M D M^T``, M upper triangular with a unit diagonal; an error ``e`` [C, R] costs
``D . (M^T e)^2``. Column k is rounded to the level nearest to

    target_k + sum over j < k of M[j, k] (target_j - ŵ_j)

the only choice that is best whatever the columns before it have come to.

Source: Chee et al. 2023, "QuIP" (arXiv:2307.13304), section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.schemes import QuantScheme
from edgeq.quant.rounders.mse import factors
from edgeq.quant.rounders.qparams import from_range, round_steps, snap_scales

Array = NDArray[np.float32]
REFITS = 2
"""Least-squares moves of a group's scale after the candidates."""


@dataclass(frozen=True)
class Grid:
    """What weights may become, but for the scale.

    Args:
        scheme: the scheme.
        palette: int8 [2**bits], if the scheme has a codebook.
        name: the tensor, for messages.
    """

    scheme: QuantScheme
    palette: NDArray[np.int8] | None
    name: str


@dataclass(frozen=True)
class Block:
    """Some columns, in the order they are rounded in, and how their errors count.

    Args:
        columns: which, int [C].
        mix: M, float32 [C, C].
        pivots: D's diagonal, float32 [C].
        pull: float32 [C, C]; times what the errors of other columns do to these gives by how much
            these should differ to make up for it.
    """

    columns: NDArray[np.intp]
    mix: Array
    pivots: Array
    pull: Array

    def cost(self, error: Array) -> Array:
        """What errors [C, R] cost each row, [R]."""
        mixed = self.mix.T @ error
        mixed *= mixed
        return cast(Array, self.pivots @ mixed)


@dataclass
class Choice:
    """Levels and scales of a block.

    Args:
        levels: whole numbers, float32 [C, R].
        scales: float32 [C, R], or [1, R] of a group.
        zeros: zero points in the shape of scales, if asymmetric, else None.
        cost: float32 [R].
    """

    levels: Array
    scales: Array
    zeros: Array | None
    cost: Array

    def improve(self, other: Choice) -> None:
        """Take over the rows that cost less in ``other``."""
        wins = other.cost < self.cost
        np.copyto(self.levels, other.levels, where=wins)
        np.copyto(self.scales, other.scales, where=wins)
        np.copyto(self.cost, other.cost, where=wins)
        if self.zeros is not None and other.zeros is not None:
            np.copyto(self.zeros, other.zeros, where=wins)


def round_block(
    target: Array, block: Block, grid: Grid, scales: Array, zeros: Array | None
) -> Choice:
    """Levels for given scales.

    Args:
        target: float32 [C, R].
        block: how errors count.
        grid: the levels there are.
        scales, zeros: float32 [C, R] or [1, R].
    """
    c, r = target.shape
    full = np.broadcast_to(scales, (c, r))
    full_zeros = None if zeros is None else np.broadcast_to(zeros, (c, r))
    levels, error = np.empty((c, r), np.float32), np.empty((c, r), np.float32)
    cost, steps, value = np.zeros(r, np.float32), np.empty(r, np.float32), np.empty(r, np.float32)
    mix = np.ascontiguousarray(block.mix.T)
    for k in range(c):
        np.matmul(mix[k, :k], error[:k], out=value)
        value += target[k]
        np.divide(value, full[k], out=steps)
        zero = None if full_zeros is None else full_zeros[k]
        round_steps(steps, grid.scheme, zero, grid.palette, out=levels[k])
        np.multiply(levels[k], full[k], out=steps)
        np.subtract(target[k], steps, out=error[k])
        value -= steps
        value *= value
        value *= block.pivots[k]
        cost += value
    return Choice(levels, scales.copy(), None if zeros is None else zeros.copy(), cost)


def priced(
    levels: Array, scales: Array, zeros: Array | None, target: Array, block: Block
) -> Choice:
    """Given levels and scales, and what they cost."""
    cost = block.cost(target - levels * scales)
    return Choice(levels.copy(), scales.copy(), None if zeros is None else zeros.copy(), cost)


def search(
    target: Array,
    block: Block,
    grid: Grid,
    tried: Iterable[tuple[Array, Array | None]],
    start: Choice | None = None,
    refits: int = REFITS,
) -> Choice:
    """The levels and scales of a block that cost least.

    Args:
        target: float32 [C, R].
        block: how errors count.
        grid: the levels there are.
        tried: scales and zero points, [C, R] or [1, R].
        start: what to begin with; overwritten.
        refits: times that the best scales [1, R] are moved on by least squares.

    Raises:
        SchemeError: a scale is beyond float16.
    """
    best = start
    for scales, zeros in tried:
        best = _better(best, round_block(target, block, grid, scales, zeros))
    assert best is not None
    mixed_target = block.mix.T @ target
    for _ in range(refits):
        mixed = block.mix.T @ best.levels
        along = block.pivots @ (mixed * mixed_target)
        square = block.pivots @ (mixed * mixed)
        fitted = np.divide(along, square, out=best.scales[0].copy(), where=square > 0)
        scales = snap_scales(np.maximum(fitted, 0), grid.name)[None]
        best.improve(priced(best.levels, scales, best.zeros, target, block))
        best.improve(round_block(target, block, grid, scales, best.zeros))
    return best


def candidates(target: Array, grid: Grid) -> Iterator[tuple[Array, Array | None]]:
    """Scales and zero points [1, R] for a group of weights [C, R]: its range times factors."""
    zero = np.float32(0)
    low = np.minimum(target.min(axis=0, keepdims=True), zero)
    high = np.maximum(target.max(axis=0, keepdims=True), zero)
    for factor in (np.float32(1), *factors(grid.scheme)):
        params = from_range(low * factor, high * factor, grid.scheme, grid.name, grid.palette)
        zeros = params.zero_points
        yield params.scales, None if zeros is None else zeros.astype(np.float32)


def _better(best: Choice | None, other: Choice) -> Choice:
    if best is None:
        return other
    best.improve(other)
    return best
