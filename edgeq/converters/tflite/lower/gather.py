"""Emitter of Gather, with tables of integers."""

from __future__ import annotations

import numpy as np

from edgeq.converters.tflite.lower import refusals
from edgeq.converters.tflite.lower.axis_order import Shape, natural
from edgeq.converters.tflite.lower.emitters import computed, emits
from edgeq.converters.tflite.lower.lowering import Made, Out, TfliteLowering
from edgeq.converters.tflite.lower.shape_ops import cut
from edgeq.converters.tflite.operators import Value
from edgeq.graph.ir import Node, QuantWeight


@emits("Gather", integer=computed, fault=refusals.gather, whole_numbers=True)
def gather(low: TfliteLowering, node: Node, out: Out) -> Made:
    """Select elements along an axis; rows of a matrix of integers are dequantized."""
    data, rows = node.inputs
    axis = node.attrs.get("axis", 0) % len(low.shape(data))
    if rows in low.graph.constants:
        places = low.graph.array(rows).astype(np.int64)
        size = low.shape(data)[axis]
        index = low.ints(np.where(places < 0, places + size, places))
    else:
        index = low.get(rows, natural(len(low.shape(rows))))
    shape = low.shape(out.name)
    constant = low.graph.constants.get(data)
    if isinstance(constant, QuantWeight):
        return _embedded(low, data, constant, index, shape), natural(len(shape))
    if constant is not None:
        table = low.array(constant)
    else:
        table = low.get(data, natural(len(low.shape(data))), out.rounded)
    value = low.op("GATHER", [table, index], shape, like=True, axis=axis, batchDims=0)
    return value, natural(len(shape))


def _embedded(low: TfliteLowering, name: str, w: QuantWeight, index: Value, shape: Shape) -> Value:
    flat = low.reshaped(index, (int(np.prod(index.shape)),))
    if w.block is None and flat.dtype != "int32":  # the operator has no other; rows are fewer
        flat = low.cast(flat, "int32")
    rows, width = flat.shape[0], w.shape[1]
    if w.block is None:
        table = low.weight(name, w.shape, natural(2), rounded=True)
        scaled = low.op("EMBEDDING_LOOKUP", [flat, table], (rows, width), dtype="float32")
        return low.reshaped(scaled, shape)
    table = low.blocks(name)
    assert table.group_scales is not None
    groups_, padded_width = table.group_scales.shape[1], table.shape[1]
    levels = low.op("GATHER", [table, flat], (rows, padded_width), axis=0, batchDims=0)
    scales = low.op("GATHER", [table.group_scales, flat], (rows, groups_), axis=0, batchDims=0)
    levels = low.reshaped(low.real(levels), (rows, groups_, w.block))
    scaled = low.op("MUL", [levels, low.reshaped(low.real(scales), (rows, groups_, 1))])
    scaled = low.reshaped(scaled, (rows, padded_width))
    return low.reshaped(cut(low, scaled, (0, 0), (rows, width)), shape)
