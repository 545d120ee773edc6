"""Emitters of elementwise operators, reductions and norms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edgeq.converters.tflite.lower import refusals
from edgeq.converters.tflite.lower.axis_order import Order, after_reduction, placed, with_last
from edgeq.converters.tflite.lower.emitters import (
    always,
    code_of,
    emits,
    fixed_params,
    one_scale,
    shared_params,
)
from edgeq.converters.tflite.lower.lowering import Made, Out, TfliteLowering
from edgeq.converters.tflite.operators import Value
from edgeq.graph.ir import Node, QuantWeight

_MOST = float(np.finfo(np.float32).max)
_ACTIVATED = ("ADD", "SUB", "MUL", "DIV")
_ERF = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
_ERF_P = 0.3275911


def taken(low: TfliteLowering, node: Node, out: Out) -> tuple[Value, Order]:
    """Return the first input and its order of axes."""
    x = node.inputs[0]
    return low.get(x, None, out.rounded), low.home(x)


def number(low: TfliteLowering, value: float) -> Value:
    """Make a float32 constant."""
    return low.g.constant(np.array(value, np.float32))


@emits("Sqrt", "Exp", "Log", "Neg", "Floor", "Ceil", "Round", "Sin", "Cos", "Not")
@emits("Abs", "Sign", lacks=("int64",))
@emits("HardSwish", integer=always)
@emits("Sigmoid", "Tanh", integer=fixed_params)
def unary(low: TfliteLowering, node: Node, out: Out) -> Made:
    """An operator of one input, element by element."""
    x, order = taken(low, node, out)
    return low.op(code_of(node), [x], quant=out.quant), order


@emits("Add", "Sub", "Mul", integer=one_scale, activation=True)
@emits("Div", activation=True, lacks=("int64",))
@emits("Max", "Min", integer=shared_params)
@emits("Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual", "And", "Or")
def binary(low: TfliteLowering, node: Node, out: Out) -> Made:
    """An operator of several broadcast inputs, which are taken two by two."""
    shape, code = low.shape(out.name), code_of(node)
    order = low.order_of(node.inputs, len(shape), out.name)
    parts = [low.operand(name, len(shape), order, out.rounded) for name in node.inputs]
    settings: dict[str, Any] = (
        {"fusedActivationFunction": low.fused(out)} if code in _ACTIVATED else {}
    )
    dtype = low.graph.info(out.name).dtype
    value = parts[0]
    for n, part in enumerate(parts[1:], 2):
        broad = np.broadcast_shapes(value.shape, part.shape)
        result = placed(shape, order) if n == len(parts) else broad
        kind = "bool" if dtype == "bool" else None
        value = low.op(code, [value, part], result, dtype=kind, quant=out.quant, **settings)
    return value, order


@emits("Pow", lacks=("int32", "int64"))
def power(low: TfliteLowering, node: Node, out: Out) -> Made:
    """A power; the square and the root by operators of their own."""
    base, exponent = node.inputs
    if exponent in low.graph.constants and low.graph.array(exponent).size == 1:
        by = float(low.graph.array(exponent).reshape(()))
        if by in (2.0, 0.5) and low.shape(base) == low.shape(out.name):
            x, order = taken(low, node, out)
            return (low.op("MUL", [x, x]) if by == 2.0 else low.op("SQRT", [x])), order
    shape = low.shape(out.name)
    order = low.order_of(node.inputs, len(shape), out.name)
    parts = [low.operand(name, len(shape), order) for name in node.inputs]
    return low.op("POW", parts, placed(shape, order)), order


@emits("Where", whole_numbers=True)
def where(low: TfliteLowering, node: Node, out: Out) -> Made:
    """Select from two values element by element."""
    shape = low.shape(out.name)
    order = low.order_of(node.inputs, len(shape), out.name)
    parts = [low.operand(name, len(shape), order) for name in node.inputs]
    return low.op("SELECT_V2", parts, placed(shape, order), dtype=parts[1].dtype), order


def bounds(low: TfliteLowering, node: Node) -> tuple[float, float]:
    """The bounds of a Relu or Clip."""
    if node.op == "Relu":
        return 0.0, math.inf
    ends = [-math.inf, math.inf]
    for place, name in enumerate(node.inputs[1:3]):
        if name:
            bound = float(low.graph.array(name).reshape(()))
            # the largest float32 bounds nothing
            ends[place] = bound if abs(bound) < _MOST else math.copysign(math.inf, bound)
    return ends[0], ends[1]


@emits("Relu", "Clip", integer=always)
def clamp(low: TfliteLowering, node: Node, out: Out) -> Made:
    """A Relu or Clip that no operator computes; of rounded values in `TfliteLowering.finish`."""
    x, order = taken(low, node, out)
    out.low, out.high = bounds(low, node)
    if out.rounded:
        return x, order
    return low.clamped(x, out), order


@emits("LeakyRelu", integer=always)
def leaky(low: TfliteLowering, node: Node, out: Out) -> Made:
    """A Relu with a slope below zero."""
    x, order = taken(low, node, out)
    alpha = float(node.attrs.get("alpha", 0.01))
    if out.quant is None:
        return low.op("LEAKY_RELU", [x], alpha=alpha), order
    slope = QuantWeight(np.ones((), np.int8), np.array(alpha, np.float32), 8)
    if not 0 < alpha <= 1:
        return _quantized_to(low, low.op("LEAKY_RELU", [low.op("DEQUANTIZE", [x], dtype="float32")],
                                    alpha=alpha), out), order  # fmt: skip
    return _sloped(low, x, low.integers(low.short("w"), slope, "int8"), out), order


@emits("PRelu", integer=one_scale)
def prelu(low: TfliteLowering, node: Node, out: Out) -> Made:
    """A Relu with a slope for each channel."""
    x, order = taken(low, node, out)
    slopes = node.inputs[1]
    if out.quant is not None and slopes in low.graph.constants:
        values = low.graph.array(slopes)
        if values.size and values.min() >= 0 and values.max() <= 1:
            slope = low.operand(slopes, len(order), order, True)
            return _sloped(low, x, slope, out), order
    if out.quant is not None:
        x = low.op("DEQUANTIZE", [x], dtype="float32")
    slope = low.operand(slopes, len(order), order, False)
    if not slope.shape:
        slope = low.reshaped(slope, (1,) * len(order))
    result = low.op("PRELU", [x, slope])
    return (result if out.quant is None else _quantized_to(low, result, out)), order


def _quantized_to(low: TfliteLowering, value: Value, out: Out) -> Value:
    assert out.quant is not None
    return low.op("QUANTIZE", [value], quant=out.quant)


def _sloped(low: TfliteLowering, x: Value, slope: Value, out: Out) -> Value:
    """max(x, slope x) in integers, for slopes from 0 to 1.

    LEAKY_RELU, PRELU and QUANTIZE of integers multiply by a factor of 8 fractional bits in some
    kernels and give another level than the graph in up to a third of the places; MUL is exact.
    """
    assert out.quant is not None
    below = low.op("MUL", [x, slope], quant=out.quant)
    if x.scales is not low.params_table(out.quant):
        x = low.requantized(x, out.quant)
    return low.op("MAXIMUM", [x, below], like=True)


@emits("Elu")
def elu(low: TfliteLowering, node: Node, out: Out) -> Made:
    """max(x, 0) + alpha (exp(min(x, 0)) - 1)."""
    x, order = taken(low, node, out)
    alpha = node.attrs.get("alpha", 1.0)
    if alpha == 1.0:
        return low.op("ELU", [x]), order
    below = low.op("EXP", [low.op("MINIMUM", [x, number(low, 0.0)])])
    below = low.op("MUL", [low.op("SUB", [below, number(low, 1.0)]), number(low, alpha)])
    return low.op("ADD", [low.op("RELU", [x]), below]), order


@emits("Softplus")
def softplus(low: TfliteLowering, node: Node, out: Out) -> Made:
    """log(1 + exp(x)), as max(x, 0) + log(1 + exp(-|x|)), which does not overflow."""
    x, order = taken(low, node, out)
    small = low.op("EXP", [low.op("NEG", [low.op("ABS", [x])])])
    small = low.op("LOG", [low.op("ADD", [small, number(low, 1.0)])])
    return low.op("ADD", [low.op("RELU", [x]), small]), order


@emits("HardSigmoid")
def hard_sigmoid(low: TfliteLowering, node: Node, out: Out) -> Made:
    """alpha x + beta, limited to 0 .. 1."""
    x, order = taken(low, node, out)
    scaled = low.op("MUL", [x, number(low, node.attrs.get("alpha", 0.2))])
    value = low.op("ADD", [scaled, number(low, node.attrs.get("beta", 0.5))])
    out.low, out.high = 0.0, 1.0
    return low.clamped(value, out), order


@emits("Gelu", integer=always)
def gelu(low: TfliteLowering, node: Node, out: Out) -> Made:
    """GELU, exactly or by its tanh form."""
    x, order = taken(low, node, out)
    tanh = node.attrs.get("approximate", "none") == "tanh"
    return low.op("GELU", [x], quant=out.quant, approximate=tanh), order


@emits("Erf")
def erf(low: TfliteLowering, node: Node, out: Out) -> Made:
    """The error function to 2e-7.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
    """
    x, order = taken(low, node, out)
    size = low.op("ABS", [x])
    t = low.op("ADD", [low.op("MUL", [size, number(low, _ERF_P)]), number(low, 1.0)])
    t = low.op("DIV", [number(low, 1.0), t], t.shape)
    total = low.op("MUL", [t, number(low, _ERF[-1])])
    for factor in reversed(_ERF[:-1]):
        total = low.op("MUL", [low.op("ADD", [total, number(low, factor)]), t])
    bell = low.op("EXP", [low.op("NEG", [low.op("MUL", [x, x])])])
    upper = low.op("SUB", [number(low, 1.0), low.op("MUL", [total, bell])], x.shape)
    return low.op("MUL", [upper, low.op("SIGN", [x])]), order


def axes_of(low: TfliteLowering, node: Node) -> list[int]:
    """The axes of a reduction."""
    rank = len(low.shape(node.inputs[0]))
    if node.op.startswith("Global"):
        return list(range(2, rank))
    given = node.inputs[1] if len(node.inputs) > 1 else ""
    if given:
        axes = [int(a) % rank for a in low.graph.array(given).reshape(-1)]
        if axes or node.attrs.get("noop_with_empty_axes"):
            return sorted(axes)
    return list(range(rank))


@emits("ReduceSum", "ReduceProd", "ReduceL2")
@emits("ReduceL1", lacks=("int64",))
@emits("ReduceMean", integer=always, activation=True, lacks=("int32", "int64"))
@emits("GlobalAveragePool", integer=always, activation=True)
@emits("GlobalMaxPool", integer=always)
@emits("ReduceMax", "ReduceMin", integer=always, whole_numbers=True, lacks=("bool",))
def reduce(low: TfliteLowering, node: Node, out: Out) -> Made:
    """A sum, mean or extreme over axes."""
    x, order = taken(low, node, out)
    axes, keep = axes_of(low, node), bool(node.attrs.get("keepdims", 1))
    code = code_of(node)
    if node.op == "ReduceL2":
        x = low.op("MUL", [x, x])
    if node.op == "ReduceL1":
        x = low.op("ABS", [x])
    value = total(low, code, x, [order.index(a) for a in axes], keep, out)
    if node.op == "ReduceL2":
        value = low.op("SQRT", [value])
    return value, order if keep else after_reduction(order, axes)


def total(
    low: TfliteLowering, code: str, x: Value, places: list[int], keep: bool, out: Out | None = None
) -> Value:
    """Reduce a tensor over axes of the file."""
    shape = [1 if i in places else n for i, n in enumerate(x.shape) if keep or i not in places]
    same = code in ("REDUCE_MAX", "REDUCE_MIN")
    quant = None if out is None or same else out.quant
    axes = low.ints(places)
    return low.op(code, [x, axes], shape, quant=quant, like=same, keepDims=keep)


@emits("ArgMax", "ArgMin", fault=refusals.arg, whole_numbers=True)
def arg(low: TfliteLowering, node: Node, out: Out) -> Made:
    """Index of the largest or smallest element along an axis."""
    x, order = taken(low, node, out)
    axis = node.attrs.get("axis", 0) % len(order)
    at = order.index(axis)
    shape = [n for i, n in enumerate(x.shape) if i != at]
    kind = low.file.schema.TensorType.INT64
    value = low.op(code_of(node), [x, low.ints(np.array(at))], shape,
                   dtype="int64", outputType=kind)  # fmt: skip
    if node.attrs.get("keepdims", 1):
        return low.reshaped(value, [1 if i == at else n for i, n in enumerate(x.shape)]), order
    return value, after_reduction(order, [axis])


@emits("Softmax", integer=fixed_params)
@emits("LogSoftmax")
def softmax(low: TfliteLowering, node: Node, out: Out) -> Made:
    """Softmax or its logarithm along one axis, which is moved to the end."""
    x = node.inputs[0]
    rank = len(low.shape(x))
    order = with_last(low.home(x), node.attrs.get("axis", -1) % rank)
    value = low.get(x, order, out.rounded)
    flat = (math.prod(value.shape[:-1]), value.shape[-1]) if rank > 4 else value.shape
    value = low.reshaped(value, flat)
    settings: dict[str, Any] = {"beta": 1.0} if node.op == "Softmax" else {}
    value = low.op(code_of(node), [value], quant=out.quant, **settings)
    return low.reshaped(value, placed(low.shape(x), order)), order


@emits("LayerNormalization")
def layer_norm(low: TfliteLowering, node: Node, out: Out) -> Made:
    """(x - mean) / sqrt(variance + epsilon), scaled and shifted: in float."""
    x, order = taken(low, node, out)
    rank = len(order)
    axes = list(range(node.attrs.get("axis", -1) % rank, rank))
    lifted = low.shape(node.inputs[1])
    places = [order.index(a) for a in axes]
    away = low.op("SUB", [x, total(low, "MEAN", x, places, True)])
    variance = total(low, "MEAN", low.op("MUL", [away, away]), places, True)
    epsilon = number(low, node.attrs.get("epsilon", 1e-5))
    value = low.op("MUL", [away, low.op("RSQRT", [low.op("ADD", [variance, epsilon])])])
    for code, name in zip(("MUL", "ADD"), node.inputs[1:], strict=False):
        if name:
            array = low.graph.array(name).reshape((1,) * (rank - len(lifted)) + tuple(lifted))
            value = low.op(code, [value, low.array(array.transpose(order))])
    return value, order
