"""Each setting of a config.json: edgeq's logits are Transformers', or edgeq refuses it by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from edgeq.core.errors import EdgeqError, FormatError, UnsupportedError
from edgeq.importers import load
from edgeq.model.reference import Reference

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOKENS = np.random.default_rng(0).integers(3, 64, 40)
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MIXED = ["full_attention", "sliding_attention", "full_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "ministral3": {},
    "qwen2": {},
    "qwen3": {},
    "gemma3_text": {"query_pre_attn_scalar": 8, "sliding_window": 6, "layer_types": MIXED},
    "gemma2": {
        "query_pre_attn_scalar": 8,
        "sliding_window": 6,
        "layer_types": MIXED,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 4.0,
    },
    "phi3": {},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "olmo2": {},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.22,
        "logits_scaling": 3.0,
    },
    "granitemoehybrid": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.22,
        "logits_scaling": 3.0,
        "num_local_experts": 0,
        "shared_intermediate_size": 48,
        "layer_types": ["full_attention"] * 3,
        "position_embedding_type": "rope",
        "mamba_n_heads": 8,
    },
    "exaone4": {"sliding_window": 6, "layer_types": MIXED},
    "olmo3": {"sliding_window": 6, "layer_types": MIXED},
    "hunyuan_v1_dense": {
        "rope_parameters": {
            "rope_type": "dynamic",
            "rope_theta": 10000.0,
            "alpha": 1000.0,
            "factor": 1.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    "ernie4_5": {},
    "glm4": {},
    # the width of the feed-forward is int(1.3 * (2 / 3 * 48)), rounded up to a multiple of 8
    "lfm2": {
        "layer_types": ["conv", "full_attention", "conv"],
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.3,
    },
    "qwen3_5_text": {
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_key_head_dim": 5,
        "linear_value_head_dim": 7,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
    },
    "qwen3_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "granitemoe": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.22,
        "logits_scaling": 3.0,
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
    },
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv"],
        "num_dense_layers": 1,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "routed_scaling_factor": 1.5,
    },
    "gpt_oss": {
        "sliding_window": 6,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
    },
}
OWN = {
    "gemma2": {"attn_logit_softcapping", "final_logit_softcapping"},
    "gemma3_text": {"use_bidirectional_attention"},
    "granite": {
        "residual_multiplier", "embedding_multiplier", "logits_scaling", "attention_multiplier",
    },
    "granitemoehybrid": {
        "residual_multiplier", "embedding_multiplier", "logits_scaling", "attention_multiplier",
        "intermediate_size",
    },
    "granitemoe": {
        "residual_multiplier", "embedding_multiplier", "logits_scaling", "attention_multiplier",
    },
    "hunyuan_v1_dense": {"use_qk_norm"},
}  # fmt: skip
"""Keys that a family follows and others refuse."""
EXPERTS = {
    "qwen3_moe": {"num_experts", "num_local_experts"},
    "granitemoe": {"num_local_experts"},
    "lfm2_moe": {"num_experts"},
    "gpt_oss": {"num_experts", "num_local_experts"},
}
"""Keys of the number of experts, which must be that of the tensors."""
EPSILON = {"lfm2": "norm_eps", "lfm2_moe": "norm_eps"}
"""The key of the norms' epsilon, where it is not ``rms_norm_eps``."""
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

Folder = tuple[Path, str]


def own_keys(over: dict[str, Any], model_type: str) -> dict[str, Any]:
    """Settings under the names that the family has for them."""
    names = {"rms_norm_eps": EPSILON.get(model_type, "rms_norm_eps")}
    return {names.get(key, key): value for key, value in over.items()}


def offset_norm(name: str, model_type: str) -> bool:
    """Whether one is added to the weight of a norm."""
    return "gemma" in model_type or ("qwen3_5" in model_type and "linear_attn" not in name)


def checkpoint(folder: Path, model_type: str, **over: Any) -> Path:
    """A random checkpoint in which every tensor matters."""
    sizes = own_keys(SIZES, model_type) | FAMILIES[model_type] | over
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            vector = weight.ndim == 1
            size = 0.2 if vector else 1.0 if "embed" in name else 1.3 / weight.shape[-1] ** 0.5
            center = 1.0 if vector and "norm" in name and not offset_norm(name, model_type) else 0.0
            weight.copy_(center + size * torch.randn_like(weight))
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(0.2 * torch.randn_like(buffer))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return checkpoint(tmp_path_factory.mktemp(request.param), request.param), request.param


@contextmanager
def settings(folder: Path, over: dict[str, Any], remove: tuple[str, ...] = ()) -> Iterator[None]:
    """The folder with some settings changed, for a while."""
    path = folder / "config.json"
    before = path.read_text()
    config = {k: v for k, v in json.loads(before).items() if k not in remove} | over
    path.write_text(json.dumps(config))
    try:
        yield
    finally:
        path.write_text(before)


def theirs(folder: Path) -> NDArray[np.float32]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        logits: NDArray[np.float32] = model.eval()(torch.tensor(TOKENS[None])).logits[0].numpy()
    return logits


def assert_equal(folder: Path) -> None:
    want = theirs(folder)
    got = Reference(load(folder)).forward(TOKENS)
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


def assert_equal_or_refused(folder: Path, words: str) -> None:
    try:
        load(folder)
    except EdgeqError:
        assert_refused(folder, words)
    else:
        assert_equal(folder)


def assert_refused(folder: Path, words: str) -> None:
    with pytest.raises(EdgeqError, match=words):
        load(folder)


EQUAL: list[dict[str, Any]] = [
    {},
    {"rms_norm_eps": 0.01},
    {"rope_theta": 500.0, "rope_parameters": None},
    {"max_position_embeddings": 32},
    # what a published file holds beside its settings
    {
        "_name_or_path": "somewhere/model",
        "torch_dtype": "bfloat16",
        "use_cache": False,
        "pretraining_tp": 2,
        "initializer_range": 0.5,
        "attention_dropout": 0.5,
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "output_attentions": True,
        "transformers.js_config": {"dtype": {"q4": "float32"}},
        "unsloth_version": "2025.1",
        "unsloth_fixed": True,
        "rope_interleaved": False,
        "is_llama_config": True,
        "use_mrope": False,
        "num_experts": 0,
        "logit_scale": 1.0,
        "my_training_note": "abc",
        "trained_steps": 1000,
        "base_model": "somewhere/base",
        "image_token_id": 7,
        "id2label": {"0": "LABEL_0"},
        "temperature": 0.7,
        "max_length": 20,
        "attn_logit_softcapping": None,
        "attention_multiplier": 8**-0.5,
        "softmax_scale": None,
        "use_parallel_residual": False,
        "use_absolute_position_embeddings": False,
        "num_train_tokens": 10**9,
        "mask_token_id": 5,
        "architectures": None,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    },
    {"architectures": ["MistralForCausalLM"]},
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"is_causal": False}, "is_causal is False"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ({"mlp_bias": True}, "mlp_bias is True"),
    ({"hidden_act": "relu", "hidden_activation": "relu"}, "hidden_act.* is 'relu'"),
    ({"hidden_act": "gelu", "hidden_activation": "gelu"}, "hidden_act.* is 'gelu'"),
    ({"final_logit_softcapping": 5.0}, r"final_logit_softcapping is 5\.0"),
    ({"attn_logit_softcapping": 5.0}, r"attn_logit_softcapping is 5\.0"),
    ({"rope_scaling": {"rope_type": "proportional"}}, "rope_type in .*'proportional'"),
    ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type in .*'longrope'|short_factor is None"),
    ({"rope_scaling": {"rope_type": None, "factor": 4.0}}, "rope_type in .*None"),
    ({"rope_scaling": {"factor": 4.0}}, r"rope_scaling\.factor is 4\.0|rope_type in .*'default'"),
    ({"rope_scaling": {"rope_type": "default", "mscale": 2.0}}, r"mscale is 2\.0|'default'"),
    ({"per_layer_config": {"1": {"rms_norm_eps": 0.5}}}, "per_layer_config is"),
    ({"architectures": ["BitnetForCausalLM"]}, "class is 'BitnetForCausalLM'"),
    ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM'"),
    ({"auto_map": {"AutoModelForCausalLM": "m.OddForCausalLM"}}, "class is 'OddForCausalLM'"),
    ({"layer_types": ["chunked_attention"] * 3}, "'chunked_attention'"),
    ({"layer_types": ["full_attention"]}, "layer_types must name each of 3 layers"),
    ({"residual_multiplier": 0.22}, r"residual_multiplier is 0\.22"),
    ({"residual_multiplier": 0}, "residual_multiplier is 0"),
    ({"embedding_multiplier": 12, "logits_scaling": 8}, "embedding_multiplier is 12, logits_scal"),
    ({"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256}, "scale_emb is 12"),
    ({"num_local_experts": 8}, "num_local_experts is 8"),
    ({"clip_qkv": 1.0}, r"clip_qkv is 1\.0"),
    ({"use_qk_norm": True}, "use_qk_norm is True"),
    ({"position_embedding_type": "alibi"}, "position_embedding_type is 'alibi'"),
    ({"rope_interleaved": True}, "rope_interleaved is True"),
    ({"attention_chunk_size": 4}, "attention_chunk_size is 4"),
    ({"weight_bits": 1, "input_bits": 8}, "weight_bits is 1, input_bits is 8"),
    ({"quantization_config": {"quant_method": "hqq"}}, "quant_method 'hqq'"),
    ({"some_setting": 3}, "some_setting is 3.*remove it from the file"),
    # what is harmless elsewhere: null, false and one
    ({"is_causal": None}, "is_causal is None"),
    ({"use_rope": None}, "use_rope is None"),
    ({"use_rotary_embedding": False}, "use_rotary_embedding is False"),
    ({"rotary_dim": 0}, "rotary_dim is 0"),
    ({"is_gated_act": False}, "is_gated_act is False"),
    ({"use_swiglu_ffn": False}, "use_swiglu_ffn is False"),
    ({"pre_norm": False}, "pre_norm is False"),
    ({"do_layer_norm_before": False}, "do_layer_norm_before is False"),
    ({"scale_attn_weights": False}, "scale_attn_weights is False"),
    ({"attention_multiplier": 1.0}, r"attention_multiplier is 1\.0"),
    ({"softmax_scale": 1}, "softmax_scale is 1"),
    # what reads like a note or a token
    ({"feed_forward_proj": "relu"}, "feed_forward_proj is 'relu'"),
    ({"normalization_type": "no_norm"}, "normalization_type is 'no_norm'"),
    ({"num_register_tokens": 4}, "num_register_tokens is 4"),
    ({"num_experts_per_token": 2}, "num_experts_per_token is 2"),
    # internal errors of a careless reader
    ({"rms_norm_eps": None}, "rms_norm_eps is null"),
    ({"hidden_size": 10**400}, "hidden_size is 1000"),
    ({"vocab_size": 10**30}, "vocab_size is 1000"),
    ({"num_hidden_layers": [3]}, "num_hidden_layers is"),
    ({"intermediate_size": {"a": 1}}, "intermediate_size is"),
    ({"rope_scaling": [1]}, r"rope_scaling is \[1\]"),
    ({"rope_theta": 0, "rope_parameters": None}, "rope_theta is 0"),
    ({"rope_theta": None, "rope_parameters": None}, "rope_theta is null"),
    ({"rope_theta": "1e4", "rope_parameters": None}, "rope_theta is '1e4'"),
    ({"layer_types": "full"}, "layer_types must name"),
    ({"layer_types": [["full_attention"]] * 3}, "layer_types names a layer"),
    ({"sliding_window": "8", "use_sliding_window": True}, "sliding_window is '8'"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
    ({"head_dim": True}, "head_dim is True"),
    ({"model_type": "mpt"}, "model_type is 'mpt', a family edgeq does not run"),
]
EITHER: list[tuple[dict[str, Any], str]] = [
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope_type in .*'dynamic'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "short_factor|llama_4_scaling_beta"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "rope_type"),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": None}, "rope_|factor"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "rope_parameters"),
    ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}}, "rope_type"),
    ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 16}, "rope_type|is 16 beside"),
    ({"rope_scaling": LLAMA3}, "rope_type"),
    ({"partial_rotary_factor": 0.5, "rope_parameters": None}, "partial_rotary_factor is 0"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
     "partial_rotary_factor|rope_parameters"),
    ({"sliding_window": 5}, "sliding_window is 5"),
    ({"sliding_window": 5, "use_sliding_window": True}, "sliding_window is 5"),
    ({"sliding_window": 5, "use_sliding_window": False}, "use_sliding_window is False"),
    ({"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1,
      "layer_types": None}, "sliding_window is 5"),
    ({"sliding_window": 5, "layer_types": MIXED}, "layer_types"),
    ({"sliding_window": 5, "use_sliding_window": True, "layer_types": MIXED}, "layer_types"),
    ({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
    ({"sliding_window_pattern": 2, "layer_types": None}, "_window_pattern is 2|layer_types must"),
    ({"no_rope_layers": [1, 1, 0]}, "no_rope_layers is"),
    ({"no_rope_layers": [0, 1]}, "no_rope_layers is"),
    ({"no_rope_layers": None, "no_rope_layer_interval": 2}, "no_rope_layer_interval is 2"),
    ({"query_pre_attn_scalar": 32}, "query_pre_attn_scalar is 32"),
    ({"rope_local_base_freq": 100.0, "rope_parameters": None}, "rope_local_base_freq is 100"),
    ({"hidden_act": "gelu_pytorch_tanh"}, "hidden_act"),
    ({"num_key_value_heads": None}, "proj.weight has shape"),
    ({"vocab_size": 63}, "embed_tokens.weight has shape"),
    ({"num_hidden_layers": 2}, "tensors that a|layer_types must name"),
    ({"attention_bias": True}, "attention_bias is True|bias is missing"),
]  # fmt: skip


@pytest.mark.parametrize("over", EQUAL, ids=lambda over: ",".join(over)[:40] or "unchanged")
def test_what_is_read_or_harmless_gives_their_logits(family: Folder, over: dict[str, Any]) -> None:
    over = {key: v for key, v in over.items() if key not in EXPERTS.get(family[1], ())}
    if "attention_multiplier" in over:  # harmless where it is what the size of a head gives
        over["attention_multiplier"] = (SIZES | FAMILIES[family[1]])["head_dim"] ** -0.5
    with settings(family[0], own_keys(over, family[1])):
        assert_equal(family[0])


@pytest.mark.parametrize(
    ("over", "words"), REFUSED, ids=lambda v: ",".join(v)[:40] if isinstance(v, dict) else ""
)
def test_what_is_not_understood_is_refused_by_name(
    family: Folder, over: dict[str, Any], words: str
) -> None:
    epsilon = EPSILON.get(family[1], "rms_norm_eps")
    with settings(family[0], own_keys(over, family[1])):
        if over.keys() & EXPERTS.get(family[1], set()):
            assert_refused(family[0], "tensor .* (is missing|has shape)|contradict")
        elif over.keys() & OWN.get(family[1], set()):
            assert_equal_or_refused(family[0], words)
        else:
            assert_refused(family[0], words.replace("rms_norm_eps", epsilon))


@pytest.mark.parametrize(
    ("over", "words"), EITHER, ids=lambda v: ",".join(v)[:40] if isinstance(v, dict) else ""
)
def test_what_some_families_have_is_equal_or_refused(
    family: Folder, over: dict[str, Any], words: str
) -> None:
    with settings(family[0], over):
        assert_equal_or_refused(family[0], words)


@pytest.mark.parametrize(
    ("name", "over"),
    [
        ("mistral", {"sliding_window": 5}),
        ("mistral", {"sliding_window": 5, "layer_types": MIXED}),
        ("qwen2", {"sliding_window": 5, "use_sliding_window": True, "layer_types": MIXED}),
        ("qwen3", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1,
                   "layer_types": None}),
        ("phi3", {"sliding_window": 5}),
        ("phi3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
        ("gemma3_text", {"query_pre_attn_scalar": 32}),
        ("granite", {"residual_multiplier": 0.5}),
        ("granite", {"embedding_multiplier": 12}),
        ("granite", {"logits_scaling": 8}),
        ("granite", {"attention_multiplier": 0.5}),
        ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
        ("granitemoehybrid", {"residual_multiplier": 0.5}),
        ("granitemoehybrid", {"position_embedding_type": None}),
        ("exaone4", {"layer_types": None}),
        ("exaone4", {"layer_types": None, "sliding_window_pattern": 2}),
        ("olmo3", {"layer_types": None}),
        ("olmo3", {"sliding_window": 3}),
        ("olmo3", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("hunyuan_v1_dense", {"rope_parameters": None, "rope_theta": 500.0,
                              "rope_scaling": {"type": "dynamic", "alpha": 50.0, "factor": 1.0}}),
        ("ernie4_5", {"rope_theta": 500.0, "rope_parameters": None}),
        ("glm4", {"partial_rotary_factor": 1.0, "rope_parameters": None}),
        ("gemma2", {"query_pre_attn_scalar": 64}),
        ("gemma2", {"attn_logit_softcapping": 0.5}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"layer_types": None}),
        ("gemma2", {"sliding_window": 3}),
        ("olmo2", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("lfm2", {"norm_eps": 0.1}),
        ("qwen3_5_text", {"rms_norm_eps": 0.1}),
        (
            "qwen3_5_text",
            {"rope_theta": 500.0, "partial_rotary_factor": 0.5, "rope_parameters": None},
        ),
        ("qwen3_5_text", {"partial_rotary_factor": 1.0, "rope_parameters": None}),
        (
            "qwen3_5_text",
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 300.0,
                    "partial_rotary_factor": 0.75,
                    "mrope_interleaved": True,
                    "mrope_section": [1, 1, 1],
                }
            },
        ),
        ("lfm2", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("smollm3", {"no_rope_layers": [0, 1, 1]}),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 3}),
        ("smollm3", {"sliding_window": 5, "use_sliding_window": True, "layer_types": None}),
        ("smollm3", {"sliding_window": 5, "use_sliding_window": True, "layer_types": MIXED}),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("llama", {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16}),
        ("qwen2", {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": None}),
    ],
)  # fmt: skip
def test_settings_that_a_family_has_are_carried_out(
    tmp_path: Path, name: str, over: dict[str, Any]
) -> None:
    folder = checkpoint(tmp_path, name)
    before = theirs(folder)
    with settings(folder, over):
        assert np.abs(theirs(folder) - before).max() > 0.01 * np.abs(before).max()
        assert_equal(folder)


@pytest.mark.parametrize("name", [
    "llama", "qwen3", "gemma3_text", "gemma2", "smollm3", "olmo2", "olmo3", "granite",
    "granitemoehybrid", "hunyuan_v1_dense",
])  # fmt: skip
def test_biases_of_the_attention(tmp_path: Path, name: str) -> None:
    folder = checkpoint(tmp_path, name, attention_bias=True)
    assert_equal(folder)
    with settings(folder, {"attention_bias": False}):
        assert_refused(folder, r"holds 12 tensors .*bias.* and 9 more")


@pytest.mark.parametrize(
    "over",
    [
        {"block_multiple_of": 256},
        {"block_ffn_dim_multiplier": 2},
        {"block_auto_adjust_ff_dim": False},
        {"block_ff_dim": 90},
        {"layer_types": None, "full_attn_idxs": [0, 2]},
        {"layer_types": None, "full_attn_idxs": None},
        {"conv_L_cache": 5},
        {"conv_L_cache": 1},
        {"tie_word_embeddings": False},
        {"tie_embedding": False},
    ],
    ids=str,
)
def test_settings_of_lfm2_that_change_its_tensors(tmp_path: Path, over: dict[str, Any]) -> None:
    assert_equal(checkpoint(tmp_path, "lfm2", **over))


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"conv_bias": True}, "conv_bias is True, which edgeq cannot run"),
        ({"full_attn_idxs": [0]}, r"full_attn_idxs is \[0\] and layer_types names other layers"),
        ({"layer_types": None, "full_attn_idxs": [3]}, r"full_attn_idxs is \[3\]; it must list"),
        ({"block_dim": 64}, "block_dim is 64, .* it runs models where block_dim is 32 or absent"),
        ({"num_heads": 2}, "num_heads is 2"),
        ({"block_norm_eps": 1e-3}, r"block_norm_eps is 0\.001"),
        ({"use_pos_enc": False}, "use_pos_enc is False"),
        ({"conv_L_cache": 0}, "conv_L_cache is 0"),
        ({"conv_L_cache": 4}, r"conv\.conv\.weight has shape \[32, 1, 3\]; the config says"),
        ({"block_multiple_of": 0}, "block_multiple_of is 0"),
        ({"block_ffn_dim_multiplier": None}, "block_ffn_dim_multiplier is null"),
    ],
    ids=str,
)
def test_settings_of_lfm2_that_are_refused(
    tmp_path: Path, over: dict[str, Any], words: str
) -> None:
    folder = checkpoint(tmp_path, "lfm2")
    with settings(folder, over):
        assert_refused(folder, words)


@pytest.mark.parametrize(
    "over",
    [
        {"layer_types": None, "full_attention_interval": 2},
        {"layer_types": None, "num_hidden_layers": 5},
        {"layer_types": ["full_attention"] * 3},
        {"linear_conv_kernel_dim": 2},
        {"linear_conv_kernel_dim": 1},
        {"linear_num_value_heads": 2},
        {"linear_key_head_dim": 16, "linear_value_head_dim": 3},
        {"attention_bias": True},
        {"tie_word_embeddings": True},
        {"head_dim": 8},
        {"attn_output_gate": True, "output_gate_type": "swish", "mtp_num_hidden_layers": 1},
    ],
    ids=str,
)
def test_settings_of_qwen3_5_that_change_its_tensors(tmp_path: Path, over: dict[str, Any]) -> None:
    assert_equal(checkpoint(tmp_path, "qwen3_5_text", **over))


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"attn_output_gate": False}, "attn_output_gate is False, which the qwen3_5 models"),
        ({"output_gate_type": "sigmoid"}, "output_gate_type is 'sigmoid'"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]"),
        ({"mtp_use_dedicated_embeddings": True}, "mtp_use_dedicated_embeddings is True"),
        ({"linear_num_value_heads": 5}, "linear_num_value_heads is 5 and linear_num_key_heads 2"),
        ({"linear_num_key_heads": 0}, "linear_num_key_heads is 0"),
        ({"linear_key_head_dim": None}, "linear_key_head_dim"),
        ({"linear_conv_kernel_dim": 3}, r"conv1d\.weight has shape \[62, 1, 4\]; the config says"),
        ({"layer_types": ["linear_attention"] * 3}, r"linear_attn\.in_proj_qkv\.weight is missing"),
        ({"layer_types": ["mamba"] * 3}, "layer_types names a layer of kind 'mamba'"),
        ({"layer_types": None, "full_attention_interval": 0}, "full_attention_interval is 0"),
    ],
    ids=str,
)
def test_settings_of_qwen3_5_that_are_refused(
    tmp_path: Path, over: dict[str, Any], words: str
) -> None:
    folder = checkpoint(tmp_path, "qwen3_5_text")
    with settings(folder, over):
        assert_refused(folder, words)


def test_what_is_left_out_of_qwen3_5_is_said(tmp_path: Path) -> None:
    """As the published checkpoints are: with a vision part and a head that guesses ahead."""
    folder = checkpoint(tmp_path, "qwen3_5_text")
    want = theirs(folder)
    config = json.loads((folder / "config.json").read_text())
    outer = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": config,
        "vision_config": {},
        "image_token_id": 60,
    }
    (folder / "config.json").write_text(json.dumps(outer))

    def rename(tensors: dict[str, NDArray[Any]]) -> None:
        for name in list(tensors):
            if name.startswith("model."):
                inner = "model.language_model." + name.removeprefix("model.")
                tensors[inner] = tensors.pop(name)
        tensors["mtp.fc.weight"] = np.ones((32, 64), np.float32)
        tensors["mtp.norm.weight"] = np.ones(32, np.float32)
        tensors["model.visual.pos_embed.weight"] = np.ones((4, 4), np.float32)

    edit_tensors(folder, rename)
    model = load(folder)
    assert model.provenance["left_out"] == [
        "2 tensors of the multi-token-prediction head, which only guesses tokens ahead",
        "1 tensor of the vision part",
    ]
    assert np.abs(Reference(model).forward(TOKENS) - want).max() < 1e-4 * np.abs(want).max()
    edit_tensors(folder, lambda tensors: tensors.update({"model.other.weight": np.ones(3)}))
    assert_refused(folder, r"holds 1 tensors .*does not use: model\.other\.weight")


def test_convolutions_as_mlx_stores_them(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "lfm2")
    want = Reference(load(folder)).forward(TOKENS)

    def transpose(tensors: dict[str, NDArray[Any]]) -> None:
        for name in (f"model.layers.{i}.conv.conv.weight" for i in (0, 2)):
            tensors[name] = np.ascontiguousarray(tensors[name].swapaxes(1, 2))

    edit_tensors(folder, transpose)
    np.testing.assert_allclose(Reference(load(folder)).forward(TOKENS), want, rtol=1e-5, atol=1e-5)


def test_minicpm_is_granite_with_other_words(tmp_path: Path) -> None:
    """Transformers does not have MiniCPM; its factors are those of Granite."""
    folder = checkpoint(
        tmp_path, "granite", embedding_multiplier=12.0, attention_multiplier=8**-0.5,
        residual_multiplier=1.4 / 3**0.5, logits_scaling=32 / 16, tie_word_embeddings=True,
    )  # fmt: skip
    want = theirs(folder)
    found = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in found.items() if "multiplier" not in k and k != "logits_scaling"}
    config |= {
        "model_type": "minicpm", "architectures": ["MiniCPMForCausalLM"], "scale_emb": 12,
        "scale_depth": 1.4, "dim_model_base": 16,
        "auto_map": {"AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    got = Reference(load(folder)).forward(TOKENS)
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()
    with settings(folder, {"scale_depth": 0}):
        assert_refused(folder, "scale_depth is 0")
    with settings(folder, {"mup_denominator": 32}):
        assert_refused(folder, "mup_denominator is 32")


def test_layers_of_granite_4_that_are_not_attention(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "granitemoehybrid")
    with settings(folder, {"layer_types": ["full_attention", "linear_attention", "attention"]}):
        assert_refused(folder, "a layer of kind 'linear_attention'")
    with settings(folder, {"num_local_experts": 4}):
        assert_refused(folder, "num_local_experts is 4, .* models where num_local_experts is 0$")
    with settings(folder, {"layer_types": ["attention"] * 3}):  # as published
        load(folder)


def test_llama3s_original_context_in_two_places(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "llama")
    inside = {**LLAMA3, "original_max_position_embeddings": 64}
    with settings(folder, {"rope_scaling": inside, "original_max_position_embeddings": 16}):
        assert_refused(folder, "is 64 inside the rotary settings and 16 beside them")


# --- tensors ----------------------------------------------------------------------------------


def edit_tensors(folder: Path, change: Callable[[dict[str, NDArray[Any]]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: value.copy() for name, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def test_a_head_of_its_own_is_used_whatever_the_flag_says(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "llama")
    with settings(folder, {"tie_word_embeddings": True}):
        assert_equal(folder)
        assert not load(folder).config.tied
        edit_tensors(folder, lambda t: t.update({HEAD: t[EMBEDDING]}))
        assert_equal(folder)
        assert load(folder).config.tied
        edit_tensors(folder, lambda t: t.pop(EMBEDDING))  # the head alone serves as both
        assert_equal(folder)
        assert load(folder).config.tied
        edit_tensors(folder, lambda t: t.pop(HEAD))
        assert_refused(folder, r"tensor model\.embed_tokens\.weight is missing")


def test_names_of_a_base_model(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "qwen3", tie_word_embeddings=True)
    rename = {name: name.removeprefix("model.") for name in load_file(folder / "model.safetensors")}
    edit_tensors(
        folder, lambda t: [t.update({new: t.pop(old)}) for old, new in rename.items() if old != new]
    )
    assert_equal(folder)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.inner_attn_ln.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.mlp.down_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.self_attn.sinks",
        "model.layers.3.input_layernorm.weight",
        "model.layers.0.mlp.gate_proj.weight_scale",
        "lm_head.bias",
        "score.weight",
        "vision_tower.patch.weight",
        "base_model.model.layers.0.lora_A.weight",
    ],
)
def test_tensors_that_nothing_reads_are_named(tmp_path: Path, name: str) -> None:
    folder = checkpoint(tmp_path, "llama")
    edit_tensors(folder, lambda t: t.update({name: np.ones(4, np.float32)}))
    with pytest.raises(UnsupportedError, match=f"holds 1 tensors .* does not use: {name}"):
        load(folder)


def test_saved_rotary_tables_are_left_alone(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "llama")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, lambda t: t.update({name: np.ones(4, np.float32)}))
    assert_equal(folder)


@pytest.mark.parametrize("kind", ["float64", "int8", "bool"])
def test_types_that_are_no_weights(tmp_path: Path, kind: str) -> None:
    folder = checkpoint(tmp_path, "llama")
    edit_tensors(folder, lambda t: t.update({HEAD: t[HEAD].astype(kind)}))
    with pytest.raises(UnsupportedError, match=r"lm_head\.weight has type .*; weights must be"):
        load(folder)


# --- files ------------------------------------------------------------------------------------


def sharded(folder: Path) -> dict[str, str]:
    """Split a checkpoint by hand; gives where each tensor lies."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    place = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(place.values()):
        part = {name: tensors[name] for name in names if place[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return place


def test_a_single_file_goes_before_an_index(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "llama")
    place = sharded(folder)
    for file in set(place.values()):  # left over from another training
        part = load_file(folder / file)
        save_file({k: v * 0 for k, v in part.items()}, folder / file, metadata={"format": "pt"})
    assert_equal(folder)
    for file in set(place.values()):
        (folder / file).unlink()
    assert_equal(folder)


def test_shards_hold_what_they_hold(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "llama")
    place = sharded(folder)
    (folder / "model.safetensors").unlink()
    assert_equal(folder)
    index = folder / "model.safetensors.index.json"
    shorter = {name: file for name, file in place.items() if name != "model.norm.weight"}
    index.write_text(json.dumps({"metadata": {}, "weight_map": shorter}))
    assert_equal(folder)
    first, second = sorted(set(place.values()))
    twice = load_file(folder / first)
    name = next(iter(load_file(folder / second)))
    twice[name] = load_file(folder / second)[name]
    save_file(twice, folder / first, metadata={"format": "pt"})
    assert_equal(folder)
    twice[name] = twice[name] + 1
    save_file(twice, folder / first, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=f"two different tensors {name}, in {first} and {second}"):
        load(folder)


def test_an_adapter_is_named(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "llama")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert_refused(folder, "holds a LoRA adapter")
    (folder / "config.json").unlink()
    assert_refused(folder, "holds a LoRA adapter")


def test_other_names_of_files_are_listed(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "llama")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert_refused(folder, r"holds neither .*; it holds weights\.safetensors")


@pytest.mark.parametrize("name", ["qwen3_moe", "granitemoe", "lfm2_moe"])
def test_experts_in_single_tensors(tmp_path: Path, name: str) -> None:
    """As Transformers 5 saves them where it is not asked for the original names."""
    original = checkpoint(tmp_path / "original", name)
    model = transformers.AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    stored = load_file(tmp_path / "stacked" / "model.safetensors")
    (first, *_), others = [n for n in stored if n.endswith("experts.gate_up_proj")], set(stored)
    assert not any(".experts.0." in n for n in others)
    assert_equal(tmp_path / "stacked")
    want, got = load(original).tensors, load(tmp_path / "stacked").tensors
    assert set(got) == set(want)
    for tensor in want:
        np.testing.assert_array_equal(got[tensor].numpy(), want[tensor].numpy())
    stored[first] = stored[first][:, :-1]
    save_file(stored, tmp_path / "stacked" / "model.safetensors")
    with pytest.raises(FormatError, match=r"has shape .*; (the config|config\.json) says"):
        load(tmp_path / "stacked")
