"""gpt-oss: mixtures of experts with biases and a clamped SwiGLU, and attention with sinks.

Source: configuration_gpt_oss.py and modeling_gpt_oss.py of Transformers 5.24; llama.cpp's
src/models/openai-moe.cpp.
"""

from __future__ import annotations

from typing import Any

from edgeq.core.errors import UnsupportedError
from edgeq.importers.gguf.architecture import Architecture
from edgeq.importers.huggingface.experts import count_of, read_experts
from edgeq.importers.huggingface.family import COMMON_DEFAULTS, Family, Shape, sizes
from edgeq.importers.huggingface.rope import read_rope
from edgeq.importers.huggingface.values import Values
from edgeq.importers.huggingface.windows import read_windows
from edgeq.importers.unread import shown
from edgeq.model.block import BlockSpec

_YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
"""What the configuration class assumes where a file says nothing of rotary scaling."""


def blocks(values: Values, shape: Shape) -> list[BlockSpec]:
    """Every other layer has the window, from the first on, where ``layer_types`` does not say."""
    sliding = [i % 2 == 0 for i in range(shape.layers)]
    windows = read_windows(values, shape, "gpt_oss", sliding=sliding)
    values.check_only({"swiglu_limit": (7.0,), "swiglu_alpha": (1.702,)})
    rope = read_rope(values, shape, base=150_000.0)
    original = rope.scaling.original_context if rope.scaling else shape.context
    _same(values, "initial_context_length", original)
    experts = read_experts(
        values,
        count_of(values, "num_local_experts", "num_experts"),
        values.count("intermediate_size"),
        normalize=True,
        biases=True,
    )
    _same(values, "experts_per_token", experts.chosen)
    return [BlockSpec(rope=rope, window=window, sinks=True, experts=experts) for window in windows]


def _same(values: Values, key: str, number: int) -> None:
    """Refuse a key that Transformers does not read where it says another number."""
    told = values.get(key)
    if told is not None and (isinstance(told, bool) or told != number):
        raise UnsupportedError(
            f"{values.path}: {key} is {shown(told)} and the keys that Transformers reads say "
            f"{number}; keep what the model was trained with"
        )


_PUBLISHED: dict[str, Any] = {
    "head_dim": 64, "num_experts_per_tok": 4, "sliding_window": 128, "rope_theta": 150_000,
    "rope_scaling": _YARN, "eos_token_id": [200002, 199999, 200012],
}  # fmt: skip

FAMILY = Family(
    name="gpt_oss",
    model_types=("gpt_oss",),
    classes=("GptOssForCausalLM", "GptOssModel"),
    blocks=blocks,
    defaults={
        **COMMON_DEFAULTS,
        "rms_norm_eps": 1e-5,
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "sliding_window": 128,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "attention_bias": True,
        "rope_parameters": _YARN,
    },
    biases="attention_bias",
    activations={"silu": "clamped_swiglu"},
    transposed_experts=True,
    gguf=Architecture(
        name="gpt-oss",
        tensors={
            "post_attention_layernorm": "post_attention_norm",
            "self_attn.sinks": "attn_sinks.weight",
        },
        untied=True,
        biases=("q_proj", "k_proj", "v_proj", "o_proj"),
        biases_required=True,
        activation="clamped_swiglu",
        windows="period",
        window_period=2,
        sinks=True,
        expert_score="softmax",
        expert_ffn=True,
        expert_biases=True,
    ),
    shapes={
        "gpt-oss-20b": sizes(
            2880, 2880, 24, 64, 8, 201088, 131072, num_local_experts=32, **_PUBLISHED
        ),
        "gpt-oss-120b": sizes(
            2880, 2880, 36, 64, 8, 201088, 131072, num_local_experts=128, **_PUBLISHED
        ),
    },
)
