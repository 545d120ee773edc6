"""Energy of a window of time from samples of power or of an energy counter.

Only what lies between the window's edges counts: values there are interpolated. What the samples
cannot tell is an `Energy` without joules and with the reason, never a zero.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import DeviceError, UsageError

MIN_SAMPLES = 3
"""Samples that must lie inside a window before its energy is believed."""

LATE = 1.5
"""Sample periods that may pass before the time until the next sample counts as unseen."""

UNSEEN = 0.05
"""The part of a window that may be unseen."""

MANY_REASONS = 2
"""Reasons for missing repeats that are listed in full."""


@dataclass(frozen=True)
class TimeWindow:
    """A stretch of time, on the clock of the trace it is applied to.

    Args:
        label: what happened then, as in "decode".
        start_ns: nanoseconds.
        end_ns: nanoseconds, after the start.
    """

    label: str
    start_ns: int
    end_ns: int

    def __post_init__(self) -> None:
        if self.end_ns <= self.start_ns:
            raise UsageError(
                f"the window {self.label!r} ends at {self.end_ns} ns and starts at "
                f"{self.start_ns} ns; it must end later than it starts"
            )

    @property
    def seconds(self) -> float:
        """How long it is."""
        return (self.end_ns - self.start_ns) / 1e9

    def __str__(self) -> str:
        return f"{self.label} ({self.seconds:.3g} s)"


@dataclass(frozen=True)
class Energy:
    """The energy of a window, or the reason why it is unknown.

    Args:
        joules: energy of the window, above idle where idle was subtracted; None if unknown.
        reason: why it is unknown; None if it is known.
        seconds: length of the window.
        meter: name of the meter; None if there was none.
        provenance: where its values come from; None if there was no meter.
        covers: the part of the device whose power the meter measures.
        samples: samples inside the window.
        rate_hz: nominal samples per second of the meter; None without a meter.
        idle_watts: power that was subtracted; None if none was.
        problems: errors while sampling that did not make the energy unknown.
    """

    joules: float | None
    reason: str | None
    seconds: float
    meter: str | None = None
    provenance: str | None = None
    covers: str | None = None
    samples: int = 0
    rate_hz: float | None = None
    idle_watts: float | None = None
    problems: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.joules is None) == (self.reason is None):
            raise UsageError(
                f"an energy has joules or the reason why not, got {self.joules} and {self.reason!r}"
            )
        if self.joules is not None and not math.isfinite(self.joules):
            raise UsageError(f"an energy of {self.joules} J; give None and a reason instead")

    @property
    def mean_watts(self) -> float | None:
        """Joules per second of the window; above idle where idle was subtracted."""
        return None if self.joules is None else self.joules / self.seconds


@dataclass(frozen=True)
class PerToken:
    """Joules per token over repeats.

    Args:
        mean: mean of the repeats that were measured; None if none was.
        std: sample standard deviation; None with fewer than two.
        samples: joules per token of each repeat; None where it was not measured.
        reason: why repeats are missing; None if none is.
    """

    mean: float | None
    std: float | None
    samples: tuple[float | None, ...]
    reason: str | None


def per_token(energies: Sequence[Energy], tokens: Sequence[int]) -> PerToken:
    """Joules per token: mean and standard deviation over repeats.

    Args:
        energies: of each repeat.
        tokens: that each repeat read or generated, positive.

    Raises:
        UsageError: not as many counts as energies, or a count that is not positive.
    """
    if len(energies) != len(tokens) or min(tokens, default=1) < 1:
        raise UsageError(
            f"{len(energies)} energies and token counts {list(tokens)}; "
            "give one positive count for each"
        )
    samples = tuple(
        None if e.joules is None else e.joules / n for e, n in zip(energies, tokens, strict=True)
    )
    known = [s for s in samples if s is not None]
    reasons = list(dict.fromkeys(e.reason for e in energies if e.reason is not None))
    if len(reasons) > MANY_REASONS:
        more = len(reasons) - MANY_REASONS
        reasons = [*reasons[:MANY_REASONS], f"{more} more of the kind in other repeats"]
    if not energies:
        reasons = ["nothing was run"]
    return PerToken(
        statistics.fmean(known) if known else None,
        statistics.stdev(known) if len(known) > 1 else None,
        samples,
        "; ".join(reasons) or None,
    )


def joules_of_power(
    t_ns: NDArray[np.int64], watts: NDArray[np.float64], window: TimeWindow, rate_hz: float
) -> float:
    """Energy of a window from power at moments, by the trapezoidal rule.

    Args:
        t_ns: [S] times, ascending.
        watts: [S] power at them.
        window: where to integrate; the values at its edges are interpolated.
        rate_hz: samples per second that were meant to come.

    Raises:
        DeviceError: too few samples, or too much of the window unseen.
    """
    t = _seconds(t_ns, window)
    grid = _grid(t, window)
    unseen = np.maximum(np.diff(_bracketed(t, grid)) - LATE * _period(t, rate_hz), 0).sum()
    _believe(float(unseen), t, window)
    value = np.interp(grid, t, watts)
    return float(((value[1:] + value[:-1]) / 2 * np.diff(grid)).sum())


def joules_of_counter(
    t_ns: NDArray[np.int64], joules: NDArray[np.float64], window: TimeWindow, rate_hz: float
) -> float:
    """Energy of a window from a counter that only rises.

    Args:
        t_ns: [S] times, ascending.
        joules: [S] the counter at them, turns already undone.
        window: whose difference is wanted; the counter at its edges is interpolated.
        rate_hz: samples per second that were meant to come.

    Raises:
        DeviceError: too few samples, or the counter is unknown near an edge.
    """
    t = _seconds(t_ns, window)
    late = LATE * _period(t, rate_hz)
    # a hole in the middle costs a counter nothing; one at an edge makes the edge's value a guess
    ends = (_around(t, 0.0), _around(t, window.seconds))
    _believe(sum(max(end - late, 0.0) for end in ends), t, window)
    first, last = max(t[0], 0.0), min(t[-1], window.seconds)
    drawn = np.interp(last, t, joules) - np.interp(first, t, joules)
    return float(drawn * window.seconds / (last - first))  # edges just outside: at the mean rate


def count_inside(t_ns: NDArray[np.int64], window: TimeWindow) -> int:
    """Samples inside a window."""
    return int(((t_ns >= window.start_ns) & (t_ns <= window.end_ns)).sum())


def _seconds(t_ns: NDArray[np.int64], window: TimeWindow) -> NDArray[np.float64]:
    """[S] seconds since the window began; refuses fewer samples inside than are needed."""
    inside = count_inside(t_ns, window)
    if inside < MIN_SAMPLES:
        raise DeviceError(
            f"{inside} samples in the {window.seconds:.3g} s of {window.label}; "
            f"at least {MIN_SAMPLES} are needed: measure for longer"
        )
    return (t_ns - window.start_ns) / 1e9


def _grid(t: NDArray[np.float64], window: TimeWindow) -> NDArray[np.float64]:
    """The window's edges and the samples between them."""
    within = t[(t > 0) & (t < window.seconds)]
    return np.concatenate(([0.0], within, [window.seconds]))


def _bracketed(t: NDArray[np.float64], grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """The grid, its edges moved to the samples outside that they are interpolated from."""
    moved = grid.copy()
    if t[0] <= grid[0]:
        moved[0] = t[t <= grid[0]][-1]
    if t[-1] >= grid[-1]:
        moved[-1] = t[t >= grid[-1]][0]
    return moved


def _around(t: NDArray[np.float64], edge: float) -> float:
    """Seconds between the two samples around an edge, or from the edge to the nearest sample."""
    before, after = t[t <= edge], t[t >= edge]
    if before.size and after.size:
        return float(after[0] - before[-1])
    return float(np.abs(t - edge).min())


def _period(t: NDArray[np.float64], rate_hz: float) -> float:
    """Seconds between samples: as configured, or as measured if the meter is slower."""
    return max(1 / rate_hz, float(np.median(np.diff(t))))


def _believe(unseen: float, t: NDArray[np.float64], window: TimeWindow) -> None:
    if unseen > UNSEEN * window.seconds:
        raise DeviceError(
            f"no good sample for {unseen:.3g} s of the {window.seconds:.3g} s of {window.label} "
            f"(samples from {t[0]:.3g} s to {t[-1]:.3g} s after its start)"
        )
