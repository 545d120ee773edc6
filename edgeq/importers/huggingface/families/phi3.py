"""Phi-3: fused projections, heads of which a part may rotate, a sliding window in all layers.

Source: configuration_phi3.py and modeling_phi3.py of Transformers 5.24.
"""

from __future__ import annotations

from edgeq.importers.gguf.architecture import Architecture
from edgeq.importers.huggingface.family import COMMON_DEFAULTS, Family, Shape, sizes
from edgeq.importers.huggingface.rope import read_rope
from edgeq.importers.huggingface.values import Values
from edgeq.importers.huggingface.windows import read_windows
from edgeq.model.block import BlockSpec


def blocks(values: Values, shape: Shape) -> list[BlockSpec]:
    """All layers are alike. Early files call longrope "su" or "yarn", as Transformers allows."""
    rope = read_rope(
        values,
        shape,
        kinds=("default", "longrope"),
        aliases={"su": "longrope", "yarn": "longrope"},
        partial=True,
    )
    windows = read_windows(
        values,
        shape,
        "phi3",
        sliding=(True,) * shape.layers,
        layer_types=False,
        switch="refused",
    )
    return [BlockSpec(rope=rope, window=window) for window in windows]


FAMILY = Family(
    name="phi3",
    model_types=("phi3",),
    classes=("Phi3ForCausalLM", "Phi3Model"),
    blocks=blocks,
    defaults={
        **COMMON_DEFAULTS,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 32000,
    },
    fused={
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    },
    gguf=Architecture(
        name="phi3",
        tensors={
            "self_attn.q_proj": "attn_qkv",
            "self_attn.k_proj": "attn_qkv",
            "self_attn.v_proj": "attn_qkv",
            "mlp.gate_proj": "ffn_up",
        },
        partial_rope=True,
        long_factors=True,
        windows="all",
        heads_span_hidden=True,
    ),
    genai="phi3",
    shapes={
        "phi3-mini": sizes(
            3072,
            8192,
            32,
            32,
            32,
            32064,
            4096,
            sliding_window=2047,
            eos_token_id=[32000, 32001, 32007],
        ),
        # longrope's factors have no part in the speed
        "phi-3.5-mini": sizes(
            3072,
            8192,
            32,
            32,
            32,
            32064,
            131072,
            sliding_window=262144,
            eos_token_id=[32007, 32001, 32000],
        ),
        "phi-4-mini": sizes(
            3072,
            8192,
            32,
            24,
            8,
            200064,
            131072,
            sliding_window=262144,
            partial_rotary_factor=0.75,
            tie_word_embeddings=True,
            bos_token_id=199999,
            eos_token_id=[200020, 199999],
        ),
    },
)
