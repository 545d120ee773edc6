"""``edgeq rerank``: the relevance of documents to a query."""

from __future__ import annotations

import json
from typing import Any

import click

from edgeq.cli import render
from edgeq.cli.embed import file_option, listed_texts, short
from edgeq.cli.options import command, engine_options, model_argument, result_options
from edgeq.cli.run import engine_arguments
from edgeq.cli.warmup import compile_first


@command("rerank", "Order documents by their relevance to a query.")
@model_argument
@click.argument("query")
@click.argument("documents", metavar="[DOCUMENT]...", nargs=-1)
@file_option("documents")
@click.option("--instruction", default=None, metavar="TEXT", show_default="a web search",
              help="How documents are judged.")  # fmt: skip
@click.option("-n", "--top-n", type=click.IntRange(min=1), default=None, show_default="all",
              help="How many of the most relevant documents to show.")  # fmt: skip
@engine_options
@result_options("text", "json")
def rerank(
    model: str,
    query: str,
    documents: tuple[str, ...],
    text_file: str | None,
    instruction: str | None,
    top_n: int | None,
    form: str,
    **settings: Any,
) -> None:
    """Order each DOCUMENT by its relevance to QUERY, as MODEL (Qwen3-Reranker) judges it.

    A score is the probability, of 0 to 1, that a document is relevant.
    """
    from edgeq.api.embed import rerank as made

    listed = listed_texts(documents, text_file, "DOCUMENT")
    how = engine_arguments(settings)
    compile_first(how["backend"])
    with render.progress("Ranking") as bar:
        scores = made(model, query, listed, instruction=instruction, progress=bar, **how).tolist()
    order = sorted(range(len(listed)), key=lambda number: -scores[number])[:top_n]
    if form == "json":
        results = [
            {"index": number, "relevance_score": scores[number], "document": listed[number]}
            for number in order
        ]
        render.write(json.dumps({"model": model, "query": query, "results": results}) + "\n")
        return
    rows = [[f"{scores[number]:.4f}", short(listed[number])] for number in order]
    render.write(render.aligned(["score", "document"], rows, "rl") + "\n")
