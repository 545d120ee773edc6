"""An ONNX file of a graph, written only if onnxruntime loads it."""

from __future__ import annotations

from pathlib import Path

from edgeq.core.errors import UsageError
from edgeq.core.files import write_whole
from edgeq.graph.execute import check_opens
from edgeq.graph.ir import Graph
from edgeq.graph.onnx.write import Integers, to_bytes


def write_onnx(graph: Graph, path: str | Path, *, activations: Integers = "int8") -> None:
    """Write a graph with its quantization.

    Args:
        graph: canonical.
        path: the .onnx file to make or replace; it is the old one or the whole new one.
        activations: how the levels of activations are held; in "uint8" they and their zero
            points are 128 more. Files of opset 21 always hold them so.

    Raises:
        UnsupportedError: more than 2 GB.
        UsageError: another suffix, or unknown ``activations``.
        FormatError: onnxruntime does not load the file; names the operator.
        MissingDependencyError: onnx or onnxruntime is not installed.
        EdgeqError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".onnx":
        raise UsageError(f"the output is {path.name}; the name of an ONNX file must end in .onnx")
    content = to_bytes(graph, activations=activations)
    check_opens(graph, content)
    write_whole(path, [content], "the model")
