"""Statistics of a model's activations over a text, and the loss from quantizing each tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from edgeq.calibration_text import calibration
from edgeq.core.errors import UsageError
from edgeq.core.progress import Progress
from edgeq.formats.schemes import QuantScheme, parse_scheme
from edgeq.importers import load
from edgeq.model.model import Model
from edgeq.quant.decoder.calibrate import CalibrationStats
from edgeq.quant.decoder.calibrate import calibrate as collect
from edgeq.quant.decoder.sensitivity import Sensitivity, measure_sensitivity
from edgeq.quant.rules import check_rounded


def calibrate(
    model: Model | str | Path,
    text_file: str | Path,
    *,
    observer: str = "minmax",
    windows: int = 128,
    context: int = 256,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> CalibrationStats:
    """Run a model over a text in float32 and collect statistics of the inputs of each matrix.

    Args:
        model: a model or the path of one.
        text_file: the calibration text, UTF-8; it should resemble what the model is used for.
        observer: how ranges are chosen: minmax, moving-average, percentile, entropy or mse.
        windows: number of windows of the text to use, spread evenly over it.
        context: tokens in each window, at most the model's own context length.
        resume: where progress is saved after each layer; a file that exists is continued from,
            with identical results.
        progress: called after every layer.

    Returns:
        Statistics that `save` writes and `quantize` takes as ``stats``.

    Raises:
        FormatError: the model or the file to resume from is damaged.
        UsageError: the text is empty or not UTF-8, or the observer is unknown.

    Example:
        >>> stats = edgeq.calibrate("model", "text.txt", windows=2, context=32)
        >>> stats.n_tokens
        64
    """
    opened = model if isinstance(model, Model) else load(model)
    text = calibration(opened, text_file, windows, context)
    place = None if resume is None else Path(resume)
    return collect(opened, text, observer=observer, resume=place, progress=progress)


def sensitivity(
    model: str | Path,
    text_file: str | Path,
    *,
    scheme: QuantScheme | str = "w4-g32",
    mode: Literal["kl", "scaled", "output"] | None = None,
    method: str = "gptq",
    windows: int = 8,
    context: int = 256,
    workers: int | None = None,
    scheduler: str | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Quantize each matrix of a model by itself to several numbers of bits and measure the loss.

    Args:
        model: the path of a floating-point model.
        text_file: the calibration text, UTF-8.
        scheme: the recipe's default; the same scheme with 2 to 6 and 8 bits and longer groups is
            measured, and palettes if it is one.
        mode: "kl" measures the KL divergence of the whole model; "scaled" estimates it from the
            error of each matrix; "output" is that error alone. By the model's size if None.
        method: how weights are rounded; it should be the method of the recipe.
        windows, context: as `calibrate` takes them.
        workers: number of processes to measure layers in parallel (Dask).
        scheduler: the address of a Dask scheduler to measure with.
        progress: called after every step.

    Returns:
        Losses by tensor and scheme, for `quantize`.

    Raises:
        FormatError: the model is damaged.
        UsageError: an unknown mode or method, or a text that cannot be used.

    Example:
        >>> losses = edgeq.sensitivity(
        ...     "model", "text.txt", mode="output", method="rtn", windows=1, context=16
        ... ).losses["model.layers.0.mlp.down_proj.weight"]
        >>> losses["w2-g32"] > losses["w4-g32"]
        True
    """
    base = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    if not isinstance(base, QuantScheme):
        raise UsageError(f"the scheme is {scheme}; give a scheme of integers, such as w4-g32")
    check_rounded(base)
    if workers or scheduler:
        from edgeq.sweeping import sweep_sensitivity

        return sweep_sensitivity(
            str(model), str(text_file), windows, context, str(base), mode, method,
            scheduler=scheduler, workers=workers or 2, progress=progress,
        )  # fmt: skip
    opened = load(model)
    text = calibration(opened, text_file, windows, context)
    return measure_sensitivity(opened, text, base, method=method, mode=mode, progress=progress)
