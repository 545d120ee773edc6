"""``edgeq bench``: tokens per second, in the rows llama-bench prints."""

from __future__ import annotations

import csv
import io
import json
import platform
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import click

from edgeq._version import __version__
from edgeq.cli import busy, graphs, render
from edgeq.cli.options import (
    Counts,
    backend_option,
    command,
    kv_bits_of,
    kv_options,
    optional_model_argument,
    refuse_given,
    result_options,
    shared_option,
)
from edgeq.cli.plan import this_profile
from edgeq.cli.warmup import compile_first
from edgeq.importers import source_kind

if TYPE_CHECKING:
    from edgeq.devices.profile import DeviceProfile
    from edgeq.model.model import Model
    from edgeq.profiling import Measurement, Scenario


_DECODERS = (
    "shape", "preset", "n_prompt", "n_gen", "n_depth", "kv_bits", "cache_type_k", "cache_type_v",
    "backend", "against_plan",
)  # fmt: skip
"""Options that have no meaning for a graph."""


@command("bench", "Measure tokens per second, as llama-bench does.")
@optional_model_argument
@click.option("--shape", default=None, metavar="NAME",
              help="Instead of MODEL: random weights with the shape of a known model.")  # fmt: skip
@click.option("--preset", default="w4-g32", help="Quantization scheme of the random weights.")
@click.option("--list", "list_shapes", is_flag=True, help="List the known shapes and exit.")
@click.option("-p", "--n-prompt", type=Counts(0), default="512",
              help="Prompt lengths in tokens; 0 skips the prompt test.")  # fmt: skip
@click.option("-n", "--n-gen", type=Counts(0), default="128",
              help="Numbers of tokens to generate; 0 skips the generation test.")  # fmt: skip
@click.option("-d", "--n-depth", type=Counts(0), default="0",
              help="Numbers of tokens already in the KV cache when a test starts.")  # fmt: skip
@shared_option(
    "-t", "--threads", env="THREADS", type=Counts(1), default=None,
    help="Numbers of threads to test.  [default: the number of cores]",
)  # fmt: skip
@click.option("-r", "--repetitions", type=click.IntRange(min=1), default=5,
              help="Number of timed repetitions of each test.")  # fmt: skip
@kv_options
@backend_option
@click.option("--compare", multiple=True, metavar="MODEL", show_default=False,
              help="Graphs: time this model in alternation with MODEL, such as the float model. "
                   "May be given several times.")  # fmt: skip
@click.option("--against-plan", is_flag=True, show_default=False,
              help="Also show the speed and peak memory that `edgeq plan` predicts, and the error "
                   "of the prediction.")  # fmt: skip
@result_options("md", "json", "jsonl", "csv")
def bench(
    model: str | None,
    shape: str | None,
    preset: str,
    list_shapes: bool,
    n_prompt: tuple[int, ...],
    n_gen: tuple[int, ...],
    n_depth: tuple[int, ...],
    threads: tuple[int, ...] | None,
    repetitions: int,
    kv_bits: str,
    cache_type_k: str | None,
    cache_type_v: str | None,
    backend: str,
    compare: tuple[str, ...],
    against_plan: bool,
    form: str,
) -> None:
    """Measure how fast MODEL, or random weights with the shape of a known model, runs here.

    The test ppN processes a prompt of N tokens, tgN generates N tokens. Each test runs once to
    warm up and is then timed. GB/s is the memory traffic of generation: the bytes that each token
    must read, times the tokens per second; "of peak" is its share of the read bandwidth measured
    on this machine with the same number of threads.

    Graphs (.onnx, .ort, .tflite) are timed by whole inferences in their own runtimes.
    """
    if model is not None and source_kind(model) != "model":
        refuse_given(_DECODERS, "language models, and MODEL is a graph")
        if form == "csv":
            raise click.UsageError(
                "--format csv is for language models; for a graph give md, json or jsonl"
            )
        graphs.bench((model, *compare), threads[0] if threads else None, repetitions, form)
        return
    refuse_given(("compare",), "graphs; `edgeq profile --compare` compares language models")
    if list_shapes:
        render.write(_known_shapes() + "\n")
        return
    if (model is None) == (shape is None):
        raise click.UsageError("give either MODEL or --shape NAME (--list shows the known shapes)")
    bits = kv_bits_of(kv_bits, cache_type_k, cache_type_v)
    scenarios = _scenarios(n_prompt, n_gen, n_depth)
    loaded, name = _subject(model, shape, preset)
    rows = []
    profiles: dict[int, DeviceProfile] = {}
    for measurement, settings in _measurements(
        loaded, scenarios, threads, repetitions, bits, backend
    ):
        row = _record(loaded, name, measurement, settings)
        if against_plan:
            if measurement.threads not in profiles:
                profiles[measurement.threads] = this_profile(measurement.threads, measured=True)
            row |= _planned(loaded, measurement, settings, profiles[measurement.threads])
        rows.append(row)
        if form == "jsonl":
            render.write(json.dumps(row) + "\n")
    if form == "json":
        render.write(json.dumps(rows, indent=2) + "\n")
    elif form == "csv":
        render.write(_csv(rows))
    if form == "md":
        render.write(busy.warnings([row["warning"] for row in rows]))
        render.write(_markdown(rows) + "\n" + _footnotes(rows))
    elif warning := busy.warnings([row["warning"] for row in rows]).rstrip():
        render.note(warning)


def _known_shapes() -> str:
    from edgeq.model.shapes import SHAPES, parameters

    rows = [[name, render.human_count(parameters(config))] for name, config in SHAPES.items()]
    return render.aligned(["shape", "parameters"], rows, "lr")


def _scenarios(
    n_prompt: tuple[int, ...], n_gen: tuple[int, ...], n_depth: tuple[int, ...]
) -> list[Scenario]:
    from edgeq.profiling import Scenario

    found = [
        scenario
        for depth in n_depth
        for scenario in (
            *(Scenario(n, 0, depth) for n in n_prompt if n),
            *(Scenario(0, n, depth) for n in n_gen if n),
        )
    ]
    if not found:
        raise click.UsageError("there is nothing to time: -p and -n are both 0")
    return found


def _subject(model: str | None, shape: str | None, preset: str) -> tuple[Model, str]:
    if model is not None:
        from edgeq.importers import load

        return load(model), str(model)
    assert shape is not None
    from edgeq.model.shapes import random_model
    from edgeq.model.shapes import shape as known_shape
    from edgeq.quant import Recipe

    config, recipe = known_shape(shape), Recipe.from_options(preset)
    with render.progress(f"Making random weights of {shape}") as bar:
        return random_model(config, recipe.scheme_for, progress=bar), f"{shape} (random weights)"


def _measurements(
    model: Model,
    scenarios: list[Scenario],
    threads: tuple[int, ...] | None,
    repeats: int,
    kv_bits: Literal[8, 16],
    backend: str,
) -> Iterator[tuple[Measurement, dict[str, Any]]]:
    from edgeq.devices.contention import Watch
    from edgeq.profiling import measure, read_bandwidth
    from edgeq.runtime.engine import Engine

    compile_first(backend)
    context = max(s.context for s in scenarios)
    if context > model.config.context:
        # time past what the model was made for tells nothing of its answers, but is the same time
        model = replace(model, config=replace(model.config, context=context))
    with render.progress("Benchmarking", still=True) as bar:
        for count in threads or (None,):
            with Engine(
                model, context=context, threads=count, kv_bits=kv_bits, backend=backend
            ) as engine:
                measured = [
                    measure(
                        engine, model, scenario,
                        repeats=repeats, threads=engine.threads, kv_bits=kv_bits, progress=bar,
                    )
                    for scenario in scenarios
                ]  # fmt: skip
                threads_used = engine.threads
            del engine  # or its cache would be held beside the next one's
            # only now: its buffer is larger than many a model and would be the peak of memory
            watch = Watch()
            bandwidth = read_bandwidth(threads_used)
            disturbed = watch.stop().reasons(threads_used)
            held = 0
            for measurement in measured:
                # what a longer test before has touched stays in memory
                held = max(held, measurement.scenario.context)
                settings = {"backend": backend, "kv_bits": kv_bits, "bandwidth": bandwidth}
                yield measurement, settings | {"held": held, "busy": disturbed}


def _planned(
    model: Model, m: Measurement, settings: dict[str, Any], profile: DeviceProfile
) -> dict[str, Any]:
    """What a plan for this machine says of a test, and by how much it errs."""
    from edgeq.devices.model_header import facts_of
    from edgeq.devices.planner import plan
    from edgeq.devices.roofline import Speed, sustained

    facts, kv_bits, scenario = facts_of(model, "the model"), settings["kv_bits"], m.scenario
    made = plan(
        facts, profile, context=settings["held"], kv_bits=kv_bits, threads=m.threads, text=False
    )
    speed = Speed(facts, sustained(profile, m.threads), kv_bits)
    if scenario.n_gen:
        seconds = speed.decode_seconds(scenario.n_depth + scenario.n_gen // 2)
    else:
        seconds = speed.prefill_seconds(scenario.n_prompt, scenario.n_depth)
        seconds = seconds and seconds / scenario.n_prompt
    rate = 1 / seconds if seconds else None
    return {
        "plan_ts": rate,
        "plan_ts_error_percent": _error(rate, m.avg_ts),
        "plan_rss_bytes": made.total_bytes,
        "plan_rss_error_percent": _error(made.total_bytes, m.peak_rss_bytes),
    }


def _error(said: float | None, found: float | None) -> float | None:
    return None if said is None or not found else 100 * (said / found - 1)


def _record(model: Model, name: str, m: Measurement, settings: dict[str, Any]) -> dict[str, Any]:
    """One flat record: llama-bench's fields by its names, then ours."""
    from edgeq.core.cpu import this_cpu
    from edgeq.profiling.limits import bandwidth_doubt

    kv_type = "q8_0" if settings["kv_bits"] == 8 else "f16"
    gb_per_s, peak = m.gb_per_s, settings["bandwidth"]
    share = None if gb_per_s is None or not peak else 100 * gb_per_s / peak
    return {
        "build_number": __version__,
        "cpu_info": this_cpu().name,
        "backends": settings["backend"],
        "model_filename": name,
        "model_type": _model_type(model),
        "model_size": model.nbytes,
        "model_n_params": _n_params(model),
        "n_threads": m.threads,
        "type_k": kv_type,
        "type_v": kv_type,
        "n_prompt": m.scenario.n_prompt,
        "n_gen": m.scenario.n_gen,
        "n_depth": m.scenario.n_depth,
        "test_time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "avg_ns": round(sum(m.samples_ns) / len(m.samples_ns)),
        "stddev_ns": round(_stddev(m.samples_ns)),
        "avg_ts": m.avg_ts,
        "stddev_ts": m.stddev_ts,
        "samples_ns": list(m.samples_ns),
        "samples_ts": list(m.samples_ts),
        "test": str(m.scenario),
        "warmup_ns": m.warmup_ns,
        "bytes_per_token": m.bytes_per_token,
        "gb_per_s": gb_per_s,
        "read_bandwidth_gb_per_s": peak,
        "bandwidth_percent": share,
        "peak_rss_bytes": m.peak_rss_bytes,
        "other_cores": m.contention and m.contention.other_cores,
        "warning": m.contention and m.contention.warning(m.threads),
        "suspect": bandwidth_doubt(share, m.bytes_per_token, settings["busy"]),
        "python": platform.python_version(),
    }


def _stddev(samples: tuple[int, ...]) -> float:
    import statistics

    return statistics.stdev(samples) if len(samples) > 1 else 0.0


def _n_params(model: Model) -> int:
    import math

    return sum(math.prod(t.shape) for t in model.tensors.values())


def _model_type(model: Model) -> str:
    """As llama-bench writes it: family, size, and how most of the bytes are held."""
    from edgeq.formats.tensor import FloatTensor, QuantTensor

    held: dict[str, int] = {}
    for tensor in model.tensors.values():
        if isinstance(tensor, QuantTensor):
            kind = str(tensor.scheme)
        else:
            kind = tensor.dtype.lower() if isinstance(tensor, FloatTensor) else "float"
        held[kind] = held.get(kind, 0) + tensor.shape[0] * (
            tensor.shape[1] if len(tensor.shape) > 1 else 1
        )
    # the scheme of most weights names the model, as "Q4_0" names one with a Q6_K head
    kind = max(held, key=lambda k: held[k])
    return f"{model.config.family} {render.human_count(_n_params(model))} {kind}"


def _csv(rows: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    flat = [{k: v for k, v in row.items() if not isinstance(v, list)} for row in rows]
    writer = csv.DictWriter(out, list(flat[0]), quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _markdown(rows: list[dict[str, Any]]) -> str:
    head = [
        "model", "size", "params", "backend", "threads", "test", "t/s",
        "GB/s", "of peak", "peak RSS",
    ]  # fmt: skip
    rules = "lrrlrrrrrr"
    if "plan_ts" in rows[0]:
        head += ["plan t/s", "error", "plan RSS", "error"]
        rules += "rrrr"
    cells = [
        [
            row["model_type"],
            render.human_bytes(row["model_size"]),
            render.human_count(row["model_n_params"]),
            row["backends"],
            str(row["n_threads"]),
            row["test"],
            f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}",
            "" if row["gb_per_s"] is None else f"{row['gb_per_s']:.1f}{_mark(row)}",
            ""
            if row["bandwidth_percent"] is None
            else f"{row['bandwidth_percent']:.0f} %{_mark(row)}",
            "" if row["peak_rss_bytes"] is None else render.human_bytes(row["peak_rss_bytes"]),
            *(_plan_cells(row) if "plan_ts" in row else ()),
        ]
        for row in rows
    ]
    return render.markdown(head, cells, rules)


def _mark(row: dict[str, Any]) -> str:
    return busy.MARK if row["suspect"] else ""


def _footnotes(rows: list[dict[str, Any]]) -> str:
    """Why figures that are marked are no facts."""
    doubts = dict.fromkeys(row["suspect"] for row in rows if row["suspect"])
    return "".join(f"\n{busy.wrapped(f'{busy.MARK} {doubt}', '  ')}\n" for doubt in doubts)


def _plan_cells(row: dict[str, Any]) -> list[str]:
    def percent(key: str) -> str:
        return "" if row[key] is None else f"{row[key]:+.1f} %"

    return [
        "" if row["plan_ts"] is None else f"{row['plan_ts']:.2f}",
        percent("plan_ts_error_percent"),
        render.human_bytes(row["plan_rss_bytes"]),
        percent("plan_rss_error_percent"),
    ]
