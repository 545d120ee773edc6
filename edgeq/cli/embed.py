"""``edgeq embed``: vectors of texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from edgeq.cli import render
from edgeq.cli.options import Decorator, command, engine_options, model_argument, result_options
from edgeq.cli.run import engine_arguments
from edgeq.cli.warmup import compile_first
from edgeq.core.documents import read_text

_SHOWN = 60
"""Characters of a text in a table."""


def file_option(what: str) -> Decorator:
    """The option that reads texts from a file."""
    return click.option(
        "-f", "--file", "text_file", type=click.Path(exists=True, dir_okay=False), default=None,
        help=f"Read {what} from this UTF-8 file, one on each line.",
    )  # fmt: skip


@command("embed", "Turn texts into vectors.")
@model_argument
@click.argument("texts", metavar="[TEXT]...", nargs=-1)
@file_option("texts")
@click.option("--pooling", type=click.Choice(["last", "mean", "cls"]), default=None,
              show_default="what the model's files say",
              help="Take the hidden state of the last token, the mean of all, or the first "
                   "token's.")  # fmt: skip
@click.option("--dimensions", type=click.IntRange(min=1), default=None, show_default="all",
              help="Keep only the first so many numbers of a vector, for models that were trained "
                   "so (Matryoshka).")  # fmt: skip
@click.option("--prefix", default=None, metavar="TEXT",
              help="Text that is put before each text.")  # fmt: skip
@click.option("--prompt-name", default=None, metavar="NAME",
              help="Put a prompt of the model's files before texts, such as query.")  # fmt: skip
@click.option("--normalize/--no-normalize", default=True,
              help="Make the length of each vector one.")  # fmt: skip
@click.option("--tokenizer", type=click.Path(exists=True, file_okay=False), default=None,
              show_default="the file's own, or the one above it",
              help="Encoders as .onnx, .ort or .tflite: the folder of the tokenizer and of the "
                   "other files of the model.")  # fmt: skip
@click.option("--base", metavar="MODEL", default=None,
              help="Report how far the vectors are from those of this model, such as the float "
                   "model.")  # fmt: skip
@engine_options
@result_options("text", "json")
def embed(
    model: str,
    texts: tuple[str, ...],
    text_file: str | None,
    pooling: str | None,
    dimensions: int | None,
    prefix: str | None,
    prompt_name: str | None,
    normalize: bool,
    tokenizer: str | None,
    base: str | None,
    form: str,
    **settings: Any,
) -> None:
    """Turn each TEXT into a vector by MODEL, a language model or the file of an encoder.

    The text result has the cosine of each text with the first one; --format json has the vectors.
    """
    from edgeq.api.embed import embed as made

    listed = listed_texts(texts, text_file, "TEXT")
    how = {
        "pooling": pooling, "dimensions": dimensions, "prompt": prefix, "prompt_name": prompt_name,
        "normalize": normalize, "tokenizer": tokenizer, **engine_arguments(settings),
    }  # fmt: skip
    compile_first(how["backend"])
    with render.progress("Embedding") as bar:
        vectors = made(model, listed, progress=bar, **how)
        theirs = None if base is None else made(base, listed, progress=bar, **how)
    beside = None if theirs is None else _cosines(vectors, theirs)
    if form == "json":
        result: dict[str, Any] = {
            "model": model,
            "dimensions": vectors.shape[1],
            "embeddings": [vector.tolist() for vector in vectors],
        }
        if beside is not None:
            result |= {"base": base, "cosines_to_base": beside}
        render.write(json.dumps(result) + "\n")
        return
    head = ["cosine with the first", *([] if beside is None else ["cosine with the base"]), "text"]
    rows = [[f"{cosine:.4f}"] for cosine in _cosines(vectors, vectors[:1])]
    for number, row in enumerate(rows):
        row += [] if beside is None else [f"{beside[number]:.5f}"]
        row.append(short(listed[number]))
    render.write(render.aligned(head, rows, "r" * (len(head) - 1) + "l") + "\n")
    about = f"{len(vectors)} vectors of {vectors.shape[1]} numbers"
    if beside is not None:
        mean = sum(beside) / len(beside)
        about += f"; cosine with the base: mean {mean:.5f}, least {min(beside):.5f}"
    render.write(about + "\n")


def listed_texts(given: tuple[str, ...], file: str | None, name: str) -> list[str]:
    """The texts of the arguments or of a file's lines.

    Raises:
        click.UsageError: there are none, or both are given.
    """
    if bool(given) == (file is not None):
        raise click.UsageError(f"give each {name} as an argument, or all of them with --file FILE")
    if file is None:
        return list(given)
    lines = [line for line in read_text(Path(file)).splitlines() if line.strip()]
    if not lines:
        raise click.UsageError(f"{file} has no line with a text")
    return lines


def _cosines(vectors: Any, others: Any) -> list[float]:
    """Cosine of each vector with the other of its row, or with the only other one."""
    import numpy as np

    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(others, axis=1)
    return [float(cosine) for cosine in (vectors * others).sum(axis=1) / lengths]


def short(text: str) -> str:
    """A text on one line of a table."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else line[: _SHOWN - 3] + "..."
