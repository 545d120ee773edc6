"""How a tensor of activations is rounded to 8 bits: one scale and one zero point for all of it.

Decoders with static activations and graphs of operators use the same type and the same formula,
so that a range gives the same integers in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import SchemeError


@dataclass(frozen=True)
class QuantParams:
    """How a value is rounded to 8 bits: ``scale * (q - zero_point)``, q from -128 to 127.

    Args:
        scale: positive and finite, exactly a float32.
        zero_point: -128 to 127.

    Raises:
        SchemeError: out of range.

    Example:
        >>> params = QuantParams.from_range(-1.0, 1.55)
        >>> params.zero_point
        -28
        >>> params.quantize(np.array([-9.0, 0.0, 9.0])).tolist()
        [-128, -28, 127]
    """

    scale: float
    zero_point: int

    def __post_init__(self) -> None:
        if not (np.isfinite(self.scale) and self.scale > 0):
            raise SchemeError(f"the scale is {self.scale}; it must be positive and finite")
        if float(np.float32(self.scale)) != self.scale:
            raise SchemeError(f"the scale {self.scale!r} is not a float32 value")
        if not -128 <= self.zero_point <= 127:
            raise SchemeError(f"the zero point is {self.zero_point}; it must be in -128 .. 127")

    @classmethod
    def from_range(cls, low: float, high: float) -> QuantParams:
        """The parameters whose 256 codes span a range, with zero as one of them.

        Scales are not rounded to numbers that float16 holds: their ratios would then be short
        fractions, sums would fall halfway between two codes, and runtimes round such ties
        differently.

        Args:
            low: at most 0.
            high: at least 0. For an empty range the scale is 1/128.
        """
        scale = float(np.float32((high - low) / 255))
        if scale < np.finfo(np.float32).tiny:
            return cls(1 / 128, 0)
        return cls(scale, int(np.clip(round(-128 - low / scale), -128, 127)))

    def quantize(self, x: NDArray[Any]) -> NDArray[np.int8]:
        """Integers of x, ties to even, as every runtime rounds them."""
        q: NDArray[np.float32] = np.rint(x / np.float32(self.scale)) + self.zero_point
        return np.clip(q, -128, 127).astype(np.int8)

    def dequantize(self, q: NDArray[np.int8]) -> NDArray[np.float32]:
        """Values that integers stand for."""
        steps = q.astype(np.float32) - np.float32(self.zero_point)
        return steps * np.float32(self.scale)
