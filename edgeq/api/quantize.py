"""Quantize a language model to an artifact, or a graph of operators to a QDQ file."""

from __future__ import annotations

import os
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
"""How a calibration text is cut where it is given as a file: windows, and tokens of each."""
SAMPLES = 256
"""Most samples taken of calibration data that is given as a path."""


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

    Args:
        source: a model, a graph, or the path of one. The SHA-256 of the file or folder that a
            model was opened from goes into the artifact.
        out: the file to make or replace; it ends in .onnx for a graph.
        recipe: which weights get which scheme, and how: a `Recipe`, the name of a preset such as
            "palette4-gptq", or a scheme such as "w4-g64". If None, 4.75bpw for a language model,
            and w8a8-static for a graph.
        data: what the recipe learns from. Language models: windows of a text, or the path of a
            UTF-8 text file; if None, a text that edgeq includes and one sampled from the model
            itself, see `edgeq.calibration_text.own_calibration`. Graphs: samples, a list of them
            (each a mapping from an input's name to its array), or the path of a folder of images
            or arrays, an .npz file or ``script.py:function``.
        fast: round a language model to nearest, without a text: the recipe w4-g32.
        method: how weights are rounded, of `edgeq.quant.METHODS`, instead of the recipe's.
        requantize: go on from weights that are quantized already, as those of most GGUF files.
        calibration: the same as ``data``, as windows of a text.
        stats: of the same source, in place of the text where these say enough.
        sensitivity: of the same source, for a recipe with a target; measured if None.
        card: the text that the quality card is measured on, or why there is none.
        max_ram: most bytes the process may hold, memory-mapped pages included; the card is left
            out where it would take more.
        threads: workers; all cores this process may use if None.
        progress: called with what is done, how far, and of how much.

    Returns:
        What was done: a `Summary` for a language model, a `GraphSummary` for a graph. Both have
        the recipe, the seconds, the bits per weight and a form for JSON.

    Raises:
        DoesNotFitError: max_ram is too little.
        FormatError: the source is damaged, or holds NaN or infinite weights.
        SchemeError: the recipe does not suit the source, or weights are too large.
        UsageError: the source is already quantized, samples are needed, or an argument is out of
            range or not for such a source.
        TypeError: an argument is of another type.
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
        raise UsageError(f"fast stands for the recipe {FAST}; leave out fast, or the recipe")
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
                raise UsageError(f"{name} is for language models; leave it out for a graph")
        return _quantize_graph(opened, Path(out), recipe, data, threads, progress)
    if data is not None and calibration is not None:
        raise UsageError("data and calibration are the same; give one of them")
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
    """Quantize a language model again, and compare every byte with the artifact that was made.

    Args:
        source: what the artifact was made from.
        file: the artifact, which is not changed. The comparison needs room for another beside it.
        recipe, options: those that it was made with, as for `quantize`.

    Returns:
        The summary of the quantization that was done again.

    Raises:
        EdgeqError: the two differ; says where first.
        UsageError: there is no such file, the source is a graph, or as for `quantize`.

    Example:
        >>> summary = edgeq.quantize("model", "small.edgeq", "w4-g32")
        >>> edgeq.verify_reproducible("model", "small.edgeq", "w4-g32").bpw == summary.bpw
        True
    """
    from edgeq.quant.decoder.reproducible import difference

    check_type("file", file, str, PathLike)
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"{path} does not exist; give the artifact that quantize wrote")
    opened = source if isinstance(source, Model | Graph) else open_source(source)
    if isinstance(opened, Graph):
        raise UsageError("only artifacts of language models are compared; the source is a graph")
    again = path.with_name(f".{path.name}.again-{os.getpid()}.edgeq")
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
        UsageError: names one that does.
    """
    if out.suffix.lower() != ".onnx":
        raise UsageError(
            f"the output is {out}, but a quantized graph is written as .onnx; give "
            f"{out.with_suffix('.onnx')}, then convert that to other formats"
        )
