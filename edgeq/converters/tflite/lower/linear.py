"""Emitters of matrix products."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeq.converters.tflite.lower import refusals
from edgeq.converters.tflite.lower.axis_order import natural, with_last
from edgeq.converters.tflite.lower.conv import bias_of, weight_tensor
from edgeq.converters.tflite.lower.emitters import emits, integer_weight, one_scale
from edgeq.converters.tflite.lower.lowering import Made, Out, TfliteLowering
from edgeq.converters.tflite.lower.shape_ops import padded
from edgeq.converters.tflite.operators import Value
from edgeq.formats.qparams import QuantParams
from edgeq.graph.ir import Node, QuantWeight

_WHOLE = ("int32", "int64")
_ENDS = np.array([-128, 127], np.int8)
"""The lowest and highest integers of 8 bits."""


@emits(
    "Linear",
    integer=integer_weight,
    fault=refusals.linear,
    activation=True,
    lacks=("int32", "int64"),
)
def linear(low: TfliteLowering, node: Node, out: Out) -> Made:
    """x [..., K] times w [N, K] transposed, plus a bias."""
    x, name = node.inputs[0], node.inputs[1]
    weight, rank = low.graph.constants[name], len(low.shape(x))
    order = with_last(low.home(x), rank - 1)
    w = weight if isinstance(weight, QuantWeight) else None
    fill = 0
    value = low.get(x, order, out.rounded)
    shape = (*value.shape[:-1], weight.shape[0])
    bias = bias_of(low, node, w, weight.shape[0], out.rounded)
    if w is not None and w.block is not None:
        factor = low.blocks(name)
        short = factor.shape[1] - value.shape[-1]
        if short:
            border = np.zeros((rank, 2), np.int64)
            border[-1, 1] = short
            value = padded(low, value, border, 0.0, out)
        if low.dynamic:
            low.hybrid = True
        else:
            factor = _unblocked(low, factor, w.block)
    else:
        quant = low.graph.quants.get(x)
        again = w is not None and not out.rounded and low.settings.compute != "float"
        if again and quant:
            value, fill = _with_ends(low, value, quant), len(_ENDS)
        factor = weight_tensor(
            low, "FULLY_CONNECTED", name, tuple(weight.shape), natural(2), out.rounded,
            low.columns.get(x), fill,
        )  # fmt: skip
    product = low.op(
        "FULLY_CONNECTED", [value, factor, bias], shape, quant=out.quant,
        keepNumDims=rank != 2, fusedActivationFunction=low.fused(out),
        asymmetricQuantizeInputs=bool(fill),
    )  # fmt: skip
    return product, order


def _with_ends(low: TfliteLowering, value: Value, quant: QuantParams) -> Value:
    """Add the lowest and highest representable value as two columns to a tensor of rounded values.

    An operator of float values and integer weights rounds each row anew, with a scale and zero
    point that it fits to the row. With these columns in every row they are the value's own, and
    nothing is lost.
    """
    key = (id(value), quant)
    if key not in low.ended:
        ends = quant.dequantize(_ENDS)
        columns = low.g.constant(np.broadcast_to(ends, (*value.shape[:-1], len(ends))).copy())
        shape = (*value.shape[:-1], value.shape[-1] + len(ends))
        joined = low.op("CONCATENATION", [value, columns], shape, axis=len(shape) - 1)
        low.ended[key] = (value, joined)
    return low.ended[key][1]


def _unblocked(low: TfliteLowering, w: Value, block: int) -> Value:
    """Dequantize a matrix with scales for blocks."""
    assert w.group_scales is not None
    n, groups = w.group_scales.shape
    levels = low.reshaped(low.real(w), (n, groups, block))
    scales = low.reshaped(low.real(w.group_scales), (n, groups, 1))
    return low.reshaped(low.op("MUL", [levels, scales]), w.shape)


@emits("MatMul", integer=one_scale, fault=refusals.matmul, activation=True, lacks=_WHOLE)
def matmul(low: TfliteLowering, node: Node, out: Out) -> Made:
    """The product of two computed values; a transposed last pair of axes is the operator's own."""
    shape = low.shape(out.name)
    rank = len(shape)
    factors: list[Value] = []
    flags: dict[str, Any] = {}
    swapped = (*range(rank - 2), rank - 1, rank - 2)
    for flag, name in zip(("adjX", "adjY"), node.inputs, strict=True):
        turned = (
            name in low.graph.values
            and len(low.shape(name)) == rank
            and low.held(name, swapped, out.rounded)
        )
        flags[flag] = turned
        order = swapped if turned else natural(rank)
        factors.append(low.operand(name, rank, order, out.rounded))
    value = low.op("BATCH_MATMUL", factors, shape, quant=out.quant, **flags)
    return value, natural(rank)
