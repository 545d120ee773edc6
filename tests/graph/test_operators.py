"""The table of operators agrees with ONNX, with each target's emitters, and with the numbers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from edgeq.formats.qparams import QuantParams
from edgeq.graph.execute import Session
from edgeq.graph.ir import Graph, Info, Node
from edgeq.graph.operators import (
    OPERATORS,
    Operator,
    Refusal,
    channel_axis,
    faults,
    is_depthwise,
    named,
)
from tests.lowering import Builder
from tests.operator_cases import GROUPS, cases

ONNX = sorted(set(OPERATORS) - {"Linear"})
"""Linear is a MatMul or Gemm with a constant."""


def test_every_operator_has_an_emitter_or_a_stated_refusal_for_tflite() -> None:
    from edgeq.converters.tflite.lower.support import EMITTERS

    assert set(EMITTERS) == named(lambda row: not isinstance(row.tflite, Refusal))


def test_every_operator_has_an_emitter_or_a_stated_refusal_for_core_ml() -> None:
    pytest.importorskip("coremltools")
    from edgeq.converters.coreml.lower.support import EMITTERS

    assert set(EMITTERS) == named(lambda row: not isinstance(row.coreml, Refusal))


def test_refusals_name_the_nearest_supported_operator() -> None:
    refusals = [
        w.why for r in OPERATORS.values() for w in (r.tflite, r.coreml) if isinstance(w, Refusal)
    ]
    assert refusals
    for why in refusals:
        assert why.rsplit(" ", 1)[-1] in OPERATORS, why


@pytest.mark.parametrize("row", OPERATORS.values(), ids=lambda row: row.name)
def test_rows_name_operators_that_the_targets_have(row: Operator) -> None:
    if isinstance(row.tflite, str):
        pytest.importorskip("ai_edge_litert")
        from edgeq.graph.tflite.schema import schema

        for name in row.tflite.split():
            assert hasattr(schema().BuiltinOperator, name), name
    if isinstance(row.coreml, str):
        pytest.importorskip("coremltools")
        from coremltools.converters.mil.mil import Builder as Mil

        for name in row.coreml.split():
            assert hasattr(Mil, name), name


@pytest.mark.parametrize("name", ONNX)
def test_rows_agree_with_onnx(name: str) -> None:
    row, schema = OPERATORS[name], onnx.defs.get_schema(name, 21)
    assert {*row.defaults, *row.allowed, *row.ignored} <= {*schema.attributes, "auto_pad", "mode"}
    for key, value in row.defaults.items():
        told = schema.attributes[key].default_value
        if told.type:  # else the default depends on other attributes
            wanted = onnx.helper.get_attribute_value(told)
            assert value == (wanted.decode() if isinstance(wanted, bytes) else wanted), key
    assert max(row.constants, default=0) < len(schema.inputs)
    assert row.outputs <= schema.max_output
    if row.weight is not None:
        assert row.weight.input < len(schema.inputs)


def test_every_operator_has_cases_in_the_matrix() -> None:
    tested = {case.op for group in GROUPS for case in cases(group).values()}
    assert set(ONNX) <= tested


def computed(op: str, x: np.ndarray) -> np.ndarray:
    """What an activation makes of an array, in onnxruntime."""
    b = Builder()
    inputs = {"Clip": ("", b.constant(2.0, "f4")), "PRelu": (b.constant([0.25], "f4"),)}
    name = b.op(op, b.input(*x.shape), *inputs.get(op, ()), **OPERATORS[op].defaults)
    return np.asarray(Session(b.graph(name))({"x": x})[name])


@pytest.mark.parametrize(
    "row", [r for r in OPERATORS.values() if r.kind in ("activation", "softmax")],
    ids=lambda row: row.name,
)  # fmt: skip
def test_traits_of_activations_are_those_of_the_numbers(row: Operator) -> None:
    x = np.linspace(-60, 60, 48, dtype=np.float32).reshape(6, 8)
    y = computed(row.name, x)
    scaled = computed(row.name, np.float32(0.125) * x)
    assert row.homogeneous == bool(np.allclose(scaled, 0.125 * y, rtol=1e-6, atol=1e-6))
    assert row.bounded == bool(np.abs(y).max() <= 1)
    sums = y.sum(-1) if row.name != "LogSoftmax" else np.exp(y).sum(-1)
    if row.kind == "softmax":
        assert row.probabilities
        np.testing.assert_allclose(sums, 1, rtol=1e-5)
    if row.integer is not None and row.integer.output is not None:  # what is fixed holds all
        params: QuantParams = row.integer.output
        ends = params.dequantize(np.array([-128, 127], np.int8))
        assert ends[0] - params.scale <= y.min() <= y.max() <= ends[1] + params.scale


def _convolution(op: str, weight: tuple[int, ...], group: int) -> tuple[Graph, Node]:
    b = Builder()
    name = b.op(op, b.input(1, 4, 6, 6), b.random(*weight), group=group)
    graph = b.graph(name)
    return graph, graph.producers[name]


def test_depthwise_means_a_group_for_each_input_channel() -> None:
    assert is_depthwise(*_convolution("Conv", (8, 1, 3, 3), 4))
    assert is_depthwise(*_convolution("ConvTranspose", (4, 2, 3, 3), 4))
    assert not is_depthwise(*_convolution("Conv", (8, 2, 3, 3), 2))
    assert not is_depthwise(*_convolution("Conv", (8, 4, 3, 3), 1))
    b = Builder()
    name = b.op("Conv", b.input(1, 1, 6, 6), b.random(3, 1, 3, 3), group=1)
    graph = b.graph(name)
    assert not is_depthwise(graph, graph.producers[name])  # one channel, but one filter bank too


def test_channels_of_layers() -> None:
    graph, node = _convolution("Conv", (8, 4, 3, 3), 1)
    assert channel_axis(graph, node) == 1
    b = Builder()
    name = b.op("Linear", b.input(2, 5, 6), b.random(3, 6))
    graph = b.graph(name)
    assert channel_axis(graph, graph.producers[name]) == 2


def test_faults_name_the_node_and_what_is_outside_its_row() -> None:
    values = {"x": Info((2, 3)), "k": Info((1,), "int64"), "a": Info((2, 1)), "b": Info((2, 1))}
    top = Node("TopK", "top", ("x", "k"), ("a", "b"), {})
    odd = Node("Gelu", "odd", ("x",), ("c",), {"approximate": "erf"})
    graph = Graph("g", ("x", "k"), ("a",), (top, odd), {}, values | {"c": Info((2, 3))})
    assert faults(graph) == [
        "TopK 'top': its k input is computed; it must be a constant",
        "Gelu 'odd': its approximate is 'erf'; it must be 'none' or 'tanh'",
    ]
