"""Granite 4 where all layers are attention and none has experts: Granite 3 with other names.

Source: configuration_granitemoehybrid.py and modeling_granitemoehybrid.py of Transformers 5.24;
llama.cpp's convert_hf_to_gguf.py, which writes these models as of the granite architecture.
"""

from __future__ import annotations

from edgeq.core.errors import FormatError
from edgeq.importers.huggingface.families import granite
from edgeq.importers.huggingface.family import COMMON_DEFAULTS, Family, Shape, sizes
from edgeq.importers.huggingface.rope import read_rope
from edgeq.importers.huggingface.values import Values
from edgeq.importers.huggingface.windows import layer_kinds, refuse_windows
from edgeq.model.block import BlockSpec

_ATTENTION = ("attention", "full_attention")
_OLDER_KEY = "layers_block_type"
_OF_OTHER_LAYERS = frozenset(
    (
        "intermediate_size", "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef",
        "mamba_n_heads", "mamba_n_groups", "mamba_d_state", "mamba_d_head", "mamba_d_conv",
        "mamba_expand", "mamba_chunk_size", "mamba_conv_bias", "mamba_proj_bias",
        "time_step_limit",
    )
)  # fmt: skip
"""Keys of experts and of recurrent layers, of which these models have none."""


def blocks(values: Values, shape: Shape) -> tuple[BlockSpec, ...]:
    """All layers are alike; they rotate if ``position_embedding_type`` is "rope"."""
    _check_layers(values, shape)
    values.read |= _OF_OTHER_LAYERS
    if values.get("intermediate_size") is not None:
        values.count("intermediate_size")  # of experts: any number
    values.check_only(
        {
            "num_local_experts": (0,),
            "normalization_function": ("rmsnorm",),
            "position_embedding_type": ("rope", "nope"),
        }
    )
    kind = values.get("position_embedding_type")
    rope = read_rope(values, shape)
    return (BlockSpec(rope=rope if kind == "rope" else None),) * shape.layers


def _check_layers(values: Values, shape: Shape) -> None:
    """Refuse windows and recurrent layers."""
    kinds = refuse_windows(values, shape, "granitemoehybrid", known=_ATTENTION)
    values.read.add(_OLDER_KEY)
    if kinds is None and layer_kinds(values, shape.layers, _ATTENTION, _OLDER_KEY) is None:
        raise FormatError(f"{values.path}: layer_types must name each of {shape.layers} layers")


FAMILY = Family(
    name="granitemoehybrid",
    model_types=("granitemoehybrid",),
    classes=("GraniteMoeHybridForCausalLM", "GraniteMoeHybridModel"),
    blocks=blocks,
    defaults={
        **COMMON_DEFAULTS,
        **granite.MULTIPLIERS,
        "vocab_size": 32000,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "shared_intermediate_size": 1024,
        "num_local_experts": 8,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    biases="attention_bias",
    numbers=granite.numbers,
    ffn=lambda values: values.count("shared_intermediate_size"),
    tensors={"mlp.down_proj": "shared_mlp.output_linear"},
    fused={"shared_mlp.input_linear": ("mlp.gate_proj", "mlp.up_proj")},
    gguf=granite.GGUF,
    genai="granite",
    hub_tag="granitemoehybrid",
    shapes={
        "granite-4.0-micro": sizes(
            2560, 8192, 40, 40, 8, 100352, 131072, rms_norm_eps=1e-5, rope_theta=10_000_000.0,
            tie_word_embeddings=True, embedding_multiplier=12.0, attention_multiplier=0.015625,
            residual_multiplier=0.22, logits_scaling=10.0, position_embedding_type="rope",
            layer_types=["attention"] * 40, num_local_experts=0, shared_intermediate_size=8192,
            bos_token_id=100257, eos_token_id=100257,
        ),
    },
)  # fmt: skip
