"""Config files as they were published: their odd keys are harmless."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.importers.huggingface.config import read_config
from edgeq.importers.shapes import SHAPES
from edgeq.model.block import ExpertsSpec
from edgeq.model.config import ModelConfig
from edgeq.model.model import Model
from edgeq.model.rope_spec import RopeScaling
from tests.families import FAMILIES, random_model, tiny_config, windows

USUAL: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
}
SLOW = [
    1.0, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649,
    2.446418898, 2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845,
    5.351743533, 5.984965424, 6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158,
    11.70738129, 13.09260651, 14.64173252, 16.37415215, 18.31155283, 20.47818807, 22.90118105,
    25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71,
    32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
]  # fmt: skip
"""Phi-4-mini's factors for long sequences."""
PUBLISHED: dict[str, dict[str, Any]] = {
    "SmolLM2-135M-Instruct": USUAL | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "hidden_size": 576,
        "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192,
        "mlp_bias": False, "num_attention_heads": 9, "num_hidden_layers": 30,
        "num_key_value_heads": 3, "pretraining_tp": 1, "rope_interleaved": False,
        "rope_scaling": None, "rope_theta": 100000, "vocab_size": 49152,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    },
    "Llama-3.2-1B-Instruct": USUAL | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64,
        "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072,
        "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rope_theta": 500000.0,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "vocab_size": 128256,
    },
    "TinyLlama-1.1B": USUAL | {
        "_name_or_path": "tinyllama", "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 2048, "intermediate_size": 5632,
        "max_position_embeddings": 2048, "max_sequence_length": 2048, "num_attention_heads": 32,
        "num_hidden_layers": 22, "num_key_value_heads": 4, "pretraining_tp": 1,
        "rope_scaling": None, "tie_word_embeddings": False, "vocab_size": 32000,
        "_flash_attn_2_enabled": True, "unsloth_version": "2024.9",
    },
    "Mistral-7B-v0.1": USUAL | {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "bos_token_id": 1,
        "eos_token_id": 2, "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "rope_theta": 10000.0, "sliding_window": 4096,
        "tie_word_embeddings": False, "vocab_size": 32000,
    },
    "Qwen2.5-0.5B-Instruct": USUAL | {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "bos_token_id": 151643,
        "eos_token_id": 151645, "hidden_size": 896, "intermediate_size": 4864,
        "max_position_embeddings": 32768, "max_window_layers": 21, "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rope_theta": 1000000.0,
        "sliding_window": 32768, "use_sliding_window": False, "use_mrope": False,
        "vocab_size": 151936,
    },
    "Qwen3-0.6B": USUAL | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_size": 1024,
        "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
        "use_sliding_window": False, "vocab_size": 151936,
    },
    "gemma-3-270m": USUAL | {
        "_sliding_window_pattern": 6, "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False, "attn_logit_softcapping": None, "bos_token_id": 2,
        "eos_token_id": 1, "final_logit_softcapping": None, "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 640, "intermediate_size": 2048,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
        "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4,
        "num_hidden_layers": 18, "num_key_value_heads": 1, "pad_token_id": 0,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_local_base_freq": 10000.0,
        "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": 512,
        "use_bidirectional_attention": False, "vocab_size": 262144,
    },
    "embeddinggemma-300m": USUAL | {
        "_sliding_window_pattern": 6, "architectures": ["Gemma3TextModel"],
        "attention_bias": False, "attn_logit_softcapping": None, "bos_token_id": 2,
        "dtype": "float32", "eos_token_id": 1, "final_logit_softcapping": None, "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 768, "intermediate_size": 1152,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 4,
        "max_position_embeddings": 2048, "model_type": "gemma3_text", "num_attention_heads": 3,
        "num_hidden_layers": 24, "num_key_value_heads": 1, "pad_token_id": 0,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_local_base_freq": 10000.0,
        "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": 512,
        "use_bidirectional_attention": True, "vocab_size": 262144,
    },
    "gemma-3-4b-it": {
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
        "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144,
        "initializer_range": 0.02, "mm_tokens_per_image": 256, "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
            "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    },
    "Phi-3-mini-4k-instruct": USUAL | {
        "_name_or_path": "Phi-3-mini-4k-instruct", "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config",
                     "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
        "bos_token_id": 1, "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_size": 3072,
        "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "phi3",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0,
        "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": 2047,
        "tie_word_embeddings": False, "vocab_size": 32064,
    },
    "Phi-3-mini-128k-instruct": USUAL | {
        "_name_or_path": "Phi-3-mini-128k-instruct", "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config",
                     "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
        "bos_token_id": 1, "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_size": 3072,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "model_type": "phi3",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0,
        "rope_scaling": {"long_factor": SLOW, "short_factor": [1.05] * 48, "type": "su"},
        "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": False,
        "vocab_size": 32064,
    },
    "Phi-4-mini-instruct": USUAL | {
        "architectures": ["Phi3ForCausalLM"], "attention_bias": False,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config",
                     "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
                     "AutoTokenizer": "Xenova/gpt-4o"},
        "bos_token_id": 199999, "embd_pdrop": 0.0, "eos_token_id": 199999, "full_attn_mod": 1,
        "hidden_size": 3072, "intermediate_size": 8192, "interpolate_factor": 1,
        "lm_head_bias": False, "max_position_embeddings": 131072, "mlp_bias": False,
        "model_type": "phi3", "num_attention_heads": 24, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "original_max_position_embeddings": 4096,
        "pad_token_id": 199999, "partial_rotary_factor": 0.75, "resid_pdrop": 0.0,
        "rope_scaling": {"long_factor": SLOW, "short_factor": [1.0] * 48, "type": "longrope"},
        "rope_theta": 10000.0, "sliding_window": 262144, "vocab_size": 200064,
    },
    "Qwen3-4B with yarn": USUAL | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_size": 2560,
        "intermediate_size": 9728, "max_position_embeddings": 40960, "max_window_layers": 36,
        "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                         "original_max_position_embeddings": 32768},
        "rope_theta": 1000000, "sliding_window": None, "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Ministral-3-3B-Instruct-2512-BF16": {
        "architectures": ["Mistral3ForConditionalGeneration"], "dtype": "bfloat16",
        "image_token_index": 10, "model_type": "mistral3", "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu", "spatial_merge_size": 2,
        "text_config": {
            "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 128,
            "hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02,
            "intermediate_size": 9216, "max_position_embeddings": 262144,
            "model_type": "ministral3", "num_attention_heads": 32, "num_hidden_layers": 26,
            "num_key_value_heads": 8, "pad_token_id": 11, "rms_norm_eps": 1e-05,
            "rope_parameters": {
                "beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1,
                "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384,
                "rope_theta": 1000000.0, "rope_type": "yarn", "type": "yarn",
            },
            "sliding_window": None, "tie_word_embeddings": True, "use_cache": True,
            "vocab_size": 131072,
        },
        "transformers_version": "5.0.0.dev0", "vision_config": {"model_type": "pixtral"},
        "vision_feature_layer": -1,
    },
    "gemma-2-2b-it": {
        "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid",
        "eos_token_id": [1, 107], "final_logit_softcapping": 30.0, "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304, "initializer_range": 0.02, "intermediate_size": 9216,
        "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8,
        "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "sliding_window": 4096, "torch_dtype": "bfloat16", "transformers_version": "4.42.4",
        "use_cache": True, "vocab_size": 256000,
    },
    "granite-3.3-2b-instruct": {
        "architectures": ["GraniteForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attention_multiplier": 0.015625, "bos_token_id": 0, "embedding_multiplier": 12.0,
        "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 8192, "logits_scaling": 8.0, "max_position_embeddings": 131072,
        "mlp_bias": False, "model_type": "granite", "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 8, "pad_token_id": 0,
        "residual_multiplier": 0.22, "rms_norm_eps": 1e-5, "rope_scaling": None,
        "rope_theta": 10000000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.49.0", "use_cache": True, "vocab_size": 49159,
    },
    "granite-4.0-micro": {
        "architectures": ["GraniteMoeHybridForCausalLM"], "attention_bias": False,
        "attention_dropout": 0.0, "attention_multiplier": 0.015625, "bos_token_id": 100257,
        "embedding_multiplier": 12, "eos_token_id": 100257, "hidden_act": "silu",
        "hidden_size": 2560, "init_method": "mup", "initializer_range": 0.1,
        "intermediate_size": 8192, "layer_types": ["attention"] * 40, "logits_scaling": 10,
        "mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 64,
        "mamba_d_state": 256, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 80,
        "mamba_proj_bias": False, "max_position_embeddings": 131072,
        "model_type": "granitemoehybrid", "normalization_function": "rmsnorm",
        "num_attention_heads": 40, "num_experts_per_tok": 0, "num_hidden_layers": 40,
        "num_key_value_heads": 8, "num_local_experts": 0, "output_router_logits": False,
        "pad_token_id": 100256, "position_embedding_type": "rope", "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 10000000,
        "router_aux_loss_coef": 0.01, "shared_intermediate_size": 8192,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.56.0",
        "use_cache": True, "vocab_size": 100352,
    },
    "MiniCPM-2B-sft-bf16": {
        "_name_or_path": "openbmb/CPM-2B", "architectures": ["MiniCPMForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMConfig",
                     "AutoModel": "modeling_minicpm.MiniCPMModel",
                     "AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM"},
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 2304,
        "initializer_range": 0.1, "intermediate_size": 5760, "max_position_embeddings": 4096,
        "model_type": "minicpm", "num_attention_heads": 36, "num_hidden_layers": 40,
        "num_key_value_heads": 36, "rms_norm_eps": 1e-5, "rope_scaling": None,
        "torch_dtype": "bfloat16", "transformers_version": "4.36.0", "use_cache": True,
        "vocab_size": 122753, "scale_emb": 12, "dim_model_base": 256, "scale_depth": 1.4,
    },
    "EXAONE-4.0-1.2B": {
        "architectures": ["Exaone4ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 361, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 4096,
        "layer_types": ["full_attention"] * 30, "max_position_embeddings": 65536,
        "model_type": "exaone4", "num_attention_heads": 32, "num_hidden_layers": 30,
        "num_key_value_heads": 8, "pad_token_id": 0, "rms_norm_eps": 1e-5,
        "rope_scaling": {"factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 1000000, "sliding_window": None, "sliding_window_pattern": None,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.54.0.dev0", "use_cache": True, "vocab_size": 102400,
    },
    "EXAONE-4.0-32B": {
        "architectures": ["Exaone4ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 361, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
        "initializer_range": 0.02, "intermediate_size": 27392,
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 16,
        "max_position_embeddings": 131072, "model_type": "exaone4", "num_attention_heads": 40,
        "num_hidden_layers": 64, "num_key_value_heads": 8, "pad_token_id": 0,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {"factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 1000000, "sliding_window": 4096, "sliding_window_pattern": "LLLG",
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.54.0.dev0", "use_cache": True, "vocab_size": 102400,
    },
    "Hunyuan-0.5B-Instruct": {
        "add_classification_head": False, "architectures": ["HunYuanDenseV1ForCausalLM"],
        "attention_bias": False, "attention_dropout": 0.1, "attention_head_dim": 128,
        "bos_token_id": 120000, "cla_share_factor": 2, "class_num": 0, "dense_list": [1024, 0],
        "eod_token_id": 120020, "eos_token_id": 120020, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 3584,
        "mask_init_id": 12, "max_position_embeddings": 262144, "mlp_bias": False,
        "model_type": "hunyuan_v1_dense", "norm_type": "rms", "num_attention_heads": 16,
        "num_hidden_layers": 24, "num_key_value_heads": 8, "org_vocab_size": 120818,
        "pad_token_id": 120002, "pool_type": "last", "pretraining_tp": 1, "rms_norm_eps": 1e-5,
        "rope_scaling": {"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0,
                         "mscale": 1.0, "mscale_all_dim": 1.0, "type": "dynamic"},
        "rope_theta": 10000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2", "use_cache": True, "use_cla": False,
        "use_qk_norm": True, "vocab_size": 120818,
    },
    "ERNIE-4.5-0.3B-PT": {
        "architectures": ["Ernie4_5ForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072,
        "max_position_embeddings": 131072, "model_type": "ernie4_5", "num_attention_heads": 16,
        "num_hidden_layers": 18, "num_key_value_heads": 2, "pad_token_id": 0,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "use_bias": False, "use_cache": False, "vocab_size": 103424,
    },
    "GLM-4-9B-0414": {
        "architectures": ["Glm4ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "eos_token_id": [151329, 151336, 151338], "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 13696,
        "max_position_embeddings": 32768, "model_type": "glm4", "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 2, "pad_token_id": 151329,
        "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.52.0.dev0", "use_cache": True, "vocab_size": 151552,
    },
    "Falcon3-1B-Instruct": USUAL | {
        "activation": "swiglu", "architectures": ["LlamaForCausalLM"], "attention_bias": False,
        "bos_token_id": 11, "eos_token_id": 11, "head_dim": 256, "hidden_size": 2048,
        "intermediate_size": 8192, "max_position_embeddings": 8192, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 8, "num_hidden_layers": 18,
        "num_key_value_heads": 4, "pad_token_id": 2023, "pretraining_tp": 1,
        "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1000042,
        "tie_word_embeddings": False, "vocab_size": 131072,
    },
    "OLMo-2-0425-1B": {
        "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 4096,
        "model_type": "olmo2", "num_attention_heads": 16, "num_hidden_layers": 16,
        "num_key_value_heads": 16, "pad_token_id": 100277, "rms_norm_eps": 1e-6,
        "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False,
        "torch_dtype": "float32", "transformers_version": "4.51.3", "use_cache": False,
        "vocab_size": 100352,
    },
    "Qwen3.5-0.8B": {
        "architectures": ["Qwen3_5ForConditionalGeneration"], "image_token_id": 248056,
        "model_type": "qwen3_5", "tie_word_embeddings": True,
        "text_config": {
            "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True,
            "dtype": "bfloat16", "eos_token_id": 248044, "full_attention_interval": 4,
            "head_dim": 256, "hidden_act": "silu", "hidden_size": 1024,
            "initializer_range": 0.02, "intermediate_size": 3584,
            "layer_types": [
                "linear_attention" if (i + 1) % 4 else "full_attention" for i in range(24)
            ],
            "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16,
            "linear_num_value_heads": 16, "linear_value_head_dim": 128,
            "mamba_ssm_dtype": "float32", "max_position_embeddings": 262144,
            "mlp_only_layers": [], "model_type": "qwen3_5_text", "mtp_num_hidden_layers": 1,
            "mtp_use_dedicated_embeddings": False, "num_attention_heads": 8,
            "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "mrope_interleaved": True, "mrope_section": [11, 11, 10],
                "partial_rotary_factor": 0.25, "rope_theta": 10000000, "rope_type": "default",
            },
            "tie_word_embeddings": True, "use_cache": True, "vocab_size": 248320,
        },
        "transformers_version": "4.57.0.dev0", "video_token_id": 248057,
        "vision_config": {"depth": 12, "hidden_size": 768, "model_type": "qwen3_5"},
        "vision_end_token_id": 248054, "vision_start_token_id": 248053,
    },
    "LFM2-1.2B": {
        "architectures": ["Lfm2ForCausalLM"], "block_auto_adjust_ff_dim": True, "block_dim": 2048,
        "block_ff_dim": 12288, "block_ffn_dim_multiplier": 1.0, "block_mlp_init_scale": 1.0,
        "block_multiple_of": 256, "block_norm_eps": 1e-5, "block_out_init_scale": 1.0,
        "block_use_swiglu": True, "block_use_xavier_init": True, "bos_token_id": 1,
        "conv_L_cache": 3, "conv_bias": False, "conv_dim": 2048, "conv_dim_out": 2048,
        "conv_use_xavier_init": True, "eos_token_id": 7,
        "full_attn_idxs": [2, 5, 8, 10, 12, 14], "hidden_size": 2048, "initializer_range": 0.02,
        "max_position_embeddings": 128000, "model_type": "lfm2", "norm_eps": 1e-5,
        "num_attention_heads": 32, "num_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "pad_token_id": 0, "rope_theta": 1000000.0,
        "torch_dtype": "bfloat16", "transformers_version": "4.54.0.dev0", "use_cache": True,
        "use_pos_enc": True, "vocab_size": 65536,
    },
    "Olmo-3-1025-7B": {
        "architectures": ["Olmo3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 11008,
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
        "max_position_embeddings": 65536, "model_type": "olmo3", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "pad_token_id": 100277,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1,
                         "factor": 8.0, "original_max_position_embeddings": 8192,
                         "rope_type": "yarn"},
        "rope_theta": 500000, "sliding_window": 4096, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.57.0.dev0", "use_cache": False,
        "vocab_size": 100278,
    },
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False,
        "attention_dropout": 0.0, "bos_token_id": 151643, "decoder_sparse_step": 1,
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960,
        "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
        "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
        "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-6,
        "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "LFM2.5-350M": {
        "architectures": ["Lfm2ForCausalLM"], "block_auto_adjust_ff_dim": True, "block_dim": 1024,
        "block_ff_dim": 6656, "block_ffn_dim_multiplier": 1.0, "block_mlp_init_scale": 1.0,
        "block_multiple_of": 256, "block_norm_eps": 1e-5, "block_out_init_scale": 1.0,
        "block_use_swiglu": True, "block_use_xavier_init": True, "bos_token_id": 1,
        "conv_L_cache": 3, "conv_bias": False, "conv_dim": 1024, "conv_use_xavier_init": True,
        "dtype": "bfloat16", "eos_token_id": 7, "hidden_size": 1024, "initializer_range": 0.02,
        "intermediate_size": 6656,
        "layer_types": [
            "full_attention" if i in (2, 5, 8, 10, 12, 14) else "conv" for i in range(16)
        ],
        "max_position_embeddings": 128000, "model_type": "lfm2", "norm_eps": 1e-5,
        "num_attention_heads": 16, "num_heads": 16, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "pad_token_id": 0,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "tie_embedding": True, "transformers_version": "5.0.0.dev0", "use_cache": True,
        "use_pos_enc": True, "vocab_size": 65536,
    },
    "gemma-4-E2B-it": {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "audio_config": {"hidden_size": 1024, "model_type": "gemma4_audio"},
        "audio_token_id": 258881, "boa_token_id": 256000, "boi_token_id": 255999,
        "dtype": "bfloat16", "eoa_token_id": 258883, "eoa_token_index": 258883,
        "eoi_token_id": 258882, "eos_token_id": [1, 106], "image_token_id": 258880,
        "initializer_range": 0.02, "model_type": "gemma4",
        "text_config": {
            "attention_bias": False, "attention_dropout": 0.0, "attention_k_eq_v": False,
            "bos_token_id": 2, "dtype": "bfloat16", "enable_moe_block": False, "eos_token_id": 1,
            "expert_intermediate_size": None, "final_logit_softcapping": 30.0,
            "global_head_dim": 512, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 1536, "hidden_size_per_layer_input": 256, "initializer_range": 0.02,
            "intermediate_size": 6144,
            "layer_types": [*["sliding_attention"] * 4, "full_attention"] * 7,
            "max_position_embeddings": 131072, "model_type": "gemma4_text",
            "num_attention_heads": 8, "num_experts": None, "num_global_key_value_heads": None,
            "num_hidden_layers": 35, "num_key_value_heads": 1, "num_kv_shared_layers": 20,
            "pad_token_id": 0, "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "full_attention": {
                    "partial_rotary_factor": 0.25, "rope_theta": 1000000.0,
                    "rope_type": "proportional",
                },
                "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
            },
            "sliding_window": 512, "tie_word_embeddings": True, "top_k_experts": None,
            "use_bidirectional_attention": None, "use_cache": True, "use_double_wide_mlp": True,
            "vocab_size": 262144, "vocab_size_per_layer_input": 262144,
        },
        "tie_word_embeddings": True, "transformers_version": "5.5.0.dev0",
        "video_token_id": 258884,
        "vision_config": {"hidden_size": 768, "model_type": "gemma4_vision"},
        "vision_soft_tokens_per_image": 280,
    },
    "SmolLM3-3B": {
        "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": 128012, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 11008,
        "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536,
        "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3",
        "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9,
        "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4,
        "pad_token_id": 128004, "pretraining_tp": 2, "rms_norm_eps": 1e-6, "rope_scaling": None,
        "rope_theta": 5000000.0, "sliding_window": None, "torch_dtype": "bfloat16",
        "transformers_version": "4.54.0.dev0", "use_cache": False, "use_sliding_window": False,
        "vocab_size": 128256,
    },
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
        "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2880, "initial_context_length": 4096, "initializer_range": 0.02,
        "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64,
        "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
        "num_local_experts": 32, "output_router_logits": False, "pad_token_id": 199999,
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
            "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": False,
        },
        "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128,
        "swiglu_limit": 7.0, "tie_word_embeddings": False, "transformers_version": "4.55.0.dev0",
        "use_cache": True, "vocab_size": 201088,
    },
}  # fmt: skip
WINDOWS = {"gpt-oss-20b": 128,
           "Mistral-7B-v0.1": 4096, "gemma-3-270m": 512, "gemma-3-4b-it": 1024,
           "embeddinggemma-300m": 257, "gemma-4-E2B-it": 512,
           "Phi-3-mini-4k-instruct": 2047, "Phi-3-mini-128k-instruct": 262144,
           "Phi-4-mini-instruct": 262144, "gemma-2-2b-it": 4096, "EXAONE-4.0-32B": 4096,
           "Olmo-3-1025-7B": 4096,
           }  # fmt: skip
STRETCHED = {
    "gpt-oss-20b": RopeScaling(
        "yarn", 32.0, original_context=4096, attention_factor=1.3465735902799727, truncate=False,
    ),
    "Llama-3.2-1B-Instruct": RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
    "gemma-3-4b-it": RopeScaling("linear", 8.0),
    "EXAONE-4.0-1.2B": RopeScaling("llama3", 16.0, 1.0, 4.0, 8192),
    "EXAONE-4.0-32B": RopeScaling("llama3", 16.0, 1.0, 4.0, 8192),
    "Phi-3-mini-128k-instruct": RopeScaling(
        "longrope", 32.0, original_context=4096, attention_factor=(1 + 5 / 12) ** 0.5,
        short_factors=(1.05,) * 48, long_factors=tuple(SLOW),
    ),
    "Phi-4-mini-instruct": RopeScaling(
        "longrope", 32.0, original_context=4096, attention_factor=(1 + 5 / 12) ** 0.5,
        short_factors=(1.0,) * 48, long_factors=tuple(SLOW),
    ),
    "Qwen3-4B with yarn": RopeScaling(
        "yarn", 4.0, original_context=32768, attention_factor=1.138629436111989,
    ),
    "Ministral-3-3B-Instruct-2512-BF16": RopeScaling("yarn", 16.0, original_context=16384),
    "Olmo-3-1025-7B": RopeScaling(
        "yarn", 8.0, original_context=8192, attention_factor=1.2079441541679836,
    ),
}  # fmt: skip
CONTEXTS = {"Qwen3-4B with yarn": 131072}
"""Of models that reach further than their max_position_embeddings."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    config = read_config(tmp_path).model
    windows = {block.window for block in config.blocks if block.mixer == "attention"}
    assert windows - {None} == {WINDOWS.get(name)} - {None}
    assert {rope.scaling for rope in config.ropes} - {None} == {STRETCHED.get(name)} - {None}
    inner = PUBLISHED[name].get("text_config", PUBLISHED[name])
    context = inner.get("max_position_embeddings", 131072)
    assert config.context == CONTEXTS.get(name, context)
    assert (config.hidden, config.layers) == (inner["hidden_size"], inner["num_hidden_layers"])


def test_published_gated_delta_nets(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Qwen3.5-0.8B"]))
    config = read_config(tmp_path).model
    known = SHAPES["qwen3.5-0.8b"]
    assert config == replace(known, bos=config.bos)
    assert [i for i, block in enumerate(config.blocks) if block.delta is None] == [
        3, 7, 11, 15, 19, 23,
    ]  # fmt: skip


def test_published_sinks(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["gpt-oss-20b"]))
    read = read_config(tmp_path)
    known = SHAPES["gpt-oss-20b"]
    assert read.model == replace(known, eos=read.model.eos)
    assert read.biases == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert all(block.sinks for block in read.model.blocks)
    assert windows(read.model) == (128, None) * 12
    # 20.9 thousand million weights, of which a token reads those of 4 of 32 experts
    shapes = [(read.model.tokens_share(name), n * k) for name, (n, k) in read.model.linears()]
    assert sum(size for _, size in shapes) == 20_907_786_240
    assert sum(share * size for share, size in shapes) == 4_186_275_840


@pytest.mark.parametrize(
    ("name", "over"),
    [
        ("gemma4-e2b", {}),
        (
            "gemma4-e4b",
            {
                "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 42,
                "num_key_value_heads": 2, "num_kv_shared_layers": 18, "use_double_wide_mlp": False,
                "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 7,
            },
        ),
    ],
)  # fmt: skip
def test_published_layers_with_inputs_of_their_own(
    tmp_path: Path, name: str, over: dict[str, Any]
) -> None:
    published = PUBLISHED["gemma-4-E2B-it"]
    whole = published | {"text_config": published["text_config"] | over}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    config = read_config(tmp_path).model
    assert config == replace(SHAPES[name], bos=config.bos, eos=config.eos)
    assert (config.layer_input, config.attn_scale, config.logit_softcap) == (256, 1.0, 30.0)


def test_published_experts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Qwen3-30B-A3B"]))
    config = read_config(tmp_path).model
    experts = ExpertsSpec(count=128, chosen=8, ffn=768, normalize=True)
    assert {block.experts for block in config.blocks} == {experts}
    assert config.blocks == SHAPES["qwen3-30b-a3b"].blocks


@pytest.mark.parametrize(("name", "ffn"), [("LFM2-1.2B", 8192), ("LFM2.5-350M", 4608)])
def test_published_short_convolutions(tmp_path: Path, name: str, ffn: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    config = read_config(tmp_path).model
    attends = [i for i, block in enumerate(config.blocks) if block.mixer == "attention"]
    assert attends == [2, 5, 8, 10, 12, 14]
    assert {block.window for block in config.blocks if block.mixer == "short_conv"} == {3}
    assert (config.ffn, config.tied, config.bos, config.eos) == (ffn, True, 1, (7,))


@pytest.mark.parametrize(
    ("outer", "inner", "words"),
    [
        ({"is_causal": False}, {}, "is_causal is False"),
        ({}, {"is_causal": False}, "is_causal is False"),
        ({"residual_multiplier": 0.2}, {}, r"residual_multiplier is 0\.2"),
        ({}, {"model_type": "gemma2"}, "text_config is a model of type 'gemma2'"),
        ({}, {"architectures": ["OddForCausalLM"]}, "class is 'OddForCausalLM'"),
        ({"quantization_config": {"quant_method": "hqq"}}, {}, "quant_method 'hqq'"),
    ],
)
def test_both_levels_of_a_vision_language_model_are_looked_at(
    tmp_path: Path, outer: dict[str, Any], inner: dict[str, Any], words: str
) -> None:
    config = PUBLISHED["gemma-3-4b-it"] | outer
    config["text_config"] = config["text_config"] | inner
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=words):
        read_config(tmp_path)


WRONG: tuple[Any, ...] = (
    None, "x", -1, 1.5, float("nan"), float("inf"), 10**400, ["a"], {"a": 1}, True, [None],
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_values_of_other_types_never_get_into_a_config(family: str) -> None:
    """What an artifact's metadata says may be damaged in any way."""
    good = tiny_config(family).to_dict()
    refused = 0
    for key in good:
        for value in WRONG:
            try:
                config = ModelConfig.from_dict(good | {key: value})
            except FormatError:
                refused += 1
            else:
                again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
                assert again == config
    assert refused > 6 * len(good)


def test_tensors_that_nothing_reads() -> None:
    model = random_model(tiny_config("llama"))
    model.validate()
    name = "model.layers.0.mlp.up_proj.bias"
    odd = Model(model.config, {**model.tensors, name: model.tensors["model.norm.weight"]})
    with pytest.raises(FormatError, match=f"holds 1 tensors that nothing reads.*{name}"):
        odd.validate()
