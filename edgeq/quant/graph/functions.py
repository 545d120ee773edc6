"""Functions that are the only consumer of a rounded value.

The rounding of such a value should minimize the error of the function's result. A hard swish, for
example, maps all inputs below -3 to zero, so that an input range of -160 to 150 would spend half of
its levels on values that make no difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.graph.ir import Graph, Node
from edgeq.quant.histogram import Function

Array = NDArray[Any]


def _sigmoid(x: Array) -> Array:
    made: Array = 0.5 * (1 + np.tanh(0.5 * x))
    return made


def _gelu(x: Array) -> Array:
    """Gelu by its tanh approximation, which is off by at most 5e-4: 1/40 of a step of 8 bits over
    -3 to 3.
    """
    return x * _sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))


def _silu(x: Array) -> Array:
    return x * _sigmoid(x)


_FUNCTIONS: Mapping[str, Function] = {
    "Sigmoid": _sigmoid,
    "Tanh": np.tanh,
    "HardSwish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "Gelu": _gelu,
    "Relu": lambda x: np.maximum(x, 0),
}
"""Operators with one input that map a range of values to nearly the same result."""


def functions_behind(graph: Graph, groups: Mapping[str, str]) -> dict[str, Function]:
    """Find the values whose only consumer is a function, also after they were only moved.

    Args:
        graph: the float graph.
        groups: rounded value -> the first of the values that share its scale and zero point.

    Returns:
        value -> the function.
    """
    members: dict[str, list[str]] = {}
    for value, group in groups.items():
        members.setdefault(group, []).append(value)
    found: dict[str, Function] = {}
    for values in members.values():
        function = _function(graph, values)
        if function is not None:
            found |= dict.fromkeys(values, function)
    return found


def _function(graph: Graph, values: Iterable[str]) -> Function | None:
    values = set(values)
    if values & set(graph.outputs):
        return None
    takers = {
        node.name: node
        for value in values
        for node in graph.consumers.get(value, ())
        if not values.intersection(node.outputs)
    }
    alone = [node for node in takers.values() if node.op in _FUNCTIONS]
    if len({node.op for node in alone}) != 1:
        return None
    if len(alone) == len(takers):
        return _FUNCTIONS[alone[0].op]
    gated = all(_is_silu(graph, node) for node in alone) and len(takers) == 2 * len(alone)
    return _silu if gated else None


def _is_silu(graph: Graph, node: Node) -> bool:
    """Whether the only consumer of a Sigmoid multiplies it with the Sigmoid's input."""
    taker = graph.only_consumer(node.output) if node.op == "Sigmoid" else None
    return (
        taker is not None
        and taker.op == "Mul"
        and set(taker.inputs) == {node.inputs[0], node.output}
    )
