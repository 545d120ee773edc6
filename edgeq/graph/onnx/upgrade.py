"""Convert operators of opset 7 and later to opset 21.

Mostly attributes that became inputs, and a few operators that are younger. Source: the
changelog of ONNX's operators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from edgeq.core.errors import UnsupportedError
from edgeq.graph.ir import Graph, Node
from edgeq.graph.operators import SOFTMAXES
from edgeq.graph.rewrite import Change, Steps, rewrite, unique

REDUCTIONS_APART: Mapping[str, str] = {
    "ReduceMean": "Identity", "ReduceSum": "Identity", "ReduceMax": "Identity",
    "ReduceMin": "Identity", "ReduceProd": "Identity", "ReduceLogSumExp": "Identity",
    "ReduceL1": "Abs", "ReduceL2": "Abs", "ReduceLogSum": "Log", "ReduceSumSquare": "Mul",
}  # fmt: skip
"""Reduction -> what it does to each element where it reduces no axis."""
_REDUCTIONS_18 = (
    "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum",
    "ReduceLogSumExp", "ReduceSumSquare",
)  # fmt: skip
_AXES_SINCE = {"Squeeze": 13, "Unsqueeze": 13, "ReduceSum": 13, **dict.fromkeys(_REDUCTIONS_18, 18)}


def upgraded(graph: Graph, opset: int) -> Graph:
    """Convert a graph to opset 21.

    Args:
        graph: as it was read; shapes need not be known.
        opset: 7 or more, what its operators mean.

    Raises:
        UnsupportedError: an operator whose older meaning has no counterpart.
    """
    for since, rule_for in _RULES:
        if opset < since:
            graph = rewrite(graph, rule_for(opset))
    for rule in (_no_axes, _group_norm(opset), _swish, _rms_norm):
        graph = rewrite(graph, rule)
    return graph


Made = Callable[[Graph, Node], Change | None]


def _with_inputs(
    graph: Graph, node: Node, given: dict[int, Any], attrs: dict[str, Any], op: str | None = None
) -> Change:
    """Replace some inputs of a node by constants, and set its attributes."""
    inputs = list(node.inputs)
    constants = {}
    for place, value in sorted(given.items()):
        inputs += [""] * (place + 1 - len(inputs))
        if value is not None:
            name = unique(graph, f"{node.name}.input{place}")
            constants[name] = np.asarray(value)
            inputs[place] = name
    while inputs and not inputs[-1]:
        inputs.pop()
    new = replace(node, op=op or node.op, inputs=tuple(inputs), attrs=attrs)
    return Change(nodes=(new,), constants=constants)


def _without(node: Node, *names: str) -> dict[str, Any]:
    return {k: v for k, v in node.attrs.items() if k not in names}


def _axes(opset: int) -> Made:
    def rule(graph: Graph, node: Node) -> Change | None:
        if opset >= _AXES_SINCE.get(node.op, 0) or "axes" not in node.attrs:
            return None
        axes = np.array(node.attrs["axes"], np.int64)
        return _with_inputs(graph, node, {1: axes}, _without(node, "axes"))

    return rule


def _split(opset: int) -> Made:
    def rule(graph: Graph, node: Node) -> Change | None:
        if node.op != "Split" or len(node.inputs) > 1 or "num_outputs" in node.attrs:
            return None
        if "split" in node.attrs and opset < 13:
            sizes = np.array(node.attrs["split"], np.int64)
            return _with_inputs(graph, node, {1: sizes}, _without(node, "split"))
        attrs = {**node.attrs, "num_outputs": len(node.outputs)}
        return Change(nodes=(replace(node, attrs=attrs),))

    return rule


def _clip(opset: int) -> Made:
    def rule(graph: Graph, node: Node) -> Change | None:
        if node.op != "Clip" or not {"min", "max"} & node.attrs.keys():
            return None
        least, most = (
            np.float32(node.attrs[key]) if key in node.attrs else None for key in ("min", "max")
        )
        return _with_inputs(graph, node, {1: least, 2: most}, {})

    return rule


def _pad(opset: int) -> Made:
    def rule(graph: Graph, node: Node) -> Change | None:
        if node.op != "Pad" or "pads" not in node.attrs:
            return None
        pads = np.array(node.attrs["pads"], np.int64)
        value = np.float32(node.attrs.get("value", 0.0))
        return _with_inputs(graph, node, {1: pads, 2: value}, _without(node, "pads", "value"))

    return rule


def _slice(opset: int) -> Made:
    def rule(graph: Graph, node: Node) -> Change | None:
        if node.op != "Slice" or "starts" not in node.attrs:
            return None
        starts, ends = (np.array(node.attrs[k], np.int64) for k in ("starts", "ends"))
        axes = np.array(node.attrs.get("axes", range(len(starts))), np.int64)
        return _with_inputs(graph, node, {1: starts, 2: ends, 3: axes}, {})

    return rule


def _top_k(opset: int) -> Made:
    def rule(graph: Graph, node: Node) -> Change | None:
        if node.op != "TopK" or "k" not in node.attrs:
            return None
        k = np.array([node.attrs["k"]], np.int64)
        return _with_inputs(graph, node, {1: k}, _without(node, "k"))

    return rule


def _resize(opset: int) -> Made:
    """Upsample, and Resize before it had coordinate_transformation_mode."""

    def rule(graph: Graph, node: Node) -> Change | None:
        old = node.op == "Upsample" or (
            node.op == "Resize" and "coordinate_transformation_mode" not in node.attrs
        )
        if not old or opset >= 11:
            return None
        attrs = {
            "mode": str(node.attrs.get("mode", "nearest")).replace("bilinear", "linear"),
            "coordinate_transformation_mode": "asymmetric",
            "nearest_mode": "floor",
        }
        if "scales" in node.attrs:
            scales = np.array(node.attrs["scales"], np.float32)
            return _with_inputs(graph, node, {2: scales}, attrs, "Resize")
        inputs = (node.inputs[0], "", node.inputs[1])
        return Change(nodes=(replace(node, op="Resize", inputs=inputs, attrs=attrs),))

    return rule


def _softmax(opset: int) -> Made:
    """Softmax over all axes from a given one on, as it was defined before opset 13."""

    def rule(graph: Graph, node: Node) -> Change | None:
        if node.op not in SOFTMAXES or node.attrs.get("edgeq_flat"):
            return None
        # whether that is another meaning is known once the shape is, see `flat_softmax`
        attrs = {"axis": node.attrs.get("axis", 1), "edgeq_flat": 1}
        return Change(nodes=(replace(node, attrs=attrs),))

    return rule


def flat_softmax(graph: Graph, node: Node) -> Change | None:
    """A rule: rewrites the older Softmax as today's, between two Reshapes where it has to be."""
    if not node.attrs.get("edgeq_flat"):
        return None
    shape = graph.info(node.inputs[0]).shape
    axis = int(node.attrs["axis"]) % max(len(shape), 1)
    inner = int(np.prod(shape[axis:], dtype=np.int64))
    if inner == shape[axis]:
        return Change(nodes=(replace(node, attrs={"axis": axis}),))
    if inner == shape[-1]:
        return Change(nodes=(replace(node, attrs={"axis": len(shape) - 1}),))
    two = replace(
        graph.info(node.output), shape=(int(np.prod(shape[:axis], dtype=np.int64)), inner)
    )
    steps = Steps(graph, node)
    to = steps.constant("matrix", np.array(two.shape, np.int64))
    back = steps.constant("shape", np.array(shape, np.int64))
    value = steps.add("Reshape", "flat", (node.inputs[0], to), two)
    value = steps.add(node.op, "soft", (value,), two, name=node.name, axis=1)
    return steps.last("Reshape", (value, back), f"{node.name}.back")


def _norm(opset: int) -> Made:
    def rule(graph: Graph, node: Node) -> Change | None:
        if node.op != "BatchNormalization" or "spatial" not in node.attrs:
            return None
        if not node.attrs["spatial"]:
            raise UnsupportedError(
                f"{node} normalizes each position (spatial=0), which edgeq does not support"
            )
        return Change(nodes=(replace(node, attrs=_without(node, "spatial")),))

    return rule


def _no_axes(graph: Graph, node: Node) -> Change | None:
    """A reduction over no axes still does what it does to each element."""
    if node.op not in REDUCTIONS_APART or not node.attrs.get("noop_with_empty_axes"):
        return None
    axes = node.inputs[1] if len(node.inputs) > 1 else ""
    constant = graph.constants.get(axes)
    if axes and (constant is None or constant.shape != (0,)):
        return None
    op = REDUCTIONS_APART[node.op]
    inputs = node.inputs[:1] * (2 if op == "Mul" else 1)
    return Change(nodes=(Node(op, node.name, inputs, node.outputs),))


def _group_norm(opset: int) -> Made:
    """Rewrite GroupNormalization as InstanceNormalization of its groups.

    Scale and bias are of the channels since opset 21, and of the groups before. ONNX tells no
    shape of the operator, so every shape here is written without knowing its input's.
    """

    def rule(graph: Graph, node: Node) -> Change | None:
        if node.op != "GroupNormalization":
            return None
        steps, (x, scale, bias) = Steps(graph, node), node.inputs
        groups = int(node.attrs["num_groups"])
        shape = steps.add("Shape", "shape", (x,))
        to = steps.constant("groups", np.array([0, groups, -1], np.int64))
        value = steps.add("Reshape", "grouped", (x, to))
        ones, zeros = (steps.constant(f"{n}s", np.full(groups, n, np.float32)) for n in (1, 0))
        epsilon = node.attrs.get("epsilon", 1e-5)
        value = steps.add("InstanceNormalization", "normed", (value, ones, zeros), epsilon=epsilon)
        if opset >= 21:
            ends = steps.add("Shape", "channels", (x,), end=2)
            rest = steps.constant("rest", np.array([-1], np.int64))
            wide = steps.add("Concat", "wide", (ends, rest), axis=0)
            value = steps.add("Reshape", "by_channel", (value, wide))
        column = steps.constant("column", np.array([-1, 1], np.int64))
        value = steps.add("Mul", "scaled", (value, steps.add("Reshape", "scale", (scale, column))))
        value = steps.add("Add", "shifted", (value, steps.add("Reshape", "bias", (bias, column))))
        return steps.last("Reshape", (value, shape))

    return rule


def _swish(graph: Graph, node: Node) -> Change | None:
    """Rewrite Swish of opset 24 with operators of opset 21."""
    if node.op != "Swish":
        return None
    steps, x = Steps(graph, node), node.inputs[0]
    inner, alpha = x, float(node.attrs.get("alpha", 1))
    if alpha != 1:
        inner = steps.add("Mul", "scaled", (x, steps.number("alpha", alpha)))
    return steps.last("Mul", (x, steps.add("Sigmoid", "gate", (inner,))))


def _rms_norm(graph: Graph, node: Node) -> Change | None:
    """Rewrite RMSNormalization of opset 23 with operators of opset 21."""
    if node.op != "RMSNormalization":
        return None
    steps, (x, scale) = Steps(graph, node), node.inputs[:2]
    axis, weight = int(node.attrs.get("axis", -1)), graph.constants.get(scale)
    if axis >= 0:  # the scale has the normalized axes, which are the last
        if weight is None:
            return None
        axis = -len(weight.shape)
    axes = steps.constant("axes", np.arange(axis, 0, dtype=np.int64))
    mean = steps.add("ReduceMean", "mean", (steps.add("Mul", "square", (x, x)), axes))
    epsilon = steps.number("epsilon", node.attrs.get("epsilon", 1e-5))
    root = steps.add("Sqrt", "root", (steps.add("Add", "above", (mean, epsilon)),))
    return steps.last("Mul", (steps.add("Div", "unit", (x, root)), scale))


_RULES: tuple[tuple[int, Callable[[int], Made]], ...] = (
    (18, _axes),
    (18, _split),
    (11, _clip),
    (11, _pad),
    (10, _slice),
    (10, _top_k),
    (11, _resize),
    (13, _softmax),
    (9, _norm),
)
"""(The first opset that is past it, the rule made for an older one)."""
