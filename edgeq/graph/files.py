"""Reading a graph from whatever file holds one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edgeq.core.errors import UsageError
from edgeq.graph.ir import Graph, Shape
from edgeq.graph.onnx.read import read_onnx

SUFFIXES = (".onnx", ".tflite")
"""What files that hold graphs end in."""


def read(
    path: str | Path,
    *,
    shapes: Mapping[str, Shape] | None = None,
    batch: int | None = None,
    dequantize: bool = False,
) -> Graph:
    """The canonical graph of an .onnx or .tflite file.

    Args:
        path: of the file.
        shapes: see `edgeq.graph.onnx.read.read_onnx`; of a .tflite file in its own axes.
        batch: likewise.
        dequantize: see `edgeq.graph.tflite.read.read_tflite`; of a .tflite file only.

    Raises:
        UsageError: another suffix, or an argument that does not fit the file.
        EdgeqError: see the reader of each.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if dequantize and suffix != ".tflite":
        raise UsageError(
            f"--dequantize converts the weights of a .tflite file, and {path} is not one; leave "
            "--dequantize out"
        )
    if suffix == ".onnx":
        return read_onnx(path, shapes=shapes, batch=batch)
    if suffix != ".tflite":
        raise UsageError(f"{path} is not a graph: its name must end in .onnx or .tflite")
    from edgeq.graph.tflite.read import read_tflite

    return read_tflite(path, dequantize=dequantize, shapes=shapes, batch=batch)
