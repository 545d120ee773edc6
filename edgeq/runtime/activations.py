"""Dynamic INT8 quantization of activations and of cached keys and values.

Activations, queries and attention weights are quantized in blocks of 32, values by token and head,
each with a scale computed at run time:

    scale = max|x| / 127        code = rint(x * (127 / max|x|))

Queries are quantized twice, the second time the error of the first.

Keys have much in common from one position to the next, which would take most of eight bits.
Therefore the first key of every 16 positions is the center of all of them, in float16, and
differences from it are quantized by token and head, with a zero point, to unsigned codes.

The compiled kernels do the same arithmetic.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.dynamic_quant import Rounded, quantize_vectors
from edgeq.formats.packing import round_up
from edgeq.formats.schemes import K_BLOCK

KEY_LEVELS = np.float32(255)


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
) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.uint8]]:
    """Quantize keys less their center, with a scale and a zero point for each token and head.

    Args:
        x: float32 [T, Hkv, D].

    Returns:
        codes uint8 [T, Hkv, D], scales float16 [T, Hkv] and zero points uint8 [T, Hkv]: x is
        about scale * (code - zero_point).
    """
    low, high = np.minimum(x.min(axis=-1), 0), np.maximum(x.max(axis=-1), 0)
    scales = ((high - low) / KEY_LEVELS).astype(np.float16)
    stored = scales.astype(np.float32)
    inverse = np.divide(np.float32(1), stored, out=np.zeros_like(stored), where=stored > 0)
    zeros = np.minimum(np.rint(-low * inverse), KEY_LEVELS)
    codes = np.rint(x * inverse[..., None]) + zeros[..., None]
    return np.clip(codes, 0, KEY_LEVELS).astype(np.uint8), scales, zeros.astype(np.uint8)
