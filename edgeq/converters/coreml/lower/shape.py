"""Emitters of operators that move, select and repeat elements.

See `edgeq.converters.coreml.lower.emitters`.

Source: the ONNX operators' definitions at opset 21, and coremltools' of MIL, ops/defs/iOS15
(tensor_transformation, tensor_operation, scatter_gather) to iOS17.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.coreml.lower.build import MAX_RANK, CoremlLowering
from edgeq.converters.coreml.lower.emitters import computed, emits
from edgeq.converters.coreml.lower.weights import Var
from edgeq.graph.ir import Graph, Node, Shape
from edgeq.graph.operators import VIEWS

_KEEPS_ORDER = VIEWS | {"Transpose"}
"""Operators that can do without dimensions of 1."""


def passes(graph: Graph, name: str) -> bool:
    """Whether a value with too many dimensions can be built without its dimensions of 1."""
    if name in (*graph.inputs, *graph.outputs):
        return False
    nodes = [*graph.consumers.get(name, ()), graph.producers[name]]
    fits = sum(n != 1 for n in graph.info(name).shape) <= MAX_RANK
    return fits and all(node.op in _KEEPS_ORDER for node in nodes)


def _kept_dimensions(shape: Shape) -> list[int]:
    """Dimensions of a value that the program keeps."""
    return [i for i, n in enumerate(shape) if n != 1 or len(shape) <= MAX_RANK]


@emits("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(b: CoremlLowering, node: Node) -> Var:
    x, shape = b.take(node.inputs[0]), b.info_shape(node.output)
    if not shape:
        return b.mb.squeeze(x=x) if x.rank else b.mb.identity(x=x)
    return b.mb.reshape(x=x, shape=[shape[i] for i in _kept_dimensions(shape)] or [1])


@emits("Transpose")
def _transpose(b: CoremlLowering, node: Node) -> Var:
    shape = b.info_shape(node.inputs[0])
    kept = _kept_dimensions(shape)
    order = node.attrs.get("perm", range(len(shape))[::-1])
    perm = [kept.index(i) for i in order if i in kept]
    return b.mb.transpose(x=b.take(node.inputs[0]), perm=perm)


@emits("Concat")
def _concat(b: CoremlLowering, node: Node) -> Var:
    return b.mb.concat(values=[b.take(n) for n in node.inputs], axis=node.attrs["axis"])


@emits("Split")
def _split(b: CoremlLowering, node: Node) -> Sequence[Var]:
    axis, sizes = node.attrs.get("axis", 0), b.ints(node.inputs[1])
    parts: Sequence[Var] = b.mb.split(x=b.take(node.inputs[0]), split_sizes=sizes, axis=axis)
    return parts


@emits("Slice", refuse=computed)
def _slice(b: CoremlLowering, node: Node) -> Var:
    x = b.take(node.inputs[0])
    shape = b.info_shape(node.inputs[0])
    starts, ends, *rest = [b.ints(n) if n else [] for n in node.inputs[1:]]
    axes = (rest[0] if rest else []) or list(range(len(starts)))
    steps = (rest[1] if len(rest) > 1 else []) or [1] * len(starts)
    begin, end, stride = [0] * len(shape), list(shape), [1] * len(shape)
    open_end = [False] * len(shape)
    for first, last, axis, step in zip(starts, ends, axes, steps, strict=True):
        at = axis % len(shape)
        begin[at], end[at], stride[at] = slice(first, last, step).indices(shape[at])
        if end[at] < 0:  # backwards to the very first
            end[at], open_end[at] = 0, True
    return b.mb.slice_by_index(x=x, begin=begin, end=end, stride=stride, end_mask=open_end)


def _refuse_pad(graph: Graph, node: Node) -> str:
    if why := computed(graph, node):
        return why
    if graph.info(node.inputs[0]).dtype != "float32":
        return f"{graph.info(node.inputs[0]).dtype} values; nearest: Cast to float32 before"
    pads, mode = _pads(graph, node), node.attrs.get("mode", "constant")
    if (pads < 0).any():
        return "negative pads; nearest: Slice"
    if mode not in ("constant", "reflect", "edge"):
        return f"mode {mode}; nearest: constant, reflect or edge"
    if mode != "constant" and (len(pads) > 4 or pads[:-2].any()):
        return f"mode {mode} on other than the last two dimensions; nearest: mode constant"
    return ""


@emits("Pad", refuse=_refuse_pad)
def _pad(b: CoremlLowering, node: Node) -> Var:
    mode = node.attrs.get("mode", "constant")
    value = 0.0
    if len(node.inputs) > 2 and node.inputs[2]:
        value = float(b.numbers(node.inputs[2]).reshape(()))
    pads = _pads(b.graph, node).reshape(-1)
    return b.mb.pad(
        x=b.take(node.inputs[0]),
        pad=[int(p) for p in pads],
        mode={"edge": "replicate"}.get(mode, mode),
        constant_val=b.const(value),
    )


def _pads(graph: Graph, node: Node) -> NDArray[np.int64]:
    """Pads before and after each dimension: [rank, 2]."""
    rank = len(graph.info(node.inputs[0]).shape)
    given = graph.array(node.inputs[1]).reshape(2, -1)
    axes = list(range(rank))
    if len(node.inputs) > 3 and node.inputs[3]:
        axes = [int(a) % rank for a in graph.array(node.inputs[3]).reshape(-1)]
    pads = np.zeros((rank, 2), np.int64)
    pads[axes] = given.T
    return pads


# --- take and repeat --------------------------------------------------------------------------


@emits("Gather")
def _gather(b: CoremlLowering, node: Node) -> Var:
    axis = node.attrs.get("axis", 0)
    indices = _indices(b, node.inputs[1], b.info_shape(node.inputs[0])[axis])
    if node.inputs[0] not in b.graph.constants or node.inputs[0] in b.graph.quants:
        return _as_numbers(
            b, b.take(node.inputs[0]), lambda x: b.mb.gather(x=x, indices=indices, axis=axis)
        )
    weight = b.weight(node.inputs[0])
    y = b.mb.gather(x=weight.var, indices=indices, axis=axis)
    if weight.scale is None:
        return y
    scale = weight.scale
    if scale.rank:
        rank = indices.rank
        scale = b.mb.gather(x=scale, indices=indices, axis=0)
        scale = b.mb.expand_dims(x=scale, axes=list(range(rank, y.rank)))
    return b.mb.mul(x=y, y=scale)


def _indices(b: CoremlLowering, name: str, size: int) -> Var:
    """Indices, counted from 0 if they are constant."""
    if name in b.graph.constants:
        values = b.numbers(name)
        return b.mb.const(val=b.const(np.where(values < 0, values + size, values)))
    return b.take(name)


def _as_numbers(b: CoremlLowering, x: Var, make: Callable[[Var], Var]) -> Var:
    """Apply an operator that supports numbers only to truth values, by casts."""
    if x.dtype != b.types.bool:
        return make(x)
    return b.mb.cast(x=make(b.cast(x, "int32")), dtype="bool")


def _refuse_gather_elements(graph: Graph, node: Node) -> str:
    data, places = (graph.info(name).shape for name in node.inputs)
    axis = node.attrs.get("axis", 0)
    if any(a != b for i, (a, b) in enumerate(zip(data, places, strict=True)) if i != axis):
        return (
            f"indices {list(places)} that are shorter than the values {list(data)} along another "
            f"axis than {axis}; nearest: Slice of the values"
        )
    return ""


@emits("GatherElements", refuse=_refuse_gather_elements)
def _gather_elements(b: CoremlLowering, node: Node) -> Var:
    axis = node.attrs.get("axis", 0)
    indices = _indices(b, node.inputs[1], b.info_shape(node.inputs[0])[axis])
    return b.mb.gather_along_axis(x=b.take(node.inputs[0]), indices=indices, axis=axis)


@emits("Expand", "Tile")
def _repeated(b: CoremlLowering, node: Node) -> Var:
    """Expand and Tile: adds dimensions of one in front, then repeats."""
    x, shape = b.take(node.inputs[0]), b.info_shape(node.output)
    source = (1,) * (len(shape) - len(b.info_shape(node.inputs[0]))) + tuple(
        b.info_shape(node.inputs[0])
    )
    reps = [n // m for n, m in zip(shape, source, strict=True)]
    if x.rank != len(shape):
        x = b.mb.reshape(x=x, shape=list(source))
    return b.mb.tile(x=x, reps=reps) if max(reps, default=1) > 1 else b.mb.identity(x=x)


@emits("TopK", refuse=computed)
def _topk(b: CoremlLowering, node: Node) -> Sequence[Var]:
    outputs: Sequence[Var] = b.mb.topk(
        x=b.take(node.inputs[0]),
        k=b.ints(node.inputs[1])[0],
        axis=node.attrs.get("axis", -1),
        ascending=not node.attrs.get("largest", 1),
    )
    return outputs


@emits("CumSum", refuse=computed)
def _cumsum(b: CoremlLowering, node: Node) -> Var:
    return b.mb.cumsum(
        x=b.take(node.inputs[0]),
        axis=b.ints(node.inputs[1])[0] % len(b.info_shape(node.inputs[0])),
        exclusive=bool(node.attrs.get("exclusive", 0)),
        reverse=bool(node.attrs.get("reverse", 0)),
    )


# --- blocks -----------------------------------------------------------------------------------


@emits("DepthToSpace")
def _depth_to_space(b: CoremlLowering, node: Node) -> Var:
    x, size = b.take(node.inputs[0]), node.attrs["blocksize"]
    if node.attrs.get("mode", "DCR") == "CRD":
        return b.mb.pixel_shuffle(x=x, upscale_factor=size)
    return b.mb.depth_to_space(x=x, block_size=size)


@emits("SpaceToDepth")
def _space_to_depth(b: CoremlLowering, node: Node) -> Var:
    return b.mb.space_to_depth(x=b.take(node.inputs[0]), block_size=node.attrs["blocksize"])
