"""Heat, clock and throttling: thermal zones, CPU sensors, cpufreq, a Raspberry Pi's flags.

Source: Documentation/driver-api/thermal/sysfs-api.rst (`temp` is millidegrees Celsius),
Documentation/hwmon/sysfs-interface.rst, Documentation/admin-guide/pm/cpufreq.rst
(`scaling_cur_freq` is kHz) of Linux; vcgencmd of the Raspberry Pi documentation for the flags.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeq.core.errors import DeviceError
from edgeq.devices.meters.base import (
    Absent,
    FileMeter,
    Meter,
    Reading,
    Run,
    optional_text,
    read_text,
)
from edgeq.devices.meters.kind import MeterKind
from edgeq.devices.meters.pmic import board_name
from edgeq.devices.throttling import FIRMWARE_FLAGS, GET_THROTTLED, parse_throttled

ZONES, CHIPS, CLOCK, FLAGS, COUNTS = (
    "thermal",
    "cpu-temperature",
    "cpufreq",
    "throttled",
    "throttle",
)

CPU_CHIPS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "soc_thermal", "acpitz")
"""hwmon chips in or near the processor. Reading the temperature of a disk would wake it."""

_RATE_HZ = 2.0


def find(root: Path, run: Run | None) -> list[Meter | Absent]:
    """Temperatures, clocks and throttling that can be read."""
    return [_zones(root), _chips(root), _clock(root), _flags(root, run), _counts(root)]


def _zones(root: Path) -> Meter | Absent:
    folder = root / "sys/class/thermal"
    files = _unique(
        [
            (optional_text(zone / "type") or zone.name, zone / "temp")
            for zone in _numbered(folder, "thermal_zone*")
        ]
    )
    return _reader(
        ZONES, "temperature", files, 1e-3, f"{folder}/thermal_zone*/temp", "thermal zones"
    )


def _chips(root: Path) -> Meter | Absent:
    folder = root / "sys/class/hwmon"
    chips = []
    for chip in _numbered(folder, "hwmon*"):
        name = optional_text(chip / "name")
        if name in CPU_CHIPS:
            for path in _numbered(chip, "temp*_input"):
                label = optional_text(chip / path.name.replace("_input", "_label")) or path.name
                chips.append((f"{name} {label}", path))
    what = "processor sensors (" + ", ".join(CPU_CHIPS) + ")"
    return _reader(CHIPS, "temperature", _unique(chips), 1e-3, f"{folder}/hwmon*/temp*_input", what)


def _clock(root: Path) -> Meter | Absent:
    cpus = root / "sys/devices/system/cpu"
    policies = _numbered(cpus / "cpufreq", "policy*")
    folders = policies or [cpu / "cpufreq" for cpu in _numbered(cpus, "cpu[0-9]*")]
    clocks = [
        (folder.name if policies else folder.parent.name, folder / "scaling_cur_freq")
        for folder in folders
    ]
    what = "clock (virtual machines hide it)"
    return _reader(CLOCK, "frequency", _unique(clocks), 1e3, f"{cpus}/*/scaling_cur_freq", what)


def _counts(root: Path) -> Meter | Absent:
    cpus = root / "sys/devices/system/cpu"
    counters = [
        (f"{cpu.name} {kind}", cpu / "thermal_throttle" / f"{kind}_throttle_count")
        for cpu in _numbered(cpus, "cpu[0-9]*")
        for kind in ("core", "package")
    ]
    path = f"{cpus}/cpu*/thermal_throttle/*_throttle_count"
    return _reader(COUNTS, "throttle", _unique(counters), 1.0, path, "throttle counts (Intel's)")


@dataclass(frozen=True, kw_only=True)
class Throttled(Meter):
    """A Raspberry Pi's flags, 1 where set.

    Args:
        source: the file that holds them, or None to run vcgencmd.
        run: runs it.
    """

    source: Path | None
    run: Run | None

    def read(self) -> Reading:
        """Every flag."""
        start = time.monotonic_ns()
        if self.source is not None:
            text = read_text(self.source)
        elif self.run is not None:
            text = self.run(GET_THROTTLED)
        else:
            raise DeviceError(f"{self.name}: neither a file nor a way to run vcgencmd")
        middle = (start + time.monotonic_ns()) // 2
        return Reading(middle, {flag: float(on) for flag, on in parse_throttled(text).items()})


def _flags(root: Path, run: Run | None) -> Meter | Absent:
    board = board_name(root)
    if board is None or not board.startswith("Raspberry Pi"):
        return Absent(FLAGS, "only a Raspberry Pi has these flags", "throttle")
    source = root / FIRMWARE_FLAGS
    from_file = optional_text(source) is not None
    meter = Throttled(
        name=FLAGS,
        quantity="throttle",
        provenance=str(source) if from_file else " ".join(GET_THROTTLED),
        rate_hz=1,
        covers="under-voltage and throttling, now and since start",
        waits=not from_file,
        source=source if from_file else None,
        run=run,
    )
    try:
        meter.read()
    except DeviceError as err:
        return Absent(FLAGS, str(err), "throttle")
    return meter


def _reader(
    name: str,
    quantity: str,
    files: dict[str, tuple[Path, ...]],
    scale: float,
    provenance: str,
    covers: str,
) -> Meter | Absent:
    """A meter of the files that can be read now, or the reason why there is none."""
    meter = FileMeter(
        name=name,
        quantity=quantity,
        provenance=provenance,
        rate_hz=_RATE_HZ,
        covers=covers,
        files=files,
        scale=scale,
    )
    if not files:
        return Absent(name, f"no {provenance}", quantity)
    try:
        meter.read()
    except DeviceError as err:
        return Absent(name, str(err), quantity)
    return meter


def _numbered(folder: Path, pattern: str) -> list[Path]:
    """Matches in the order of the numbers in their names."""
    return sorted(folder.glob(pattern), key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])


def _unique(sensors: Sequence[tuple[str, Path]]) -> dict[str, tuple[Path, ...]]:
    """Existing files by channel; a name that came before is given the file's own place."""
    files: dict[str, tuple[Path, ...]] = {}
    for name, path in sensors:
        if path.exists():
            files[name if name not in files else f"{name} {path.parent.name}"] = (path,)
    return files


KIND = MeterKind(name="thermal", find=find)
