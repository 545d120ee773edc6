"""Emitters of operators that move, cut and join values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.tflite.lower import refusals
from edgeq.converters.tflite.lower.axis_order import (
    Order,
    Shape,
    after_transpose,
    channels_last,
    groups,
    natural,
    placed,
    reshaped,
)
from edgeq.converters.tflite.lower.emitters import always, computed, emits
from edgeq.converters.tflite.lower.lowering import Made, Out, TfliteLowering
from edgeq.converters.tflite.lower.math_ops import taken
from edgeq.converters.tflite.operators import Value
from edgeq.graph.ir import Node, QuantWeight


def constant_ints(low: TfliteLowering, node: Node, place: int) -> list[int] | None:
    """The integers of a constant input; None if it is absent."""
    name = node.inputs[place] if place < len(node.inputs) else ""
    return [int(n) for n in low.graph.array(name).reshape(-1)] if name else None


@emits("Reshape", integer=always, whole_numbers=True, max_rank=6)
@emits("Flatten", "Squeeze", "Unsqueeze", integer=always, whole_numbers=True)
def reshape(low: TfliteLowering, node: Node, out: Out) -> Made:
    """Reshape, Flatten, Squeeze and Unsqueeze."""
    x, into = node.inputs[0], low.shape(out.name)
    source, order = low.shape(x), low.home(x)
    need, gives = reshaped(source, order, into, node.output in low.images)
    if need != order and (flat := _flattened(low, node, source, order, into)):
        low.columns[node.output] = flat
        return low.reshaped(low.get(x, order, out.rounded), into), natural(len(into))
    return low.reshaped(low.get(x, need, out.rounded), placed(into, gives)), gives


def _flattened(
    low: TfliteLowering, node: Node, source: Shape, order: Order, into: Shape
) -> tuple[Shape, Order] | None:
    """The axes that become columns of matrix products only, and their order in the file.

    The products' weights can be put into that order, and nothing need be moved.
    """
    users = low.graph.consumers.get(node.output, ())
    if node.output in low.graph.outputs or not users:
        return None
    for user in users:
        if user.op != "Linear" or user.inputs[0] != node.output:
            return None
        w = low.graph.constants[user.inputs[1]]
        if isinstance(w, QuantWeight) and w.block is not None:
            return None
    parts = groups(source, into)
    if not parts or parts[-1][1] != [len(into) - 1]:
        return None
    axes = parts[-1][0]
    lead = [axis for left, _ in parts[:-1] for axis in left]
    long = [axis for axis in order if source[axis] != 1]
    if long[: len(lead)] != lead:
        return None
    return tuple(source[a] for a in axes), tuple(axes.index(a) for a in long[len(lead) :])


@emits("Transpose", integer=always, whole_numbers=True, max_rank=6)
def transpose(low: TfliteLowering, node: Node, out: Out) -> Made:
    """A transposition only renames the order of axes; nothing moves until an operator needs it."""
    x, order = taken(low, node, out)
    perm = node.attrs.get("perm", tuple(reversed(range(len(order)))))
    return x, after_transpose(order, [int(p) for p in perm])


@emits("Identity", integer=always, whole_numbers=True)
def identity(low: TfliteLowering, node: Node, out: Out) -> Made:
    """The same value under another name; a constant becomes a computed tensor."""
    name = node.inputs[0]
    if name not in low.graph.constants:
        return taken(low, node, out)
    order = natural(len(low.shape(name)))
    value = low.array(low.graph.array(name))
    return low.op("RESHAPE", [value, low.ints(value.shape)], newShape=list(value.shape)), order


@emits("Concat", integer=always, whole_numbers=True, activation=True)
def concat(low: TfliteLowering, node: Node, out: Out) -> Made:
    """Join values along an axis, all with the scale and zero point of the output."""
    shape = low.shape(out.name)
    rank = len(shape)
    order = low.order_of(node.inputs, rank, out.name)
    table = low.params_table(out.quant)
    parts: list[Value | None] = []
    for name in node.inputs:
        if name in low.graph.constants:
            array = low.graph.array(name).transpose(order)
            if out.quant:
                buffer = low.file.constant(out.quant.quantize(array))
                parts.append(Value(low.short("c"), array.shape, "int8", buffer, table))
            else:
                parts.append(low.array(array))
            continue
        part = low.get(name, order, out.rounded)
        if out.quant is not None and part.scales is not table:
            part = low.requantized(part, out.quant)
        parts.append(part)
    axis = order.index(node.attrs["axis"] % rank)
    value = low.op(
        "CONCATENATION", parts, placed(shape, order), quant=out.quant, axis=axis,
        fusedActivationFunction=0,
    )  # fmt: skip
    return value, order


def cut(low: TfliteLowering, x: Value, begin: Sequence[int], shape: Sequence[int]) -> Value:
    """Cut a part out of a tensor."""
    if tuple(shape) == x.shape:
        return x
    return low.op("SLICE", [x, low.ints(begin), low.ints(shape)], shape, like=True)


@emits("Split", integer=always, whole_numbers=True)
def split(low: TfliteLowering, node: Node, out: Out) -> list[Made]:
    """Cut a value into parts along an axis."""
    x, order = taken(low, node, out)
    at = order.index(node.attrs.get("axis", 0) % len(order))
    parts: list[Made] = []
    start = 0
    for name in node.outputs:
        size = _split_sizes(low, node)[len(parts)] if not name else None
        shape = list(x.shape)
        shape[at] = low.shape(name)[order[at]] if size is None else size
        begin = [start if i == at else 0 for i in range(len(order))]
        parts.append((cut(low, x, begin, shape), order))
        start += shape[at]
    return parts


def _split_sizes(low: TfliteLowering, node: Node) -> list[int]:
    sizes = constant_ints(low, node, 1)
    if sizes is not None:
        return sizes
    axis = node.attrs.get("axis", 0)
    total, n = low.shape(node.inputs[0])[axis], len(node.outputs)
    return [-(-total // n)] * n


@emits("Slice", integer=always, whole_numbers=True)
def slice_(low: TfliteLowering, node: Node, out: Out) -> Made:
    """Cut a part out of a value, with steps; negative steps by gathering."""
    x, order = taken(low, node, out)
    starts, ends = constant_ints(low, node, 1) or [], constant_ints(low, node, 2) or []
    given = constant_ints(low, node, 3)
    axes = list(range(len(starts))) if given is None else given
    steps = constant_ints(low, node, 4) or [1] * len(starts)
    ranges = [range(n) for n in low.shape(node.inputs[0])]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = len(ranges[axis])
        ranges[axis] = range(size)[slice(start, end if step > 0 or end >= -size else None, step)]
    if any(r.step < 0 for r in ranges):
        for axis, r in enumerate(ranges):
            if r != range(low.shape(node.inputs[0])[axis]):
                x = gathered(low, x, np.array(r), order.index(axis))
        return x, order
    inside = [ranges[axis] for axis in order]
    if all(r.step == 1 for r in inside):
        return cut(low, x, [r.start for r in inside], [len(r) for r in inside]), order
    limits = (
        [r.start for r in inside], [r.start + len(r) * r.step for r in inside],
        [r.step for r in inside],
    )  # fmt: skip
    ends_ = [min(end, n) for end, n in zip(limits[1], x.shape, strict=True)]
    parts = [x, low.ints(limits[0]), low.ints(ends_), low.ints(limits[2])]
    return low.op("STRIDED_SLICE", parts, [len(r) for r in inside], like=True), order


def gathered(low: TfliteLowering, x: Value, places: NDArray[np.integer], axis: int) -> Value:
    """Select elements of a tensor along an axis of the file, at constant places."""
    shape = (*x.shape[:axis], *places.shape, *x.shape[axis + 1 :])
    return low.op("GATHER", [x, low.ints(places)], shape, like=True, axis=axis, batchDims=0)


@emits("Pad", integer=always, whole_numbers=True, fault=refusals.pad)
def pad(low: TfliteLowering, node: Node, out: Out) -> Made:
    """Pad with a constant or by reflection."""
    x, order = taken(low, node, out)
    amounts, rank = constant_ints(low, node, 1) or [], len(order)
    given = constant_ints(low, node, 3)
    axes = list(range(rank)) if given is None else [a % rank for a in given]
    table = np.zeros((rank, 2), np.int64)
    for i, axis in enumerate(axes):
        table[axis] = amounts[i], amounts[i + len(axes)]
    border, shape = table[list(order)], placed(low.shape(out.name), order)
    if (border < 0).any():
        keep = [n + min(0, a) + min(0, b) for n, (a, b) in zip(x.shape, border, strict=True)]
        x = cut(low, x, [max(0, -a) for a in border[:, 0]], keep)
        border = np.maximum(border, 0)
    if not border.any():
        return x, order
    if node.attrs.get("mode", "constant") == "reflect":
        return low.op("MIRROR_PAD", [x, low.ints(border)], shape, like=True, mode=0), order
    name = node.inputs[2] if len(node.inputs) > 2 else ""
    value = float(low.graph.array(name).reshape(())) if name else 0.0
    return padded(low, x, border, value, out), order


def padded(
    low: TfliteLowering, x: Value, border: NDArray[np.integer], value: float, out: Out
) -> Value:
    """Pad a tensor with one value; rounded tensors with that value's integer."""
    shape = [n + int(a) + int(b) for n, (a, b) in zip(x.shape, border, strict=True)]
    if value == 0.0 and x.dtype in ("float32", "int8"):
        return low.op("PAD", [x, low.ints(border)], shape, like=True)
    if x.scales is not None:
        level = low.quant_of(x).quantize(np.array(value, np.float32))
        fill = Value(low.short("c"), (), "int8", low.file.constant(level), x.scales)
    else:
        fill = low.g.constant(np.array(value, x.dtype))
    return low.op("PADV2", [x, low.ints(border), fill], shape, like=True)


@emits("Expand", integer=computed, whole_numbers=True)
def expand(low: TfliteLowering, node: Node, out: Out) -> Made:
    """Broadcast a value to a shape."""
    x, shape = node.inputs[0], low.shape(out.name)
    order = low.order_of([x], len(shape), out.name)
    value, wide = low.operand(x, len(shape), order, out.rounded), placed(shape, order)
    if value.shape == wide:
        return value, order
    return low.op("BROADCAST_TO", [value, low.ints(wide)], wide, like=True), order


@emits("Tile", integer=always, whole_numbers=True)
def tile(low: TfliteLowering, node: Node, out: Out) -> Made:
    """Repeat a value along its axes."""
    x, order = taken(low, node, out)
    times = constant_ints(low, node, 1) or []
    shape = placed(low.shape(out.name), order)
    return low.op("TILE", [x, low.ints([times[a] for a in order])], shape, like=True), order


@emits("Cast", fault=refusals.cast, whole_numbers=True)
def cast(low: TfliteLowering, node: Node, out: Out) -> Made:
    """Cast a value; float64 and float16 are stored as float32."""
    x, order = taken(low, node, out)
    dtype = file_type(low.graph.info(out.name).dtype)
    if x.dtype == dtype:
        return x, order
    if dtype == "bool" and x.dtype not in ("int8", "uint8"):  # of which there is no comparison
        zero = low.g.constant(np.array(0, x.dtype))
        return low.op("NOT_EQUAL", [x, zero], dtype="bool"), order
    return low.cast(x, dtype), order


def file_type(dtype: str) -> str:
    """The type of a value in the file: its own, but float32 for other floats."""
    return {"float64": "float32", "float16": "float32"}.get(dtype, dtype)


@emits("CumSum")
def cumulated(low: TfliteLowering, node: Node, out: Out) -> Made:
    """Cumulative sums along an axis."""
    x, order = taken(low, node, out)
    axis = (constant_ints(low, node, 1) or [0])[0] % len(order)
    at = low.ints(np.array(order.index(axis)))
    settings: dict[str, Any] = {k: bool(node.attrs.get(k, 0)) for k in ("exclusive", "reverse")}
    return low.op("CUMSUM", [x, at], **settings), order


@emits("DepthToSpace", "SpaceToDepth", integer=always, fault=refusals.image)
def depth_to_space(low: TfliteLowering, node: Node, out: Out) -> Made:
    """DepthToSpace and SpaceToDepth."""
    x, order = node.inputs[0], channels_last(4)
    block = node.attrs["blocksize"]
    value = low.get(x, order, out.rounded)
    shape = placed(low.shape(out.name), order)
    if node.op == "SpaceToDepth":
        return low.op("SPACE_TO_DEPTH", [value], shape, like=True, blockSize=block), order
    if node.attrs.get("mode", "DCR") == "CRD":
        channels = np.arange(value.shape[3]).reshape(-1, block * block).T.reshape(-1)
        value = gathered(low, value, channels, 3)
    return low.op("DEPTH_TO_SPACE", [value], shape, like=True, blockSize=block), order
