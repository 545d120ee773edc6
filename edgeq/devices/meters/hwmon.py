"""hwmon: power that monitoring chips measure (INA219/226/3221, Jetson rails, others).

Source: Documentation/hwmon/sysfs-interface.rst of Linux: `power*_input` and `power*_average` are
microwatts, `in*_input` millivolts, `curr*_input` milliamperes. ina2xx.rst and ina3221.rst: of an
INA3221 the channels 1 to 3 have a bus voltage and a current of the same number (4 to 7 are shunt
voltages and their sum). Jetsons with JetPack 4 have a driver of NVIDIA's own instead, which gives
`in_power*_input` in milliwatts below `ina3221x`.
"""

from __future__ import annotations

from pathlib import Path

from edgeq.devices.meters.base import Absent, FileMeter, Meter, Run, optional_text
from edgeq.devices.meters.battery import POWER_SUPPLY
from edgeq.devices.meters.kind import MeterKind

NAME = "hwmon"

WHOLE = ("VDD_IN", "POM_5V_IN", "5V_IN", "Total System Power")
"""Labels of rails that feed all the others of their board: Jetson TX2, Xavier NX, Orin Nano and
NX; Jetson Nano; Apple laptops under Linux."""

WHOLE_CHIPS = ("power_meter",)
"""Chips that measure a machine's input: ACPI power meters of servers. Where there are several, as
with one for each supply, none of them is the whole."""

RATE_HZ = 10.0


def find(root: Path, run: Run | None = None) -> list[Meter | Absent]:
    """A meter per chip that measures power."""
    folder = root / "sys/class/hwmon"
    supplies = {path.name.replace("-", "_") for path in (root / POWER_SUPPLY).glob("*")}
    # the kernel shows every power supply as a chip too; batteries have a meter of their own
    chips = [
        (chip, name)
        for chip in sorted(folder.glob("hwmon*"), key=_order)
        if (name := optional_text(chip / "name") or chip.name) not in supplies
    ]
    inputs = sum(name in WHOLE_CHIPS for _, name in chips)
    meters: list[Meter | Absent] = []
    for chip, name in chips:
        files, scale = _power_files(chip, name)
        if files:
            alone = name not in WHOLE_CHIPS or inputs == 1
            meters.append(_meter(f"{NAME}/{chip.name}", name, files, scale, chip, alone))
    legacy = root / "sys/bus/i2c/drivers/ina3221x"
    for chip in sorted(legacy.glob("*/iio:device*")):
        rails: dict[str, tuple[Path, ...]] = {
            optional_text(chip / f"rail_name_{n}") or f"power{n}": (chip / f"in_power{n}_input",)
            for n in range(3)
            if (chip / f"in_power{n}_input").exists()
        }
        if rails:
            meters.append(_meter(f"{NAME}/{chip.parent.name}", "ina3221x", rails, 1e-3, chip))
    if not meters:
        had = f"none of its {len(chips)} chips measures power" if chips else f"no {folder}/hwmon*"
        meters.append(Absent(NAME, f"{had}; an INA219 or INA226 on I2C gives one"))
    return meters


def _power_files(chip: Path, name: str) -> tuple[dict[str, tuple[Path, ...]], float]:
    """Files of each channel's power in microwatts, or of the two whose product is that."""
    files: dict[str, tuple[Path, ...]] = {}
    sensors: dict[str, Path] = {}
    for pattern in ("power*_input", "power*_average"):
        for path in sorted(chip.glob(pattern)):
            stem = path.name.partition("_")[0]
            sensors.setdefault(stem, path)
    for stem, path in sensors.items():
        label = optional_text(chip / f"{stem}_label") or stem
        files[f"{label} {stem}" if label in files else label] = (path,)
    if not files and name.startswith("ina"):
        for n in (1, 2, 3):
            volts, amps = chip / f"in{n}_input", chip / f"curr{n}_input"
            # a channel may be switched off, and an unused one is labeled NC by device trees
            label = optional_text(chip / f"in{n}_label") or f"channel{n}"
            off = label == "NC" or optional_text(chip / f"in{n}_enable") == "0"
            if not off and volts.exists() and amps.exists():
                files[f"{label} channel{n}" if label in files else label] = (volts, amps)
    return files, 1e-6


def _meter(
    meter: str,
    chip: str,
    files: dict[str, tuple[Path, ...]],
    scale: float,
    path: Path,
    alone: bool = True,
) -> FileMeter:
    """A meter of one chip.

    Args:
        meter: its name.
        chip: the chip's name.
        files: of each channel.
        scale: from the product of a channel's files to watts.
        path: of the chip.
        alone: False if another chip measures a part of the same machine's input, so that neither
            is the whole.
    """
    whole = tuple(label for label in files if label in WHOLE)[:1]
    if whole or (chip in WHOLE_CHIPS and len(files) == 1 and alone):
        total, scope = whole or tuple(files), "board"
    elif len(files) == 1:
        total, scope = tuple(files), "rail" if chip.startswith("ina") else "part"
    else:
        total, scope = (), "part"
    return FileMeter(
        name=meter,
        quantity="power",
        provenance=f"{path} ({chip}: {', '.join(files)})",
        rate_hz=RATE_HZ,
        covers=f"{chip} {total[0]}" if total else f"{chip}, {len(files)} rails",
        scope=scope,
        total=total,
        files=files,
        scale=scale,
    )


def _order(chip: Path) -> tuple[int, str]:
    digits = chip.name.removeprefix("hwmon")
    return (int(digits) if digits.isdigit() else -1, chip.name)


KIND = MeterKind(name="hwmon", find=find)
