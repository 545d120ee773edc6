"""The steps of `edgeq.converters.convert.convert` for graphs of operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from edgeq.converters.options import Options
from edgeq.converters.targets import graph_target, target_named
from edgeq.converters.validate.graph import check_packed, compare_graph, with_options
from edgeq.converters.validate.report import ValidationReport
from edgeq.core.errors import UsageError
from edgeq.core.hashing import file_sha256
from edgeq.core.progress import Progress
from edgeq.graph.feeds import Feeds
from edgeq.graph.finite import check_finite_weights
from edgeq.graph.ir import Graph


class GraphConversion:
    """A conversion of a graph.

    Args:
        source: a graph, or the path of one: what ``edgeq quantize`` wrote, or a float model.
        target: name of the target.
        options: options of the conversion, all of them in ``extra``.
        shapes, samples, threads, progress, announce: as for `convert`.
        preset, max_ram: refused; they are for language models.

    Raises:
        UsageError: an argument is for language models.
    """

    def __init__(
        self,
        source: Graph | str | Path,
        target: str,
        options: Options,
        *,
        preset: str | None,
        shapes: Mapping[str, tuple[int, ...]] | None,
        samples: Iterable[Feeds] | None,
        max_ram: int | None,
        threads: int,
        progress: Progress | None,
        announce: Callable[[str], None] | None,
    ) -> None:
        if preset is not None or max_ram is not None or options != Options(extra=options.extra):
            raise UsageError(
                "preset, max_ram, context, kv, compute and prefill are for language models, and "
                "the source is a graph; give a graph's options as extra"
            )
        self._row, self._target = target_named(target), graph_target(target)
        self._source, self._options = source, dict(options.extra)
        self._shapes, self._samples = shapes, samples
        self._threads, self._progress, self._announce = threads, progress, announce
        self._graph: Graph | None = source if isinstance(source, Graph) else None

    @property
    def graph(self) -> Graph:
        """The graph, once it is read."""
        if self._graph is None:
            from edgeq.graph.files import read

            assert not isinstance(self._source, Graph)
            self._graph = read(self._source, shapes=self._shapes)
        return self._graph

    def check_name(self, path: Path) -> None:
        """Refuse an output of another kind, or in its own source's place."""
        self._row.check_output(path, graph=True)
        if not isinstance(self._source, Graph) and path.absolute() == Path(self._source).absolute():
            raise UsageError(f"{path} is the model to convert itself; give another --output")

    def prepare(self, folder: Path) -> None:
        """Read the graph, and refuse what the target cannot represent."""
        check_finite_weights(self.graph)
        self._target.check(self.graph, self._options)
        if self._announce:
            for remark in self._target.remarks(self.graph, self._options):
                self._announce(remark)

    def write(self, output: Path) -> None:
        """Write the output."""
        graph = with_options(self.graph, self._options)
        self._target.write(graph, output, self._options, self._progress)

    def validate(self, output: Path) -> ValidationReport:
        """Run the output and compare it with the graph."""
        return compare_graph(
            self.graph, output, self._row.name,
            samples=self._samples, threads=self._threads, progress=self._progress,
        )  # fmt: skip

    def check_written(self, output: Path) -> None:
        """Refuse an output in which a weight stayed float that the graph has as integers."""
        check_packed(self.graph, output, self._row.name)

    def source(self) -> Mapping[str, Any]:
        """Name and recipe of the graph, and its file if there is one."""
        about: dict[str, Any] = {
            "name": self.graph.name,
            "recipe": self.graph.meta.get("edgeq.recipe"),
        }
        if not isinstance(self._source, Graph):
            path = Path(self._source)
            about |= {"source": path.name, "source_sha256": file_sha256(path)}
        return about

    def versions(self) -> Mapping[str, str]:
        """The libraries that took part."""
        return self._target.versions()

    def arena_bytes(self) -> int | None:
        """Bytes of the activations at their peak."""
        return self._target.arena_bytes(self.graph, self._options)
