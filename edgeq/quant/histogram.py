"""Counts of samples in bins, and the error of rounding what they count."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, UsageError

Samples = NDArray[np.float32]
Range = tuple[float, float]

BINS = 2048
"""Bins over the first piece's range; more are added as the range grows."""
MAX_BINS = 8192
"""Past so many, neighboring bins are merged."""
LEVELS = 255
"""Steps from the lowest to the highest of 8 bits."""
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
        self.counts += np.histogram(x, self.counts.size, range=(-edge, edge))[0]

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


def squared_error(
    counts: NDArray[np.float64], edges: NDArray[np.float64], ends: Range, levels: int = LEVELS
) -> float:
    """Sum of squared errors of a histogram's values in a range of evenly spaced levels.

    Args:
        counts: float64 [bins], each bin's values evenly spread over it.
        edges: float64 [bins + 1].
        ends: low <= 0 <= high, not both 0; zero is a level.
        levels: steps from end to end.
    """
    step = (ends[1] - ends[0]) / levels
    u = edges / step
    lowest = np.rint(ends[0] / step)
    highest = lowest + levels
    inside = np.clip(u, lowest - 0.5, highest + 0.5)
    nearest = np.clip(np.rint(inside), lowest, highest)
    # integral of (u - nearest)^2 from 0: 1/12 for each whole level passed, and the cube of the
    # rest; beyond the last level that rest goes on growing
    rest = u - nearest
    integral = nearest / 12 + rest * rest * rest / 3
    return float(counts @ np.diff(integral) * step**3 / (edges[1] - edges[0]))
