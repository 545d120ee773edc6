"""Qwen 3.5, alone or as the decoder of a vision-language model.

Gated delta nets in three layers of four, attention with an output gate in the others; norm weights
with an offset of one, norms on each head of q and k, and heads of which a quarter rotates. A text
has one position a token, so that the three axes of the published rotary settings agree. The
published multi-token-prediction head guesses tokens ahead and takes no part in an answer
(`edgeq.model.mtp`); Transformers leaves it out.

Source: configuration_qwen3_5.py and modeling_qwen3_5.py of Transformers 5.24; llama.cpp's
src/models/qwen35.cpp.
"""

from __future__ import annotations

from typing import Any

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.importers.gguf.architecture import Architecture
from edgeq.importers.huggingface.family import COMMON_DEFAULTS, Family, Shape, sizes
from edgeq.importers.huggingface.rope import read_rope
from edgeq.importers.huggingface.values import Values
from edgeq.importers.huggingface.windows import refuse_windows
from edgeq.importers.unread import shown
from edgeq.model.block import BlockSpec, DeltaSpec

_ONLY: dict[str, tuple[Any, ...]] = {
    "attn_output_gate": (True, None),
    "output_gate_type": ("swish", "silu", None),
    "mlp_only_layers": ([], None),
    "mtp_use_dedicated_embeddings": (False, None),
}
"""Keys that no class of Transformers follows, and the values for what these compute."""
_HARMLESS = (
    "mamba_ssm_dtype", "mtp_num_hidden_layers", "language_model_only", "pad_token_id",
    "video_token_id", "vision_start_token_id", "vision_end_token_id", "image_token_id",
)  # fmt: skip


def blocks(values: Values, shape: Shape) -> list[BlockSpec]:
    """A gated delta net where ``layer_types`` says "linear_attention", attention elsewhere."""
    for key, allowed in _ONLY.items():
        value = values.get(key)
        if value not in allowed:
            raise UnsupportedError(
                f"{values.path}: {key} is {shown(value)}, which the qwen3_5 models of Transformers "
                f"do not follow; they compute with {' or '.join(map(shown, allowed[:-1]))}; remove "
                f"{key} if the model was trained so"
            )
    if values.get("hidden_act") not in ("silu", "swish"):
        raise UnsupportedError(
            f"{values.path}: hidden_act is {shown(values.get('hidden_act'))}, which edgeq does not "
            "compute after the convolutions of gated delta nets; it computes silu"
        )
    values.read.update(_HARMLESS)
    rope = read_rope(
        values, shape, partial=True, share=0.25, known=("mrope_section", "mrope_interleaved")
    )
    attention = BlockSpec(qk_norm="head", rope=rope, output_gate=True)
    key_heads, value_heads = (values.count(f"linear_num_{kind}_heads") for kind in ("key", "value"))
    if value_heads % key_heads:
        raise FormatError(
            f"{values.path}: linear_num_value_heads is {value_heads} and linear_num_key_heads "
            f"{key_heads}; the first must be a multiple of the second"
        )
    delta = BlockSpec(
        mixer="gated_delta_net",
        rope=None,
        window=values.count("linear_conv_kernel_dim"),
        delta=DeltaSpec(
            key_heads=key_heads,
            value_heads=value_heads,
            key_dim=values.count("linear_key_head_dim"),
            value_dim=values.count("linear_value_head_dim"),
        ),
    )
    return [attention if attends else delta for attends in _attending(values, shape)]


def _attending(values: Values, shape: Shape) -> list[bool]:
    """Whether each layer has attention, by ``layer_types`` or else ``full_attention_interval``."""
    kinds = refuse_windows(values, shape, "qwen3_5", known=("linear_attention", "full_attention"))
    stated = values.get("full_attention_interval")
    if kinds is not None:
        return [kind == "full_attention" for kind in kinds]
    interval = 4 if stated is None else values.count("full_attention_interval")
    return [(i + 1) % interval == 0 for i in range(shape.layers)]


def _published(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """A published model of at most 4 billion weights."""
    return sizes(
        hidden,
        ffn,
        layers,
        heads,
        kv_heads,
        248320,
        262144,
        tie_word_embeddings=True,
        linear_num_value_heads=16 if hidden < 2560 else 32,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000_000},
        eos_token_id=248044,
    )


FAMILY = Family(
    name="qwen3_5",
    model_types=("qwen3_5", "qwen3_5_text"),
    classes=(
        "Qwen3_5ForCausalLM",
        "Qwen3_5TextModel",
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5Model",
    ),
    blocks=blocks,
    defaults={
        **COMMON_DEFAULTS,
        "vocab_size": 248320,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 32768,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
    },
    biases="attention_bias",
    norm_offset=1.0,
    fused_by_head={"self_attn.q_proj": ("self_attn.q_proj", "self_attn.g_proj")},
    mtp=True,
    left_out={
        "mtp.": "multi-token-prediction head, which only guesses tokens ahead",
        "visual.": "vision part",
    },
    gguf=Architecture(
        name="qwen35",
        tensors={
            "self_attn.g_proj": "attn_q",
            "post_attention_layernorm": "post_attention_norm",
            "linear_attn.in_proj_qkv": "attn_qkv",
            "linear_attn.in_proj_z": "attn_gate",
            "linear_attn.in_proj_b": "ssm_beta",
            "linear_attn.in_proj_a": "ssm_alpha",
            "linear_attn.conv1d": "ssm_conv1d",
            "linear_attn.norm": "ssm_norm",
            "linear_attn.out_proj": "ssm_out",
            "linear_attn.A_log": "ssm_a",
            "linear_attn.dt_bias": "ssm_dt.bias",
        },
        partial_rope=True,
        qk_norm="head",
        delta_net=True,
        output_gate=True,
    ),
    text_config="text_config",
    prefix="language_model.",
    shapes={
        "qwen3.5-0.8b": _published(1024, 3584, 24, 8, 2),
        "qwen3.5-2b": _published(2048, 6144, 24, 8, 2),
        "qwen3.5-4b": _published(2560, 9216, 32, 16, 4),
    },
)
