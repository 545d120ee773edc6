"""Numbers derived from a document's raw samples: percentiles, rates, joules, tables, decay."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np

from edgeq.devices.energy import Energy, TimeWindow, per_token
from edgeq.profiling.document import IDLE, Document, Run
from edgeq.profiling.limits import bandwidth_doubt, exceeds, throughput_doubt
from edgeq.profiling.operations import Operation, Phase

OUTSIDE = "(outside)"
"""The row of what no operation accounts for: Python, threads waking, a runtime's own work."""


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Count, mean, standard deviation, extremes and percentiles; None of no values."""
    if not values:
        return None
    p50, p90, p99 = np.percentile(values, [50, 90, 99]).tolist()
    return {
        "n": len(values),
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "min": min(values),
        "p50": p50,
        "p90": p90,
        "p99": p99,
        "max": max(values),
    }


def summary(document: Document, run: Run) -> dict[str, Any]:
    """The figures of a run in one record; what is unknown is None."""
    subject, environment, workload = run.subject, document.environment, document.workload
    tokens = subject["unit"] == "token"
    steps = [ns / 1e6 for s in run.timed for ns in s.step_ns]
    prefills = [s.prefill_ns for s in run.timed if s.prefill_ns]
    rates = [len(s.step_ns) * 1e9 / sum(s.step_ns) for s in run.timed if s.step_ns]
    prefill = spread([workload.n_prompt * 1e9 / ns for ns in prefills])
    decode = spread(rates)
    threads = str(subject.get("threads"))
    read_peak = environment["read_gb_s"].get(threads)
    int8_peak = environment["int8_gops"].get(threads)
    gb_s = _product(decode, subject.get("bytes_per_token"), 1e9)
    gops = {
        "prefill": _product(
            spread([1e9 / ns for ns in prefills]), subject.get("macs_prefill"), 5e8
        ),
        "decode": _product(decode, subject.get("macs_per_token"), 5e8),
    }
    bandwidth_percent = _percent(gb_s, read_peak)
    int8_percent = {name: _percent(value, int8_peak) for name, value in gops.items()}
    count, contention = subject.get("threads"), document.contention
    busy = document.limits_contention.reasons(count) if document.limits_contention else []
    return {
        "name": subject["name"],
        "runtime": subject["runtime"],
        "threads": subject.get("threads"),
        "rounds": len(run.timed),
        "ttft_ms": spread([ns / 1e6 for ns in prefills]),
        "tpot_ms": spread(steps) if tokens else None,
        "run_ms": None if tokens else spread(steps),
        "prefill_tokens_per_s": prefill,
        "decode_tokens_per_s": decode if tokens else None,
        "runs_per_s": None if tokens else decode,
        "gb_per_s": gb_s,
        "bandwidth_percent": bandwidth_percent,
        "int8_gops": gops,
        "int8_percent": int8_percent,
        "warning": contention and contention.warning(count),
        "suspect": {
            "gb_per_s": bandwidth_doubt(bandwidth_percent, subject.get("bytes_per_token"), busy),
            **{
                f"int8_gops.{name}": throughput_doubt(value, busy)
                for name, value in int8_percent.items()
            },
        },
        "memory": {
            "peak_rss_bytes": run.peak_rss_bytes,
            "weights_bytes": subject.get("weights_bytes"),
            "kv_bytes": subject.get("kv_bytes"),
            "scratch_bytes": subject.get("scratch_bytes"),
        },
        "energy": {
            "prefill": _energy(document, run, "prefill"),
            "decode": _energy(document, run, "decode"),
            "rounds": _energy(document, run, "rounds"),
        },
        "estimate": run.estimate,
        "sensors": sensors(document),
        "operations": run.operations
        and {
            "source": run.operations.source,
            "reason": run.operations.reason,
            "phases": [
                {
                    "name": p.name,
                    "covered_percent": _percent(p.covered, 1.0),
                    "cost_percent": _percent(p.cost, 1.0),
                }
                for p in run.operations.phases
            ],
        },
    }


def energies(document: Document, run: Run, part: str) -> tuple[list[Energy], list[int]]:
    """The energy of each timed repeat, and the tokens it was of; above idle if that was measured.

    Args:
        document: whose meters are asked.
        run: whose repeats.
        part: "prefill" or "decode", where only this window counts; or "rounds": all repeats in
            one window, counted instead of tokens, for meters that are slower than a repeat. It
            is given only for a run that had the machine to itself.
    """
    recording = document.recording
    idle = next(iter(recording.named(IDLE)), None)
    if part == "rounds":
        start = min((sample.start_ns for sample in run.timed), default=0)
        end = max((sample.end_ns for sample in run.timed), default=0)
        if len(document.runs) > 1 or end <= start:
            return [], []
        whole = TimeWindow(part, start, end)
        return [recording.energy(whole, idle=idle)], [len(run.timed)]
    energies, counts = [], []
    for sample in run.timed:
        start, end, count = sample.decode_start_ns, sample.end_ns, len(sample.step_ns)
        if part == "prefill":
            start, end = sample.start_ns, sample.decode_start_ns
            count = document.workload.n_prompt
        if count and end > start:
            energies.append(recording.energy(TimeWindow(part, start, end), idle=idle))
            counts.append(count)
    return energies, counts


def sensors(document: Document) -> dict[str, dict[str, Any]]:
    """What each channel of each meter was at first, at last and at the extremes."""
    sensors = {}
    for trace in document.recording.traces:
        if trace.sensor.quantity == "energy":  # a counter, whose values mean nothing
            continue
        for channel in trace.values:
            _, values, _ = trace.series(channel)
            if values.size:
                sensors[f"{trace.sensor.name}/{channel}"] = {
                    "quantity": trace.sensor.quantity,
                    "unit": trace.sensor.unit,
                    "first": float(values[0]),
                    "min": float(values.min()),
                    "max": float(values.max()),
                    "last": float(values[-1]),
                }
    return sensors


def decay(document: Document, run: Run, parts: int = 10) -> list[dict[str, Any]]:
    """Speed over time, and the sensors' means meanwhile.

    Args:
        document: whose meters are asked.
        run: whose repeats.
        parts: of equal length, into which its time is cut; those without a token are left out.

    Returns:
        seconds since the start, decode rate, and mean of each channel of temperature, clock and
        power; None where nothing was read.
    """
    if not run.timed:
        return []
    ends, took = [], []
    for sample in run.timed:
        ends.append(sample.decode_start_ns + np.cumsum(sample.step_ns, dtype=np.int64))
        took.append(np.array(sample.step_ns, np.int64))
    end_ns, step_ns = np.concatenate(ends), np.concatenate(took)
    if not end_ns.size:
        return []
    begin = run.timed[0].start_ns
    edges = np.linspace(begin, int(end_ns[-1]) + 1, parts + 1).astype(np.int64)
    rows = []
    for low, high in pairwise(edges.tolist()):
        inside = (end_ns >= low) & (end_ns < high)
        if not inside.any():
            continue
        row: dict[str, Any] = {
            "seconds": float((low + high) / 2 - begin) / 1e9,
            "per_s": float(inside.sum() * 1e9 / step_ns[inside].sum()),
        }
        for trace in document.recording.traces:
            if trace.sensor.quantity not in ("temperature", "frequency", "power", "throttle"):
                continue
            for channel in trace.values:
                t_ns, values, _ = trace.series(channel)
                seen = values[(t_ns >= low) & (t_ns < high)]
                name = f"{trace.sensor.name}/{channel}"
                row[name] = float(seen.mean()) if seen.size else None
        rows.append(row)
    return rows


def beyond_memory(document: Document, run: Run, row: Mapping[str, Any]) -> bool:
    """Whether an operation read faster than memory was measured to, so mostly from caches.

    Args:
        document: with the machine's limits.
        run: whose operation it is.
        row: of `by_operation` or `by_layer`.
    """
    peak = document.environment["read_gb_s"].get(str(run.subject.get("threads")))
    return exceeds(_percent(row["gb_per_s"], peak))


def by_operation(phase: Phase, against: Phase | None = None) -> list[dict[str, Any]]:
    """A phase's operations of all layers together, the longest first.

    Args:
        phase: of the run.
        against: the same phase of another, whose time for the same operation is divided by this
            one's: "speedup".
    """
    return _table(phase, lambda row: row.op, "op", against)


def by_layer(phase: Phase, against: Phase | None = None) -> list[dict[str, Any]]:
    """A phase's layers, in order; what is of no layer comes by its operation."""
    return _table(phase, lambda row: row.op if row.layer is None else row.layer, "layer", against)


def _table(
    phase: Phase, key: Callable[[Operation], Any], name: str, against: Phase | None
) -> list[dict[str, Any]]:
    groups = _grouped(phase, key)
    others = _grouped(against, key) if against else {}
    wall_ns = None if phase.middle is None else phase.wall_ns[phase.middle]
    rows: list[dict[str, Any]] = []
    for label, members in groups.items():
        ns = _middle_ns(phase, members)
        theirs = _middle_ns(against, others[label]) if against and label in others else None
        read = [row.nbytes for row in members if row.nbytes is not None]
        speedup = None
        if ns and theirs and against:
            speedup = (theirs / against.units) / (ns / phase.units)
        rows.append(
            {
                name: label,
                "calls": sum(row.calls for row in members),
                "ns_per_unit": None if ns is None else ns / phase.units,
                "percent": _percent(ns, wall_ns),
                "bytes_per_unit": sum(read) / phase.units if read else None,
                "gb_per_s": sum(read) / ns if read and ns else None,
                "speedup": speedup,
            }
        )
    middle = _middle_ns(phase, phase.rows)
    if middle is not None and wall_ns is not None:
        left = max(wall_ns - middle, 0)
        rows.append(
            {
                name: OUTSIDE, "calls": phase.units, "ns_per_unit": left / phase.units,
                "percent": _percent(left, wall_ns),
                "bytes_per_unit": None, "gb_per_s": None, "speedup": None,
            }
        )  # fmt: skip
    if name == "op":
        rows.sort(key=lambda row: (-(row["ns_per_unit"] or 0), -row["calls"]))
    else:  # layers in order, then what is of none
        rows.sort(key=lambda row: row[name] if isinstance(row[name], int) else math.inf)
    total = 0.0
    for row in rows:
        total += row["percent"] or 0.0
        row["cumulative_percent"] = None if row["percent"] is None else total
    return rows


def _grouped(phase: Phase, key: Callable[[Operation], Any]) -> dict[Any, list[Operation]]:
    groups: dict[Any, list[Operation]] = {}
    for row in phase.rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _middle_ns(phase: Phase, rows: Sequence[Operation]) -> int | None:
    """Time of some operations in the phase's median repeat; None if it is not known."""
    if phase.middle is None:
        return None
    return sum(row.ns[phase.middle] for row in rows if row.ns is not None)


def _energy(document: Document, run: Run, part: str) -> dict[str, Any]:
    windows, counts = energies(document, run, part)
    joules = per_token(windows, counts)
    known = [e for e in windows if e.joules is not None]
    first = known[0] if known else None
    watts = [e.mean_watts for e in known if e.mean_watts is not None]
    return {
        "joules_per_token": asdict(joules),
        "mean_watts": statistics.fmean(watts) if watts else None,
        "meter": first and first.meter,
        "provenance": first and first.provenance,
        "covers": first and first.covers,
        "idle_watts": first and first.idle_watts,
        "problems": sorted({p for e in known for p in e.problems}),
    }


def _product(rate: dict[str, float] | None, each: float | None, unit: float) -> float | None:
    return None if rate is None or not each else rate["mean"] * each / unit


def _percent(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else 100 * part / whole
