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


def overflow_message(layer: int, part: str, kv_bits: int) -> str:
    """The message about keys or values that are too large for the cache."""
    largest = "65504"  # of float16
    if kv_bits == 16 and part == "values":
        return (
            f"the float16 KV cache overflowed: layer {layer} makes values beyond {largest}, the "
            "largest float16 number; the model's file is not at fault; run it with an 8-bit cache "
            "(--kv-bits 8, or kv_bits=8), which has scales for them"
        )
    return (
        f"the KV cache overflowed: layer {layer} makes keys or values too large for the float16 "
        f"numbers (at most {largest}) in a cache of {kv_bits} bits; the model's file is not at "
        "fault; divide k_proj by a power of two and multiply q_proj by it (and v_proj and o_proj "
        "likewise), which leaves the model's answers as they are"
    )
