"""``edgeq profile``: measure time, memory and energy of a model, and of each operation."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeq.cli import busy, render
from edgeq.cli.busy import MARK
from edgeq.cli.options import (
    backend_option,
    command,
    kv_bits_of,
    kv_options,
    model_argument,
    threads_option,
)
from edgeq.cli.warmup import compile_first
from edgeq.core.errors import UsageError
from edgeq.core.files import check_target

if TYPE_CHECKING:
    from edgeq.profiling.document import Document, Run
    from edgeq.profiling.operations import Phase


class Seconds(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3
    """A duration: ``30``, ``30s``, ``10m`` or ``1h``."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Parse the text of the value as seconds."""
        if isinstance(value, int | float):
            return float(value)
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", value.strip())
        if not match:
            self.fail(f"{value!r} is not a duration; write 30s, 10m or 1h", param, ctx)
        return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


@command("profile", "Show where time, memory and energy go.")
@model_argument
@click.option("--compare", multiple=True, metavar="MODEL", show_default=False,
              help="Also profile this model, in alternation with MODEL. TARGET:FILE names the "
                   "runtime, such as gguf:model.gguf for llama.cpp. May be given several "
                   "times.")  # fmt: skip
@click.option("-p", "--n-prompt", type=click.IntRange(min=0), default=128,
              help="Prompt length in tokens.")  # fmt: skip
@click.option("-n", "--n-gen", type=click.IntRange(min=0), default=64,
              help="Number of tokens to generate; for graphs, the number of "
                   "inferences.")  # fmt: skip
@click.option("-d", "--n-depth", type=click.IntRange(min=0), default=0,
              help="Number of tokens already in the KV cache at the start.")  # fmt: skip
@click.option("-r", "--repetitions", type=click.IntRange(min=1), default=5,
              help="Number of timed rounds.")  # fmt: skip
@click.option("--warmup", type=click.IntRange(min=0), default=1,
              help="Number of untimed rounds at the start.")  # fmt: skip
@click.option("--sustained", type=Seconds(), default=0.0, show_default=False,
              help="Keep running for this long, such as 10m, and show speed and temperature over "
                   "time.")  # fmt: skip
@click.option("--idle", type=Seconds(), default=0.0, show_default=False,
              help="First measure idle power for this long, such as 30s, and subtract "
                   "it.")  # fmt: skip
@click.option("--meter", "extra_meters", multiple=True, metavar="KIND:PATH", show_default=False,
              help="An additional power meter, such as serial:/dev/ttyACM0, or adb:SERIAL for a "
                   "phone's battery. May be given several times.")  # fmt: skip
@click.option("--energy-log", type=click.Path(exists=True, path_type=Path), default=None,
              help="The log of an external power meter with Unix timestamps; it is read after the "
                   "run.")  # fmt: skip
@click.option("--estimate", metavar="DEVICE", default=None, show_default=False,
              help="Also estimate the energy from the power that this device draws under load; the "
                   "figure is labeled as an estimate.")  # fmt: skip
@click.option("--on", "on", metavar="PLACE", default=None, show_default=False,
              help="Run on another machine: ssh://user@host[:port] or adb://serial; local: runs in "
                   "a separate process.")  # fmt: skip
@click.option("--on-python", metavar="PATH", default=None, show_default=False,
              help="With --on: the Python to use there, such as edgeq-env/bin/python in the home "
                   "folder.")  # fmt: skip
@click.option("--operations/--no-operations", default=True,
              help="Also time every operation, after the timed rounds.")  # fmt: skip
@threads_option
@kv_options
@backend_option
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), multiple=True,
              show_default=False,
              help="Save all raw samples to a .json file, or a report to an .html file. May be "
                   "given several times.")  # fmt: skip
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table",
              help="Format of the result on standard output.")  # fmt: skip
def profile(
    model: str,
    compare: tuple[str, ...],
    n_prompt: int,
    n_gen: int,
    n_depth: int,
    repetitions: int,
    warmup: int,
    sustained: float,
    idle: float,
    extra_meters: tuple[str, ...],
    energy_log: Path | None,
    estimate: str | None,
    on: str | None,
    on_python: str | None,
    operations: bool,
    threads: int | None,
    kv_bits: str,
    cache_type_k: str | None,
    cache_type_v: str | None,
    backend: str,
    output: tuple[Path, ...],
    form: str,
) -> None:
    """Run MODEL and show the time to the first token, the time per token, the share of every
    operation, and memory, clock rate, temperature and energy.

    MODEL is an .edgeq file, a checkpoint, an .onnx, .ort or .tflite file, or a file that edgeq
    converted. The operations of an .mlpackage are only counted. Energy is shown only if this
    machine can measure it. With --on, MODEL and edgeq are copied to another machine that has
    Python, NumPy and Numba, and removed afterwards.
    """
    from edgeq.api.profile import profile as run
    from edgeq.devices.meters import read_log
    from edgeq.profiling.foreign import Named
    from edgeq.profiling.session import Workload

    bits = kv_bits_of(kv_bits, cache_type_k, cache_type_v)
    if not n_prompt + n_gen:
        raise click.UsageError(
            "-p and -n are both 0, so there is nothing to time; give one of them a positive number"
        )
    _check(output)
    if on_python is not None and on is None:
        raise click.UsageError(
            "--on-python names the Python of another machine; also name the machine with --on"
        )
    workload = Workload(n_prompt, n_gen, n_depth, warmup, repetitions, sustained)
    models = (model, *compare)
    if on is None and any(Named.parse(text).target is None for text in models):
        compile_first(backend)
    title = "Profiling" if on is None else f"Profiling on {on}"
    with render.progress(title, still=True) as bar:
        document = run(
            models, workload, threads=threads, kv_bits=bits, backend=backend, meters=extra_meters,
            idle_seconds=idle, operations=operations, estimate=estimate, on=on,
            on_python=on_python, progress=bar,
        )  # fmt: skip
    _keep(document, output)  # first, so that a later error does not lose the samples
    if energy_log is not None:
        document = document.with_logs(read_log(energy_log))
        _keep(document, output)
    render.write(_json(document) if form == "json" else _text(document, long=sustained > 0))


def _check(output: tuple[Path, ...]) -> None:
    """Refuse output files that cannot be written, before anything runs."""
    for path in output:
        if path.suffix.lower() not in (".json", ".html"):
            raise click.UsageError(
                f"--output is {path}; its name must end in .json for raw samples or in .html for a "
                "report"
            )
        try:
            check_target(path)
        except UsageError as err:
            raise click.UsageError(str(err)) from err


def _keep(document: Document, output: tuple[Path, ...]) -> None:
    """Write the raw samples, then the reports."""
    from edgeq.profiling import document as documents
    from edgeq.reporting import Sources, write

    for path in sorted(output, key=lambda path: path.suffix.lower() == ".html"):
        if path.suffix.lower() == ".json":
            documents.write(document, path)
        else:
            write(Sources(((path.name, document),)), path, title=path.stem)


def _json(document: Document) -> str:
    from edgeq.profiling import summary as derive

    runs = [
        {
            **derive.summary(document, run),
            "decay": derive.decay(document, run),
            "tables": {
                phase.name: {
                    "operations": derive.by_operation(phase, _same(document, run, phase)),
                    "layers": derive.by_layer(phase, _same(document, run, phase)),
                }
                for phase in (run.operations.phases if run.operations else ())
            },
        }
        for run in document.runs
    ]
    record = {"created": document.created, "environment": dict(document.environment), "runs": runs}
    return json.dumps(record, indent=2) + "\n"


def _same(document: Document, run: Run, phase: Phase) -> Phase | None:
    """The same phase of another run, to which speedups are relative."""
    others = [r for r in document.runs if r is not run and r.operations is not None]
    phases = [p for r in others[:1] if r.operations for p in r.operations.phases]
    return next((p for p in phases if p.name == phase.name and p.middle is not None), None)


def _text(document: Document, *, long: bool) -> str:
    from edgeq.profiling import summary as derive

    summaries = [derive.summary(document, run) for run in document.runs]
    # warnings differ between runs, because more threads are disturbed more easily
    parts = [busy.warnings([one["warning"] for one in summaries]).strip()]
    from_caches = False
    for run, figures in zip(document.runs, summaries, strict=True):
        parts.append(run_figures(figures))
        if long:
            parts.append(_over_time(derive.decay(document, run)))
        for phase in run.operations.phases if run.operations else ():
            other = _same(document, run, phase)
            tables = {"op": derive.by_operation(phase, other)}
            if any(row.layer is not None for row in phase.rows):
                tables["layer"] = derive.by_layer(phase, other)
            for key, rows in tables.items():
                marked = [phase.middle is not None and derive.beyond_memory(document, run, row)
                          for row in rows]  # fmt: skip
                from_caches = from_caches or any(marked)
                parts.append(_table(phase, rows, key, marked))
    if from_caches:
        parts.append(
            f"{MARK} above the measured memory bandwidth: the data came from caches, or the\n"
            "  machine was slower when its bandwidth was measured"
        )
    parts.append(_sensors(document))
    return "\n\n".join(part for part in parts if part) + "\n"


def run_figures(summary: dict[str, Any]) -> str:
    """The figures of a run, one per line. Unknown figures are left out, except energy."""
    rows = [("model", summary["name"])]
    if summary["runtime"]:
        rows.append(("runtime", f"{summary['runtime']}, {summary['threads']} threads"))
    for key, name in (("ttft_ms", "first token"), ("tpot_ms", "each token"), ("run_ms", "run")):
        figures = summary[key]
        if figures:
            rows.append(
                (
                    name,
                    f"{figures['p50']:.3f} ms p50, {figures['p90']:.3f} p90, "
                    f"{figures['p99']:.3f} p99",
                )
            )
    for part in ("prefill", "decode"):
        figures, share = summary[f"{part}_tokens_per_s"], summary["int8_percent"][part]
        if figures:
            text = f"{figures['mean']:.2f} ± {figures['std']:.2f} tokens/s"
            if share is not None:
                doubt = summary["suspect"][f"int8_gops.{part}"]
                mark = MARK if doubt else ""
                text += (
                    f", {summary['int8_gops'][part]:.1f}{mark} GOPS "
                    f"({share:.0f}{mark} % of the kernel's peak)"
                )
                text += f" ({MARK} {doubt})" if doubt else ""
            rows.append((part, text))
    if summary["gb_per_s"] is not None:
        doubt = summary["suspect"]["gb_per_s"]
        mark = MARK if doubt else ""
        text = f"{summary['gb_per_s']:.2f}{mark} GB/s"
        if summary["bandwidth_percent"] is not None:
            text += f", {summary['bandwidth_percent']:.0f}{mark} % of what this machine reads"
        text += f" ({MARK} {doubt})" if doubt else ""
        rows.append(("bandwidth", text))
    memory = summary["memory"]
    names = (("peak RSS", "peak_rss_bytes"), ("weights", "weights_bytes"),
             ("KV cache", "kv_bytes"), ("scratch", "scratch_bytes"))  # fmt: skip
    sizes = [f"{name} {render.human_bytes(memory[key])}" for name, key in names if memory[key]]
    rows.append(("memory", ", ".join(sizes)))
    if summary["rounds"]:
        rows.append(("energy", _energy(summary["energy"], summary["runs_per_s"] is not None)))
    if summary["estimate"]:
        rows.append(("", _estimate(summary["estimate"])))
    known = summary["operations"]
    for phase in known["phases"] if known else ():
        if phase["covered_percent"] is not None:
            text = f"cover {phase['covered_percent']:.1f} % of {phase['name']}"
            if phase["cost_percent"] is not None:
                text += f", timing them cost {phase['cost_percent']:+.1f} %"
            rows.append(("operations", text))
    if known and known["reason"]:
        rows.append(("operations", known["reason"]))
    return "\n".join(
        render.wrapped(f"{name:12s}{text}", render.prose_width(), " " * 12) for name, text in rows
    )


def _energy(energy: dict[str, Any], runs: bool) -> str:
    """The energy of decoding, or of whole rounds if the meter is too slow for that."""
    window, what = energy["decode"], "J/run" if runs else "J/token of decode"
    if window["joules_per_token"]["mean"] is None:
        if energy["rounds"]["joules_per_token"]["mean"] is None:
            return f"not measured: {window['joules_per_token']['reason']}"
        window, what = energy["rounds"], "J/round"
    each = window["joules_per_token"]
    text = f"{each['mean']:.4g}"
    if each["std"] is not None:
        text += f" ± {each['std']:.2g}"
    text += f" {what}, {window['mean_watts']:.3g} W of {window['covers']}"
    if window["idle_watts"] is not None:
        text += f" above {window['idle_watts']:.3g} W idle"
    return f"{text} ({window['meter']}: {window['provenance']})"


def _estimate(estimate: dict[str, Any]) -> str:
    joules = estimate["decode_joules_per_token"]
    if joules is None:
        return f"no estimate: {estimate['reason']}"
    return (
        f"{joules:.4g} J/{estimate.get('unit', 'token')} ESTIMATED, not measured: "
        f"{estimate['load_watts']} W of {estimate['device']} under load at this speed"
    )


def _over_time(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    channels = [key for key in rows[0] if key not in ("seconds", "per_s")]
    cells = [
        [
            f"{row['seconds']:.1f}",
            f"{row['per_s']:.2f}",
            *("" if row[name] is None else f"{row[name]:.4g}" for name in channels),
        ]
        for row in rows
    ]
    return render.aligned(["seconds", "per s", *channels], cells, "r" * (2 + len(channels)))


def _table(phase: Phase, rows: list[dict[str, Any]], key: str, marked: list[bool]) -> str:
    """A table of operations or layers; ``marked`` rows exceed the memory bandwidth."""
    unit = "run" if phase.name == "run" else "token"
    if phase.middle is None:
        counts = [[str(row[key]), str(row["calls"])] for row in rows]
        return render.aligned([key, "times"], counts, "lr")
    faster = any(row["speedup"] for row in rows)
    head = [f"{phase.name}: {key}", f"us/{unit}", "%", "sum %", f"KiB/{unit}", "GB/s"]
    cells = [
        [
            str(row[key]),
            f"{row['ns_per_unit'] / 1000:.2f}",
            f"{row['percent']:.1f}",
            f"{row['cumulative_percent']:.1f}",
            "" if row["bytes_per_unit"] is None else f"{row['bytes_per_unit'] / 1024:.1f}",
            "" if row["gb_per_s"] is None else f"{row['gb_per_s']:.2f}{MARK * mark}",
            *([f"{row['speedup']:.2f}x" if row["speedup"] else ""] if faster else []),
        ]
        for row, mark in zip(rows, marked, strict=True)
    ]
    return render.aligned(head + ["speedup"] * faster, cells, "lrrrrrr"[: len(head) + faster])


def _sensors(document: Document) -> str:
    from edgeq.profiling.summary import sensors

    rows = []
    for name, seen in sensors(document).items():
        values = [seen[key] for key in ("first", "min", "max", "last")]
        if seen["unit"] == "B":
            rows.append([name, *map(render.human_bytes, values), ""])
        else:
            rows.append([name, *(f"{value:.4g}" for value in values), seen["unit"]])
    if not rows:
        return ""
    return render.aligned(["meter", "first", "least", "most", "last", "unit"], rows, "lrrrrl")
