"""What 8 bits with one scale would destroy stays in float: masks, and statistics of norms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.graph.execute import Session
from edgeq.graph.ir import Graph, Info
from edgeq.quant.graph.float_precision import hidden_terms, needs_float
from edgeq.quant.graph.integer_plan import scope_of
from edgeq.quant.graph.quantize import quantize_graph
from edgeq.quant.graph.samples import samples_of
from edgeq.quant.recipe import Recipe
from tests.graph_made import Made, cnn

pytest.importorskip("onnxruntime")

LENGTH, WIDTH = 8, 16


def attention(mask: str, convs: int = 0) -> Graph:
    """Attention with a mask of integers, of floats, or one that is an input, as terms of scores."""
    kind = Info((1, LENGTH), "int64" if mask == "integers" else "float32")
    m = Made(3, x=Info((1, LENGTH, WIDTH)), mask=kind)
    x = "x"
    for _ in range(convs):
        x = m.node("Unsqueeze", [x, m.constant(np.array([0]))], (1, 1, LENGTH, WIDTH))
        x = m.node("Squeeze", [m.conv(x, 1), m.constant(np.array([0]))], (1, LENGTH, WIDTH))
    q, k, v = (m.linear(x, WIDTH) for _ in range(3))
    k = m.node("Transpose", [k], (1, WIDTH, LENGTH), perm=[0, 2, 1])
    scores = m.node("MatMul", [q, k], (1, LENGTH, LENGTH))
    scores = m.same("Mul", scores, m.constant(np.float32(0.25)))
    shape = (1, 1, LENGTH)
    term = m.node("Unsqueeze", ["mask", m.constant(np.array([1]))], shape)
    if mask == "integers":
        m.values[term] = Info(shape, "int64")
        term = m.node("Cast", [term], shape, to=1)
    if mask != "added":
        term = m.node("Sub", [m.constant(np.float32(1)), term], shape)
        term = m.node("Mul", [term, m.constant(np.float32(-10000))], shape)
    scores = m.same("Add", scores, term)
    mixed = m.node("MatMul", [m.same("Softmax", scores, axis=-1), v], (1, LENGTH, WIDTH))
    return m.graph(mixed)


def sentences(mask: str, n: int, seed: int, padded: bool = True) -> list[dict[str, NDArray[Any]]]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        length = int(rng.integers(3, LENGTH + 1)) if padded else LENGTH
        seen = (np.arange(LENGTH) < length)[None]
        if mask == "added":
            given: NDArray[Any] = np.where(seen, 0, -1e9).astype(np.float32)
        else:
            given = seen.astype(np.int64 if mask == "integers" else np.float32)
        x = rng.standard_normal((1, LENGTH, WIDTH)).astype(np.float32)
        found.append({"x": x, "mask": given})
    return found


def error(graph: Graph, made: Graph, feeds: list[dict[str, NDArray[Any]]]) -> float:
    runs = Session(graph), Session(made)
    (name,) = graph.outputs
    right, got = (np.stack([run(one)[name] for one in feeds]) for run in runs)
    return float(np.sqrt(np.mean((got - right) ** 2) / np.mean(right**2)))


@pytest.mark.parametrize("mask", ["integers", "floats", "added"])
@pytest.mark.parametrize("padded", [True, False], ids=["all lengths", "full sentences"])
@pytest.mark.parametrize("scope", ["auto", "all"])
def test_a_mask_is_not_rounded_with_the_scores(mask: str, padded: bool, scope: Any) -> None:
    graph = attention(mask)
    recipe = Recipe.from_dict({**Recipe.named("w8a8-static", "graph").to_dict(), "scope": scope})
    calibration = samples_of(graph, sentences(mask, 32, 1, padded))
    made = quantize_graph(graph, recipe, calibration).graph
    assert error(graph, made, sentences(mask, 16, 2)) < 0.05


def test_attention_without_layer_norms_keeps_its_scores_float_where_matrices_prevail() -> None:
    assert scope_of(attention("integers")) == "layers"
    assert scope_of(attention("integers", convs=4)) == "all"
    assert scope_of(cnn()) == "all"


def test_a_mean_of_squares_keeps_its_small_values() -> None:
    """Rows of very different size: on one grid, the means of the small ones would be zero."""
    m = Made(4, x=Info((1, 4, WIDTH)))
    x = m.linear("x", WIDTH)
    mean = m.node("ReduceMean", [m.same("Mul", x, x), m.constant(np.array([-1]))], (1, 4, 1),
                  keepdims=1)  # fmt: skip
    root = m.same("Sqrt", m.same("Add", mean, m.constant(np.float32(1e-6))))
    graph = m.graph(m.linear(m.same("Div", x, root), WIDTH))
    ops = {node.name: node.op for node in graph.nodes}
    assert sorted(ops[name] for name in needs_float(graph)) == ["Add", "Mul", "ReduceMean"]
    rng = np.random.default_rng(0)
    sizes = np.array([100, 10, 3, 1], np.float32)[None, :, None]
    feeds = [
        {"x": (rng.standard_normal((1, 4, WIDTH)) * sizes).astype(np.float32)} for _ in range(32)
    ]
    recipe = Recipe.from_dict({**Recipe.named("w8a8-static", "graph").to_dict(), "scope": "all"})
    made = quantize_graph(graph, recipe, samples_of(graph, feeds)).graph
    found = Session(made)(feeds[0])[graph.outputs[0]]
    right = Session(graph)(feeds[0])[graph.outputs[0]]
    # the largest rows are exact to 8 bits; the smallest have few levels left, and no infinity
    assert np.abs(found[0, 0] - right[0, 0]).max() < 0.1 * np.abs(right).max()
    assert np.abs(found).max() < 3 * np.abs(right).max()


def test_a_sum_with_a_term_that_hides_the_other_is_named() -> None:
    m = Made(0, x=Info((1, 4)), y=Info((1, 4)))
    graph = m.graph(m.same("Add", m.linear("x", 4), "y"))
    linear, add = (node.output for node in graph.nodes)
    assert hidden_terms(graph, {linear: (-1.0, 1.0), "y": (-500.0, 0.0)}) == {"add1"}
    assert not hidden_terms(graph, {linear: (-1.0, 1.0), "y": (-5.0, 0.0)})
    assert not hidden_terms(graph, {linear: (-1.0, 1.0), add: (0.0, 1.0)})


def test_a_spectrum_before_the_network_keeps_its_range() -> None:
    m = Made(5, x=Info((1, 1, 8, 32)))
    power = m.conv("x", 8)
    power = m.same("Add", m.same("Mul", power, power), m.constant(np.float32(1e-6)))
    graph = m.graph(m.conv(m.same("Relu", m.conv(m.same("Log", power), 8)), 4))
    assert {"conv0", "mul1", "add2"} <= needs_float(graph)
    assert not {"conv4", "conv6"} & needs_float(graph)
    rng = np.random.default_rng(0)
    feeds = [
        {"x": (10 ** rng.uniform(-3, 0) * rng.standard_normal((1, 1, 8, 32))).astype(np.float32)}
        for _ in range(32)
    ]
    made = quantize_graph(
        graph, Recipe.named("w8a8-static", "graph"), samples_of(graph, feeds)
    ).graph
    assert error(graph, made, feeds[:8]) < 0.05
    # a logarithm of the outputs leaves the network behind it alone
    m = Made(6, x=Info((1, 3, 8, 8)))
    end = m.graph(m.same("Log", m.same("Softmax", m.conv("x", 4), axis=1)))
    assert "conv0" not in needs_float(end)
