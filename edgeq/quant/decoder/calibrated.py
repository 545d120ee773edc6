"""Matrices rounded with statistics of their inputs, group by group through the model.

A text is replayed through the model (`edgeq.quant.decoder.replay`). At each group of matrices with
one input the statistics that the method needs are taken, the matrices are rounded and written, and
the written ones replace them: all later groups see the error made before them and can compensate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.progress import Progress
from edgeq.formats.schemes import QuantScheme, Scheme
from edgeq.formats.tensor import FloatTensor, QuantTensor, Tensor, row_blocks
from edgeq.model.model import Model
from edgeq.quant.decoder.calibrate import CalibrationText
from edgeq.quant.decoder.replay import Replay, ReplayStep
from edgeq.quant.kernels.products import column_squares, squares
from edgeq.quant.rounders.hessian import Hessian
from edgeq.quant.rounders.qparams import check_finite
from edgeq.quant.rounders.rounding import METHOD_INPUTS, quantize_tensor, sqnr_db

EXACT_BITS = 8
"""With so many bits a head loses too little for its inputs to matter."""
HEAD_WINDOWS = 8
"""Windows that the head's inputs are measured on."""
Ratios = Mapping[str, float | None]
"""Tensor name -> SQNR in dB; None where nothing was lost."""
Write = Callable[[str, QuantTensor], None]
"""Stores a rounded matrix under its name."""


def layer_matrices(schemes: Mapping[str, Scheme]) -> dict[str, QuantScheme]:
    """Those of the matrices that are rounded where the model meets them: all in layers."""
    return {
        name: scheme
        for name, scheme in schemes.items()
        if isinstance(scheme, QuantScheme) and name.startswith("model.layers.")
    }


def head_importance(
    model: Model, schemes: Mapping[str, Scheme], method: str, calibration: CalibrationText
) -> dict[str, NDArray[np.float32]]:
    """Mean squares of the head's inputs in the float model, where its rounding is weighted by them.

    A few inputs of the head are many times the others, so a head of few bits loses half as much
    when they count for more. A tied head is also the embedding, whose rounding costs little.

    Args:
        model: float.
        schemes: of all tensors that are stored.
        method: of `edgeq.quant.METHODS`.
        calibration: windows of text, of which at most `HEAD_WINDOWS` are used.

    Returns:
        The name under which the head is stored, and float32 [K]; nothing where the method needs no
        inputs, or the head has `EXACT_BITS` or more.
    """
    name = "model.embed_tokens.weight" if model.config.tied else model.config.head_name
    if method not in METHOD_INPUTS or not is_weighted(schemes.get(name)):
        return {}
    windows = calibration.windows[:: -(-len(calibration.windows) // HEAD_WINDOWS)]
    square, n = np.zeros(model.config.hidden), 0
    for step in Replay(model, windows):
        if step.group.kind != "head":
            continue
        for x in step.inputs():
            square += column_squares(x)
            n += len(x)
    return {name: (square / n).astype(np.float32)}


def is_weighted(scheme: Scheme | None) -> bool:
    """Whether a head of this scheme is rounded by the mean squares of its inputs."""
    return isinstance(scheme, QuantScheme) and scheme.bits < EXACT_BITS


def round_calibrated(
    model: Model,
    schemes: Mapping[str, QuantScheme],
    method: str,
    calibration: CalibrationText,
    write: Write,
    written: Mapping[str, Tensor],
    *,
    options: Mapping[str, Any],
    progress: Progress | None = None,
) -> dict[str, float | None]:
    """Quantize and write the matrices of the layers.

    Args:
        model: the float model.
        schemes: of the matrices to be rounded here, by name; all in layers.
        method: of `edgeq.quant.METHODS`.
        calibration: windows of text.
        write: takes each, with its name.
        written: the model's other tensors where they are held differently, as embedding and
            head: the replay computes with these.
        options: of the method; "use_quantized_inputs" makes up for the error of the inputs too.
        progress: called with the matrix, weights done, and of how many.

    Returns:
        The SQNR in dB of each; None where nothing was lost.

    Raises:
        FormatError: NaN or infinite weights.
        SchemeError: weights too large for their scheme.
    """
    own = dict(options)
    use_quantized_inputs = (
        bool(own.pop("use_quantized_inputs", False)) and METHOD_INPUTS.get(method) == "hessian"
    )
    total = sum(int(np.prod(model.tensors[name].shape)) for name in schemes)
    ratios: dict[str, float | None] = {}
    done = 0
    replay = Replay(model, calibration.windows, float_inputs=use_quantized_inputs, replaced=written)
    for step in replay:
        names = [name for name in step.group.linears if name in schemes]
        if not names:
            continue
        if progress:
            progress(names[0], done, total)
        seen = _input_statistics(step, METHOD_INPUTS.get(method), use_quantized_inputs)
        targets = _compensated_weights(step, names, seen.get("hessian"))
        for name in names:
            w = step.weights[name]
            tensor = quantize_tensor(
                targets.pop(name, w), schemes[name], method, name=name, **seen, **own
            )
            write(name, tensor)
            ratios[name] = tensor_sqnr(FloatTensor("float32", w), tensor)
            step.replace(name, tensor.numpy())
            done += w.size
            if progress:
                progress(name, done, total)
        if done == total:
            break
    return ratios


def tensor_sqnr(original: Tensor, tensor: Tensor) -> float | None:
    """Signal to quantization noise of a tensor, in dB; None where nothing was lost."""
    signal = noise = 0.0
    for part in row_blocks(original.shape):
        w = original.rows(part.start, part.stop)
        signal += squares(w)
        noise += squares(w - tensor.rows(part.start, part.stop))
    return sqnr_db(signal, noise)


def _compensated_weights(
    step: ReplayStep, names: Sequence[str], hessian: Hessian | None
) -> dict[str, NDArray[np.float32]]:
    """What to round in place of the weights, to make up for errors upstream as well.

    Computed for all matrices of the group at once: the memory is as large as the Hessian, and need
    not be held while they are rounded.
    """
    for name in names:
        check_finite(step.weights[name], name)
    if hessian is None or hessian.cross is None:
        return {}
    targets = {name: hessian.target(step.weights[name]) for name in names}
    hessian.settle()
    return targets


def _input_statistics(
    step: ReplayStep, need: str | None, use_quantized_inputs: bool
) -> dict[str, Any]:
    """What a method needs to know of a group's inputs, by the name it asks for."""
    if need is None:
        return {}
    k = step.weights[step.group.linears[0]].shape[1]
    if need == "importance":
        square, n = np.zeros(k), 0
        for x in step.inputs():
            square += column_squares(x)
            n += x.shape[0]
        return {"importance": (square / n).astype(np.float32)}
    hessian = Hessian(k, crossed=use_quantized_inputs)
    if not use_quantized_inputs:
        for x in step.inputs():
            hessian.add(x)
        return {"hessian": hessian}
    seen = zip(step.inputs(), step.float_inputs(), step.residual_errors(), strict=True)
    # a norm between the matrix and x would scale what is made up for
    adds = step.group.adds_to_residual
    for x, x_float, error in seen:
        hessian.add(x, x_float, error if adds else None)
    return {"hessian": hessian}
