"""SmolLM3: Llama without rotary positions in every fourth layer.

Source: configuration_smollm3.py and modeling_smollm3.py of Transformers 5.24; llama.cpp's
src/models/smollm3.cpp.
"""

from __future__ import annotations

from edgeq.core.errors import FormatError
from edgeq.importers.gguf.architecture import Architecture
from edgeq.importers.huggingface.family import COMMON_DEFAULTS, Family, Shape, sizes
from edgeq.importers.huggingface.rope import read_rope
from edgeq.importers.huggingface.values import Values
from edgeq.importers.huggingface.windows import read_windows
from edgeq.importers.unread import shown
from edgeq.model.block import BlockSpec


def blocks(values: Values, shape: Shape) -> list[BlockSpec]:
    """Layers without positions are also those that a sliding window applies to, if there is one."""
    rope, rotates = read_rope(values, shape, base=2_000_000.0), _rotating_layers(values, shape)
    windows = read_windows(
        values, shape, "smollm3", sliding=[not r for r in rotates], switch="followed"
    )
    return [
        BlockSpec(rope=rope if rotates[i] else None, window=windows[i]) for i in range(shape.layers)
    ]


def _rotating_layers(values: Values, shape: Shape) -> list[bool]:
    """Whether each layer has rotary positions, as ``no_rope_layers`` says with ones and zeros."""
    values.read.add("no_rope_layer_interval")
    listed = values.get("no_rope_layers")
    if listed is None:
        interval = values.count("no_rope_layer_interval")
        return [(i + 1) % interval != 0 for i in range(shape.layers)]
    known = isinstance(listed, list) and all(rotates in (0, 1) for rotates in listed)
    if not known or len(listed) < shape.layers:
        raise FormatError(
            f"{values.path}: no_rope_layers is {shown(listed)}; it must hold 1 for each of "
            f"{shape.layers} layers with rotary positions and 0 for each without"
        )
    return [bool(rotates) for rotates in listed[: shape.layers]]


FAMILY = Family(
    name="smollm3",
    model_types=("smollm3",),
    classes=("SmolLM3ForCausalLM", "SmolLM3Model"),
    blocks=blocks,
    defaults={
        **COMMON_DEFAULTS,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "no_rope_layer_interval": 4,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    biases="attention_bias",
    gguf=Architecture(
        name="smollm3",
        interleaved=True,
        rope_layers=lambda layer, layers: (layer + 1) % 4 != 0,
        biases=("q_proj", "k_proj", "v_proj", "o_proj"),
    ),
    genai="smollm3",
    shapes={
        "smollm3-3b": sizes(
            2048, 11008, 36, 16, 4, 128256, 65536, rope_theta=5e6, eos_token_id=128012
        ),
    },
)
