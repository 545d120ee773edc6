"""Reading convolutions, pools and resizes, which need channels first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edgeq.graph.tflite.layout import Layouts
from edgeq.graph.tflite.schema import TfliteOperator

_SAME = 0
"""The schema's number of the padding that keeps the size."""


def same_pads(size: int, kernel: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """Zeros before and behind an axis for TensorFlow's SAME; the odd one is behind."""
    out = -(-size // stride)
    total = max((out - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def _window(r: Layouts, op: TfliteOperator, x: int, kernel: tuple[int, int]) -> dict[str, Any]:
    """Attributes that convolutions and pools share."""
    o = op.options
    _, height, width, _ = r.shape(x)
    dilations = [getattr(o, "dilationHFactor", 1), getattr(o, "dilationWFactor", 1)]
    pads = [(0, 0), (0, 0)]
    if o.padding == _SAME:
        pads = [
            same_pads(height, kernel[0], o.strideH, dilations[0]),
            same_pads(width, kernel[1], o.strideW, dilations[1]),
        ]
    return {
        "kernel_shape": list(kernel),
        "strides": [o.strideH, o.strideW],
        "dilations": dilations,
        "pads": [pads[0][0], pads[1][0], pads[0][1], pads[1][1]],
    }


def _conv(r: Layouts, op: TfliteOperator) -> None:
    x, w = op.inputs[:2]
    weights = r.fixed(op, 1)
    if op.op == "DEPTHWISE_CONV_2D":
        weights, group = weights.transpose(3, 0, 1, 2), r.shape(x)[3]
    else:
        weights = weights.transpose(0, 3, 1, 2)
        group = r.shape(x)[3] // weights.shape[1]
    inputs = [r.get(x, True), r.add_constant(r.base(w), weights), *_bias(r, op, 2)]
    attrs = _window(r, op, x, (weights.shape[2], weights.shape[3]))
    r.result(op, "Conv", inputs, first=True, fused=True, group=group, **attrs)


def _bias(r: Layouts, op: TfliteOperator, position: int) -> list[str]:
    if len(op.inputs) <= position or op.inputs[position] < 0:
        return []
    r.fixed(op, position)
    return [r.get(op.inputs[position], False)]


def _transposed_conv(r: Layouts, op: TfliteOperator) -> None:
    x, o = op.inputs[2], op.options
    weights = r.fixed(op, 1).transpose(3, 0, 1, 2)  # [O, kh, kw, I] -> [I, O, kh, kw]
    pads, extra = [], []
    for axis, stride in ((1, o.strideH), (2, o.strideW)):
        full = (r.shape(x)[axis] - 1) * stride + weights.shape[axis + 1]
        over = full - r.shape(op.outputs[0])[axis]
        pads.append((max(over, 0) // 2, max(over, 0) - max(over, 0) // 2))
        extra.append(max(-over, 0))
    inputs = [r.get(x, True), r.add_constant(r.base(op.inputs[1]), weights), *_bias(r, op, 3)]
    r.result(
        op, "ConvTranspose", inputs, first=True, fused=True, group=1, dilations=[1, 1],
        kernel_shape=list(weights.shape[2:]), strides=[o.strideH, o.strideW],
        pads=[pads[0][0], pads[1][0], pads[0][1], pads[1][1]], output_padding=extra,
    )  # fmt: skip


def _pool(kind: str) -> Callable[[Layouts, TfliteOperator], None]:
    def run(r: Layouts, op: TfliteOperator) -> None:
        x, o = op.inputs[0], op.options
        attrs = _window(r, op, x, (o.filterHeight, o.filterWidth))
        if kind == "AveragePool":
            attrs["count_include_pad"] = 0
        r.result(op, kind, [r.get(x, True)], first=True, fused=True, ceil_mode=0, **attrs)

    return run


def _resize(mode: str) -> Callable[[Layouts, TfliteOperator], None]:
    def run(r: Layouts, op: TfliteOperator) -> None:
        x, o = op.inputs[0], op.options
        n, height, width, channels = r.shape(op.outputs[0])
        attrs: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": "asymmetric"}
        if o.alignCorners:
            attrs["coordinate_transformation_mode"] = "align_corners"
        elif o.halfPixelCenters:
            attrs["coordinate_transformation_mode"] = "half_pixel"
        if mode == "nearest":
            whole = o.alignCorners or o.halfPixelCenters
            attrs["nearest_mode"] = "round_prefer_ceil" if whole else "floor"
        sizes = r.numbers([n, channels, height, width])
        r.result(op, "Resize", [r.get(x, True), "", "", sizes], first=True, **attrs)

    return run


def _blocks(kind: str) -> Callable[[Layouts, TfliteOperator], None]:
    def run(r: Layouts, op: TfliteOperator) -> None:
        attrs: dict[str, Any] = {"mode": "DCR"} if kind == "DepthToSpace" else {}
        size = op.options.blockSize
        r.result(op, kind, [r.get(op.inputs[0], True)], first=True, blocksize=size, **attrs)

    return run


IMAGE: Mapping[str, Callable[[Layouts, TfliteOperator], None]] = {
    "AVERAGE_POOL_2D": _pool("AveragePool"),
    "CONV_2D": _conv,
    "DEPTHWISE_CONV_2D": _conv,
    "DEPTH_TO_SPACE": _blocks("DepthToSpace"),
    "MAX_POOL_2D": _pool("MaxPool"),
    "RESIZE_BILINEAR": _resize("linear"),
    "RESIZE_NEAREST_NEIGHBOR": _resize("nearest"),
    "SPACE_TO_DEPTH": _blocks("SpaceToDepth"),
    "TRANSPOSE_CONV": _transposed_conv,
}
"""Operators on images -> how they are read."""
