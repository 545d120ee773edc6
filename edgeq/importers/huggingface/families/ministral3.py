"""Ministral 3: Mistral with yarn, and queries whose temperature grows with the position.

The published models also see; edgeq reads the decoder of such a checkpoint (type mistral3).

Source: configuration_ministral3.py and modeling_ministral3.py of Transformers 5.24; llama.cpp's
src/models/mistral3.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edgeq.core.errors import FormatError
from edgeq.importers.gguf.architecture import Architecture
from edgeq.importers.huggingface.family import COMMON_DEFAULTS, Family, Shape, sizes
from edgeq.importers.huggingface.rope import read_rope, rope_settings
from edgeq.importers.huggingface.values import Values
from edgeq.importers.huggingface.windows import read_windows
from edgeq.importers.unread import shown
from edgeq.model.block import BlockSpec
from edgeq.model.rope_spec import RopeSpec

_BETA = "llama_4_scaling_beta"


def blocks(values: Values, shape: Shape) -> list[BlockSpec]:
    """All layers are alike. The classes of Transformers compute them with yarn alone."""
    rope = _read_rope(values, shape)
    windows = read_windows(
        values,
        shape,
        "ministral3",
        sliding=(True,) * shape.layers,
        layer_types=False,
        switch="refused",
    )
    return [BlockSpec(rope=rope, window=window) for window in windows]


def _read_rope(values: Values, shape: Shape) -> RopeSpec:
    """Yarn, and the temperature of queries past the original context."""
    if not any(
        isinstance(values.raw.get(key), dict) for key in ("rope_scaling", "rope_parameters")
    ):
        # the class assumes all of them then, whatever stands beside them
        values.check_number("rope_theta", values.raw.get("rope_theta", _ROPE["rope_theta"]))
    rope = read_rope(values, shape, kinds=("yarn",), known=(_BETA, "max_position_embeddings"))
    name, settings = rope_settings(values)
    beta = settings.get(_BETA)
    if isinstance(beta, bool) or not isinstance(beta, int | float) or beta < 0:
        raise FormatError(
            f"{values.path}: {_BETA} in {name} is {shown(beta)}; it must be a number of at least 0"
        )
    assert rope.scaling is not None  # yarn is the only kind
    if not beta:
        return rope
    length = rope.scaling.original_context
    return replace(rope, temperature=float(beta), temperature_length=length)


def _published(hidden: int, ffn: int, layers: int, *, tied: bool = False) -> dict[str, Any]:
    """A published model; the rest is as the configuration class assumes."""
    return sizes(hidden, ffn, layers, 32, 8, 131072, 262144, tie_word_embeddings=tied)


_ROPE = {
    "rope_type": "yarn", "type": "yarn", "rope_theta": 1e6, "factor": 16.0,
    "original_max_position_embeddings": 16384, "max_position_embeddings": 262144,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}  # fmt: skip

FAMILY = Family(
    name="ministral3",
    model_types=("mistral3", "ministral3"),
    classes=(
        "Ministral3ForCausalLM",
        "Ministral3Model",
        "Mistral3ForConditionalGeneration",
        "Mistral3Model",
    ),
    blocks=blocks,
    defaults={
        **COMMON_DEFAULTS,
        "rms_norm_eps": 1e-5,
        "vocab_size": 131072,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 34,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rope_parameters": _ROPE,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    text_config="text_config",
    prefix="language_model.",
    gguf=Architecture(
        name="mistral3",
        interleaved=True,
        rope_factors=True,
        yarn_log=True,
        temperature=True,
    ),
    hub_tag="mistral3",
    shapes={
        "ministral-3-3b": _published(3072, 9216, 26, tied=True),
        "ministral-3-8b": _published(4096, 14336, 34),
    },
)
