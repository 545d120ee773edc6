"""Some columns of a matrix rounded together, each making up for those before it.

All arrays are transposed: columns [C] first, rows of the matrix [R] along the last axis. A block's
Hessian is ``M D M^T``, M upper triangular with a unit diagonal; an error ``e`` [C, R] costs
``D . (M^T e)^2``. Column k is rounded to the level nearest to

    target_k + sum over j < k of M[j, k] (target_j - ŵ_j)

the only choice that is best whatever the columns before it have come to.

Source: Chee et al. 2023, "QuIP" (arXiv:2307.13304), section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.schemes import QuantScheme
from edgeq.quant.kernels.blocks import cost_columns, fit_columns, round_columns
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


@dataclass(frozen=True)
class Grid:
    """What weights may become, but for the scale.

    Args:
        scheme: the scheme.
        palette: int8 [2**bits], if the scheme has a codebook.
        name: the tensor, for messages.
        signed: whether the scale of a group may be negative.
    """

    scheme: QuantScheme
    palette: NDArray[np.int8] | None
    name: str
    signed: bool = False

    @property
    def has_mirror(self) -> bool:
        """Whether negative scales are allowed and give other levels than positive ones."""
        if not self.signed or self.palette is not None or not self.scheme.symmetric:
            return False
        lowest, highest = levels(self.scheme)
        return self.scheme.granularity == "group" and -lowest != highest

    @cached_property
    def _nearest(self) -> Array:
        """The palette's nearest number for each half step, float32 [508]."""
        assert self.palette is not None
        return palette_levels(self.palette)

    @cached_property
    def levels(self) -> dict[str, Any]:
        """The levels as `edgeq.quant.kernels.blocks.round_columns` takes them."""
        if self.palette is not None:
            return {"grid": "palette", "table": self._nearest}
        if not self.scheme.symmetric:
            return {"grid": "zeros", "limits": (0.0, float(self.scheme.n_codes - 1))}
        return {"grid": "even", "limits": levels(self.scheme)}

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
        mix: M^T, float32 [C, C] without gaps.
        pivots: D's diagonal, float32 [C].
        pull: float32 [C, C]; times what the errors of other columns do to these gives by how much
            these should differ to make up for it.
    """

    columns: NDArray[np.intp]
    mix: Array
    pivots: Array
    pull: Array


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
    """Levels for the cheapest of several scales for each row; the first where two cost the same.

    Args:
        target: float32 [C, R].
        block: how errors count.
        grid: the levels there are.
        scales, zeros: float32 [trials, R]; or [C, R] where columns have scales of their own.
    """
    by_column = grid.scheme.granularity != "group"
    levels, cost, winner = round_columns(
        target, block.mix, block.pivots, scales, zeros, by_column=by_column, **grid.levels
    )
    if by_column:
        return Choice(levels, scales.copy(), None if zeros is None else zeros.copy(), cost)
    rows = np.arange(len(winner))
    return Choice(
        levels, scales[winner, rows][None], None if zeros is None else zeros[winner, rows][None],
        cost,
    )  # fmt: skip


def priced(
    levels: Array, scales: Array, zeros: Array | None, target: Array, block: Block
) -> Choice:
    """Given levels and scales, and what they cost."""
    cost = cost_columns(target, block.mix, block.pivots, levels, scales)
    return Choice(levels.copy(), scales.copy(), None if zeros is None else zeros.copy(), cost)


def search(
    target: Array,
    block: Block,
    grid: Grid,
    scales: Array,
    zeros: Array | None,
    start: Choice | None = None,
    refits: int = REFITS,
) -> Choice:
    """The levels and scales of a block that cost least.

    Args:
        target: float32 [C, R].
        block: how errors count.
        grid: the levels there are.
        scales, zeros: what is tried, as for `round_block`.
        start: what to begin with; overwritten.
        refits: times that the best scales [1, R] are moved on by least squares.

    Raises:
        SchemeError: a scale is beyond float16.
    """
    best = round_block(target, block, grid, scales, zeros)
    if start is not None:
        start.improve(best)
        best = start
    for _ in range(refits):
        along, square = fit_columns(target, block.mix, block.pivots, best.levels)
        fitted = np.divide(along, square, out=best.scales[0].copy(), where=square > 0)
        sign = np.copysign(np.float32(1), best.scales[0])
        moved = snap_scales(np.maximum(fitted * sign, 0) * sign, grid.name)[None]
        best.improve(priced(best.levels, moved, best.zeros, target, block))
        best.improve(round_block(target, block, grid, moved, best.zeros))
    return best


def candidates(target: Array, grid: Grid) -> tuple[Array, Array | None]:
    """Scales and zero points [trials, R] for a group of weights [C, R]: its range times factors.

    The levels of an even grid have one more below zero than above. With a negative scale the last
    one serves the largest weights, so that it is tried too where the grid allows it.
    """
    zero = np.float32(0)
    low = np.minimum(target.min(axis=0, keepdims=True), zero)
    high = np.maximum(target.max(axis=0, keepdims=True), zero)
    tried = np.concatenate([np.ones(1, np.float32), factors(grid.scheme)])[:, None]
    with np.errstate(over="ignore"):  # `from_range` refuses ranges that are not finite
        low, high = low * tried, high * tried
    params = from_range(low, high, grid.scheme, grid.name, grid.palette)
    zeros = params.zero_points
    if grid.has_mirror:
        mirrored = from_range(-high, -low, grid.scheme, grid.name).scales
        return np.concatenate([params.scales, -mirrored]), None
    return params.scales, None if zeros is None else zeros.astype(np.float32)
