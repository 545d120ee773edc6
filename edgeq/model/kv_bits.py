"""How many bits a number in the KV cache may have; without NumPy, as the command line needs it."""

from __future__ import annotations

from typing import Literal, get_args

from edgeq.core.errors import UsageError

KvBits = Literal[4, 8, 16]
"""Bits of a number in the cache: integers of 4 or 8 bits, or float16."""
KV_BITS: tuple[KvBits, ...] = get_args(KvBits)


def checked_kv_bits(kv_bits: int) -> KvBits:
    """The same number.

    Raises:
        UsageError: no cache has so many bits.
    """
    for known in KV_BITS:
        if kv_bits == known:
            return known
    raise UsageError(f"kv_bits is {kv_bits}; use 4, 8 or 16")
