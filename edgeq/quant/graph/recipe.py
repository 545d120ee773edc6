"""What a recipe says of graphs alone, and what it gives each of their nodes.

What recipes share with those of decoders is in `edgeq.quant.recipe`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from edgeq.core.errors import SchemeError, UsageError, check_type, unknown
from edgeq.formats.schemes import FloatScheme, QuantScheme, Scheme
from edgeq.graph.ir import Node

if TYPE_CHECKING:
    from edgeq.quant.recipe import Recipe

SCOPES = ("auto", "all", "layers")
SINGLE, HALF = FloatScheme("float32"), FloatScheme("float16")
GRAPH_METHODS = ("rtn", "mse", "gptq", "palette")
"""What ``--method`` may say for a graph; "palette" gives the weights a table of values."""


@dataclass(frozen=True)
class GraphOptions:
    """What a recipe says of graphs alone.

    Args:
        scope: which operators compute in integers, where activations are static: "all" that can,
            or the "layers" Conv, ConvTranspose and Linear, with smoothed inputs
            (`edgeq.quant.graph.smooth`) and all else in float; "auto": layers where there is a
            LayerNormalization (residual streams of transformers have outliers), else all.
        outer: the scheme of the first and the last layer and of depthwise convolutions; None for
            the recipe's default.
        tables: the scheme of tables of Gather, of which a run reads a few rows alone; None for
            the recipe's default.
        equalize: whether ranges of channels are brought together across layers; None for where
            there are depthwise convolutions.
        bias_correction: add the mean error of each output channel to its bias; in scope "layers"
            it gains nothing and is left out.
        mixed: give the layers that lose most the scheme ``mixed_keep``, until the loss is this
            part of what it was; None for no such search.
        mixed_keep: the scheme of those layers.
        rest: what float constants are stored in: f32 or f16.

    Raises:
        SchemeError: a part that cannot be.
    """

    scope: Literal["auto", "all", "layers"] = "auto"
    outer: Scheme | None = None
    tables: Scheme | None = None
    equalize: bool | None = None
    bias_correction: bool = False
    mixed: float | None = None
    mixed_keep: Scheme = HALF
    rest: FloatScheme = SINGLE

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise SchemeError(unknown("scope", str(self.scope), SCOPES))
        check_type("outer", self.outer, QuantScheme, FloatScheme, None)
        check_type("tables", self.tables, QuantScheme, FloatScheme, None)
        check_type("mixed_keep", self.mixed_keep, QuantScheme, FloatScheme)
        if not isinstance(self.rest, FloatScheme):
            raise SchemeError(f"rest is {self.rest}; float constants are stored in f32 or fp16")
        for name in ("equalize", "bias_correction"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "equalize" and value is None):
                raise SchemeError(f"{name} is {value!r}; it must be true or false")
        if self.mixed is not None and not (isinstance(self.mixed, float) and 0 < self.mixed < 1):
            raise SchemeError(f"mixed is {self.mixed!r}; it must be between 0 and 1")


def node_scheme(recipe: Recipe, node: Node, *, outer: bool = False) -> Scheme:
    """The scheme of a node's weight; a float one makes the node compute in float.

    Args:
        recipe: for graphs.
        node: any.
        outer: whether it is one that `GraphOptions.outer` is for.
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
        SchemeError: names the rule and some of the nodes.
    """
    names = [node.name for node in nodes]
    for rule in recipe.rules:
        if not any(map(rule.matches, names)):
            shown = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
            raise SchemeError(f"the rule {rule.pattern!r} matches no node (nodes: {shown})")


def options_of(recipe: Recipe) -> GraphOptions:
    """What the recipe says of graphs.

    Raises:
        UsageError: it is a recipe for decoders.
    """
    if recipe.graph is None:
        raise UsageError(
            "this recipe is for decoders; load one for graphs, as with "
            "Recipe.from_options(preset, source='graph')"
        )
    return recipe.graph


def check_graph_recipe(recipe: Recipe) -> None:
    """Refuse what graphs cannot do.

    Raises:
        SchemeError: names the part.
    """
    options = options_of(recipe)
    for part in ("transforms", "training", "target", "options"):
        if getattr(recipe, part):
            raise SchemeError(f"{part} is for decoders; leave it out of a recipe for graphs")
    for scheme in recipe.weight_schemes:
        if scheme.bits not in (4, 8):
            raise SchemeError(f"weights of a graph have 4 or 8 bits, not {scheme.bits}")
        if not scheme.symmetric:
            raise SchemeError(f"weights of a graph are symmetric; write {scheme} without -asym")
        if scheme.method == "imatrix":
            raise SchemeError(unknown("method", scheme.method, GRAPH_METHODS))
    floats = [rule.scheme for rule in recipe.rules]
    floats += [recipe.default, options.mixed_keep, options.rest]
    if FloatScheme("bfloat16") in floats:
        raise SchemeError("constants of a graph are stored in f32 or fp16, not bf16")
    if recipe.activations is None or recipe.activations.mode != "static":
        return
    if isinstance(recipe.default, FloatScheme):
        raise SchemeError(
            f"static activations need integer weights, and weights is {recipe.default}; "
            "write weights = 'w8-channel', say, or activations = 'float'"
        )
    grouped = [scheme for scheme in recipe.weight_schemes if scheme.granularity == "group"]
    if grouped:
        raise SchemeError(
            f"static activations take scales for a channel or tensor of weights, not "
            f"{grouped[0]}; use granularity channel or tensor"
        )
