"""Changing a `Graph`: the tools that passes are written with.

A rule looks at one node and says what takes its place; `rewrite` asks it of every node until it
has nothing more to say. Nodes whose values nobody takes then go by themselves, so a rule that
matches a pattern replaces its last node only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError
from edgeq.graph.ir import Constant, Graph, Info, Node, QuantWeight


@dataclass(frozen=True)
class Change:
    """What a rule puts in the place of one node.

    Args:
        nodes: take its place, in order.
        constants: added to the graph's, or put in the place of one of that name.
        values: what is known of values that are new.
        same: value of the replaced node -> the value or constant that is taken instead of it.
    """

    nodes: tuple[Node, ...] = ()
    constants: Mapping[str, Constant] = field(default_factory=dict)
    values: Mapping[str, Info] = field(default_factory=dict)
    same: Mapping[str, str] = field(default_factory=dict)


Rule = Callable[[Graph, Node], Change | None]


class Steps:
    """Collects the nodes that replace one node; `last` returns the change.

    Args:
        graph: that the node is of.
        node: the one that is replaced. New names begin with its own.
    """

    def __init__(self, graph: Graph, node: Node) -> None:
        self._graph, self._node = graph, node
        self._nodes: list[Node] = []
        self._constants: dict[str, Constant] = {}
        self._values: dict[str, Info] = {}

    def constant(self, what: str, array: NDArray[Any]) -> str:
        """Add a constant; returns its name."""
        name = unique(self._graph, f"{self._node.name}.{what}")
        self._constants[name] = array
        return name

    def number(self, what: str, value: float) -> str:
        """Add a float32 constant of one element; returns its name."""
        return self.constant(what, np.array(value, np.float32))

    def add(
        self,
        op: str,
        what: str,
        inputs: tuple[str, ...],
        info: Info | None = None,
        name: str | None = None,
        **attrs: Any,
    ) -> str:
        """Add a node; returns the name of its value."""
        out = unique(self._graph, f"{self._node.output}.{what}")
        named = name or unique_node(self._graph, f"{self._node.name}.{what}")
        self._nodes.append(Node(op, named, inputs, (out,), attrs))
        if info is not None:
            self._values[out] = info
        return out

    def last(
        self, op: str, inputs: tuple[str, ...], name: str | None = None, **attrs: Any
    ) -> Change:
        """Add the last node, which computes the replaced node's value; returns the change."""
        named = name or self._node.name
        self._nodes.append(Node(op, named, inputs, self._node.outputs, attrs))
        return Change(tuple(self._nodes), self._constants, self._values)


def rewrite(graph: Graph, rule: Rule) -> Graph:
    """Apply a rule to every node, and again to the nodes that it adds.

    Raises:
        FormatError: a node whose attributes or constants contradict the values it takes.
    """
    at = 0
    while at < len(graph.nodes):
        node = graph.nodes[at]
        try:
            change = rule(graph, node)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as err:
            raise FormatError(f"{node} does not fit what it takes: {err}") from err
        if change is None:
            at += 1
            continue
        after = {n.name for n in graph.nodes[at + 1 :]}
        graph = prune(_changed(graph, node, change))
        at = next((i for i, n in enumerate(graph.nodes) if n.name in after), len(graph.nodes))
        at = max(at - len(change.nodes), 0)
    return graph


def _changed(graph: Graph, node: Node, change: Change) -> Graph:
    nodes: list[Node] = []
    for old in graph.nodes:
        nodes.extend(change.nodes if old is node else (old,))
    constants = dict(graph.constants)
    for name, constant in change.constants.items():  # NumPy makes scalars of arrays without axes
        constants[name] = constant if isinstance(constant, QuantWeight) else np.asarray(constant)
    values = {**graph.values, **change.values}
    changed = replace(graph, nodes=tuple(nodes), constants=constants, values=values)
    for old_name, new_name in change.same.items():
        changed = _renamed(changed, old_name, new_name)
    return changed


def _renamed(graph: Graph, old: str, new: str) -> Graph:
    """Replace one value by another; the name of an output of the graph stays."""
    if old in graph.outputs:
        if new in graph.constants or new in graph.inputs or new in graph.outputs:
            keep = Node("Identity", unique_node(graph, f"{old}.copy"), (new,), (old,))
            graph = replace(graph, nodes=(*graph.nodes, keep))
            return _rewired(graph, old, new)
        nodes = tuple(
            replace(n, outputs=tuple(old if o == new else o for o in n.outputs))
            for n in graph.nodes
        )
        return _rewired(replace(graph, nodes=nodes), new, old)
    return _rewired(graph, old, new)


def _rewired(graph: Graph, old: str, new: str) -> Graph:
    """Let all nodes that use one value use another."""
    nodes = tuple(
        replace(n, inputs=tuple(new if i == old else i for i in n.inputs)) if old in n.inputs else n
        for n in graph.nodes
    )
    return replace(graph, nodes=nodes)


def prune(graph: Graph) -> Graph:
    """Remove nodes, constants and shapes that no output needs."""
    wanted = set(graph.outputs)
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if any(out in wanted for out in node.outputs):
            wanted.update(node.inputs)
            kept.append(node)
    wanted.discard("")
    nodes = []
    for node in reversed(kept):
        outputs = tuple(out if out in wanted else "" for out in node.outputs)
        nodes.append(node if outputs == node.outputs else replace(node, outputs=outputs))
    live = wanted | set(graph.inputs)
    return replace(
        graph,
        nodes=tuple(nodes),
        constants={k: v for k, v in graph.constants.items() if k in wanted},
        values={k: v for k, v in graph.values.items() if k in live},
        quants={k: v for k, v in graph.quants.items() if k in live},
    )


def ordered(graph: Graph) -> Graph:
    """Sort the nodes so that each is behind those whose values it uses.

    Raises:
        FormatError: a value that nothing makes, or that is made from itself.
    """
    ready = {"", *graph.inputs, *graph.constants}
    makers = graph.producers
    waiting: dict[str, int] = {}
    takers: dict[str, list[Node]] = {}
    free: list[Node] = []
    for node in graph.nodes:
        missing = {i for i in node.inputs if i not in ready}
        for name in missing:
            if name not in makers:
                raise FormatError(f"{node} reads {name!r}, which no operator computes")
            takers.setdefault(name, []).append(node)
        waiting[node.name] = len(missing)
        if not missing:
            free.append(node)
    nodes: list[Node] = []
    for node in free:  # grows while it is walked
        nodes.append(node)
        for out in node.outputs:
            for taker in takers.pop(out, ()) if out else ():
                waiting[taker.name] -= 1
                if not waiting[taker.name]:
                    free.append(taker)
    if len(nodes) < len(graph.nodes):
        stuck = next(n for n in graph.nodes if waiting[n.name])
        raise FormatError(f"{stuck} is part of a cycle: it depends on its own output")
    # a list that is in order already stays as it is: names in reports follow the model's
    place = {node.name: i for i, node in enumerate(graph.nodes)}
    if all(
        place[makers[i].name] < place[n.name] for n in graph.nodes for i in n.inputs if i in makers
    ):
        return graph
    return replace(graph, nodes=tuple(nodes))


def copy_constant_outputs(graph: Graph) -> Graph:
    """Put an Identity before each output that is a constant itself, so that a node makes it."""
    renamed = {
        name: unique(graph, f"{name}.constant") for name in graph.outputs if name in graph.constants
    }
    if not renamed:
        return graph
    nodes = [
        replace(node, inputs=tuple(renamed.get(name, name) for name in node.inputs))
        for node in graph.nodes
    ]
    copies = [
        Node("Identity", unique_node(graph, f"{name}.copy"), (constant,), (name,))
        for name, constant in renamed.items()
    ]
    constants = {renamed.get(name, name): array for name, array in graph.constants.items()}
    values = {**graph.values, **{name: graph.info(name) for name in renamed}}
    return replace(graph, nodes=(*copies, *nodes), constants=constants, values=values)


def unique(graph: Graph, name: str) -> str:
    """Make a name that no value or constant has."""
    return _free(name, graph.values.keys() | graph.constants.keys() | graph.producers.keys())


def unique_node(graph: Graph, name: str) -> str:
    """Make a name that no node has."""
    return _free(name, {n.name for n in graph.nodes})


def _free(name: str, taken: Iterable[str]) -> str:
    taken, tried, count = set(taken), name, 1
    while tried in taken:
        count += 1
        tried = f"{name}.{count}"
    return tried


def scalar(graph: Graph, name: str) -> float | None:
    """The number in a constant of one element; None for other values."""
    constant = graph.constants.get(name)
    if constant is None or isinstance(constant, QuantWeight) or constant.size != 1:
        return None
    return float(constant.reshape(-1)[0])


def ints(graph: Graph, name: str) -> tuple[int, ...] | None:
    """The integers in a constant; None for other values."""
    constant = graph.constants.get(name)
    if constant is None or isinstance(constant, QuantWeight) or constant.dtype.kind not in "iu":
        return None
    return tuple(int(v) for v in constant.reshape(-1))


def floats(graph: Graph, name: str) -> NDArray[Any] | None:
    """A float constant that is not quantized, widened to float32; None for other values."""
    constant = graph.constants.get(name)
    if constant is None or isinstance(constant, QuantWeight) or constant.dtype.kind != "f":
        return None
    return constant.astype(np.float32, copy=False)
