"""Sensitivity: how much rounding each layer changes the outputs, and which layers to keep float.

Each layer is rounded alone, together with its input and output if those are rounded, and the
outputs of the graph are compared with those of the float graph:

    kl          KL divergence of the class probabilities in nats, for outputs [N, C] of a Linear or
                a Softmax
    cosine      1 - cosine similarity, for other outputs [N, C] and for sequences [N, T, C], where
                each row counts by itself
    relative    squared error divided by the squared float output, for all others, such as boxes
                and feature maps

Several outputs count by their mean. The losses of the layers are nearly additive, as those of
`edgeq.quant.decoder.sensitivity` are.

Source: sensitivity by the divergence of the output, Cai et al. 2020, "ZeroQ" (arXiv:2001.00281),
section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import UsageError
from edgeq.core.progress import Progress
from edgeq.evaluation.graph import cosine
from edgeq.evaluation.text import kl_divergence, log_softmax
from edgeq.graph.feeds import Feeds, OpenSession
from edgeq.graph.ir import Constant, Graph, Node, QuantWeight
from edgeq.graph.operators import ACTIVATIONS, FLATTENS, SOFTMAXES, WEIGHTED
from edgeq.quant.graph.hessians import weight_name

Measure = Literal["kl", "cosine", "relative"]
TINY = 1e-12
"""Lower bound of probabilities, so that their logarithms are finite."""


@dataclass(frozen=True)
class LayerLoss:
    """The loss that rounding one layer causes.

    Args:
        node: name of the layer.
        loss: mean over samples and outputs, see the module.
        nbytes: additional bytes of its weight if it stays float32.
    """

    node: str
    loss: float
    nbytes: int


def sensitivity(
    graph: Graph,
    quantized: Graph,
    samples: Iterable[Feeds],
    *,
    session_of: OpenSession,
    progress: Progress | None = None,
) -> tuple[LayerLoss, ...]:
    """Measure the loss of each layer with a rounded weight, in the order of the graph.

    The samples are iterated over once for each layer; the float outputs are kept in memory.

    Args:
        graph: the float graph.
        quantized: a graph with the same nodes and values.
        samples: inputs of the graph. Some dozen are enough, because the same samples are compared
            with and without one rounded layer.
        session_of: opens a session that runs a graph.
        progress: called with ("sensitivity", layers done, number of layers).

    Raises:
        UsageError: there are no samples.
    """
    nodes = [node for node in quantized.nodes if _rounded(quantized, node)]
    run = session_of(graph, ())
    float_outputs = [{name: run(feeds)[name] for name in graph.outputs} for feeds in samples]
    if not float_outputs:
        raise UsageError("there are no calibration samples; give at least one")
    measures = {name: measure_of(graph, name) for name in graph.outputs}
    rows = []
    for done, node in enumerate(nodes):
        if progress:
            progress("sensitivity", done, len(nodes))
        run = session_of(only(graph, quantized, node), ())
        loss = 0.0
        for feeds, expected in zip(samples, float_outputs, strict=True):
            actual = run(feeds)
            distances = [distance(expected[o], actual[o], m) for o, m in measures.items()]
            loss += sum(distances) / len(measures)
        w = quantized.constants[weight_name(node)]
        more = graph.info(weight_name(node)).nbytes - w.nbytes
        rows.append(LayerLoss(node.name, loss / len(float_outputs), max(more, 0)))
    return tuple(rows)


def keep_float(rows: Iterable[LayerLoss], budget: float) -> frozenset[str]:
    """Choose layers to keep float so that at most a fraction of the summed loss remains.

    Layers are chosen in the order of the loss that they save per byte, until enough loss is saved.
    Then layers that turn out not to be needed are dropped again, the largest first.

    Args:
        rows: losses of all layers.
        budget: fraction of the summed loss that may remain, 0 to 1.

    Returns:
        names of the nodes to keep float.

    Raises:
        UsageError: the budget is out of range.
    """
    if not 0 <= budget <= 1:
        raise UsageError(f"the fraction of the loss that may remain is {budget}; use 0 to 1")
    rows = [row for row in rows if row.loss > 0]
    total = math.fsum(row.loss for row in rows)
    allowed = budget * total
    kept: list[LayerLoss] = []
    for row in sorted(rows, key=lambda row: -row.loss / max(row.nbytes, 1)):
        if _left(rows, kept) <= allowed:
            break
        kept.append(row)
    for row in sorted(kept, key=lambda row: -row.nbytes):
        fewer = [other for other in kept if other is not row]
        if _left(rows, fewer) <= allowed:
            kept = fewer
    return frozenset(row.node for row in kept)


def only(graph: Graph, quantized: Graph, node: Node) -> Graph:
    """The float graph with one node that computes as in the quantized graph.

    Args:
        graph: the float graph.
        quantized: a graph with the same nodes and values.
        node: a node of the quantized graph.
    """
    last = node
    after = quantized.only_consumer(node.output)
    if node.output not in quantized.quants and after is not None and after.op in ACTIVATIONS:
        last = after
    values = (*node.inputs, last.output)
    quants = {name: quantized.quants[name] for name in values if name in quantized.quants}
    own: dict[str, Constant] = {n: quantized.constants[n] for n in node.inputs[1:]
                                if n in quantized.constants}  # fmt: skip
    if node.op == "Gather":
        own = {weight_name(node): quantized.constants[weight_name(node)]}
    nodes = tuple(node if other.name == node.name else other for other in graph.nodes)
    return replace(graph, nodes=nodes, constants={**graph.constants, **own}, quants=quants)


def measure_of(graph: Graph, output: str) -> Measure:
    """The measure for changes of one output, see the module."""
    info = graph.info(output)
    if not info.dtype.startswith("float") or len(info.shape) not in (2, 3) or info.shape[-1] < 2:
        return "relative"
    node = graph.producers.get(output)
    while node is not None and node.op in FLATTENS:
        node = graph.producers.get(node.inputs[0])
    classes = node is not None and node.op in SOFTMAXES | {"Linear"}
    return "kl" if classes and len(info.shape) == 2 else "cosine"


def distance(right: NDArray[Any], got: NDArray[Any], measure: Measure) -> float:
    """Distance between the output of the float graph and another output, see the module.

    Args:
        right, got: the outputs of both graphs for one sample, with the same shape.
        measure: the measure. "kl" accepts logits or probabilities, which sum to 1.
    """
    right, got = right.astype(np.float64), got.astype(np.float64)
    if measure == "relative":
        return float(np.square(right - got).sum() / max(np.square(right).sum(), TINY))
    p, q = right.reshape(-1, right.shape[-1]), got.reshape(-1, got.shape[-1])
    if measure == "cosine":
        return float(1 - cosine(p, q).mean())
    if p.min() >= 0 and np.allclose(p.sum(axis=1), 1, atol=1e-3):
        p, q = np.log(np.maximum(p, TINY)), np.log(np.maximum(q, TINY))
    return float(kl_divergence(log_softmax(p), log_softmax(q)).mean())


def _rounded(graph: Graph, node: Node) -> bool:
    return node.op in WEIGHTED and isinstance(graph.constants.get(weight_name(node)), QuantWeight)


def _left(rows: Collection[LayerLoss], kept: Collection[LayerLoss]) -> float:
    spared = {row.node for row in kept}
    return math.fsum(row.loss for row in rows if row.node not in spared)
