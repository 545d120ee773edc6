"""Calibrated rounding: round the layers' matrices with statistics of their inputs, in order.

A text is replayed through the model (`edgeq.quant.decoder.replay`). At each group of matrices with
the same input, the statistics that the method needs are measured, the matrices are rounded and
written, and the rounded matrices replace the originals in the replay. Later groups therefore see
the error of earlier ones and can compensate for it.
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
from edgeq.quant.decoder.finished_layers import FinishedLayers, Wanted
from edgeq.quant.decoder.replay import Replay, ReplayStep
from edgeq.quant.kernels.products import column_squares, product, row_products, squares
from edgeq.quant.recipe import Recipe
from edgeq.quant.rounders.gptq import importance
from edgeq.quant.rounders.hessian import Hessian
from edgeq.quant.rounders.palette import find_palette
from edgeq.quant.rounders.qparams import check_finite, group_view
from edgeq.quant.rounders.rounding import METHOD_INPUTS, quantize_tensor, sqnr_db

EXACT_BITS = 8
"""From this many bits on, the error of the head is too small for its inputs to matter."""
HEAD_WINDOWS = 8
"""Most windows on which the inputs of the head are measured."""
HEAD_ROWS = 4096
"""Rows of the head that are rounded at once: a multiple of the rows of a packed tile."""
REPLAY_OPTIONS = (
    "use_quantized_inputs", "relative_errors", "calibrated_head", "sensitive_layers",
)  # fmt: skip
"""Options of a recipe that concern the replay and not the rounder."""
LEAST_SQUARE = np.float32(1e-12)
"""Lower bound of the mean square of a residual stream."""
Ratios = Mapping[str, float | None]
"""Name of a tensor -> SQNR in dB; None without an error."""
Write = Callable[[str, QuantTensor], None]
"""Stores a rounded matrix under its name."""


def layer_matrices(schemes: Mapping[str, Scheme]) -> dict[str, QuantScheme]:
    """The schemes of the matrices that are rounded during the replay: those of the layers."""
    return {
        name: scheme
        for name, scheme in schemes.items()
        if isinstance(scheme, QuantScheme) and name.startswith("model.layers.")
    }


def head_importance(
    model: Model, schemes: Mapping[str, Scheme], method: str, calibration: CalibrationText
) -> dict[str, NDArray[np.float32]]:
    """Mean squares of the head's inputs in the float model, for weighting its rounding errors.

    A few inputs of the head are many times larger than the others, so weighting by them halves the
    loss of a head with few bits. A tied head is also the embedding, whose rounding costs little.

    Args:
        model: the float model.
        schemes: schemes of all tensors that are stored.
        method: a name of `edgeq.quant.METHODS`.
        calibration: the windows, of which at most `HEAD_WINDOWS` are used.

    Returns:
        the name under which the head is stored -> mean squares, float32 [K]. Empty if the method
        needs no inputs, or if the head has `EXACT_BITS` bits or more.
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
    """The name of the head, if GPTQ rounds it; else None.

    A few inputs of the head are many times larger than the others, so the other columns compensate
    the rounding error of those columns well. A tied head is also the embedding, whose rounding
    costs less.
    """
    name = head_name(model)
    scheme = schemes.get(name)
    wanted = recipe.method == "gptq" and recipe.options.get("calibrated_head", False)
    if not wanted or not isinstance(scheme, QuantScheme) or not is_weighted(scheme):
        return None
    return None if scheme.granularity == "tensor" else name


def head_name(model: Model) -> str:
    """The name under which the head is stored. A tied head is stored as the embedding."""
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
        model: the float model, in which the inputs of the head are measured.
        name: name under which the head is stored.
        scheme: a scheme with groups or channels.
        calibration: the windows, of which at most `HEAD_WINDOWS` are used.
        write: writes the rounded head.
        options: options of the method.
        progress: called with the head, weights done, and number of weights.

    Returns:
        the SQNR in dB; None without an error.
    """
    hessian = Hessian(model.config.hidden)
    for x in _head_inputs(model, calibration):
        hessian.add(x)
    own = {key: value for key, value in options.items() if key not in REPLAY_OPTIONS}
    tensor, parts = model.tensors[name], []
    n, k = tensor.shape
    pieces = range(0, n, HEAD_ROWS)

    def rows(start: int) -> NDArray[np.float32]:
        w = tensor.rows(start, min(start + HEAD_ROWS, n))
        check_finite(w, name, start)
        return w

    if scheme.codebook:  # one table for all rows
        chunks = (group_view(rows(start), scheme) for start in pieces)
        own["palette"] = find_palette(chunks, scheme, name, importance(hessian.diagonal, scheme))
    noise = signal = 0.0
    for start in pieces:
        w = rows(start)
        parts.append(quantize_tensor(w, scheme, "gptq", name=name, hessian=hessian, **own))
        signal += squares(w)
        noise += squares(w - parts[-1].numpy())
        release(tensor)
        if progress:
            progress(name, min(start + HEAD_ROWS, n) * k, n * k)
    joined = {
        part: np.concatenate([getattr(piece, part) for piece in parts])
        for part in part_shapes(scheme, (n, k))
        if part != "palette"
    }
    write(name, QuantTensor(scheme, (n, k), **joined, palette=parts[0].palette))
    return sqnr_db(signal, noise)


def _head_inputs(model: Model, calibration: CalibrationText) -> Iterator[NDArray[np.float32]]:
    """Inputs of a float model's head for at most `HEAD_WINDOWS` windows: float32 [T, K] each."""
    windows = calibration.windows[:: -(-len(calibration.windows) // HEAD_WINDOWS)]
    for step in Replay(model, windows):
        if step.group.kind == "head":
            yield from step.inputs()


def is_weighted(scheme: Scheme | None) -> bool:
    """Whether the rounding of a head with this scheme is weighted by its inputs."""
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
    finished: FinishedLayers | None = None,
    progress: Progress | None = None,
) -> dict[str, float | None]:
    """Quantize and write the matrices of the layers.

    Args:
        model: the float model.
        schemes: name -> scheme of the matrices to round, all of them in layers.
        method: a name of `edgeq.quant.METHODS`.
        calibration: the windows.
        write: writes a rounded matrix.
        written: tensors that the replay uses instead of the model's, such as the rounded embedding.
        options: options of the method and of the replay. "use_quantized_inputs" also compensates
            for the error of the inputs. "relative_errors" also divides errors that are added to the
            residual stream by its size, as the norm that follows does.
        finished: layers that an interrupted run has rounded, which are replayed only; each layer
            that is rounded is kept there.
        progress: called with the matrix, weights done, and number of weights.

    Returns:
        name -> SQNR in dB; None without an error.

    Raises:
        FormatError: a weight is NaN or infinite.
        SchemeError: a weight is too large for its scheme.
    """
    own = {key: value for key, value in options.items() if key not in REPLAY_OPTIONS}
    crossed = METHOD_INPUTS.get(method) == "hessian"
    use_quantized_inputs = crossed and bool(options.get("use_quantized_inputs", False))
    relative_errors = use_quantized_inputs and bool(options.get("relative_errors", False))
    total = sum(int(np.prod(model.tensors[name].shape)) for name in schemes)
    ratios: dict[str, float | None] = {}
    done = 0
    layers = _Layers(model, schemes, finished)
    replay = Replay(model, calibration.windows, float_inputs=use_quantized_inputs, replaced=written)
    for step in replay:
        names = [name for name in step.group.linears if name in schemes]
        if not names:
            continue
        if progress:
            progress(names[0], done, total)
        kept = layers.begin(step.group.layer)
        seen: dict[str, Any] = {}
        if kept:
            targets: dict[str, NDArray[np.float32]] = {}
        else:
            if relative_errors and step.group.adds_to_residual:
                seen = {"hessian": _residual_moments(step)}
            else:
                seen = _input_statistics(step, METHOD_INPUTS.get(method), use_quantized_inputs)
            targets = _compensated_weights(step, names, seen.get("hessian"))
        for name in names:
            w = step.weights[name]
            tensor = kept.get(name) or quantize_tensor(
                targets.pop(name, w), schemes[name], method, name=name, **seen, **own
            )
            write(name, tensor)
            w_hat = tensor.numpy()
            ratios[name] = tensor_sqnr(FloatTensor("float32", w), FloatTensor("float32", w_hat))
            step.replace(name, w_hat)
            layers.add(name, tensor)
            done += w.size
            if progress:
                progress(name, done, total)
        if done == total:
            break
    return ratios


class _Layers:
    """The layer that is being rounded, and those that are finished."""

    def __init__(
        self, model: Model, schemes: Mapping[str, QuantScheme], finished: FinishedLayers | None
    ) -> None:
        self._model, self._schemes, self._finished = model, schemes, finished
        self._layer = -1
        self._wanted: Wanted = {}
        self._kept: Mapping[str, QuantTensor] = {}
        self._rounded: dict[str, QuantTensor] = {}

    def begin(self, layer: int) -> Mapping[str, QuantTensor]:
        """Go on with a layer; returns its matrices if they are rounded already, else nothing."""
        if self._finished is not None and layer != self._layer:
            prefix = f"model.layers.{layer}."
            self._wanted = {
                name: (scheme, (n, k))
                for name, scheme in self._schemes.items()
                if name.startswith(prefix)
                for n, k in [self._model.tensors[name].shape]
            }
            self._layer, self._rounded = layer, {}
            self._kept = self._finished.tensors(layer, self._wanted)
        return self._kept

    def add(self, name: str, tensor: QuantTensor) -> None:
        """Take a rounded matrix, and keep the layer if it was the last one."""
        if self._finished is None or self._kept:
            return
        self._rounded[name] = tensor
        if len(self._rounded) == len(self._wanted):
            self._finished.keep(self._layer, self._rounded)


def tensor_sqnr(original: Tensor, tensor: Tensor) -> float | None:
    """SQNR of a tensor in dB; None without an error."""
    signal = noise = 0.0
    for part in row_blocks(original.shape):
        w = original.rows(part.start, part.stop)
        signal += squares(w)
        noise += squares(w - tensor.rows(part.start, part.stop))
    return sqnr_db(signal, noise)


def _compensated_weights(
    step: ReplayStep, names: Sequence[str], hessian: Hessian | None
) -> dict[str, NDArray[np.float32]]:
    """The matrices to round instead of the weights, which also compensate for the inputs' errors.

    They are computed for all matrices of the group at once. The cross moments are as large as the
    Hessian and are released before the matrices are rounded.
    """
    for name in names:
        check_finite(step.weights[name], name)
    if hessian is None or not hessian.has_target:
        return {}
    targets = {name: hessian.target(step.weights[name]) for name in names}
    hessian.settle()
    return targets


def _residual_moments(step: ReplayStep) -> Hessian:
    """Second moments of the inputs of a matrix whose output is added to the residual stream.

    Tokens are weighted by the inverse of the mean square of the residual stream. The norm that
    follows divides by its size, so that a relative error of 1 % counts the same for tokens with
    small activations and for tokens with activations that are a thousand times larger.
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
    """The statistics of a group's inputs that a method needs, as its keyword arguments."""
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
    # only without a norm in between is the error of the residual stream that of the outputs
    adds = step.group.adds_to_residual
    for x, x_float, error in seen:
        hessian.add(x, x_float, error if adds else None)
    return {"hessian": hessian}
