"""Constants of a graph as tensors of a .tflite file, with a description for reading them back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.tflite.file import TfliteFile
from edgeq.converters.tflite.lower.axis_order import Order, Shape, natural, row_columns
from edgeq.converters.tflite.lower.subgraph import Operators
from edgeq.converters.tflite.operators import Value
from edgeq.graph.ir import Graph, QuantWeight


class Constants(Operators):
    """Adds constants to the file's graph.

    Args:
        graph: what is lowered.
        file: what it is put into.
    """

    def __init__(self, graph: Graph, file: TfliteFile) -> None:
        super().__init__(graph, file)
        self.weights: dict[str, dict[str, Any]] = {}
        """Quantized constant -> how its tensor was made of it, for those who read it back; what
        is as in the constant itself is left out."""
        self._tensors: dict[Any, Value] = {}

    def constant(self, name: str, rank: int, order: Order, rounded: bool = False) -> Value:
        """Return a constant with axes of one added up to a rank, in an order."""
        constant = self.graph.constants[name]
        shape = (1,) * (rank - len(constant.shape)) + tuple(constant.shape)
        if isinstance(constant, QuantWeight) and constant.bits != 32:
            return self.weight(name, shape, order, rounded=rounded)
        array = self.graph.array(name) if isinstance(constant, QuantWeight) else constant
        array = array.reshape(()) if array.size == 1 else array.reshape(shape).transpose(order)
        return self.array(array)

    def array(self, array: NDArray[Any]) -> Value:
        """Return a constant; float16 is widened when the file is loaded."""
        if array.dtype == np.float16:
            value = self.g.constant(np.ascontiguousarray(array))
            key = ("float16", value.buffer, value.shape)
            if key not in self._tensors:
                self._tensors[key] = self.op("DEQUANTIZE", [value], dtype="float32")
            return self._tensors[key]
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        return self.g.constant(np.ascontiguousarray(array))

    def weight(
        self, name: str, shape: Shape, order: Order, *, rounded: bool, narrow: bool = True,
        columns: tuple[Shape, Order] | None = None, fill: int = 0,
    ) -> Value:  # fmt: skip
        """Return a quantized constant as integers, or dequantized where an operator takes none.

        Args:
            name: the constant.
            shape: its own, with axes of one element put in.
            order: of those axes in the file.
            rounded: integers are wanted.
            narrow: the operator reads 4 bits; else 4-bit levels take a byte each.
            columns: axes of its columns and their order, of a matrix behind a flattened image.
            fill: columns of zeros behind those of a matrix.
        """
        weight = self.graph.constants[name]
        assert isinstance(weight, QuantWeight)
        # the levels of a palette take a byte each
        kind = "int4" if weight.bits == 4 and narrow and weight.palette is None else "int8"
        key = (name, shape, order, kind, columns, fill)
        if key not in self._tensors:
            put_in = len(shape) - len(weight.shape)
            lead = (
                put_in if shape[:put_in] == (1,) * put_in and shape[put_in:] == weight.shape else 0
            )
            axis = None if weight.axis is None else weight.axis + lead
            w = replace(weight, levels=weight.levels.reshape(shape), axis=axis).transposed(order)
            if columns is not None:
                w = replace(w, levels=w.levels[:, row_columns(*columns)])
            if fill:
                w = replace(w, levels=np.pad(w.levels, ((0, 0), (0, fill))))
            self._tensors[key] = self.integers(self.short("w"), w, kind)
            self._record(name, self._tensors[key].name, shape, order, columns)
        value = self._tensors[key]
        if rounded:
            return value
        if ("float", key) not in self._tensors:
            self._tensors["float", key] = self.op("DEQUANTIZE", [value], dtype="float32")
        return self._tensors["float", key]

    def integers(self, name: str, w: QuantWeight, kind: str) -> Value:
        """Make a tensor with a weight's levels and scales."""
        levels = np.ascontiguousarray(w.levels)
        if kind == "int4":
            flat = np.append(levels.reshape(-1), np.zeros(levels.size % 2, np.int8)).view(np.uint8)
            levels = (flat[0::2] & 15) | (flat[1::2] << 4)
        scales = self.file.per_row(w.scales, w.axis or 0)
        return Value(name, w.shape, kind, self.file.constant(levels), scales)

    def bias(
        self, name: str, levels: NDArray[np.int32], scales: NDArray[np.float32], less: int = 0
    ) -> Value:
        """Make an int32 bias with the scales of the products it is added to, minus ``less``."""
        key = (name, "bias", less)
        if key not in self._tensors:
            table = self.file.per_row(np.ascontiguousarray(scales, np.float32))
            buffer = self.file.constant(np.ascontiguousarray(levels - less, np.int32))
            tensor = self.short("w")
            self._tensors[key] = Value(tensor, levels.shape, "int32", buffer, table)
            if name in self.graph.constants:
                self._record(name, tensor, levels.shape, natural(1), less=less)
        return self._tensors[key]

    def blocks(self, name: str, *, narrow: bool = True) -> Value:
        """Make a matrix [N, K] with scales for blocks of columns, K padded to whole blocks."""
        w = self.graph.constants[name]
        assert isinstance(w, QuantWeight)
        assert w.block is not None
        key = (name, "blocks", narrow)
        if key not in self._tensors:
            short = -w.shape[1] % w.block
            levels = np.pad(w.levels, ((0, 0), (0, short)))
            tensor = self.short("w")
            kind = "int4" if w.bits == 4 and narrow and w.palette is None else "int8"
            plain = self.integers(
                tensor, QuantWeight(levels, np.ones((), np.float32), w.bits), kind
            )
            half = w.scales.astype(np.float16)
            scales = Value(self.short("s"), half.shape, "float16", self.file.constant(half))
            self._tensors[key] = replace(plain, scales=None, group_scales=scales)
            self._record(name, tensor, w.shape, natural(2))
        return self._tensors[key]

    def _record(
        self, name: str, tensor: str, lifted: Shape, order: Order,
        columns: tuple[Shape, Order] | None = None, less: int = 0,
    ) -> None:  # fmt: skip
        w = self.graph.constants[name]
        assert isinstance(w, QuantWeight)
        record = {
            "tensor": tensor,
            "bits": w.bits,
            "shape": list(w.shape),
            "axis": w.axis,
            "block": w.block,
            "lifted": list(lifted) if tuple(lifted) != w.shape else None,
            "order": list(order) if order != natural(len(order)) else None,
            "columns": None if columns is None else [list(part) for part in columns],
            "palette": None if w.palette is None else w.palette.tolist(),
            "less": less or None,
        }
        present = {key: entry for key, entry in record.items() if entry is not None}
        self.weights.setdefault(name, present)
