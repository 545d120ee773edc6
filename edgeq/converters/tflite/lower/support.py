"""Which graphs can be lowered to a .tflite file, and which of their nodes compute on integers."""

from __future__ import annotations

import difflib
import math

from edgeq.converters.tflite.lower import conv, gather, linear, math_ops, resize, shape_ops
from edgeq.converters.tflite.lower.emitters import EMITTERS
from edgeq.converters.tflite.lower.refusals import operands
from edgeq.core.errors import UnsupportedError
from edgeq.formats.qparams import QuantParams
from edgeq.graph.ir import Graph, Node, QuantWeight
from edgeq.graph.operators import OPERATORS, PRODUCTS, Refusal

__all__ = ["EMITTERS", "MODULES", "check", "faults", "integer"]

MODULES = (conv, gather, linear, math_ops, resize, shape_ops)
"""The modules of emitters; importing them fills `EMITTERS`."""
_FACTOR = 100.0
"""The largest scale of an integer operator's inputs, in scales of its output."""
_MULTIPLIES = PRODUCTS | {"Mul"}


def integer(graph: Graph, node: Node, out: QuantParams) -> bool:
    """Whether a node computes on integers: its values are rounded, and LiteRT has a kernel.

    Args:
        graph: it is of.
        node: any.
        out: how its output is rounded.
    """
    check = EMITTERS[node.op].integer
    values = [name for name in node.inputs if name in graph.values]
    floats = [name for name in values if graph.info(name).dtype == "float32"]
    if check is None or not all(name in graph.quants for name in floats):
        return False
    return check(graph, node, out) and _near(graph, node, out)


def _near(graph: Graph, node: Node, out: QuantParams) -> bool:
    """Whether the factor from the inputs' scale to the output's is one that all kernels know.

    Past it LiteRT refuses to run, gives wrong numbers, or ends the process.
    """
    scales = [graph.quants[name].scale for name in node.inputs if name in graph.quants]
    for name in node.inputs:
        constant = graph.constants.get(name)
        if isinstance(constant, QuantWeight) and constant.bits != 32:
            scales.append(float(constant.scales.max()))
    factor = math.prod(scales) if node.op in _MULTIPLIES else max(scales, default=0.0)
    return factor < _FACTOR * out.scale


def faults(graph: Graph) -> list[str]:
    """What stands in the way of lowering a graph, a line for each node."""
    return [f"{node}: {why}" for node in graph.nodes if (why := _fault(graph, node))]


def _fault(graph: Graph, node: Node) -> str | None:
    row = OPERATORS.get(node.op)
    if row is None:
        near = ", ".join(difflib.get_close_matches(node.op, EMITTERS, n=3, cutoff=0.5))
        hint = f"; the nearest supported: {near}" if near else ""
        return f"no such operator is known{hint}"
    if isinstance(row.tflite, Refusal):
        return row.tflite.why
    emitter = EMITTERS[node.op]
    own = emitter.fault(graph, node) if emitter.fault else None
    return own or operands(graph, node, emitter)


def check(graph: Graph) -> None:
    """Refuse a graph that cannot be lowered.

    Raises:
        UnsupportedError: lists every offending node.
    """
    if lines := faults(graph):
        raise UnsupportedError(
            f"the graph {graph.name} cannot be lowered to TFLite because of {len(lines)} of its "
            "operators:\n  " + "\n  ".join(lines)
        )
