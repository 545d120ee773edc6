"""From a graph to a target's file: checked first, its integers read back, run beside its source.

A target is one module, named in `GRAPH_TARGETS` and imported only when it is asked for:

    check(graph, options)          refuse what the target cannot hold, before any work
    write(graph, path, options, progress)   make the file or folder ``path``
    open_graph(path, *, threads)   -> GraphRunner
    stored_weights(path)           -> (name, QuantWeight) of every packed constant, read back
    stored_quants(path)            -> value -> Quant, read back
    arena(graph, options)          -> bytes of the values while it runs, if buffers are used again
    versions()                     -> the libraries that took part
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeq._version import __version__
from edgeq.converters import TARGETS, Conversion, Progress
from edgeq.converters.certificate import VERSION, certificate_path, machine, sha256
from edgeq.converters.output import check_place, deliver, files, workshop
from edgeq.errors import EdgeqError, FormatError, UsageError, unknown
from edgeq.graphs.ir import Graph, Info, Quant, QuantWeight

GRAPH_TARGETS = {"ort": "ort_lower", "tflite": "tflite_lower", "coreml": "coreml_lower"}
"""Target -> its module in `edgeq.converters`."""
_SUFFIXES = {".onnx": "ort", ".ort": "ort", ".tflite": "tflite", ".mlpackage": "coreml"}
SOURCES = (".onnx", ".tflite")
"""Suffixes of files that are read as graphs."""
RUNS = 4
"""Inputs that are made up for a comparison where none are given."""
ALLOWED = {"float": 1e-4, "half": 0.03, "static": 0.1, "dynamic": 0.1}
"""How values are computed -> the error allowed, as a part of the values' root mean square. Where
values are rounded, a runtime that sums in another order takes the other of two neighbours; where
the source itself makes more of inputs that differ by such a step, so may the target."""
_MOST = 0.3
"""Never more than that."""

Feeds = Mapping[str, NDArray[Any]]


class GraphRunner(Protocol):
    """A graph in a runtime, called by the names, shapes and float types of its source."""

    runtime: str
    """What executes it, with its version."""
    inputs: Mapping[str, Info]
    outputs: Mapping[str, Info]

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the source's meta held: recipe, preprocessing."""

    def __call__(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Outputs of inputs."""

    def close(self) -> None:
        """Give everything back."""


@dataclass(frozen=True)
class Comparison:
    """A target beside its source.

    Args:
        runtime: what executed the target.
        source_runtime: what executed the source.
        runs: inputs that were tried.
        error: output -> root mean square error over root mean square of the right values.
        allowed: largest error allowed.
        top1: part of the runs whose largest output is the same; None without scores.
        weights: packed constant -> whether integers and scales read back are the source's.
        quants: the same of rounded values.
        bits: packed constant -> bits a weight takes in the file; none for one that is not packed.
        asked: packed constant of the source -> its bits there.
    """

    runtime: str
    source_runtime: str
    runs: int
    error: Mapping[str, float]
    allowed: float
    top1: float | None
    weights: Mapping[str, bool]
    quants: Mapping[str, bool]
    bits: Mapping[str, int]
    asked: Mapping[str, int]

    @property
    def passed(self) -> bool:
        """Whether it computes what its source does, from the same integers."""
        same = all(self.weights.values()) and all(self.quants.values())
        return same and all(error <= self.allowed for error in self.error.values())

    def explain(self) -> str:
        """What differs, a line each."""
        missing = [name for name in self.weights if name not in self.bits]
        lines = [_stayed_float(missing, len(self.weights))] if missing else []
        lines += [
            f"{name}: integers or scales differ from the source's"
            for held in (self.weights, self.quants)
            for name, same in held.items()
            if not same and name not in missing
        ]
        lines += [
            f"{name}: differs by {error:.3g} of its size, {self.allowed:.3g} is allowed"
            for name, error in self.error.items()
            if not error <= self.allowed
        ]
        return "\n".join(lines)


def graph_target(name: str) -> ModuleType:
    """The module of a target.

    Raises:
        UsageError: it takes no graphs.
    """
    if name not in GRAPH_TARGETS:
        raise UsageError(unknown("target of a graph", name, tuple(GRAPH_TARGETS)))
    return importlib.import_module(f"edgeq.converters.{GRAPH_TARGETS[name]}")


def open_graph(path: str | Path, *, threads: int = 1) -> GraphRunner:
    """Any file that holds a graph, in its runtime.

    Raises:
        FormatError: it is no such file, or damaged.
        MissingDependencyError: the runtime is not installed.
    """
    runner: GraphRunner = _module_of(path).open_graph(Path(path), threads=threads)
    return runner


def stored(path: str | Path) -> tuple[dict[str, QuantWeight], dict[str, Quant]]:
    """What edgeq packed into a target's file, read back from it.

    Raises:
        FormatError: edgeq did not write it, or it is damaged.
        MissingDependencyError: the target's package is not installed.
    """
    module = _module_of(path)
    return dict(module.stored_weights(Path(path))), module.stored_quants(Path(path))


def target_of(path: str | Path) -> str:
    """The target that a file is of, by its suffix.

    Raises:
        FormatError: it does not exist, or is of none.
    """
    path = Path(path)
    if not path.exists():
        raise FormatError(f"{path} does not exist")
    if path.suffix.lower() not in _SUFFIXES:
        raise FormatError(
            f"{path} is not a graph; its name must end in one of {', '.join(_SUFFIXES)}"
        )
    return _SUFFIXES[path.suffix.lower()]


def _module_of(path: str | Path) -> ModuleType:
    return graph_target(target_of(path))


def convert_graph(
    source: Graph | str | Path,
    target: str,
    out: str | Path,
    options: Mapping[str, Any] | None = None,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    samples: Iterable[Feeds] | None = None,
    force: bool = False,
    validate: bool = True,
    threads: int = 1,
    progress: Progress | None = None,
) -> Conversion:
    """Write a graph in a target's own format, with the very same integers.

    Args:
        source: a graph, or the path of one: what ``edgeq quantize`` made, or a float model.
        target: a name in `GRAPH_TARGETS`.
        out: the file or folder to make.
        options: of the target.
        shapes: of inputs that the file leaves open.
        samples: to compare on; made up within the inputs' ranges if None.
        force: replace what is there.
        validate: run the result beside its source.
        threads: to run with.
        progress: called with what is done, how far, and of how much.

    Raises:
        UsageError: an unknown target or option, or an output that exists or has no folder.
        UnsupportedError: the target cannot hold the graph; names operators and nodes.
        FormatError: the source is damaged.
        MissingDependencyError: a package is not installed; names the extra.
        EdgeqError: the output cannot be written, or does not hold or compute what its source does.
    """
    started = time.perf_counter()
    module, options, path = graph_target(target), dict(options or {}), Path(out)
    _check_out(source, target, path)
    check_place(path, force)
    libraries = module.versions()
    graph = source if isinstance(source, Graph) else _read(source, shapes)
    module.check(graph, options)
    with workshop(path) as room:
        made = room / "made"
        made.mkdir()
        module.write(graph, made / path.name, options, progress)
        nbytes = sum(file.stat().st_size for file in files(made).values())
        certificate = None
        if not validate:
            _check_packed(graph, made / path.name, target)
        else:
            found = compare(
                graph, made / path.name, target,
                samples=samples, threads=threads, progress=progress,
            )  # fmt: skip
            if not found.passed:
                raise EdgeqError(
                    f"the converted model ({target}) does not compute what its source does and was "
                    f"deleted (--no-validate keeps it):\n{found.explain()}"
                )
            certificate = _certify(found, graph, source, target, options, files(made), libraries)
            where = certificate_path(made / path.name, folder=(made / path.name).is_dir())
            where.write_text(json.dumps(certificate, indent=2) + "\n", "utf-8")
        deliver(made, path, room, force)
    return Conversion(target, path, nbytes, time.perf_counter() - started, certificate)


def _check_out(source: Graph | str | Path, target: str, path: Path) -> None:
    """Refuse an output of another kind, or in its own source's place."""
    suffixes = [suffix for suffix, of in _SUFFIXES.items() if of == target]
    if path.suffix not in suffixes:
        raise UsageError(
            f"{TARGETS[target].partition(':')[0]} output must end in {' or '.join(suffixes)}, but "
            f"--output is {path}" + (f"; use {path.with_suffix(suffixes[0])}" if path.name else "")
        )
    if not isinstance(source, Graph) and path.absolute() == Path(source).absolute():
        raise UsageError(f"{path} is the model to convert itself; give another --output")


def _read(path: str | Path, shapes: Mapping[str, tuple[int, ...]] | None) -> Graph:
    from edgeq.graphs.files import read  # packages that are needed for files only

    return read(path, shapes=shapes)


def compare(
    graph: Graph,
    path: Path,
    target: str,
    *,
    samples: Iterable[Feeds] | None = None,
    threads: int = 1,
    progress: Progress | None = None,
) -> Comparison:
    """Run a graph and what was made of it, and read back the integers.

    Args:
        graph: the source.
        path: of the target's file.
        target: its name.
        samples: inputs; made up if None.
        threads: of the target's runtime.
        progress: called with what is done, how far, and of how much.

    Raises:
        UsageError: the file has other inputs or outputs than the graph.
        FormatError: edgeq did not write the file, or it is damaged.
        MissingDependencyError: a runtime is not installed.
    """
    from edgeq.graphs.execute import Session, require

    module = graph_target(target)
    feeds = list(made_up(graph) if samples is None else samples)
    weights, bits = _weights(graph, module.stored_weights(path))
    held = module.stored_quants(path)
    quants = {name: held.get(name) == quant for name, quant in graph.quants.items() if name in held}
    right, source = Session(graph), require()
    runner = module.open_graph(path, threads=threads)
    error: dict[str, float] = {}
    agreed, scored, by_a_step = 0, 0, 0.0
    rng = np.random.default_rng(0)
    try:
        _check_ends(graph, runner, path)
        for i, feed in enumerate(feeds):
            if progress:
                progress("comparing", i, len(feeds))
            want, got = right(feed), runner(feed)
            beside = right(_a_step_off(graph, feed, rng)) if graph.quants else want
            for name in graph.outputs:
                error[name] = max(error.get(name, 0.0), _error(got[name], want[name]))
                by_a_step = max(by_a_step, _error(beside[name], want[name]))
            scores = want[graph.outputs[0]]
            if scores.ndim == 2 and scores.shape[1] > 1 and scores.dtype.kind == "f":
                scored += len(scores)
                agreed += int((got[graph.outputs[0]].argmax(1) == scores.argmax(1)).sum())
        runtime = runner.runtime
    finally:
        runner.close()
    kind = graph.meta.get("edgeq.activations", "float")
    if kind == "float":  # the runtime may round more than the record does
        precision = getattr(runner, "precision", "float32")
        kind = {"float16": "half", "int8": "dynamic"}.get(precision, kind)
    return Comparison(
        runtime, f"onnxruntime {source.__version__}", len(feeds), error,
        max(ALLOWED[kind], min(by_a_step, _MOST)),
        agreed / scored if scored else None, weights, quants, bits,
        {name: w.bits for name, w in _packed(graph).items() if name in weights},
    )  # fmt: skip


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


def made_up(graph: Graph, runs: int = RUNS) -> list[dict[str, NDArray[Any]]]:
    """Inputs within the ranges that the graph was calibrated for, or around 0.

    Integers are taken as row numbers of the table they select from; without one, and truth values,
    as a mask: ones, and zeros behind them.
    """
    rng = np.random.default_rng(0)
    return [{name: _input(graph, name, rng) for name in graph.inputs} for _ in range(runs)]


def _input(graph: Graph, name: str, rng: np.random.Generator) -> NDArray[Any]:
    info, quant = graph.info(name), graph.quants.get(name)
    if info.dtype.startswith(("int", "uint", "bool")):
        tables = [
            graph.info(node.inputs[0]).shape[node.attrs.get("axis", 0)]
            for node in graph.consumers.get(name, ())
            if node.op == "Gather" and node.inputs[1] == name
        ]
        if tables:
            return rng.integers(0, min(tables), info.shape).astype(info.dtype)
        n = info.shape[-1] if info.shape else 1
        mask = np.arange(n) < rng.integers(1, n + 1)
        return np.broadcast_to(mask.reshape((-1,)[: len(info.shape)]), info.shape).astype(
            info.dtype
        )
    if quant is None:
        return rng.standard_normal(info.shape).astype(info.dtype)
    levels = rng.integers(-128, 128, info.shape).astype(np.int8)
    return quant.dequantize(levels)


def _a_step_off(graph: Graph, feeds: Feeds, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
    """Inputs of which each rounded number is a level lower, higher or the same, by chance."""
    found = dict(feeds)
    for name in graph.quants.keys() & feeds.keys():
        quant, x = graph.quants[name], np.asarray(feeds[name])
        levels = quant.quantize(x) + rng.integers(-1, 2, x.shape)
        found[name] = quant.dequantize(np.clip(levels, -128, 127).astype(np.int8))
    return found


def _error(got: NDArray[Any], want: NDArray[Any]) -> float:
    if got.shape != want.shape:
        raise FormatError(f"an output is {list(got.shape)}, its source's is {list(want.shape)}")
    if not np.isfinite(got).all():
        return float("inf")
    wrong = np.sqrt(np.mean((got.astype(np.float64) - want) ** 2))
    size = np.sqrt(np.mean(want.astype(np.float64) ** 2))
    return float(wrong / size) if size else float(wrong)


def _weights(
    graph: Graph, stored: Iterable[tuple[str, QuantWeight]]
) -> tuple[dict[str, bool], dict[str, int]]:
    """Whether each packed constant came back, and in how many bits it is held.

    A bias of integers counts where the target has such; in Core ML it is of floats.
    """
    same = {name: False for name, held in _packed(graph).items() if held.bits != 32}
    bits: dict[str, int] = {}
    for name, found in stored:
        mine = graph.constants.get(name)
        if isinstance(mine, QuantWeight):
            same[name] = np.array_equal(found.levels, mine.levels) and np.array_equal(
                np.broadcast_to(found.wide_scales(), mine.shape),
                np.broadcast_to(mine.wide_scales(), mine.shape),
            )
            bits[name] = found.bits
        elif mine is not None:  # float in the source
            same[name], bits[name] = False, found.bits
    return same, bits


def _packed(graph: Graph) -> dict[str, QuantWeight]:
    """Constants that are integers."""
    return {name: w for name, w in graph.constants.items() if isinstance(w, QuantWeight)}


def _check_packed(graph: Graph, path: Path, target: str) -> None:
    """Refuse a file in which a weight stayed float that the source has as integers."""
    weights, bits = _weights(graph, graph_target(target).stored_weights(path))
    if missing := [name for name in weights if name not in bits]:
        raise EdgeqError(
            f"the converted model ({target}) was deleted: {_stayed_float(missing, len(weights))}"
        )


def _stayed_float(missing: list[str], total: int) -> str:
    return (
        f"{len(missing)} of {total} weights that the source has as integers are not packed in the "
        f"file: {', '.join(missing)}; please report it"
    )


def _certify(
    found: Comparison,
    graph: Graph,
    source: Graph | str | Path,
    target: str,
    options: Mapping[str, Any],
    made: Mapping[str, Path],
    libraries: Mapping[str, str],
) -> dict[str, Any]:
    module = graph_target(target)
    about: dict[str, Any] = {"name": graph.name, "recipe": graph.meta.get("edgeq.recipe")}
    if not isinstance(source, Graph):
        about |= {"source": Path(source).name, "source_sha256": sha256(Path(source))}
    return {
        "certificate": VERSION,
        "passed": found.passed,
        "target": target,
        "runtime": found.runtime,
        "edgeq": __version__,
        "libraries": dict(libraries),
        "options": dict(options),
        "source": about,
        "files": {
            name: {"nbytes": path.stat().st_size, "sha256": sha256(path)}
            for name, path in sorted(made.items())
        },
        "weights_equal": f"{sum(found.weights.values())} of {len(found.weights)}",
        "weights": {
            name: {"equal": same, "bits": found.bits.get(name), "asked": found.asked[name]}
            for name, same in found.weights.items()
        },
        "quants_equal": f"{sum(found.quants.values())} of {len(found.quants)}",
        "quants_not_in_file": len(graph.quants) - len(found.quants),
        "arena_bytes": module.arena(graph, options),
        "compared_with": found.source_runtime,
        "runs": found.runs,
        "error": dict(found.error),
        "error_allowed": found.allowed,
        "top1_agreement": found.top1,
        "machine": machine(),
    }
