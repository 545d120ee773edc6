"""MiniCPM (1 and 2): Llama with factors on embeddings, branches and logits.

Source: configuration_minicpm.py and modeling_minicpm.py of openbmb/MiniCPM-2B-sft-bf16, which
Transformers does not have; llama.cpp's convert_hf_to_gguf.py and src/models/granite.cpp.
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
    refuse_windows(values, shape, "minicpm")
    return (BlockSpec(rope=read_rope(values, shape)),) * shape.layers


def numbers(values: Values, shape: Shape) -> dict[str, Any]:
    """The factors, of which two depend on the sizes."""
    return {
        "embed_scale": values.number("scale_emb"),
        "residual_scale": values.number("scale_depth") / shape.layers**0.5,
        "logit_scale": values.number("dim_model_base") / shape.hidden,
    }


FAMILY = Family(
    name="minicpm",
    model_types=("minicpm",),
    classes=("MiniCPMForCausalLM", "MiniCPMModel"),
    blocks=blocks,
    defaults={
        **COMMON_DEFAULTS,
        "tie_word_embeddings": True,
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "scale_emb": 1.0,
        "scale_depth": 1.0,
        "dim_model_base": 1.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    biases="attention_bias",
    numbers=numbers,
    gguf=Architecture(
        name="minicpm",
        interleaved=True,
        multipliers=("embed_scale", "residual_scale", "logit_scale"),
        multipliers_required=True,
    ),
    shapes={
        "minicpm-2b": sizes(
            2304, 5760, 40, 36, 36, 122753, 4096, rms_norm_eps=1e-5, scale_emb=12.0,
            scale_depth=1.4, dim_model_base=256.0,
        ),
    },
)  # fmt: skip
