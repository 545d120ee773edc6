"""Observers: samples of a value go in, the range to quantize it with comes out.

An observer is given samples piece by piece and holds no more than a histogram of them. Its range
always includes zero.

    minmax          all values
    moving-average  the mean of each piece's smallest and largest value, recent ones counting more
    percentile      the middle 99.99 % of the values
    entropy         the range whose coarse histogram has the least KL divergence from the fine one
    mse             the range that gives the least squared error when values are rounded to 8 bits

Percentile and entropy are defined as ONNX Runtime's calibrators define them, down to the edges of
the bins, so that ranges can be compared with its tools. Where the histogram would grow past
`MAX_BINS`, as theirs does without bound, bins are merged and thresholds agree to the wider bin.

Source: MXNet and TensorRT's entropy calibration (Migacz 2017, "8-bit inference with TensorRT");
onnxruntime.quantization.calibrate for the details.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import UsageError, unknown
from edgeq.quant.histogram import (
    BINS,
    LEVELS,
    NOTHING,
    TINY,
    ErrorsBehind,
    Function,
    Histogram,
    Range,
    Samples,
    extremes,
    squared_errors,
)

AVERAGING = 0.1
"""The weight of a new piece in the moving average."""
COARSE_BINS = 128
"""Bins of the histogram whose divergence from the fine one is minimized."""
_SHRINKS = 2.0 ** -(np.arange(161) / 16)
"""Ranges that are tried, as parts of the whole: down to 1/1024 in steps of 4 %."""
_COARSE = 8
"""Steps between the ranges that are tried first."""


class Observer(Protocol):
    """What all observers have."""

    def add(self, x: Samples) -> None:
        """Take samples of any shape into account.

        Raises:
            FormatError: one is NaN or infinite.
        """

    def range(self) -> Range:
        """The smallest and the largest value to represent: low <= 0 <= high.

        Raises:
            UsageError: there were no samples.
        """


class MinMax:
    """The range of all values."""

    def __init__(self) -> None:
        self._seen: Range | None = None

    def add(self, x: Samples) -> None:
        """Take samples of any shape into account."""
        if x.size:
            self._seen = self._joined(*map(float, extremes(x)))

    def range(self) -> Range:
        """The smallest and the largest value, zero included."""
        if self._seen is None:
            raise UsageError(NOTHING)
        return _with_zero(*self._seen)

    def _joined(self, low: float, high: float) -> Range:
        before = self._seen or (low, high)
        return min(low, before[0]), max(high, before[1])


class MovingAverage(MinMax):
    """The mean of each piece's extremes: new = old + constant * (piece - old).

    One outlier moves it by a part only, and the first piece is forgotten after some dozen more.

    Args:
        constant: the weight of a new piece.
    """

    def __init__(self, *, constant: float = AVERAGING) -> None:
        super().__init__()
        if not 0 < constant <= 1:
            raise UsageError(f"the averaging constant is {constant}; it must be in (0, 1]")
        self._constant = constant

    def _joined(self, low: float, high: float) -> Range:
        before = self._seen or (low, high)
        return (
            before[0] + self._constant * (low - before[0]),
            before[1] + self._constant * (high - before[1]),
        )


class Percentile:
    """The range that holds a percentage of the values, as much being cut off on either side.

    Args:
        percentile: of values to keep.
        bins: of the histogram.
    """

    def __init__(self, *, percentile: float = 99.99, bins: int = BINS) -> None:
        if not 0 < percentile <= 100:
            raise UsageError(f"percentile is {percentile}; it must be in (0, 100]")
        self._kept = percentile / 100
        self._histogram = Histogram(bins)

    def add(self, x: Samples) -> None:
        """Take samples of any shape into account."""
        self._histogram.add(x)

    def range(self) -> Range:
        """Edges of the bins in which the percentage is reached, within what was seen."""
        h = self._histogram
        edges, counts = h.edges(), h.counts
        cumulative = np.cumsum(counts / counts.sum())
        cut = (1 - self._kept) / 2
        low = edges[np.searchsorted(cumulative, cut)]
        # rounding may leave the last sum a little below one
        high = edges[min(int(np.searchsorted(cumulative, 1 - cut)), counts.size)]
        return _with_zero(max(low, float(h.low)), min(high, float(h.high)))


class Entropy:
    """The range whose coarse histogram diverges least from the fine one.

    Every range symmetric about zero is tried that is at least as many bins wide as there are
    coarse ones. What lies outside counts with the outermost bins of the fine histogram, and not
    in the coarse one, which is what makes a range that cuts much off a bad one.

    Args:
        bins: of the histogram; at least `COARSE_BINS`.
    """

    def __init__(self, *, bins: int = BINS) -> None:
        self._histogram = Histogram(bins)

    def add(self, x: Samples) -> None:
        """Take samples of any shape into account."""
        self._histogram.add(x)

    def range(self) -> Range:
        """The best range among those tried."""
        h = self._histogram
        edges, counts = h.edges(), h.counts
        middle = counts.size // 2
        halves = range(COARSE_BINS // 2, middle + 1)
        divergences = [self._divergence(counts, middle - i, middle + i + 1) for i in halves]
        i = halves[int(np.argmin(divergences))]
        low, high = edges[middle - i], edges[min(middle + i + 1, counts.size)]
        seen = _with_zero(float(h.low), float(h.high))
        return _with_zero(max(low, seen[0]), min(high, seen[1]))

    def _divergence(self, counts: NDArray[np.int64], start: int, stop: int) -> float:
        inside = counts[start:stop]
        fine = inside.copy()
        fine[0] += counts[:start].sum()
        fine[-1] += counts[stop:].sum()
        merged = inside.size // COARSE_BINS
        even = merged * COARSE_BINS
        coarse = inside[:even].reshape(COARSE_BINS, merged).sum(axis=1)
        coarse[-1] += inside[even:].sum()
        used = np.count_nonzero(fine[:even].reshape(COARSE_BINS, merged), axis=1)
        spread = np.zeros_like(fine)
        # whole numbers, and nothing where nothing is: as the calibrators this agrees with have it
        shares = np.divide(coarse, used, out=np.zeros(COARSE_BINS), where=used > 0)
        spread[:even] = np.repeat(shares.astype(np.int64), merged)
        p, q = _smoothed(fine), _smoothed(spread)
        if p is None or q is None:
            return np.inf
        p, q = p / p.sum(), q / q.sum()
        return float((p * np.log(p / q)).sum())


class LeastSquares:
    """The range with the least squared error of rounding and clipping to 8 bits.

    Within a bin values are taken as evenly spread, so the error of any range is a sum of
    integrals in closed form: of (x - nearest level)^2 inside, of (x - end)^2 outside. First both
    ends are drawn in together, then each alone, twice.

    Args:
        bins: of the histogram.
        levels: steps from end to end; 255 for 8 bits.
        function: what alone is computed of the values, if that is known: the error is then that
            of its results, in 8 bits. A hard swish is zero below -3, so that no level need be
            spent there, however far the values reach.
    """

    def __init__(
        self, *, bins: int = BINS, levels: int = LEVELS, function: Function | None = None
    ) -> None:
        if levels < 1:
            raise UsageError(f"levels is {levels}; use at least 1")
        if function is not None and levels != LEVELS:
            raise UsageError(f"levels is {levels}; behind a function it must be {LEVELS}")
        self._levels = levels
        self._function = function
        self._histogram = Histogram(bins)

    def add(self, x: Samples) -> None:
        """Take samples of any shape into account."""
        self._histogram.add(x)

    def range(self) -> Range:
        """The best range among those tried."""
        h = self._histogram
        h.edges()  # refuses nothing observed
        low, high = _with_zero(float(h.low), float(h.high))
        if high - low <= TINY:
            return low, high

        def plain(pairs: list[Range]) -> NDArray[np.float64]:
            return squared_errors(h, pairs, self._levels)

        errors = plain if self._function is None else ErrorsBehind(h, self._function)

        def best(tried: list[Range]) -> Range:
            """The best of ranges that shrink: of every eighth, then of those around it."""
            places = list(range(0, len(tried), _COARSE))
            found = dict(zip(places, errors([tried[i] for i in places]), strict=True))
            at = min(found, key=found.__getitem__)
            near = range(max(0, at - _COARSE + 1), min(len(tried), at + _COARSE))
            more = [i for i in near if i not in found]
            found |= zip(more, errors([tried[i] for i in more]), strict=True)
            return tried[min(found, key=lambda i: (found[i], i))]

        low, high = best([(low * s, high * s) for s in _SHRINKS])
        for _ in range(2):
            widest = float(h.low), float(h.high)
            high = best([(low, widest[1] * s) for s in _SHRINKS])[1] if high else high
            low = best([(widest[0] * s, high) for s in _SHRINKS])[0] if low else low
        return _with_zero(low, high)


OBSERVERS: dict[str, Callable[[], Observer]] = {
    "minmax": MinMax,
    "moving-average": MovingAverage,
    "percentile": Percentile,
    "entropy": Entropy,
    "mse": LeastSquares,
}
"""Name -> class."""


def observer_named(name: str) -> Observer:
    """A new observer.

    Raises:
        UsageError: there is none of that name; lists the known ones.
    """
    try:
        return OBSERVERS[name]()
    except KeyError:
        raise UsageError(unknown("observer", name, OBSERVERS)) from None


def _with_zero(low: float, high: float) -> Range:
    return min(float(low), 0.0) + 0.0, max(float(high), 0.0)  # + 0.0: no minus zero


def _smoothed(counts: NDArray[np.int64]) -> NDArray[np.float32] | None:
    """Counts with zeros replaced by a small number, which is subtracted from the others."""
    eps = 1e-4
    zeros = counts == 0
    n_zeros = int(zeros.sum())
    if n_zeros == counts.size:
        return None
    smoothed = counts.astype(np.float32)
    smoothed += eps * zeros.astype(np.float32)
    smoothed -= eps * n_zeros / (counts.size - n_zeros) * (~zeros).astype(np.float32)
    return smoothed
