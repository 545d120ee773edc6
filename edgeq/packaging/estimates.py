"""Expected memory and speed of a form, as `edgeq plan` estimates them, for manifest and README."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgeq.devices.model_header import ModelFacts
from edgeq.devices.planner import PROCESS_BYTES, TOKENIZER_BYTES, plan
from edgeq.devices.profile import find
from edgeq.model.kv_bits import KvBits
from edgeq.model.memory_layout import kv_bytes, scratch_bytes

CONTEXTS = (512, 1024, 2048, 4096)
"""Context lengths, in tokens, whose memory is listed if the form supports them."""
SERVER_BYTES = 32 << 20
"""Memory of ``edgeq serve`` for the web framework and requests, in bytes. Measured: 24 MiB."""
PREFIX_BYTES = 64 << 20
"""Memory limit, in bytes, that the server of a package gets for KV caches of earlier
conversations."""
UNCERTAINTY = (
    "Speeds are estimates from the bandwidth of the memory. Of 16 published measurements on "
    "Raspberry Pi boards, 15 lay within 25 % of such an estimate; on phones nobody checked them, "
    "and heat slows a phone down after a minute or two. What a token costs beside the reading of "
    "weights is left out, so models of a few million parameters are slower. Measure on your own "
    "device before you promise a speed."
)
_THREADS = 4


def contexts(limit: int) -> list[int]:
    """The context lengths to list for a form that is built for ``limit`` tokens."""
    return sorted({*(n for n in CONTEXTS if n < limit), limit})


def engine_memory(facts: ModelFacts, limit: int) -> list[dict[str, int]]:
    """Memory of ``edgeq serve`` with one conversation, in bytes, for each context length.

    Args:
        facts: the size of the model.
        limit: the longest context, in tokens.
    """
    process = PROCESS_BYTES + TOKENIZER_BYTES * facts.config.vocab + SERVER_BYTES + PREFIX_BYTES
    return _rows(facts, facts.weights_bytes, limit, 8, process)


def runtime_memory(facts: ModelFacts, nbytes: int, limit: int) -> list[dict[str, int]]:
    """Memory of another runtime, in bytes: its files, a 16-bit KV cache and activations.

    Args:
        facts: the size of the model.
        nbytes: size of the files that the runtime loads, in bytes.
        limit: number of tokens that the form is built for.
    """
    return _rows(facts, nbytes, limit, 16, 0)


def _rows(
    facts: ModelFacts, weights: int, limit: int, kv_bits: KvBits, other: int
) -> list[dict[str, int]]:
    rows = []
    for context in contexts(limit):
        cache = kv_bytes(facts.config, context, kv_bits)
        beside = other + scratch_bytes(facts.config, context, _THREADS)
        rows.append(
            {
                "context": context,
                "weights_bytes": weights,
                "cache_bytes": cache,
                "other_bytes": beside,
                "total_bytes": weights + cache + beside,
            }
        )
    return rows


def speeds(
    facts: ModelFacts, devices: Sequence[str], limit: int, needed: int
) -> tuple[list[Any], list[str]]:
    """Expected speed on devices, in tokens per second, and the assumptions behind it.

    Args:
        facts: the size of the model.
        devices: names of device profiles.
        limit: number of tokens that the form is built for.
        needed: bytes that the form takes with its whole context, by `engine_memory` or
            `runtime_memory`; the form fits on a device that can give it so much.
    """
    rows: list[dict[str, Any]] = []
    assumptions: dict[str, None] = {}
    context = min(limit, 2048)
    for name in devices:
        made = plan(facts, find(name), context=context)
        rows.append(
            {
                "device": made.device,
                "context": context,
                "decode_tokens_per_s": _short(made.decode_tokens_per_s),
                "prefill_tokens_per_s": _short(made.prefill_tokens_per_s),
                "fits": needed <= made.usable_bytes,
            }
        )
        assumptions |= {f"{made.device}: {one}": None for one in made.assumptions[2:4]}
    return rows, list(assumptions)


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.2g}")
