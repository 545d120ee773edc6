"""A lowered graph's .tflite file: run in LiteRT, and its integers read back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.runners import Precision
from edgeq.converters.tflite.interpreter import interpreter
from edgeq.converters.tflite.lower.axis_order import Order, row_columns
from edgeq.converters.tflite.lower.subgraph import SIGNATURE
from edgeq.converters.tflite.read import Header, read
from edgeq.core.errors import FormatError, UsageError
from edgeq.formats.qparams import QuantParams
from edgeq.graph.arena import Life, lay_out
from edgeq.graph.feeds import held_as
from edgeq.graph.ir import Info, QuantWeight
from edgeq.graph.tflite.schema import schema

METADATA = "edgeq.graph"
"""The file's metadata entry that is ours: JSON."""
_BYTES = {
    "FLOAT32": 4,
    "INT32": 4,
    "INT64": 8,
    "FLOAT16": 2,
    "INT8": 1,
    "UINT8": 1,
    "BOOL": 1,
    "INT4": 0.5,
}


class LiteRTGraphRunner:
    """A graph that edgeq converted, in LiteRT's interpreter.

    Args:
        path: the file.
        threads: it may use.
        exact: run the runtime's plain reference operators instead of its fast ones.

    Raises:
        FormatError: edgeq did not write it, or LiteRT cannot load it.
        MissingDependencyError: LiteRT is not installed.
    """

    def __init__(self, path: str | Path, *, threads: int = 1, exact: bool = False) -> None:
        header = read(path, entry=METADATA)
        self._orders: dict[str, Order] = {}
        self.inputs = self._ends(header.settings["inputs"])
        """Name -> shape and type, as in the source."""
        self.outputs = self._ends(header.settings["outputs"])
        """Name -> shape and type, as in the source."""
        self.metadata: Mapping[str, str] = header.settings.get("meta", {})
        """What the source's meta held."""
        self.precision: Precision = header.settings["precision"]
        """What float values are computed in: "int8" if an operator rounds them as it runs."""
        self._quants = read_quants(Path(path))
        self.runtime = f"LiteRT {version('ai-edge-litert')}"
        self._interpreter: Any = interpreter(Path(path), threads=threads, exact=exact)
        try:
            self._run: Any = self._interpreter.get_signature_runner(SIGNATURE)
            details = self._run.get_input_details()
        except (ValueError, RuntimeError) as err:
            raise FormatError(f"LiteRT cannot load {path}: {err}") from err
        self._kinds = {name: np.dtype(entry["dtype"]) for name, entry in details.items()}

    def _ends(self, recorded: Mapping[str, Any]) -> dict[str, Info]:
        self._orders |= {name: tuple(entry["order"]) for name, entry in recorded.items()}
        return {name: Info(tuple(e["shape"]), e["dtype"]) for name, e in recorded.items()}

    def close(self) -> None:
        """Release everything."""
        self._run = self._interpreter = None

    def __call__(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run it once.

        Args:
            feeds: every input by name, in the source's shape.

        Returns:
            Every output by name, in the source's shape and type.

        Raises:
            UsageError: an input is missing, unknown or of another shape.
            FormatError: LiteRT fails to run the file.
        """
        if set(feeds) != set(self.inputs):
            raise UsageError(f"the inputs are {sorted(self.inputs)}, got {sorted(feeds)}")
        inputs = {name: self._as_input(name, np.asarray(array)) for name, array in feeds.items()}
        try:
            results = self._run(**inputs)
        except (ValueError, RuntimeError) as err:
            raise FormatError(f"LiteRT cannot run the file: {err}") from err
        return {name: self._back(name, results[name]) for name in self.outputs}

    def _as_input(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        if array.shape != self.inputs[name].shape:
            raise UsageError(
                f"the input {name!r} is {list(self.inputs[name].shape)}, got {list(array.shape)}"
            )
        moved = np.asarray(array.transpose(self._orders[name]), order="C")
        if self._kinds[name] == np.int8 and name in self._quants:
            return self._quants[name].quantize(moved)
        return held_as(name, moved, self._kinds[name])

    def _back(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        info, order = self.outputs[name], self._orders[name]
        if array.dtype == np.int8 and name in self._quants:
            array = self._quants[name].dequantize(array)
        moved = array.transpose(np.argsort(order)) if order else array.reshape(())
        return np.ascontiguousarray(moved).astype(info.dtype).reshape(info.shape)


def read_quants(path: Path) -> dict[str, QuantParams]:
    """How the file rounds each value of the source that it rounds.

    Raises:
        FormatError: edgeq did not write it.
    """
    header = read(path, entry=METADATA)
    tensors, params = _tensors(header), {}
    for name, tensor in header.settings["quants"].items():
        quantization = _tensor(header, tensors, tensor or name).quantization
        params[name] = QuantParams(float(quantization.scale[0]), int(quantization.zeroPoint[0]))
    return params


def read_weights(path: Path) -> Iterator[tuple[str, QuantWeight]]:
    """The integers of every quantized constant, in the source's own axes.

    Raises:
        FormatError: edgeq did not write it.
    """
    header = read(path, entry=METADATA)
    tensors = _tensors(header)
    for name, how in header.settings["weights"].items():
        yield name, _weight(header, _tensor(header, tensors, how.get("tensor", name)), how)


def _tensors(header: Header) -> dict[str, Any]:
    return {tensor.name.decode(): tensor for tensor in header.model.subgraphs[0].tensors}


def _tensor(header: Header, tensors: Mapping[str, Any], name: str) -> Any:
    if name not in tensors:
        raise FormatError(f"{header.path} lacks the tensor {name}, which its metadata lists")
    return tensors[name]


def _weight(header: Header, tensor: Any, how: Mapping[str, Any]) -> QuantWeight:
    shape = tuple(int(n) for n in (tensor.shape if tensor.shape is not None else ()))
    own = list(how["shape"])
    lifted = how.get("lifted", own)
    order, quantization = tuple(how.get("order", range(len(lifted)))), tensor.quantization
    levels = _levels(header, tensor, shape)
    if "less" in how:
        levels = levels + np.int32(how["less"])
    if "columns" in how:
        dims, axes = (tuple(part) for part in how["columns"])
        levels = levels[:, np.argsort(row_columns(dims, axes))]
    axis, block, palette = how.get("axis"), how.get("block"), how.get("palette")
    if block is not None:
        entry = header.model.subgraphs[0].tensors[quantization.details.scales]
        raw = header.bytes_of(entry.buffer).view(np.float16)
        scales = raw.reshape([int(n) for n in entry.shape]).astype(np.float32)
        levels = levels[:, : own[1]]
    else:
        if len(own) == 2 and order == (0, 1):
            levels = levels[:, : own[1]]  # behind them lie columns of zeros
        scales = np.asarray(quantization.scale, np.float32)
        scales = scales.reshape(()) if axis is None else scales
        if how["bits"] == 32:  # one scale where the weight has one
            scales = np.resize(scales, own[0])
        levels = levels.transpose(np.argsort(order)).reshape(own)
        if axis is not None and how["bits"] != 32:
            # the axis that the file itself says its scales are along
            put_in = len(lifted) - len(own)
            axis = order[quantization.quantizedDimension] - (
                put_in if lifted[put_in:] == own else 0
            )
    return QuantWeight(
        np.asarray(levels, order="C"), scales, how["bits"], axis, block,
        None if palette is None else np.array(palette, np.int8),
    )  # fmt: skip


def _levels(header: Header, tensor: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    types = schema().TensorType
    raw = header.bytes_of(tensor.buffer)
    if tensor.type == types.INT4:
        codes = raw.view(np.int8)
        # shifts of signed bytes carry the sign along
        both = np.stack([(codes << 4) >> 4, codes >> 4], axis=-1).reshape(-1)
        return both[: int(np.prod(shape))].reshape(shape)
    if tensor.type not in (types.INT8, types.INT32):
        raise FormatError(f"{header.path}: {tensor.name.decode()} holds no integers")
    return raw.view(np.int8 if tensor.type == types.INT8 else np.int32).reshape(shape)


def arena_bytes(model: Any) -> int:
    """Bytes of a file's computed tensors in one arena, each in a place only while it is needed.

    As in LiteRT, inputs are kept until the end, and what is made of constants alone for good.
    """
    s = schema()
    graph = model.subgraphs[0]
    sizes = {value: name for name, value in vars(s.TensorType).items() if isinstance(value, int)}
    views = {s.BuiltinOperator.RESHAPE}
    root: dict[int, int] = {}
    first = {int(i): -1 for i in graph.inputs}
    last = dict(first)
    end = len(graph.operators)
    for step, op in enumerate(graph.operators):
        computed = [root.get(int(i), int(i)) for i in op.inputs if i >= 0]
        computed = [i for i in computed if i in first]
        for i in computed:
            last[i] = max(last[i], step)
        code = model.operatorCodes[op.opcodeIndex].builtinCode
        for out in map(int, op.outputs):
            if code in views and computed:
                root[out] = computed[0]
            else:
                first[out], last[out] = (step, step) if computed else (-1, end)
    for i in (*graph.inputs, *graph.outputs):
        last[root.get(int(i), int(i))] = end
    lives = {}
    for i, start in first.items():
        tensor = graph.tensors[i]
        count = int(np.prod([int(n) for n in tensor.shape], dtype=np.int64))
        lives[str(i)] = Life(start, last[i], int(count * _BYTES[sizes[tensor.type]]))
    return lay_out(lives).nbytes


def read_parts(path: Path) -> Iterator[tuple[str, bytes]]:
    """Every constant and operator of the file: its name, and its content with all settings."""
    header = read(path, entry=METADATA)
    graph, codes = header.model.subgraphs[0], header.model.operatorCodes
    names = [tensor.name.decode() for tensor in graph.tensors]
    for i, tensor in enumerate(graph.tensors):
        about = [tensor.type, _listed(tensor.shape), *_rounding(header, tensor.quantization)]
        raw = header.bytes_of(tensor.buffer) if tensor.buffer else np.zeros(0, np.uint8)
        yield f"tensor {names[i]}", repr(about).encode() + raw.tobytes()
    for i, op in enumerate(graph.operators):
        code = codes[op.opcodeIndex]
        ends = [[names[k] if k >= 0 else "" for k in end] for end in (op.inputs, op.outputs)]
        settings = vars(op.builtinOptions) if op.builtinOptions is not None else {}
        about = [code.builtinCode, *ends, {k: _listed(v) for k, v in sorted(settings.items())}]
        yield (
            f"operator {i} that makes {ends[1][0] if ends[1] else 'nothing'}",
            repr(about).encode(),
        )


def _rounding(header: Header, quantization: Any) -> list[Any]:
    if quantization is None:
        return []
    about = [
        _listed(quantization.scale),
        _listed(quantization.zeroPoint),
        quantization.quantizedDimension,
    ]
    return [*about, vars(quantization.details) if quantization.details is not None else None]


def _listed(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value
