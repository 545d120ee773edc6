"""OLMo 2: norms after attention and feed-forward alone, and one over all heads of q and of k.

Source: configuration_olmo2.py and modeling_olmo2.py of Transformers 5.24; llama.cpp's
src/models/olmo2.cpp.
"""

from __future__ import annotations

from edgeq.importers.gguf.architecture import NORMS_AFTER, Architecture
from edgeq.importers.huggingface.family import COMMON_DEFAULTS, Family, Shape, sizes
from edgeq.importers.huggingface.rope import read_rope
from edgeq.importers.huggingface.values import Values
from edgeq.importers.huggingface.windows import refuse_windows
from edgeq.model.block import BlockSpec


def blocks(values: Values, shape: Shape) -> tuple[BlockSpec, ...]:
    """All layers are alike."""
    refuse_windows(values, shape, "olmo2")
    rope = read_rope(values, shape)
    block = BlockSpec(norm_before=False, norm_after=True, qk_norm="all", rope=rope)
    return (block,) * shape.layers


FAMILY = Family(
    name="olmo2",
    model_types=("olmo2",),
    classes=("Olmo2ForCausalLM", "Olmo2Model"),
    blocks=blocks,
    defaults={
        **COMMON_DEFAULTS,
        "rms_norm_eps": 1e-5,
        "vocab_size": 50304,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "eos_token_id": 50279,
    },
    biases="attention_bias",
    gguf=Architecture(
        name="olmo2",
        tensors=NORMS_AFTER,
        norm_before=False,
        norm_after=True,
        qk_norm="all",
        heads_span_hidden=True,
        untied=True,
        # those of OLMo 3, whose files are of this architecture
        windows="optional",
        window_period=4,
        local_unscaled=True,
    ),
    shapes={
        "olmo2-1b": sizes(
            2048,
            8192,
            16,
            16,
            16,
            100352,
            4096,
            rms_norm_eps=1e-6,
            rope_theta=5e5,
            eos_token_id=100257,
            tie_word_embeddings=False,
        ),
    },
)
