"""Emitters of activations, elementwise operators, comparisons and reductions.

See `edgeq.converters.coreml.lower.emitters`.

Source: the ONNX operators' definitions at opset 21, and coremltools' of MIL, ops/defs/iOS15
(activation, elementwise_unary, elementwise_binary, reduction) to iOS17.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgeq.converters.coreml.lower.build import CoremlLowering
from edgeq.converters.coreml.lower.emitters import emits, mil_name, not_float
from edgeq.converters.coreml.lower.weights import Var
from edgeq.graph.ir import Graph, Node
from edgeq.graph.operators import OPERATORS

# --- activations ------------------------------------------------------------------------------


def _constant_bounds(graph: Graph, node: Node) -> str:
    computed = [n for n in node.inputs[1:] if n and n not in graph.constants]
    return f"{computed[0]!r} is computed; nearest: constant bounds" if computed else ""


@emits("Clip", refuse=_constant_bounds)
def _clip(b: CoremlLowering, node: Node) -> Var:
    x = b.take(node.inputs[0])
    least, most = (
        float(b.numbers(name).reshape(())) if name else bound
        for name, bound in zip((*node.inputs[1:3], "", "")[:2], (-np.inf, np.inf), strict=True)
    )
    if b.graph.info(node.output).dtype != "float32":  # MIL's clip takes floats alone
        return _clip_whole(b, x, least, most)
    top = float(np.finfo(np.float16 if b.kind == "fp16" else np.float32).max)
    low, high = least > -top, most < top
    if low and high and least < most:
        if (least, most) == (0, 6):
            return b.mb.relu6(x=x)
        return b.mb.clip(x=x, alpha=b.const(least), beta=b.const(most))
    if low and least == 0 and not high:
        return b.mb.relu(x=x)
    if low:
        x = b.mb.maximum(x=x, y=b.const(least))
    return b.mb.minimum(x=x, y=b.const(most)) if high else b.mb.identity(x=x)


@emits("Relu")
def _relu(b: CoremlLowering, node: Node) -> Var:
    x = b.take(node.inputs[0])
    if b.graph.info(node.output).dtype != "float32":  # MIL's relu takes floats alone
        return _clip_whole(b, x, 0, np.inf)
    return b.mb.relu(x=x)


def _clip_whole(b: CoremlLowering, x: Var, least: float, most: float) -> Var:
    """Clip integers; where the bounds cross, the upper one wins."""
    for make, bound in ((b.mb.maximum, least), (b.mb.minimum, most)):
        if np.isfinite(bound):
            x = make(x=x, y=b.const(int(bound)))
    return x if np.isfinite(least) or np.isfinite(most) else b.mb.identity(x=x)


@emits("PRelu")
def _prelu(b: CoremlLowering, node: Node) -> Var:
    x, slope = b.take(node.inputs[0]), b.take(node.inputs[1])
    shape = b.info_shape(node.inputs[1])
    channels = x.shape[1] if x.rank == 4 else 0
    constant = b.graph.constants.get(node.inputs[1])
    if isinstance(constant, np.ndarray) and shape in ((channels, 1, 1), (1, channels, 1, 1)):
        return b.mb.prelu(x=x, alpha=b.const(b.numbers(node.inputs[1]).reshape(-1)))
    below = b.mb.mul(x=b.mb.minimum(x=x, y=b.const(0.0)), y=slope)
    return b.mb.add(x=b.mb.relu(x=x), y=below)


def _sigmoid_hard(b: CoremlLowering, x: Var, alpha: float, beta: float) -> Var:
    return b.mb.sigmoid_hard(x=x, alpha=b.const(alpha), beta=b.const(beta))


@emits("HardSwish")
def _hard_swish(b: CoremlLowering, node: Node) -> Var:
    x = b.take(node.inputs[0])
    return b.mb.mul(x=x, y=_sigmoid_hard(b, x, 1 / 6, 0.5))


@emits("Gelu")
def _gelu(b: CoremlLowering, node: Node) -> Var:
    near = node.attrs.get("approximate", "none") == "tanh"
    return b.mb.gelu(x=b.take(node.inputs[0]), mode="TANH_APPROXIMATION" if near else "EXACT")


@emits("LogSoftmax")
def _log_softmax(b: CoremlLowering, node: Node) -> Var:
    x, axis = b.take(node.inputs[0]), node.attrs.get("axis", -1)
    return b.mb.sub(x=x, y=b.mb.reduce_log_sum_exp(x=x, axes=[axis], keep_dims=True))


@emits("Elu", "LeakyRelu")
def _sloped(b: CoremlLowering, node: Node) -> Var:
    """An activation whose attributes have the same names in ONNX and MIL."""
    defaults = OPERATORS[node.op].defaults
    given = {k: b.const(float(node.attrs.get(k, v))) for k, v in defaults.items()}
    return getattr(b.mb, mil_name(node))(x=b.take(node.inputs[0]), **given)


@emits("HardSigmoid")
def _hard_sigmoid(b: CoremlLowering, node: Node) -> Var:
    """alpha x + beta, limited to 0 .. 1."""
    alpha, beta = node.attrs.get("alpha", 0.2), node.attrs.get("beta", 0.5)
    return _sigmoid_hard(b, b.take(node.inputs[0]), alpha, beta)


@emits("Softmax")
def _softmax(b: CoremlLowering, node: Node) -> Var:
    """Softmax along one axis."""
    return b.mb.softmax(x=b.take(node.inputs[0]), axis=node.attrs.get("axis", -1))


# --- elementwise ------------------------------------------------------------------------------


@emits(
    "Abs", "Ceil", "Cos", "Erf", "Exp", "Floor", "Identity", "Log", "Not", "Round", "Sigmoid",
    "Sign", "Sin", "Softplus", "Sqrt", "Tanh",
)  # fmt: skip
def _unary(b: CoremlLowering, node: Node) -> Var:
    """An operator of one input, element by element."""
    return getattr(b.mb, mil_name(node))(x=b.take(node.inputs[0]))


@emits("Neg")
def _neg(b: CoremlLowering, node: Node) -> Var:
    """Multiplication by -1, as MIL has no negation."""
    minus = -1.0 if b.graph.info(node.output).dtype == "float32" else -1
    return b.mb.mul(x=b.take(node.inputs[0]), y=b.const(minus))


def _refuse_mod(graph: Graph, node: Node) -> str:
    return "fmod; nearest: Mod of fmod 0" if node.attrs.get("fmod", 0) else ""


@emits("Add", "Sub", "Mul", "Max", "Min", "And", "Or", "MatMul")
@emits("Div", refuse=not_float)
@emits("Mod", refuse=_refuse_mod)
def _binary(b: CoremlLowering, node: Node) -> Var:
    """An operator of two inputs."""
    x, y = (b.take(name) for name in node.inputs)
    return getattr(b.mb, mil_name(node))(x=x, y=y)


@emits("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
def _compared(b: CoremlLowering, node: Node) -> Var:
    """A comparison; MIL compares numbers only, so truth values are cast."""
    pair = [b.take(n) for n in node.inputs]
    x, y = (b.cast(v, "int32") if v.dtype == b.types.bool else v for v in pair)
    return getattr(b.mb, mil_name(node))(x=x, y=y)


@emits("Pow", refuse=not_float)
def _pow(b: CoremlLowering, node: Node) -> Var:
    x = b.take(node.inputs[0])
    power = b.numbers(node.inputs[1]) if node.inputs[1] in b.graph.constants else np.array([0, 0])
    if power.size == 1 and b.info_shape(node.output) == b.info_shape(node.inputs[0]):
        if power.item() == 2:  # whatever the sign of x
            return b.mb.mul(x=x, y=x)
        if power.item() == 0.5:
            return b.mb.sqrt(x=x)
    return b.mb.pow(x=x, y=b.take(node.inputs[1]))


@emits("Where")
def _where(b: CoremlLowering, node: Node) -> Var:
    flag, x, y = (b.take(n) for n in node.inputs)
    return b.mb.select(cond=flag, a=x, b=y)


@emits("Cast")
def _cast(b: CoremlLowering, node: Node) -> Var:
    x = b.take(node.inputs[0])
    kind = {"float32": b.kind, "bool": "bool"}.get(b.graph.info(node.output).dtype, "int32")
    return b.mb.cast(x=x, dtype=kind)


# --- reductions -------------------------------------------------------------------------------


def _axes(graph: Graph, node: Node) -> list[int] | None:
    """Axes of a reduction; None if it reduces none."""
    rank = len(graph.info(node.inputs[0]).shape)
    given: Sequence[int] = node.attrs.get("axes", [])
    if len(node.inputs) > 1 and node.inputs[1]:
        given = [int(v) for v in graph.array(node.inputs[1]).reshape(-1)]
    if len(given):
        return sorted(a % rank for a in given)
    return None if node.attrs.get("noop_with_empty_axes", 0) else list(range(rank))


def _refuse_reduction(graph: Graph, node: Node) -> str:
    if len(node.inputs) > 1 and node.inputs[1] and node.inputs[1] not in graph.constants:
        return f"the axes {node.inputs[1]!r} are computed; nearest: constant axes"
    return not_float(graph, node)


@emits(
    "ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum",
    refuse=_refuse_reduction,
)  # fmt: skip
def _reduced(b: CoremlLowering, node: Node) -> Var:
    """A sum, mean or extreme over axes."""
    x, axes = b.take(node.inputs[0]), _axes(b.graph, node)
    if not axes:
        return b.mb.identity(x=x)
    keep = bool(node.attrs.get("keepdims", 1))
    return getattr(b.mb, mil_name(node))(x=x, axes=axes, keep_dims=keep)


def _refuse_last(graph: Graph, node: Node) -> str:
    last = node.attrs.get("select_last_index", 0)
    return "select_last_index; nearest: the first of equal ones" if last else ""


@emits("ArgMax", "ArgMin", refuse=_refuse_last)
def _arg(b: CoremlLowering, node: Node) -> Var:
    """Index of the largest or smallest element along an axis."""
    return getattr(b.mb, mil_name(node))(
        x=b.take(node.inputs[0]),
        axis=node.attrs.get("axis", 0),
        keep_dims=bool(node.attrs.get("keepdims", 1)),
    )
