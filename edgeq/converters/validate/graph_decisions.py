"""Outputs that are decisions on float values: which is the largest, on which side of a bound.

A right runtime may decide a tie in another way. How far a decision is from a tie is known from the
float values that it is made on, in the source.

    ArgMax, ArgMin    how much worse the score at the place that was chosen is than the best
    TopK's places     how far the score at that place is from the one that belongs there
    Cast to integers  how far the value is from those that become that integer
    comparisons       how far the two sides are from each other
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.graph.feeds import Feeds
from edgeq.graph.ir import Graph, Node
from edgeq.graph.operators import LOGIC, VIEWS

Array = NDArray[np.float64]
_SAME_ORDER = VIEWS | {"Cast", "Identity", "Not"}


@dataclass(frozen=True)
class Decision:
    """What an output decides.

    Args:
        node: that decides; the output has its elements in the same order.
        scores: the float values it decides on, as they are to be watched; constants are not.
        constants: those of them that are constants.
    """

    node: Node
    scores: tuple[str, ...]
    constants: Mapping[str, NDArray[Any]]

    def gaps(self, values: Feeds, got: NDArray[Any]) -> Array:
        """How far each element of the output is from a tie, in a list.

        Args:
            values: the source's outputs and watched values.
            got: the target's output.
        """
        sides = [
            np.asarray(self.constants.get(name, values.get(name)), np.float64)
            for name in self.node.inputs[: 2 if self.node.op in LOGIC else 1]
        ]
        return _GAPS.get(self.node.op, _sides)(self.node, sides, got)


def decision(graph: Graph, name: str) -> Decision | None:
    """The decision that an output is; None if it is none, or not one on float values."""
    node, slot = graph.producers.get(name), name
    while node is not None and node.op in _SAME_ORDER and not _casts(graph, node):
        slot = node.inputs[0]
        node = graph.producers.get(slot)
    if node is None or (node.op == "TopK" and slot != node.outputs[1]):
        return None
    if node.op not in _GAPS and node.op not in LOGIC:
        return None
    sides = node.inputs[: 2 if node.op in LOGIC else 1]
    if any(graph.info(side).dtype != "float32" for side in sides):
        return None
    computed = tuple(side for side in sides if side in graph.producers)
    constants = {side: graph.array(side) for side in sides if side in graph.constants}
    if not computed or len(computed) + len(constants) < len(sides):
        return None
    return Decision(node, computed, constants)


def _casts(graph: Graph, node: Node) -> bool:
    """Whether a node makes integers of floats."""
    before, after = graph.info(node.inputs[0]).dtype, graph.info(node.output).dtype
    return node.op == "Cast" and before == "float32" and after.startswith(("int", "uint"))


def _ranked(node: Node, sides: list[Array], got: NDArray[Any]) -> Array:
    rows = _rows(node, sides[0], default=0)
    rows = -rows if node.op == "ArgMin" else rows
    taken = _taken(rows, got.reshape(-1, 1))[:, 0]
    gaps: Array = rows.max(axis=1) - taken
    return gaps


def _places(node: Node, sides: list[Array], got: NDArray[Any]) -> Array:
    axis = int(node.attrs.get("axis", -1))
    rows = _rows(node, sides[0], default=-1)
    rows = rows if node.attrs.get("largest", 1) else -rows
    chosen = np.moveaxis(got, axis, -1)
    places = chosen.reshape(-1, chosen.shape[-1])
    best = -np.sort(-rows, axis=1)[:, : places.shape[1]]
    gaps = np.abs(best - _taken(rows, places)).reshape(chosen.shape)
    listed: Array = np.moveaxis(gaps, -1, axis).reshape(-1)
    return listed


def _rows(node: Node, scores: Array, default: int) -> Array:
    rows = np.moveaxis(scores, int(node.attrs.get("axis", default)), -1)
    return rows.reshape(-1, rows.shape[-1])


def _taken(rows: Array, places: NDArray[Any]) -> Array:
    """The scores at places of each row; -inf at a place that is none."""
    at = places.astype(np.int64)
    inside = (at >= 0) & (at < rows.shape[1])
    taken = np.take_along_axis(rows, np.where(inside, at, 0), axis=1)
    scores: Array = np.where(inside, taken, -np.inf)
    return scores


def _truncated(node: Node, sides: list[Array], got: NDArray[Any]) -> Array:
    whole, value = got.astype(np.float64).reshape(-1), sides[0].reshape(-1)
    low = np.where(whole <= 0, whole - 1, whole)
    high = np.where(whole >= 0, whole + 1, whole)
    return np.maximum(np.maximum(low - value, value - high), 0)


def _sides(node: Node, sides: list[Array], got: NDArray[Any]) -> Array:
    gaps: Array = np.abs(sides[0] - sides[1]).reshape(-1)
    return gaps


_GAPS: Mapping[str, Callable[[Node, list[Array], NDArray[Any]], Array]] = {
    "ArgMax": _ranked, "ArgMin": _ranked, "TopK": _places, "Cast": _truncated,
}  # fmt: skip
