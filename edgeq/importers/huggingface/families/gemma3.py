"""Gemma 3, alone or as the decoder of a vision-language model.

Norms after attention and feed-forward as well, norm weights with an offset of one, embeddings times
sqrt(hidden), and sliding windows with rotary frequencies of their own in five layers of six. With
``use_bidirectional_attention`` (EmbeddingGemma) it reads texts as a whole: a token sees as much
after it as before it, and the window is that of both sides together.

Source: configuration_gemma3.py and modeling_gemma3.py of Transformers 5.24.
"""

from __future__ import annotations

from edgeq.importers.gguf.architecture import NORMS_AROUND, Architecture
from edgeq.importers.huggingface.family import Family, Shape, sizes
from edgeq.importers.huggingface.rope import (
    check_whole_heads,
    read_base,
    read_scaling,
    rope_settings_by_kind,
)
from edgeq.importers.huggingface.values import Values
from edgeq.importers.huggingface.windows import read_windows
from edgeq.model.block import BlockSpec
from edgeq.model.rope_spec import RopeSpec

_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_BASE, _LOCAL_BASE = 1_000_000.0, 10_000.0


def blocks(values: Values, shape: Shape) -> list[BlockSpec]:
    """Layers with a window have rotary frequencies of their own."""
    ropes = _read_ropes(values, shape)
    values.read.add("sliding_window_pattern")
    if values.get("layer_types") is None:
        period = values.count("sliding_window_pattern")
        sliding = tuple((i + 1) % period != 0 for i in range(shape.layers))
    else:
        sliding = (True,) * shape.layers
    windows = read_windows(values, shape, "gemma3", sliding=sliding)
    accept_older_activation(values)
    causal = not values.flag("use_bidirectional_attention")
    return [
        BlockSpec(
            norm_after=True,
            qk_norm="head",
            rope=ropes[window is not None],
            window=window if causal or window is None else window // 2 + 1,
            causal=causal,
        )
        for window in windows
    ]


def accept_older_activation(values: Values) -> None:
    """Accept ``hidden_act``, for older readers, beside Gemma's own key ``hidden_activation``."""
    if "gelu" in str(values.raw.get("hidden_act")):
        values.read.add("hidden_act")


def _read_ropes(values: Values, shape: Shape) -> tuple[RopeSpec, RopeSpec]:
    """Rotary embeddings of the layers that see everything, and of those with a window."""
    name, full, local = rope_settings_by_kind(values, "a Gemma 3")
    bases = []
    for settings, key, default in (
        (full, "rope_theta", _BASE),
        (local, "rope_local_base_freq", _LOCAL_BASE),
    ):
        bases.append(read_base(values, settings, default, key))
        check_whole_heads(values, "rope_parameters", settings)
    # the frequencies of layers with a window are never stretched
    dim = shape.head_dim
    read_scaling(values, "sliding_attention", local, shape, dim, ("default",))
    scaling = read_scaling(values, name, full, shape, dim, _KINDS, inside_only=True)
    return RopeSpec(bases[0], dim, scaling), RopeSpec(bases[1], dim)


_PUBLISHED = {"head_dim": 256, "sliding_window": 512, "eos_token_id": [1, 106]}

FAMILY = Family(
    name="gemma3",
    model_types=("gemma3", "gemma3_text"),
    classes=(
        "Gemma3ForCausalLM",
        "Gemma3TextModel",
        "Gemma3ForConditionalGeneration",
        "Gemma3Model",
    ),
    blocks=blocks,
    defaults={
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "use_bidirectional_attention": False,
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
    biases="attention_bias",
    activation_key="hidden_activation",
    norm_offset=1.0,
    scaled_embeddings=True,
    query_scale_key="query_pre_attn_scalar",
    text_config="text_config",
    prefix="language_model.",
    gguf=Architecture(
        name="gemma3",
        tensors=NORMS_AROUND,
        activation="gelu_tanh",
        norm_after=True,
        qk_norm="head",
        scaled_embeddings=True,
        # one layer in six attends to everything, where a file does not say otherwise
        windows="period",
        window_period=6,
        local_rope_base=_LOCAL_BASE,
        default_rope_base=None,
        # Gemma 3 27B alone scales its queries by other than the head's size; no key says so
        query_dim=lambda layers, hidden, heads, head_dim: (
            hidden / heads if layers == 62 else head_dim
        ),
    ),
    genai="gemma3_text",
    hub_tag="gemma",
    shapes={
        "gemma3-270m": sizes(640, 2048, 18, 4, 1, 262144, 32768, **_PUBLISHED),
        "gemma3-1b": sizes(1152, 6912, 26, 4, 1, 262144, 32768, **_PUBLISHED),
    },
)
