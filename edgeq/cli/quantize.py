"""``edgeq quantize``: quantize a checkpoint to one file, or a graph to a quantized graph."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeq import calibration_text as texts
from edgeq.cli import render
from edgeq.cli.graphs import refuse_made
from edgeq.cli.options import (
    SAMPLE_OPTIONS,
    ByteSize,
    check_output,
    command,
    force_option,
    optional_source_argument,
    refuse_given,
    sample_options,
    threads_option,
)
from edgeq.cli.quantize_graph import listing, quantize_graph
from edgeq.cli.quantize_report import report
from edgeq.importers import source_kind

if TYPE_CHECKING:
    from edgeq.model.model import Model
    from edgeq.quant import Recipe
    from edgeq.quant.decoder.calibrate import CalibrationStats
    from edgeq.quant.decoder.sensitivity import Sensitivity

TARGET_PRESET = "mixed-4.5bpw"
"""The preset for a target if no recipe is given."""
OF_MODELS = (
    "fast", "bits", "group", "asym", "calib_windows", "calib_context", "stats", "target_bpw",
    "target_size", "target_device", "target_context", "sensitivity", "eval_text", "card", "max_ram",
    "repack", "requantize", "verify_reproducible",
)  # fmt: skip
"""Options for language models only."""
NOT_OF_REPACK = (
    "preset", "recipe_file", "method", "tensor_types", "calib", "card",
    *(name for name in OF_MODELS if name != "repack"),
)  # fmt: skip
"""Options of rounding, which `--repack` does not do."""
OF_GRAPHS = ("calib_samples", "observer", "shapes", "dequantize", *SAMPLE_OPTIONS)
"""Options for graphs only."""


@command("quantize", "Quantize a checkpoint to one .edgeq file, or quantize a graph.")
@optional_source_argument
@click.option("-o", "--output", type=click.Path(dir_okay=False), default=None,
              help="The file to write, such as model.edgeq; for a graph, such as "
                   "model.onnx.")  # fmt: skip
@click.option("--preset", metavar="NAME", default=None, show_default="4.75bpw; graphs: w8a8-static",
              help="A preset (see --list) or a quantization scheme, such as "
                   "w4-g64-asym.")  # fmt: skip
@click.option("--fast", is_flag=True, show_default=False,
              help="Language models: round to nearest without a calibration text, in seconds; the "
                   "preset w4-g32.")  # fmt: skip
@click.option("--recipe", "recipe_file", type=click.Path(exists=True, dir_okay=False),
              default=None, help="Instead of --preset: a recipe file in JSON or TOML.")  # fmt: skip
@click.option("--bits", "--q-bits", type=click.Choice(["2", "3", "4", "5", "6", "8"]), default=None,
              help="Instead of --preset: bits per weight.")  # fmt: skip
@click.option("--group", "--group-size", "--q-group-size", "group",
              metavar="N|channel|tensor", default=None,
              help="Instead of --preset: how many weights share a scale: 16, 32, 64, 128 or 256 "
                   "along a row, the whole row (channel), or the whole tensor.")  # fmt: skip
@click.option("--asym", is_flag=True, help="Instead of --preset: use zero points.")
@click.option("--method", default=None, show_default="the preset's, or rtn",
              help="How weights are rounded (see --list).")  # fmt: skip
@click.option("--tensor-type", "tensor_types", multiple=True, metavar="REGEX=SCHEME",
              help="The scheme of the tensors (for graphs: operators) whose name matches REGEX; "
                   "the first match is used. May be given several times.")  # fmt: skip
@click.option("--calib", metavar="SAMPLES", default=None,
              help="Calibration data. Language models: a UTF-8 text file like what the model is "
                   "for; by default a text that edgeq includes and one sampled from the model. "
                   "Graphs: a folder of images or arrays, an .npz file, a file of sentences, or "
                   "script.py:function.")  # fmt: skip
@click.option("--calib-samples", type=click.IntRange(min=1), default=256,
              help="Graphs: number of calibration samples to use, spread evenly over the "
                   "data.")  # fmt: skip
@click.option("--observer", metavar="NAME", default=None, show_default="the preset's",
              help="Graphs: how the range of each activation is chosen: minmax, moving-average, "
                   "percentile, entropy or mse.")  # fmt: skip
@click.option("--shape", "shapes", multiple=True, metavar="NAME=1,3,224,224",
              help="Graphs: the shape of an input with dynamic dimensions. May be given several "
                   "times.")  # fmt: skip
@click.option("--dequantize", is_flag=True, show_default=False,
              help="Graphs: first convert the integer weights of a .tflite file back to "
                   "float.")  # fmt: skip
@sample_options
@click.option("--calib-windows", type=click.IntRange(min=1), default=128,
              help="Language models: number of windows of the calibration text to use, spread "
                   "evenly over it.")  # fmt: skip
@click.option("--calib-context", type=click.IntRange(min=2), default=256,
              help="Language models: number of tokens in each window.")  # fmt: skip
@click.option(
    "--stats",
    type=click.Path(exists=True, dir_okay=False),
    default=None,
    help="Instead of --calib: the statistics that `edgeq calibrate` wrote, for recipes that need "
    "no more than those.",
)
@click.option(
    "--target-bpw",
    type=click.FloatRange(min=0, min_open=True),
    default=None,
    help="Choose the bits of each tensor to reach this many bits per weight on average, scales "
    "included.",
)
@click.option(
    "--target-size",
    type=ByteSize(),
    default=None,
    help="Choose the bits of each tensor to stay within this file size, such as 300M.",
)
@click.option("--target-device", metavar="NAME", default=None,
              help="Make the model fit in the memory of a device (see `edgeq devices list`): if "
                   "the recipe gives a larger model, choose the bits of each tensor to "
                   "fit.")  # fmt: skip
@click.option("--target-context", type=click.IntRange(min=0), default=0,
              help="With --target-device: context length in tokens to reserve memory for; 0 takes "
                   "the model's own, at most 4096.")  # fmt: skip
@click.option(
    "--sensitivity",
    type=click.Path(exists=True, dir_okay=False),
    default=None,
    help="With a --target option: the file that `edgeq sensitivity` wrote.",
)
@click.option(
    "--eval-text",
    type=click.Path(exists=True, dir_okay=False),
    default=None,
    show_default="a text that edgeq includes",
    help="The text that quality is measured on; it must not be the text of --calib.",
)
@click.option(
    "--card/--no-card",
    "card",
    default=True,
    help="Measure how far the quantized model differs from MODEL and store it in the file.",
)
@click.option(
    "--max-ram",
    type=ByteSize(),
    default=None,
    help="Limit on the memory used, such as 1G; quality is not measured if that would need more.",
)
@click.option("--repack", is_flag=True, show_default=False,
              help="Language models: keep the integers of a source whose weights are already "
                   "quantized (a GGUF file, or a GPTQ, AWQ, compressed-tensors, AutoRound or MLX "
                   "folder) instead of rounding them again.")  # fmt: skip
@click.option("--requantize", is_flag=True, show_default=False,
              help="Language models: accept a source whose weights are already quantized, such as "
                   "most GGUF files; rounding them again loses more than rounding the float "
                   "checkpoint.")  # fmt: skip
@click.option("--verify-reproducible", is_flag=True, show_default=False,
              help="Language models: quantize MODEL again with the same options, and compare every "
                   "byte with the FILE of -o, which is not changed; a difference is an "
                   "error.")  # fmt: skip
@threads_option
@force_option
@click.option("--list", "list_all", is_flag=True, help="List the presets and methods and exit.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text",
              help="Format of the summary on standard output.")  # fmt: skip
def quantize(
    source: str | None,
    output: str | None,
    preset: str | None,
    fast: bool,
    recipe_file: str | None,
    bits: str | None,
    group: str | None,
    asym: bool,
    method: str | None,
    tensor_types: tuple[str, ...],
    calib: str | None,
    calib_samples: int,
    observer: str | None,
    shapes: tuple[str, ...],
    dequantize: bool,
    calib_windows: int,
    calib_context: int,
    stats: str | None,
    target_bpw: float | None,
    target_size: int | None,
    target_device: str | None,
    target_context: int,
    sensitivity: str | None,
    eval_text: str | None,
    card: bool,
    max_ram: int | None,
    repack: bool,
    requantize: bool,
    verify_reproducible: bool,
    threads: int | None,
    force: bool,
    list_all: bool,
    form: str,
    **sample: Any,
) -> None:
    """Quantize MODEL and write it to one file.

    A language model (a Hugging Face folder, a GGUF file or a llama2.c .bin file) becomes an .edgeq
    file, by default with about 4.75 bits per weight, rounded by GPTQ with a calibration text.
    Norms stay floating point; --tensor-type gives some tensors another scheme. If a calibrated run
    is interrupted, the same command continues after the last layer that was finished.

    A graph (an .onnx or .tflite file of a vision, audio or encoder model) becomes an .onnx file
    with QuantizeLinear and DequantizeLinear operators, which `edgeq convert` converts to other
    formats.
    """
    if list_all:
        render.write(f"{_listing()}\n\n{listing()}\n")
        return
    if source is None:
        raise click.UsageError("Missing argument 'MODEL'.")
    if output is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
    if source_kind(source) == "graph":
        refuse_given(OF_MODELS, f"language models, and {source} is a graph")
        quantize_graph(
            Path(source), Path(output), preset=preset, recipe_file=recipe_file, method=method,
            observer=observer, rules=tensor_types, calib=calib, calib_samples=calib_samples,
            shapes=shapes, dequantize=dequantize, sample=sample, threads=threads, force=force,
            form=form,
        )  # fmt: skip
        return
    refuse_made(source)
    refuse_given(OF_GRAPHS, f"graphs (.onnx, .tflite), and {source} is a language model")
    if repack:
        refuse_given(NOT_OF_REPACK, "rounding, and --repack rounds nothing")
        _repack(source, Path(output), force, form)
        return
    if calib is not None and not Path(calib).is_file():
        raise click.BadParameter(f"File {calib!r} does not exist.", param_hint="'--calib'")
    from edgeq.api.quantize import quantize as run
    from edgeq.api.quantize import verify_reproducible as verify
    from edgeq.importers import load
    from edgeq.quant.decoder.source import refuse_quantized

    target = _target(target_bpw, target_size)
    scheme = _scheme(preset, bits, group, asym)
    if fast:
        from edgeq.quant.presets import FAST

        if scheme or recipe_file:
            raise click.UsageError(
                "--fast is the same as --preset w4-g32 and cannot be used with --preset, --recipe, "
                "--bits, --group-size and --asym; leave out --fast or those"
            )
        scheme = FAST
    recipe = _recipe(recipe_file, scheme, method, tensor_types, target)
    file = Path(output)
    if verify_reproducible and not file.is_file():
        raise click.BadParameter(f"File {output!r} does not exist.", param_hint="'--output'")
    if not verify_reproducible:
        check_output(file, force)
    loaded = load(source)
    for text in loaded.provenance.get("left_out", ()):
        render.note(f"left out: {text}")
    if not requantize:
        refuse_quantized(loaded, source)  # before texts are read and tokenized
    if target_device is not None:
        room = _room(loaded, target_device, target_context, recipe)
        if room is not None:
            render.note(
                f"the model would not fit in the memory of {target_device} with this recipe; "
                f"choosing the bits of each tensor for {render.human_bytes(room)}"
            )
            recipe = _recipe(recipe_file, scheme, method, tensor_types, {"bytes": room})
    windows = None
    if calib is not None:
        windows = texts.calibration(loaded, calib, calib_windows, calib_context)
    with render.progress("Quantizing") as bar:
        summary = (verify if verify_reproducible else run)(
            loaded, file, recipe,
            calibration=windows,
            stats=_stats(stats),
            sensitivity=_sensitivity(sensitivity),
            card=texts.held_out(loaded, eval_text) if card else "skipped with --no-card",
            requantize=requantize, max_ram=max_ram, threads=threads, progress=bar,
        )  # fmt: skip
    if verify_reproducible:
        render.note(f"{output} is reproduced: every byte is equal")
    report(summary, file, form)


def _repack(source: str, out: Path, force: bool, form: str) -> None:
    """Repack a quantized source, keeping its integers."""
    from edgeq.quant.decoder.repack import repack
    from edgeq.quant.decoder.source import type_counts

    check_output(out, force)
    with render.progress("Repacking") as bar:
        summary = repack(source, out, progress=bar)
    if form == "json":
        render.write(json.dumps({"path": str(out)} | summary.to_dict(), indent=2) + "\n")
        return
    render.lines(
        f"{out}: {render.human_bytes(summary.file_bytes)}, {summary.bpw:.2f} bits per weight, the "
        f"source's own integers ({type_counts(summary.kept)}), "
        f"from {render.human_bytes(summary.source_bytes)} in {summary.seconds:.1f} s"
    )


def _stats(path: str | None) -> CalibrationStats | None:
    if path is None:
        return None
    from edgeq.quant.decoder.calibrate import CalibrationStats

    return CalibrationStats.load(path)


def _sensitivity(path: str | None) -> Sensitivity | None:
    if path is None:
        return None
    from edgeq.quant.decoder.sensitivity import Sensitivity

    return Sensitivity.load(path)


def _target(bpw: float | None, size: int | None) -> dict[str, float] | None:
    if bpw is not None and size is not None:
        raise click.UsageError(
            "--target-bpw and --target-size cannot be used together; give one of them"
        )
    if bpw is not None:
        return {"bpw": bpw}
    return None if size is None else {"bytes": size}


def _room(model: Model, device: str, context: int, recipe: Recipe) -> int | None:
    """Bytes for the tensors on a device; None if the recipe's model fits in them."""
    from edgeq.cli.plan import profile_named
    from edgeq.devices.model_header import facts_of
    from edgeq.devices.planner import budget_bytes
    from edgeq.model.rotary import default_context

    known = facts_of(model, model.origin.name if model.origin else "")
    profile = profile_named(device)
    room = budget_bytes(known, profile, context or default_context(known.config))
    wanted: float = known.quantized(recipe).weights_bytes
    if recipe.target:
        wanted = recipe.target.get("bytes") or recipe.target["bpw"] * known.n_params / 8
    return None if wanted <= room else room


def _recipe(
    file: str | None,
    scheme: str | None,
    method: str | None,
    tensor_types: tuple[str, ...],
    target: dict[str, float] | None,
) -> Recipe:
    """The recipe that the options describe.

    Raises:
        click.UsageError: a file and a preset are both given.
    """
    from edgeq.quant import Recipe

    if file is not None and scheme is not None:
        raise click.UsageError(
            "--recipe replaces --preset, --bits, --group-size and --asym; leave those out"
        )
    if target and not (file or scheme or method):
        scheme = TARGET_PRESET
    recipe = Recipe.from_options(preset=scheme, file=file, tensor_types=tensor_types, method=method)
    return replace(recipe, target=target) if target else recipe


def _scheme(preset: str | None, bits: str | None, group: str | None, asym: bool) -> str | None:
    """The text of the scheme that the options describe; None if no such option is given.

    Raises:
        click.UsageError: --preset is given with other options, or the group is invalid.
    """
    if preset is not None:
        if bits or group or asym:
            raise click.UsageError(
                f"--preset {preset} cannot be used with --bits, --group-size and --asym; leave "
                "those out, or "
                "give the whole scheme as the preset, such as --preset w4-g64-asym"
            )
        return preset
    if not (bits or group or asym):
        return None
    from edgeq.formats.schemes import BY_BITS

    base = BY_BITS[int(bits or 4)]  # the defaults for these bits
    if group in ("channel", "tensor"):
        middle = group
    elif group is None:
        middle = str(base).split("-")[1]
    elif group.isdecimal():
        middle = f"g{group}"
    else:
        raise click.UsageError(f"--group-size is {group!r}; give a number, 'channel' or 'tensor'")
    zero_points = asym or not base.symmetric
    return f"w{base.bits}-{middle}" + ("-asym" if zero_points else "")


def _listing() -> str:
    from edgeq.quant import METHODS, Recipe
    from edgeq.quant.presets import presets_for

    presets = []
    for name in presets_for("decoder"):
        recipe = Recipe.named(name)
        presets.append(
            [
                name,
                _bits(recipe),
                recipe.method,
                _extras(recipe),
                "calibration text" if recipe.needs else "",
                recipe.extra or "",
            ]
        )
    methods = [[name, about] for name, about in METHODS.items()]
    head = ["preset", "bits per weight", "method", "options", "needs", "pip extra"]
    return "\n\n".join(
        [
            render.aligned(head, presets),
            render.aligned(["method", "what it does"], methods),
            "Bits per weight are those of the matrices in the layers, including scales; for mixed "
            "presets, those of all weights.\n"
            "A calibration text should resemble what the model will be used for: --calib FILE. "
            "Without one,\nedgeq uses a text that it includes and one sampled from the model.\n"
            "--preset also takes a scheme: w<2|3|4|5|6|8>-<g16|g32|g64|g128|g256|channel|tensor>"
            "[-asym|-palette],\nor f32, f16, bf16 for tensors that stay floating point.",
        ]
    )


def _bits(recipe: Recipe) -> str:
    """Bits per weight of the matrices in the layers, including scales, for long rows."""
    from edgeq.model.artifact_layout import TensorLayout

    if recipe.target:
        return f"{recipe.target.get('bpw', 0):.2f}"
    n, k = 4096, 4096
    return f"{8 * TensorLayout(recipe.default, (n, k)).nbytes / (n * k):.2f}"


def _extras(recipe: Recipe) -> str:
    parts = [*recipe.transforms]
    if recipe.activations:
        parts.append(f"{recipe.activations.mode} int8 activations")
    if recipe.target:
        parts.append("bits chosen per tensor")
    if recipe.training:
        parts.append(str(recipe.training["method"]))
    return ", ".join(parts)
