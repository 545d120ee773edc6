"""Gemma 2: soft caps of attention scores and logits, and windows in every other layer.

Norms after attention and feed-forward as well, norm weights with an offset of one, embeddings times
sqrt(hidden).

Source: configuration_gemma2.py and modeling_gemma2.py of Transformers 5.24; llama.cpp's
src/models/gemma2.cpp.
"""

from __future__ import annotations

from typing import Any

from edgeq.importers.gguf.architecture import NORMS_AROUND, Architecture
from edgeq.importers.huggingface.families.gemma3 import accept_older_activation
from edgeq.importers.huggingface.family import Family, Shape, sizes
from edgeq.importers.huggingface.rope import read_rope
from edgeq.importers.huggingface.values import Values
from edgeq.importers.huggingface.windows import read_windows
from edgeq.model.block import BlockSpec


def blocks(values: Values, shape: Shape) -> list[BlockSpec]:
    """Every other layer has a window, the first one too; all rotate alike."""
    rope = read_rope(values, shape)
    sliding = [i % 2 == 0 for i in range(shape.layers)]
    windows = read_windows(values, shape, "gemma2", sliding=sliding)
    accept_older_activation(values)
    return [BlockSpec(norm_after=True, rope=rope, window=window) for window in windows]


def numbers(values: Values, shape: Shape) -> dict[str, Any]:
    """The soft caps; null switches one off."""
    return {
        field: None if values.is_null(key) else values.number(key)
        for field, key in (
            ("attn_softcap", "attn_logit_softcapping"),
            ("logit_softcap", "final_logit_softcapping"),
        )
    }


FAMILY = Family(
    name="gemma2",
    model_types=("gemma2",),
    classes=("Gemma2ForCausalLM", "Gemma2Model"),
    blocks=blocks,
    defaults={
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
    biases="attention_bias",
    activation_key="hidden_activation",
    norm_offset=1.0,
    scaled_embeddings=True,
    numbers=numbers,
    query_scale_key="query_pre_attn_scalar",
    gguf=Architecture(
        name="gemma2",
        tensors=NORMS_AROUND,
        activation="gelu_tanh",
        norm_after=True,
        tied=True,
        scaled_embeddings=True,
        softcaps=True,
        windows="period",
        default_window=4096,
        window_period=2,
        # Gemma 2 27B alone scales its queries by other than the head's size; no key says so
        query_dim=lambda layers, hidden, heads, head_dim: (
            hidden / heads if layers == 46 else head_dim
        ),
    ),
    genai="gemma2",
    hub_tag="gemma2",
    shapes={
        "gemma2-2b": sizes(2304, 9216, 26, 8, 4, 256000, 8192, eos_token_id=[1, 107]),
    },
)
