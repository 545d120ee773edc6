"""Counts of samples in bins, and the error of rounding what they count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, UsageError
from edgeq.formats.qparams import QuantParams
from edgeq.quant.kernels.counts import count_in_bins, rounding_sums

Samples = NDArray[np.float32]
Range = tuple[float, float]
Function = Callable[[NDArray[Any]], NDArray[Any]]
"""An elementwise function."""

BINS = 2048
"""Bins over the first piece's range; more are added as the range grows."""
MAX_BINS = 8192
"""Past so many, neighboring bins are merged."""
LEVELS = 255
"""Steps from the lowest to the highest of 8 bits."""
PARTS = 8
"""Parts of a bin in each of which a function is taken as constant."""
TINY = np.float32(1e-30)
"""Samples no larger than this are counted as zeros: bins for them would have no width."""
NOTHING = "nothing was observed; add samples before asking for their range"


def extremes(x: Samples) -> tuple[np.float32, np.float32]:
    """Smallest and largest sample.

    Raises:
        FormatError: one is NaN or infinite.
    """
    low, high = np.float32(x.min()), np.float32(x.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise FormatError(
            f"values from {low} to {high} were observed; they must be finite: "
            "the model's weights are damaged, or its activations overflow"
        )
    return low, high


class Histogram:
    """Counts in evenly wide bins over (-limit, limit), which widens as larger samples come.

    Widening adds bins of the same width on both sides, so no sample changes its bin; only past
    `MAX_BINS` neighbors are merged.

    Args:
        bins: over the first piece; even.

    Attributes:
        counts: int64 [bins].
        limit: where the last bin ends; 0 while all samples are zero.
        low, high: the extremes of all samples.
    """

    def __init__(self, bins: int = BINS) -> None:
        if bins < 2 or bins % 2 or bins > MAX_BINS:
            raise UsageError(f"bins is {bins}; use an even number from 2 to {MAX_BINS}")
        self.counts = np.zeros(bins, np.int64)
        self.limit = np.float32(0)
        self.low = self.high = np.float32(0)
        self._empty = True

    def add(self, x: Samples) -> None:
        """Count samples of any shape.

        Raises:
            FormatError: one is NaN or infinite.
        """
        if not x.size:
            return
        low, high = extremes(x)
        self.low, self.high = (
            (low, high) if self._empty else (min(low, self.low), max(high, self.high))
        )
        self._empty = False
        self._widen(max(-low, high))
        edge = self._edge()
        bins = self.counts.size
        count_in_bins(x, np.linspace(-edge, edge, bins + 1, dtype=np.float32), self.counts)

    def edges(self) -> NDArray[np.float64]:
        """Where the bins begin and end, float64 [bins + 1].

        Raises:
            UsageError: there were no samples.
        """
        if self._empty:
            raise UsageError(NOTHING)
        return np.linspace(-self._edge(), self._edge(), self.counts.size + 1)

    def _edge(self) -> float:
        """Where the last bin ends; anywhere while all samples are zero, and lie in the middle."""
        return float(self.limit) or 1.0

    def _widen(self, wanted: np.float32) -> None:
        if wanted <= max(self.limit, TINY):
            return
        if not self.limit:
            self.limit = wanted
            return
        while True:
            width = 2 * self.limit / np.float32(self.counts.size)
            more = int((wanted - self.limit) // width + 1)
            if self.counts.size + 2 * more <= MAX_BINS:
                break
            self._merge(width)
        self.counts = np.pad(self.counts, more)
        self.limit = more * width + self.limit

    def _merge(self, width: np.float32) -> None:
        """Make two bins one; zero stays between two bins."""
        if self.counts.size % 4:
            self.counts = np.pad(self.counts, 1)
            self.limit = self.limit + width
        self.counts = self.counts.reshape(-1, 2).sum(axis=1)


def squared_errors(
    histogram: Histogram, ranges: Sequence[Range], levels: int = LEVELS
) -> NDArray[np.float64]:
    """Sums of squared errors of a histogram's values in ranges of evenly spaced levels.

    Each bin's values are taken as evenly spread over it, so the error is a sum of integrals of
    (u - nearest)^2, u in steps of the range: from 0 on 1/12 for each whole level passed, and the
    cube of the rest; beyond the last level that rest goes on growing.

    Args:
        histogram: of values.
        ranges: low <= 0 <= high, not both 0; zero is a level.
        levels: steps from end to end.
    """
    edges, used = histogram.edges(), np.nonzero(histogram.counts)[0]
    sums = rounding_sums(
        histogram.counts[used].astype(np.float64), edges[used], edges[used + 1], ranges, levels
    )
    steps = np.array([(high - low) / levels for low, high in ranges])
    errors: NDArray[np.float64] = sums * steps**3 / (edges[1] - edges[0])
    return errors


class ErrorsBehind:
    """Squared errors of a function of a histogram's values, where those are rounded to 8 bits.

    Each bin's values are taken as evenly spread over it, and the function as constant in each of
    its `PARTS` parts: between two bounds of levels, sums of counts and of the function and its
    square are then differences of running sums.

    Args:
        histogram: of values.
        function: what is computed of the values before anything else.
    """

    def __init__(self, histogram: Histogram, function: Function) -> None:
        edges = histogram.edges()
        self._edges = np.linspace(edges[0], edges[-1], PARTS * (edges.size - 1) + 1)
        self._function = function
        counts = np.repeat(histogram.counts / PARTS, PARTS)
        made = function((self._edges[:-1] + self._edges[1:]) / 2)
        self._running = [
            np.concatenate([[0.0], np.cumsum(counts * power)]) for power in (1.0, made, made**2)
        ]

    def __call__(self, ranges: Sequence[Range]) -> NDArray[np.float64]:
        """The sum over all values for each range: low <= 0 <= high."""
        return np.array([self._error(QuantParams.from_range(*ends)) for ends in ranges])

    def _error(self, params: QuantParams) -> float:
        levels = (np.arange(-128, 128) - params.zero_point) * params.scale
        first, last = self._edges[[0, -1]]
        bounds = np.concatenate([[first], (levels[:-1] + levels[1:]) / 2, [last]])
        bounds = np.clip(bounds, first, last)
        n, sums, squares = (np.diff(np.interp(bounds, self._edges, held)) for held in self._running)
        made = self._function(levels)
        return float((squares - 2 * made * sums + made * made * n).sum())
