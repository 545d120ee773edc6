"""GLM-4 (the 0414 models): norms before and after, and half of each head rotates neighbors.

Source: configuration_glm4.py and modeling_glm4.py of Transformers 5.24; llama.cpp's
src/models/glm4.cpp.
"""

from __future__ import annotations

from edgeq.importers.gguf.architecture import NORMS_AROUND, Architecture
from edgeq.importers.huggingface.family import COMMON_DEFAULTS, Family, Shape, sizes
from edgeq.importers.huggingface.rope import read_rope
from edgeq.importers.huggingface.values import Values
from edgeq.importers.huggingface.windows import refuse_windows
from edgeq.model.block import BlockSpec


def blocks(values: Values, shape: Shape) -> tuple[BlockSpec, ...]:
    """All layers are alike."""
    refuse_windows(values, shape, "glm4")
    rope = read_rope(values, shape, partial=True, share=0.5)
    return (BlockSpec(norm_after=True, rope=rope),) * shape.layers


FAMILY = Family(
    name="glm4",
    model_types=("glm4",),
    classes=("Glm4ForCausalLM", "Glm4Model"),
    blocks=blocks,
    defaults={
        **COMMON_DEFAULTS,
        "rms_norm_eps": 1.5625e-7,
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 13696,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "attention_bias": True,
        "eos_token_id": [151329, 151336, 151338],
    },
    biases="qkv_if_attention_bias",
    tensors={
        "post_attention_layernorm": "post_self_attn_layernorm",
        "pre_feedforward_layernorm": "post_attention_layernorm",
        "post_feedforward_layernorm": "post_mlp_layernorm",
    },
    interleaved=True,
    fused={"mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")},
    gguf=Architecture(
        name="glm4",
        tensors={**NORMS_AROUND, "mlp.gate_proj": "ffn_up"},
        interleaved=True,
        partial_rope=True,
        biases=("q_proj", "k_proj", "v_proj"),
        norm_after=True,
    ),
    shapes={
        "glm4-9b-0414": sizes(
            4096, 13696, 40, 32, 2, 151552, 32768, rms_norm_eps=1e-5, attention_bias=False,
            eos_token_id=[151329, 151336, 151338],
        ),
    },
)  # fmt: skip
