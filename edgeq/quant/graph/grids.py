"""Which operators compute in integers, and which values must be rounded for that.

A node computes in integers if all its float inputs and its output are rounded and its weight is
held in integers. `plan` chooses the nodes, and with them the values:

- Conv, ConvTranspose and Linear, wherever they are.
- In scope "all" the product of two computed factors, and every other operator that can, if one of
  its inputs comes from such a node.
- In scope "layers" only those that move values, and Relu and Clip. The output of a layer that no
  integer node takes stays float there, as what is added to a residual stream: it multiplies
  rounded inputs and rounded weights, and its result is not rounded again. Attention is float: its
  probabilities need more than 8 bits, and it is a small part of the work.
- What only moves values joins the consumer that takes its output in integers: rounding before is
  the same as after.
- The head, a layer that makes the graph's output or what only a final Softmax takes, has rounded
  inputs and weights, but its output stays float: on a grid of 256 levels the two best scores are
  often the same, and which wins is then chance. It is a small part of the work.
- Behind the last product of the graph, where scores and boxes are made of its output, integers
  go on only through additions, pools and moves: a softmax there would lose the small
  probabilities, and a float one costs next to nothing.

A Relu or Clip belongs to the node it follows; the value between them is not rounded. Operators
that only move or choose values have one grid for their inputs and outputs. Grids of Softmax,
Sigmoid and Tanh are fixed, as TFLite's are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.qparams import QuantParams
from edgeq.graph.ir import Graph, Node, QuantWeight
from edgeq.quant.graph.precise import has_attention, precise
from edgeq.quant.histogram import Range

Scope = Literal["all", "layers"]

PRODUCTS = frozenset({"Conv", "ConvTranspose", "Linear", "MatMul"})
ACTIVATIONS = frozenset(
    {"Relu", "Clip", "LeakyRelu", "PRelu", "Sigmoid", "Tanh", "HardSwish", "Gelu"}
)
MOVES = frozenset(
    {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "DepthToSpace",
     "SpaceToDepth", "Identity"}
)  # fmt: skip
"""Operators that commute with rounding."""
SAME_GRID = MOVES | {
    "MaxPool", "AveragePool", "GlobalMaxPool", "Concat", "Pad", "Gather", "Resize",
}  # fmt: skip
"""Operators whose inputs and outputs have one grid."""
ARITHMETIC = frozenset({"Add", "Sub", "Mul", "GlobalAveragePool", "ReduceMean", "Softmax"})
TAIL = SAME_GRID | {"Add", "GlobalAveragePool", "ReduceMean", "Relu", "Clip", "LeakyRelu"}
"""Operators that stay integer behind the last product."""
ONE_INPUT = frozenset({"Clip", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Split", "Pad", "Gather",
                       "Resize", "ReduceMean"})  # fmt: skip
"""Operators of which only the first input holds values; the others are settings."""
FUSING = frozenset({"Conv", "ConvTranspose", "Linear", "Add", "Sub", "Mul"})
"""Operators that a Relu or Clip behind them becomes a part of."""
FUSED = frozenset({"Relu", "Clip"})
FIXED: Mapping[str, QuantParams] = {
    "Softmax": QuantParams(1 / 256, -128),
    "Sigmoid": QuantParams(1 / 256, -128),
    "Tanh": QuantParams(1 / 128, 0),
}
_FINAL = frozenset({"Softmax", "LogSoftmax", "Sigmoid"})
"""Operators that make probabilities of scores."""
_LOST = 0.05
"""Most that 8 bits may take from a factor, as part of it, for integers to be used."""
_LARGEST = 1e3
"""Largest term that is added in integers: what is larger hides the rest, as masks do."""


@dataclass(frozen=True)
class Plan:
    """What is to be rounded.

    Args:
        integer: names of the nodes that compute in integers.
        open_ended: names of layers with rounded inputs whose output stays float.
        groups: each value to round -> the first of those that share its grid.
        fixed: group -> its grid, where that is not for samples to say.
        sources: value to observe -> its group; where several are of one group, their ranges join.
        constants: (node, place of the input) of constants to round to 8 bits.
    """

    integer: frozenset[str]
    open_ended: frozenset[str]
    groups: Mapping[str, str]
    fixed: Mapping[str, QuantParams]
    sources: Mapping[str, str]
    constants: tuple[tuple[str, int], ...]


def scope_of(graph: Graph) -> Scope:
    """What "auto" stands for: layers for transformers, else all.

    A transformer has a LayerNormalization, or attention and no more convolutions than matrices.
    """
    if any(node.op == "LayerNormalization" for node in graph.nodes):
        return "layers"
    count = {op: sum(node.op == op for node in graph.nodes) for op in ("Conv", "Linear")}
    return "layers" if has_attention(graph) and count["Linear"] >= count["Conv"] else "all"


def plan(graph: Graph, scope: Scope, packed: Iterable[str], floats: Iterable[str] = ()) -> Plan:
    """Choose the nodes that compute in integers.

    Args:
        graph: float.
        scope: see the module.
        packed: names of nodes whose weight will be held in integers.
        floats: names of nodes that must compute in float.
    """
    chooser = _Chooser(graph, scope, frozenset(packed), set(floats) | precise(graph))
    integer = chooser.integer()
    open_ended = _open_ended(graph, integer) if scope == "layers" else integer & heads(graph)
    integer -= open_ended
    groups = _groups(graph, integer, _rounded(graph, integer, open_ended))
    fixed: dict[str, QuantParams] = {}
    sources = _sources(graph, integer, groups)
    clashing = set()
    for value, group in sources.items():
        node = graph.producers.get(value)
        grid = FIXED.get(node.op) if node else None
        others = [v for v, g in sources.items() if g == group and v != value]
        if grid is None:
            continue
        if any(
            getattr(graph.producers.get(v), "op", None) != getattr(node, "op", None) for v in others
        ):
            clashing |= {
                n.name for n in graph.nodes
                if n.op == "Concat" and n.name in integer and groups.get(n.output) == group
            }  # fmt: skip
        else:
            fixed[group] = grid
    if clashing:  # values of a fixed grid joined with others: they are joined in float
        return plan(graph, scope, packed, {*floats, *clashing})
    return Plan(
        frozenset(integer),
        frozenset(open_ended),
        groups,
        fixed,
        {v: g for v, g in sources.items() if g not in fixed},
        tuple(
            (node.name, place)
            for node in graph.nodes
            if node.name in integer and node.op not in PRODUCTS
            for place, name in enumerate(data_inputs(graph, node))
            if name in graph.constants
        ),
    )


def grids(made: Plan, ranges: Mapping[str, Range]) -> dict[str, QuantParams]:
    """A grid for each value of a plan.

    Args:
        made: the plan.
        ranges: of each of its sources: low <= 0 <= high.
    """
    wide: dict[str, Range] = {}
    for value, group in made.sources.items():
        low, high = ranges[value]
        before = wide.get(group, (0.0, 0.0))
        wide[group] = min(low, before[0]), max(high, before[1])
    params = {group: QuantParams.from_range(*ends) for group, ends in wide.items()}
    params |= made.fixed
    return {value: params[group] for value, group in made.groups.items()}


def rounded_constant(x: NDArray[np.float32]) -> QuantWeight:
    """A constant in 8 bits with one scale; a single number is kept as exactly as float32 can."""
    most = float(np.abs(x).max(initial=0))
    scale = np.float32(most / 127 if most else 1.0)
    return QuantWeight(np.rint(x / scale).astype(np.int8), np.array(scale, np.float32), 8)


def data_inputs(graph: Graph, node: Node) -> tuple[str, ...]:
    """Inputs of a node that hold values: not settings, and not the weight and bias of a product."""
    if node.op in PRODUCTS - {"MatMul"} or node.op in ONE_INPUT:
        return node.inputs[:1]
    return tuple(name for name in node.inputs if name)


class _Chooser:
    """Decides for each node.

    Args:
        graph, scope, packed, floats: as `plan`.
    """

    def __init__(
        self, graph: Graph, scope: Scope, packed: frozenset[str], floats: set[str]
    ) -> None:
        self._graph, self._packed, self._floats = graph, packed, floats
        light = ACTIVATIONS | SAME_GRID | ARITHMETIC if scope == "all" else MOVES | FUSED
        self._light = light
        self._heavy = PRODUCTS if scope == "all" else PRODUCTS - {"MatMul"}
        self._tail = self._behind_the_last_product()
        self._heads = heads(graph) if scope == "all" else frozenset()

    def integer(self) -> set[str]:
        """Names of nodes that compute in integers."""
        graph = self._graph
        found: set[str] = set()
        made: set[str] = set()
        for node in graph.nodes:
            if not self._can(node):
                continue
            given = [name for name in data_inputs(graph, node) if name not in graph.constants]
            joins = node.op in self._light and any(name in made for name in given)
            if node.name in self._tail and node.op not in PRODUCTS:
                joins &= node.op in TAIL and all(name in made for name in given)
            if node.op in self._heavy or joins:
                found.add(node.name)
                if node.name not in self._heads:
                    made.update(node.outputs)
        for node in reversed(graph.nodes):
            if node.op not in MOVES or node.name in found or not self._can(node):
                continue
            takers = [t for out in node.outputs for t in graph.consumers.get(out, ())]
            alone = graph.only_consumer(node.inputs[0]) is node
            free = not any(out in graph.outputs for out in node.outputs)
            if takers and alone and free and all(taker.name in found for taker in takers):
                found.add(node.name)
        return found

    def _can(self, node: Node) -> bool:
        """Whether a node could compute in integers at all."""
        graph = self._graph
        if node.name in self._floats or node.op not in self._heavy | self._light:
            return False
        if any(graph.info(out).dtype != "float32" for out in node.outputs if out):
            return False
        if node.op in PRODUCTS - {"MatMul"}:
            return node.name in self._packed
        if node.op in ("Resize", "Pad") and not _within(graph, node):
            return False
        for name in data_inputs(graph, node):
            if graph.info(name).dtype != "float32":
                return False
            if name in graph.constants and not (
                node.op in ("Add", "Sub", "Mul", "PRelu")
                and _held_by_8_bits(graph.array(name), node.op)
            ):
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


def _within(graph: Graph, node: Node) -> bool:
    """Whether what a Resize or Pad makes stays within the range of what it takes."""
    if node.op == "Resize":
        return node.attrs.get("mode", "nearest") in ("nearest", "linear")
    if node.attrs.get("mode", "constant") != "constant" or len(node.inputs) < 3:
        return True
    return not node.inputs[2] or not np.any(graph.array(node.inputs[2]))


def _held_by_8_bits(x: NDArray[np.float32], op: str) -> bool:
    """Whether a constant term or factor can be rounded to 8 bits with one scale."""
    if op in ("Add", "Sub"):
        return float(np.abs(x).max(initial=0)) <= _LARGEST
    return bool((np.abs(rounded_constant(x).numpy() - x) <= _LOST * np.abs(x)).all())


def heads(graph: Graph) -> frozenset[str]:
    """Names of the layers that make scores: an output, or what only a final Softmax takes.

    A convolution of many places makes none: it is too much of the work to be left in float.
    """
    return frozenset(
        node.name
        for node in graph.nodes
        if (
            node.op == "Linear"
            or (node.op == "Conv" and set(graph.info(node.output).shape[2:]) == {1})
        )
        and _final(graph, node)
    )


def _final(graph: Graph, node: Node) -> bool:
    taker = graph.only_consumer(node.output)
    if taker is None:
        return node.output in graph.outputs and not graph.consumers.get(node.output)
    return taker.op in MOVES | _FINAL and len(taker.outputs) == 1 and _final(graph, taker)


def fused(graph: Graph, node: Node) -> Node | None:
    """The Relu or Clip that a node computes with its own result; None if there is none."""
    if node.op not in FUSING:
        return None
    taker = graph.only_consumer(node.output)
    return taker if taker is not None and taker.op in FUSED else None


def _open_ended(graph: Graph, integer: set[str]) -> set[str]:
    """Layers whose output no integer node takes, as it is, moved or fused; what moves it goes."""
    found: set[str] = set()
    for node in reversed(graph.nodes):
        if node.name not in integer:
            continue
        takers = [t for out in node.outputs for t in graph.consumers.get(out, ())]
        if any(taker.name in integer for taker in takers):
            continue
        if node.op in PRODUCTS:
            found.add(node.name)
        else:
            integer.discard(node.name)
    return found


def _rounded(graph: Graph, integer: set[str], open_ended: set[str]) -> list[str]:
    """Values that integer nodes take and make, in the graph's order."""
    found: dict[str, None] = {}
    for node in graph.nodes:
        if node.name in open_ended:
            given = data_inputs(graph, node)
            found.update(dict.fromkeys(name for name in given if name not in graph.constants))
        if node.name not in integer:
            continue
        maker = graph.producers.get(node.inputs[0])
        joined = node.op in FUSED and maker is not None and fused(graph, maker) is node
        if not (joined and maker is not None and maker.name in integer):
            given = data_inputs(graph, node)
            found.update(dict.fromkeys(name for name in given if name not in graph.constants))
        behind = fused(graph, node)
        if behind is None or behind.name not in integer:
            found.update(dict.fromkeys(out for out in node.outputs if out))
    return list(found)


def _groups(graph: Graph, integer: set[str], values: list[str]) -> dict[str, str]:
    """Value -> the first of those that share its grid."""
    parent = {value: value for value in values}

    def root(value: str) -> str:
        while parent[value] != value:
            value = parent[value]
        return value

    order = {value: i for i, value in enumerate(values)}
    for node in graph.nodes:
        if node.op not in SAME_GRID or node.name not in integer:
            continue
        ends = [root(v) for v in (*data_inputs(graph, node), *node.outputs) if v in parent]
        first = min(ends, key=order.__getitem__)
        for end in ends:
            parent[end] = first
    return {value: root(value) for value in values}


def _sources(graph: Graph, integer: set[str], groups: Mapping[str, str]) -> dict[str, str]:
    """Values that are not merely moved from others of their group."""
    return {
        value: group
        for value, group in groups.items()
        if (maker := graph.producers.get(value)) is None
        or maker.op not in SAME_GRID
        or maker.name not in integer
    }
