"""Clip search: the scale with the least squared error, though it may cut off the largest weights.

Each group tries its range times a grid of factors, then moves the best scale to the least
squares fit of the levels it gave, ``s = sum(w * level) / sum(level**2)``, as long as that helps.
Scales are compared as they will be stored, and the range of round-to-nearest is the first tried,
so no group comes out worse than with that. Where the mean square of each input is known, errors
are weighted with it: "imatrix".

Source: the search is that of OMSE, Choukroun et al. 2019, "Low-bit quantization of neural
networks for efficient inference" (arXiv:1902.06822), section 3, done for every group.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.schemes import QuantScheme
from edgeq.model.trigonometry import power
from edgeq.quant.kernels.products import row_products, total
from edgeq.quant.rounders.qparams import (
    Groups,
    Scratch,
    WeightParams,
    from_range,
    levels,
    ranges,
    snap_scales,
    squared_error,
    to_levels,
)

LEAST = {2: 0.40, 3: 0.60, 4: 0.70, 5: 0.78, 6: 0.84, 8: 0.90}
"""Bits -> the smallest factor tried on a short group: with fewer levels it pays to cut more."""
LEAST_LONG = {2: 0.10, 3: 0.15, 4: 0.20, 5: 0.30, 6: 0.45, 8: 0.80}
"""The same for a row or tensor, where one outlier may be many times the rest."""
TRIALS, TRIALS_LONG = 14, 20
"""How many factors, in equal ratios."""
REFINEMENTS = 2
"""Least-squares moves after the grid."""


def fit_mse(
    chunks: Iterable[Groups],
    scheme: QuantScheme,
    name: str,
    scratch: Scratch,
    *,
    importance: Groups | None = None,
    palette: NDArray[np.int8] | None = None,
) -> WeightParams:
    """Parameters of least squared error.

    Args:
        chunks: float32 [R, G, S]: one array, or, for granularity "tensor", all the tensor's;
            iterated some 15 to 25 times.
        scheme: the scheme.
        name: the tensor, for messages.
        scratch: working memory.
        importance: float32 [1, G, S], not negative: weights of the squared errors.
        palette: the levels, if the scheme has a codebook.

    Returns:
        Parameters [R, G] ([1, 1] for granularity "tensor").

    Raises:
        SchemeError: a scale is beyond float16.
    """

    def measured(params: WeightParams) -> _Trial:
        return params, *_try(chunks, params, scheme, scratch, importance)

    low, high = ranges(chunks, scheme)
    best = measured(from_range(low, high, scheme, name, palette))
    for shrink in factors(scheme):
        trial = from_range(low * shrink, high * shrink, scheme, name, palette)
        best = _better(best, measured(trial))
    for _ in range(REFINEMENTS):
        params, _, fitted = best
        trial = replace(params, scales=snap_scales(fitted, name))
        best = _better(best, measured(trial))
    return best[0]


def factors(scheme: QuantScheme) -> NDArray[np.float32]:
    """Decreasing factors of the range of round-to-nearest, which is tried as well."""
    short = scheme.granularity == "group"
    least = (LEAST if short else LEAST_LONG)[scheme.bits]
    most = 1.0
    if scheme.symmetric and short and not scheme.codebook:
        # where the lowest level was needed, a scale that leaves it free may serve the rest better
        lowest, highest = levels(scheme)
        most = -lowest / highest
    trials = TRIALS if short else TRIALS_LONG
    return _ratios(most, least, trials)


@cache
def _ratios(first: float, last: float, count: int) -> NDArray[np.float32]:
    """Values from the first to the last in equal ratios."""
    values = [first * power(last / first, i / (count - 1)) for i in range(count)]
    return np.array(values, np.float32)


_Trial = tuple[WeightParams, NDArray[np.float64], NDArray[np.float32]]
"""Parameters, their squared error, and the least-squares scale of the levels they give."""


def _try(
    chunks: Iterable[Groups],
    params: WeightParams,
    scheme: QuantScheme,
    scratch: Scratch,
    importance: Groups | None,
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    shape = params.scales.shape
    error, along, square = np.zeros((3, *shape))
    for w in chunks:
        steps, rounded = to_levels(w, params, scheme, scratch)
        weighted = rounded
        if importance is not None:
            weighted = np.multiply(rounded, importance, out=scratch.like("weighted", w.shape))
        products = row_products(steps, weighted)
        squares = row_products(rounded, weighted)
        errors = squared_error(steps, rounded, params, importance)
        if scheme.granularity == "tensor":
            error += total(errors)
            along += total(products)
            square += total(squares)
        else:
            error, along, square = errors, products, squares
    scales = params.scales.astype(np.float64)
    fitted = scales * np.divide(along, square, out=np.ones(shape), where=square > 0)
    return error, np.maximum(fitted, 0).astype(np.float32)


def _better(best: _Trial, trial: _Trial) -> _Trial:
    """The better of two for each group."""
    wins = trial[1] < best[1]
    zeros = None
    if best[0].zero_points is not None and trial[0].zero_points is not None:
        zeros = np.where(wins, trial[0].zero_points, best[0].zero_points)
    scales = np.where(wins, trial[0].scales, best[0].scales)
    return (
        WeightParams(scales, zeros, best[0].palette),
        np.where(wins, trial[1], best[1]),
        np.where(wins, trial[2], best[2]),
    )
