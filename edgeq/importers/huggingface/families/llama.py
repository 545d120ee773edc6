"""Llama 2 and 3, and models of other names that are computed as they are (SmolLM2, TinyLlama).

Source: configuration_llama.py and modeling_llama.py of Transformers 5.24.
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
    """All layers are alike. The classes of Transformers ignore sliding windows."""
    refuse_windows(values, shape, "llama")
    return (BlockSpec(rope=read_rope(values, shape)),) * shape.layers


_FALCON3 = {"bos_token_id": 11, "eos_token_id": 11}
_TIED = {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}


def _llama3(factor: float, *, tied: bool) -> dict[str, Any]:
    """Settings that the models of Llama 3 share."""
    scaling = {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    return {
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": scaling,
        "tie_word_embeddings": tied, "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
    }  # fmt: skip


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
        long_factors=True,
        biases=("q_proj", "k_proj", "v_proj", "o_proj"),
    ),
    genai="llama",
    shapes={
        "stories15m": sizes(288, 768, 6, 6, 6, 32000, 256, **_TIED),
        "stories42m": sizes(512, 1376, 8, 8, 8, 32000, 1024, **_TIED),
        "stories110m": sizes(768, 2048, 12, 12, 12, 32000, 1024, **_TIED),
        "smollm2-135m": sizes(576, 1536, 30, 9, 3, 49152, 8192, rope_theta=1e5, **_TIED),
        "smollm2-360m": sizes(960, 2560, 32, 15, 5, 49152, 8192, rope_theta=1e5, **_TIED),
        "smollm2-1.7b": sizes(2048, 8192, 24, 32, 32, 49152, 8192, rope_theta=130000.0, **_TIED),
        "tinyllama-1.1b": sizes(2048, 5632, 22, 32, 4, 32000, 2048, rms_norm_eps=1e-5),
        "falcon3-1b": sizes(
            2048, 8192, 18, 8, 4, 131072, 8192, head_dim=256, rope_theta=1000042.0, **_FALCON3
        ),
        "llama-3.2-1b": sizes(2048, 8192, 16, 32, 8, 128256, 131072, **_llama3(32.0, tied=True)),
        "llama-3.2-3b": sizes(3072, 8192, 28, 24, 8, 128256, 131072, **_llama3(32.0, tied=True)),
        "llama-3.1-8b": sizes(4096, 14336, 32, 32, 8, 128256, 131072, **_llama3(8.0, tied=False)),
    },
)
