"""``edgeq perplexity``: measure how well a model predicts a text, and the loss of quantization."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeq.cli import render
from edgeq.cli.options import (
    backend_option,
    command,
    kv_bits_of,
    kv_options,
    model_argument,
    result_options,
    shared_option,
    threads_option,
)
from edgeq.cli.warmup import compile_first
from edgeq.core.documents import read_text

if TYPE_CHECKING:
    from edgeq.evaluation.text import Evaluation


@command("perplexity", "Measure the perplexity of a model on a text.")
@model_argument
@click.option(
    "-f", "--file", "text_file", type=click.Path(exists=True, dir_okay=False), required=True,
    help="The text to score, UTF-8.",
)  # fmt: skip
@shared_option(
    "-c", "--ctx-size", env="CTX_SIZE", type=click.IntRange(min=2), default=512,
    help="Tokens in each window, at most the model's own context length.",
)  # fmt: skip
@click.option("--chunks", type=click.IntRange(min=1), default=None,
              help="Use only this many windows from the start of the text.")  # fmt: skip
@click.option(
    "--score", type=click.Choice(["all", "half"]), default="all",
    help="all: score every token of a window but the first. half: score the second half of each "
    "window, as llama.cpp does.",
)  # fmt: skip
@click.option("--kl-base", metavar="MODEL", default=None,
              help="Compare with this model, such as the float model, run in float32.")  # fmt: skip
@threads_option
@kv_options
@backend_option
@result_options("text", "json")
def perplexity(
    model: str,
    text_file: str,
    ctx_size: int,
    chunks: int | None,
    score: Any,
    kl_base: str | None,
    threads: int | None,
    kv_bits: str,
    cache_type_k: str | None,
    cache_type_v: str | None,
    backend: str,
    form: str,
) -> None:
    """Score a text with MODEL: perplexity, bits per byte, and KL divergence from another model.

    Perplexities are comparable only with the same tokenizer, context length and protocol, so the
    protocol is printed as well. Bits per byte are comparable across tokenizers.
    """
    from edgeq.api.evaluate import perplexity as measure

    text = read_text(Path(text_file))
    compile_first(backend)
    bits = kv_bits_of(kv_bits, cache_type_k, cache_type_v)
    with render.progress("Measuring perplexity") as bar:
        result = measure(
            model, text, context=ctx_size, windows=chunks, score=score, base=kl_base,
            threads=threads, kv_bits=bits, backend=backend, progress=bar,
        )  # fmt: skip
    if form == "json":
        render.write(json.dumps(result.to_dict(), indent=2) + "\n")
    else:
        render.write(_text(result) + "\n")


def _text(result: Evaluation) -> str:
    rows = [
        ("protocol", result.protocol),
        ("tokens scored", f"{result.n_tokens}"),
        ("nats per token", f"{result.nll_per_token:.4f}"),
        ("perplexity", f"{result.ppl:.4f}"),
        ("bits per byte", _number(result.bits_per_byte)),
        ("KL mean, nats", _number(result.kl_mean)),
        ("KL 99th percentile", _number(result.kl_p99)),
        ("KL maximum", _number(result.kl_max)),
        (
            "same top token",
            "" if result.top1_agreement is None else f"{100 * result.top1_agreement:.2f} %",
        ),
    ]
    return render.facts(rows, 20)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"
