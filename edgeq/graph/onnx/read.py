"""Read an ONNX file as the canonical `Graph` that every target takes.

All shapes are static; pads, axes and defaults are spelled out; constants are folded, as are
batch norms; Gemm and MatMul with a constant are Linear; what exporters spell out (layer norms,
GELU, hard swish) is recognized. See `edgeq.graph.passes`. A graph that `edgeq.graph.onnx.write`
wrote is read back with its very same integers, scales and zero points.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from edgeq.graph.ir import Graph, Shape
from edgeq.graph.onnx.file import read_raw
from edgeq.graph.onnx.infer import inferred, settled
from edgeq.graph.onnx.legacy import modernized
from edgeq.graph.onnx.upgrade import upgraded
from edgeq.graph.operators import check_known
from edgeq.graph.passes import PASSES, QDQ_PASSES
from edgeq.graph.passes.fold import fold
from edgeq.graph.qdq import FORMAT, from_qdq, refuse_foreign
from edgeq.graph.rewrite import copy_constant_outputs, ordered, prune
from edgeq.graph.training import refuse_training


def read_onnx(
    path: str | Path, *, shapes: Mapping[str, Shape] | None = None, batch: int | None = None
) -> Graph:
    """Read a float model, or one that edgeq quantized.

    Args:
        path: the .onnx file; external data must lie beside it.
        shapes: input -> its whole shape, for inputs with unknown axes; an axis that has the same
            name in several inputs need be given once.
        batch: what a first axis becomes that the model leaves open; 1 if None.

    Returns:
        The canonical graph. What was decided about open axes and float types is in its meta under
        "edgeq.batch" and "edgeq.widened".

    Raises:
        FormatError: the file is damaged, contradicts itself, or its external data is missing or
            outside of its folder.
        UnsupportedError: an unknown opset, an operator outside the known set (all of them are
            listed), or a model that another tool quantized.
        UsageError: an open axis that is not given, or a shape that contradicts the model.
        MissingDependencyError: onnx or onnxruntime is not installed.
    """
    raw = read_raw(Path(path), shapes or {}, batch)
    graph = ordered(copy_constant_outputs(raw.graph))
    refuse_training(graph, raw.opset)
    ours = FORMAT in graph.meta
    if ours:
        graph = from_qdq(graph)
    else:
        refuse_foreign(graph)
    graph = prune(graph)
    if raw.opset < 7:
        graph = modernized(graph, raw.opset, inferred)
    else:
        graph = upgraded(graph, raw.opset)
    graph = settled(graph, fold)
    for step in QDQ_PASSES if ours else PASSES:
        graph = step(graph)
    check_known(graph)
    return replace(graph, meta={**graph.meta, **raw.notes})
