"""ONNX files of many exporters: read into the canonical graph, they compute what they did."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeq.graph.execute import Session
from edgeq.graph.files import read
from edgeq.graph.ir import Graph
from edgeq.graph.onnx.read import read_onnx
from edgeq.graph.operators import OPERATORS, faults
from tests.conftest import need
from tests.graph_zoo import MODELS, Exporter, canonical, feeds, save


def original(path: Path, given: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """What onnxruntime makes of the file itself, each operator as it stands."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    made: list[NDArray[Any]] = session.run(None, given)
    return made


def assert_same(graph: Graph, path: Path) -> None:
    given = feeds(graph)
    made = Session(graph)(given)
    wanted = original(path, given)
    assert list(made) == list(graph.outputs)
    for got, want in zip(made.values(), wanted, strict=True):
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        assert np.isfinite(want).all()
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(np.abs(want).max(), 1e-3))


def assert_canonical(graph: Graph) -> None:
    """What every target relies on."""
    assert not faults(graph)
    assert len({n.name for n in graph.nodes}) == len(graph.nodes)
    made = set(graph.inputs)
    for node in graph.nodes:
        assert node.name
        assert node.op in OPERATORS
        for name in node.inputs:
            assert not name or name in graph.constants or name in made, f"{node} takes {name}"
        made.update(node.outputs)
        for name in node.outputs:
            assert not name or min(graph.values[name].shape, default=1) >= 0
        if node.op in ("Conv", "ConvTranspose", "MaxPool"):
            assert {"pads", "strides", "dilations", "kernel_shape"} <= node.attrs.keys()
            assert "auto_pad" not in node.attrs
        if node.op == "Linear":
            n, k = graph.info(node.inputs[1]).shape
            assert graph.values[node.inputs[0]].shape[-1] == k
            assert graph.values[node.output].shape[-1] == n
            assert len(node.inputs) < 3 or graph.info(node.inputs[2]).shape == (n,)
        if node.op == "MatMul":
            assert node.inputs[1] not in graph.constants
        if node.op == "Reshape":
            assert min(graph.array(node.inputs[1])) > 0
        if node.op == "Slice":
            assert len(node.inputs) == 5
        if node.op == "Clip":
            assert all(graph.array(name).ndim == 0 for name in node.inputs[1:3])
        if isinstance(node.attrs.get("axis"), int):
            assert node.attrs["axis"] >= 0
    for name, info in graph.values.items():
        assert name in made
        assert info.dtype in ("float32", "int64", "int32", "bool")


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


@pytest.mark.parametrize("name", MODELS)
def test_zoo(name: str, tmp_path: Path) -> None:
    path = save(name, tmp_path)
    graph = read_onnx(path)
    assert_canonical(graph)
    assert_same(graph, path)


def test_mnist_of_cntk() -> None:
    path = need("data/mnist/mnist_cntk_opset8.onnx")
    graph = read_onnx(path)
    assert_canonical(graph)
    assert_same(graph, path)
    assert ops(graph) == [
        "Conv", "Relu", "MaxPool", "Conv", "Relu", "MaxPool", "Reshape", "Linear",
    ]  # fmt: skip
    assert all(len(n.inputs) == 3 for n in graph.nodes if n.op in ("Conv", "Linear"))


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet", "keyword_spotter", "efficientnet"])
def test_batch_norms_are_folded(name: str, tmp_path: Path) -> None:
    graph = canonical(name, tmp_path)
    convs = [n for n in graph.nodes if n.op == "Conv"]
    assert all(len(n.inputs) == 3 for n in convs)
    assert not {"BatchNormalization", "Identity", "Dropout", "Constant"} & set(ops(graph))


@pytest.mark.parametrize("name", ["bert", "bert_modern", "bert_tanh"])
def test_encoders_come_out_alike(name: str, tmp_path: Path) -> None:
    graph = canonical(name, tmp_path)
    found = ops(graph)
    assert found.count("LayerNormalization") == 5
    assert found.count("Gelu") == 2
    assert found.count("Linear") == 13
    assert found.count("MatMul") == 4
    assert found.count("Div") == 1  # of the sentence by its length; the scores' is in the weights
    assert found.count("Erf") == found.count("Pow") == found.count("Sqrt") == 0
    gelu = next(n for n in graph.nodes if n.op == "Gelu")
    assert gelu.attrs["approximate"] == ("tanh" if name == "bert_tanh" else "none")
    for node in graph.nodes:
        if node.op == "Linear":
            assert len(node.inputs) == 3, f"{node} has no bias"


def test_masks_are_finite(tmp_path: Path) -> None:
    for name in ("bert", "bert_tanh", "decoder_mask"):
        graph = canonical(name, tmp_path)
        least = min(float(graph.array(c).min()) for c in graph.constants if graph.array(c).size)
        assert least == -1e4, name


def test_hard_swish_in_every_spelling(tmp_path: Path) -> None:
    found = ops(canonical("mobilenet_v3", tmp_path))
    assert found.count("HardSwish") == 3
    assert found.count("HardSigmoid") == 1
    assert "Div" not in found


def test_tied_weights_are_held_once(tmp_path: Path) -> None:
    graph = canonical("shared_embedding", tmp_path)
    gather = next(n for n in graph.nodes if n.op == "Gather")
    head = graph.nodes[-1]
    assert head.op == "Linear"
    assert head.inputs[1] == gather.inputs[0]


def test_float16_stays_in_half_the_bytes(tmp_path: Path) -> None:
    graph = canonical("half_precision", tmp_path)
    conv = graph.nodes[0]
    assert graph.constants[conv.inputs[1]].dtype == np.float16  # type: ignore[union-attr]
    assert graph.info(conv.inputs[1]).dtype == "float32"
    assert ops(graph) == ["Conv", "Relu"]


def test_a_model_of_float16_is_taken_as_float32(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((4, 3, 3, 3)).astype(np.float16)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1, 3, 6, 6])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT16, [1, 4, 4, 4])
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"])]
    graph = helper.make_graph(nodes, "half", [x], [y], [numpy_helper.from_array(w, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, tmp_path / "half.onnx")
    got = read_onnx(tmp_path / "half.onnx")
    assert got.values["x"].dtype == got.values["y"].dtype == "float32"
    assert got.meta["edgeq.widened"] == "float16"
    given = feeds(got)
    want = original(tmp_path / "half.onnx", {"x": given["x"].astype(np.float16)})[0]
    np.testing.assert_allclose(Session(got)(given)["y"], want, atol=0.05)


def test_open_batch_becomes_one_and_is_recorded(tmp_path: Path) -> None:
    path = save("mobilenet_v2", tmp_path)
    graph = read_onnx(path)
    assert graph.values["x"].shape == (1, 3, 32, 32)
    assert graph.meta["edgeq.batch"] == "1, unknown in the model (N)"
    four = read_onnx(path, batch=4)
    assert four.values["logits"].shape == (4, 10)
    assert_same(four, path)
    given = read_onnx(path, shapes={"x": (2, 3, 32, 32)})
    assert given.values["logits"].shape == (2, 10)
    assert "edgeq.batch" not in given.meta
    assert_same(given, path)


def test_an_axis_named_twice_is_given_once(tmp_path: Path) -> None:
    e = Exporter(17)
    y = e("Add", "a", e("Relu", "b"))
    model = e.model({"a": ("N", "S", 4), "b": ("N", "S", 4)}, {"y": y})
    onnx.save(model, tmp_path / "m.onnx")
    graph = read_onnx(tmp_path / "m.onnx", shapes={"a": (2, 7, 4)})
    assert graph.values["b"].shape == (2, 7, 4)


@pytest.mark.parametrize("opset", [1, 3, 5, 6])
def test_opsets_before_shapes_were_brought_together_as_today(opset: int, tmp_path: Path) -> None:
    """onnxruntime runs none of these, so the same net in opset 7 is what they are held to."""
    rng = np.random.default_rng(0)
    held = {
        "w": (4, 3, 3, 3), "b": (4,), "g": (4,), "beta": (4,), "mean": (4,), "c": (4,),
        "fc": (256, 5), "fb": (5,),
    }  # fmt: skip
    arrays = {k: rng.standard_normal(s).astype(np.float32) for k, s in held.items()}
    arrays["var"] = rng.uniform(0.5, 1, 4).astype(np.float32)

    def model(opset: int) -> onnx.ModelProto:
        old, extra = opset < 7, dict(arrays)
        inplace = {"consumed_inputs": [0]} if opset < 6 else {}
        norm: dict[str, Any] = {"is_test": 1} if old else {}
        if opset < 6:
            norm["consumed_inputs"] = [0, 0, 0, 1, 1]
        nodes = [
            helper.make_node("Conv", ["x", "w", "b"], ["t1"], kernel_shape=[3, 3], pads=[1] * 4),
            helper.make_node(
                "BatchNormalization", ["t1", "g", "beta", "mean", "var"], ["t2"], **norm
            ),
        ]
        if old:
            nodes.append(helper.make_node("Add", ["t2", "c"], ["t3"], broadcast=1, axis=1))
            nodes.append(helper.make_node("Relu", ["t3"], ["t4"], **inplace))
        else:
            extra["c"] = arrays["c"].reshape(4, 1, 1)
            nodes.append(helper.make_node("Add", ["t2", "c"], ["t3"]))
            nodes.append(helper.make_node("Relu", ["t3"], ["t4"]))
        if opset < 5:
            nodes.append(helper.make_node("Reshape", ["t4"], ["t5"], shape=[0, 256]))
        else:
            extra["to"] = np.array([0, 256], np.int64)
            nodes.append(helper.make_node("Reshape", ["t4", "to"], ["t5"]))
        gemm = {"broadcast": 1} if old else {}
        nodes.append(helper.make_node("Gemm", ["t5", "fc", "fb"], ["y"], **gemm))
        tensors = [numpy_helper.from_array(a, n) for n, a in extra.items()]
        given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])]
        given += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in tensors]
        out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])]
        graph = helper.make_graph(nodes, "old", given, out, tensors)
        ids = [helper.make_opsetid("", opset)]
        return helper.make_model(graph, opset_imports=ids, ir_version=3)

    onnx.save(model(opset), tmp_path / "old.onnx")
    onnx.save(model(7), tmp_path / "seven.onnx")
    graph = read_onnx(tmp_path / "old.onnx")
    assert ops(graph) == ["Conv", "Relu", "Reshape", "Linear"]
    want = original(tmp_path / "seven.onnx", feeds(graph))[0]
    np.testing.assert_allclose(Session(graph)(feeds(graph))["y"], want, atol=1e-4)


def test_external_data_beside_the_model(tmp_path: Path) -> None:
    plain = save("resnet", tmp_path)
    path = tmp_path / "external.onnx"
    onnx.save(
        onnx.load(plain), path, save_as_external_data=True, location="weights.bin",
        size_threshold=0,
    )  # fmt: skip
    assert (tmp_path / "weights.bin").stat().st_size > 10_000
    one, other = read_onnx(plain), read_onnx(path)
    assert one.nodes == other.nodes
    for name in one.constants:
        np.testing.assert_array_equal(one.array(name), other.array(name))


def test_functions_of_the_model_are_inlined(tmp_path: Path) -> None:
    body = [
        helper.make_node("Sigmoid", ["a"], ["s"]),
        helper.make_node("Mul", ["a", "s"], ["out"]),
    ]
    ids = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    silu = helper.make_function("local", "silu", ["a"], ["out"], body, ids[:1])
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 3]) for n in "xy")
    nodes = [helper.make_node("silu", ["x"], ["y"], domain="local")]
    graph = helper.make_graph(nodes, "f", [x], [y])
    model = helper.make_model(graph, opset_imports=ids, functions=[silu], ir_version=9)
    onnx.save(model, tmp_path / "f.onnx")
    got = read_onnx(tmp_path / "f.onnx")
    assert ops(got) == ["Sigmoid", "Mul"]
    assert_same(got, tmp_path / "f.onnx")


def test_outputs_that_are_inputs_or_constants_keep_their_names(tmp_path: Path) -> None:
    e = Exporter(17)
    y = e("Relu", "x")
    outputs = {"same": "x", "fixed": e.c(np.ones(3), np.float32), "y": y, "again": y}
    onnx.save(e.model({"x": (2, 3)}, outputs), tmp_path / "m.onnx")
    graph = read(tmp_path / "m.onnx")
    assert graph.outputs == ("same", "fixed", "y", "again")
    assert sorted(ops(graph)) == ["Identity", "Identity", "Identity", "Relu"]
    assert_same(graph, tmp_path / "m.onnx")


@pytest.mark.parametrize("opset", [11, 14, 17])
def test_what_pytorch_exports(opset: int, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    nn = torch.nn
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 8, 3, groups=8, padding=1, bias=False), nn.BatchNorm2d(8), nn.Hardswish(),
        nn.Conv2d(8, 16, 1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Dropout(),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.PixelShuffle(2), nn.PReLU(4), nn.Mish(), nn.Flatten(2), nn.Linear(1296, 12),
        nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 5),
    ).eval()  # fmt: skip
    path = tmp_path / "torch.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net, (torch.randn(1, 3, 16, 16),), path, dynamo=False, opset_version=opset,
            input_names=["x"], dynamic_axes={"x": {0: "N"}},
        )  # fmt: skip
    graph = read_onnx(path)
    assert_canonical(graph)
    assert_same(graph, path)
    found = ops(graph)
    assert found.count("HardSwish") == found.count("Gelu") == 1
    assert found.count("Linear") == 2
    assert "Erf" not in found


def test_reading_is_the_same_every_time(tmp_path: Path) -> None:
    one, other = canonical("bert", tmp_path), canonical("bert", tmp_path)
    assert one.nodes == other.nodes
    assert list(one.constants) == list(other.constants)
