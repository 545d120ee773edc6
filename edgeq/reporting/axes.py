"""Axes: where a value lies between two ends, and at which values ticks stand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Kind = Literal["linear", "log", "tail"]

TAIL = (0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999)
"""Where a tail axis has ticks."""

FEW = 6
"""Ticks at most that fit a phone beside each other."""


@dataclass(frozen=True)
class Axis:
    """An axis.

    Args:
        label: what its values are, with their unit.
        low, high: values at its ends.
        kind: "log" for powers of ten at equal distances; "tail" for parts of a whole, each nine
            more at equal distances.
    """

    label: str
    low: float
    high: float
    kind: Kind = "linear"

    def at(self, values: ArrayLike) -> NDArray[np.float64]:
        """Where values lie: 0 at the low end, 1 at the high one."""
        low, high = self._scaled([self.low, self.high])
        return np.asarray((self._scaled(values) - low) / (high - low))

    def ticks(self) -> list[tuple[float, str]]:
        """(place, text) of each tick."""
        if self.kind == "tail":
            places: Sequence[float] = [v for v in TAIL if self.low <= v <= self.high]
            texts = [f"{100 * v:g}" for v in places]
        else:
            places = _powers(self.low, self.high) if self.kind == "log" else []
            texts = [short(v) for v in places]
            if len(places) < 2:
                step = _step(self.low, self.high)
                first, last = math.ceil(self.low / step), math.floor(self.high / step)
                places = [n * step for n in range(first, last + 1)]
                texts = [_precise(v, step, max(map(abs, places))) for v in places]
        return [(float(p), text) for p, text in zip(self.at(places), texts, strict=True)]

    def _scaled(self, values: ArrayLike) -> NDArray[np.float64]:
        given = np.asarray(values, np.float64)
        if self.kind == "log":
            return np.log10(given)
        return -np.log10(1 - given) if self.kind == "tail" else given


def around(
    label: str, values: Iterable[float], *, zero: bool = False, log: bool = False
) -> Axis | None:
    """An axis that holds all values with some room; None if there is none to hold.

    Args:
        label: with the unit.
        values: those that are not finite are left out; on a log axis also those not above 0.
        zero: begin at 0, as lengths must.
        log: by powers of ten.
    """
    known = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    if not known:
        return None
    low, high = min(known), max(known)
    if log:
        room = max((high / low) ** 0.08, 1.25)
        return Axis(label, low / room, high * room, "log")
    if zero:
        return Axis(label, min(low, 0.0), max(high, 0.0) * 1.08 or 1.0)
    room = (high - low) * 0.08 or max(abs(high) * 0.05, 1e-9)
    return Axis(label, low - room, high + room)


def short(value: float) -> str:
    """A number in few characters: four digits that count, thousands apart."""
    if not math.isfinite(value):
        return "unknown"
    if abs(value) >= 1e9 or 0 < abs(value) < 1e-4:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def threads_of(count: object) -> str:
    """The number of threads as text: "4 threads"."""
    return f"{count} thread" + ("" if str(count) == "1" else "s")


def _step(low: float, high: float) -> float:
    """1, 2 or 5 times a power of ten, of which few fit between two values."""
    rough = (high - low) / (FEW - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)


def _precise(value: float, step: float, largest: float) -> str:
    """A multiple of a step, with as many digits as tell it from the next."""
    place = math.floor(math.log10(step) + 1e-9)
    if largest >= 1e9 or largest < 1e-4:
        digits = math.floor(math.log10(largest)) - place
        return f"{value:.{max(digits, 0)}e}" if value else "0"
    return f"{value:,.{max(-place, 0)}f}"


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten, with their doubles and fives where those are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for parts in ((1, 2, 5), (1, 3), (1,)):
        powers = [m * 10.0**n for n in range(first, last + 1) for m in parts]
        powers = [v for v in powers if low <= v <= high]
        if len(powers) <= FEW:
            return powers
    every = -(-len(powers) // FEW)
    return powers[::every]
