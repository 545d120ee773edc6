"""Rare operators in terms of common ones, so that each target has fewer to write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from edgeq.graphs.ir import Graph, Info, Node
from edgeq.graphs.passes.explicit import single
from edgeq.graphs.rewrite import Change, Steps, rewrite, scalar
from edgeq.graphs.upgrade import flat_softmax


def simplify(graph: Graph) -> Graph:
    """The graph with rare operators taken apart."""
    return rewrite(graph, lambda g, n: flat_softmax(g, n) or _apart(g, n))


def _apart(graph: Graph, node: Node) -> Change | None:
    if node.attrs.get("noop_with_empty_axes") and len(node.inputs) == 1:
        return Change(nodes=(Node("Identity", node.name, node.inputs, node.outputs),))
    rule = _RULES.get(node.op)
    return rule(graph, node) if rule else None


def _many(graph: Graph, node: Node) -> Change | None:
    """Sum, Mean, Max and Min of many as pairs."""
    op = {"Sum": "Add", "Mean": "Add"}.get(node.op, node.op)
    count = len(node.inputs)
    if count == 1 or (op == node.op and count == 2):
        return None
    steps, made = Steps(graph, node), node.inputs[0]
    dtype = graph.info(node.output).dtype
    for place, other in enumerate(node.inputs[1:], 1):
        if place == count - 1 and node.op != "Mean":
            return steps.last(op, (made, other))
        shapes = [graph.info(name).shape for name in node.inputs[: place + 1]]
        info = Info(np.broadcast_shapes(*shapes), dtype)
        made = steps.add(op, f"upto{place}", (made, other), info)
    share = steps.constant("share", np.array(1 / count, np.float32))
    return steps.last("Mul", (made, share))


def _reciprocal(graph: Graph, node: Node) -> Change:
    steps = Steps(graph, node)
    return steps.last("Div", (steps.constant("one", np.array(1, np.float32)), node.inputs[0]))


def _sum_square(graph: Graph, node: Node) -> Change:
    steps, x = Steps(graph, node), node.inputs[0]
    square = steps.add("Mul", "square", (x, x), graph.info(x))
    return steps.last("ReduceSum", (square, *node.inputs[1:]), **node.attrs)


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


def _instance_norm(graph: Graph, node: Node) -> Change | None:
    """InstanceNormalization as LayerNormalization over all positions of a channel."""
    x, scale, bias = node.inputs
    if scale not in graph.constants or bias not in graph.constants:
        return None
    info, steps = graph.info(x), Steps(graph, node)
    n, c = info.shape[:2]
    area = int(np.prod(info.shape[2:], dtype=np.int64))
    flat = replace(info, shape=(n, c, area))
    to = steps.constant("flat", np.array(flat.shape, np.int64))
    back = steps.constant("shape", np.array(info.shape, np.int64))
    ones = steps.constant("ones", np.ones(area, np.float32))
    wide = (c, *[1] * (len(info.shape) - 2))
    made = steps.add("Reshape", "flattened", (x, to), flat)
    made = steps.add(
        "LayerNormalization", "normed", (made, ones), flat,
        axis=2, epsilon=node.attrs.get("epsilon", single(1e-5)),
    )  # fmt: skip
    made = steps.add("Reshape", "image", (made, back), info)
    made = steps.add(
        "Mul", "scaled",
        (made, steps.constant("scale", graph.array(scale).reshape(wide))), info,
    )  # fmt: skip
    return steps.last("Add", (made, steps.constant("bias", graph.array(bias).reshape(wide))))


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
