"""State of lowering a graph to a .tflite file: values, their orders of axes and their types.

The file may hold a value several times: rounded and as float32, and in several orders of its axes.
A form that an operator needs is computed once from another one, by QUANTIZE, DEQUANTIZE,
TRANSPOSE, or RESHAPE where only axes of one element move.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgeq.converters.tflite.file import TfliteFile
from edgeq.converters.tflite.lower.axis_order import Order, Shape, channels_last, natural
from edgeq.converters.tflite.lower.constants import Constants
from edgeq.converters.tflite.operators import Value
from edgeq.formats.qparams import QuantParams
from edgeq.graph.ir import Graph, QuantWeight
from edgeq.graph.operators import SPATIAL

Made = tuple[Value, Order]
"""A tensor, and the order of its value's axes in it."""
_FUSED = {(0.0, math.inf): "RELU", (0.0, 6.0): "RELU6", (-1.0, 1.0): "RELU_N1_TO_1"}


@dataclass(frozen=True)
class LoweringOptions:
    """How a graph is lowered.

    Args:
        layout: of images that go in and out: "nhwc", or "nchw" as in the source.
        io: type of the inputs and outputs: "float32", or "int8" for those that are rounded.
        compute: of operators with integer weights and float values: "int8" rounds the values as
            it runs, "float" takes the weights back to float, and "auto" does what the graph says:
            values are rounded as it runs only where its activations are "dynamic".
        int4: weights of 4 bits with a scale for each row or channel are "packed", two to a byte,
            or "bytes": larger, but LiteRT's fastest kernels read them.
    """

    layout: str = "nhwc"
    io: str = "float32"
    compute: str = "auto"
    int4: str = "packed"


@dataclass
class Out:
    """The output that an emitter has to make.

    Args:
        name: the value, after the activation that is fused into the node.
        quant: how it is rounded, if the node computes in integers.
        low, high: bounds of an activation that no operator has applied yet.
    """

    name: str
    quant: QuantParams | None = None
    low: float = -math.inf
    high: float = math.inf

    @property
    def rounded(self) -> bool:
        """Whether the node computes on integers."""
        return self.quant is not None


class TfliteLowering(Constants):
    """Lowers a graph into a file.

    Args:
        graph: what is lowered.
        file: what it is put into.
        settings: how.
    """

    def __init__(self, graph: Graph, file: TfliteFile, settings: LoweringOptions) -> None:
        super().__init__(graph, file)
        self.settings = settings
        self.rounded: dict[str, Value] = {}
        """Value of the graph -> the tensor with its integers."""
        self.columns: dict[str, tuple[Shape, Order]] = {}
        """Flattened value -> the axes [C, H, W] of its columns, and their order in the file."""
        self.ended: dict[tuple[int, QuantParams], tuple[Value, Value]] = {}
        """Tensor's id and parameters -> it, and it with the lowest and highest value as columns."""
        self.hybrid = False
        """Whether some operator rounds float values as it runs."""
        self._held: dict[str, dict[tuple[bool, Order], Value]] = {}
        self._placed: set[int] = set()
        self.images = self._images()

    def _images(self) -> set[str]:
        """Values that reach operators with channels last, directly or through others."""
        images: set[str] = set()
        for node in reversed(self.graph.nodes):
            if node.op in SPATIAL:
                images.add(node.inputs[0])
            elif node.op != "Transpose" and images.intersection(node.outputs):
                rank = len(self.graph.info(node.output).shape)
                inputs = (name for name in node.inputs if name in self.graph.values)
                images.update(n for n in inputs if len(self.graph.info(n).shape) == rank)
        return images

    @property
    def dynamic(self) -> bool:
        """Whether operators with integer weights may round float values as they run."""
        if self.settings.compute == "auto":
            return self.graph.meta.get("edgeq.activations") == "dynamic"
        return self.settings.compute == "int8"

    def shape(self, name: str) -> Shape:
        """Shape of a value or constant in the source."""
        return self.graph.info(name).shape

    def put(self, name: str, value: Value, order: Order) -> None:
        """Register a tensor of a value."""
        self._held.setdefault(name, {})[value.scales is not None, order] = value

    def home(self, name: str) -> Order:
        """The order of a value's first tensor."""
        return next(iter(self._held[name]))[1]

    def held(self, name: str, order: Order, rounded: bool) -> bool:
        """Whether the file has a tensor of a value in this form."""
        return (rounded, order) in self._held[name]

    def get(self, name: str, order: Order | None = None, rounded: bool = False) -> Value:
        """Return a value in an order, rounded or in float."""
        forms = self._held[name]
        order = self.home(name) if order is None else order
        if (rounded, order) not in forms:
            alike = [(have, value) for (kind, have), value in forms.items() if kind == rounded]
            if alike:
                tensor = self.moved(alike[0][1], self.shape(name), alike[0][0], order)
            else:
                tensor = self.op("DEQUANTIZE", [self.get(name, order, True)], dtype="float32")
            forms[rounded, order] = tensor
        return forms[rounded, order]

    def operand(self, name: str, rank: int, order: Order, rounded: bool = False) -> Value:
        """Return a value or constant to be broadcast with others of a rank, in their order."""
        if name in self.graph.constants:
            return self.constant(name, rank, order, rounded)
        shape = self.shape(name)
        if len(shape) == rank:
            return self.get(name, order, rounded)
        value = self.get(name, natural(len(shape)), rounded)
        wide = (1,) * (rank - len(shape)) + shape
        return self.moved(self.reshaped(value, wide), wide, natural(rank), order)

    def order_of(self, names: Sequence[str], rank: int, out: str) -> Order:
        """Choose the order in which an elementwise operator takes its inputs."""
        last = channels_last(rank)
        known = [self.home(n) for n in names if n in self._held and len(self.shape(n)) == rank]
        if not known or last in known or (out in self.images and natural(rank) in known):
            return last if out in self.images or last in known else natural(rank)
        return known[0]

    def fused(self, out: Out) -> int:
        """Mark the activation as fused into the operator; returns the schema's number of it."""
        kinds = self.file.schema.ActivationFunctionType
        name = _FUSED.get((out.low, out.high))
        if name is None:
            return int(kinds.NONE)
        out.low, out.high = -math.inf, math.inf
        return int(getattr(kinds, name))

    def finish(self, out: Out, value: Value, order: Order) -> None:
        """Register a node's output, rounded as the graph says and limited by its activation."""
        quant = self.graph.quants.get(out.name)
        rounded = value.scales is not None
        if quant and rounded and value.scales is not self.params_table(quant):
            value = self.requantized(value, quant)
        value = self.clamped(value, out, quant if rounded else None)
        if quant and not rounded:
            value = self.op("QUANTIZE", [value], quant=quant)
        if id(value) not in self._placed:
            self._placed.add(id(value))
            self.g.rename(value, out.name)
        if quant:
            self.rounded[out.name] = value
        self.put(out.name, value, order)

    def requantized(self, value: Value, quant: QuantParams) -> Value:
        """Requantize a tensor to another scale and zero point.

        A kernel of QUANTIZE multiplies integers by a factor of 8 fractional bits and gives another
        level in some places; MUL by one is exact.
        """
        one = QuantWeight(np.ones((), np.int8), np.ones((), np.float32), 8)
        return self.op("MUL", [value, self.integers(self.short("w"), one, "int8")], quant=quant)

    def clamped(self, value: Value, out: Out, quant: QuantParams | None = None) -> Value:
        """Limit a tensor to its bounds; of a rounded one, its integers, which is exact."""
        kind = _FUSED.get((out.low, out.high))
        if kind and quant is None and value.dtype == "float32":
            out.low, out.high = -math.inf, math.inf
            return self.op(kind, [value])
        for code, bound, end in (("MAXIMUM", out.low, -128), ("MINIMUM", out.high, 127)):
            if not math.isfinite(bound):
                continue
            if quant is None:
                limit = self.g.constant(np.array(bound, value.dtype))
                value = self.op(code, [value, limit])
            elif (level := quant.quantize(np.array(bound, np.float32))) != end:
                buffer = self.file.constant(level)
                limit = Value(self.short("c"), (), "int8", buffer, value.scales)
                value = self.op(code, [value, limit], like=True)
        out.low, out.high = -math.inf, math.inf
        return value
