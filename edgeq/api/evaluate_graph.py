"""Accuracy of graphs on labeled samples, and their distance from another graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeq.converters.runners import GraphRunner
from edgeq.converters.targets import open_graph, opens_as_graph
from edgeq.converters.tflite.foreign import read_or_open
from edgeq.core.errors import UsageError
from edgeq.core.progress import Progress
from edgeq.evaluation.graph import GraphEvaluation
from edgeq.evaluation.graph import evaluate_graph as evaluate_runner
from edgeq.graph.execute import Session
from edgeq.graph.files import graph_format
from edgeq.graph.ir import Graph
from edgeq.quant.graph.images import Preprocess
from edgeq.quant.graph.samples import Samples, open_samples


@dataclass(frozen=True)
class GraphAccuracy:
    """The result of `evaluate_graph`.

    Args:
        evaluation: accuracy, agreement and similarity.
        runtimes: names of the runtimes of the graph and of the base, if there is one.
        samples: where the samples came from.
        preprocess: how images became inputs.
    """

    evaluation: GraphEvaluation
    runtimes: tuple[str, ...]
    samples: str
    preprocess: Preprocess


def evaluate_graph(
    model: str | Path,
    data: str | Path,
    *,
    base: str | Path | None = None,
    output: str | None = None,
    limit: int | None = None,
    preprocess: Preprocess | None = None,
    tokenizer: str | Path | None = None,
    threads: int = 1,
    progress: Progress | None = None,
) -> GraphAccuracy:
    """Measure a graph on labeled samples, and how far its outputs are from another graph's.

    Graphs run in their own runtimes, Core ML packages in edgeq. Labels give top-1 and top-5
    accuracy and AUC; a base gives agreement and cosine similarity, which need no labels.

    Args:
        model: an .onnx, .ort, .tflite or .mlpackage file.
        data: a folder with one subfolder of images per class, an .npz file with labels, a file of
            sentences, or ``script.py:function``.
        base: another graph with the same inputs, such as the float model.
        output: the output that holds the class scores or the embedding; the first if None.
        limit: use only this many samples, spread evenly.
        preprocess: how images become inputs; as the model file says if None.
        tokenizer: the tokenizer.json for sentences, or the folder that contains it.
        threads: of the runtimes.
        progress: called after every sample.

    Raises:
        FormatError: a file cannot be read.
        UsageError: neither labels nor a base, or graphs with different inputs.
        MissingDependencyError: a runtime is not installed.

    Example:
        >>> result = edgeq.evaluate_graph("graph.onnx", "samples.npz", base="graph.onnx")
        >>> result.evaluation.n, round(result.evaluation.cosine, 3)
        (4, 1.0)
    """
    model, other = str(model), None
    runner, about = opened_graph(Path(model), threads)
    try:
        if base is not None:
            other, _ = opened_graph(Path(base), threads)
            other = _alike(runner, other, model, str(base))
        samples = open_samples(
            str(data), about, preprocess=preprocess or Preprocess.from_meta(about.meta),
            tokenizer=None if tokenizer is None else str(tokenizer), limit=limit,
        )  # fmt: skip
        evaluation = evaluate_runner(
            runner, _pairs(samples), output=output, against=other,
            classes=samples.classes, progress=progress,
        )  # fmt: skip
        runtimes = (runner.runtime, *([other.runtime] if other is not None else []))
    finally:
        for opened in (runner, other):
            if opened is not None:
                opened.close()
    return GraphAccuracy(evaluation, runtimes, samples.source, samples.preprocess)


def opened_graph(path: Path, threads: int) -> tuple[GraphRunner, Graph]:
    """A runner, and a graph without operators that has the file's inputs and meta.

    A file that its runtime takes only from edgeq is read as a graph and run by onnxruntime; a
    .tflite file that is no graph of floats runs in LiteRT as it is.
    """
    runner: GraphRunner
    if opens_as_graph(path) or graph_format(path) is None or not path.is_file():
        runner = open_graph(path, threads=threads)
    else:
        opened = read_or_open(path, threads=threads)
        if isinstance(opened, Graph):
            return Session(opened, threads=threads), opened
        runner = opened
    values = {**runner.inputs, **runner.outputs}
    inputs, outputs = tuple(runner.inputs), tuple(runner.outputs)
    about = Graph(path.stem, inputs, outputs, (), {}, values, meta=runner.metadata)
    return runner, about


class _Renamed:
    """A runner with other names for its inputs and outputs, in the same order."""

    def __init__(self, runner: GraphRunner, like: GraphRunner) -> None:
        self._runner = runner
        self._names = dict(zip(like.inputs, runner.inputs, strict=True))
        self._made = dict(zip(runner.outputs, like.outputs, strict=True))
        self.runtime, self.metadata = runner.runtime, runner.metadata
        self.precision = runner.precision
        self.inputs, self.outputs = like.inputs, like.outputs
        self.close = runner.close

    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        results = self._runner({self._names[name]: array for name, array in feeds.items()})
        return {self._made[name]: array for name, array in results.items()}


def _alike(runner: GraphRunner, other: GraphRunner, model: str, base: str) -> GraphRunner:
    """The second runner with the first one's names.

    Raises:
        UsageError: they take other inputs.
    """
    ends = [list(one.inputs.values()) for one in (runner, other)]
    count = [len(one.outputs) for one in (runner, other)]
    if ends[0] == ends[1] and count[0] == count[1]:
        named = list(runner.inputs) == list(other.inputs)
        same = named and list(runner.outputs) == list(other.outputs)
        return (
            other if same or set(runner.outputs) == set(other.outputs) else _Renamed(other, runner)
        )
    if dict(runner.inputs) != dict(other.inputs):
        listed = [", ".join(f"{name} {list(info.shape)}" for name, info in one.inputs.items())
                for one in (runner, other)]  # fmt: skip
        raise UsageError(
            f"{model} has the inputs {listed[0]}, but {base} has {listed[1]}; give files that were "
            "made from the same model"
        )
    return other


def _pairs(samples: Samples) -> Iterator[tuple[Any, int | None]]:
    """Samples with their labels if the first has one."""
    try:
        next(samples.first(1).pairs())
    except UsageError:
        return ((feeds, None) for feeds in samples)
    return iter(samples.pairs())
