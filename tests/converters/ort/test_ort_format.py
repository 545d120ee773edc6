"""Files of onnxruntime's minimal builds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeq.converters.ort.ort_format import to_ort_format

KINDS = ("Relu", "Sigmoid", "Tanh", "Exp", "Softmax", "Neg", "Abs", "Floor", "Erf", "HardSwish")


def some_model() -> onnx.ModelProto:
    """Operators of many types, each of which has an entry in the file."""
    nodes, value = [], "x"
    for number, kind in enumerate(KINDS):
        nodes.append(helper.make_node(kind, [value], [f"v{number}"]))
        value = f"v{number}"
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    nodes += [
        helper.make_node("MatMul", [value, "w"], ["product"]),
        helper.make_node("Cast", ["product"], ["whole"], to=TensorProto.INT32),
        helper.make_node("Cast", ["whole"], ["y"], to=TensorProto.FLOAT),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])]
    graph = helper.make_graph(nodes, "some", inputs, outputs, [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def fixed_addresses() -> bool:
    """Whether the system lets a program have its memory at fixed addresses; Docker may not."""
    code = "import ctypes, sys; sys.exit(ctypes.CDLL(None).personality(0x0040000) == -1)"
    return sys.platform == "linux" and not subprocess.run([sys.executable, "-c", code]).returncode


@pytest.mark.slow
@pytest.mark.skipif(not fixed_addresses(), reason="memory at fixed addresses is not allowed here")
def test_neither_the_folder_nor_the_environment_changes_a_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    for folder, variable in (("a", ""), ("b" * 200, "x" * 5000), (f"{'c' * 90}/{'d' * 90}", "y")):
        path = tmp_path / folder / "model.onnx"
        path.parent.mkdir(parents=True)
        onnx.save(some_model(), path)
        monkeypatch.setenv("A_VARIABLE_OF_THE_USER", variable)
        to_ort_format(path, "1.0")
        operators = path.with_suffix(".required_operators.config").read_text()
        files.append((path.with_suffix(".ort").read_bytes(), operators))
    assert files[0] == files[1] == files[2]
