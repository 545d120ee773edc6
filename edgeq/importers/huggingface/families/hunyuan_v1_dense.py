"""Hunyuan without experts: norms of each head of q and k after they are rotated.

Published checkpoints call their rotary frequencies "dynamic"; with an ``alpha`` they are fixed ones
of a larger base.

Source: configuration_hunyuan_v1_dense.py and modeling_hunyuan_v1_dense.py of Transformers 5.24;
llama.cpp's src/models/hunyuan-dense.cpp and convert_hf_to_gguf.py.
"""

from __future__ import annotations

from edgeq.core.errors import UnsupportedError
from edgeq.importers.gguf.architecture import Architecture
from edgeq.importers.huggingface.family import COMMON_DEFAULTS, Family, Shape, sizes
from edgeq.importers.huggingface.rope import (
    check_whole_heads,
    read_base,
    read_rope,
    rope_settings,
)
from edgeq.importers.huggingface.values import Values
from edgeq.importers.huggingface.windows import refuse_windows
from edgeq.importers.unread import refusal
from edgeq.model.block import BlockSpec
from edgeq.model.rope_spec import RopeSpec
from edgeq.model.rotary import stretched_base

_BASE = 10_000.0
_ALPHA_KEYS = frozenset(
    (
        "type", "rope_type", "rope_theta", "alpha", "factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim",
    )
)  # fmt: skip
"""Keys of rotary settings with an ``alpha``, of which only that and the base are followed."""

_OF_OTHER_MODELS = frozenset(
    ("cla_share_factor", "dense_list", "class_num", "pool_type", "mask_init_id", "org_vocab_size")
)
"""Keys of keys and values that layers share, and of a head for classes; none of these is used."""


def blocks(values: Values, shape: Shape) -> tuple[BlockSpec, ...]:
    """All layers are alike."""
    refuse_windows(values, shape, "hunyuan_v1_dense")
    values.read |= _OF_OTHER_MODELS
    values.check_only(
        {
            "use_qk_norm": (True,),
            "attention_head_dim": (shape.head_dim,),
            "norm_type": ("rms",),
            "use_cla": (False,),
            "add_classification_head": (False,),
        }
    )
    rope = _alpha_rope(values, shape) or read_rope(values, shape)
    return (BlockSpec(qk_norm="head", qk_norm_last=True, rope=rope),) * shape.layers


def _alpha_rope(values: Values, shape: Shape) -> RopeSpec | None:
    """Frequencies of a base that is stretched by ``alpha``; None if there is none."""
    name, settings = rope_settings(values)
    kind = settings.get("rope_type", settings.get("type"))
    if kind != "dynamic" or not settings.get("alpha"):
        return None
    if others := {f"{name}.{k}": v for k, v in settings.items() if k not in _ALPHA_KEYS}:
        raise UnsupportedError(f"{values.path}: {refusal(others)}")
    check_whole_heads(values, name, settings)
    base = read_base(values, settings, _BASE)
    alpha = values.check_number("alpha", settings["alpha"])
    return RopeSpec(stretched_base(base, alpha, shape.head_dim), shape.head_dim)


FAMILY = Family(
    name="hunyuan_v1_dense",
    model_types=("hunyuan_v1_dense",),
    classes=("HunYuanDenseV1ForCausalLM", "HunYuanDenseV1Model"),
    blocks=blocks,
    defaults={
        **COMMON_DEFAULTS,
        "rms_norm_eps": 1e-5,
        "vocab_size": 290943,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    biases="attention_bias",
    tensors={
        "self_attn.q_norm": "self_attn.query_layernorm",
        "self_attn.k_norm": "self_attn.key_layernorm",
    },
    gguf=Architecture(
        name="hunyuan-dense",
        qk_norm="head",
        qk_norm_last=True,
        rope_alpha=True,
    ),
    shapes={
        "hunyuan-0.5b": sizes(
            1024, 3584, 24, 16, 8, 120818, 262144, head_dim=128, tie_word_embeddings=True,
            rope_scaling={"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
            bos_token_id=120000, eos_token_id=120020,
        ),
    },
)  # fmt: skip
