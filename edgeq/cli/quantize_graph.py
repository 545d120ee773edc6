"""``edgeq quantize`` for graphs: quantize a float .onnx or .tflite file to a QDQ .onnx file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeq.cli import render
from edgeq.cli.graphs import named_shapes
from edgeq.cli.options import check_output

if TYPE_CHECKING:
    from edgeq.quant.graph.images import Preprocess
    from edgeq.quant.graph.summary import GraphSummary, OpRow

_WORST = 3
"""Number of operators with the largest errors that are named."""


def quantize_graph(
    source: Path,
    output: Path,
    *,
    preset: str | None,
    recipe_file: str | None,
    method: str | None,
    observer: str | None,
    rules: Iterable[str],
    calib: str | None,
    calib_samples: int,
    shapes: Iterable[str],
    dequantize: bool,
    sample: Mapping[str, Any],
    threads: int | None,
    force: bool,
    form: str,
) -> None:
    """Quantize a graph and print a summary.

    Args:
        source: path of the .onnx or .tflite file.
        output: the .onnx file to write.
        sample: values of the options `edgeq.cli.options.SAMPLE_OPTIONS`.
        preset, recipe_file, method, observer, rules, calib, calib_samples, shapes, dequantize,
            threads, force, form: values of the options of these names.
    """
    from edgeq.api.quantize import check_graph_output
    from edgeq.api.quantize import quantize as run
    from edgeq.core.errors import UsageError
    from edgeq.graph.files import read
    from edgeq.quant.graph.samples import open_samples
    from edgeq.quant.recipe import Recipe

    check_graph_output(output)
    if output.absolute() == source.absolute():
        raise UsageError(
            f"--output is {output}, which is the model to quantize; give another --output"
        )
    check_output(output, force)
    recipe = Recipe.from_options(
        preset, file=recipe_file, tensor_types=rules, method=method, observer=observer,
        source="graph",
    )  # fmt: skip
    if recipe.needs and calib is None:
        raise UsageError(
            "this recipe needs calibration data: give --calib with a folder of images or arrays, "
            "an .npz file or script.py:function, or choose a preset that needs none (w8-dynamic, "
            "w4-g32)"
        )
    graph = read(source, shapes=named_shapes(shapes), dequantize=dequantize)
    samples = None
    if calib is not None:
        samples = open_samples(
            calib,
            graph,
            preprocess=preprocess_of(sample),
            tokenizer=sample["tokenizer"],
            limit=calib_samples,
        )
    with render.progress("Quantizing") as bar:
        summary = run(graph, output, recipe, data=samples, threads=threads, progress=bar)
    _report(summary, source, output, form)


def preprocess_of(sample: Mapping[str, Any]) -> Preprocess:
    """The preprocessing of images that the options describe.

    Args:
        sample: values of the options `edgeq.cli.options.SAMPLE_OPTIONS`.

    Raises:
        UsageError: the value of an option is invalid.
    """
    from edgeq.quant.graph.images import Preprocess, parse_numbers, parse_ratio, parse_size

    size = sample["image_size"]
    return Preprocess(
        size=None if size is None else parse_size(size),
        mean=parse_numbers(sample["mean"], "--mean"),
        std=parse_numbers(sample["std"], "--std"),
        scale=parse_ratio(sample["scale"], "--scale"),
        layout=sample["layout"],
        resize=sample["resize"],
    )


def listing() -> str:
    """The presets for graphs, as a table."""
    from edgeq.quant.presets import DEFAULTS, PRESETS, presets_for
    from edgeq.quant.recipe import Recipe

    rows = [
        [
            name + (" *" if name == DEFAULTS["graph"] else ""),
            "samples" if Recipe.named(name, "graph").needs else "",
            PRESETS[name].about,
        ]
        for name in presets_for("graph")
    ]
    return (
        "Presets for graphs (.onnx, .tflite):\n\n"
        + render.aligned(["preset", "needs", "what it does"], rows)
        + "\n\n* is the default for graphs. Samples are calibration data, given with --calib."
    )


def _report(summary: GraphSummary, source: Path, output: Path, form: str) -> None:
    size = output.stat().st_size
    for warning in summary.warnings:
        render.note(f"warning: {warning}")
    if form == "json":
        record = {
            "path": str(output),
            "source_bytes": source.stat().st_size,
            "file_bytes": size,
            **summary.to_dict(),
        }
        render.write(json.dumps(record, indent=2) + "\n")
        return
    from edgeq.quant.graph.summary import precisions

    packed, whole = summary.packed_bytes, summary.float_bytes
    render.lines(
        f"{output}: {render.human_bytes(size)}, weights {render.human_bytes(packed)} of "
        f"{render.human_bytes(whole)} ({whole / max(packed, 1):.2f}x smaller), activations "
        f"{render.human_bytes(summary.arena)} of {render.human_bytes(summary.float_arena)}, in "
        f"{summary.seconds:.1f} s"
    )
    for what, n in precisions(summary.rows).items():
        render.write(f"  {n:4} operators: {what}\n")
    if summary.kept:
        render.lines(f"kept in higher precision: {', '.join(summary.kept)}")
    if worst := _lost_most(summary.rows):
        render.lines(f"largest errors (SQNR): {worst}")
    if (near := summary.agreement) is not None:
        agreement = f"cosine similarity to float {near.cosine:.5f}"
        if near.varied_sqnr_db is not None:
            agreement += f", {near.varied_sqnr_db:.1f} dB SQNR of what differs between samples"
        if near.top1 is not None and near.classes != 1:
            agreement += f", same top class {near.top1:.1%}"
        render.lines(f"outputs: {agreement}, on {near.samples} calibration samples")


def _lost_most(rows: Iterable[OpRow]) -> str:
    measured = [(row.sqnr_db, row) for row in rows if row.sqnr_db is not None]
    worst = sorted(measured, key=lambda pair: pair[0])[:_WORST]
    return ", ".join(f"{row.op} {row.node} {db:.1f} dB" for db, row in worst)
