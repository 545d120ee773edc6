"""Integers in LiteRT: the very same levels and scales, and results a step from the record's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeq.converters.tflite.graph import LiteRTGraphTarget
from edgeq.converters.tflite.graph_run import LiteRTGraphRunner
from edgeq.graph.execute import Session
from edgeq.graph.ir import Graph, QuantWeight
from edgeq.quant.graph.quantize import quantize_graph
from edgeq.quant.graph.samples import samples_of
from edgeq.quant.recipe import Recipe
from tests.converters.tflite.test_graph import FLOAT, made
from tests.lowering import Builder, Feeds, feeds, quantized, reference, weights_rounded

lower = LiteRTGraphTarget()

pytest.importorskip("ai_edge_litert")
pytest.importorskip("onnxruntime")
Make = Callable[[Builder], str | tuple[str, ...]]

SINGLE = [
    name for name in FLOAT
    if name.startswith((
        "conv", "depthwise", "transposed", "linear", "matmul", "maxpool", "averagepool", "global",
        "ReduceMean", "ReduceMax", "ReduceMin", "add", "sub", "mul", "min", "relu", "leaky",
        "sigmoid", "tanh", "hardswish", "gelu", "prelu", "clip", "Softmax", "softmax", "gather",
        "reshape", "flatten", "tokens", "channel shuffle", "transpose", "squeeze", "unsqueeze",
        "concat", "split", "slice", "pad", "nearest", "depth to", "space to", "expand", "div",
        "layernorm", "exp", "embedding", "elu", "erf",
    )) and name not in ("a number over x", "erf of little", "split")
]  # fmt: skip


def same_integers(graph: Graph, path: Path) -> None:
    """The file holds the graph's levels and scales bit for bit, in its axes."""
    found = dict(lower.read_weights(path))
    want = {k: w for k, w in graph.constants.items() if isinstance(w, QuantWeight)}
    used = {name for node in graph.nodes for name in node.inputs}
    assert set(found) <= set(want)
    for name in set(want) & used:
        if want[name].bits == 32 and name not in found:
            continue  # of a node that computes in float
        a, b = found[name], want[name]
        assert (a.bits, a.axis, a.block) == (b.bits, b.axis, b.block)
        np.testing.assert_array_equal(a.levels, b.levels)
        np.testing.assert_array_equal(a.scales, b.scales)
    for name, quant in lower.read_quants(path).items():
        assert graph.quants[name] == quant
    assert set(lower.read_quants(path)) == set(graph.quants)


def lowered(graph: Graph, path: Path, given: Feeds, exact: bool = False, **options: str) -> Feeds:
    lower.check(graph, options)
    path.unlink(missing_ok=True)
    lower.write(graph, path, options)
    return LiteRTGraphRunner(path, exact=exact)(given)


def steps(graph: Graph, found: Feeds, want: Feeds) -> float:
    """The largest difference, in steps of the outputs' grids."""
    worst = 0.0
    for out in graph.outputs:
        if want[out].dtype.kind == "f":
            step = graph.quants[out].scale
            worst = max(worst, float(np.abs(found[out] - want[out]).max()) / step)
    return worst


@pytest.mark.parametrize("name", SINGLE)
def test_operator_in_integers(name: str, tmp_path: Path) -> None:
    source = made(FLOAT[name])
    given = feeds(source)
    graph = quantized(source, given)
    want = reference(graph, given)
    found = lowered(graph, tmp_path / "m.tflite", given)
    same_integers(graph, tmp_path / "m.tflite")
    assert steps(graph, found, want) < 1.01


def operators(path: Path) -> list[str]:
    """What the file is made of."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    run = Interpreter(model_path=str(path), experimental_op_resolver_type=plain)
    return [op["op_name"] for op in run._get_ops_details()]


WEIGHTED = ["conv", "conv grouped", "conv 1-d", "depthwise", "transposed 4x4", "linear",
            "linear of three axes", "linear without bias", "flatten and linear"]  # fmt: skip


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_with_rounded_values(name: str, bits: int, tmp_path: Path) -> None:
    source = made(FLOAT[name])
    given = feeds(source)
    graph = quantized(source, given, bits)
    path = tmp_path / "m.tflite"
    found = lowered(graph, path, given)
    assert steps(graph, found, reference(graph, given)) < 1.01
    assert steps(graph, lowered(graph, path, given, exact=True), reference(graph, given)) < 1.01
    same_integers(graph, path)
    kinds = operators(path)
    assert (kinds[0], kinds[-1]) == ("QUANTIZE", "DEQUANTIZE")
    assert not {"QUANTIZE", "DEQUANTIZE", "TRANSPOSE"} & set(kinds[1:-1])


@pytest.mark.parametrize("compute", ["int8", "float"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_with_float_values(name: str, bits: int, compute: str, tmp_path: Path) -> None:
    source = made(FLOAT[name])
    given = feeds(source)
    graph = weights_rounded(source, bits)
    want = reference(graph, given)
    found = lowered(graph, tmp_path / "m.tflite", given, compute=compute)
    same_integers(graph, tmp_path / "m.tflite")
    for out in graph.outputs:
        # values rounded as it runs have 8 bits
        allowed = 1e-5 if compute == "float" else 0.02
        assert np.abs(found[out] - want[out]).max() < allowed * max(1, np.abs(want[out]).max())
    widened = compute == "float" or name == "depthwise"
    assert ("DEQUANTIZE" in operators(tmp_path / "m.tflite")) == widened


@pytest.mark.parametrize("bits", [4, 8])
def test_a_conv_of_rounded_values_and_a_float_result(bits: int, tmp_path: Path) -> None:
    """The runtime would round the values again, to other levels: such weights are float there."""
    source = made(FLOAT["conv"])
    given = feeds(source)
    quants = quantized(source, given, bits).quants
    taken = {n: quant for n, quant in quants.items() if n not in source.outputs}
    graph = replace(weights_rounded(source, bits), quants=taken)
    found = lowered(graph, tmp_path / "m.tflite", given)
    want, (out,) = reference(graph, given), graph.outputs
    assert np.abs(found[out] - want[out]).max() < 1e-5 * max(1, np.abs(want[out]).max())
    same_integers(graph, tmp_path / "m.tflite")


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", [name for name in WEIGHTED if "linear" in name])
def test_rounded_values_and_a_float_result(
    name: str, bits: int, exact: bool, tmp_path: Path
) -> None:
    """Integers are multiplied, and the runtime's own rounding of the values changes nothing."""
    source = made(FLOAT[name])
    given = feeds(source)
    quants = quantized(source, given, bits).quants
    taken = {n: quant for n, quant in quants.items() if n not in source.outputs}
    graph = replace(weights_rounded(source, bits), quants=taken)
    found = lowered(graph, tmp_path / "m.tflite", given, exact=exact)
    want, (out,) = reference(graph, given), graph.outputs
    np.testing.assert_allclose(found[out], want[out], atol=1e-5 * np.abs(want[out]).max())
    same_integers(graph, tmp_path / "m.tflite")
    assert "CONCATENATION" in operators(tmp_path / "m.tflite")


@pytest.mark.parametrize("compute", ["int8", "float"])
@pytest.mark.parametrize("k", [64, 50])
def test_blocks(k: int, compute: str, tmp_path: Path) -> None:
    b = Builder()
    source = b.graph(b.linear(b.input(3, k), k, 16))
    given = feeds(source)
    graph = weights_rounded(source, 4, block=32)
    want = reference(graph, given)
    found = lowered(graph, tmp_path / "m.tflite", given, compute=compute)
    same_integers(graph, tmp_path / "m.tflite")
    allowed = 1e-5 if compute == "float" else 0.02
    out = graph.outputs[0]
    assert np.abs(found[out] - want[out]).max() < allowed * np.abs(want[out]).max()


@pytest.mark.parametrize(("bits", "block"), [(8, None), (4, None), (4, 32)])
def test_embedding(bits: int, block: int | None, tmp_path: Path) -> None:
    b = Builder()
    rows = b.input(2, 6, dtype="int64", name="ids")
    source = b.graph(b.op("Gather", b.random(9, 50), rows, axis=0))
    given = feeds(source)
    graph = weights_rounded(source, bits, block=block)
    found = lowered(graph, tmp_path / "m.tflite", given)
    same_integers(graph, tmp_path / "m.tflite")
    out = graph.outputs[0]
    np.testing.assert_allclose(found[out], reference(graph, given)[out], atol=1e-6)


def small_net(b: Builder) -> str:
    """A residual net with all that keeps transposes out of sight."""
    x = b.op("Relu", b.conv(b.input(1, 3, 16, 16), 3, 8, strides=2))
    y = b.op("Clip", b.conv(x, 8, 8, group=8), b.constant(0, "f4"), b.constant(6, "f4"))
    x = b.op("Relu", b.op("Add", b.conv(y, 8, 8, 1), x))
    x = b.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2], pads=[0] * 4)
    side = b.op("Resize", b.op("GlobalAveragePool", x), "", "", b.ints(1, 8, 4, 4), mode="nearest",
                coordinate_transformation_mode="asymmetric", nearest_mode="floor")  # fmt: skip
    x = b.op("Concat", x, side, axis=1)
    return b.linear(b.op("Flatten", x, axis=1), 256, 10)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_no_transposes(bits: int | None, tmp_path: Path) -> None:
    source = made(small_net)
    given = feeds(source)
    graph = quantized(source, given, bits) if bits else source
    found = lowered(graph, tmp_path / "m.tflite", given)
    assert "TRANSPOSE" not in operators(tmp_path / "m.tflite")
    want, out = reference(graph, given), graph.outputs[0]
    same_integers(graph, tmp_path / "m.tflite")
    if bits:
        assert steps(graph, found, want) < 2.01
        assert found[out].argmax() == want[out].argmax()
    else:
        np.testing.assert_allclose(found[out], want[out], atol=1e-5)


def test_layout_of_the_source(tmp_path: Path) -> None:
    source = made(lambda b: b.conv(b.input(1, 3, 8, 6), 3, 4))
    given = feeds(source)
    for layout, shape in (("nhwc", [1, 8, 6, 3]), ("nchw", [1, 3, 8, 6])):
        found = lowered(source, tmp_path / "m.tflite", given, layout=layout)
        run = lower.open_runner(tmp_path / "m.tflite")
        assert list(run._run.get_input_details()["x"]["shape"]) == shape
        assert run.inputs["x"].shape == (1, 3, 8, 6)
        np.testing.assert_allclose(
            found[source.outputs[0]], reference(source, given)[source.outputs[0]], atol=1e-5
        )
        count = operators(tmp_path / "m.tflite").count("TRANSPOSE")
        assert count == (0 if layout == "nhwc" else 2)


def test_integers_in_and_out(tmp_path: Path) -> None:
    source = made(small_net)
    given = feeds(source)
    graph = quantized(source, given)
    found = lowered(graph, tmp_path / "m.tflite", given, io="int8")
    run = lower.open_runner(tmp_path / "m.tflite")
    assert run._run.get_input_details()["x"]["dtype"] == np.int8
    kinds = operators(tmp_path / "m.tflite")
    assert kinds[0] != "QUANTIZE"
    assert "DEQUANTIZE" not in kinds
    plain = lowered(graph, tmp_path / "m.tflite", given)
    np.testing.assert_array_equal(found[graph.outputs[0]], plain[graph.outputs[0]])


def test_a_layer_left_in_float(tmp_path: Path) -> None:
    """Integers end where a float weight begins, and begin again behind it."""
    source = made(small_net)
    given = feeds(source)
    graph = quantized(source, given)
    first = next(n for n in source.nodes if n.op == "Linear")
    floats = {name: source.constants[name] for name in first.inputs[1:]}
    graph = replace(graph, constants={**graph.constants, **floats})
    found = lowered(graph, tmp_path / "m.tflite", given)
    assert steps(graph, found, reference(graph, given)) < 2.01
    assert operators(tmp_path / "m.tflite")[-4:] == [
        "DEQUANTIZE", "FULLY_CONNECTED", "QUANTIZE", "DEQUANTIZE"
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["add", "mul", "conv", "linear", "concat", "hardswish", "matmul"])
@pytest.mark.parametrize("factor", [1e-7, 1e-3, 0.02, 1e3, 1e7])
def test_grids_far_from_each_other(name: str, factor: float, tmp_path: Path) -> None:
    """LiteRT would refuse them, saturate the wrong way or end the process; they go by float."""
    source = made(FLOAT[name])
    given = feeds(source)
    graph = quantized(source, given)
    out = graph.outputs[0]
    step = float(np.float32(graph.quants[out].scale * factor))
    quants = {**graph.quants, out: replace(graph.quants[out], scale=step)}
    graph = replace(graph, quants=quants)
    found, want = lowered(graph, tmp_path / "m.tflite", given), reference(graph, given)
    # float sums are not exact to the smallest of these steps
    assert steps(graph, found, want) < 1.01 or np.abs(found[out] - want[out]).max() < 1e-7


def test_an_output_that_is_another(tmp_path: Path) -> None:
    b = Builder()
    x = b.input(1, 3, 4, 4)
    y = b.conv(x, 3, 4)
    graph = b.graph(b.op("Transpose", y, perm=[0, 2, 3, 1]), y)
    for source in (graph, quantized(graph, feeds(graph))):
        found, want = (
            lowered(source, tmp_path / "m.tflite", feeds(graph)), reference(source, feeds(graph))
        )  # fmt: skip
        for out, array in want.items():
            np.testing.assert_allclose(found[out], array, atol=1e-5)


def test_packed_convolutions_give_the_very_levels_of_onnxruntime(tmp_path: Path) -> None:
    """LiteRT's kernel for them rounds twice; scales and a bias of one less make up for it."""
    b = Builder()
    x = b.op("Relu", b.conv(b.input(1, 16, 12, 12), 16, 32))
    source = b.graph(b.conv(x, 32, 24))  # of both signs
    rng = np.random.default_rng(0)
    given = [{"x": rng.standard_normal((1, 16, 12, 12)).astype(np.float32)} for _ in range(20)]
    recipe = Recipe.from_dict(
        {"weights": "w4-channel-gptq", "activations": "static", "bias_correction": True}
    )
    graph = quantize_graph(source, recipe, samples_of(source, given)).graph
    assert {graph.constants[n.inputs[1]].bits for n in graph.nodes if n.op == "Conv"} == {4}
    path = tmp_path / "m.tflite"
    lower.write(graph, path, {})
    same_integers(graph, path)
    want, run = Session(graph), lower.open_runner(path)
    for feed in given:
        for name, rows in run(feed).items():
            np.testing.assert_array_equal(rows, want(feed)[name])
