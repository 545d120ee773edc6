"""``edgeq chat``: a conversation with a model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from edgeq.cli import render
from edgeq.cli.options import (
    command,
    engine_options,
    lookup_option,
    model_argument,
    sampling_options,
    schema_option,
)
from edgeq.cli.plan import fit_option, refuse_what_cannot_fit
from edgeq.cli.run import engine_arguments, sampling_params, timing
from edgeq.cli.warmup import compile_first

if TYPE_CHECKING:
    from edgeq.api.run import Conversation
    from edgeq.runtime.sampling import SamplingParams

_HELP = (
    "/reset starts a new conversation, /system TEXT does so with another system prompt, "
    "/stats shows the timings of the last answer, /exit ends the chat"
)


@command("chat", "Have a conversation.")
@model_argument
@click.option("-sys", "--system", "--system-prompt", "system", default=None,
              help="The system prompt.")  # fmt: skip
@click.option("-n", "--n-predict", "--predict", "--max-tokens", type=click.IntRange(min=1),
              default=512, help="Maximum number of tokens in an answer.")  # fmt: skip
@lookup_option
@schema_option
@sampling_options
@engine_options
@fit_option
def chat(model: str, system: str | None, n_predict: int, force: bool, **settings: Any) -> None:
    """Chat with MODEL. Each line you type is a message; /help lists the commands.

    When standard input is a pipe, each of its lines is a message and each answer is written to
    standard output.
    """
    from edgeq.api.run import chat as begin
    from edgeq.importers import load

    params = sampling_params(settings)
    engine_settings = engine_arguments(settings)
    loaded = load(model)
    if not force:
        refuse_what_cannot_fit(loaded, model, engine_settings)
    compile_first(engine_settings["backend"])
    schema = settings["json_schema"]
    with begin(loaded, system=system, json_schema=schema, **engine_settings) as talk:
        if sys.stdin.isatty():
            render.note(_HELP)
        while (line := _next_line()) is not None:
            word, _, rest = line.strip().partition(" ")
            if word in ("/exit", "/quit"):
                break
            if word == "/reset":
                talk.reset(talk.system)
            elif word == "/system":
                talk.reset(rest.strip() or None)
            elif word == "/stats":
                render.note(timing(talk.last) if talk.last else "there is no answer yet")
            elif word == "/help" or (word.startswith("/") and "/" not in word[1:]):
                render.note(_HELP)
            elif line.strip():
                _answer(
                    talk, line, params, max_tokens=n_predict, stop=settings["stop"],
                    lookup=settings["lookup"],
                )  # fmt: skip


def _next_line() -> str | None:
    if sys.stdin.isatty():
        try:
            return input("\n> ")
        except (EOFError, KeyboardInterrupt):
            return None
    return sys.stdin.readline() or None


def _answer(
    talk: Conversation,
    line: str,
    params: SamplingParams,
    **how: Any,
) -> None:
    from edgeq.core.errors import DoesNotFitError, UsageError

    try:
        for chunk in talk.say(line.strip(), params, **how):
            render.write(chunk.text)
    except KeyboardInterrupt:  # Ctrl-C ends the answer, not the conversation
        if not sys.stdin.isatty():
            raise
    except (DoesNotFitError, UsageError) as err:
        if not sys.stdin.isatty():
            raise
        render.note(f"error: {err}\n(/reset starts a new conversation)")
    render.write("\n")
