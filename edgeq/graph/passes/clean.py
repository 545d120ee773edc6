"""Remove operators that do nothing, and compute equal values once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from edgeq.graph.ir import Graph, Node
from edgeq.graph.operators import VIEWS
from edgeq.graph.rewrite import Change, ints, prune, rewrite, unique


def clean(graph: Graph) -> Graph:
    """Remove operators that change nothing or undo each other."""
    graph = rewrite(graph, _empty_parts)
    graph = rewrite(graph, _nothing)
    graph = rewrite(graph, _two_transposes)
    graph = rewrite(graph, _two_reshapes)
    graph = rewrite(graph, _two_slices)
    return rewrite(graph, _nothing)


def _nothing(graph: Graph, node: Node) -> Change | None:
    """A rule: removes an operator whose output is its input."""
    if not node.inputs or not node.inputs[0]:
        return None
    if node.op not in ("Identity", "Concat", "Max", "Min", "Sum", "Mean") and not _idle(
        graph, node
    ):
        return None
    if node.op in ("Concat", "Max", "Min", "Sum", "Mean") and len(node.inputs) > 1:
        return None
    source = node.inputs[0]
    copied = source in graph.inputs or source in graph.constants or source in graph.outputs
    if node.output in graph.outputs and copied:
        if node.op == "Identity":
            return None
        return Change(nodes=(Node("Identity", node.name, (source,), node.outputs),))
    return Change(same={node.output: source})


def _empty_parts(graph: Graph, node: Node) -> Change | None:
    """A rule: leaves out parts of a Concat that have no elements, which few runtimes take."""
    if node.op != "Concat":
        return None
    parts = tuple(name for name in node.inputs if 0 not in graph.info(name).shape)
    if not parts or len(parts) == len(node.inputs):
        return None
    return Change(nodes=(replace(node, inputs=parts),))


def _idle(graph: Graph, node: Node) -> bool:
    before, after = graph.info(node.inputs[0]), graph.info(node.output)
    if node.op == "Cast":
        return before.dtype == after.dtype
    if before.shape != after.shape:
        return False
    if node.op == "Transpose":
        # an axis of one element may stand anywhere
        moved = [axis for axis in node.attrs["perm"] if before.shape[axis] > 1]
        return moved == sorted(moved)
    if node.op == "Slice":
        return set(ints(graph, node.inputs[4]) or ()) <= {1} if len(node.inputs) > 4 else True
    if node.op == "Pad":
        return not any(ints(graph, node.inputs[1]) or (1,))
    if node.op == "Split":
        return len(node.outputs) == 1
    if node.op == "DepthToSpace" or node.op == "SpaceToDepth":
        return bool(node.attrs["blocksize"] == 1)
    return node.op in VIEWS | {"Expand", "Tile"}


def _two_transposes(graph: Graph, node: Node) -> Change | None:
    before = graph.producers.get(node.inputs[0]) if node.op == "Transpose" else None
    if before is None or before.op != "Transpose":
        return None
    perm = tuple(before.attrs["perm"][axis] for axis in node.attrs["perm"])
    new = replace(node, inputs=before.inputs, attrs={"perm": perm})
    return Change(nodes=(new,))


def _two_reshapes(graph: Graph, node: Node) -> Change | None:
    before = graph.producers.get(node.inputs[0]) if node.op in VIEWS else None
    if before is None or before.op not in VIEWS or node.inputs[0] in graph.outputs:
        return None
    shape = unique(graph, f"{node.output}.shape")
    new = Node("Reshape", node.name, (before.inputs[0], shape), node.outputs)
    return Change(
        nodes=(new,), constants={shape: np.array(graph.info(node.output).shape, np.int64)}
    )


def _two_slices(graph: Graph, node: Node) -> Change | None:
    """A rule: joins slices of different axes, which exporters write one by one."""
    before = graph.producers.get(node.inputs[0]) if node.op == "Slice" else None
    if before is None or before.op != "Slice" or graph.only_consumer(before.output) is not node:
        return None
    both = [[ints(graph, name) for name in n.inputs[1:]] for n in (before, node)]
    joined = [(a or ()) + (b or ()) for a, b in zip(*both, strict=True)]
    axes = joined[2]
    if len(joined) != 4 or len(set(axes)) != len(axes) or node.inputs[0] in graph.quants:
        return None
    names = [unique(graph, f"{node.output}.{what}") for what in ("from", "to", "along", "by")]
    constants = {n: np.array(v, np.int64) for n, v in zip(names, joined, strict=True)}
    new = replace(node, inputs=(before.inputs[0], *names))
    return Change(nodes=(new,), constants=constants)


def duplicates(graph: Graph) -> Graph:
    """Merge equal nodes, and equal small constants."""
    names: dict[Any, str] = {}
    same: dict[str, str] = {}
    for name, constant in graph.constants.items():
        if isinstance(constant, np.ndarray) and constant.size <= 16:
            key = (str(constant.dtype), constant.shape, constant.tobytes())
            if (first := names.setdefault(key, name)) != name:
                same[name] = first
    seen: dict[Any, Node] = {}
    nodes = []
    for node in graph.nodes:
        node = replace(node, inputs=tuple(same.get(i, i) for i in node.inputs))
        attrs = tuple((k, _frozen(v)) for k, v in sorted(node.attrs.items()))
        first_node = seen.setdefault((node.op, node.inputs, attrs, len(node.outputs)), node)
        known = all(a or not b for a, b in zip(first_node.outputs, node.outputs, strict=True))
        if first_node is node or not known or set(node.outputs) & set(graph.outputs):
            nodes.append(node)
        else:
            same.update(zip(node.outputs, first_node.outputs, strict=True))
            same.pop("", None)
    return prune(replace(graph, nodes=tuple(nodes)))


def _frozen(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    return value
