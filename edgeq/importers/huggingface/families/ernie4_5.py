"""ERNIE 4.5 without experts: Llama whose heads rotate neighbors.

Source: configuration_ernie4_5.py and modeling_ernie4_5.py of Transformers 5.24; llama.cpp's
src/models/ernie4-5.cpp.
"""

from __future__ import annotations

from edgeq.importers.gguf.architecture import Architecture
from edgeq.importers.huggingface.family import COMMON_DEFAULTS, Family, Shape, sizes
from edgeq.importers.huggingface.rope import read_rope
from edgeq.importers.huggingface.values import Values
from edgeq.importers.huggingface.windows import refuse_windows
from edgeq.model.block import BlockSpec

_BASE = 500_000.0


def blocks(values: Values, shape: Shape) -> tuple[BlockSpec, ...]:
    """All layers are alike."""
    refuse_windows(values, shape, "ernie4_5")
    values.check_only({"use_bias": (False,)})
    return (BlockSpec(rope=read_rope(values, shape, base=_BASE)),) * shape.layers


FAMILY = Family(
    name="ernie4_5",
    model_types=("ernie4_5",),
    classes=("Ernie4_5ForCausalLM", "Ernie4_5Model"),
    blocks=blocks,
    defaults={
        **COMMON_DEFAULTS,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "vocab_size": 103424,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "use_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    interleaved=True,
    gguf=Architecture(name="ernie4_5", interleaved=True),
    genai="ernie4_5",
    shapes={"ernie4.5-0.3b": sizes(1024, 3072, 18, 16, 2, 103424, 131072)},
)
