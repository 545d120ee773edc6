"""Meters: small readers of power, energy, temperature, clock and memory.

Each has a name, a quantity, a unit, a rate and its provenance; one that cannot be read here is an
`Absent` with the reason. `probe` finds those of a machine; `read_log` reads what another program
or an external meter recorded. docs/meters.md lists them all.
"""

from __future__ import annotations

from pathlib import Path

from edgeq.core.errors import FormatError, UsageError
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
)
from edgeq.devices.meters.base import (
    Absent,
    Meter,
    Reading,
    Run,
    Sensor,
    absent_of,
    meters_of,
    run_here,
)
from edgeq.devices.meters.kind import MeterKind
from edgeq.devices.meters.trace import Trace

__all__ = [
    "KINDS",
    "Absent",
    "Meter",
    "MeterKind",
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


KINDS: tuple[MeterKind, ...] = (
    pmic.KIND, hwmon.KIND, battery.KIND, rapl.KIND, thermal.KIND, process.KIND,
    android.KIND,
    traces.EEMBC, powermetrics.KIND, tegrastats.KIND, traces.PTD,
    serial_lines.KIND,
)  # fmt: skip
"""Every kind of meter: the most telling power meter of a machine first, and logs in the order in
which they are recognized."""


def probe(root: Path = Path("/"), *, run: Run | None = None) -> list[Meter | Absent]:
    """What can be measured on a machine, the most telling power meter first.

    Args:
        root: of its file system; another than "/" for a copy of one.
        run: runs commands there. On this machine itself they are run by default, on a copy none.
    """
    if run is None and root == Path("/"):
        run = run_here
    return [meter for kind in KINDS if kind.find is not None for meter in kind.find(root, run)]


def probe_android(run: Run) -> list[Meter | Absent]:
    """What can be measured on an Android device, by commands that `run` runs on it."""
    return android.find(run)


def from_option(text: str) -> Meter:
    """A meter that a user names.

    Args:
        text: NAME:WHERE of a kind that can be opened, such as "serial:/dev/ttyACM0",
            "serial:/dev/ttyUSB0@9600", or "adb:SERIAL" for the battery of an Android device
            ("adb:" if one alone is connected).

    Raises:
        UsageError: it is not of this form.
        DeviceError: it cannot be opened or read.
    """
    name, colon, where = text.partition(":")
    openers = {kind.name: kind for kind in reversed(KINDS) if kind.open is not None}
    kind = openers.get(name) if colon else None
    if kind is None or kind.open is None:
        usage = " or ".join(kind.usage for kind in openers.values())
        raise UsageError(f"meter {text!r}; expected {usage}")
    return kind.open(where)


def read_log(path: Path) -> list[Trace]:
    """Traces that another program or an external meter recorded, of a kind known by the content.

    EEMBC energy traces (a folder or `*-energy.bin`), PTDaemon's `spl.txt`, logs of powermetrics
    and tegrastats, and lines of a serial meter with times.

    Raises:
        FormatError: it is none of these, or damaged.
    """
    head = b""
    if not path.is_dir():
        try:
            with path.open("rb") as file:
                head = file.read(1 << 16)
        except OSError as err:
            raise FormatError(f"{path} cannot be read: {err.strerror or err}") from err
    for kind in KINDS:
        if kind.recognizes and kind.read_log and kind.recognizes(path, head):
            return kind.read_log(path)
    raise FormatError(f"{path} is not the log of a power meter")
