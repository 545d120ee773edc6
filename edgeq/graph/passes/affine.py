"""Fold operators that scale and shift channels into the weights before them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.graph.ir import Constant, Graph, Info, Node
from edgeq.graph.operators import LAYERS, VIEWS, channel_axis
from edgeq.graph.rewrite import Change, floats, rewrite, scalar, unique

_CARRY = VIEWS | {"Transpose", "MatMul"}
"""Operators that give c times as much for c times their first input."""
Array = NDArray[np.floating[Any]]


def batch_norms(graph: Graph) -> Graph:
    """Replace every BatchNormalization, by folding it or by Mul and Add."""
    return rewrite(graph, _batch_norm)


def affine(graph: Graph) -> Graph:
    """Fold Mul, Div, Add and Sub by channel into the weights before them.

    A factor may stand further behind, as that of an attention's queries or scores does.
    """
    return rewrite(rewrite(graph, _by_channel), _by_number)


def _batch_norm(graph: Graph, node: Node) -> Change | None:
    if node.op != "BatchNormalization" or any(node.outputs[1:]):
        return None
    read = [floats(graph, name) for name in node.inputs[1:]]
    parameters = [f.astype(np.float64) for f in read if f is not None]
    if len(parameters) != 4:
        return None
    gamma, beta, mean, variance = parameters
    scale = gamma / np.sqrt(variance + node.attrs.get("epsilon", 1e-5))
    shift = beta - mean * scale
    x = node.inputs[0]
    weighted = graph.producers.get(x)
    last = len(graph.info(x).shape) == 2
    if weighted is not None and weighted.op in LAYERS and (weighted.op != "Linear" or last):
        folded = _folded(graph, weighted, node, scale, shift)
        if folded is not None:
            return folded
    wide = (-1, *[1] * (len(graph.info(x).shape) - 2))
    scaled = unique(graph, f"{node.output}.scaled")
    names = [unique(graph, f"{node.name}.{what}") for what in ("scale", "shift")]
    return Change(
        nodes=(
            Node("Mul", f"{node.name}.mul", (x, names[0]), (scaled,)),
            Node("Add", node.name, (scaled, names[1]), node.outputs[:1]),
        ),
        constants={
            names[0]: scale.reshape(wide).astype(np.float32),
            names[1]: shift.reshape(wide).astype(np.float32),
        },
        values={scaled: Info(graph.info(x).shape)},
    )


def _by_channel(graph: Graph, node: Node) -> Change | None:
    if node.op not in ("Mul", "Div", "Add", "Sub"):
        return None
    for x, other in (node.inputs, node.inputs[::-1]):
        weighted = graph.producers.get(x)
        if weighted is None or weighted.op not in LAYERS:
            continue
        if graph.info(x).shape != graph.info(node.output).shape or node.inputs[0] == node.inputs[1]:
            continue
        number = _channels(graph, weighted, other)
        if number is None or (node.op == "Div" and (x != node.inputs[0] or not number.all())):
            continue
        scale, shift = np.ones_like(number), np.zeros_like(number)
        if node.op == "Mul":
            scale = number
        elif node.op == "Div":
            scale = 1 / number
        elif node.op == "Add":
            shift = number
        elif x == node.inputs[0]:
            shift = -number
        else:
            scale, shift = -scale, number
        if folded := _folded(graph, weighted, node, scale, shift):
            return folded
    return None


def _by_number(graph: Graph, node: Node) -> Change | None:
    """A rule: folds a factor into a weight further before, through operators that scale along."""
    if node.op not in ("Mul", "Div"):
        return None
    for x, other in (node.inputs, node.inputs[::-1]):
        number = scalar(graph, other)
        if number is None or not number or graph.info(x).shape != graph.info(node.output).shape:
            continue
        if node.op == "Div" and x != node.inputs[0]:
            continue
        chain, taker = [node], graph.producers.get(x)
        while taker is not None and graph.only_consumer(taker.output) is chain[-1]:
            chain.append(taker)
            if taker.op not in _CARRY:
                break
            taker = graph.producers.get(taker.inputs[0])
        weighted = chain[-1]
        if weighted.op not in LAYERS:
            continue
        n = graph.info(weighted.output).shape[channel_axis(graph, weighted)]
        scale = np.full(n, number if node.op == "Mul" else 1 / number)
        folded = _folded(graph, weighted, chain[-2], scale, np.zeros(n))
        if folded is None:
            continue
        # the chain again, for values that are scaled have other names than those that were not
        scaled = unique(graph, f"{weighted.output}.scaled")
        nodes = [replace(folded.nodes[0], outputs=(scaled,))]
        values = {scaled: graph.info(weighted.output)}
        for step in chain[-2:0:-1]:
            out = node.output if step is chain[1] else unique(graph, f"{step.output}.scaled")
            nodes.append(replace(step, inputs=(scaled, *step.inputs[1:]), outputs=(out,)))
            values[out] = graph.info(step.output)
            scaled = out
        return Change(tuple(nodes), folded.constants, values)
    return None


def _channels(graph: Graph, weighted: Node, name: str) -> Array | None:
    """A constant as a number for each output channel of a layer; None if it does not vary so."""
    values = floats(graph, name)
    shape = graph.info(weighted.output).shape
    axis = channel_axis(graph, weighted)
    if values is None or values.ndim > len(shape):
        return None
    wide = (1,) * (len(shape) - values.ndim) + values.shape
    if any(n > 1 and place != axis for place, n in enumerate(wide)):
        return None
    return np.broadcast_to(values.reshape(-1).astype(np.float64), (shape[axis],)).copy()


def _folded(graph: Graph, weighted: Node, node: Node, scale: Array, shift: Array) -> Change | None:
    """The layer with scale and shift of its output channels in its weight and bias."""
    weight = floats(graph, weighted.inputs[1])
    bias: Array | None = np.zeros(len(scale))
    if len(weighted.inputs) > 2 and weighted.inputs[2]:
        bias = floats(graph, weighted.inputs[2])
    if (
        weight is None
        or bias is None
        or weighted.output in graph.quants
        or graph.only_consumer(weighted.output) is not node
    ):
        return None
    constants: dict[str, Constant] = {}
    w = weighted.inputs[1]
    if (scale != 1).any():
        if graph.only_consumer(w) is not weighted:
            w = unique(graph, f"{weighted.name}.weight")
        constants[w] = _scaled(weighted, weight, scale)
    b = weighted.inputs[2] if len(weighted.inputs) > 2 else ""
    if not b or graph.only_consumer(b) is not weighted:
        b = unique(graph, f"{weighted.name}.bias")
    constants[b] = (bias * scale + shift).astype(np.float32)
    new = replace(weighted, inputs=(weighted.inputs[0], w, b), outputs=node.outputs[:1])
    return Change(nodes=(new,), constants=constants)


def _scaled(weighted: Node, weight: Array, scale: Array) -> NDArray[np.float32]:
    if weighted.op == "ConvTranspose":  # [I, O/g, ...]: outputs lie group by group
        group = int(weighted.attrs["group"])
        parts = weight.reshape(group, -1, *weight.shape[1:])
        wide = scale.reshape(group, 1, -1, *[1] * (weight.ndim - 2))
        return (parts * wide).reshape(weight.shape).astype(np.float32)
    return (weight * scale.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.float32)
