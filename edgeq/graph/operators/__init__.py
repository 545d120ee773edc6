"""The operators a canonical graph may hold: a row for each, and sets that the rows make.

    OPERATORS    name -> `Operator`
    LAYERS ...   sets of names, each defined here and nowhere else
    check_known  refuses a graph with any other operator, before any other work

Sets that serve one algorithm only stand beside it, made of these as far as they can be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from edgeq.core.errors import UnsupportedError
from edgeq.graph.ir import Graph, Node
from edgeq.graph.operators.operator import Integer, Operator, Refusal, Weight
from edgeq.graph.operators.table import ROWS, single

__all__ = [
    "ACTIVATIONS", "BOUNDED", "FLATTENS", "LAYERS", "LOGIC", "MATRICES", "MOVES", "OPERATORS",
    "POOLS", "PRODUCTS", "REDUCTIONS", "SHARED_PARAMS", "SOFTMAXES", "SPATIAL",
    "TAKES_ACTIVATION", "VIEWS", "WEIGHTED", "WINDOWS", "Integer", "Operator", "Refusal", "Weight",
    "channel_axis", "check_known", "faults", "is_depthwise", "named", "single", "weight_of",
]  # fmt: skip

OPERATORS: Mapping[str, Operator] = {row.name: row for row in ROWS}
"""Operator -> its row."""


def named(trait: Callable[[Operator], object]) -> frozenset[str]:
    """Names of the operators of whose row something is true.

    >>> sorted(named(lambda row: row.exact_input is not None))
    ['Div', 'Log', 'Pow', 'Sqrt']
    """
    return frozenset(name for name, row in OPERATORS.items() if trait(row))


LAYERS = named(lambda row: row.kind == "layer")
"""Products with a constant weight, and a bias behind it."""
PRODUCTS = LAYERS | named(lambda row: row.kind == "product")
"""Layers, and the product of two computed values."""
WEIGHTED = named(lambda row: row.weight)
"""Layers and tables: `Operator.weight` says where the weight is."""
MATRICES = WEIGHTED - named(lambda row: row.window)
"""Operators whose weight is a matrix, which may have a scale for each block of a row."""
POOLS = named(lambda row: row.kind == "pool")
REDUCTIONS = named(lambda row: row.kind == "reduction")
SOFTMAXES = named(lambda row: row.kind == "softmax")
LOGIC = named(lambda row: row.kind == "logic")
"""Operators that make truth values."""
VIEWS = named(lambda row: row.kind == "view")
"""Operators whose output has the elements of the input in the same order."""
FLATTENS = VIEWS - {"Unsqueeze"}
"""Views that may join axes."""
MOVES = named(lambda row: row.integer and row.integer.rule == "moves")
"""Operators that commute with rounding."""
SHARED_PARAMS = MOVES | named(lambda row: row.integer and row.integer.rule == "shares")
"""Operators whose inputs and outputs have the same scale and zero point."""
ACTIVATIONS = named(lambda row: row.integer and row.integer.is_activation)
"""Activations that are computed with the operator before them: Relu and Clip."""
TAKES_ACTIVATION = named(lambda row: row.integer and row.integer.takes_activation)
"""Operators that compute such an activation with their own result, where they are quantized."""
SPATIAL = named(lambda row: row.spatial)
"""Operators on images and sequences: channels are axis 1, and space is behind."""
WINDOWS = named(lambda row: row.window)
"""Operators with the attributes of a sliding window."""
BOUNDED = named(lambda row: row.bounded)
"""Operators whose results lie between -1 and 1, so that their error does not shrink with them."""

_FORMS: Mapping[str, str] = {
    "BatchNormalization": "it is known for inference only, with one output and with a scale, bias, "
    "mean and variance that are constants",
    "Celu": "it is known with an alpha above 0",
    "LpNormalization": "it is known with p 1 or 2",
    "RMSNormalization": "it is known with a negative axis, or a constant scale",
    "LayerNormalization": "it is known with one output",
    "Dropout": "it is known for inference only",
    "Upsample": "it is known up to opset 9; use Resize",
}
"""Operator that is rewritten while a graph is read -> the form it must have for that."""


def weight_of(node: Node) -> Weight:
    """Where the weight of a node of one of the `WEIGHTED` is."""
    weight = OPERATORS[node.op].weight
    assert weight is not None, f"{node} has no weight"
    return weight


def channel_axis(graph: Graph, layer: Node) -> int:
    """Axis of a layer's output that has the output channels of its weight, not negative."""
    axis = weight_of(layer).output
    assert axis is not None, f"{layer} looks up rows, which are no channels"
    return axis % len(graph.info(layer.output).shape)


def is_depthwise(graph: Graph, node: Node) -> bool:
    """Whether a node is a convolution with a group for each of its input channels."""
    if node.op not in LAYERS or not OPERATORS[node.op].window:
        return False
    return 1 < int(node.attrs.get("group", 1)) == graph.info(node.inputs[0]).shape[1]


def faults(graph: Graph) -> list[str]:
    """What stands between a graph and the canonical form, a line for each node."""
    lines = []
    for node in graph.nodes:
        row = OPERATORS.get(node.op)
        if row is None and node.op in _FORMS:
            lines.append(f"{node}: {_FORMS[node.op]}")
        elif row is None:
            lines.append(f"{node}: no such operator is known")
        elif fault := row.fault(graph, node):
            lines.append(f"{node}: {fault}")
    return lines


def check_known(graph: Graph) -> None:
    """Refuse a graph that is not canonical.

    Raises:
        UnsupportedError: lists every offending node.
    """
    if lines := faults(graph):
        raise UnsupportedError(
            f"the graph {graph.name} has {len(lines)} operators that edgeq does not support:\n  "
            + "\n  ".join(lines)
            + f"\n(supported operators: {', '.join(sorted(OPERATORS))})"
        )
