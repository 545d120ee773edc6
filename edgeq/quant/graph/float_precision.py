"""Operators that must stay float, because 8 bits with one scale would destroy their results.

- An additive mask adds -10000 or less to attention scores of a few units. With one scale for both,
  all scores round to the same integer. If no calibration sample is padded, the measured range does
  not even contain the mask. Sums of a computed value and a mask stay float, and so does the softmax
  that follows.
- A divisor, and the input of a square root or a logarithm, needs a small relative error, also for
  small values. Rounding to 8 bits has a constant absolute error and turns small values into zero.
  The mean of squares in an RMS norm that consists of several operators is such a value.
- Operators that compute the logarithm of a spectrum before the first layers of a network need the
  whole range of their inputs, which is far more than 8 bits can represent.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgeq.graph.ir import Graph, Node
from edgeq.graph.operators import LOGIC, OPERATORS, PRODUCTS, SOFTMAXES, VIEWS, named

_PASSES = VIEWS | {"Add", "Sub", "Mul", "Div", "Clip", "Transpose", "Slice", "Identity"}
"""Operators that may be between the product of attention and its softmax."""
_STATISTICS = (VIEWS - {"Flatten"}) | {
    "Add", "Sub", "Mul", "ReduceMean", "GlobalAveragePool", "Clip", "Relu", "Identity",
}  # fmt: skip
"""Operators between values and a divisor, root or logarithm of their mean, variance or sum."""
_SUMS = ("Add", "Sub")
_EXACT = named(lambda row: row.exact_input is not None)
"""Operators of which one input needs a small relative error."""
MASKED = 20.0
"""A constant term of scores above this magnitude is a mask: its softmax is below 1e-8."""
HIDES = 32.0
"""If one term of a sum is this many times larger than the other, too few integer levels remain for
the smaller term."""


def needs_float(graph: Graph) -> frozenset[str]:
    """Names of the nodes to keep float for the reasons above, as far as the graph alone shows.

    Args:
        graph: the float graph.
    """
    return frozenset(_masking(graph) | _statistics(graph) | _features(graph))


def hidden_terms(graph: Graph, ranges: Mapping[str, tuple[float, float]]) -> frozenset[str]:
    """Names of sums with one term so large that 8 bits represent little of the other term.

    Args:
        graph: the float graph.
        ranges: value -> its lowest and highest number on samples; values may be missing.
    """
    names = set()
    for node in graph.nodes:
        if node.op not in _SUMS or not all(name in ranges for name in node.inputs):
            continue
        small, large = sorted(max(abs(end) for end in ranges[name]) for name in node.inputs)
        if small > 0 and large > HIDES * small:
            names.add(node.name)
    return frozenset(names)


def has_attention(graph: Graph) -> bool:
    """Whether the graph has attention: a softmax of a MatMul whose result enters another MatMul."""
    for node in graph.nodes:
        if node.op != "Softmax":
            continue
        takers = graph.consumers.get(node.output, ())
        if any(t.op == "MatMul" for t in takers) and any(
            maker.op == "MatMul" for maker in _before(graph, node)
        ):
            return True
    return False


def _before(graph: Graph, softmax: Node) -> list[Node]:
    """The nodes before a softmax, back to and including the products."""
    nodes: dict[str, Node] = {}
    waiting = [softmax.inputs[0]]
    while waiting:
        producer = graph.producers.get(waiting.pop())
        if producer is None or producer.name in nodes:
            continue
        nodes[producer.name] = producer
        if producer.op in _PASSES:
            waiting += [name for name in producer.inputs if name in graph.values]
    return list(nodes.values())


def _masking(graph: Graph) -> set[str]:
    """Sums of scores and a mask before a softmax, and sums with a mask computed from integers."""
    computed = _computed(graph)
    names = set()
    for softmax in graph.nodes:
        if softmax.op not in SOFTMAXES:
            continue
        for node in _before(graph, softmax):
            if node.op in _SUMS and any(_is_mask(graph, name, computed) for name in node.inputs):
                names.add(node.name)
    flags = _flags(graph)
    for node in graph.nodes:
        if node.op in _SUMS and any(name in flags for name in node.inputs):
            names.add(node.name)
    return names


def _is_mask(graph: Graph, name: str, computed: set[str]) -> bool:
    if name in graph.constants:
        array = graph.array(name)
        return bool(array.size and float(np.abs(array).max()) > MASKED)
    return name not in computed


def _computed(graph: Graph) -> set[str]:
    """Values that depend on a product or on rows of a float table."""
    values: set[str] = set()
    for node in graph.nodes:
        table = node.op == "Gather" and node.inputs[0] in graph.constants
        if node.op in PRODUCTS or table or values.intersection(node.inputs):
            values.update(out for out in node.outputs if out)
    return values


def _flags(graph: Graph) -> set[str]:
    """Float values that are computed only from integers or booleans, as masks are."""
    integers = {name for name in graph.inputs if _is_whole(graph, name)}
    flags: set[str] = set()
    for node in graph.nodes:
        inputs = [name for name in node.inputs if name in graph.values]
        table = node.op == "Gather" and node.inputs[0] in graph.constants
        if not inputs or table:
            continue
        if all(name in integers or name in flags for name in inputs):
            for out in node.outputs:
                if out:
                    (integers if _is_whole(graph, out) else flags).add(out)
        elif node.op in LOGIC:
            integers.update(out for out in node.outputs if out)
    return flags


def _is_whole(graph: Graph, name: str) -> bool:
    return graph.info(name).dtype.startswith(("int", "uint", "bool"))


def _statistics(graph: Graph) -> set[str]:
    """Nodes before a divisor, a root or a logarithm whose results no other node uses."""
    names: set[str] = set()
    waiting = [
        node.inputs[OPERATORS[node.op].exact_input or 0]
        for node in graph.nodes
        if node.op in _EXACT and not (node.op == "Pow" and _is_square(graph, node))
    ]
    while waiting:
        name = waiting.pop()
        producer = graph.producers.get(name)
        if producer is None or producer.name in names or producer.op not in _STATISTICS:
            continue
        users = graph.consumers.get(name, ())
        unshared = len(users) == 1 or all(t.name in names or t.op in _EXACT for t in users)
        if not unshared or name in graph.outputs:
            continue
        names.add(producer.name)
        waiting += [value for value in producer.inputs if value in graph.values]
    return names


def _features(graph: Graph) -> set[str]:
    """All nodes before a logarithm that products follow."""
    behind: set[str] = set()
    logarithms = []
    for node in reversed(graph.nodes):
        users = (t for out in node.outputs for t in graph.consumers.get(out, ()))
        if any(user.op in PRODUCTS or user.name in behind for user in users):
            behind.add(node.name)
            if node.op == "Log":
                logarithms.append(node)
    names: set[str] = set()
    waiting = [name for node in logarithms for name in node.inputs]
    while waiting:
        producer = graph.producers.get(waiting.pop())
        if producer is not None and producer.name not in names:
            names.add(producer.name)
            waiting += list(producer.inputs)
    return names


def _is_square(graph: Graph, node: Node) -> bool:
    """Whether all exponents of a Pow are 1 or more, which needs no small relative error."""
    exponent = graph.constants.get(node.inputs[1])
    if exponent is None:
        return False
    values = graph.array(node.inputs[1])
    return bool((values >= 1).all())
