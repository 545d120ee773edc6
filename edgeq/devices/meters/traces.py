"""Energy traces recorded by an external meter, read from files.

EEMBC EnergyRunner (MLPerf Tiny): `*-energy.bin` is the byte 0xF1, a little-endian float32 sample
rate in hertz, then a float32 of microjoules for each sample. Beside it `*-timestamps.json` lists
the seconds at which the device under test gave signals; what lies between the second and the
third, the fourth and the fifth ... are the measured windows.

MLPerf Power: `spl.txt` of SPEC PTDaemon has a line for each second,
`Time,03-03-2021 00:42:30.170,Watts,3.040000,Volts,...,Mark,NAME`. Its times are local and name no
zone; they are taken as those of this machine's.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np

from edgeq.core.errors import DeviceError, FormatError
from edgeq.devices.energy import TimeWindow
from edgeq.devices.meters.base import LATEST_S, Reading, Sensor, number
from edgeq.devices.meters.kind import MeterKind
from edgeq.devices.meters.trace import Trace

EEMBC_MAGIC = 0xF1
MOST_BAD = 0.05
"""The share of a trace's samples that may be invalid before the file is refused."""

_SPL = re.compile(r"Time,([\d-]+ [\d:.]+),Watts,([^,]*),")


def read_eembc(path: Path) -> Trace:
    """An EEMBC trace with its windows, as an energy counter.

    Args:
        path: the `*-energy.bin`, or a folder with one of them.

    Raises:
        FormatError: the file is not such a trace, or is damaged.
    """
    if path.is_dir():
        files = sorted(path.glob("*-energy.bin"))
        if len(files) != 1:
            raise FormatError(f"{path} holds {len(files)} *-energy.bin; name one of them")
        path = files[0]
    data = _bytes(path)
    if len(data) < 9 or data[0] != EEMBC_MAGIC or (len(data) - 5) % 4:
        raise FormatError(
            f"{path} is not a whole EEMBC energy trace: {len(data)} bytes, the first "
            f"{data[:1].hex() or 'missing'}; expected f1, a float32 rate, float32 microjoules"
        )
    rate = float(np.frombuffer(data, "<f4", 1, 1)[0])
    if not 0.1 <= rate < 1e7:
        raise FormatError(f"{path}: a sample rate of {rate} Hz; expected 0.1 Hz to 10 MHz")
    each = np.frombuffer(data, "<f4", offset=5).astype(np.float64)
    good = np.isfinite(each) & (each >= 0)
    bad = int((~good).sum())
    if bad > MOST_BAD * each.size:
        raise FormatError(f"{path}: {bad} of {each.size} samples are negative or no numbers")
    if bad:
        each = np.interp(np.arange(each.size), np.flatnonzero(good), each[good])
    # sample i is the energy between i / rate and (i + 1) / rate
    t_ns = np.round(np.arange(each.size + 1) * (1e9 / rate)).astype(np.int64)
    sensor = Sensor(
        name="eembc",
        quantity="energy",
        provenance=str(path),
        rate_hz=rate,
        covers="what the external meter fed",
        scope="board",
        total=("energy",),
    )
    joules = np.concatenate(([0.0], np.cumsum(each))) * 1e-6
    problems = (
        {"sample negative or not a number, replaced by the mean of its neighbors": bad}
        if bad
        else {}
    )
    return Trace(sensor, t_ns, {"energy": joules}, problems, "own", _eembc_windows(path))


def _eembc_windows(path: Path) -> tuple[TimeWindow, ...]:
    stamps = path.with_name(path.name.replace("-energy.bin", "-timestamps.json"))
    if not stamps.exists():
        return ()
    try:
        seconds = [float(s) for s in json.loads(stamps.read_text("utf-8"))]
    except (OSError, ValueError, TypeError) as err:
        raise FormatError(f"{stamps}: expected a list of seconds: {err}") from err
    if not all(0 <= s < LATEST_S for s in seconds) or any(b <= a for a, b in pairwise(seconds)):
        raise FormatError(f"{stamps}: the seconds do not rise: {seconds}")
    ns = [round(s * 1e9) for s in seconds]
    pairs = zip(ns[1::2], ns[2::2], strict=False)
    return tuple(TimeWindow(f"window {2 * i + 2}", a, b) for i, (a, b) in enumerate(pairs))


def read_ptd(path: Path) -> Trace:
    """Power from a SPEC PTDaemon log, with a window for each of its marks.

    Args:
        path: the `spl.txt`.

    Raises:
        FormatError: no line of it can be read.
    """
    samples: list[Reading] = []
    marks: dict[str, list[int]] = {}
    problems: Counter[str] = Counter()
    for line in _bytes(path).decode("utf-8", "replace").splitlines():
        match = _SPL.match(line)
        if not match:
            problems["line that is not Time,...,Watts,..."] += bool(line.strip())
            continue
        try:
            when = datetime.strptime(match[1], "%m-%d-%Y %H:%M:%S.%f")
            t_ns = round(when.timestamp() * 1e3) * 1_000_000
            samples.append(Reading(t_ns, {"watts": number(match[2], "Watts")}))
        except (ValueError, OverflowError, OSError, DeviceError) as err:
            problems[str(err)] += 1
            continue
        marks.setdefault(line.rpartition(",Mark,")[2].strip(), []).append(t_ns)
    if not samples:
        raise FormatError(f"{path}: no line like Time,03-03-2021 00:42:30.170,Watts,3.04,...")
    sensor = Sensor(
        name="ptd",
        quantity="power",
        provenance=str(path),
        rate_hz=1,
        covers="what the power analyzer fed",
        scope="board",
        total=("watts",),
    )
    trace = Trace.of(sensor, samples, {k: n for k, n in problems.items() if n}, "unix")
    windows = tuple(TimeWindow(m, min(t), max(t)) for m, t in marks.items() if max(t) > min(t))
    return Trace(sensor, trace.t_ns, trace.values, trace.problems, "unix", windows)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as err:
        raise FormatError(f"{path} cannot be read: {err.strerror or err}") from err


EEMBC = MeterKind(
    name="eembc",
    recognizes=lambda path, head: path.is_dir() or head[:1] == bytes([EEMBC_MAGIC]),
    read_log=lambda path: [read_eembc(path)],
)
PTD = MeterKind(
    name="ptd",
    recognizes=lambda path, head: head.startswith(b"Time,"),
    read_log=lambda path: [read_ptd(path)],
)
