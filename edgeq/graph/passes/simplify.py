"""Rewrite rare operators with common ones, so that each target has fewer to support."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from edgeq.graph.ir import Graph, Info, Node
from edgeq.graph.onnx.upgrade import flat_softmax
from edgeq.graph.operators import single
from edgeq.graph.rewrite import Change, Steps, ints, rewrite, scalar


def simplify(graph: Graph) -> Graph:
    """Rewrite rare operators with common ones."""
    return rewrite(graph, lambda g, n: flat_softmax(g, n) or _apart(g, n))


def _apart(graph: Graph, node: Node) -> Change | None:
    rule = _RULES.get(node.op)
    return rule(graph, node) if rule else None


def _many(graph: Graph, node: Node) -> Change | None:
    """Sum, Mean, Max and Min of many inputs as operators of two."""
    op = {"Sum": "Add", "Mean": "Add"}.get(node.op, node.op)
    count = len(node.inputs)
    if count == 1 or (op == node.op and count == 2):
        return None
    steps, joined = Steps(graph, node), node.inputs[0]
    dtype = graph.info(node.output).dtype
    for place, other in enumerate(node.inputs[1:], 1):
        if place == count - 1 and node.op != "Mean":
            return steps.last(op, (joined, other))
        shapes = [graph.info(name).shape for name in node.inputs[: place + 1]]
        info = Info(np.broadcast_shapes(*shapes), dtype)
        joined = steps.add(op, f"upto{place}", (joined, other), info)
    share = steps.constant("share", np.array(1 / count, np.float32))
    return steps.last("Mul", (joined, share))


def _reciprocal(graph: Graph, node: Node) -> Change:
    steps = Steps(graph, node)
    return steps.last("Div", (steps.constant("one", np.array(1, np.float32)), node.inputs[0]))


def _sum_square(graph: Graph, node: Node) -> Change:
    steps, x = Steps(graph, node), node.inputs[0]
    square = steps.add("Mul", "square", (x, x), graph.info(x))
    return steps.last("ReduceSum", (square, *node.inputs[1:]), **node.attrs)


def _log_sum(graph: Graph, node: Node) -> Change:
    steps = Steps(graph, node)
    total = steps.add("ReduceSum", "sum", node.inputs, graph.info(node.output), **node.attrs)
    return steps.last("Log", (total,))


def _log_sum_exp(graph: Graph, node: Node) -> Change | None:
    """Subtracts the largest element before the exponentials, so that they do not overflow."""
    axes = _axes(graph, node)
    if axes is None:
        return None
    steps, x, info = Steps(graph, node), node.inputs[0], graph.info(node.inputs[0])
    along = steps.constant("axes", np.array(axes, np.int64))
    one = tuple(1 if place in axes else n for place, n in enumerate(info.shape))
    most = steps.add("ReduceMax", "most", (x, along), replace(info, shape=one), keepdims=1)
    less = steps.add("Exp", "exp", (steps.add("Sub", "less", (x, most), info),), info)
    out, keep = graph.info(node.output), node.attrs.get("keepdims", 1)
    total = steps.add("ReduceSum", "sum", (less, along), out, keepdims=keep)
    if not keep:
        most = steps.add("ReduceMax", "added", (x, along), out, keepdims=0)
    return steps.last("Add", (steps.add("Log", "log", (total,), out), most))


def _axes(graph: Graph, node: Node) -> tuple[int, ...] | None:
    """Axes of a reduction counted from 0; None if they are computed."""
    rank = len(graph.info(node.inputs[0]).shape)
    name = node.inputs[1] if len(node.inputs) > 1 else ""
    axes = ints(graph, name) if name else ()
    return None if axes is None else tuple(sorted(a % rank for a in axes or range(rank)))


def _clip(graph: Graph, node: Node) -> Change | None:
    """Clip with a computed bound as Max, then Min: where they cross, the upper bound wins."""
    bounds = [*node.inputs[1:3], "", ""][:2]
    if not any(name and name not in graph.constants for name in bounds):
        return None
    steps, value = Steps(graph, node), node.inputs[0]
    least, most = bounds
    if not most:
        return steps.last("Max", (value, least))
    if least:
        value = steps.add("Max", "raised", (value, least), graph.info(node.output))
    return steps.last("Min", (value, most))


def _vectors(graph: Graph, node: Node) -> Change | None:
    """MatMul of a vector as MatMul of a matrix with one row or column."""
    ranks = [len(graph.info(name).shape) for name in node.inputs]
    if 1 not in ranks:
        return None
    steps, out, factors = Steps(graph, node), graph.info(node.output), []
    wide = list(out.shape)
    for place, (name, what) in enumerate(zip(node.inputs, ("row", "column"), strict=True)):
        info = graph.info(name)
        if len(info.shape) == 1:
            shape = (1, *info.shape) if place == 0 else (*info.shape, 1)
            wide.insert(len(wide) - (ranks[1] > 1) if place == 0 else len(wide), 1)
            if name in graph.constants:
                name = steps.constant(what, graph.array(name).reshape(shape))
            else:
                to = steps.constant(f"{what}_shape", np.array(shape, np.int64))
                name = steps.add("Reshape", what, (name, to), replace(info, shape=shape))
        factors.append(name)
    product = steps.add(
        "MatMul", "matrix", (factors[0], factors[1]), replace(out, shape=tuple(wide)),
        name=node.name,
    )  # fmt: skip
    back = steps.constant("shape", np.array(out.shape, np.int64))
    return steps.last("Reshape", (product, back), f"{node.name}.vector")


def _selu(graph: Graph, node: Node) -> Change:
    steps, x = Steps(graph, node), node.inputs[0]
    alpha = float(node.attrs.get("alpha", single(1.67326319217681884765625)))
    gamma = float(node.attrs.get("gamma", single(1.05070102214813232421875)))
    elu = steps.add("Elu", "elu", (x,), graph.info(x), alpha=alpha)
    return steps.last("Mul", (elu, steps.number("gamma", gamma)))


def _celu(graph: Graph, node: Node) -> Change | None:
    """max(x, 0) + min(alpha (exp(x / alpha) - 1), 0), which is alpha times Elu of x / alpha."""
    if node.attrs.get("alpha", 1) <= 0:
        return None
    steps, x, info = Steps(graph, node), node.inputs[0], graph.info(node.inputs[0])
    alpha = steps.number("alpha", float(node.attrs.get("alpha", 1)))
    elu = steps.add("Elu", "elu", (steps.add("Div", "scaled", (x, alpha), info),), info, alpha=1.0)
    return steps.last("Mul", (elu, alpha))


def _thresholded_relu(graph: Graph, node: Node) -> Change:
    steps, x = Steps(graph, node), node.inputs[0]
    alpha = steps.number("alpha", float(node.attrs.get("alpha", 1)))
    above = steps.add("Greater", "above", (x, alpha), replace(graph.info(x), dtype="bool"))
    return steps.last("Where", (above, x, steps.number("zero", 0)))


def _shrink(graph: Graph, node: Node) -> Change:
    steps, x, info = Steps(graph, node), node.inputs[0], graph.info(node.inputs[0])
    flags, bound = replace(info, dtype="bool"), float(node.attrs.get("lambd", 0.5))
    bias = steps.number("bias", float(node.attrs.get("bias", 0)))
    below = steps.add("Less", "below", (x, steps.number("least", -bound)), flags)
    above = steps.add("Greater", "above", (x, steps.number("most", bound)), flags)
    less, more = (steps.add(op, op.lower(), (x, bias), info) for op in ("Sub", "Add"))
    inner = steps.add("Where", "inner", (above, less, steps.number("zero", 0)), info)
    return steps.last("Where", (below, more, inner))


def _xor(graph: Graph, node: Node) -> Change:
    steps = Steps(graph, node)
    same = steps.add("Equal", "same", node.inputs, graph.info(node.output))
    return steps.last("Not", (same,))


def _pow(graph: Graph, node: Node) -> Change | None:
    """Make the integer exponent of a float power a float, which all targets support."""
    base, exponent = (graph.info(name) for name in node.inputs)
    if base.dtype != "float32" or exponent.dtype == "float32":
        return None
    steps = Steps(graph, node)
    if node.inputs[1] in graph.constants:
        power = steps.constant("power", graph.array(node.inputs[1]).astype(np.float32))
    else:
        power = steps.add("Cast", "power", node.inputs[1:], Info(exponent.shape), to=1)
    return steps.last("Pow", (node.inputs[0], power))


def _float_mod(graph: Graph, node: Node) -> Change | None:
    """Mod of floats whose result has the divisor's sign, which ONNX defines since opset 28."""
    info = graph.info(node.output)
    if node.attrs.get("fmod") or info.dtype != "float32":
        return None
    steps, (x, y) = Steps(graph, node), node.inputs
    whole = steps.add("Floor", "whole", (steps.add("Div", "ratio", (x, y), info),), info)
    return steps.last("Sub", (x, steps.add("Mul", "part", (whole, y), info)))


def _computed_affine(graph: Graph, node: Node) -> Change | None:
    """LayerNormalization with a computed scale or bias as a norm, a product and a sum."""
    names = [name for name in node.inputs[1:3] if name]
    if any(node.outputs[1:]) or all(name in graph.constants for name in names):
        return None
    steps, x, info = Steps(graph, node), node.inputs[0], graph.info(node.inputs[0])
    axis = int(node.attrs.get("axis", -1)) % len(info.shape)
    ones = steps.constant("ones", np.ones(info.shape[axis:], np.float32))
    normed = steps.add("LayerNormalization", "normed", (x, ones), info, **node.attrs)
    if len(names) == 1:
        return steps.last("Mul", (normed, names[0]))
    return steps.last("Add", (steps.add("Mul", "scaled", (normed, names[0]), info), names[1]))


def _prelu(graph: Graph, node: Node) -> Change | None:
    """PRelu with a computed slope as max(x, 0) + slope min(x, 0)."""
    (x, slope), info = node.inputs, graph.info(node.inputs[0])
    if slope in graph.constants:
        return None
    steps = Steps(graph, node)
    above, zero = steps.add("Relu", "above", (x,), info), steps.number("zero", 0)
    below = steps.add("Mul", "scaled", (steps.add("Min", "below", (x, zero), info), slope), info)
    return steps.last("Add", (above, below))


def _cast_like(graph: Graph, node: Node) -> Change:
    to = TENSOR_TYPES[graph.info(node.inputs[1]).dtype]
    return Steps(graph, node).last("Cast", node.inputs[:1], to=to)


def _softsign(graph: Graph, node: Node) -> Change:
    steps, x = Steps(graph, node), node.inputs[0]
    size = steps.add("Abs", "abs", (x,), graph.info(x))
    one = steps.constant("one", np.array(1, np.float32))
    return steps.last("Div", (x, steps.add("Add", "above", (size, one), graph.info(x))))


def _mish(graph: Graph, node: Node) -> Change:
    steps, x = Steps(graph, node), node.inputs[0]
    soft = steps.add("Softplus", "softplus", (x,), graph.info(x))
    return steps.last("Mul", (x, steps.add("Tanh", "tanh", (soft,), graph.info(x))))


def _lp_norm(graph: Graph, node: Node) -> Change | None:
    norm = {1: "ReduceL1", 2: "ReduceL2"}.get(node.attrs.get("p", 2))
    if norm is None:
        return None
    steps, x = Steps(graph, node), node.inputs[0]
    info = graph.info(x)
    axis = node.attrs.get("axis", -1) % len(info.shape)
    one = tuple(1 if place == axis else n for place, n in enumerate(info.shape))
    axes = steps.constant("axes", np.array([axis], np.int64))
    length = steps.add(norm, "length", (x, axes), replace(info, shape=one), keepdims=1)
    # nothing of length 0 is divided, as by the operator itself
    least = steps.constant("least", np.array(1e-12, np.float32))
    positive = steps.add("Clip", "positive", (length, least), replace(info, shape=one))
    return steps.last("Div", (x, positive))


def _instance_norm(graph: Graph, node: Node) -> Change:
    """InstanceNormalization as LayerNormalization over all positions of a channel."""
    info, steps = graph.info(node.inputs[0]), Steps(graph, node)
    n, c = info.shape[:2]
    area = int(np.prod(info.shape[2:], dtype=np.int64))
    flat = replace(info, shape=(n, c, area))
    to = steps.constant("flat", np.array(flat.shape, np.int64))
    back = steps.constant("shape", np.array(info.shape, np.int64))
    ones = steps.constant("ones", np.ones(area, np.float32))
    flattened = steps.add("Reshape", "flattened", (node.inputs[0], to), flat)
    flattened = steps.add(
        "LayerNormalization", "normed", (flattened, ones), flat,
        axis=2, epsilon=node.attrs.get("epsilon", single(1e-5)),
    )  # fmt: skip
    flattened = steps.add("Reshape", "image", (flattened, back), info)
    wide = (c, *[1] * (len(info.shape) - 2))
    factors = []
    for name, what in zip(node.inputs[1:], ("scale", "bias"), strict=True):
        if name in graph.constants:
            factors.append(steps.constant(what, graph.array(name).reshape(wide)))
        else:
            to = steps.constant(f"{what}_shape", np.array(wide, np.int64))
            factors.append(steps.add("Reshape", what, (name, to), Info(wide)))
    flattened = steps.add("Mul", "scaled", (flattened, factors[0]), info)
    return steps.last("Add", (flattened, factors[1]))


def _extremum(graph: Graph, node: Node) -> Change | None:
    """Max or Min with a constant of one element as Relu or Clip."""
    if len(node.inputs) > 2:
        return _many(graph, node)
    for x, other in (node.inputs, node.inputs[::-1]) if len(node.inputs) == 2 else ():
        bound = scalar(graph, other)
        info = graph.info(node.output)
        if bound is None or info.dtype != "float32" or graph.info(x).shape != info.shape:
            continue
        if x in graph.constants:
            continue
        steps = Steps(graph, node)
        limit = steps.constant("bound", np.array(bound, np.float32))
        return steps.last("Clip", (x, limit) if node.op == "Max" else (x, "", limit))
    return None


TENSOR_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9}
"""NumPy's name -> ONNX's number of a type. Source: onnx.proto, TensorProto.DataType."""

_RULES: dict[str, Callable[[Graph, Node], Change | None]] = {
    "Clip": _clip,
    "MatMul": _vectors,
    "Selu": _selu,
    "Celu": _celu,
    "ThresholdedRelu": _thresholded_relu,
    "Shrink": _shrink,
    "Xor": _xor,
    "Mod": _float_mod,
    "Pow": _pow,
    "LayerNormalization": _computed_affine,
    "PRelu": _prelu,
    "ReduceLogSum": _log_sum,
    "ReduceLogSumExp": _log_sum_exp,
    "Sum": _many,
    "Mean": _many,
    "Max": _extremum,
    "Min": _extremum,
    "Reciprocal": _reciprocal,
    "CastLike": _cast_like,
    "ReduceSumSquare": _sum_square,
    "Softsign": _softsign,
    "Mish": _mish,
    "LpNormalization": _lp_norm,
    "InstanceNormalization": _instance_norm,
}
