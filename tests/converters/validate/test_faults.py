"""Faults planted in real files of real targets: each is found and named."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.converters import Options, target_named
from edgeq.converters.gguf.bytes import BLOCK_BYTES, pack_blocks, unpack_blocks
from edgeq.converters.validate import decoder as validation
from edgeq.converters.validate import validate
from edgeq.converters.validate.report import ValidationReport
from edgeq.importers.gguf.file import open_gguf
from edgeq.model.model import Model
from tests.families import quantized, random_model, tiny_config

SHAPE: dict[str, Any] = {"hidden": 64, "head_dim": 16, "ffn": 96, "context": 128}


def tiny(family: str, **over: Any) -> Model:
    return quantized(random_model(tiny_config(family, **(SHAPE | over))), "w4-g32")


QWEN, QWEN3 = tiny("qwen2", layers=3), tiny("qwen3", heads=4, layers=3)
PLAIN = tiny("llama", rope_scaling=None, norm_eps=0.05, layers=3)
UNTIED = tiny("mistral", window=None, vocab=96)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A converted model, made once; each test plants in a copy."""
    folder = tmp_path_factory.mktemp("converted")
    made: dict[tuple[int, str], Path] = {}

    def convert(model: Model, target: str, out: Path, options: Options | None = None) -> Path:
        key = (id(model), target)
        if key not in made:
            room = folder / f"{len(made)}"
            room.mkdir()
            module = target_named(target).decoder_target()
            module.check(model, options or Options())
            module.write(model, room / out.name, options or Options())
            made[key] = room
        shutil.copytree(made[key], out.parent, dirs_exist_ok=True)
        return out

    return convert


def found(model: Model, target: str, path: Path) -> ValidationReport:
    """What validation finds."""
    report = validate(path, model, target, threads=1, steps=4)
    assert not report.passed, "the fault was not found"
    assert report.explain()
    return report


def found_by_steps(model: Model, target: str, path: Path) -> ValidationReport:
    """What it finds by running the file, were its operators not compared before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "compare_constants", lambda *args: (0, []))
        by_steps = found(model, target, path)
    report = found(model, target, path)
    assert report.runtime == "", "a graph that differs is not run"
    return by_steps


def names_tensor(report: ValidationReport, name: str, words: str) -> None:
    assert report.decoder.tensor_faults[0].name == name, report.explain()
    assert words in str(report.decoder.tensor_faults[0])
    assert not report.integers[name]


def names_step(report: ValidationReport, step: str, words: str = "") -> None:
    assert not report.decoder.tensor_faults, report.explain()
    assert report.decoder.divergence is not None, report.explain()
    assert report.decoder.divergence.step == step, report.explain()
    assert words in str(report.decoder.divergence)


# --- GGUF: bytes of the file ------------------------------------------------------------------


class Edited:
    """A GGUF file whose bytes are changed in place."""

    def __init__(self, path: Path) -> None:
        file = open_gguf(path)
        self.entries = dict(file.tensors)
        self.data = np.memmap(path, np.uint8, "r+")

    def rows(self, name: str) -> NDArray[np.uint8]:
        entry = self.entries[name]
        size = entry.shape[0] * entry.row_bytes if len(entry.shape) == 2 else entry.row_bytes
        return self.data[entry.start : entry.start + size].reshape(-1, entry.row_bytes)

    def blocks(self, name: str) -> NDArray[np.uint8]:
        kind = self.entries[name].type
        return self.rows(name).reshape(self.entries[name].shape[0], -1, BLOCK_BYTES[kind])

    def number(self, key: str, value: float) -> None:
        """A float of the metadata."""
        raw = bytes(self.data[: 1 << 16])
        at = raw.index(struct.pack("<Q", len(key)) + key.encode()) + 8 + len(key)
        assert raw[at : at + 4] == struct.pack("<I", 6)
        self.data[at + 4 : at + 8] = np.frombuffer(struct.pack("<f", value), np.uint8)


def swapped_nibbles(file: Edited) -> None:
    codes = file.blocks("blk.1.ffn_up.weight")[..., 2:]
    codes[:] = (codes >> 4) | (codes << 4)


def shifted_scale(file: Edited) -> None:
    scales = file.blocks("blk.0.attn_q.weight")[..., :2]
    scales[:] = np.roll(scales, 1, axis=1)


def doubled_scale(file: Edited) -> None:
    scale = file.blocks("blk.2.attn_v.weight")[5, 1, :2]
    scale[:] = (scale.view(np.float16) * 2).view(np.uint8)


def exchanged_gate_and_up(file: Edited) -> None:
    gate, up = file.rows("blk.1.ffn_gate.weight"), file.rows("blk.1.ffn_up.weight")
    kept = gate.copy()
    gate[:] = up
    up[:] = kept


def transposed_matrix(file: Edited) -> None:
    rows = file.rows("blk.0.attn_output.weight")
    levels, scales, _ = unpack_blocks("Q4_0", rows)
    rows[:] = pack_blocks("Q4_0", np.ascontiguousarray(levels.T), scales)


def wrong_head(file: Edited) -> None:
    file.rows("output.weight")[:] = file.rows("token_embd.weight")


def wrong_rope_base(file: Edited) -> None:
    file.number("qwen2.rope.freq_base", 10000.0)


def wrong_epsilon(file: Edited) -> None:
    file.number("llama.attention.layer_norm_rms_epsilon", 1e-5)


def missing_bias(file: Edited) -> None:
    file.rows("blk.1.attn_k.bias")[:] = 0


def another_norm(file: Edited) -> None:
    file.rows("blk.2.ffn_norm.weight")[:] = file.rows("blk.2.attn_norm.weight")


@dataclass(frozen=True)
class Planted:
    model: Model
    plant: Callable[[Any], None]
    name: str
    words: str

    def __repr__(self) -> str:
        return self.plant.__name__


LAYER = "model.layers.{}.{}.weight".format
GGUF_TENSORS = [
    Planted(QWEN, swapped_nibbles, LAYER(1, "mlp.up_proj"), "nibbles of each byte are exchanged"),
    Planted(QWEN, shifted_scale, LAYER(0, "self_attn.q_proj"), "shifted by one group"),
    Planted(QWEN, doubled_scale, LAYER(2, "self_attn.v_proj"), "row 5, group 1: 1 of 64 scales"),
    Planted(
        QWEN, exchanged_gate_and_up, LAYER(1, "mlp.gate_proj"),
        "holds the integers of model.layers.1.mlp.up_proj.weight",
    ),
    Planted(PLAIN, transposed_matrix, LAYER(0, "self_attn.o_proj"), "the matrix is transposed"),
    Planted(
        UNTIED, wrong_head, "lm_head.weight", "holds the integers of model.embed_tokens.weight"
    ),
]  # fmt: skip
GGUF_CONSTANTS = [
    Planted(QWEN, wrong_rope_base, "qwen2.rope.freq_base", "10000.0 in the file, 1000000.0 in"),
    Planted(PLAIN, wrong_epsilon, "llama.attention.layer_norm_rms_epsilon", "in the source"),
    Planted(QWEN, missing_bias, "blk.1.attn_k.bias", "of 32 values differ, the first at [0]"),
    Planted(QWEN3, another_norm, "blk.2.ffn_norm.weight", "of 64 values differ"),
]


def gguf(converted: Callable[..., Path], fault: Planted, folder: Path) -> ValidationReport:
    out = converted(fault.model, "gguf", folder / "m.gguf")
    fault.plant(Edited(out))
    return found(fault.model, "gguf", out)


@pytest.mark.parametrize("fault", GGUF_TENSORS, ids=repr)
def test_gguf_tensors(converted: Any, fault: Planted, tmp_path: Path) -> None:
    names_tensor(gguf(converted, fault, tmp_path), fault.name, fault.words)


@pytest.mark.parametrize("fault", GGUF_CONSTANTS, ids=repr)
def test_gguf_constants(converted: Any, fault: Planted, tmp_path: Path) -> None:
    report = gguf(converted, fault, tmp_path)
    assert [f.name for f in report.decoder.tensor_faults] == [fault.name]
    assert fault.words in report.explain()


# --- ONNX: nodes of the graph -----------------------------------------------------------------


def node(graph: Any, output: str) -> Any:
    return next(n for n in graph.node if output in n.output)


def attribute(graph: Any, output: str, name: str) -> Any:
    return next(a for a in node(graph, output).attribute if a.name == name)


def onnx_dropped_cache(graph: Any) -> None:
    """Layer 2 reads the cache of layer 1."""
    inputs = node(graph, "layers.2.mix").input
    inputs[3], inputs[4] = "past_key_values.1.key", "past_key_values.1.value"


def onnx_attention_scale(graph: Any) -> None:
    attribute(graph, "layers.1.mix", "scale").f *= 1.5


def onnx_epsilon(graph: Any) -> None:
    attribute(graph, "layers.1.mlp_norm", "epsilon").f = 1e-6


def onnx_no_rotation(graph: Any) -> None:
    node(graph, "layers.2.mix").input[1] = node(graph, "layers.2.k_rope").input[0]


def onnx_exchanged_rotation(graph: Any) -> None:
    inputs = node(graph, "layers.0.k_rope").input
    inputs[2], inputs[3] = inputs[3], inputs[2]


def onnx_exchanged_gate_and_up(graph: Any) -> None:
    gate, up = node(graph, "layers.0.gate"), node(graph, "layers.0.up")
    gate.output[0], up.output[0] = up.output[0], gate.output[0]


def onnx_dropped_residual(graph: Any) -> None:
    inputs = node(graph, "layers.1.out").input
    inputs[0] = inputs[1]


def onnx_another_norm(graph: Any) -> None:
    node(graph, "final_norm").input[1] = "model.layers.0.input_layernorm.weight"


ONNX_STEPS = [
    Planted(QWEN, onnx_dropped_cache, "layers.2.mix", "in a decoding step"),
    Planted(PLAIN, onnx_attention_scale, "layers.1.mix", "attention"),
    Planted(PLAIN, onnx_epsilon, "layers.1.mlp_norm", "norm before the feed-forward in layer 1"),
    Planted(PLAIN, onnx_no_rotation, "layers.2.mix", ""),
    Planted(PLAIN, onnx_exchanged_rotation, "layers.0.k_rope", "positions of the keys in layer 0"),
    Planted(PLAIN, onnx_exchanged_gate_and_up, "layers.0.gate", "the gate projection in layer 0"),
    Planted(QWEN, onnx_dropped_residual, "layers.1.out", "sum after the feed-forward in layer 1"),
    Planted(QWEN, onnx_another_norm, "final_norm", "the last norm"),
]


@pytest.mark.parametrize("compute", ["float", "int8"])
@pytest.mark.parametrize("fault", ONNX_STEPS, ids=repr)
def test_onnx_steps(fault: Planted, compute: Any, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    out = tmp_path / "m.onnx"
    module = target_named("ort").decoder_target()
    module.write(fault.model, out, Options(compute=compute))
    graph = onnx.load(out, load_external_data=False)
    fault.plant(graph.graph)
    onnx.save(graph, out)
    names_step(found_by_steps(fault.model, "ort", out), fault.name, fault.words)


def test_onnx_tensors(converted: Any, tmp_path: Path) -> None:
    """Neighboring nibbles of one matrix exchanged, in the data file."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    out = converted(PLAIN, "ort", tmp_path / "m.onnx")
    graph = onnx.load(out, load_external_data=False).graph
    name = LAYER(2, "mlp.down_proj")
    codes = next(i for i in graph.initializer if i.name == f"{name}.codes")
    where = {entry.key: entry.value for entry in codes.external_data}
    data = np.memmap(tmp_path / where["location"], np.uint8, "r+")
    part = data[int(where["offset"]) : int(where["offset"]) + int(where["length"])]
    part[:] = (part >> 4) | (part << 4)
    names_tensor(found(PLAIN, "ort", out), name, "the two nibbles of each byte are exchanged")


# --- TFLite: operators of one signature, in place ---------------------------------------------


class Flat:
    """A .tflite file whose operators' inputs are changed in place."""

    def __init__(self, path: Path, signature: str) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self.path, self.raw = path, bytearray(path.read_bytes())
        model = schema.Model.GetRootAs(self.raw, 0)
        signatures = [model.SignatureDefs(i) for i in range(model.SignatureDefsLength())]
        where = next(s for s in signatures if s.SignatureKey() == signature.encode())
        self.graph = model.Subgraphs(where.SubgraphIndex())
        names = [self.graph.Tensors(i).Name() for i in range(self.graph.TensorsLength())]
        self.index = {name.decode().rpartition("/")[2]: i for i, name in enumerate(names)}
        self.makers: dict[int, NDArray[np.int32]] = {}
        self.users: dict[int, list[NDArray[np.int32]]] = {}
        for i in range(self.graph.OperatorsLength()):
            op = self.graph.Operators(i)
            inputs = op.InputsAsNumpy()
            for output in op.OutputsAsNumpy():
                self.makers[int(output)] = inputs
            for used in inputs:
                self.users.setdefault(int(used), []).append(inputs)

    def made_from(self, name: str) -> NDArray[np.int32]:
        """Inputs of the operator that makes a tensor."""
        return self.makers[self.index[name]]

    def replace(self, old: str, new: str) -> None:
        """Whoever reads one tensor reads another."""
        for inputs in self.users[self.index[old]]:
            inputs[inputs == self.index[old]] = self.index[new]

    def save(self) -> None:
        self.path.write_bytes(self.raw)


def tflite_dropped_cache(file: Flat) -> None:
    file.replace("kv_cache_k_1_out", "kv_cache_k_0_out")


def tflite_old_cache(file: Flat) -> None:
    """Layer 1 attends to values that lack the new position's."""
    file.replace("kv_cache_v_1_out", "kv_cache_v_1")


def tflite_exchanged_gate_and_up(file: Flat) -> None:
    gate, up = file.made_from("layers.1.gate"), file.made_from("layers.1.up")
    gate[1], up[1] = int(up[1]), int(gate[1])


def tflite_dropped_residual(file: Flat) -> None:
    inputs = file.made_from("layers.0.attn_out")
    inputs[0] = inputs[1]


def tflite_another_norm(file: Flat) -> None:
    file.made_from("layers.1.mlp_norm")[1] = file.made_from("layers.0.attn_norm")[1]


def tflite_no_rotation(file: Flat) -> None:
    inputs = file.made_from("layers.2.k_rope")
    inputs[1] = inputs[0]


TFLITE_STEPS = [
    Planted(PLAIN, tflite_dropped_cache, "layers.1.mix", "attention"),
    Planted(PLAIN, tflite_old_cache, "layers.1.mix", "attention"),
    Planted(PLAIN, tflite_exchanged_gate_and_up, "layers.1.gate", "the gate projection in layer 1"),
    Planted(PLAIN, tflite_dropped_residual, "layers.0.attn_out", "sum after attention in layer 0"),
    Planted(PLAIN, tflite_another_norm, "layers.1.mlp_norm", "norm before the feed-forward"),
    Planted(PLAIN, tflite_no_rotation, "layers.2.k_rope", "rotary positions of the keys"),
]


@pytest.mark.parametrize("signature", ["decode", "prefill_16"])
@pytest.mark.parametrize("fault", TFLITE_STEPS, ids=repr)
def test_tflite_steps(converted: Any, fault: Planted, signature: str, tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    options = Options(compute="float", prefill=(16,))
    out = converted(fault.model, "tflite", tmp_path / "m.tflite", options)
    file = Flat(out, signature)
    fault.plant(file)
    file.save()
    names_step(found_by_steps(fault.model, "tflite", out), fault.name, fault.words)


# --- Core ML: operations of one function ------------------------------------------------------


class Program:
    """An .mlpackage whose program's operations are changed."""

    def __init__(self, package: Path, function: str) -> None:
        from coremltools.proto import Model_pb2

        self.path = next(package.rglob("model.mlmodel"))
        self.model = Model_pb2.Model()
        self.model.ParseFromString(self.path.read_bytes())
        block = next(iter(self.model.mlProgram.functions[function].block_specializations.values()))
        self.ops = list(block.operations)
        names = ((output.name.replace(".", "_"), op) for op in self.ops for output in op.outputs)
        self.makers = dict(names)

    def made(self, name: str) -> Any:
        """The operation that makes a result."""
        return self.makers[name.replace(".", "_")]

    def argument(self, op: Any, name: str) -> Any:
        return op.inputs[name].arguments[0]

    def save(self) -> None:
        self.path.write_bytes(self.model.SerializeToString())


def coreml_dropped_cache(file: Program) -> None:
    """The update of layer 1's keys forgets that of layer 0, as a compiler may do."""
    updates = [op for op in file.ops if op.type == "slice_update"]
    file.argument(updates[2], "x").name = file.argument(updates[0], "x").name


def coreml_exchanged_gate_and_up(file: Program) -> None:
    gate, up = (file.made(f"layers.1.{name}").outputs[0] for name in ("gate", "up"))
    gate.name, up.name = up.name, gate.name


def coreml_dropped_residual(file: Program) -> None:
    op = file.made("layers.1.attn_out")
    file.argument(op, "x").name = file.argument(op, "y").name


def coreml_another_norm(file: Program) -> None:
    ours, other = file.made("layers.2.attn_norm"), file.made("layers.0.attn_norm")
    file.argument(ours, "y").name = file.argument(other, "y").name


def coreml_attention_scale(file: Program) -> None:
    """Queries go to attention twice as long."""
    attention = [op for op in file.ops if op.type == "scaled_dot_product_attention"]
    file.argument(attention[1], "query").name = file.argument(attention[0], "query").name


COREML_STEPS = [
    Planted(PLAIN, coreml_dropped_cache, "layers.0.mix", "attention"),
    Planted(PLAIN, coreml_exchanged_gate_and_up, "layers.1.gate", "the gate projection in layer 1"),
    Planted(PLAIN, coreml_dropped_residual, "layers.1.attn_out", "the sum after attention"),
    Planted(PLAIN, coreml_another_norm, "layers.2.attn_norm", "the norm before attention"),
    Planted(PLAIN, coreml_attention_scale, "layers.1.mix", "attention"),
]


@pytest.mark.parametrize("fault", COREML_STEPS, ids=repr)
def test_coreml_steps(converted: Any, fault: Planted, tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    out = converted(fault.model, "coreml", tmp_path / "m.mlpackage")
    file = Program(out, "decode")
    fault.plant(file)
    file.save()
    names_step(found_by_steps(fault.model, "coreml", out), fault.name, fault.words)
