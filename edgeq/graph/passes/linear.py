"""Replace Gemm, and MatMul with a constant, by Linear."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgeq.graph.ir import Constant, Graph, Node, QuantWeight
from edgeq.graph.rewrite import Change, Steps, floats, prune, rewrite, unique


def linear(graph: Graph) -> Graph:
    """Replace every product with a constant matrix by Linear."""
    return _products(rewrite(rewrite(graph, _gemm), _narrow))


def _gemm(graph: Graph, node: Node) -> Change | None:
    """A rule: splits Gemm into its parts, which later passes fold."""
    if node.op != "Gemm":
        return None
    a, b, c = (*node.inputs, "")[:3]
    alpha, beta = float(node.attrs.get("alpha", 1)), float(node.attrs.get("beta", 1))
    info, steps = graph.info(node.output), Steps(graph, node)

    def turned(name: str, what: str) -> str:
        flipped = replace(graph.info(name), shape=graph.info(name).shape[::-1])
        return steps.add("Transpose", what, (name,), flipped, perm=(1, 0))

    if node.attrs.get("transA"):
        a = turned(a, "first")
    op = "MatMul"
    if node.attrs.get("transB") and b in graph.constants:
        op = "Linear"
    elif node.attrs.get("transB"):
        b = turned(b, "second")
    if alpha == 1 and not c:
        return steps.last(op, (a, b))
    product = steps.add(op, "product", (a, b), info, name=node.name)
    if alpha != 1 and not c:
        return steps.last("Mul", (product, steps.number("alpha", alpha)), f"{node.name}.scale")
    if alpha != 1:
        product = steps.add("Mul", "scaled", (product, steps.number("alpha", alpha)), info)
    bias = floats(graph, c)
    if beta != 1 and bias is not None:
        c = steps.constant("addend", (bias * np.float32(beta)).astype(np.float32))
    elif beta != 1:
        c = steps.add("Mul", "addend", (c, steps.number("beta", beta)), graph.info(c))
    return steps.last("Add", (product, c), f"{node.name}.add")


def _turned(weight: Constant) -> Constant:
    if isinstance(weight, QuantWeight):
        return weight.transposed((1, 0))
    return np.ascontiguousarray(weight.T)


def _row(graph: Graph, name: str, n: int) -> Constant | None:
    """A constant that adds the same [n] to each row; None if it does not."""
    constant = graph.constants.get(name)
    if constant is None or (len(constant.shape) > 1 and max(constant.shape[:-1]) > 1):
        return None
    if isinstance(constant, QuantWeight):
        return constant if constant.shape == (n,) else None
    if constant.shape == (n,):
        return constant
    return (
        np.ascontiguousarray(np.broadcast_to(constant.reshape(-1), (n,)))
        if constant.size in (1, n)
        else None
    )


def _narrow(graph: Graph, node: Node) -> Change | None:
    """A rule: removes leading axes of one from the constant of a MatMul."""
    weight = floats(graph, node.inputs[1]) if node.op == "MatMul" else None
    if weight is None or weight.ndim <= 2 or node.inputs[0] in graph.constants:
        return None
    x = graph.info(node.inputs[0])
    name = unique(graph, f"{node.inputs[1]}.matrix")
    if max(weight.shape[:-2]) > 1 or len(x.shape) < weight.ndim:
        return None
    return Change(
        nodes=(replace(node, inputs=(node.inputs[0], name)),),
        constants={name: weight.reshape(weight.shape[-2:])},
    )


def _products(graph: Graph) -> Graph:
    """Replace MatMul with a constant matrix, or the transpose of one, by Linear."""
    constants: dict[str, Constant] = dict(graph.constants)
    weights: dict[str, str] = {}  # second factor -> the Linear's weight
    nodes = []
    for node in graph.nodes:
        replacement = node
        if node.op == "MatMul" and node.inputs[0] not in graph.constants:
            second = node.inputs[1]
            if second not in weights:
                weights[second] = _weight(graph, second, constants)
            if weights[second]:
                replacement = replace(node, op="Linear", inputs=(node.inputs[0], weights[second]))
        nodes.append(replacement)
    return prune(replace(graph, nodes=tuple(nodes), constants=constants))


def _weight(graph: Graph, second: str, constants: dict[str, Constant]) -> str:
    """The name of a Linear's weight for a second factor, added to the constants; "" if none."""
    constant = graph.constants.get(second)
    turn = graph.producers.get(second)
    if constant is None:
        if turn is None or turn.op != "Transpose" or len(graph.info(second).shape) != 2:
            return ""
        return turn.inputs[0] if turn.inputs[0] in graph.constants else ""
    if len(constant.shape) != 2 or graph.info(second).dtype != "float32":
        return ""
    alone = all(
        n.op == "MatMul" and n.inputs[1] == second != n.inputs[0] and n.inputs[0] not in constants
        for n in graph.consumers[second]
    )
    name = second if alone and second not in graph.outputs else unique(graph, f"{second}.turned")
    constants[name] = _turned(constant)
    return name


def biases(graph: Graph) -> Graph:
    """Turn a constant that is added to each row after a Linear into its bias."""
    return rewrite(graph, _bias)


def _bias(graph: Graph, node: Node) -> Change | None:
    if node.op != "Add":
        return None
    for value, other in (node.inputs, node.inputs[::-1]):
        product = graph.producers.get(value)
        info = graph.info(node.output)
        if (
            product is None
            or product.op != "Linear"
            or graph.only_consumer(value) is not node
            or value in graph.quants
            or value == other
            or graph.info(value).shape != info.shape
        ):
            continue
        row = _row(graph, other, info.shape[-1])
        if row is None:
            continue
        constants: dict[str, Constant] = {}
        if len(product.inputs) > 2:
            old = floats(graph, product.inputs[2])
            if old is None or isinstance(row, QuantWeight):
                continue
            row = (old + row).astype(np.float32)
        if row is not graph.constants.get(other):
            other = unique(graph, f"{product.name}.bias")
            constants[other] = row
        new = replace(product, inputs=(*product.inputs[:2], other), outputs=node.outputs)
        return Change(nodes=(new,), constants=constants)
    return None
