"""Llama 2 and 3, and models of other names that are computed as they are (SmolLM2, TinyLlama).

Source: configuration_llama.py and modeling_llama.py of Transformers 5.24.
"""

from __future__ import annotations

from edgeq.importers.gguf.architecture import Architecture
from edgeq.importers.huggingface.family import COMMON_DEFAULTS, Family, Shape
from edgeq.importers.huggingface.rope import read_rope
from edgeq.importers.huggingface.values import Values
from edgeq.importers.huggingface.windows import refuse_windows
from edgeq.model.block import BlockSpec


def blocks(values: Values, shape: Shape) -> tuple[BlockSpec, ...]:
    """All layers alike; the classes of Transformers follow no window."""
    refuse_windows(values, shape, "llama")
    return (BlockSpec(rope=read_rope(values, shape)),) * shape.layers


FAMILY = Family(
    name="llama",
    model_types=("llama", "smollm"),
    classes=("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel"),
    blocks=blocks,
    defaults={
        **COMMON_DEFAULTS,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    biases="attention_bias",
    gguf=Architecture(
        name="llama",
        interleaved=True,
        rope_factors=True,
        biases=("q_proj", "k_proj", "v_proj", "o_proj"),
    ),
    genai="llama",
)
