"""What edgeq knows of an operator: one `Operator` is one row of the table.

A row says everything about an operator that is not code: its inputs and attributes, how it is
computed on integers, what quantization may assume of it, and which operators of TFLite and of
Core ML stand for it. Emitters are functions of each target (``converters/tflite/lower``,
``converters/coreml/lower``), registered under the operator's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from edgeq.formats.qparams import QuantParams
from edgeq.graph.ir import Graph, Node

Kind = Literal[
    "layer", "product", "lookup", "pool", "reduction", "scan", "arithmetic", "function", "logic",
    "activation", "softmax", "normalization", "view", "move", "repeat", "resize",
]  # fmt: skip
"""The section of the table that an operator is in; sets such as `LAYERS` are made of kinds."""
Rule = Literal["weights", "product", "moves", "shares", "rescales"]
ALL = 1 << 30


@dataclass(frozen=True)
class Weight:
    """The constant that an operator multiplies or looks up.

    Args:
        input: place among the inputs.
        channels: axis of the weight that becomes the channels (or rows) of the output.
        output: axis of those channels in the output; None for a table.
    """

    input: int
    channels: int
    output: int | None = None


@dataclass(frozen=True)
class Integer:
    """How an operator is computed on 8-bit integers.

    Args:
        rule: "weights" multiplies with packed weights; "product" multiplies two computed values;
            "moves" copies integers, so that it may stand before or after rounding; "shares"
            selects or averages, so that inputs and output have the same scale and zero point;
            "rescales" gives its output a scale and zero point of its own.
        constant: what a constant input is: a "term" or a "factor" may be rounded to 8 bits;
            None if the operator does not compute on integers with a constant input.
        near_output: stays integer behind the last product of the graph, where scores and boxes
            are made: it adds no error that grows.
        takes_activation: a Relu or Clip behind it is computed with it, and the value between is
            not rounded.
        is_activation: such a Relu or Clip.
        output: the scale and zero point that every runtime uses for its output; None if they
            follow from the values.
        keeps_range: whether the output of a node stays within the range of its input, for "shares".
    """

    rule: Rule
    constant: Literal["term", "factor"] | None = None
    near_output: bool = False
    takes_activation: bool = False
    is_activation: bool = False
    output: QuantParams | None = None
    keeps_range: Callable[[Graph, Node], bool] | None = None


@dataclass(frozen=True)
class Refusal:
    """Why a target has no emitter for an operator.

    Args:
        why: what is missing, and the nearest form that is supported.
    """

    why: str


@dataclass(frozen=True)
class Operator:
    """What edgeq knows of the operator of one ONNX name, in its form of opset 21.

    Args:
        name: ONNX's, or "Linear".
        kind: section of the table.
        tflite: names in TFLite's schema of the operators it becomes, separated by spaces, the main
            one first; or why it becomes none.
        coreml: names in Core ML's MIL, likewise.
        values: how many of the first inputs hold values; those behind are settings or indices,
            which quantization leaves alone.
        constants: place of an input that must be a constant -> its name.
        defaults: attribute -> its value where it is left out.
        allowed: attribute -> values that are supported; all values of other attributes are.
        ignored: attributes without a meaning in a canonical graph.
        outputs: how many outputs are supported.
        since: the first opset whose form of the operator is read.
        weight: the constant it multiplies or looks up; None for other operators.
        integer: how it is computed on integers; None if it always computes in float.
        exact_input: place of the input whose relative error decides the result, so that 8 bits are
            not enough for it; None if there is none.
        homogeneous: f(s x) = s f(x) for every s > 0, element by element or within a channel.
        spatial: axis 1 of its input holds channels, and the axes behind are space.
        window: its attributes are those of a sliding window: strides, dilations and pads.
        bounded: its results lie between -1 and 1.
        probabilities: it makes probabilities (or their logarithms) of scores.
    """

    name: str
    kind: Kind
    tflite: str | Refusal
    coreml: str | Refusal
    values: int = ALL
    constants: Mapping[int, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    allowed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    outputs: int = 1
    since: int = 1
    weight: Weight | None = None
    integer: Integer | None = None
    exact_input: int | None = None
    homogeneous: bool = False
    spatial: bool = False
    window: bool = False
    bounded: bool = False
    probabilities: bool = False

    def fault(self, graph: Graph, node: Node) -> str | None:
        """What of a node is outside the row, as part of a sentence; None if nothing is."""
        for place, what in self.constants.items():
            name = node.inputs[place] if place < len(node.inputs) else ""
            if name and name not in graph.constants:
                return f"its {what} input is computed; it must be a constant"
        for key, values in self.allowed.items():
            if key in node.attrs and node.attrs[key] not in values:
                words = " or ".join(repr(value) for value in values)
                return f"its {key} is {node.attrs[key]!r}; it must be {words}"
        for place, name in enumerate(node.outputs):
            if name and place >= self.outputs:
                return f"its output number {place + 1} is used; it may have {self.outputs}"
        return None
