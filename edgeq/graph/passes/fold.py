"""Compute what depends on constants only, and remove copies."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgeq.graph.execute import compute
from edgeq.graph.ir import Constant, Graph, Node, QuantWeight
from edgeq.graph.rewrite import Change, copy_constant_outputs, floats, prune, rewrite, unique

_RANDOM = ("RandomNormal", "RandomUniform", "Bernoulli", "Multinomial")


def fold(graph: Graph) -> Graph:
    """Replace nodes that depend on constants only by their results.

    An output of the graph that is a constant or a copy keeps an Identity.
    """
    return prune(copy_constant_outputs(_computed(rewrite(graph, _shape_or_copy))))


def sums(graph: Graph) -> Graph:
    """Join constants that are added one after the other, if the sum is not larger."""
    return rewrite(graph, _sum)


def _sum(graph: Graph, node: Node) -> Change | None:
    if node.op != "Add":
        return None
    for value, last in (node.inputs, node.inputs[::-1]):
        before = graph.producers.get(value)
        if before is None or before.op != "Add" or graph.only_consumer(value) is not node:
            continue
        for x, first in (before.inputs, before.inputs[::-1]):
            one, other = floats(graph, first), floats(graph, last)
            if x in graph.constants or one is None or other is None:
                continue
            total = np.asarray(one + other, np.float32)
            if total.size > max(one.size, other.size):
                continue
            name = unique(graph, f"{node.name}.sum")
            return Change(nodes=(replace(node, inputs=(x, name)),), constants={name: total})
    return None


def _shape_or_copy(graph: Graph, node: Node) -> Change | None:
    """A rule: replaces Shape and Size by constants, and removes Identity and Dropout."""
    if node.op == "Dropout" and any(node.outputs[1:]):
        return _whole_mask(graph, node)
    if node.op in ("Identity", "Dropout"):
        if node.op == "Identity" and node.output in graph.outputs:
            source = node.inputs[0]
            if source in graph.constants or source in graph.inputs or source in graph.outputs:
                return None
        return Change(same={node.output: node.inputs[0]})
    if node.op == "Cast" and node.attrs["to"] == 1 and node.output not in graph.outputs:
        constant = graph.constants.get(node.inputs[0])
        if isinstance(constant, np.ndarray) and constant.dtype == np.float16:
            return Change(same={node.output: node.inputs[0]})  # it stands for float32 as it is
    if node.op in ("Shape", "Size") and _known(graph, node.inputs[0]):
        shape = graph.info(node.inputs[0]).shape
        if node.op == "Size":
            number = np.array(np.prod(shape, dtype=np.int64), np.int64)
        else:
            number = np.array(shape[node.attrs.get("start", 0) : node.attrs.get("end")], np.int64)
        return Change(constants={node.output: number})
    return None


def _whole_mask(graph: Graph, node: Node) -> Change | None:
    """Replace Dropout's second output, a mask that keeps every value, by a constant."""
    if not _known(graph, node.inputs[0]):
        return None
    name = unique(graph, f"{node.name}.mask")
    nodes = [Node("Identity", f"{node.name}.keeps", (name,), node.outputs[1:])]
    if node.outputs[0]:
        nodes.insert(0, Node("Identity", node.name, node.inputs[:1], node.outputs[:1]))
    mask = np.ones(graph.info(node.inputs[0]).shape, np.bool_)
    return Change(nodes=tuple(nodes), constants={name: mask})


def _known(graph: Graph, name: str) -> bool:
    return name in graph.constants or name in graph.values


def _computed(graph: Graph) -> Graph:
    constant = {n for n, value in graph.constants.items() if not isinstance(value, QuantWeight)}
    folded: set[str] = set()
    for node in graph.nodes:
        if (
            all(name in constant for name in node.inputs if name)
            and not node.op.startswith(_RANDOM)
            and not (node.op == "Identity" and node.output in graph.outputs)
            and not _turns_a_matrix(graph, node)
        ):
            folded.add(node.name)
            constant.update(node.outputs)
    if not folded:
        return graph
    rest = tuple(n for n in graph.nodes if n.name not in folded)
    taken = {name for node in rest for name in node.inputs} | set(graph.outputs)
    wanted = tuple(
        out for n in graph.nodes if n.name in folded for out in n.outputs if out and out in taken
    )
    computed = compute(graph, wanted) if wanted else {}
    constants: dict[str, Constant] = {**graph.constants, **computed}
    values = {k: v for k, v in graph.values.items() if k not in constants}
    return replace(graph, nodes=rest, constants=constants, values=values)


def _turns_a_matrix(graph: Graph, node: Node) -> bool:
    """Whether a node is the transpose of a MatMul's constant, which the pass for Linear uses."""
    return (
        node.op == "Transpose"
        and node.output not in graph.outputs
        and node.inputs[0] in graph.constants
        and len(graph.info(node.inputs[0]).shape) == 2
        and all(
            n.op == "MatMul" and n.inputs[1] == node.output and n.inputs[0] != node.output
            and n.inputs[0] not in graph.constants
            for n in graph.consumers.get(node.output, ())
        )
    )  # fmt: skip
