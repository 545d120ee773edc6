"""EXAONE 4: norms after attention and feed-forward alone, and of each head of q and k.

Where the model has a sliding window, the layers that have it rotate, and those that see all
positions do not. Where it has none, all layers rotate.

Source: configuration_exaone4.py and modeling_exaone4.py of Transformers 5.24; llama.cpp's
src/models/exaone4.cpp.
"""

from __future__ import annotations

from edgeq.core.errors import FormatError
from edgeq.importers.gguf.architecture import NORMS_AFTER, Architecture
from edgeq.importers.huggingface.family import COMMON_DEFAULTS, Family, Shape, sizes
from edgeq.importers.huggingface.rope import read_rope
from edgeq.importers.huggingface.values import Values
from edgeq.importers.huggingface.windows import read_windows
from edgeq.importers.unread import shown
from edgeq.model.block import BlockSpec

_WINDOWED_DEPTH = 64
"""Layers of the 32B model, the only one to which llama.cpp gives windows."""


def blocks(values: Values, shape: Shape) -> list[BlockSpec]:
    """Three layers of four have the window and rotate, unless the configuration says otherwise."""
    rope = read_rope(values, shape)
    without = values.is_null("sliding_window")
    sliding = _sliding_layers(values, shape, without)
    windows = read_windows(values, shape, "exaone4", sliding=sliding)
    return [
        BlockSpec(
            norm_before=False,
            norm_after=True,
            qk_norm="head",
            rope=rope if without or window is not None else None,
            window=window,
        )
        for window in windows
    ]


def _sliding_layers(values: Values, shape: Shape, without: bool) -> list[bool]:
    """Which layers have the window where ``layer_types`` does not say."""
    pattern = values.get("sliding_window_pattern")
    if without or values.get("layer_types") is not None:
        return [False] * shape.layers
    if isinstance(pattern, str) and pattern and set(pattern) <= set("LG"):
        kinds = [pattern[i % len(pattern)] == "L" for i in range(shape.layers - 1)]
        return [*kinds, False]
    if type(pattern) is not int or pattern < 1:
        raise FormatError(
            f"{values.path}: sliding_window_pattern is {shown(pattern)}; it must be a text of L "
            "and G, as 'LLLG', or a number of layers"
        )
    return [(i + 1) % pattern != 0 for i in range(shape.layers)]


FAMILY = Family(
    name="exaone4",
    model_types=("exaone4",),
    classes=("Exaone4ForCausalLM", "Exaone4Model"),
    blocks=blocks,
    defaults={
        **COMMON_DEFAULTS,
        "rms_norm_eps": 1e-5,
        "vocab_size": 102400,
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 2048,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
    gguf=Architecture(
        name="exaone4",
        tensors=NORMS_AFTER,
        norm_before=False,
        norm_after=True,
        qk_norm="head",
        rope_factors=True,
        rope_layers=lambda layer, layers: layers != _WINDOWED_DEPTH or (layer + 1) % 4 != 0,
        windows="period",
        default_window=4096,
        window_period=4,
        windowed_depths=(_WINDOWED_DEPTH,),
    ),
    shapes={
        "exaone4-1.2b": sizes(
            2048, 4096, 30, 32, 8, 102400, 65536, rms_norm_eps=1e-5, head_dim=64,
            rope_theta=1_000_000.0, tie_word_embeddings=True, sliding_window=None,
            rope_scaling={
                "rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            },
            bos_token_id=1, eos_token_id=361,
        ),
    },
)  # fmt: skip
