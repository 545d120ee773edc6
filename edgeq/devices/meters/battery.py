"""Batteries of this machine, by the kernel's power_supply class.

Source: Documentation/ABI/testing/sysfs-class-power of Linux: `power_now` is microwatts,
`current_now` microamperes and `voltage_now` microvolts. Whether a discharging battery has a
negative current differs between drivers, so the status gives the direction and the sign is ignored.

The device draws what all its batteries give together, and only while nothing else feeds it: with a
charger connected, or while a battery charges, there is no reading. A laptop with two batteries
often drains one after the other, so the status of each is read every time.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

from edgeq.core.errors import DeviceError
from edgeq.devices.meters.base import (
    Absent,
    Meter,
    Reading,
    Run,
    optional_text,
    read_number,
    read_text,
)
from edgeq.devices.meters.kind import MeterKind

NAME = "battery"
POWER_SUPPLY = "sys/class/power_supply"

_AT_REST = ("not charging", "full")
"""States of a battery that neither gives nor takes power."""

_COUNTERS = ("energy_now", "energy_full", "charge_now", "charge_full", "current_now", "power_now")
"""Files that the battery of a machine has, and that of a mouse or a headset mostly has not."""

_DISAGREEMENT = 10.0
"""Factor between power_now and current_now * voltage_now beyond which one has another unit."""


@dataclass(frozen=True)
class Supply:
    """A battery.

    Args:
        path: its folder in the power_supply class.
        files: whose product, times `scale`, is watts; empty if the battery reports no power.
        scale: from the product to watts.
    """

    path: Path
    files: tuple[Path, ...]
    scale: float

    @property
    def name(self) -> str:
        """The kernel's name for it, such as "BAT0"."""
        return self.path.name

    def watts(self) -> float:
        """Power out of this battery now; 0 if it is at rest.

        Raises:
            DeviceError: it charges, or its state or its numbers cannot be relied on.
        """
        status = read_text(self.path / "status").casefold()
        if status in _AT_REST:
            return 0.0
        watts = self._reported()
        if status == "unknown" and watts == 0:  # a second battery waiting for its turn
            return 0.0
        reason = not_discharging(status, self.name)
        if reason:
            raise DeviceError(reason)
        return watts

    def _reported(self) -> float:
        """What its files give, without the sign."""
        if not self.files:
            raise DeviceError(f"{self.path} has neither power_now nor current_now and voltage_now")
        watts = abs(math.prod(read_number(path) for path in self.files)) * self.scale
        volts = optional_text(self.path / "voltage_now")
        amps = optional_text(self.path / "current_now")
        if len(self.files) > 1 or volts is None or amps is None:
            return watts
        try:
            product = abs(float(volts) * float(amps)) * 1e-12
        except ValueError:
            return watts
        if watts and product and not 1 / _DISAGREEMENT < watts / product < _DISAGREEMENT:
            raise DeviceError(
                f"{self.path}: power_now says {watts:.3g} W and current_now times voltage_now "
                f"says {product:.3g} W; one of them is not in the kernel's units"
            )
        return watts


@dataclass(frozen=True, kw_only=True)
class Batteries(Meter):
    """Power out of all batteries of a machine; no reading while something else feeds it.

    Args:
        supplies: the batteries.
        folder: the power_supply class, where chargers are looked for.
    """

    supplies: tuple[Supply, ...]
    folder: Path

    def read(self) -> Reading:
        """Watts out of each battery, all or none of them."""
        start = time.monotonic_ns()
        states = [optional_text(supply.path / "status") or "" for supply in self.supplies]
        if not any(state.casefold() == "discharging" for state in states):
            first = self.supplies[0].name if len(self.supplies) > 1 else ""
            raise DeviceError(str(not_discharging(states[0].casefold(), first)))
        charger = connected_charger(self.folder)
        if charger:
            raise DeviceError(
                f"the charger {charger} is connected while the battery discharges: the battery "
                "gives only a part of what the device draws; unplug the charger"
            )
        names = channels(self.supplies)
        values = {c: s.watts() for c, s in zip(names, self.supplies, strict=True)}
        if not any(values.values()):
            raise DeviceError(
                f"{' and '.join(s.name for s in self.supplies)} reports 0 W while discharging: "
                "its driver does not measure the power"
            )
        return Reading((start + time.monotonic_ns()) // 2, values)


def not_discharging(status: str, name: str = "") -> str | None:
    """Why a battery in this state measures nothing; None if it discharges.

    Args:
        status: as the kernel or Android says it.
        name: of the battery, where there are several.
    """
    if status.casefold() == "discharging":
        return None
    battery = f"battery {name}" if name else "battery"
    return (
        f"the {battery} is {status.casefold() or 'in no known state'}: its numbers are not what "
        "the device draws; unplug the charger"
    )


def connected_charger(folder: Path) -> str | None:
    """The name of a charger that feeds the machine now, or None.

    Args:
        folder: the power_supply class.
    """
    for supply in sorted(folder.glob("*")):
        kind = optional_text(supply / "type")
        if kind is None or kind in ("Battery", "UPS") or _is_peripheral(supply):
            continue
        # 2 is "online programmable": USB Power Delivery
        if optional_text(supply / "online") in ("1", "2"):
            return supply.name
    return None


def find(root: Path, run: Run | None = None) -> list[Meter | Absent]:
    """A single meter for all batteries that feed this machine."""
    folder = root / POWER_SUPPLY
    batteries = [
        path
        for path in sorted(folder.glob("*"))
        if optional_text(path / "type") == "Battery" and not _is_peripheral(path)
    ]
    if not batteries:
        return [Absent(NAME, f"no battery in {folder}")]
    absent: list[Meter | Absent] = [
        Absent(f"{NAME}/{path.name}", "the battery is not inserted")
        for path in batteries
        if optional_text(path / "present") == "0"
    ]
    supplies = tuple(_supply(path) for path in batteries if optional_text(path / "present") != "0")
    if not supplies:
        return absent
    meter = Batteries(
        name=f"{NAME}/{'+'.join(s.name for s in supplies)}",
        quantity="power",
        provenance=" + ".join(" * ".join(map(str, s.files)) or str(s.path) for s in supplies),
        rate_hz=1,
        covers="the whole device, out of its "
        + ("battery" if len(supplies) == 1 else f"{len(supplies)} batteries"),
        scope="board",
        total=channels(supplies),
        supplies=supplies,
        folder=folder,
    )
    try:
        meter.read()
    except DeviceError as err:
        return [*absent, Absent(meter.name, str(err))]
    return [*absent, meter]


def channels(supplies: tuple[Supply, ...]) -> tuple[str, ...]:
    """The channel of each battery: "battery" of the only one, else their names."""
    return ("battery",) if len(supplies) == 1 else tuple(s.name for s in supplies)


def _supply(path: Path) -> Supply:
    power, pair = path / "power_now", (path / "current_now", path / "voltage_now")
    if optional_text(power) is not None:
        return Supply(path, (power,), 1e-6)
    if all(optional_text(file) is not None for file in pair):
        return Supply(path, pair, 1e-12)
    return Supply(path, (), 0.0)


def _is_peripheral(supply: Path) -> bool:
    """Whether this feeds a mouse, a keyboard or a headset and not the machine.

    Such a supply has the scope "Device". Drivers that set no scope are recognized by
    their files: they know a percentage or a level, and no energy, charge, current or power.
    """
    scope = optional_text(supply / "scope")
    if scope is not None:
        return scope == "Device"
    if optional_text(supply / "type") != "Battery":
        return False
    tells_level = any((supply / name).exists() for name in ("capacity", "capacity_level"))
    return tells_level and not any((supply / name).exists() for name in _COUNTERS)


KIND = MeterKind(name="battery", find=find)
