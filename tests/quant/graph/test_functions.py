"""A value that only a function takes is rounded for what the function makes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.core.errors import UsageError
from edgeq.formats.qparams import QuantParams
from edgeq.graph.execute import Session
from edgeq.graph.ir import Graph, Info
from edgeq.quant.graph.functions import functions_behind
from edgeq.quant.graph.quantize import quantize_graph
from edgeq.quant.graph.samples import samples_of
from edgeq.quant.histogram import ErrorsBehind, Histogram
from edgeq.quant.observers import LeastSquares
from edgeq.quant.recipe import Recipe
from tests.graph_made import Made, samples

pytest.importorskip("onnxruntime")

FUNCTIONS = ("HardSwish", "Sigmoid", "Tanh", "Gelu", "Relu")
STATIC = Recipe.named("w8a8-static", "graph")


def one(op: str) -> Graph:
    """A function of a sum, which is a value of its own."""
    m = Made(0, x=Info((1, 4, 6, 6)), z=Info((1, 4, 6, 6)))
    return m.graph(m.conv(m.same(op, m.same("Concat", "x", axis=1)), 4))


def alone(graph: Graph) -> dict[str, Any]:
    return functions_behind(graph, {name: name for name in graph.values})


@pytest.mark.parametrize("op", FUNCTIONS)
def test_each_function_is_the_operators(op: str) -> None:
    graph = one(op)
    function = alone(graph)[graph.nodes[0].output]
    x = (np.random.default_rng(1).standard_normal((1, 4, 6, 6)) * 3).astype(np.float32)
    run = Session(graph, [graph.nodes[1].output])
    want = run({"x": x, "z": x})[graph.nodes[1].output]
    np.testing.assert_allclose(function(x), want, atol=6e-4)


def test_a_value_times_its_sigmoid_is_one_function() -> None:
    m = Made(0, x=Info((1, 4, 6, 6)))
    x = m.conv("x", 4)
    gate = m.same("Sigmoid", x)
    graph = m.graph(m.conv(m.same("Mul", gate, x), 4))
    found = alone(graph)
    assert set(found) == {x}
    values = np.linspace(-8, 8, 33)
    np.testing.assert_allclose(found[x](values), values / (1 + np.exp(-values)), atol=1e-12)


@pytest.mark.parametrize("why", ["output", "another taker", "two functions", "shared scale"])
def test_what_others_see_is_rounded_for_itself(why: str) -> None:
    m = Made(0, x=Info((1, 4, 6, 6)))
    x = m.conv("x", 4)
    ends = [m.conv(m.same("HardSwish", x), 4)]
    if why == "output":
        ends.append(x)
    elif why == "another taker":
        ends.append(m.conv(x, 4))
    elif why == "two functions":
        ends.append(m.conv(m.same("Tanh", x), 4))
    graph = m.graph(*ends)
    groups = {name: name for name in graph.values}
    if why == "shared scale":
        groups = dict.fromkeys(graph.values, "x")
    assert x not in functions_behind(graph, groups)


def test_a_view_between_changes_nothing() -> None:
    m = Made(0, x=Info((1, 4, 6, 6)))
    x = m.conv("x", 4)
    flat = m.node("Flatten", [x], (1, 144), axis=1)
    graph = m.graph(m.linear(m.same("HardSwish", flat), 3))
    assert set(functions_behind(graph, {x: x, flat: x})) == {x, flat}


@pytest.mark.parametrize("op", FUNCTIONS)
def test_errors_are_those_of_the_values(op: str) -> None:
    function = alone(one(op))[one(op).nodes[0].output]
    rng = np.random.default_rng(3)
    x = (rng.standard_normal(200_001) * np.array(rng.choice([0.5, 20.0], 200_001))).astype("f4")
    histogram = Histogram()
    histogram.add(x)
    pairs = [(-60.0, 70.0), (-3.0, 70.0), (-3.0, 4.0), (0.0, 30.0)]
    wide = x.astype(np.float64)
    right = []
    for low, high in pairs:
        params = QuantParams.from_range(low, high)
        held = params.dequantize(params.quantize(x)).astype(np.float64)
        right.append(np.square(function(held) - function(wide)).sum())
    np.testing.assert_allclose(ErrorsBehind(histogram, function)(pairs), right, rtol=0.2)


def test_no_level_is_spent_on_what_a_hard_swish_makes_zero() -> None:
    function = alone(one("HardSwish"))[one("HardSwish").nodes[0].output]
    x = np.random.default_rng(0).normal(-20, 20, 100_000).astype(np.float32)
    plain, behind = LeastSquares(), LeastSquares(function=function)
    for observer in (plain, behind):
        observer.add(x)
    assert plain.range()[0] < -40
    assert -4 < behind.range()[0] < 0
    with pytest.raises(UsageError, match="behind a function it must be 255"):
        LeastSquares(levels=15, function=function)


def deep(op: str) -> tuple[Graph, list[dict[str, NDArray[Any]]]]:
    """Layers whose sums reach far below what their function lets through."""
    m = Made(5, x=Info((1, 6, 10, 10)))
    x = "x"
    for _ in range(4):
        x = m.conv(x, 12)
        bias = m.nodes[-1].inputs[2]
        m.constants[bias] = (m.constants[bias] * 300).astype(np.float32)
        x = m.same(op, x) if op != "SiLU" else m.same("Mul", x, m.same("Sigmoid", x))
    graph = m.graph(m.conv(x, 5))
    return graph, [dict(feed) for feed in samples(graph, 24, seed=7)]


@pytest.mark.parametrize("op", ["HardSwish", "SiLU"])
def test_layers_far_below_zero_keep_their_outputs(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, feeds = deep(op)
    run = Session(graph)
    (name,) = graph.outputs
    right = np.stack([run(feed)[name] for feed in feeds[16:]])

    def error() -> float:
        made = quantize_graph(graph, replace(STATIC), samples_of(graph, feeds[:16])).graph
        got = np.stack([Session(made)(feed)[name] for feed in feeds[16:]])
        return float(np.sqrt(np.mean((got - right) ** 2) / np.var(right)))

    better = error()
    monkeypatch.setattr("edgeq.quant.graph.quantize.functions_behind", lambda *_: {})
    assert better < 0.9 * error()
    assert better < 0.1
