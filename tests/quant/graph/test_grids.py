"""Which values are rounded: integers where they pay, one grid where values only move."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgeq.formats.qparams import QuantParams
from edgeq.graph.ir import Graph, Info
from edgeq.graph.operators import SHARED_PARAMS
from edgeq.quant.graph.integer_plan import (
    IntegerPlan,
    Scope,
    activation_params,
    data_inputs,
    heads,
    plan_integers,
    rounded_constant,
    scope_of,
)
from edgeq.quant.graph.weights import weight_nodes
from tests.graph_made import Made, cnn, encoder


def planned(graph: Graph, scope: Scope = "all", floats: tuple[str, ...] = ()) -> IntegerPlan:
    packed = [node.name for node in weight_nodes(graph) if node.name not in floats]
    return plan_integers(graph, scope, packed, floats)


def test_a_classifier_is_integer_up_to_its_softmax() -> None:
    graph = cnn()
    found = planned(graph)
    assert {n.name for n in graph.nodes} - found.integer == {"linear10", "softmax11"}
    # scores on 256 levels are often equal: those of the last layer are not rounded
    assert found.open_ended == {"linear10"}
    assert "flatten9_out" in found.groups
    assert not {"linear10_out", "softmax11_out"} & set(found.groups)
    # what a Relu takes from the node it belongs to is not rounded
    assert not {"conv0_out", "conv2_out", "add5_out"} & set(found.groups)
    assert found.groups["maxpool7_out"] == found.groups["relu6_out"]
    assert found.groups["globalaveragepool8_out"] != found.groups["relu6_out"]


def test_integer_nodes_have_grids_and_same_grids_where_values_move() -> None:
    for graph in (cnn(), encoder()):
        found = planned(graph, scope_of(graph))
        quants = activation_params(found, dict.fromkeys(found.sources, (-1.0, 2.0)))
        for node in graph.nodes:
            ends = [v for v in (*data_inputs(node), *node.outputs) if v in quants]
            if node.name in found.integer and node.op in SHARED_PARAMS:
                assert len({quants[v] for v in ends}) == 1
        assert set(found.sources.values()) | set(found.fixed) == set(found.groups.values())


def test_an_encoder_rounds_what_layers_take_and_nothing_else() -> None:
    graph = encoder()
    assert scope_of(graph) == "layers"
    found = planned(graph, "layers")
    ops = {n.name: n.op for n in graph.nodes}
    # nothing takes what a Linear makes as it is: its output is float, its input is not
    assert {ops[name] for name in found.integer} == {"Reshape", "Transpose"}
    assert {ops[name] for name in found.open_ended} == {"Linear"}
    taken = {v for n in graph.nodes if n.op == "Linear" for v in data_inputs(n)}
    assert taken <= set(found.groups)
    made = {n.output for n in graph.nodes if n.op in ("Linear", "Add", "Softmax")}
    assert not made & set(found.groups)


def test_attention_is_integer_where_all_is_to_be() -> None:
    graph = encoder()
    found = planned(graph, "all")
    assert {n.name for n in graph.nodes if n.op == "MatMul"} <= found.integer
    softmax = next(n.output for n in graph.nodes if n.op == "Softmax")
    assert found.fixed[found.groups[softmax]] == QuantParams(1 / 256, -128)


def test_a_node_kept_float_leaves_its_values_to_its_neighbors() -> None:
    graph = cnn()
    found = planned(graph, floats=("conv4", "add5"))
    assert {"conv4", "add5", "relu6"}.isdisjoint(found.integer)
    assert "conv4_out" not in found.groups
    assert {"relu1_out", "relu3_out"} <= set(found.groups)  # made by integers


def test_moves_join_the_one_who_takes_their_output() -> None:
    m = Made(x=Info((1, 4, 8, 2)))
    turned = m.node("Transpose", ["x"], (1, 2, 8, 4), perm=[0, 3, 2, 1])
    graph = m.graph(m.conv(turned, 4))
    found = planned(graph)
    assert found.groups == {
        "x": "x", "transpose0_out": "x", "conv1_out": "conv1_out",
    }  # fmt: skip
    # but not where something else takes the input as it is
    graph = replace(graph, outputs=("conv1_out", "x"))
    assert "x" not in planned(graph).groups


def test_heads_are_layers_that_make_scores() -> None:
    m = Made(x=Info((1, 4, 1, 1)))
    a = m.conv("x", 4)
    b = m.conv(a, 3)
    scores = m.node("Flatten", [b], (1, 3), axis=1)
    assert heads(m.graph(scores)) == {"conv1"}
    assert planned(m.graph(scores)).open_ended == {"conv1"}
    assert heads(m.graph(m.node("Softmax", [scores], (1, 3), axis=1))) == {"conv1"}
    assert not heads(m.graph(scores, b))
    picture = Made(x=Info((1, 4, 8, 8)))
    assert not heads(picture.graph(picture.conv("x", 4)))


def gated() -> Made:
    """Conv, and its output times its own sigmoid."""
    m = Made(x=Info((1, 3, 8, 8)))
    a = m.conv("x", 4)
    m.same("Mul", a, m.same("Sigmoid", a))
    return m


def test_values_of_fixed_grids_are_joined_with_others_in_float() -> None:
    m = gated()
    joined = m.node("Concat", ["sigmoid1_out", "mul2_out"], (1, 8, 8, 8), axis=1)
    found = planned(m.graph(m.conv(joined, 4)))
    assert found.fixed[found.groups["sigmoid1_out"]] == QuantParams(1 / 256, -128)
    assert "concat3" not in found.integer
    assert found.groups["concat3_out"] == "concat3_out"
    m = gated()
    joined = m.node("Concat", ["mul2_out", "conv0_out"], (1, 8, 8, 8), axis=1)
    found = planned(m.graph(m.conv(joined, 4)))
    assert found.groups["mul2_out"] == found.groups["conv0_out"] == found.groups["concat3_out"]


def test_behind_the_last_product_only_sums_and_moves_stay_integer() -> None:
    m = gated()
    joined = m.node("Concat", ["conv0_out", "sigmoid1_out"], (1, 8, 8, 8), axis=1)
    found = planned(m.graph(joined, "mul2_out"))
    assert found.integer == {"conv0"}
    assert set(found.groups) == {"x", "conv0_out"}


@pytest.mark.parametrize(
    ("op", "constant", "joins"),
    [
        ("Add", [0.3], True),
        ("Add", [0.001, 1.0], True),
        ("Add", [0.0, -1e4], False),
        ("Mul", [0.3], True),
        ("Mul", [0.0, 0.3], True),
        ("Mul", [0.3, 0.5], True),
        ("Mul", [0.3, 300.0], False),
    ],
)
def test_constants_join_only_if_8_bits_hold_them(
    op: str, constant: list[float], joins: bool
) -> None:
    m = Made(x=Info((1, 3, 8, 8)))
    held = np.resize(np.array(constant, np.float32), (4, 1, 1))
    changed = m.same(op, m.conv("x", 4), m.constant(held))
    found = planned(m.graph(m.conv(changed, 4)))
    assert found.constants == (((f"{op.lower()}1", 1),) if joins else ())
    assert (f"{op.lower()}1" in found.integer) == joins


def test_pads_and_resizes_that_make_new_values_are_not_of_the_same_grid() -> None:
    def graph(value: float) -> Graph:
        m = Made(x=Info((1, 3, 8, 8)))
        pads = m.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1]))
        value_name = m.constant(np.float32(value))
        padded = m.node("Pad", [m.conv("x", 4), pads, value_name], (1, 4, 10, 10), mode="constant")
        return m.graph(m.conv(padded, 4))

    assert "pad1" in planned(graph(0.0)).integer
    assert "pad1" not in planned(graph(-3.4e38)).integer


@pytest.mark.parametrize(
    ("low", "high", "want"),
    [
        (0.0, 255.0, QuantParams(1.0, -128)),
        (-255.0, 0.0, QuantParams(1.0, 127)),
        (0.0, 0.0, QuantParams(1 / 128, 0)),
        (0.0, 1e-45, QuantParams(1 / 128, 0)),
    ],
)
def test_grids_of_ranges(low: float, high: float, want: QuantParams) -> None:
    assert QuantParams.from_range(low, high) == want


def test_a_grid_holds_zero_and_both_ends() -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        low, high = -rng.exponential(3.0), rng.exponential(0.5)
        grid = QuantParams.from_range(low, high)
        ends = np.array([low, 0.0, high], np.float32)
        back = grid.dequantize(grid.quantize(ends))
        assert back[1] == 0
        assert np.abs(back - ends).max() <= grid.scale * 0.51 + 1e-7


def test_one_number_is_held_as_float32_holds_it() -> None:
    for value in (0.3, -7.25, 1e-6, 0.0):
        held = rounded_constant(np.array(value, np.float32)).numpy()
        assert np.isclose(held, value, rtol=2e-7, atol=0)
