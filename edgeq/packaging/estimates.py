"""Expected memory and speed of a form, as `edgeq plan` estimates them, for manifest and README.

LiteRT-LM and onnxruntime-genai hold one KV cache of float32. Measured on x86-64, a cache of 8192
tokens instead of 512 took 1.14 and 0.98 times the memory that `cache_bytes` gives for it.
onnxruntime-genai takes less for a shorter context (``max_length``). LiteRT-LM (``max_num_tokens``)
does not, as the length is part of the file; that of a Core ML state is too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgeq.devices.model_header import ModelFacts
from edgeq.devices.planner import PROCESS_BYTES, TOKENIZER_BYTES, plan
from edgeq.devices.profile import DeviceProfile, find, names
from edgeq.model.config import ModelConfig
from edgeq.model.memory_layout import kv_bytes, scratch_bytes
from edgeq.packaging.manifest import ModelVariant
from edgeq.packaging.platforms import Form
from edgeq.packaging.runners import ENGINE
from edgeq.packaging.tiers import INSPECT, PLAN, Tier

CONTEXTS = (256, 512, 1024, 2048, 4096)
"""Context lengths, in tokens, whose memory is listed if the form supports them."""
SERVER_BYTES = 32 << 20
"""Memory of ``edgeq serve`` for the web framework and requests, in bytes. Measured: 24 MiB."""
PREFIX_BYTES = 64 << 20
"""Memory limit, in bytes, that the server of a package gets for KV caches of earlier
conversations."""
_SPEEDS = (
    "The speeds are estimates from the bandwidth of the memory. {} The estimates count only the "
    "time for reading the weights, so models of a few million parameters are slower. Measure on "
    "your own device before you promise a speed."
)
_BOARDS = (
    "Of 16 published measurements on Raspberry Pi boards, 15 lay within 25 % of such an estimate. "
    "A board that gets hot slows down."
)
_TELEPHONES = (
    "For phones they were not compared with measurements, and heat slows a phone down after a "
    "minute or two. Of 16 published measurements on Raspberry Pi boards, 15 lay within 25 % of an "
    "estimate that was made in the same way."
)
_THREADS = 4


def contexts(limit: int) -> list[int]:
    """The context lengths to list for a form that is built for ``limit`` tokens."""
    return sorted({*(n for n in CONTEXTS if n < limit), limit})


def uncertainty(platform: str) -> str:
    """How far the expected speeds of a platform may be from those of a device, for the README."""
    return _SPEEDS.format(_BOARDS if platform == "rpi" else _TELEPHONES)


def memory(form: Form, facts: ModelFacts, nbytes: int, limit: int) -> list[dict[str, int]]:
    """Memory of a form, in bytes, for each context length that it can be given.

    That of edgeq's engine is ``edgeq serve`` with one conversation. That of another runtime is its
    files, its KV cache and activations, without the app and the runtime's own buffers.

    Args:
        form: the form.
        facts: the size of the model.
        nbytes: size of the files that the runtime loads, in bytes.
        limit: number of tokens that the form is built for.
    """
    config = facts.config
    weights, other = nbytes, 0
    if form.target == ENGINE:
        weights = facts.weights_bytes
        other = PROCESS_BYTES + TOKENIZER_BYTES * config.vocab + SERVER_BYTES + PREFIX_BYTES
    rows = []
    for context in [limit] if form.fixed_cache else contexts(limit):
        cache = cache_bytes(form, config, context)
        beside = other + scratch_bytes(config, context, form.threads or _THREADS)
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


def cache_bytes(form: Form, config: ModelConfig, context: int) -> int:
    """Bytes of the KV cache of a form.

    Args:
        form: the form.
        config: the model's hyperparameters.
        context: length of the cache, in tokens.
    """
    if form.target == ENGINE:
        return kv_bytes(config, context, form.cache_bits)
    return (
        2
        * len(config.blocks)
        * config.kv_heads
        * config.head_dim
        * context
        * (form.cache_bits // 8)
    )


def graph_memory(nbytes: int, arena: int) -> dict[str, int]:
    """Memory of a graph in bytes, in the form of a row of `memory`.

    Args:
        nbytes: size of the files that the runtime loads.
        arena: most bytes that activations take at a time.
    """
    return {
        "context": 0, "weights_bytes": nbytes, "cache_bytes": 0, "other_bytes": arena,
        "total_bytes": nbytes + arena,
    }  # fmt: skip


def devices_of(platform: str) -> list[DeviceProfile]:
    """The devices of a platform in edgeq's table, from the smallest memory to the largest."""
    found = [find(name) for name in names()]

    def belongs(device: DeviceProfile) -> bool:
        kind = next((k for k in ("rpi", "iphone") if device.name.startswith(k)), None)
        android = kind is None and (device.kind == "phone" or device.name.startswith("phone-"))
        here = {"rpi": kind == "rpi", "ios": kind == "iphone", "android": android}
        return here.get(platform, kind is not None or android)

    devices = [device for device in found if belongs(device) and device.usable_bytes]
    return sorted(devices, key=lambda device: (device.ram_bytes or 0, device.name))


def tiers(platform: str, form: Form, variants: Sequence[ModelVariant]) -> list[Tier]:
    """The tiers of a form, from the most memory to the least.

    Args:
        platform: name of the platform.
        form: the form.
        variants: the variants of the form, each with its memory.
    """
    devices = devices_of(platform)
    pairs = sorted(
        ((variant, row) for variant in variants for row in variant.memory),
        key=lambda pair: -pair[1]["total_bytes"],
    )
    left, made = list(devices), []
    for variant, row in pairs:
        needed, context = row["total_bytes"], row["context"] or None
        able = [device for device in devices if needed <= (device.usable_bytes or 0)]
        taking = [device for device in left if device in able]
        left = [device for device in left if device not in able]
        made.append(
            Tier(
                id=f"{variant.id}-{context}" if context else variant.id,
                variant=variant.id,
                entry=variant.entry,
                context=context,
                compute_units=form.compute_units,
                threads=form.threads,
                needed_bytes=needed,
                least_ram_bytes=min(
                    (device.ram_bytes for device in able if device.ram_bytes), default=None
                ),
                devices=tuple(device.name for device in taking),
                by=PLAN if context else INSPECT,
            )
        )
    return made


def speeds(
    facts: ModelFacts, devices: Sequence[str], limit: int, needed: int
) -> tuple[list[Any], list[str]]:
    """Expected speed on devices, in tokens per second, and the assumptions behind it.

    Args:
        facts: the size of the model.
        devices: names of device profiles.
        limit: number of tokens that the form is built for.
        needed: bytes that the form takes with its whole context, by `memory`; the
            form fits on a device that can give it so much.
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
