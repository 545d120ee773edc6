"""Make the constants of attention masks finite in float16 and 8 bits.

Exporters write -inf or the least float32, which are nothing in float16 and spoil the range of
8 bits. Behind the softmax -10000 is zero just as well.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgeq.graph.ir import Constant, Graph, Node
from edgeq.graph.rewrite import Change, floats, rewrite, unique

LEAST = -1e4
"""What stands for minus infinity."""
_PATH = (
    "Add", "Sub", "Mul", "Where", "Expand", "Reshape", "Unsqueeze", "Squeeze", "Slice", "Concat",
    "Transpose", "Gather", "Identity", "Clip", "Tile", "Cast",
)  # fmt: skip
"""Operators between a mask's constants and the softmax."""
_TAKES = ("Add", "Sub", "Mul", "Where", "Concat", "Expand", "Gather")
"""Those of them whose constants are the mask's values; a Clip's are bounds."""


def masks(graph: Graph) -> Graph:
    """Limit constants before a Softmax to 10000."""
    on_path: set[str] = set()
    for node in graph.nodes:
        if node.op == "Softmax":
            _collect(graph, node.inputs[0], on_path)
    constants: dict[str, Constant] = dict(graph.constants)
    nodes = []
    for node in graph.nodes:
        if node.name in on_path and node.op in _TAKES:
            taken = tuple(_finite(graph, name, constants, on_path) for name in node.inputs)
            node = replace(node, inputs=taken)
        nodes.append(node)
    changed = replace(graph, nodes=tuple(nodes), constants=constants)
    return rewrite(changed, _no_number)


def _collect(graph: Graph, name: str, names: set[str]) -> None:
    waiting = [name]
    while waiting:
        node = graph.producers.get(waiting.pop())
        if node is not None and node.op in _PATH and node.name not in names:
            names.add(node.name)
            waiting += node.inputs


def _finite(graph: Graph, name: str, constants: dict[str, Constant], on_path: set[str]) -> str:
    values = floats(graph, name)
    if values is None or not values.size or np.abs(values).max() <= -LEAST:
        return name
    alone = all(n.name in on_path and n.op in _TAKES for n in graph.consumers[name])
    new = name if alone else unique(graph, f"{name}.finite")
    constants[new] = np.asarray(np.clip(values, LEAST, -LEAST))
    return new


def _no_number(graph: Graph, node: Node) -> Change | None:
    """A rule: removes the repair of a softmax of nothing but -inf, which no longer occurs."""
    if node.op != "Where":
        return None
    asked, softmax = graph.producers.get(node.inputs[0]), graph.producers.get(node.inputs[2])
    if asked is None or asked.op != "IsNaN" or softmax is None or softmax.op != "Softmax":
        return None
    if asked.inputs[0] != node.inputs[2] or node.inputs[1] not in graph.constants:
        return None
    return Change(same={node.output: node.inputs[2]})
