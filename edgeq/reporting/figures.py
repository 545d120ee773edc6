"""What is drawn of runs and sweeps; what cannot be drawn is a reason instead."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from edgeq.profiling.summary import decay
from edgeq.reporting.axes import Axis, around, short, threads_of
from edgeq.reporting.plot import Dot, Line, Plot
from edgeq.reporting.sources import ReportedRun
from edgeq.sweeping import SweepResult, pareto


@dataclass(frozen=True)
class Missing:
    """What is not shown, and why."""

    name: str
    reason: str


UNITS = ("token", "run")
"""What is timed one by one; never both in one plot."""

PARTS = 40
"""Stretches of a sustained run, of which each has one speed."""


def latency(entries: Sequence[ReportedRun]) -> list[Plot]:
    """How slow the slowest tokens are, or runs of graphs: time over percentile."""
    plots = []
    for unit in UNITS:
        steps = {
            e.letter: np.array([ns / 1e6 for s in e.run.timed for ns in s.step_ns])
            for e in entries
            if e.run.subject["unit"] == unit
        }
        shown = [e for e in entries if e.letter in steps and steps[e.letter].size]
        if not shown:
            continue
        most = max(1 - 1 / steps[e.letter].size for e in shown)
        lines, rows = [], []
        for e in shown:
            ms = steps[e.letter]
            nines = np.linspace(0, math.log10(ms.size), 120) if ms.size > 1 else np.zeros(1)
            part = 1 - 10**-nines
            lines.append(Line(e.name, part, np.quantile(ms, part), e.color, dots=ms.size == 1))
            figures = e.figures["tpot_ms" if unit == "token" else "run_ms"]
            rows.append(
                [e.name, *(short(figures[key]) for key in ("n", "min", "p50", "p90", "p99", "max"))]
            )
        low, high = (f([f(line.y) for line in lines]) for f in (min, max))
        y = around(f"Time of a {unit}, ms", [low, high], log=high > 5 * low > 0)
        assert y is not None  # there are steps
        plots.append(
            Plot(
                f"latency-{unit}",
                f"Time of a {unit}",
                f"Time of a {unit} in milliseconds over the percentage of {unit}s that took no "
                "longer, one line a run. A line that rises late has few slow ones.",
                Axis(f"{unit.capitalize()}s that took no longer, %", 0.0, max(most, 0.9), "tail"),
                y,
                tuple(lines),
                columns=("run", f"{unit}s", "least, ms", "p50", "p90", "p99", "most"),
                rows=rows,
            )
        )
    return plots


def speed(entries: Sequence[ReportedRun]) -> list[Plot]:
    """Speed over the time of sustained runs."""
    plots = []
    for unit in UNITS:
        lines, rows = [], []
        for e in entries:
            if e.run.subject["unit"] != unit or not e.document.workload.min_seconds:
                continue
            rates = decay(e.document, e.run, PARTS)
            if len(rates) > 1:
                x, y = (np.array([row[key] for row in rates]) for key in ("seconds", "per_s"))
                lines.append(Line(e.name, x, y, e.color, dots=True))
                tenth = max(len(y) // 10, 1)
                first, last = float(y[:tenth].mean()), float(y[-tenth:].mean())
                rows.append([e.name, short(first), short(last), f"{100 * (last / first - 1):+.1f}"])
        x_axis = around(
            "Time since the first timed round, s", _all(line.x for line in lines), zero=True
        )
        y_axis = around(f"Speed, {unit}s/s", _all(line.y for line in lines), zero=True)
        if x_axis is None or y_axis is None:
            continue
        plots.append(
            Plot(
                f"speed-{unit}",
                "Speed over time",
                f"{unit.capitalize()}s per second of decoding over the seconds of a sustained run.",
                x_axis,
                y_axis,
                tuple(lines),
                columns=("run", f"at first, {unit}s/s", f"at last, {unit}s/s", "change, %"),
                rows=rows,
            )
        )
    return plots


def roofline(key: str, entries: Sequence[ReportedRun]) -> Plot | Missing:
    """A machine's limits, and how near to them its runs come.

    Args:
        key: of the plot.
        entries: runs on the same machine.
    """
    name = "Roofline"
    dots, rows, reasons = [], [], []
    for e in entries:
        for part, reading in (("prefill", _prefill_bytes(e)), ("decode", _decode_bytes(e))):
            gops = e.figures["int8_gops"][part]
            macs = e.run.subject.get("macs_prefill" if part == "prefill" else "macs_per_token")
            if not (gops and macs and reading) or min(gops, macs, reading) <= 0:
                reasons.append(f"{e.letter} {part}")
                continue
            intensity = 2 * macs / reading
            dots.append(Dot(e.letter, intensity, gops, e.color, part == "prefill"))
            rows.append([f"{e.name}: {part}", short(intensity), short(gops)])
    if not dots:
        return Missing(name, "the work and the bytes of these runs are not known; edgeq counts "
                             "them for its own runtime, prompts with --operations")  # fmt: skip
    environment = entries[0].document.environment
    threads = sorted({str(e.run.subject.get("threads")) for e in entries})
    limits = [
        (count, environment["read_gb_s"].get(count), environment["int8_gops"].get(count))
        for count in threads
    ]
    limits = [(count, read, peak) for count, read, peak in limits if min(read or 0, peak or 0) > 0]
    if not limits:
        return Missing(name, "the machine's limits were not measured, as no compiled kernel ran")
    ridges = [peak / read for _, read, peak in limits]
    x = around("Intensity, int8 operations/byte read", [*(d.x for d in dots), *ridges], log=True)
    assert x is not None  # there are dots
    x = Axis(x.label, x.low / 2, x.high * 2, "log")
    lines = []
    for i, (count, read, peak) in enumerate(limits):
        says = f"reads {short(read)} GB/s, int8 peak {short(peak)} GOPS ({threads_of(count)})"
        at = np.array([x.low, peak / read, x.high])
        lines.append(Line(says, at, np.minimum(at * read, peak), i, quiet=True))
        rows.append(
            [f"limits of {threads_of(count)}: {short(read)} GB/s", short(peak / read), short(peak)]
        )
    heights = [*(d.y for d in dots), *_all(line.y for line in lines)]
    y = around("Achieved, 10⁹ int8 operations/s", heights, log=True)
    assert y is not None
    notes = [
        "Filled: decode; hollow: prefill. Left of the bend memory is the limit, right of it the "
        "integer units. Both were measured on this machine, with as many threads; a model that "
        "fits in the caches passes the memory's line."
    ]
    if reasons:
        notes.append("Not drawn, as work or bytes are not known: " + ", ".join(reasons) + ".")
    return Plot(
        key, name,
        "Integer operations per second over operations per byte read: the machine's limits as "
        "lines, prefill and decode of each run as dots.",
        x, y, tuple(lines), tuple(dots), notes=tuple(notes), rows=rows,
        columns=("what", "operations/byte", "10⁹ operations/s"),
    )  # fmt: skip


def pareto_plots(rows: Sequence[SweepResult]) -> list[Plot]:
    """Size and speed against divergence, for each model of a sweep."""
    best = {row.key for row in pareto(rows)}
    plots = []
    for i, model in enumerate(dict.fromkeys(row.model for row in rows)):
        shown = [r for r in rows if r.model == model and r.nbytes and r.kl is not None]
        shown.sort(key=lambda row: (row.nbytes or 0, row.kl or 0.0))
        log = bool(shown) and all(row.kl for row in shown)
        y = around("KL from float, nats/token", [r.kl or 0.0 for r in shown], log=log, zero=not log)
        number = {row.key: str(n) for n, row in enumerate(shown, 1)}
        cells = [
            [
                f"{number[r.key]} {r.name}{' *' if r.key in best else ''}",
                f"{(r.nbytes or 0) / 1e6:.2f}",
                short(r.kl or 0.0),
                "not timed" if r.tokens_per_s is None else short(r.tokens_per_s),
            ]
            for r in shown
        ]
        for key, title, label, values in (
            ("size", "Size and divergence", "Size of the artifact, MB",
             {r.key: (r.nbytes or 0) / 1e6 for r in shown}),
            ("rate", "Speed and divergence", "Speed of one thread, tokens/s",
             {r.key: r.tokens_per_s for r in shown if r.tokens_per_s}),
        ):  # fmt: skip
            x = around(label, values.values())
            if x is None or y is None:
                continue
            dots = tuple(
                Dot(number[r.key], values[r.key] or 0.0, r.kl or 0.0, 0, r.key not in best)
                for r in sorted(shown, key=lambda row: row.key in best)  # the best on top
                if r.key in values
            )
            front = [r for r in shown if r.key in best] if key == "size" else []
            plots.append(
                Plot(
                    f"pareto-{i}-{key}",
                    f"{title}: {model}",
                    f"{label}, against KL divergence from the float model, one dot a recipe.",
                    x,
                    y,
                    tuple(_front(front)),
                    dots,
                    notes=(
                        "Filled, and * in the table: no other recipe is both smaller and nearer "
                        "to the float model.",
                    ),
                    columns=("recipe", "MB", "KL, nats/token", "tokens/s"),
                    rows=cells if key == "size" else (),
                    open=True,
                )
            )
    return plots


def not_swept(rows: Sequence[SweepResult]) -> list[Missing]:
    """Recipes without a size or a divergence."""
    return [
        Missing(f"{row.name} on {row.model}", row.error or "size or divergence was not measured")
        for row in rows
        if row.nbytes is None or row.kl is None
    ]


def _front(rows: Sequence[SweepResult]) -> Iterable[Line]:
    if len(rows) > 1:
        x = np.array([(row.nbytes or 0) / 1e6 for row in rows])
        yield Line("Pareto front", x, np.array([row.kl or 0.0 for row in rows]), 0, quiet=True)


def _decode_bytes(entry: ReportedRun) -> float | None:
    return entry.run.subject.get("bytes_per_token")


def _prefill_bytes(entry: ReportedRun) -> float | None:
    """Bytes that a prompt's operations read."""
    known = entry.run.operations
    phases = [p for p in known.phases if p.name == "prefill"] if known else []
    return sum(row.nbytes or 0 for p in phases for row in p.rows) or None


def _all(rows: Iterable[np.ndarray]) -> list[float]:
    return [float(v) for row in rows for v in row]
