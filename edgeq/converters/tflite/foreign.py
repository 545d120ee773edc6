"""Any .tflite file of one graph in LiteRT: what other tools made, quantized or not.

Inputs and outputs have the file's names. Quantized ones are taken and returned as float32, and
images have their channels first, as in the graphs that edgeq reads from .tflite files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.runners import Precision
from edgeq.converters.tflite.interpreter import interpreter
from edgeq.core.errors import FormatError, UnsupportedError, UsageError
from edgeq.graph.files import graph_format, read
from edgeq.graph.ir import Graph, Info, Shape
from edgeq.graph.tflite.image import IMAGE
from edgeq.graph.tflite.ops import PASSED_ON

_THROUGH = {*PASSED_ON, *IMAGE, "QUANTIZE", "DEQUANTIZE"}
"""Operators whose output is an image if their input is one."""


@dataclass(frozen=True)
class _End:
    """An input or output.

    Args:
        index: of its tensor.
        dtype: in the file.
        shape: in the file.
        axes: the same, with -1 where the file leaves an axis open.
        scale, zero: of its quantization; a scale of 0 means that it is not quantized.
        image: whether it is given channels first.
    """

    index: int
    dtype: np.dtype[Any]
    shape: Shape
    axes: Shape
    scale: float
    zero: int
    image: bool

    @property
    def info(self) -> Info:
        """The shape and type that callers see: channels first, float32 if quantized."""
        shape = self.shape
        if self.image:
            shape = (shape[0], shape[3], shape[1], shape[2])
        return Info(shape, "float32" if self.scale else str(self.dtype))


class ForeignTflite:
    """A file in LiteRT, called with float values.

    Args:
        path: the file.
        threads: it may use.

    Raises:
        FormatError: LiteRT cannot load it.
        MissingDependencyError: LiteRT is not installed.
    """

    def __init__(self, path: str | Path, *, threads: int = 1) -> None:
        self._interpreter: Any = interpreter(Path(path), threads=threads)
        try:
            self._interpreter.allocate_tensors()
            self._ops: list[Any] = [
                op for op in self._interpreter._get_ops_details() if op["op_name"] != "DELEGATE"
            ]
            inputs, outputs = (
                self._interpreter.get_input_details(), self._interpreter.get_output_details(),
            )  # fmt: skip
        except (ValueError, RuntimeError) as err:
            reason = " ".join(str(err).split())[:200]
            raise FormatError(f"LiteRT cannot load {path}: {reason}") from err
        self.runtime = f"LiteRT {version('ai-edge-litert')}"
        self.metadata: Mapping[str, str] = {}
        self._inputs = {e["name"]: _end(e, self._feeds_images(e["index"])) for e in inputs}
        self._outputs = {e["name"]: _end(e, self._is_image(e["index"])) for e in outputs}
        self.inputs: Mapping[str, Info] = {n: end.info for n, end in self._inputs.items()}
        self.outputs: Mapping[str, Info] = {n: end.info for n, end in self._outputs.items()}
        rounded = any(end.scale for end in (*self._inputs.values(), *self._outputs.values()))
        self.precision: Precision = "int8" if rounded else "float32"

    def close(self) -> None:
        """Release everything."""
        self._interpreter = None

    def __call__(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run it once.

        Raises:
            UsageError: an input is missing, unknown or of another shape.
            FormatError: LiteRT fails to run the file.
        """
        if set(feeds) != set(self.inputs):
            raise UsageError(f"the inputs are {sorted(self.inputs)}, got {sorted(feeds)}")
        for name, end in self._inputs.items():
            x = np.asarray(feeds[name])
            if x.shape != end.info.shape:
                raise UsageError(
                    f"the input {name!r} is {list(end.info.shape)}, got {list(x.shape)}"
                )
            x = x.transpose(0, 2, 3, 1) if end.image else x
            if end.scale:
                limits = np.iinfo(end.dtype)
                x = np.clip(np.rint(x / np.float32(end.scale)) + end.zero, limits.min, limits.max)
            self._interpreter.set_tensor(end.index, np.asarray(x, end.dtype, order="C"))
        try:
            self._interpreter.invoke()
        except (ValueError, RuntimeError) as err:
            raise FormatError(f"LiteRT cannot run the file: {err}") from err
        results = {}
        for name, end in self._outputs.items():
            y = self._interpreter.get_tensor(end.index)
            if end.scale:
                y = (y.astype(np.float32) - end.zero) * np.float32(end.scale)
            results[name] = np.asarray(y.transpose(0, 3, 1, 2) if end.image else y, order="C")
        return results

    def describe(self) -> dict[str, Any]:
        """Inputs, outputs, operators and bytes of constants, ready for JSON."""
        tensors = {e["index"]: e for e in self._interpreter.get_tensor_details()}
        computed = {int(i) for op in self._ops for i in op["outputs"]}
        ends = {end.index for end in (*self._inputs.values(), *self._outputs.values())}
        constant_bytes: Counter[str] = Counter()
        for index, entry in tensors.items():
            if index not in computed and index not in ends and entry["name"]:
                size = (
                    int(np.prod(entry["shape"], dtype=np.int64)) * np.dtype(entry["dtype"]).itemsize
                )
                constant_bytes[np.dtype(entry["dtype"]).name] += size
        kinds: Counter[str] = Counter()
        for op in self._ops:
            first = next((int(i) for i in op["outputs"] if int(i) in tensors), None)
            kind = np.dtype(tensors[first]["dtype"]).name if first is not None else ""
            kinds[f"{op['op_name']} {kind}"] += 1
        return {
            "inputs": {name: self._described(end) for name, end in self._inputs.items()},
            "outputs": {name: self._described(end) for name, end in self._outputs.items()},
            "constants_bytes": dict(constant_bytes.most_common()),
            "operators": dict(kinds.most_common()),
        }

    def _described(self, end: _End) -> str:
        rounding = f", scale {end.scale:.6g}, zero point {end.zero}" if end.scale else ""
        shown = ", ".join("?" if n < 0 else str(n) for n in end.axes)
        return f"{end.dtype} [{shown}]{rounding}"

    def _feeds_images(self, index: int) -> bool:
        """Whether an operator on images takes an input, perhaps through `_THROUGH`."""
        reached = {index}
        for op in self._ops:
            if not reached.intersection(map(int, op["inputs"])):
                continue
            if op["op_name"] in IMAGE:
                return True
            if op["op_name"] in _THROUGH:
                reached.update(map(int, op["outputs"]))
        return False

    def _is_image(self, index: int) -> bool:
        """Whether an operator on images computes an output, perhaps through `_THROUGH`."""
        makers = {int(i): op for op in self._ops for i in op["outputs"]}
        op = makers.get(index)
        while op is not None and op["op_name"] in _THROUGH:
            if op["op_name"] in IMAGE:
                return True
            op = next((makers[int(i)] for i in op["inputs"] if int(i) in makers), None)
        return False


def read_or_open(path: Path, *, threads: int = 1) -> Graph | ForeignTflite:
    """The graph of a file, or a .tflite file that edgeq does not read as one, opened in LiteRT.

    Such are files that other tools quantized, and those with operators that edgeq lacks.

    Args:
        path: an ONNX or LiteRT file.
        threads: LiteRT may use.

    Raises:
        EdgeqError: of `edgeq.graph.files.read`, where LiteRT does not open the file either.
    """
    try:
        return read(path)
    except (UnsupportedError, UsageError) as unread:
        if graph_format(path) != "tflite":
            raise
        try:
            return ForeignTflite(path, threads=threads)
        except FormatError as err:
            raise type(unread)(f"{unread}\n{err}") from err


def _end(entry: Mapping[str, Any], image: bool) -> _End:
    scale, zero = entry["quantization"]
    shape = tuple(int(n) for n in entry["shape"])
    axes = tuple(int(n) for n in entry.get("shape_signature", shape))
    dtype = np.dtype(entry["dtype"])
    rounded = float(scale) if dtype.kind in "iu" else 0.0
    return _End(
        int(entry["index"]), dtype, shape, axes if len(axes) == len(shape) else shape, rounded,
        int(zero), image and len(shape) == 4,
    )  # fmt: skip
