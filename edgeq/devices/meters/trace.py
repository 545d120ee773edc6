"""A trace: the values of a sensor over time, and the energy that they add up to."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import DeviceError, FormatError
from edgeq.devices.energy import (
    Energy,
    TimeWindow,
    count_inside,
    joules_of_counter,
    joules_of_power,
)
from edgeq.devices.meters.base import PLAUSIBLE, Reading, Sensor

Series = tuple[NDArray[np.int64], NDArray[np.float64], dict[str, int]]

Clock = Literal["monotonic", "unix", "own"]
"""What the times of a trace count from: this machine's start (`time.monotonic_ns`), 1970, or
something that only the meter knows."""

TELLS_APART = 1e-4
"""Share of a window's energy below which the energy above idle is not a measurement."""


@dataclass(frozen=True)
class Trace:
    """Samples of one sensor.

    Args:
        sensor: what was read.
        t_ns: [S] int64 nanoseconds, ascending.
        values: channel -> [S] float64 as read, nan where the channel gave nothing.
        problems: what went wrong while reading -> how often.
        clock: what the times count from.
        windows: stretches of time that came with the samples, on the same clock.
    """

    sensor: Sensor
    t_ns: NDArray[np.int64]
    values: Mapping[str, NDArray[np.float64]]
    problems: Mapping[str, int] = field(default_factory=dict)
    clock: Clock = "monotonic"
    windows: tuple[TimeWindow, ...] = ()

    @classmethod
    def of(
        cls,
        sensor: Sensor,
        samples: Iterable[Reading],
        problems: Mapping[str, int] | None = None,
        clock: Clock = "monotonic",
    ) -> Trace:
        """A trace of samples in any order; their problems are counted with those given."""
        ordered = sorted(samples, key=lambda sample: sample.t_ns)
        channels = list(dict.fromkeys(c for sample in ordered for c in sample.values))
        counted = Counter(problems or {})
        counted.update(p for sample in ordered for p in sample.problems)
        values = {
            c: np.array([sample.values.get(c, math.nan) for sample in ordered], np.float64)
            for c in channels
        }
        t_ns = np.array([sample.t_ns for sample in ordered], np.int64)
        return cls(sensor, t_ns, values, dict(counted), clock)

    def series(self, channel: str) -> Series:
        """The samples of a channel that may be believed.

        Values that are not numbers, or that no device can have, are left out. The turns of an
        energy counter are undone; one that falls, or leaps by more than any device draws, is
        left out until it is back where it must be.

        Returns:
            times [S] int64, values [S] float64, and what was left out -> how often; shared by
            all who ask, so not to be changed.
        """
        if channel not in self._believed:
            self._believed[channel] = self._series(channel)
        return self._believed[channel]

    @cached_property
    def _believed(self) -> dict[str, Series]:
        """Results of `series`, kept because every window reads all channels."""
        return {}

    def _series(self, channel: str) -> Series:
        raw = self.values.get(channel, np.full(self.t_ns.shape, math.nan))
        low, high = PLAUSIBLE[self.sensor.quantity]
        there = ~np.isnan(raw)
        good = there & (raw >= low) & (raw <= high) & np.isfinite(raw)
        left_out = Counter(
            f"{channel}: {_shown(value)} {self.sensor.unit} is not possible"
            for value in raw[there & ~good]
        )
        t_ns, values = self.t_ns[good], raw[good]
        if self.sensor.quantity == "energy":
            keep, values = _rising(t_ns, values, self.sensor.wraps.get(channel))
            if fell := int((~keep).sum()):
                left_out[f"{channel}: the counter fell, or leapt further than is possible"] = fell
            t_ns = t_ns[keep]
        return t_ns, values, dict(left_out)

    def energy(
        self,
        window: TimeWindow,
        *,
        idle: TimeWindow | float | None = None,
        channel: str | None = None,
    ) -> Energy:
        """The energy of a window, or why it is unknown.

        Args:
            window: on this trace's clock; nothing outside it counts.
            idle: a window of doing nothing, or its watts, to be subtracted.
            channel: one channel instead of the sensor's total.
        """
        drawn, watts, reason = None, None, None
        try:
            channels = self._total(channel)
            drawn = sum(self._joules(c, window) for c in channels)
            if isinstance(idle, TimeWindow):
                watts = sum(self._joules(c, idle) for c in channels) / idle.seconds
            elif idle is not None:
                watts = idle
            gross = drawn
            if gross == 0 and self.sensor.quantity == "energy":
                raise DeviceError(
                    f"the counter stood still during {window}: it does not count here, or its "
                    "steps are too coarse; measure for longer"
                )
            drawn -= (watts or 0.0) * window.seconds
            if idle is not None and abs(drawn) <= TELLS_APART * gross:
                raise DeviceError(
                    f"{window} drew the same power as the idle {watts:.4g} W that was to be "
                    "subtracted: this meter does not tell the load from idle"
                )
            if drawn < 0:
                raise DeviceError(
                    f"{window} drew {-drawn / window.seconds:.4g} W less than the idle power of "
                    f"{watts:.4g} W that was to be subtracted; measure idle again"
                )
        except DeviceError as err:
            drawn, watts = None, None
            reason = f"{self.sensor.name}: " + "; ".join([str(err), *self._troubles()])
        return Energy(
            drawn,
            reason,
            seconds=window.seconds,
            meter=self.sensor.name,
            provenance=self.sensor.provenance,
            covers=channel or self.sensor.covers,
            samples=count_inside(self.t_ns, window),
            rate_hz=self.sensor.rate_hz,
            idle_watts=watts,
            problems=self._troubles(),
        )

    def within(self, window: TimeWindow) -> Trace:
        """The samples inside a window."""
        inside = (self.t_ns >= window.start_ns) & (self.t_ns <= window.end_ns)
        values = {c: v[inside] for c, v in self.values.items()}
        return replace(self, t_ns=self.t_ns[inside], values=values, windows=())

    def shifted(self, by_ns: int, clock: Clock) -> Trace:
        """The same trace on another clock, which shows `by_ns` more."""
        windows = tuple(
            TimeWindow(w.label, w.start_ns + by_ns, w.end_ns + by_ns) for w in self.windows
        )
        return replace(self, t_ns=self.t_ns + by_ns, clock=clock, windows=windows)

    def to_json(self) -> dict[str, Any]:
        """A form that JSON can hold: nothing left out, missing values None."""
        return {
            **asdict(self.sensor.described()),
            "total": list(self.sensor.total),
            "unit": self.sensor.unit,
            "clock": self.clock,
            "t_ns": self.t_ns.tolist(),
            "values": {
                c: [v if math.isfinite(v) else None for v in row.tolist()]
                for c, row in self.values.items()
            },
            "problems": dict(self.problems),
            "windows": [[w.label, w.start_ns, w.end_ns] for w in self.windows],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trace:
        """The trace that `to_json` wrote.

        Raises:
            FormatError: something is missing or of the wrong kind.
        """
        try:
            about = {f.name: data[f.name] for f in fields(Sensor)}
            about["total"] = tuple(about["total"])
            return cls(
                Sensor(**about),
                np.array(data["t_ns"], np.int64),
                {c: np.array(row, np.float64) for c, row in data["values"].items()},
                dict(data["problems"]),
                data["clock"],
                tuple(TimeWindow(*window) for window in data["windows"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as err:
            raise FormatError(f"not a trace of a meter: {type(err).__name__} {err}") from err

    def _total(self, channel: str | None) -> tuple[str, ...]:
        if self.sensor.quantity not in ("power", "energy"):
            raise DeviceError(f"measures {self.sensor.quantity}, not power or energy")
        if channel is None and not self.sensor.total:
            raise DeviceError(
                f"none of its channels is the whole; ask for one of {', '.join(self.values)}"
            )
        return self.sensor.total if channel is None else (channel,)

    def _joules(self, channel: str, window: TimeWindow) -> float:
        t_ns, values, _ = self.series(channel)
        of = joules_of_counter if self.sensor.quantity == "energy" else joules_of_power
        return of(t_ns, values, window, self.sensor.rate_hz)

    def _troubles(self) -> tuple[str, ...]:
        counts = Counter(self.problems)
        for channel in self.sensor.total or self.values:
            counts.update(self.series(channel)[2])
        return tuple(f"{text} ({n} times)" if n > 1 else text for text, n in counts.items())


def _shown(value: float) -> str:
    """A few digits, so that noise makes few different complaints."""
    return f"{value:.1g}" if math.isfinite(value) else str(value)


def _rising(
    t_ns: NDArray[np.int64], joules: NDArray[np.float64], wraps: float | None
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Which samples of a counter may be believed, and those with its turns undone."""
    most = PLAUSIBLE["power"][1]
    steps, waits = np.diff(joules), np.diff(t_ns) / 1e9
    if bool(((steps >= 0) & (steps <= most * waits)).all()):  # long traces are mostly so
        return np.ones(joules.shape, bool), joules
    keep = np.zeros(joules.shape, bool)
    rose: list[float] = []
    before = 0  # the last sample that was believed
    for i in range(len(joules)):
        step = 0.0 if i == 0 else float(joules[i] - joules[before])
        if step < 0 and wraps:
            step += wraps
        seconds = max(int(t_ns[i] - t_ns[before]), 1_000_000) / 1e9
        if 0 <= step <= most * seconds:
            keep[i], before = True, i
            rose.append((rose[-1] if rose else float(joules[0])) + step)
    return keep, np.array(rose, np.float64)
