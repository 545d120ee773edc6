"""Qwen 3: Qwen 2 with norms on each head of q and k in place of the biases.

Source: configuration_qwen3.py and modeling_qwen3.py of Transformers 5.24.
"""

from __future__ import annotations

from dataclasses import replace

from edgeq.importers.gguf.architecture import Architecture
from edgeq.importers.huggingface.families import qwen2
from edgeq.importers.huggingface.family import Family, Shape, sizes
from edgeq.importers.huggingface.values import Values
from edgeq.model.block import BlockSpec


def blocks(values: Values, shape: Shape) -> list[BlockSpec]:
    """Qwen 2's, with norms on q and k."""
    return [replace(block, qk_norm="head") for block in qwen2.blocks(values, shape)]


FAMILY = Family(
    name="qwen3",
    model_types=("qwen3",),
    classes=("Qwen3ForCausalLM", "Qwen3Model"),
    blocks=blocks,
    defaults={**qwen2.FAMILY.defaults, "max_position_embeddings": 32768, "head_dim": 128},
    biases="attention_bias",
    gguf=Architecture(name="qwen3", qk_norm="head"),
    genai="qwen3",
    shapes={
        "qwen3-0.6b": sizes(1024, 3072, 28, 16, 8, 151936, 40960, **qwen2.PUBLISHED),
        "qwen3-1.7b": sizes(2048, 6144, 28, 16, 8, 151936, 40960, **qwen2.PUBLISHED),
    },
)
