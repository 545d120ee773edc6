"""What numbers of a model may be."""

from __future__ import annotations

import sys
from numbers import Integral, Real
from typing import Any

MAX_SIZE = 1 << 31
"""No size of a model is larger."""
MAX_LAYERS = 1 << 16
"""No model has more layers."""
MAX_EXPERTS = 4096
"""No layer has more experts."""


def is_count(value: Any) -> bool:
    """Whether a value is a whole number from 0 to `MAX_SIZE`."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return whole and 0 <= int(value) <= MAX_SIZE


def is_finite(value: Any) -> bool:
    """Whether a value is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    number: Any = value  # compared rather than converted: an integer of 400 digits is no float
    return bool(-sys.float_info.max <= number <= sys.float_info.max)
