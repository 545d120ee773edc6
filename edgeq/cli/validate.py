"""``edgeq validate``: compare a converted model with its source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeq.cli import graphs, render
from edgeq.cli.options import command, refuse_given, result_options, threads_option
from edgeq.converters import TARGETS
from edgeq.importers import source_kind

if TYPE_CHECKING:
    from edgeq.converters.runners import Execution
    from edgeq.converters.validate.report import DecoderFindings, ValidationReport


@command("validate", "Run a converted model and compare it with its source model.")
@click.argument("out", type=click.Path())
@click.option("--against", metavar="MODEL", default=None,
              help="The model that OUT was converted from.")  # fmt: skip
@click.option("--target", type=click.Choice(list(TARGETS)), default=None,
              show_default="detected from the name of OUT",
              help="The format of OUT, if its name does not show it.")  # fmt: skip
@click.option("--steps", type=click.IntRange(min=2), default=8,
              help="Number of tokens to decode after each prompt.")  # fmt: skip
@click.option("--data", metavar="SAMPLES", default=None, show_default="those kept in the graph",
              help="Graphs: real inputs to compare on: a folder, an .npz file or "
                   "script.py:function.")  # fmt: skip
@threads_option
@result_options("text", "json")
def validate(
    out: str,
    against: str | None,
    target: str | None,
    steps: int,
    data: str | None,
    threads: int | None,
    form: str,
) -> int:
    """Run the converted model OUT in its own runtime and compare it with its source model.

    Every constant, logits and greedy tokens are compared. If they differ, the first tensor or step
    that differs is named and the exit code is 1. A certificate beside OUT is checked too. The loss
    from the rounding in the runtime's kernels is reported and is not a failure.

    For graphs (an .onnx, .ort, .tflite or .mlpackage file against the .onnx or .tflite file that it
    was converted from), outputs, weights and quantization parameters are compared.

    Without --against, a Core ML package is run once on random inputs.
    """
    from edgeq.converters.validate import validate as run

    path = Path(out)
    graph = against is not None and source_kind(against) == "graph"
    if graph:
        refuse_given(("target", "steps"), "language models, and MODEL is a graph")
    else:
        refuse_given(("data",), "graphs, and OUT was converted from a language model")
    if against is None:
        report = run(path, None, target)
        assert report.execution is not None
        _show_execution(path, report.execution, form)
        return 0
    if graph:
        source, samples = graphs.source_and_samples(against, out, data)
        with render.progress("Validating") as bar:
            report = run(path, source, samples=samples, threads=threads, progress=bar)
        text = "" if form == "json" else graphs.compared(report)
    else:
        with render.progress("Validating") as bar:
            report = run(
                path, against, target,
                steps=steps, threads=threads, progress=bar, announce=render.note,
            )  # fmt: skip
        text = "" if form == "json" or report.decoder is None else _text(report, report.decoder)
    render.write(json.dumps(report.to_dict(), indent=2) + "\n" if form == "json" else text)
    return 0 if report.passed else 1


def _text(report: ValidationReport, findings: DecoderFindings) -> str:
    equal = f"{sum(report.integers.values())} of {len(report.integers)} tensors equal"
    rows = [
        ("target", report.target),
        ("runtime", f"{report.runtime}, computing in {findings.precision}"),
        ("integers", equal if report.integers else "the model is floating point"),
        ("constants", f"{findings.constants} others compared"),
        (
            "logits",
            f"differ by {findings.logits_max:.3g} at most, {findings.logits_rms:.3g} RMS, "
            f"in a range of {findings.logits_range:.3g}",
        ),
        (
            "KL, nats",
            f"{findings.kl_mean:.3g} mean (standard error {findings.kl_error:.1g}, "
            f"{findings.kl_rows} positions), {findings.kl_max:.3g} at most",
        ),
        (
            "greedy tokens",
            f"{findings.greedy_equal} of {findings.greedy_compared} equal"
            + (f", {findings.near_ties} near ties" if findings.near_ties else ""),
        ),
        ("result", "passed" if report.passed else "FAILED"),
    ]
    if not report.runtime:
        rows = [row for row in rows if row[0] in ("target", "integers", "constants", "result")]
    text = "\n".join(f"{name:15s}{value}" for name, value in rows) + "\n"
    remarks = [part for part in (report.explain(), findings.cost(), *report.notes) if part]
    return "\n".join([text, *remarks]) + "\n" if remarks else text


def _show_execution(path: Path, done: Execution, form: str) -> None:
    if form == "json":
        record = {
            "path": str(path),
            "runtime": done.runtime,
            "ops": dict(done.ops),
            "inputs": {name: list(shape) for name, shape in done.inputs.items()},
            "outputs": {name: _range(value) for name, value in done.outputs.items()},
        }
        render.write(json.dumps(record, indent=2) + "\n")
        return
    rows = [[name, str(count)] for name, count in sorted(done.ops.items(), key=lambda x: -x[1])]
    lines = [f"{path} runs in {done.runtime}", "", render.aligned(["op", "times"], rows, "lr"), ""]
    for name, shape in done.inputs.items():
        lines.append(f"input   {name} {list(shape)}")
    for name, value in done.outputs.items():
        record = _range(value)
        lines.append(
            f"output  {name} {record['shape']}"
            + (
                f", {record['low']:.4g} to {record['high']:.4g}"
                if record["low"] is not None
                else ""
            )
        )
    render.write("\n".join(lines) + "\n")


def _range(value: Any) -> dict[str, Any]:
    number = value.size and value.dtype.kind in "fiub"
    return {
        "shape": list(value.shape),
        "dtype": str(value.dtype),
        "low": float(value.min()) if number else None,
        "high": float(value.max()) if number else None,
    }
