"""``edgeq eval`` for graphs: accuracy on labeled samples, for any file of a graph."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from edgeq.cli import render
from edgeq.cli.options import SAMPLE_OPTIONS
from edgeq.cli.quantize_graph import preprocess_of

if TYPE_CHECKING:
    from edgeq.evaluation.graph import GraphEvaluation
    from edgeq.quant.graph.images import Preprocess

_SHOWN = 3
"""Number of most confused pairs of classes that are named."""


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
    """Measure a graph and print the result.

    Args:
        model: path of an .onnx, .ort, .tflite or .mlpackage.
        data: a source that `edgeq.quant.graph.samples.open_samples` reads.
        base: path of another graph to compare with.
        scores: name of the output with the scores.
        confusion: file to which the confusion matrix is written.
        sample: values of the options `edgeq.cli.options.SAMPLE_OPTIONS` except the layout.
        limit, layout, threads, form: values of the options of these names.
    """
    from edgeq.api.evaluate_graph import evaluate_graph
    from edgeq.core.files import check_target
    from edgeq.evaluation.confusion import check_suffix, write_confusion

    if confusion is not None:
        check_suffix(Path(confusion))
        check_target(Path(confusion))
    with render.progress("Evaluating") as bar:
        result = evaluate_graph(
            model, data, base=base, output=scores, limit=limit,
            preprocess=_given_preprocess({**sample, "layout": layout or "auto"}),
            tokenizer=sample["tokenizer"], threads=threads or 1, progress=bar,
        )  # fmt: skip
    evaluation = result.evaluation
    if confusion is not None:
        write_confusion(evaluation, confusion)
    if form == "json":
        record = {"model": model, "runtime": result.runtimes[0], "samples": result.samples,
                  "preprocess": json.loads(json.dumps(result.preprocess.__dict__)),
                  **evaluation.to_dict()}  # fmt: skip
        render.write(json.dumps(record, indent=2) + "\n")
    else:
        render.write(_text(evaluation, result.runtimes) + "\n")


def _given_preprocess(sample: Mapping[str, Any]) -> Preprocess | None:
    """The preprocessing that the options give; None without options, for that of the model."""
    ctx = click.get_current_context()
    given = any(
        ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
        for name in SAMPLE_OPTIONS
        if name != "tokenizer"
    )
    return preprocess_of(sample) if given else None


def _text(evaluation: GraphEvaluation, runtimes: Sequence[str]) -> str:
    share: Callable[[float | None], str] = lambda x: "" if x is None else f"{100 * x:.2f} %"  # noqa: E731
    number: Callable[[float | None], str] = lambda x: "" if x is None else f"{x:.5f}"  # noqa: E731
    top1 = share(evaluation.top1)
    if evaluation.stderr is not None:
        top1 += f" +- {100 * evaluation.stderr:.2f}"
    rows = [
        ("runtime", runtimes[0]),
        ("compared with", ", ".join(runtimes[1:])),
        ("output", evaluation.output),
        ("samples", f"{evaluation.n}"),
        ("top-1", top1),
        ("top-1 of the base", share(evaluation.base_top1)),
        ("top-5", share(evaluation.top5)),
        ("AUC", number(evaluation.auc)),
        ("agreement", share(evaluation.agreement)),
        ("cosine, mean", number(evaluation.cosine)),
        ("cosine, minimum", number(evaluation.cosine_least)),
        *(("confused" if not i else "", line) for i, line in enumerate(_mixed_up(evaluation))),
    ]
    return render.facts(rows, 20)


def _mixed_up(evaluation: GraphEvaluation) -> list[str]:
    """The pairs of classes that are confused most often, as text."""
    counts = evaluation.confusion or ()
    named = len(evaluation.classes) == len(counts)
    name = evaluation.classes.__getitem__ if named else str
    pairs = [(n, i, j) for i, row in enumerate(counts) for j, n in enumerate(row) if i != j and n]
    worst = sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))[:_SHOWN]
    return [f"{name(i)} predicted as {name(j)}: {n}" for n, i, j in worst]
