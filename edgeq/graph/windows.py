"""Rewrite pools that round the number of windows up as pools that round it down."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from edgeq.graph.ir import Graph, Info, Node
from edgeq.graph.operators import POOLS, WINDOWS
from edgeq.graph.rewrite import Change, Steps


def whole_windows(graph: Graph, node: Node) -> Change | None:
    """A rule: replaces ceil_mode by padding at the end, once the shape of the input is known.

    ONNX Runtime and PyTorch drop the last window where it would begin in the padding behind the
    input. Where the padding counts in a mean, that added here does not: a Pad lays the counted
    zeros around the input, and the pool's own padding is what is not counted.

    Returns:
        The nodes that take the place of the pool, with the shape of its values; None if it is no
        such pool, or its input's shape is not known yet.
    """
    if node.op not in POOLS & WINDOWS or not node.attrs.get("ceil_mode"):
        return None
    x = graph.values.get(node.inputs[0])
    if x is None:
        return None
    attrs: dict[str, Any] = {k: v for k, v in node.attrs.items() if k != "ceil_mode"}
    if attrs.get("auto_pad", "NOTSET") != "NOTSET":
        return None  # the number of windows follows from the strides alone
    sizes, rank = x.shape[2:], len(x.shape) - 2
    kernel = tuple(attrs["kernel_shape"])
    strides, dilations = (tuple(attrs.get(k) or (1,) * rank) for k in ("strides", "dilations"))
    pads = list(attrs.get("pads") or (0,) * 2 * rank)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    counts = [
        _count(n + before + after - r, s, n + before)
        for n, s, r, before, after in zip(
            sizes, strides, reach, pads[:rank], pads[rank:], strict=True
        )
    ]
    ends = [
        max((count - 1) * s + r - n - before, 0)
        for count, s, r, n, before in zip(counts, strides, reach, sizes, pads[:rank], strict=True)
    ]
    info = replace(x, shape=(*x.shape[:2], *counts))
    values = {out: info for out in node.outputs if out}
    laid = [min(after, end) for after, end in zip(pads[rank:], ends, strict=True)]
    counted = bool(attrs.get("count_include_pad", 0)) and laid != ends
    if not counted and all(end < k for end, k in zip(ends, kernel, strict=True)):
        attrs["pads"] = (*pads[:rank], *ends)
        return Change(nodes=(replace(node, attrs=attrs),), values=values)
    # some windows reach so far past the padding that no pool takes it, or it is not to be counted
    if node.op == "AveragePool" and not counted:
        return None
    steps = Steps(graph, node)
    if node.op == "MaxPool":
        laid = ends
    where = steps.constant("laid", np.array((0, 0, *pads[:rank], 0, 0, *laid), np.int64))
    lowest = _lowest(x) if node.op == "MaxPool" else np.array(0, x.dtype)
    padded = steps.add("Pad", "padded", (node.inputs[0], where, steps.constant("value", lowest)))
    if node.op == "MaxPool":
        attrs["pads"] = (0,) * 2 * rank
    else:
        left = tuple(end - after for end, after in zip(ends, laid, strict=True))
        if any(end >= k for end, k in zip(left, kernel, strict=True)):
            return None
        attrs |= {"pads": (*(0,) * rank, *left), "count_include_pad": 0}
    change = steps.last(node.op, (padded,), **attrs)
    return replace(change, values=values)


def _count(room: int, stride: int, begins: int) -> int:
    """Number of windows along an axis that begin before a place; the last may be partial."""
    count = -(-room // stride) + 1
    return count - 1 if (count - 1) * stride >= begins else count


def _lowest(x: Info) -> np.ndarray[Any, Any]:
    """The lowest number of a type."""
    dtype = np.dtype(x.dtype)
    return np.array(-np.inf if dtype.kind == "f" else np.iinfo(dtype).min, dtype)
