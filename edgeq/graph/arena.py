"""How much memory a graph's values take while it runs, when buffers are reused.

A runtime that knows all sizes beforehand lays every value into one arena, where values that are
never needed at the same time may share bytes.

Source: Pisarchyk and Lee 2020, "Efficient memory management for deep neural net inference"
(arXiv:2001.03288), greedy by size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgeq.formats.packing import round_up
from edgeq.graph.ir import Graph
from edgeq.graph.operators import VIEWS

ALIGN = 64
"""Bytes that a value's place is a multiple of."""


@dataclass(frozen=True)
class Life:
    """When a value is in memory, and its size.

    Args:
        first, last: steps in which it is made and last needed.
        nbytes: its size.
    """

    first: int
    last: int
    nbytes: int


@dataclass(frozen=True)
class ArenaLayout:
    """Where each value is placed in one block of memory.

    Args:
        nbytes: of the whole.
        least: the most bytes needed at the same time, which no plan can go below.
        offsets: value -> its first byte.
    """

    nbytes: int
    least: int
    offsets: Mapping[str, int]


def lay_out(lives: Mapping[str, Life]) -> ArenaLayout:
    """Place values in one block, the largest first, each at the lowest free offset."""
    placed: list[tuple[int, int, Life]] = []
    offsets: dict[str, int] = {}
    for name, life in sorted(lives.items(), key=lambda item: (-item[1].nbytes, item[1].first)):
        size = round_up(life.nbytes, ALIGN)
        at = 0
        for start, stop, other in sorted(placed, key=lambda entry: entry[0]):
            meets = life.first <= other.last and other.first <= life.last
            if meets and start < at + size:
                at = max(at, stop)
        offsets[name] = at
        placed.append((at, at + size, life))
    steps = {life.first for life in lives.values()}
    least = (
        sum(round_up(v.nbytes, ALIGN) for v in lives.values() if v.first <= step <= v.last)
        for step in steps
    )
    return ArenaLayout(
        max((stop for _, stop, _ in placed), default=0), max(least, default=0), offsets
    )


def lives(graph: Graph) -> dict[str, Life]:
    """Find when each value of a graph is in memory; each node is one step.

    A rounded value takes a byte an element, and a view shares its source's place.
    """
    root: dict[str, str] = {}
    first = dict.fromkeys(graph.inputs, -1)
    last: dict[str, int] = {}
    for step, node in enumerate(graph.nodes):
        given = [root.get(name, name) for name in node.inputs if name and name in graph.values]
        for name in given:
            last[name] = step
        for out in node.outputs:
            if out and node.op in VIEWS and given:
                root[out] = given[0]
            elif out:
                first[out] = last[out] = step
    end = len(graph.nodes)
    for name in graph.outputs:
        last[root.get(name, name)] = end
    return {
        name: Life(first[name], last.get(name, first[name]), _size(graph, name))
        for name in first
        if name in graph.values
    }


def _size(graph: Graph, name: str) -> int:
    info = graph.info(name)
    return info.nbytes // 4 if name in graph.quants and info.dtype == "float32" else info.nbytes
