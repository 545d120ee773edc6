"""A weight that is NaN is named by every command that would pass it on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgeq.cli import main
from edgeq.core.errors import FormatError
from edgeq.graph.files import read
from edgeq.graph.finite import check_finite_weights
from tests import graph_zoo


def spoiled(folder: Path, value: float, ndim: int) -> Path:
    """A network of which one number of a weight or bias has another value."""
    path = graph_zoo.save("keyword_spotter", folder)
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if len(t.dims) == ndim and t.data_type == 1)
    array = numpy_helper.to_array(tensor).copy()
    array.flat[array.size // 2] = value
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("ndim", [1, 4])
def test_it_is_refused(tmp_path: Path, ndim: int) -> None:
    path = spoiled(tmp_path, np.nan, ndim)
    with pytest.raises(FormatError, match=r"\d+ of the \d+ values .* are NaN"):
        check_finite_weights(read(path))
    check_finite_weights(read(graph_zoo.save("keyword_spotter", tmp_path)))


def test_an_infinite_bias_passes(tmp_path: Path) -> None:
    """It may be a mask that was added behind a product."""
    weights = {"w": np.ones((4, 3), np.float32), "mask": np.array([0, -np.inf, 0], np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["scores"]),
             helper.make_node("Add", ["scores", "mask"], ["masked"]),
             helper.make_node("Softmax", ["masked"], ["y"])]  # fmt: skip
    graph = helper.make_graph(
        nodes, "masked",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 4])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 3])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    onnx.save(model, tmp_path / "m.onnx")
    check_finite_weights(read(tmp_path / "m.onnx"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert", "--to", "ort", "-o", "out.onnx"),
        ("convert", "--to", "tflite", "-o", "out.tflite"),
        ("quantize", "--preset", "w8-channel", "-o", "out.onnx"),
    ],
)
def test_commands_refuse_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = spoiled(tmp_path, np.nan, 4)
    monkeypatch.chdir(tmp_path)
    assert main([arguments[0], str(path), *arguments[1:]]) == 1
    assert "are NaN, which makes its results NaN" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
