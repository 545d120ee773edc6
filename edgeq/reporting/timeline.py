"""What the meters said over time, with the stretches of prefill, decode and idle shaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.devices.meters import Trace
from edgeq.profiling.document import IDLE, Document
from edgeq.reporting.axes import Axis, around, short
from edgeq.reporting.figures import Missing
from edgeq.reporting.plot import Line, Plot, Shade

QUANTITIES = {
    "power": ("Power", "W", 1.0),
    "temperature": ("Temperature", "°C", 1.0),
    "frequency": ("Clock", "GHz", 1e9),
    "memory": ("Memory", "MiB", 2.0**20),
    "throttle": ("Throttling", "count or flags", 1.0),
}
"""Quantity -> its title, the unit it is drawn in, and how many of the meter's that is."""

COLUMNS = 1000
"""Slices that the time is cut into for shading; each shows the phase that took most of it."""

ROUNDS = 50
"""Up to this many rounds are shaded as prefill and decode; more would be stripes on a phone."""

MANY = 6
"""Up to this many channels of a meter are drawn one by one."""

GAP = 3.0
"""Sample periods without a sample, past which a line is broken."""

Series = tuple[NDArray[np.int64], NDArray[np.float64]]


def timeline(key: str, document: Document) -> tuple[list[Plot], list[Missing]]:
    """A plot of each quantity that was recorded, and what was not recorded.

    Args:
        key: of the plots, which they follow with the quantity.
        document: whose recording.
    """
    recording = document.recording
    seconds = (recording.end_ns - recording.start_ns) / 1e9
    plots: list[Plot] = []
    missing: list[Missing] = []
    for quantity, (title, unit, scale) in QUANTITIES.items():
        lines: list[Line] = []
        rows = []
        for trace in recording.traces:
            drawn_as = "power" if trace.sensor.quantity == "energy" else trace.sensor.quantity
            if drawn_as != quantity:
                continue
            for name, (t_ns, values) in _series(trace).items():
                x = (t_ns - recording.start_ns) / 1e9
                inside = (x >= 0) & (x <= seconds)
                if not inside.any():
                    continue
                x, y = _broken(x[inside], values[inside] / scale, trace.sensor.rate_hz)
                lines.append(Line(name, x, y, len(lines), dots=x.size < 3))
                rows.append([name, *map(short, _statistics(y)), str(trace.sensor.provenance)])
        y_axis = around(f"{title}, {unit}", [v for line in lines for v in line.y],
                        zero=quantity != "temperature")  # fmt: skip
        if y_axis is None or seconds <= 0:
            missing.append(Missing(title, _why(document, quantity)))
            continue
        plots.append(
            Plot(
                f"{key}-{quantity}",
                title,
                f"{title} in {unit} over the seconds of the recording.",
                Axis("Time since the recording began, s", 0.0, seconds),
                y_axis,
                tuple(lines),
                shades=_shades(document, seconds),
                columns=("meter", "first", "least", "mean", "most", f"last, {unit}", "read from"),
                rows=rows,
                low=True,
            )
        )
    return plots, missing


def _series(trace: Trace) -> dict[str, Series]:
    """What is drawn of a meter: its channels if they are few, and their sum if they add up."""
    name = trace.sensor.name
    counter = trace.sensor.quantity == "energy"
    channels: dict[str, Series] = {}
    for channel in trace.values:
        t_ns, values, _ = trace.series(channel)
        t_ns, values = _rate(t_ns, values) if counter else (t_ns, values)
        if values.size:
            channels[channel] = (t_ns, values)
    total = [channels[c] for c in trace.sensor.total if c in channels]
    by_name = {}
    if len(total) > 1 and len(total) == len(trace.sensor.total):
        by_name[f"{name}: {trace.sensor.covers or 'total'}"] = _across(total, np.sum)
    if len(channels) <= MANY:
        by_name |= {name if c == name else f"{name}: {c}": s for c, s in channels.items()}
    elif not by_name:
        kinds = (("least", np.min), ("mean", np.mean), ("most", np.max))
        for what, of in kinds:
            by_name[f"{name}: {what} of {len(channels)}"] = _across(list(channels.values()), of)
    return {what: series for what, series in by_name.items() if series[1].size}


def _rate(t_ns: NDArray[np.int64], joules: NDArray[np.float64]) -> Series:
    """Power between a counter's samples, at their middle."""
    waits = np.diff(t_ns)
    there = waits > 0
    return (t_ns[:-1] + waits // 2)[there], np.diff(joules)[there] / waits[there] * 1e9


def _across(channels: Sequence[Series], of: Any) -> Series:
    """Combine all channels into one value at each time that all have."""
    times = channels[0][0]
    for t_ns, _ in channels[1:]:
        times = np.intersect1d(times, t_ns)
    at = [values[np.searchsorted(t_ns, times)] for t_ns, values in channels]
    return times, of(at, axis=0)


def _broken(
    x: NDArray[np.float64], y: NDArray[np.float64], rate_hz: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The same with nan where samples are missing."""
    if x.size < 2:
        return x, y
    waits = np.diff(x)
    late = np.flatnonzero(waits > GAP * max(1 / rate_hz, float(np.median(waits)))) + 1
    return np.insert(x, late, x[late]), np.insert(y, late, np.nan)


def _statistics(y: NDArray[np.float64]) -> list[float]:
    seen = y[~np.isnan(y)]
    return [float(v) for v in (seen[0], seen.min(), seen.mean(), seen.max(), seen[-1])]


def _why(document: Document, quantity: str) -> str:
    """Why nothing of a quantity can be drawn."""
    same = ("power", "energy") if quantity == "power" else (quantity,)
    reasons = [f"{a.name}: {a.reason}" for a in document.recording.absent if a.quantity in same]
    for trace in document.recording.traces:
        if trace.sensor.quantity in same:
            reasons += [f"{trace.sensor.name}: {text}" for text in trace.problems] or [
                f"{trace.sensor.name}: no sample that can be believed"
            ]
    return "; ".join(reasons) or "no meter of it was asked"


def _shades(document: Document, seconds: float) -> tuple[Shade, ...]:
    timed = [s for run in document.runs for s in run.timed]
    idle = [(w.start_ns, w.end_ns) for w in document.recording.named(IDLE)]
    prefill = [(s.start_ns, s.decode_start_ns) for s in timed if s.prefill_ns]
    decode = [(s.decode_start_ns, s.end_ns) for s in timed if s.step_ns]
    if len(timed) > ROUNDS and prefill and decode:
        phases = [("turns", "prefill and decode in turns", prefill + decode)]
    else:
        phases = [("prefill", "prefill", prefill), ("decode", "decode", decode)]
    phases = [phase for phase in (*phases, ("idle", "idle", idle)) if phase[2]]
    if not phases:
        return ()
    edges = np.linspace(0, seconds, COLUMNS + 1)
    cover = [
        np.diff(_passed((np.array(windows) - document.recording.start_ns) / 1e9, edges))
        for _, _, windows in phases
    ]
    rest = seconds / COLUMNS - np.sum(cover, axis=0)
    ranked = np.argmax([*cover, rest], axis=0)
    shades = []
    for i, (kind, name, _) in enumerate(phases):
        # where columns of this phase begin and where they end
        turns = np.flatnonzero(np.diff(np.concatenate([[False], ranked == i, [False]])))
        pairs = tuple((float(edges[a]), float(edges[b])) for a, b in turns.reshape(-1, 2))
        shades.append(Shade(kind, name, pairs))
    return tuple(shades)


def _passed(windows: NDArray[np.float64], moments: NDArray[np.float64]) -> NDArray[np.float64]:
    """How much of windows [W, 2], which do not overlap, has passed at each moment."""
    ordered = windows[windows[:, 0].argsort()]
    lengths = np.cumsum(ordered[:, 1] - ordered[:, 0])
    before = np.concatenate([[0.0], lengths[:-1]])
    passed = np.interp(moments, ordered.ravel(), np.column_stack([before, lengths]).ravel())
    return np.asarray(passed)
