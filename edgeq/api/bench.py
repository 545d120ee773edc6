"""Tokens per second of decoders as llama-bench measures them, inferences per second of graphs."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgeq._version import __version__
from edgeq.core.cpu import this_cpu
from edgeq.core.errors import UsageError
from edgeq.core.progress import Progress
from edgeq.core.units import human_count
from edgeq.devices.contention import Watch
from edgeq.devices.model_header import facts_of
from edgeq.devices.planner import plan
from edgeq.devices.profile import DeviceProfile
from edgeq.devices.roofline import Speed, sustained
from edgeq.importers import load
from edgeq.model.kv_bits import KvBits
from edgeq.model.model import Model
from edgeq.profiling import Measurement, Workload, measure, read_bandwidth
from edgeq.profiling.foreign import Named, open_candidate
from edgeq.profiling.limits import bandwidth_doubt
from edgeq.profiling.session import run

_CACHE_TYPES = {4: "q4_0", 8: "q8_0", 16: "f16"}
"""Bits of the KV cache -> what llama-bench calls a cache of that size."""
GRAPH_RUNS = 10
"""Inferences of a graph in each turn."""


def bench(
    model: Model | str | Path,
    *,
    n_prompt: Sequence[int] = (512,),
    n_gen: Sequence[int] = (128,),
    n_depth: Sequence[int] = (0,),
    threads: Sequence[int] | None = None,
    repetitions: int = 5,
    kv_bits: KvBits = 8,
    backend: str = "numba",
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Measure how fast a decoder runs on this machine.

    Every test runs once to warm up and is then timed.

    Args:
        model: a model or the path of one.
        n_prompt: prompt lengths to process at once, in tokens.
        n_gen: numbers of tokens to generate.
        n_depth: numbers of tokens already in the KV cache when a test starts.
        threads: numbers of threads to test; all cores if None.
        repetitions: timed repeats of each test.
        kv_bits, backend: of the engine.
        progress: called after every repeat.

    Returns:
        A record for each test with llama-bench's fields: "test" is its name, "avg_ts" the tokens
        per second; "gb_per_s" is the memory traffic of generation, None for prompts.

    Raises:
        UsageError: there is nothing to time, or a number is out of range.

    Example:
        >>> (row,) = edgeq.bench("model.edgeq", n_prompt=[8], n_gen=[], threads=[1], repetitions=2)
        >>> row["test"], len(row["samples_ns"]), row["avg_ts"] > 0
        ('pp8', 2, True)
    """
    opened = model if isinstance(model, Model) else load(model)
    name = "the model" if isinstance(model, Model) else str(model)
    workloads = bench_workloads(n_prompt, n_gen, n_depth, repetitions)
    return list(
        bench_rows(
            opened, name, workloads, threads=threads, kv_bits=kv_bits, backend=backend,
            progress=progress,
        )
    )  # fmt: skip


def bench_workloads(
    n_prompt: Sequence[int], n_gen: Sequence[int], n_depth: Sequence[int], repetitions: int
) -> list[Workload]:
    """A workload for each prompt length and each number of tokens, at each depth.

    Raises:
        UsageError: there is none.
    """
    workloads = [
        workload
        for depth in n_depth
        for workload in (
            *(Workload(n, 0, depth, repeats=repetitions) for n in n_prompt if n),
            *(Workload(0, n, depth, repeats=repetitions) for n in n_gen if n),
        )
    ]
    if not workloads:
        raise UsageError("there is nothing to time: n_prompt and n_gen hold no positive number")
    return workloads


def bench_rows(
    model: Model,
    name: str,
    workloads: Sequence[Workload],
    *,
    threads: Sequence[int] | None = None,
    kv_bits: KvBits = 8,
    backend: str = "numba",
    profile_for: Callable[[int], DeviceProfile] | None = None,
    progress: Progress | None = None,
) -> Iterator[dict[str, Any]]:
    """The records of `bench`, each as soon as all tests on its number of threads are done.

    Args:
        model: what to run.
        name: what the records call it.
        workloads: of `bench_workloads`.
        threads, kv_bits, backend, progress: as `bench` takes them.
        profile_for: gives this machine's profile for a number of threads, to compare with a plan.
    """
    from edgeq.runtime.engine import Engine

    context = max(workload.positions for workload in workloads)
    if context > model.config.context:
        # a context longer than the model was trained for takes the same time
        model = replace(model, config=replace(model.config, context=context))
    for count in threads or (None,):
        with Engine(
            model, context=context, threads=count, kv_bits=kv_bits, backend=backend
        ) as engine:
            measured = [measure(engine, workload, progress=progress) for workload in workloads]
            used = engine.threads
        del engine  # or its cache would be in memory together with the next one's
        # measured last: its buffer is larger than many a model and would be the peak of memory
        watch = Watch()
        bandwidth = read_bandwidth(used)
        disturbances = watch.stop().reasons(used)
        longest = 0
        for measurement in measured:
            # what an earlier and longer test touched stays in memory
            longest = max(longest, measurement.workload.positions)
            row = _record(model, name, measurement, kv_bits, backend, bandwidth, disturbances)
            if profile_for is not None:
                row |= _planned(model, measurement, kv_bits, longest, profile_for(used))
            yield row


def bench_graphs(
    models: Sequence[str | Path],
    *,
    threads: int | None = None,
    repetitions: int = 5,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Time graphs in alternation, each in its own runtime.

    Args:
        models: .onnx, .ort or .tflite files; speedups are relative to the last of several.
        threads: of the runtimes; all cores if None.
        repetitions: timed turns of each, of `GRAPH_RUNS` inferences.
        progress: called after every turn.

    Returns:
        A record for each graph: "ms_p50" and "ms_p90" are milliseconds of an inference,
        "samples_ms" all of them, "speedup" is None for a single graph.

    Raises:
        UsageError: a Core ML package, which edgeq executes with NumPy.
        EdgeqError: a runtime refuses a file, or is not installed.

    Example:
        >>> (row,) = edgeq.bench_graphs(["graph.onnx"], threads=1, repetitions=1)
        >>> len(row["samples_ms"]), row["speedup"]
        (10, None)
    """
    for model in models:
        if Path(model).suffix.lower() == ".mlpackage":
            raise UsageError(
                f"{model} cannot be timed: edgeq runs Core ML programs with NumPy, whose times say "
                "nothing about a device; `edgeq validate` checks it, Xcode measures it on a device"
            )
    workload = Workload(0, GRAPH_RUNS, 0, 1, repetitions)
    candidates = [open_candidate(Named.parse(str(model)), threads) for model in models]
    try:
        watch = Watch()
        rounds = run(candidates, workload, progress)
        warning = watch.stop().warning(threads)
    finally:
        for candidate in candidates:
            candidate.close()
    rows: list[dict[str, Any]] = []
    for model, candidate, taken in zip(models, candidates, rounds, strict=True):
        about = candidate.facts(workload)
        times = [ns / 1e6 for one in taken if one.round >= 0 for ns in one.step_ns]
        tenths = statistics.quantiles(times, n=10) if len(times) > 1 else times * 9
        rows.append(
            {
                "model": str(model),
                "runtime": about["runtime"],
                "threads": about["threads"],
                "nbytes": about["weights_bytes"],
                "ms_p50": statistics.median(times),
                "ms_p90": tenths[8],
                "samples_ms": times,
                "warning": warning,
            }
        )
    for row in rows:
        row["speedup"] = rows[-1]["ms_p50"] / row["ms_p50"] if len(rows) > 1 else None
    return rows


def _planned(
    model: Model, m: Measurement, kv_bits: KvBits, context: int, profile: DeviceProfile
) -> dict[str, Any]:
    """The speed and memory that a plan for this machine predicts, and the errors in percent."""
    facts, workload = facts_of(model, "the model"), m.workload
    planned = plan(facts, profile, context=context, kv_bits=kv_bits, threads=m.threads, text=False)
    speed = Speed(facts, sustained(profile, m.threads), kv_bits)
    if workload.n_gen:
        seconds = speed.decode_seconds(workload.n_depth + workload.n_gen // 2)
    else:
        seconds = speed.prefill_seconds(workload.n_prompt, workload.n_depth)
        seconds = seconds and seconds / workload.n_prompt
    rate = 1 / seconds if seconds else None
    return {
        "plan_ts": rate,
        "plan_ts_error_percent": _error(rate, m.avg_ts),
        "plan_rss_bytes": planned.total_bytes,
        "plan_rss_error_percent": _error(planned.total_bytes, m.peak_rss_bytes),
    }


def _error(predicted: float | None, measured: float | None) -> float | None:
    return None if predicted is None or not measured else 100 * (predicted / measured - 1)


def _record(
    model: Model,
    name: str,
    m: Measurement,
    kv_bits: int,
    backend: str,
    bandwidth: float,
    disturbances: Sequence[str],
) -> dict[str, Any]:
    """A flat record: the fields of llama-bench under its names, then those of edgeq."""
    kv_type = _CACHE_TYPES[kv_bits]
    gb_per_s = m.gb_per_s
    share = None if gb_per_s is None or not bandwidth else 100 * gb_per_s / bandwidth
    return {
        "build_number": __version__,
        "cpu_info": this_cpu().name,
        "backends": backend,
        "model_filename": name,
        "model_type": _model_type(model),
        "model_size": model.nbytes,
        "model_n_params": sum(math.prod(t.shape) for t in model.tensors.values()),
        "n_threads": m.threads,
        "type_k": kv_type,
        "type_v": kv_type,
        "n_prompt": m.workload.n_prompt,
        "n_gen": m.workload.n_gen,
        "n_depth": m.workload.n_depth,
        "test_time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "avg_ns": round(sum(m.samples_ns) / len(m.samples_ns)),
        "stddev_ns": round(statistics.stdev(m.samples_ns) if len(m.samples_ns) > 1 else 0.0),
        "avg_ts": m.avg_ts,
        "stddev_ts": m.stddev_ts,
        "samples_ns": list(m.samples_ns),
        "samples_ts": list(m.samples_ts),
        "test": m.workload.label,
        "warmup_ns": m.warmup_ns,
        "bytes_per_token": m.bytes_per_token,
        "gb_per_s": gb_per_s,
        "read_bandwidth_gb_per_s": bandwidth,
        "bandwidth_percent": share,
        "peak_rss_bytes": m.peak_rss_bytes,
        "other_cores": m.contention and m.contention.other_cores,
        "warning": m.contention and m.contention.warning(m.threads),
        "suspect": bandwidth_doubt(share, m.bytes_per_token, disturbances),
        "python": platform.python_version(),
    }


def _model_type(model: Model) -> str:
    """The model's type as llama-bench writes it: family, size, and the scheme of most weights."""
    facts = facts_of(model, "the model")
    return f"{model.config.family} {human_count(facts.n_params)} {facts.scheme}"
