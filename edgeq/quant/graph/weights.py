"""Round the weights of a graph's operators with the rounders of `edgeq.quant`.

Weights are rounded as matrices, whose rows are

    Linear         [N, K]                outputs; groups run along K
    Gather         [V, D]                entries of the table; groups run along D
    Conv           [O, I/g, kh, kw]      output channels, I/g * kh * kw long
    ConvTranspose  [I, O/g, kh, kw]      output channels of all groups; input channels for
                                         depthwise convolutions

GPTQ needs the second moments of the vectors that a row is multiplied with: for a convolution the
rows of im2col, with one matrix for each of its groups. A Gather multiplies nothing, and in a
ConvTranspose each output uses other taps of a row, so the recipe's GPTQ becomes "mse" for these
two.

Only matrices have groups, because every target can represent those. A convolution gets one scale
for each channel instead, and so does a row that is not longer than a group.

Scales can be represented exactly in both float16 and bfloat16, like all scales of edgeq, so that
the files of all targets hold the same numbers. The only exception are 4-bit weights of layers whose
output is rounded, see `odd_scales`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import SchemeError, UsageError
from edgeq.formats.schemes import QuantScheme
from edgeq.graph.ir import LEVELS, Graph, Node, QuantWeight
from edgeq.graph.operators import MATRICES, WEIGHTED
from edgeq.quant.graph.hessians import ROW_PRODUCTS, Array, weight_name
from edgeq.quant.rounders.gptq import round_gptq
from edgeq.quant.rounders.gptq_stack import MOST_COLUMNS, round_stack_of_matrices
from edgeq.quant.rounders.hessian import Hessian
from edgeq.quant.rounders.qparams import (
    QuantRows,
    WeightParams,
    check_finite,
    group_view,
    snap_scales,
)
from edgeq.quant.rounders.rounding import Shared, find_shared, round_rows

ODD = (4.0, 4096.0)
"""Range of the ratio between an output step and an accumulator step in which `odd_scales` makes the
ratio odd. Below it a scale would change too much, and above it float32 is not precise enough."""
BIAS_LIMIT = 2**30
"""Largest integer of a bias, which leaves half of the int32 range to the sum of products."""


_LEAST_SCALE = 2.0**-20
"""Smallest scale of a weight. Smaller scales have too few significant bits in float16."""


def weight_nodes(graph: Graph) -> tuple[Node, ...]:
    """The nodes whose weights can be rounded.

    These are the Conv, ConvTranspose and Linear nodes with constant float weights, and the Gather
    nodes that look up rows of a constant float matrix.
    """

    def rounds(node: Node) -> bool:
        if node.op not in WEIGHTED:
            return False
        w = graph.constants.get(weight_name(node))
        if not isinstance(w, np.ndarray) or w.dtype not in (np.float32, np.float16):
            return False
        return node.op != "Gather" or (w.ndim == 2 and node.attrs.get("axis", 0) == 0)

    return tuple(node for node in graph.nodes if rounds(node))


def needs_hessian(node: Node, scheme: QuantScheme) -> bool:
    """Whether a scheme needs the second moments of the node's inputs to round its weight."""
    by_gptq = scheme.method == "gptq" or (scheme.codebook is not None and scheme.method is None)
    return by_gptq and node.op in ROW_PRODUCTS


def round_weight(
    w: NDArray[np.floating[Any]],
    node: Node,
    scheme: QuantScheme,
    hessian: Array | None = None,
    ratio: float | None = None,
) -> QuantWeight:
    """Round one weight.

    Args:
        w: the weight, in the shape of the node.
        node: a Conv, ConvTranspose, Linear or Gather.
        scheme: scheme and method of rounding. Without a method it is "rtn"; a palette without a
            method is rounded by "gptq" if there is a Hessian, else by "mse".
        hessian: mean of x x^T over the input vectors of a row, float32 [K, K], or [groups, K, K]
            for a grouped convolution. GPTQ needs it; a palette is more accurate with it.
        ratio: scale of the output divided by the scale of the input, if both are rounded. 4-bit
            weights with one scale for each channel then get scales of `odd_scales`.

    Raises:
        FormatError: a weight is NaN or infinite.
        SchemeError: a scale is too large or too small for float16.
        UsageError: GPTQ has no Hessian, or a Hessian of another width.
    """
    name = weight_name(node)
    axis = _channel_axis(node, w.shape)
    rows = np.moveaxis(w.astype(np.float32), axis, 0)
    shape, rows = rows.shape, np.ascontiguousarray(rows).reshape(len(rows), -1)
    check_finite(rows, name)
    _check_size(rows, node, scheme.bits)
    size, k = scheme.group_size, rows.shape[1]
    grouped = node.op in MATRICES and size is not None and k > size
    matrix = scheme.stored
    if scheme.granularity == "group" and not grouped:
        matrix = replace(matrix, granularity="channel", group_size=None)
    if hessian is not None and needs_hessian(node, scheme):
        parts = _by_gptq(rows, matrix, hessian, name)
    elif scheme.method == "gptq" and needs_hessian(node, scheme):
        raise UsageError(
            f"gptq needs the second moments of the inputs of {node}; give calibration samples, or "
            "use mse"
        )
    else:
        to_nearest = scheme.method == "rtn" or (scheme.method is None and not scheme.codebook)
        parts = [round_rows(rows, matrix, "rtn" if to_nearest else "mse", name=name)]
    scales = np.concatenate([part.row_scales for part in parts])
    palette = parts[0].params.palette
    levels = np.concatenate([part.levels(matrix) for part in parts])
    per_channel = matrix.granularity == "channel" and palette is None
    if ratio is not None and scheme.bits == 4 and per_channel:
        moments = hessian if needs_hessian(node, scheme) else None
        levels, scales = _with_odd_scales(rows, scales, ratio, moments, name)
    levels = np.ascontiguousarray(np.moveaxis(levels.reshape(shape), 0, axis))
    if size is not None and grouped:
        # padding may have added groups
        scales = np.ascontiguousarray(scales[:, : -(-k // size)])
        return QuantWeight(levels, scales, scheme.bits, 1, size, palette)
    if matrix.granularity == "tensor":
        return QuantWeight(levels, np.array(scales[0, 0]), scheme.bits, None, None, palette)
    return QuantWeight(levels, scales[:, 0].copy(), scheme.bits, axis, None, palette)


def _check_size(rows: Array, node: Node, bits: int) -> None:
    """Refuse weights that are so small that their scale has too few bits in float16."""
    most = float(np.abs(rows).max(initial=0))
    if 0 < most < _LEAST_SCALE * (2 ** (bits - 1) - 1):
        raise SchemeError(
            f"the weights of {node} are at most {most:.3g}, and their scale would be below "
            f"{_LEAST_SCALE:.3g}, the smallest that float16 represents well; keep them float "
            f"(--tensor-type {node.name}=f32)"
        )


def odd_scales(scales: Array, ratio: float, more: int = 0) -> Array:
    """The nearest scales for which one output step is an odd number of accumulator steps.

    Then no integer sum lies halfway between two output integers, or closer to it than half an
    accumulator step. Runtimes requantize the sum in float32 or by fixed-point products with one or
    two roundings, and all of them get the same integer. That matters for weights of 4 bits, for
    which an output step is only some dozen accumulator steps.

    Args:
        scales: scales of the weight, float32 of any shape.
        ratio: scale of the output divided by the scale of the input.
        more: an even number that is added to the odd numbers.
    """
    steps = ratio / scales.astype(np.float64)
    odd = (ratio / (2 * np.floor(steps / 2) + 1 + more)).astype(np.float32)
    return np.where((steps >= ODD[0]) & (steps <= ODD[1]), odd, scales)


def int_bias(
    b: NDArray[np.floating[Any]], x_scale: float, w: QuantWeight, name: str = "bias"
) -> QuantWeight:
    """Round a bias to int32 with the scale of the products, ``float32(x_scale) * w.scales``.

    Args:
        b: float bias [O].
        x_scale: scale of the input.
        w: the weight, with one scale for the tensor or one for each output channel.
        name: name of the bias, for messages.

    Raises:
        SchemeError: the weight has groups, or an integer of the bias would exceed `BIAS_LIMIT`; see
            `with_room`.
    """
    scales = _product_scales(len(b), x_scale, w, name)
    levels = np.rint(b / scales.astype(np.float64))
    if not (np.abs(levels) <= BIAS_LIMIT).all():
        at = int(np.abs(levels).argmax())
        raise SchemeError(
            f"{name} is {float(b[at]):.6g} in channel {at}, where one step is {scales[at]:.6g}: "
            f"more than the {BIAS_LIMIT} steps that an integer bias may have; give the weights of "
            "the channel a larger scale (with_room)"
        )
    return QuantWeight(levels.astype(np.int32), scales, 32, 0)


def with_room(b: NDArray[np.floating[Any]], x_scale: float, w: QuantWeight) -> QuantWeight:
    """Enlarge the scales of a weight so that `int_bias` can represent the bias.

    The bias of a channel with very small weights may overflow. The error of rounding such weights
    with a larger scale is less than one float32 step of the bias.

    Args:
        b: float bias [O].
        x_scale: scale of the input.
        w: the weight, with one scale for the tensor or one for each output channel.

    Raises:
        SchemeError: the weight has groups.
    """
    scales = _product_scales(len(b), x_scale, w, "bias")
    short = np.abs(b) / (BIAS_LIMIT * scales.astype(np.float64))
    if w.axis is None:
        grow = short.max(keepdims=True)
    else:
        grow = short.reshape(-1, w.scales.size).max(axis=0)
    if not (grow > 1).any():
        return w
    larger = snap_scales((w.scales * np.maximum(grow, 1)).astype(np.float32).reshape(-1), up=True)
    wider = replace(w, scales=np.where(grow > 1, larger, w.scales).reshape(w.scales.shape))
    steps = np.rint(w.numpy() / wider.wide_scales()).reshape(-1)
    if w.palette is None:
        levels = np.clip(steps, *LEVELS[w.bits]).astype(np.int8)
    else:
        levels = w.palette[np.abs(w.palette[:, None] - steps).argmin(0)]
    return replace(wider, levels=levels.reshape(w.shape))


def _channel_axis(node: Node, shape: tuple[int, ...]) -> int:
    """The axis of a weight along which its scales lie: output channels, or those of one group."""
    if node.op != "ConvTranspose":
        return 0
    depthwise = int(node.attrs.get("group", 1)) == shape[0] and shape[1] == 1
    return 0 if depthwise else 1


def _product_scales(n: int, x_scale: float, w: QuantWeight, name: str) -> Array:
    if w.block is not None:
        raise SchemeError(
            f"{name} must be an integer, and its weight has scales for groups of {w.block}; use "
            "the granularity channel or tensor if activations are integers too"
        )
    # in a transposed convolution all groups share the scales of their channels
    return np.float32(x_scale) * np.resize(w.scales, n)


def _by_gptq(rows: Array, scheme: QuantScheme, hessian: Array, name: str) -> list[QuantRows]:
    """Round rows by GPTQ; each group of a convolution has its own Hessian."""
    if hessian.ndim == 2:
        return [round_gptq(rows, scheme, Hessian.of(hessian), name=name)]
    shared = find_shared([group_view(rows, scheme)], scheme, "mse", rows.shape[1], name=name)
    params = shared.params
    palette = shared.palette if params is None else params.palette
    if scheme.granularity != "group" and rows.shape[1] <= MOST_COLUMNS:
        return [
            round_stack_of_matrices(
                rows, scheme, hessian, name=name, params=params, palette=palette
            )
        ]
    return [
        round_gptq(part, scheme, Hessian.of(matrix), name=name, params=params, palette=palette)
        for part, matrix in zip(np.split(rows, len(hessian)), hessian, strict=True)
    ]


def _with_odd_scales(
    rows: Array, scales: Array, ratio: float, hessian: Array | None, name: str
) -> tuple[NDArray[np.int8], Array]:
    """Integers [N, K] of 4 bits and scales [N, 1]: each row gets the best of three odd scales."""
    best = None
    matrices = None if hessian is None else hessian if hessian.ndim == 3 else hessian[None]
    for more in (0, -2, 2):
        tried = odd_scales(scales, ratio, more)
        levels = _in_steps(rows / tried, matrices, name)
        missed = rows - levels * tried
        if matrices is None:
            error = np.square(missed).sum(axis=1, keepdims=True)
        else:
            parts = np.split(missed, len(matrices))
            error = np.concatenate([
                (part @ matrix * part).sum(axis=1, keepdims=True)
                for part, matrix in zip(parts, matrices, strict=True)
            ])  # fmt: skip
        if best is None:
            best = levels, tried, error
        else:
            better = error < best[2]
            best = (np.where(better, levels, best[0]), np.where(better, tried, best[1]),
                    np.minimum(error, best[2]))  # fmt: skip
    assert best is not None
    return best[0], best[1]


def _in_steps(rows: Array, matrices: Array | None, name: str) -> NDArray[np.int8]:
    """Round rows that are divided by their scales already to integers of 4 bits."""
    scheme = QuantScheme(4, True, "tensor", None, None)
    one = WeightParams(np.ones((1, 1), np.float32))
    if matrices is None:
        rounded = round_rows(rows, scheme, "rtn", name=name, shared=Shared(one))
        return rounded.levels(scheme)
    if rows.shape[1] <= MOST_COLUMNS and len(matrices) > 1:
        stack = round_stack_of_matrices(rows, scheme, matrices, name=name, params=one)
        return stack.levels(scheme)
    return np.concatenate([
        round_gptq(part, scheme, Hessian.of(matrix), name=name, params=one).levels(scheme)
        for part, matrix in zip(np.split(rows, len(matrices)), matrices, strict=True)
    ])  # fmt: skip
