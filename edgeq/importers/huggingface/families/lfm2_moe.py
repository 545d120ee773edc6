"""LFM2 with experts: LFM2 whose feed-forwards, but those of the first layers, are experts.

Source: configuration_lfm2_moe.py and modeling_lfm2_moe.py of Transformers 5.24; llama.cpp's
src/models/lfm2.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edgeq.core.errors import FormatError
from edgeq.importers.huggingface.experts import count_of, read_experts
from edgeq.importers.huggingface.families import lfm2
from edgeq.importers.huggingface.family import Family, Shape, sizes
from edgeq.importers.huggingface.rope import read_rope
from edgeq.importers.huggingface.values import Values
from edgeq.importers.huggingface.windows import refuse_windows
from edgeq.importers.unread import shown
from edgeq.model.block import BlockSpec

_LISTED = ("conv", "full_attention")


def blocks(values: Values, shape: Shape) -> list[BlockSpec]:
    """A short convolution where ``layer_types`` says "conv", attention elsewhere.

    The first ``num_dense_layers`` have no experts.
    """
    kinds = refuse_windows(values, shape, "lfm2_moe", known=_LISTED)
    if kinds is None:
        raise FormatError(
            f"{values.path}: layer_types must name each of {shape.layers} layers conv or "
            "full_attention, and it is missing"
        )
    attention = BlockSpec(qk_norm="head", rope=read_rope(values, shape, base=1_000_000.0))
    convolution = lfm2.convolution(values)
    dense = _dense_layers(values)
    experts = read_experts(
        values,
        count_of(values, "num_experts"),
        values.count("moe_intermediate_size"),
        score="sigmoid",
        choice_bias=values.flag("use_expert_bias"),
        normalize=values.flag("norm_topk_prob"),
        scale=values.number("routed_scaling_factor"),
    )
    return [
        replace(
            attention if kind == "full_attention" else convolution,
            experts=experts if i >= dense else None,
        )
        for i, kind in enumerate(kinds)
    ]


def _dense_layers(values: Values) -> int:
    """How many layers, from the first, have no experts."""
    number = values.get("num_dense_layers")
    if type(number) is not int or number < 0:
        raise FormatError(
            f"{values.path}: num_dense_layers is {shown(number)}; it must be a whole number of at "
            "least 0"
        )
    return number


_PUBLISHED: dict[str, Any] = {
    "layer_types": [
        "full_attention" if i in (2, 6, 10, 14, 18, 21) else "conv" for i in range(24)
    ],
    "moe_intermediate_size": 1792, "num_dense_layers": 2, "num_experts": 32,
    "num_experts_per_tok": 4, "eos_token_id": 7,
}  # fmt: skip

_OF_LFM2 = (
    "norm_eps", "tie_word_embeddings", "vocab_size", "num_attention_heads", "num_key_value_heads",
    "num_hidden_layers", "max_position_embeddings", "bos_token_id", "eos_token_id", "conv_bias",
    "conv_L_cache",
)  # fmt: skip

FAMILY = Family(
    name="lfm2_moe",
    model_types=("lfm2_moe",),
    classes=("Lfm2MoeForCausalLM", "Lfm2MoeModel"),
    blocks=blocks,
    defaults={
        **{key: lfm2.FAMILY.defaults[key] for key in _OF_LFM2},
        "hidden_size": 2048,
        "intermediate_size": 7168,
        "moe_intermediate_size": 1792,
        "num_dense_layers": 2,
        "num_experts_per_tok": 4,
        "num_experts": 32,
        "use_expert_bias": True,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
    },
    activation_key=None,
    norm_eps_key="norm_eps",
    tied_keys=lfm2.FAMILY.tied_keys,
    tensors={
        **lfm2.FAMILY.tensors,
        "mlp.router": "feed_forward.gate",
        "mlp.experts.bias": "feed_forward.expert_bias",
        "mlp.experts.*.gate_proj": "feed_forward.experts.*.w1",
        "mlp.experts.*.up_proj": "feed_forward.experts.*.w3",
        "mlp.experts.*.down_proj": "feed_forward.experts.*.w2",
    },
    fused=lfm2.FAMILY.fused,
    gguf=replace(
        lfm2.ARCHITECTURE,
        name="lfm2moe",
        expert_score="sigmoid",
        expert_ffn=True,
        leading_dense=True,
        tied=True,
    ),
    shapes={
        "lfm2-8b-a1b": sizes(2048, 7168, 24, 32, 8, 65536, 128_000, **_PUBLISHED),
    },
)
