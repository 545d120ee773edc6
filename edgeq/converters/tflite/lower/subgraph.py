"""Adding operators to the graph of a .tflite file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.tflite.file import SharedTable, TfliteFile
from edgeq.converters.tflite.lower.axis_order import Order, Shape, moves, placed, same
from edgeq.converters.tflite.operators import SubgraphWriter, Value
from edgeq.converters.tflite.versions import version
from edgeq.formats.qparams import QuantParams
from edgeq.graph.ir import Graph, Node

SIGNATURE = "serving_default"
"""What callers run a file's graph by."""


class Operators:
    """Adds operators to the file's graph.

    Args:
        graph: what is lowered.
        file: what it is put into.
    """

    def __init__(self, graph: Graph, file: TfliteFile) -> None:
        self.graph = graph
        self.file = file
        self.g = SubgraphWriter(file, SIGNATURE, lambda _: self.short("c"))
        self.node = Node("", graph.name, (), ())
        """What is being lowered."""
        self.made_by: list[Node] = []
        """For each operator of the file, in order: the node it was made for."""
        self._names = {*graph.values, *graph.constants}
        self._counts: dict[str, int] = {}
        self._quants: dict[int, QuantParams] = {}

    def op(
        self, code: str, inputs: Sequence[Value | None], shape: Sequence[int] | None = None, *,
        dtype: str | None = None, quant: QuantParams | None = None, like: bool = False,
        **settings: Any,
    ) -> Value:  # fmt: skip
        """Add an operator of the file.

        Args:
            code: the schema's name.
            inputs: what it takes; None for one left out.
            shape: of what it makes; the first input's if None.
            dtype: of what it makes; the first input's if None.
            quant: how it is rounded.
            like: it is rounded as the first input is.
            settings: by the schema's names.
        """
        first = inputs[0]
        assert first is not None
        kind = "int8" if quant else dtype or first.dtype
        scales = first.scales if like else self.params_table(quant)
        out_shape = first.shape if shape is None else tuple(shape)
        self.made_by.append(self.node)
        return self.g.op(
            code, inputs, out_shape, kind, options_of(code), version(code, inputs, kind, settings),
            self.short("t"), scales, **settings,
        )  # fmt: skip

    def cast(self, value: Value, dtype: str) -> Value:
        """Cast a tensor."""
        types = self.file.schema.TensorType
        return self.op(
            "CAST", [value], dtype=dtype, inDataType=getattr(types, value.dtype.upper()),
            outDataType=getattr(types, dtype.upper()),
        )  # fmt: skip

    def real(self, value: Value) -> Value:
        """Cast a tensor to float32."""
        return self.cast(value, "float32")

    def params_table(self, quant: QuantParams | None) -> SharedTable | None:
        """Return the table of scale and zero point that marks rounded tensors."""
        if quant is None:
            return None
        table = self.file.per_tensor(quant.scale, quant.zero_point)
        self._quants[id(table)] = quant
        return table

    def quant_of(self, value: Value) -> QuantParams:
        """Return the scale and zero point of a tensor."""
        return self._quants[id(value.scales)]

    def moved(self, value: Value, shape: Shape, have: Order, want: Order) -> Value:
        """Bring a tensor from one order of axes to another."""
        if have == want:
            return value
        if same(shape, have, want):
            return self.reshaped(value, placed(shape, want))
        order = moves(have, want)
        return self.op(
            "TRANSPOSE", [value, self.g.constant(list(order))], placed(shape, want), like=True
        )

    def reshaped(self, value: Value, shape: Sequence[int]) -> Value:
        """Reshape a tensor."""
        if value.shape == tuple(shape):
            return value
        want = self.g.constant(np.array(shape, np.int32))
        return self.op("RESHAPE", [value, want], shape, like=True, newShape=list(shape))

    def ints(self, numbers: Sequence[int] | NDArray[Any]) -> Value:
        """Make a constant list of int32."""
        return self.g.constant(np.asarray(numbers, np.int32))

    def short(self, kind: str) -> str:
        """Make a short unique name for a tensor that is no value of the source.

        In a small network names are a part of the file that counts; values keep theirs.
        """
        while True:
            self._counts[kind] = n = self._counts.get(kind, -1) + 1
            if f"{kind}{n}" not in self._names:
                return f"{kind}{n}"


_OPTIONS = {
    "CONV_2D": "Conv2DOptions", "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "TRANSPOSE_CONV": "TransposeConvOptions", "FULLY_CONNECTED": "FullyConnectedOptions",
    "BATCH_MATMUL": "BatchMatMulOptions", "MAX_POOL_2D": "Pool2DOptions",
    "AVERAGE_POOL_2D": "Pool2DOptions", "MAXIMUM": "MaximumMinimumOptions",
    "MINIMUM": "MaximumMinimumOptions", "CONCATENATION": "ConcatenationOptions",
    "DEPTH_TO_SPACE": "DepthToSpaceOptions", "SPACE_TO_DEPTH": "SpaceToDepthOptions",
    "RESIZE_BILINEAR": "ResizeBilinearOptions", "LEAKY_RELU": "LeakyReluOptions",
    "RESIZE_NEAREST_NEIGHBOR": "ResizeNearestNeighborOptions", "PADV2": "PadV2Options",
    "LOG_SOFTMAX": "LogSoftmaxOptions", "STRIDED_SLICE": "StridedSliceOptions",
    "ARG_MAX": "ArgMaxOptions", "ARG_MIN": "ArgMinOptions", "MIRROR_PAD": "MirrorPadOptions",
    "SELECT_V2": "SelectV2Options", "BROADCAST_TO": "BroadcastToOptions",
    "GREATER_EQUAL": "GreaterEqualOptions", "LESS_EQUAL": "LessEqualOptions",
    "LOGICAL_AND": "LogicalAndOptions", "LOGICAL_OR": "LogicalOrOptions",
    "LOGICAL_NOT": "LogicalNotOptions",
    **dict.fromkeys(("MEAN", "SUM", "REDUCE_MAX", "REDUCE_MIN", "REDUCE_PROD"), "ReducerOptions"),
    **dict.fromkeys(
        ("SQRT", "RSQRT", "LOGISTIC", "TANH", "LOG", "RELU", "RELU6", "RELU_N1_TO_1", "ELU",
         "FLOOR", "CEIL", "ROUND", "SIN", "PRELU", "EMBEDDING_LOOKUP"), ""),
}  # fmt: skip


def options_of(code: str) -> str:
    """The schema's name of an operator's options; "" if it has none."""
    return _OPTIONS.get(code, "".join(word.capitalize() for word in code.split("_")) + "Options")
