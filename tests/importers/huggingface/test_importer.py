"""Hugging Face checkpoints of every family, written by Transformers itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.formats.tensor import FloatTensor, bf16_to_float32
from edgeq.importers import load
from edgeq.importers.huggingface import importer as huggingface
from edgeq.model.model import Model
from edgeq.model.rope_spec import RopeScaling, RopeSpec
from tests.conftest import need
from tests.families import windows

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 71,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def write(folder: Path, name: str, dtype: str = "float32", **over: Any) -> Any:
    """A tiny random checkpoint of a Transformers class; gives the module it came from."""
    config = getattr(transformers, name + "Config")(**{**TINY, **over})
    torch.manual_seed(0)
    model = getattr(transformers, name + "ForCausalLM")(config).to(getattr(torch, dtype))
    with torch.no_grad():  # norms start as constants and biases as zeros: make all of them tell
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


def assert_same(model: Model, module: Any, fused: bool = False) -> None:
    """Every tensor has the values of the module's own, and none is left out."""
    state = {k: v.float().numpy() for k, v in module.state_dict().items()}
    if fused:
        heads, kv, dim = model.config.heads, model.config.kv_heads, model.config.head_dim
        for key in [k for k in state if "qkv_proj" in k]:
            q, k, v = np.split(state.pop(key), [heads * dim, (heads + kv) * dim])
            for letter, part in zip("qkv", (q, k, v), strict=True):
                state[key.replace("qkv_proj", f"{letter}_proj")] = part
        for key in [k for k in state if "gate_up_proj" in k]:
            gate, up = np.split(state.pop(key), 2)
            state[key.replace("gate_up_proj", "gate_proj")] = gate
            state[key.replace("gate_up_proj", "up_proj")] = up
    if model.config.tied:
        state.pop("lm_head.weight", None)
    assert set(model.tensors) == set(state)
    for name, values in state.items():
        np.testing.assert_array_equal(model.tensors[name].numpy(), values, err_msg=name)


def edit(folder: Path, remove: tuple[str, ...] = (), **values: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in remove}))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_llama_in_every_float_type(tmp_path: Path, dtype: str) -> None:
    module = write(tmp_path, "Llama", dtype, rope_parameters={**LLAMA3, "rope_theta": 5e5})
    model = load(tmp_path)
    assert_same(model, module)
    assert {t.dtype for t in model.tensors.values() if isinstance(t, FloatTensor)} == {dtype}
    config = model.config
    assert config.ropes == (RopeSpec(5e5, 8, RopeScaling("llama3", 8.0, 1.0, 4.0, 16)),)
    assert (config.tied, config.bos, config.eos) == (False, 1, (2,))
    assert (config.hidden, config.ffn, config.layers, config.vocab) == (32, 48, 3, 71)
    assert (config.heads, config.kv_heads, config.head_dim, config.context) == (4, 2, 8, 64)
    assert config.norm_eps == module.config.rms_norm_eps


def test_llama_written_before_transformers_5(tmp_path: Path) -> None:
    module = write(tmp_path, "Llama", tie_word_embeddings=True)
    edit(tmp_path, ("rope_parameters",), rope_theta=5e5, rope_scaling={**LLAMA3, "factor": 32.0})
    model = load(tmp_path)
    assert_same(model, module)
    assert model.config.tied
    assert model.config.ropes == (RopeSpec(5e5, 8, RopeScaling("llama3", 32.0, 1.0, 4.0, 16)),)
    edit(tmp_path, rope_scaling={"type": "linear", "factor": 2.0})
    assert load(tmp_path).config.ropes[0].scaling == RopeScaling("linear", 2.0)


def test_llama_biases(tmp_path: Path) -> None:
    module = write(tmp_path, "Llama", attention_bias=True)
    model = load(tmp_path)
    assert_same(model, module)
    assert "model.layers.0.self_attn.o_proj.bias" in model.tensors


def test_smollm_is_llama(tmp_path: Path) -> None:
    module = write(tmp_path, "Llama", tie_word_embeddings=True, num_key_value_heads=1)
    edit(tmp_path, model_type="smollm")
    model = load(tmp_path)
    assert_same(model, module)
    assert model.config.family == "llama"


@pytest.mark.parametrize("window", [6, None])
def test_mistral(tmp_path: Path, window: int | None) -> None:
    module = write(tmp_path, "Mistral", sliding_window=window, head_dim=12)
    model = load(tmp_path)
    assert_same(model, module)
    assert windows(model.config) == (window,) * 3
    assert model.config.head_dim == 12


def test_qwen2(tmp_path: Path) -> None:
    module = write(tmp_path, "Qwen2", tie_word_embeddings=True)
    model = load(tmp_path)
    assert_same(model, module)
    assert "model.layers.2.self_attn.v_proj.bias" in model.tensors
    assert windows(model.config) == (None,) * 3  # sliding_window is set, use_sliding_window is not
    edit(tmp_path, ("layer_types",), use_sliding_window=True, sliding_window=5, max_window_layers=2)
    assert windows(load(tmp_path).config) == (None, None, 5)


def test_qwen3(tmp_path: Path) -> None:
    module = write(tmp_path, "Qwen3", head_dim=20)
    model = load(tmp_path)
    assert_same(model, module)
    assert {block.qk_norm for block in model.config.blocks} == {"head"}
    assert model.config.head_dim == 20
    assert model.tensors["model.layers.0.self_attn.k_norm.weight"].shape == (20,)


def gemma_sizes() -> dict[str, Any]:
    return {
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 9000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 9e5},
        },
    }


def assert_gemma(model: Model) -> None:
    config = model.config
    assert config.family == "gemma3"
    assert (config.norm_offset, config.activation) == (1.0, "gelu_tanh")
    assert {(b.norm_after, b.qk_norm) for b in config.blocks} == {(True, "head")}
    assert config.embed_scale == math.sqrt(32)
    assert config.attn_scale == 24**-0.5
    local, whole = RopeSpec(9000.0, 16), RopeSpec(9e5, 16, RopeScaling("linear", 8.0))
    assert [block.rope for block in config.blocks] == [local, whole, local]
    assert windows(config) == (6, None, 6)
    assert config.tied


def test_gemma3_text(tmp_path: Path) -> None:
    config = transformers.Gemma3TextConfig(**{**TINY, **gemma_sizes()})
    torch.manual_seed(0)
    module = transformers.Gemma3ForCausalLM(config)
    module.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert_same(model, module)
    assert_gemma(model)


def test_gemma3_as_google_published_it(tmp_path: Path) -> None:
    """Flat rotary settings, a pattern instead of layer types, and defaults left out."""
    config = transformers.Gemma3TextConfig(**{**TINY, **gemma_sizes()})
    transformers.Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    edit(
        tmp_path,
        ("rope_parameters", "layer_types", "rms_norm_eps", "hidden_activation"),
        rope_theta=1e6,
        rope_local_base_freq=10000,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        sliding_window_pattern=2,
    )
    got = load(tmp_path).config
    assert got.ropes == (RopeSpec(1e4, 16), RopeSpec(1e6, 16, RopeScaling("linear", 8.0)))
    assert [window is not None for window in windows(got)] == [True, False, True]
    assert got.norm_eps == 1e-6
    edit(tmp_path, ("rope_theta", "rope_local_base_freq", "sliding_window_pattern", "rope_scaling"))
    got = load(tmp_path).config
    assert got.ropes == (RopeSpec(1e4, 16),)
    assert None not in windows(got)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_gemma3_inside_a_vision_model(tmp_path: Path, prefix: str) -> None:
    config = transformers.Gemma3TextConfig(**{**TINY, **gemma_sizes()})
    module = transformers.Gemma3ForCausalLM(config)
    module.save_pretrained(tmp_path)
    inner = json.loads((tmp_path / "config.json").read_text())
    outer = {
        "model_type": "gemma3",
        "text_config": {
            k: v for k, v in inner.items() if k not in ("eos_token_id", "tie_word_embeddings")
        },
        "eos_token_id": [1, 7],
        "vision_config": {"hidden_size": 8},
    }
    (tmp_path / "config.json").write_text(json.dumps(outer))
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {prefix + name.removeprefix("model."): value for name, value in tensors.items()}
    renamed["vision_tower.patch.weight"] = np.ones((2, 2), np.float32)
    save_file(renamed, tmp_path / "model.safetensors")
    model = load(tmp_path)
    assert_same(model, module)
    assert_gemma(model)
    assert model.config.eos == (1, 7)


def test_phi3_is_split_without_a_copy(tmp_path: Path) -> None:
    module = write(
        tmp_path,
        "Phi3",
        rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5, "rope_type": "default"},
        sliding_window=7,
    )
    model = load(tmp_path)
    assert_same(model, module, fused=True)
    assert model.config.ropes[0].dim == 4
    assert set(windows(model.config)) == {7}
    part = model.tensors["model.layers.1.self_attn.v_proj.weight"]
    assert isinstance(part, FloatTensor)
    assert not part.data.flags.owndata


def test_phi3_old_partial_factor(tmp_path: Path) -> None:
    write(tmp_path, "Phi3")
    edit(
        tmp_path,
        ("rope_parameters",),
        rope_theta=1e4,
        partial_rotary_factor=0.75,
        rope_scaling=None,
    )
    assert load(tmp_path).config.ropes[0].dim == 6


def test_shards(tmp_path: Path) -> None:
    module = write(tmp_path / "one", "Llama")
    module.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert_same(load(tmp_path / "many"), module)
    gone = shards[1]
    gone.rename(gone.with_suffix(".away"))
    with pytest.raises(FormatError, match=rf"lacks 1 of {len(shards)} shards: {gone.name}"):
        load(tmp_path / "many")


def test_index_is_checked(tmp_path: Path) -> None:
    module = write(tmp_path, "Llama")
    module.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    other = next(n for n, f in index["weight_map"].items() if f != first)
    index["weight_map"][other] = first
    path.write_text(json.dumps(index))
    with pytest.raises(FormatError, match=f"puts tensor {other} in {first}, which does not"):
        load(tmp_path)
    index["weight_map"][other] = "../elsewhere.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(FormatError, match="outside the folder"):
        load(tmp_path)
    path.write_text("{}")
    with pytest.raises(FormatError, match="no weight_map"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("family", "over", "remove", "error", "words"),
    [
        ("Llama", {"model_type": "bloom"}, (), UnsupportedError,
         r"model_type is 'bloom'.*gemma3_text,.*llama, "),
        ("Llama", {}, ("model_type",), FormatError, "names no model_type"),
        ("Llama", {}, ("hidden_size",), FormatError, "hidden_size is missing"),
        ("Llama", {"hidden_size": "32"}, (), FormatError, "must be a positive number"),
        ("Llama", {"hidden_size": 32.5}, (), FormatError, "must be a whole number"),
        ("Llama", {"num_hidden_layers": 10**5}, (), FormatError, "at most 4096"),
        ("Llama", {"num_hidden_layers": 4}, (), FormatError,
         r"tensor model\.layers\.3\..* is missing"),
        ("Llama", {"intermediate_size": 47}, (), FormatError,
         r"gate_proj.weight has shape \[48, 32\]; the config says \[47, 32\]"),
        ("Llama", {"num_attention_heads": 3}, (), FormatError, "heads cannot share"),
        ("Llama", {"rope_parameters": {"rope_type": "ntk", "factor": 4.0}}, (), UnsupportedError,
         "is 'ntk', which edgeq does not compute .* it computes default, linear, llama3"),
        ("Llama", {"rope_parameters": {"rope_type": "linear"}}, (), FormatError,
         "rope factor is missing"),
        ("Llama", {"rope_parameters": 7}, (), FormatError, "it must be an object"),
        ("Llama", {"mlp_bias": True}, (), UnsupportedError, "mlp_bias is True"),
        ("Llama", {"hidden_act": "relu"}, (), UnsupportedError, "hidden_act is 'relu'"),
        ("Llama", {"quantization_config": {"quant_method": "hqq"}}, (), UnsupportedError,
         "quant_method 'hqq'.*original F32, F16 or BF16"),
        ("Llama", {"eos_token_id": "x"}, (), FormatError, "expected token ids"),
        ("Llama", {"bos_token_id": -1}, (), FormatError, "expected a token id"),
        ("Llama", {"attention_bias": True}, (), FormatError, r"q_proj\.bias is missing"),
        ("Llama", {"attention_bias": 1}, (), FormatError, "must be true or false"),
        ("Phi3", {"rope_parameters": {"rope_type": "longrope"}}, (), FormatError,
         "short_factor is None; it must list a number for each of"),
        ("Phi3", {"rope_parameters": None, "rope_scaling": {"type": "su"}}, (), FormatError,
         "short_factor is None; it must list a number for each of"),
        ("Phi3", {"num_key_value_heads": 1}, (), FormatError, "qkv_proj.weight has shape"),
        ("Qwen2", {**SLIDING, "layer_types": ["odd"] * 3}, (), UnsupportedError,
         "a layer of kind 'odd'"),
        ("Qwen2", {**SLIDING, "layer_types": ["odd"]}, (), FormatError,
         "must name each of 3 layers"),
    ],
)  # fmt: skip
def test_folders_of_other_models_are_refused(
    tmp_path_factory: pytest.TempPathFactory,
    family: str,
    over: dict[str, Any],
    remove: tuple[str, ...],
    error: type[Exception],
    words: str,
) -> None:
    folder = tmp_path_factory.mktemp("refused")
    write(folder, family)
    (folder / "generation_config.json").unlink(missing_ok=True)
    edit(folder, remove, **over)
    with pytest.raises(error, match=words):
        load(folder)


def test_gemma_refusals(tmp_path: Path) -> None:
    config = transformers.Gemma3TextConfig(**{**TINY, **gemma_sizes()})
    transformers.Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    edit(tmp_path, final_logit_softcapping=30.0)
    with pytest.raises(UnsupportedError, match=r"final_logit_softcapping is 30\.0"):
        load(tmp_path)
    rope = gemma_sizes()["rope_parameters"]
    rope["sliding_attention"] = {"rope_type": "linear", "factor": 2.0}
    edit(tmp_path, ("final_logit_softcapping",), rope_parameters=rope)
    with pytest.raises(UnsupportedError, match="rope_type in sliding_attention is 'linear'"):
        load(tmp_path)


def test_unreadable_folders(tmp_path: Path) -> None:
    write(tmp_path, "Llama")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FormatError, match=r"config\.json is not JSON"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(FormatError, match="holds a list, expected an object"):
        load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FormatError, match=r"a folder without config\.json; give a Hugging Face"):
        load(tmp_path)


def test_pytorch_weights_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "Llama")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match=r"PyTorch weights \(pytorch_model\.bin\)"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(FormatError, match=r"holds neither model\.safetensors nor"):
        load(tmp_path)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "Llama")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"model\.norm\.weight has type I8; weights must be"):
        load(tmp_path)


def test_generation_config_knows_the_ends(tmp_path: Path) -> None:
    write(tmp_path, "Llama")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6, 5]}')
    model = load(tmp_path)
    assert model.config.eos == (5, 6)
    assert model.files["generation_config.json"] == b'{"eos_token_id": [5, 6, 5]}'
    assert model.provenance["source"] == tmp_path.name


def test_rows_are_read_where_they_lie(tmp_path: Path) -> None:
    module = write(tmp_path, "Llama", "bfloat16")
    model = load(tmp_path)
    whole = module.state_dict()["model.embed_tokens.weight"].float().numpy()
    tensor = model.tensors["model.embed_tokens.weight"]
    np.testing.assert_array_equal(tensor.rows(3, 9), whole[3:9])
    assert isinstance(tensor, FloatTensor)
    assert not tensor.data.flags.writeable
    np.testing.assert_array_equal(bf16_to_float32(tensor.data[3:9]), whole[3:9])


def test_real_checkpoint() -> None:
    model = huggingface.load(need("models/stories260K"))
    assert model.config.tied
    assert model.config.eos == (2,)
    assert set(model.files) == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
