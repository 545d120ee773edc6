"""Rotary settings as keys and tensors of a GGUF file; `edgeq.importers.gguf.rope` lists them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import UnsupportedError
from edgeq.importers.gguf.architecture import Architecture
from edgeq.importers.gguf.rope import LONG, SHORT
from edgeq.model.config import ModelConfig
from edgeq.model.rope_spec import RopeScaling, RopeSpec
from edgeq.model.rotary import rope_at, rope_frequencies, yarn_attention_factor
from edgeq.model.trigonometry import log


def rope_is_known(c: ModelConfig, arch: Architecture) -> bool:
    """Whether llama.cpp stretches rotary positions as all layers of a model do."""
    local = arch.local_rope_base is not None
    for block in c.blocks:
        rope = block.rope
        if rope is None or rope.scaling is None:
            continue
        scaling = rope.scaling
        known = {
            "linear": True,
            "llama3": arch.rope_factors,
            "yarn": not local and scaling.factor >= 1,
            "longrope": arch.long_factors,
            "dynamic": True,  # within the original context, see `rope_in_file`
        }
        if not known[scaling.kind] or (local and block.window is not None):
            return False
    return True


def rope_in_file(rope: RopeSpec, context: int) -> RopeSpec:
    """The rotary embedding that a file of a context describes.

    Raises:
        UnsupportedError: dynamic frequencies that the context stretches.
    """
    scaling = rope.scaling
    if scaling is None or scaling.kind != "dynamic":
        return rope
    if context > scaling.original_context:
        raise UnsupportedError(
            "llama.cpp does not compute dynamic rotary scaling; give a context of at most "
            f"{scaling.original_context}, where nothing is stretched (--ctx-size), or convert to "
            "another target"
        )
    return rope_at(rope, context)


def factor_tensors(rope: RopeSpec) -> dict[str, NDArray[np.float32]]:
    """Tensors that divide the frequencies, by their names."""
    scaling = rope.scaling
    if scaling is None or scaling.kind not in ("llama3", "longrope"):
        return {}
    if scaling.kind == "longrope":
        lists = {LONG: scaling.long_factors, SHORT: scaling.short_factors}
        return {name: np.array(factors, np.float32) for name, factors in lists.items()}
    factors = rope_frequencies(replace(rope, scaling=None)) / rope_frequencies(rope)
    return {"rope_freqs.weight": factors.astype(np.float32)}


def rope_keys(rope: RopeSpec, arch: Architecture) -> dict[str, Any]:
    """The keys that say how positions are stretched, without the architecture's name."""
    keys: dict[str, Any] = {}
    scaling = rope.scaling
    if scaling is not None and scaling.kind in ("linear", "yarn", "longrope"):
        keys["rope.scaling.type"] = scaling.kind
        if scaling.kind != "longrope":
            keys["rope.scaling.factor"] = float(scaling.factor)
        if scaling.kind != "linear":
            keys["rope.scaling.original_context_length"] = scaling.original_context
        if scaling.kind == "longrope":
            keys["rope.scaling.attn_factor"] = float(scaling.attention_factor)
        if scaling.kind == "yarn":
            keys |= _yarn_keys(scaling, arch)
    if rope.temperature:
        keys["attention.temperature_scale"] = float(rope.temperature)
        keys["rope.scaling.original_context_length"] = rope.temperature_length
    return keys


def _yarn_keys(scaling: RopeScaling, arch: Architecture) -> dict[str, float]:
    """Keys of yarn alone.

    llama.cpp has a factor of its own on what is rotated. Where the model's is a smaller one, the
    multiplier says so to the architectures that read it, and to the others a further factor.
    """
    keys = {
        "rope.scaling.yarn_beta_fast": float(scaling.beta_fast),
        "rope.scaling.yarn_beta_slow": float(scaling.beta_slow),
    }
    own = yarn_attention_factor(scaling.factor)
    further = scaling.attention_factor / own
    if arch.yarn_log and scaling.factor > 1 and further <= 1:
        keys["rope.scaling.yarn_log_multiplier"] = (1 / further - 1) / (0.1 * log(scaling.factor))
    elif further != 1:
        keys["rope.scaling.attn_factor"] = further
    return keys
