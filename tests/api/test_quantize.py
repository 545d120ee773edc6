"""One `quantize` for language models and graphs: what it writes, returns and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import edgeq
from edgeq.graph.files import read
from edgeq.graph.onnx.save import write_onnx
from edgeq.quant.decoder.quantize import Summary
from edgeq.quant.graph.summary import GraphSummary
from tests.graph_made import cnn, samples
from tests.paths import DEMO


def test_a_path_is_a_model_or_a_graph(tmp_path: Path) -> None:
    source = tmp_path / "cnn.onnx"
    write_onnx(cnn(), source)
    summary = edgeq.quantize(source, tmp_path / "q.onnx", "w8-channel")
    assert isinstance(summary, GraphSummary)
    assert 8 < summary.bpw < 16  # vectors stay floating point
    assert summary.recipe == edgeq.Recipe.named("w8-channel", "graph")
    assert read(tmp_path / "q.onnx").meta["edgeq.activations"] == "float"
    other = edgeq.quantize(DEMO, tmp_path / "m.edgeq", "w8-channel")
    assert isinstance(other, Summary)
    assert other.recipe == edgeq.Recipe.named("w8-channel")
    assert edgeq.load(tmp_path / "m.edgeq").nbytes < edgeq.load(DEMO).nbytes
    for either in (summary, other):
        assert json.loads(json.dumps(either.to_dict()))["recipe"] == either.recipe.to_dict()


def test_data_may_be_a_path_or_an_object(tmp_path: Path) -> None:
    graph, seen = cnn(), samples(cnn(), 16)
    made = edgeq.quantize(graph, tmp_path / "q.onnx", data=seen)
    assert made.recipe == edgeq.Recipe.named("w8a8-static", "graph")
    feeds = list(seen)
    arrays = {name: np.concatenate([feed[name] for feed in feeds]) for name in graph.inputs}
    np.savez(tmp_path / "calib.npz", **arrays)
    edgeq.quantize(graph, tmp_path / "again.onnx", data=tmp_path / "calib.npz")
    assert read(tmp_path / "again.onnx").quants == read(tmp_path / "q.onnx").quants
    edgeq.quantize(graph, tmp_path / "list.onnx", data=feeds)
    assert read(tmp_path / "list.onnx").quants == read(tmp_path / "q.onnx").quants
    summary = edgeq.quantize(
        edgeq.load(DEMO), tmp_path / "m.edgeq", "w8a8-static", data=DEMO / "heldout.txt"
    )
    assert isinstance(summary, Summary)
    assert "activations" in edgeq.load(tmp_path / "m.edgeq").provenance


def test_what_does_not_suit_the_source_is_refused(tmp_path: Path) -> None:
    graph, model = cnn(), edgeq.load(DEMO)
    with pytest.raises(edgeq.UsageError, match=r"q\.edgeq, but a quantized graph is written as"):
        edgeq.quantize(graph, tmp_path / "q.edgeq", "w8-channel")
    with pytest.raises(edgeq.UsageError, match="max_ram applies only to language models"):
        edgeq.quantize(graph, tmp_path / "q.onnx", "w8-channel", max_ram=1 << 30)
    with pytest.raises(edgeq.UsageError, match="this recipe is for decoders"):
        edgeq.quantize(graph, tmp_path / "q.onnx", edgeq.Recipe.named("w8-channel"))
    with pytest.raises(edgeq.UsageError, match="this recipe is for graphs"):
        edgeq.quantize(model, tmp_path / "m.edgeq", edgeq.Recipe.named("w8-channel", "graph"))
    with pytest.raises(TypeError, match="data must be"):
        edgeq.quantize(model, tmp_path / "m.edgeq", data=3)  # type: ignore[call-overload]
    assert not list(tmp_path.iterdir())
