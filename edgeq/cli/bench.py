"""``edgeq bench``: tokens per second, in rows like those of llama-bench."""

from __future__ import annotations

import csv
import io
import json
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import click

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
    from edgeq.model.model import Model


_DECODERS = (
    "shape", "preset", "n_prompt", "n_gen", "n_depth", "kv_bits", "cache_type_k", "cache_type_v",
    "backend", "against_plan",
)  # fmt: skip
"""Options for language models only."""


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
    from edgeq.api.bench import bench_rows, bench_workloads

    if not any((*n_prompt, *n_gen)):
        raise click.UsageError(
            "-p and -n are both 0, so there is nothing to time; give one of them a positive number"
        )
    bits = kv_bits_of(kv_bits, cache_type_k, cache_type_v)
    workloads = bench_workloads(n_prompt, n_gen, n_depth, repetitions)
    loaded, name = _subject(model, shape, preset)
    profile_for = cache(partial(this_profile, measured=True)) if against_plan else None
    compile_first(backend)
    rows = []
    with render.progress("Benchmarking", still=True) as bar:
        for row in bench_rows(
            loaded, name, workloads, threads=threads, kv_bits=bits, backend=backend,
            profile_for=profile_for, progress=bar,
        ):  # fmt: skip
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
    from edgeq.importers.shapes import SHAPES, parameters

    rows = [[name, render.human_count(parameters(config))] for name, config in SHAPES.items()]
    return render.aligned(["shape", "parameters"], rows, "lr")


def _subject(model: str | None, shape: str | None, preset: str) -> tuple[Model, str]:
    if model is not None:
        from edgeq.importers import load

        return load(model), str(model)
    assert shape is not None
    from edgeq.importers.shapes import random_model
    from edgeq.importers.shapes import shape as known_shape
    from edgeq.quant import Recipe

    config, recipe = known_shape(shape), Recipe.from_options(preset)
    with render.progress(f"Making random weights of {shape}") as bar:
        return random_model(config, recipe.scheme_for, progress=bar), f"{shape} (random weights)"


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
    """Footnotes that explain marked figures."""
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
