"""Tokens per second of one workload on this machine, with memory, traffic and disturbances.

The workload is run once to warm up (pages are touched, code is compiled) and then timed; the time
of every repeat is kept, averages are computed when asked for. What cannot be measured here is
None, never 0.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgeq.core.errors import UsageError
from edgeq.core.memory import peak_rss_bytes, reset_peak_rss
from edgeq.core.progress import Progress
from edgeq.devices.contention import Contention, Watch
from edgeq.profiling.candidates import EngineCandidate, bytes_read_per_token
from edgeq.profiling.session import Workload, run

if TYPE_CHECKING:
    from edgeq.runtime.engine import Engine


@dataclass(frozen=True)
class Measurement:
    """Raw times of one workload, which either reads a prompt or generates.

    Args:
        workload: what was timed.
        threads: number of threads it ran on.
        samples_ns: nanoseconds of each repeat, in order.
        warmup_ns: nanoseconds of the untimed first run.
        bytes_per_token: bytes that must be read for one generated token (weights, and the cache
            half-way through), None for a prompt, which reads them for many tokens at once.
        peak_rss_bytes: most memory the process held while running, None if unknown.
        contention: what else used the processor during the repeats; None if not watched.
    """

    workload: Workload
    threads: int
    samples_ns: tuple[int, ...]
    warmup_ns: int
    bytes_per_token: int | None
    peak_rss_bytes: int | None
    contention: Contention | None = None

    @property
    def samples_ts(self) -> tuple[float, ...]:
        """Tokens per second of each repeat."""
        return tuple(self.workload.tokens * 1e9 / ns for ns in self.samples_ns)

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


def measure(engine: Engine, workload: Workload, *, progress: Progress | None = None) -> Measurement:
    """Time one workload. Tokens are generated in one call of the engine's compiled loop.

    Args:
        engine: runs it; its context must hold the workload.
        workload: what to time; exactly one of n_prompt and n_gen is positive.
        progress: called with the workload's label after every repeat.

    Raises:
        UsageError: the context is too short, or the workload both reads and generates.
    """
    if (workload.n_prompt > 0) == (workload.n_gen > 0):
        raise UsageError(
            f"a measurement reads a prompt or generates, got n_prompt {workload.n_prompt} "
            f"and n_gen {workload.n_gen}; make exactly one of them positive"
        )
    if workload.positions > engine.context:
        raise UsageError(
            f"{workload.label} needs a context of {workload.positions} tokens and this one has "
            f"{engine.context}; make the engine with a larger one"
        )
    candidate = EngineCandidate(engine, engine.model, "")

    def timed(repeats: int, report: Progress | None) -> list[int]:
        once = replace(workload, warmup=0, repeats=repeats)
        (rounds,) = run([candidate], once, report, in_one_call=True)
        return [one.end_ns - one.start_ns for one in rounds]

    def labeled(_: str, done: int, total: int) -> None:
        if progress:
            progress(workload.label, done, total)

    reset_peak_rss()
    engine.reset()
    (warmup,) = timed(1, None)
    watch = Watch()
    samples = timed(workload.repeats, labeled)
    contention = watch.stop()
    cached = workload.n_depth + workload.n_gen // 2
    traffic = bytes_read_per_token(engine.model, cached, engine.kv_bits)
    return Measurement(
        workload,
        engine.threads,
        tuple(samples),
        warmup,
        traffic if workload.n_gen else None,
        peak_rss_bytes(),
        contention,
    )


def read_bandwidth(threads: int) -> float:
    """Bytes per second / 1e9 that this machine reads from memory with so many threads."""
    from edgeq.runtime.kernels import read_bandwidth as measured

    return measured(threads)
