"""Make everything explicit: defaults, pads, axes counted from 0, shapes without 0 and -1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from edgeq.core.errors import UnsupportedError
from edgeq.graph.ir import Constant, Graph, Node, Shape
from edgeq.graph.operators import OPERATORS, REDUCTIONS
from edgeq.graph.rewrite import Change, ints, rewrite, scalar, unique

_FLOAT_MAX = np.finfo(np.float32).max


def explicit(graph: Graph) -> Graph:
    """Write out all attributes, pads and axes."""
    return rewrite(graph, _spelled)


def _spelled(graph: Graph, node: Node) -> Change | None:
    row = OPERATORS.get(node.op)
    attrs = {**row.defaults, **node.attrs} if row else dict(node.attrs)
    for name in row.ignored if row else ():
        attrs.pop(name, None)
    for name in ("keepdims", "largest", "sorted"):  # another number than 1 is no, to runtimes
        if name in attrs:
            attrs[name] = int(attrs[name] == 1)
    if row and isinstance(attrs.get("axis"), int) and attrs["axis"] < 0:
        attrs["axis"] += len(graph.info(node.inputs[0]).shape)
    inputs, given = list(node.inputs), {}
    rule = _RULES.get(node.op)
    if rule is not None:
        given = rule(graph, node, attrs) or {}
    constants: dict[str, Constant] = {}
    for place, value in given.items():
        inputs += [""] * (place + 1 - len(inputs))
        if value is None:
            inputs[place] = ""
            continue
        constant = graph.constants.get(inputs[place])
        if (
            isinstance(constant, np.ndarray)
            and constant.dtype == value.dtype
            and np.array_equal(constant, value)
            and constant.shape == value.shape
        ):
            continue
        name = unique(graph, f"{node.output or node.name}.{OPERATORS[node.op].constants[place]}")
        constants[name] = value
        inputs[place] = name
    while inputs and not inputs[-1]:
        inputs.pop()
    new = replace(node, inputs=tuple(inputs), attrs=attrs)
    return None if new == node else Change(nodes=(new,), constants=constants)


Given = dict[int, Any]
"""Place of an input -> the constant that stands there from now on, None for none."""


def _is_constant(graph: Graph, node: Node, place: int) -> bool:
    """Whether an input is absent or a constant."""
    return place >= len(node.inputs) or not node.inputs[place] or (
        node.inputs[place] in graph.constants
    )  # fmt: skip


def _window(graph: Graph, node: Node, attrs: dict[str, Any]) -> None:
    """Make kernel, strides, dilations and pads of Conv and pools explicit."""
    x, y = graph.info(node.inputs[0]).shape[2:], graph.info(node.output).shape[2:]
    if node.op == "Conv":
        attrs["kernel_shape"] = graph.info(node.inputs[1]).shape[2:]
        attrs.setdefault("group", 1)
    rank = len(x)
    for name in ("strides", "dilations"):
        attrs[name] = tuple(attrs.get(name, (1,) * rank))
    attrs["kernel_shape"] = tuple(attrs["kernel_shape"])
    reach = [
        (k - 1) * d + 1 for k, d in zip(attrs["kernel_shape"], attrs["dilations"], strict=True)
    ]
    auto = attrs.pop("auto_pad", "NOTSET")
    pads = list(attrs.get("pads", (0,) * 2 * rank))
    if auto.startswith("SAME"):
        pads = _same(auto, [
            max((out - 1) * s + r - n, 0)
            for n, out, s, r in zip(x, y, attrs["strides"], reach, strict=True)
        ])  # fmt: skip
    elif auto == "VALID":
        pads = [0] * 2 * rank
    if node.op != "Conv":
        _pool(attrs, pads, x, y, reach, auto != "NOTSET")
    attrs["pads"] = tuple(pads)


def _same(auto: str, totals: list[int]) -> list[int]:
    """Split the total padding evenly, with the odd one at the end (UPPER) or the beginning."""
    less, more = [t // 2 for t in totals], [t - t // 2 for t in totals]
    return [*less, *more] if auto == "SAME_UPPER" else [*more, *less]


def _pool(
    attrs: dict[str, Any], pads: list[int], x: Shape, y: Shape, reach: list[int], automatic: bool
) -> None:
    """Replace ceil_mode with auto_pad by pads at the end; `whole_windows` replaces all others."""
    attrs.setdefault("storage_order", 0)
    counted = attrs.setdefault("count_include_pad", 0)
    ceil = attrs.setdefault("ceil_mode", 0)
    rank = len(x)
    if not ceil or not automatic:
        return
    need = [
        max((out - 1) * s + r - n - before, after)
        for n, out, s, r, before, after in zip(
            x, y, attrs["strides"], reach, pads[:rank], pads[rank:], strict=True
        )
    ]
    if not counted or need == pads[rank:]:
        pads[rank:] = need
        attrs["ceil_mode"] = 0


def _max_pool(graph: Graph, node: Node, attrs: dict[str, Any]) -> None:
    _window(graph, node, attrs)
    del attrs["count_include_pad"]


def _average_pool(graph: Graph, node: Node, attrs: dict[str, Any]) -> None:
    _window(graph, node, attrs)
    del attrs["storage_order"]
    if not any(attrs["pads"]):
        attrs["count_include_pad"] = 0  # there is nothing to count


def _conv_transpose(graph: Graph, node: Node, attrs: dict[str, Any]) -> None:
    x, y = graph.info(node.inputs[0]).shape[2:], graph.info(node.output).shape[2:]
    rank = len(x)
    attrs["kernel_shape"] = graph.info(node.inputs[1]).shape[2:]
    attrs.setdefault("group", 1)
    for name, value in (("strides", 1), ("dilations", 1), ("output_padding", 0)):
        attrs[name] = tuple(attrs.get(name, (value,) * rank))
    auto = attrs.pop("auto_pad", "NOTSET")
    fixed = attrs.pop("output_shape", None)
    if auto == "VALID":
        attrs["pads"] = (0,) * 2 * rank
    elif fixed is not None or auto != "NOTSET":
        totals = [
            s * (n - 1) + extra + (k - 1) * d + 1 - out
            for s, n, extra, k, d, out in zip(
                attrs["strides"], x, attrs["output_padding"], attrs["kernel_shape"],
                attrs["dilations"], y, strict=True,
            )
        ]  # fmt: skip
        short = [max(-t, 0) for t in totals]
        if any(short):  # pads are never negative: what is missing is added behind
            added = zip(attrs["output_padding"], short, strict=True)
            attrs["output_padding"] = tuple(a + b for a, b in added)
        upper = "SAME_UPPER" if auto == "SAME_UPPER" else "SAME_LOWER"
        attrs["pads"] = tuple(_same(upper, [max(t, 0) for t in totals]))
    attrs["pads"] = tuple(attrs.get("pads", (0,) * 2 * rank))


def _reduce(graph: Graph, node: Node, attrs: dict[str, Any]) -> Given | None:
    rank = len(graph.info(node.inputs[0]).shape)
    if not _is_constant(graph, node, 1):
        return None
    axes = ints(graph, node.inputs[1]) if len(node.inputs) > 1 else ()
    attrs.pop("noop_with_empty_axes", None)  # with no axes it is taken by `clean`
    axes = axes or tuple(range(rank))
    return {1: np.array(sorted(a % rank for a in axes), np.int64)}


def _squeeze(graph: Graph, node: Node, attrs: dict[str, Any]) -> Given | None:
    if not _is_constant(graph, node, 1):
        return None
    shape = graph.info(node.inputs[0]).shape
    rank = len(graph.info(node.output).shape if node.op == "Unsqueeze" else shape)
    axes = ints(graph, node.inputs[1]) if len(node.inputs) > 1 else None
    if axes == () and 1 in shape:
        raise UnsupportedError(
            f"{node} has an empty list of axes, which some runtimes read as no axis and others as "
            "all axes of one element; list the axes, or leave the input out"
        )
    if axes is None:
        axes = tuple(i for i, n in enumerate(shape) if n == 1)
    return {1: np.array(sorted(a % rank for a in axes), np.int64)}


def _shape(graph: Graph, node: Node, attrs: dict[str, Any]) -> Given | None:
    # the shape is known, so whatever computes it computes just that
    return {1: np.array(graph.info(node.output).shape, np.int64)}


def _clip(graph: Graph, node: Node, attrs: dict[str, Any]) -> Given | None:
    if not (_is_constant(graph, node, 1) and _is_constant(graph, node, 2)):
        return None
    if graph.info(node.output).dtype != "float32":
        return None
    bounds = []
    for place, default in ((1, -_FLOAT_MAX), (2, _FLOAT_MAX)):
        given = node.inputs[place] if place < len(node.inputs) else ""
        number = scalar(graph, given) if given else None
        bounds.append(np.array(default if number is None else number, np.float32))
    return {1: bounds[0], 2: bounds[1]}


def _slice(graph: Graph, node: Node, attrs: dict[str, Any]) -> Given | None:
    shape = graph.info(node.inputs[0]).shape
    parts = [ints(graph, name) if name else None for name in node.inputs[1:]]
    parts += [None] * (4 - len(parts))
    starts, ends, axes, steps = parts
    if starts is None or ends is None or not all(_is_constant(graph, node, i) for i in (3, 4)):
        return None
    axes = tuple(range(len(starts))) if axes is None else axes
    steps = (1,) * len(starts) if steps is None else steps
    rows = []
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis %= len(shape)
        first, last, step = slice(start, end, step).indices(shape[axis])
        # backwards to the very beginning ends before 0, which ONNX writes as a number past it
        rows.append((first, last if last >= 0 else -shape[axis] - 1, axis, step))
    columns = zip(*rows, strict=True)
    return {place: np.array(column, np.int64) for place, column in enumerate(columns, 1)}


def _pad(graph: Graph, node: Node, attrs: dict[str, Any]) -> Given | None:
    attrs["mode"] = attrs.get("mode", "constant")
    rank = len(graph.info(node.inputs[0]).shape)
    pads = ints(graph, node.inputs[1])
    if pads is None or not all(_is_constant(graph, node, i) for i in (2, 3)):
        return None
    if len(node.inputs) > 3 and node.inputs[3]:
        axes = ints(graph, node.inputs[3]) or ()
        wide = [0] * 2 * rank
        for place, axis in enumerate(axes):
            wide[axis % rank] = pads[place]
            wide[axis % rank + rank] = pads[place + len(axes)]
        pads = tuple(wide)
    dtype = np.dtype(graph.info(node.inputs[0]).dtype)
    given: Given = {1: np.array(pads, np.int64), 3: None}
    value = scalar(graph, node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else 0
    given[2] = np.array(value, dtype) if attrs["mode"] == "constant" else None
    return given


def _split(graph: Graph, node: Node, attrs: dict[str, Any]) -> Given | None:
    if not _is_constant(graph, node, 1):
        return None
    attrs.pop("num_outputs", None)
    sizes = [graph.info(o).shape[attrs["axis"]] if o else -1 for o in node.outputs]
    if -1 in sizes:  # the outputs nobody asked for
        lengths = ints(graph, node.inputs[1]) if len(node.inputs) > 1 else None
        whole = graph.info(node.inputs[0]).shape[attrs["axis"]]
        part = -(-whole // len(sizes))
        equal = [max(min(part, whole - i * part), 0) for i in range(len(sizes))]
        sizes = list(lengths) if lengths is not None else equal
    return {1: np.array(sizes, np.int64)}


def _resize(graph: Graph, node: Node, attrs: dict[str, Any]) -> Given | None:
    before, after = graph.info(node.inputs[0]).shape, graph.info(node.output).shape
    if not all(_is_constant(graph, node, i) for i in (2, 3)):
        return None
    factors = graph.constants.get(node.inputs[2]) if len(node.inputs) > 2 else None
    scales = graph.array(node.inputs[2]) if factors is not None and 0 not in factors.shape else None
    axes = attrs.pop("axes", None) or range(len(before))
    wide = np.ones(len(before), np.float32)
    if scales is not None:
        wide[list(axes)] = scales
    if attrs["mode"] != "nearest":
        attrs.pop("nearest_mode", None)
    if attrs["mode"] != "cubic":
        attrs.pop("cubic_coeff_a", None)
    if scales is None or np.array_equal(wide * before, after):
        return {1: None, 2: None, 3: np.array(after, np.int64)}
    return {1: None, 2: wide, 3: None}  # a scale that does not divide counts as it was given


def _transpose(graph: Graph, node: Node, attrs: dict[str, Any]) -> None:
    rank = len(graph.info(node.inputs[0]).shape)
    attrs["perm"] = tuple(attrs.get("perm", range(rank - 1, -1, -1)))


def _layer_norm(graph: Graph, node: Node, attrs: dict[str, Any]) -> Given | None:
    """Broadcast scale and bias to the shape of the normalized axes."""
    shape = graph.info(node.inputs[0]).shape[attrs["axis"] :]
    given: Given = {}
    for place, name in enumerate(node.inputs[1:3], 1):
        constant = graph.constants.get(name)
        if isinstance(constant, np.ndarray) and constant.shape != shape:
            array = graph.array(name)
            array = array.reshape(array.shape[max(array.ndim - len(shape), 0) :])
            given[place] = np.ascontiguousarray(np.broadcast_to(array, shape))
    return given


def _space_to_depth(graph: Graph, node: Node, attrs: dict[str, Any]) -> None:
    if attrs.get("mode") == "DCR":  # of opset 28; before, there was nothing else
        del attrs["mode"]


def _top_k(graph: Graph, node: Node, attrs: dict[str, Any]) -> Given | None:
    count = ints(graph, node.inputs[1])
    return None if count is None else {1: np.array(count, np.int64)}


_RULES: dict[str, Callable[[Graph, Node, dict[str, Any]], Given | None]] = {
    "Conv": _window,
    "ConvTranspose": _conv_transpose,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "Squeeze": _squeeze,
    "Unsqueeze": _squeeze,
    "Reshape": _shape,
    "Expand": _shape,
    "Clip": _clip,
    "Slice": _slice,
    "Pad": _pad,
    "Split": _split,
    "Resize": _resize,
    "Transpose": _transpose,
    "SpaceToDepth": _space_to_depth,
    "LayerNormalization": _layer_norm,
    "TopK": _top_k,
    **dict.fromkeys(REDUCTIONS, _reduce),
}
