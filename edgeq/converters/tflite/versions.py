"""Which version of an operator a file asks the runtime for: the first that knows its types.

Source: ``tflite/tools/versioning/op_version.cc`` of LiteRT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgeq.converters.tflite.operators import Value


def version(
    code: str, inputs: Sequence[Value | None], dtype: str, settings: Mapping[str, Any]
) -> int:
    """The version of an operator.

    Args:
        code: the schema's name.
        inputs: what it takes.
        dtype: of what it makes.
        settings: of the operator.
    """
    x = inputs[0]
    assert x is not None
    if code in _WEIGHTED:
        return _WEIGHTED[code](inputs, x.dtype, settings)
    if code == "CAST":
        kinds = {x.dtype, dtype}
        return 6 if "int4" in kinds else 5 if "float16" in kinds else 3 if "int8" in kinds else 1
    if code == "DEQUANTIZE":
        return {"int4": 6, "int8": 5 if x.buffer else 2, "float16": 3}.get(x.dtype, 1)
    if code == "GATHER":
        return {"int4": 7, "bool": 3, "int8": 2}.get(x.dtype, 1)
    if code in ("RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR") and any(settings.values()):
        return 3
    rank = max(len(v.shape) for v in inputs if v is not None)
    if code == "TRANSPOSE" and rank > 4:
        return 4 if rank == 5 else 6
    if code in _WIDE and rank > 4:
        return _WIDE[code]
    if code == "BROADCAST_TO":
        return 3 if x.dtype == "int8" else 2
    if code in ("TRANSPOSE", "STRIDED_SLICE") and x.dtype == "bool":
        return 3
    if x.dtype == "int8" and code not in _FIRST:
        return 3 if code == "TILE" else 2
    return 1


_FIRST = frozenset({"QUANTIZE", "RESHAPE", "LEAKY_RELU", "PRELU", "HARD_SWISH", "SELECT_V2"})
"""Operators whose first version knows int8."""
_WIDE = {"MAXIMUM": 3, "MINIMUM": 3, "SUB": 3, "DIV": 2, "PAD": 4, "PADV2": 4, "SLICE": 5,
         "STRIDED_SLICE": 4}  # fmt: skip
"""Operator -> the version from which it takes more than four axes."""


def _conv(inputs: Sequence[Value | None], x: str, settings: Mapping[str, Any]) -> int:
    w = inputs[1]
    assert w is not None
    assert inputs[0] is not None
    if inputs[0].shape[3] != w.shape[3]:
        return 6  # groups
    return {"float32": 1, "int4": 7, "int8": 3 if x == "int8" else 5}[w.dtype]


def _depthwise(inputs: Sequence[Value | None], x: str, settings: Mapping[str, Any]) -> int:
    w = inputs[1]
    assert w is not None
    if w.dtype == "float32":
        return 2 if (settings["dilationWFactor"], settings["dilationHFactor"]) != (1, 1) else 1
    return {"int4": 7, "int8": 3 if x == "int8" else 6}[w.dtype]


def _transposed(inputs: Sequence[Value | None], x: str, settings: Mapping[str, Any]) -> int:
    w = inputs[1]
    assert w is not None
    if settings["fusedActivationFunction"]:
        return 4
    return 3 if len(inputs) == 4 else 2 if w.dtype == "int8" else 1


def _full(inputs: Sequence[Value | None], x: str, settings: Mapping[str, Any]) -> int:
    w = inputs[1]
    assert w is not None
    if w.dtype != "float32" and x == "float32":
        return 12
    if w.dtype == "int4":
        return 10
    if len(inputs) == 2:
        return 6
    return 5 if settings["keepNumDims"] else 4 if x == "int8" else 1


def _embedding(inputs: Sequence[Value | None], x: str, settings: Mapping[str, Any]) -> int:
    table = inputs[1]
    assert table is not None
    return 1 if table.dtype == "float32" else 4


_WEIGHTED = {
    "CONV_2D": _conv,
    "DEPTHWISE_CONV_2D": _depthwise,
    "TRANSPOSE_CONV": _transposed,
    "FULLY_CONNECTED": _full,
    "EMBEDDING_LOOKUP": _embedding,
}
