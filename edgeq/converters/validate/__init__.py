"""Whether a converted file computes what its source does.

    report                 what is measured
    decoder                language models: everything below, and the first step that differs
    graph                  graphs of operators: integers, constants, outputs
    integers, constants    what the file stores, read back and compared
    logits, prompts        what it generates
    bisect, kernels        the first step whose result differs, and how kernels round
    tokenizer, hard_strings    what it makes of texts
    graph_inputs, graph_rounding, graph_tolerance    how far right runtimes lie apart

`validate` does it for any file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.core.progress import Progress

if TYPE_CHECKING:
    from edgeq.converters.validate.report import ValidationReport
    from edgeq.graph.feeds import Feeds
    from edgeq.graph.ir import Graph
    from edgeq.model.model import Model

__all__ = ["validate"]


def validate(
    path: str | Path,
    source: Model | Graph | str | Path | None = None,
    target: str | None = None,
    *,
    steps: int = 8,
    prompts: Sequence[Sequence[int]] | None = None,
    samples: Iterable[Feeds] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> ValidationReport:
    """Run a converted file in its own runtime and compare it with its source.

    Args:
        path: the converted file or folder.
        source: the model or graph that it was converted from, or the path of that. Without one,
            the file is run once on random inputs, where the target can run any file.
        target: what it was converted to; None tells it by the name and content of ``path``.
        steps: decoders: greedy tokens decoded after each prompt, at least 2. The text on which
            the cost of a target's rounding is measured is 36 times as long.
        prompts: decoders: token ids; None takes three prompts of different lengths.
        samples: graphs: real inputs; None takes those stored with the calibration, or random ones.
        threads: threads of the target's runtime; None takes all cores, or 1 for graphs.
        progress: called with what is done, how far, and of how much.
        announce: called with a sentence that says how long it will take, if that is long.

    Raises:
        UsageError: an unknown target, too few steps, no room for a prompt, a file with other
            inputs or outputs than the source, or no source where the target needs one.
        MissingDependencyError: the target's runtime is not installed.
        FormatError: the target does not open the file, or edgeq did not write it.

    Example:
        >>> conversion = edgeq.convert("model.edgeq", "gguf", "checked.gguf", validate=False)
        >>> edgeq.validate("checked.gguf", "model.edgeq").passed
        True
    """
    from edgeq.converters.targets import graph_target_of, target_named, target_of
    from edgeq.converters.validate.report import ValidationReport
    from edgeq.graph.ir import Graph

    path = Path(path)
    if source is None:
        name = target or target_of(path)
        execution = target_named(name).decoder_target().execute(path)
        return ValidationReport(name, execution.runtime, execution=execution)
    opened = _opened(source, path) if isinstance(source, str | Path) else source
    if isinstance(opened, Graph):
        from edgeq.converters.validate.graph import validate_graph

        return validate_graph(
            opened, path, target or graph_target_of(path),
            samples=samples, threads=threads or 1, progress=progress,
        )  # fmt: skip
    from edgeq.converters.validate.decoder import validate_decoder

    return validate_decoder(
        path, opened, target or target_of(path),
        steps=steps, prompts=prompts, threads=threads, progress=progress, announce=announce,
    )  # fmt: skip


def _opened(source: str | Path, path: Path) -> Model | Graph:
    from edgeq.importers import load, source_kind

    if source_kind(source) != "graph":
        return load(source)
    from edgeq.converters.validate.graph import read_source

    return read_source(source, path)
