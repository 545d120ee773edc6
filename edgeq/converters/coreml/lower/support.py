"""Which graphs can be built as Core ML programs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edgeq.converters.coreml.lower import layers, math, resize, shape, weights
from edgeq.converters.coreml.lower.build import MAX_RANK
from edgeq.converters.coreml.lower.emitters import EMITTERS
from edgeq.core.errors import unknown
from edgeq.graph.ir import Graph, Node, QuantWeight
from edgeq.graph.operators import OPERATORS, Refusal

__all__ = ["EMITTERS", "MODULES", "faults"]

MODULES = (layers, math, resize, shape)
"""The modules of emitters; importing them fills `EMITTERS`."""
_TYPES = ("float32", "int64", "int32", "bool")


def faults(graph: Graph, target: str) -> list[str]:
    """What stands in the way of building a graph, a line for each value or node.

    Args:
        graph: float or quantized.
        target: "ios16", "ios17" or "ios18".
    """
    return [*_values(graph, target), *_nodes(graph, target)]


def _values(graph: Graph, target: str) -> Iterator[str]:
    if graph.quants and target == "ios16":
        yield (
            f"{len(graph.quants)} values rounded to 8 bits, which ios16 has no operators for; "
            "nearest: target_os ios17, or weights only"
        )
    for name in (*graph.inputs, *(out for node in graph.nodes for out in node.outputs if out)):
        info, node = graph.info(name), graph.producers.get(name)
        what = f"{node}: {name!r}" if node else f"input {name!r}"
        if len(info.shape) > MAX_RANK and not shape.passes(graph, name):
            yield (
                f"{what} has {len(info.shape)} dimensions; Core ML has at most {MAX_RANK}, those "
                "of 1 not counted between Reshape and Transpose; nearest: the same in two steps"
            )
        if 0 in info.shape:
            yield f"{what} has no elements, {list(info.shape)}; nearest: a model without it"
        if info.dtype not in _TYPES:
            yield f"{what} is {info.dtype}; nearest: {', '.join(_TYPES)}"


def _nodes(graph: Graph, target: str) -> Iterator[str]:
    for node in graph.nodes:
        row = OPERATORS.get(node.op)
        if row is None:
            yield f"{node}: {unknown('operator', node.op, EMITTERS)}"
        elif isinstance(row.coreml, Refusal):
            yield f"{node}: {row.coreml.why}"
        else:
            if why := EMITTERS[node.op].refuse(graph, node):
                yield f"{node}: {why}"
            yield from (f"{node}: {why}" for why in _constants(graph, node, target))


def _constants(graph: Graph, node: Node, target: str) -> Iterator[str]:
    read_by_emitter = OPERATORS[node.op].constants
    for place, name in enumerate(node.inputs):
        constant = graph.constants.get(name)
        if isinstance(constant, QuantWeight):
            if why := weights.refusal(graph, node, name, target):
                yield why
        elif constant is not None and constant.dtype.kind in "iu" and place not in read_by_emitter:
            limit = np.iinfo(np.int32)
            if constant.size and not limit.min <= constant.min() <= constant.max() <= limit.max:
                yield f"{name!r} holds numbers past int32; nearest: smaller ones"
