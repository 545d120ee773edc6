"""Which operators of the canonical graph can be lowered to a .tflite file, and which not."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from edgeq.converters.tflite.lower import conv, moves, ops
from edgeq.converters.tflite.lower import faults as reasons
from edgeq.converters.tflite.lower import gather as gathering
from edgeq.converters.tflite.lower import linear as products
from edgeq.converters.tflite.lower import resize as resizing
from edgeq.converters.tflite.lower.lowering import Lowering, Made, Out
from edgeq.core.errors import UnsupportedError
from edgeq.formats.qparams import QuantParams
from edgeq.graph.ir import Graph, Node, QuantWeight

SOFT = QuantParams(1 / 256, -128)
"""The only grid that the runtime's rounded Softmax and Sigmoid make."""
TANH = QuantParams(1 / 128, 0)
"""And its rounded Tanh."""
_FACTOR = 100.0
"""The largest step that an integer operator may take in, in steps of what it makes."""
_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Linear", "MatMul", "Mul"})

Fault = Callable[[Graph, Node], str | None]
Fits = Callable[[Graph, Node, QuantParams], bool]


@dataclass(frozen=True)
class Rule:
    """How one operator is lowered.

    Args:
        emit: makes it.
        rounded: whether a node of rounded values has an integer operator; none has if None.
        fault: why a node cannot be lowered, with the nearest that can; None if it can.
    """

    emit: Callable[[Lowering, Node, Out], Made | list[Made]]
    rounded: Fits | None = None
    fault: Fault | None = None


def _always(graph: Graph, node: Node, out: QuantParams) -> bool:
    return True


def _moved(graph: Graph, node: Node, out: QuantParams) -> bool:
    """Constants among what is moved have no grid of their own."""
    return node.inputs[0] in graph.quants


def _factors(graph: Graph, node: Node, out: QuantParams) -> bool:
    """Whether all constants are rounded to one scale."""
    for name in node.inputs:
        held = graph.constants.get(name)
        one_scale = isinstance(held, QuantWeight) and held.bits == 8 and held.axis is None
        if held is not None and not one_scale:
            return False
    return True


def _alike(graph: Graph, node: Node, out: QuantParams) -> bool:
    """Whether all inputs are on the output's grid, which the runtime wants of an extreme."""
    return all(graph.quants.get(name) == out for name in node.inputs)


def _same_grid(graph: Graph, node: Node, out: QuantParams) -> bool:
    return graph.quants.get(node.inputs[0]) == out


def _average(graph: Graph, node: Node, out: QuantParams) -> bool:
    counts, alike = conv.pool_counts(graph, node)
    area = int(np.prod(node.attrs["kernel_shape"]))
    return _same_grid(graph, node, out) and (alike or bool((counts == area).all()))


def _soft(graph: Graph, node: Node, out: QuantParams) -> bool:
    return out == SOFT


def _tanh(graph: Graph, node: Node, out: QuantParams) -> bool:
    return out == TANH


def _weighted(graph: Graph, node: Node, out: QuantParams) -> bool:
    held = graph.constants.get(node.inputs[1])
    channel = 1 if node.op == "ConvTranspose" else 0
    if not isinstance(held, QuantWeight) or held.block is not None:
        return False
    if held.bits == 32 or held.axis not in (None, channel):
        return False
    name = node.inputs[2] if len(node.inputs) > 2 else ""
    bias = graph.constants.get(name)
    return not name or (isinstance(bias, QuantWeight) and bias.bits == 32)


_FLOAT_UNARY = ("Sqrt", "Exp", "Log", "Neg", "Abs", "Floor", "Ceil", "Round", "Sin", "Cos", "Sign",
                "Not")  # fmt: skip
RULES: Mapping[str, Rule] = {
    "Conv": Rule(conv.conv, _weighted, reasons.conv),
    "ConvTranspose": Rule(conv.conv_transpose, _weighted, reasons.conv_transpose),
    "Linear": Rule(products.linear, _weighted, reasons.linear),
    "MatMul": Rule(products.matmul, _factors, reasons.matmul),
    "Gather": Rule(gathering.gather, _moved, reasons.gather),
    "MaxPool": Rule(conv.max_pool, _always, reasons.pool),
    "AveragePool": Rule(conv.average_pool, _average, reasons.pool),
    "GlobalAveragePool": Rule(ops.reduce, _always),
    "GlobalMaxPool": Rule(ops.reduce, _always),
    "ReduceMean": Rule(ops.reduce, _always),
    **dict.fromkeys(("ReduceMax", "ReduceMin"), Rule(ops.reduce, _always)),
    **dict.fromkeys(("ReduceSum", "ReduceL1", "ReduceL2", "ReduceProd"), Rule(ops.reduce)),
    **dict.fromkeys(("ArgMax", "ArgMin"), Rule(ops.arg, None, reasons.arg)),
    **dict.fromkeys(("Add", "Sub", "Mul"), Rule(ops.binary, _factors)),
    **dict.fromkeys(("Max", "Min"), Rule(ops.binary, _alike)),
    **dict.fromkeys(
        ("Div", "Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual", "And", "Or"),
        Rule(ops.binary),
    ),
    "Pow": Rule(ops.power),
    **dict.fromkeys(_FLOAT_UNARY, Rule(ops.unary)),
    "HardSwish": Rule(ops.unary, _always),
    "Sigmoid": Rule(ops.unary, _soft),
    "Tanh": Rule(ops.unary, _tanh),
    "Erf": Rule(ops.erf),
    "Where": Rule(ops.where),
    "Cast": Rule(moves.cast, None, reasons.cast),
    "Relu": Rule(ops.clamp, _always),
    "Clip": Rule(ops.clamp, _always),
    "LeakyRelu": Rule(ops.leaky, _always),
    "PRelu": Rule(ops.prelu, _factors),
    "Elu": Rule(ops.elu),
    "Softplus": Rule(ops.softplus),
    "HardSigmoid": Rule(ops.hard_sigmoid),
    "Gelu": Rule(ops.gelu, _always),
    "Softmax": Rule(ops.softmax, _soft),
    "LogSoftmax": Rule(ops.softmax),
    "LayerNormalization": Rule(ops.layer_norm),
    "InstanceNormalization": Rule(ops.layer_norm),
    **dict.fromkeys(
        ("Reshape", "Flatten", "Squeeze", "Unsqueeze"), Rule(moves.reshape, _always)
    ),
    "Transpose": Rule(moves.transpose, _always),
    "Identity": Rule(moves.identity, _always),
    "Concat": Rule(moves.concat, _always),
    "Split": Rule(moves.split, _always),
    "Slice": Rule(moves.slice_, _always),
    "Pad": Rule(moves.pad, _always, reasons.pad),
    "Expand": Rule(moves.expand, _moved),
    "Tile": Rule(moves.tile, _always),
    "CumSum": Rule(moves.cumulated),
    "Resize": Rule(resizing.resize, _always, resizing.fault),
    **dict.fromkeys(
        ("DepthToSpace", "SpaceToDepth"), Rule(moves.depth_to_space, _always, reasons.image)
    ),
}  # fmt: skip
"""Operator -> how it is lowered."""


def integer(graph: Graph, node: Node, out: QuantParams) -> bool:
    """Whether a node computes in integers: its values are rounded, and an operator does that."""
    rule = RULES[node.op]
    values = [name for name in node.inputs if name in graph.values]
    floats = [name for name in values if graph.info(name).dtype == "float32"]
    if rule.rounded is None or not all(name in graph.quants for name in floats):
        return False
    return rule.rounded(graph, node, out) and _near(graph, node, out)


def _near(graph: Graph, node: Node, out: QuantParams) -> bool:
    """Whether the factor from what a node takes to what it makes is one that all kernels know.

    Past it LiteRT refuses to run, gives wrong numbers, or ends the process.
    """
    scales = [graph.quants[name].scale for name in node.inputs if name in graph.quants]
    for name in node.inputs:
        held = graph.constants.get(name)
        if isinstance(held, QuantWeight) and held.bits != 32:
            scales.append(float(held.scales.max()))
    factor = math.prod(scales) if node.op in _PRODUCTS else max(scales, default=0.0)
    return factor < _FACTOR * out.scale


def faults(graph: Graph) -> list[str]:
    """What stands in the way of lowering a graph, a line for each node."""
    found = []
    for node in graph.nodes:
        rule = RULES.get(node.op)
        if rule is None:
            near = ", ".join(difflib.get_close_matches(node.op, RULES, n=3, cutoff=0.5))
            hint = f"; the nearest supported: {near}" if near else ""
            found.append(f"{node}: no such operator is known{hint}")
        elif why := (rule.fault(graph, node) if rule.fault else None) or reasons.plain(graph, node):
            found.append(f"{node}: {why}")
    return found


def check(graph: Graph) -> None:
    """Refuse a graph that cannot be lowered.

    Raises:
        UnsupportedError: lists every offending node.
    """
    if found := faults(graph):
        raise UnsupportedError(
            f"the graph {graph.name} cannot be lowered to TFLite because of {len(found)} of its "
            "operators:\n  " + "\n  ".join(found)
        )
