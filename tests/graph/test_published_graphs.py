"""Models as strangers bring them: what is understood is computed, all else refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeq.api.inspect import inspect
from edgeq.converters import open_graph
from edgeq.converters.convert import convert
from edgeq.core.errors import EdgeqError, FormatError, SchemeError, UnsupportedError, UsageError
from edgeq.graph.execute import Session
from edgeq.graph.ir import Graph, Info, Node
from edgeq.graph.onnx.read import read_onnx
from edgeq.graph.onnx.save import write_onnx
from edgeq.graph.tflite.read import read_tflite
from tests.lowering import Builder
from tests.real_models import YOLOV8N, real_model

Array = NDArray[Any]
RNG = np.random.default_rng(0)


def saved(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, tuple[int, ...]]],
    outputs: dict[str, int],
    constants: dict[str, Array] | None = None,
    opset: int = 17,
) -> Path:
    """A model as a file; inputs are name -> (type, shape), outputs name -> type."""
    graph = helper.make_graph(
        nodes, "stranger",
        [helper.make_tensor_value_info(n, kind, shape) for n, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(n, kind, None) for n, kind in outputs.items()],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in (constants or {}).items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", opset)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def test_whole_numbers_past_32_bits_stay_so_in_tflite(tmp_path: Path) -> None:
    model = saved(
        tmp_path / "m.onnx",
        [
            helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["f", "c"], ["y"]),
            helper.make_node("Add", ["x", "k"], ["z"]),
        ],
        {"x": (TensorProto.INT64, (1, 4))}, {"y": TensorProto.FLOAT, "z": TensorProto.INT64},
        {"c": np.float32(1e-9), "k": np.array([[5_000_000_000]], np.int64)},
    )  # fmt: skip
    convert(model, "tflite", tmp_path / "m.tflite")
    runner = open_graph(tmp_path / "m.tflite")
    x = np.array([[3_000_000_000, -5, 7, 2**40]], np.int64)
    made = runner({"x": x})
    np.testing.assert_allclose(made["y"], x.astype(np.float32) * np.float32(1e-9), rtol=1e-6)
    np.testing.assert_array_equal(made["z"], x + 5_000_000_000)


def test_whole_numbers_that_core_ml_may_not_hold_are_told(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mul", ["x", "c"], ["a"], name="scaled"),
        helper.make_node("Cast", ["a"], ["y"], to=1),
    ]
    kinds = {"x": (TensorProto.INT64, (3,))}, {"y": TensorProto.FLOAT}
    model = saved(tmp_path / "m.onnx", nodes, *kinds, {"c": np.array(1000000)})
    said: list[str] = []
    convert(model, "coreml", tmp_path / "m.mlpackage", announce=said.append)
    assert len(said) == 1
    assert "the int64 results of Mul 'scaled' must lie within 2147483647" in said[0]
    plain = saved(tmp_path / "n.onnx", [helper.make_node("Cast", ["x"], ["y"], to=1)], *kinds, {})
    convert(plain, "coreml", tmp_path / "n.mlpackage", announce=said.append)
    assert len(said) == 1


def test_core_ml_is_not_fed_numbers_that_it_cannot_hold(tmp_path: Path) -> None:
    model = saved(
        tmp_path / "m.onnx", [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)],
        {"x": (TensorProto.INT64, (2,))}, {"y": TensorProto.FLOAT},
    )  # fmt: skip
    convert(model, "coreml", tmp_path / "m.mlpackage")
    runner = open_graph(tmp_path / "m.mlpackage")
    with pytest.raises(UsageError, match=r"'x' holds numbers from 1 to 3000000000; .*int32"):
        runner({"x": np.array([1, 3_000_000_000], np.int64)})


@pytest.mark.parametrize("kind", [TensorProto.UINT8, TensorProto.INT8])
def test_pictures_of_bytes_in_tflite(kind: int, tmp_path: Path) -> None:
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind))
    model = saved(
        tmp_path / "m.onnx",
        [
            helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["f", "s"], ["g"]),
            helper.make_node("Conv", ["g", "w"], ["y"]),
        ],
        {"x": (kind, (1, 3, 6, 5))}, {"y": TensorProto.FLOAT},
        {"s": np.float32(1 / 64), "w": RNG.standard_normal((4, 3, 3, 3)).astype(np.float32)},
    )  # fmt: skip
    convert(model, "tflite", tmp_path / "m.tflite")
    x = RNG.integers(0, 120, (1, 3, 6, 5)).astype(dtype)
    want = Session(read_onnx(model))({"x": x})["y"]
    np.testing.assert_allclose(open_graph(tmp_path / "m.tflite")({"x": x})["y"], want, atol=1e-4)
    again = read_tflite(tmp_path / "m.tflite")
    assert again.info("x").dtype == dtype.name
    np.testing.assert_allclose(Session(again)({"x": x})[again.outputs[0]], want, atol=1e-4)


def test_an_output_that_is_a_constant(tmp_path: Path) -> None:
    anchors = np.array([1, 2, 3, 4], np.float32)
    model = saved(
        tmp_path / "m.onnx",
        [
            helper.make_node("Add", ["x", "k"], ["y"]),
            helper.make_node("Identity", ["k"], ["z"]),
        ],
        {"x": (TensorProto.FLOAT, (1, 4))}, {"y": TensorProto.FLOAT, "z": TensorProto.FLOAT},
        {"k": anchors},
    )  # fmt: skip
    for name in ("m.tflite", "m.mlpackage"):
        target = "tflite" if name == "m.tflite" else "coreml"
        convert(model, target, tmp_path / name)
        made = open_graph(tmp_path / name)({"x": np.zeros((1, 4), np.float32)})
        np.testing.assert_array_equal(made["z"], anchors)


def test_constants_of_equal_bytes_are_not_one_in_core_ml(tmp_path: Path) -> None:
    b = Builder()
    ones, zeros = b.constant(np.ones(8), np.float32), b.constant(np.zeros(8), np.float32)
    y = b.linear(b.input(1, 4, 8), 8, 8)
    y = b.op("LayerNormalization", y, ones, zeros, axis=2, epsilon=1e-5)
    y = b.op("Linear", y, b.random(8, 8), b.constant(np.zeros(8), np.float32))
    graph = b.graph(b.op("Max", y, b.constant(np.zeros((1, 1, 8)), np.float32)))
    convert(graph, "coreml", tmp_path / "m.mlpackage")
    x = RNG.standard_normal((1, 4, 8)).astype(np.float32)
    made = open_graph(tmp_path / "m.mlpackage")({"x": x})[graph.outputs[0]]
    np.testing.assert_allclose(made, Session(graph)({"x": x})[graph.outputs[0]], atol=0.02)


def test_a_constant_past_float16_is_computed_in_float32(tmp_path: Path) -> None:
    b = Builder()
    far = b.op("Mul", b.input(4), b.constant(3e6, np.float32))
    graph = b.graph(b.op("Mul", far, b.constant(1e-7, np.float32)))
    convert(graph, "coreml", tmp_path / "m.mlpackage", validate=False)
    made = open_graph(tmp_path / "m.mlpackage")({"x": np.array([0.001, 1, 2, -0.01], np.float32)})
    want = np.array([0.001, 1, 2, -0.01]) * 0.3
    np.testing.assert_allclose(made[graph.outputs[0]][[0, 3]], want[[0, 3]], rtol=0.01)


@pytest.mark.parametrize(
    ("node", "constants", "outputs", "words"),
    [
        (
            ("BatchNormalization", ["x", "s", "s", "s", "s"], {"training_mode": 1}),
            {"s": np.ones(3, np.float32)}, 3,
            r"BatchNormalization 'n' normalizes by the mean and variance of the batch",
        ),
        (
            ("Dropout", ["x", "r", "t"], {}),
            {"r": np.float32(0.5), "t": np.array(True)}, 1,
            r"Dropout 'n' sets values to zero at random",
        ),
        (
            ("Squeeze", ["x", "none"], {}),
            {"none": np.zeros(0, np.int64)}, 1,
            r"Squeeze 'n' has an empty list of axes, which some runtimes read",
        ),
    ],
)  # fmt: skip
def test_what_has_another_meaning_is_refused(
    node: tuple[Any, ...], constants: dict[str, Array], outputs: int, words: str, tmp_path: Path
) -> None:
    op, inputs, attrs = node
    made = [f"y{i}" for i in range(outputs)]
    path = saved(
        tmp_path / "m.onnx", [helper.make_node(op, inputs, made, name="n", **attrs)],
        {"x": (TensorProto.FLOAT, (1, 3, 4, 4))}, {"y0": TensorProto.FLOAT}, constants,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match=words):
        read_onnx(path)


def test_a_file_that_onnx_runtime_does_not_load_is_not_written(tmp_path: Path) -> None:
    graph = Graph(
        "g", ("x",), ("z",),
        (Node("Add", "sum", ("x", "x"), ("y",)), Node("Relu", "bend", ("y",), ("z",))),
        {}, {name: Info((2,), "int64") for name in "xyz"},
    )  # fmt: skip
    with pytest.raises(FormatError, match=r"onnxruntime refuses Relu 'bend' of the graph g: "):
        write_onnx(graph, tmp_path / "g.onnx")
    assert not list(tmp_path.iterdir())


def test_core_ml_refusals_name_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from coremltools.converters.mil.mil import Builder as Mil

    def broken(**given: Any) -> Any:
        raise ValueError("no such form")

    monkeypatch.setattr(Mil, "tanh", broken)
    b = Builder()
    graph = b.graph(b.op("Tanh", b.input(2)))
    with pytest.raises(UnsupportedError, match=r"Tanh 'tanh_0' cannot be .*: no such form"):
        convert(graph, "coreml", tmp_path / "m.mlpackage")


def test_weights_below_float16_are_not_rounded_to_nothing(tmp_path: Path) -> None:
    from edgeq.quant.graph.quantize import quantize_graph
    from edgeq.quant.recipe import Recipe

    model = saved(
        tmp_path / "m.onnx",
        [
            helper.make_node("MatMul", ["x", "w"], ["m"], name="small"),
            helper.make_node("Tanh", ["m"], ["t"]),
            helper.make_node("Mul", ["t", "k"], ["y"]),
        ],
        {"x": (TensorProto.FLOAT, (4, 64))}, {"y": TensorProto.FLOAT},
        {"w": RNG.standard_normal((64, 32)).astype(np.float32) * np.float32(1e-9),
         "k": np.full((1, 32), 1e9, np.float32)},
    )  # fmt: skip
    graph = read_onnx(model)
    with pytest.raises(SchemeError, match=r"weights of Linear 'small' are at most .*small=f32"):
        quantize_graph(graph, Recipe.named("w8-channel", "graph"))
    halved = quantize_graph(graph, Recipe.named("fp16", "graph")).graph
    x = RNG.standard_normal((4, 64)).astype(np.float32)
    want = Session(graph)({"x": x})["y"]
    np.testing.assert_allclose(Session(halved)({"x": x})["y"], want, rtol=1e-2, atol=1e-2)


def opened(source: Path, path: Path) -> Path:
    """A .tflite file with its height and width left open, as TensorFlow's converter writes it."""
    flatbuffers = pytest.importorskip("flatbuffers")
    from ai_edge_litert import schema_py_generated as s

    model = s.ModelT.InitFromObj(s.Model.GetRootAs(source.read_bytes(), 0))
    graph = model.subgraphs[0]
    for tensor in (graph.tensors[i] for i in graph.inputs):
        tensor.shapeSignature = np.array([1, -1, -1, tensor.shape[3]], np.int32)
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    return path


@pytest.fixture
def open_file(tmp_path: Path) -> Path:
    b = Builder()
    graph = b.graph(b.op("Relu", b.conv(b.input(1, 3, 1, 1), 3, 4)))
    convert(graph, "tflite", tmp_path / "plain.tflite", validate=False)
    return opened(tmp_path / "plain.tflite", tmp_path / "open.tflite")


def test_open_axes_of_a_tflite_file_are_asked_for_and_taken(open_file: Path) -> None:
    with pytest.raises(UsageError, match=r"axis 1 of the input 'x' \[1, \?, \?, 3\].*=1,N,N,3"):
        read_tflite(open_file)
    graph = read_tflite(open_file, shapes={"x": (1, 9, 7, 3)})
    assert graph.info(graph.inputs[0]).shape == (1, 3, 9, 7)
    from ai_edge_litert.interpreter import Interpreter

    x = RNG.standard_normal((1, 9, 7, 3)).astype(np.float32)
    interpreter = Interpreter(model_path=str(open_file))
    interpreter.resize_tensor_input(interpreter.get_input_details()[0]["index"], x.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    interpreter.invoke()
    want = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    made = Session(graph)({"x": np.ascontiguousarray(x.transpose(0, 3, 1, 2))})[graph.outputs[0]]
    np.testing.assert_allclose(made.transpose(0, 2, 3, 1), want, atol=1e-5)


def test_inspect_shows_the_open_axes_and_operators_of_a_tflite_file(open_file: Path) -> None:
    found = inspect(open_file)
    assert found["inputs"] == {"x": "float32 [1, ?, ?, 3]"}
    assert found["operators"] == {"CONV_2D float32": 1}
    assert found["constants_bytes"] == {"float32": 4 * (4 * 3 * 3 * 3 + 4)}


@pytest.mark.parametrize(
    ("shapes", "batch", "words"),
    [
        ({"x": (1, 9, 7)}, None, r"\[1, 9, 7\] does not fit the input 'x' \[1, \?, \?, 3\]"),
        ({"x": (2, 9, 7, 3)}, None, r"contradicts the model's \[1, \?, \?, 3\]"),
        ({"q": (1, 9, 7, 3)}, None, r"has no input 'q'; its inputs: x"),
        ({}, 0, r"the batch is 0; it must be 1 or more"),
    ],
)
def test_shapes_that_do_not_fit_a_tflite_file(
    shapes: dict[str, tuple[int, ...]], batch: int | None, words: str, open_file: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        read_tflite(open_file, shapes=shapes, batch=batch)


def test_yolo_s_head_is_read() -> None:
    path = real_model(YOLOV8N)
    graph = read_onnx(path, shapes={"images": (1, 3, 320, 320)})
    import onnxruntime

    x = RNG.random((1, 3, 320, 320)).astype(np.float32)
    (want,) = onnxruntime.InferenceSession(str(path)).run(None, {"images": x})
    made = Session(graph)({"images": x})[graph.outputs[0]]
    np.testing.assert_allclose(made, want, rtol=1e-3, atol=1e-2)


ODD = ["in put:0", "出力/1", "a.b/c;d", "0start", "'q\"uo", "any", "add_1"]


@pytest.mark.parametrize(
    "names", [ODD, ["t0", "c0", "w0", "x.float", "x.scale", "x.levels", "v0"],
              ["a b", "a_b", "a.b", "a-b", "a/b", "a:b", "a+b"]],
)  # fmt: skip
def test_names_with_odd_characters(names: list[str], tmp_path: Path) -> None:
    x, w, b, conv, bent, total, out = names
    constants = {w: RNG.standard_normal((3, 3, 3, 3)).astype(np.float32) / 5,
                 b: RNG.standard_normal(3).astype(np.float32)}  # fmt: skip
    model = saved(
        tmp_path / "m.onnx",
        [
            helper.make_node("Conv", [x, w, b], [conv], pads=[1] * 4),
            helper.make_node("Relu", [conv], [bent]),
            helper.make_node("Add", [bent, x], [total]),
            helper.make_node("Identity", [total], [out]),
        ],
        {x: (TensorProto.FLOAT, (1, 3, 6, 6))},
        {total: TensorProto.FLOAT, out: TensorProto.FLOAT}, constants,
    )  # fmt: skip
    feeds = {x: RNG.standard_normal((1, 3, 6, 6)).astype(np.float32)}
    want = Session(read_onnx(model))(feeds)
    for target, name in (("ort", "o.onnx"), ("tflite", "o.tflite"), ("coreml", "o.mlpackage")):
        convert(model, target, tmp_path / name)
        made = open_graph(tmp_path / name)(feeds)
        assert made.keys() == want.keys()
        for key, right in want.items():
            np.testing.assert_allclose(made[key], right, atol=0.02)


def test_damage_of_a_tflite_shape_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tflite").write_bytes(b"nothing of this kind")
    with pytest.raises(EdgeqError, match=r"is not a \.tflite file"):
        read_tflite(tmp_path / "x.tflite", shapes={"x": (1,)})
