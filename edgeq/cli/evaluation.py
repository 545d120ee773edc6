"""``edgeq eval``: how many questions, or labelled samples, a model answers rightly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import click

from edgeq.cli import render
from edgeq.cli.eval_graph import eval_graph
from edgeq.cli.options import (
    SAMPLE_OPTIONS,
    backend_option,
    command,
    format_option,
    kv_bits_of,
    kv_options,
    model_argument,
    refuse_given,
    sample_options,
    shared_option,
    threads_option,
)
from edgeq.cli.warmup import compile_first

if TYPE_CHECKING:
    from edgeq.runtime.engine import Engine
    from edgeq.runtime.tokenizer import Tokenizer
    from edgeq.tasks import Outcome


OF_MODELS = ("task", "ctx_size", "kv_bits", "cache_type_k", "cache_type_v", "backend")
"""Options that graphs have no use for."""
OF_GRAPHS = ("scores", "confusion", *(name for name in SAMPLE_OPTIONS if name != "layout"))
"""Options that language models have no use for."""


@command("eval", "Ask a model the questions of a set, or measure a graph on samples.")
@model_argument
@click.option("--task", type=click.Path(exists=True, dir_okay=False), default=None,
              help="Language models: the set in JSON lines, as published: HellaSwag, MMLU, "
                   "LAMBADA or GSM8K.")  # fmt: skip
@click.option("--data", metavar="SAMPLES", default=None,
              help="Graphs: a folder of pictures for each class, an .npz file with labels, "
                   "sentences, or script.py:function.")  # fmt: skip
@click.option("--layout", default=None, show_default="told by the data",
              help="Of the set: hellaswag, mmlu, lambada or gsm8k. Of samples: nchw or nhwc, "
                   "where channels are.")  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), default=None,
              help="Only the first so many questions, or so many samples spread "
                   "evenly.")  # fmt: skip
@click.option("--base", "--against", "base", metavar="SRC", default=None,
              help="Ask this model too, and count the answers that differ; of graphs also the "
                   "cosine of the outputs.")  # fmt: skip
@click.option("--scores", metavar="NAME", default=None, show_default="the first",
              help="Graphs: the output with the scores or the embedding.")  # fmt: skip
@click.option("--confusion", metavar="FILE", type=click.Path(dir_okay=False), default=None,
              help="Graphs: write labels against answers to a .csv, .png, .svg or .pdf "
                   "file.")  # fmt: skip
@partial(sample_options, layout=False)
@shared_option("-c", "--ctx-size", env="CTX_SIZE", type=click.IntRange(min=2), default=2048,
               help="Most tokens of a question; never more than the model was "
                    "made for.")  # fmt: skip
@threads_option
@kv_options
@backend_option
@format_option("text", "json")
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
    """Score MODEL on a set of questions (--task) or on samples (--data).

    A language model is asked zero-shot, with the prompts of lm-evaluation-harness. A graph (.onnx,
    .ort, .tflite, .mlpackage) is run in its own runtime, a package for Core ML by edgeq: top-1,
    top-5 and AUC of labelled samples, and with --base agreement and cosine of any.

    With --base SRC both answer, and answers that changed are counted: a model may keep its
    accuracy and still have become another.
    """
    if (task is None) == (data is None):
        raise click.UsageError(
            "give either --task FILE, to ask a language model, or --data SAMPLES, to measure a "
            "graph"
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
    bits: Literal[8, 16],
    backend: str,
    form: str,
) -> None:
    """Ask a language model, and say how it answered."""
    from edgeq.importers import load
    from edgeq.runtime.engine import Engine
    from edgeq.runtime.tokenizer import Tokenizer
    from edgeq.tasks import evaluate_task, read_items

    name, items = read_items(task, layout, limit)
    loaded = load(model)
    other = load(base) if base is not None else None
    if other is not None and other.config.vocab != loaded.config.vocab:
        raise click.UsageError(
            f"--base has a vocabulary of {other.config.vocab} tokens and MODEL one of "
            f"{loaded.config.vocab}; give the model that MODEL was quantized from"
        )
    tokenizer = Tokenizer(loaded.files)
    compile_first(backend)
    settings: dict[str, Any] = {
        "context": min(context, loaded.config.context), "threads": threads, "kv_bits": bits,
        "backend": backend,
    }  # fmt: skip
    with Engine(loaded, **settings) as engine:
        beside = Engine(other, **settings) if other is not None else None
        try:
            with render.progress("asking") as bar:
                outcome = evaluate_task(
                    name, items, _Asked(engine, tokenizer), tokenizer,
                    base=_Asked(beside, tokenizer) if beside is not None else None, progress=bar,
                )  # fmt: skip
        finally:
            if beside is not None:
                beside.close()
    if form == "json":
        render.write(json.dumps(outcome.to_dict(), indent=2) + "\n")
    else:
        render.write(_text(outcome) + "\n")


class _Asked:
    """An engine as `edgeq.tasks` asks it; what two questions begin with is read once."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        from edgeq.runtime.generate import all_end_ids

        self._engine, self._ends = engine, all_end_ids(engine, tokenizer)
        self.context = engine.context

    def scores(self, prompt: list[int], continuation: list[int]) -> Any:
        """Logits from which each token of the continuation is predicted, [C, V]."""
        tokens = [*self._engine.reuse(prompt), *continuation[:-1]]
        return self._engine.forward(tokens, all_logits=True)[-len(continuation) :]

    def generate(self, prompt: list[int], n: int) -> Iterator[int]:
        """Greedy tokens after the prompt, at most n, none past the end of the text."""
        self._engine.reset()
        token = int(self._engine.forward(prompt).argmax())
        for left in range(min(n, self.context - len(prompt)), 0, -1):
            if token in self._ends:
                return
            yield token
            if left > 1:
                token = int(self._engine.forward([token]).argmax())


def _text(outcome: Outcome) -> str:
    rows = [
        ("layout", outcome.layout),
        ("protocol", outcome.protocol),
        ("questions", f"{outcome.n}"),
        ("right", _share(outcome.accuracy) + f" +- {100 * outcome.stderr:.2f}"),
        ("right, normalised", _share(outcome.accuracy_normalised)),
        ("nats per byte", "" if outcome.nll_per_byte is None else f"{outcome.nll_per_byte:.4f}"),
        ("beginnings cut", f"{outcome.truncated}" if outcome.truncated else ""),
        ("base right", _share(outcome.base_accuracy)),
    ]
    if outcome.flips is not None:
        rows.append(
            ("answers changed",
             f"{outcome.flips}, of which {outcome.flips_right} to right and "
             f"{outcome.flips_base_right} from right")
        )  # fmt: skip
    return "\n".join(f"{name:20s}{value}" for name, value in rows if value)


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"
