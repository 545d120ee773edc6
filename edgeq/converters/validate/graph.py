"""A converted graph compared with its source: the same integers, and the same results.

Integers and scales of every weight and scale and zero point of every rounded value are read back
from the file; with the options of the conversion, every other constant and every operator is
compared too. Then both are run, on real inputs where there are any
(`edgeq.converters.validate.graph_inputs`), and the outputs may differ by what right runtimes
differ by (`edgeq.converters.validate.graph_tolerance`).
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeq._version import __version__
from edgeq.converters.certificate import check_certificate
from edgeq.converters.runners import GraphRunner
from edgeq.converters.target import GraphTarget
from edgeq.converters.targets import graph_target, open_graph
from edgeq.converters.validate.graph_inputs import RANDOM, inputs_of
from edgeq.converters.validate.graph_tolerance import Kind, OutputError, OutputTolerance
from edgeq.converters.validate.report import GraphFindings, ValidationReport, stayed_float
from edgeq.core.errors import EdgeqError, UsageError
from edgeq.core.progress import Progress
from edgeq.graph.feeds import Feeds
from edgeq.graph.files import graph_format, read
from edgeq.graph.ir import Graph, QuantWeight
from edgeq.quant.graph.stored_samples import META_SAMPLES

META_OPTIONS = "edgeq.options"
"""Key of a file's metadata: the options of its conversion, and edgeq's version."""
COSTLY = 0.05
"""Change of an output by the runtime's own rounding from which on it is reported."""


def validate_graph(
    graph: Graph,
    path: Path,
    target: str,
    *,
    samples: Iterable[Feeds] | None = None,
    threads: int = 1,
    progress: Progress | None = None,
) -> ValidationReport:
    """Compare a converted graph with its source: integers, all other constants, and outputs.

    Args:
        graph: the source.
        path: the target's file or package.
        target: name of the target.
        samples: real inputs; None takes those stored with the calibration, or random ones.
        threads: threads of the target's runtime.
        progress: called with what is done, how far, and of how much.

    Raises:
        UsageError: the file has other inputs or outputs than the graph.
        FormatError: edgeq did not write the file, or it is damaged or not the one that its
            certificate describes.
        MissingDependencyError: a runtime is not installed.
    """
    check_certificate(path)
    return compare_graph(
        graph, path, target, samples=samples, constants=True, threads=threads, progress=progress
    )


def read_source(source: str | Path, path: str | Path) -> Graph:
    """Read the graph that a file was converted from.

    Axes that the source leaves open were settled when it was converted: they are the file's.

    Args:
        source: an ONNX or LiteRT file.
        path: what it was converted to.

    Raises:
        FormatError: one of them is damaged.
        MissingDependencyError: the target's runtime is not installed.
    """
    runner = open_graph(path)
    shapes = {name: info.shape for name, info in runner.inputs.items()}
    runner.close()
    return read(source, shapes=shapes if graph_format(source) == "onnx" else None)


def compare_graph(
    graph: Graph,
    path: Path,
    target: str,
    *,
    samples: Iterable[Feeds] | None = None,
    constants: bool = False,
    threads: int = 1,
    progress: Progress | None = None,
) -> ValidationReport:
    """`validate_graph`, without its certificate.

    Args:
        graph, path, target, samples, threads, progress: as for `validate_graph`.
        constants: compare all constants and operators with those of a new conversion.
    """
    from edgeq.graph.execute import require

    started = time.perf_counter()
    module, source = graph_target(target), require()
    where, feeds = inputs_of(graph, samples)
    integers, bits = _weights(graph, module.read_weights(path))
    quants = {
        name: quant == graph.quants[name]
        for name, quant in module.read_quants(path).items()
        if name in graph.quants
    }
    runner = module.open_runner(path, threads=threads)
    try:
        _check_ends(graph, runner, path)
        count, different, notes = (
            _rebuilt(graph, path, module, runner) if constants else (0, [], [])
        )
        kind, half = _kind(graph, runner)
        tolerance = OutputTolerance(graph, kind, half=half)
        for i, feed in enumerate(feeds):
            if progress:
                progress(f"comparing on {where}", i, len(feeds))
            tolerance.add(feed, runner(feed))
        runtime = runner.runtime
    finally:
        runner.close()
    outputs = tolerance.found()
    findings = GraphFindings(
        source_runtime=f"onnxruntime {source.__version__}",
        inputs=where,
        runs=len(feeds),
        error={name: one.error for name, one in outputs.items()},
        allowed={name: one.allowed for name, one in outputs.items()},
        rounding_error={name: one.price for name, one in outputs.items()},
        top1=sum(tolerance.top1) / len(tolerance.top1) if tolerance.top1 else None,
        quants={name: quants[name] for name in graph.quants if name in quants},
        source_quants=len(graph.quants),
        bits=bits,
        source_bits={name: w.bits for name, w in _packed(graph).items() if name in integers},
        parts=count,
        different=tuple(different),
        random=where == RANDOM,
    )
    return ValidationReport(
        target, runtime, integers, graph=findings,
        notes=(*notes, *_notes(outputs, kind)), seconds=time.perf_counter() - started,
    )  # fmt: skip


def _kind(graph: Graph, runner: GraphRunner) -> tuple[Kind, bool]:
    """How the target computes, and whether its floats are float16."""
    precision = runner.precision
    half = precision == "float16"
    kind = graph.meta.get("edgeq.activations", "float")
    if graph.quants:
        return "static", half
    if kind == "dynamic" or precision == "int8":
        return "dynamic", half
    return ("half" if half else "float"), half


def _notes(outputs: Mapping[str, OutputError], kind: Kind) -> list[str]:
    remarks: dict[str, list[str]] = {}
    for name, one in outputs.items():
        if one.note:
            remarks.setdefault(one.note, []).append(name)
    notes = [f"{', '.join(names)}: {note}" for note, names in remarks.items()]
    costly = {name: one.price for name, one in outputs.items() if one.price > COSTLY}
    if kind == "dynamic" and costly:
        worst = max(costly, key=costly.__getitem__)
        notes.append(
            f"rounding values to 8 bits as the model runs changes {worst} by {costly[worst]:.2g} "
            "of its size; --set compute=float of tflite, or a preset of weights only, avoids it"
        )
    return notes


def with_options(graph: Graph, options: Mapping[str, Any]) -> Graph:
    """The graph as it is written: its metadata says how, and keeps no samples."""
    meta = {key: text for key, text in graph.meta.items() if key != META_SAMPLES}
    meta[META_OPTIONS] = json.dumps({"edgeq": __version__, "options": dict(options)})
    return replace(graph, meta=meta)


def _rebuilt(
    graph: Graph, path: Path, module: GraphTarget, runner: GraphRunner
) -> tuple[int, list[str], list[str]]:
    """How many parts were compared with a new conversion's, those that differ, and notes."""
    try:
        recorded = json.loads(runner.metadata[META_OPTIONS])
        version, options = recorded["edgeq"], dict(recorded["options"])
    except (KeyError, TypeError, ValueError):
        return 0, [], ["constants that are not integers were not compared: the file does not say "
                       "with which options it was made; convert again"]  # fmt: skip
    if version != __version__:
        return 0, [], [f"constants that are not integers were not compared: edgeq {version} made "
                       f"the file, and this is {__version__}; convert again"]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="edgeq-") as folder:
        right = Path(folder) / path.name
        module.write(with_options(graph, options), right, options, None)
        parts, expected = dict(module.read_parts(path)), dict(module.read_parts(right))
    names = list(dict.fromkeys([*expected, *parts]))
    return len(names), [name for name in names if parts.get(name) != expected.get(name)], []


def _check_ends(graph: Graph, runner: GraphRunner, path: Path) -> None:
    """Refuse a file that was made from another graph."""
    for what, mine, there in (
        ("takes", graph.inputs, runner.inputs),
        ("gives", graph.outputs, runner.outputs),
    ):
        want, got = ({name: list(ends[name].shape) for name in ends}
                     for ends in ({n: graph.info(n) for n in mine}, there))  # fmt: skip
        if want != got:
            raise UsageError(
                f"{path} {what} {_listed(got)}, and {graph.name!r} {_listed(want)}; compare it "
                "with what it was converted from"
            )


def _listed(ends: Mapping[str, list[int]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in ends.items())


def _weights(
    graph: Graph, stored: Iterable[tuple[str, QuantWeight]]
) -> tuple[dict[str, bool], dict[str, int]]:
    """Whether each packed constant was read back equal, and in how many bits it is stored.

    A bias of integers counts where the target has such; in Core ML it is of floats.
    """
    same = {name: False for name, constant in _packed(graph).items() if constant.bits != 32}
    bits: dict[str, int] = {}
    for name, weight in stored:
        mine = graph.constants.get(name)
        if isinstance(mine, QuantWeight):
            same[name] = np.array_equal(weight.levels, mine.levels) and np.array_equal(
                np.broadcast_to(weight.wide_scales(), mine.shape),
                np.broadcast_to(mine.wide_scales(), mine.shape),
            )
            bits[name] = weight.bits
        elif mine is not None:  # float in the source
            same[name], bits[name] = False, weight.bits
    return same, bits


def _packed(graph: Graph) -> dict[str, QuantWeight]:
    """Constants that are integers."""
    return {name: w for name, w in graph.constants.items() if isinstance(w, QuantWeight)}


def check_packed(graph: Graph, path: Path, target: str) -> None:
    """Refuse a file in which a weight stayed float that the source has as integers.

    Raises:
        EdgeqError: there is one.
    """
    weights, bits = _weights(graph, graph_target(target).read_weights(path))
    if missing := [name for name in weights if name not in bits]:
        raise EdgeqError(f"the {target} output is not kept: {stayed_float(missing, len(weights))}")
