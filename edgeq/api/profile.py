"""Where time, memory and energy go, and reports of saved profiles and sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgeq.core.errors import UsageError
from edgeq.core.progress import Progress
from edgeq.devices.meters import from_option, probe
from edgeq.devices.profile import DeviceProfile, find
from edgeq.devices.transport import open_transport
from edgeq.model.kv_bits import KvBits
from edgeq.profiling.document import Document
from edgeq.profiling.foreign import Named
from edgeq.profiling.profile import profile as profile_here
from edgeq.profiling.remote import profile_on
from edgeq.profiling.session import Workload
from edgeq.reporting import Sources, read, write


def profile(
    models: str | Path | Sequence[str | Path],
    workload: Workload | None = None,
    *,
    threads: int | None = None,
    kv_bits: KvBits = 8,
    backend: str = "numba",
    meters: Sequence[str] = (),
    idle_seconds: float = 0.0,
    operations: bool = True,
    estimate: DeviceProfile | str | None = None,
    on: str | None = None,
    on_python: str | None = None,
    progress: Progress | None = None,
) -> Document:
    """Time models, and record memory, clock, temperature and power meanwhile.

    Args:
        models: the path of a model, or several, which run in alternation: an .edgeq file, a
            checkpoint, an .onnx, .ort or .tflite file, or a file that edgeq converted.
            ``TARGET:PATH`` names the runtime, such as ``gguf:model.gguf`` for llama.cpp.
        workload: prompt length, number of tokens, and rounds; the defaults of `Workload` if None.
        threads, kv_bits, backend: as `Engine` takes them.
        meters: power meters besides those that are found, such as ``serial:/dev/ttyACM0``.
        idle_seconds: measure idle power for so long first, and subtract it.
        operations: also time every operation, after the timed rounds.
        estimate: a device or its name: also estimate energy from its power under load.
        on: another machine: ``ssh://user@host[:port]`` or ``adb://serial``.
        on_python: the Python to use there.
        progress: called with what is done.

    Returns:
        All raw samples; `edgeq.profiling.summary.summary` derives the figures from them.

    Raises:
        EdgeqError: a model cannot be opened or run.

    Example:
        >>> document = edgeq.profile(
        ...     "model.edgeq", edgeq.Workload(n_prompt=4, n_gen=4, repeats=2), threads=1
        ... )
        >>> [len(timed.step_ns) for timed in document.runs[0].timed]
        [4, 4]
    """
    several = [models] if isinstance(models, str | Path) else list(models)
    if not several:
        raise UsageError("there is no model to profile; give the path of one")
    named = [Named.parse(str(path)) for path in several]
    workload = Workload() if workload is None else workload
    if on is not None:
        name = estimate.name if isinstance(estimate, DeviceProfile) else estimate
        return profile_on(
            open_transport(on), named, workload, python=on_python, threads=threads,
            kv_bits=kv_bits, backend=backend, meters=tuple(meters), idle_seconds=idle_seconds,
            operations=operations, estimate=name, progress=progress,
        )  # fmt: skip
    if on_python is not None:
        raise UsageError("on_python names the Python of another machine; also give on")
    device = find(estimate) if isinstance(estimate, str) else estimate
    recorded = [*(from_option(text) for text in meters), *probe()]
    return profile_here(
        named, workload, threads=threads, kv_bits=kv_bits, backend=backend, meters=recorded,
        idle_seconds=idle_seconds, operations=operations, estimate=device, progress=progress,
    )  # fmt: skip


def report(
    sources: str | Path | Document | Sequence[str | Path | Document],
    out: str | Path,
    *,
    title: str = "edgeq report",
) -> Path:
    """Write an HTML report of profiles and sweeps, which needs no network.

    Args:
        sources: profiles, and paths of saved profiles, results of a sweep, or a sweep's folder.
        out: the .html file to write or replace.
        title: of the report.

    Returns:
        The path of the report.

    Raises:
        FormatError: a file is not a profile or a result of a sweep.
        UsageError: ``out`` does not end in .html.
        EdgeqError: there is nothing to show, or the file cannot be written.

    Example:
        >>> workload = edgeq.Workload(n_prompt=4, n_gen=4, repeats=1)
        >>> document = edgeq.profile("model.edgeq", workload, threads=1, operations=False)
        >>> edgeq.report(document, "report.html").stat().st_size > 1000
        True
    """
    path = Path(out)
    if path.suffix.lower() != ".html":
        raise UsageError(f"the report is {path}; its name must end in .html")
    given = [sources] if isinstance(sources, str | Path | Document) else list(sources)
    saved = read([one for one in given if not isinstance(one, Document)])
    documents = [one for one in given if isinstance(one, Document)]
    named = tuple((f"profile {i}", one) for i, one in enumerate(documents, 1))
    write(Sources((*named, *saved.documents), saved.rows), path, title)
    return path
