"""``edgeq validate``: does a converted model compute what its source does?"""

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
    from edgeq.converters import Execution
    from edgeq.converters.validate.decoder import Report


@command("validate", "Run a converted model and compare it with its source model.")
@click.argument("out", type=click.Path())
@click.option("--against", metavar="MODEL", default=None,
              help="The model that OUT was converted from.")  # fmt: skip
@click.option("--target", type=click.Choice(list(TARGETS)), default=None,
              show_default="detected from the name of OUT",
              help="The format of OUT, if its name does not tell.")  # fmt: skip
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
    that differs is named and the exit code is 1. A certificate beside OUT is checked too. What the
    rounding of the runtime's kernels costs is reported and is not a failure.

    For graphs (an .onnx, .ort, .tflite or .mlpackage file against the .onnx or .tflite file that it
    was made from), outputs, weights and quantization parameters are compared.

    Without --against, a Core ML package is run once on random inputs.
    """
    from edgeq.converters import target_module, target_of
    from edgeq.core.errors import UsageError

    if against is not None and source_kind(against) == "graph":
        refuse_given(("target", "steps"), "language models, and MODEL is a graph")
        return 0 if graphs.validate(out, against, threads, form, data) else 1
    refuse_given(("data",), "graphs, and OUT is made from a language model")
    path = Path(out)
    name = target or target_of(path)
    if against is None:
        module = target_module(name)
        if not hasattr(module, "execute"):
            raise UsageError(
                f"{out} can only be validated against the model it was converted from; give it as "
                "--against MODEL"
            )
        _show_execution(path, module.execute(path), form)
        return 0
    from edgeq.converters import require_target
    from edgeq.converters.validate.decoder import validate as run
    from edgeq.importers import load

    require_target(name)
    with render.progress("Validating") as bar:
        report = run(
            path, load(against), name, steps=steps, threads=threads, progress=bar,
            announce=render.note,
        )  # fmt: skip
    render.write(_json(report) if form == "json" else _text(report))
    return 0 if report.passed else 1


def _json(report: Report) -> str:
    from edgeq.converters.certificate import findings

    found: dict[str, Any] = {
        "passed": report.passed,
        "target": report.target,
        "runtime": report.runtime,
        "precision": report.precision,
        "note": report.note or None,
        **findings(report),
        "tensor_faults": [
            {"name": f.name, "row": f.row, "group": f.group, "what": f.what}
            for f in report.tensor_faults
        ],
        "first_divergence": report.divergence and {
            "step": report.divergence.step,
            "error": report.divergence.error,
            "allowed": report.divergence.allowed,
            "when": report.divergence.when,
            "also": list(report.divergence.also),
        },
        "complaints": list(report.complaints),
    }  # fmt: skip
    return json.dumps(found, indent=2) + "\n"


def _text(report: Report) -> str:
    equal = f"{sum(report.integers.values())} of {len(report.integers)} tensors equal"
    rows = [
        ("target", report.target),
        ("runtime", f"{report.runtime}, computing in {report.precision}"),
        ("integers", equal if report.integers else "the model is floating point"),
        ("constants", f"{report.constants} others compared"),
        (
            "logits",
            f"differ by {report.logits_max:.3g} at most, {report.logits_rms:.3g} RMS, "
            f"in a range of {report.logits_range:.3g}",
        ),
        (
            "KL, nats",
            f"{report.kl_mean:.3g} mean (standard error {report.kl_error:.1g}, "
            f"{report.kl_rows} positions), {report.kl_max:.3g} at most",
        ),
        (
            "greedy tokens",
            f"{report.greedy_equal} of {report.greedy_compared} equal"
            + (f", {report.near_ties} near ties" if report.near_ties else ""),
        ),
        ("result", "passed" if report.passed else "FAILED"),
    ]
    if not report.runtime:
        rows = [row for row in rows if row[0] in ("target", "integers", "constants", "result")]
    text = "\n".join(f"{name:15s}{value}" for name, value in rows) + "\n"
    said = [part for part in (report.explain(), report.cost(), report.note) if part]
    return "\n".join([text, *said]) + "\n" if said else text


def _show_execution(path: Path, done: Execution, form: str) -> None:
    if form == "json":
        found = {
            "path": str(path),
            "runtime": done.runtime,
            "ops": dict(done.ops),
            "inputs": {name: list(shape) for name, shape in done.inputs.items()},
            "outputs": {name: _range(value) for name, value in done.outputs.items()},
        }
        render.write(json.dumps(found, indent=2) + "\n")
        return
    rows = [[name, str(count)] for name, count in sorted(done.ops.items(), key=lambda x: -x[1])]
    lines = [f"{path} runs in {done.runtime}", "", render.aligned(["op", "times"], rows, "lr"), ""]
    for name, shape in done.inputs.items():
        lines.append(f"input   {name} {list(shape)}")
    for name, value in done.outputs.items():
        found = _range(value)
        lines.append(
            f"output  {name} {found['shape']}"
            + (f", {found['low']:.4g} to {found['high']:.4g}" if found["low"] is not None else "")
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
