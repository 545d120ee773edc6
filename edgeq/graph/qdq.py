"""The QDQ form: quantization inside an ONNX graph as QuantizeLinear and DequantizeLinear.

    value       made -> QuantizeLinear -> DequantizeLinear -> taken          QuantParams
    weight      levels -> DequantizeLinear -> taken                          QuantWeight
    float16     half -> Cast -> taken                                        a float16 constant,
                                                                             or scales

`edgeq.graph.onnx.write` makes it; `from_qdq` reads it back, exactly.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, SchemeError, UnsupportedError
from edgeq.formats.qparams import QuantParams
from edgeq.graph.ir import Constant, Graph, Node, QuantWeight
from edgeq.graph.rewrite import prune

FORMAT = "edgeq.graph"
"""Key of the metadata that marks a file of ours; its value is the form's version."""
PALETTES = "edgeq.palettes"
"""Key of the metadata with the palettes of weights: name -> bits and levels."""
VERSION = "1"
FOREIGN = (
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul",
    "ConvInteger", "MatMulInteger",
)  # fmt: skip
"""Operators by which another tool's quantization shows."""


def refuse_foreign(graph: Graph) -> None:
    """Refuse a graph that another tool quantized.

    Raises:
        UnsupportedError: names the first operators that show it.
    """
    foreign = [n for n in graph.nodes if n.op in FOREIGN]
    if foreign:
        listed = ", ".join(str(n) for n in foreign[:4])
        raise UnsupportedError(
            f"the graph {graph.name} was already quantized by another tool ({len(foreign)} such "
            f"operators: {listed} ...); give the float model it was made from"
        )


def from_qdq(graph: Graph) -> Graph:
    """Turn QuantizeLinear and DequantizeLinear of a file of edgeq into parameters and weights.

    Raises:
        FormatError: it says it is ours and is not in our form.
    """
    if graph.meta.get(FORMAT) != VERSION:
        raise FormatError(
            f"the graph {graph.name} has version {graph.meta.get(FORMAT)} of edgeq's metadata; "
            f"this edgeq reads version {VERSION}"
        )
    try:
        palettes = {
            str(name): (int(palette["bits"]), np.array(palette["levels"], np.int8))
            for name, palette in json.loads(graph.meta.get(PALETTES, "{}")).items()
        }
        return _decoded(graph, palettes)
    except (SchemeError, KeyError, IndexError, ValueError, OverflowError, AttributeError) as err:
        raise FormatError(f"the quantization of the graph {graph.name} is damaged: {err}") from err


Palette = tuple[int, NDArray[np.int8]]


def _decoded(graph: Graph, palettes: dict[str, Palette]) -> Graph:
    constants: dict[str, Constant] = dict(graph.constants)
    quants: dict[str, QuantParams] = {}
    same: dict[str, str] = {}  # value -> the name it goes by in the graph
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.op == "QuantizeLinear":
            continue  # its DequantizeLinear has the same parameters
        if node.op == "Cast" and _half(graph, node):
            constants[node.output] = graph.constants[node.inputs[0]]
        elif node.op != "DequantizeLinear":
            nodes.append(node)
        elif node.inputs[0] in graph.constants:
            widened = replace(graph, constants=constants)  # scales may be widened ones
            constants[node.output] = _weight(widened, node, palettes.get(node.output))
        else:
            producer = graph.producers[node.inputs[0]]
            if producer.op != "QuantizeLinear" or producer.inputs[1:] != node.inputs[1:]:
                raise FormatError(f"{node} has another scale or zero point than its QuantizeLinear")
            raw = producer.inputs[0]
            if raw in graph.inputs or raw in graph.constants:
                same[node.output] = raw
                quants[raw] = _quant(graph, node)
            else:
                same[raw] = node.output
                quants[node.output] = _quant(graph, node)
    renamed = tuple(
        replace(
            n,
            inputs=tuple(same.get(i, i) for i in n.inputs),
            outputs=tuple(same.get(o, o) for o in n.outputs),
        )
        for n in nodes
    )
    meta = {k: v for k, v in graph.meta.items() if k not in (FORMAT, PALETTES)}
    return prune(replace(graph, nodes=renamed, constants=constants, quants=quants, meta=meta))


def _half(graph: Graph, node: Node) -> bool:
    constant = graph.constants.get(node.inputs[0])
    return (
        constant is not None
        and not isinstance(constant, QuantWeight)
        and constant.dtype == np.float16
    )


def _array(graph: Graph, name: str) -> NDArray[Any]:
    constant = graph.constants.get(name)
    if constant is None or isinstance(constant, QuantWeight):
        raise FormatError(f"{name!r} is not a constant")
    return constant


def _quant(graph: Graph, node: Node) -> QuantParams:
    scale, zero = (_array(graph, name) for name in node.inputs[1:3])
    if scale.size != 1 or scale.dtype != np.float32 or zero.dtype.name not in ("int8", "uint8"):
        raise FormatError(f"{node} does not quantize to 8 bits with one scale")
    shift = 128 if zero.dtype == np.uint8 else 0
    return QuantParams(float(scale.reshape(-1)[0]), int(zero.reshape(-1)[0]) - shift)


def _weight(graph: Graph, node: Node, palette: Palette | None) -> QuantWeight:
    levels, scales = (_array(graph, name) for name in node.inputs[:2])
    scales = scales.astype(np.float32)
    bits = {"int4": 4, "int8": 8, "int32": 32}.get(levels.dtype.name)
    if bits is None:
        raise FormatError(
            f"{node} dequantizes {levels.dtype.name}; edgeq reads int4, int8 and int32"
        )
    if len(node.inputs) > 2 and _array(graph, node.inputs[2]).astype(np.int32).any():
        raise FormatError(f"{node} has zero points; edgeq writes weights without zero points")
    block = int(node.attrs.get("block_size", 0)) or None
    axis = None if scales.ndim == 0 else int(node.attrs.get("axis", 1)) % max(levels.ndim, 1)
    table = None
    if palette is not None:
        bits, table = palette
    levels = np.asarray(levels.astype(np.int32 if bits == 32 else np.int8), order="C")
    return QuantWeight(levels, scales, bits, axis, block, table)
