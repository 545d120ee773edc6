"""Convert a model or a graph to a target's file, which is checked before it is written and run
before it is published.

Everything is written to a hidden folder beside the output and moved to its place at the end, when
its integers have been read back and it has been run. So an output is never half a file, nor one
that computes something else than its source.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgeq.converters.atomic_output import check_output, files_below, publish, staging
from edgeq.converters.certificate import certificate_path, certify
from edgeq.converters.options import Options
from edgeq.converters.targets import graph_target, require_target, target_named
from edgeq.core.errors import EdgeqError
from edgeq.core.progress import Progress
from edgeq.graph.feeds import Feeds
from edgeq.graph.ir import Graph
from edgeq.importers import source_kind
from edgeq.model.model import Model

if TYPE_CHECKING:
    from edgeq.converters.validate.report import ValidationReport


@dataclass(frozen=True)
class Conversion:
    """A finished conversion.

    Args:
        target: name of the target.
        path: the file or folder that was written.
        nbytes: size of all its files, the certificate aside.
        seconds: wall-clock time.
        certificate: what validation measured; None if validation was left out.
    """

    target: str
    path: Path
    nbytes: int
    seconds: float
    certificate: Mapping[str, Any] | None = None


class ConversionSteps(Protocol):
    """The steps of `convert` that depend on the kind of source."""

    def check_name(self, path: Path) -> None:
        """Refuse an output that the target would not recognize by its name."""

    def prepare(self, folder: Path) -> None:
        """Open the source, and refuse what the target cannot represent.

        Args:
            folder: for files that are needed meanwhile.
        """

    def write(self, output: Path) -> None:
        """Write the output."""

    def validate(self, output: Path) -> ValidationReport:
        """Run the output and compare it with the source."""

    def check_written(self, output: Path) -> None:
        """Refuse an output that is wrong beyond doubt, where validation is left out."""

    def source(self) -> Mapping[str, Any]:
        """The source as a certificate records it."""

    def versions(self) -> Mapping[str, str]:
        """The libraries that took part."""

    def arena_bytes(self) -> int | None:
        """Activations of a graph at their peak."""


def convert(
    source: Model | Graph | str | Path,
    target: str,
    out: str | Path,
    options: Options | Mapping[str, Any] | None = None,
    *,
    preset: str | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    samples: Iterable[Feeds] | None = None,
    force: bool = False,
    validate: bool = True,
    steps: int = 8,
    max_ram: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> Conversion:
    """Convert a language model or a graph to a target's own format, with the same integers.

    Args:
        source: a model or a graph, or the path of one: an artifact, a checkpoint folder, a GGUF
            file, an ONNX or LiteRT file.
        target: a name in `edgeq.converters.TARGETS`.
        out: the file or folder to write.
        options: options of the conversion; a mapping stands for ``Options(extra=...)``.
        preset: models: quantize a float source with this preset first; without it, floats stay
            floats.
        shapes: graphs: shapes of inputs that the file leaves open.
        samples: graphs: real inputs to compare on; None takes those stored with the calibration,
            or random ones.
        force: replace what is there.
        validate: run the result and compare it with the source; the certificate says how they
            compare.
        steps: models: greedy tokens compared after each prompt.
        max_ram: models: most bytes that this process may take while it writes.
        threads: to quantize and run with; None takes all cores, or 1 for graphs.
        progress: called with what is done, how far, and of how much.
        announce: called with a sentence on the size the output will have, on defaults that were
            chosen, on how long validation takes, or on what the output needs where it runs, each
            before the work.

    Raises:
        UsageError: an unknown target, an output that exists or has no folder, or an option that
            the target or this kind of source does not have.
        UnsupportedError: the target cannot represent the source; names the tensors or nodes, and
            the nearest form that it can.
        MissingDependencyError: a package is not installed; names the extra.
        DoesNotFitError: max_ram is too little, or the target cannot promise it.
        FormatError: the source is damaged.
        EdgeqError: the output cannot be written, or computes something else than its source.

    Example:
        >>> conversion = edgeq.convert("model.edgeq", "gguf", "model.gguf", validate=False)
        >>> conversion.path.name
        'model.gguf'
    """
    started = time.perf_counter()
    path = Path(out)
    if not isinstance(options, Options):
        options = Options(extra=dict(options or {}))
    work: ConversionSteps
    if isinstance(source, Graph) or (
        not isinstance(source, Model) and source_kind(source) == "graph"
    ):
        from edgeq.converters.convert_graph import GraphConversion

        graph_target(target)
        work = GraphConversion(
            source, target, options,
            preset=preset, shapes=shapes, samples=samples, max_ram=max_ram,
            threads=threads or 1, progress=progress, announce=announce,
        )  # fmt: skip
    else:
        from edgeq.converters.convert_decoder import DecoderConversion

        target_named(target)
        work = DecoderConversion(
            source, target, options,
            preset=preset, shapes=shapes, samples=samples, max_ram=max_ram, steps=steps,
            threads=threads, progress=progress, announce=announce,
        )  # fmt: skip
    require_target(target)
    work.check_name(path)
    check_output(path, force)
    with staging(path) as folder:
        work.prepare(folder)
        written = folder / "written"
        written.mkdir()
        output = written / path.name
        work.write(output)
        nbytes = sum(file.stat().st_size for file in files_below(written).values())
        certificate = None
        if validate:
            report = work.validate(output)
            if not report.passed:
                raise EdgeqError(
                    f"the converted model ({target}) does not compute what its source does and was "
                    f"deleted (--no-validate keeps it):\n{report.explain()}"
                )
            certificate = certify(
                report, work.source(), _recorded(options, report), files_below(written),
                work.versions(), arena_bytes=work.arena_bytes(),
            )  # fmt: skip
            place = certificate_path(output, folder=output.is_dir())
            place.write_text(json.dumps(certificate, indent=2) + "\n", "utf-8")
        else:
            work.check_written(output)
        publish(written, path, folder, force)
    return Conversion(target, path, nbytes, time.perf_counter() - started, certificate)


def _recorded(options: Options, report: ValidationReport) -> Mapping[str, Any]:
    """The options as a certificate names them."""
    return options.to_dict() if report.decoder else dict(options.extra)
