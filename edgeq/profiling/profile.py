"""Profile models: open them, let them alternate while the meters record, collect the results."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from edgeq.core.memory import peak_rss_bytes, reset_peak_rss
from edgeq.core.progress import Progress
from edgeq.devices.contention import Watch
from edgeq.devices.meters import Absent, Meter, probe
from edgeq.devices.profile import DeviceProfile
from edgeq.devices.recorder import Recorder
from edgeq.model.kv_bits import KvBits
from edgeq.profiling import foreign
from edgeq.profiling.candidates import EngineCandidate
from edgeq.profiling.document import IDLE, Document, Run, environment
from edgeq.profiling.foreign import Named
from edgeq.profiling.operations import Operations, engine_operations
from edgeq.profiling.session import Candidate, Workload, run
from edgeq.profiling.summary import summary


def profile(
    models: Sequence[Named],
    workload: Workload,
    *,
    threads: int | None = None,
    kv_bits: KvBits = 8,
    backend: str = "numba",
    meters: Iterable[Meter | Absent] | None = None,
    idle_seconds: float = 0.0,
    operations: bool = True,
    estimate: DeviceProfile | None = None,
    progress: Progress | None = None,
) -> Document:
    """Time models in turns, and record memory, clock, temperature and power meanwhile.

    Loading is not measured. Operations are timed afterwards, outside the recording.

    Args:
        models: what to profile; in one run, round by round, if they are several.
        workload: what each does.
        threads: of each; all cores if None.
        kv_bits, backend: of our engine.
        meters: what to record; what can be read on this machine if None.
        idle_seconds: how long to record before anything runs, to subtract idle power.
        operations: time every step too.
        estimate: add energy by this device's power under load, labeled as an estimate.
        progress: called with what is done.

    Raises:
        EdgeqError: a model cannot be opened or run.
    """
    recorder = Recorder(probe() if meters is None else meters)
    with ExitStack() as stack:
        candidates: list[Candidate | None] = []
        for named in models:
            opened = _open(named, workload, threads, kv_bits, backend)
            candidates.append(opened)
            if opened is not None:
                stack.callback(opened.close)
        open_candidates = [c for c in candidates if c is not None]
        facts = [_facts(named, s, workload) for named, s in zip(models, candidates, strict=True)]
        reset_peak_rss()
        with recorder:
            _rest(recorder, idle_seconds, progress)
            watch = Watch()
            samples = iter(run(open_candidates, workload, progress) if open_candidates else [])
            contention = watch.stop()
        peak = peak_rss_bytes() if len(open_candidates) == 1 else None
        runs = []
        for i, (named, candidate) in enumerate(zip(models, candidates, strict=True)):
            operation_times: Operations | None = None
            if operations:
                if progress:
                    progress("operations", i, len(models))
                operation_times = (
                    engine_operations(candidate, workload)
                    if isinstance(candidate, EngineCandidate)
                    else foreign.operations(named, candidate, workload, threads)
                )
            taken = () if candidate is None else tuple(next(samples))
            runs.append(Run(facts[i], taken, operation_times, None if candidate is None else peak))
    # only now: their buffers are larger than many a model
    compiled = [f["threads"] for f in facts if f.get("kernel")]
    machine = environment(compiled) | {"contention": contention.to_json()}
    document = Document(workload, tuple(runs), machine, recorder.recording)
    if estimate is None:
        return document
    return replace(document, runs=tuple(_estimated(document, r, estimate) for r in runs))


def _open(
    named: Named, workload: Workload, threads: int | None, kv_bits: KvBits, backend: str
) -> Candidate | None:
    if named.target == "coreml":
        return None
    if named.target is not None:
        return foreign.open_candidate(named, threads)
    from edgeq.importers import load
    from edgeq.runtime.engine import Engine

    model = load(named.path)
    if workload.context > model.config.context:
        # time past what the model was made for tells nothing of its answers, but is the same time
        model = replace(model, config=replace(model.config, context=workload.context))
    engine = Engine(
        model, context=workload.context, threads=threads, kv_bits=kv_bits, backend=backend
    )
    return EngineCandidate(engine, model, str(named.path))


def _facts(named: Named, candidate: Candidate | None, workload: Workload) -> dict[str, Any]:
    if candidate is not None:
        return candidate.facts(workload)
    return {
        "name": str(named.path),
        "runtime": None,
        "unit": "run",
        "weights_bytes": foreign.nbytes(named.path),
    }


def _rest(recorder: Recorder, seconds: float, progress: Progress | None) -> None:
    """Record the idle machine."""
    if seconds <= 0:
        return
    with recorder.window(IDLE):
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if progress:
                progress("idle", int(seconds - left), int(seconds))
            time.sleep(min(left, 1.0))


def _estimated(document: Document, run: Run, device: DeviceProfile) -> Run:
    """Joules per token, or run of a graph, if the device drew its power under load all the time."""
    figures, unit = summary(document, run), run.subject.get("unit", "token")
    rate = figures["runs_per_s" if unit == "run" else "decode_tokens_per_s"]
    watts = device.load_watts
    joules = None if watts is None or rate is None else watts / rate["mean"]
    reason = f"the profile {device.name} has no load_watts" if watts is None else None
    if rate is None and reason is None:
        reason = "nothing was run" if unit == "run" else "no token was generated"
    about = {
        "label": "estimate, not measured",
        "method": f"the device's power under load times the seconds per {unit} measured here",
        "unit": unit,
        "device": device.name,
        "load_watts": watts,
        "source": device.sources.get("load_watts"),
        "decode_joules_per_token": joules,
        "reason": reason,
    }
    return replace(run, estimate=about)
