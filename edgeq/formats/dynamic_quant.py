"""INT8 vectors: rounding with a scale of their own, found at run time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Rounded = tuple[NDArray[np.int8], NDArray[np.float32]]
"""(codes in -127 .. 127, scales)"""

LEVELS = np.float32(127)
TINY = np.float32(1e-30)
"""A vector with no entry larger than this is taken as zero: 127 / max would overflow float32."""


def quantize_vectors(x: NDArray[np.float32]) -> Rounded:
    """Round vectors along the last axis to INT8, each with its own scale.

    ``scale = max|x| / 127``, ``code = rint(x * (127 / max|x|))``.

    Args:
        x: float32 [..., n].

    Returns:
        codes int8 [..., n], scales float32 [...]; both 0 for a vector of zeros.
    """
    largest = np.abs(x).max(axis=-1)
    live = largest > TINY
    inverse = np.divide(LEVELS, largest, out=np.zeros_like(largest), where=live)
    codes = np.rint(x * inverse[..., None]).astype(np.int8)
    return codes, np.where(live, largest / LEVELS, np.float32(0))
