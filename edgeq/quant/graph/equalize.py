"""Cross-layer equalization: give the channels of two layers similar ranges.

Where a layer feeds only one other, through operators f with ``f(s x) = s f(x)`` for s > 0,

    W2 f(W1 x + b1)  =  (W2 S) f(S^-1 (W1 x + b1))

for any positive diagonal matrix S, so the function of the graph does not change. Let r1_i be the
largest absolute weight that produces channel i, and r2_i the largest that consumes it. With
``s_i = sqrt(r1_i / r2_i)`` both become ``sqrt(r1_i r2_i)``, and no channel is rounded with a scale
that the range of another channel determines. That helps weights with one scale for all channels,
and the value between the layers, which always has one scale. A change of one pair changes the pairs
next to it, so all pairs are visited repeatedly until they converge; chains such as expansion,
depthwise convolution and projection need that.

Relu, LeakyRelu, PRelu and pooling are such operators f, and so is a reshape of [1, C, H, W] to
[1, C * H * W]. A Clip is not, so pairs across a Clip are left unchanged. `replace_unmet_clips`
replaces a Clip by a Relu if no sample reaches its upper bound.

Source: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias
Correction" (arXiv:1906.04721), section 4.1, equations 9 to 11.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import UsageError
from edgeq.core.progress import Progress
from edgeq.graph.feeds import Feeds, OpenSession
from edgeq.graph.ir import Constant, Graph, Node
from edgeq.graph.operators import FLATTENS, LAYERS, POOLS, channel_axis, named
from edgeq.graph.rewrite import floats, ints, prune, scalar
from edgeq.quant.graph.hessians import weight_name

PASSES = 40
"""Most passes over all pairs."""
SETTLED = 1e-3
"""The passes end when no channel changes by more than this relative amount."""
DEAD = 1e-4
"""A channel is left unchanged if its largest weight is at most this fraction of the layer's
largest, because scaling it would only enlarge its bias."""
UNEVEN = 64.0
"""Ranges are equalized by default if the largest channel is more than this many times the median
channel, to which 8 bits then leave two levels of each sign, and to most channels fewer."""
MOST = 1e3
"""The factor of a channel is at most this many times larger or smaller than the mean factor."""
_HOMOGENEOUS = named(lambda row: row.homogeneous) - POOLS
"""Activations f with f(s x) = s f(x) for every s > 0."""


@dataclass(frozen=True)
class Pair:
    """Two layers whose channels can be scaled inversely.

    Args:
        first, second: Conv, ConvTranspose or Linear.
        spread: number of inputs of the second layer that come from one channel of the first.
    """

    first: Node
    second: Node
    spread: int = 1


def equalize(graph: Graph, *, passes: int = PASSES) -> Graph:
    """Give the channels of all pairs of layers similar ranges.

    Args:
        graph: the float graph; the weights of its layers are constants.
        passes: most passes over all pairs.

    Raises:
        UsageError: passes is negative.
    """
    if passes < 0:
        raise UsageError(f"passes is {passes}; use 0 or more ({PASSES} by default)")
    chosen = pairs(graph)
    arrays: dict[str, NDArray[np.float64]] = {}
    for node in (node for pair in chosen for node in (pair.first, pair.second)):
        for name in filter(None, node.inputs[1:]):
            arrays.setdefault(name, graph.array(name).astype(np.float64))
    factors: dict[str, NDArray[np.float64]] = {}
    for _ in range(passes):
        change = max((_scale(pair, arrays, factors) for pair in chosen), default=0.0)
        if change <= SETTLED:
            break
    changed: dict[str, Constant] = {name: a.astype(np.float32) for name, a in arrays.items()}
    return replace(graph, constants={**graph.constants, **changed})


def uneven(graph: Graph) -> bool:
    """Whether a channel between two layers is so much larger than the others that they vanish.

    That is one whose largest weight is more than `UNEVEN` times the median channel's.
    """
    for pair in pairs(graph):
        weight = graph.array(weight_name(pair.first)).astype(np.float64)
        ranges = _made(_by_output_channel(pair.first, weight))
        live = ranges[ranges > DEAD * ranges.max(initial=0)]
        if live.size and ranges.max() > UNEVEN * float(np.median(live)):
            return True
    return False


def pairs(graph: Graph) -> tuple[Pair, ...]:
    """Find all pairs of layers whose channels can be scaled inversely."""
    candidates = (_pair(graph, node) for node in graph.nodes if _own(graph, node))
    return tuple(pair for pair in candidates if pair is not None)


def replace_unmet_clips(
    graph: Graph,
    samples: Iterable[Feeds],
    *,
    session_of: OpenSession,
    progress: Progress | None = None,
) -> Graph:
    """Replace every Clip with the lower bound 0 whose upper bound no sample exceeds by a Relu.

    Args:
        graph: the float graph.
        samples: inputs of the graph.
        session_of: opens a session that runs a graph.
        progress: called with ("upper bounds", samples done, 0).

    Raises:
        UsageError: there are no samples.
    """
    bounds = {}
    for node in graph.nodes:
        if node.op == "Clip" and len(node.inputs) == 3 and scalar(graph, node.inputs[1]) == 0:
            bound = scalar(graph, node.inputs[2])
            if bound is not None:
                bounds[node.name] = node, bound
    if not bounds:
        return graph
    run = session_of(graph, [node.inputs[0] for node, _ in bounds.values()])
    seen = 0
    for feeds in samples:
        seen += 1
        values = {**feeds, **run(feeds)}
        bounds = {k: (n, b) for k, (n, b) in bounds.items() if values[n.inputs[0]].max() <= b}
        if progress:
            progress("upper bounds", seen, 0)
    if not seen:
        raise UsageError("there are no calibration samples; give at least one")
    nodes = tuple(
        replace(n, op="Relu", inputs=n.inputs[:1], attrs={}) if n.name in bounds else n
        for n in graph.nodes
    )
    return prune(replace(graph, nodes=nodes))


def _own(graph: Graph, node: Node) -> bool:
    """Whether a node is a layer whose float constants no other node uses."""
    return node.op in LAYERS and all(
        floats(graph, name) is not None and len(graph.consumers[name]) == 1
        for name in filter(None, node.inputs[1:])
    )


def _pair(graph: Graph, first: Node) -> Pair | None:
    """Find the only layer that follows a layer, if every operator between them is homogeneous."""
    axis = channel_axis(graph, first)
    spread, value = 1, first.output
    while (node := graph.only_consumer(value)) is not None:
        if node.inputs.count(value) != 1 or node.inputs[0] != value:
            return None
        if node.op in LAYERS:
            last = len(graph.info(value).shape) - 1
            fits = axis == last if node.op == "Linear" else axis == 1 and spread == 1
            return Pair(first, node, spread) if fits and _own(graph, node) else None
        if node.op in FLATTENS:
            more = _flattened(graph, node, axis)
            if more is None:
                return None
            spread *= more
        elif node.op in POOLS:
            if axis != 1:
                return None
        elif node.op == "ReduceMean":
            axes = ints(graph, node.inputs[1]) if len(node.inputs) > 1 else None
            rank = len(graph.info(value).shape)
            if not axes or axis != 1 or any(a % rank < 2 for a in axes):
                return None
        elif node.op not in _HOMOGENEOUS:
            return None
        value = node.output
    return None


def _flattened(graph: Graph, node: Node, axis: int) -> int | None:
    """Number of values per channel that a reshape to [N, C * n] or [N, C, 1, ...] keeps adjacent.

    Returns:
        the number n; None if the reshape mixes channels.
    """
    before, after = graph.info(node.inputs[0]).shape, graph.info(node.output).shape
    if axis != 1 or len(after) < 2 or after[0] != before[0]:
        return None
    inner = int(np.prod(before[2:], dtype=np.int64))
    if after[1:] == (before[1] * inner,):
        return inner
    return 1 if after[1] == before[1] and inner == 1 else None


def _with_bias(
    pair: Pair,
    arrays: dict[str, NDArray[np.float64]],
    weight: NDArray[np.float64],
    s: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Limit the factors so that no channel gets the largest range through its bias alone.

    The range of a channel's products is estimated as three times the norm of its weights, as for
    inputs of unit variance.
    """
    biases = [arrays[name] for name in pair.first.inputs[2:3] if name]
    if not biases:
        return s
    norms = np.sqrt(np.square(weight).sum(axis=(1, 3))).reshape(-1)
    bias, product = np.abs(biases[0]), 3 * norms
    size = bias + product
    led = product >= bias  # channels whose products exceed their bias
    if not led.any():
        return s
    top = (size[led] / s[led]).max()
    return np.where(led, s, np.maximum(s, size / top))


def _scale(
    pair: Pair,
    arrays: dict[str, NDArray[np.float64]],
    factors: dict[str, NDArray[np.float64]],
) -> float:
    """Scale one pair in place; returns the largest change of a channel (natural logarithm)."""
    first, second = weight_name(pair.first), weight_name(pair.second)
    by_output = _by_output_channel(pair.first, arrays[first])
    by_input = _by_input_channel(pair.second, arrays[second])
    r1 = _made(by_output)
    r2 = np.abs(by_input).max(axis=(1, 3)).reshape(len(r1), -1).max(axis=1)
    live = (r1 > DEAD * r1.max(initial=0)) & (r2 > DEAD * r2.max(initial=0))
    s = np.sqrt(np.divide(r1, r2, out=np.ones_like(r1), where=live))
    # a factor that is common to all channels does not change the ratios of their ranges
    s[~live] = common = np.exp(np.log(s[live]).mean()) if live.any() else 1.0
    before = factors.setdefault(pair.first.name, np.ones_like(s))
    s = np.clip(before * s, before.mean() * common / MOST, before.mean() * common * MOST) / before
    s = _with_bias(pair, arrays, by_output, s)
    factors[pair.first.name] = before * s
    by_output /= s.reshape(by_output.shape[0], 1, by_output.shape[2], 1)
    by_input *= np.repeat(s, pair.spread).reshape(by_input.shape[0], 1, by_input.shape[2], 1)
    for bias in filter(None, pair.first.inputs[2:3]):
        arrays[bias] /= s
    return float(np.abs(np.log(s)).max())


def _made(by_output: NDArray[np.float64]) -> NDArray[np.float64]:
    """The largest weight that makes each channel."""
    largest: NDArray[np.float64] = np.abs(by_output).max(axis=(1, 3)).reshape(-1)
    return largest


def _by_output_channel(node: Node, w: NDArray[np.float64]) -> NDArray[np.float64]:
    """A view of weights as [groups, others, output channels of a group, taps]."""
    if node.op == "ConvTranspose":
        groups = int(node.attrs.get("group", 1))
        return w.reshape(groups, w.shape[0] // groups, w.shape[1], -1)
    return w.reshape(1, 1, w.shape[0], -1)


def _by_input_channel(node: Node, w: NDArray[np.float64]) -> NDArray[np.float64]:
    """A view of weights as [groups, others, input channels of a group, taps]."""
    if node.op == "ConvTranspose":
        return w.reshape(1, 1, w.shape[0], -1)
    groups = int(node.attrs.get("group", 1)) if node.op == "Conv" else 1
    return w.reshape(groups, w.shape[0] // groups, w.shape[1], -1)
