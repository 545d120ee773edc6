"""``edgeq convert``: write the same integers in the format of another runtime."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeq.cli import graphs, render
from edgeq.cli.options import (
    ByteSize,
    Counts,
    command,
    force_option,
    model_argument,
    refuse_given,
    shared_option,
    threads_option,
)
from edgeq.converters import TARGETS
from edgeq.importers import source_kind

if TYPE_CHECKING:
    from edgeq.converters.convert import Conversion


_DECODERS = ("preset", "ctx_size", "kv", "compute", "prefill", "steps", "max_ram")
"""Options for language models only."""


@command("convert", "Convert a model to the format of another runtime.")
@model_argument
@click.option("--to", "target", type=click.Choice(list(TARGETS)), required=True,
              help="The target format; see the list above.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(), required=True,
              help="The file or folder to write, such as model.gguf.")  # fmt: skip
@click.option("--preset", metavar="SCHEME", default=None, show_default="no quantization",
              help="Quantize a floating-point MODEL first with this scheme, such as "
                   "w4-g32.")  # fmt: skip
@shared_option("-c", "--ctx-size", env="CTX_SIZE", type=click.IntRange(min=0), default=0,
               help="Context length in tokens; 0 takes the model's own, at most 4096 (tflite and "
                    "litertlm: 1280).")  # fmt: skip
@click.option("--kv", type=click.Choice(["float32", "float16", "int8"]), default=None,
              show_default="the target's",
              help="Data type of the KV cache in the converted model.")  # fmt: skip
@click.option("--compute", type=click.Choice(["float", "int8"]), default=None,
              show_default="the target's",
              help="How matrices are multiplied: float uses floating-point activations; int8 "
                   "rounds activations to 8 bits for the target's faster kernels.")  # fmt: skip
@click.option("--prefill", type=Counts(1), default=(), show_default="the target's",
              help="Prompt lengths for which prefill functions are made.")  # fmt: skip
@click.option("--target-os", metavar="OS", default=None, show_default="the target's",
              help="The minimum operating system version, such as ios16 or ios18 (Core "
                   "ML).")  # fmt: skip
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", show_default=False,
              help="An option that only this target has. May be given several times.")  # fmt: skip
@click.option("--shape", "shapes", multiple=True, metavar="NAME=N,N,...", show_default=False,
              help="Graphs: the shape of an input with dynamic dimensions. May be given several "
                   "times.")  # fmt: skip
@click.option("--data", metavar="SAMPLES", default=None, show_default="those kept in the graph",
              help="Graphs: real inputs to compare the converted model on: a folder, an .npz "
                   "file or script.py:function.")  # fmt: skip
@click.option("--validate/--no-validate", "checked", default=True,
              help="Run the converted model in its own runtime and compare it with "
                   "MODEL.")  # fmt: skip
@click.option("--steps", type=click.IntRange(min=2), default=8,
              help="Validation: number of tokens to decode after each prompt.")  # fmt: skip
@click.option("--max-ram", type=ByteSize(), default=None,
              help="Limit on the memory used for writing, such as 1G.")  # fmt: skip
@threads_option
@force_option
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text",
              help="Format of the summary on standard output; json contains the "
                   "certificate.")  # fmt: skip
def convert(
    model: str,
    target: str,
    output: str,
    preset: str | None,
    ctx_size: int,
    kv: Any,
    compute: Any,
    prefill: tuple[int, ...],
    target_os: str | None,
    settings: tuple[str, ...],
    shapes: tuple[str, ...],
    data: str | None,
    checked: bool,
    steps: int,
    max_ram: int | None,
    threads: int | None,
    force: bool,
    form: str,
) -> None:
    """Convert MODEL (an .edgeq file, a checkpoint folder or a GGUF file) to another format.

    Quantized weights are repacked without quantizing them again, so every target has the same
    integers. The converted model is run in its own runtime and compared with MODEL; the results
    are written to NAME.certificate.json, or to certificate.json inside an output folder.

    If MODEL is a graph (.onnx or .tflite, float or quantized by edgeq), the targets are ort
    (writes .onnx or .ort), tflite and coreml.
    """
    from edgeq.converters import Options
    from edgeq.converters.convert import convert as run

    extra = _settings(settings) | ({"target_os": target_os} if target_os else {})
    options = Options(ctx_size or None, kv, compute, prefill, extra)
    named_shapes, samples = None, None
    graph = source_kind(model) == "graph"
    if graph:
        refuse_given(_DECODERS, "language models, and MODEL is a graph")
        options, named_shapes = Options(extra=extra), graphs.named_shapes(shapes)
        if data is not None:
            from edgeq.graph.files import read

            samples = graphs.real_inputs(read(model, shapes=named_shapes), data)
    else:
        graphs.refuse_made(model)
        refuse_given(("shapes", "data"), "graphs, and MODEL is a language model")
    with render.progress(f"Converting to {target}") as bar:
        conversion = run(
            model, target, output, options,
            preset=preset, shapes=named_shapes, samples=samples, force=force, validate=checked,
            steps=steps, max_ram=max_ram, threads=threads, progress=bar,
            announce=render.note,
        )  # fmt: skip
    if form == "json":
        render.write(json.dumps(_summary(conversion), indent=2) + "\n")
    else:
        render.lines((graphs.converted(conversion) if graph else _text(conversion)).rstrip())


# the help text lists the targets of the table, so that there is only one list
_WIDTH = max(map(len, TARGETS))
convert.help = f"{inspect.cleandoc(convert.help or '')}\n\n\b\n" + "\n".join(
    f"{name.ljust(_WIDTH)}  {row.title}: {row.description}" for name, row in TARGETS.items()
)


def _settings(pairs: tuple[str, ...]) -> dict[str, Any]:
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise click.UsageError(f"--set is {pair!r}; write NAME=VALUE")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def _summary(conversion: Conversion) -> dict[str, Any]:
    summary = {
        "path": str(conversion.path),
        "nbytes": conversion.nbytes,
        "convert_seconds": conversion.seconds,
    }
    return summary | dict(conversion.certificate or {"target": conversion.target, "passed": None})


def _text(conversion: Conversion) -> str:
    lines = [
        f"{conversion.path}: {render.human_bytes(conversion.nbytes)} in {conversion.seconds:.1f} s"
    ]
    certificate = conversion.certificate
    if certificate is None:
        lines.append("not validated")
    else:
        from edgeq.converters.certificate import certificate_path

        greedy, equal = certificate["greedy_tokens"], certificate["integers_equal"]
        # a floating-point model has no integers to compare
        integers = "" if equal == "0 of 0" else f"integers of {equal} tensors equal, "
        where = certificate_path(Path(conversion.path), folder=conversion.path.is_dir())
        compared = f"{integers}{certificate['constants_equal']} other constants equal"
        lines += [
            f"validated in {certificate['runtime']}: {compared}, "
            f"KL {certificate['kl']['mean']:.2g} nats, "
            f"{greedy['equal']} of {greedy['compared']} greedy tokens equal"
            if certificate["runtime"]
            else f"read back: {compared}",
            *(sentence for sentence in (certificate["note"], certificate["cost"]) if sentence),
            f"certificate: {where}",
        ]
    return "\n".join(lines) + "\n"
