"""USB and serial power meters: lines of text from a tty, a pipe or a file.

A line holds `name=value` fields, in any order, between spaces, tabs, commas or semicolons:

    W=5.12                     power; or mW, uW
    V=5.09 A=1.006             voltage and current (or mV, mA, uA), multiplied
    V=231 A=0.1 PF=0.41        the same of mains, and the power factor
    J=12.5                     an energy counter; or mJ, uJ, Wh, mWh

and optionally the time, `t=` in seconds on the meter's clock or `unix=` since 1970 (with
fractions). Or the fields are columns: a line of these names, then lines of numbers. Empty lines
and lines that begin with # are skipped. A counter is preferred to power, power to V and A.
"""

from __future__ import annotations

import os
import re
import select
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from edgeq.core.errors import DeviceError, FormatError, UsageError
from edgeq.devices.meters.base import LATEST_S, Meter, Reading, Sensor, number
from edgeq.devices.meters.kind import MeterKind
from edgeq.devices.meters.trace import Trace

UNITS: dict[str, tuple[str, float]] = {
    "W": ("power", 1.0), "mW": ("power", 1e-3), "uW": ("power", 1e-6),
    "J": ("energy", 1.0), "mJ": ("energy", 1e-3), "uJ": ("energy", 1e-6),
    "Wh": ("energy", 3600.0), "mWh": ("energy", 3.6),
    "V": ("volts", 1.0), "mV": ("volts", 1e-3),
    "A": ("amps", 1.0), "mA": ("amps", 1e-3), "uA": ("amps", 1e-6),
    "PF": ("factor", 1.0), "pf": ("factor", 1.0),
    "t": ("t", 1.0), "unix": ("unix", 1.0),
}  # fmt: skip
"""Name of a field -> what it is, and the factor to watts, joules, volts, amperes or seconds."""

MOST_VOLTS = 60.0
"""Of a device that is fed by direct current. More is mains, where volts times amperes is the
apparent power, which may be twice the power."""

LONGEST = 4096
"""Bytes without an end of line before they are thrown away: the baud rate is wrong."""

_SPLIT = re.compile(r"[,;\s]+")


@dataclass
class Lines:
    """Makes numbers of lines; remembers the names of columns.

    Args:
        columns: their names, once a line of names has come.
    """

    columns: tuple[str, ...] = ()

    def values(self, line: str) -> dict[str, float]:
        """What a line says, as {"power" or "energy": value, "t" or "unix": seconds}.

        Empty for a comment or the line that names the columns.

        Raises:
            DeviceError: the line is neither fields nor numbers for the columns.
        """
        line = line.strip()
        if not line or line.startswith("#"):
            return {}
        words = [word for word in _SPLIT.split(line) if word]
        if all(word in UNITS for word in words):
            self.columns = tuple(words)
            return {}
        if all("=" in word for word in words):
            pairs = [word.split("=", 1) for word in words]
        elif len(words) == len(self.columns):
            pairs = [[name, word] for name, word in zip(self.columns, words, strict=True)]
        else:
            raise DeviceError(f"line {line[:60]!r} has neither name=value fields nor columns")
        values: dict[str, float] = {}
        for name, word in pairs:
            if name in UNITS:  # a meter may say more than is needed
                what, factor = UNITS[name]
                values[what] = number(word, name) * factor
        if max(abs(values.get("t", 0)), abs(values.get("unix", 0))) > LATEST_S:
            raise DeviceError(f"line {line[:60]!r} has a time that cannot be")
        if {"volts", "amps"} <= values.keys() and not values.keys() & {"power", "energy"}:
            if values["volts"] > MOST_VOLTS and "factor" not in values:
                raise DeviceError(
                    f"line {line[:60]!r} has the voltage of mains, where V times A is not the "
                    "power; the meter must say W, or the power factor (PF)"
                )
            factor = values.get("factor", 1.0)
            if not 0 <= factor <= 1:
                raise DeviceError(f"line {line[:60]!r} has a power factor that is not 0 to 1")
            values["power"] = values["volts"] * values["amps"] * factor
        kept = {w: value for w, value in values.items() if w not in ("volts", "amps", "factor")}
        if not kept.keys() & {"power", "energy"}:
            raise DeviceError(f"line {line[:60]!r} has no power, energy, or V and A")
        return kept


class Stream(Protocol):
    """Where lines come from; any binary file."""

    def fileno(self) -> int:
        """The descriptor of the open file."""


@dataclass(frozen=True, kw_only=True)
class LineMeter(Meter):
    """Reads the next line that a stream brings.

    Args:
        stream: an open binary file, pipe or tty.
        parse: line -> channel -> value; no value means a line that says nothing.
        patience_s: how long to wait for a line.
    """

    stream: Stream
    parse: Callable[[str], Mapping[str, float]]
    patience_s: float = 2.0
    waits: bool = True
    pushes: bool = True
    pending: bytearray = field(default_factory=bytearray, repr=False, compare=False)

    def read(self) -> Reading:
        """Wait for the next line; its time is that of its arrival."""
        limit = time.monotonic() + self.patience_s
        while True:
            line = self._line(limit)
            t_ns = time.monotonic_ns()
            values = self.parse(line)
            if values:
                return Reading(t_ns, values)

    def _line(self, limit: float) -> str:
        while b"\n" not in self.pending:
            if len(self.pending) > LONGEST:
                self.pending.clear()
                raise DeviceError(f"{self.provenance}: no end of line; is the baud rate right?")
            try:
                ready, _, _ = select.select([self.stream], [], [], limit - time.monotonic())
                chunk = os.read(self.stream.fileno(), LONGEST) if ready else None
            except (OSError, ValueError) as err:
                raise DeviceError(f"{self.provenance} cannot be read: {err}") from err
            if chunk is None:
                raise DeviceError(f"{self.provenance}: no line within {self.patience_s:g} s")
            if not chunk:
                raise DeviceError(f"{self.provenance} has ended or was unplugged")
            self.pending.extend(chunk)
        line, _, rest = bytes(self.pending).partition(b"\n")
        self.pending[:] = rest
        return line.decode("utf-8", "replace")


def live(
    stream: Stream, provenance: str, quantity: str = "power", rate_hz: float = 10.0
) -> LineMeter:
    """A meter of lines as they arrive. Their own times are not used.

    Args:
        stream: an open binary file, pipe or tty.
        provenance: what it is, as in "/dev/ttyACM0".
        quantity: "power" or "energy", which of the two the lines are read for.
        rate_hz: lines per second that the meter is known to send.
    """
    if quantity not in ("power", "energy"):
        raise UsageError(f"lines hold power or energy, not {quantity!r}")
    lines = Lines()

    def parse(line: str) -> Mapping[str, float]:
        values = lines.values(line)
        if values and quantity not in values:
            raise DeviceError(f"{provenance}: line {line.strip()[:60]!r} has no {quantity}")
        return {"input": values[quantity]} if values else {}

    return LineMeter(
        name="serial",
        quantity=quantity,
        provenance=provenance,
        rate_hz=rate_hz,
        covers="what the external meter feeds",
        scope="board",
        total=("input",),
        stream=stream,
        parse=parse,
    )


def open_tty(
    path: Path, baud: int = 115200, quantity: str = "power", rate_hz: float = 10.0
) -> LineMeter:
    """A meter on a serial port; what it sent before is thrown away.

    Raises:
        DeviceError: the port cannot be opened.
        UsageError: a baud rate that this system does not have.
    """
    try:
        import termios
    except ImportError as err:  # Windows
        raise DeviceError(
            "serial ports are read on Linux and macOS only; record the meter's lines to a file "
            "with times and give that"
        ) from err
    speed = getattr(termios, f"B{baud}", None)
    if speed is None:
        raise UsageError(f"{baud} baud; this system knows 9600, 19200, 38400, 57600, 115200 ...")
    try:
        stream = path.open("rb", buffering=0)
        mode = termios.tcgetattr(stream)
        # as cfmakeraw(3): bytes as they come, and no answer
        mode[0] = termios.IGNBRK
        mode[1] = 0
        mode[2] = termios.CS8 | termios.CREAD | termios.CLOCAL
        mode[3] = 0
        mode[4] = mode[5] = speed
        termios.tcsetattr(stream, termios.TCSANOW, mode)
        termios.tcflush(stream, termios.TCIFLUSH)
    except PermissionError as err:
        raise DeviceError(
            f"{path}: permission denied; sudo usermod -aG dialout $USER, then log in again"
        ) from err
    except (OSError, termios.error) as err:
        raise DeviceError(f"{path} cannot be opened as a serial port: {err}") from err
    return live(stream, f"{path} at {baud} baud", quantity, rate_hz)


def read(path: Path) -> Trace:
    """A file of such lines; each must have its time.

    Raises:
        FormatError: no line can be read, or one has no time.
    """
    try:
        text = path.read_text("utf-8", errors="replace")
    except OSError as err:
        raise FormatError(f"{path} cannot be read: {err.strerror or err}") from err
    lines, problems = Lines(), Counter[str]()
    traces = []
    for line in text.splitlines():
        try:
            values = lines.values(line)
        except DeviceError as err:
            problems[str(err)] += 1
            continue
        if values:
            traces.append(values)
    clock = next((c for c in ("unix", "t") if traces and all(c in v for v in traces)), None)
    if clock is None:
        raise FormatError(
            f"{path}: {len(traces)} lines of a power meter"
            + ("; each needs its time, t=SECONDS or unix=SECONDS" if traces else "")
        )
    quantity = "energy" if all("energy" in v for v in traces) else "power"
    samples = [
        Reading(round(v[clock] * 1e9), {"input": v[quantity]} if quantity in v else {})
        for v in traces
    ]
    seconds = (max(s.t_ns for s in samples) - min(s.t_ns for s in samples)) / 1e9
    sensor = Sensor(
        name="serial",
        quantity=quantity,
        provenance=str(path),
        rate_hz=(len(samples) - 1) / seconds if seconds > 0 else 1.0,
        covers="what the external meter fed",
        scope="board",
        total=("input",),
    )
    return Trace.of(sensor, samples, problems, "unix" if clock == "unix" else "own")


def open_option(where: str) -> LineMeter:
    """The meter on a serial port, written ``PATH`` or ``PATH@BAUD``.

    Raises:
        UsageError: it is written otherwise.
        DeviceError: the port cannot be opened.
    """
    path, _, baud = where.partition("@")
    if not path or (baud and not baud.isdigit()):
        raise UsageError(f"meter {f'serial:{where}'!r}; expected {USAGE}")
    return open_tty(Path(path), int(baud or 115200))


USAGE = "serial:/dev/ttyACM0, serial:PATH@BAUD"
KIND = MeterKind(
    name="serial",
    open=open_option,
    usage=USAGE,
    recognizes=lambda path, head: True,  # the last kind: its reader refuses what it is not
    read_log=lambda path: [read(path)],
)
