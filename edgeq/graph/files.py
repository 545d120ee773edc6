"""File formats of graphs, and reading a graph from any of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgeq.core.errors import FormatError, UsageError
from edgeq.core.files import STAND_IN_BYTES, stand_in
from edgeq.graph.tflite import IDENTIFIER

if TYPE_CHECKING:
    from edgeq.graph.ir import Graph, Shape

GraphFormat = Literal["onnx", "tflite"]

_IR_VERSION_TAG = 0x08
_TAGS_AFTER_IR_VERSION = frozenset((0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42, 0x72, 0xA2, 0xCA))
"""First bytes of the tags that may follow ``ir_version`` in a ModelProto: producer_name,
producer_version, domain, model_version, doc_string, graph, opset_import, metadata_props,
training_info and functions."""


def graph_format(path: str | Path) -> GraphFormat | None:
    """The format of a file that holds a graph, or None for a file of another kind.

    The first bytes decide. Where they are of neither format, or there is no such file, the name
    does: the reader of that format says what is wrong with it.

    Source: onnx.proto (ModelProto); schema.fbs of LiteRT (file_identifier).
    """
    path = Path(path)
    head = _head(path)
    if head[4:8] == IDENTIFIER:
        return "tflite"
    if len(head) > 2 and head[0] == _IR_VERSION_TAG and head[2] in _TAGS_AFTER_IR_VERSION:
        return "onnx"
    by_suffix: dict[str, GraphFormat] = {".onnx": "onnx", ".tflite": "tflite"}
    return by_suffix.get(path.suffix.lower())


def read(
    path: str | Path,
    *,
    shapes: Mapping[str, Shape] | None = None,
    batch: int | None = None,
    dequantize: bool = False,
) -> Graph:
    """Read the canonical graph of an ONNX or LiteRT file.

    Args:
        path: of the file.
        shapes: see `edgeq.graph.onnx.read.read_onnx`; of a LiteRT file in its own axes.
        batch: likewise.
        dequantize: see `edgeq.graph.tflite.read.read_tflite`; of a LiteRT file only.

    Raises:
        FormatError: a pointer of Git LFS or a web page lies where the file should.
        UsageError: a file of another format, or an argument that does not fit the file.
        EdgeqError: see the reader of each.
    """
    path = Path(path)
    kind = graph_format(path)
    if words := stand_in(_head(path)):
        raise FormatError(f"{path} {words}")
    if dequantize and kind != "tflite":
        raise UsageError(
            f"--dequantize converts the weights of a .tflite file, and {path} is not one; leave "
            "--dequantize out"
        )
    if kind == "onnx":
        from edgeq.graph.onnx.read import read_onnx

        return read_onnx(path, shapes=shapes, batch=batch)
    if kind != "tflite":
        raise UsageError(f"{path} is not a graph; give an ONNX (.onnx) or LiteRT (.tflite) file")
    from edgeq.graph.tflite.read import read_tflite

    return read_tflite(path, dequantize=dequantize, shapes=shapes, batch=batch)


def _head(path: Path) -> bytes:
    """The first bytes of a file; none where there is no file or it cannot be read."""
    try:
        if not path.is_file():
            return b""
        with path.open("rb") as file:
            return file.read(STAND_IN_BYTES)
    except OSError:
        return b""
