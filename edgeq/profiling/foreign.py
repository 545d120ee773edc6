"""Models of another runtime as subjects, and their operations from that runtime's own profiler."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.converters.runners import DecoderRunner
from edgeq.converters.target import NodeTime, OperatorCounts, ProfilerTarget, TimedGraph
from edgeq.converters.targets import TARGETS, known_target_of, target_named
from edgeq.core.cpu import available_cores
from edgeq.core.errors import FormatError
from edgeq.profiling.candidates import GraphCandidate, RunnerCandidate
from edgeq.profiling.operations import Operation, Operations, Phase
from edgeq.profiling.session import Candidate, Workload, random_tokens

_OURS = (".gguf",)
"""What a converter makes but our engine runs too; named as ``gguf:FILE`` llama.cpp runs it."""
_LAYER = re.compile(r"(?:layers?|blk|block|h)[._/](\d+)[._/]")


@dataclass(frozen=True)
class Named:
    """What a user asked to be profiled.

    Args:
        path: of the model.
        target: name of the target whose runtime executes it; None for edgeq's engine.
    """

    path: Path
    target: str | None

    @classmethod
    def parse(cls, text: str) -> Named:
        """Parse ``PATH``, or ``TARGET:PATH``, which names the runtime."""
        kind, _, rest = text.partition(":")
        if rest and kind in TARGETS:
            return cls(Path(rest), kind)
        path = Path(text)
        if path.suffix in _OURS:
            return cls(path, None)
        return cls(path, known_target_of(path))  # of no target: a checkpoint, or nothing at all


def open_candidate(named: Named, threads: int | None) -> Candidate:
    """The model in its runtime: a decoder that edgeq converted, or any ONNX or LiteRT graph.

    Raises:
        EdgeqError: the runtime refuses it, or is not installed.
    """
    about: dict[str, Any] = {
        "name": str(named.path),
        "backend": named.target,
        "threads": threads or available_cores(),
        "weights_bytes": nbytes(named.path),
    }
    decoder, profiler = target_named(str(named.target)).decoder_target(), _profiler(named)
    if profiler is not None and not decoder.wrote(named.path):
        graph = profiler.open_graph(named.path, threads=threads)
        if graph is not None:
            about["runtime"] = graph.runtime
            return GraphCandidate(graph.run, about, graph.close)
    runner = decoder.open_runner(named.path, threads=threads)
    vocab = int(runner.forward(np.zeros(1, np.int64)).shape[-1])
    runner.reset()
    about |= {"runtime": runner.runtime, "precision": runner.precision}
    if runner.config is not None:
        about |= {"family": runner.config.family, "layers": runner.config.layers}
    return RunnerCandidate(runner, vocab, about)


def operations(
    named: Named, candidate: Candidate | None, workload: Workload, threads: int | None
) -> Operations:
    """What the runtime's own profiler says of a model's operations, or how many there are.

    Args:
        named: the model.
        candidate: as `open_candidate` gave it, for its unit and its vocabulary; None if it was only
            to be counted.
        workload: what is run; prefill and decode are profiled once each.
        threads: of the runtime.
    """
    profiler = _profiler(named)
    counts = profiler.count_operators(named.path) if profiler else None
    if counts is not None:
        return _counted(counts)
    if profiler is None or candidate is None:
        return Operations(
            str(named.target), (), f"edgeq reads no profiler of the target {named.target}"
        )
    return _timed(profiler, named, candidate, workload, threads)


def _timed(
    profiler: ProfilerTarget,
    named: Named,
    candidate: Candidate,
    workload: Workload,
    threads: int | None,
) -> Operations:
    source = f"{profiler.name}'s profiler, in a session of its own"

    def timed(
        work: Callable[[Any], object], skip: int, *, decoder: bool = True
    ) -> tuple[list[NodeTime], int, int]:
        return profiler.time_nodes(named.path, work, decoder=decoder, skip=skip, threads=threads)

    if candidate.unit == "run":

        def again(graph: TimedGraph) -> None:
            for _ in range(1 + workload.n_gen):
                graph.run()

        times = timed(again, 1, decoder=False)
        return Operations(source, (_phase("run", times, times[1]),))
    tokens = random_tokens(candidate, workload)

    def decode(runner: DecoderRunner) -> None:
        if len(tokens) > 1:
            runner.forward(tokens[:-1])
        for token in [int(tokens[-1])] * (1 + workload.n_gen):  # the first is not counted
            runner.forward(np.array([token], np.int64))

    def prefill(runner: DecoderRunner) -> None:
        for _ in range(2):  # the first is not counted
            runner.reset()
            if workload.n_depth:
                runner.forward(tokens[: workload.n_depth])
            runner.forward(tokens[workload.n_depth :])

    phases = []
    if workload.n_prompt:
        skip = 3 if workload.n_depth else 1  # all passes but the last
        phases.append(_phase("prefill", timed(prefill, skip), workload.n_prompt))
    if workload.n_gen:
        skip = 2 if len(tokens) > 1 else 1
        phases.append(_phase("decode", timed(decode, skip), workload.n_gen))
    return Operations(source, tuple(phases))


def _profiler(named: Named) -> ProfilerTarget | None:
    target = target_named(str(named.target))
    return target.profiler() if target.profiler else None


def nbytes(path: Path) -> int:
    """Bytes of a file or of all files of a folder, and of an ONNX file's external data.

    Raises:
        FormatError: there is no such file.
    """
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if not path.exists():
        raise FormatError(f"{path} does not exist")
    beside = path.with_name(path.name + ".data")
    return path.stat().st_size + (beside.stat().st_size if beside.is_file() else 0)


def _phase(name: str, times: tuple[list[NodeTime], int, int], units: int) -> Phase:
    nodes, runs, wall_ns = times
    rows = [Operation(_layer(n.name), n.op, n.name, n.calls, (n.ns,)) for n in nodes]
    return Phase(name, units, tuple(rows), (wall_ns,) if runs else ())


def _counted(counts: OperatorCounts) -> Operations:
    rows = tuple(Operation(None, op, "", n, None) for op, n in sorted(counts.counts.items()))
    return Operations(counts.source, (Phase("run", 1, rows),), counts.reason)


def _layer(name: str) -> int | None:
    match = _LAYER.search(name)
    return int(match[1]) if match else None
