"""Models of another runtime as subjects, and their operations from that runtime's own profiler."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.converters import TARGETS, Runner, target_module, target_of
from edgeq.converters.coreml.exec import describe
from edgeq.converters.ort.profile import NodeTime, OrtGraph, node_times
from edgeq.converters.ort.run import OrtRunner
from edgeq.converters.ort.target import graph_of
from edgeq.converters.tflite.profile import NO_PROFILER, TfliteGraph, operators
from edgeq.core.cpu import available_cores
from edgeq.core.errors import FormatError
from edgeq.model.config import ModelConfig
from edgeq.profiling.candidates import GraphCandidate, RunnerCandidate
from edgeq.profiling.operations import Operation, Operations, Phase
from edgeq.profiling.session import Candidate, Workload, random_tokens

COUNTED = (
    "Core ML programs are executed here by NumPy, which says nothing of a device's times; "
    "operations are only counted"
)
_OURS = (".gguf",)
"""What a converter makes but our engine runs too; named as ``gguf:FILE`` llama.cpp runs it."""
_LAYER = re.compile(r"(?:layers?|blk|block|h)[._/](\d+)[._/]")


@dataclass(frozen=True)
class Named:
    """What a user asked to be profiled.

    Args:
        path: of the model.
        target: the converter that knows its runtime; None for our engine.
    """

    path: Path
    target: str | None

    @classmethod
    def parse(cls, text: str) -> Named:
        """From ``PATH``, or ``TARGET:PATH`` to say which runtime."""
        kind, _, rest = text.partition(":")
        if rest and kind in TARGETS:
            return cls(Path(rest), kind)
        path = Path(text)
        if path.suffix in _OURS:
            return cls(path, None)
        try:
            return cls(path, target_of(path))
        except FormatError:  # of no target: a checkpoint, or the importers say what is wrong
            return cls(path, None)


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
    try:
        runner = _open_decoder(named, threads)
    except FormatError:
        if named.target == "ort":
            onnx_graph = OrtGraph(graph_of(named.path), threads=threads)
            about["runtime"] = onnx_graph.runtime
            return GraphCandidate(onnx_graph.run, about, onnx_graph.close)
        if named.target == "tflite":
            graph = TfliteGraph(named.path, threads=threads)
            about["runtime"] = graph.runtime
            return GraphCandidate(graph.run, about, graph.close)
        raise
    vocab = int(runner.forward(np.zeros(1, np.int64)).shape[-1])
    runner.reset()
    about |= {"runtime": runner.runtime, "precision": runner.precision}
    config = getattr(runner, "config", None)
    if isinstance(config, ModelConfig):
        about |= {"family": config.family, "layers": config.layers}
    return RunnerCandidate(runner, vocab, about)


def operations(
    named: Named, subject: Candidate | None, workload: Workload, threads: int | None
) -> Operations:
    """What the runtime's own profiler says of a model's operations, or how many there are.

    Args:
        named: the model.
        subject: as `open_candidate` gave it, for its unit and its vocabulary; None if it was only
            to be counted.
        workload: what is run; prefill and decode are profiled once each.
        threads: of the runtime.
    """
    path = named.path
    if named.target == "coreml":
        about = describe(path)
        function = about.functions[next(iter(about.functions))]
        return _counted("the file's program", dict(function.ops), COUNTED)
    if named.target == "tflite":
        return _counted("the file's graphs", operators(path), NO_PROFILER)
    if named.target != "ort" or subject is None:
        return Operations(
            str(named.target), (), f"edgeq reads no profiler of the target {named.target}"
        )
    file, source = graph_of(path), "onnxruntime's profiler, in a session of its own"
    if subject.unit == "run":

        def again(graph: OrtGraph) -> None:
            for _ in range(1 + workload.n_gen):
                graph.run()

        times = node_times(lambda to: OrtGraph(file, threads=threads, profile=to), again, 1)
        return Operations(source, (_phase("run", times, times[1]),))
    tokens = random_tokens(subject, workload)

    def decode(runner: OrtRunner) -> None:
        if len(tokens) > 1:
            runner.forward(tokens[:-1])
        for token in [int(tokens[-1])] * (1 + workload.n_gen):  # the first is not counted
            runner.forward(np.array([token], np.int64))

    def prefill(runner: OrtRunner) -> None:
        for _ in range(2):  # the first is not counted
            runner.reset()
            if workload.n_depth:
                runner.forward(tokens[: workload.n_depth])
            runner.forward(tokens[workload.n_depth :])

    def open_it(to: Path) -> OrtRunner:
        return OrtRunner(file, threads=threads, profile=to)

    phases = []
    if workload.n_prompt:
        skip = 3 if workload.n_depth else 1  # all passes but the last
        phases.append(_phase("prefill", node_times(open_it, prefill, skip), workload.n_prompt))
    if workload.n_gen:
        skip = 2 if len(tokens) > 1 else 1
        phases.append(_phase("decode", node_times(open_it, decode, skip), workload.n_gen))
    return Operations(source, tuple(phases))


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


def _open_decoder(named: Named, threads: int | None) -> Runner:
    runner: Runner = target_module(str(named.target)).open(named.path, threads=threads)
    return runner


def _phase(name: str, times: tuple[list[NodeTime], int, int], units: int) -> Phase:
    nodes, runs, wall_ns = times
    rows = [Operation(_layer(n.name), n.op, n.name, n.calls, (n.ns,)) for n in nodes]
    return Phase(name, units, tuple(rows), (wall_ns,) if runs else ())


def _counted(source: str, ops: Mapping[str, int], reason: str) -> Operations:
    rows = tuple(Operation(None, op, "", n, None) for op, n in sorted(ops.items()))
    return Operations(source, (Phase("run", 1, rows),), reason)


def _layer(name: str) -> int | None:
    found = _LAYER.search(name)
    return int(found[1]) if found else None
