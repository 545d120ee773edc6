"""Meters: small readers of power, energy, temperature, clock and memory.

Each has a name, a quantity, a unit, a rate and its provenance; one that cannot be read here is an
`Absent` with the reason. `probe` finds those of a machine; `read_log` reads what another program
or an external meter recorded. docs/meters.md lists them all.
"""

from __future__ import annotations

from pathlib import Path

from edgeq.core.errors import DeviceError, FormatError, UsageError
from edgeq.devices.meters import (
    android,
    battery,
    hwmon,
    pmic,
    powermetrics,
    process,
    rapl,
    serial_lines,
    tegrastats,
    thermal,
    traces,
)  # fmt: skip
from edgeq.devices.meters.base import (
    Absent,
    Meter,
    Reading,
    Run,
    Sensor,
    absent_of,
    meters_of,
    run_here,
)  # fmt: skip
from edgeq.devices.meters.trace import Trace

__all__ = [
    "Absent",
    "Meter",
    "Reading",
    "Run",
    "Sensor",
    "Trace",
    "absent_of",
    "from_option",
    "meters_of",
    "probe",
    "probe_android",
    "read_log",
]


def probe(root: Path = Path("/"), *, run: Run | None = None) -> list[Meter | Absent]:
    """What can be measured on a machine, the most telling power meter first.

    Args:
        root: of its file system; another than "/" for a copy of one.
        run: runs commands there. On this machine itself they are run by default, on a copy none.
    """
    here = root == Path("/")
    if run is None and here:
        run = run_here
    power = [*pmic.find(root, run), *hwmon.find(root), *battery.find(root), *rapl.find(root)]
    return [*power, *thermal.find(root, run), *(process.find() if here else ())]


def probe_android(run: Run) -> list[Meter | Absent]:
    """What can be measured on an Android device, by commands that `run` runs on it."""
    return android.find(run)


def from_option(text: str) -> Meter:
    """A meter that a user names.

    Args:
        text: "serial:/dev/ttyACM0" or "serial:/dev/ttyUSB0@9600"; "adb:SERIAL" for the battery of
            an Android device, "adb:" if there is one alone.

    Raises:
        UsageError: it is not of this form.
        DeviceError: it cannot be opened or read.
    """
    kind, colon, rest = text.partition(":")
    if kind == "adb" and colon:
        which = ["-s", rest] if rest else []
        (found,) = probe_android(lambda argv: run_here(["adb", *which, "shell", *argv]))
        if isinstance(found, Absent):
            raise DeviceError(f"meter {text!r}: {found.reason}")
        return found
    path, _, baud = rest.partition("@")
    if kind != "serial" or not path or (baud and not baud.isdigit()):
        raise UsageError(
            f"meter {text!r}; expected serial:/dev/ttyACM0, serial:PATH@BAUD or adb:SERIAL"
        )
    return serial_lines.open_tty(Path(path), int(baud or 115200))


def read_log(path: Path) -> list[Trace]:
    """Traces that another program or an external meter recorded; the kind is told by the content.

    EEMBC energy traces (a folder or `*-energy.bin`), PTDaemon's `spl.txt`, logs of powermetrics
    and tegrastats, and lines of a serial meter with times.

    Raises:
        FormatError: it is none of these, or damaged.
    """
    if path.is_dir():
        return [traces.read_eembc(path)]
    try:
        with path.open("rb") as file:
            head = file.read(1 << 16)
    except OSError as err:
        raise FormatError(f"{path} cannot be read: {err.strerror or err}") from err
    if head[:1] == bytes([traces.EEMBC_MAGIC]):
        return [traces.read_eembc(path)]
    text = head.decode("utf-8", "replace")
    if powermetrics.HEAD.search(text):
        return powermetrics.read(path)
    if tegrastats.LINE.search(text):
        return tegrastats.read(path)
    if text.startswith("Time,"):
        return [traces.read_ptd(path)]
    return [serial_lines.read(path)]
