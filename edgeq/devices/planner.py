"""Will a model fit on a device, and how fast would it be: a plan from headers and a profile.

    weights   as the engine holds them, or as they would be at so many bits
    cache     exactly what the engine allocates for the context (`edgeq.model.memory_layout`)
    scratch   the same, for the threads
    process   interpreter, libraries, compiled code and the tokenizer, as measured

Speed is a roofline (`edgeq.devices.roofline`). Each figure that is not of the model or the profile
is named in the plan's assumptions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edgeq.core.errors import DoesNotFitError, UsageError
from edgeq.devices.model_header import ModelFacts
from edgeq.devices.profile import DeviceProfile
from edgeq.devices.roofline import ATTENTION, DECODE_SHARE, Bound, Rates, Speed, sustained
from edgeq.formats.schemes import BITS
from edgeq.model.config import ModelConfig
from edgeq.model.kv_bits import KvBits, checked_kv_bits
from edgeq.model.memory_layout import MAX_SEQUENCES, draft_bytes, kv_bytes, scratch_bytes
from edgeq.model.mtp import mtp_config

PROCESS_BYTES = 104 << 20
"""Interpreter, NumPy, the compiler's library and compiled kernels; measured on x86-64 Linux."""
TOKENIZER_BYTES = 1024
"""Of each entry of the vocabulary; measured with byte-level BPE of 50 to 250 thousand entries."""
PROMPT = 512
"""Tokens of the prompt whose speed is given, if the context holds them."""


@dataclass(frozen=True)
class Plan:
    """What a model takes and does on a device.

    Attributes:
        model, device: names.
        scheme: how most weights are held.
        context: tokens of context that memory is counted for.
        kv_bits: of the cache.
        threads: of the engine.
        parallel: answers at a time, each with a cache of its own.
        fits: whether all of it fits in the usable memory.
        weights_bytes, kv_bytes, scratch_bytes, process_bytes: what is held.
        draft_bytes: all that a draft model takes, or the caches and buffers of the model's own
            multi-token-prediction head, whose weights are among the model's; 0 without either.
        table_bytes: of the weights that stay in the model's file, where only rows of them are read;
            they are not in the other figures.
        usable_bytes: what the device can give one process.
        headroom_bytes: what is left; negative where it does not fit.
        largest_context: tokens that would fit, 0 if the weights alone do not.
        highest_bits: of 8, 4, 3 and 2 bits per weight, the highest that fits this context; None
            if none does.
        prefill_tokens_per_s: of a prompt of 512 tokens or the context; None where unknown.
        decode_tokens_per_s: with an empty cache.
        decode_full_tokens_per_s: with the whole context in the cache. All speeds are of one answer
            alone.
        bound: what limits decoding.
        joules_per_token: of the whole device while decoding with an empty cache; None without a
            power figure.
        assumptions: everything that was taken for granted, in sentences.
    """

    model: str
    device: str
    scheme: str
    context: int
    kv_bits: int
    threads: int
    parallel: int
    fits: bool
    weights_bytes: int
    kv_bytes: int
    scratch_bytes: int
    process_bytes: int
    draft_bytes: int
    table_bytes: int
    usable_bytes: int
    headroom_bytes: int
    largest_context: int
    highest_bits: int | None
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    decode_full_tokens_per_s: float | None
    bound: Bound | None
    joules_per_token: float | None
    assumptions: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of everything in memory."""
        return self.usable_bytes - self.headroom_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {
            "total_bytes": self.total_bytes,
            "assumptions": list(self.assumptions),
        }

    @property
    def _fits_alone(self) -> bool:
        """Whether it fits without its draft model."""
        return bool(self.draft_bytes) and self.headroom_bytes + self.draft_bytes >= 0

    def require(self) -> None:
        """Refuse what does not fit.

        Raises:
            DoesNotFitError: says what is needed, what there is, and what would fit.
        """
        if self.fits:
            return
        raise DoesNotFitError(
            f"{self.model} ({self.scheme}) needs {_mib(self.total_bytes)} with a context of "
            f"{self.context} tokens{self._times()} (weights {_mib(self.weights_bytes)}, KV cache "
            f"{_mib(self.kv_bytes)}, {self._draft()}other "
            f"{_mib(self.scratch_bytes + self.process_bytes)}), but {self.device} has "
            f"{_mib(self.usable_bytes)} usable; {self._mend()}",
            plan=self,
        )

    def _times(self) -> str:
        return f" for each of {self.parallel} answers at a time" if self.parallel > 1 else ""

    def _draft(self) -> str:
        return f"draft model {_mib(self.draft_bytes)}, " if self.draft_bytes else ""

    def _mend(self) -> str:
        ways = ["no draft model"] if self._fits_alone else []
        if self.largest_context:
            ways.append(f"a context of {self.largest_context} tokens (-c {self.largest_context})")
        if self.highest_bits:
            ways.append(
                f"weights of {self.highest_bits} bits (edgeq quantize --bits {self.highest_bits})"
            )
        if not ways:
            return "not even 2 bits per weight would fit: use a smaller model"
        return f"these would fit: {' or '.join(ways)}"


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.0f} MiB"


def plan(
    facts: ModelFacts,
    profile: DeviceProfile,
    *,
    context: int,
    kv_bits: KvBits = 8,
    threads: int | None = None,
    bits: int | None = None,
    text: bool = True,
    parallel: int = 1,
    draft: ModelFacts | None = None,
) -> Plan:
    """Plan a model on a device.

    Args:
        facts: of the model.
        profile: of the device.
        context: tokens of context to make room for.
        kv_bits: of the cache.
        threads: of the engine; all of the device's cores if None.
        bits: plan for the model quantized to so many bits per weight instead of as it is held.
        text: whether the process has a tokenizer.
        parallel: answers at a time, as `edgeq serve` gives them, each with a cache of its own.
        draft: a small model that drafts tokens for it, as it is held.

    Raises:
        UsageError: a number outside what is allowed, or a device of unknown memory.
    """
    config = facts.config
    if not 1 <= context <= config.context:
        raise UsageError(
            f"context is {context}; {facts.name} supports 1 to {config.context} tokens"
        )
    checked_kv_bits(kv_bits)
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}; use 1 or more")
    if not 1 <= parallel <= MAX_SEQUENCES:
        raise UsageError(f"parallel is {parallel}; use 1 to {MAX_SEQUENCES}")
    if profile.usable_bytes is None:
        raise UsageError(f"the usable memory of {profile.title} is not known; give it usable_bytes")
    threads = threads or profile.cores or 1
    stored = facts if bits is None else facts.at_bits(bits)
    rates = sustained(profile, threads)
    memory = _Memory(config, kv_bits, threads, text, parallel, draft)
    total = memory.whole(stored, context)
    usable = profile.usable_bytes
    speed = Speed(stored, rates, kv_bits)
    decode = _per_second(speed.decode_seconds(0))
    prompt = min(PROMPT, context)
    return Plan(
        model=facts.name,
        device=profile.title,
        scheme=stored.scheme,
        context=context,
        kv_bits=kv_bits,
        threads=threads,
        parallel=parallel,
        fits=total <= usable,
        weights_bytes=stored.weights_bytes,
        kv_bytes=memory.cache(context),
        scratch_bytes=memory.scratch(context),
        process_bytes=memory.process,
        draft_bytes=memory.drafting,
        table_bytes=stored.table_bytes,
        usable_bytes=usable,
        headroom_bytes=usable - total,
        largest_context=_largest(config.context, lambda n: memory.whole(stored, n) <= usable),
        highest_bits=_highest_bits(facts, usable - memory.beside(context)),
        prefill_tokens_per_s=_per_second(speed.prefill_seconds(prompt), prompt),
        decode_tokens_per_s=decode,
        decode_full_tokens_per_s=_per_second(speed.decode_seconds(context)),
        bound=speed.bound,
        joules_per_token=profile.load_watts / decode if profile.load_watts and decode else None,
        assumptions=tuple(_assumptions(stored, profile, rates, bits, kv_bits, text)),
    )


def needed_bytes(
    facts: ModelFacts,
    *,
    context: int,
    threads: int,
    kv_bits: KvBits = 8,
    draft: ModelFacts | None = None,
) -> int:
    """Bytes that a model takes on any device, as `plan` counts them.

    Args:
        facts: of the model.
        context: tokens of context.
        threads: of the engine.
        kv_bits: of the cache.
        draft: a small model that drafts tokens for it.
    """
    return _Memory(facts.config, kv_bits, threads, True, 1, draft).whole(facts, context)


def budget_bytes(
    facts: ModelFacts,
    profile: DeviceProfile,
    context: int,
    *,
    kv_bits: KvBits = 8,
    threads: int | None = None,
) -> int:
    """Bytes that are left for the tensors of a model on a device.

    Args:
        facts: of the model.
        profile: of the device.
        context: tokens of context to keep room for.
        kv_bits: of the cache.
        threads: of the engine; all of the device's cores if None.

    Raises:
        DoesNotFitError: nothing is left for weights.
        UsageError: as `plan`.
    """
    smallest = plan(
        facts, profile, context=context, kv_bits=kv_bits, threads=threads, bits=min(BITS)
    )
    left = smallest.usable_bytes - (smallest.total_bytes - smallest.weights_bytes)
    if left <= 0:
        smallest.require()
    return left


@dataclass(frozen=True)
class _Memory:
    """Memory other than the weights."""

    config: ModelConfig
    kv_bits: int
    threads: int
    text: bool
    parallel: int
    draft: ModelFacts | None

    @property
    def drafting(self) -> int:
        own = 0
        if self.config.mtp is not None:
            own = draft_bytes(mtp_config(self.config), self.threads, self.kv_bits, self.parallel)
        if self.draft is None:
            return own
        beside = draft_bytes(self.draft.config, self.threads, self.kv_bits, self.parallel)
        return own + self.draft.weights_bytes + beside

    @property
    def process(self) -> int:
        return PROCESS_BYTES + self.text * TOKENIZER_BYTES * self.config.vocab

    def cache(self, context: int) -> int:
        return self.parallel * kv_bytes(self.config, context, self.kv_bits)

    def scratch(self, context: int) -> int:
        return scratch_bytes(self.config, context, self.threads, self.parallel)

    def beside(self, context: int) -> int:
        return self.cache(context) + self.scratch(context) + self.process + self.drafting

    def whole(self, facts: ModelFacts, context: int) -> int:
        """All memory, with the weights as they are held."""
        return facts.weights_bytes + self.beside(context)


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to ``most`` that fits, if all smaller ones do; 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _highest_bits(facts: ModelFacts, room: int) -> int | None:
    sizes = {bits: facts.at_bits(bits).weights_bytes for bits in BITS}
    return max((bits for bits, nbytes in sizes.items() if nbytes <= room), default=None)


def _per_second(seconds: float | None, tokens: int = 1) -> float | None:
    return None if seconds is None else tokens / seconds


def _assumptions(
    facts: ModelFacts,
    profile: DeviceProfile,
    rates: Rates,
    bits: int | None,
    kv_bits: int,
    text: bool,
) -> list[str]:
    assumptions = [
        f"the usable memory is {_mib(profile.usable_bytes or 0)}: "
        f"{_source(profile.sources, 'usable_bytes')}",
        f"Python, libraries and compiled kernels need {_mib(PROCESS_BYTES)}"
        + (f", the tokenizer {TOKENIZER_BYTES} bytes per entry" if text else ""),
    ]
    if bits is not None:
        assumptions.append(
            f"the model is quantized to {facts.scheme}, embedding and output head to 8 bits"
        )
    if facts.table_bytes:
        assumptions.append(
            f"a table of {_mib(facts.table_bytes)} stays in the model's file: of each token one "
            "row is read, which the system may keep in memory that nothing else needs"
        )
    if facts.decoded:
        assumptions.append(
            f"{facts.decoded} tensors have a type that the engine cannot compute with and are "
            "converted to float32; `edgeq quantize` avoids that"
        )
    if rates.read_gb_s is None:
        assumptions.append("the memory bandwidth is unknown, so speed is not estimated")
    else:
        assumptions.append(
            f"memory is read at {rates.read_gb_s:.1f} GB/s and generation reaches "
            f"{DECODE_SHARE:.0%} of that, as measured on x86-64; a model that fits the "
            "processor's cache is faster"
        )
    if not facts.integer:
        assumptions.append("prompts are not estimated for floating-point weights")
    elif rates.int8_gops is None:
        assumptions.append("the integer throughput is unknown, so prompts are not estimated")
    else:
        assumptions.append(f"prompts are processed at {rates.int8_gops:.0f} GOPS")
    if rates.int8_gops is None:
        assumptions.append("attention is limited by memory bandwidth")
    else:
        key, query = ATTENTION[kv_bits]
        assumptions.append(
            f"attention needs {key} multiplications per dimension of a cached position and "
            f"{query} per dimension of each query head, as measured with AVX-512 VNNI"
        )
    assumptions.append(f"sources of the rates: {rates.source}")
    assumptions.append("no other program runs, and heat does not reduce the clock rate")
    if profile.load_watts is not None:
        assumptions.append(
            f"power during generation is {profile.load_watts:g} W, as with all cores busy, for the "
            f"whole device: {_source(profile.sources, 'load_watts')}"
        )
    return assumptions


def _source(sources: Mapping[str, str], field: str) -> str:
    return sources.get(field, "no source given")
