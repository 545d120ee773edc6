"""The examples in the docstrings of the Python API run, in a folder with small files."""

from __future__ import annotations

import contextlib
import doctest
import inspect
import io
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import numpy as np
import pytest
from _pytest.mark import ParameterSet

import edgeq

CLASSES = (
    "Conversation", "Draft", "Engine", "GrammarVocabulary", "Recipe", "SamplingParams", "Server",
    "ServerSettings", "Tokenizer", "Workload",
)  # fmt: skip
"""Classes whose docstring has an example; every public function has one."""

PACKAGES = {
    "evaluate_graph": ("onnxruntime", "onnx"), "bench_graphs": ("onnxruntime", "onnx"),
    "sweep": ("dask", "distributed"), "convert": ("gguf",), "validate": ("gguf",),
    "open_source": ("onnx",), "serve": ("starlette", "uvicorn"), "Server": ("starlette", "uvicorn"),
    "GrammarVocabulary": ("llguidance",),
}  # fmt: skip
"""What an example needs beyond the base packages."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
)


def functions() -> list[ParameterSet]:
    """Every public function; warnings of Dask's threads, as of a port in use, are ignored."""
    ignored = pytest.mark.filterwarnings("ignore")
    return [
        pytest.param(name, marks=[ignored] if name == "sweep" else [])
        for name in edgeq.__all__
        if isinstance(getattr(edgeq, name), FunctionType)
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that the examples name: a checkpoint, artifacts, texts, questions, a graph."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copytree(edgeq.demo_model(), folder / "model")
    edgeq.quantize(folder / "model", folder / "model.edgeq", fast=True, threads=1)
    chat = folder / "chat"
    shutil.copytree(folder / "model", chat)
    config = json.loads((chat / "tokenizer_config.json").read_text("utf-8"))
    config["chat_template"] = CHAT_TEMPLATE
    (chat / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    edgeq.quantize(chat, folder / "chat.edgeq", fast=True, threads=1)
    shutil.copy(folder / "model" / "heldout.txt", folder / "text.txt")
    questions = ["Once upon a time there was a girl", "The sun was warm and the sky was blue"]
    lines = [json.dumps({"text": text}) for text in questions]
    (folder / "lambada.jsonl").write_text("\n".join(lines), "utf-8")
    with contextlib.suppress(ImportError):
        _write_graph(folder / "graph.onnx")
    rng = np.random.default_rng(0)
    np.savez(folder / "samples.npz", x=rng.standard_normal((4, 1, 8, 8), np.float32))
    return folder


def _write_graph(path: Path) -> None:
    """Convolution, pooling and a classifier of three classes."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(1)
    weights = {"w": rng.standard_normal((4, 1, 3, 3)), "v": rng.standard_normal((4, 3))}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["a"]),
            helper.make_node("Relu", ["a"], ["b"]),
            helper.make_node("GlobalAveragePool", ["b"], ["c"]),
            helper.make_node("Flatten", ["c"], ["d"]),
            helper.make_node("MatMul", ["d", "v"], ["y"]),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])],
        [
            numpy_helper.from_array(array.astype(np.float32), name)
            for name, array in weights.items()
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(path))


@pytest.fixture
def here(files: Path, tmp_path: Path) -> Iterator[None]:
    for file in files.iterdir():
        (tmp_path / file.name).symlink_to(file)
    before = Path.cwd()
    os.chdir(tmp_path)
    yield
    os.chdir(before)


@pytest.mark.parametrize("name", [*functions(), *CLASSES])
@pytest.mark.usefixtures("here")
def test_example(name: str) -> None:
    for package in PACKAGES.get(name, ()):
        pytest.importorskip(package)
    value = getattr(edgeq, name)
    text = inspect.getdoc(value) or ""
    tests = doctest.DocTestFinder(recurse=False).find(
        value, name, globs={"edgeq": edgeq, "pathlib": pathlib, "np": np}
    )
    assert tests, f"the docstring of edgeq.{name} has no example"
    assert tests[0].examples, f"the docstring of edgeq.{name} has no example: {text[:60]}"
    report = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    failed, _ = runner.run(tests[0], out=report.write)
    assert not failed, report.getvalue()
