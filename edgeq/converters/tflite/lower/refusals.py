"""Why nodes cannot be lowered to a .tflite file, each with the nearest supported form.

Every function gives the reason, or None if there is none.
"""

from __future__ import annotations

import numpy as np

from edgeq.converters.tflite.lower.emitters import TfliteEmitter
from edgeq.graph.ir import Graph, Node, QuantWeight
from edgeq.graph.operators import MATRICES, weight_of

BLOCKS = (32, 64, 128, 256)
"""Levels that may share a scale."""


def _constant_weight(graph: Graph, node: Node) -> str | None:
    for place in (1, 2):
        name = node.inputs[place] if place < len(node.inputs) else ""
        if name and name not in graph.constants:
            return f"its input {name!r} is computed; the nearest supported is a constant"
    return None


def conv(graph: Graph, node: Node) -> str | None:
    """Check a convolution."""
    rank = len(graph.info(node.inputs[0]).shape)
    if rank not in (3, 4):
        return f"it has {rank - 2} spatial axes; the nearest supported has 1 or 2"
    if reason := _constant_weight(graph, node):
        return reason
    weight = graph.constants[node.inputs[1]]
    if isinstance(weight, QuantWeight) and weight.block is not None:
        return "its weight has scales for blocks; the nearest supported is a scale for each channel"
    channel = weight_of(node).channels
    if isinstance(weight, QuantWeight) and weight.axis not in (None, channel):
        return (
            f"its scales differ along axis {weight.axis}; the nearest supported differ along axis "
            f"{channel}, the channels of its output"
        )
    return None


def conv_transpose(graph: Graph, node: Node) -> str | None:
    """Check a transposed convolution."""
    if int(node.attrs.get("group", 1)) != 1:
        return f"its group is {node.attrs['group']}; the nearest supported is 1"
    if reason := conv(graph, node):
        return reason
    if any(int(d) != 1 for d in node.attrs.get("dilations") or ()):
        return f"its dilations are {list(node.attrs['dilations'])}; the nearest supported are 1"
    n = len(graph.info(node.inputs[0]).shape) - 2
    over = node.attrs.get("output_padding") or [0] * n
    pads = node.attrs.get("pads") or [0] * (2 * n)
    if any(int(a) > int(b) for a, b in zip(over, pads[n:], strict=True)):
        return (
            f"its output_padding {list(over)} is larger than its pads {list(pads[n:])}; the "
            "nearest supported is at most as large"
        )
    return None


def pool(graph: Graph, node: Node) -> str | None:
    """Check a pool."""
    rank = len(graph.info(node.inputs[0]).shape)
    if rank not in (3, 4):
        return f"it has {rank - 2} spatial axes; the nearest supported has 1 or 2"
    if any(int(d) != 1 for d in node.attrs.get("dilations") or ()):
        return f"its dilations are {list(node.attrs['dilations'])}; the nearest supported are 1"
    if len(node.outputs) > 1 and node.outputs[1]:
        return "its indices are asked for; only its values can be made"
    return None


def linear(graph: Graph, node: Node) -> str | None:
    """Check a product with a constant."""
    if reason := _constant_weight(graph, node):
        return reason
    weight = graph.constants[node.inputs[1]]
    if not isinstance(weight, QuantWeight):
        return None
    if weight.block is not None:
        return _blocks(weight)
    if weight.axis not in (None, 0):
        return "its scales differ along K; the nearest supported differ by row or blocks of K"
    return None


def _blocks(weight: QuantWeight) -> str | None:
    if weight.axis != 1 or weight.block not in BLOCKS:
        return (
            f"its blocks are {weight.block} along axis {weight.axis}; the nearest supported are "
            f"{', '.join(map(str, BLOCKS))} along axis 1"
        )
    if not (weight.scales == weight.scales.astype(np.float16)).all():
        return "its scales are no float16, which the file holds of blocks; quantize with such"
    return None


def matmul(graph: Graph, node: Node) -> str | None:
    """Check a product of two values."""
    ranks = [len(graph.info(name).shape) for name in node.inputs]
    if min(ranks) < 2:
        return f"its factors have {ranks} axes; the nearest supported have 2 or more"
    return None


def gather(graph: Graph, node: Node) -> str | None:
    """Check a selection of rows or elements."""
    table = graph.constants.get(node.inputs[0])
    if not isinstance(table, QuantWeight):
        return None
    if len(table.shape) != 2 or int(node.attrs.get("axis", 0)) != 0:
        return "it takes integers of no table's rows; the nearest supported is axis 0 of a matrix"
    if table.block is not None:
        return _blocks(table)
    if table.axis not in (None, 0):
        return "its scales differ along its columns; the nearest supported differ by row"
    return None


def pad(graph: Graph, node: Node) -> str | None:
    """Check a padding."""
    mode = node.attrs.get("mode", "constant")
    if mode not in ("constant", "reflect"):
        return f"its mode is {mode}; the nearest supported are constant and reflect"
    return None


def arg(graph: Graph, node: Node) -> str | None:
    """Check the search for an extreme."""
    if node.attrs.get("select_last_index"):
        return "it takes the last of equals; the nearest supported takes the first"
    return None


def cast(graph: Graph, node: Node) -> str | None:
    """Check a cast."""
    known = ("float32", "float64", "float16", "int64", "int32", "int8", "uint8", "bool")
    dtype = graph.info(node.output).dtype
    return None if dtype in known else f"it makes {dtype}; the nearest supported is int32"


def image(graph: Graph, node: Node) -> str | None:
    """Check an operator that supports images only."""
    rank = len(graph.info(node.inputs[0]).shape)
    return None if rank == 4 else f"its input has {rank} axes; the nearest supported has 4"


def operands(graph: Graph, node: Node, emitter: TfliteEmitter) -> str | None:
    """Check types, shapes and scales of a node's inputs and outputs."""
    if fault := _types(graph, node, emitter):
        return fault
    for name in node.inputs:
        constant = graph.constants.get(name)
        if (
            isinstance(constant, QuantWeight)
            and constant.block is not None
            and node.op not in MATRICES
        ):
            return f"{name!r} has scales for blocks; only Linear and Gather take such"
    for name in (*node.inputs, *node.outputs):
        if name and len(graph.info(name).shape) > emitter.max_rank:
            rank = len(graph.info(name).shape)
            return f"{name!r} has {rank} axes; the nearest supported has {emitter.max_rank}"
    return None


def _types(graph: Graph, node: Node, emitter: TfliteEmitter) -> str | None:
    for name in (*node.inputs[:1], *node.outputs):  # other inputs may be places or axes
        dtype = graph.info(name).dtype if name and name not in graph.quants else "float32"
        if dtype in ("int8", "uint8") and not emitter.whole_numbers:
            return f"{name!r} is {dtype}; the nearest supported are float32 and int32 (Cast before)"
        if dtype in emitter.lacks:
            near = "int32" if dtype == "int64" and "int32" not in emitter.lacks else "float32"
            return f"{name!r} is {dtype}; the nearest supported is {near} (Cast before)"
    return None
