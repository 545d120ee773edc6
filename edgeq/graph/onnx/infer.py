"""Infer the shape of every value, and fold the constants that depend on shapes.

Exporters compute shapes while the model runs (Shape, Gather, Concat, Reshape). With the inputs'
shapes known these are constants, which make more shapes known, and so on until nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.graph.ir import Constant, Graph, Info, Node, QuantWeight
from edgeq.graph.onnx.file import require
from edgeq.graph.onnx.write import to_model
from edgeq.graph.operators import OPERATORS
from edgeq.graph.windows import whole_windows

_SMALL = 1024
"""Elements a constant may have whose values could matter for a shape."""
_ROUNDS = 64
_BY_VALUE = ("NonZero", "Unique", "Compress", "NonMaxSuppression", "Range", "OneHot",
             "ConstantOfShape")  # fmt: skip
"""Operators whose shapes depend on what they take."""


def settled(graph: Graph, fold: Callable[[Graph], Graph]) -> Graph:
    """Infer shapes and fold constants until every shape is known.

    Args:
        graph: in the words of opset 21; shapes of its inputs are known.
        fold: folds what depends on constants, and on shapes that are known.

    Raises:
        FormatError: shapes or types contradict each other.
        UnsupportedError: a shape depends on what the inputs hold.
    """
    for _ in range(_ROUNDS):
        graph = fold(_with_whole_windows(inferred(graph)))
        missing = [n for n in graph.nodes if any(o and o not in graph.values for o in n.outputs)]
        if not missing:
            _check_sizes(graph)
            return graph
        before, graph = graph, inferred(graph)
        if len(graph.values) == len(before.values):
            break
    first = next(n for n in graph.nodes if any(o and o not in graph.values for o in n.outputs))
    if first.op not in OPERATORS and first.op not in _BY_VALUE:
        raise UnsupportedError(
            f"{first} is an operator whose shapes ONNX does not tell and that edgeq does not know; "
            "export the model without it"
        )
    raise UnsupportedError(
        f"the output shape of {first} is unknown: it depends on the values of the inputs; export "
        "the model with fixed shapes, or without this operator"
    )


def _with_whole_windows(graph: Graph) -> Graph:
    """Replace every pool's ceil_mode by padding at the end, with the shapes that follow.

    A window that would begin in the padding at the end is dropped, as runtimes do, and as ONNX's
    shape inference (1.23) does not; so what it says of the values behind is found anew.
    """
    at = 0
    while at < len(graph.nodes):
        node = graph.nodes[at]
        change = whole_windows(graph, node)
        if change is None:
            at += 1
            continue
        nodes = (*graph.nodes[:at], *change.nodes, *graph.nodes[at + 1 :])
        constants = {**graph.constants, **change.constants}
        known = graph.values.get(node.output)
        graph = replace(graph, nodes=nodes, constants=constants)
        at += len(change.nodes)
        if (
            known is None
            or known.shape != change.values[node.output].shape
            or len(change.nodes) > 1
        ):
            graph = inferred(graph)
    return graph


def inferred(graph: Graph) -> Graph:
    """Run ONNX's shape inference.

    Raises:
        FormatError: shapes or types contradict each other.
    """
    onnx = require()
    small: dict[str, Constant] = {}
    large: dict[str, Info] = {}
    for name, constant in graph.constants.items():
        if isinstance(constant, QuantWeight) or constant.size > _SMALL:
            large[name] = graph.info(name)
        else:
            small[name] = constant
    given = {name: graph.values[name] for name in graph.inputs}
    model = to_model(
        replace(
            graph,
            inputs=(*graph.inputs, *large),
            constants=small,
            values={**given, **large},
            quants={},
        )
    )
    try:
        inferred = onnx.shape_inference.infer_shapes(
            model, check_type=True, strict_mode=True, data_prop=True
        )
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, ValueError) as err:
        lines = [line for line in str(err).splitlines() if line.strip()]
        reason = lines[0].split("Inference error(s): ")[-1]  # what follows comes from it
        raise FormatError(f"the shapes of the graph {graph.name} do not fit: {reason}") from err
    values = dict(given)
    for value in (*inferred.graph.value_info, *inferred.graph.output):
        tensor = value.type.tensor_type
        if not tensor.HasField("shape") or value.name in graph.constants:
            continue
        shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)
        if min(shape, default=0) >= 0 and tensor.elem_type:
            dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
            values[value.name] = Info(shape, dtype.name)
    return replace(graph, values=values)


def _check_sizes(graph: Graph) -> None:
    """Refuse what ONNX accepts: weights that do not fit, and Reshapes that change the size."""
    for node in graph.nodes:
        if node.op in ("Conv", "ConvTranspose"):
            _check_weight(graph, node)
        if node.op != "Reshape":
            continue
        before, after = (graph.info(name).shape for name in (node.inputs[0], node.output))
        if np.prod(before, dtype=np.int64) != np.prod(after, dtype=np.int64):
            raise FormatError(
                f"{node} makes {list(after)} of {list(before)}, another number of elements; the "
                "shapes of the inputs do not fit the model"
            )


def _check_weight(graph: Graph, node: Node) -> None:
    """Refuse a convolution whose weight or bias does not fit its groups or channels."""
    x, w = (graph.info(name).shape for name in node.inputs[:2])
    groups = int(node.attrs.get("group", 1))
    transposed = node.op == "ConvTranspose"
    taken, made = (w[0], w[1] * groups) if transposed else (w[1] * groups, w[0])
    bias = graph.info(node.inputs[2]).shape if len(node.inputs) > 2 and node.inputs[2] else (made,)
    if groups < 1 or w[0] % groups or x[1] != taken or bias != (made,):
        raise FormatError(
            f"{node} has a weight {list(w)} and a bias {list(bias)} in {groups} groups, which take "
            f"{taken} channels and make {made}; its input is {list(x)}"
        )
