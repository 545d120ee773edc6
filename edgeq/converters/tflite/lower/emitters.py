"""The table of emitters: for each operator of a graph, the function that adds it to a .tflite file.

A function registers itself under the operators that it writes, with all that is particular to
LiteRT's kernels of them:

    @emits("Add", "Sub", "Mul", integer=one_scale, activation=True)
    def binary(low, node, out): ...

The names of TFLite's operators stand in the operators' rows (`edgeq.graph.operators`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgeq.converters.tflite.lower.lowering import Made, Out, TfliteLowering
from edgeq.formats.qparams import QuantParams
from edgeq.graph.ir import Graph, Node, QuantWeight
from edgeq.graph.operators import OPERATORS, weight_of

Emit = Callable[[TfliteLowering, Node, Out], Made | list[Made]]
Fault = Callable[[Graph, Node], str | None]
"""Why a node cannot be lowered, with the nearest form that can be; None if it can."""
IntegerCheck = Callable[[Graph, Node, QuantParams], bool]
"""Whether LiteRT computes a node with rounded inputs, whose output has these parameters, on
integers."""
MAX_RANK = 5
"""The most axes that nearly all of LiteRT's kernels take."""


@dataclass(frozen=True)
class TfliteEmitter:
    """How one operator is written to a .tflite file.

    Args:
        emit: adds it to the file.
        integer: whether a node whose values are rounded computes on integers; it never does if
            None.
        fault: why a node cannot be lowered.
        activation: it takes a Relu or Clip behind it into itself, or clamps integers for it.
        whole_numbers: it takes values of int8 and uint8 as the numbers they are; LiteRT takes
            those of other operators as quantized ones.
        lacks: types of values for which LiteRT has no kernel of the operator.
        max_rank: the most axes of its values.
    """

    emit: Emit
    integer: IntegerCheck | None = None
    fault: Fault | None = None
    activation: bool = False
    whole_numbers: bool = False
    lacks: tuple[str, ...] = ()
    max_rank: int = MAX_RANK


EMITTERS: dict[str, TfliteEmitter] = {}
"""Operator -> how it is written."""


def emits(
    *operators: str,
    integer: IntegerCheck | None = None,
    fault: Fault | None = None,
    activation: bool = False,
    whole_numbers: bool = False,
    lacks: tuple[str, ...] = (),
    max_rank: int = MAX_RANK,
) -> Callable[[Emit], Emit]:
    """Register a function as the emitter of some operators; see `TfliteEmitter`."""

    def register(emit: Emit) -> Emit:
        for name in operators:
            assert name not in EMITTERS, name
            EMITTERS[name] = TfliteEmitter(
                emit, integer, fault, activation, whole_numbers, lacks, max_rank
            )
        return emit

    return register


def code_of(node: Node) -> str:
    """TFLite's name of the main operator that a node becomes."""
    names = OPERATORS[node.op].tflite
    assert isinstance(names, str)
    return names.split()[0]


# --- integer checks ---------------------------------------------------------------------------


def always(graph: Graph, node: Node, out: QuantParams) -> bool:
    """LiteRT has integer kernels for all scales and zero points."""
    return True


def computed(graph: Graph, node: Node, out: QuantParams) -> bool:
    """Whether the values are computed: constants among them have no scale of their own."""
    return node.inputs[0] in graph.quants


def one_scale(graph: Graph, node: Node, out: QuantParams) -> bool:
    """Whether all constants are rounded to 8 bits with one scale."""
    for name in node.inputs:
        constant = graph.constants.get(name)
        if constant is None:
            continue
        if not isinstance(constant, QuantWeight) or constant.bits != 8 or constant.axis is not None:
            return False
    return True


def shared_params(graph: Graph, node: Node, out: QuantParams) -> bool:
    """Whether all inputs have the scale and zero point of the output."""
    return all(graph.quants.get(name) == out for name in node.inputs)


def fixed_params(graph: Graph, node: Node, out: QuantParams) -> bool:
    """Whether the output has the only scale and zero point that the kernel makes."""
    rule = OPERATORS[node.op].integer
    return rule is not None and out == rule.output


def integer_weight(graph: Graph, node: Node, out: QuantParams) -> bool:
    """Whether weight and bias are integers, with one scale or one for each output channel."""
    weight = weight_of(node)
    constant = graph.constants.get(node.inputs[weight.input])
    if not isinstance(constant, QuantWeight) or constant.block is not None:
        return False
    if constant.bits == 32 or constant.axis not in (None, weight.channels):
        return False
    name = node.inputs[2] if len(node.inputs) > 2 else ""
    bias = graph.constants.get(name)
    return not name or (isinstance(bias, QuantWeight) and bias.bits == 32)
