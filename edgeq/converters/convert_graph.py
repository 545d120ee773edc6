"""From a graph to a target's file: checked first, its integers read back, run beside its source.

A target is one module, named in `GRAPH_TARGETS` and imported only when it is asked for:

    check(graph, options)          refuse what the target cannot hold, before any work
    write(graph, path, options, progress)   make the file or folder ``path``
    open_graph(path, *, threads)   -> GraphRunner
    stored_weights(path)           -> (name, QuantWeight) of every packed constant, read back
    stored_quants(path)            -> value -> QuantParams, read back
    arena(graph, options)          -> bytes of the values while it runs, if buffers are used again
    versions()                     -> the libraries that took part
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from numpy.typing import NDArray

from edgeq._version import __version__
from edgeq.converters import TARGETS, Conversion
from edgeq.converters.atomic_output import check_place, deliver, files, workshop
from edgeq.converters.certificate import VERSION, certificate_path, machine
from edgeq.converters.validate.graph_compare import (
    Comparison,
    check_packed,
    compare_with,
    with_options,
)
from edgeq.converters.validate.graph_inputs import Feeds
from edgeq.core.errors import EdgeqError, FormatError, UsageError, unknown
from edgeq.core.hashing import file_sha256
from edgeq.core.progress import Progress
from edgeq.formats.qparams import QuantParams
from edgeq.graph.ir import Graph, Info, QuantWeight

GRAPH_TARGETS = {"ort": "ort.graph", "tflite": "tflite.lower.graph", "coreml": "coreml.lower.graph"}
"""Target -> its module in `edgeq.converters`."""
_SUFFIXES = {".onnx": "ort", ".ort": "ort", ".tflite": "tflite", ".mlpackage": "coreml"}


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


def stored(path: str | Path) -> tuple[dict[str, QuantWeight], dict[str, QuantParams]]:
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
        samples: real inputs to compare on; if None those that the record keeps of its calibration,
            and random ones where it keeps none.
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
        module.write(with_options(graph, options), made / path.name, options, progress)
        nbytes = sum(file.stat().st_size for file in files(made).values())
        certificate = None
        if not validate:
            check_packed(graph, made / path.name, target, module)
        else:
            found = compare_with(
                graph, made / path.name, module,
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
    from edgeq.graph.files import read  # packages that are needed for files only

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
    """Compare a target's file with its source: integers, all other constants, and outputs.

    Args:
        graph: the source.
        path: of the target's file.
        target: its name.
        samples: real inputs; if None those that the record keeps, or random ones.
        threads: of the target's runtime.
        progress: called with what is done, how far, and of how much.

    Raises:
        UsageError: the file has other inputs or outputs than the graph.
        FormatError: edgeq did not write the file, or it is damaged or not the one that its
            certificate describes.
        MissingDependencyError: a runtime is not installed.
    """
    check_certificate(path)
    return compare_with(
        graph, path, graph_target(target),
        samples=samples, rebuilt=True, threads=threads, progress=progress,
    )  # fmt: skip


def check_certificate(path: Path) -> None:
    """Compare a file or package with the sizes and digests of the certificate beside it, if any.

    Raises:
        FormatError: a file is not the one that was certified, or the certificate is damaged.
    """
    where = certificate_path(path, folder=path.is_dir())
    if not where.is_file():
        return
    try:
        listed = dict(json.loads(where.read_text("utf-8"))["files"])
        digests = {str(name): str(entry["sha256"]) for name, entry in listed.items()}
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise FormatError(f"the certificate {where} cannot be read: {err}") from err
    changed = [
        name
        for name, digest in digests.items()
        if Path(name).parts[:1] == (path.name,) and ".." not in Path(name).parts
        and (not (path.parent / name).is_file() or file_sha256(path.parent / name) != digest)
    ]  # fmt: skip
    if changed:
        raise FormatError(
            f"{', '.join(changed)} is not the file that {where.name} certifies: it was changed or "
            "damaged after the conversion; convert the source again, or delete the certificate to "
            "validate the file as it is"
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
        about |= {"source": Path(source).name, "source_sha256": file_sha256(Path(source))}
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
            name: {"nbytes": path.stat().st_size, "sha256": file_sha256(path)}
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
        "inputs": found.inputs,
        "runs": found.runs,
        "error": dict(found.error),
        "error_allowed": dict(found.allowed),
        "rounding_price": dict(found.price),
        "notes": list(found.notes),
        "top1_agreement": found.top1,
        "machine": machine(),
    }
