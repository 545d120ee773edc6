"""SmoothQuant for graphs: bring the channels of a Linear's input to one size.

The inputs of a Linear are divided by a factor for each channel and its weights multiplied by it,
which changes nothing but rounding:

    factor = sqrt(largest input) of each channel, their geometric mean being 1

Where the inputs come from a LayerNormalization that nothing else takes, the division goes into its
scale and bias; else a Mul is put before the layers. What else takes the value, as the residual
stream does, then has it unrounded.

Source: Xiao et al. 2023, "SmoothQuant" (arXiv:2211.10438), equation 4 with a strength of 1/2; the
channels of the weights are left out of it, as it is their rows that share a scale.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import UsageError
from edgeq.core.progress import Progress
from edgeq.graph.feeds import Feeds, OpenSession
from edgeq.graph.ir import Constant, Graph, Info, Node
from edgeq.graph.rewrite import unique, unique_node

MAKERS = ("LayerNormalization", "Gelu")
"""Operators whose outputs have channels of very different size."""
_WIDEST = 1e3
"""Largest factor, and its inverse the least."""


def smooth(
    graph: Graph,
    samples: Iterable[Feeds],
    *,
    session_of: OpenSession,
    progress: Progress | None = None,
) -> Graph:
    """Smooth the inputs of Linears that an operator of `MAKERS` computes.

    Args:
        graph: float; Linears that are smoothed take no part in each other's weights.
        samples: inputs of the graph.
        session_of: runs a graph.
        progress: called with ("smoothing", samples seen, 0).

    Raises:
        UsageError: there are no samples.
    """
    linears = {
        node.output: _linears(graph, node.output) for node in graph.nodes if node.op in MAKERS
    }
    linears = {value: nodes for value, nodes in linears.items() if nodes}
    largest = _largest(graph, list(linears), samples, session_of, progress)
    for value, nodes in linears.items():
        factor = np.sqrt(np.where(largest[value] > 0, largest[value], 1.0))
        factor = np.clip(factor / np.exp(np.log(factor).mean()), 1 / _WIDEST, _WIDEST)
        graph = _divided(graph, value, nodes, factor.astype(np.float32))
    return graph


def _linears(graph: Graph, value: str) -> tuple[Node, ...]:
    """The Linears that use a value and do not share their weight."""
    return tuple(
        node
        for node in graph.consumers.get(value, ())
        if node.op == "Linear"
        and node.inputs[0] == value
        and graph.consumers[node.inputs[1]] == (node,)
    )


def _largest(
    graph: Graph,
    values: list[str],
    samples: Iterable[Feeds],
    session_of: OpenSession,
    progress: Progress | None,
) -> dict[str, NDArray[np.float32]]:
    """The largest magnitude of each channel, which is the last axis."""
    run = session_of(graph, values)
    largest: dict[str, NDArray[np.float32]] = {}
    n = 0
    for n, feeds in enumerate(samples, 1):
        outputs = run(feeds)
        for value in values:
            x = np.abs(outputs[value]).reshape(-1, outputs[value].shape[-1]).max(axis=0)
            largest[value] = np.maximum(largest.get(value, 0), x)
        if progress is not None:
            progress("smoothing", n, 0)
    if not n:
        raise UsageError("there are no calibration samples; give at least one")
    return largest


def _divided(
    graph: Graph, value: str, nodes: tuple[Node, ...], factor: NDArray[np.float32]
) -> Graph:
    """Divide a value by a factor for each channel, and multiply the weights behind it."""
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
