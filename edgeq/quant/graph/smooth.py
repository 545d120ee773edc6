"""SmoothQuant for graphs: give the channels of a Linear's input similar ranges.

The inputs of a Linear are divided by a factor for each channel, and its weights are multiplied by
the same factor, which changes only the rounding errors:

    factor = (largest absolute input of the channel) ** strength, scaled to a geometric mean of 1

The strength is the one of `STRENGTHS` with the smallest expected error of the layers' results. The
expected error assumes that rounding errors are uniformly distributed, with one step for all
channels of the inputs and one step for each row of the weights.

If the inputs come from a LayerNormalization without other consumers, its scale and bias are
divided. Otherwise a Mul is inserted before the layers, and other consumers of the value, such as
the residual stream, get it unrounded.

Source: Xiao et al. 2023, "SmoothQuant" (arXiv:2211.10438), equation 4. The factor does not depend
on the weights, because their scales belong to rows and not to channels; the choice of the strength
is edgeq's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import UsageError
from edgeq.core.progress import Progress
from edgeq.graph.feeds import Feeds, OpenSession
from edgeq.graph.ir import Constant, Graph, Info, Node
from edgeq.graph.rewrite import unique, unique_node

Array = NDArray[np.float64]
MAKERS = ("LayerNormalization", "Gelu")
"""Operators whose outputs have channels with very different ranges."""
STRENGTHS = tuple(i / 8 for i in range(5))
"""Strengths from 0, which changes nothing, to 1/2. With larger strengths all channels come close to
the ends of the range, and inputs slightly larger than the observed ones are clipped in many."""
_WIDEST = 1e3
"""Largest factor; its inverse is the smallest."""


def smooth(
    graph: Graph,
    samples: Iterable[Feeds],
    *,
    session_of: OpenSession,
    progress: Progress | None = None,
) -> Graph:
    """Smooth the inputs of Linears that an operator of `MAKERS` computes.

    Linears that share their weight with other nodes are left unchanged.

    Args:
        graph: the float graph.
        samples: inputs of the graph.
        session_of: opens a session that runs a graph.
        progress: called with ("smoothing", samples done, 0).

    Raises:
        UsageError: there are no samples.
    """
    linears = {
        node.output: _linears(graph, node.output) for node in graph.nodes if node.op in MAKERS
    }
    linears = {value: nodes for value, nodes in linears.items() if nodes}
    seen = _observed(graph, list(linears), samples, session_of, progress)
    for value, nodes in linears.items():
        weights = [graph.array(node.inputs[1]) for node in nodes]
        tried = [_factor(seen[value], strength) for strength in STRENGTHS]
        errors = [_expected_error(seen[value], weights, factor) for factor in tried]
        graph = _divided(graph, value, nodes, tried[int(np.argmin(errors))].astype(np.float32))
    return graph


@dataclass
class _Channels:
    """Statistics of each channel of a value: float64 [K] each."""

    low: Array
    high: Array
    squares: Array
    """Means of squares."""


def _factor(seen: _Channels, strength: float) -> Array:
    largest = np.maximum(-seen.low, seen.high)
    factor = np.where(largest > 0, largest, 1.0) ** strength
    factor /= np.exp(np.log(factor).mean())
    clipped: Array = np.clip(factor, 1 / _WIDEST, _WIDEST)
    return clipped


def _expected_error(seen: _Channels, weights: Iterable[NDArray[Any]], factor: Array) -> float:
    """Expected squared error of the results after rounding to 8 bits, up to a constant factor."""
    step = ((seen.high / factor).max() - (seen.low / factor).min()) / 255
    inputs = (seen.squares / factor**2).sum()
    error = 0.0
    for w in weights:
        scaled = w.astype(np.float64) * factor
        steps = np.abs(scaled).max(axis=1) / 127
        error += float(step**2 * np.square(scaled).sum() + inputs * np.square(steps).sum())
    return error


def _linears(graph: Graph, value: str) -> tuple[Node, ...]:
    """The Linears that consume a value and do not share their weight."""
    return tuple(
        node
        for node in graph.consumers.get(value, ())
        if node.op == "Linear"
        and node.inputs[0] == value
        and graph.consumers[node.inputs[1]] == (node,)
    )


def _observed(
    graph: Graph,
    values: list[str],
    samples: Iterable[Feeds],
    session_of: OpenSession,
    progress: Progress | None,
) -> dict[str, _Channels]:
    """Measure each channel (the last axis) of values on samples; ranges include zero."""
    run = session_of(graph, values)
    seen: dict[str, _Channels] = {}
    n = 0
    for n, feeds in enumerate(samples, 1):
        outputs = run(feeds)
        for value in values:
            x = outputs[value].reshape(-1, outputs[value].shape[-1])
            zero = np.zeros(x.shape[1])
            channels = seen.setdefault(value, _Channels(zero, zero, zero))
            channels.low = np.minimum(channels.low, x.min(axis=0))
            channels.high = np.maximum(channels.high, x.max(axis=0))
            mean = np.square(x, dtype=np.float64).mean(axis=0)
            channels.squares = channels.squares + (mean - channels.squares) / n
        if progress is not None:
            progress("smoothing", n, 0)
    if not n:
        raise UsageError("there are no calibration samples; give at least one")
    return seen


def _divided(
    graph: Graph, value: str, nodes: tuple[Node, ...], factor: NDArray[np.float32]
) -> Graph:
    """Divide a value by a factor for each channel, and multiply the weights of its consumers."""
    constants: dict[str, Constant] = dict(graph.constants)
    for node in nodes:
        constants[node.inputs[1]] = graph.array(node.inputs[1]) * factor
    maker = graph.producers[value]
    own = [name for name in maker.inputs[1:] if name]
    alone = value not in graph.outputs and graph.consumers[value] == nodes
    if maker.op == "LayerNormalization" and alone and all(_only(graph, n, maker) for n in own):
        for name in own:
            constants[name] = graph.array(name) / factor
        return replace(graph, constants=constants)
    inverse, out = unique(graph, f"{value}.factor"), unique(graph, f"{value}.smooth")
    constants[inverse] = (1 / factor).astype(np.float32)
    mul = Node("Mul", unique_node(graph, f"{maker.name}.smooth"), (value, inverse), (out,))
    names = {node.name for node in nodes}
    changed: list[Node] = []
    for node in graph.nodes:
        changed.append(
            replace(node, inputs=(out, *node.inputs[1:])) if node.name in names else node
        )
        if node is maker:
            changed.append(mul)
    values = {**graph.values, out: Info(graph.info(value).shape)}
    return replace(graph, nodes=tuple(changed), constants=constants, values=values)


def _only(graph: Graph, constant: str, node: Node) -> bool:
    return constant in graph.constants and graph.consumers[constant] == (node,)
