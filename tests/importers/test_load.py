"""`load` knows a model by its content, and says what it accepts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import edgeq
from edgeq.core.errors import EdgeqError, FormatError, UnsupportedError, UsageError
from edgeq.graph.files import read
from edgeq.graph.ir import Graph
from edgeq.importers import load, open_source, source_kind
from edgeq.importers.huggingface.config import read_config
from edgeq.importers.tokenizer.sentencepiece_model import tokenizer_files
from edgeq.model.model import Model
from edgeq.model.origin import Origin
from tests.conftest import need
from tests.families import quantized, random_model, tiny_config

ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2.5, 1e400, float("nan"), 10**30, "x", [], [1], {}, {"rope_type": 3},
)  # fmt: skip


def test_not_found(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"nowhere does not exist; give a Hugging Face folder"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty; give a Hugging Face folder .*GGUF.*edgeq artifact.*llama2.c"),
        (b"hello world, this is text", "starts with b'hello wo' and is no known format"),
        (b"\x80\x02.PK" + bytes(40), "is no known format"),
        (bytes(8), "is no known format"),
    ],
)
def test_unknown_files(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=words.replace("edgeq artifact", "an .edgeq artifact")):
        load(path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 134515008\n"
PAGE = b"\n<!DOCTYPE html>\n<html><title>Sign in</title></html>"
CONFIG = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "vocab_size": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("content", "words"), [(POINTER, "is a pointer of Git LFS"), (PAGE, "is a web page")]
)
@pytest.mark.parametrize(
    "name",
    ["m.gguf", "m.edgeq", "m.onnx", "m.tflite", "model.safetensors", "config.json",
     "generation_config.json", "tokenizer.model", "tokenizer.json"],
)  # fmt: skip
def test_files_that_were_not_really_fetched(
    name: str, content: bytes, words: str, tmp_path: Path
) -> None:
    of_folder = not name.startswith("m.")
    if of_folder:
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
        save_file({"model.norm.weight": np.ones(32, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / name).write_bytes(content)
    opens: dict[str, Callable[[], object]] = {
        "tokenizer.json": lambda: edgeq.Tokenizer({name: content}),
        "tokenizer.model": lambda: tokenizer_files(tmp_path / name),
    }
    source = tmp_path if of_folder else tmp_path / name
    with pytest.raises(FormatError, match=f"{name} {words}"):
        opens.get(name, lambda: open_source(source))()


@pytest.mark.parametrize(
    ("name", "words"),
    [("params.json", "Meta and Mistral"), ("model_index.json", "a pipeline for pictures"),
     ("modules.json", "sentence embeddings")],
)  # fmt: skip
def test_folders_of_other_kinds_are_named(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(UnsupportedError, match=words):
        load(tmp_path)


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"is a folder without config\.json; give"):
        load(tmp_path)
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    with pytest.raises(FormatError, match=r"but it holds small\.gguf; give"):
        load(tmp_path)


def test_a_bare_safetensors_file(tmp_path: Path) -> None:
    save_file({"w": np.zeros(3, np.float32)}, tmp_path / "w.safetensors")
    with pytest.raises(FormatError, match=r"bare safetensors file .* folder with its config\.json"):
        load(tmp_path / "w.safetensors")


def test_an_artifact_under_any_name(tmp_path: Path) -> None:
    model = quantized(random_model(tiny_config("llama")), "w4-g32")
    path = tmp_path / "model.bin"
    edgeq.save(model, path)
    got = edgeq.load(path)
    assert got.config == model.config
    for name, tensor in model.tensors.items():
        np.testing.assert_array_equal(got.tensors[name].numpy(), tensor.numpy())


def test_the_digest_of_an_origin(tmp_path: Path) -> None:
    one, two = tmp_path / "config.json", tmp_path / "model.safetensors"
    one.write_bytes(b"{}")
    two.write_bytes(b"abc")
    (tmp_path / "README.md").write_bytes(b"not of the model")
    sums = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (one, two)}
    lines = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    assert Origin(two).sha256 == sums["model.safetensors"]
    assert Origin(tmp_path).sha256 == hashlib.sha256(lines.encode()).hexdigest()
    with pytest.raises(FormatError, match="cannot be read: No such file"):
        _ = Origin(tmp_path / "nowhere").sha256


def test_a_model_knows_where_it_was_opened(tmp_path: Path) -> None:
    model = quantized(random_model(tiny_config("llama")), "w4-g32")
    assert model.origin is None
    path = tmp_path / "model.edgeq"
    edgeq.save(model, path)
    got = load(path)
    assert got.origin == Origin(path)
    assert got.origin is not None
    assert got.origin.name == "model.edgeq"
    assert got.origin.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    # its tensors may be others
    assert replace(got, tensors=model.tensors).origin is None


def test_sources_are_recognized_by_content(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    graph = tmp_path / "classifier"
    graph.write_bytes(small_onnx())
    assert source_kind(graph) == "graph"
    opened = open_source(graph)
    assert isinstance(opened, Graph)
    assert [node.op for node in opened.nodes] == ["Relu"]
    with pytest.raises(UnsupportedError, match="is a graph of operators, but this command needs"):
        load(graph)
    model = tmp_path / "model.onnx"
    edgeq.save(random_model(tiny_config("llama")), model)
    assert source_kind(model) == "model"
    assert isinstance(open_source(model), Model)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("absent.onnx", "graph"), ("absent.TFLITE", "graph"), ("absent.ort", "program"),
        ("absent.mlpackage", "program"), ("absent.gguf", "model"), ("absent", "model"),
    ],
)  # fmt: skip
def test_absent_sources_are_known_by_their_names(tmp_path: Path, name: str, kind: str) -> None:
    assert source_kind(tmp_path / name) == kind
    with pytest.raises(EdgeqError, match=r"exist|No such file"):
        open_source(tmp_path / name)


def test_real_sources() -> None:
    assert source_kind(need("models/stories260K")) == "model"


def test_damaged_graphs_are_named_by_their_reader(tmp_path: Path) -> None:
    for name in ("m.onnx", "m.tflite"):
        (tmp_path / name).write_bytes(b"no graph at all")
        assert source_kind(tmp_path / name) == "graph"
        with pytest.raises(FormatError, match=name):
            open_source(tmp_path / name)
    (tmp_path / "m.txt").write_bytes(b"no graph at all")
    with pytest.raises(UsageError, match="is not a graph; give an ONNX"):
        read(tmp_path / "m.txt")


def small_onnx() -> bytes:
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    opset = [helper.make_opsetid("", 17)]
    made: bytes = helper.make_model(graph, opset_imports=opset).SerializeToString()
    return made


def test_odd_values_in_a_config_never_crash(tmp_path: Path) -> None:
    original = json.loads((need("models/stories260K") / "config.json").read_text())
    path = tmp_path / "config.json"
    extra = ("rope_scaling", "rope_parameters", "sliding_window", "layer_types", "head_dim",
             "use_sliding_window", "max_window_layers", "query_pre_attn_scalar",
             "text_config", "attention_bias", "partial_rotary_factor")  # fmt: skip
    outcomes = {True: 0, False: 0}
    for family in ("llama", "qwen2", "gemma3_text"):
        for key in (*original, *extra):
            for value in ODD:
                config = original | {"model_type": family, "use_sliding_window": True, key: value}
                path.write_text(json.dumps(config))
                try:
                    read_config(tmp_path)
                    outcomes[True] += 1
                except EdgeqError:
                    outcomes[False] += 1
    assert min(outcomes.values()) > 50
