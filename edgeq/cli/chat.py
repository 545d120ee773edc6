"""``edgeq chat``: a conversation with a model."""

from __future__ import annotations

import difflib
import sys
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeq.cli import render
from edgeq.cli.answer_options import draft_option, lookup_option, mtp_option, schema_option
from edgeq.cli.options import (
    command,
    engine_options,
    model_argument,
    sampling_options,
)
from edgeq.cli.plan import fit_option, refuse_what_cannot_fit
from edgeq.cli.run import engine_arguments, sampling_params, timing
from edgeq.cli.terminal import CtrlC, LineEditor, LiveRate, default_history, interruptible
from edgeq.cli.warmup import compile_first

if TYPE_CHECKING:
    from collections.abc import Generator

    from edgeq.api.conversation import Conversation
    from edgeq.runtime.generate import Chunk
    from edgeq.runtime.sampling import SamplingParams

_COMMANDS = {
    "/help": "list the commands",
    "/regen": "answer the last message again",
    "/reset": "start a new conversation",
    "/system TEXT": "start a new conversation with another system prompt",
    "/save FILE": "save the conversation",
    "/load FILE": "continue a saved conversation",
    "/stats": "show the timings of the last answer, and how many tokens of the context are used",
    "/exit": "end the chat, as Ctrl-D does",
}
_WORDS = (*(name.partition(" ")[0] for name in _COMMANDS), "/quit")
_FOR_THE_MODEL = ("/think", "/no_think", "/nothink")
"""Switches in a message that some models understand."""
_STOP = "Ctrl-C stops an answer."
_OTHERS = "Any other line is a message; begin it with a space if it starts with /"


@command("chat", "Have a conversation.")
@model_argument
@click.option(
    "-sys", "--system", "--system-prompt", "system", default=None, help="The system prompt."
)
@click.option("-n", "--n-predict", "--predict", "--max-tokens", type=click.IntRange(min=1),
              default=512, help="Maximum number of tokens in an answer.")  # fmt: skip
@click.option("--load", type=click.Path(exists=True, dir_okay=False), default=None, metavar="FILE",
              help="Continue a conversation that /save wrote.")  # fmt: skip
@click.option("--history", type=click.Path(dir_okay=False), default=None, metavar="FILE",
              show_default="~/.local/state/edgeq/chat_history",
              help="File of earlier messages, which the arrow keys recall.")  # fmt: skip
@click.option(
    "--no-history", is_flag=True, show_default=False, help="Do not keep messages in a file."
)
@lookup_option
@draft_option
@mtp_option
@schema_option
@sampling_options
@engine_options
@fit_option
def chat(
    model: str,
    system: str | None,
    n_predict: int,
    load: str | None,
    history: str | None,
    no_history: bool,
    force: bool,
    **settings: Any,
) -> None:
    """Chat with MODEL. Each line you type is a message; /help lists the commands.

    When standard input is a pipe, each of its lines is a message and each answer is written to
    standard output.
    """
    from edgeq.api.run import chat as begin
    from edgeq.importers import load as open_model

    if system is not None and load is not None:
        raise click.UsageError(
            "the conversation of --load has its own system prompt; leave out --system"
        )
    if history is not None and no_history:
        raise click.UsageError("give --history or --no-history, not both")
    params = sampling_params(settings)
    engine_settings = engine_arguments(settings)
    person = sys.stdin.isatty()
    kept = None if no_history else Path(history) if history else default_history()
    editor = LineEditor(kept, _WORDS) if person else None
    loaded = open_model(model)
    draft = None if settings["draft"] is None else open_model(settings["draft"])
    if not force:
        refuse_what_cannot_fit(loaded, model, engine_settings, draft)
    compile_first(engine_settings["backend"])
    schema = settings["json_schema"]
    with begin(
        loaded, system=system, json_schema=schema, draft=draft, mtp=settings["mtp"],
        **engine_settings,
    ) as talk:  # fmt: skip
        how = {"max_tokens": n_predict, "stop": settings["stop"], "lookup": settings["lookup"]}
        ctrl_c = CtrlC()
        session = _Session(talk, params, how, person, ctrl_c)
        if load is not None:
            session.load(load)
        if editor is not None:
            render.note(f"/help lists the commands. {_STOP}")
        with ctrl_c if person else nullcontext():
            while (line := _next_line(editor, ctrl_c)) is not None:
                if not session.take(line):
                    break


def _next_line(editor: LineEditor | None, ctrl_c: CtrlC) -> str | None:
    if editor is None:
        return sys.stdin.readline() or None
    sys.stderr.write("\n")
    while True:
        try:
            with ctrl_c.heard():
                return editor.ask("> ")
        except KeyboardInterrupt:
            render.note("\n/exit or Ctrl-D ends the chat")


class _Session:
    """A conversation at the command line.

    Args:
        talk: the conversation.
        params: parameters of sampling.
        how: further arguments of `Conversation.say`.
        person: whether standard input is a terminal; then errors do not end the chat.
        ctrl_c: what Ctrl-C does.
    """

    def __init__(
        self,
        talk: Conversation,
        params: SamplingParams,
        how: dict[str, Any],
        person: bool,
        ctrl_c: CtrlC,
    ) -> None:
        self._talk, self._params, self._how, self._person = talk, params, how, person
        self._ctrl_c = ctrl_c
        self._again = 0  # how often the last message was answered again

    def take(self, line: str) -> bool:
        """Execute a command or answer a message; returns False if the chat should end."""
        from edgeq.core.errors import EdgeqError

        if line.strip() in ("/exit", "/quit"):
            return False
        try:
            self._do(line)
        except EdgeqError as err:
            if not self._person:
                raise
            render.note(f"error: {err}")
        return True

    def _do(self, line: str) -> None:
        talk = self._talk
        word, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        named = word.startswith("/") and "/" not in word[1:] and word not in _FOR_THE_MODEL
        if not line.strip():
            return
        if not named or line.startswith(" "):
            self._again = 0
            self._answer(talk.say(line.strip(), self._params, **self._how))
        elif word == "/regen":
            self._again += 1
            self._answer(talk.regenerate(self._params_again(), **self._how))
        elif word in ("/reset", "/system"):
            talk.reset(talk.system if word == "/reset" else rest or None)
            begun = f"with the system prompt: {talk.system}" if talk.system else "no system prompt"
            render.note(f"new conversation, {render.visible(begun)}")
        elif word == "/stats":
            render.note(self._stats())
        elif word in ("/save", "/load"):
            if not rest:
                render.note(f"{word} needs the name of a file: {word} FILE")
            else:
                with self._ctrl_c.heard():  # a file may be a pipe that nobody reads or writes
                    if word == "/load":
                        self.load(rest)
                    else:
                        talk.save(Path(rest).expanduser())
                        render.note(f"saved: {rest}")
        elif word == "/help":
            rows = [f"{name:14}{about}" for name, about in _COMMANDS.items()]
            render.note("\n".join([*rows, f"{_STOP} {_OTHERS}"]))
        else:
            near = difflib.get_close_matches(word, _WORDS, 1)
            meant = f"did you mean {near[0]}? " if near else ""
            render.note(f"there is no command {word}; {meant}/help lists them. A line that begins "
                        "with a space is sent as a message")  # fmt: skip

    def load(self, path: str) -> None:
        """Continue a saved conversation."""
        self._talk.load(Path(path).expanduser())
        self._again = 0
        render.note(f"loaded: {len(self._talk.messages)} messages; the last one:")
        if self._talk.messages:
            last = self._talk.messages[-1]
            render.note(f"{last['role']}: {render.visible(last['content'][-500:])}")

    def _params_again(self) -> SamplingParams:
        """The parameters with another seed than before, so that the answer differs."""
        seed = self._params.seed
        if seed is None:
            return self._params
        return replace(self._params, seed=(seed + self._again) % (1 << 64))

    def _stats(self) -> str:
        talk = self._talk
        if talk.last is None:
            return "there is no answer yet"
        used = f"context: {talk.engine.n_past} of {talk.engine.context} tokens"
        return f"{timing(talk.last)}\n{used}"

    def _answer(self, pieces: Generator[Chunk, None, None]) -> None:
        if not self._person:
            for chunk in pieces:
                render.generated(chunk.text)
            render.write("\n")
            return
        try:
            with interruptible() as interrupt, closing(pieces), LiveRate() as rate:
                for chunk in pieces:
                    render.generated(chunk.text)
                    rate.show(chunk)
                    if interrupt.asked:
                        break
        finally:
            render.write("\n")
        if interrupt.asked:
            render.note("[stopped]")
