"""Ends of graphs that are valid and rare: constants and shapes as outputs, scalars, empty parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeq.converters import graph_target
from edgeq.converters.convert import convert
from edgeq.core.errors import EdgeqError
from edgeq.graph.execute import Session
from edgeq.graph.ir import Graph
from edgeq.graph.onnx.read import read_onnx
from edgeq.graph.onnx.save import write_onnx
from edgeq.quant.graph.quantize import quantize_graph
from edgeq.quant.graph.samples import open_samples
from edgeq.quant.recipe import Recipe

FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64
SUFFIX = {"ort": ".onnx", "tflite": ".tflite", "coreml": ".mlpackage"}
STATIC = Recipe.named("w8a8-static", "graph")


def model(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, list[int]]],
    outputs: dict[str, int],
    **held: Any,
) -> onnx.ModelProto:
    """A model of opset 17."""
    tensors = [numpy_helper.from_array(np.asarray(a), n) for n, a in held.items()]
    given = [helper.make_tensor_value_info(n, *about) for n, about in inputs.items()]
    made = [helper.make_tensor_value_info(n, kind, None) for n, kind in outputs.items()]
    graph = helper.make_graph(nodes, "ends", given, made, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def original(path: Path, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """What onnxruntime computes from a file with its default settings."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [out.name for out in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def in_runtime(graph: Graph, target: str, path: Path, feeds: Any) -> dict[str, NDArray[Any]]:
    convert(graph, target, path, {"precision": "float32"} if target == "coreml" else {})
    runner = graph_target(target).open_runner(path)
    try:
        return dict(runner(feeds))
    finally:
        runner.close()


@pytest.mark.parametrize("target", list(SUFFIX))
def test_outputs_that_are_constants_or_shapes(target: str, tmp_path: Path) -> None:
    """A Constant, an initializer that a node takes too, and the shape of a value."""
    pytest.importorskip({"tflite": "ai_edge_litert", "coreml": "coremltools"}.get(target, "onnx"))
    nodes = [
        helper.make_node("Constant", [], ["k"], value_floats=[1.0, 2.0]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("Shape", ["y"], ["s"]),
    ]
    w = np.arange(12, dtype=np.float32).reshape(4, 3)
    made = model(nodes, {"x": (FLOAT, [1, 4])}, {"k": FLOAT, "w": FLOAT, "y": FLOAT, "s": INT}, w=w)
    onnx.save(made, tmp_path / "m.onnx")
    feeds = {"x": np.ones((1, 4), np.float32)}
    want = original(tmp_path / "m.onnx", feeds)
    got = in_runtime(read_onnx(tmp_path / "m.onnx"), target, tmp_path / f"o{SUFFIX[target]}", feeds)
    assert list(got) == list(want)
    for name, array in want.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_allclose(got[name], array, rtol=1e-5)


@pytest.mark.parametrize("target", list(SUFFIX))
def test_scalar_inputs_take_one_number_a_sample(target: str, tmp_path: Path) -> None:
    pytest.importorskip({"tflite": "ai_edge_litert", "coreml": "coremltools"}.get(target, "onnx"))
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Mul", ["h", "t"], ["y"]),
    ]
    rng = np.random.default_rng(0)
    w = rng.standard_normal((8, 4)).astype(np.float32)
    made = model(nodes, {"x": (FLOAT, [1, 8]), "t": (FLOAT, [])}, {"y": FLOAT}, w=w)
    onnx.save(made, tmp_path / "m.onnx")
    x, t = rng.standard_normal((16, 8)), rng.random(16)
    np.savez(tmp_path / "c.npz", x=x.astype(np.float32), t=t.astype(np.float32))
    graph = read_onnx(tmp_path / "m.onnx")
    samples = open_samples(tmp_path / "c.npz", graph)
    first = next(iter(samples))
    assert first["t"].shape == ()
    quantized = quantize_graph(graph, STATIC, samples).graph
    got = in_runtime(quantized, target, tmp_path / f"q{SUFFIX[target]}", first)
    want = original(tmp_path / "m.onnx", dict(first))["y"]
    assert np.abs(got["y"] - want).max() < 0.05 * np.abs(want).max()


def test_a_pool_whose_places_nobody_takes_runs_in_onnxruntime(tmp_path: Path) -> None:
    """The file that is written, and what is converted from it, in their default settings."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("MaxPool", ["c"], ["y", "at"], kernel_shape=[2, 2], strides=[2, 2]),
    ]
    rng = np.random.default_rng(0)
    w = rng.standard_normal((4, 3, 1, 1)).astype(np.float32)
    made = model(nodes, {"x": (FLOAT, [1, 3, 8, 8])}, {"y": FLOAT}, w=w)
    onnx.save(made, tmp_path / "m.onnx")
    x = rng.standard_normal((16, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "c.npz", x=x)
    graph = read_onnx(tmp_path / "m.onnx")
    quantized = quantize_graph(graph, STATIC, open_samples(tmp_path / "c.npz", graph)).graph
    write_onnx(quantized, tmp_path / "q.onnx")
    want = original(tmp_path / "m.onnx", {"x": x[:1]})["y"]
    for got in (
        original(tmp_path / "q.onnx", {"x": x[:1]}),
        in_runtime(quantized, "ort", tmp_path / "o.onnx", {"x": x[:1]}),
    ):
        assert np.abs(got["y"] - want).max() < 0.05 * np.abs(want).max()


def test_parts_without_elements_are_left_out_of_a_concat(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Slice", ["x", "none", "none", "axis"], ["e"]),
        helper.make_node("Concat", ["x", "e", "x"], ["y"], axis=1),
        helper.make_node("Concat", ["e", "x"], ["z"], axis=1),
    ]
    made = model(
        nodes, {"x": (FLOAT, [1, 2, 3])}, {"y": FLOAT, "z": FLOAT},
        none=np.array([0]), axis=np.array([1]),
    )  # fmt: skip
    onnx.save(made, tmp_path / "m.onnx")
    graph = read_onnx(tmp_path / "m.onnx")
    assert [node.op for node in graph.nodes] == ["Concat", "Identity"]
    x = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    got = Session(graph)({"x": x})
    for name, array in original(tmp_path / "m.onnx", {"x": x}).items():
        np.testing.assert_array_equal(got[name], array)


def test_operators_of_scikit_learn_are_refused_with_the_option_that_avoids_them(
    tmp_path: Path,
) -> None:
    zip_map = helper.make_node(
        "ZipMap", ["x"], ["y"], name="z", domain="ai.onnx.ml", classlabels_int64s=[0, 1]
    )
    made = model([zip_map], {"x": (FLOAT, [1, 2])}, {"y": FLOAT})
    made.opset_import.append(helper.make_opsetid("ai.onnx.ml", 1))
    onnx.save(made, tmp_path / "m.onnx")
    with pytest.raises(EdgeqError, match=r"ai\.onnx\.ml\.ZipMap 'z'.*zipmap"):
        read_onnx(tmp_path / "m.onnx")


def test_other_names_for_the_default_domain_and_missing_names_are_taken(tmp_path: Path) -> None:
    node = helper.make_node("Relu", ["x"], ["y"], domain="ai.onnx")
    made = model([node], {"x": (FLOAT, [1, 4])}, {"y": FLOAT})
    made.opset_import.append(helper.make_opsetid("ai.onnx", 17))
    made.graph.name = ""
    onnx.save(made, tmp_path / "m.onnx")
    graph = read_onnx(tmp_path / "m.onnx")
    assert [node.op for node in graph.nodes] == ["Relu"]
    assert graph.name == "m"


def test_an_input_without_a_shape_is_given_one(tmp_path: Path) -> None:
    made = model([helper.make_node("Relu", ["x"], ["y"])], {"x": (FLOAT, [1])}, {"y": FLOAT})
    made.graph.input[0].type.tensor_type.ClearField("shape")
    onnx.save(made, tmp_path / "m.onnx")
    with pytest.raises(EdgeqError, match=r"the input 'x' .* has no shape; give one, as --shape x="):
        read_onnx(tmp_path / "m.onnx")
    assert read_onnx(tmp_path / "m.onnx", shapes={"x": (2, 3)}).info("y").shape == (2, 3)


@pytest.mark.parametrize(("group", "bias"), [(2, 4), (1, 5)])
def test_convolutions_whose_constants_do_not_fit_are_refused(
    group: int, bias: int, tmp_path: Path
) -> None:
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], name="c", group=group)
    made = model(
        [node], {"x": (FLOAT, [1, 3, 8, 8])}, {"y": FLOAT},
        w=np.ones((4, 3, 1, 1), np.float32), b=np.ones(bias, np.float32),
    )  # fmt: skip
    onnx.save(made, tmp_path / "m.onnx")
    with pytest.raises(EdgeqError, match=r"Conv 'c' has a weight \[4, 3, 1, 1\] and a bias"):
        read_onnx(tmp_path / "m.onnx")


def test_samples_for_a_graph_without_inputs_are_refused(tmp_path: Path) -> None:
    w = np.ones((2, 2), np.float32)
    made = model([helper.make_node("MatMul", ["w", "w"], ["y"])], {}, {"y": FLOAT}, w=w)
    onnx.save(made, tmp_path / "m.onnx")
    np.savez(tmp_path / "c.npz", x=w)
    with pytest.raises(EdgeqError, match="has no inputs that samples could be for"):
        open_samples(tmp_path / "c.npz", read_onnx(tmp_path / "m.onnx"))
