"""Lines of NVIDIA's `tegrastats`: power rails, temperatures and clocks of a Jetson.

Source: "Tegrastats Utility" of the Jetson Linux Developer Guide: `VDD_IN 12479mW/12479mW` is a
rail's power now and its mean since the program started (older ones write no unit), `cpu@53.968C`
a temperature, `EMC_FREQ 43%@2133` load and megahertz. A line's time is local and names no zone. A
Jetson's rails can also be read without it, by hwmon.
"""

from __future__ import annotations

import re
from collections import Counter
from datetime import datetime
from pathlib import Path

from edgeq.core.errors import DeviceError, FormatError
from edgeq.devices.meters.base import Reading, Sensor
from edgeq.devices.meters.hwmon import WHOLE
from edgeq.devices.meters.kind import MeterKind
from edgeq.devices.meters.serial_lines import LineMeter, Stream
from edgeq.devices.meters.trace import Clock, Trace

LINE = re.compile(r"\bRAM \d+/\d+MB\b")
_STAMP = re.compile(r"^(\d\d-\d\d-\d{4} \d\d:\d\d:\d\d) ", re.A)
_RAIL = re.compile(r"\b([A-Z][A-Z0-9_]*) (\d+)(?:mW)?/\d+(?:mW)?(?!\S)", re.A)
_HEAT = re.compile(r"\b(\w+)@(-?\d+(?:\.\d+)?)C\b", re.A)
_CORES = re.compile(r"\bCPU \[([^\]]*)\]")
_CLOCK = re.compile(r"\b(EMC|GR3D)_FREQ \d+%@\[?(\d+)", re.A)

FAKE = ("PMIC",)
"""Temperatures that are not measured: this one always says 100 degrees."""


def parse_line(line: str) -> dict[str, dict[str, float]]:
    """What a line says: quantity -> channel -> value in W, degrees Celsius, Hz.

    Raises:
        DeviceError: it is not a line of tegrastats.
    """
    if not LINE.search(line):
        raise DeviceError(f"not a line of tegrastats: {line.strip()[:60]!r}")
    clocks = {name: float(mhz) * 1e6 for name, mhz in _CLOCK.findall(line)}
    cores = _CORES.search(line)
    for i, core in enumerate(cores[1].split(",") if cores else ()):
        _, at, mhz = core.partition("@")
        if at and mhz.isdecimal():  # a core may be "off"
            clocks[f"cpu{i}"] = float(mhz) * 1e6
    return {
        "power": {rail: float(mw) / 1e3 for rail, mw in _RAIL.findall(line)},
        "temperature": {n: float(c) for n, c in _HEAT.findall(line) if n not in FAKE},
        "frequency": clocks,
    }


def live(stream: Stream, rate_hz: float = 1.0, whole: str = "VDD_IN") -> LineMeter:
    """The power rails of a running `tegrastats`, from its standard output.

    Args:
        stream: its standard output.
        rate_hz: lines per second (`--interval`).
        whole: the rail that feeds the others; on a Jetson Nano "POM_5V_IN".
    """

    def parse(line: str) -> dict[str, float]:
        return parse_line(line)["power"]

    return LineMeter(
        name="tegrastats",
        quantity="power",
        provenance="tegrastats",
        rate_hz=rate_hz,
        covers=f"Jetson, {whole}",
        scope="board",
        total=(whole,),
        stream=stream,
        parse=parse,
    )


def read(path: Path, interval_s: float = 1.0) -> list[Trace]:
    """Power, temperatures and clocks of a log.

    Args:
        path: the file.
        interval_s: between its lines (`--interval`); used where they have no stamp or share one.

    Raises:
        FormatError: no line can be read.
    """
    try:
        text = path.read_text("utf-8", errors="replace")
    except OSError as err:
        raise FormatError(f"{path} cannot be read: {err.strerror or err}") from err
    problems: Counter[str] = Counter()
    parsed, stamps = [], []
    for line in text.splitlines():
        if not line.strip():
            continue
        try:
            parsed.append(parse_line(line))
        except DeviceError as err:
            problems[str(err)] += 1
            continue
        stamps.append(_stamp(line))
    if not parsed:
        raise FormatError(f"{path}: no line of tegrastats in it")
    known = [stamp for stamp in stamps if stamp is not None]
    stamped = len(known) == len(parsed) and len(set(known)) == len(known)
    seconds = known if stamped else [i * interval_s for i in range(len(parsed))]
    clock: Clock = "unix" if stamped else "own"
    rails = {rail for values in parsed for rail in values["power"]}
    whole = tuple(rail for rail in WHOLE if rail in rails)[:1]
    traces = []
    for quantity in ("power", "temperature", "frequency"):
        samples = [
            Reading(round(s * 1e9), values[quantity])
            for s, values in zip(seconds, parsed, strict=True)
        ]
        sensor = Sensor(
            name="tegrastats" if quantity == "power" else f"tegrastats-{quantity}",
            quantity=quantity,
            provenance=str(path),
            rate_hz=1 / interval_s,
            covers=f"Jetson, {whole[0]}" if whole else "Jetson",
            scope="board" if whole else "part",
            total=whole if quantity == "power" else (),
        )
        if any(sample.values for sample in samples):
            traces.append(Trace.of(sensor, samples, problems, clock))
    return traces


def _stamp(line: str) -> float | None:
    """Seconds since 1970 of a line's local time in this machine's zone; None without one."""
    match = _STAMP.match(line)
    if not match:
        return None
    try:
        return datetime.strptime(match[1], "%m-%d-%Y %H:%M:%S").timestamp()
    except (ValueError, OverflowError, OSError):  # years that the system's clock does not have
        return None


KIND = MeterKind(
    name="tegrastats",
    recognizes=lambda path, head: bool(LINE.search(head.decode("utf-8", "replace"))),
    read_log=read,
)
