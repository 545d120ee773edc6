"""Batteries: the kernel's power_supply class, and Android's `dumpsys battery`.

Source: Documentation/ABI/testing/sysfs-class-power of Linux: `power_now` is microwatts,
`current_now` microamperes and `voltage_now` microvolts. Whether a discharging battery has a
negative current differs between drivers, so the status tells the direction and the sign does not.
While it charges, these numbers are what goes into the battery, not what the device draws.

Android: `Charge counter` is microampere-hours left (BatteryManager,
BATTERY_PROPERTY_CHARGE_COUNTER), `voltage` millivolts; what was drawn is the fall of the counter
times the voltage. The counter moves in coarse steps: windows of minutes are needed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edgeq.devices.meters.base import (
    Absent,
    FileMeter,
    Meter,
    Run,
    Sample,
    number,
    optional_text,
    read_text,
)  # fmt: skip
from edgeq.errors import DeviceError

NAME = "battery"
ANDROID = "android-battery"
DUMPSYS = ("dumpsys", "battery")

UAH = 3.6e-3
"""Coulombs per microampere-hour."""

_STATUS = {"1": "unknown", "2": "charging", "3": "discharging", "4": "not charging", "5": "full"}
"""android.os.BatteryManager, BATTERY_STATUS_*."""


@dataclass(frozen=True, kw_only=True)
class Battery(FileMeter):
    """Power out of a battery; refuses to read while it does not discharge.

    Args:
        status: file that says "Discharging" or what else.
    """

    status: Path

    def read(self) -> Sample:
        """Watts out of the battery."""
        told = not_discharging(read_text(self.status))
        if told:
            raise DeviceError(told)
        sample = super().read()
        values = {channel: abs(value) for channel, value in sample.values.items()}
        return Sample(sample.t_ns, values, sample.problems)


def not_discharging(status: str) -> str | None:
    """Why a battery in this state measures nothing; None if it discharges."""
    if status.casefold() == "discharging":
        return None
    return (
        f"the battery is {status.casefold() or 'in no known state'}: its numbers are not what "
        "the device draws; unplug the charger"
    )


def find(root: Path) -> list[Meter | Absent]:
    """A meter per battery that feeds this machine."""
    folder = root / "sys/class/power_supply"
    found: list[Meter | Absent] = []
    for supply in sorted(folder.glob("*")):
        if optional_text(supply / "type") != "Battery":
            continue
        if optional_text(supply / "scope") == "Device":  # a mouse's or keyboard's own
            continue
        found.append(_battery(supply))
    return found or [Absent(NAME, f"no battery in {folder}")]


def _battery(supply: Path) -> Meter | Absent:
    name = f"{NAME}/{supply.name}"
    power, pair = supply / "power_now", (supply / "current_now", supply / "voltage_now")
    if optional_text(supply / "present") == "0":
        return Absent(name, "the battery is not inserted")
    files: tuple[Path, ...]
    if optional_text(power) is not None:
        files, scale = (power,), 1e-6
    elif all(optional_text(path) is not None for path in pair):
        files, scale = pair, 1e-12
    else:
        return Absent(name, f"{supply} has neither power_now nor current_now and voltage_now")
    told = not_discharging(optional_text(supply / "status") or "")
    if told:
        return Absent(name, told)
    return Battery(
        name=name,
        quantity="power",
        provenance=" * ".join(str(path) for path in files),
        rate_hz=1,
        covers="the whole device, out of its battery",
        scope="board",
        total=("battery",),
        files={"battery": files},
        scale=scale,
        status=supply / "status",
    )


@dataclass(frozen=True, kw_only=True)
class AndroidBattery(Meter):
    """Energy out of an Android device's battery since the first reading.

    Args:
        run: runs a command on the device.
    """

    run: Run
    last: dict[str, float] = field(default_factory=dict, repr=False, compare=False)

    def read(self) -> Sample:
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
        return Sample(middle, {"battery": drawn})


def dump(text: str) -> dict[str, str]:
    """The "name: value" lines of `dumpsys battery`, names in lower case, the first one kept."""
    held: dict[str, str] = {}
    for name, value in re.findall(r"^\s*([\w ]+?):[ \t]*(\S.*?)\s*$", text, re.MULTILINE):
        held.setdefault(name.casefold(), value)
    return held


def charge(text: str) -> tuple[float, float]:
    """Coulombs left in an Android battery that is discharging, and its volts.

    Raises:
        DeviceError: it is plugged in, its state is frozen for a test, or a number is missing.
    """
    where = " ".join(DUMPSYS)
    held = dump(text)
    if "UPDATES STOPPED" in text:
        raise DeviceError(f"{where}: the state is frozen by a test; run dumpsys battery reset")
    plugged = plugged_into(held)
    if plugged:
        raise DeviceError(
            f"{where}: {plugged} powered; its charge counter is not what the device draws. "
            "Unplug it and use adb over Wi-Fi (adb tcpip 5555, adb connect ADDRESS)"
        )
    told = not_discharging(_STATUS.get(held.get("status", ""), "in no known state"))
    if told:
        raise DeviceError(f"{where}: {told}")
    coulombs = number(held.get("charge counter", ""), f"{where}, Charge counter") * UAH
    volts = number(held.get("voltage", ""), f"{where}, voltage") / 1e3
    if coulombs <= 0 or volts <= 0:
        raise DeviceError(f"{where}: a charge of {coulombs:.4g} C at {volts:.4g} V; not kept here")
    return coulombs, volts


def plugged_into(held: Mapping[str, str]) -> str | None:
    """What powers an Android device besides its battery: "AC", "USB", "Wireless", "Dock"."""
    kinds = ("AC", "USB", "Wireless", "Dock")
    return next((k for k in kinds if held.get(f"{k.casefold()} powered") == "true"), None)


def find_android(run: Run) -> list[Meter | Absent]:
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
