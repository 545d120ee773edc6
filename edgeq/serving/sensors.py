"""Temperature and power of this machine, for the chat page and the metrics of a server.

A thread reads the sensors, and only if a client asked for them within the last seconds, because
reading some of them starts a process or wakes a device.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from edgeq.core.errors import DeviceError
from edgeq.devices import meters
from edgeq.devices.meters import Meter, Reading
from edgeq.devices.meters.base import PLAUSIBLE

EVERY_S = 2.0
"""Seconds between readings."""
INTEREST_S = 15.0
"""Seconds for which sensors are read after a client asked for them."""


@dataclass(frozen=True)
class SensorState:
    """The latest readings; None for what this machine cannot measure.

    Args:
        temperature_c: temperature of the hottest part of the processor, in degrees Celsius.
        watts: power in watts, from the power meter that covers most of the machine.
        covers: what that power meter measures.
    """

    temperature_c: float | None = None
    watts: float | None = None
    covers: str | None = None


class Sensors:
    """Reads this machine's sensors on demand.

    Args:
        found: meters to read; None finds those of this machine.
    """

    def __init__(self, found: Sequence[Meter] | None = None) -> None:
        self._found = found
        self._asked = threading.Event()
        self._ended = threading.Event()
        self._until = 0.0
        self._state = SensorState()
        self._before: Reading | None = None
        self._thread = threading.Thread(target=self._watch, name="edgeq-sensors", daemon=True)
        self._thread.start()

    def latest(self) -> SensorState:
        """The latest readings. They are available some seconds after the first call."""
        self._until = time.monotonic() + INTEREST_S
        self._asked.set()
        return self._state

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._asked.set()
        self._thread.join(timeout=6)

    def _watch(self) -> None:
        power: Meter | None = None
        heat: list[Meter] = []
        while True:
            self._asked.wait()
            if self._ended.is_set():
                return
            if self._found is None:
                self._found = meters.meters_of(meters.probe())
            if power is None and not heat:
                power = power_meter(self._found)
                heat = [m for m in self._found if m.quantity == "temperature"]
            self._state = SensorState(
                _hottest(heat), self._watts(power), power.covers if power else None
            )
            if time.monotonic() > self._until:
                self._asked.clear()
                self._before = None
            self._ended.wait(EVERY_S)

    def _watts(self, meter: Meter | None) -> float | None:
        if meter is None:
            return None
        try:
            now = meter.read()
        except DeviceError:
            return None
        before, self._before = self._before, now
        return watts(meter, before, now)


def power_meter(found: Sequence[Meter]) -> Meter | None:
    """The meter that covers most of this machine's power; None if there is none."""
    total = [m for m in found if m.quantity in ("power", "energy") and m.total and not m.pushes]
    return next((m for scope in ("board", "package", "rail") for m in total if m.scope == scope),
                None)  # fmt: skip


def watts(meter: Meter, before: Reading | None, now: Reading) -> float | None:
    """Power in watts, from a reading of a power meter or two readings of an energy counter."""
    if not all(channel in now.values for channel in meter.total):
        return None
    if meter.quantity == "power":
        return sum(now.values[channel] for channel in meter.total)
    if before is None or now.t_ns <= before.t_ns:
        return None
    joules = 0.0
    for channel in meter.total:
        if channel not in before.values:
            return None
        risen = now.values[channel] - before.values[channel]
        joules += risen if risen >= 0 else risen + meter.wraps.get(channel, 0.0)
    return joules / ((now.t_ns - before.t_ns) / 1e9) if joules >= 0 else None


def _hottest(heat: Sequence[Meter]) -> float | None:
    values: list[float] = []
    for meter in heat:
        with contextlib.suppress(DeviceError):
            values += meter.read().values.values()
    low, high = PLAUSIBLE["temperature"]
    return max((value for value in values if low <= value <= high), default=None)
