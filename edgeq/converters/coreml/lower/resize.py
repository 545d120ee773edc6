"""Emitter of Resize: the same points between pixels, or the same pixels.

Source: ONNX's Resize at opset 19, and coremltools' ops/defs/iOS15/image_resizing.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.coreml.lower.build import CoremlLowering
from edgeq.converters.coreml.lower.emitters import computed, emits
from edgeq.converters.coreml.lower.weights import Var
from edgeq.graph.ir import Graph, Node

_LINEAR = {
    "half_pixel": "UNALIGN_CORNERS",
    "pytorch_half_pixel": "UNALIGN_CORNERS",
    "align_corners": "STRICT_ALIGN_CORNERS",
    "asymmetric": "DEFAULT",
}
"""ONNX's coordinates -> MIL's sampling mode with the same points."""


_ROUNDED: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "floor": np.floor,
    "ceil": np.ceil,
    "round_prefer_ceil": lambda at: np.floor(at + 0.5),
    "round_prefer_floor": lambda at: np.ceil(at - 0.5),
}


def _refuse_resize(graph: Graph, node: Node) -> str:
    if why := computed(graph, node):
        return why
    mode = node.attrs.get("mode", "nearest")
    way = node.attrs.get("coordinate_transformation_mode", "half_pixel")
    source, shape = graph.info(node.inputs[0]).shape, graph.info(node.output).shape
    if mode not in ("nearest", "linear") or way not in _LINEAR:
        return f"mode {mode} with {way}; nearest: mode linear or nearest with half_pixel"
    if node.attrs.get("antialias", 0):
        return "antialias; nearest: without, or AveragePool"
    if mode == "nearest":
        return ""
    if len(shape) < 3 or shape[:-2] != source[:-2]:
        return "linear on other than the last two dimensions; nearest: Transpose, Resize, Transpose"
    for axis in (-2, -1):
        n, m, scale = shape[axis], source[axis], _scales(graph, node)[axis]
        if way != "align_corners" and not math.isclose(n / m, scale, rel_tol=1e-6):
            return f"a scale of {scale:g} that makes {n} of {m}; nearest: sizes, not scales"
        if way == "pytorch_half_pixel" and n == 1 and m != 1:
            return "pytorch_half_pixel down to one pixel; nearest: half_pixel, or AveragePool"
    return ""


@emits("Resize", refuse=_refuse_resize)
def _resize(b: CoremlLowering, node: Node) -> Var:
    x = b.take(node.inputs[0])
    source, shape = b.info_shape(node.inputs[0]), b.info_shape(node.output)
    if node.attrs.get("mode", "nearest") == "linear":
        way = node.attrs.get("coordinate_transformation_mode", "half_pixel")
        return b.mb.resize_bilinear(
            x=x,
            target_size_height=shape[-2],
            target_size_width=shape[-1],
            sampling_mode=_LINEAR[way],
        )
    points = {i: _nearest(b.graph, node, i) for i in range(len(shape)) if shape[i] != source[i]}
    whole = all(
        np.array_equal(p, np.arange(shape[i]) * source[i] // shape[i]) for i, p in points.items()
    )
    if whole and len(shape) > 2 and all(i >= len(shape) - 2 for i in points):
        return b.mb.resize_nearest_neighbor(
            x=x, target_size_height=shape[-2], target_size_width=shape[-1]
        )
    for axis, at in points.items():  # whichever pixels ONNX takes, told one by one
        x = b.mb.gather(x=x, indices=b.const(at), axis=axis)
    return x if points else b.mb.identity(x=x)


def _scales(graph: Graph, node: Node) -> list[float]:
    """The scale of each dimension."""
    source, shape = graph.info(node.inputs[0]).shape, graph.info(node.output).shape
    if len(node.inputs) > 2 and node.inputs[2] and graph.array(node.inputs[2]).size:
        given = [float(v) for v in graph.array(node.inputs[2]).reshape(-1)]
        axes = node.attrs.get("axes", range(len(source)))
        scales = [1.0] * len(source)
        for axis, scale in zip(axes, given, strict=True):
            scales[axis] = scale
        return scales
    return [n / m for n, m in zip(shape, source, strict=True)]


def _nearest(graph: Graph, node: Node, axis: int) -> NDArray[np.int64]:
    """Index of the source pixel of each output pixel along an axis."""
    size, count = graph.info(node.inputs[0]).shape[axis], graph.info(node.output).shape[axis]
    scale = _scales(graph, node)[axis]
    i = np.arange(count, dtype=np.float64)
    mode = node.attrs.get("nearest_mode", "round_prefer_floor")
    way = node.attrs.get("coordinate_transformation_mode", "half_pixel")
    if way == "align_corners":
        at = i * (size - 1) / (count - 1) if count > 1 else np.zeros(1)
    elif way == "asymmetric":
        at = i / scale
    else:
        at = (i + 0.5) / scale - 0.5
        if way == "pytorch_half_pixel" and count == 1:
            at = np.zeros(1)
    return np.clip(_ROUNDED[mode](at), 0, size - 1).astype(np.int64)
