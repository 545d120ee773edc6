"""Round the weights of a graph's operators with the rounders of `edgeq.quant`, one row a channel.

    Linear         [N, K]                a row is an output; groups run along K
    Gather         [V, D]                a row is an entry of the table; groups run along D
    Conv           [O, I/g, kh, kw]      a row is an output channel, I/g * kh * kw long
    ConvTranspose  [I, O/g, kh, kw]      a row is an output channel of all groups; an input
                                         channel where each is a group of its own

GPTQ needs second moments of what a row is multiplied with: of a convolution's inputs as im2col
cuts them, one matrix for each of its groups. Gather multiplies nothing, and in ConvTranspose
each output meets other taps of a row, so those two are rounded by "mse" where GPTQ is asked for.

Groups are for rows that every target can cut: a convolution gets a scale for each channel instead,
and so does a row no longer than a group.

Scales lie on the lattice that float16 and bfloat16 share, as all of edgeq's do, so that the
numbers in the file of every target are the same. The one exception are 4-bit weights of layers
whose output is rounded: `odd_scales`.
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
"""Steps of a sum in one of the output between which `odd_scales` makes them an odd number: with
fewer a scale would move too far, and with more float32 holds no number so well."""
BIAS_LIMIT = 2**30
"""Largest level of a bias, so that as much again is left for the sum it is added to."""


_LEAST_SCALE = 2.0**-20
"""The least scale of a weight: below it float16 holds too few of its digits."""


def weight_nodes(graph: Graph) -> tuple[Node, ...]:
    """Nodes whose weights can be rounded: float constants of Conv, ConvTranspose, Linear, Gather.

    A Gather is one of them if it looks rows of a matrix up.
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
    """Whether the weight is rounded with second moments of the node's inputs."""
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
        w: of the node, in its own shape.
        node: Conv, ConvTranspose, Linear or Gather.
        scheme: how, its method included: "rtn" if it names none; a palette without a method is
            rounded by "gptq" where there is a Hessian, else by "mse".
        hessian: mean of x x^T over a row's inputs, float32 [K, K]; of a convolution in groups
            [groups, K, K]. GPTQ needs it; a palette is better with it.
        ratio: the output's scale divided by the input's, where both are rounded: 4-bit weights
            with a scale for each channel then get those of `odd_scales`.

    Raises:
        FormatError: a weight is NaN or infinite.
        SchemeError: a scale is beyond float16, or so far below 1 that it is nearly 0 there.
        UsageError: GPTQ without a Hessian, or one of another width.
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
            f"gptq needs the second moments of the inputs of {node}; give samples, or use mse"
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
        # padding may have brought groups of its own
        scales = np.ascontiguousarray(scales[:, : -(-k // size)])
        return QuantWeight(levels, scales, scheme.bits, 1, size, palette)
    if matrix.granularity == "tensor":
        return QuantWeight(levels, np.array(scales[0, 0]), scheme.bits, None, None, palette)
    return QuantWeight(levels, scales[:, 0].copy(), scheme.bits, axis, None, palette)


def _check_size(rows: Array, node: Node, bits: int) -> None:
    """Refuse weights so small that float16, which scales are held in, has no scale for them."""
    most = float(np.abs(rows).max(initial=0))
    if 0 < most < _LEAST_SCALE * (2 ** (bits - 1) - 1):
        raise SchemeError(
            f"the weights of {node} are at most {most:.3g}, and their scale would be below the "
            f"least that float16 holds well, {_LEAST_SCALE:.3g}; keep them float "
            f"(--tensor-type {node.name}=f32)"
        )


def odd_scales(scales: Array, ratio: float, more: int = 0) -> Array:
    """The nearest scales with which a step of the output is an odd number of steps of the sum.

    No sum then lies halfway between two levels of the output, nor nearer to it than half a step of
    the sum. Runtimes that compute the sum in integers and round it with float32, with one rounding
    of a fixed-point product or with two, get the same level. It matters for weights of 4 bits,
    where a step of the output is but some dozen of the sum.

    Args:
        scales: float32, any shape.
        ratio: the output's scale divided by the input's.
        more: added to the odd numbers; even.
    """
    steps = ratio / scales.astype(np.float64)
    odd = (ratio / (2 * np.floor(steps / 2) + 1 + more)).astype(np.float32)
    return np.where((steps >= ODD[0]) & (steps <= ODD[1]), odd, scales)


def int_bias(
    b: NDArray[np.floating[Any]], x_scale: float, w: QuantWeight, name: str = "bias"
) -> QuantWeight:
    """A bias as integers of the products' scale, ``float32(x_scale) * w.scales``.

    Args:
        b: float [O].
        x_scale: of the input.
        w: the weight; has a scale for the tensor or for each output channel.
        name: for messages.

    Raises:
        SchemeError: the weight has groups, or a bias takes more than `BIAS_LIMIT` levels; see
            `with_room`.
    """
    scales = _product_scales(len(b), x_scale, w, name)
    levels = np.rint(b / scales.astype(np.float64))
    if not (np.abs(levels) <= BIAS_LIMIT).all():
        at = int(np.abs(levels).argmax())
        raise SchemeError(
            f"{name} is {float(b[at]):.6g} in channel {at}, where one step is {scales[at]:.6g}: "
            f"more than the {BIAS_LIMIT} steps an integer bias may have; "
            "the weights of the channel need a larger scale, as with_room gives them"
        )
    return QuantWeight(levels.astype(np.int32), scales, 32, 0)


def with_room(b: NDArray[np.floating[Any]], x_scale: float, w: QuantWeight) -> QuantWeight:
    """The weight with scales so large that `int_bias` can hold the bias.

    Channels of next to no weight may have a bias that would overflow. What such weights lose by
    being rounded to larger steps is less than a step of the bias in float32.

    Args:
        b: float [O].
        x_scale: of the input.
        w: the weight; has a scale for the tensor or for each output channel.

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
    """The axis of output channels, or of those of one group."""
    if node.op != "ConvTranspose":
        return 0
    depthwise = int(node.attrs.get("group", 1)) == shape[0] and shape[1] == 1
    return 0 if depthwise else 1


def _product_scales(n: int, x_scale: float, w: QuantWeight, name: str) -> Array:
    if w.block is not None:
        raise SchemeError(
            f"{name} is to be an integer, and its weight has scales for groups of {w.block}; "
            "use granularity channel or tensor where activations are integers too"
        )
    # in a transposed convolution the groups' channels share the scales
    return np.float32(x_scale) * np.resize(w.scales, n)


def _by_gptq(rows: Array, scheme: QuantScheme, hessian: Array, name: str) -> list[QuantRows]:
    """Rows of all groups of a convolution, each group by its own Hessian."""
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
    """Levels [N, K] and scales [N, 1] of 4 bits: each row takes the best of three odd numbers."""
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
    """Rows that are divided by their scales, to integers of 4 bits."""
    scheme = QuantScheme(4, True, "tensor", None, None)
    one = WeightParams(np.ones((1, 1), np.float32))
    if matrices is None:
        rounded = round_rows(rows, scheme, "rtn", name=name, shared=Shared(one))
        return rounded.levels(scheme)
    if rows.shape[1] <= MOST_COLUMNS and len(matrices) > 1:
        found = round_stack_of_matrices(rows, scheme, matrices, name=name, params=one)
        return found.levels(scheme)
    return np.concatenate([
        round_gptq(part, scheme, Hessian.of(matrix), name=name, params=one).levels(scheme)
        for part, matrix in zip(np.split(rows, len(matrices)), matrices, strict=True)
    ])  # fmt: skip
