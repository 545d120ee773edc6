"""Mistral and Ministral: Llama with a sliding window.

Source: configuration_mistral.py and configuration_ministral.py of Transformers 5.24.
"""

from __future__ import annotations

from edgeq.importers.huggingface.families import llama
from edgeq.importers.huggingface.family import COMMON_DEFAULTS, Family, Shape, sizes
from edgeq.importers.huggingface.rope import read_rope
from edgeq.importers.huggingface.values import Values
from edgeq.importers.huggingface.windows import read_windows
from edgeq.model.block import BlockSpec


def blocks(values: Values, shape: Shape) -> list[BlockSpec]:
    """A window in all layers, or in those that layer_types names: then Transformers computes the
    model as a Ministral."""
    rope = read_rope(values, shape)
    windows = read_windows(
        values,
        shape,
        "mistral",
        sliding=(True,) * shape.layers,
        layer_types="layer_types" in values.raw,
        switch="refused",
    )
    return [BlockSpec(rope=rope, window=window) for window in windows]


FAMILY = Family(
    name="mistral",
    model_types=("mistral", "ministral"),
    classes=("MistralForCausalLM", "MistralModel", "MinistralForCausalLM", "MinistralModel"),
    blocks=blocks,
    defaults={
        **COMMON_DEFAULTS,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    gguf=llama.FAMILY.gguf,
    genai="mistral",
    shapes={
        "mistral-7b": sizes(
            4096,
            14336,
            32,
            32,
            8,
            32768,
            32768,
            rms_norm_eps=1e-5,
            rope_theta=1e6,
            sliding_window=None,
        ),
    },
)
