"""Files of onnxruntime that hold a graph: run, and their integers read back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.metadata_blob import read_blob
from edgeq.converters.ort.file import unpack_rows
from edgeq.converters.ort.run import file_metadata, read_graph
from edgeq.converters.ort.session import TYPES, open_session, ort_tensors, require
from edgeq.converters.runners import Precision
from edgeq.core.errors import FormatError
from edgeq.formats.qparams import QuantParams
from edgeq.graph.ir import Info, QuantWeight

HELD = "edgeq.held"
"""Key of the metadata with the names of the tensors that hold weights, scales and zero points."""


class OrtGraphRunner:
    """Any .onnx or .ort file in onnxruntime's CPU provider, with exact sums of 8-bit products.

    Args:
        path: of the file.
        threads: onnxruntime's.
        free_axes: take a file that leaves axes open; they are -1 in the shapes.

    Raises:
        FormatError: onnxruntime refuses it, or an axis is unknown and ``free_axes`` is false.
        MissingDependencyError: onnxruntime is not installed.
    """

    precision: Precision = "float32"

    def __init__(self, path: Path, *, threads: int = 1, free_axes: bool = False) -> None:
        _, onnxruntime = require()
        self._session = open_session(path, threads=threads)
        self.runtime = f"onnxruntime {onnxruntime.__version__}"
        ends = self._session.get_inputs(), self._session.get_outputs()
        self.inputs, self.outputs = (
            {entry.name: _info(entry, path, free_axes) for entry in end} for end in ends
        )

    def __call__(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph once; gives the outputs by name."""
        given = {name: np.asarray(array) for name, array in feeds.items()}
        try:
            results = self._session.run(list(self.outputs), given)
        except Exception as err:
            raise FormatError(f"onnxruntime cannot run it: {err}") from err
        return dict(zip(self.outputs, results, strict=True))

    @property
    def metadata(self) -> dict[str, str]:
        """The file's metadata."""
        return dict(self._session.get_modelmeta().custom_metadata_map)

    def close(self) -> None:
        """Close the session."""
        self._session = None


def read_weights(path: Path) -> Iterator[tuple[str, QuantWeight]]:
    """Every packed constant of a file that edgeq wrote, as the source had it.

    Raises:
        FormatError: edgeq did not write it, or it is damaged.
    """
    places, tensors = _opened(path)
    for name, entry in places["weights"].items():
        shape, block = tuple(entry["shape"]), entry["block"]
        scales = _scales(places, tensors, entry)
        if "codes" in entry:
            codes = _tensor(tensors, entry["codes"]).reshape(shape[0], -1)
            n = -(-shape[1] // entry["width"]) * entry["width"]
            middle = 1 << (entry["bits"] - 1)
            levels = unpack_rows(codes, entry["bits"], n).astype(np.int16) - middle
            rows = levels[:, : shape[1]].astype(np.int8)
            scales = scales.reshape(shape[0], -1)
            if block is None:
                _alike(name, scales)
                scales = scales[:, 0] if entry["axis"] == 0 else scales[0, 0]
            yield name, QuantWeight(rows, np.asarray(scales), entry["bits"], entry["axis"], block)
            continue
        stored = _tensor(tensors, entry["levels"])
        if stored.dtype == np.uint8:  # with the zero point 128
            stored = (stored ^ np.uint8(128)).view(np.int8)
        levels = stored.astype(np.int32 if entry["bits"] == 32 else np.int8)
        levels = _channels_first(levels, shape)
        if entry["turned"]:
            levels, scales = levels.T, scales.T if block else scales
        if block is None:  # one that is multiplied by lies along the axis it is for
            scales = scales.reshape(() if entry["axis"] is None else -1)
        if entry["bits"] == 32:  # one scale where the weight has one
            scales = np.resize(scales, shape)
        bits = 8 if entry["bits"] == 4 and stored.dtype == np.int8 else entry["bits"]
        yield (
            name,
            QuantWeight(
                np.asarray(levels, order="C"),  # which leaves a single one without axes
                np.asarray(scales, order="C"),
                bits,
                entry["axis"],
                block,
            ),
        )


def read_quants(path: Path) -> dict[str, QuantParams]:
    """How each rounded value is rounded, read from a file that edgeq wrote.

    Where onnxruntime fused operators it keeps equal scales and zero points once; some are missing.

    Raises:
        FormatError: edgeq did not write it, or it is damaged.
    """
    places, tensors = _opened(path)
    params = {}
    for name, (scale, zero) in places["quants"].items():
        if scale not in tensors or zero not in tensors:
            continue
        point = tensors[zero]
        shift = 128 if point.dtype == np.uint8 else 0
        params[name] = QuantParams(float(tensors[scale].item()), int(point.item()) - shift)
    return params


def _scales(
    places: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]], entry: Mapping[str, Any]
) -> NDArray[np.float32]:
    """The scales of a weight. A fused operator computes those of its bias as a product."""
    name = entry["scales"]
    if name in tensors or "product" not in entry:
        return _tensor(tensors, name)
    step, w = entry["product"]
    scales: NDArray[np.float32] = _tensor(tensors, places["weights"][w]["scales"])
    return np.float32(step) * scales


def _channels_first(levels: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """A constant in its own order and rank: onnxruntime gives those beside images four axes, and
    stores them with the channels last."""
    full = (1,) * (levels.ndim - len(shape)) + shape
    if levels.shape == full:
        return levels.reshape(shape)
    if levels.ndim != 4 or levels.shape != (*full[:1], *full[2:], full[1]):
        return levels
    return np.moveaxis(levels, -1, 1).reshape(shape)


def _alike(name: str, scales: NDArray[np.float32]) -> None:
    if scales.size and (scales != scales[:, :1]).any():
        raise FormatError(f"{name} has several scales in a row that had one")


def _tensor(tensors: Mapping[str, NDArray[Any]], name: str) -> NDArray[Any]:
    if name not in tensors:
        raise FormatError(f"the file holds no tensor {name!r}")
    tensor = tensors[name]
    return tensor.astype(np.float32) if tensor.dtype == np.float16 else tensor


def _opened(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The names of the tensors of each weight and value, and all constants of the file."""
    text = file_metadata(path).get(HELD)
    if text is None:
        raise FormatError(f"{path} was not converted by edgeq: it does not say what it holds")
    try:
        places = read_blob(text)
    except FormatError as err:
        raise FormatError(f"{path}: {err}") from err
    return places, (ort_tensors if path.suffix == ".ort" else _onnx_tensors)(path)


def _onnx_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """Constants of an ONNX file; one that is cast has two names and its stored type."""
    onnx, _ = require()
    graph = read_graph(path).graph
    tensors = {entry.name: onnx.numpy_helper.to_array(entry) for entry in graph.initializer}
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] in tensors:
            tensors[node.output[0]] = tensors[node.input[0]]
    return tensors


def has_known_axes(path: Path) -> bool:
    """Whether a file's inputs and outputs have fixed shapes, as `OrtGraphRunner` needs them.

    Raises:
        FormatError: it cannot be read.
    """
    if path.suffix.lower() == ".ort":
        session = open_session(path)
        ends = (*session.get_inputs(), *session.get_outputs())
        return all(isinstance(n, int) for entry in ends for n in entry.shape)
    graph = read_graph(path).graph
    constants = {tensor.name for tensor in graph.initializer}
    ends = (*(entry for entry in graph.input if entry.name not in constants), *graph.output)
    return bool(ends) and all(
        dim.HasField("dim_value") for entry in ends for dim in entry.type.tensor_type.shape.dim
    )


def _info(entry: Any, path: Path, free_axes: bool) -> Info:
    shape = tuple(n if isinstance(n, int) else -1 for n in entry.shape)
    if not free_axes and any(not isinstance(n, int) for n in entry.shape):
        raise FormatError(
            f"{path}: {entry.name} is {list(entry.shape)}, which leaves axes open; convert the "
            "model with --shape first"
        )
    return Info(shape, str(TYPES.get(entry.type, entry.type)))


def read_parts(path: Path) -> Iterator[tuple[str, bytes]]:
    """Every constant and operator of the file: its name, and its content with all settings."""
    if path.suffix.lower() == ".ort":
        for name, array in ort_tensors(path).items():
            yield f"constant {name}", f"{array.dtype} {array.shape}".encode() + array.tobytes()
        return
    graph = read_graph(path).graph
    for tensor in graph.initializer:
        yield f"constant {tensor.name}", tensor.SerializeToString(deterministic=True)
    for i, node in enumerate(graph.node):
        text = node.SerializeToString(deterministic=True)
        yield f"operator {i} that makes {node.output[0]}", text
