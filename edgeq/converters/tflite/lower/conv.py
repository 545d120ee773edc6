"""Emitters of convolutions and pools."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.tflite.lower import refusals
from edgeq.converters.tflite.lower.axis_order import (
    AxisWindow,
    Order,
    Shape,
    channels_last,
    placed,
    row_columns,
)
from edgeq.converters.tflite.lower.emitters import always, emits, integer_weight, shared_params
from edgeq.converters.tflite.lower.lowering import Made, Out, TfliteLowering
from edgeq.converters.tflite.lower.shape_ops import cut, padded
from edgeq.converters.tflite.operators import Value
from edgeq.formats.qparams import QuantParams
from edgeq.graph.ir import Graph, Node, QuantWeight
from edgeq.graph.operators import is_depthwise

INT4 = frozenset({"CONV_2D", "FULLY_CONNECTED"})
"""Operators that read weights of 4 bits in every kernel; for others these take a byte each."""
HYBRID = frozenset({"CONV_2D", "TRANSPOSE_CONV", "FULLY_CONNECTED"})
"""Operators that take integer weights and float values, faster than float ones; depthwise ones do
so at a third of the speed."""
TWICE_ROUNDED = 1
"""What LiteRT's kernel for convolutions with 4-bit weights adds to a sum, at most.

It computes floor((floor(sum * m + 1/2) + 2^(s-1)) / 2^s) for a factor m / 2^s with 1/2 <= m < 1,
which is floor(sum * m / 2^s + 1/2) of a sum that is 1 / 2m larger: 1/2 to 1. A bias of 1 less
brings that to 0 to -1/2, which changes no result where a step of the output is an odd number of
steps of the sum: `edgeq.quant.graph.weights.odd_scales`. Convolutions in groups have another."""
_LAST = channels_last(4)


def windows(graph: Graph, node: Node) -> list[AxisWindow]:
    """The windows of a Conv or pool along height and width; height is 1 if there is width only."""
    shape, out = graph.info(node.inputs[0]).shape, graph.info(node.output).shape
    if node.op == "Conv":
        kernel: Sequence[int] = graph.info(node.inputs[1]).shape[2:]
    else:
        kernel = node.attrs["kernel_shape"]
    n = len(kernel)
    pads = node.attrs.get("pads") or [0] * (2 * n)
    strides, dilations = (node.attrs.get(k) or [1] * n for k in ("strides", "dilations"))
    windows_ = [
        AxisWindow(shape[2 + i], int(kernel[i]), int(strides[i]), int(pads[i]), out[2 + i],
               int(dilations[i]))
        for i in range(n)
    ]  # fmt: skip
    return windows_ if n > 1 else [AxisWindow(1, 1, 1, 0, 1), *windows_]


def image(low: TfliteLowering, node: Node, rounded: bool) -> Value:
    """Return the first input as [N, H, W, C]."""
    x = node.inputs[0]
    shape = low.shape(x)
    value = low.get(x, channels_last(len(shape)), rounded)
    return low.reshaped(value, (value.shape[0], 1, *value.shape[1:])) if len(shape) == 3 else value


def flat_again(low: TfliteLowering, value: Value, out: Out) -> Made:
    """Return an image [N, H, W, C] in the shape of its value, which may have width only."""
    shape = low.shape(out.name)
    order = channels_last(len(shape))
    return low.reshaped(value, placed(shape, order)), order


def lifted(shape: Shape) -> Shape:
    """Add a height of 1 to a kernel's shape that has width only."""
    return (*shape[:2], 1, shape[2]) if len(shape) == 3 else shape


def bias_of(
    low: TfliteLowering, node: Node, w: QuantWeight | None, n: int, rounded: bool, less: int = 0
) -> Value:
    """Return the bias: int32 with the scales of products if rounded, else float32; zeros if absent.

    Integers are ``less`` than the graph's; reading back adds it again.
    """
    name = node.inputs[2] if len(node.inputs) > 2 else ""
    if not rounded:
        return low.array(low.graph.array(name) if name else np.zeros(n, np.float32))
    assert w is not None
    bias = low.graph.constants.get(name)
    if isinstance(bias, QuantWeight):
        # one scale for each of the weight's
        levels, scales = bias.levels, bias.scales.reshape(-1)[: max(1, w.scales.size)]
    else:
        scale = np.float32(low.graph.quants[node.inputs[0]].scale)
        levels, scales = np.zeros(n, np.int32), np.atleast_1d(scale * w.scales)
    return low.bias(name or f"{node.name}/bias", levels, scales, less)


def weight_tensor(
    low: TfliteLowering, code: str, name: str, shape: Shape, order: Order, rounded: bool,
    columns: tuple[Shape, Order] | None = None, fill: int = 0,
) -> Value:  # fmt: skip
    """Return a weight as an operator reads it: integers where it can, else float32.

    Integers get ``fill`` columns of zeros behind their own.
    """
    weight = low.graph.constants[name]
    if not isinstance(weight, QuantWeight):
        array = weight.reshape(shape).transpose(order)
        return low.array(array if columns is None else array[:, row_columns(*columns)])
    hybrid = not rounded and low.dynamic and code in HYBRID
    # what is rounded already would be rounded again, to other levels; `linear` sees to that
    hybrid &= code == "FULLY_CONNECTED" or low.node.inputs[0] not in low.graph.quants
    low.hybrid |= hybrid and not fill
    integers = rounded or hybrid or bool(fill)
    narrow = code in INT4 and low.settings.int4 == "packed"
    return low.weight(
        name, shape, order, rounded=integers, narrow=narrow, columns=columns, fill=fill
    )


def padding(
    low: TfliteLowering, x: Value, windows_: Sequence[AxisWindow], out: Out, fill: float = 0.0
) -> tuple[Value, dict[str, Any]]:
    """Pad an image as far as the operator does not; returns it with the operator's padding."""
    kinds = low.file.schema.Padding
    height, width = windows_
    if height.valid and width.valid:
        return x, {"padding": kinds.VALID}
    if height.alike and width.alike:
        return x, {"padding": kinds.SAME}
    border = np.array([(0, 0), height.pads, width.pads, (0, 0)])
    if border.any():
        x = padded(low, x, border, fill, out)
    return x, {"padding": kinds.VALID}


@emits("Conv", integer=integer_weight, fault=refusals.conv, activation=True)
def conv(low: TfliteLowering, node: Node, out: Out) -> Made:
    """A convolution, depthwise if each filter has one channel."""
    name = node.inputs[1]
    weight = low.graph.constants[name]
    shape, windows_ = lifted(tuple(weight.shape)), windows(low.graph, node)
    deep = is_depthwise(low.graph, node)
    code, order = ("DEPTHWISE_CONV_2D", (1, 2, 3, 0)) if deep else ("CONV_2D", _LAST)
    x, settings = padding(low, image(low, node, out.rounded), windows_, out)
    w = weight_tensor(low, code, name, shape, order, out.rounded)
    bias = bias_of(
        low, node, weight if isinstance(weight, QuantWeight) else None, shape[0], out.rounded,
        TWICE_ROUNDED if w.dtype == "int4" and int(node.attrs.get("group", 1)) == 1 else 0,
    )  # fmt: skip
    if deep:
        settings["depthMultiplier"] = shape[0] // x.shape[3]
    height, width = windows_
    value = low.op(
        code, [x, w, bias], (x.shape[0], height.out, width.out, shape[0]), quant=out.quant,
        strideH=height.stride, strideW=width.stride, dilationHFactor=height.dilation,
        dilationWFactor=width.dilation, fusedActivationFunction=low.fused(out), **settings,
    )  # fmt: skip
    return flat_again(low, value, out)


@emits("ConvTranspose", integer=integer_weight, fault=refusals.conv_transpose, activation=True)
def conv_transpose(low: TfliteLowering, node: Node, out: Out) -> Made:
    """A transposed convolution, cut to size where TFLite lacks its padding."""
    name = node.inputs[1]
    weight = low.graph.constants[name]
    shape = lifted(tuple(weight.shape))
    n = len(weight.shape) - 2
    strides = [int(s) for s in node.attrs.get("strides") or [1] * n]
    pads = [int(p) for p in node.attrs.get("pads") or [0] * (2 * n)]
    sizes = [int(s) for s in low.shape(node.output)[2:]]
    if n == 1:
        strides, sizes, pads = [1, *strides], [1, *sizes], [0, pads[0], 0, pads[1]]
    x = image(low, node, out.rounded)
    kernel, kinds = shape[2:], low.file.schema.Padding
    whole = [(x.shape[1 + i] - 1) * strides[i] + kernel[i] for i in range(2)]
    settings: dict[str, Any] = {"padding": kinds.VALID}
    extents, start = whole, pads[:2]
    if all(_transposed_same(x.shape[1 + i], sizes[i], kernel[i], strides[i], pads[i])
           for i in range(2)):  # fmt: skip
        settings, extents, start = {"padding": kinds.SAME}, sizes, [0, 0]
    whole_out = extents == sizes and not any(start)
    bias = bias_of(
        low, node, weight if isinstance(weight, QuantWeight) else None, shape[1], out.rounded
    )
    w = weight_tensor(low, "TRANSPOSE_CONV", name, shape, (1, 2, 3, 0), out.rounded)
    target = (x.shape[0], *extents, shape[1])
    value = low.op(
        "TRANSPOSE_CONV", [low.ints(target), w, x, bias], target, dtype=x.dtype, quant=out.quant,
        strideH=strides[0], strideW=strides[1], fusedActivationFunction=low.fused(out),
        **settings,
    )  # fmt: skip
    if not whole_out:
        inside = [
            min(size, full - at) for size, full, at in zip(sizes, extents, start, strict=True)
        ]
        value = cut(low, value, (0, *start, 0), (x.shape[0], *inside, shape[1]))
    return flat_again(low, value, out)


def _transposed_same(size: int, out: int, kernel: int, stride: int, before: int) -> bool:
    total = max(0, (size - 1) * stride + kernel - out)
    return -(-out // stride) == size and total // 2 == before


@emits("MaxPool", integer=always, fault=refusals.pool, activation=True, whole_numbers=True)
def max_pool(low: TfliteLowering, node: Node, out: Out) -> Made:
    """The largest element in a window; padding is lower than any value."""
    windows_ = windows(low.graph, node)
    x = image(low, node, out.rounded)
    x, settings = padding(low, x, windows_, out, -math.inf)
    value = pooled(low, "MAX_POOL_2D", x, windows_, out, settings)
    return flat_again(low, value, out)


def pooled(
    low: TfliteLowering,
    code: str,
    x: Value,
    windows_: Sequence[AxisWindow],
    out: Out,
    settings: dict[str, Any],
) -> Value:
    """A pool whose output has the scale and zero point of its input."""
    height, width = windows_
    act = 0 if out.rounded else low.fused(out)
    return low.op(
        code, [x], (x.shape[0], height.out, width.out, x.shape[3]), like=True,
        strideH=height.stride, strideW=width.stride, filterHeight=height.kernel,
        filterWidth=width.kernel, fusedActivationFunction=act, **settings,
    )  # fmt: skip


def pool_counts(graph: Graph, node: Node) -> tuple[NDArray[np.int64], bool]:
    """Number of elements in each mean [oh, ow], and whether TFLite's SAME counts the same."""
    windows_ = windows(graph, node)
    pads = [int(p) for p in node.attrs.get("pads") or [0] * 4]
    ends = [(0, 0), (pads[0], pads[1])] if len(pads) == 2 else [pads[0::2], pads[1::2]]
    included = bool(node.attrs.get("count_include_pad", 0))
    inner = [w.counts((0, 0)) for w in windows_]
    real = [w.counts((end[0], end[1])) if included else n
            for w, n, end in zip(windows_, inner, ends, strict=True)]  # fmt: skip
    alike = all(w.alike for w in windows_) and all(
        (a == b).all() for a, b in zip(real, inner, strict=True)
    )
    return np.outer(*real), alike


def _averages(graph: Graph, node: Node, out: QuantParams) -> bool:
    """Whether LiteRT's integer pool divides as the source does."""
    counts, alike = pool_counts(graph, node)
    area = int(np.prod(node.attrs["kernel_shape"]))
    return shared_params(graph, node, out) and (alike or bool((counts == area).all()))


@emits("AveragePool", integer=_averages, fault=refusals.pool, activation=True)
def average_pool(low: TfliteLowering, node: Node, out: Out) -> Made:
    """The mean in a window, of the elements that the source counts."""
    windows_ = windows(low.graph, node)
    counts, alike = pool_counts(low.graph, node)
    x = image(low, node, out.rounded)
    area = math.prod(w.kernel for w in windows_)
    if alike:
        value = pooled(
            low, "AVERAGE_POOL_2D", x, windows_, out, {"padding": low.file.schema.Padding.SAME}
        )
        return flat_again(low, value, out)
    border = np.array([(0, 0), windows_[0].pads, windows_[1].pads, (0, 0)])
    x = padded(low, x, border, 0.0, out) if border.any() else x
    valid = {"padding": low.file.schema.Padding.VALID}
    if (counts == area).all():
        return flat_again(low, pooled(low, "AVERAGE_POOL_2D", x, windows_, out, valid), out)
    plain = Out(out.name)
    value = pooled(low, "AVERAGE_POOL_2D", x, windows_, plain, valid)
    factor = (area / counts).astype(np.float32)[None, :, :, None]
    value = low.op("MUL", [value, low.g.constant(factor)], fusedActivationFunction=low.fused(out))
    return flat_again(low, value, out)
