"""A GGUF file's metadata as a `ModelConfig`.

A key means what it means to llama.cpp, whose converters write them. What no key says is assumed as
llama.cpp assumes it (`edgeq.importers.gguf.architecture`).

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; llama.cpp's llama-model.cpp for
what is assumed where a key is absent.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.formats.tensor import Tensor
from edgeq.importers.gguf.architecture import MULTIPLIERS, SOFTCAPS, Architecture
from edgeq.importers.gguf.keys import Keys
from edgeq.importers.unread import shown
from edgeq.model.block import BlockSpec, RopeScaling, RopeSpec
from edgeq.model.config import ModelConfig
from edgeq.model.formulas import rope_frequencies, stretched_base

_SCALING_TYPE, _SCALING_FACTOR = "{arch}.rope.scaling.type", "{arch}.rope.scaling.factor"
_OLD_FACTOR = "{arch}.rope.scale_linear"
_WINDOW = "{arch}.attention.sliding_window"
_PATTERN = "{arch}.attention.sliding_window_pattern"
_ORIGINAL_CONTEXTS = tuple(1 << power for power in range(4, 21))


class TensorSource(Protocol):
    """A file's tensors by GGUF's names."""

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of that name."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name."""


def read_config(keys: Keys, family: str, arch: Architecture, source: TensorSource) -> ModelConfig:
    """Read the hyperparameters, and check that no key is left unread that may change them.

    Args:
        keys: the metadata.
        family: the family that files of the architecture are read as.
        arch: what llama.cpp computes for the architecture.
        source: the tensors, for the vocabulary's size and Llama 3.1's rotary factors.

    Raises:
        FormatError: a key or tensor is missing or impossible.
        UnsupportedError: a key or tensor that edgeq does not compute with.
    """
    if not len(source):
        raise FormatError(
            f"{keys.path} holds a vocabulary and no tensors; give the file with the model's weights"
        )
    layers = keys.count("{arch}.block_count")
    if layers > len(source):
        raise FormatError(f"{keys.path} claims {layers} layers and holds {len(source)} tensors")
    hidden, heads = keys.count("{arch}.embedding_length"), keys.count("{arch}.attention.head_count")
    head_dim = keys.count("{arch}.attention.key_length", hidden // heads or 1)
    value_dim = keys.count("{arch}.attention.value_length", head_dim)
    if value_dim != head_dim:
        raise UnsupportedError(
            f"{keys.path}: {arch.name}.attention.value_length is {value_dim} and key_length is "
            f"{head_dim}; edgeq computes models whose keys and values have one length"
        )
    context = keys.count("{arch}.context_length")
    scale = arch.query_dim(layers, hidden, heads, head_dim) ** -0.5
    if "attn_scale" not in arch.multipliers:
        _check_scale(keys, scale)
    numbers = {
        "embed_scale": hidden**0.5 if arch.scaled_embeddings else 1.0,
        "attn_scale": scale,
        **_numbers(keys, arch),
    }
    config = ModelConfig(
        family=family,
        hidden=hidden,
        ffn=keys.count("{arch}.feed_forward_length"),
        heads=heads,
        kv_heads=keys.count("{arch}.attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab=source["token_embd.weight"].shape[0],
        context=context,
        blocks=_read_blocks(keys, arch, source, layers, head_dim, context),
        norm_eps=keys.number("{arch}.attention.layer_norm_rms_epsilon"),
        activation=arch.activation,
        **numbers,
        tied="output.weight" not in source,
    )
    keys.check_unread()
    return config


def _read_blocks(
    keys: Keys,
    arch: Architecture,
    source: TensorSource,
    layers: int,
    head_dim: int,
    context: int,
) -> tuple[BlockSpec, ...]:
    rope = _read_rope(keys, arch, source, head_dim)
    local = rope
    if arch.local_rope_base is not None:
        base = keys.number("{arch}.rope.freq_base_swa", arch.local_rope_base)
        local = RopeSpec(base, rope.dim)
    elif arch.local_unscaled:
        local = replace(rope, scaling=None)
    window = _window(keys, arch, layers, context)
    where = _window_layers(keys, arch, layers, window)
    return tuple(
        BlockSpec(
            norm_before=arch.norm_before,
            norm_after=arch.norm_after,
            qk_norm=arch.qk_norm,
            qk_norm_last=arch.qk_norm_last,
            rope=(local if where[i] else rope) if arch.rope_layers(i, layers) else None,
            window=window if where[i] else None,
        )
        for i in range(layers)
    )


def _numbers(keys: Keys, arch: Architecture) -> dict[str, float]:
    """The multipliers and soft caps that the file states; llama.cpp leaves those at 0 out."""
    found = {}
    for name in arch.multipliers:
        assumed = None if arch.multipliers_required else 0.0
        value = keys.number(f"{{arch}}.{MULTIPLIERS[name]}", assumed)
        if value:
            found[name] = 1 / value if name == "logit_scale" else value
    if arch.softcaps:
        for name, (key, default) in SOFTCAPS.items():
            cap = keys.number(f"{{arch}}.{key}", default)
            if not cap:
                raise UnsupportedError(
                    f"{keys.path}: {keys.name('{arch}.' + key)} is {cap:g}, by which llama.cpp "
                    "divides; remove the key if the model was trained with the usual "
                    f"{default:g}"
                )
            found[name] = cap
    return found


def _check_scale(keys: Keys, assumed: float) -> None:
    scale = keys.number("{arch}.attention.scale", 0.0)
    if scale and not math.isclose(scale, assumed, rel_tol=1e-5):
        raise UnsupportedError(
            f"{keys.path}: {keys.name('{arch}.attention.scale')} is {scale:g}; edgeq computes this "
            f"architecture with {assumed:g}, as llama.cpp does"
        )


def _window(keys: Keys, arch: Architecture, layers: int, context: int) -> int | None:
    """The sliding window.

    Phi-3's is applied as Transformers applies it and as the model was trained, although llama.cpp
    leaves it off.
    """
    has = arch.windows_of(layers) != "none"
    window = int(keys.number(_WINDOW, arch.default_window if has else 0)) or None
    if window is None or has:
        return window
    if window < context:
        raise UnsupportedError(
            f"{keys.path}: {keys.name(_WINDOW)} is {window}, and llama.cpp runs this architecture "
            "without a window; import the Hugging Face checkpoint if the model was trained with "
            "one, or remove the key (gguf-new-metadata --remove-metadata) if it was not"
        )
    return None


def _window_layers(
    keys: Keys, arch: Architecture, layers: int, window: int | None
) -> tuple[bool, ...]:
    """Which layers have a window: all, or all but every so-many-th, or as an array says."""
    if arch.windows_of(layers) in ("none", "all"):
        return (window is not None,) * layers
    pattern = keys.get(_PATTERN)
    if window is None:
        return (False,) * layers
    if isinstance(pattern, list):
        if len(pattern) != layers or not all(isinstance(one, bool) for one in pattern):
            raise FormatError(
                f"{keys.path}: {keys.name(_PATTERN)} is {shown(pattern)}; expected a bool for each "
                "layer"
            )
        return tuple(pattern)
    period = keys.count(_PATTERN, arch.window_period)
    return tuple((i + 1) % period != 0 for i in range(layers))


def _read_rope(keys: Keys, arch: Architecture, source: TensorSource, head_dim: int) -> RopeSpec:
    """The rotary embedding of layers that see all positions."""
    base = keys.number("{arch}.rope.freq_base", arch.default_rope_base) or 10_000.0
    dim = keys.count("{arch}.rope.dimension_count", head_dim)
    if dim != head_dim and not arch.partial_rope:
        raise UnsupportedError(
            f"{keys.path}: {arch.name}.rope.dimension_count is {dim} and heads have {head_dim} "
            f"dimensions; in the {arch.name} architecture all of them rotate"
        )
    if arch.rope_alpha and (alpha := keys.number("{arch}.rope.scaling.alpha", 0.0)):
        base = stretched_base(base, alpha, dim)
    rope = RopeSpec(base, dim, _rope_scaling(keys))
    for name in ("rope_factors_long.weight", "rope_factors_short.weight"):
        if name in source:
            raise UnsupportedError(
                f"{keys.path}: the tensor {name} stretches rotary positions by the longrope "
                "method, which edgeq does not compute; it computes none, linear and Llama 3.1's"
            )
    if "rope_freqs.weight" not in source or not arch.rope_factors:
        return rope  # of another architecture llama.cpp reads no such tensor, and nor does edgeq
    factors = source["rope_freqs.weight"].numpy()
    scaling = _llama3_scaling(rope, factors)
    if scaling is not None and rope.scaling is not None:
        raise UnsupportedError(
            f"{keys.path} stretches rotary positions twice, by {keys.name(_SCALING_FACTOR)} and by "
            "the tensor rope_freqs.weight; edgeq computes one of them"
        )
    whole = factors.shape == (dim // 2,)
    if scaling is None and not (whole and (factors == 1).all()):
        raise UnsupportedError(
            f"{keys.path}: rope_freqs.weight holds frequency factors other than those of Llama 3.1;"
            " import the Hugging Face checkpoint instead"
        )
    return rope if scaling is None else replace(rope, scaling=scaling)


def _rope_scaling(keys: Keys) -> RopeScaling | None:
    """Linear stretching; where a factor is given without a type, the type is linear."""
    kind = keys.get(_SCALING_TYPE, "linear")
    old = keys.number(_OLD_FACTOR, 0.0)
    factor = keys.number(_SCALING_FACTOR, old)
    if kind == "none":
        return None
    if kind != "linear":
        raise UnsupportedError(
            f"{keys.path}: {keys.name(_SCALING_TYPE)} is {shown(kind)}, which edgeq does not "
            "compute; it computes none and linear"
        )
    return RopeScaling("linear", factor) if factor not in (0.0, 1.0) else None


def _llama3_scaling(rope: RopeSpec, factors: NDArray[np.float32]) -> RopeScaling | None:
    """Find Llama 3.1's numbers behind the frequency divisors that GGUF stores instead."""
    if factors.shape != (rope.dim // 2,) or not np.isfinite(factors).all():
        return None
    if (factors == 1).all() or factors.max() <= 0:
        return None
    plain = rope_frequencies(replace(rope, scaling=None))
    # most files are of Llama 3.1 itself
    for original in sorted(_ORIGINAL_CONTEXTS, key=lambda context: context != 8192):
        scaling = RopeScaling("llama3", float(factors.max()), original_context=original)
        stretched = rope_frequencies(replace(rope, scaling=scaling))
        if np.allclose(plain / stretched, factors, rtol=1e-4):
            return scaling
    return None
