"""Logs of macOS `powermetrics` (text form): power, clock and thermal pressure of a Mac.

Record one during a run with
`sudo powermetrics -i 200 --samplers cpu_power,gpu_power,thermal -o power.log`.
Each sample is a mean over the time it says has elapsed, so power times that time is exact energy;
it is read as a counter. A sample is stamped to whole seconds; that the stamps of all samples
must agree with the elapsed times places them more exactly than one second.
"""

from __future__ import annotations

import re
from collections import Counter
from datetime import datetime
from pathlib import Path

from edgeq.core.errors import FormatError
from edgeq.devices.meters.base import Reading, Sensor
from edgeq.devices.meters.kind import MeterKind
from edgeq.devices.meters.trace import Trace

_LINES = re.M | re.A

HEAD = re.compile(
    r"^\*\*\* Sampled system activity \((?P<when>[^()]+)\) \((?P<ms>\d+(?:\.\d+)?)ms elapsed\)",
    _LINES,
)
_POWER = re.compile(r"^(CPU|GPU|ANE|DRAM|Package|Combined) Power(?: \([^)]*\))?: (\d+) mW", _LINES)
_INTEL = re.compile(r"^Intel energy model derived package power[^:]*: (\d+(?:\.\d+)?)W", _LINES)
_CLOCK = re.compile(r"^(\S+-Cluster|GPU)(?: HW)? active frequency: (\d+) MHz", _LINES)
_PRESSURE = re.compile(r"^Current pressure level: (\w+)", _LINES)

PRESSURES = ("Nominal", "Moderate", "Heavy", "Trapping", "Sleeping")
"""Thermal pressure, from none on; the number of a level is its place."""

_DISAGREE_S = 2.0
"""Stamps cut to seconds explain one second, a clock that is being set another."""

_WHOLE = ("combined", "package")

STAMP = "%a %b %d %H:%M:%S %Y %z"
"""As in "Sun Jun 29 19:31:22 2025 -0400"."""


def read(path: Path) -> list[Trace]:
    """Energy, clocks and thermal pressure of a log, on the clock of Unix time.

    Raises:
        FormatError: the file holds no sample.
    """
    try:
        text = path.read_text("utf-8", errors="replace")
    except OSError as err:
        raise FormatError(f"{path} cannot be read: {err.strerror or err}") from err
    heads = [head for head in HEAD.finditer(text) if 0 < float(head["ms"]) < 1e9]
    problems: Counter[str] = Counter()
    if not heads:
        raise FormatError(f"{path}: no '*** Sampled system activity' of powermetrics in it")
    ends = [*(head.start() for head in heads[1:]), len(text)]
    elapsed, starts = 0.0, []  # seconds since the first sample began; its beginning in Unix time
    joules: dict[str, float] = {}
    energy, clocks, pressures = [], [], []
    for head, end in zip(heads, ends, strict=True):
        part = text[head.end() : end]
        seconds = float(head["ms"]) / 1e3
        watts = _watts(part)
        if not joules:
            joules = dict.fromkeys(watts, 0.0)
            energy.append(Reading(round(elapsed * 1e9), dict(joules)))
        elapsed += seconds
        t_ns = round(elapsed * 1e9)
        if watts.keys() != joules.keys():  # the last sample of a log is often cut short
            problems["sample without all its powers; the log was read up to there"] += 1
            break
        try:
            starts.append(datetime.strptime(head["when"], STAMP).timestamp() - elapsed)
        except ValueError:
            problems[f"stamp {head['when']!r} not understood"] += 1
        joules = {name: before + watts[name] * seconds for name, before in joules.items()}
        energy.append(Reading(t_ns, joules))
        clocks.append(Reading(t_ns, {c: float(mhz) * 1e6 for c, mhz in _CLOCK.findall(part)}))
        level = _PRESSURE.search(part)
        if level and level[1] in PRESSURES:
            pressures.append(Reading(t_ns, {"pressure": float(PRESSURES.index(level[1]))}))
    if not joules:
        raise FormatError(f"{path}: its samples have no power; add --samplers cpu_power")
    # every stamp is cut to whole seconds, so each start is up to 1 s early: the latest is nearest
    start_s = max(starts, default=0.0)
    apart = start_s - min(starts, default=0.0)
    if apart > _DISAGREE_S:
        problems[f"its stamps and elapsed times disagree by {apart:.0f} s; it slept"] += 1
    rate = (len(energy) - 1) / elapsed
    whole = tuple(name for name in _WHOLE if name in joules)[:1]
    power = Sensor(
        name="powermetrics",
        quantity="energy",
        provenance=str(path),
        rate_hz=rate,
        covers="Apple SoC: CPU + GPU + ANE, without memory and display"
        if whole == ("combined",)
        else "processor package",
        scope="package",
        total=whole,
    )
    traces = [Trace.of(power, energy, problems)]
    for name, quantity, samples in (
        ("powermetrics-clock", "frequency", clocks),
        ("powermetrics-pressure", "throttle", pressures),
    ):
        about = Sensor(name=name, quantity=quantity, provenance=str(path), rate_hz=rate)
        if any(sample.values for sample in samples):
            traces.append(Trace.of(about, samples))
    return [trace.shifted(round(start_s * 1e9), "unix" if starts else "own") for trace in traces]


def _watts(part: str) -> dict[str, float]:
    """Watts by what draws them; the first mention counts, GPU power is printed twice."""
    rails: dict[str, float] = {}
    for name, milliwatts in _POWER.findall(part):
        rails.setdefault(name.casefold(), float(milliwatts) / 1e3)
    for watts in _INTEL.findall(part):
        rails.setdefault("package", float(watts))
    return rails


KIND = MeterKind(
    name="powermetrics",
    recognizes=lambda path, head: bool(HEAD.search(head.decode("utf-8", "replace"))),
    read_log=read,
)
