"""Sensitivity: one layer rounded alone, the loss of the outputs, and which layers to spare."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.core.errors import UsageError
from edgeq.graph.execute import Session
from edgeq.graph.ir import Graph, QuantWeight
from edgeq.quant.graph.hessians import weight_name
from edgeq.quant.graph.quantize import quantize_graph
from edgeq.quant.graph.sensitivity import (
    LayerLoss,
    distance,
    keep_float,
    measure_of,
    only,
    sensitivity,
)
from edgeq.quant.graph.weights import round_weight, weight_nodes
from tests.graph_made import cnn, encoder, samples, static_recipe, weight_scheme

pytest.importorskip("onnxruntime")


def rounded(graph: Graph, bits: dict[str, Any]) -> Graph:
    """Every layer in as many bits as said, 8 by default."""
    constants = dict(graph.constants)
    for node in weight_nodes(graph):
        name = weight_name(node)
        scheme = weight_scheme(bits.get(node.name, 8), "tensor", None, "rtn")
        constants[name] = round_weight(graph.array(name), node, scheme)
    return replace(graph, constants=constants)


@pytest.mark.parametrize("make", [cnn, encoder])
def test_the_layer_of_few_bits_is_the_sensitive_one(make: Any) -> None:
    graph = make()
    seen = samples(graph, 8)
    for node in weight_nodes(graph)[1:]:
        made = rounded(graph, {node.name: 4})
        told: list[tuple[str, int, int]] = []
        rows = sensitivity(
            graph, made, seen, session_of=Session, progress=lambda *at, t=told: t.append(at)
        )
        assert [row.node for row in rows] == [n.name for n in weight_nodes(graph)]
        assert max(rows, key=lambda row: row.loss).node == node.name
        assert keep_float(rows, 0.5) == {node.name}
        assert len(told) == len(rows)
        for row, n in zip(rows, weight_nodes(graph), strict=True):
            w = made.constants[weight_name(n)]
            assert isinstance(w, QuantWeight)
            assert row.nbytes == 4 * w.levels.size - w.nbytes
            assert row.loss >= 0


def test_only_one_layer_is_rounded() -> None:
    graph = cnn()
    seen = samples(graph, 12)
    recipe = static_recipe(weight_scheme(8), equalize=False)
    made = quantize_graph(graph, recipe, seen).graph
    for node in weight_nodes(graph):
        mine = next(n for n in made.nodes if n.name == node.name)
        part = only(graph, made, mine)
        held = [n.name for n in part.nodes if n.op in ("Conv", "Linear")
                and isinstance(part.constants[weight_name(n)], QuantWeight)]  # fmt: skip
        assert held == [node.name]
        assert mine.inputs[0] in part.quants
        after = made.only_consumer(mine.output)
        out = after.output if after is not None and after.op == "Relu" else mine.output
        assert set(part.quants) == {mine.inputs[0], out} & set(made.quants)
        feeds = next(iter(seen))
        want, got, all_of_it = (Session(g)(feeds) for g in (graph, part, made))
        name = graph.outputs[0]
        assert not np.array_equal(want[name], got[name])
        assert not np.array_equal(all_of_it[name], got[name])


def test_a_layer_that_loses_nothing_is_worth_nothing() -> None:
    graph = cnn()
    node = weight_nodes(graph)[-1]
    name = weight_name(node)
    exact = rounded(graph, {}).constants[name]
    assert isinstance(exact, QuantWeight)
    graph = replace(graph, constants={**graph.constants, name: exact.numpy()})
    made = replace(graph, constants={**graph.constants, name: exact})
    rows = sensitivity(graph, made, samples(graph, 4), session_of=Session)
    assert [row.node for row in rows] == [node.name]
    assert rows[0].loss < 1e-9
    with pytest.raises(UsageError, match="there are no calibration samples"):
        sensitivity(graph, made, [], session_of=Session)


def test_how_outputs_are_compared() -> None:
    graph = cnn()
    assert measure_of(graph, graph.outputs[0]) == "kl"
    assert measure_of(graph, graph.nodes[-2].output) == "kl"  # the logits
    assert measure_of(graph, graph.nodes[-3].output) == "cosine"  # the features
    assert measure_of(graph, graph.nodes[0].output) == "relative"  # a map
    assert measure_of(encoder(), encoder().outputs[0]) == "cosine"
    rng = np.random.default_rng(0)
    p, q = rng.standard_normal((2, 3, 5)).astype(np.float32)
    soft = [np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (p, q)]
    want = float((soft[0] * np.log(soft[0] / soft[1])).sum(1).mean())
    assert distance(p, q, "kl") == pytest.approx(want, rel=1e-4)
    assert distance(*soft, "kl") == pytest.approx(want, rel=1e-4)  # told by their sums
    assert distance(p, 3 * p, "cosine") == pytest.approx(0, abs=1e-7)
    assert distance(p, -p, "cosine") == pytest.approx(2)
    assert distance(p, 1.5 * p, "relative") == pytest.approx(0.25)
    sure = np.array([[1.0, 0.0]])
    assert np.isfinite(distance(sure, sure[:, ::-1], "kl"))


def row(name: str, loss: float, nbytes: int) -> LayerLoss:
    return LayerLoss(name, loss, nbytes)


def test_cheap_and_sensitive_layers_are_spared_first() -> None:
    rows = [row("a", 6, 10), row("b", 3, 1000), row("c", 1, 1), row("d", 0, 5)]
    assert keep_float(rows, 1.0) == frozenset()
    assert keep_float(rows, 0.5) == {"a"}  # "c" would save more for each byte, and is not needed
    assert keep_float(rows, 0.3) == {"a", "c"}
    assert keep_float(rows, 0.1) == {"a", "b"}
    assert keep_float(rows, 0.0) == {"a", "b", "c"}
    assert keep_float([], 0.5) == frozenset()
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match=r"use 0 to 1"):
            keep_float(rows, wrong)


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 10**6)), max_size=12), st.floats(0, 1))
def test_no_spared_layer_can_be_given_back(pairs: list[tuple[float, int]], budget: float) -> None:
    rows = [row(str(i), *pair) for i, pair in enumerate(pairs)]
    kept = keep_float(rows, budget)
    allowed = budget * sum(r.loss for r in rows)
    left = sum(r.loss for r in rows if r.node not in kept)
    assert left <= allowed * (1 + 1e-9) + 1e-12
    for r in rows:
        if r.node in kept:
            assert left + r.loss > allowed * (1 - 1e-9)
