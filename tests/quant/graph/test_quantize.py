"""From a float graph to a quantized one: what is packed, what it computes, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from edgeq.core.errors import SchemeError, UsageError
from edgeq.graph.execute import Session
from edgeq.graph.ir import Graph, Info, QuantWeight
from edgeq.graph.onnx.read import read_onnx
from edgeq.graph.onnx.save import write_onnx
from edgeq.quant.graph.choices import choices, own_constants
from edgeq.quant.graph.quantize import check_packed, quantize_graph
from edgeq.quant.graph.samples import samples_of
from edgeq.quant.graph.smooth import smooth
from edgeq.quant.graph.summary import GraphSummary, computes_in_integers
from edgeq.quant.graph.weights import weight_name
from edgeq.quant.presets import presets_for
from edgeq.quant.recipe import Recipe
from tests.graph_made import Made, cnn, encoder, samples

pytest.importorskip("onnxruntime")


def quantized(graph: Graph, preset: str, *rules: str, n: int = 16) -> GraphSummary:
    return quantize_graph(
        graph, Recipe.from_options(preset, tensor_types=rules, source="graph"), samples(graph, n)
    )


@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_smoothing_is_as_strong_as_the_inputs_and_weights_ask_for(spread: float) -> None:
    m = Made(3, x=Info((6, 64)))
    made = m.same("Gelu", "x")
    graph = m.graph(m.linear(made, 24))
    sizes = np.exp(spread * m.rng.standard_normal(64)).astype(np.float32)
    rng = np.random.default_rng(0)
    draws = rng.standard_normal((40, 6, 64)).astype(np.float32) * sizes
    given = samples_of(graph, [{"x": x} for x in draws[:24]])

    def error(strengths: tuple[float, ...]) -> float:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("edgeq.quant.graph.smooth.STRENGTHS", strengths)
            recipe = Recipe.named("w8a8-static", "graph")
            assert recipe.graph is not None
            recipe = replace(recipe, graph=replace(recipe.graph, scope="layers"))
            got = Session(quantize_graph(graph, recipe, given).graph)
            right = Session(graph)
            pairs = [(got({"x": x}), right({"x": x})) for x in draws[24:]]
        (name,) = graph.outputs
        return float(np.mean([np.square(a[name] - b[name]).mean() for a, b in pairs]))

    errors = [error((strength,)) for strength in (0.0, 0.25, 0.5)]
    chosen = error((0.0, 0.25, 0.5))
    assert chosen < 1.1 * errors[-1]
    if spread:
        assert chosen < 1.25 * min(errors)
        assert max(errors) > 1.5 * min(errors)


def test_smoothing_changes_nothing_but_rounding() -> None:
    graph = encoder()
    smoothed = smooth(graph, samples(graph), session_of=Session)
    assert sqnr(graph, smoothed) > 100
    norms = [node for node in graph.nodes if node.op == "LayerNormalization"]
    alone = replace(graph, outputs=(norms[0].output,))
    assert smooth(alone, samples(graph), session_of=Session).values.keys() > graph.values.keys()
    with pytest.raises(UsageError, match="there are no calibration samples"):
        smooth(graph, [], session_of=Session)


def sqnr(graph: Graph, other: Graph) -> float:
    power = error = 0.0
    runs = Session(graph), Session(other, optimize=False)
    for feeds in samples(graph, 8, seed=9):
        want, got = (run(feeds)[graph.outputs[0]].astype(np.float64) for run in runs)
        power, error = power + float((want**2).sum()), error + float(((want - got) ** 2).sum())
    return 10 * float(np.log10(power / error))


ENCODED = ("w8a8-static", "w8-dynamic", "w4-g32-gptq", "fp16")
"""Presets that are tried on an encoder as well."""


@pytest.mark.parametrize(
    ("preset", "graph"),
    [*((name, cnn()) for name in presets_for("graph")), *((name, encoder()) for name in ENCODED)],
)
def test_every_preset_makes_a_graph_that_runs_near_the_float_one(preset: str, graph: Graph) -> None:
    found = quantized(graph, preset)
    least = 6 if preset.startswith(("w4", "palette")) else 20
    assert sqnr(graph, found.graph) > least
    assert found.packed_bytes < found.float_bytes
    recipe = Recipe.from_dict(json.loads(found.graph.meta["edgeq.recipe"]))
    assert recipe == Recipe.named(preset, "graph")
    mode = recipe.activations.mode if recipe.activations else "float"
    assert found.graph.meta["edgeq.activations"] == mode
    assert bool(found.graph.quants) == (mode == "static")


def test_a_static_graph_is_integer_throughout() -> None:
    found = quantized(cnn(), "w8a8-static")
    graph = found.graph
    by_name = {row.node: row for row in found.rows}
    floats = [row.node for row in found.rows if row.activations == "float"]
    assert floats == ["linear10", "softmax11"]
    assert by_name["conv0"].weight == "int8 channel"
    assert by_name["conv0"].sqnr_db is None or by_name["conv0"].sqnr_db > 25
    for node in graph.nodes:
        if node.op not in ("Conv", "Linear"):
            continue
        w, b = (graph.constants[name] for name in node.inputs[1:3])
        assert isinstance(w, QuantWeight)
        if node.name == "linear10":
            assert node.inputs[0] in graph.quants
            assert not isinstance(b, QuantWeight)
            continue
        assert isinstance(b, QuantWeight)
        x = np.float32(graph.quants[node.inputs[0]].scale)
        assert b.bits == 32
        assert np.array_equal(b.scales, x * w.scales)
    assert found.agreement is not None
    assert found.agreement.cosine > 0.99
    assert found.agreement.top1 is not None
    assert found.arena < found.float_arena / 3


def test_rows_and_definition_agree_in_an_encoder() -> None:
    found = quantized(encoder(), "w8a8-static")
    inner = [node for node in found.graph.nodes if node.op == "Linear"]
    assert all(node.inputs[0] in found.graph.quants for node in inner)
    moved = {n.op for n in found.graph.nodes if computes_in_integers(found.graph, n)}
    assert moved == {"Reshape", "Transpose"}
    smooth = [node for node in found.graph.nodes if node.name.endswith(".smooth")]
    assert [node.op for node in smooth] == ["Mul"] * 3
    table = next(row for row in found.rows if row.op == "Gather")
    assert (table.weight, table.activations) == ("int8 channel", "float")


def test_what_is_written_is_what_was_made(tmp_path: object) -> None:
    found = quantized(cnn(), "w4a8-static")
    write_onnx(found.graph, tmp_path / "q.onnx")  # type: ignore[operator]
    again = read_onnx(tmp_path / "q.onnx")  # type: ignore[operator]
    assert again.quants == found.graph.quants
    assert again.meta["edgeq.recipe"] == found.graph.meta["edgeq.recipe"]
    for name, held in found.graph.constants.items():
        if isinstance(held, QuantWeight):
            other = again.constants[name]
            assert isinstance(other, QuantWeight)
            assert np.array_equal(other.levels, held.levels)
            assert np.array_equal(other.scales, held.scales)


def test_weights_alone_leave_all_values_float() -> None:
    found = quantized(cnn(), "w4-channel")
    bits = [held.bits for held in found.graph.constants.values() if isinstance(held, QuantWeight)]
    assert sorted(bits) == [4, 8, 8, 8]  # first, last and depthwise layers keep 8
    assert not found.graph.quants


def test_rules_keep_nodes_float_and_store_them_in_half() -> None:
    found = quantized(cnn(), "w8a8-static", "^conv4$=fp16", "^add5$=f32")
    graph = found.graph
    conv = next(node for node in graph.nodes if node.name == "conv4")
    held = graph.constants[weight_name(conv)]
    assert isinstance(held, np.ndarray)
    assert held.dtype == np.float16
    assert conv.output not in graph.quants
    assert {r.node for r in found.rows if r.activations == "float"} == {
        "conv4", "add5", "relu6", "maxpool7", "globalaveragepool8", "flatten9", "linear10",
        "softmax11",
    } - {r.node for r in found.rows if r.activations == "int8"}  # fmt: skip


def test_mixed_keeps_what_loses_most() -> None:
    graph = cnn(3)
    plain, mixed = (quantized(graph, preset, n=32) for preset in ("w4a8-gptq", "w4a8-mixed"))
    assert mixed.kept == ("conv4",)
    assert mixed.agreement is not None
    assert plain.agreement is not None
    assert (mixed.agreement.sqnr_db or 0) > (plain.agreement.sqnr_db or 0)


def test_integers_for_constants_that_are_added() -> None:
    m = Made(x=Info((1, 3, 8, 8)))
    scaled = m.same("Mul", m.conv("x", 4), m.constant(np.float32(0.3), "factor"))
    graph = m.graph(m.conv(scaled, 4))
    found = quantized(graph, "w8a8-static").graph
    mul = next(node for node in found.nodes if node.op == "Mul")
    assert computes_in_integers(found, mul)
    held = found.constants[mul.inputs[1]]
    assert isinstance(held, QuantWeight)
    assert np.isclose(held.numpy(), 0.3, rtol=1e-6)
    assert "factor" not in found.constants


def shared() -> Graph:
    """Two convolutions, one after the other, with the same weight and bias."""
    m = Made(x=Info((1, 3, 8, 8)))
    a = m.conv("x", 3)
    m.conv(a, 3)
    graph = m.graph("conv1_out")
    first, second = graph.nodes
    return replace(graph, nodes=(first, replace(second, inputs=(a, *first.inputs[1:]))))


def test_shared_constants_are_parted_where_they_are_rounded_apart() -> None:
    graph = shared()
    static = own_constants(
        graph, Recipe.from_dict({"weights": "w8-channel", "activations": "static"})
    )
    weights, biases = ({n.inputs[i] for n in static.nodes} for i in (1, 2))
    assert (len(weights), len(biases)) == (1, 2)
    gptq = own_constants(graph, Recipe.from_dict({"weights": "w4-channel-gptq"}))
    assert len({n.inputs[1] for n in gptq.nodes}) == 2
    assert sqnr(graph, quantized(graph, "w8a8-static").graph) > 25


def test_a_constant_that_is_weight_and_value_stays_as_it_is_for_the_other() -> None:
    m = Made(x=Info((1, 4, 4)))
    out = m.linear("x", 4)
    weight = m.nodes[0].inputs[1]
    both = m.node("Add", [out, weight], (1, 4, 4))
    graph = m.graph(both)
    found = quantized(graph, "w4-channel").graph
    add = found.nodes[1]
    assert np.array_equal(found.array(add.inputs[1]), graph.array(weight))


def test_what_cannot_be_is_refused() -> None:
    graph = cnn()
    done = quantized(graph, "w8a8-static").graph
    with pytest.raises(UsageError, match="quantized already"):
        quantized(done, "w8a8-static")
    with pytest.raises(UsageError, match="needs calibration samples"):
        quantize_graph(graph, Recipe.named("w8a8-static", "graph"))
    with pytest.raises(UsageError, match="has 3 samples; give at least 8"):
        quantized(graph, "w8a8-static", n=3)
    with pytest.raises(UsageError, match="contains no samples"):
        quantize_graph(graph, Recipe.named("w8a8-static", "graph"), samples_of(graph, []))
    with pytest.raises(SchemeError, match="matches no node"):
        quantized(graph, "w8-channel", "nowhere=f32")
    m = Made(x=Info((1, 4)))
    with pytest.raises(SchemeError, match="no weights to quantize"):
        quantized(m.graph(m.same("Relu", "x")), "w8-channel")


def test_fewer_weights_than_asked_for_is_an_error() -> None:
    graph = cnn()
    recipe = Recipe.named("w8-channel", "graph")
    picked = choices(graph, recipe)
    made = quantized(graph, "w8-channel").graph
    check_packed(made, picked)
    name = weight_name(graph.nodes[0])
    lost = replace(made, constants={**made.constants, name: graph.constants[name]})
    with pytest.raises(SchemeError, match=r"1 weights are not packed .*conv0"):
        check_packed(lost, picked)


def test_without_samples_nothing_is_claimed() -> None:
    found = quantize_graph(cnn(), Recipe.named("w8-dynamic", "graph"))
    assert found.agreement is None
    assert all(row.sqnr_db is None for row in found.rows)
    told = found.to_dict()
    assert json.loads(json.dumps(told)) == told
