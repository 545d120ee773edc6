"""Qwen 2 and 2.5: biases on q, k and v, and a sliding window in the later layers.

Source: configuration_qwen2.py and modeling_qwen2.py of Transformers 5.24.
"""

from __future__ import annotations

from edgeq.importers.gguf.architecture import Architecture
from edgeq.importers.huggingface.family import COMMON_DEFAULTS, Family, Shape, sizes
from edgeq.importers.huggingface.rope import read_rope
from edgeq.importers.huggingface.values import Values
from edgeq.importers.huggingface.windows import layers_from, read_windows
from edgeq.model.block import BlockSpec


def blocks(values: Values, shape: Shape) -> list[BlockSpec]:
    """The window, if it is switched on, applies from layer ``max_window_layers`` on."""
    rope = read_rope(values, shape)
    windows = read_windows(
        values,
        shape,
        "qwen2",
        sliding=layers_from(values, shape, "max_window_layers", 28),
        switch="followed",
    )
    return [BlockSpec(rope=rope, window=window) for window in windows]


PUBLISHED = {
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True, "bos_token_id": 151643,
    "eos_token_id": [151645, 151643],
}  # fmt: skip
"""What the small published models have in common."""

FAMILY = Family(
    name="qwen2",
    model_types=("qwen2",),
    classes=("Qwen2ForCausalLM", "Qwen2Model"),
    blocks=blocks,
    defaults={**COMMON_DEFAULTS, "max_position_embeddings": 32768, "num_key_value_heads": 32},
    biases="qkv",
    gguf=Architecture(name="qwen2", biases=("q_proj", "k_proj", "v_proj")),
    genai="qwen2",
    shapes={
        "qwen2.5-0.5b": sizes(896, 4864, 24, 14, 2, 151936, 32768, **PUBLISHED),
        "qwen2.5-1.5b": sizes(1536, 8960, 28, 12, 2, 151936, 32768, **PUBLISHED),
    },
)
