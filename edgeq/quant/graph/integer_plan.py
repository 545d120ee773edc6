"""Decide which nodes compute on integers and which values are rounded to 8 bits for that.

A node computes on integers if all its float inputs and its output are rounded and its weight is
stored as integers. `plan_integers` chooses the nodes, and with them the values:

- Conv, ConvTranspose and Linear always compute on integers.
- In scope "all" the product of two computed factors does too, and so does every other operator with
  an integer rule (`edgeq.graph.operators`) if one of its inputs comes from such a node.
- In scope "layers" only operators that move values do, and Relu and Clip. The output of a layer
  that no integer node consumes stays float, for instance the term of a residual stream: the layer
  multiplies rounded inputs and rounded weights, and its result is not rounded again. Attention is
  float, because its probabilities need more than 8 bits and it is a small part of the work.
- An operator that only moves values computes on integers if its consumers do, because rounding
  before the move is the same as rounding after it.
- The head, a layer that produces the graph's output or the input of a final Softmax, has rounded
  inputs and weights, but its output stays float. With 256 codes the two highest scores are often
  equal, and the top class would then be arbitrary. The head is a small part of the work.
- After the last product of the graph, where scores and boxes are computed from its output, only
  additions, pools and moves compute on integers. A rounded softmax there would lose the small
  probabilities, and a float softmax costs next to nothing.

A Relu or Clip is fused with the node that it follows; the value between them is not rounded.
Operators that only move or select values have the same scale and zero point for their inputs and
outputs. The scale and zero point of the outputs of Softmax, Sigmoid and Tanh are fixed, as in
TFLite.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.qparams import QuantParams
from edgeq.graph.ir import Graph, Node, QuantWeight
from edgeq.graph.operators import (
    ACTIVATIONS,
    LAYERS,
    MOVES,
    OPERATORS,
    PRODUCTS,
    SHARED_PARAMS,
    TAKES_ACTIVATION,
    named,
)
from edgeq.quant.graph.float_precision import has_attention, needs_float
from edgeq.quant.histogram import Range

Scope = Literal["all", "layers"]

_INTEGER = named(lambda row: row.integer)
_NEAR_OUTPUT = SHARED_PARAMS | named(lambda row: row.integer and row.integer.near_output)
"""Operators that compute on integers even after the last product."""
_PROBABILITIES = named(lambda row: row.probabilities)
_MAX_FACTOR_ERROR = 0.05
"""Largest relative error of a rounded constant factor of a node that computes on integers."""
_MAX_TERM = 1e3
"""Largest constant that is added in integers. A larger one would hide the other term, as a mask
does."""


@dataclass(frozen=True)
class IntegerPlan:
    """Which nodes compute on integers, and which values are rounded.

    Args:
        integer: names of the nodes that compute on integers.
        open_ended: names of layers with rounded inputs whose output stays float.
        groups: rounded value -> its group, the first of the values that share its scale and zero
            point.
        fixed: group -> scale and zero point, for groups whose parameters do not depend on samples.
        sources: value to observe -> its group. If a group has several, it gets the union of their
            ranges.
        constants: (node, index of the input) of constants to round to 8 bits.
    """

    integer: frozenset[str]
    open_ended: frozenset[str]
    groups: Mapping[str, str]
    fixed: Mapping[str, QuantParams]
    sources: Mapping[str, str]
    constants: tuple[tuple[str, int], ...]


def scope_of(graph: Graph) -> Scope:
    """The scope that "auto" means for a graph: "layers" for transformers, else "all".

    A transformer has a LayerNormalization, or attention and no more convolutions than matrices.
    """
    if any(node.op == "LayerNormalization" for node in graph.nodes):
        return "layers"
    count = {op: sum(node.op == op for node in graph.nodes) for op in ("Conv", "Linear")}
    return "layers" if has_attention(graph) and count["Linear"] >= count["Conv"] else "all"


def plan_integers(
    graph: Graph, scope: Scope, packed: Iterable[str], floats: Iterable[str] = ()
) -> IntegerPlan:
    """Choose the nodes that compute on integers.

    Args:
        graph: the float graph.
        scope: "all" or "layers", see the module.
        packed: names of nodes whose weight will be stored as integers.
        floats: names of nodes that must compute in float.
    """
    integer = _IntegerNodes(graph, scope, frozenset(packed), set(floats) | needs_float(graph)).all()
    open_ended = _open_ended(graph, integer) if scope == "layers" else integer & heads(graph)
    integer -= open_ended
    groups = _groups(graph, integer, _rounded_values(graph, integer, open_ended))
    sources = _sources(graph, integer, groups)
    fixed, clashing = _fixed(graph, integer, groups, sources)
    if clashing:  # a Concat of values with different fixed parameters stays float
        return plan_integers(graph, scope, packed, {*floats, *clashing})
    return IntegerPlan(
        frozenset(integer),
        frozenset(open_ended),
        groups,
        fixed,
        {v: g for v, g in sources.items() if g not in fixed},
        tuple(
            (node.name, place)
            for node in graph.nodes
            if node.name in integer and node.op not in PRODUCTS
            for place, name in enumerate(data_inputs(node))
            if name in graph.constants
        ),
    )


def activation_params(plan: IntegerPlan, ranges: Mapping[str, Range]) -> dict[str, QuantParams]:
    """Scale and zero point of each rounded value of a plan.

    Args:
        plan: the plan.
        ranges: source of the plan -> (low, high) with low <= 0 <= high.

    Returns:
        value -> its scale and zero point.
    """
    joined: dict[str, Range] = {}
    for value, group in plan.sources.items():
        low, high = ranges[value]
        before = joined.get(group, (0.0, 0.0))
        joined[group] = min(low, before[0]), max(high, before[1])
    params = {group: QuantParams.from_range(*ends) for group, ends in joined.items()}
    params |= plan.fixed
    return {value: params[group] for value, group in plan.groups.items()}


def rounded_constant(x: NDArray[np.float32]) -> QuantWeight:
    """Round a constant to 8 bits with one scale. A single number stays exact up to float32."""
    most = float(np.abs(x).max(initial=0))
    scale = np.float32(most / 127 if most else 1.0)
    return QuantWeight(np.rint(x / scale).astype(np.int8), np.array(scale, np.float32), 8)


def data_inputs(node: Node) -> tuple[str, ...]:
    """The inputs of a node that are data, not settings and not the weight or bias of a layer."""
    row = OPERATORS.get(node.op)
    return tuple(name for name in node.inputs[: row.values if row else None] if name)


class _IntegerNodes:
    """Decides for each node whether it computes on integers.

    Args:
        graph, scope, packed, floats: as in `plan_integers`.
    """

    def __init__(
        self, graph: Graph, scope: Scope, packed: frozenset[str], floats: set[str]
    ) -> None:
        self._graph, self._packed, self._floats = graph, packed, floats
        self._products = PRODUCTS if scope == "all" else LAYERS
        self._joining = _INTEGER - PRODUCTS if scope == "all" else MOVES | ACTIVATIONS
        self._near_output = self._behind_the_last_product()
        self._heads = heads(graph) if scope == "all" else frozenset()

    def all(self) -> set[str]:
        """Names of nodes that compute on integers."""
        graph = self._graph
        chosen: set[str] = set()
        rounded: set[str] = set()
        for node in graph.nodes:
            if not self._can(node):
                continue
            computed = [name for name in data_inputs(node) if name not in graph.constants]
            joins = node.op in self._joining and any(name in rounded for name in computed)
            if node.name in self._near_output and node.op not in PRODUCTS:
                joins &= node.op in _NEAR_OUTPUT and all(name in rounded for name in computed)
            if node.op in self._products or joins:
                chosen.add(node.name)
                if node.name not in self._heads:
                    rounded.update(node.outputs)
        for node in reversed(graph.nodes):
            if node.op not in MOVES or node.name in chosen or not self._can(node):
                continue
            takers = [t for out in node.outputs for t in graph.consumers.get(out, ())]
            alone = graph.only_consumer(node.inputs[0]) is node
            inside = not any(out in graph.outputs for out in node.outputs)
            if takers and alone and inside and all(taker.name in chosen for taker in takers):
                chosen.add(node.name)
        return chosen

    def _can(self, node: Node) -> bool:
        """Whether a node could compute on integers at all."""
        graph = self._graph
        if node.name in self._floats or node.op not in self._products | self._joining:
            return False
        if any(graph.info(out).dtype != "float32" for out in node.outputs if out):
            return False
        if node.op in LAYERS:
            return node.name in self._packed
        rule = OPERATORS[node.op].integer
        assert rule is not None
        if rule.keeps_range is not None and not rule.keeps_range(graph, node):
            return False
        for name in data_inputs(node):
            if graph.info(name).dtype != "float32":
                return False
            if name in graph.constants and not _rounds_well(graph.array(name), rule.constant):
                return False
        return True

    def _behind_the_last_product(self) -> set[str]:
        graph = self._graph
        before: set[str] = set()
        for node in reversed(graph.nodes):
            takers = (t for out in node.outputs for t in graph.consumers.get(out, ()))
            if any(taker.op in PRODUCTS or taker.name in before for taker in takers):
                before.add(node.name)
        return {node.name for node in graph.nodes if node.name not in before}


def _rounds_well(x: NDArray[np.float32], kind: Literal["term", "factor"] | None) -> bool:
    """Whether a constant term or factor can be rounded to 8 bits with one scale."""
    if kind == "term":
        return float(np.abs(x).max(initial=0)) <= _MAX_TERM
    if kind == "factor":
        error = np.abs(rounded_constant(x).numpy() - x)
        return bool((error <= _MAX_FACTOR_ERROR * np.abs(x)).all())
    return False


def heads(graph: Graph) -> frozenset[str]:
    """Names of the layers that produce scores: an output, or the input of a final Softmax.

    A convolution with many output positions is not a head, because it is too much of the work to
    stay float.
    """
    return frozenset(
        node.name
        for node in graph.nodes
        if (
            node.op == "Linear"
            or (node.op == "Conv" and set(graph.info(node.output).shape[2:]) == {1})
        )
        and _is_final(graph, node)
    )


def _is_final(graph: Graph, node: Node) -> bool:
    taker = graph.only_consumer(node.output)
    if taker is None:
        return node.output in graph.outputs and not graph.consumers.get(node.output)
    passes = taker.op in MOVES | _PROBABILITIES and len(taker.outputs) == 1
    return passes and _is_final(graph, taker)


def activation_behind(graph: Graph, node: Node) -> Node | None:
    """The Relu or Clip that is fused with a node; None if there is none."""
    if node.op not in TAKES_ACTIVATION:
        return None
    taker = graph.only_consumer(node.output)
    return taker if taker is not None and taker.op in ACTIVATIONS else None


def _open_ended(graph: Graph, integer: set[str]) -> set[str]:
    """Names of layers whose output no integer node consumes.

    Other nodes whose output no integer node consumes are removed from ``integer``.
    """
    layers: set[str] = set()
    for node in reversed(graph.nodes):
        if node.name not in integer:
            continue
        takers = [t for out in node.outputs for t in graph.consumers.get(out, ())]
        if any(taker.name in integer for taker in takers):
            continue
        if node.op in PRODUCTS:
            layers.add(node.name)
        else:
            integer.discard(node.name)
    return layers


def _rounded_values(graph: Graph, integer: set[str], open_ended: set[str]) -> list[str]:
    """Values that integer nodes consume and produce, in the order of the graph."""
    values: dict[str, None] = {}
    for node in graph.nodes:
        computed = [name for name in data_inputs(node) if name not in graph.constants]
        if node.name in open_ended:
            values.update(dict.fromkeys(computed))
        if node.name not in integer:
            continue
        maker = graph.producers.get(node.inputs[0])
        joined = maker is not None and activation_behind(graph, maker) is node
        if not (joined and maker is not None and maker.name in integer):
            values.update(dict.fromkeys(computed))
        behind = activation_behind(graph, node)
        if behind is None or behind.name not in integer:
            values.update(dict.fromkeys(out for out in node.outputs if out))
    return list(values)


def _groups(graph: Graph, integer: set[str], values: list[str]) -> dict[str, str]:
    """Value -> the first of the values that share its scale and zero point."""
    parent = {value: value for value in values}

    def root(value: str) -> str:
        while parent[value] != value:
            value = parent[value]
        return value

    order = {value: i for i, value in enumerate(values)}
    for node in graph.nodes:
        if node.op not in SHARED_PARAMS or node.name not in integer:
            continue
        ends = [root(v) for v in (*data_inputs(node), *node.outputs) if v in parent]
        first = min(ends, key=order.__getitem__)
        for end in ends:
            parent[end] = first
    return {value: root(value) for value in values}


def _sources(graph: Graph, integer: set[str], groups: Mapping[str, str]) -> dict[str, str]:
    """Values that are not just moved from other values of their group -> their group."""
    return {
        value: group
        for value, group in groups.items()
        if (maker := graph.producers.get(value)) is None
        or maker.op not in SHARED_PARAMS
        or maker.name not in integer
    }


def _fixed(
    graph: Graph, integer: set[str], groups: Mapping[str, str], sources: Mapping[str, str]
) -> tuple[dict[str, QuantParams], set[str]]:
    """Find the groups whose parameters an operator fixes.

    Returns:
        group -> scale and zero point, and the names of Concats that cannot compute on integers
        because their inputs have different fixed parameters.
    """
    fixed: dict[str, QuantParams] = {}
    clashing: set[str] = set()

    def operator(value: str) -> str | None:
        maker = graph.producers.get(value)
        return maker.op if maker else None

    for value, group in sources.items():
        row = OPERATORS.get(operator(value) or "")
        params = row.integer.output if row and row.integer else None
        if params is None:
            continue
        others = [v for v, g in sources.items() if g == group and v != value]
        if all(operator(other) == operator(value) for other in others):
            fixed[group] = params
        else:
            clashing |= {
                n.name for n in graph.nodes
                if n.op == "Concat" and n.name in integer and groups.get(n.output) == group
            }  # fmt: skip
    return fixed, clashing
