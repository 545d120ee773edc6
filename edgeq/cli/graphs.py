"""What several commands do where MODEL is a graph of operators: vision, audio, encoder models."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import click

from edgeq.cli import render

if TYPE_CHECKING:
    from edgeq.converters import Conversion

READ = (".onnx", ".tflite")
"""Suffixes of graphs that are quantized and converted."""
RUN = (*READ, ".ort", ".mlpackage")
"""Suffixes of graphs that are run."""
RUNS = 10
"""Runs of a graph in each turn."""


def is_graph(path: str | Path, suffixes: Sequence[str] = READ) -> bool:
    """Whether a path is that of a graph, by its name."""
    return Path(path).suffix.lower() in suffixes


def convert(
    model: str,
    target: str,
    output: str,
    settings: Mapping[str, Any],
    shapes: Iterable[str],
    checked: bool,
    threads: int | None,
    force: bool,
    form: str,
) -> None:
    """``edgeq convert`` of a graph; the arguments are its options."""
    from edgeq.converters.graphs import convert_graph

    with render.progress(f"converting to {target}") as bar:
        made = convert_graph(
            model, target, output, settings,
            shapes=named_shapes(shapes), force=force, validate=checked, threads=threads or 1,
            progress=bar,
        )  # fmt: skip
    if form == "json":
        found = {"path": str(made.path), "nbytes": made.nbytes, "convert_seconds": made.seconds}
        found |= dict(made.certificate or {"target": made.target, "passed": None})
        render.write(json.dumps(found, indent=2) + "\n")
    else:
        render.write(_converted(made))


def named_shapes(texts: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Shapes from ``NAME=1,3,224,224``."""
    found = {}
    for text in texts:
        name, equals, sizes = text.rpartition("=")
        numbers = sizes.split(",")
        if not (equals and name and all(n.strip().isdigit() and int(n) for n in numbers)):
            raise click.UsageError(f"--shape {text!r}: write NAME=1,3,224,224")
        found[name] = tuple(int(n) for n in numbers)
    return found


def inspect(model: str, form: str) -> None:
    """``edgeq inspect`` of a graph: each operator's precision, or what a target's file holds."""
    render.write(_read(model, form) if is_graph(model) else _foreign(Path(model), form))


def bench(models: Sequence[str], threads: int | None, repetitions: int, form: str) -> None:
    """``edgeq bench`` of graphs, which take turns; times are of whole runs."""
    from edgeq.profiling.foreign import Named, open_subject
    from edgeq.profiling.session import Workload, run

    workload = Workload(0, RUNS, 0, 1, repetitions)
    subjects = [open_subject(Named.parse(model), threads) for model in models]
    try:
        with render.progress("bench", still=True) as bar:
            samples = run(subjects, workload, bar)
    finally:
        for subject in subjects:
            subject.close()
    rows: list[dict[str, Any]] = []
    for model, subject, taken in zip(models, subjects, samples, strict=True):
        about = subject.facts(workload)
        times = [ns / 1e6 for sample in taken if sample.round >= 0 for ns in sample.step_ns]
        tenths = quantiles(times, n=10) if len(times) > 1 else times * 9
        rows.append(
            {
                "model": model,
                "runtime": about["runtime"],
                "threads": about["threads"],
                "nbytes": about["weights_bytes"],
                "ms_p50": median(times),
                "ms_p90": tenths[8],
                "samples_ms": times,
            }
        )
    for row in rows:
        row["speedup"] = rows[-1]["ms_p50"] / row["ms_p50"] if len(rows) > 1 else None
    if form in ("json", "jsonl"):
        lines = [json.dumps(row) for row in rows]
        text = json.dumps(rows, indent=2) if form == "json" else "\n".join(lines)
        render.write(text + "\n")
        return
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


def _converted(made: Conversion) -> str:
    lines = [f"{made.path}: {render.human_bytes(made.nbytes)} in {made.seconds:.1f} s"]
    found = made.certificate
    if found is None:
        return lines[0] + "\nnot validated\n"
    from edgeq.converters.certificate import certificate_path

    worst = max(found["error"].values())
    same = found["top1_agreement"]
    text = f"{found['weights_equal']} weights"
    if found["quants_equal"] != "0 of 0":
        text += f" and {found['quants_equal']} grids"
    lines += [
        f"validated in {found['runtime']}: integers of {text} equal, outputs differ by "
        f"{worst:.2g} of their size" + ("" if same is None else f", same top class {same:.0%}"),
        f"values take {render.human_bytes(found['arena_bytes'])} at most while it runs",
        f"certificate: {certificate_path(made.path, folder=made.path.is_dir())}",
    ]
    return "\n".join(lines) + "\n"


def _read(model: str, form: str) -> str:
    from edgeq.graphs.files import read
    from edgeq.quant.graph.summary import (
        arena_bytes,
        constants_bytes,
        operator_rows,
        precisions,
    )

    graph = read(model)
    rows = operator_rows(graph)
    whole, held = constants_bytes(graph)
    facts: dict[str, Any] = {
        "path": model,
        "name": graph.name,
        "inputs": {name: _info(graph.info(name)) for name in graph.inputs},
        "outputs": {name: _info(graph.info(name)) for name in graph.outputs},
        "float_bytes": whole,
        "nbytes": held,
        "arena_bytes": arena_bytes(graph),
        "meta": dict(graph.meta),
        "precisions": precisions(rows),
    }
    if form == "json":
        return json.dumps(facts | {"operators": [vars(row) for row in rows]}, indent=2) + "\n"
    lines = [f"{kind:9s}{name} {text}" for kind in ("inputs", "outputs")
             for name, text in facts[kind].items()]  # fmt: skip
    lines += [
        f"weights  {render.human_bytes(held)}, {render.human_bytes(whole)} in float32",
        f"values   {render.human_bytes(facts['arena_bytes'])} at most while it runs",
    ]
    if recipe := graph.meta.get("edgeq.recipe"):
        lines.append(f"recipe   {recipe}")
    lines += ["", *(f"{count:5d}  {what}" for what, count in facts["precisions"].items()), ""]
    cells = [
        [row.op, row.node, row.weight, row.activations, render.human_bytes(row.nbytes)]
        for row in rows
    ]
    table = render.aligned(["operator", "node", "weight", "computes in", "bytes"], cells, "llllr")
    return "\n".join([*lines, table]) + "\n"


def _foreign(path: Path, form: str) -> str:
    """A target's file: what edgeq packed into it, read back."""
    from edgeq.converters.graphs import stored

    weights, quants = stored(path)
    if form == "json":
        found = {
            "path": str(path),
            "weights": {
                name: {"bits": held.bits, "shape": list(held.shape), "nbytes": held.nbytes}
                for name, held in weights.items()
            },
            "quants": {name: vars(quant) for name, quant in quants.items()},
        }
        return json.dumps(found, indent=2) + "\n"
    cells = [
        [name, str(held.bits), str(list(held.shape)), render.human_bytes(held.nbytes)]
        for name, held in weights.items()
    ]
    table = render.aligned(["packed weight", "bits", "shape", "bytes"], cells, "lrlr")
    return f"{table}\n\n{len(quants)} values are rounded to 8 bits\n"


def _info(info: Any) -> str:
    return f"{info.dtype} {list(info.shape)}"
