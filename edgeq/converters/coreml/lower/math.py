"""Activations, elementwise operators, comparisons and reductions of a graph in MIL.

See `coreml_lower_build.Operator`.

Source: the ONNX operators' definitions at opset 21, and coremltools' of MIL, ops/defs/iOS15
(activation, elementwise_unary, elementwise_binary, reduction) to iOS17.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edgeq.converters.coreml.lower.build import Lowering, Operator
from edgeq.converters.coreml.lower.weights import Var
from edgeq.graph.ir import Graph, Node

# --- activations ------------------------------------------------------------------------------


def _clip(b: Lowering, node: Node) -> Var:
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


def _relu(b: Lowering, node: Node) -> Var:
    x = b.take(node.inputs[0])
    if b.graph.info(node.output).dtype != "float32":  # MIL's relu takes floats alone
        return _clip_whole(b, x, 0, np.inf)
    return b.mb.relu(x=x)


def _clip_whole(b: Lowering, x: Var, least: float, most: float) -> Var:
    """Whole numbers between bounds; the greatest value wins where they cross."""
    for make, bound in ((b.mb.maximum, least), (b.mb.minimum, most)):
        if np.isfinite(bound):
            x = make(x=x, y=b.const(int(bound)))
    return x if np.isfinite(least) or np.isfinite(most) else b.mb.identity(x=x)


def _constant_bounds(graph: Graph, node: Node) -> str:
    computed = [n for n in node.inputs[1:] if n and n not in graph.constants]
    return f"{computed[0]!r} is computed; nearest: constant bounds" if computed else ""


def _prelu(b: Lowering, node: Node) -> Var:
    x, slope = b.take(node.inputs[0]), b.take(node.inputs[1])
    shape = b.info_shape(node.inputs[1])
    channels = x.shape[1] if x.rank == 4 else 0
    held = b.graph.constants.get(node.inputs[1])
    if isinstance(held, np.ndarray) and shape in ((channels, 1, 1), (1, channels, 1, 1)):
        return b.mb.prelu(x=x, alpha=b.const(b.numbers(node.inputs[1]).reshape(-1)))
    below = b.mb.mul(x=b.mb.minimum(x=x, y=b.const(0.0)), y=slope)
    return b.mb.add(x=b.mb.relu(x=x), y=below)


def _hard_sigmoid(b: Lowering, x: Var, alpha: float, beta: float) -> Var:
    return b.mb.sigmoid_hard(x=x, alpha=b.const(alpha), beta=b.const(beta))


def _hard_swish(b: Lowering, node: Node) -> Var:
    x = b.take(node.inputs[0])
    return b.mb.mul(x=x, y=_hard_sigmoid(b, x, 1 / 6, 0.5))


def _gelu(b: Lowering, node: Node) -> Var:
    near = node.attrs.get("approximate", "none") == "tanh"
    return b.mb.gelu(x=b.take(node.inputs[0]), mode="TANH_APPROXIMATION" if near else "EXACT")


def _log_softmax(b: Lowering, node: Node) -> Var:
    x, axis = b.take(node.inputs[0]), node.attrs.get("axis", -1)
    return b.mb.sub(x=x, y=b.mb.reduce_log_sum_exp(x=x, axes=[axis], keep_dims=True))


def _with(name: str, **defaults: float) -> Operator:
    """An activation of x with numbers of ONNX's names, which are MIL's."""

    def build(b: Lowering, node: Node) -> Var:
        given = {k: b.const(float(node.attrs.get(k, v))) for k, v in defaults.items()}
        return getattr(b.mb, name)(x=b.take(node.inputs[0]), **given)

    return Operator(build)


# --- elementwise ------------------------------------------------------------------------------


def _unary(name: str, **given: Any) -> Operator:
    return Operator(lambda b, node: getattr(b.mb, name)(x=b.take(node.inputs[0]), **given))


def _binary(name: str, refuse: Callable[[Graph, Node], str] | None = None) -> Operator:
    """Of two inputs, or of more from the left to the right."""

    def build(b: Lowering, node: Node) -> Var:
        result, *rest = (b.take(n) for n in node.inputs)
        for other in rest:
            result = getattr(b.mb, name)(x=result, y=other)
        return b.mb.identity(x=result) if not rest else result

    return Operator(build, refuse) if refuse else Operator(build)


def _compared(name: str) -> Operator:
    """A comparison; MIL compares numbers, so flags are made some."""

    def build(b: Lowering, node: Node) -> Var:
        pair = [b.take(n) for n in node.inputs]
        x, y = (b.cast(v, "int32") if v.dtype == b.types.bool else v for v in pair)
        return getattr(b.mb, name)(x=x, y=y)

    return Operator(build)


def _pow(b: Lowering, node: Node) -> Var:
    x = b.take(node.inputs[0])
    power = b.numbers(node.inputs[1]) if node.inputs[1] in b.graph.constants else np.array([0, 0])
    if power.size == 1 and b.info_shape(node.output) == b.info_shape(node.inputs[0]):
        if power.item() == 2:  # whatever the sign of x
            return b.mb.mul(x=x, y=x)
        if power.item() == 0.5:
            return b.mb.sqrt(x=x)
    return b.mb.pow(x=x, y=b.take(node.inputs[1]))


def _no_integers(graph: Graph, node: Node) -> str:
    if graph.info(node.inputs[0]).dtype != "float32":
        return f"{graph.info(node.inputs[0]).dtype} values; nearest: Cast to float32 before"
    return ""


def _refuse_mod(graph: Graph, node: Node) -> str:
    return "fmod; nearest: Mod of fmod 0" if node.attrs.get("fmod", 0) else ""


def _where(b: Lowering, node: Node) -> Var:
    flag, x, y = (b.take(n) for n in node.inputs)
    return b.mb.select(cond=flag, a=x, b=y)


def _cast(b: Lowering, node: Node) -> Var:
    x = b.take(node.inputs[0])
    kind = {"float32": b.kind, "bool": "bool"}.get(b.graph.info(node.output).dtype, "int32")
    return b.mb.cast(x=x, dtype=kind)


# --- reductions -------------------------------------------------------------------------------


def _axes(graph: Graph, node: Node) -> list[int] | None:
    """Axes that are reduced; None for no reduction at all."""
    rank = len(graph.info(node.inputs[0]).shape)
    given: Sequence[int] = node.attrs.get("axes", [])
    if len(node.inputs) > 1 and node.inputs[1]:
        given = [int(v) for v in graph.array(node.inputs[1]).reshape(-1)]
    if len(given):
        return sorted(a % rank for a in given)
    return None if node.attrs.get("noop_with_empty_axes", 0) else list(range(rank))


def _reduced(name: str) -> Operator:
    def build(b: Lowering, node: Node) -> Var:
        x, axes = b.take(node.inputs[0]), _axes(b.graph, node)
        if not axes:
            return b.mb.identity(x=x)
        return getattr(b.mb, name)(x=x, axes=axes, keep_dims=bool(node.attrs.get("keepdims", 1)))

    def refuse(graph: Graph, node: Node) -> str:
        if len(node.inputs) > 1 and node.inputs[1] and node.inputs[1] not in graph.constants:
            return f"the axes {node.inputs[1]!r} are computed; nearest: constant axes"
        return _no_integers(graph, node)

    return Operator(build, refuse)


def _arg(name: str) -> Operator:
    def build(b: Lowering, node: Node) -> Var:
        return getattr(b.mb, name)(
            x=b.take(node.inputs[0]),
            axis=node.attrs.get("axis", 0),
            keep_dims=bool(node.attrs.get("keepdims", 1)),
        )

    def refuse(graph: Graph, node: Node) -> str:
        last = node.attrs.get("select_last_index", 0)
        return "select_last_index; nearest: the first of equal ones" if last else ""

    return Operator(build, refuse)


OPS: dict[str, Operator] = {
    "MatMul": _binary("matmul"),
    "Clip": Operator(_clip, _constant_bounds),
    "Elu": _with("elu", alpha=1.0),
    "Gelu": Operator(_gelu),
    "HardSigmoid": Operator(
        lambda b, node: _hard_sigmoid(
            b, b.take(node.inputs[0]), node.attrs.get("alpha", 0.2), node.attrs.get("beta", 0.5)
        )
    ),
    "HardSwish": Operator(_hard_swish),
    "LeakyRelu": _with("leaky_relu", alpha=0.01),
    "LogSoftmax": Operator(_log_softmax),
    "PRelu": Operator(_prelu),
    "Relu": Operator(_relu),
    "Sigmoid": _unary("sigmoid"),
    "Softmax": Operator(
        lambda b, node: b.mb.softmax(x=b.take(node.inputs[0]), axis=node.attrs.get("axis", -1))
    ),
    "Softplus": _unary("softplus"),
    "Softsign": _unary("softsign"),
    "Tanh": _unary("tanh"),
    "Abs": _unary("abs"),
    "Ceil": _unary("ceil"),
    "Cos": _unary("cos"),
    "Erf": _unary("erf"),
    "Exp": _unary("exp"),
    "Floor": _unary("floor"),
    "Identity": _unary("identity"),
    "Log": _unary("log"),
    "Neg": Operator(
        lambda b, node: b.mb.mul(
            x=b.take(node.inputs[0]),
            y=b.const(-1.0 if b.graph.info(node.output).dtype == "float32" else -1),
        )
    ),
    "Not": _unary("logical_not"),
    "Reciprocal": Operator(lambda b, node: b.mb.real_div(x=b.const(1.0), y=b.take(node.inputs[0]))),
    "Round": _unary("round"),
    "Sign": _unary("sign"),
    "Sin": _unary("sin"),
    "Sqrt": _unary("sqrt"),
    "Add": _binary("add"),
    "Sum": _binary("add"),
    "Sub": _binary("sub"),
    "Mul": _binary("mul"),
    "Div": _binary("real_div", _no_integers),
    "Max": _binary("maximum"),
    "Min": _binary("minimum"),
    "Mod": _binary("mod", _refuse_mod),
    "Pow": Operator(_pow, _no_integers),
    "And": _binary("logical_and"),
    "Or": _binary("logical_or"),
    "Xor": _binary("logical_xor"),
    "Equal": _compared("equal"),
    "Greater": _compared("greater"),
    "GreaterOrEqual": _compared("greater_equal"),
    "Less": _compared("less"),
    "LessOrEqual": _compared("less_equal"),
    "Where": Operator(_where),
    "Cast": Operator(_cast),
    "ReduceL1": _reduced("reduce_l1_norm"),
    "ReduceL2": _reduced("reduce_l2_norm"),
    "ReduceLogSum": _reduced("reduce_log_sum"),
    "ReduceLogSumExp": _reduced("reduce_log_sum_exp"),
    "ReduceMax": _reduced("reduce_max"),
    "ReduceMean": _reduced("reduce_mean"),
    "ReduceMin": _reduced("reduce_min"),
    "ReduceProd": _reduced("reduce_prod"),
    "ReduceSum": _reduced("reduce_sum"),
    "ReduceSumSquare": _reduced("reduce_sum_square"),
    "ArgMax": _arg("reduce_argmax"),
    "ArgMin": _arg("reduce_argmin"),
}
"""The operators of this module by ONNX's names."""
