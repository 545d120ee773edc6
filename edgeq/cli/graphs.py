"""The parts of commands that concern graphs: vision, audio and encoder models."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeq.cli import busy, render

if TYPE_CHECKING:
    from edgeq.converters.convert import Conversion
    from edgeq.converters.validate.report import ValidationReport
    from edgeq.graph.ir import Graph

_SHOWN = 4
"""Most weights, of those stored in more bits, that are named; the certificate lists all."""


def refuse_made(model: str) -> None:
    """Refuse a file that was converted for a runtime, because it cannot be converted again.

    Raises:
        UsageError: the file was converted for a runtime.
    """
    from edgeq.core.errors import UsageError
    from edgeq.importers import source_kind

    if source_kind(model) == "program":
        raise UsageError(
            f"{model} was made for a runtime and cannot be converted again; give the .onnx or "
            ".tflite file that it was made from"
        )


def named_shapes(texts: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Parse values of ``--shape`` such as ``NAME=1,3,224,224``."""
    shapes = {}
    for text in texts:
        name, equals, sizes = text.rpartition("=")
        numbers = sizes.split(",")
        if not (equals and name and all(n.strip().isdecimal() and int(n) for n in numbers)):
            raise click.UsageError(f"--shape is {text!r}; write NAME=1,3,224,224")
        shapes[name] = tuple(int(n) for n in numbers)
    return shapes


def inspect(model: str, form: str, details: bool) -> None:
    """``edgeq inspect`` for graphs: the operators of a graph, or the content of a converted file.

    Args:
        model: path of the file.
        form: "text", or "json" with all details.
        details: list each operator or weight instead of their numbers.
    """
    from edgeq.api.inspect import inspect as describe

    record = describe(model)
    if form == "json":
        render.write(json.dumps(record, indent=2) + "\n")
    elif "weights" in record:
        render.write(_packed_file(record, details))
    elif isinstance(record["operators"], list):
        render.write(_graph(record, details))
    else:
        render.write(_other_tflite(record))


REAL = 16
"""Most samples of --data on which a converted graph is compared."""


def real_inputs(graph: Graph, data: str) -> Iterable[Any]:
    """Samples for a comparison, preprocessed as those of the calibration were.

    Raises:
        UsageError: there are no samples that fit the graph.
        FormatError: the samples cannot be read.
    """
    from edgeq.quant.graph.images import Preprocess
    from edgeq.quant.graph.samples import open_samples

    return open_samples(data, graph, preprocess=Preprocess.from_meta(graph.meta), limit=REAL)


def source_and_samples(
    against: str, out: str, data: str | None
) -> tuple[Graph, Iterable[Any] | None]:
    """The graph that a file was converted from, and the samples of ``--data`` if it is given."""
    from edgeq.converters.validate.graph import read_source

    graph = read_source(against, out)
    return graph, None if data is None else real_inputs(graph, data)


def bench(models: Sequence[str], threads: int | None, repetitions: int, form: str) -> None:
    """``edgeq bench`` for graphs, which are timed in alternation; times are of whole inferences."""
    from edgeq.api.bench import bench_graphs

    with render.progress("Benchmarking", still=True) as bar:
        rows = bench_graphs(models, threads=threads, repetitions=repetitions, progress=bar)
    warning = rows[0]["warning"]
    if form in ("json", "jsonl"):
        lines = [json.dumps(row) for row in rows]
        text = json.dumps(rows, indent=2) if form == "json" else "\n".join(lines)
        render.write(text + "\n")
        if warning:
            render.note(busy.wrapped(f"Warning: {warning}"))
        return
    render.write(busy.warnings([warning]))
    cells = [
        [
            row["model"], row["runtime"], str(row["threads"]), render.human_bytes(row["nbytes"]),
            f"{row['ms_p50']:.3f}", f"{row['ms_p90']:.3f}", f"{1000 / row['ms_p50']:.1f}",
            "" if row["speedup"] is None else f"{row['speedup']:.2f}x",
        ]
        for row in rows
    ]  # fmt: skip
    head = ["model", "runtime", "threads", "size", "ms p50", "ms p90", "runs/s"]
    head.append(f"against {Path(models[-1]).name}" if len(models) > 1 else "")
    render.write(render.aligned(head, cells, "llrrrrrr") + "\n")


def converted(conversion: Conversion) -> str:
    """The summary of a converted graph as text."""
    lines = [
        f"{conversion.path}: {render.human_bytes(conversion.nbytes)} in {conversion.seconds:.1f} s"
    ]
    certificate = conversion.certificate
    if certificate is None:
        return lines[0] + "\nnot validated\n"
    from edgeq.converters.certificate import certificate_path

    worst = max(certificate["error"].values())
    same = certificate["top1_agreement"]
    text = f"{certificate['weights_equal']} weights"
    if certificate["quants_equal"] != "0 of 0":
        text += f" and {certificate['quants_equal']} quantization parameters"
    missing = certificate["quants_not_in_file"]
    left = f" ({missing} are not in the file)" if missing else ""
    entries = certificate["weights"].items()
    lines += [
        f"validated in {certificate['runtime']}: {text} equal{left}, relative error of the outputs "
        f"{worst:.2g} on {certificate['runs']} {certificate['inputs']}"
        + ("" if same is None else f", same top class {same:.0%}"),
        *(f"note: {note}" for note in certificate["notes"]),
        *held_wider({n: w["asked"] for n, w in entries}, {n: w["bits"] for n, w in entries}),
        f"peak memory of the activations: {render.human_bytes(certificate['arena_bytes'])}",
        f"certificate: {certificate_path(conversion.path, folder=conversion.path.is_dir())}",
    ]
    return "\n".join(lines) + "\n"


def held_wider(asked: Mapping[str, int], widths: Mapping[str, int]) -> list[str]:
    """One line for each kind of weights that a file stores in more bits than they have.

    Args:
        asked: name of a weight -> its bits.
        widths: name of a weight -> the bits in which it is stored.
    """
    kinds: dict[tuple[int, int], list[str]] = {}
    for name, bits in asked.items():
        if widths.get(name, bits) > bits:
            kinds.setdefault((bits, widths[name]), []).append(name)
    return [
        f"{len(names)} weight{'s' * (len(names) > 1)} of {bits} bits "
        f"{'are' if len(names) > 1 else 'is'} stored in {wide} bits: {', '.join(names[:_SHOWN])}"
        + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        for (bits, wide), names in kinds.items()
    ]


def _graph(record: dict[str, Any], details: bool) -> str:
    rows = record["operators"]
    size, float_size = map(render.human_bytes, (record["nbytes"], record["float_bytes"]))
    summary = render.facts(
        [
            ("model", Path(record["path"]).name),
            *((kind[:-1], f"{name} {text}") for kind in ("inputs", "outputs")
              for name, text in record[kind].items()),
            ("weights", f"{size}, {float_size} in float32"),
            ("activations", f"{render.human_bytes(record['arena_bytes'])} at most at a time"),
            ("recipe", record["meta"].get("edgeq.recipe", "")),
        ]
    )  # fmt: skip
    if details:
        head, sides = ["operator", "node", "weights", "computes in", "size"], "llllr"
        cells = [
            [
                *(row[key] for key in ("op", "node", "weight", "activations")),
                render.human_bytes(row["nbytes"]),
            ]
            for row in rows
        ]
    else:
        head, sides = ["operator", "count", "weights", "computes in", "size"], "lrllr"
        kinds: dict[tuple[str, str, str], list[int]] = {}
        for row in rows:
            kind = (row["op"], row["weight"], row["activations"])
            kinds.setdefault(kind, []).append(row["nbytes"])
        cells = [
            [op, str(len(sizes)), weight, activations, render.human_bytes(sum(sizes))]
            for (op, weight, activations), sizes in kinds.items()
        ]
    hint = "" if details else "\n--tensors lists each operator\n"
    return f"{summary}\n\n{render.aligned(head, cells, sides)}\n{hint}"


def compared(report: ValidationReport) -> str:
    """The result of validating a graph as text."""
    result = report.graph
    assert result is not None
    equal, known, grids = (
        sum(result.quants.values()),
        len(result.quants),
        result.source_quants,
    )
    rows = [
        ("target", report.target),
        ("runtime", f"{report.runtime}, beside {result.source_runtime}"),
        ("weights", f"{sum(report.integers.values())} of {len(report.integers)} have equal integers"
         if report.integers else "none are integers"),
        *(("", line) for line in held_wider(result.source_bits, result.bits)),
        ("qparams", "" if not grids else f"{equal} of {known} equal"
         + (f", {grids - known} not in the file" if grids > known else "")),
        ("top-1", "" if result.top1 is None else f"the same for {result.top1:.0%}"),
        ("others", f"{result.parts - len(result.different)} of {result.parts} constants and "
         "operators equal" if result.parts else ""),
        ("runs", f"{result.runs} on {result.inputs}"),
        ("result", "passed" if report.passed else "FAILED"),
    ]  # fmt: skip
    cells = [
        [name, f"{error:.3g}", f"{result.allowed[name]:.3g}",
         "passed" if error <= result.allowed[name] else "FAILED"]
        for name, error in result.error.items()
    ]  # fmt: skip
    table = render.aligned(["output", "error", "allowed", "result"], cells, "lrrl")
    text = "\n".join(f"{name:9s}{value}" for name, value in rows if value)
    explained = "" if report.passed else f"\n{report.explain()}\n"
    if report.passed and report.notes:
        explained = "\n" + "".join(f"note: {note}\n" for note in report.notes)
    return f"{text}\n\n{table}\n{explained}"


def _packed_file(record: dict[str, Any], details: bool) -> str:
    """The description of a file that edgeq converted for another runtime."""
    weights = record["weights"]
    if details:
        head, sides = ["packed weight", "bits", "shape", "size"], "lrlr"
        cells = [
            [name, str(w["bits"]), str(w["shape"]), render.human_bytes(w["nbytes"])]
            for name, w in weights.items()
        ]
    else:
        head, sides = ["packed weights", "count", "size"], "lrr"
        sizes: dict[int, list[int]] = {}
        for weight in weights.values():
            sizes.setdefault(weight["bits"], []).append(weight["nbytes"])
        cells = [
            [f"{bits} bits", str(len(of)), render.human_bytes(sum(of))]
            for bits, of in sorted(sizes.items())
        ]
    hint = "" if details else "\n--tensors lists each weight\n"
    quantized = f"{len(record['quants'])} activations are quantized to 8 bits"
    return f"{render.aligned(head, cells, sides)}\n\n{quantized}\n{hint}"


def _other_tflite(summary: dict[str, Any]) -> str:
    """The description of a .tflite file of another tool, as LiteRT reads it."""
    size = render.human_bytes(summary["nbytes"])
    lines = [f"{summary['path']}: {size}, made by another tool", ""]
    lines += [f"{kind:9s}{name} {text}" for kind in ("inputs", "outputs")
              for name, text in summary[kind].items()]  # fmt: skip
    lines += [f"{'constants':11s}{kind} {render.human_bytes(size)}"
              for kind, size in summary["constants_bytes"].items()]  # fmt: skip
    cells = [[*what.rsplit(" ", 1), str(n)] for what, n in summary["operators"].items()]
    table = render.aligned(["operator", "makes", "times"], cells, "llr")
    return "\n".join([*lines, "", table]) + "\n"
