"""Cross-layer equalization: the function stays, the ranges meet, and depthwise nets survive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.core.errors import UsageError
from edgeq.graph.execute import Session
from edgeq.graph.ir import Graph, Info
from edgeq.graph.onnx.save import write_onnx
from edgeq.quant.graph.equalize import equalize, pairs, replace_unmet_clips, uneven
from edgeq.quant.graph.quantize import quantize_graph
from edgeq.quant.graph.samples import Samples, samples_of
from edgeq.quant.recipe import Recipe
from tests.graph_made import Made, samples, static_recipe, weight_scheme

onnxruntime = pytest.importorskip("onnxruntime")

CLASSES = 10
FEATURES = 48


def activated(m: Made, op: str, x: str) -> str:
    if op == "Clip":
        return m.same("Clip", x, m.constant(np.float32(0)), m.constant(np.float32(6)))
    if op == "PRelu":
        slope = m.constant(np.full((m.values[x].shape[1], 1, 1), 0.3, np.float32))
        return m.same("PRelu", x, slope)
    return m.same(op, x, **({"alpha": 0.1} if op == "LeakyRelu" else {}))


def mobilenet(activation: str = "Relu", seed: int = 0) -> Graph:
    """Inverted residuals: expansion, depthwise, projection; a linear head on the pooled map."""
    m = Made(seed, x=Info((1, 3, 16, 16)))
    x = activated(m, activation, m.conv("x", 16, stride=2))
    for out, stride in ((16, 1), (24, 2), (24, 1)):
        inner = 3 * m.values[x].shape[1]
        y = activated(m, activation, m.conv(x, inner, k=1))
        y = activated(m, activation, m.conv(y, inner, stride=stride, group=inner))
        y = m.conv(y, out, k=1)
        x = m.same("Add", x, y) if m.values[x].shape == m.values[y].shape else y
    x = activated(m, activation, m.conv(x, FEATURES, k=1))
    x = m.node("GlobalAveragePool", [x], (1, FEATURES, 1, 1))
    x = m.node("Flatten", [x], (1, FEATURES), axis=1)
    return m.graph(m.linear(x, CLASSES))


def pictures(n: int, seed: int) -> tuple[list[dict[str, NDArray[Any]]], NDArray[np.int64]]:
    """Ten patterns, noise on top."""
    patterns = np.random.default_rng(99).standard_normal((CLASSES, 1, 3, 16, 16))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n)
    noise = rng.standard_normal((n, 1, 3, 16, 16))
    return [{"x": x} for x in (patterns[labels] + 0.7 * noise).astype(np.float32)], labels


def trained(graph: Graph) -> Graph:
    """The head fitted by ridge regression, so that it tells the patterns apart."""
    head = graph.nodes[-1]
    run = Session(graph, [head.inputs[0]])
    feeds, labels = pictures(400, 1)
    x = np.concatenate([run(f)[head.inputs[0]] for f in feeds]).astype(np.float64)
    mean, y = x.mean(0), np.eye(CLASSES)[labels] - 1 / CLASSES
    w = np.linalg.solve((x - mean).T @ (x - mean) + 1e-3 * np.eye(FEATURES), (x - mean).T @ y)
    held = {head.inputs[1]: w.T, head.inputs[2]: -mean @ w}
    return replace(
        graph, constants={**graph.constants, **{k: v.astype(np.float32) for k, v in held.items()}}
    )


def badly_scaled(graph: Graph, decades: float, seed: int = 5) -> Graph:
    """The same function with channels between pairs scaled by factors over some decades."""
    rng = np.random.default_rng(seed)
    constants = {name: graph.array(name) for name in graph.constants}
    for pair in pairs(graph):
        w1, b1, w2 = pair.first.inputs[1], pair.first.inputs[2], pair.second.inputs[1]
        f = 10 ** rng.uniform(-decades / 2, decades / 2, graph.array(w1).shape[0])
        f = f.astype(np.float32)
        constants[w1] = constants[w1] * f.reshape(-1, *[1] * (constants[w1].ndim - 1))
        constants[b1] = constants[b1] * f
        wide = np.repeat(f, pair.spread)
        if pair.second.attrs.get("group", 1) > 1:
            constants[w2] = constants[w2] / wide.reshape(-1, 1, 1, 1)
        else:
            constants[w2] = constants[w2] / wide.reshape(1, -1, *[1] * (constants[w2].ndim - 2))
    return replace(graph, constants=constants)


def outputs(graph: Graph, feeds: Sequence[dict[str, NDArray[Any]]]) -> NDArray[np.float32]:
    run = Session(graph)
    return np.concatenate([run(f)[graph.outputs[0]] for f in feeds])


def ranges_between(graph: Graph) -> list[NDArray[np.float64]]:
    """How much larger the most strongly made channel is than the least, of each pair."""
    found = []
    for pair in pairs(graph):
        w = np.abs(graph.array(pair.first.inputs[1]))
        rows = w.reshape(len(w), -1).max(1)
        found.append(rows.max() / rows.min())
    return found


@pytest.mark.parametrize("activation", ["Relu", "LeakyRelu", "PRelu"])
def test_the_function_stays(activation: str) -> None:
    graph = badly_scaled(mobilenet(activation), 3)
    same = equalize(graph)
    assert ranges_between(same) != ranges_between(graph)
    feeds, _ = pictures(4, 3)
    want = outputs(graph, feeds)
    np.testing.assert_allclose(outputs(same, feeds), want, rtol=1e-5, atol=1e-5 * np.ptp(want))


def test_pairs_of_a_mobilenet() -> None:
    """In each block expansion to depthwise to projection; the residual stream is left alone."""
    found = [(p.first.name, p.second.name) for p in pairs(mobilenet())]
    assert found == [
        ("conv2", "conv4"), ("conv4", "conv6"),
        ("conv8", "conv10"), ("conv10", "conv12"),
        ("conv13", "conv15"), ("conv15", "conv17"),
        ("conv19", "linear23"),
    ]  # fmt: skip
    assert pairs(mobilenet("Clip")) == pairs(mobilenet("Sigmoid")) == ()


def test_ranges_meet() -> None:
    graph = badly_scaled(mobilenet(), 3)
    same = equalize(graph)
    assert max(ranges_between(graph)) > 100
    for pair in pairs(same):
        made = np.abs(same.array(pair.first.inputs[1]))
        taken = np.abs(same.array(pair.second.inputs[1]))
        grouped = pair.second.attrs.get("group", 1) > 1
        taken = taken if grouped else taken.swapaxes(0, 1)
        r1, r2 = (w.reshape(len(w), -1).max(1) for w in (made, taken))
        np.testing.assert_allclose(r1, r2, rtol=5e-3)
    # a second time there is nothing left to do
    again = equalize(same)
    for name, array in same.constants.items():
        np.testing.assert_allclose(again.array(name), array, rtol=5e-3)
    assert equalize(graph, passes=0).constants.keys() == graph.constants.keys()
    with pytest.raises(UsageError, match="passes is -1"):
        equalize(graph, passes=-1)


def test_what_is_between_transposed_and_grouped_convolutions_and_flattened_maps() -> None:
    m = Made(2, x=Info((1, 4, 5, 5)))
    x = m.same("Relu", m.conv("x", 8))
    x = m.same("LeakyRelu", m.conv(x, 12, group=2), alpha=0.2)
    up = {"strides": [2, 2], "pads": [0] * 4, "dilations": [1, 1], "output_padding": [0, 0]}
    kernel = {"kernel_shape": [2, 2], "group": 3}
    bias = m.constant(np.arange(6, dtype=np.float32))
    x = m.node("ConvTranspose", [x, m.weight(12, 2, 2, 2), bias], (1, 6, 10, 10), **up, **kernel)
    x = m.same("Relu", x)
    x = m.node(
        "MaxPool", [x], (1, 6, 5, 5), kernel_shape=[2, 2], strides=[2, 2], pads=[0] * 4,
        dilations=[1, 1], ceil_mode=0,
    )  # fmt: skip
    x = m.node("Reshape", [x, m.constant(np.array([1, 150]))], (1, 150))
    x = m.same("Relu", m.linear(x, 7))
    graph = m.graph(m.linear(x, 3))
    assert [p.spread for p in pairs(graph)] == [1, 1, 25, 1]
    same = equalize(graph)
    feeds = list(samples(graph, 4))
    want = outputs(graph, feeds)
    np.testing.assert_allclose(outputs(same, feeds), want, rtol=1e-5, atol=1e-5 * np.ptp(want))
    for pair in pairs(graph):
        name = pair.second.inputs[1]
        assert not np.allclose(graph.array(name), same.array(name))


def test_channels_of_nothing_are_left_alone() -> None:
    graph = mobilenet()
    _, w, b = pairs(graph)[0].first.inputs
    dead = graph.array(w).copy()
    dead[3] = 0
    graph = replace(graph, constants={**graph.constants, w: dead})
    same = equalize(graph)
    assert not same.array(w)[3].any()
    assert all(np.isfinite(same.array(name)).all() for name in same.constants)
    # it is scaled as the others are on the whole, so that its bias does not stand out
    scaled = np.abs(graph.array(w)).reshape(len(dead), -1).max(1)[:3]
    scaled = np.log(scaled / np.abs(same.array(w)).reshape(len(dead), -1).max(1)[:3])
    factor = np.log(graph.array(b)[3] / same.array(b)[3])
    assert abs(factor) <= np.abs(scaled).max() + 1


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e-8, 1e-5, 1e-3])
def test_the_bias_of_a_channel_of_small_weights_is_not_made_the_largest(size: float) -> None:
    graph = mobilenet()
    _, w, b = pairs(graph)[0].first.inputs
    weights, bias = graph.array(w).copy(), graph.array(b).copy()
    weights[3] *= np.float32(size)
    bias[3] = 0.3
    graph = replace(graph, constants={**graph.constants, w: weights, b: bias})
    feeds, _ = pictures(32, 2)
    given = samples_of(graph, feeds)
    right = outputs(graph, list(feeds))

    def error(on: bool) -> float:
        recipe = static_recipe(weight_scheme(8, "channel", None, "rtn"), equalize=on)
        found = outputs(quantize_graph(graph, recipe, given).graph, list(feeds))
        return float(np.sqrt(np.mean((found - right) ** 2)))

    assert error(True) < 1.5 * error(False)
    same = equalize(graph)
    assert np.abs(same.array(b)[3]) < 10 * np.abs(graph.array(b)).max()


@pytest.mark.parametrize("change", ["output", "shared", "second consumer"])
def test_no_pair_where_others_look_on(change: str) -> None:
    graph = mobilenet()
    first = pairs(graph)[0].first
    if change == "output":
        graph = replace(graph, outputs=(*graph.outputs, first.output))
    elif change == "shared":
        twin = replace(first, name="twin", outputs=("twin_out",))
        values = {**graph.values, "twin_out": graph.values[first.output]}
        nodes = (*graph.nodes, twin)
        graph = replace(graph, nodes=nodes, values=values, outputs=(*graph.outputs, "twin_out"))
    else:
        inner = graph.only_consumer(first.output)
        assert inner is not None
        other = replace(inner, name="other", outputs=("other_out",), inputs=(inner.output,))
        values = {**graph.values, "other_out": graph.values[inner.output]}
        nodes = (*graph.nodes, other)
        graph = replace(graph, nodes=nodes, values=values, outputs=(*graph.outputs, "other_out"))
    assert first.name not in {p.first.name for p in pairs(graph)}


def test_a_bound_that_is_never_met_becomes_a_relu() -> None:
    m = Made(1, x=Info((1, 3, 6, 6)))
    small = activated(m, "Clip", m.conv("x", 4))
    large = m.constant((m.rng.standard_normal((4, 4, 1, 1)) * 50).astype(np.float32))
    attrs = {"kernel_shape": [1, 1], "pads": [0] * 4, "strides": [1, 1], "dilations": [1, 1]}
    x = m.node("Conv", [small, large], (1, 4, 6, 6), group=1, **attrs)
    graph = m.graph(activated(m, "Clip", x))
    seen = samples(graph, 8)
    same = replace_unmet_clips(graph, seen, session_of=Session)
    assert [n.op for n in same.nodes] == ["Conv", "Relu", "Conv", "Clip"]
    np.testing.assert_array_equal(outputs(same, list(seen)), outputs(graph, list(seen)))
    assert replace_unmet_clips(mobilenet(), seen, session_of=Session).nodes == mobilenet().nodes
    with pytest.raises(UsageError, match="there are no calibration samples"):
        replace_unmet_clips(graph, [], session_of=Session)


# --- depthwise nets do not collapse ---------------------------------------------------------------


@pytest.fixture(scope="module")
def net() -> tuple[Graph, Samples, list[dict[str, NDArray[Any]]], NDArray[np.int64]]:
    graph = badly_scaled(trained(mobilenet()), 3)
    feeds, _ = pictures(64, 2)
    test, labels = pictures(400, 3)
    top = outputs(graph, test).argmax(1)
    assert (top == labels).mean() > 0.9  # it is a classifier that is quantized
    return graph, samples_of(graph, feeds), test, top


@pytest.mark.parametrize(("granularity", "worst"), [("tensor", 0.5), ("channel", 0.5)])
def test_a_badly_scaled_depthwise_net_keeps_its_classes(
    net: Any, granularity: Any, worst: float
) -> None:
    graph, calibration, test, top = net

    def agreement(on: bool) -> float:
        recipe = static_recipe(weight_scheme(8, granularity, None, "rtn"), equalize=on)
        made = quantize_graph(graph, recipe, calibration).graph
        return float((outputs(made, test).argmax(1) == top).mean())

    assert agreement(False) < worst
    assert agreement(True) >= 0.98


@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e-3])
def test_dead_channels_lose_no_more_than_in_onnxruntimes_own_quantizer(
    size: float, tmp_path: Path
) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")
    m = Made(0, x=Info((1, 3, 16, 16)))
    x = m.same("Relu", m.conv("x", 16))
    w, b = m.nodes[0].inputs[1:]
    m.constants[w][3:6] *= np.float32(size)
    m.constants[b][3:6] = 0.3
    x = m.same("Relu", m.conv(x, 16, group=16))
    x = m.node("GlobalAveragePool", [m.conv(x, 10, k=1)], (1, 10, 1, 1))
    graph = m.graph(m.node("Flatten", [x], (1, 10), axis=1))
    feeds = list(samples(graph, 48, seed=2))
    right = outputs(graph, feeds[32:])

    def decibels(found: NDArray[Any]) -> float:
        return float(10 * np.log10(np.square(right).mean() / np.square(found - right).mean()))

    recipe = Recipe.named("w8a8-static", "graph")
    ours = quantize_graph(graph, recipe, samples_of(graph, feeds[:32])).graph
    write_onnx(graph, tmp_path / "float.onnx")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        left = iter(feeds[:32])

        def get_next(self) -> Any:
            return next(self.left, None)

    quantization.quantize_static(
        tmp_path / "float.onnx", tmp_path / "theirs.onnx", Reader(), per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(
        tmp_path / "theirs.onnx", providers=["CPUExecutionProvider"]
    )
    theirs = np.concatenate([session.run(None, feed)[0] for feed in feeds[32:]])
    assert decibels(outputs(ours, feeds[32:])) > decibels(theirs) - 1
    assert decibels(outputs(ours, feeds[32:])) > 35


@pytest.mark.parametrize(("size", "on"), [(1000.0, True), (8.0, False)])
def test_a_channel_far_larger_than_the_others_is_brought_to_their_size_unasked(
    size: float, on: bool
) -> None:
    m = Made(0, x=Info((1, 3, 8, 8)))
    x = m.same("Relu", m.conv("x", 8))
    y = m.conv(x, 4, k=1)
    first, second = (node.inputs[1] for node in m.nodes if node.op == "Conv")
    m.constants[first][2] *= np.float32(size)
    m.constants[second][:, 2] /= np.float32(size)
    graph = m.graph(y)
    assert uneven(graph) == on
    made = quantize_graph(graph, Recipe.named("w8a8-static", "graph"), samples(graph, 32))
    assert made.agreement is not None
    assert made.agreement.cosine > 0.995
