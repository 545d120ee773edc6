"""What this machine does with a model: timed runs, raw samples kept, memory and bandwidth.

A scenario is run once to warm up (pages are touched, code is compiled) and then timed
``repeats`` times; every sample is kept, averages are made only when asked for. What cannot be
measured here is None, never 0.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgeq.core.errors import UsageError
from edgeq.core.memory import peak_rss_bytes, reset_peak_rss
from edgeq.core.progress import Progress
from edgeq.devices.contention import Contention, Watch
from edgeq.devices.model_header import facts_of
from edgeq.devices.roofline import cache_read_bytes

if TYPE_CHECKING:
    from edgeq.model.model import Model
    from edgeq.runtime.engine import Engine


@dataclass(frozen=True)
class Scenario:
    """What is timed: reading a prompt or generating, with some of the context used already.

    Args:
        n_prompt: tokens read at once; 0 if this times generation.
        n_gen: tokens generated one after the other; 0 if this times a prompt.
        n_depth: tokens in the cache before the clock starts.
    """

    n_prompt: int
    n_gen: int
    n_depth: int = 0

    def __post_init__(self) -> None:
        if (self.n_prompt > 0) == (self.n_gen > 0) or min(self.n_prompt, self.n_gen) < 0:
            raise UsageError(
                f"a scenario reads a prompt or generates, got n_prompt {self.n_prompt} "
                f"and n_gen {self.n_gen}; make exactly one of them positive"
            )

    @property
    def tokens(self) -> int:
        """Tokens that the clock covers."""
        return self.n_prompt + self.n_gen

    @property
    def context(self) -> int:
        """Tokens the cache must hold."""
        return self.n_depth + self.tokens

    def __str__(self) -> str:
        name = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return name + (f" @ d{self.n_depth}" if self.n_depth else "")


@dataclass(frozen=True)
class Measurement:
    """Raw times of one scenario.

    Args:
        scenario: what was timed.
        threads: threads it ran on.
        samples_ns: nanoseconds of each repeat, in order.
        warmup_ns: nanoseconds of the untimed first run.
        bytes_per_token: bytes that must be read for one generated token (weights, and the cache
            half-way through), None for a prompt, which reads them for many tokens at once.
        peak_rss_bytes: most memory the process held while running, None if unknown.
        contention: what else used the processor during the repeats; None if not watched.
    """

    scenario: Scenario
    threads: int
    samples_ns: tuple[int, ...]
    warmup_ns: int
    bytes_per_token: int | None
    peak_rss_bytes: int | None
    contention: Contention | None = None

    @property
    def samples_ts(self) -> tuple[float, ...]:
        """Tokens per second of each repeat."""
        return tuple(self.scenario.tokens * 1e9 / ns for ns in self.samples_ns)

    @property
    def avg_ts(self) -> float:
        """Mean tokens per second."""
        return statistics.fmean(self.samples_ts)

    @property
    def stddev_ts(self) -> float:
        """Sample standard deviation of tokens per second; 0 for one repeat."""
        return statistics.stdev(self.samples_ts) if len(self.samples_ns) > 1 else 0.0

    @property
    def gb_per_s(self) -> float | None:
        """Mean 1e9 bytes read per second of generation, None for a prompt."""
        return None if self.bytes_per_token is None else self.avg_ts * self.bytes_per_token / 1e9


def measure(
    engine: Engine,
    model: Model,
    scenario: Scenario,
    *,
    repeats: int,
    threads: int,
    kv_bits: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> Measurement:
    """Time a scenario.

    Args:
        engine: runs it; its context must hold the scenario.
        model: what the engine runs.
        scenario: what to time.
        repeats: how many samples to take.
        threads: threads the engine runs on.
        kv_bits: bits of its cache.
        seed: of the random tokens that are read.
        progress: called after every repeat.

    Raises:
        UsageError: the context is too short, or no repeats were asked for.
    """
    if repeats < 1:
        raise UsageError(f"repeats is {repeats}; must be at least 1")
    if scenario.context > engine.context:
        raise UsageError(
            f"{scenario} needs a context of {scenario.context} tokens and this one has "
            f"{engine.context}; make the engine with a larger one"
        )
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, model.config.vocab, scenario.n_depth + max(scenario.n_prompt, 1))
    before, after = tokens[: scenario.n_depth], tokens[scenario.n_depth :]

    def once() -> int:
        engine.truncate(scenario.n_depth)
        start = time.perf_counter_ns()
        if scenario.n_prompt:
            engine.forward(after)
        else:
            engine.greedy(int(after[0]), scenario.n_gen)
        return time.perf_counter_ns() - start

    reset_peak_rss()
    engine.reset()
    if scenario.n_depth:
        engine.forward(before)
    warmup = once()
    samples = []
    watch = Watch()
    for done in range(repeats):
        samples.append(once())
        if progress:
            progress(str(scenario), done + 1, repeats)
    contention = watch.stop()
    return Measurement(
        scenario,
        threads,
        tuple(samples),
        warmup,
        bytes_read_per_token(model, scenario.n_depth + scenario.n_gen // 2, kv_bits)
        if scenario.n_gen
        else None,
        peak_rss_bytes(),
        contention,
    )


def bytes_read_per_token(model: Model, cached: int, kv_bits: int) -> int:
    """Bytes that generating one token has to read.

    Every weight once, but of an embedding that is not the head too only one row; and the keys
    and values of ``cached`` tokens, or of a layer's window.
    """
    weights = facts_of(model, "the model").read_bytes
    return weights + cache_read_bytes(model.config, cached, kv_bits)


def read_bandwidth(threads: int) -> float:
    """Bytes per second / 1e9 that this machine reads from memory with so many threads."""
    from edgeq.runtime.kernels import read_bandwidth as measured

    return measured(threads)
