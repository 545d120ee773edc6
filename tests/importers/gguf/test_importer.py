"""GGUF files written by the gguf package: types bit for bit, architectures, damage."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.core.errors import EdgeqError, FormatError, UnsupportedError
from edgeq.formats.tensor import FloatTensor
from edgeq.importers import load
from edgeq.importers.gguf import importer
from edgeq.importers.gguf.blocks import quant_rows
from edgeq.importers.gguf.file import TENSOR_TYPES, open_gguf
from edgeq.importers.gguf.tokenizer import tokenizer_files
from edgeq.importers.huggingface.families import FAMILIES as FAMILY_ROWS
from edgeq.model.block import DeltaSpec
from edgeq.model.config import ModelConfig
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from edgeq.model.rope_spec import RopeScaling, RopeSpec
from edgeq.model.rotary import rope_frequencies
from edgeq.runtime.engine import Engine
from edgeq.runtime.tokenizer import Tokenizer
from tests.conftest import need
from tests.families import CALIBRATED, random_model, tiny_config, windows

gguf = pytest.importorskip("gguf")
quantize = gguf.quants.quantize

TYPE_NAMES = tuple(name for name, _, _ in TENSOR_TYPES.values())
INTERLEAVED = (
    "llama",
    "smollm3",
    "mistral3",
    "granite",
    "minicpm",
    "ernie4_5",
    "glm4",
    "granitemoe",
)
"""Architectures in whose files the rows of q and k are in interleaved order."""
ARCHITECTURE = {
    "mistral": "llama", "ministral3": "mistral3", "olmo3": "olmo2", "granitemoehybrid": "granite",
    "hunyuan_v1_dense": "hunyuan-dense", "qwen3_5": "qwen35", "qwen3_moe": "qwen3moe",
    "lfm2_moe": "lfm2moe", "gpt_oss": "gpt-oss",
}  # fmt: skip
"""Names of architectures that are not their family's."""
READ_AS = {"mistral": "llama", "olmo3": "olmo2", "granitemoehybrid": "granite"}
"""Families whose files are those of another."""


def name_of(name: str, arch: str, layers: int) -> str:
    """The name that llama.cpp's converter gives a tensor, by the gguf package's own tables."""
    numbers = {text: number for number, text in gguf.MODEL_ARCH_NAMES.items()}
    # in phi3 the gate has no name: it is fused below; older packages do not know smollm3
    for number in (numbers[known] for known in (arch, "llama") if known in numbers):
        names = gguf.get_tensor_name_map(number, layers)
        for known in (name, name.removeprefix("model.")):  # experts of LFM2 are named without it
            found = names.get_name(known, (".weight", ".bias"))
            if found is not None:
                return str(found)
    raise AssertionError(name)


def interleaved(values: NDArray[Any], heads: int, rotated: int | None = None) -> NDArray[Any]:
    """What llama.cpp's converter does to q and k of the llama architecture.

    Of glm4, whose checkpoints are in this order already, a part of each head.
    """
    split = values.reshape(heads, values.shape[0] // heads, *values.shape[1:])
    turning = rotated or split.shape[1]
    pairs = split[:, :turning].reshape(heads, 2, turning // 2, *values.shape[1:]).swapaxes(1, 2)
    turned = pairs.reshape(heads, turning, *values.shape[1:])
    return np.concatenate([turned, split[:, turning:]], axis=1).reshape(values.shape)


def joined(arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """LFM2's tensors in the shapes of its checkpoints, as llama.cpp's converter leaves them."""
    out = {}
    for name, values in arrays.items():
        if name.endswith(("conv.b_proj.weight", "conv.c_proj.weight", "conv.x_proj.weight")):
            start = name.rpartition("conv.")[0] + "conv."
            parts = [arrays[f"{start}{letter}_proj.weight"] for letter in "bcx"]
            out[start + "in_proj.weight"] = np.concatenate(parts)
        else:
            out[name] = values[:, 0] if name.endswith("conv.conv.weight") else values
    return out


def tiled(name: str, values: NDArray[Any], spec: DeltaSpec) -> NDArray[Any]:
    """The value heads of a tensor in the order of llama.cpp's converter: the first of every key
    head, then the second of every one, and so on."""
    part = name.split(".", 3)[-1].removeprefix("linear_attn.").removesuffix(".weight")
    if part == "out_proj":
        grid = values.reshape(-1, spec.key_heads, spec.group, spec.value_dim)
        return grid.swapaxes(1, 2).reshape(values.shape)
    if part in ("in_proj_qkv", "conv1d"):
        keys, rest = np.split(values, [2 * spec.key_heads * spec.key_dim])
        grid = rest.reshape(spec.key_heads, spec.group, -1)
        return np.concatenate([keys, grid.swapaxes(0, 1).reshape(rest.shape)])
    if part in ("in_proj_z", "in_proj_b", "in_proj_a", "A_log", "dt_bias"):
        grid = values.reshape(spec.key_heads, spec.group, -1)
        return grid.swapaxes(0, 1).reshape(values.shape)
    return values


def recurrent(
    arrays: dict[str, NDArray[Any]], heads: int, spec: DeltaSpec
) -> dict[str, NDArray[Any]]:
    """Qwen 3.5's tensors in the shapes of its checkpoints, as llama.cpp's converter leaves them."""
    out = {}
    for name, stored in arrays.items():
        values = tiled(name, stored, spec)
        if name.endswith("self_attn.q_proj.weight"):
            gate = arrays[name.replace("q_proj", "g_proj")]
            both = [part.reshape(heads, -1, part.shape[1]) for part in (values, gate)]
            out[name] = np.concatenate(both, axis=1).reshape(-1, values.shape[1])
        elif name.endswith("A_log"):
            out[name] = -np.exp(values)
        elif name.endswith("dt_bias"):
            out[name.replace("dt_bias", "dt_proj.bias")] = values
        elif "g_proj" not in name:
            out[name] = values[:, 0] if name.endswith("conv1d.weight") else values
    return out


def stacked(arrays: dict[str, NDArray[Any]], count: int) -> dict[str, NDArray[Any]]:
    """The matrices of all experts of a layer as one tensor, as llama.cpp's converter joins them."""
    out = {}
    for name, values in arrays.items():
        before, experts, after = name.partition(".experts.")
        number, _, part = after.partition(".")
        if name.endswith(".expert_bias"):
            out[f"{name}.bias"] = values
        elif name.endswith(".sinks"):
            out[f"{name}.weight"] = values
        elif not experts or not number.isdigit():
            out[name] = values
        elif number == "0":
            every = [arrays[f"{before}.experts.{e}.{part}"] for e in range(count)]
            out[f"{before}.experts.{part}"] = np.stack(every)
    return out


def expert_keys(c: ModelConfig, arch: str) -> dict[str, Any]:
    """What the converters for Qwen 3, Granite, LFM2 and gpt-oss write of experts."""
    if c.experts is None:
        return {}
    keys = {"expert_count": c.experts.count, "expert_used_count": c.experts.chosen}
    if arch != "granitemoe":
        keys["expert_feed_forward_length"] = c.experts.ffn
    if arch == "lfm2moe":
        dense = sum(block.experts is None for block in c.blocks)
        keys |= {"expert_gating_func": 2, "leading_dense_block_count": dense}
    return keys


def write(
    path: Path,
    model: Model,
    change: Callable[[dict[str, Any]], None] | None = None,
    extra: dict[str, NDArray[Any]] | None = None,
    tokenizer: dict[str, Any] | None = None,
    kinds: dict[str, str] | None = None,
) -> None:
    """A GGUF file of a model, as llama.cpp's converter would write it.

    ``kinds`` says the types of parts of layers; blocks of 256 are random ones.
    """
    c = model.config
    arch = ARCHITECTURE.get(c.family, c.family)
    rope = next((block.rope for block in c.blocks if block.rope and not block.window), c.ropes[0])
    keys: dict[str, Any] = {
        "block_count": c.layers, "embedding_length": c.hidden, "feed_forward_length": c.ffn,
        "context_length": c.context, "attention.head_count": c.heads,
        "attention.head_count_kv": c.kv_heads, "attention.key_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.norm_eps, "rope.freq_base": rope.base,
        "rope.dimension_count": rope.dim,
    }  # fmt: skip
    attends = [block.mixer == "attention" for block in c.blocks]
    if window := max(windows(c)[i] or 0 for i in range(c.layers) if attends[i]):
        keys["attention.sliding_window"] = window
    keys |= expert_keys(c, arch)
    if arch in ("granite", "granitemoe", "minicpm"):
        keys |= {
            "embedding_scale": c.embed_scale, "residual_scale": c.residual_scale,
            "logit_scale": 1 / c.logit_scale,
        }  # fmt: skip
    if arch in ("granite", "granitemoe"):
        keys["attention.scale"] = c.attn_scale
    if c.attn_softcap is not None:
        keys["attn_logit_softcapping"] = c.attn_softcap
    if c.logit_softcap is not None:
        keys["final_logit_softcapping"] = c.logit_softcap
    delta = c.blocks[0].delta
    if delta is not None:
        keys |= {
            "ssm.conv_kernel": windows(c)[0], "ssm.inner_size": delta.values,
            "ssm.state_size": delta.key_dim, "ssm.time_step_rank": delta.value_heads,
            "ssm.group_count": delta.key_heads, "full_attention_interval": c.layers,
            "rope.dimension_sections": [1, 1, 0, 0],
        }  # fmt: skip
    elif not all(attends):
        keys["attention.head_count_kv"] = [c.kv_heads if attend else 0 for attend in attends]
        keys["shortconv.l_cache"] = windows(c)[attends.index(False)]
    if rope.scaling and rope.scaling.kind == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope.scaling.factor}
    keys |= stretching(rope)
    keys = {f"{arch}.{key}": value for key, value in keys.items()}
    arrays = {name: t.numpy() for name, t in model.tensors.items()}
    if c.norm_offset:
        arrays = {
            k: v + 1 if "norm" in k and "linear_attn" not in k else v for k, v in arrays.items()
        }
    if arch in INTERLEAVED:
        for i in range(c.layers):
            for letter, heads in (("q", c.heads), ("k", c.kv_heads)):
                for part in ("weight", "bias"):
                    name = f"model.layers.{i}.self_attn.{letter}_proj.{part}"
                    if name in arrays:
                        arrays[name] = interleaved(arrays[name], heads, rope.dim)
    if arch in ("lfm2", "lfm2moe"):
        arrays = joined(arrays)
    if arch == "qwen35":
        assert delta is not None
        arrays = recurrent(arrays, c.heads, delta)
    # of granitemoehybrid the converter splits what is fused before it names the parts
    stored_name = str if arch == "granite" else FAMILY_ROWS[c.family].stored_name
    arrays = {stored_name(name): values for name, values in arrays.items()}
    if c.experts is not None:
        arrays = stacked(arrays, c.experts.count)
    renamed = {name_of(name, arch, c.layers): values for name, values in arrays.items()}
    for i in range(c.layers):
        if arch == "glm4":
            gate, up = f"blk.{i}.ffn_gate.weight", f"blk.{i}.ffn_up.weight"
            renamed[up] = np.concatenate([renamed.pop(gate), renamed[up]])
    if arch == "phi3":
        for i in range(c.layers):
            fused = [renamed.pop(f"blk.{i}.attn_{x}.weight") for x in "qkv"]
            renamed[f"blk.{i}.attn_qkv.weight"] = np.concatenate(fused)
            gate = renamed.pop(f"blk.{i}.ffn_gate.weight")
            up = renamed[f"blk.{i}.ffn_up.weight"]
            renamed[f"blk.{i}.ffn_up.weight"] = np.concatenate([gate, up])
    if rope.scaling and rope.scaling.kind == "longrope":
        for name in ("long", "short"):
            factors = np.array(getattr(rope.scaling, f"{name}_factors"), np.float32)
            renamed[f"rope_factors_{name}.weight"] = factors
    if rope.scaling and rope.scaling.kind == "llama3":
        factors = rope_frequencies(replace(rope, scaling=None)) / rope_frequencies(rope)
        renamed["rope_freqs.weight"] = factors.astype(np.float32)
    if change:
        change(keys)
    writer = gguf.GGUFWriter(path, keys.pop("arch", arch))
    for key, value in (keys | (tokenizer or {})).items():
        add(writer, key, value)
    for name, values in (renamed | (extra or {})).items():
        kind = (kinds or {}).get(name.split(".")[-2])
        if kind is None:
            writer.add_tensor(name, np.ascontiguousarray(values))
            continue
        number, blocks = gguf.GGMLQuantizationType[kind], kind.endswith("K")
        raw = random_blocks(kind, *values.shape, 0.01) if blocks else quantize(values, number)
        writer.add_tensor(name, raw, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stretching(rope: RopeSpec) -> dict[str, Any]:
    """The keys that the converters for Qwen, Phi-3 and Ministral 3 write."""
    scaling = rope.scaling
    if scaling is None or scaling.kind not in ("yarn", "longrope"):
        return {}
    keys: dict[str, Any] = {"rope.scaling.original_context_length": scaling.original_context}
    if scaling.kind == "longrope":
        return keys | {"rope.scaling.attn_factor": float(scaling.attention_factor)}
    keys |= {"rope.scaling.type": "yarn", "rope.scaling.factor": scaling.factor}
    if rope.temperature:
        keys |= {
            "attention.temperature_scale": rope.temperature,
            "rope.scaling.yarn_beta_fast": scaling.beta_fast,
            "rope.scaling.yarn_log_multiplier": 1.0,
        }
    return keys


def add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def model_of(family: str) -> Model:
    """Gemma's pattern and local base are not in the file, so they have GGUF's fixed values."""
    over: dict[str, Any] = {"context": 128}
    if family == "gemma3":
        layers = 7
        where = tuple((i + 1) % 6 != 0 for i in range(layers))
        over |= {"layers": layers, "window_layers": where, "attn_scale": 12**-0.5}
    elif family == "llama":
        over |= {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)}
    elif family == "exaone4":  # whose windows are those of models of 64 layers
        over |= {"window": None, "window_layers": (), "rope_layers": ()}
    elif family == "qwen3_5":
        over |= {"delta": DeltaSpec(key_heads=4, value_heads=4, key_dim=8, value_dim=8)}
    elif family == "qwen3_moe":  # whose layers all have experts
        over |= {"dense_layers": 0}
    elif family == "mistral":  # of the llama architecture, which has no window
        over |= {"window": None}
    return random_model(tiny_config(family, **over))


@pytest.mark.parametrize("family", CALIBRATED)
def test_architectures_give_the_same_logits(tmp_path: Path, family: str) -> None:
    model = model_of(family)
    path = tmp_path / "model.gguf"
    write(path, model)
    got = load(path)
    assert got.config.family == READ_AS.get(family, family)
    assert set(got.tensors) == set(model.tensors)
    for name, tensor in model.tensors.items():
        normed = "norm" in name and "linear_attn" not in name
        offset = model.config.norm_offset if normed else 0.0
        if name.endswith("A_log"):
            np.testing.assert_allclose(got.tensors[name].numpy(), tensor.numpy(), rtol=1e-5)
            continue
        np.testing.assert_array_equal(got.tensors[name].numpy(), tensor.numpy() + offset, name)
    assert got.config.blocks == model.config.blocks
    tokens = np.arange(11) * 7 % 101
    want = Reference(model).forward(tokens)
    np.testing.assert_allclose(Reference(got).forward(tokens), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("pattern", "seen"),
    [
        (3, [True, True, False, True, True, False, True]),
        ([False, True] * 3 + [False], [False, True] * 3 + [False]),
    ],
)
def test_gemmas_windows_are_where_the_file_says(
    tmp_path: Path, pattern: Any, seen: list[bool]
) -> None:
    key = "gemma3.attention.sliding_window_pattern"
    path = tmp_path / "model.gguf"
    write(path, model_of("gemma3"), lambda keys: keys.update({key: pattern}))
    assert [window is not None for window in windows(load(path).config)] == seen
    write(path, model_of("gemma3"), lambda keys: keys.update({key: [True, False]}))
    with pytest.raises(FormatError, match="expected a bool for each layer"):
        load(path)


def random_blocks(kind: str, n: int, k: int, spread: float = 1.0) -> NDArray[np.uint8]:
    """Rows of a type's bytes with every pattern of codes, and sane float16 scales."""
    _, block, nbytes = next(t for t in TENSOR_TYPES.values() if t[0] == kind)
    rng = np.random.default_rng(7)
    raw = rng.integers(0, 256, (n, k // block, nbytes), dtype=np.uint8)
    if kind == "MXFP4":
        top = 128 + (16 if spread == 1 else -9)
        raw[:, :, 0] = rng.integers(128 - 24, top, raw.shape[:2])
        return raw.reshape(n, -1)
    scales = {
        "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
        "Q4_1": (0, 2), "Q5_1": (0, 2), "TQ1_0": (52,), "TQ2_0": (64,),
    }  # fmt: skip
    for at in scales.get(kind, (0,)):
        half = (spread * rng.standard_normal((n, k // block))).astype(np.float16)
        raw[:, :, at : at + 2] = half[:, :, None].view(np.uint8)
    return raw.reshape(n, -1)


def bits(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Bit patterns; 0 and -0 are one value, whose sign depends on how it was computed."""
    return (values + np.float32(0)).view(np.uint32)


@pytest.mark.parametrize("kind", TYPE_NAMES)
def test_types_are_bit_exact(tmp_path: Path, kind: str) -> None:
    n, k = 37, 512
    number = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    rng = np.random.default_rng(1)
    values = rng.standard_normal((n, k)).astype(np.float32)
    if kind in ("F32", "F16"):
        data: NDArray[Any] = values.astype({"F32": np.float32, "F16": np.float16}[kind])
    elif kind == "BF16":
        data = gguf.quants.quantize(values, number)
    else:
        data = random_blocks(kind, n, k)
    writer.add_tensor("other.weight", np.ones(3, np.float32))
    writer.add_tensor("w.weight", data, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    want = gguf.quants.dequantize(data, number)
    theirs = gguf.GGUFReader(tmp_path / "t.gguf").tensors[1]
    np.testing.assert_array_equal(gguf.quants.dequantize(theirs.data, number), want)
    file = open_gguf(tmp_path / "t.gguf")
    tensor = importer.GgufTensors(tmp_path, file)["w.weight"]
    assert tensor.shape == (n, k)
    assert tensor.nbytes == data.nbytes
    assert tensor.numpy().dtype == np.float32
    np.testing.assert_array_equal(bits(tensor.numpy()), bits(want))
    for start, stop in ((0, 1), (36, 37), (5, 22), (3, 3), (30, 99)):
        np.testing.assert_array_equal(bits(tensor.rows(start, stop)), bits(want[start:stop]))


def test_table_of_types_is_the_packages() -> None:
    for number, (name, block, nbytes) in TENSOR_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert kind.name == name
        assert gguf.GGML_QUANT_SIZES[kind] == (block, nbytes)


def test_quantized_llama_rows_are_put_in_order(tmp_path: Path) -> None:
    """q and k of the llama architecture: whole rows move, whatever their type."""
    config = tiny_config("llama", hidden=64, rope_scaling=None)
    model = random_model(config)
    path = tmp_path / "m.gguf"
    name = "model.layers.1.self_attn.k_proj.weight"
    kind = gguf.GGMLQuantizationType.Q8_0
    permuted = interleaved(model.tensors[name].numpy(), config.kv_heads)
    data = gguf.quants.quantize(permuted, kind)
    values = gguf.quants.dequantize(data, kind)
    undone = values.reshape(config.kv_heads, config.head_dim // 2, 2, 64).swapaxes(1, 2)

    class Quantized(gguf.GGUFWriter):
        def add_tensor(self, key: str, tensor: Any, **rest: Any) -> None:
            if key == "blk.1.attn_k.weight":
                super().add_tensor(key, data, raw_dtype=kind)
            else:
                super().add_tensor(key, tensor, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", Quantized)
        write(path, model)
    tensor = load(path).tensors[name]
    np.testing.assert_array_equal(tensor.numpy(), undone.reshape(values.shape))
    np.testing.assert_array_equal(tensor.rows(7, 20), tensor.numpy()[7:20])


def test_scales_that_float16_cannot_hold_are_refused() -> None:
    block = np.zeros((1, 17), np.uint8)
    block[0, 0] = 90
    assert not quant_rows("MXFP4", block, 32).numpy().any()  # zeros, whatever their scale
    block[0, 3] = 2
    with pytest.raises(UnsupportedError, match=r"MXFP4 block has the scale 2\*\*-38"):
        quant_rows("MXFP4", block, 32)


@pytest.mark.parametrize(
    ("change", "extra", "error", "words"),
    [
        ({"arch": "mamba"}, {}, UnsupportedError,
         r"architecture is 'mamba', .* it runs llama, .*qwen2, qwen3, gemma3"),
        ({"llama.block_count": None}, {}, FormatError,
         r"llama\.block_count is missing; it must be a number"),
        ({"llama.block_count": 3}, {}, FormatError, r"tensor blk\.2\..* is missing"),
        ({"llama.block_count": 10**9}, {}, FormatError, "claims 1000000000 layers"),
        ({"llama.feed_forward_length": 75}, {}, FormatError, r"has shape \[76, 44\]; the config"),
        ({"llama.attention.head_count": 8}, {}, FormatError, "the config says 8 heads of 12"),
        ({"llama.attention.head_count_kv": [2, 1]}, {}, UnsupportedError, "from layer to layer"),
        ({"llama.expert_count": 8}, {}, UnsupportedError, r"llama\.expert_count is 8"),
        ({"llama.rope.scaling.type": "ntk"}, {}, UnsupportedError,
         "rope.scaling.type is 'ntk', .* computes none, linear, yarn and longrope"),
        ({"llama.rope.dimension_count": 6}, {}, UnsupportedError,
         "dimension_count is 6 and heads have 12"),
        ({"llama.embedding_length": float("nan")}, {}, FormatError, "must be a number"),
        ({"split.count": 3}, {}, UnsupportedError, "one of 3 parts; join them"),
        ({}, {"rope_freqs.weight": np.array([1, 2, 3, 4, 5, 6.5], np.float32)}, UnsupportedError,
         "frequency factors other than those of Llama 3.1"),
        ({}, {"rope_factors_long.weight": np.ones(6, np.float32)}, FormatError,
         "tensor rope_factors_short.weight is missing"),
        ({"tokenizer.ggml.model": "bert"}, {}, UnsupportedError,
         r"unknown GGUF tokenizer 'bert' \(known: gpt2, llama\)"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a"],
          "tokenizer.ggml.pre": "qwen22"}, {}, UnsupportedError,
         "unknown GGUF pre-tokenizer 'qwen22'; did you mean 'qwen2'"),
    ],
)  # fmt: skip
def test_gguf_files_of_other_models_are_refused(
    tmp_path: Path,
    change: dict[str, Any],
    extra: dict[str, NDArray[Any]],
    error: type[Exception],
    words: str,
) -> None:
    def apply(keys: dict[str, Any]) -> None:
        for key, value in change.items():
            keys.pop(key, None)
            if value is not None:
                keys[key] = value

    write(tmp_path / "m.gguf", random_model(tiny_config("llama", rope_scaling=None)), apply, extra)
    with pytest.raises(error, match=words):
        load(tmp_path / "m.gguf")


def test_unread_types_are_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    data = np.zeros((2, 66), np.uint8)
    writer.add_tensor("w", data, raw_dtype=gguf.GGMLQuantizationType.IQ2_XXS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match="tensor w has type IQ2_XXS; edgeq reads F32, F16, "):
        load(tmp_path / "t.gguf")


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def forge(path: Path, *parts: bytes, n_tensors: int = 0, n_keys: int = 0, version: int = 3) -> Path:
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join(parts))
    return path


def tensor_info(name: str, dims: list[int], kind: int, offset: int) -> bytes:
    head = text(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
    return head + struct.pack("<IQ", kind, offset)


def test_headers_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    with pytest.raises(UnsupportedError, match="GGUF version 1; edgeq reads 2 and 3"):
        load(forge(path, version=1))
    with pytest.raises(FormatError, match="truncated or damaged: 8 bytes expected at 24, 0 left"):
        load(forge(path, n_keys=1 << 60))
    with pytest.raises(FormatError, match="truncated or damaged: 8 bytes expected at 24, 0 left"):
        load(forge(path, n_tensors=1 << 60))
    with pytest.raises(FormatError, match="unknown metadata type 99"):
        load(forge(path, text("k"), struct.pack("<I", 99), n_keys=1))
    with pytest.raises(FormatError, match="1152921504606846976 values expected"):
        load(forge(path, text("k"), struct.pack("<IIQ", 9, 8, 1 << 60), n_keys=1))
    with pytest.raises(FormatError, match="4611686018427387904 values expected"):
        load(forge(path, text("k"), struct.pack("<IIQ", 9, 4, 1 << 62), n_keys=1))
    with pytest.raises(FormatError, match="an array of type 9"):
        load(forge(path, text("k"), struct.pack("<IIQ", 9, 9, 1), n_keys=1))
    with pytest.raises(FormatError, match="not UTF-8"):
        load(forge(path, struct.pack("<Q", 1), b"\xff", n_keys=1))
    key = text("k") + struct.pack("<IB", 0, 1)
    with pytest.raises(FormatError, match="the key 'k' twice"):
        load(forge(path, key, key, n_keys=2))
    key = text("general.alignment") + struct.pack("<II", 4, 0)
    with pytest.raises(FormatError, match="alignment is 0"):
        load(forge(path, key, n_keys=1))
    info = tensor_info("w", [32], 0, 0)
    with pytest.raises(FormatError, match=r"tensor w ends at byte .* out of range"):
        load(forge(path, info, n_tensors=1))
    with pytest.raises(FormatError, match=r"tensor w ends at byte .* out of range"):
        load(forge(path, tensor_info("w", [4], 0, 1 << 60), bytes(99), n_tensors=1))
    with pytest.raises(FormatError, match=r"tensor w ends at byte .* out of range"):
        load(forge(path, tensor_info("w", [1 << 40, 1 << 40], 0, 0), bytes(99), n_tensors=1))
    with pytest.raises(FormatError, match="the tensor w twice"):
        load(forge(path, info, info, bytes(512), n_tensors=2))
    with pytest.raises(FormatError, match="tensor v overlaps"):
        load(forge(path, info, tensor_info("v", [8], 0, 32), bytes(512), n_tensors=2))
    with pytest.raises(FormatError, match="not at a multiple of 32"):
        load(forge(path, tensor_info("w", [8], 0, 8), bytes(512), n_tensors=1))
    with pytest.raises(FormatError, match="does not hold whole Q4_0 blocks of 32"):
        load(forge(path, tensor_info("w", [33, 2], 2, 0), bytes(512), n_tensors=1))
    with pytest.raises(FormatError, match="9 dimensions"):
        load(forge(path, tensor_info("w", [1] * 9, 0, 0), bytes(512), n_tensors=1))
    path.write_bytes(b"FUGG" + bytes(20))
    with pytest.raises(FormatError, match="big-endian GGUF"):
        load(path)
    path.write_bytes(b"GGUF")
    with pytest.raises(FormatError, match="truncated or damaged"):
        load(path)


BPE = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "llama-bpe",
    "tokenizer.ggml.tokens": [*"abcĠ", "ab", "Ġab", "abc", "<|begin|>", "<|eot_id|>", "<tool>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 1, 1, 1, 1, 3, 3, 4],
    "tokenizer.ggml.merges": ["a b", "Ġ ab"],
    "tokenizer.ggml.bos_token_id": 7,
    "tokenizer.ggml.eos_token_id": 7,
    "tokenizer.chat_template": "{{ messages[0].content }}",
}


def test_byte_level_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path, random_model(tiny_config("llama", rope_scaling=None)), tokenizer=BPE)
    model = load(path)
    assert model.config.eos == (7, 8)
    assert model.config.bos == 7
    tokenizer = Tokenizer(model.files)
    assert tokenizer.eos_ids == (7, 8)
    # Llama 3 starts with BOS, and takes a whole word that no merge makes
    assert tokenizer.encode("abc ab<tool><|eot_id|>") == [7, 6, 5, 9, 8]
    assert tokenizer.decode([7, 6, 5, 9, 8]) == "abc ab<tool>"
    assert b"messages[0]" in model.files["tokenizer_config.json"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"merges": ["a b", "b z"]}, "merges 'b' and 'z'"),
        ({"merges": ["ab"]}, "holds 'ab', no pair"),
        ({"tokens": [1, 2]}, "tokens is not an array of str"),
        ({"tokens": ["a", "a"], "token_type": [1, 1], "merges": ["a b"]}, "token 'a' twice"),
        ({"token_type": [1]}, "10 tokens and 1 token types"),
        ({"bos_token_id": 10}, "bos token is 10, past its 10 tokens"),
        ({"eos_token_id": "x"}, "expected a token id"),
        ({"model": "llama", "scores": [0.0]}, "10 tokens and 1 scores"),
        ({"model": "llama"}, "scores is not an array of float"),
    ],
)
def test_tokenizer_refusals(change: dict[str, Any], words: str) -> None:
    metadata = BPE | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(FormatError, match=words):
        tokenizer_files(metadata)


@pytest.mark.parametrize("vocabulary", ["llama-spm", "gpt-2"])
def test_published_vectors(vocabulary: str) -> None:
    """Text and the ids llama.cpp gives for it."""
    stem = f"data/tokenizers/ggml-vocab-{vocabulary}.gguf"
    tokenizer = Tokenizer(tokenizer_files(open_gguf(need(stem)).metadata)[0])
    texts = need(stem + ".inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = need(stem + ".out").read_text().split("\n")
    assert len(texts) == len(lines) == 47
    for text_, line in zip(texts, lines, strict=True):
        ids = tokenizer.encode(text_, add_bos=False)
        assert ids == [int(i) for i in line.split()], text_
        assert tokenizer.decode(ids) == text_
    with_bos = [tokenizer.bos] if vocabulary == "llama-spm" else []
    assert tokenizer.encode("", add_bos=True) == with_bos


def test_wordpiece_is_refused_by_name() -> None:
    file = open_gguf(need("data/tokenizers/ggml-vocab-bert-bge.gguf"))
    with pytest.raises(UnsupportedError, match="unknown GGUF tokenizer 'bert'"):
        tokenizer_files(file.metadata)


def test_truncations_and_flips_never_crash(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    model = random_model(tiny_config("llama", rope_scaling=None, layers=1))
    write(path, model, tokenizer=BPE)
    whole = path.read_bytes()
    header = len(whole) - sum(t.nbytes for t in model.tensors.values())
    rng = random.Random(0)
    refused = 0
    for trial in range(800):
        hurt = bytearray(whole)
        if trial % 4 == 0:
            del hurt[rng.randrange(len(hurt)) :]
        else:
            for _ in range(rng.randrange(1, 4)):
                hurt[rng.randrange(header)] = rng.choice((0, 255, rng.randrange(256)))
        path.write_bytes(hurt)
        try:
            got = load(path)
            for tensor in got.tensors.values():
                tensor.numpy()
            Tokenizer(got.files)
        except EdgeqError:
            refused += 1
    assert 200 < refused < 800


def test_float_tensors_are_views(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", random_model(tiny_config("qwen2")))
    model = load(tmp_path / "m.gguf")
    tensor = model.tensors["model.embed_tokens.weight"]
    assert isinstance(tensor, FloatTensor)
    assert not tensor.data.flags.owndata
    assert "model.layers.0.self_attn.q_proj.bias" in model.tensors


def test_layers_that_guess_ahead_are_left_out(tmp_path: Path) -> None:
    """Files of Qwen 3.5 may hold its multi-token-prediction head as a layer after the others."""
    model, path = model_of("qwen3_5"), tmp_path / "model.gguf"

    def change(keys: dict[str, Any]) -> None:
        keys |= {"qwen35.block_count": 4, "qwen35.nextn_predict_layers": 1}

    ahead = {
        f"blk.3.{name}.weight": np.ones((4, 4), np.float32) for name in ("ffn_up", "nextn.eh_proj")
    }
    write(path, model, change, ahead)
    got = load(path)
    assert got.provenance["left_out"] == ["2 tensors of layers that only guess tokens ahead"]
    assert got.config.blocks == model.config.blocks
    write(path, model, change, ahead | {"blk.4.ffn_up.weight": np.ones((4, 4), np.float32)})
    with pytest.raises(UnsupportedError, match=r"holds 1 tensors .* does not use: blk\.4\.ffn_up"):
        load(path)


@pytest.mark.parametrize(
    ("keys", "error", "words"),
    [
        ({"qwen35.ssm.inner_size": 31}, FormatError, r"inner_size is 31; it must be 4 heads of 8"),
        ({"qwen35.ssm.group_count": 3}, FormatError, "group_count is 3 and there are 4"),
        ({"qwen35.full_attention_interval": 2}, FormatError, r"tensor blk\.1\.attn_q.* is missing"),
        (
            {"qwen35.nextn_predict_layers": 1},
            FormatError,
            r"nextn_predict_layers is 1, and tensor blk\.2\.nextn\.eh_proj\.weight .* is missing",
        ),
        (
            {"qwen35.rope.dimension_sections": [2, 0, 0, 0]},
            UnsupportedError,
            r"dimension_sections is \[2, 0, 0, 0\], by which not all of 2 pairs rotate",
        ),
        ({"qwen35.ssm.conv_kernel": 3}, FormatError, r"ssm_conv1d\.weight has shape \[96, 4\]"),
        ({"qwen35.attention.head_count": 2}, FormatError, r"attn_q\.weight has 96 rows"),
    ],
    ids=str,
)
def test_gated_delta_nets_that_do_not_fit(
    tmp_path: Path, keys: dict[str, Any], error: type[Exception], words: str
) -> None:
    path = tmp_path / "model.gguf"
    write(path, model_of("qwen3_5"), lambda found: found.update(keys))
    with pytest.raises(error, match=words):
        load(path)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_K"])
def test_value_heads_that_share_key_heads_are_put_in_order(tmp_path: Path, kind: str) -> None:
    """Files list the first value head of every key head, then the second of every one.

    The columns of blocks of 256 weights cannot be moved where a head has fewer; they stay where
    they are, and the mixer's output is listed in their order.
    """
    spec = DeltaSpec(key_heads=2, value_heads=6, key_dim=128, value_dim=128)
    model = random_model(tiny_config("qwen3_5", hidden=256, delta=spec, context=64))
    path, at = tmp_path / "model.gguf", "model.layers.0.linear_attn."
    write(path, model, kinds=dict.fromkeys(("ssm_out", "attn_qkv", "attn_gate"), kind))
    got = load(path)
    assert got.config.blocks[0].delta == replace(spec, tiled_out=True)
    parts = ["in_proj_b.weight", "in_proj_a.weight", "conv1d.weight", "A_log", "dt_bias"]
    if kind != "Q4_K":  # whose blocks are not the model's
        parts += ["in_proj_qkv.weight", "in_proj_z.weight"]
        assert Reference(got).forward([1, 2]).shape == (2, model.config.vocab)
    for part in parts:
        want, tensor = model.tensors[at + part].numpy(), got.tensors[at + part].numpy()
        np.testing.assert_allclose(tensor, want, atol=6e-3 * np.abs(want).max(), err_msg=part)
    raw = importer.GgufTensors(path, open_gguf(path))["blk.0.attn_gate.weight"].numpy()
    grid = raw.reshape(spec.group, spec.key_heads, spec.value_dim, -1).swapaxes(0, 1)
    moved = got.tensors[f"{at}in_proj_z.weight"].numpy()
    np.testing.assert_array_equal(bits(moved), bits(grid.reshape(raw.shape)))
    tokens = [int(token) for token in np.arange(20) % model.config.vocab]
    logits = Reference(got).forward(tokens)
    if kind == "F32":
        want = Reference(model).forward(tokens)
        np.testing.assert_allclose(logits, want, atol=2e-5 * np.abs(want).max())
    with Engine(got, context=64, threads=2, kv_bits=16) as engine:
        compiled = engine.forward(tokens, all_logits=True)
    close = 2e-3 if kind in ("F32", "F16") else 5e-2  # activations are rounded beside integers
    assert np.abs(compiled - logits).max() < close * np.ptp(logits)
