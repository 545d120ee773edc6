"""Operators that 8 bits with one scale would destroy, whatever the layers around them.

- An additive mask puts -10000 or less beside scores of a few units: with one scale for both, all
  scores round to the same integer. Where no calibration sample is padded, the range holds no mask
  at all. Sums of a computed value and a mask stay float, and so does the softmax behind them.
- A divisor, and the input of a square root or a logarithm, needs a small relative error, also where
  it is small. Rounding to 8 bits has a constant absolute error, and turns small values into zero.
  The mean of squares in an RMS norm that is written as several operators is such a value.
- Operators that compute the logarithm of a spectrum before the first layers of a network need the
  range of their inputs, which is far more than 8 bits hold.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgeq.graph.ir import Graph, Node
from edgeq.graph.operators import LOGIC, OPERATORS, PRODUCTS, VIEWS, named

_PASSES = VIEWS | {"Add", "Sub", "Mul", "Div", "Clip", "Transpose", "Slice", "Identity"}
"""Operators between a product of attention and its softmax."""
_STATISTICS = (VIEWS - {"Flatten"}) | {
    "Add", "Sub", "Mul", "ReduceMean", "GlobalAveragePool", "Clip", "Relu", "Identity",
}  # fmt: skip
"""Operators between values and a divisor, root or logarithm of their mean, variance or sum."""
_EXACT = named(lambda row: row.exact_input is not None)
"""Operators of which one input needs a small relative error."""
MASKED = 20.0
"""A term of scores past this much is a mask: a softmax makes less than 1e-8 of it."""
HIDES = 32.0
"""Where one term of a sum is so many times the other, the other has too few levels left."""


def needs_float(graph: Graph) -> frozenset[str]:
    """Names of nodes to keep float for the reasons above, as far as the graph itself shows.

    Args:
        graph: float.
    """
    return frozenset(_masking(graph) | _statistics(graph) | _features(graph))


def hidden_terms(graph: Graph, ranges: Mapping[str, tuple[float, float]]) -> frozenset[str]:
    """Names of sums of which one term is so large that 8 bits hold little of the other.

    Args:
        graph: float.
        ranges: value -> its lowest and highest number on samples; values may be missing.
    """
    found = set()
    for node in graph.nodes:
        if node.op not in ("Add", "Sub") or not all(name in ranges for name in node.inputs):
            continue
        small, large = sorted(max(abs(end) for end in ranges[name]) for name in node.inputs)
        if small > 0 and large > HIDES * small:
            found.add(node.name)
    return frozenset(found)


def has_attention(graph: Graph) -> bool:
    """Whether a softmax of a product of two computed values is multiplied again."""
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
    """The nodes before a softmax, back to the products and including them."""
    found: dict[str, Node] = {}
    rest = [softmax.inputs[0]]
    while rest:
        maker = graph.producers.get(rest.pop())
        if maker is None or maker.name in found:
            continue
        found[maker.name] = maker
        if maker.op in _PASSES:
            rest += [name for name in maker.inputs if name in graph.values]
    return list(found.values())


def _masking(graph: Graph) -> set[str]:
    """Sums of scores and a mask before a softmax, and sums with a mask made of integers."""
    computed = _computed(graph)
    found = set()
    for softmax in graph.nodes:
        if softmax.op not in ("Softmax", "LogSoftmax"):
            continue
        for node in _before(graph, softmax):
            if node.op in ("Add", "Sub") and any(
                _is_mask(graph, name, computed) for name in node.inputs
            ):
                found.add(node.name)
    flags = _flags(graph)
    for node in graph.nodes:
        if node.op in ("Add", "Sub") and any(name in flags for name in node.inputs):
            found.add(node.name)
    return found


def _is_mask(graph: Graph, name: str, computed: set[str]) -> bool:
    if name in graph.constants:
        array = graph.array(name)
        return bool(array.size and float(np.abs(array).max()) > MASKED)
    return name not in computed


def _computed(graph: Graph) -> set[str]:
    """Values that depend on a product or on rows of a table of floats."""
    found: set[str] = set()
    for node in graph.nodes:
        table = node.op == "Gather" and node.inputs[0] in graph.constants
        if node.op in PRODUCTS or table or found.intersection(node.inputs):
            found.update(out for out in node.outputs if out)
    return found


def _flags(graph: Graph) -> set[str]:
    """Float values computed of integers or truth values only, as masks are."""
    whole = {name for name in graph.inputs if _is_whole(graph, name)}
    made: set[str] = set()
    for node in graph.nodes:
        given = [name for name in node.inputs if name in graph.values]
        table = node.op == "Gather" and node.inputs[0] in graph.constants
        if not given or table:
            continue
        if all(name in whole or name in made for name in given):
            for out in node.outputs:
                if out:
                    (whole if _is_whole(graph, out) else made).add(out)
        elif node.op in LOGIC:
            whole.update(out for out in node.outputs if out)
    return made


def _is_whole(graph: Graph, name: str) -> bool:
    return graph.info(name).dtype.startswith(("int", "uint", "bool"))


def _statistics(graph: Graph) -> set[str]:
    """Nodes before a divisor, a root or a logarithm, as far as nothing else uses them."""
    found: set[str] = set()
    rest = [
        node.inputs[OPERATORS[node.op].exact_input or 0]
        for node in graph.nodes
        if node.op in _EXACT and not (node.op == "Pow" and _is_square(graph, node))
    ]
    while rest:
        name = rest.pop()
        maker = graph.producers.get(name)
        if maker is None or maker.name in found or maker.op not in _STATISTICS:
            continue
        takers = graph.consumers.get(name, ())
        alone = len(takers) == 1 or all(t.name in found or t.op in _EXACT for t in takers)
        if not alone or name in graph.outputs:
            continue
        found.add(maker.name)
        rest += [given for given in maker.inputs if given in graph.values]
    return found


def _features(graph: Graph) -> set[str]:
    """All nodes before a logarithm that has products behind it."""
    behind: set[str] = set()
    front = []
    for node in reversed(graph.nodes):
        takers = (t for out in node.outputs for t in graph.consumers.get(out, ()))
        if any(taker.op in PRODUCTS or taker.name in behind for taker in takers):
            behind.add(node.name)
            if node.op == "Log":
                front.append(node)
    found: set[str] = set()
    rest = [name for node in front for name in node.inputs]
    while rest:
        maker = graph.producers.get(rest.pop())
        if maker is not None and maker.name not in found:
            found.add(maker.name)
            rest += list(maker.inputs)
    return found


def _is_square(graph: Graph, node: Node) -> bool:
    """Whether the exponents of a Pow are 1 or more, which needs no relative precision."""
    exponent = graph.constants.get(node.inputs[1])
    if exponent is None:
        return False
    values = graph.array(node.inputs[1])
    return bool((values >= 1).all())
