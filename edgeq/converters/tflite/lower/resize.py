"""Emitter of Resize, with the option of LiteRT's operator that computes the same as the source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.tflite.lower.conv import flat_again, image
from edgeq.converters.tflite.lower.emitters import always, emits
from edgeq.converters.tflite.lower.lowering import Made, Out, TfliteLowering
from edgeq.converters.tflite.lower.shape_ops import gathered
from edgeq.converters.tflite.operators import Value
from edgeq.graph.ir import Graph, Node

_LINEAR: Mapping[str, dict[str, Any]] = {"asymmetric": {}, "align_corners": {"alignCorners": True},
           "half_pixel": {"halfPixelCenters": True},
           "pytorch_half_pixel": {"halfPixelCenters": True}}  # fmt: skip
"""ONNX's coordinate transformation -> the options of RESIZE_BILINEAR."""


def scales_of(graph: Graph, node: Node) -> list[float]:
    """The scale of each axis."""
    source, out = graph.info(node.inputs[0]).shape, graph.info(node.output).shape
    scales = [b / a for a, b in zip(source, out, strict=True)]
    name = node.inputs[2] if len(node.inputs) > 2 else ""
    if name and graph.array(name).size:
        axes = node.attrs.get("axes") or range(len(source))
        for axis, scale in zip(axes, graph.array(name).reshape(-1), strict=True):
            scales[axis] = float(scale)
    return scales


def places(size: int, out: int, scale: float, attrs: Mapping[str, Any]) -> NDArray[np.float64]:
    """Coordinates in the source of each output element along one axis.

    Source: the operator Resize of ONNX, opset 19.
    """
    at = np.arange(out, dtype=np.float64)
    mode = attrs.get("coordinate_transformation_mode", "half_pixel")
    if mode == "asymmetric":
        return at / scale
    if mode == "align_corners":
        return at * ((size - 1) / (out - 1)) if out > 1 else at * 0
    if mode == "pytorch_half_pixel" and out == 1:
        return at * 0
    return (at + 0.5) / scale - 0.5


def nearest(size: int, out: int, scale: float, attrs: Mapping[str, Any]) -> NDArray[np.int64]:
    """Index in the source of each output element along one axis."""
    at = places(size, out, scale, attrs)
    way = attrs.get("nearest_mode", "round_prefer_floor")
    rounded = {
        "round_prefer_floor": np.ceil(at - 0.5), "round_prefer_ceil": np.floor(at + 0.5),
        "floor": np.floor(at), "ceil": np.ceil(at),
    }[way]  # fmt: skip
    return np.clip(rounded, 0, size - 1).astype(np.int64)


def fault(graph: Graph, node: Node) -> str | None:
    """Why a Resize cannot be lowered; None if it can."""
    source, out = graph.info(node.inputs[0]).shape, graph.info(node.output).shape
    mode = node.attrs.get("mode", "nearest")
    if len(source) not in (3, 4) or source[:2] != out[:2]:
        return "it resizes other axes than height and width; only those can be"
    if mode == "cubic":
        return "its mode is cubic; the nearest supported is linear"
    if node.attrs.get("antialias"):
        return "its antialias is on; the nearest supported is mode linear without it"
    if mode != "linear":
        return None
    way = node.attrs.get("coordinate_transformation_mode", "half_pixel")
    if way not in _LINEAR:
        return f"its coordinates are {way}; the nearest supported are half_pixel"
    if way == "align_corners":
        return None
    if way == "pytorch_half_pixel" and any(
        n == 1 != m for m, n in zip(source[2:], out[2:], strict=True)
    ):
        return (
            "its coordinates are pytorch_half_pixel down to one pixel; the nearest supported "
            "are half_pixel"
        )
    exact = [b / a for a, b in zip(source, out, strict=True)]
    if not np.allclose(scales_of(graph, node), exact, rtol=1e-6):
        return (
            f"its scales {scales_of(graph, node)} are not its sizes' ratio {exact}; give sizes, "
            "or scales that divide evenly"
        )
    return None


@emits("Resize", integer=always, fault=fault)
def resize(low: TfliteLowering, node: Node, out: Out) -> Made:
    """Resize an image."""
    x = image(low, node, out.rounded)
    shape = low.shape(out.name)
    sizes = list(shape[2:]) if len(shape) == 4 else [1, shape[2]]
    if node.attrs.get("mode", "nearest") == "linear":
        way = _LINEAR[node.attrs.get("coordinate_transformation_mode", "half_pixel")]
        value = low.op(
            "RESIZE_BILINEAR", [x, low.ints(sizes)], (x.shape[0], *sizes, x.shape[3]),
            like=True, **way,
        )  # fmt: skip
        return flat_again(low, value, out)
    scales = scales_of(low.graph, node)[2:]
    scales = scales if len(scales) == 2 else [1.0, *scales]
    wanted = [nearest(x.shape[1 + i], sizes[i], scales[i], node.attrs) for i in range(2)]
    return flat_again(low, _nearest(low, x, sizes, wanted), out)


def _nearest(
    low: TfliteLowering, x: Value, sizes: list[int], wanted: list[NDArray[np.int64]]
) -> Value:
    """Resize by the runtime's operator if it selects the same elements, else by GATHER."""
    ways: tuple[dict[str, Any], ...] = ({}, {"halfPixelCenters": True}, {"alignCorners": True})
    for way in ways:
        if all(
            np.array_equal(_selected(x.shape[1 + i], sizes[i], way), wanted[i]) for i in range(2)
        ):
            shape = (x.shape[0], *sizes, x.shape[3])
            return low.op("RESIZE_NEAREST_NEIGHBOR", [x, low.ints(sizes)], shape, like=True, **way)
    for axis, places_ in enumerate(wanted, 1):
        if not np.array_equal(places_, np.arange(x.shape[axis])):
            x = gathered(low, x, places_, axis)
    return x


def _selected(size: int, out: int, way: Mapping[str, bool]) -> NDArray[np.int64]:
    """The elements that RESIZE_NEAREST_NEIGHBOR selects, in its own float32 arithmetic.

    Source: ``GetNearestNeighbor`` in ``reference/resize_nearest_neighbor.h`` of LiteRT.
    """
    aligned = way.get("alignCorners", False) and out > 1
    step = np.float32(size - 1) / np.float32(out - 1) if aligned else np.float32(size) / out
    shift = np.float32(0.5 if way.get("halfPixelCenters") else 0.0)
    at = (np.arange(out).astype(np.float32) + shift) * np.float32(step)
    # TfLiteRound rounds halves away from zero
    whole = np.floor(at + np.float32(0.5)) if way.get("alignCorners") else np.floor(at)
    places: NDArray[np.int64] = np.clip(whole, 0, size - 1).astype(np.int64)
    return places
