"""Second moments of the inputs of a graph's layers, for GPTQ and smoothing.

A convolution multiplies each row of its weight with the patch of its input under the kernel, at
every position: these are the rows of im2col. Of a sample with many positions only some are used,
evenly spaced, because the means have converged by then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sized

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import UsageError
from edgeq.core.progress import Progress
from edgeq.graph.feeds import Feeds, OpenSession
from edgeq.graph.ir import Graph, Node
from edgeq.graph.operators import LAYERS, named, weight_of
from edgeq.quant.kernels.products import products
from edgeq.quant.rounders.hessian import STRIP, Hessian

Array = NDArray[np.float32]
ROW_PRODUCTS = LAYERS & named(lambda row: row.weight and row.weight.channels == 0)
"""Layers that multiply each row of their weight with the same input vectors: Conv and Linear."""
PLACES = 512
"""Most positions of one sample that are used."""


def weight_name(node: Node) -> str:
    """Name of a node's weight."""
    return node.inputs[weight_of(node).input]


def hessians(
    graph: Graph,
    nodes: Iterable[Node],
    samples: Iterable[Feeds],
    *,
    session_of: OpenSession,
    progress: Progress | None = None,
) -> dict[str, Array]:
    """Mean of x x^T over the input vectors x of each node.

    The matrices and the inputs of the nodes for one sample are in memory. Nodes with the same input
    vectors, such as the three projections of attention, share one matrix.

    Args:
        graph: the float graph.
        nodes: nodes of the graph with the operators Conv and Linear.
        samples: inputs of the graph.
        session_of: opens a session that runs the graph.
        progress: called with ("hessians", samples done, number of samples or 0 if unknown).

    Returns:
        name of a node -> float32 [K, K], or [groups, K, K] for a grouped convolution.

    Raises:
        UsageError: a node has another operator, or there are no samples.
    """
    nodes = tuple(nodes)
    for node in nodes:
        if node.op not in ROW_PRODUCTS:
            raise UsageError(f"{node} has no second moments; give only Conv and Linear nodes")
    cuts = {node.name: _cut(graph, node) for node in nodes}
    inputs: dict[tuple[object, ...], tuple[Node, _Moments]] = {}
    for node in nodes:
        if cuts[node.name] not in inputs:
            k = int(np.prod(graph.info(weight_name(node)).shape[1:], dtype=np.int64))
            inputs[cuts[node.name]] = node, _Moments(_groups(node), k)
    run = session_of(graph, sorted({node.inputs[0] for node, _ in inputs.values()}))
    total = len(samples) if isinstance(samples, Sized) else 0
    seen = 0
    for feeds in samples:
        values = {**feeds, **run(feeds)}
        for node, moments in inputs.values():
            x = np.asarray(values[node.inputs[0]], np.float32)
            moments.add(patches(x, graph, node, offset=seen))
        seen += 1
        if progress:
            progress("hessians", seen, total)
    if not seen:
        raise UsageError("there are no calibration samples; give at least one")
    results = {key: moments.means() for key, (_, moments) in inputs.items()}
    return {node.name: results[cuts[node.name]] for node in nodes}


class _Moments:
    """Second moments of the inputs of all groups of a layer.

    Args:
        groups: number of groups of the layer.
        k: length of the input vectors of each group.
    """

    def __init__(self, groups: int, k: int) -> None:
        small = groups > 1 and k <= STRIP
        self._stack = np.zeros((groups, k, k), np.float32) if small else None
        self._each = [] if small else [Hessian(k) for _ in range(groups)]
        self._n = 0

    def add(self, rows: Array) -> None:
        """Add input vectors, float32 [groups, T, K]."""
        self._n += rows.shape[1]
        if self._stack is not None:
            columns = rows.swapaxes(1, 2)
            products(columns, columns, self._stack)
        for hessian, part in zip(self._each, rows, strict=False):
            hessian.add(part)

    def means(self) -> Array:
        """Mean of x x^T: float32 [K, K], or [groups, K, K] for several groups."""
        if self._stack is not None:
            return self._stack * np.float32(1 / self._n)
        one = self._each[0].matrix
        return one if len(self._each) == 1 else np.stack([hessian.matrix for hessian in self._each])


def patches(x: Array, graph: Graph, node: Node, *, offset: int = 0) -> Array:
    """Cut a node's input into the vectors that the rows of its weight are multiplied with.

    Args:
        x: the input of a Linear [..., K] or of a Conv [N, C, ...].
        graph: the graph, for the shape of the kernel.
        node: a Conv or Linear.
        offset: the first position that is used, if not all are.

    Returns:
        float32 [groups, positions, K] with at most `PLACES` positions.
    """
    if node.op == "Linear":
        rows = x.reshape(-1, x.shape[-1])
        return rows[_spread(len(rows), offset)][None]
    _, _, *kernel = graph.info(weight_name(node)).shape
    d = len(kernel)
    strides = list(node.attrs.get("strides", [1] * d))
    dilations = list(node.attrs.get("dilations", [1] * d))
    pads = list(node.attrs.get("pads", [0] * 2 * d))
    x = np.pad(x, [(0, 0), (0, 0), *zip(pads[:d], pads[d:], strict=True)])
    reach = tuple(1 + (k - 1) * step for k, step in zip(kernel, dilations, strict=True))
    view = np.lib.stride_tricks.sliding_window_view(x, reach, tuple(range(2, 2 + d)))
    steps = [slice(None, None, step) for step in (*strides, *dilations)]
    view = np.moveaxis(view[(slice(None), slice(None), *steps)], 1, 1 + d)
    places = _spread(int(np.prod(view.shape[: 1 + d])), offset)
    rows = view[np.unravel_index(places, view.shape[: 1 + d])]
    groups = _groups(node)
    return np.ascontiguousarray(rows.reshape(len(places), groups, -1).swapaxes(0, 1))


def _spread(n: int, offset: int) -> NDArray[np.intp]:
    """Indices of at most `PLACES` of n positions, evenly spaced."""
    stride = -(-n // PLACES)
    return np.arange(offset % stride, n, stride)


def _groups(node: Node) -> int:
    return int(node.attrs.get("group", 1)) if node.op == "Conv" else 1


def _cut(graph: Graph, node: Node) -> tuple[object, ...]:
    """A key that is equal for nodes with the same input vectors."""
    shape = graph.info(weight_name(node)).shape[1:]
    geometry = (node.attrs.get(name) for name in ("strides", "pads", "dilations"))
    return (node.op, node.inputs[0], shape, _groups(node), *(str(g) for g in geometry))
