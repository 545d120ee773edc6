"""Matrices rounded with statistics of their inputs, group by group through the model.

A text is replayed through the model (`edgeq.quant.decoder.replay`). At each group of matrices with
one input the statistics that the method needs are taken, the matrices are rounded and written, and
the written ones replace them: all later groups see the error made before them and can compensate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.progress import Progress
from edgeq.formats.mapped_file import release
from edgeq.formats.schemes import QuantScheme, Scheme
from edgeq.formats.tensor import FloatTensor, QuantTensor, Tensor, part_shapes, row_blocks
from edgeq.model.model import Model
from edgeq.quant.decoder.calibrate import CalibrationText
from edgeq.quant.decoder.replay import Replay, ReplayStep
from edgeq.quant.kernels.products import column_squares, product, row_products, squares
from edgeq.quant.recipe import Recipe
from edgeq.quant.rounders.hessian import Hessian
from edgeq.quant.rounders.qparams import check_finite
from edgeq.quant.rounders.rounding import METHOD_INPUTS, quantize_tensor, sqnr_db

EXACT_BITS = 8
"""With so many bits a head loses too little for its inputs to matter."""
HEAD_WINDOWS = 8
"""Windows that the head's inputs are measured on."""
HEAD_ROWS = 4096
"""Rows of the head that are rounded at once: a multiple of a packed tile's."""
REPLAY_OPTIONS = (
    "use_quantized_inputs", "relative_errors", "calibrated_head", "sensitive_layers",
)  # fmt: skip
"""Options of a recipe that say what matrices are rounded for, and not how."""
LEAST_SQUARE = np.float32(1e-12)
"""Mean square of a residual stream below which it counts as this."""
Ratios = Mapping[str, float | None]
"""Tensor name -> SQNR in dB; None where nothing was lost."""
Write = Callable[[str, QuantTensor], None]
"""Stores a rounded matrix under its name."""


def layer_matrices(schemes: Mapping[str, Scheme]) -> dict[str, QuantScheme]:
    """The schemes of the matrices that are rounded during the replay: all those in layers."""
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
    name = head_name(model)
    if method not in METHOD_INPUTS or not is_weighted(schemes.get(name)):
        return {}
    square, n = np.zeros(model.config.hidden), 0
    for x in _head_inputs(model, calibration):
        square += column_squares(x)
        n += len(x)
    return {name: (square / n).astype(np.float32)}


def head_by_gptq(model: Model, schemes: Mapping[str, Scheme], recipe: Recipe) -> str | None:
    """The head's name, if it is rounded for the least error of the logits; None if not.

    A few inputs of the head are many times the others, so that what is lost in rounding their
    columns is well made up for by the others'. A tied head is also the embedding, whose rounding
    costs less.
    """
    name = head_name(model)
    scheme = schemes.get(name)
    wanted = recipe.method == "gptq" and recipe.options.get("calibrated_head", False)
    if not wanted or not isinstance(scheme, QuantScheme) or not is_weighted(scheme):
        return None
    return None if scheme.codebook or scheme.granularity == "tensor" else name


def head_name(model: Model) -> str:
    """The name under which the head is stored: a tied one is the embedding."""
    return "model.embed_tokens.weight" if model.config.tied else model.config.head_name


def round_head(
    model: Model,
    name: str,
    scheme: QuantScheme,
    calibration: CalibrationText,
    write: Write,
    *,
    options: Mapping[str, Any],
    progress: Progress | None = None,
) -> float | None:
    """Quantize and write the head by GPTQ, a block of rows at a time.

    Args:
        model: float; the head's inputs are measured in it.
        name: of the head, as it is stored.
        scheme: of groups or rows, without a table.
        calibration: windows of text, of which at most `HEAD_WINDOWS` are used.
        write: takes it.
        options: of the method.
        progress: called with the head, weights done, and of how many.

    Returns:
        The SQNR in dB; None where nothing was lost.
    """
    hessian = Hessian(model.config.hidden)
    for x in _head_inputs(model, calibration):
        hessian.add(x)
    own = {key: value for key, value in options.items() if key not in REPLAY_OPTIONS}
    tensor, parts = model.tensors[name], []
    n, k = tensor.shape
    noise = signal = 0.0
    for start in range(0, n, HEAD_ROWS):
        w = tensor.rows(start, min(start + HEAD_ROWS, n))
        check_finite(w, name, start)
        parts.append(quantize_tensor(w, scheme, "gptq", name=name, hessian=hessian, **own))
        signal += squares(w)
        noise += squares(w - parts[-1].numpy())
        release(tensor)
        if progress:
            progress(name, min(start + HEAD_ROWS, n) * k, n * k)
    joined = {
        part: np.concatenate([getattr(piece, part) for piece in parts])
        for part in part_shapes(scheme, (n, k))
    }
    write(name, QuantTensor(scheme, (n, k), **joined))
    return sqnr_db(signal, noise)


def _head_inputs(model: Model, calibration: CalibrationText) -> Iterator[NDArray[np.float32]]:
    """Inputs of a float model's head in at most `HEAD_WINDOWS` windows: float32 [T, K] each."""
    windows = calibration.windows[:: -(-len(calibration.windows) // HEAD_WINDOWS)]
    for step in Replay(model, windows):
        if step.group.kind == "head":
            yield from step.inputs()


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
        options: of the method; "use_quantized_inputs" makes up for the error of the inputs too,
            and "relative_errors" besides counts errors that are added to the residual stream in
            parts of its size, as the norm that follows divides by it.
        progress: called with the matrix, weights done, and of how many.

    Returns:
        The SQNR in dB of each; None where nothing was lost.

    Raises:
        FormatError: NaN or infinite weights.
        SchemeError: weights too large for their scheme.
    """
    own = {key: value for key, value in options.items() if key not in REPLAY_OPTIONS}
    crossed = METHOD_INPUTS.get(method) == "hessian"
    use_quantized_inputs = crossed and bool(options.get("use_quantized_inputs", False))
    relative_errors = use_quantized_inputs and bool(options.get("relative_errors", False))
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
        if relative_errors and step.group.adds_to_residual:
            seen: dict[str, Any] = {"hessian": _residual_moments(step)}
        else:
            seen = _input_statistics(step, METHOD_INPUTS.get(method), use_quantized_inputs)
        targets = _compensated_weights(step, names, seen.get("hessian"))
        for name in names:
            w = step.weights[name]
            tensor = quantize_tensor(
                targets.pop(name, w), schemes[name], method, name=name, **seen, **own
            )
            write(name, tensor)
            w_hat = tensor.numpy()
            ratios[name] = tensor_sqnr(FloatTensor("float32", w), FloatTensor("float32", w_hat))
            step.replace(name, w_hat)
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
    if hessian is None or not hessian.has_target:
        return {}
    targets = {name: hessian.target(step.weights[name]) for name in names}
    hessian.settle()
    return targets


def _residual_moments(step: ReplayStep) -> Hessian:
    """Moments of the inputs of a matrix whose output is added to the residual stream.

    Tokens count in inverse proportion to the square of the stream they are added to: the norm that
    follows divides by its size, so that an error of one part in a hundred counts the same for a
    token whose activations are a thousand times those of others.
    """
    (name,) = step.group.linears
    w = step.weights[name]
    hessian = Hessian(w.shape[1])
    seen = zip(
        step.inputs(), step.float_inputs(), step.residual_errors(), step.float_outputs(),
        strict=True,
    )  # fmt: skip
    for x, x_float, error, after in seen:
        missed: NDArray[np.float32] = product(x_float - x, w)
        missed += error
        square = row_products(after, after) / np.float32(after.shape[1])
        size: NDArray[np.float32] = np.sqrt(np.maximum(square, LEAST_SQUARE))[:, None]
        hessian.add(x / size, None, missed / size)
    return hessian


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
