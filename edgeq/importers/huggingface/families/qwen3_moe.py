"""Qwen 3 with experts: Qwen 3 whose feed-forwards are mixtures of experts.

Source: configuration_qwen3_moe.py and modeling_qwen3_moe.py of Transformers 5.24; llama.cpp's
src/models/qwen3moe.cpp.
"""

from __future__ import annotations

from edgeq.core.errors import FormatError
from edgeq.importers.gguf.architecture import Architecture
from edgeq.importers.huggingface.experts import count_of, read_experts
from edgeq.importers.huggingface.family import COMMON_DEFAULTS, Family, Shape, sizes
from edgeq.importers.huggingface.rope import read_rope
from edgeq.importers.huggingface.values import Values
from edgeq.importers.huggingface.windows import read_windows
from edgeq.importers.unread import shown
from edgeq.model.block import BlockSpec


def blocks(values: Values, shape: Shape) -> list[BlockSpec]:
    """Every ``decoder_sparse_step``-th layer has experts, but those of ``mlp_only_layers``."""
    rope = read_rope(values, shape)
    windows = read_windows(
        values, shape, "qwen3_moe", sliding=(True,) * shape.layers, layer_types=False,
        switch="followed",
    )  # fmt: skip
    values.read.add("max_window_layers")
    if values.flag("use_sliding_window") and "sliding_window" not in values.raw:
        raise FormatError(
            f"{values.path}: use_sliding_window is true and sliding_window is missing; it must be "
            "a number of tokens (Transformers assumes 4096)"
        )
    experts = read_experts(
        values,
        count_of(values, "num_experts", "num_local_experts"),
        values.count("moe_intermediate_size"),
        normalize=values.flag("norm_topk_prob"),
    )
    step, dense = values.count("decoder_sparse_step"), _dense(values, shape)
    return [
        BlockSpec(
            qk_norm="head",
            rope=rope,
            window=window,
            experts=None if i in dense or (i + 1) % step else experts,
        )
        for i, window in enumerate(windows)
    ]


def _dense(values: Values, shape: Shape) -> list[int]:
    """The layers that ``mlp_only_layers`` names."""
    listed = values.get("mlp_only_layers")
    if listed is None:
        return []
    if not isinstance(listed, list) or not all(type(i) is int and i >= 0 for i in listed):
        raise FormatError(
            f"{values.path}: mlp_only_layers is {shown(listed)}; it must list numbers of layers "
            f"from 0 to {shape.layers - 1}"
        )
    return listed


FAMILY = Family(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    classes=("Qwen3MoeForCausalLM", "Qwen3MoeModel"),
    blocks=blocks,
    defaults={
        **COMMON_DEFAULTS,
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
        "norm_topk_prob": False,
    },
    biases="attention_bias",
    tensors={"mlp.router": "mlp.gate"},
    gguf=Architecture(name="qwen3moe", qk_norm="head", expert_score="softmax", expert_ffn=True),
    shapes={
        "qwen3-30b-a3b": sizes(
            2048, 6144, 48, 32, 4, 151936, 40960, head_dim=128, num_experts=128,
            num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True, rope_theta=1e6,
            tie_word_embeddings=False, bos_token_id=151643, eos_token_id=[151645, 151643],
        ),
    },
)  # fmt: skip
