"""Apply the rules of a recipe to the nodes of a graph."""

from __future__ import annotations

from collections.abc import Iterable

from edgeq.core.errors import SchemeError, UsageError
from edgeq.formats.schemes import Scheme
from edgeq.graph.ir import Node
from edgeq.quant.graph.options import GraphOptions
from edgeq.quant.recipe import Recipe


def node_scheme(recipe: Recipe, node: Node, *, outer: bool = False) -> Scheme:
    """The scheme of a node's weight. With a float scheme the node computes in float.

    Args:
        recipe: a recipe for graphs.
        node: any node.
        outer: whether `GraphOptions.outer` applies to the node.
    """
    options = options_of(recipe)
    for rule in recipe.rules:
        if rule.matches(node.name):
            return rule.scheme
    if node.op == "Gather" and options.tables is not None:
        return options.tables
    return options.outer if outer and options.outer is not None else recipe.default


def check_rules(recipe: Recipe, nodes: Iterable[Node]) -> None:
    """Refuse a rule that no node matches.

    Raises:
        SchemeError: a rule matches no node; the message names the rule and some of the nodes.
    """
    names = [node.name for node in nodes]
    for rule in recipe.rules:
        if not any(map(rule.matches, names)):
            shown = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
            raise SchemeError(
                f"the rule {rule.pattern!r} matches no node; use a pattern of the nodes' names: "
                f"{shown}"
            )


def options_of(recipe: Recipe) -> GraphOptions:
    """The options of a recipe for graphs.

    Raises:
        UsageError: the recipe is for decoders.
    """
    if recipe.graph is None:
        raise UsageError(
            "this recipe is for decoders; load one for graphs, as with "
            "Recipe.from_options(preset, source='graph')"
        )
    return recipe.graph
