"""A package that a graph was lowered to: its integers read back, and executed.

See `edgeq.converters.coreml.lower`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.coreml.exec.load import Function, MilTensor, Op, functions, open_file
from edgeq.converters.coreml.exec.machine import Arithmetic, Machine, refuse_unknown
from edgeq.converters.coreml.lower import weights
from edgeq.converters.metadata_blob import read_blob
from edgeq.converters.runners import Precision
from edgeq.core.errors import FormatError, UsageError, unknown
from edgeq.formats.qparams import QuantParams
from edgeq.graph.feeds import held_as
from edgeq.graph.ir import Info, QuantWeight

ENTRY, FORMAT = "edgeq.graph", 1
"""Entry of the model's user-defined metadata, and its version."""
_RUNTIME = f"edgeq.converters.coreml.exec (NumPy {np.__version__})"

# --- reading back -----------------------------------------------------------------------------


class GraphPackage:
    """An open package with a graph that edgeq converted."""

    def __init__(self, path: str | Path) -> None:
        file = open_file(path)
        entry = file.metadata.get(ENTRY)
        if entry is None or file.spec.WhichOneof("Type") != "mlProgram":
            raise FormatError(f"{path} is not a graph that edgeq wrote")
        try:
            self.about: dict[str, Any] = read_blob(entry)
        except FormatError as err:
            raise FormatError(f"{path}: {err}") from err
        try:
            self.metadata = dict(file.metadata)
            if self.about["format"] != FORMAT:
                raise FormatError(
                    f"{path} was written by another version of edgeq: its format is "
                    f"{self.about['format']}, "
                    f"this edgeq reads {FORMAT}"
                )
            self.inputs = {i["name"]: (i["id"], _info(i)) for i in self.about["inputs"]}
            self.outputs = {o["name"]: (o["id"], _info(o)) for o in self.about["outputs"]}
            self.constants: dict[str, Any] = self.about["constants"]
            self.biases: dict[str, Any] = self.about["biases"]
            self.quants: dict[str, str] = self.about["quants"]
        except (ValueError, KeyError, TypeError) as err:
            raise FormatError(f"{path}: its description is damaged ({err})") from err
        by_name = functions(file)
        if "main" not in by_name:
            raise FormatError(f"{path} has no function 'main'")
        self.function: Function = by_name["main"]
        self.ops: dict[str, Op] = {
            name: op for op in self.function.block.ops for name, _ in op.outputs
        }

    def quant(self, name: str) -> QuantParams:
        """How a value is rounded."""
        op = self.ops.get(self.quants[name])
        if op is None or op.type != "quantize":
            raise FormatError(f"the program does not round {name!r}")
        scale = float(np.float32(weights.constant(op, "scale", self.ops)))
        return QuantParams(scale, int(weights.constant(op, "zero_point", self.ops)))


def _info(entry: Mapping[str, Any]) -> Info:
    return Info(tuple(int(n) for n in entry["shape"]), str(entry["dtype"]))


def read_weights(path: Path) -> Iterator[tuple[str, QuantWeight]]:
    """Quantized constants by the graph's names, with levels and scales as the package holds them.

    A bias is told where its integers can be; see `edgeq.converters.coreml.lower`.

    Raises:
        FormatError: the package is damaged, or edgeq did not write it.
    """
    package = GraphPackage(path)
    scales: dict[str, NDArray[np.float32]] = {}
    for name, about in package.constants.items():
        weight = weights.read(about["id"], about["scales"], about, package.ops)
        scales[name] = weight.scales
        yield name, weight
    for name, about in package.biases.items():
        values = weights.constant(package.ops[about["id"]], "val", package.ops)
        step = weights.bias_scales(
            package.quant(about["value"]).scale, scales[about["weight"]], values.shape
        )
        levels = weights.bias_levels(values, step).astype(np.int32)
        yield name, QuantWeight(levels, step, 32, axis=0)


def read_quants(path: Path) -> dict[str, QuantParams]:
    """How values are rounded, by the graph's names, as the package holds it.

    Raises:
        FormatError: the package is damaged, or edgeq did not write it.
    """
    package = GraphPackage(path)
    return {name: package.quant(name) for name in package.quants}


# --- running ----------------------------------------------------------------------------------


class CoreMLGraphRunner:
    """A package in edgeq's executor, called by the graph's own names, shapes and types.

    Args:
        path: of the package.
        arithmetic: what float16 is held as.

    Raises:
        FormatError: the package is damaged, or edgeq did not write it.
    """

    def __init__(self, path: str | Path, arithmetic: Arithmetic = "float32") -> None:
        self._package = GraphPackage(path)
        refuse_unknown(self._package.function)
        self._machine = Machine(arithmetic)
        self.runtime = _RUNTIME
        self.metadata: Mapping[str, str] = self._package.metadata
        self.precision: Precision = self._package.about["precision"]
        self.inputs: Mapping[str, Info] = {n: info for n, (_, info) in self._package.inputs.items()}
        self.outputs: Mapping[str, Info] = {
            n: info for n, (_, info) in self._package.outputs.items()
        }

    def __call__(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run it once.

        Raises:
            UsageError: an input is missing, unknown, or of another shape.
        """
        for name in feeds:
            if name not in self.inputs:
                raise UsageError(unknown("input", name, self.inputs))
        inputs = {}
        for name, (label, info) in self._package.inputs.items():
            if name not in feeds:
                raise UsageError(f"the input {name!r} is missing: {list(info.shape)} {info.dtype}")
            value = np.asarray(feeds[name])
            if value.shape != info.shape:
                raise UsageError(
                    f"the input {name!r} has shape {list(value.shape)}; the model takes "
                    f"{list(info.shape)}"
                )
            kind = np.float32 if info.dtype == "float32" else np.int32
            inputs[label] = held_as(name, value, kind).reshape(info.shape or (1,))
        results = self._machine.run(self._package.function, inputs)
        return {
            name: np.asarray(results[label]).reshape(info.shape).astype(info.dtype)
            for name, (label, info) in self._package.outputs.items()
        }

    def close(self) -> None:
        """Release everything."""
        self._machine = Machine()


def read_parts(path: Path) -> Iterator[tuple[str, bytes]]:
    """Every constant and operator of the file: its name, and its content with all settings."""
    for name, function in functions(open_file(path)).items():
        for i, op in enumerate(function.block.walk()):
            about = [f"{op.type} {op.outputs}".encode()]
            for key, values in sorted(op.inputs.items()):
                about.append(key.encode())
                about += [_encoded(one) for one in values]
            yield f"{op.type} {op.name or i} of {name}", b"\0".join(about)


def _encoded(one: str | MilTensor) -> bytes:
    if isinstance(one, str):
        return one.encode()
    value = one.get()
    array = np.asarray(value)
    return str(one.type).encode() + (
        array.tobytes() if array.dtype.kind in "fiub" else repr(value).encode()
    )
