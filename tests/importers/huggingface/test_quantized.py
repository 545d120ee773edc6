"""Integers of quantized Hugging Face folders, bit for bit as the layouts store them.

The arrays are packed here by an independent reading of the published layouts, one field at a time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import edgeq
from edgeq.core.errors import EdgeqError, FormatError, UnsupportedError
from edgeq.formats.kept import KeptTensor
from edgeq.importers.huggingface.importer import load
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from edgeq.runtime.engine import Engine

HIDDEN, FFN, VOCAB = 64, 128, 96
SHAPES = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64), "mlp.gate_proj": (FFN, 64), "mlp.up_proj": (FFN, 64),
    "mlp.down_proj": (64, FFN),
}  # fmt: skip
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN,
    "intermediate_size": FFN, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
GROUP = 32


def stream(fields: Any, bits: int) -> Any:
    """Rows of fields -> rows of 32-bit words, one Python integer at a time."""
    rows = []
    for row in np.asarray(fields).tolist():
        whole = sum(value << (i * bits) for i, value in enumerate(row))
        words = -(-len(row) * bits // 32)
        rows.append([(whole >> (32 * i)) & 0xFFFFFFFF for i in range(words)])
    return np.array(rows, np.uint32)


def awq_words(fields: Any) -> Any:
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    fields = np.asarray(fields).reshape(len(fields), -1, 8)
    return stream(fields[:, :, order].reshape(len(fields), -1), 4).view(np.int32)


class Source:
    """Random integers of every matrix of the tiny model, and what they stand for."""

    def __init__(self, bits: int, *, symmetric: bool) -> None:
        rng = np.random.default_rng(bits)
        self.codes, self.scales, self.zeros = {}, {}, {}
        for end, (n, k) in SHAPES.items():
            name = f"model.layers.0.{end}"
            self.codes[name] = rng.integers(0, 1 << bits, (n, k))
            self.scales[name] = rng.uniform(0.001, 0.02, (n, k // GROUP)).astype(np.float16)
            mid = np.full((n, k // GROUP), 1 << (bits - 1))
            zeros = rng.integers(1, (1 << bits) - 1, mid.shape)
            self.zeros[name] = mid if symmetric else zeros

    def values(self, name: str) -> Any:
        wide = self.codes[name] - np.repeat(self.zeros[name], GROUP, axis=1)
        scales = np.repeat(self.scales[name].astype(np.float32), GROUP, axis=1)
        return wide.astype(np.float32) * scales


def write(folder: Path, tensors: dict[str, Any], **settings: Any) -> Path:
    rng = np.random.default_rng(0)
    floats = {
        "model.embed_tokens.weight": rng.normal(size=(VOCAB, HIDDEN)).astype(np.float16),
        "lm_head.weight": rng.normal(size=(VOCAB, HIDDEN)).astype(np.float16),
        "model.norm.weight": np.ones(HIDDEN, np.float16),
        "model.layers.0.input_layernorm.weight": np.ones(HIDDEN, np.float16),
        "model.layers.0.post_attention_layernorm.weight": np.ones(HIDDEN, np.float16),
    }
    folder.mkdir(exist_ok=True)
    whole = {name: np.ascontiguousarray(array) for name, array in (floats | tensors).items()}
    save_file(whole, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(CONFIG | settings))
    return folder


def gptq(source: Source, bits: int, *, first: bool) -> dict[str, Any]:
    out = {}
    for name, codes in source.codes.items():
        k = codes.shape[1]
        out[f"{name}.qweight"] = stream(codes, bits).T.view(np.int32)
        out[f"{name}.qzeros"] = stream(source.zeros[name].T - int(first), bits).view(np.int32)
        out[f"{name}.scales"] = source.scales[name].T
        out[f"{name}.g_idx"] = (np.arange(k) // GROUP).astype(np.int32)
    return out


def gptq_settings(bits: int, symmetric: bool, form: str) -> dict[str, Any]:
    return {
        "quant_method": "gptq", "bits": bits, "group_size": GROUP, "sym": symmetric,
        "desc_act": False, "checkpoint_format": form,
    }  # fmt: skip


def check_engine(model: Model) -> None:
    """The engine computes with the integers: near the dequantized weights, whatever the threads."""
    tokens = [1, 5, 90, 33, 2, 7]
    want = Reference(model).forward(np.array(tokens))[-1]
    outputs = []
    for threads in (1, 2):
        with Engine(model, context=32, threads=threads, kv_bits=16) as engine:
            outputs.append(np.array(engine.forward(tokens)).reshape(-1))
    np.testing.assert_array_equal(*outputs)
    assert np.abs(outputs[0] - want).max() < 0.03 * np.abs(want).max()


def check(folder: Path, source: Source) -> None:
    model = load(folder)
    check_engine(model)
    for name, codes in source.codes.items():
        tensor = model.tensors[f"{name}.weight"]
        assert isinstance(tensor, KeptTensor)
        packed = tensor.quantized(0, codes.shape[0])
        np.testing.assert_array_equal(packed.codes(), codes)
        scales, zeros = packed.row_params()
        groups = source.scales[name].shape[1]
        np.testing.assert_array_equal(scales[:, :groups], source.scales[name])
        np.testing.assert_array_equal(zeros[:, :groups], source.zeros[name])
        np.testing.assert_array_equal(tensor.numpy(), source.values(name))
        np.testing.assert_array_equal(tensor.rows(5, 23), source.values(name)[5:23])


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(tmp_path: Path, bits: int, symmetric: bool, form: str) -> None:
    source = Source(bits, symmetric=symmetric)
    settings = gptq_settings(bits, symmetric, form)
    tensors = gptq(source, bits, first=form == "gptq")
    check(write(tmp_path / "m", tensors, quantization_config=settings), source)


def test_awq(tmp_path: Path) -> None:
    source = Source(4, symmetric=False)
    tensors = {}
    for name, codes in source.codes.items():
        tensors[f"{name}.qweight"] = awq_words(codes.T)
        tensors[f"{name}.qzeros"] = awq_words(source.zeros[name].T)
        tensors[f"{name}.scales"] = source.scales[name].T
    settings = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}
    check(write(tmp_path / "m", tensors, quantization_config=settings), source)


@pytest.mark.parametrize("packing", ["auto_round:auto_gptq", "auto_round"])
def test_auto_round(tmp_path: Path, packing: str) -> None:
    source = Source(4, symmetric=True)
    settings = {
        "quant_method": "auto-round", "bits": 4, "group_size": GROUP, "sym": True, "iters": 200,
        "data_type": "int", "packing_format": packing, "autoround_version": "0.16.1",
    }  # fmt: skip
    tensors = gptq(source, 4, first="gptq" in packing)
    check(write(tmp_path / "m", tensors, quantization_config=settings), source)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("form", "bits"), [("pack-quantized", 4), ("pack-quantized", 8),
                                            ("int-quantized", 8)])  # fmt: skip
def test_compressed_tensors(tmp_path: Path, form: str, bits: int, symmetric: bool) -> None:
    source = Source(bits, symmetric=symmetric)
    tensors: dict[str, Any] = {}
    for name, codes in source.codes.items():
        mid = 1 << (bits - 1)
        tensors[f"{name}.weight_scale"] = source.scales[name]
        if form == "pack-quantized":
            tensors[f"{name}.weight_packed"] = stream(codes, bits).view(np.int32)
            tensors[f"{name}.weight_shape"] = np.array(codes.shape, np.int64)
            zeros = stream(source.zeros[name].T, bits).T.view(np.int32)
        else:
            tensors[f"{name}.weight"] = (codes - mid).astype(np.int8)
            zeros = (source.zeros[name] - mid).astype(np.int8)
        if not symmetric:
            tensors[f"{name}.weight_zero_point"] = zeros
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group",
               "group_size": GROUP}  # fmt: skip
    settings = {
        "quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip
    check(write(tmp_path / "m", tensors, quantization_config=settings), source)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_mlx(tmp_path: Path, bits: int) -> None:
    source = Source(bits, symmetric=True)
    rng = np.random.default_rng(1)
    tensors, biases = {}, {}
    for name, codes in source.codes.items():
        biases[name] = rng.uniform(-0.1, 0.1, source.scales[name].shape).astype(np.float16)
        tensors[f"{name}.weight"] = stream(codes, bits)
        tensors[f"{name}.scales"] = source.scales[name]
        tensors[f"{name}.biases"] = biases[name]
    settings = {"bits": bits, "group_size": GROUP}
    model = load(write(tmp_path / "m", tensors, quantization=settings))
    check_engine(model)
    for name, codes in source.codes.items():
        tensor = model.tensors[f"{name}.weight"]
        assert isinstance(tensor, KeptTensor)
        packed = tensor.quantized(0, codes.shape[0])
        np.testing.assert_array_equal(packed.codes(), codes)
        groups = biases[name].shape[1]
        np.testing.assert_array_equal(packed.row_minimums()[:, :groups], biases[name])


def folder_of(folder: Path, layout: str, **more: Any) -> Path:
    """A small checkpoint in a layout, with further tensors."""
    source = Source(4, symmetric=layout != "awq")
    tensors: dict[str, Any] = {}
    settings: dict[str, Any] = {"quant_method": layout, "bits": 4, "group_size": GROUP}
    if layout == "gptq":
        tensors, settings = gptq(source, 4, first=True), gptq_settings(4, True, "gptq")
    for name, codes in source.codes.items():
        if layout == "awq":
            tensors[f"{name}.qweight"] = awq_words(codes.T)
            tensors[f"{name}.qzeros"] = awq_words(source.zeros[name].T)
            tensors[f"{name}.scales"] = source.scales[name].T
        elif layout == "mlx":
            tensors[f"{name}.weight"] = stream(codes, 4)
            tensors[f"{name}.scales"] = source.scales[name]
            tensors[f"{name}.biases"] = source.scales[name]
        elif layout == "compressed-tensors":
            tensors[f"{name}.weight_scale"] = source.scales[name]
            tensors[f"{name}.weight_packed"] = stream(codes, 4).view(np.int32)
            tensors[f"{name}.weight_shape"] = np.array(codes.shape, np.int64)
    if layout == "mlx":
        return write(folder, tensors | more, quantization={"bits": 4, "group_size": GROUP})
    if layout == "compressed-tensors":
        weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
        settings = {"quant_method": layout, "format": "pack-quantized", "config_groups":
                    {"group_0": {"targets": ["Linear"], "weights": weights}}}  # fmt: skip
    return write(folder, tensors | more, quantization_config=settings)


DOWN = "model.layers.0.mlp.down_proj"
LAYOUTS = ["gptq", "awq", "mlx", "compressed-tensors"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name",
    [
        f"{DOWN}.bias", f"{DOWN}.lora_A.weight", f"{DOWN}.input_scale", f"{DOWN}.pre_quant_scale",
        f"{DOWN}.perm", f"{DOWN}.weight_scale_2", f"{DOWN}.scale_shift", f"{DOWN}.smooth_scale",
        "model.layers.0.self_attn.k_scale", "model.layers.0.self_attn.kv_cache_scaling_factor",
        "model.layers.0.self_attn.q_norm.weight", "model.layers.1.mlp.down_proj.qweight",
        "lm_head.qweight_extra", "model.rotation",
    ],
)  # fmt: skip
def test_tensors_beside_the_layout_are_named(tmp_path: Path, layout: str, name: str) -> None:
    folder = folder_of(tmp_path / "m", layout, **{name: np.ones(64, np.float16)})
    with pytest.raises(UnsupportedError, match=f"holds 1 tensors .* does not use: {name}"):
        load(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_float_matrix_beside_its_integers_is_named(tmp_path: Path, layout: str) -> None:
    wanted = f"{DOWN}.weight"
    if layout == "mlx":  # there the integers have that name
        wanted = f"{DOWN}.qweight"
    folder = folder_of(tmp_path / "m", layout, **{wanted: np.ones((64, FFN), np.float16)})
    with pytest.raises(UnsupportedError, match=f"does not use: {wanted}"):
        load(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_biases_of_zeros_add_nothing(tmp_path: Path, layout: str) -> None:
    """AutoGPTQ writes one beside every matrix."""
    zeros = {f"model.layers.0.{e}.bias": np.zeros(n, np.float16) for e, (n, _) in SHAPES.items()}
    plain = load(folder_of(tmp_path / "plain", layout))
    biased = load(folder_of(tmp_path / "biased", layout, **zeros))
    assert plain.tensors.keys() == biased.tensors.keys()
    for name, tensor in plain.tensors.items():
        np.testing.assert_array_equal(tensor.numpy(), biased.tensors[name].numpy())


def test_settings_in_a_file_of_their_own_are_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", "gptq")
    config = json.loads((folder / "config.json").read_text())
    own = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"are quantized \(.*qweight\), and config.json has no"):
        load(folder)
    (folder / "quantize_config.json").write_text(json.dumps(own))
    with pytest.raises(FormatError, match=r"; quantize_config\.json may hold it"):
        load(folder)


def _damage(tensors: dict[str, Any], settings: dict[str, Any], what: str) -> None:
    name = "model.layers.0.mlp.down_proj"
    if what == "NaN":
        tensors[f"{name}.scales"] = np.full_like(tensors[f"{name}.scales"], np.nan)
    elif what == "missing":
        del tensors[f"{name}.scales"]
    elif what == "qzeros":
        tensors[f"{name}.qzeros"] = np.full_like(tensors[f"{name}.qzeros"], -1)
    elif what == "desc_act":
        tensors[f"{name}.g_idx"] = tensors[f"{name}.g_idx"][::-1].copy()
    elif what == "shape":
        tensors[f"{name}.scales"] = tensors[f"{name}.scales"][:1]
    else:
        settings |= json.loads(what)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("NaN", "not finite"), ("missing", "missing"), ("qzeros", "zero point minus one"),
        ("desc_act", "desc_act"), ("shape", "has shape"), ('{"bits": 7}', "bits is 7"),
        ('{"group_size": 48}', "48 do not"), ('{"group_size": null}', "group_size"),
        ('{"checkpoint_format": "marlin"}', "marlin"), ('{"quant_method": "hqq"}', "hqq"),
        ('{"scale_shift": 3}', "scale_shift"),
    ],
)  # fmt: skip
def test_damage_is_named(tmp_path: Path, what: str, message: str) -> None:
    tensors = gptq(Source(4, symmetric=False), 4, first=True)
    settings = gptq_settings(4, False, "gptq")
    _damage(tensors, settings, what)
    folder = write(tmp_path / "m", tensors, quantization_config=settings)
    with pytest.raises(EdgeqError, match=message):
        _read_all(folder)


def _read_all(folder: Path) -> None:
    for tensor in load(folder).tensors.values():
        tensor.numpy()


def test_bfloat16_scales_are_never_rounded(tmp_path: Path) -> None:
    from edgeq.importers.huggingface.quantized.stored import exact_half

    exact = np.array([0x3C12, 0x3A80], np.uint16)
    assert exact_half(exact, "BF16", "x").astype(np.float32).view(np.uint32).tolist() == [
        0x3C120000, 0x3A800000,
    ]  # fmt: skip
    with pytest.raises(edgeq.UnsupportedError, match="cannot hold exactly"):
        exact_half(np.array([0x3011], np.uint16), "BF16", "x")
