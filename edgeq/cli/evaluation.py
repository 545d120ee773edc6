"""``edgeq eval``: measure the accuracy of a model on questions or on labeled samples."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from edgeq.cli import render
from edgeq.cli.eval_graph import eval_graph
from edgeq.cli.options import (
    SAMPLE_OPTIONS,
    backend_option,
    command,
    kv_bits_of,
    kv_options,
    model_argument,
    refuse_given,
    result_options,
    sample_options,
    shared_option,
    threads_option,
)
from edgeq.cli.warmup import compile_first
from edgeq.model.kv_bits import KvBits

if TYPE_CHECKING:
    from edgeq.evaluation.tasks import Outcome


OF_MODELS = ("task", "ctx_size", "kv_bits", "cache_type_k", "cache_type_v", "backend")
"""Options for language models only."""
OF_GRAPHS = ("scores", "confusion", *(name for name in SAMPLE_OPTIONS if name != "layout"))
"""Options for graphs only."""


@command("eval", "Measure the accuracy of a model on a question set or on labeled samples.")
@model_argument
@click.option("--task", type=click.Path(exists=True, dir_okay=False), default=None,
              help="Language models: the question set as published (JSON lines): HellaSwag, MMLU, "
                   "LAMBADA or GSM8K.")  # fmt: skip
@click.option("--data", metavar="SAMPLES", default=None,
              help="Graphs: a folder with one subfolder of images per class, an .npz file with "
                   "labels, a file of sentences, or script.py:function.")  # fmt: skip
@click.option("--layout", default=None, show_default="detected from the data",
              help="Format of the question set: hellaswag, mmlu, lambada or gsm8k. Graphs: the "
                   "order of the axes: nchw or nhwc.")  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), default=None,
              help="Use only this many questions from the start, or this many samples spread "
                   "evenly.")  # fmt: skip
@click.option("--base", "--against", "base", metavar="MODEL", default=None,
              help="Also evaluate this model and count the answers that differ; for graphs, also "
                   "the cosine similarity of the outputs.")  # fmt: skip
@click.option("--scores", metavar="NAME", default=None, show_default="the first output",
              help="Graphs: the output that holds the class scores or the embedding.")  # fmt: skip
@click.option("--confusion", metavar="FILE", type=click.Path(dir_okay=False), default=None,
              help="Graphs: write the confusion matrix to a .csv or .svg file.")  # fmt: skip
@partial(sample_options, layout=False)
@shared_option("-c", "--ctx-size", env="CTX_SIZE", type=click.IntRange(min=2), default=2048,
               help="Longest question in tokens, at most the model's own context "
                    "length.")  # fmt: skip
@threads_option
@kv_options
@backend_option
@result_options("text", "json")
def evaluation(
    model: str,
    task: str | None,
    data: str | None,
    layout: str | None,
    limit: int | None,
    base: str | None,
    scores: str | None,
    confusion: str | None,
    ctx_size: int,
    threads: int | None,
    kv_bits: str,
    cache_type_k: str | None,
    cache_type_v: str | None,
    backend: str,
    form: str,
    **sample: Any,
) -> None:
    """Measure MODEL on a question set (--task) or on samples (--data).

    Language models are evaluated zero-shot with the prompts of lm-evaluation-harness. Graphs
    (.onnx, .ort, .tflite, .mlpackage) run in their own runtimes, Core ML packages in edgeq:
    top-1 and top-5 accuracy and AUC on labeled samples; with --base also agreement and cosine
    similarity, which need no labels.

    With --base, both models answer and the answers that changed are counted, since a quantized
    model can have the same accuracy and yet give different answers.
    """
    if (task is None) == (data is None):
        raise click.UsageError(
            "give either --task FILE for a language model or --data SAMPLES for a graph"
        )
    if data is not None:
        refuse_given(OF_MODELS, "language models (--task)")
        eval_graph(
            model, data, base=base, scores=scores, limit=limit, confusion=confusion,
            layout=layout, sample=sample, threads=threads, form=form,
        )  # fmt: skip
        return
    refuse_given(OF_GRAPHS, "graphs (--data)")
    assert task is not None
    _ask(
        model, task, layout, limit, base,
        context=ctx_size, threads=threads, backend=backend, form=form,
        bits=kv_bits_of(kv_bits, cache_type_k, cache_type_v),
    )  # fmt: skip


def _ask(
    model: str,
    task: str,
    layout: str | None,
    limit: int | None,
    base: str | None,
    *,
    context: int,
    threads: int | None,
    bits: KvBits,
    backend: str,
    form: str,
) -> None:
    """Evaluate a language model on a question set and print the result."""
    from edgeq.api.evaluate import evaluate

    compile_first(backend)
    with render.progress("Evaluating") as bar:
        outcome = evaluate(
            model, task, layout=layout, limit=limit, base=base, context=context, threads=threads,
            kv_bits=bits, backend=backend, progress=bar,
        )  # fmt: skip
    if form == "json":
        render.write(json.dumps(outcome.to_dict(), indent=2) + "\n")
    else:
        render.write(_text(outcome) + "\n")


def _text(outcome: Outcome) -> str:
    rows = [
        ("layout", outcome.layout),
        ("protocol", outcome.protocol),
        ("questions", f"{outcome.n}"),
        ("correct", _share(outcome.accuracy) + f" +- {100 * outcome.stderr:.2f}"),
        ("correct, normalized", _share(outcome.accuracy_normalized)),
        ("nats per byte", "" if outcome.nll_per_byte is None else f"{outcome.nll_per_byte:.4f}"),
        ("truncated", f"{outcome.truncated}" if outcome.truncated else ""),
        ("base correct", _share(outcome.base_accuracy)),
    ]
    if outcome.flips is not None:
        rows.append(
            ("answers changed",
             f"{outcome.flips}: {outcome.flips_right} from wrong to correct, "
             f"{outcome.flips_base_right} from correct to wrong")
        )  # fmt: skip
    return render.facts(rows, 20)


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"
