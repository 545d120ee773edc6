"""Some columns of a matrix rounded together, each making up for those before it.

All arrays are transposed: columns [C] first, rows of the matrix [R] along the last axis. A block's
Hessian is ``M D M^T``, M upper triangular with a unit diagonal; an error ``e`` [C, R] costs
``D . (M^T e)^2``. Column k is rounded to the level nearest to

    target_k + sum over j < k of M[j, k] (target_j - ŵ_j)

the only choice that is best whatever the columns before it have come to.

Source: Chee et al. 2023, "QuIP" (arXiv:2307.13304), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.schemes import QuantScheme
from edgeq.quant.rounders.mse import factors
from edgeq.quant.rounders.qparams import (
    HALVES,
    from_range,
    levels,
    palette_levels,
    round_steps,
    snap_scales,
)

Array = NDArray[np.float32]
Rounding = Callable[[Array, Array, Array | None, Array], None]
REFITS = 2
"""Least-squares moves of a group's scale after the candidates."""
STACKED = 8192
"""Numbers of a column, over rows and scales, that are rounded at once: the columns of a block
stay in the second-level cache."""


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

    @cached_property
    def _nearest(self) -> Array:
        """The palette's nearest number for each half step, float32 [508]."""
        assert self.palette is not None
        return palette_levels(self.palette)

    def rounding(self, shape: tuple[int, ...]) -> Rounding:
        """A function that puts the levels nearest to ``values / scales`` into its last argument.

        It does what `edgeq.quant.rounders.qparams.round_steps` does, with working memory and
        tables of its own, since a column of a block is short.

        Args:
            shape: of its arguments.
        """
        steps = np.empty(shape, np.float32)
        if self.palette is not None:
            half, index, table = np.float32(0.5), np.empty(shape, np.intp), self._nearest
            offset = np.float32(HALVES // 2)

            def from_palette(values: Array, scales: Array, zeros: Array | None, out: Array) -> None:
                np.multiply(scales, half, out=steps)
                np.divide(values, steps, out=steps)
                np.floor(steps, out=steps)
                np.add(steps, offset, out=steps)
                np.copyto(index, steps, casting="unsafe")
                table.take(index, out=out, mode="clip")

            return from_palette
        if not self.scheme.symmetric:

            def with_zeros(values: Array, scales: Array, zeros: Array | None, out: Array) -> None:
                np.divide(values, scales, out=steps)
                round_steps(steps, self.scheme, zeros, out=out)

            return with_zeros
        lowest, highest = map(np.float32, levels(self.scheme))

        def even(values: Array, scales: Array, zeros: Array | None, out: Array) -> None:
            np.divide(values, scales, out=steps)
            np.rint(steps, out=out)
            np.maximum(out, lowest, out=out)
            np.minimum(out, highest, out=out)

        return even


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
    levels = np.empty((c, r), np.float32)
    cost = _round(target, block, grid, full, full_zeros, levels)
    return Choice(levels, scales.copy(), None if zeros is None else zeros.copy(), cost)


def round_stack(
    target: Array, block: Block, grid: Grid, tried: Sequence[tuple[Array, Array | None]]
) -> Choice:
    """Levels for the cheapest of several scales for each row; the first where two cost the same.

    Args:
        target: float32 [C, R].
        block: how errors count.
        grid: the levels there are.
        tried: scales and zero points, float32 [1, R] each.
    """
    c, r = target.shape
    n = len(tried)
    scales = np.concatenate([scale for scale, _ in tried])
    zeros = None
    if tried[0][1] is not None:
        zeros = np.concatenate([zero for _, zero in tried if zero is not None])
    best_levels, best_cost = np.empty((c, r), np.float32), np.empty(r, np.float32)
    winners = np.empty(r, np.intp)
    width = max(1, STACKED // n)
    for start in range(0, r, width):
        part = slice(start, start + width)
        some = np.ascontiguousarray(scales[:, part])
        some_zeros = None if zeros is None else np.ascontiguousarray(zeros[:, part])
        levels = np.empty((c, *some.shape), np.float32)
        cost = _round(
            target[:, None, part], block, grid,
            np.broadcast_to(some, levels.shape),
            None if some_zeros is None else np.broadcast_to(some_zeros, levels.shape), levels,
        )  # fmt: skip
        wins = cost.argmin(axis=0)
        rows = np.arange(len(wins))
        winners[part], best_cost[part] = wins, cost[wins, rows]
        best_levels[:, part] = levels[:, wins, rows]
    rows = np.arange(r)
    best_zeros = None if zeros is None else zeros[winners, rows][None]
    return Choice(best_levels, scales[winners, rows][None], best_zeros, best_cost)


def _round(
    target: Array, block: Block, grid: Grid, scales: Array, zeros: Array | None, levels: Array
) -> Array:
    """Round column by column, each column making up for those before it.

    Args:
        target: float32 [C, ...], of a shape that broadcasts to that of levels.
        block: how errors count.
        grid: the levels there are.
        scales, zeros: float32, of the shape of levels.
        levels: takes the levels, float32 [C, ...].

    Returns:
        What the errors cost, float32 [...].
    """
    c, shape = len(levels), levels.shape[1:]
    error, missed = np.empty_like(levels), np.empty_like(levels)
    flat = error.reshape(c, -1)
    mix = np.ascontiguousarray(block.mix.T)
    rounded = np.empty(shape, np.float32)
    nearest = grid.rounding(shape)
    for k in range(c):
        value = missed[k]
        np.matmul(mix[k, :k], flat[:k], out=value.reshape(-1))
        value += target[k]
        nearest(value, scales[k], None if zeros is None else zeros[k], levels[k])
        np.multiply(levels[k], scales[k], out=rounded)
        np.subtract(target[k], rounded, out=error[k])
        value -= rounded
    missed *= missed
    missed *= block.pivots.reshape(-1, *[1] * len(shape))
    return cast(Array, missed.sum(axis=0))


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
    scales_of_rows = list(tried)
    if len(scales_of_rows) > 1:
        best = _better(best, round_stack(target, block, grid, scales_of_rows))
    for scales, zeros in scales_of_rows if len(scales_of_rows) == 1 else ():
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
