"""Every constant and operator of a converted graph, to compare a file with what it should be.

The conversion of a graph always makes the same file, so a file is compared part by part with a new
conversion of its source: weights, biases, scales, zero points, float constants, tables, and the
operators with their settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.converters.coreml.exec.load import Tensor, functions, open_file
from edgeq.converters.ort.graph_read import ort_tensors
from edgeq.converters.ort.run import read_graph
from edgeq.converters.tflite.lower.run import METADATA
from edgeq.converters.tflite.read import Header, read

Parts = dict[str, bytes]
"""What a part is called -> all that it is."""


def parts(path: Path) -> Parts:
    """Constants and operators of a file or package.

    Raises:
        FormatError: it is damaged, or edgeq did not write it.
        MissingDependencyError: the target's package is not installed.
    """
    kinds = {".tflite": _tflite, ".mlpackage": _coreml, ".onnx": _onnx, ".ort": _ort}
    return dict(kinds[path.suffix.lower()](path))


def differing(path: Path, right: Path) -> tuple[int, list[str]]:
    """How many parts were compared, and which of them differ, are missing, or are too many."""
    mine, other = parts(path), parts(right)
    names = list(dict.fromkeys([*other, *mine]))
    return len(names), [name for name in names if mine.get(name) != other.get(name)]


def _tflite(path: Path) -> Iterator[tuple[str, bytes]]:
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


def _rounding(header: Header, found: Any) -> list[Any]:
    if found is None:
        return []
    about = [_listed(found.scale), _listed(found.zeroPoint), found.quantizedDimension]
    return [*about, vars(found.details) if found.details is not None else None]


def _listed(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _onnx(path: Path) -> Iterator[tuple[str, bytes]]:
    graph = read_graph(path).graph
    for tensor in graph.initializer:
        yield f"constant {tensor.name}", tensor.SerializeToString(deterministic=True)
    for i, node in enumerate(graph.node):
        text = node.SerializeToString(deterministic=True)
        yield f"operator {i} that makes {node.output[0]}", text


def _ort(path: Path) -> Iterator[tuple[str, bytes]]:
    for name, array in ort_tensors(path).items():
        yield f"constant {name}", f"{array.dtype} {array.shape}".encode() + array.tobytes()


def _coreml(path: Path) -> Iterator[tuple[str, bytes]]:
    for name, function in functions(open_file(path)).items():
        for i, op in enumerate(function.block.walk()):
            about = [f"{op.type} {op.outputs}".encode()]
            for key, given in sorted(op.inputs.items()):
                about.append(key.encode())
                about += [_given(one) for one in given]
            yield f"{op.type} {op.name or i} of {name}", b"\0".join(about)


def _given(one: str | Tensor) -> bytes:
    if isinstance(one, str):
        return one.encode()
    value = one.get()
    array = np.asarray(value)
    return str(one.type).encode() + (
        array.tobytes() if array.dtype.kind in "fiub" else repr(value).encode()
    )
