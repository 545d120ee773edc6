"""Samples that cannot calibrate are told, and agreement on them does not reassure."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.graph.execute import Session
from edgeq.graph.ir import Graph, Info
from edgeq.quant.graph.quantize import quantize_graph
from edgeq.quant.graph.sample_warnings import sample_warnings
from edgeq.quant.graph.samples import samples_of
from edgeq.quant.recipe import Recipe
from tests.graph_made import Made, cnn
from tests.quant.graph.test_equalize import mobilenet, outputs, pictures, trained

pytest.importorskip("onnxruntime")

STATIC = Recipe.named("w8a8-static", "graph")


def warnings(graph: Graph, rows: NDArray[np.float32]) -> str:
    feeds = [{"x": row[None]} for row in rows.astype(np.float32)]
    return " | ".join(quantize_graph(graph, STATIC, samples_of(graph, feeds)).warnings)


def test_samples_that_are_all_the_same_give_a_warning() -> None:
    rng = np.random.default_rng(0)
    one = rng.standard_normal((1, 3, 8, 8))
    assert "all 16 samples of the samples given are identical" in warnings(
        cnn(), np.repeat(one, 16, 0)
    )
    three = np.repeat(rng.standard_normal((3, 3, 8, 8)), 8, 0)
    assert "only 3 of 24 samples" in warnings(cnn(), three)
    zeros = warnings(cnn(), np.zeros((16, 3, 8, 8)))
    assert "a single number for the input 'x' (0 in the first sample)" in zeros
    assert "nearly the same outputs for all samples" in zeros
    told = warnings(cnn(), rng.standard_normal((32, 3, 8, 8)))
    assert "identical" not in told
    assert "a single number" not in told


@pytest.fixture(scope="module")
def classifier() -> Graph:
    """Trained on inputs of unit variance, a bias in its first layer."""
    return trained(mobilenet())


@pytest.mark.parametrize(("factor", "says"), [(255.0, "--scale 1/255"), (1 / 255, "--scale 1 ")])
def test_inputs_on_another_scale_than_in_training_give_a_warning(
    classifier: Graph, factor: float, says: str
) -> None:
    first = classifier.nodes[0]
    bias = np.random.default_rng(1).standard_normal(classifier.info(first.inputs[2]).shape)
    constants = {**classifier.constants, first.inputs[2]: bias.astype(np.float32)}
    graph = replace(classifier, constants=constants)
    feeds, _ = pictures(16, 2)
    made = samples_of(graph, [{"x": f["x"] * np.float32(factor)} for f in feeds])
    right = outputs(graph, list(feeds)).argmax(1)
    moved = outputs(graph, list(made)).argmax(1)
    assert (right == moved).mean() < 0.8  # another scale does matter to this network
    assert says in " ".join(sample_warnings(graph, made, Session))
    assert not sample_warnings(graph, samples_of(graph, list(feeds)), Session)


def test_labels_show_that_samples_are_not_prepared_as_in_training(classifier: Graph) -> None:
    feeds, labels = pictures(48, 2)
    right = samples_of(classifier, list(feeds), list(labels))
    assert not sample_warnings(classifier, right, Session)
    turned = [{"x": np.ascontiguousarray(-f["x"][:, ::-1, ::-1])} for f in feeds]
    shuffled = samples_of(classifier, turned, list((labels + 5) % 10))
    assert "labels" in " ".join(sample_warnings(classifier, shuffled, Session))


def test_outputs_that_are_not_finite_are_reported_and_left_out_of_the_figures() -> None:
    m = Made(0, x=Info((1, 8)))
    h = m.linear("x", 6)
    graph = m.graph(m.same("Log", h), h)
    rows = np.random.default_rng(0).standard_normal((16, 1, 8)).astype(np.float32)
    summary = quantize_graph(graph, STATIC, samples_of(graph, [{"x": row} for row in rows]))
    agreement = summary.agreement
    assert agreement is not None
    assert 0.1 < agreement.undefined < 0.4  # half of one of two outputs
    assert 0.9 < agreement.cosine <= 1
    assert any("are NaN or infinite on the samples" in text for text in summary.warnings)
    assert all(row.sqnr_db is None or np.isfinite(row.sqnr_db) for row in summary.rows)
