"""Rotary frequencies of every kind, and their cosines and sines: the only copy of these formulas.

Two kinds depend on the length of the sequence: longrope has factors for short and for long ones,
and dynamic raises its base with the length. Keys in a cache have been rotated already, so a
decoder cannot change its mind while a sequence grows. Everything here, and in each target, goes by
the context that a session is opened with, as llama.cpp does: the results are those of Transformers
for a sequence of that length. `default_context` is short enough for nothing to be stretched.

Source: Su et al. 2021 (arXiv 2104.09864); Chen et al. 2023 (arXiv 2306.15595) for linear; Peng et
al. 2023 (arXiv 2309.00071) for yarn; Ding et al. 2024 (arXiv 2402.13753) for longrope;
modeling_rope_utils.py of Transformers 5.24 for what the settings mean.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.tensor import row_blocks
from edgeq.model.config import ModelConfig
from edgeq.model.rope_spec import RopeScaling, RopeSpec
from edgeq.model.trigonometry import cos_sin, log, power

Array = NDArray[np.float32]

CONTEXT = 4096
"""Tokens of context where nothing is said and the model has as many."""
ROPE_ELEMENTS = 1 << 14
"""Angles turned to cosines and sines at once, so that what is between stays in the cache."""


def default_context(config: ModelConfig) -> int:
    """Tokens of context where nothing is said.

    The model's own limit, at most `CONTEXT`, and at most the context before stretching where the
    rotary embedding depends on the length.
    """
    originals = [
        rope.scaling.original_context
        for rope in config.ropes
        if rope.scaling is not None and _depends_on_length(rope)
    ]
    return min(config.context, CONTEXT, *originals)


@lru_cache(maxsize=64)
def rope_at(rope: RopeSpec, context: int) -> RopeSpec:
    """The rotary embedding of a session with a context: the same for every length.

    Args:
        rope: of a layer.
        context: tokens that the session has room for.
    """
    scaling = rope.scaling
    if scaling is None or not _depends_on_length(rope):
        return rope
    longer = context > scaling.original_context
    if scaling.kind == "longrope":
        factors = scaling.long_factors if longer else scaling.short_factors
        return replace(rope, scaling=replace(scaling, short_factors=factors, long_factors=factors))
    if not longer:
        return replace(rope, scaling=None)
    stretch = scaling.factor * context / scaling.original_context - (scaling.factor - 1)
    return replace(rope, base=stretched_base(rope.base, stretch, rope.dim), scaling=None)


def stretched_base(base: float, stretch: float, dim: int) -> float:
    """The base whose lowest frequency is ``stretch`` times lower (NTK-aware scaling)."""
    return float(base * power(stretch, dim / (dim - 2)))


def config_at(config: ModelConfig, context: int) -> ModelConfig:
    """A model's configuration with the rotary embeddings of a session with a context."""
    if not any(_depends_on_length(rope) for rope in config.ropes):
        return config
    blocks = (
        replace(block, rope=block.rope and rope_at(block.rope, context)) for block in config.blocks
    )
    return replace(config, blocks=tuple(blocks))


def same_ropes(config: ModelConfig, context: int, other: int) -> bool:
    """Whether sessions with two contexts rotate alike, so that keys of one serve the other."""
    return all(rope_at(rope, context) == rope_at(rope, other) for rope in config.ropes)


def rope_frequencies(rope: RopeSpec, context: int = 0) -> NDArray[np.float64]:
    """Radians per position of each rotated pair, float64 [dim / 2].

    Args:
        rope: of a layer.
        context: see `rope_at`.
    """
    rope = rope_at(rope, context)
    exponents = [-i / rope.dim for i in range(0, rope.dim, 2)]
    frequencies: NDArray[np.float64] = np.array([power(rope.base, e) for e in exponents])
    frequencies[len(frequencies) - rope.still :] = 0
    scaling = rope.scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "longrope":
        frequencies /= np.array(scaling.short_factors)
        return frequencies
    stretched = frequencies / scaling.factor
    if scaling.kind == "linear":
        return stretched
    if scaling.kind == "yarn":
        unstretched = 1 - _yarn_ramp(rope, scaling)
    else:
        # Llama 3.1: how many turns a pair makes in the original context decides how much of the
        # stretching it gets: all below low_freq_factor turns, none above high_freq_factor.
        turns = scaling.original_context * frequencies / (2 * np.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        unstretched = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - unstretched) * stretched + unstretched * frequencies


def rope_tables(rope: RopeSpec, n_positions: int, context: int = 0) -> tuple[Array, Array]:
    """Cosines and sines of positions 0 .. n_positions-1, times all factors that go with them.

    Computed in float64 and rounded once.

    Args:
        rope: of the queries or, from `RopeSpec.for_keys`, of the keys of a layer.
        n_positions: how many.
        context: of the session; n_positions if 0. See `rope_at`.

    Returns:
        (cos, sin), each float32 [n_positions, dim / 2].
    """
    frequencies = rope_frequencies(rope, context or n_positions)
    amplitude = rope.scaling.attention_factor if rope.scaling else 1.0
    cos, sin = np.empty((2, n_positions, len(frequencies)), np.float32)
    for rows in row_blocks(cos.shape, ROPE_ELEMENTS):
        positions = np.arange(rows.start, rows.stop)
        parts = cos_sin(np.outer(positions, frequencies))
        if amplitude != 1 or rope.temperature:
            scale = amplitude * _temperatures(rope, positions)[:, None]
            parts = parts[0] * scale, parts[1] * scale
        cos[rows], sin[rows] = parts
    return cos, sin


def _depends_on_length(rope: RopeSpec) -> bool:
    scaling = rope.scaling
    return scaling is not None and (
        scaling.kind == "dynamic" or scaling.short_factors != scaling.long_factors
    )


def _yarn_ramp(rope: RopeSpec, scaling: RopeScaling) -> NDArray[np.float64]:
    """How much of the stretching each pair gets, from 0 to 1."""
    low = _yarn_pair(rope, scaling, scaling.beta_fast)
    high = _yarn_pair(rope, scaling, scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    return np.clip((np.arange(rope.dim // 2, dtype=np.float64) - low) / (high - low), 0.0, 1.0)


def _yarn_pair(rope: RopeSpec, scaling: RopeScaling, turns: float) -> float:
    """The pair, as a real number, that makes so many turns in the original context."""
    return rope.dim * log(scaling.original_context / (turns * 2 * math.pi)) / (2 * log(rope.base))


def _temperatures(rope: RopeSpec, positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """What the queries at each position are multiplied by."""
    if not rope.temperature:
        return np.ones(len(positions))
    steps = positions // rope.temperature_length
    values = {int(step): 1 + rope.temperature * log(1.0 + step) for step in np.unique(steps)}
    return np.array([values[int(step)] for step in steps])


def yarn_attention_factor(factor: float, numerator: float = 1.0, denominator: float = 0.0) -> float:
    """Yarn's factor on what is rotated, where a model states none.

    Args:
        factor: how many times the context is stretched.
        numerator, denominator: ``mscale`` and ``mscale_all_dim`` of a configuration.

    Example:
        >>> round(yarn_attention_factor(4.0), 6), yarn_attention_factor(4.0, 1.0, 1.0)
        (1.138629, 1.0)
    """
    if factor <= 1:
        return 1.0
    return (0.1 * numerator * log(factor) + 1) / (0.1 * denominator * log(factor) + 1)


def longrope_attention_factor(factor: float, original_context: int) -> float:
    """Longrope's factor on what is rotated, where a model states none.

    Example:
        >>> round(longrope_attention_factor(32.0, 4096), 6)
        1.190238
    """
    if factor <= 1:
        return 1.0
    return math.sqrt(1 + log(factor) / log(float(original_context)))
