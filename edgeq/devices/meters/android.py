"""The battery of an Android device, by `dumpsys battery`.

Source: `Charge counter` is microampere-hours left (BatteryManager,
BATTERY_PROPERTY_CHARGE_COUNTER), `voltage` millivolts, `level` of `scale` the share that is left.
What was drawn is the fall of the counter times the voltage. The counter moves in coarse steps:
windows of minutes are needed. Some devices give the counter in other units; those are refused.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from edgeq.core.errors import DeviceError
from edgeq.devices.meters.base import Absent, Meter, Reading, Run, number, run_here
from edgeq.devices.meters.battery import not_discharging
from edgeq.devices.meters.kind import MeterKind

ANDROID = "android-battery"
DUMPSYS = ("dumpsys", "battery")

UAH = 3.6e-3
"""Coulombs per microampere-hour."""

_STATUS = {"1": "unknown", "2": "charging", "3": "discharging", "4": "not charging", "5": "full"}
"""android.os.BatteryManager, BATTERY_STATUS_*."""

CAPACITY_MAH = (50.0, 100_000.0)
"""Capacities of a full battery that a device can have, from a watch to a large tablet."""

LEAST_SHARE = 0.05
"""Charge below which the capacity cannot be inferred from the charge left."""

VOLTS = (2.0, 30.0)
"""Voltages that a battery of one to six cells can have."""


@dataclass(frozen=True, kw_only=True)
class AndroidBattery(Meter):
    """Energy out of an Android device's battery since the first reading.

    Args:
        run: runs a command on the device.
    """

    run: Run
    last: dict[str, float] = field(default_factory=dict, repr=False, compare=False)

    def read(self) -> Reading:
        """Joules drawn so far."""
        start = time.monotonic_ns()
        coulombs, volts = charge(self.run(DUMPSYS))
        middle = (start + time.monotonic_ns()) // 2
        fell = self.last.get("coulombs", coulombs) - coulombs
        if fell < 0:
            self.last["coulombs"] = coulombs
            raise DeviceError(f"{' '.join(DUMPSYS)}: the charge counter rose by {-fell:.3g} C")
        drawn = self.last.get("joules", 0.0) + fell * (self.last.get("volts", volts) + volts) / 2
        self.last.update(coulombs=coulombs, volts=volts, joules=drawn)
        return Reading(middle, {"battery": drawn})


def dump(text: str) -> dict[str, str]:
    """The "name: value" lines of `dumpsys battery`, names in lower case, the first one kept."""
    fields: dict[str, str] = {}
    for name, value in re.findall(r"^\s*([\w ]+?):[ \t]*(\S.*?)\s*$", text, re.MULTILINE):
        fields.setdefault(name.casefold(), value)
    return fields


def charge(text: str) -> tuple[float, float]:
    """Coulombs left in an Android battery that is discharging, and its volts.

    Raises:
        DeviceError: it is plugged in, its state is frozen for a test, or a number is missing.
    """
    where = " ".join(DUMPSYS)
    fields = dump(text)
    if "UPDATES STOPPED" in text:
        raise DeviceError(f"{where}: the state is frozen by a test; run dumpsys battery reset")
    plugged = plugged_into(fields)
    if plugged:
        raise DeviceError(
            f"{where}: {plugged} powered; its charge counter is not what the device draws. "
            "Unplug it and use adb over Wi-Fi (adb tcpip 5555, adb connect ADDRESS)"
        )
    problem = not_discharging(_STATUS.get(fields.get("status", ""), "in no known state"))
    if problem:
        raise DeviceError(f"{where}: {problem}")
    coulombs = number(fields.get("charge counter", ""), f"{where}, Charge counter") * UAH
    volts = number(fields.get("voltage", ""), f"{where}, voltage") / 1e3
    if coulombs <= 0 or volts <= 0:
        raise DeviceError(
            f"{where}: this device does not report its charge "
            f"(Charge counter {coulombs / UAH:.4g}, voltage {volts * 1e3:.4g})"
        )
    _check_units(fields, coulombs, volts)
    return coulombs, volts


def _check_units(state: Mapping[str, str], coulombs: float, volts: float) -> None:
    """Refuse numbers that no battery has in microampere-hours and millivolts."""
    where = " ".join(DUMPSYS)
    if not VOLTS[0] <= volts <= VOLTS[1]:
        raise DeviceError(
            f"{where}: a voltage of {volts * 1e3:g} is not in millivolts on this device, "
            "so its energy cannot be computed"
        )
    try:
        share = float(state.get("level", "")) / float(state.get("scale", "100"))
    except (ValueError, ZeroDivisionError):
        return
    if share < LEAST_SHARE:
        return
    full_mah = coulombs / UAH / 1e3 / share
    if not CAPACITY_MAH[0] <= full_mah <= CAPACITY_MAH[1]:
        raise DeviceError(
            f"{where}: a Charge counter of {coulombs / UAH:.10g} at a level of {100 * share:.0f} % "
            f"would be a battery of {full_mah:.4g} mAh; the counter is not in "
            "microampere-hours on this device, so its energy cannot be computed"
        )


def plugged_into(state: Mapping[str, str]) -> str | None:
    """What powers an Android device besides its battery: "AC", "USB", "Wireless", "Dock"."""
    kinds = ("AC", "USB", "Wireless", "Dock")
    return next((k for k in kinds if state.get(f"{k.casefold()} powered") == "true"), None)


def find(run: Run) -> list[Meter | Absent]:
    """The battery of the Android device that `run` runs commands on."""
    try:
        charge(run(DUMPSYS))
    except DeviceError as err:
        return [Absent(ANDROID, str(err), "energy")]
    return [
        AndroidBattery(
            name=ANDROID,
            quantity="energy",
            provenance=f"{' '.join(DUMPSYS)}: fall of Charge counter * voltage",
            rate_hz=0.5,
            covers="the whole device, out of its battery",
            scope="board",
            total=("battery",),
            waits=True,
            run=run,
        )
    ]


def open_adb(serial: str) -> Meter:
    """The battery of an Android device.

    Args:
        serial: of the device; empty if one alone is connected.

    Raises:
        DeviceError: it cannot be read.
    """
    which = ["-s", serial] if serial else []
    (meter,) = find(lambda argv: run_here(["adb", *which, "shell", *argv]))
    if isinstance(meter, Absent):
        raise DeviceError(f"meter {f'adb:{serial}'!r}: {meter.reason}")
    return meter


KIND = MeterKind(name="adb", open=open_adb, usage="adb:SERIAL")
