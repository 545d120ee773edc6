"""Apply a recipe to a graph: choose the scheme of each weight, and copy shared constants."""

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
"""A layer is not the first if one of these operators is before it, nor the last if one is after."""


def choices(graph: Graph, recipe: Recipe) -> dict[str, Scheme]:
    """Name of a node -> the scheme of its weight, for all nodes whose weights can be rounded."""
    nodes = weight_nodes(graph)
    few = outer_nodes(graph, nodes) if options_of(recipe).outer is not None else frozenset()
    return {node.name: node_scheme(recipe, node, outer=node.name in few) for node in nodes}


def float_nodes(graph: Graph, recipe: Recipe) -> frozenset[str]:
    """Names of the nodes, with or without weights, that a rule of the recipe keeps float."""
    return frozenset(
        node.name
        for node in graph.nodes
        if any(r.matches(node.name) for r in recipe.rules)
        and isinstance(node_scheme(recipe, node), FloatScheme)
    )


def outer_nodes(graph: Graph, nodes: Iterable[Node]) -> frozenset[str]:
    """Names of the nodes that are a first or last layer or a depthwise convolution.

    A layer is a first layer if no operator of `_INNER` is before it, and a last layer if none is
    after it. A transformer encoder has neither, because embedding tables are before its layers and
    a normalization is after them.

    Args:
        graph: the float graph.
        nodes: the nodes with weights to choose from.
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
    """Copy constants that several nodes share but that quantization may change differently.

    Every node gets its own bias. Nodes keep sharing a weight if the recipe rounds it in the same
    way for all of them and the rounding does not depend on their inputs.
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
    """Names of the nodes somewhere after (or before) a node with an operator of `_INNER`."""
    reached: set[str] = set()
    for node in graph.nodes if forward else reversed(graph.nodes):
        if forward:
            neighbors = [graph.producers[name] for name in node.inputs if name in graph.producers]
        else:
            neighbors = [t for out in node.outputs for t in graph.consumers.get(out, ())]
        if any(other.op in _INNER or other.name in reached for other in neighbors):
            reached.add(node.name)
    return reached
