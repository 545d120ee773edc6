"""Graphs of operators: the form in which vision, audio and encoder models are quantized.

Operators, their attributes and their meaning are those of ONNX's opset 21, channels first, with
two differences that `edgeq.graph.onnx.read` and `edgeq.graph.onnx.write` translate:

    Linear      x [..., K] times w [N, K] transposed, plus b [N] if there is one: Gemm, and MatMul
                with a constant
    QuantParams of a value stands for a QuantizeLinear and DequantizeLinear behind it, and
                QuantWeight for a DequantizeLinear behind its integers

Every shape is known and every constant is a NumPy array or a `QuantWeight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, SchemeError
from edgeq.formats.qparams import QuantParams

Shape = tuple[int, ...]
LEVELS = {4: (-8, 7), 8: (-127, 127), 32: (-(2**31) + 1, 2**31 - 1)}
"""Bits -> the least and the largest level of a symmetric weight, equal in every runtime."""


@dataclass(frozen=True)
class Info:
    """Shape and type of a value.

    Args:
        shape: all of it; no axis is unknown.
        dtype: NumPy's name: "float32", "int64", "int32", "bool" ...
    """

    shape: Shape
    dtype: str = "float32"

    @property
    def nbytes(self) -> int:
        """Size of the value in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, eq=False)
class QuantWeight:
    """A constant held as integers; its value is ``levels * scales``. It is always symmetric.

    Args:
        levels: int8 (4 and 8 bits) or int32 (a bias, 32 bits), of the constant's own shape.
        scales: float32; one number [] for the tensor; [C] with ``axis``, a scale for each index
            of that axis; with ``block`` too, the shape of ``levels`` with ``axis`` divided into
            blocks, the last of which may be short.
        bits: 4, 8 or 32.
        axis: along which scales differ; None for one scale.
        block: levels along ``axis`` that share a scale; None for a scale for each index.
        palette: int8 [n]: all that ``levels`` may be, if they were chosen from a table.

    Raises:
        SchemeError: a part has another shape or range than that.
    """

    levels: NDArray[Any]
    scales: NDArray[np.float32]
    bits: int
    axis: int | None = None
    block: int | None = None
    palette: NDArray[np.int8] | None = None

    def __post_init__(self) -> None:
        want = np.int32 if self.bits == 32 else np.int8
        if self.bits not in LEVELS or self.levels.dtype != want or self.scales.dtype != np.float32:
            raise SchemeError(
                f"a weight of {self.bits} bits holds {self.levels.dtype} and {self.scales.dtype}; "
                "4 and 8 bits hold int8 with float32 scales, 32 bits int32"
            )
        if self.scales.shape != self._scales_shape():
            raise SchemeError(
                f"scales of {list(self.levels.shape)} along axis {self.axis} in blocks of "
                f"{self.block} are {list(self._scales_shape())}, got {list(self.scales.shape)}"
            )
        low, high = LEVELS[self.bits] if self.palette is None else (-128, 127)
        if self.levels.size and not low <= self.levels.min() <= self.levels.max() <= high:
            raise SchemeError(f"levels of {self.bits} bits must lie in {low} .. {high}")

    def _scales_shape(self) -> Shape:
        if self.axis is None:
            return ()
        n = self.levels.shape[self.axis]
        if self.block is None:
            return (n,)
        shape = list(self.levels.shape)
        shape[self.axis] = -(-n // self.block)
        return tuple(shape)

    @property
    def shape(self) -> Shape:
        """Shape of the constant."""
        return self.levels.shape

    @property
    def nbytes(self) -> int:
        """Size in a file: packed levels and scales."""
        bits = 32 if self.bits == 32 else self.bits
        return -(-self.levels.size * bits // 8) + self.scales.nbytes

    def wide_scales(self) -> NDArray[np.float32]:
        """Return the scales in a shape that broadcasts with ``levels``."""
        if self.axis is None:
            return self.scales
        if self.block is not None:
            wide = np.repeat(self.scales, self.block, self.axis)
            return np.take(wide, np.arange(self.shape[self.axis]), self.axis)
        shape = [1] * self.levels.ndim
        shape[self.axis] = -1
        return self.scales.reshape(shape)

    def numpy(self) -> NDArray[np.float32]:
        """Return the float32 values."""
        return self.levels.astype(np.float32) * self.wide_scales()

    def transposed(self, order: tuple[int, ...]) -> QuantWeight:
        """Return the same weight with its axes in another order."""
        axis = None if self.axis is None else order.index(self.axis)
        wide = self.block is not None
        scales = np.asarray(self.scales.transpose(order), order="C") if wide else self.scales
        return replace(
            self,
            levels=np.asarray(self.levels.transpose(order), order="C"),
            scales=scales,
            axis=axis,
        )


Constant = NDArray[Any] | QuantWeight
"""A float16 array stands for a float32 one that is stored in half the bytes."""


@dataclass(frozen=True)
class Node:
    """One operator.

    Args:
        op: its type.
        name: unique in the graph.
        inputs: names of values and constants; "" for one left out.
        outputs: names of the values it makes; "" for one nobody asked for.
        attrs: numbers, texts, lists of them, or arrays.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def output(self) -> str:
        """The first output that has a name."""
        return next((name for name in self.outputs if name), "")

    def __str__(self) -> str:
        return f"{self.op} {self.name!r}"


@dataclass(frozen=True)
class Graph:
    """A model. It is immutable; `dataclasses.replace` makes a changed copy.

    Args:
        name: of the model.
        inputs, outputs: names of values.
        nodes: each after those whose values it takes.
        constants: name -> array or quantized weight.
        values: name -> shape and type of every value that is no constant.
        quants: name -> how that value is rounded wherever it is used; the graph's outputs too.
        meta: texts that are kept in the file: the recipe, preprocessing, labels.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    constants: Mapping[str, Constant]
    values: Mapping[str, Info]
    quants: Mapping[str, QuantParams] = field(default_factory=dict)
    meta: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def producers(self) -> Mapping[str, Node]:
        """Value -> the node that computes it; inputs of the graph have none."""
        return {out: node for node in self.nodes for out in node.outputs if out}

    @cached_property
    def consumers(self) -> Mapping[str, tuple[Node, ...]]:
        """Value or constant -> the nodes that use it, each listed once."""
        readers: dict[str, dict[str, Node]] = {}
        for node in self.nodes:
            for name in node.inputs:
                if name:
                    readers.setdefault(name, {})[node.name] = node
        return {name: tuple(nodes.values()) for name, nodes in readers.items()}

    def info(self, name: str) -> Info:
        """Return shape and type of a value or constant.

        Raises:
            FormatError: there is none of that name.
        """
        constant = self.constants.get(name)
        if constant is None:
            if name not in self.values:
                raise FormatError(f"the graph {self.name} has no value {name!r}")
            return self.values[name]
        if isinstance(constant, QuantWeight) or constant.dtype == np.float16:
            return Info(constant.shape, "float32")
        return Info(constant.shape, str(constant.dtype))

    def array(self, name: str) -> NDArray[Any]:
        """Return a constant's values: dequantized, and float16 widened to float32.

        Raises:
            FormatError: it is no constant.
        """
        constant = self.constants.get(name)
        if constant is None:
            raise FormatError(f"{name!r} of the graph {self.name} is not a constant")
        if isinstance(constant, QuantWeight):
            return constant.numpy()
        return constant.astype(np.float32) if constant.dtype == np.float16 else constant

    def only_consumer(self, name: str) -> Node | None:
        """Return the only node that uses a value; None if several do, or the graph's outputs do."""
        nodes = self.consumers.get(name, ())
        return nodes[0] if len(nodes) == 1 and name not in self.outputs else None
