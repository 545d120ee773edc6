"""Files that were damaged: whatever constant the damage is in, validation names it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.converters import Options, target_named
from edgeq.converters.certificate import certificate_path
from edgeq.converters.validate import validate
from edgeq.converters.validate.constants import compare_constants
from edgeq.converters.validate.integers import compare_integers
from edgeq.core.errors import FormatError
from edgeq.core.hashing import file_sha256
from edgeq.importers.gguf.file import open_gguf
from edgeq.model.model import Model
from tests.families import quantized, random_model, tiny_config

PACKAGES = {"tflite": "ai_edge_litert", "ort": "onnx", "coreml": "coremltools", "gguf": "numpy"}
ENDINGS = {"tflite": ".tflite", "ort": ".onnx", "coreml": ".mlpackage", "gguf": ".gguf"}
DAMAGED = 64
"""Bytes."""

MODEL = quantized(
    random_model(
        tiny_config("qwen2", hidden=64, head_dim=16, ffn=96, context=128, vocab=160, tied=False)
    ),
    "w4-g32",
)
LLAMA3 = quantized(
    random_model(tiny_config("llama", hidden=64, head_dim=64, ffn=96, vocab=160)), "w4-g32"
)
"""With stretched rotary positions, which llama.cpp holds as a table of factors."""

Place = tuple[Path, int, int]
"""File, first byte, bytes."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Model], Path]:
    """A conversion, made once for each target and model."""
    done: dict[tuple[str, int], Path] = {}

    def make(target: str, model: Model) -> Path:
        pytest.importorskip(PACKAGES[target])
        key = target, id(model)
        if key not in done:
            out = tmp_path_factory.mktemp("made") / f"m{ENDINGS[target]}"
            module = target_named(target).decoder_target()
            module.check(model, Options())
            module.write(model, out, Options())
            done[key] = out
        return done[key]

    return make


def copied(path: Path, folder: Path) -> Path:
    for each in path.parent.iterdir():
        (shutil.copytree if each.is_dir() else shutil.copy)(each, folder / each.name)
    return folder / path.name


def places(target: str, path: Path) -> dict[str, Place]:
    """Where constants lie, by their names in the file."""
    if target == "gguf":
        file = open_gguf(path)
        return {
            name: (path, e.start, int(np.prod(e.shape[:-1])) * e.row_bytes)
            for name, e in file.tensors.items()
        }
    if target == "ort":
        import onnx

        graph = onnx.load(path, load_external_data=False).graph
        found: dict[str, Place] = {}
        for tensor in graph.initializer:
            where = {e.key: e.value for e in tensor.external_data}
            if where:
                file_ = path.parent / where["location"]
                found[tensor.name] = (file_, int(where["offset"]), int(where["length"]))
        return found
    if target == "tflite":
        from edgeq.converters.tflite.read import read

        header = read(path)
        raw = path.read_bytes()
        found = {}
        for tensor in header.model.subgraphs[-1].tensors:
            entry = header.model.buffers[tensor.buffer]
            data = header.bytes_of(tensor.buffer).tobytes()
            # a short constant lies in the flatbuffer, at the only place with its bytes
            if len(data) >= DAMAGED:
                start = entry.offset or raw.index(data)
                found[tensor.name.decode()] = (path, start, len(data))
        return found
    from edgeq.converters.coreml.run import DecoderPackage

    weights = path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    whole = weights.read_bytes()
    found = {}
    for op in DecoderPackage(path).functions["decode"].block.ops:
        for parameter, values in op.inputs.items():
            blob = getattr(values[0], "blob", None)
            if blob is not None and blob.raw.nbytes >= DAMAGED:
                start = whole.index(blob.raw.tobytes())
                found[f"{op.name}.{parameter}"] = (weights, start, blob.raw.nbytes)
    return found


def damage(place: Place, rng: random.Random) -> None:
    """Alter up to 64 bytes of a constant."""
    file, start, nbytes = place
    at = start + rng.randrange(max(1, nbytes - DAMAGED))
    data = np.memmap(file, np.uint8, "r+")
    part = data[at : min(at + DAMAGED, start + nbytes)]
    part ^= np.frombuffer(bytes(rng.randrange(1, 256) for _ in range(part.size)), np.uint8)
    data.flush()


def named(target: str, path: Path, model: Model) -> list[str]:
    """What is found to differ, without running anything."""
    module = target_named(target).decoder_target()
    _, faults = compare_integers(model, lambda: module.read_weights(path))
    _, more = compare_constants(model, module, path, [f.name for f in faults])
    return [fault.name for fault in faults + more]


KINDS = {
    "tflite": {
        "rope table": "decode/rope.global.sin",
        "norm": "decode/model.layers.1.input_layernorm.weight",
        "bias": "decode/model.layers.0.self_attn.q_proj.bias",
        "scales": "decode/model.layers.1.mlp.up_proj.weight.scales",
        "embedding": "decode/model.embed_tokens.weight",
        "head": "decode/lm_head.weight",
    },
    "ort": {
        "rope table": "cos.global",
        "norm": "model.layers.1.input_layernorm.weight",
        "bias": "model.layers.0.self_attn.q_proj.bias",
        "scales": "model.layers.1.mlp.up_proj.weight.scales",
        "embedding": "model.embed_tokens.weight.codes",
        "head": "lm_head.weight.codes",
    },
    "coreml": {
        "rope table": "sin_global.val",
        "scales": "model_layers_1_mlp_up_proj_weight.scale",
        "embedding": "model_embed_tokens_weight.data",
        "head": "lm_head_weight.data",
    },
    "gguf": {
        "norm": "blk.1.attn_norm.weight",
        "bias": "blk.0.attn_q.bias",
        "scales and codes": "blk.1.ffn_up.weight",
        "embedding": "token_embd.weight",
        "head": "output.weight",
    },
}
"""Of each format: kind of constant -> one of it, by its name in the file."""


@pytest.mark.parametrize(
    ("target", "kind"), [(target, kind) for target, kinds in KINDS.items() for kind in kinds]
)
def test_damage_is_named_whatever_the_constant(
    target: str, kind: str, made: Any, tmp_path: Path
) -> None:
    path = copied(made(target, MODEL), tmp_path)
    assert named(target, path, MODEL) == [], "a right file"
    name = KINDS[target][kind]
    damage(places(target, path)[name], random.Random(1))
    plain = name.removeprefix("decode/").removesuffix(".val")
    ours = plain.removesuffix(".codes").removesuffix(".scales")
    underscored = plain.removesuffix(".data").removesuffix(".scale")
    found = named(target, path, MODEL)
    gguf = {"blk.1.ffn_up.weight": "model.layers.1.mlp.up_proj.weight",
            "token_embd.weight": "model.embed_tokens.weight",
            "output.weight": "lm_head.weight"}  # fmt: skip
    wanted = gguf.get(name, ours)
    assert found, "the damage was not found"
    assert all(wanted in f or underscored in f.replace(".", "_") for f in found), found
    report = validate(path, MODEL, target, threads=1, steps=2)
    assert not report.passed
    assert found[0] in report.explain()


def test_the_factors_of_stretched_positions_are_compared(made: Any, tmp_path: Path) -> None:
    path = copied(made("gguf", LLAMA3), tmp_path)
    assert named("gguf", path, LLAMA3) == []
    damage(places("gguf", path)["rope_freqs.weight"], random.Random(3))
    assert named("gguf", path, LLAMA3) == ["rope_freqs.weight"]


@pytest.mark.slow
@pytest.mark.parametrize("target", list(ENDINGS))
def test_damage_anywhere_in_the_constants_is_found(target: str, made: Any, tmp_path: Path) -> None:
    """At random places, each constant as likely as its bytes."""
    right = made(target, MODEL)
    rng = random.Random(11)
    for i in range(12):
        (tmp_path / str(i)).mkdir()
        path = copied(right, tmp_path / str(i))
        found = places(target, path)
        name = rng.choices(list(found), [n for _, _, n in found.values()])[0]
        damage(found[name], rng)
        assert named(target, path, MODEL), f"damage in {name} was not found"


def test_the_scales_of_an_int8_cache_are_checked(tmp_path: Path) -> None:
    """They were measured when the file was made, and no new conversion gives them."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    module, path = target_named("ort").decoder_target(), tmp_path / "m.onnx"
    module.write(MODEL, path, Options(kv="int8", extra={"calibration": list(range(40))}))
    assert named("ort", path, MODEL) == []
    proto = onnx.load(path, load_external_data=False)
    name = "past_key_values.1.value.scale"
    scales = next(t for t in proto.graph.initializer if t.name == name)
    scales.raw_data = scales.raw_data[:4] + scales.raw_data[:-4]
    onnx.save(proto, path)
    with pytest.raises(FormatError, match="the scales of the int8 cache are not those"):
        validate(path, MODEL, "ort", threads=1, steps=2)


def test_a_file_that_the_certificate_does_not_describe_is_reported(
    made: Any, tmp_path: Path
) -> None:
    path = copied(made("gguf", MODEL), tmp_path)
    place = certificate_path(path, folder=False)
    entry = {"nbytes": path.stat().st_size, "sha256": file_sha256(path)}
    place.write_text(json.dumps({"files": {path.name: entry}}))
    assert validate(path, MODEL, "gguf", threads=1, steps=2).passed
    # the name of the model is no constant, and no other comparison sees it
    raw = path.read_bytes()
    key = b"general.name"
    at = raw.index(key) + len(key) + 4 + 8
    path.write_bytes(raw[:at] + b"#" + raw[at + 1 :])
    report = validate(path, MODEL, "gguf", threads=1, steps=2)
    assert [f.name for f in report.decoder.tensor_faults] == [path.name]
    assert "is not the file that m.gguf.certificate.json was made for" in report.explain()
    place.write_text("{")
    assert "cannot be read" in validate(path, MODEL, "gguf", threads=1, steps=2).explain()


def test_tensor_names_are_unique_across_all_graphs(made: Any) -> None:
    from edgeq.converters.tflite.read import read

    for model in (MODEL, LLAMA3):
        header = read(made("tflite", model))
        names = [t.name for graph in header.model.subgraphs for t in graph.tensors]
        assert len(set(names)) == len(names)
        assert len(header.model.subgraphs) > 1


def test_other_tools_read_the_names(made: Any) -> None:
    """LiteRT's own list of a graph's tensors has each name once, the constants' among them."""
    from ai_edge_litert.interpreter import Interpreter

    details = Interpreter(model_path=str(made("tflite", LLAMA3))).get_tensor_details()
    names = [entry["name"] for entry in details if entry["name"]]
    assert len(set(names)) == len(names)
    assert any(name.endswith("model.layers.0.mlp.up_proj.weight") for name in names)
