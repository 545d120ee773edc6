"""How fast a model would run: a roofline of memory bandwidth and integer throughput.

A generated token reads every weight once, of experts those that it goes through, at `DECODE_SHARE`
of the memory's read bandwidth, or multiplies by them, if that takes longer. Attention reads the
cache and multiplies with it, the slower of the two counting again. A prompt multiplies every such
weight of the layers for each token at a share of the integer peak, and attends to what came before.

Source: Williams, Waterman & Patterson 2009, "Roofline" (doi 10.1145/1498765.1498785). The shares
and costs are measured with our kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgeq.devices.model_header import ModelFacts
from edgeq.devices.profile import DeviceProfile
from edgeq.model.config import ModelConfig
from edgeq.model.memory_layout import layer_position_bytes, state_bytes

Bound = Literal["memory bandwidth", "int8 throughput"]

DECODE_SHARE = 0.88
"""Of the read bandwidth, what decoding turns into weights; docs/benchmarks.md, one thread."""
PREFILL_SHARE = 0.6
"""Of the integer peak reckoned from cores and clocks, what a prompt reaches; measured with
AVX-512-VNNI."""
KERNEL_SHARE = 0.82
"""The same of the matmul kernel's own measured throughput."""
ATTENTION = {4: (26, 3), 8: (26, 4), 16: (25, 16)}
"""Bits of the cache -> what one dimension of a cached position costs: for each key/value head in
a decode step, and for each query head; in multiplications of a prompt. Fitted to decoding and
prompts at depth 4000 of shapes with 3 and 7 query heads a key, with AVX-512-VNNI."""


@dataclass(frozen=True)
class Rates:
    """What a device sustains.

    Args:
        read_gb_s: 1e9 bytes read per second; None unknown.
        int8_gops: 1e9 8-bit operations per second of a prompt's matrix products (a multiplication
            and an addition are two); None unknown.
        source: where they come from, in words.
    """

    read_gb_s: float | None
    int8_gops: float | None
    source: str


def sustained(profile: DeviceProfile, threads: int) -> Rates:
    """What a profile says that a number of threads sustains."""
    read = None
    if profile.read_gb_s:
        known = [n for n in profile.read_gb_s if n <= threads] or [min(profile.read_gb_s)]
        read = profile.read_gb_s[max(known)]
    int8 = None
    if profile.int8_gops is not None and profile.cores:
        measured = profile.sources.get("int8_gops", "").startswith("measured: ")
        share = KERNEL_SHARE if measured else PREFILL_SHARE
        int8 = profile.int8_gops * share * min(threads, profile.cores) / profile.cores
    sources = [
        f"{name} {profile.sources[field]}"
        for name, field in (("bandwidth", "read_gb_s"), ("integer peak", "int8_gops"))
        if field in profile.sources
    ]
    if int8 is not None:
        sources.append(f"prompts reach {share:.0%} of the latter, as with AVX-512-VNNI")
    return Rates(read, int8, "; ".join(sources) or "unknown")


class Speed:
    """Times of a model, by the roofline.

    Args:
        facts: of the model, as it is held.
        rates: of the device.
        kv_bits: of the cache.
    """

    def __init__(self, facts: ModelFacts, rates: Rates, kv_bits: int) -> None:
        self._facts, self._kv_bits = facts, kv_bits
        self._key_cost, self._query_cost = ATTENTION[kv_bits]
        self._read = rates.read_gb_s * 1e9 * DECODE_SHARE if rates.read_gb_s else None
        self._multiply = rates.int8_gops * 1e9 / 2 if rates.int8_gops else None

    @property
    def bound(self) -> Bound | None:
        """What limits decoding with an empty cache."""
        if self._read is None:
            return None
        return "memory bandwidth" if self._reading >= self._multiplying else "int8 throughput"

    @property
    def _reading(self) -> float:
        assert self._read is not None
        return self._facts.read_bytes / self._read

    @property
    def _multiplying(self) -> float:
        if self._multiply is None or not self._facts.integer:
            return 0.0
        head = self._facts.config.hidden * self._facts.config.vocab
        return (self._facts.token_products + head) / self._multiply

    def decode_seconds(self, cached: int) -> float | None:
        """Seconds for a token after ``cached`` others; None where the bandwidth is unknown."""
        if self._read is None:
            return None
        return max(self._reading, self._multiplying) + self._attention(cached)

    def _attention(self, cached: int) -> float:
        assert self._read is not None
        config = self._facts.config
        seen = values_seen(config, cached)
        reading = cache_read_bytes(config, cached, self._kv_bits) / self._read
        if self._multiply is None:
            return reading
        products = self._key_cost * config.kv_heads + self._query_cost * config.heads
        return max(reading, products * seen / self._multiply)

    def prefill_seconds(self, tokens: int, cached: int = 0) -> float | None:
        """Seconds for a prompt after ``cached`` tokens; None where the weights are floats or the
        throughput is unknown."""
        if self._multiply is None or not self._facts.integer:
            return None
        config = self._facts.config
        head = config.hidden * config.vocab
        seen = sum(values_seen(config, cached + n) for n in range(tokens))
        attention = self._query_cost * config.heads * seen
        products = tokens * self._facts.token_products + head + attention
        read = self._facts.bytes_read_by(tokens)
        reading = read / self._read if self._read else 0.0
        return max(products / self._multiply, reading)


def cache_read_bytes(config: ModelConfig, cached: int, kv_bits: int) -> int:
    """Bytes of the cache that a token after ``cached`` others reads."""
    return sum(
        block.positions_seen(cached) * layer_position_bytes(config, layer, kv_bits)
        + 2 * state_bytes(config, layer)  # read and written
        for layer, block in enumerate(config.blocks)
    )


def values_seen(config: ModelConfig, cached: int) -> int:
    """Values of a head at the cached positions that a token attends to, summed over the layers that
    have attention."""
    return sum(
        block.positions_seen(cached) * config.head_dim_of(layer)
        for layer, block in enumerate(config.blocks)
        if block.mixer == "attention"
    )
