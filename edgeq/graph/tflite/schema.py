"""Parsing a .tflite file: its tensors and operators, checked but not interpreted.

Source: the schema of LiteRT, ``tflite/schema.fbs``.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, MissingDependencyError, UnsupportedError
from edgeq.graph.ir import Shape
from edgeq.graph.tflite import IDENTIFIER
from edgeq.graph.tflite.shapes import set_shapes

_TYPES = {"FLOAT32": "float32", "FLOAT16": "float16", "INT32": "int32", "INT64": "int64",
          "BOOL": "bool", "INT8": "int8", "UINT8": "uint8", "INT16": "int16"}  # fmt: skip
"""The schema's types that are read -> NumPy's."""
_INTEGERS = ("INT2", "INT4", "UINT4", "INT8", "UINT8", "INT16")
"""Types that only quantized models have, but for whole numbers in 8 bits without a scale."""
_READ = ("INT8", "UINT8", "INT16")
"""Those of them that can be taken back to float."""


@dataclass(frozen=True)
class TfliteTensor:
    """A value or constant of the file.

    Args:
        name: as in the file; not always unique.
        shape: all of it.
        dtype: NumPy's name.
        data: of a constant, in the file's own axes.
        dequantized: the file holds it as integers.
    """

    name: str
    shape: Shape
    dtype: str
    data: NDArray[Any] | None = None
    dequantized: bool = False


@dataclass(frozen=True)
class TfliteOperator:
    """An operator of the file.

    Args:
        index: its place in the file.
        op: the schema's name, as "CONV_2D".
        inputs, outputs: numbers of tensors; -1 for one left out.
        options: the schema's object, None where the operator has no options.
    """

    index: int
    op: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Any


@dataclass(frozen=True)
class TfliteModel:
    """The only graph of a file.

    Args:
        path: the file.
        tensors, operators: in the file's order.
        inputs, outputs: tensor -> the name that callers know it by.
    """

    path: Path
    tensors: tuple[TfliteTensor, ...]
    operators: tuple[TfliteOperator, ...]
    inputs: dict[int, str]
    outputs: dict[int, str]


def schema() -> Any:
    """LiteRT's schema as Python classes.

    Raises:
        MissingDependencyError: LiteRT is not installed.
    """
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError as err:
        raise MissingDependencyError(
            "ai_edge_litert", "tflite", "to read and write .tflite files"
        ) from err
    return schema_py_generated


@cache
def words(enum: str) -> dict[int, str]:
    """The names of an enumeration of the schema, by number."""
    members = vars(getattr(schema(), enum)).items()
    return {value: name for name, value in members if isinstance(value, int)}


def parse(
    path: str | Path,
    *,
    dequantize: bool = False,
    shapes: Mapping[str, Shape] | None = None,
    batch: int | None = None,
) -> TfliteModel:
    """Read a file of one graph with float activations.

    Args:
        path: the file.
        dequantize: take weights that are integers back to float; else they are refused.
        shapes: input -> its whole shape, in the file's own axes, for inputs with open axes.
        batch: what an open first axis becomes; as the file has it if None.

    Raises:
        FormatError: it is damaged or no .tflite file.
        UnsupportedError: it is quantized, holds several graphs, or tensors of unknown shape.
        UsageError: an open axis that is not given, or a shape that contradicts the file.
        MissingDependencyError: LiteRT is not installed.
    """
    path = Path(path)
    model, raw = _verified(path)
    if len(model.subgraphs) != 1 or len(model.signatureDefs or ()) > 1:
        names = ", ".join(_text(s.signatureKey) for s in model.signatureDefs or ()) or "unnamed"
        raise UnsupportedError(
            f"{path} contains {len(model.subgraphs)} graphs (signatures: {names}); "
            "edgeq reads .tflite files with one graph: convert the model with a single signature"
        )
    graph = model.subgraphs[0]
    set_shapes(path, model, raw, dict(shapes or {}), batch)
    try:
        operators = tuple(_operator(model, *pair) for pair in enumerate(graph.operators or ()))
        ends = [int(i) for i in (*graph.inputs, *graph.outputs)]
        used = {i for op in operators for i in (*op.inputs, *op.outputs) if i >= 0} | set(ends)
        computed = {i for op in operators for i in op.outputs}.union(map(int, graph.inputs))
        restorable = not any(
            words("TensorType").get(graph.tensors[i].type) in _INTEGERS
            and _scaled(graph.tensors[i])
            for i in computed & used
        )
        tensors = tuple(
            _tensor(
                path, model, raw, tensor, i in computed or tensor.isVariable, dequantize, restorable
            )
            if i in used
            else TfliteTensor("", (), "")
            for i, tensor in enumerate(graph.tensors)
        )
        inputs, outputs = _ends(model, graph, tensors)
    except (IndexError, ValueError, TypeError, AttributeError, KeyError) as err:
        raise FormatError(f"{path} is damaged: {err}") from err
    return TfliteModel(path, tensors, operators, inputs, outputs)


def mapped_flatbuffer(path: Path, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
    """The bytes of a .tflite file, mapped and not yet checked beyond the identifier.

    Args:
        path: of the file.
        start, stop: the part of it that is the .tflite file, if not all.

    Raises:
        FormatError: it cannot be read, or is no .tflite file.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as err:
        raise FormatError(f"{path} cannot be read: {err.strerror or err}") from err
    except ValueError as err:  # an empty file cannot be mapped
        raise FormatError(f"{path} is empty") from err
    data = np.frombuffer(mapped, np.uint8)[start:stop]
    if bytes(data[4:8]) != IDENTIFIER:
        raise FormatError(f"{path} is not a .tflite file: it does not have the identifier TFL3")
    return data


def _verified(path: Path) -> tuple[Any, bytes]:
    s = schema()
    from ai_edge_litert.interpreter import Interpreter

    raw = bytes(mapped_flatbuffer(path))
    try:
        Interpreter(model_content=raw)  # checks every offset; the Python classes check none
    except (ValueError, RuntimeError) as err:
        if "Flatbuffer" in str(err):
            raise FormatError(f"{path} is damaged or cut short: {err}") from err
        # the file is whole; what else LiteRT does not run, what follows names better
    model = s.ModelT.InitFromPackedBuf(raw)
    if not model.subgraphs or not model.subgraphs[0].tensors:
        raise FormatError(f"{path} contains no graph")
    return model, raw


def _operator(model: Any, index: int, entry: Any) -> TfliteOperator:
    code = model.operatorCodes[entry.opcodeIndex]
    number = max(code.builtinCode, code.deprecatedBuiltinCode)
    op = words("BuiltinOperator").get(number, f"operator {number}")
    if op == "CUSTOM":
        op = f"CUSTOM {_text(code.customCode)}"
    inputs = tuple(int(i) for i in (entry.inputs if entry.inputs is not None else ()))
    outputs = tuple(int(i) for i in (entry.outputs if entry.outputs is not None else ()))
    return TfliteOperator(index, op, inputs, outputs, entry.builtinOptions)


def _tensor(
    path: Path,
    model: Any,
    raw: bytes,
    entry: Any,
    computed: bool,
    dequantize: bool,
    restorable: bool,
) -> TfliteTensor:
    name, kind = _text(entry.name), words("TensorType").get(entry.type, f"type {entry.type}")
    shape = tuple(int(n) for n in entry.shape) if entry.shape is not None else ()
    if computed and any(n < 1 for n in shape):
        raise UnsupportedError(
            f"{path}: the tensor {name!r} has the dynamic shape {list(shape)}, which is known only "
            "when the model runs; convert the model with fixed shapes"
        )
    content = None if computed else _content(model, raw, entry)
    if kind in ("INT8", "UINT8") and not _scaled(entry) and (content is None or not dequantize):
        if content is None:
            return TfliteTensor(name, shape, _TYPES[kind])
        return TfliteTensor(
            name, shape, _TYPES[kind], np.frombuffer(content, _TYPES[kind]).reshape(shape)
        )
    if kind in _INTEGERS and (content is None or not dequantize or kind not in _READ):
        raise UnsupportedError(
            f"{path} is already quantized: the tensor {name!r} is {kind}; give the float model"
            + (
                ", or convert its weights back to float with edgeq quantize --dequantize"
                if content is not None and restorable
                else ""
            )
        )
    if kind not in _TYPES:
        raise UnsupportedError(
            f"{path}: the tensor {name!r} is {kind}; edgeq reads {', '.join(_TYPES)}"
        )
    if content is None:
        return TfliteTensor(name, shape, _TYPES[kind])
    data = np.frombuffer(content, _TYPES[kind]).reshape(shape)
    if kind not in _READ:
        return TfliteTensor(name, shape, _TYPES[kind], data)
    return TfliteTensor(name, shape, "float32", _dequantized(data, entry.quantization), True)


def _scaled(entry: Any) -> bool:
    """Whether a tensor's integers have a scale."""
    quantization = entry.quantization
    return quantization is not None and (
        (quantization.scale is not None and len(quantization.scale) > 0)
        or quantization.details is not None
    )


def _dequantized(data: NDArray[Any], entry: Any) -> NDArray[np.float32]:
    if entry is None or entry.scale is None or entry.details is not None:
        raise ValueError("integer weights without plain scales")
    scales, zeros = np.asarray(entry.scale, np.float32), np.asarray(entry.zeroPoint, np.float32)
    if scales.size > 1:
        shape = [1] * data.ndim
        shape[entry.quantizedDimension] = -1
        scales, zeros = scales.reshape(shape), zeros.reshape(shape)
    return (data.astype(np.float32) - zeros) * scales


def _content(model: Any, raw: bytes, entry: Any) -> bytes:
    buffer = model.buffers[entry.buffer]
    if buffer.data is not None and len(buffer.data):
        return bytes(np.asarray(buffer.data, np.uint8))
    if buffer.offset > 1:  # weights behind the flatbuffer
        if buffer.offset + buffer.size > len(raw):
            raise ValueError(f"the weights end at byte {buffer.offset + buffer.size}")
        return raw[buffer.offset : buffer.offset + buffer.size]
    return b""  # a constant of no elements


def _ends(
    model: Any, graph: Any, tensors: tuple[TfliteTensor, ...]
) -> tuple[dict[int, str], dict[int, str]]:
    """Names of the graph's inputs and outputs: the signature's, if there is one."""
    ends: list[dict[int, str]] = []
    signature = model.signatureDefs[0] if model.signatureDefs else None
    for side in ("inputs", "outputs"):
        given = getattr(signature, side, None) or ()
        named = {int(entry.tensorIndex): _text(entry.name) for entry in given}
        ends.append({int(i): named.get(int(i), tensors[int(i)].name)
                      for i in getattr(graph, side)})  # fmt: skip
    return ends[0], ends[1]


def _text(raw: bytes | str | None) -> str:
    return raw.decode("utf-8", "replace") if isinstance(raw, bytes) else raw or ""
