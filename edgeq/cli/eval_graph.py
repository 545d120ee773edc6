"""``edgeq eval`` for graphs of operators: labelled samples through any of their files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from edgeq.cli import render
from edgeq.cli.options import SAMPLE_OPTIONS
from edgeq.cli.quantize_graph import preprocess_of

if TYPE_CHECKING:
    from edgeq.converters.convert_graph import GraphRunner
    from edgeq.evaluation.graph import GraphEvaluation
    from edgeq.graph.ir import Graph
    from edgeq.quant.graph.samples import Samples

_SHOWN = 3
"""Pairs of classes that are named for being mixed up most."""


def eval_graph(
    model: str,
    data: str,
    *,
    base: str | None,
    scores: str | None,
    limit: int | None,
    confusion: str | None,
    layout: str | None,
    sample: Mapping[str, Any],
    threads: int | None,
    form: str,
) -> None:
    """Measure a graph and say what was found.

    Args:
        model: .onnx, .ort, .tflite or .mlpackage.
        data: what `edgeq.quant.graph.samples.open_samples` reads.
        base: another graph to compare with.
        scores: name of the output.
        confusion: the file to write the confusion matrix to.
        sample: values of `edgeq.cli.options.SAMPLE_OPTIONS` but the layout.
        limit, layout, threads, form: the options.
    """
    from edgeq.core.files import check_target
    from edgeq.evaluation.confusion_picture import check_ending, write_confusion
    from edgeq.evaluation.graph import evaluate_graph

    if confusion is not None:
        check_ending(Path(confusion))
        check_target(Path(confusion))
    runner, about = _opened(model, threads or 1)
    other = None
    try:
        if base is not None:
            other, _ = _opened(base, threads or 1)
            other = _alike(runner, other, model, base)
        samples = _samples(data, about, {**sample, "layout": layout or "auto"}, limit)
        with render.progress("Evaluating") as bar:
            found = evaluate_graph(
                runner, _pairs(samples), output=scores, against=other,
                classes=samples.classes, progress=bar,
            )  # fmt: skip
        runtimes = [runner.runtime, *([other.runtime] if other is not None else [])]
    finally:
        for opened in (runner, other):
            if opened is not None:
                opened.close()
    if confusion is not None:
        write_confusion(found, confusion)
    if form == "json":
        told = {"model": model, "runtime": runtimes[0], "samples": samples.source,
                "preprocess": json.loads(json.dumps(samples.preprocess.__dict__)),
                **found.to_dict()}  # fmt: skip
        render.write(json.dumps(told, indent=2) + "\n")
    else:
        render.write(_text(found, runtimes) + "\n")


def _opened(path: str, threads: int) -> tuple[GraphRunner, Graph]:
    """A runner, and a graph without operators that has the file's inputs and meta.

    A file that its runtime takes only from edgeq is read as a graph and run by onnxruntime; a
    .tflite file that is no graph of floats runs in LiteRT as it is.
    """
    from edgeq.converters.convert_graph import open_graph
    from edgeq.converters.tflite.foreign import ForeignTflite
    from edgeq.core.errors import FormatError, UnsupportedError
    from edgeq.graph.execute import Session
    from edgeq.graph.files import graph_format, read
    from edgeq.graph.ir import Graph

    try:
        runner = open_graph(path, threads=threads)
    except FormatError:
        if graph_format(path) is None or not Path(path).is_file():
            raise
        try:
            graph = read(path)
            return Session(graph, threads=threads), graph
        except (FormatError, UnsupportedError):
            if graph_format(path) != "tflite":
                raise
            runner = ForeignTflite(path, threads=threads)
    values = {**runner.inputs, **runner.outputs}
    inputs, outputs = tuple(runner.inputs), tuple(runner.outputs)
    about = Graph(Path(path).stem, inputs, outputs, (), {}, values, meta=runner.metadata)
    return runner, about


class _Renamed:
    """A runner with other names for its inputs and outputs, in the same order."""

    def __init__(self, runner: GraphRunner, like: GraphRunner) -> None:
        self._runner = runner
        self._names = dict(zip(like.inputs, runner.inputs, strict=True))
        self._made = dict(zip(runner.outputs, like.outputs, strict=True))
        self.runtime, self.metadata = runner.runtime, runner.metadata
        self.inputs, self.outputs = like.inputs, like.outputs
        self.close = runner.close

    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        found = self._runner({self._names[name]: array for name, array in feeds.items()})
        return {self._made[name]: array for name, array in found.items()}


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
        told = [", ".join(f"{name} {list(info.shape)}" for name, info in one.inputs.items())
                for one in (runner, other)]  # fmt: skip
        raise click.UsageError(
            f"{model} has the inputs {told[0]}, but {base} has {told[1]}; give files that were "
            "made from the same model"
        )
    return other


def _samples(data: str, about: Graph, sample: Mapping[str, Any], limit: int | None) -> Samples:
    from edgeq.quant.graph.images import Preprocess
    from edgeq.quant.graph.samples import open_samples

    ctx = click.get_current_context()
    said = any(
        ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
        for name in SAMPLE_OPTIONS
        if name != "tokenizer"
    )
    preprocess = preprocess_of(sample) if said else Preprocess.from_meta(about.meta)
    return open_samples(
        data, about, preprocess=preprocess, tokenizer=sample["tokenizer"], limit=limit
    )


def _pairs(samples: Samples) -> Iterator[tuple[Any, int | None]]:
    """Samples with their labels if the first has one."""
    from edgeq.core.errors import UsageError

    try:
        next(samples.first(1).pairs())
    except UsageError:
        return ((feeds, None) for feeds in samples)
    return iter(samples.pairs())


def _text(found: GraphEvaluation, runtimes: list[str]) -> str:
    share: Callable[[float | None], str] = lambda x: "" if x is None else f"{100 * x:.2f} %"  # noqa: E731
    number: Callable[[float | None], str] = lambda x: "" if x is None else f"{x:.5f}"  # noqa: E731
    top1 = share(found.top1)
    if found.stderr is not None:
        top1 += f" +- {100 * found.stderr:.2f}"
    rows = [
        ("runtime", runtimes[0]),
        ("compared with", ", ".join(runtimes[1:])),
        ("output", found.output),
        ("samples", f"{found.n}"),
        ("top-1", top1),
        ("top-1 of the base", share(found.base_top1)),
        ("top-5", share(found.top5)),
        ("AUC", number(found.auc)),
        ("agreement", share(found.agreement)),
        ("cosine, mean", number(found.cosine)),
        ("cosine, minimum", number(found.cosine_least)),
        *(("confused" if not i else "", line) for i, line in enumerate(_mixed_up(found))),
    ]
    return render.facts(rows, 20)


def _mixed_up(found: GraphEvaluation) -> list[str]:
    """The pairs of classes with most errors."""
    counts = found.confusion or ()
    named = len(found.classes) == len(counts)
    name = found.classes.__getitem__ if named else str
    pairs = [(n, i, j) for i, row in enumerate(counts) for j, n in enumerate(row) if i != j and n]
    worst = sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))[:_SHOWN]
    return [f"{name(i)} predicted as {name(j)}: {n}" for n, i, j in worst]
