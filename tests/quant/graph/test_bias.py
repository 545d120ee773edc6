"""Bias correction: every channel gets the mean it has in the float graph."""

from __future__ import annotations

import gzip
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.core.errors import UsageError
from edgeq.formats.schemes import QuantScheme
from edgeq.graph.execute import Session
from edgeq.graph.files import read
from edgeq.graph.ir import Graph, Info, QuantWeight
from edgeq.quant.graph.bias import correct_biases
from edgeq.quant.graph.hessians import weight_name
from edgeq.quant.graph.quantize import quantize_graph
from edgeq.quant.graph.samples import Samples, samples_of
from edgeq.quant.graph.weights import round_weight, weight_nodes
from tests.conftest import need
from tests.graph_made import Made, cnn, encoder, samples, static_recipe, weight_scheme

pytest.importorskip("onnxruntime")

ROUGH = weight_scheme(4, "tensor", None, "rtn")


def weights_only(graph: Graph, scheme: QuantScheme = ROUGH) -> Graph:
    constants = dict(graph.constants)
    for node in weight_nodes(graph):
        if node.op != "Gather":
            name = weight_name(node)
            constants[name] = round_weight(graph.array(name), node, scheme)
    return replace(graph, constants=constants)


def static(graph: Graph, seen: Samples, scheme: QuantScheme = ROUGH) -> Graph:
    recipe = static_recipe(scheme, equalize=False)
    return quantize_graph(graph, recipe, seen).graph


def mean_errors(graph: Graph, other: Graph, seen: Samples) -> dict[str, NDArray[np.float64]]:
    """Layer -> mean error of its channels, in parts of the output's standard deviation."""
    names = [n.output for n in weight_nodes(graph) if n.op != "Gather"]
    one, two = Session(graph, names), Session(other, names)
    got: dict[str, list[Any]] = {name: [] for name in names}
    spread: dict[str, list[Any]] = {name: [] for name in names}
    for feeds in seen:
        a, b = one(feeds), two(feeds)
        for name in names:
            axes = tuple(i for i in range(a[name].ndim) if i != (1 if a[name].ndim == 4 else
                                                                 a[name].ndim - 1))  # fmt: skip
            got[name].append((b[name] - a[name]).mean(axis=axes, dtype=np.float64))
            spread[name].append(a[name])
    return {n: np.abs(np.mean(got[n], axis=0)) / np.std(spread[n]) for n in names}


def deep(width: int = 8, layers: int = 5) -> Graph:
    """A chain without residuals, in which shifts pile up, that ends in two heads side by side."""
    m = Made(4, x=Info((1, 3, 6, 6)))
    x = "x"
    for _ in range(layers):
        x = m.same("Relu", m.conv(x, width))
    x = m.node("Flatten", [m.node("GlobalAveragePool", [x], (1, width, 1, 1))], (1, width), axis=1)
    return m.graph(m.linear(x, 4), m.linear(x, 3))


@pytest.mark.parametrize("make", [cnn, deep, encoder])
def test_means_come_back_where_only_weights_are_rounded(make: Any) -> None:
    graph = make()
    seen = samples(graph, 24)
    rough = weights_only(graph)
    better = correct_biases(graph, rough, seen, session_of=Session)
    before, after = mean_errors(graph, rough, seen), mean_errors(graph, better, seen)
    assert max(e.max() for e in before.values()) > 0.05
    for name, errors in after.items():
        assert errors.max() < 2e-4, name
    # a float bias stays one, and weights are untouched
    for node in weight_nodes(graph):
        if node.op != "Gather":
            assert better.constants[weight_name(node)] is rough.constants[weight_name(node)]
            assert isinstance(better.constants[node.inputs[2]], np.ndarray)


def test_integer_biases_stay_integers_of_the_same_scale() -> None:
    graph = deep()
    seen = samples(graph, 32)
    rough = static(graph, seen)
    better = correct_biases(graph, rough, seen, session_of=Session)
    before, after = mean_errors(graph, rough, seen), mean_errors(graph, better, seen)
    for node in rough.nodes:
        if node.op == "Linear":  # a head, whose output is not rounded
            assert isinstance(better.constants[node.inputs[2]], np.ndarray)
        if node.op == "Conv":
            was, now = (g.constants[node.inputs[2]] for g in (rough, better))
            assert isinstance(was, QuantWeight)
            assert isinstance(now, QuantWeight)
            assert now.bits == 32
            np.testing.assert_array_equal(was.scales, now.scales)
            assert now.levels.dtype == np.int32
    assert any((better.constants[n.inputs[2]].levels != rough.constants[n.inputs[2]].levels).any()
               for n in rough.nodes if n.op == "Conv")  # type: ignore[union-attr]  # fmt: skip
    for name, errors in after.items():
        # outputs that are rounded come as near as a part of their step
        assert errors.max() < max(0.3 * before[name].max(), 0.01), name


def test_a_layer_without_a_bias_gets_one() -> None:
    graph = deep()
    bare = tuple(
        replace(n, inputs=n.inputs[:2]) if n.op in ("Conv", "Linear") else n for n in graph.nodes
    )
    graph = replace(graph, nodes=bare)
    seen = samples(graph, 16)
    for rough in (weights_only(graph), static(graph, seen)):
        better = correct_biases(graph, rough, seen, session_of=Session)
        for old, new in zip(rough.nodes, better.nodes, strict=True):
            assert old.name == new.name
            if new.op in ("Conv", "Linear"):
                held = better.constants[new.inputs[2]]
                assert isinstance(held, QuantWeight) == bool(rough.quants)
        out = max(e.max() for e in mean_errors(graph, better, seen).values())
        assert out < 0.5 * max(e.max() for e in mean_errors(graph, rough, seen).values())


def test_a_bias_that_two_layers_share_is_parted() -> None:
    graph = deep()
    first, second = (n for n in graph.nodes if n.op == "Conv" and n.name in ("conv2", "conv4"))
    shared = replace(second, inputs=(*second.inputs[:2], first.inputs[2]))
    graph = replace(graph, nodes=tuple(shared if n is second else n for n in graph.nodes))
    seen = samples(graph, 16)
    better = correct_biases(graph, weights_only(graph), seen, session_of=Session)
    names = [n.inputs[2] for n in better.nodes if n.name in ("conv2", "conv4")]
    assert len(set(names)) == 2
    for errors in mean_errors(graph, better, seen).values():
        assert errors.max() < 2e-4


def test_each_part_of_the_graph_is_opened_once() -> None:
    """One session for the float graph and one for each depth: five convolutions, then two heads.

    A part behind the first holds the corrected layers before it and its own, and no more.
    """
    graph = deep()
    made: list[tuple[int, int]] = []
    told: list[tuple[str, int, int]] = []

    def session_of(part: Graph, watch: Any) -> Session:
        made.append((len(part.nodes), len(watch)))
        return Session(part, watch)

    correct_biases(
        graph, weights_only(graph), samples(graph, 4),
        session_of=session_of, progress=lambda *at: told.append(at),
    )  # fmt: skip
    assert made[0][1] == 7
    assert [nodes for nodes, _ in made[1:]] == [1, 3, 3, 3, 3, 6]
    assert told == [("correcting biases", i, 6) for i in range(6)]


@pytest.mark.parametrize("make", [cnn, deep, encoder])
def test_values_that_do_not_fit_into_memory_are_computed_again(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = make()
    seen = samples(graph, 6)
    rough = weights_only(graph)
    kept = correct_biases(graph, rough, seen, session_of=Session)
    for limit in (0, 6 * 1200):
        monkeypatch.setattr("edgeq.quant.graph.bias.KEPT_BYTES", limit)
        again = correct_biases(graph, rough, seen, session_of=Session)
        assert [node.inputs for node in again.nodes] == [node.inputs for node in kept.nodes]
        for node in weight_nodes(graph):
            if node.op != "Gather":
                np.testing.assert_allclose(
                    again.array(node.inputs[2]), kept.array(node.inputs[2]), rtol=1e-4, atol=1e-5
                )


def test_nothing_to_correct_and_nothing_to_correct_by() -> None:
    graph = deep()
    assert correct_biases(graph, graph, samples(graph, 1), session_of=Session) is graph
    with pytest.raises(UsageError, match="no calibration samples"):
        correct_biases(graph, weights_only(graph), [], session_of=Session)


def test_a_real_net_in_four_bits_stays_within_two_points() -> None:
    """All layers of an MNIST classifier by GPTQ, 8-bit activations, biases corrected."""
    images = gzip.decompress(need("data/mnist/t10k-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress(need("data/mnist/t10k-labels-idx1-ubyte.gz").read_bytes())
    graph = read(need("data/mnist/mnist_cntk_opset8.onnx"))
    x = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 1, 28, 28).astype(np.float32)
    y = np.frombuffer(labels, np.uint8, offset=8)[:1000]
    seen = samples_of(graph, [{graph.inputs[0]: one} for one in x[-48:]])

    def right(made: Graph) -> int:
        run = Session(made)
        logits = np.concatenate([run({made.inputs[0]: one})[made.outputs[0]] for one in x[:1000]])
        return int((logits.argmax(1) == y).sum())

    recipe = static_recipe(
        weight_scheme(4, "channel", None, "gptq"),
        bias_correction=True,
    )
    made = quantize_graph(graph, recipe, seen).graph
    assert all(c.bits in (4, 32) for c in made.constants.values() if isinstance(c, QuantWeight))
    assert right(made) >= right(graph) - 20 >= 950
