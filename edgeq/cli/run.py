"""``edgeq run``: answer a question, or continue a text."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeq.cli import render
from edgeq.cli.answer_options import draft_option, lookup_option, mtp_option, schema_option
from edgeq.cli.options import (
    command,
    engine_options,
    kv_bits_of,
    model_argument,
    sampling_options,
)
from edgeq.cli.plan import fit_option, refuse_what_cannot_fit
from edgeq.cli.terminal import LiveRate
from edgeq.cli.warmup import compile_first

if TYPE_CHECKING:
    from edgeq.runtime.generate import Chunk
    from edgeq.runtime.sampling import SamplingParams


@command("run", "Answer a question, or continue a text.")
@model_argument
@click.argument("question", metavar="[PROMPT]", required=False)
@click.option("-p", "--prompt", default=None, help="The prompt; the same as the PROMPT argument.")
@click.option(
    "-f",
    "--file",
    "prompt_file",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    default=None,
    help="Read the prompt from this file; - reads standard input.",
)
@click.option(
    "--raw",
    is_flag=True,
    show_default=False,
    help="Continue the prompt as plain text even if the model has a chat template.",
)
@click.option(
    "-n",
    "--n-predict",
    "--predict",
    "--max-tokens",
    type=click.IntRange(min=-1),
    default=128,
    help="Maximum number of tokens to generate; -1 generates until the end-of-text token or until "
    "the context is full.",
)
@click.option(
    "--prompt-cache",
    type=click.Path(dir_okay=False),
    default=None,
    help="Save the KV cache of the prompt to this file. A later prompt that starts with the same "
    "tokens reuses the saved cache and only processes the rest.",
)
@click.option(
    "--prompt-cache-all",
    is_flag=True,
    show_default=False,
    help="Save the KV cache of the generated text to that file as well.",
)
@lookup_option
@draft_option
@mtp_option
@schema_option
@sampling_options
@engine_options
@fit_option
@click.option(
    "--stream/--no-stream",
    default=True,
    help="Print the text token by token, or all of it at the end.",
)
def run(
    model: str,
    question: str | None,
    prompt: str | None,
    prompt_file: str | None,
    raw: bool,
    n_predict: int,
    stream: bool,
    prompt_cache: str | None,
    prompt_cache_all: bool,
    force: bool,
    **settings: Any,
) -> None:
    """Answer PROMPT with MODEL (an .edgeq file, a checkpoint folder or a GGUF file).

    A model with a chat template is given the prompt as a user's message, and its answer goes to
    stdout. Without a template, or with --raw, the model continues the prompt as plain text, and
    the prompt and its continuation go to stdout. A line of timings goes to stderr.
    """
    from edgeq.api.run import run as answer
    from edgeq.importers import load
    from edgeq.importers.tokenizer.chat_templates import chat_templates

    if prompt_cache_all and prompt_cache is None:
        raise click.UsageError("--prompt-cache-all needs --prompt-cache FILE, the file to save to")
    text = prompt_text(question, prompt, prompt_file)
    params = sampling_params(settings)
    engine_settings = engine_arguments(settings)
    loaded = load(model)
    draft = None if settings["draft"] is None else load(settings["draft"])
    if not force:
        refuse_what_cannot_fit(loaded, model, engine_settings, draft)
    chat = bool(chat_templates(loaded.files)) and not raw
    compile_first(engine_settings["backend"])
    chunks = answer(
        loaded, text, params, max_tokens=None if n_predict < 0 else n_predict,
        stop=settings["stop"], raw=raw, lookup=settings["lookup"],
        json_schema=settings["json_schema"], prompt_cache=prompt_cache,
        prompt_cache_all=prompt_cache_all, draft=draft, mtp=settings["mtp"], **engine_settings,
    )  # fmt: skip
    with closing(chunks), LiveRate() as rate:
        unprinted = ["" if chat else text]
        last: Chunk | None = None
        try:
            if stream:
                render.generated(unprinted.pop())
            for last in chunks:
                rate.show(last)
                if stream:
                    render.generated(last.text)
                else:
                    unprinted.append(last.text)
        finally:  # after Ctrl-C too, write the text so far and end the line
            render.generated("".join(unprinted) + "\n")
    if last is not None:
        how = "chat template (--raw continues the plain text)" if chat else ""
        render.note(timing(last, how))


def prompt_text(question: str | None, prompt: str | None, prompt_file: str | None) -> str:
    """The prompt from the argument or one of the options.

    Raises:
        click.UsageError: the prompt is given nowhere or more than once, or is not UTF-8.
    """
    if sum(given is not None for given in (question, prompt, prompt_file)) != 1:
        raise click.UsageError(
            'give one prompt: edgeq run MODEL "PROMPT", --prompt TEXT or --file FILE'
        )
    prompt = question if prompt is None else prompt
    if prompt is not None:
        return prompt
    assert prompt_file is not None
    raw = sys.stdin.buffer.read() if prompt_file == "-" else Path(prompt_file).read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as err:
        raise click.UsageError(f"{prompt_file} is not UTF-8 text: {err}") from err


def sampling_params(settings: dict[str, Any]) -> SamplingParams:
    """`SamplingParams` from the options of `sampling_options`."""
    from edgeq.runtime.sampling import SamplingParams

    return SamplingParams(
        temperature=settings["temp"],
        top_k=settings["top_k"],
        top_p=settings["top_p"],
        min_p=settings["min_p"],
        repetition_penalty=settings["repeat_penalty"],
        repeat_last_n=settings["repeat_last_n"],
        seed=None if settings["seed"] < 0 else settings["seed"],
    )


def engine_arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `Engine` from the options of `engine_options`."""
    return {
        "context": settings["ctx_size"] or None,
        "threads": settings["threads"],
        "kv_bits": kv_bits_of(
            settings["kv_bits"], settings["cache_type_k"], settings["cache_type_v"]
        ),
        "backend": settings["backend"],
        "mmap": settings["mmap"],
    }


def timing(chunk: Chunk, how: str = "") -> str:
    """The timings of an answer: ``[prompt 5 tokens in 0.01 s, 610.2 tok/s | ...]``.

    Args:
        chunk: the last chunk of the answer.
        how: a remark that is put first.
    """
    reused = f" ({chunk.n_reused} before it reused)" if chunk.n_reused else ""
    parts = [how] if how else []
    parts += [
        f"prompt {chunk.n_prompt} tokens{reused} in {chunk.prefill_s:.2f} s"
        + _rate(chunk.prefill_tokens_per_s),
        f"generated {chunk.n_generated} tokens in {chunk.decode_s:.2f} s"
        + _rate(chunk.decode_tokens_per_s),
    ]
    if chunk.n_drafted:
        share = 100 * chunk.n_accepted / chunk.n_drafted
        parts.append(
            f"{chunk.n_accepted} of {chunk.n_drafted} drafted tokens accepted, {share:.0f} %"
        )
    if chunk.finish_reason:
        parts.append(f"end: {chunk.finish_reason}")
    return "[" + " | ".join(parts) + "]"


def _rate(tokens_per_s: float | None) -> str:
    return "" if not tokens_per_s else f", {tokens_per_s:.1f} tok/s"
