"""Dynamic quantization of activations to INT8, and of cached keys and values to 8 or 4 bits.

Activations, queries and attention weights are quantized in blocks of 32, values by token and head,
each with a scale computed at run time:

    scale = max|x| / 127        code = rint(x * (127 / max|x|))

Queries are quantized twice, the second time the error of the first.

Keys have much in common from one position to the next, which would take most of eight bits.
Therefore the first key of every 16 positions is the center of all of them, in float16, and
differences from it are quantized by token and head, with a zero point, to unsigned codes.

A cache of 4 bits is the same but for this. Keys and queries, after their rotary embedding, and
values are multiplied by a Hadamard matrix for each head (`hadamard`), which spreads an outlier over
all dimensions: products of queries and keys stay as they are, and the sum of values is multiplied
back. 64 positions share a center. Values use all 16 codes, code = rint(x / scale) + 8 with
scale = -x / 8 of the x furthest from 0. Queries are quantized once, as their rounding is far
smaller than that of such keys.

The compiled kernels do the same arithmetic. Source of the rotation: QuaRot, Ashkboos et al. 2024,
https://arxiv.org/abs/2404.00456.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.dynamic_quant import TINY, Rounded, quantize_vectors
from edgeq.formats.packing import round_up
from edgeq.formats.schemes import K_BLOCK

VALUE_ZERO = 8
"""The code of a 4-bit value that stands for 0."""


def quantize_blocks(x: NDArray[np.float32], padded: int | None = None) -> Rounded:
    """Quantize activations to INT8 in blocks of 32 along the last axis.

    Args:
        x: float32 [..., K].
        padded: K rounded up to whole blocks and groups (`QuantScheme.padded_k`); to whole blocks
            if None. The padding is zero.

    Returns:
        codes int8 [..., padded], scales float32 [..., padded / 32].
    """
    *lead, k = x.shape
    padded = padded or round_up(k, K_BLOCK)
    full = np.zeros((*lead, padded), np.float32)
    full[..., :k] = x
    codes, scales = quantize_vectors(full.reshape(*lead, padded // K_BLOCK, K_BLOCK))
    return codes.reshape(*lead, padded), scales


def quantize_twice(x: NDArray[np.float32]) -> tuple[Rounded, Rounded]:
    """Quantize by `quantize_blocks`, and then the error of that: x is about the sum of the two."""
    codes, scales = quantize_blocks(x)
    dequantized = codes.astype(np.float32) * np.repeat(scales, K_BLOCK, axis=-1)
    return (codes, scales), quantize_blocks(x - dequantized[..., : x.shape[-1]])


def quantize_keys(
    x: NDArray[np.float32],
    bits: int = 8,
) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.uint8]]:
    """Quantize keys less their center, with a scale and a zero point for each token and head.

    Args:
        x: float32 [T, Hkv, D].
        bits: of a code.

    Returns:
        codes uint8 [T, Hkv, D], scales float16 [T, Hkv] and zero points uint8 [T, Hkv]: x is
        about scale * (code - zero_point).
    """
    levels = np.float32((1 << bits) - 1)
    low, high = np.minimum(x.min(axis=-1), 0), np.maximum(x.max(axis=-1), 0)
    scales = ((high - low) / levels).astype(np.float16)
    stored = scales.astype(np.float32)
    inverse = np.divide(np.float32(1), stored, out=np.zeros_like(stored), where=stored > 0)
    zeros = np.minimum(np.rint(-low * inverse), levels)
    codes = np.rint(x * inverse[..., None]) + zeros[..., None]
    return np.clip(codes, 0, levels).astype(np.uint8), scales, zeros.astype(np.uint8)


def quantize_values(x: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Quantize values to 4 bits, with a scale for each token and head.

    Args:
        x: float32 [T, Hkv, D].

    Returns:
        codes uint8 [T, Hkv, D] and scales float32 [T, Hkv]: x is about scale * (code - 8).
    """
    low, high = x.min(axis=-1), x.max(axis=-1)
    furthest = np.where(high > -low, high, low)
    live = np.abs(furthest) > TINY
    scales = np.where(live, furthest / np.float32(-VALUE_ZERO), np.float32(0))
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=live)
    codes = np.rint(x * inverse[..., None]) + np.float32(VALUE_ZERO)
    return np.clip(codes, 0, 2 * VALUE_ZERO - 1).astype(np.uint8), scales


def hadamard(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors times an orthonormal Hadamard matrix, which is its own inverse.

    Args:
        x: float32 [..., D]. Where D is not a power of two, runs of the largest one that divides it
            are multiplied, each by itself.

    Returns:
        float32 [..., D].
    """
    dim = x.shape[-1]
    size, half = dim & -dim, 1
    runs = x.reshape(*x.shape[:-1], dim // size, size)
    while half < size:
        pairs = runs.reshape(*runs.shape[:-1], -1, 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        runs = np.stack([a + b, a - b], axis=-2).reshape(runs.shape)
        half *= 2
    return runs.reshape(x.shape) * np.float32(1 / np.sqrt(size))
