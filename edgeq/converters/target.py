"""The parts of a target: another runtime's format, with what writes, reads and runs it.

A target is a `Target`: one row of `edgeq.converters.targets.TARGETS`, which says everything that
is known without importing the target, and up to three classes, each imported when it is needed:

    decoder    a `DecoderTarget`, if language models can be converted to the format
    graph      a `GraphTarget`, if graphs of operators can be
    profiler   a `ProfilerTarget`, if its runtime can be timed or its operators counted

A refusal is an `EdgeqError` that ``check`` raises before any work; a missing package is a
`MissingDependencyError`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgeq.core.errors import UsageError
from edgeq.core.progress import Progress

if TYPE_CHECKING:  # the command line reads the table of targets and needs no NumPy for it
    from contextlib import AbstractContextManager

    import numpy as np
    from numpy.typing import NDArray

    from edgeq.converters.options import Options, WrittenWith
    from edgeq.converters.runners import DecoderRunner, Execution, GraphRunner, Trace
    from edgeq.converters.size import Size
    from edgeq.converters.stored import StoredConstant, StoredWeight
    from edgeq.converters.validate.kernels import Kernels
    from edgeq.converters.validate.tokenizer import TargetTokenizer
    from edgeq.formats.qparams import QuantParams
    from edgeq.graph.ir import Graph, QuantWeight
    from edgeq.importers.huggingface.tokenizer import HfTokenizer
    from edgeq.model.model import Model


class DecoderTarget(Protocol):
    """Conversion of language models to one target; subclass it explicitly."""

    @abstractmethod
    def check(self, model: Model, options: Options) -> None:
        """Refuse what the target cannot represent, before any work.

        Raises:
            UsageError: an unknown option, or a value outside what is allowed.
            UnsupportedError: a scheme, shape or feature that the target lacks; names the tensor.
            MissingDependencyError: a package is not installed.
        """

    @abstractmethod
    def write(
        self, model: Model, out: Path, options: Options, progress: Progress | None = None
    ) -> None:
        """Write the file or folder.

        Args:
            model: a model that `check` accepted.
            out: the file or folder, which does not exist, in an empty folder. Further files
                beside it may be written if their names begin with its name.
            options: the options that `check` accepted.
            progress: called with what is written, how much is done, and of how much.
        """

    @abstractmethod
    def sizes(self, model: Model, options: Options) -> Iterator[Size]:
        """Bits and bytes that each matrix will take."""

    @abstractmethod
    def open_runner(self, path: Path, *, threads: int | None = None) -> DecoderRunner:
        """Open what `write` wrote in the target's own runtime.

        Args:
            path: the file or folder.
            threads: threads of the runtime; all cores if None.

        Raises:
            FormatError: edgeq did not write it, or the runtime refuses it.
            MissingDependencyError: the runtime is not installed.
        """

    def open_frugal(self, path: Path, *, threads: int | None = None) -> DecoderRunner:
        """`open_runner` with the least memory that the runtime can do with, if it is slower."""
        return self.open_runner(path, threads=threads)

    def wrote(self, path: Path) -> bool:
        """Whether `write` wrote the file, by its metadata.

        A format that only language models are written to takes all files for its own.

        Raises:
            FormatError: it cannot be read, or is damaged.
            MissingDependencyError: the package that reads it is not installed.
        """
        return True

    @abstractmethod
    def read_weights(self, path: Path) -> Iterator[StoredWeight]:
        """The integers and scales of every quantized matrix, read back from the file."""

    @abstractmethod
    def read_constants(self, path: Path) -> Iterator[StoredConstant]:
        """Every constant of the file, and its operators if it stores a graph."""

    @abstractmethod
    def read_options(self, path: Path) -> WrittenWith:
        """The options that write the same file again, and the version of edgeq that wrote it."""

    @abstractmethod
    def tracer(self, path: Path) -> AbstractContextManager[Trace]:
        """A context in which passes give every named result of `edgeq.model.decoder`."""

    @abstractmethod
    def kernels(self, path: Path, model: Model) -> Kernels:
        """How the runtime rounds activations and cache while it runs the file."""

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Version of each library that takes part, by name."""

    def trace(
        self, path: Path, tokens: list[int], past: Any = ()
    ) -> dict[str, NDArray[np.float32]]:
        """Every named result of one pass over ``tokens``; see `tracer`."""
        with self.tracer(path) as run:
            return dict(run(tokens, past))

    def remarks(self, model: Model, options: Options) -> list[str]:
        """Sentences on the defaults that were chosen for this model, and what they cost."""
        return []

    def memory(self, model: Model, options: Options) -> int | None:
        """Bytes that `write` needs at its peak, the mapped source file not counted.

        None means that no limit can be promised, so that ``max_ram`` is refused.
        """
        return None

    def tokenizer(self, path: Path, source: HfTokenizer) -> TargetTokenizer | None:
        """The tokenizer in the file, in the target's own runtime; None if it stores none."""
        return None

    def execute(self, path: Path) -> Execution:
        """Run any file of the format once on random inputs, written by edgeq or not.

        Raises:
            UsageError: the target runs nothing but what edgeq converted.
        """
        raise UsageError(
            f"{path} can only be validated against the model it was converted from; give it as "
            "--against MODEL"
        )

    def why_not_run(self) -> str | None:
        """Why the target's own runtime does not run the file, one sentence; None if it does."""
        return None


class GraphTarget(Protocol):
    """Conversion of graphs of operators to one target; subclass it explicitly.

    Options are `edgeq.converters.options.Options.extra`.
    """

    @abstractmethod
    def check(self, graph: Graph, options: Mapping[str, Any]) -> None:
        """Refuse what the target cannot represent, before any work.

        Raises:
            UsageError: an unknown option, or a value outside what is allowed.
            UnsupportedError: lists every node that cannot be converted, with the nearest form
                that can be.
            MissingDependencyError: a package is not installed.
        """

    @abstractmethod
    def write(
        self,
        graph: Graph,
        path: Path,
        options: Mapping[str, Any],
        progress: Progress | None = None,
    ) -> None:
        """Write the file or package ``path``, which does not exist."""

    @abstractmethod
    def wrote(self, path: Path) -> bool:
        """Whether `write` wrote the file, by its metadata.

        Raises:
            FormatError: it cannot be read, or is damaged.
            MissingDependencyError: the package that reads it is not installed.
        """

    def opens(self, path: Path) -> bool:
        """Whether `open_runner` opens the file: one that `write` wrote, or more.

        Raises:
            FormatError, MissingDependencyError: as `wrote`.
        """
        return self.wrote(path)

    @abstractmethod
    def open_runner(self, path: Path, *, threads: int = 1) -> GraphRunner:
        """Open what `write` wrote in the target's own runtime.

        Raises:
            FormatError: edgeq did not write it, or the runtime refuses it.
            MissingDependencyError: the runtime is not installed.
        """

    @abstractmethod
    def read_weights(self, path: Path) -> Iterator[tuple[str, QuantWeight]]:
        """Every packed constant by its name in the source, read back from the file."""

    @abstractmethod
    def read_quants(self, path: Path) -> dict[str, QuantParams]:
        """Scale and zero point of each rounded value by its name in the source, read back."""

    @abstractmethod
    def read_parts(self, path: Path) -> Iterator[tuple[str, bytes]]:
        """Every constant and operator of a file that `write` wrote.

        The conversion of a graph always writes the same file, so a file is compared part by part
        with a new conversion of its source.

        Yields:
            what a part is called, and its content with all settings.
        """

    def remarks(self, graph: Graph, options: Mapping[str, Any]) -> list[str]:
        """Sentences on what the file will need where it runs."""
        return []

    @abstractmethod
    def arena_bytes(self, graph: Graph, options: Mapping[str, Any]) -> int | None:
        """Bytes of the activations at their peak, if buffers are reused; None if unknown."""

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Version of each library that takes part, by name."""


@dataclass(frozen=True)
class NodeTime:
    """Time of one node over some runs of a graph.

    Args:
        op: type of the operator.
        name: name of the node.
        calls: number of executions.
        ns: nanoseconds of all of them.
    """

    op: str
    name: str
    calls: int
    ns: int


@dataclass(frozen=True)
class OperatorCounts:
    """The operators of a file whose runtime has no profiler.

    Args:
        source: where the numbers come from.
        counts: number of operators of each type.
        reason: why they are only counted, not timed.
    """

    source: str
    counts: Mapping[str, int]
    reason: str


class TimedGraph(Protocol):
    """Any graph of a format in its runtime, with random inputs."""

    runtime: str
    """What executes it, with its version."""

    def run(self) -> None:
        """Run it once."""

    def close(self) -> None:
        """Release everything."""


class ProfilerTarget(Protocol):
    """Times and operator counts from a target's runtime; subclass it explicitly."""

    name: str = ""
    """What profiles: "onnxruntime"."""

    def open_graph(self, path: Path, *, threads: int | None = None) -> TimedGraph | None:
        """Any graph of the format with random inputs; None if only what edgeq wrote runs."""
        return None

    def count_operators(self, path: Path) -> OperatorCounts | None:
        """How many operators of each type a file has; None if `time_nodes` times them."""
        return None

    def time_nodes(
        self,
        path: Path,
        work: Callable[[Any], object],
        *,
        decoder: bool,
        skip: int,
        threads: int | None = None,
    ) -> tuple[list[NodeTime], int, int]:
        """Time the nodes of a file with the runtime's own profiler, in a session of its own.

        Args:
            path: the file or folder.
            work: runs it; called with a `DecoderRunner`, or else with a `TimedGraph`.
            decoder: which of the two.
            skip: number of first runs that are not counted.
            threads: threads of the runtime; all cores if None.

        Returns:
            the nodes in the order of their first execution, the number of runs counted, and the
            nanoseconds of those runs.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Target:
    """A target: a row of the table of targets.

    Args:
        name: as users write it.
        title: name of the runtime.
        description: what a conversion writes.
        suffixes: of files and packages of this format, lower case.
        folder_file: a file by which a folder of this format is known.
        output: what the output of a language model must end in; "" allows any file or folder.
        graph_outputs: what the output of a graph may end in, the default first.
        package: the output is a folder that systems show as one file, so that a certificate lies
            beside it and not inside.
        packages: import names of the packages that writing and validating needs.
        extra: the extra of edgeq that installs them; the name of the target if "".
        decoder, graph, profiler: make the parts; see the module.
    """

    name: str
    title: str
    description: str
    suffixes: tuple[str, ...] = ()
    folder_file: str = ""
    output: str = ""
    graph_outputs: tuple[str, ...] = ()
    package: bool = False
    packages: tuple[str, ...] = ()
    extra: str = ""
    decoder: Callable[[], DecoderTarget] | None = None
    graph: Callable[[], GraphTarget] | None = None
    profiler: Callable[[], ProfilerTarget] | None = None

    def check_output(self, path: Path, *, graph: bool) -> None:
        """Refuse an output that the runtime would not recognize by its name.

        Args:
            path: of the output.
            graph: it holds a graph, not a language model.

        Raises:
            UsageError: the name does not end as it must.
        """
        endings = self.graph_outputs if graph else (self.output,) if self.output else ()
        if endings and path.name and path.suffix not in endings:
            raise UsageError(
                f"{self.title} output must end in {' or '.join(endings)}, but --output is {path}; "
                f"use {path.with_suffix(endings[0])}"
            )

    def decoder_target(self) -> DecoderTarget:
        """The class that converts language models.

        Raises:
            UsageError: the target takes none.
        """
        if self.decoder is None:
            raise UsageError(f"the target {self.name} takes no language models, only graphs")
        return self.decoder()
