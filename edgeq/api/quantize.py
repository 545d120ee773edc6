"""Quantize a language model to an artifact, or a graph of operators to a QDQ file."""

from __future__ import annotations

import secrets
import shutil
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack, overload

from edgeq._version import __version__
from edgeq.calibration_text import calibration as calibration_windows
from edgeq.calibration_text import own_calibration
from edgeq.core.cpu import available_cores
from edgeq.core.errors import EdgeqError, UsageError, check_type
from edgeq.core.files import check_target
from edgeq.core.progress import Progress
from edgeq.graph.ir import Graph
from edgeq.importers import open_source
from edgeq.model.model import Model
from edgeq.quant.decoder.calibrate import CalibrationStats, CalibrationText
from edgeq.quant.decoder.calibration_data import NO_TEXT
from edgeq.quant.decoder.quality_report import HeldOut
from edgeq.quant.decoder.quantize import Summary, quantize_model, require_packages
from edgeq.quant.decoder.sensitivity import Sensitivity
from edgeq.quant.presets import FAST, SourceKind
from edgeq.quant.recipe import Recipe
from edgeq.quant.summary import QuantizationSummary

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgeq.graph.feeds import Feeds
    from edgeq.quant.graph.samples import Samples
    from edgeq.quant.graph.summary import GraphSummary

WINDOWS, CONTEXT = 128, 256
"""A calibration text that is given as a file is split into windows: their number, and the tokens
in each."""
SAMPLES = 256
"""The most samples that are read from calibration data given as a path."""


class _Options(TypedDict, total=False):
    """Keywords of `quantize`."""

    data: CalibrationText | Samples | Sequence[Feeds] | str | Path | None
    fast: bool
    method: str | None
    requantize: bool
    calibration: CalibrationText | None
    stats: CalibrationStats | None
    sensitivity: Sensitivity | None
    card: HeldOut | str
    max_ram: int | None
    threads: int | None
    progress: Progress | None


@overload
def quantize(
    source: Model, out: str | Path, recipe: Recipe | str | None = None, **options: Unpack[_Options]
) -> Summary: ...


@overload
def quantize(
    source: Graph, out: str | Path, recipe: Recipe | str | None = None, **options: Unpack[_Options]
) -> GraphSummary: ...


@overload
def quantize(
    source: str | Path,
    out: str | Path,
    recipe: Recipe | str | None = None,
    **options: Unpack[_Options],
) -> QuantizationSummary: ...


def quantize(
    source: Model | Graph | str | Path,
    out: str | Path,
    recipe: Recipe | str | None = None,
    *,
    data: CalibrationText | Samples | Sequence[Feeds] | str | Path | None = None,
    fast: bool = False,
    method: str | None = None,
    requantize: bool = False,
    calibration: CalibrationText | None = None,
    stats: CalibrationStats | None = None,
    sensitivity: Sensitivity | None = None,
    card: HeldOut | str = NO_TEXT,
    max_ram: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> QuantizationSummary:
    """Quantize a language model into one .edgeq file, or a graph into one .onnx file.

    A calibrated run that was interrupted is continued by the next one with the same arguments, if
    the source is a file or folder: finished layers are kept beside ``out`` until it is whole.

    Args:
        source: a model, a graph, or the path of one. The artifact records the SHA-256 of the file
            or folder that a model was opened from.
        out: the file to write or replace; for a graph its name ends in .onnx.
        recipe: which weights get which scheme, and how they are rounded: a `Recipe`, the name of a
            preset such as "palette4-gptq", or a scheme such as "w4-g64". None is 4.75bpw for a
            language model, and w8a8-static for a graph.
        data: the calibration data. For language models, windows of a text, or the path of a
            UTF-8 text file; None uses a text that edgeq includes and a text sampled from the model
            itself, see `edgeq.calibration_text.own_calibration`. For graphs, samples, a list of
            them (each a mapping from an input's name to its array), or the path of a folder of
            images or arrays, an .npz file or ``script.py:function``.
        fast: quantize a language model with the recipe w4-g32, which rounds to nearest and needs
            no calibration.
        method: the rounding method, one of `edgeq.quant.METHODS`, instead of the recipe's.
        requantize: quantize weights again that are already quantized, as in most GGUF files.
        calibration: the same as ``data`` for language models, as windows of a text.
        stats: calibration statistics of the same source; they replace the text if they have all
            that the recipe needs.
        sensitivity: sensitivities of the same source, for a recipe with a target; None measures
            them.
        card: the text that the quality card is measured on, or the reason why there is no card.
        max_ram: the most bytes of memory that the process may use, memory-mapped pages included;
            the quality card is left out if it would need more.
        threads: number of threads; None uses all cores that this process may use.
        progress: called with the name of the current step, how much of it is done, and its total.

    Returns:
        A `Summary` for a language model, a `GraphSummary` for a graph. Both have the recipe, the
        seconds and the bits per weight, and can be written as JSON.

    Raises:
        DoesNotFitError: max_ram is too small.
        FormatError: the source is damaged, or has NaN or infinite weights.
        SchemeError: the recipe does not fit the source, or weights are too large.
        UsageError: the source is already quantized, samples are needed, or an argument is out of
            range or does not apply to such a source.
        TypeError: an argument has the wrong type.
        MissingDependencyError: the recipe trains, and PyTorch is not installed.
        EdgeqError: the file cannot be written.

    Example:
        >>> summary = edgeq.quantize("model", "small.edgeq", "w4-g32")
        >>> round(summary.bpw, 1)
        5.1
        >>> edgeq.quantize("graph.onnx", "small.onnx", "w8-channel").recipe.graph is not None
        True
    """
    check_type("source", source, Model, Graph, str, PathLike)
    check_type("out", out, str, PathLike)
    check_type("recipe", recipe, Recipe, str, None)
    check_type("method", method, str, None)
    check_type("fast", fast, bool)
    if fast and recipe is not None:
        raise UsageError(f"fast is the same as the recipe {FAST}; give either fast or a recipe")
    check_type("requantize", requantize, bool)
    check_type("calibration", calibration, CalibrationText, None)
    check_type("stats", stats, CalibrationStats, None)
    check_type("sensitivity", sensitivity, Sensitivity, None)
    check_type("card", card, HeldOut, str)
    check_type("max_ram", max_ram, int, None)
    check_type("threads", threads, int, None)
    if isinstance(recipe, Recipe):
        require_packages(recipe)
    opened = source if isinstance(source, Model | Graph) else open_source(source)
    kind: SourceKind = "graph" if isinstance(opened, Graph) else "decoder"
    if not isinstance(recipe, Recipe):
        recipe = Recipe.from_options(preset=FAST if fast else recipe, source=kind)
    if method is not None:
        recipe = recipe.with_method(method) if kind == "graph" else replace(recipe, method=method)
    if isinstance(opened, Graph):
        given = {
            "fast": fast, "requantize": requantize, "calibration": calibration, "stats": stats,
            "sensitivity": sensitivity, "card": card is not NO_TEXT, "max_ram": max_ram,
        }  # fmt: skip
        for name, value in given.items():
            if value:
                raise UsageError(
                    f"{name} applies only to language models, and the source is a graph; leave out "
                    f"{name}"
                )
        return _quantize_graph(opened, Path(out), recipe, data, threads, progress)
    if data is not None and calibration is not None:
        raise UsageError("data and calibration have the same meaning; give only one of them")
    return quantize_model(
        opened, out, recipe,
        requantize=requantize, calibration=calibration or _windows(opened, data),
        own_text=own_calibration,
        stats=stats, sensitivity=sensitivity, card=card, max_ram=max_ram, threads=threads,
        progress=progress,
    )  # fmt: skip


def verify_reproducible(
    source: Model | str | Path,
    file: str | Path,
    recipe: Recipe | str | None = None,
    **options: Unpack[_Options],
) -> Summary:
    """Quantize a language model again, and compare every byte with the existing artifact.

    Args:
        source: the model that the artifact was made from.
        file: the artifact, which is not changed. The comparison writes a second artifact to the
            same folder for a while, so the disk must have space for it.
        recipe, options: those that the artifact was made with, as for `quantize`.

    Returns:
        The summary of the second quantization.

    Raises:
        EdgeqError: the two artifacts differ; the message names the first difference.
        UsageError: there is no such file, or the source is a graph; also as for `quantize`.

    Example:
        >>> summary = edgeq.quantize("model", "small.edgeq", "w4-g32")
        >>> edgeq.verify_reproducible("model", "small.edgeq", "w4-g32").bpw == summary.bpw
        True
    """
    from edgeq.quant.decoder.finished_layers import unfinished_folder
    from edgeq.quant.decoder.reproducible import difference

    check_type("file", file, str, PathLike)
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"{path} does not exist; give the artifact that quantize wrote")
    opened = source if isinstance(source, Model | Graph) else open_source(source)
    if isinstance(opened, Graph):
        raise UsageError(
            "verify_reproducible compares artifacts of language models, and the source is a graph"
        )
    again = path.with_name(f".{path.name}.again-{secrets.token_hex(4)}.edgeq")
    try:
        summary = quantize(opened, again, recipe, **options)
        if first_difference := difference(path, again):
            raise EdgeqError(
                f"{path} is not what these options give with edgeq {__version__}: "
                f"{first_difference}; was it made from another source or text, with other options "
                "or another version?"
            )
    finally:
        again.unlink(missing_ok=True)
        shutil.rmtree(unfinished_folder(again), ignore_errors=True)
    return summary


def _windows(model: Model, data: object) -> CalibrationText | None:
    """Windows of a calibration text."""
    check_type("data", data, CalibrationText, str, PathLike, None)
    if data is None or isinstance(data, CalibrationText):
        return data
    return calibration_windows(model, Path(str(data)), WINDOWS, CONTEXT)


def _quantize_graph(
    graph: Graph,
    out: Path,
    recipe: Recipe,
    data: object,
    threads: int | None,
    progress: Progress | None,
) -> GraphSummary:
    from edgeq.graph.onnx.save import write_onnx
    from edgeq.quant.graph.quantize import quantize_graph
    from edgeq.quant.graph.samples import Samples, open_samples, samples_of

    check_type("data", data, Samples, list, tuple, str, PathLike, None)
    check_graph_output(out)
    check_target(out)
    samples: Samples | None
    if data is None or isinstance(data, Samples):
        samples = data
    elif isinstance(data, list | tuple):
        samples = samples_of(graph, data)
    else:
        samples = open_samples(str(data), graph, limit=SAMPLES)
    summary = quantize_graph(
        graph, recipe, samples, threads=threads or available_cores(), progress=progress
    )
    write_onnx(summary.graph, out)
    return summary


def check_graph_output(out: Path) -> None:
    """Refuse a file that does not end in .onnx.

    Raises:
        UsageError: the file does not end in .onnx; the message gives a name that does.
    """
    if out.suffix.lower() != ".onnx":
        raise UsageError(
            f"the output is {out}, but a quantized graph is written as .onnx; give "
            f"{out.with_suffix('.onnx')}, and convert that file to other formats with edgeq convert"
        )
