"""GPTQ: each weight is rounded so as to make up for the rounding of those before it.

The error of a row's outputs is ``|e M sqrt(D)|^2`` with ``e = w - ŵ`` and the damped Hessian
factored as ``H = M D M^T``, M upper triangular with a unit diagonal. So columns are taken in
order, and each is rounded to the level nearest to

    w_k + sum over j < k of e_j M[j, k]

which is what textbook GPTQ comes to by updating all later columns after each, without inverting H.
Columns go through in blocks, a group being one (`edgeq.quant.rounders.gptq_block`): the errors
made before a block say what it should be instead of ``w``.

The scale of a group is found when it is come to: each candidate is tried by rounding the whole
group; the one with the least error of the outputs wins and is then moved to the least-squares fit
of the levels it gave. Negative scales can be among the candidates: they mirror the levels, of
which there is one more below zero than above. Scales of rows are those of least error weighted
with H's diagonal times some factors, tried on the whole row; the scale of a tensor is of the first
kind.

After that, all blocks are gone through again: rounded anew against the errors of all others, the
later ones too, where that lowers the row's error.

Source: Frantar et al. 2022, "GPTQ" (arXiv:2210.17323); Chee et al. 2023, "QuIP"
(arXiv:2307.13304), theorem 6, for rounding by M. The search for scales, the order by groups and
the second pass are ours.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import UsageError
from edgeq.formats.schemes import QuantScheme
from edgeq.quant.kernels.blocks import ROWS as ROWS_OF_A_VECTOR
from edgeq.quant.kernels.products import product, total, upper_inverse, upper_root
from edgeq.quant.rounders.gptq_block import (
    REFITS,
    Array,
    Block,
    Choice,
    Grid,
    candidates,
    priced,
    search,
)
from edgeq.quant.rounders.hessian import Factor, Hessian, damped, ridge, weighted_error
from edgeq.quant.rounders.mse import fit_mse
from edgeq.quant.rounders.palette import find_palette
from edgeq.quant.rounders.qparams import (
    Groups,
    QuantRows,
    Scratch,
    WeightParams,
    from_range,
    group_view,
    snap_scales,
    to_codes,
)

__all__ = ["Hessian", "round_gptq", "weighted_error"]

SWEEPS = 2
"""Times that all blocks are rounded again after the first pass."""
NEAR = (0.95, 1.05)
"""Factors on a group's scale that a sweep tries besides the scale as it is."""
NEAR_ROWS = (0.9, 0.95, 1.05, 1.1)
"""Factors on a row's scale that are tried besides the scale as it is."""
ROWS = 2048
"""Rows taken together."""


def round_gptq(
    w: Array,
    scheme: QuantScheme,
    hessian: Hessian,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    block: int = 128,
    sweeps: int = SWEEPS,
    signed_scales: bool = False,
    name: str = "weights",
    params: WeightParams | None = None,
    palette: NDArray[np.int8] | None = None,
) -> QuantRows:
    """Quantize a matrix for the least error of its outputs.

    Besides the Hessian, K * K float64 are held twice over while it is factored, once in float32
    after that, and 4 * K * min(N, 2048) float32 for
    the rows at work.

    Args:
        w: float32 [N, K], finite.
        scheme: the scheme.
        hessian: second moments of the inputs. If it is crossed, `Hessian.target` is rounded.
        damping: added to H's diagonal, in parts of its mean.
        act_order: columns with large inputs first; groups are kept together, so a group's scale
            can still be found when it is come to.
        block: columns rounded together where no group says so, and that the errors made so far
            are gathered for at once.
        sweeps: times that all blocks are rounded again after the first pass.
        signed_scales: let scales of groups be negative, so that the level which has no opposite,
            as -8 of 4 bits, can serve the largest weights of either sign.
        name: the tensor, for messages.
        params: the scale of the tensor ("tensor"), where ``w`` is only a part of it.
        palette: int8 [2**bits], the same; found if the scheme has a codebook and there is none.

    Raises:
        SchemeError: a scale is beyond float16.
        UsageError: an option out of range; or a Hessian of another width, without tokens, or too
            singular for the damping.
    """
    k = w.shape[1]
    _check(k, hessian, damping, block, sweeps, name)
    wanted = _Wanted(
        hessian.target(w), scheme, hessian.diagonal, name, params, palette, signed_scales
    )
    segments = _segments(hessian.diagonal, scheme.group_size, block, act_order)
    try:
        mix, coming, again = hessian.once(
            (damping, scheme.group_size, block, act_order, sweeps > 0),
            lambda: (
                *_coming(hessian, damping, segments),
                _alone(hessian, damping, segments) if sweeps else [],
            ),
        )
    except np.linalg.LinAlgError as err:
        raise UsageError(
            f"the Hessian of {name}'s inputs is too singular for a damping of {damping}; "
            "use a larger one (0.01 is usual), or more text"
        ) from err
    parts = []
    for groups in wanted.chunks:
        params = wanted.params(groups)
        rows = _Rows(groups, k, wanted.grid, params)
        rows.pass_on(mix, coming, block)
        for near in NEAR_ROWS if scheme.granularity == "channel" else ():
            assert params is not None
            scales = snap_scales(params.scales * np.float32(near), name)
            other = _Rows(groups, k, wanted.grid, replace(params, scales=scales))
            other.pass_on(mix, coming, block)
            rows.improve(other)
        for _ in range(sweeps):
            rows.sweep(again, hessian.matrix, ridge(hessian.matrix, damping))
        parts.append(rows.result())
    codes = np.concatenate([part for part, _ in parts])
    scales = np.concatenate([taken.scales for _, taken in parts])
    zeros = [taken.zero_points for _, taken in parts if taken.zero_points is not None]
    zero_points = np.concatenate(zeros) if zeros else None
    return QuantRows(codes, WeightParams(scales, zero_points, wanted.grid.palette))


def _check(k: int, hessian: Hessian, damping: float, block: int, sweeps: int, name: str) -> None:
    if len(hessian.matrix) != k:
        raise UsageError(
            f"the Hessian is of inputs {len(hessian.matrix)} wide and {name} has rows of {k} "
            "weights; was it measured on another model?"
        )
    if not hessian.n:
        raise UsageError(f"no inputs of {name} were seen; calibrate with at least one token")
    if not 0 <= damping < np.inf:
        raise UsageError(f"damping is {damping}; use 0 or more (0.01 is usual)")
    if block < 1:
        raise UsageError(f"block is {block}; use at least 1 column (128 is usual)")
    if sweeps < 0:
        raise UsageError(f"sweeps is {sweeps}; use 0 or more")


class _Wanted:
    """The weights to come near to, in chunks of rows, and what is found before any is rounded."""

    def __init__(
        self,
        w: Array,
        scheme: QuantScheme,
        diagonal: Array,
        name: str,
        params: WeightParams | None,
        palette: NDArray[np.int8] | None,
        signed: bool,
    ) -> None:
        self.chunks = [group_view(w[a : a + ROWS], scheme) for a in range(0, len(w), ROWS)]
        self._importance = importance(diagonal, scheme)
        if scheme.codebook and palette is None:
            palette = find_palette(self.chunks, scheme, name, self._importance)
        self.grid = Grid(scheme, palette, name, signed)
        self._shared = params
        if scheme.granularity == "tensor" and params is None:
            self._shared = self._fit(self.chunks)

    def params(self, groups: Groups) -> WeightParams | None:
        """Scales of rows or of the tensor; None for groups, which are fitted one by one."""
        if self.grid.scheme.granularity == "group":
            return None
        return self._shared or self._fit([groups])

    def _fit(self, chunks: list[Groups]) -> WeightParams:
        grid = self.grid
        return fit_mse(
            chunks, grid.scheme, grid.name, Scratch(),
            importance=self._importance, palette=grid.palette,
        )  # fmt: skip


def importance(diagonal: Array, scheme: QuantScheme) -> Groups:
    """How much a squared error of each weight of a row counts, for scales and palettes.

    Args:
        diagonal: mean squares of the inputs, float32 [K].
        scheme: says how rows are cut into groups.

    Returns:
        float32 [1, G, S]; 0 for padding.
    """
    # a weight that no input ever met must not be without any say in its scale
    live = np.maximum(diagonal, np.float32(1e-6) * diagonal.max() or np.float32(1))
    return group_view(live[None], scheme)


def _segments(
    diagonal: Array, group_size: int | None, block: int, act_order: bool
) -> list[NDArray[np.intp]]:
    """Columns that are rounded together, in the order they are rounded in."""
    k = len(diagonal)
    if group_size is None:
        order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(k)
        return [order[a : a + block] for a in range(0, k, block)]
    groups = [np.arange(a, min(a + group_size, k)) for a in range(0, k, group_size)]
    if act_order:
        groups = [part[np.argsort(-diagonal[part], kind="stable")] for part in groups]
        groups.sort(key=lambda part: -total(diagonal[part]))
    return groups


def _coming(
    hessian: Hessian, damping: float, segments: list[NDArray[np.intp]]
) -> tuple[Array, list[Block]]:
    """M in the order of rounding, and blocks of columns that all later ones make up for."""
    matrix, order = damped(hessian.matrix, damping), np.concatenate(segments)
    if (np.diff(order) != 1).any():
        matrix = matrix[np.ix_(order, order)]
    factor = Factor.of(matrix)
    blocks, start = [], 0
    for columns in segments:
        part = slice(start, start + len(columns))
        mix = factor.mix[part, part]
        pull = upper_inverse(mix).T.astype(np.float32)
        blocks.append(Block(columns, np.ascontiguousarray(mix.T), factor.pivots[part], pull))
        start = part.stop
    return factor.mix, blocks


def _alone(hessian: Hessian, damping: float, segments: list[NDArray[np.intp]]) -> list[Block]:
    """Columns that are rounded while all others stay what they are."""
    blocks = []
    for columns in segments:
        part = hessian.matrix[np.ix_(columns, columns)].astype(np.float64)
        part[np.diag_indices(len(part))] += ridge(hessian.matrix, damping)
        root = upper_root(part)
        roots = np.diagonal(root).copy()
        inverse = upper_inverse(root)
        pull = product(inverse.T, inverse.T).astype(np.float32)
        mix = np.ascontiguousarray((root / roots).T, np.float32)
        blocks.append(Block(columns, mix, np.square(roots).astype(np.float32), pull))
    return blocks


class _Rows:
    """Some rows at work: columns first, rows along the last axis.

    Args:
        groups: the weights to come near to, float32 [R, G, S], padding included.
        k: columns without padding.
        grid: the levels there are.
        params: scales found before; None to find each group's when it is come to.
    """

    def __init__(self, groups: Groups, k: int, grid: Grid, params: WeightParams | None) -> None:
        r, g, self._size = groups.shape
        self._k, self._grid, self._searched = k, grid, params is None
        self._r, r = r, -(-r // ROWS_OF_A_VECTOR) * ROWS_OF_A_VECTOR
        self._wanted = np.zeros((k, r), np.float32)
        self._wanted[:, : self._r] = groups.reshape(self._r, -1)[:, :k].T
        self._levels = np.zeros_like(self._wanted)
        self._error = np.zeros_like(self._wanted)
        self._cost = np.zeros(r, np.float32)
        if params is None:
            # stays so for groups of nothing but padding
            empty = np.zeros((self._r, g), np.float32)
            params = from_range(empty, empty, grid.scheme, grid.name, grid.palette)
        self._scales = np.ones((g, r), np.float32)
        self._scales[:, : self._r] = np.broadcast_to(params.scales, (len(groups), g)).T
        self._zeros: Array | None = None
        if params.zero_points is not None:
            self._zeros = np.zeros((g, r), np.float32)
            self._zeros[:, : self._r] = np.broadcast_to(params.zero_points, (len(groups), g)).T

    def pass_on(self, mix: Array, blocks: list[Block], block: int) -> None:
        """The first pass: errors are passed on to the columns that come later.

        Args:
            mix: M of the Hessian in the order of the blocks, float32 [K, K].
            blocks: columns rounded together.
            block: columns that the errors made so far are gathered for at once, at least.
        """
        error = np.empty_like(self._error)  # in the order of rounding
        start = first = last = 0
        gathered = error[:0]
        for part in blocks:
            columns, stop = part.columns, start + len(part.columns)
            if stop > last:
                first, last = start, max(stop, min(start + block, self._k))
                gathered = product(mix[:first, first:last].T, error[:first].T)
            passed = gathered[start - first : stop - first]
            product(mix[first:start, start:stop].T, error[first:start].T, passed, accumulate=True)
            target = self._wanted[columns]
            product(part.pull, passed.T, target, accumulate=True)
            if self._searched:
                choice = search(target, part, self._grid, *candidates(target, self._grid))
            else:
                choice = search(target, part, self._grid, *self._params(columns), refits=0)
            self._take(choice, columns)
            self._cost += choice.cost
            error[start:stop] = self._error[columns]
            start = stop

    def improve(self, other: _Rows) -> None:
        """Take over the rows whose first pass cost less in ``other``."""
        wins = other._cost < self._cost
        mine = (self._levels, self._error, self._scales, self._cost)
        its = (other._levels, other._error, other._scales, other._cost)
        for array, better in zip(mine, its, strict=True):
            np.copyto(array, better, where=wins)

    def sweep(self, blocks: list[Block], matrix: Array, extra: float) -> None:
        """Round every block again, against the errors of all others.

        Args:
            blocks: how errors count while all others stay.
            matrix: H, float32 [K, K].
            extra: what is added to its diagonal.
        """
        for part in blocks:
            columns = part.columns
            error = self._error[columns]
            passed = product(matrix[columns], self._error.T)
            passed += np.float32(extra) * error
            target = self._wanted[columns] - error
            product(part.pull, passed.T, target, accumulate=True)
            scales, zeros = self._params(columns[:1] if self._searched else columns)
            start = priced(self._levels[columns], scales, zeros, target, part)
            refits = 0
            if self._searched:
                near = [snap_scales(scales * factor, self._grid.name) for factor in NEAR]
                scales = np.concatenate([scales, *near])
                zeros = None if zeros is None else np.repeat(zeros, len(scales), axis=0)
                refits = REFITS
            self._take(search(target, part, self._grid, scales, zeros, start, refits), columns)

    def result(self) -> tuple[NDArray[np.uint8], WeightParams]:
        """Codes [R, K], and parameters [R, G]."""
        scheme = self._grid.scheme
        rows = slice(self._r)
        zeros = None if self._zeros is None else self._zeros.T[rows].astype(np.uint8)
        params = WeightParams(np.ascontiguousarray(self._scales.T[rows]), zeros, self._grid.palette)
        levels = group_view(np.ascontiguousarray(self._levels.T[rows]), scheme)
        return to_codes(levels, params, scheme)[:, : self._k], params

    def _params(self, columns: NDArray[np.intp]) -> tuple[Array, Array | None]:
        groups = columns // self._size
        return self._scales[groups], None if self._zeros is None else self._zeros[groups]

    def _take(self, choice: Choice, columns: NDArray[np.intp]) -> None:
        self._levels[columns] = choice.levels
        self._error[columns] = self._wanted[columns] - choice.levels * choice.scales
        if self._searched:
            group = columns[0] // self._size
            self._scales[group] = choice.scales[0]
            if self._zeros is not None and choice.zeros is not None:
                self._zeros[group] = choice.zeros[0]
