"""LFM2 and LFM2.5: gated short convolutions in most layers, attention in the others.

Source: configuration_lfm2.py and modeling_lfm2.py of Transformers 5.24; llama.cpp's
src/models/lfm2.cpp.
"""

from __future__ import annotations

from typing import Any

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.importers.gguf.architecture import Architecture
from edgeq.importers.huggingface.family import Family, Shape, sizes
from edgeq.importers.huggingface.rope import read_rope
from edgeq.importers.huggingface.values import Values
from edgeq.importers.huggingface.windows import refuse_windows
from edgeq.importers.unread import shown
from edgeq.model.block import BlockSpec

_HARMLESS = (
    "block_mlp_init_scale", "block_out_init_scale", "block_use_xavier_init",
    "conv_use_xavier_init",
)  # fmt: skip
"""How weights were initialized before training."""


def blocks(values: Values, shape: Shape) -> list[BlockSpec]:
    """A short convolution where ``layer_types`` says "conv", attention elsewhere."""
    _check_repeated(values, shape)
    mixer = convolution(values)
    attention = BlockSpec(qk_norm="head", rope=read_rope(values, shape, base=1_000_000.0))
    return [attention if attends else mixer for attends in _attending(values, shape)]


def convolution(values: Values) -> BlockSpec:
    """A layer with a short convolution, which has no biases."""
    values.check_only({"conv_bias": (False,)})
    return BlockSpec(mixer="short_conv", rope=None, window=values.count("conv_L_cache"))


def _attending(values: Values, shape: Shape) -> list[bool]:
    """Whether each layer has attention, by ``layer_types`` or else ``full_attn_idxs``."""
    kinds = refuse_windows(values, shape, "lfm2", known=("conv", "full_attention"))
    listed = values.get("full_attn_idxs")
    by_index = [True] * shape.layers
    if listed is not None:
        if not isinstance(listed, list) or not all(
            type(i) is int and 0 <= i < shape.layers for i in listed
        ):
            raise FormatError(
                f"{values.path}: full_attn_idxs is {shown(listed)}; it must list numbers of layers "
                f"from 0 to {shape.layers - 1}"
            )
        by_index = [i in listed for i in range(shape.layers)]
    if kinds is None:
        return by_index
    by_kind = [kind == "full_attention" for kind in kinds]
    if listed is not None and by_index != by_kind:
        raise UnsupportedError(
            f"{values.path}: full_attn_idxs is {shown(listed)} and layer_types names other layers "
            "full_attention; keep the one the model was trained with"
        )
    return by_kind


def _check_repeated(values: Values, shape: Shape) -> None:
    """Refuse keys that no class of Transformers follows and that contradict those it follows."""
    values.read.update(_HARMLESS)
    values.check_only(
        {
            "block_dim": (shape.hidden,),
            "conv_dim": (shape.hidden,),
            "conv_dim_out": (shape.hidden,),
            "num_heads": (shape.heads,),
            "block_norm_eps": (values.number("norm_eps"),),
            "block_use_swiglu": (True,),
            "use_pos_enc": (True,),
            "hidden_act": ("silu", "swish"),
        }
    )


def _ffn(values: Values) -> int:
    """The width of the feed-forward, which may be two thirds of the stated one, rounded up."""
    key = "block_ff_dim" if values.get("block_ff_dim") is not None else "intermediate_size"
    values.read.add("intermediate_size")
    width = values.count(key)
    multiple = values.count("block_multiple_of")
    factor = values.number("block_ffn_dim_multiplier")
    if not values.flag("block_auto_adjust_ff_dim"):
        return width
    return -(-int(factor * int(2 * width / 3)) // multiple) * multiple


_PUBLISHED: dict[str, Any] = {"eos_token_id": 7, "full_attn_idxs": [2, 5, 8, 10, 12, 14]}

ARCHITECTURE = Architecture(
    name="lfm2",
    tensors={
        "conv.b_proj": "shortconv.in_proj",
        "conv.c_proj": "shortconv.in_proj",
        "conv.x_proj": "shortconv.in_proj",
        "conv.conv": "shortconv.conv",
        "conv.out_proj": "shortconv.out_proj",
        "model.norm": "token_embd_norm",
    },
    qk_norm="head",
    short_conv=True,
)

FAMILY = Family(
    name="lfm2",
    model_types=("lfm2",),
    classes=("Lfm2ForCausalLM", "Lfm2Model"),
    blocks=blocks,
    defaults={
        "norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "vocab_size": 65536,
        "hidden_size": 2560,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 128_000,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
    },
    activation_key=None,
    norm_eps_key="norm_eps",
    tied_keys=("tie_embedding", "tie_word_embeddings"),
    ffn=_ffn,
    tensors={
        "input_layernorm": "operator_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "self_attn.out_proj",
        "self_attn.q_norm": "self_attn.q_layernorm",
        "self_attn.k_norm": "self_attn.k_layernorm",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "model.norm": "model.embedding_norm",
    },
    fused={"conv.in_proj": ("conv.b_proj", "conv.c_proj", "conv.x_proj")},
    gguf=ARCHITECTURE,
    shapes={
        "lfm2-350m": sizes(1024, 6656, 16, 16, 8, 65536, 128_000, **_PUBLISHED),
        "lfm2-700m": sizes(1536, 10240, 16, 24, 8, 65536, 128_000, **_PUBLISHED),
        "lfm2-1.2b": sizes(2048, 12288, 16, 32, 8, 65536, 128_000, **_PUBLISHED),
        "lfm2-2.6b": sizes(
            2048,
            10752,
            30,
            32,
            8,
            65536,
            128_000,
            eos_token_id=7,
            block_auto_adjust_ff_dim=False,
            full_attn_idxs=[2, 5, 9, 13, 17, 21, 24, 27],
        ),
    },
)
