"""Granite 3 with experts: Granite 3 whose feed-forwards are mixtures of experts.

Source: configuration_granitemoe.py and modeling_granitemoe.py of Transformers 5.24; llama.cpp's
src/models/granite.cpp.
"""

from __future__ import annotations

from dataclasses import replace

from edgeq.importers.huggingface.experts import count_of, read_experts
from edgeq.importers.huggingface.families import granite
from edgeq.importers.huggingface.family import COMMON_DEFAULTS, Family, Shape, sizes
from edgeq.importers.huggingface.rope import read_rope
from edgeq.importers.huggingface.values import Values
from edgeq.importers.huggingface.windows import refuse_windows
from edgeq.model.block import BlockSpec


def blocks(values: Values, shape: Shape) -> tuple[BlockSpec, ...]:
    """All layers are alike. The weights of experts are the softmax over the chosen ones."""
    refuse_windows(values, shape, "granitemoe")
    experts = read_experts(
        values,
        count_of(values, "num_local_experts"),
        values.count("intermediate_size"),
        normalize=True,
    )
    return (BlockSpec(rope=read_rope(values, shape), experts=experts),) * shape.layers


FAMILY = Family(
    name="granitemoe",
    model_types=("granitemoe",),
    classes=("GraniteMoeForCausalLM", "GraniteMoeModel"),
    blocks=blocks,
    defaults={
        **COMMON_DEFAULTS,
        **granite.MULTIPLIERS,
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    biases="attention_bias",
    numbers=granite.numbers,
    tensors={"mlp.router": "block_sparse_moe.router.layer"},
    fused={
        "block_sparse_moe.input_linear": ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
        "block_sparse_moe.output_linear": ("mlp.experts.*.down_proj",),
    },
    renamed={
        "block_sparse_moe.router.weight": "block_sparse_moe.router.layer.weight",
        "block_sparse_moe.experts.gate_up_proj": "block_sparse_moe.input_linear.weight",
        "block_sparse_moe.experts.down_proj": "block_sparse_moe.output_linear.weight",
    },
    gguf=replace(granite.GGUF, name="granitemoe", expert_score="softmax"),
    shapes={
        "granite-3-1b-a400m": sizes(
            1024, 512, 24, 16, 8, 49155, 4096, num_local_experts=32, num_experts_per_tok=8,
            rms_norm_eps=1e-6, rope_theta=10_000.0, tie_word_embeddings=True,
            embedding_multiplier=12.0, attention_multiplier=0.015625, residual_multiplier=0.22,
            logits_scaling=6.0, bos_token_id=0, eos_token_id=0,
        ),
    },
)  # fmt: skip
