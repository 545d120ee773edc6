"""Granite 3: Llama with factors on embeddings, branches and logits, and a scale of attention.

Source: configuration_granite.py and modeling_granite.py of Transformers 5.24; llama.cpp's
src/models/granite.cpp.
"""

from __future__ import annotations

from typing import Any

from edgeq.importers.gguf.architecture import Architecture
from edgeq.importers.huggingface.family import COMMON_DEFAULTS, Family, Shape, sizes
from edgeq.importers.huggingface.rope import read_rope
from edgeq.importers.huggingface.values import Values
from edgeq.importers.huggingface.windows import refuse_windows
from edgeq.model.block import BlockSpec


def blocks(values: Values, shape: Shape) -> tuple[BlockSpec, ...]:
    """All layers are alike."""
    refuse_windows(values, shape, "granite")
    return (BlockSpec(rope=read_rope(values, shape)),) * shape.layers


def numbers(values: Values, shape: Shape) -> dict[str, Any]:
    """The multipliers; logits are divided by theirs."""
    return {
        "embed_scale": values.number("embedding_multiplier"),
        "attn_scale": values.number("attention_multiplier"),
        "residual_scale": values.number("residual_multiplier"),
        "logit_scale": 1 / values.number("logits_scaling"),
    }


MULTIPLIERS = {
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}

GGUF = Architecture(
    name="granite",
    interleaved=True,
    rope_factors=True,
    biases=("q_proj", "k_proj", "v_proj", "o_proj"),
    multipliers=("embed_scale", "residual_scale", "logit_scale", "attn_scale"),
)

FAMILY = Family(
    name="granite",
    model_types=("granite",),
    classes=("GraniteForCausalLM", "GraniteModel"),
    blocks=blocks,
    defaults={
        **COMMON_DEFAULTS,
        **MULTIPLIERS,
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    biases="attention_bias",
    numbers=numbers,
    gguf=GGUF,
    genai="granite",
    shapes={
        "granite-3.3-2b": sizes(
            2048, 8192, 40, 32, 8, 49159, 131072, rms_norm_eps=1e-5, rope_theta=10_000_000.0,
            tie_word_embeddings=True, embedding_multiplier=12.0, attention_multiplier=0.015625,
            residual_multiplier=0.22, logits_scaling=8.0, bos_token_id=0, eos_token_id=0,
        ),
    },
)  # fmt: skip
