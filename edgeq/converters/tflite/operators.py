"""Graphs of a .tflite file, built operator by operator.

Source: the schema of LiteRT, ``tflite/schema.fbs``, and the operators' versions by type in
``tflite/tools/versioning/op_version.cc``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.tflite.file import SharedTable, TfliteFile

Shape = tuple[int, ...]
_MASKED = -1e9
"""Added to scores that may not be seen; its exponential is zero."""


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of a graph.

    Args:
        name: what the file calls it.
        shape: its shape.
        dtype: "float32", "float16", "int32", "int8", "int4" or "bool".
        buffer: of its data; 0 if it is computed or given.
        scales: how its integers stand for numbers, if they do: one scale, or one a row.
        group_scales: a float16 matrix [N, G] of the scales of its groups, if it has groups.
    """

    name: str
    shape: Shape
    dtype: str
    buffer: int = 0
    scales: SharedTable | None = None
    group_scales: Value | None = None


@dataclass
class _Op:
    code: int
    version: int
    inputs: list[Value | None]
    output: Value
    options: Any
    kind: int


@dataclass
class SubgraphWriter:
    """Collects the operators of a graph; those that no output needs are removed at the end.

    Args:
        file: the file it will be part of.
        name: its name.
        constant_name: names the constant of a number, counted from 0.
        prefix: put before every tensor's name in the file, so that no two graphs share one.
    """

    file: TfliteFile
    name: str
    constant_name: Callable[[int], str] = "constant_{}".format
    prefix: str = ""
    _ops: list[_Op] = field(default_factory=list)
    _constants: dict[tuple[str, Shape, int], Value] = field(default_factory=dict)
    _renamed: dict[int, str] = field(default_factory=dict)

    def input(self, name: str, shape: Shape, dtype: str) -> Value:
        """A tensor that is given."""
        return Value(name, shape, dtype)

    def constant(
        self, array: NDArray[Any] | Sequence[int] | float, name: str | None = None
    ) -> Value:
        """A small constant; Python's whole numbers are int32 and others float32.

        Args:
            array: its values.
            name: what it is called, where it is more than a number; equal ones share the first.
        """
        if not isinstance(array, np.ndarray):
            array = np.asarray(array, np.float32 if isinstance(array, float) else np.int32)
        index = self.file.constant(array)
        key = (array.dtype.name, array.shape, index)
        if key not in self._constants:
            name = name or self.constant_name(len(self._constants))
            self._constants[key] = Value(name, array.shape, array.dtype.name, index)
        return self._constants[key]

    def rename(self, value: Value, name: str) -> None:
        """Call a tensor by another name in the file."""
        self._renamed[id(value)] = name

    def name_of(self, value: Value) -> str:
        """Name of a tensor in the file."""
        return self.prefix + self._renamed.get(id(value), value.name)

    def finish(self, inputs: Mapping[str, Value], outputs: Mapping[str, Value]) -> None:
        """Put the graph into its file, to be called by its name.

        Args:
            inputs, outputs: by the names that callers use.
        """
        producer = {id(op.output): op for op in self._ops}
        needed: set[int] = set()
        waiting = list(outputs.values())
        while waiting:
            value = waiting.pop()
            if id(value) in needed:
                continue
            needed.add(id(value))
            waiting += [] if value.group_scales is None else [value.group_scales]
            if id(value) in producer:
                waiting += [v for v in producer[id(value)].inputs if v is not None]
        s = self.file.schema
        graph = s.SubGraphT()
        graph.name, graph.tensors, graph.operators = self.name, [], []
        index: dict[int, int] = {}
        names: dict[str, int] = {}  # the value that each name belongs to
        for value in (*outputs.values(), *inputs.values()):
            names[self.name_of(value)] = id(value)

        def at(value: Value | None) -> int:
            if value is None:
                return -1
            if id(value) not in index:
                tensor = self._tensor(value, at)
                name, number = tensor.name, 1
                while names.get(tensor.name, id(value)) != id(value):
                    tensor.name, number = f"{name}_{number}", number + 1
                names[tensor.name] = id(value)
                index[id(value)] = len(graph.tensors)
                graph.tensors.append(tensor)
            return index[id(value)]

        graph.inputs = _numbers([at(value) for value in inputs.values()])
        for op in self._ops:
            if id(op.output) not in needed:
                continue
            entry = s.OperatorT()
            entry.opcodeIndex = self.file.opcode(op.code, op.version)
            entry.inputs = _numbers([at(v) for v in op.inputs])
            entry.outputs = _numbers([at(op.output)])
            entry.builtinOptions, entry.builtinOptionsType = op.options, op.kind
            graph.operators.append(entry)
        graph.outputs = _numbers([at(value) for value in outputs.values()])
        named = [{name: at(value) for name, value in part.items()} for part in (inputs, outputs)]
        self.file.add(graph, self.name, *named)

    def _tensor(self, value: Value, at: Callable[[Value], int]) -> Any:
        s = self.file.schema
        tensor = s.TensorT()
        tensor.name = self.name_of(value)
        tensor.buffer, tensor.hasRank = value.buffer, True
        tensor.shape = _numbers(value.shape)
        tensor.type = getattr(s.TensorType, value.dtype.upper())
        tensor.quantization = value.scales
        if value.group_scales is not None:
            groups = s.BlockwiseQuantizationT()
            groups.scales, groups.zeroPoints = at(value.group_scales), -1
            groups.blockSize = value.shape[1] // value.group_scales.shape[1]
            tensor.quantization = s.QuantizationParametersT()
            tensor.quantization.details = groups
            tensor.quantization.detailsType = s.QuantizationDetails.BlockwiseQuantization
        return tensor

    def op(
        self,
        code: str,
        inputs: Sequence[Value | None],
        shape: Sequence[int],
        dtype: str | None = None,
        options: str = "",
        version: int = 1,
        name: str = "",
        scales: SharedTable | None = None,
        **settings: Any,
    ) -> Value:
        """Add an operator; ``options`` is the schema's name of its ``settings``.

        Args:
            code: the schema's name of the operator.
            inputs: what it takes; None for one left out.
            shape, dtype, scales, name: of what it makes; the type is the first input's if None.
            version: of the operator.
        """
        s = self.file.schema
        table = getattr(s, f"{options}T")() if options else None
        for key, setting in settings.items():
            setattr(table, key, setting)
        first = next(v for v in inputs if v is not None)
        name = name or f"{code.lower()}_{len(self._ops)}"
        dims = tuple(int(n) for n in shape)
        output = Value(name, dims, dtype or first.dtype, scales=scales)
        number = getattr(s.BuiltinOperator, code)
        kind = getattr(s.BuiltinOptions, options) if options else 0
        self._ops.append(_Op(number, version, list(inputs), output, table, kind))
        return output

    # --- arithmetic ---

    def add(self, a: Value, b: Value, name: str = "") -> Value:
        """a + b, broadcast."""
        return self.op("ADD", [a, b], _both(a, b), options="AddOptions", name=name)

    def mul(self, a: Value, b: Value, name: str = "") -> Value:
        """a * b, broadcast."""
        return self.op("MUL", [a, b], _both(a, b), options="MulOptions", name=name)

    def sub(self, a: Value, b: Value) -> Value:
        """a - b, broadcast."""
        return self.op("SUB", [a, b], _both(a, b), options="SubOptions")

    def div(self, a: Value, b: Value) -> Value:
        """a / b, broadcast."""
        return self.op("DIV", [a, b], _both(a, b), options="DivOptions")

    def maximum(self, a: Value, b: Value) -> Value:
        """The larger of a and b, broadcast."""
        return self.op("MAXIMUM", [a, b], _both(a, b), options="MaximumMinimumOptions")

    def negative(self, x: Value) -> Value:
        """-x."""
        return self.op("NEG", [x], x.shape, options="NegOptions")

    def absolute(self, x: Value) -> Value:
        """|x|."""
        return self.op("ABS", [x], x.shape, options="AbsOptions")

    def round(self, x: Value) -> Value:
        """The nearest whole number, ties to even."""
        return self.op("ROUND", [x], x.shape)

    def rsqrt(self, x: Value) -> Value:
        """1 / sqrt(x)."""
        return self.op("RSQRT", [x], x.shape)

    def logistic(self, x: Value) -> Value:
        """1 / (1 + exp(-x))."""
        return self.op("LOGISTIC", [x], x.shape)

    def tanh(self, x: Value) -> Value:
        """The hyperbolic tangent."""
        return self.op("TANH", [x], x.shape)

    def gelu_tanh(self, x: Value) -> Value:
        """GELU's tanh form."""
        return self.op("GELU", [x], x.shape, options="GeluOptions", approximate=True)

    def softmax(self, x: Value) -> Value:
        """Softmax along the last axis."""
        return self.op("SOFTMAX", [x], x.shape, options="SoftmaxOptions", beta=1.0)

    def mean(self, x: Value) -> Value:
        """Mean of the last axis, which stays as 1."""
        return self._reduced("MEAN", x)

    def largest(self, x: Value) -> Value:
        """Maximum of the last axis, which stays as 1."""
        return self._reduced("REDUCE_MAX", x)

    def _reduced(self, code: str, x: Value) -> Value:
        axis = self.constant([len(x.shape) - 1])
        shape = (*x.shape[:-1], 1)
        return self.op(code, [x, axis], shape, options="ReducerOptions", keepDims=True)

    # --- comparing ---

    def less_equal(self, a: Value, b: Value) -> Value:
        """a <= b, broadcast: bool."""
        return self.op("LESS_EQUAL", [a, b], _both(a, b), "bool", "LessEqualOptions")

    def greater(self, a: Value, b: Value) -> Value:
        """a > b, broadcast: bool."""
        return self.op("GREATER", [a, b], _both(a, b), "bool", "GreaterOptions")

    def both(self, a: Value, b: Value) -> Value:
        """a and b."""
        return self.op("LOGICAL_AND", [a, b], _both(a, b), options="LogicalAndOptions")

    def hidden(self, visible: Value) -> Value:
        """A mask to add to scores: 0 where ``visible`` is true, else a large negative number."""
        yes, no = self.constant(0.0), self.constant(_MASKED)
        return self.op("SELECT_V2", [visible, yes, no], visible.shape, "float32", "SelectV2Options")

    # --- moving ---

    def reshape(self, x: Value, shape: Sequence[int], name: str = "") -> Value:
        """The same numbers in another shape."""
        if x.shape == tuple(shape) and not name:
            return x
        want = self.constant(list(shape))
        return self.op(
            "RESHAPE", [x, want], shape, options="ReshapeOptions", name=name, newShape=list(shape)
        )

    def transpose(self, x: Value, order: Sequence[int]) -> Value:
        """Axes in another order."""
        shape = [x.shape[i] for i in order]
        if _keeps(x.shape, order):
            return self.reshape(x, shape)
        return self.op(
            "TRANSPOSE", [x, self.constant(list(order))], shape, options="TransposeOptions"
        )

    def last(self, x: Value, start: int, stop: int) -> Value:
        """Part of the last axis."""
        if (start, stop) == (0, x.shape[-1]):
            return x
        size = (*x.shape[:-1], stop - start)
        begin = [*(0 for _ in x.shape[:-1]), start]
        return self.op(
            "SLICE", [x, self.constant(begin), self.constant(list(size))], size,
            options="SliceOptions",
        )  # fmt: skip

    def part(self, x: Value, start: Value, size: Shape) -> Value:
        """A part of a size, from where ``start`` says."""
        return self.op("SLICE", [x, start, self.constant(list(size))], size, options="SliceOptions")

    def first(self, x: Value) -> Value:
        """The first element of a vector: [1]."""
        return self.op(
            "SLICE", [x, self.constant([0]), self.constant([1])], (1,), options="SliceOptions"
        )

    def concat(self, parts: Sequence[Value], axis: int, name: str = "") -> Value:
        """Parts joined along an axis."""
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        return self.op(
            "CONCATENATION", parts, shape, options="ConcatenationOptions", name=name,
            axis=axis % len(shape),
        )  # fmt: skip

    def pad_last(self, x: Value, width: int) -> Value:
        """Zeros put behind the last axis [T, K] to make it [T, width]."""
        if x.shape[-1] == width:
            return x
        amounts = self.constant(np.array([[0, 0], [0, width - x.shape[-1]]], np.int32))
        return self.op("PAD", [x, amounts], (*x.shape[:-1], width), options="PadOptions")

    def gather(self, table: Value, rows: Value) -> Value:
        """Rows of a table."""
        version = {"int4": 7, "int8": 2}.get(table.dtype, 1)
        shape = (*rows.shape, *table.shape[1:])
        return self.op("GATHER", [table, rows], shape, None, "GatherOptions", version, axis=0)

    def update(self, into: Value, part: Value, start: Value, name: str = "") -> Value:
        """``into`` with ``part`` put at ``start``."""
        version = 3 if into.dtype == "float16" else 1
        return self.op(
            "DYNAMIC_UPDATE_SLICE", [into, part, start], into.shape, None,
            "DynamicUpdateSliceOptions", version, name,
        )  # fmt: skip

    def cast(self, x: Value, dtype: str, name: str = "") -> Value:
        """The same numbers as another type."""
        kinds = {x.dtype, dtype}
        version = 6 if "int4" in kinds else 5 if "float16" in kinds else 3 if "int8" in kinds else 1
        types = self.file.schema.TensorType
        return self.op(
            "CAST", [x], x.shape, dtype, "CastOptions", version, name,
            inDataType=getattr(types, x.dtype.upper()), outDataType=getattr(types, dtype.upper()),
        )  # fmt: skip

    def widened(self, x: Value) -> Value:
        """A float16 constant as float32, which the runtime does once."""
        return self.op("DEQUANTIZE", [x], x.shape, "float32", "DequantizeOptions", 3)

    # --- products ---

    def embedding_lookup(self, rows: Value, table: Value, name: str = "") -> Value:
        """Rows of a matrix as float32, dequantized if it holds integers."""
        version = 1 if table.dtype == "float32" else 4
        shape = (*rows.shape, table.shape[1])
        return self.op(
            "EMBEDDING_LOOKUP", [rows, table], shape, "float32", version=version, name=name
        )

    def fully_connected(self, x: Value, w: Value, bias: Value | None, name: str = "") -> Value:
        """x [T, K] times w [N, K], transposed; x is rounded to 8 bits if w holds integers."""
        version = 1 if w.dtype == "float32" else 12
        shape = (x.shape[0], w.shape[0])
        return self.op(
            "FULLY_CONNECTED", [x, w, bias], shape, None, "FullyConnectedOptions", version, name
        )

    def batch_matmul(self, a: Value, b: Value, transposed: bool = False) -> Value:
        """a [..., M, K] times b [..., K, N], or b [..., N, K] transposed."""
        shape = (*a.shape[:-1], b.shape[-2] if transposed else b.shape[-1])
        return self.op("BATCH_MATMUL", [a, b], shape, options="BatchMatMulOptions", adjY=transposed)


def _numbers(values: Sequence[int]) -> NDArray[np.int32]:
    return np.array(values, np.int32)


def _both(a: Value, b: Value) -> Shape:
    return np.broadcast_shapes(a.shape, b.shape)


def _keeps(shape: Shape, order: Sequence[int]) -> bool:
    """Whether only axes of one element move."""
    moved = [i for i in order if shape[i] > 1]
    return moved == sorted(moved)
