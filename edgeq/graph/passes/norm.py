"""Recognize layer normalization that exporters write as several operators."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgeq.graph.ir import Graph, Node
from edgeq.graph.rewrite import Change, floats, ints, rewrite, scalar, unique


def layer_norms(graph: Graph) -> Graph:
    """Replace (x - mean) / sqrt(variance + epsilon) by LayerNormalization."""
    graph = rewrite(graph, _core)
    graph = rewrite(graph, _scale)
    return rewrite(graph, _bias)


def _core(graph: Graph, node: Node) -> Change | None:
    """A rule: replaces the division by the deviation by a norm with scale 1."""
    parts = _parts(graph, node)
    if parts is None:
        return None
    centered, deviation = parts
    root = _producer(graph, deviation, "Sqrt", "Pow")
    if root is None or (root.op == "Pow" and scalar(graph, root.inputs[1]) != 0.5):
        return None
    total = _producer(graph, root.inputs[0], "Add")
    sub = _producer(graph, centered, "Sub")
    if total is None or sub is None:
        return None
    for variance, added in (total.inputs, total.inputs[::-1]):
        epsilon, mean2 = scalar(graph, added), _producer(graph, variance, "ReduceMean")
        if epsilon is None or mean2 is None or not _is_square(graph, mean2.inputs[0], centered):
            continue
        x, mean = sub.inputs[0], _producer(graph, sub.inputs[1], "ReduceMean")
        if mean is None or mean.inputs[0] != x or not mean.attrs["keepdims"]:
            continue
        axes, rank = ints(graph, mean.inputs[1]), len(graph.info(x).shape)
        if axes is None or ints(graph, mean2.inputs[1]) != axes or not mean2.attrs["keepdims"]:
            continue
        if axes != tuple(range(axes[0], rank)):
            continue
        ones = unique(graph, f"{node.name}.ones")
        attrs = {"axis": axes[0], "epsilon": epsilon}
        new = Node("LayerNormalization", node.name, (x, ones), node.outputs, attrs)
        gamma = np.ones(graph.info(x).shape[axes[0] :], np.float32)
        return Change(nodes=(new,), constants={ones: gamma})
    return None


def _parts(graph: Graph, node: Node) -> tuple[str, str] | None:
    """Numerator and denominator of a quotient, which may be a product with 1/x."""
    if node.op == "Div":
        return node.inputs[0], node.inputs[1]
    if node.op == "Mul":
        for x, other in (node.inputs, node.inputs[::-1]):
            inverse = _producer(graph, other, "Div")
            if inverse is not None and scalar(graph, inverse.inputs[0]) == 1:
                return x, inverse.inputs[1]
    return None


def _producer(graph: Graph, name: str, *ops: str) -> Node | None:
    """The node that computes a value, if it is one of these operators."""
    node = graph.producers.get(name)
    return node if node is not None and node.op in ops else None


def _is_square(graph: Graph, name: str, x: str) -> bool:
    node = _producer(graph, name, "Mul", "Pow")
    if node is None or node.inputs[0] != x:
        return False
    return node.inputs[1] == x if node.op == "Mul" else scalar(graph, node.inputs[1]) == 2


def _behind(graph: Graph, node: Node) -> tuple[Node, NDArray[np.float32]] | None:
    """The norm before a Mul or Add of a constant with the norm's shape, and that constant."""
    for value, other in (node.inputs, node.inputs[::-1]):
        norm, values = _producer(graph, value, "LayerNormalization"), floats(graph, other)
        if norm is None or values is None or graph.only_consumer(value) is not node:
            continue
        shape = graph.info(norm.inputs[1]).shape
        rank = len(graph.info(value).shape)
        wide = (1,) * (rank - values.ndim) + values.shape
        if value in graph.quants or wide != (1,) * (rank - len(shape)) + shape:
            continue
        return norm, values.reshape(shape)
    return None


def _scale(graph: Graph, node: Node) -> Change | None:
    """A rule: makes a product behind a norm its scale."""
    match = _behind(graph, node) if node.op == "Mul" else None
    if match is None or len(match[0].inputs) > 2:
        return None
    norm, values = match
    old = floats(graph, norm.inputs[1])
    if old is None:
        return None
    name = unique(graph, f"{node.name}.scale")
    new = replace(norm, inputs=(norm.inputs[0], name), outputs=node.outputs)
    return Change(nodes=(new,), constants={name: old * values})


def _bias(graph: Graph, node: Node) -> Change | None:
    """A rule: makes a sum behind a norm its bias."""
    match = _behind(graph, node) if node.op == "Add" else None
    if match is None:
        return None
    norm, values = match
    if len(norm.inputs) > 2:
        old = floats(graph, norm.inputs[2])
        if old is None:
            return None
        values = values + old
    name = unique(graph, f"{node.name}.bias")
    new = replace(norm, inputs=(*norm.inputs[:2], name), outputs=node.outputs)
    return Change(nodes=(new,), constants={name: values})
