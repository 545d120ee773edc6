"""What runtimes compute otherwise than their operators' names say, lowered so that it is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.converters import open_graph
from edgeq.converters.convert import convert
from edgeq.converters.ort.graph_run import read_weights
from edgeq.graph.execute import Session
from edgeq.graph.ir import Graph, Info, QuantWeight
from edgeq.quant.graph.quantize import quantize_graph
from edgeq.quant.recipe import Recipe
from tests.graph_made import Made, cnn, encoder, samples

pytest.importorskip("onnxruntime")
SUFFIX = {"tflite": ".tflite", "ort": ".ort", "coreml": ".mlpackage"}
PACKAGE = {"tflite": "ai_edge_litert", "ort": "onnxruntime", "coreml": "coremltools"}


def stack(activation: str, slope: float, layers: int = 6) -> Graph:
    m = Made(0, x=Info((1, 3, 12, 12)))
    x = "x"
    for i in range(layers):
        x = m.conv(x, 12)
        if activation == "PRelu":
            slopes = np.full((12, 1, 1), slope, np.float32) * np.linspace(0.5, 1, 12)[:, None, None]
            x = m.same("PRelu", x, m.constant(slopes.astype(np.float32), f"slopes{i}"))
        else:
            x = m.same("LeakyRelu", x, alpha=slope)
    x = m.node("GlobalAveragePool", [x], (1, 12, 1, 1))
    return m.graph(m.node("Flatten", [x], (1, 12), axis=1))


@pytest.mark.parametrize(
    ("activation", "slope"),
    [("LeakyRelu", 0.1), ("LeakyRelu", 0.01), ("PRelu", 0.25), ("LeakyRelu", 1.5),
     ("LeakyRelu", -0.5), ("PRelu", -0.3), ("PRelu", 2.0)],
)  # fmt: skip
def test_leaky_activations_are_the_records_level_for_level(
    activation: str, slope: float, tmp_path: Path
) -> None:
    pytest.importorskip("ai_edge_litert")
    graph = stack(activation, slope)
    made = quantize_graph(graph, Recipe.named("w8a8-static", "graph"), samples(graph, 16)).graph
    convert(made, "tflite", tmp_path / "m.tflite")
    right, runner = Session(made), open_graph(tmp_path / "m.tflite")
    (name,) = graph.outputs
    differ = total = 0
    for feed in samples(graph, 8, seed=3):
        a, b = right(feed)[name], runner(feed)[name]
        step = made.quants[name].scale if name in made.quants else np.abs(a).max() / 255
        steps = np.rint(np.abs(a - b) / step)
        assert steps.max() <= 1
        differ, total = differ + int((steps > 0).sum()), total + steps.size
    runner.close()
    assert differ <= 0.03 * total


@pytest.mark.parametrize("target", list(SUFFIX))
def test_one_scale_for_each_weight_is_converted_and_read_back(target: str, tmp_path: Path) -> None:
    pytest.importorskip(PACKAGE[target])
    for net in (cnn(), encoder()):
        made = quantize_graph(net, Recipe.named("w8a8-tensor", "graph"), samples(net)).graph
        done = convert(made, target, tmp_path / f"m{SUFFIX[target]}", force=True)
        assert done.certificate is not None
        equal, of = done.certificate["weights_equal"].split(" of ")
        assert equal == of != "0"


@pytest.mark.parametrize("preset", ["w8-channel", "w4-channel", "w4-g32", "palette4", "fp16"])
@pytest.mark.parametrize("net", [cnn, encoder])
def test_weights_only_means_float_activations_in_litert(
    net: Any, preset: str, tmp_path: Path
) -> None:
    """Outliers in the inputs: one range for all of them would leave the others few levels."""
    pytest.importorskip("ai_edge_litert")
    graph = net()
    made = quantize_graph(graph, Recipe.named(preset, "graph")).graph
    convert(made, "tflite", tmp_path / "m.tflite")
    runner = open_graph(tmp_path / "m.tflite")
    assert getattr(runner, "precision", "") == "float32"
    right = Session(made, optimize=False)
    for feed in samples(graph, 4, seed=3):
        if "x" in feed:
            feed["x"][0, 0, 0, 0] = 500
        for name, array in right(feed).items():
            np.testing.assert_allclose(runner(feed)[name], array, rtol=1e-3, atol=1e-4)
    runner.close()


def test_the_cost_of_rounding_at_run_time_is_reported(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    graph = cnn()
    made = quantize_graph(graph, Recipe.named("w8-dynamic", "graph")).graph
    feeds = list(samples(graph, 4))
    for feed in feeds:
        feed["x"][0, 0, 0, 0] = 60
    done = convert(made, "tflite", tmp_path / "m.tflite", samples=feeds)
    assert done.certificate is not None
    (name,) = graph.outputs
    assert done.certificate["rounding_price"][name] > 1e-3
    free = convert(made, "tflite", tmp_path / "f.tflite", {"compute": "float"}, samples=feeds)
    assert free.certificate is not None
    assert free.certificate["error"][name] < 1e-4


@pytest.mark.parametrize("activation", ["LeakyRelu", "PRelu"])
def test_all_runtimes_give_the_levels_of_a_leaky_activation(
    activation: str, tmp_path: Path
) -> None:
    for package in PACKAGE.values():
        pytest.importorskip(package)
    graph = stack(activation, 0.1, layers=8)
    made = quantize_graph(graph, Recipe.named("w8a8-static", "graph"), samples(graph, 16)).graph
    (name,) = graph.outputs
    feeds = list(samples(graph, 8, seed=3))
    right = np.stack([Session(made)(feed)[name] for feed in feeds])
    lost = np.stack([Session(graph)(feed)[name] for feed in feeds]) - right
    for target, suffix in SUFFIX.items():
        path = tmp_path / f"{target}{suffix}"
        convert(made, target, path)
        runner = open_graph(path)
        got = np.stack([runner(feed)[name] for feed in feeds])
        runner.close()
        # far below what rounding costs, where another rule of the activation cost as much
        assert np.square(got - right).mean() < 0.05 * np.square(lost).mean(), target


@pytest.mark.parametrize("op", ["Mul", "Add", "PRelu"])
@pytest.mark.parametrize("size", [(12, 1, 1), (1, 12, 1, 1), (12, 12, 10)])
def test_constants_beside_images_are_read_back_from_an_ort_file(
    op: str, size: tuple[int, ...], tmp_path: Path
) -> None:
    m = Made(0, x=Info((1, 3, 12, 10)))
    constant = m.rng.uniform(0.5, 1, size).astype(np.float32)
    x = m.same(op, m.conv("x", 12), m.constant(constant, "beside"))
    graph = m.graph(m.conv(x, 4))
    made = quantize_graph(graph, Recipe.named("w8a8-static", "graph"), samples(graph, 16)).graph
    convert(made, "ort", tmp_path / "m.ort")
    found = dict(read_weights(tmp_path / "m.ort"))
    kept = {name: c for name, c in made.constants.items() if name.startswith("beside.")}
    for name, weight in kept.items():
        assert isinstance(weight, QuantWeight)
        np.testing.assert_array_equal(found[name].levels, weight.levels)
