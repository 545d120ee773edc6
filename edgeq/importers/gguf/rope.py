"""The rotary settings of a GGUF file, as llama.cpp reads them.

rope.freq_base, rope.dimension_count        base and rotated dimensions
rope.scaling.type                           "none", "linear", "yarn" or "longrope"; linear if a
                                            factor is given alone
rope.scaling.factor (or rope.scale_linear)  how many times the context is stretched
rope.scaling.original_context_length        before stretching; context_length if absent
rope.scaling.attn_factor                    multiplies what is rotated, beside yarn's own factor
rope.scaling.yarn_log_multiplier            yarn's mscale_all_dim, with an mscale of one
rope.scaling.yarn_beta_fast, _slow          yarn's limits
attention.temperature_scale                 of queries, by positions of the original context
rope.scaling.alpha                          by which the base is stretched, Hunyuan's
rope_freqs.weight                           divisors of the frequencies, Llama 3.1's
rope_factors_long.weight, _short.weight     longrope's, whatever the type says
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.formats.tensor import Tensor
from edgeq.importers.gguf.architecture import Architecture
from edgeq.importers.gguf.keys import Keys
from edgeq.importers.unread import shown
from edgeq.model.rope_spec import RopeScaling, RopeSpec
from edgeq.model.rotary import rope_frequencies, stretched_base, yarn_attention_factor

_TYPE, _FACTOR = "{arch}.rope.scaling.type", "{arch}.rope.scaling.factor"
_OLD_FACTOR = "{arch}.rope.scale_linear"
_ORIGINAL = "{arch}.rope.scaling.original_context_length"
_ATTENTION = "{arch}.rope.scaling.attn_factor"
_LOG_MULTIPLIER = "{arch}.rope.scaling.yarn_log_multiplier"
_EXTRAPOLATION = "{arch}.rope.scaling.yarn_ext_factor"
_BETAS = "{arch}.rope.scaling.yarn_beta_fast", "{arch}.rope.scaling.yarn_beta_slow"
_TEMPERATURE = "{arch}.attention.temperature_scale"
_ALPHA = "{arch}.rope.scaling.alpha"
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"
"""Longrope's tensors."""
_ORIGINAL_CONTEXTS = tuple(1 << power for power in range(4, 21))


class TensorSource(Protocol):
    """A file's tensors by GGUF's names."""

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of that name."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name."""


def read_rope(
    keys: Keys, arch: Architecture, source: TensorSource, head_dim: int, context: int
) -> RopeSpec:
    """The rotary embedding of layers that see all positions.

    Args:
        keys: the metadata.
        arch: what llama.cpp computes for the architecture.
        source: the tensors.
        head_dim: size of a head.
        context: the file's context length.

    Raises:
        FormatError: a key or tensor is missing or impossible.
        UnsupportedError: settings that edgeq does not compute with.
    """
    base = keys.number("{arch}.rope.freq_base", arch.default_rope_base) or 10_000.0
    dim = keys.count("{arch}.rope.dimension_count", head_dim)
    if dim != head_dim and not arch.partial_rope:
        raise UnsupportedError(
            f"{keys.path}: {arch.name}.rope.dimension_count is {dim} and heads have {head_dim} "
            f"dimensions; in the {arch.name} architecture all of them rotate"
        )
    if arch.rope_alpha and (alpha := keys.number(_ALPHA, 0.0)):
        base = stretched_base(base, alpha, dim)
    rope = RopeSpec(base, dim, _scaling(keys, arch, source, dim, context))
    if arch.temperature and (beta := keys.number(_TEMPERATURE, 0.0)):
        length = keys.count(_ORIGINAL, context)
        rope = replace(rope, temperature=beta, temperature_length=length)
    if "rope_freqs.weight" not in source or not arch.rope_factors:
        return rope  # of another architecture llama.cpp reads no such tensor, and nor does edgeq
    if keys.get(_TYPE) == "longrope":
        return rope  # the other two tensors go before it
    factors = source["rope_freqs.weight"].numpy()
    scaling = _llama3(rope, factors)
    if scaling is not None and rope.scaling is not None:
        raise UnsupportedError(
            f"{keys.path} stretches rotary positions twice, by {keys.name(_FACTOR)} and by "
            "the tensor rope_freqs.weight; edgeq computes one of them"
        )
    whole = factors.shape == (dim // 2,)
    if scaling is None and not (whole and (factors == 1).all()):
        raise UnsupportedError(
            f"{keys.path}: rope_freqs.weight holds frequency factors other than those of Llama 3.1;"
            " import the Hugging Face checkpoint instead"
        )
    return rope if scaling is None else replace(rope, scaling=scaling)


def _scaling(
    keys: Keys, arch: Architecture, source: TensorSource, dim: int, context: int
) -> RopeScaling | None:
    kind = keys.get(_TYPE)
    old = keys.number(_OLD_FACTOR, 0.0)
    factor = keys.number(_FACTOR, old) or 1.0
    if kind == "longrope" or any(name in source for name in (SHORT, LONG)):
        return _longrope(keys, arch, source, dim, context, factor)
    if kind == "none":
        return None
    if kind == "yarn":
        return _yarn(keys, arch, context, factor)
    if kind not in (None, "linear"):
        raise UnsupportedError(
            f"{keys.path}: {keys.name(_TYPE)} is {shown(kind)}, which edgeq does not "
            "compute; it computes none, linear, yarn and longrope"
        )
    return RopeScaling("linear", factor) if factor != 1 else None


def _yarn(keys: Keys, arch: Architecture, context: int, factor: float) -> RopeScaling | None:
    if arch.local_rope_base is not None:
        raise UnsupportedError(
            f"{keys.path}: {keys.name(_TYPE)} is 'yarn', which edgeq does not compute for the "
            f"{arch.name} architecture; it computes none and linear"
        )
    extrapolation = keys.get(_EXTRAPOLATION, -1.0)
    if extrapolation not in (-1, 1):
        raise UnsupportedError(
            f"{keys.path}: {keys.name(_EXTRAPOLATION)} is {shown(extrapolation)}; edgeq computes "
            "yarn with 1, which is llama.cpp's own value"
        )
    if factor < 1:
        raise UnsupportedError(
            f"{keys.path}: {keys.name(_FACTOR)} is {factor:g}; edgeq computes yarn with factors of "
            "at least 1"
        )
    multiplier = keys.number(_LOG_MULTIPLIER, 0.0) if arch.yarn_log else 0.0
    attention = yarn_attention_factor(factor, 1.0, multiplier) * keys.number(_ATTENTION, 1.0)
    return RopeScaling(
        "yarn",
        factor,
        original_context=keys.count(_ORIGINAL, context),
        attention_factor=attention,
        beta_fast=keys.number(_BETAS[0], 32.0),
        beta_slow=keys.number(_BETAS[1], 1.0),
    )


def _longrope(
    keys: Keys, arch: Architecture, source: TensorSource, dim: int, context: int, factor: float
) -> RopeScaling:
    if not arch.long_factors:
        raise UnsupportedError(
            f"{keys.path} stretches rotary positions by the longrope method, which llama.cpp does "
            f"not compute for the {arch.name} architecture"
        )
    if factor != 1:
        raise UnsupportedError(
            f"{keys.path} stretches rotary positions twice, by {keys.name(_FACTOR)} and by the "
            f"tensor {LONG}; edgeq computes one of them"
        )
    lists = []
    for name in (SHORT, LONG):
        factors = source[name].numpy()
        if factors.shape != (dim // 2,) or not (np.isfinite(factors) & (factors > 0)).all():
            raise FormatError(
                f"{keys.path}: tensor {name} must hold a number above 0 for each of {dim // 2} "
                f"rotated pairs; its shape is {list(factors.shape)}"
            )
        lists.append(tuple(float(one) for one in factors))
    original = keys.count(_ORIGINAL, context)
    return RopeScaling(
        "longrope",
        max(1.0, context / original),
        original_context=original,
        attention_factor=keys.number(_ATTENTION, 1.0),
        short_factors=lists[0],
        long_factors=lists[1],
    )


def _llama3(rope: RopeSpec, factors: NDArray[np.float32]) -> RopeScaling | None:
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
