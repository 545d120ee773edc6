"""The meter protocol: a named sensor of one quantity that is read repeatedly."""

from __future__ import annotations

import math
import os
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from edgeq.core.errors import DeviceError, UsageError, unknown

UNITS = {
    "power": "W",
    "energy": "J",
    "temperature": "°C",
    "frequency": "Hz",
    "memory": "B",
    "throttle": "count",
}
"""Quantity -> unit of its values. Energy is a counter that only rises."""

PLAUSIBLE = {
    "power": (0.0, 2_000.0),
    "energy": (0.0, math.inf),
    "temperature": (-40.0, 150.0),
    "frequency": (0.0, 20e9),
    "memory": (0.0, math.inf),
    "throttle": (0.0, math.inf),
}
"""Quantity -> plausible values of a device on a desk; others are reported and left out."""

SCOPES = ("board", "package", "rail", "part")
"""What a meter measures, the most complete first: all power of the board or device; the processor
package; one supply rail; a part whose energy is not that of the run."""

LATEST_S = 9e9
"""The largest number of seconds that nanoseconds in 64 bits can hold."""

PAGE = 4096
"""Bytes; no file of sysfs is longer."""

Run = Callable[[Sequence[str]], str]
"""Runs a command where the sensor is and returns its standard output; raises DeviceError."""


@dataclass(frozen=True)
class Reading:
    """Values read at one moment.

    Args:
        t_ns: nanoseconds of `time.monotonic_ns`.
        values: channel -> value in the meter's unit. A channel that failed is left out.
        problems: what failed, in words.
    """

    t_ns: int
    values: Mapping[str, float]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Absent:
    """A meter that cannot be read here.

    Args:
        name: of the meter.
        reason: why, and how to fix it if that is possible.
        quantity: what it would have measured, one of `UNITS`.
    """

    name: str
    reason: str
    quantity: str = "power"


@dataclass(frozen=True, kw_only=True)
class Sensor:
    """The description of a meter.

    Args:
        name: short and stable, such as "rapl".
        quantity: one of `UNITS`.
        provenance: path or command that the values come from.
        rate_hz: useful samples per second.
        covers: what the total is the power or energy of, in words.
        scope: one of `SCOPES`.
        total: channels that add up to what `covers` says; empty if they do not add up.
        wraps: channel -> joules at which its counter begins at 0 again.
    """

    name: str
    quantity: str
    provenance: str
    rate_hz: float
    covers: str = ""
    scope: str = "part"
    total: tuple[str, ...] = ()
    wraps: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.quantity not in UNITS:
            raise UsageError(unknown("quantity", self.quantity, UNITS))
        if self.scope not in SCOPES:
            raise UsageError(unknown("scope", self.scope, SCOPES))
        if not self.rate_hz > 0:
            raise UsageError(f"{self.name}: a rate of {self.rate_hz} Hz; must be positive")

    @property
    def unit(self) -> str:
        """Unit of the values."""
        return UNITS[self.quantity]

    def described(self) -> Sensor:
        """A plain `Sensor`, without what a meter needs for reading."""
        return Sensor(**{f.name: getattr(self, f.name) for f in fields(Sensor)})


@dataclass(frozen=True, kw_only=True)
class Meter(Sensor, ABC):
    """A sensor that can be read.

    Args:
        waits: reading takes a while, by a command or over a line; such a meter is sampled on a
            thread of its own.
        pushes: the sensor itself sends values at its own rate, and `read` waits for the next.
    """

    waits: bool = False
    pushes: bool = False

    @abstractmethod
    def read(self) -> Reading:
        """Read all channels now.

        Raises:
            DeviceError: nothing could be read; reading again later may work.
        """


@dataclass(frozen=True, kw_only=True)
class FileMeter(Meter):
    """Reads one file per channel, or several whose values are multiplied, as in V * A.

    Args:
        files: channel -> files with one number each.
        scale: from the product of the numbers to the meter's unit.
    """

    files: Mapping[str, tuple[Path, ...]]
    scale: float

    def read(self) -> Reading:
        """Read every file; channels that fail are left out and listed as problems."""
        values: dict[str, float] = {}
        problems: list[str] = []
        start = time.monotonic_ns()
        for channel, paths in self.files.items():
            try:
                values[channel] = math.prod(read_number(path) for path in paths) * self.scale
            except DeviceError as err:
                problems.append(str(err))
        t_ns = (start + time.monotonic_ns()) // 2
        if not values:
            raise DeviceError("; ".join(problems))
        return Reading(t_ns, values, tuple(problems))


def read_text(path: Path) -> str:
    """A small file of the system, stripped.

    Raises:
        DeviceError: it cannot be read; says why.
    """
    try:
        # a quarter of the time of Path.read_text, and meters read all the time
        file = os.open(path, os.O_RDONLY)
        try:
            return os.read(file, PAGE).decode("utf-8", "replace").strip()
        finally:
            os.close(file)
    except PermissionError as err:
        raise DeviceError(f"{path}: permission denied") from err
    except OSError as err:
        raise DeviceError(f"{path}: {err.strerror or err}") from err


def read_number(path: Path) -> float:
    """The number that a file of the system holds.

    Raises:
        DeviceError: it cannot be read, or holds no number.
    """
    return number(read_text(path), str(path))


def number(text: str, where: str) -> float:
    """A number from a sensor's text; nan and inf are refused.

    Raises:
        DeviceError: it is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DeviceError(f"{where}: expected a number, got {text[:40]!r}")
    return value


def optional_text(path: Path) -> str | None:
    """A small file of the system, or None where it cannot be read."""
    try:
        return read_text(path)
    except DeviceError:
        return None


def run_here(argv: Sequence[str]) -> str:
    """Run a command on this machine and return what it prints.

    Raises:
        DeviceError: it is not installed, fails, or takes more than 5 seconds.
    """
    what = " ".join(argv)
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, errors="replace", timeout=5, check=False
        )
    except FileNotFoundError as err:
        raise DeviceError(f"{argv[0]} is not installed or not on the PATH") from err
    except subprocess.TimeoutExpired as err:
        raise DeviceError(f"{what}: no answer within 5 s") from err
    except OSError as err:
        raise DeviceError(f"{what}: {err.strerror or err}") from err
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise DeviceError(f"{what}: exit code {done.returncode}; {lines[0] if lines else 'silent'}")
    return done.stdout


def meters_of(results: Iterable[Meter | Absent]) -> list[Meter]:
    """The meters that can be read."""
    return [one for one in results if isinstance(one, Meter)]


def absent_of(results: Iterable[Meter | Absent]) -> list[Absent]:
    """The meters that cannot be read."""
    return [one for one in results if isinstance(one, Absent)]
