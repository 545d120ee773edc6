"""The scheme of each node's weight, and a weight for each scheme: a recipe applied to a graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from edgeq.formats.schemes import FloatScheme, Scheme
from edgeq.graph.ir import Graph, Node
from edgeq.graph.operators import LAYERS, PRODUCTS, is_depthwise, weight_of
from edgeq.quant.graph.hessians import weight_name
from edgeq.quant.graph.recipe import node_scheme, options_of
from edgeq.quant.graph.weights import needs_hessian, weight_nodes
from edgeq.quant.recipe import Recipe

_INNER = PRODUCTS | {"Gather", "LayerNormalization"}
"""Behind one of these a layer is no longer the first, before one no longer the last."""


def choices(graph: Graph, recipe: Recipe) -> dict[str, Scheme]:
    """Node -> what its weight is held in, for all nodes whose weights can be rounded."""
    nodes = weight_nodes(graph)
    few = outer_nodes(graph, nodes) if options_of(recipe).outer is not None else frozenset()
    return {node.name: node_scheme(recipe, node, outer=node.name in few) for node in nodes}


def float_nodes(graph: Graph, recipe: Recipe) -> frozenset[str]:
    """Nodes that a rule keeps float, with weights or without."""
    return frozenset(
        node.name
        for node in graph.nodes
        if any(r.matches(node.name) for r in recipe.rules)
        and isinstance(node_scheme(recipe, node), FloatScheme)
    )


def outer_nodes(graph: Graph, nodes: Iterable[Node]) -> frozenset[str]:
    """Which of the nodes with weights are a first or last layer, or depthwise.

    A layer is the first if nothing with weights and no product is before it, and the last if none
    is after it. An encoder has neither: its tables are before all layers, and a normalization is
    behind them.
    """
    behind = _reached(graph, forward=True)
    before = _reached(graph, forward=False)
    return frozenset(
        node.name
        for node in nodes
        if is_depthwise(graph, node)
        or (node.op in LAYERS and (node.name not in behind or node.name not in before))
    )


def own_constants(graph: Graph, recipe: Recipe) -> Graph:
    """Give each node its own bias, and its own weight where nodes would round it differently.

    Nodes that share a weight go on sharing it if the recipe rounds it the same for all of them
    and does so without looking at what they are fed.
    """
    picked = choices(graph, recipe)
    constants = dict(graph.constants)
    first: dict[str, Node] = {}
    nodes = []
    for node in graph.nodes:
        inputs = list(node.inputs)
        for place, name in enumerate(inputs):
            if name not in graph.constants or graph.info(name).dtype != "float32":
                continue
            other = first.setdefault(name, node)
            if other is node or not (node.name in picked or other.name in picked):
                continue
            if place == 2 or not _round_alike(other, node, picked, name):
                inputs[place] = f"{name}.{node.name}"
                constants[inputs[place]] = constants[name]
        nodes.append(replace(node, inputs=tuple(inputs)))
    return replace(graph, nodes=tuple(nodes), constants=constants)


def _round_alike(a: Node, b: Node, picked: Mapping[str, Scheme], name: str) -> bool:
    same = picked.get(a.name) == picked.get(b.name)
    scheme = picked.get(a.name)
    weights = all(n.name in picked and weight_name(n) == name for n in (a, b))
    blind = isinstance(scheme, FloatScheme) or (scheme is not None and not needs_hessian(a, scheme))
    return same and weights and blind and weight_of(a).channels == weight_of(b).channels


def _reached(graph: Graph, *, forward: bool) -> set[str]:
    """Nodes that lie somewhere behind (or before) one of `_INNER`."""
    reached: set[str] = set()
    for node in graph.nodes if forward else reversed(graph.nodes):
        if forward:
            neighbors = [graph.producers[name] for name in node.inputs if name in graph.producers]
        else:
            neighbors = [t for out in node.outputs for t in graph.consumers.get(out, ())]
        if any(other.op in _INNER or other.name in reached for other in neighbors):
            reached.add(node.name)
    return reached
