"""Memory of a graph's values: plans are right, and as small as can be where that is known."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edgeq.formats.qparams import QuantParams
from edgeq.graph.arena import ALIGN, Life, lay_out, lives
from edgeq.graph.ir import Graph, Info, Node

LIVES = st.lists(
    st.tuples(st.integers(0, 12), st.integers(0, 6), st.integers(1, 5000)), min_size=1, max_size=20
)


@given(LIVES)
def test_values_that_meet_never_share_a_byte(entries: list[tuple[int, int, int]]) -> None:
    held = {str(i): Life(first, first + n, size) for i, (first, n, size) in enumerate(entries)}
    plan = lay_out(held)
    taken = np.full((20, plan.nbytes), -1)
    for i, life in enumerate(held.values()):
        at = plan.offsets[str(i)]
        part = taken[life.first : life.last + 1, at : at + life.nbytes]
        assert (part == -1).all()
        part[:] = i
    assert plan.least <= plan.nbytes
    assert all(at % ALIGN == 0 for at in plan.offsets.values())


def chain(*, quants: bool) -> Graph:
    """Four values of 4000, 8000, 8000 (a view) and 2000 bytes, one after the other."""
    values = {
        "x": Info((1, 1000)), "a": Info((1, 2000)), "b": Info((2, 1000)), "y": Info((2, 250)),
    }  # fmt: skip
    nodes = (
        Node("Linear", "fc", ("x", "w"), ("a",)),
        Node("Reshape", "view", ("a", "shape"), ("b",)),
        Node("Linear", "out", ("b", "v"), ("y",)),
    )
    constants = {
        "w": np.zeros((2000, 1000), np.float32),
        "shape": np.array([2, 1000]),
        "v": np.zeros((250, 1000), np.float32),
    }
    rounded = {name: QuantParams(1.0, 0) for name in values} if quants else {}
    return Graph("chain", ("x",), ("y",), nodes, constants, values, rounded)


def test_a_chain_needs_its_two_largest_neighbors() -> None:
    plan = lay_out(lives(chain(quants=False)))
    assert plan.nbytes == plan.least == 4032 + 8000  # 4000 in whole blocks of 64 bytes
    assert plan.offsets["a"] == 0
    assert "b" not in plan.offsets


def test_rounded_values_take_a_quarter() -> None:
    plan = lay_out(lives(chain(quants=True)))
    assert plan.nbytes == 1024 + 2048  # 1000 and 2000 in whole blocks
