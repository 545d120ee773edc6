"""Convert operators of opsets 1 to 6 to opset 21.

They differ in how two shapes are brought together: ``broadcast=1, axis=k`` lays the second input's
axes onto the first's from axis k on. ONNX's own converter (1.23) puts them elsewhere without a
word where k is not 0, so this is ours. Source: the changelog of ONNX's operators.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from edgeq.core.errors import UnsupportedError
from edgeq.graph.ir import Graph, Node
from edgeq.graph.onnx.upgrade import upgraded
from edgeq.graph.operators import OPERATORS
from edgeq.graph.rewrite import Change, Steps, rewrite, unique

_GONE = ("consumed_inputs", "is_test")
"""Attributes whose meaning is the default today."""
_PAIRS = ("Add", "Sub", "Mul", "Div", "Pow", "And", "Or", "Xor", "Equal", "Greater", "Less",
          "PRelu")  # fmt: skip
_UNKNOWN = ("Upsample", "Affine", "Crop", "ParametricSoftplus", "ScaledTanh",
            "ImageScaler", "Scale", "GivenTensorFill", "ATen", "GRUUnit")  # fmt: skip
"""Operators whose form of those days is not known here."""


def modernized(graph: Graph, opset: int, inferred: Callable[[Graph], Graph]) -> Graph:
    """Convert a graph to opset 21.

    Args:
        graph: as it was read; shapes of its inputs are known.
        opset: 1 to 6, what its operators mean.
        inferred: finds the shapes of values.

    Raises:
        UnsupportedError: an operator whose form of those days is not known.
    """
    if unread := [n for n in graph.nodes if n.op in _UNKNOWN or opset < _first_opset(n)]:
        raise UnsupportedError(
            f"{unread[0]} has opset {opset}, whose version of it edgeq does not read; export it "
            "with opset 7 or newer"
        )
    graph = upgraded(rewrite(graph, _attributes), opset)
    # a pair has the shape of its first input, so without the second all ranks can be found
    alone = tuple(
        Node("Identity", n.name, n.inputs[:1], n.outputs) if "broadcast" in n.attrs else n
        for n in graph.nodes
    )
    ranks = inferred(replace(graph, nodes=alone))

    def rank(name: str) -> int:
        if name not in ranks.values and name not in graph.constants:
            raise UnsupportedError(
                f"the shape of {name!r}, which a broadcast of opset {opset} needs, is unknown; "
                "export the model with opset 7 or newer"
            )
        return len(ranks.info(name).shape)

    return rewrite(graph, lambda g, n: _aligned(g, n, rank))


def _first_opset(node: Node) -> int:
    """The first opset whose form of an operator is read."""
    row = OPERATORS.get(node.op)
    return row.since if row else 1


def _attributes(graph: Graph, node: Node) -> Change | None:
    attrs: dict[str, Any] = {k: v for k, v in node.attrs.items() if k not in _GONE}
    inputs = node.inputs
    constants = {}
    if node.op == "Gemm":
        attrs.pop("broadcast", None)
    if node.op == "Reshape" and "shape" in attrs:
        name = unique(graph, f"{node.name}.shape")
        constants[name] = np.array(attrs.pop("shape"), np.int64)
        inputs = (inputs[0], name)
    if node.op == "Pad" and "paddings" in attrs:
        attrs["pads"] = attrs.pop("paddings")
    if node.op == "Concat":
        attrs.setdefault("axis", 1)
    new = replace(node, inputs=inputs, attrs=attrs)
    return None if new == node else Change(nodes=(new,), constants=constants)


def _aligned(graph: Graph, node: Node, rank: Callable[[str], int]) -> Change | None:
    """A rule that appends axes of size 1 to the second input, so that it broadcasts as before."""
    if node.op not in _PAIRS or not {"broadcast", "axis"} & node.attrs.keys():
        return None
    attrs = {k: v for k, v in node.attrs.items() if k not in ("broadcast", "axis")}
    first, second = node.inputs
    axis = node.attrs.get("axis")
    own = rank(second)
    behind = 0 if axis is None else rank(first) - axis % max(rank(first), 1) - own
    if not node.attrs.get("broadcast") or behind <= 0:
        return Change(nodes=(replace(node, attrs=attrs),))
    steps = Steps(graph, node)
    axes = steps.constant("axes", np.arange(own, own + behind, dtype=np.int64))
    wide = steps.add("Unsqueeze", "aligned", (second, axes))
    return steps.last(node.op, (first, wide), **attrs)
