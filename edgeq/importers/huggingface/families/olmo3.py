"""OLMo 3: OLMo 2 with windows in three layers of four.

Rotary frequencies are stretched only in the layers that see all positions.

Source: configuration_olmo3.py and modeling_olmo3.py of Transformers 5.24; llama.cpp's
src/models/olmo2.cpp.
"""

from __future__ import annotations

from edgeq.importers.huggingface.families import olmo2
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

_BASE = 500_000.0
_KINDS = ("default", "linear", "yarn")


def blocks(values: Values, shape: Shape) -> list[BlockSpec]:
    """All but every fourth layer have the window."""
    sliding = [(i + 1) % 4 != 0 for i in range(shape.layers)]
    windows = read_windows(values, shape, "olmo3", sliding=sliding)
    ropes = _read_ropes(values, shape)
    return [
        BlockSpec(
            norm_before=False,
            norm_after=True,
            qk_norm="all",
            rope=ropes[window is not None],
            window=window,
        )
        for window in windows
    ]


def _read_ropes(values: Values, shape: Shape) -> tuple[RopeSpec, RopeSpec]:
    """Rotary embeddings of the layers that see everything, and of those with a window.

    ``rope_theta`` and ``rope_scaling`` beside the settings of each kind of layer are those of the
    layers that see everything, as in Transformers.
    """
    full_name, full, local = rope_settings_by_kind(values, "an OLMo 3")
    ropes = []
    for name, settings, base in (
        (full_name, full, read_base(values, full, _BASE)),
        (
            "sliding_attention",
            local,
            values.check_number("rope_theta", local.get("rope_theta", _BASE)),
        ),
    ):
        check_whole_heads(values, name, settings)
        dim = shape.head_dim
        scaling = read_scaling(values, name, settings, shape, dim, _KINDS)
        ropes.append(RopeSpec(base, dim, scaling))
    return ropes[0], ropes[1]


FAMILY = Family(
    name="olmo3",
    model_types=("olmo3",),
    classes=("Olmo3ForCausalLM", "Olmo3Model"),
    blocks=blocks,
    defaults={**olmo2.FAMILY.defaults, "sliding_window": 4096},
    biases="attention_bias",
    gguf=olmo2.FAMILY.gguf,
    shapes={
        "olmo3-7b": sizes(
            4096, 11008, 32, 32, 32, 100278, 65536, rms_norm_eps=1e-6, eos_token_id=100257
        ),
    },
)
