"""Every figure with its unit and where it comes from; operations, machine, what was missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgeq.profiling.document import Document
from edgeq.profiling.operations import Phase
from edgeq.profiling.summary import by_operation
from edgeq.reporting.axes import short, threads_of
from edgeq.reporting.sources import ReportedRun

MIB = 2.0**20
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Figure:
    """A line of a run's summary: what, how much with its unit, and where that comes from."""

    name: str
    value: str
    source: str


@dataclass(frozen=True)
class Bar:
    """A cell with a bar below its number.

    Args:
        text: the number; "" if it is not known.
        part: of the longest bar of its column, 0 to 1.
    """

    text: str
    part: float


@dataclass(frozen=True)
class Bars:
    """Operations of a phase, the longest first.

    Args:
        name: of the phase.
        unit: what the numbers are for: a token or a run.
        timed: whether times are known; else operations were only counted.
        rows: each operation with its cells.
        covered: the part of the whole that they add up to, %; None if unknown.
    """

    name: str
    unit: str
    timed: bool
    rows: tuple[tuple[str, tuple[Bar, ...]], ...]
    covered: float | None

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the cells, with their units."""
        if not self.timed:
            return ("times",)
        return ("time, %", f"time, µs per {self.unit}", f"read, KiB per {self.unit}", "rate, GB/s")


def figures(entry: ReportedRun) -> list[Figure]:
    """The summary of a run; energy is there even where it was not measured, with the reason."""
    return list(_figures(entry))


def _figures(entry: ReportedRun) -> Iterator[Figure]:
    figures, subject, work = entry.figures, entry.run.subject, entry.document.workload
    threads = figures["threads"]
    yield Figure(
        "runtime", str(figures["runtime"] or "none here"), ", ".join(_engine_settings(subject))
    )
    rounds = f"of {figures['rounds']} timed rounds"
    depth = f" after {work.n_depth} others" if work.n_depth else ""
    if ttft := figures["ttft_ms"]:
        yield Figure("first token", _percentiles(ttft),
                     f"time of reading {work.n_prompt} tokens{depth}, {rounds}")  # fmt: skip
    for key, unit in (("tpot_ms", "token"), ("run_ms", "run")):
        if ttft := figures[key]:
            yield Figure(f"each {unit}", _percentiles(ttft), f"all {ttft['n']} {unit}s {rounds}")
    for part in ("prefill", "decode"):
        if ttft := figures[f"{part}_tokens_per_s"]:
            yield Figure(part, _mean(ttft, "tokens/s"), f"mean and deviation {rounds}")
        if (gops := figures["int8_gops"][part]) is not None:
            share = figures["int8_percent"][part]
            yield Figure(
                f"{part}, integer work",
                f"{short(gops)} GOPS"
                + _share(share, doubt := figures["suspect"][f"int8_gops.{part}"]),
                "operations counted from the model's shape, at that rate"
                + _limit(share, f"the matmul kernel's peak measured here, {threads_of(threads)}")
                + _doubt(doubt),
            )
    if ttft := figures["runs_per_s"]:
        yield Figure("runs", _mean(ttft, "runs/s"), f"mean and deviation {rounds}")
    if (gb_s := figures["gb_per_s"]) is not None:
        share = figures["bandwidth_percent"]
        yield Figure(
            "bandwidth",
            f"{short(gb_s)} GB/s" + _share(share, doubt := figures["suspect"]["gb_per_s"]),
            "bytes read per token, times the decoding speed"
            + _limit(share, f"the read bandwidth measured here, {threads_of(threads)}")
            + _doubt(doubt),
        )
    yield from _memory(figures["memory"], len(entry.document.runs))
    if figures["rounds"]:
        energies = [
            _energy(part, subject["unit"], ttft)
            for part, ttft in figures["energy"].items()
            if ttft["joules_per_token"]["samples"]  # a graph reads no prompt
        ]
        if any(energy.value != NOT_MEASURED for energy in energies[:-1]):
            energies = energies[:-1]  # rounds are for meters slower than one
        elif len({energy.source for energy in energies}) == 1:
            energies = [replace(energies[0], name="energy")]
        yield from energies
    if guess := figures["estimate"]:
        yield _estimate(guess)


def _engine_settings(subject: Mapping[str, Any]) -> Iterator[str]:
    if subject.get("threads") is not None:
        yield threads_of(subject["threads"])
    for key, text in (("kernel", "kernel {}"), ("backend", "{}"),
                      ("kv_bits", "{} bits of cache"), ("context", "context {}")):  # fmt: skip
        if subject.get(key) is not None:
            yield text.format(subject[key])


def _memory(memory: Mapping[str, Any], runs: int) -> Iterator[Figure]:
    peak = memory["peak_rss_bytes"]
    if peak is None:
        reason = "the runs share the process" if runs > 1 else "this system does not tell"
        yield Figure("peak memory (RSS)", NOT_MEASURED, reason)
    else:
        yield Figure("peak memory (RSS)", f"{short(peak / MIB)} MiB",
                     "most that the whole process held while it ran")  # fmt: skip
    for key, name in (("weights", "weights"), ("kv", "KV cache"), ("scratch", "scratch")):
        if memory[f"{key}_bytes"]:
            yield Figure(
                name, f"{short(memory[f'{key}_bytes'] / MIB)} MiB", "counted, not measured"
            )


def _energy(part: str, unit: str, figures: Mapping[str, Any]) -> Figure:
    each = figures["joules_per_token"]
    together = part == "rounds"
    unit = "round" if together else unit
    part = "runs" if unit == "run" else part
    name = f"energy of {part}"
    if each["mean"] is None:
        return Figure(name, NOT_MEASURED, each["reason"])
    value = short(each["mean"])
    if each["std"] is not None:
        value += f" ± {short(each['std'])}"
    value += f" J/{unit} at {short(figures['mean_watts'])} W"
    known = sum(joules is not None for joules in each["samples"])
    source = f"{figures['meter']}: {figures['provenance']}"
    if figures["covers"]:
        source += f", of {figures['covers']}"
    count = f"the {part} of {known} of {len(each['samples'])} timed rounds"
    source += f"; {'all timed rounds together' if together else count}"
    if figures["idle_watts"] is not None:
        source += f"; {short(figures['idle_watts'])} W of the idle machine subtracted"
    for problem in (*figures["problems"], *([each["reason"]] if each["reason"] else [])):
        source += f"; {problem}"
    return Figure(name, value, source)


def _estimate(guess: Mapping[str, Any]) -> Figure:
    name, joules = "energy, ESTIMATE", guess["decode_joules_per_token"]
    if joules is None:
        return Figure(name, "no estimate", str(guess["reason"]))
    return Figure(
        name,
        f"{short(joules)} J/{guess.get('unit', 'token')}, not measured",
        f"{guess['method']}: {guess['load_watts']} W of {guess['device']} ({guess['source']})",
    )


def compared(entries: Sequence[ReportedRun]) -> list[list[str]]:
    """The runs beneath each other, by their main figures."""
    rows = []
    for entry in entries:
        figures = entry.figures
        each = figures["tpot_ms"] or figures["run_ms"]
        joules = figures["energy"]["decode"]["joules_per_token"]["mean"]
        peak = figures["memory"]["peak_rss_bytes"]
        speed = figures["decode_tokens_per_s"] or figures["runs_per_s"]
        cells = [
            figures["ttft_ms"] and short(figures["ttft_ms"]["p50"]),
            each and short(each["p50"]),
            each and short(each["p99"]),
            figures["prefill_tokens_per_s"] and short(figures["prefill_tokens_per_s"]["mean"]),
            speed and short(speed["mean"]),
            None if peak is None else short(peak / MIB),
            None if joules is None else short(joules),
        ]
        rows.append([entry.name, *(cell or "not measured" for cell in cells)])
    return rows


COMPARED = ("run", "first token p50, ms", "token or run p50, ms", "p99, ms", "prefill, tokens/s",
            "decode, tokens/s or runs/s", "peak RSS, MiB", "decode, J/token or J/run")  # fmt: skip


def operations(phase: Phase) -> Bars:
    """A phase's operations as bars."""
    unit = "run" if phase.name == "run" else "token"
    bars = by_operation(phase)
    covered = None if phase.covered is None else 100 * phase.covered
    if phase.middle is None:
        cells = [_bars([row["calls"] for row in bars])]
    else:
        cells = [
            _bars([row["percent"] for row in bars], "{:.1f}".format),
            _bars([_scaled(row["ns_per_unit"], 1e3) for row in bars]),
            _bars([_scaled(row["bytes_per_unit"], 1024) for row in bars]),
            _bars([row["gb_per_s"] for row in bars]),
        ]
    names = [str(row["op"]) for row in bars]
    rows = tuple((name, row) for name, *row in zip(names, *cells, strict=True))
    return Bars(
        phase.name, unit, phase.middle is not None,
        tuple((name, tuple(row)) for name, row in rows), covered,
    )  # fmt: skip


def _bars(values: Sequence[float | None], form: Callable[[float], str] = short) -> list[Bar]:
    most = max((v for v in values if v is not None), default=0) or 1
    return [Bar("", 0.0) if v is None else Bar(form(v), max(v / most, 0)) for v in values]


def machine(document: Document) -> list[tuple[str, str]]:
    """What the run was made on, and what it was asked to do."""
    environment, work = document.environment, document.workload
    rows = [(name, str(environment[name])) for name in ("cpu", "arch", "cores", "os", "python")
             if environment.get(name) is not None]  # fmt: skip
    for key, name, unit in (("read_gb_s", "reads", "GB/s"), ("int8_gops", "int8 peak", "GOPS")):
        for threads, value in environment[key].items():
            rows.append((f"{name}, {threads_of(threads)}", f"{short(value)} {unit}, measured here"))
    asked = f"{work.n_prompt} tokens read, {work.n_gen} generated one by one"
    if work.n_depth:
        asked += f", after {work.n_depth} others"
    rows.append(("each round", asked))
    rounds = f"{work.warmup} to warm up, then {work.repeats}"
    if work.min_seconds:
        rounds += f" or more, for {short(work.min_seconds)} s"
    rows += [("rounds", rounds), ("measured", f"{document.created} by {document.tool}")]
    if document.contention and (warning := document.contention.warning()):
        rows.insert(0, ("warning", warning))
    return rows


def problems(document: Document) -> list[tuple[str, str]]:
    """What went wrong with each meter that was read."""
    return [
        (trace.sensor.name, f"{text} ({count} times)" if count > 1 else text)
        for trace in document.recording.traces
        for text, count in trace.problems.items()
    ]


def _percentiles(values: Mapping[str, float]) -> str:
    return f"{short(values['p50'])} ms p50, {short(values['p90'])} p90, {short(values['p99'])} p99"


def _mean(values: Mapping[str, float], unit: str) -> str:
    return f"{short(values['mean'])} ± {short(values['std'])} {unit}"


def _share(percent: float | None, doubt: str | None) -> str:
    """A share of a limit; marked where it is beyond it and so no fact."""
    mark = "*" if doubt else ""
    return mark if percent is None else f"{mark}, {percent:.0f} %{mark}"


def _doubt(doubt: str | None) -> str:
    return f"; * {doubt}" if doubt else ""


def _limit(percent: float | None, of: str) -> str:
    return "; no limit was measured" if percent is None else f"; share of {of}"


def _scaled(value: float | None, by: float) -> float | None:
    return None if value is None else value / by
