"""A conversation with a model: messages, and an engine that has read them."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from edgeq.core.errors import FormatError, UsageError
from edgeq.core.files import check_target, write_whole
from edgeq.runtime.constraint import Grammar
from edgeq.runtime.draft import Draft
from edgeq.runtime.engine import Engine
from edgeq.runtime.generate import Chunk, generate
from edgeq.runtime.sampling import SamplingParams
from edgeq.runtime.tokenizer import Tokenizer

FORMAT = "edgeq conversation"
"""The value of the field "format" of a saved conversation."""
ROLES = ("system", "user", "assistant", "tool")
_LARGEST = 64 << 20
"""Bytes of the largest file that is read as a conversation."""


class Conversation:
    """The messages of a conversation, and an engine with their tokens in its KV cache.

    Args:
        engine: the engine, which keeps the conversation's tokens in its KV cache.
        tokenizer: the model's tokenizer, which includes its chat template.
        system: the system prompt, or None.
        grammar: a grammar that every answer follows, from `GrammarVocabulary`, or None.
        draft: a small model that drafts tokens; None drafts none.
        mtp: draft with the model's own multi-token-prediction head, as `generate` does.

    Example:
        >>> model = edgeq.load("chat.edgeq")
        >>> with edgeq.Conversation(edgeq.Engine(model), edgeq.Tokenizer(model)) as conversation:
        ...     conversation.check()
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        system: str | None = None,
        grammar: Grammar | None = None,
        draft: Draft | None = None,
        mtp: bool = True,
    ) -> None:
        self.engine, self._tokenizer, self._grammar = engine, tokenizer, grammar
        self.draft, self.mtp = draft, mtp
        self.last: Chunk | None = None
        self._asked: list[dict[str, str]] = []  # up to the last message of the user
        self.reset(system)

    def __enter__(self) -> Conversation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the threads and memory of the engine, and of the draft model."""
        self.engine.close()
        if self.draft is not None:
            self.draft.close()

    def reset(self, system: str | None = None) -> None:
        """Forget all messages and start with this system prompt."""
        self.system = system
        self.messages = [{"role": "system", "content": system}] if system else []
        self._asked = []
        self.last = None

    def check(self) -> None:
        """Refuse a model whose chat template is missing or cannot be read.

        Raises:
            UnsupportedError: the model has no chat template, or one that cannot be read.
        """
        self._tokenizer.encode_chat([*self.messages, {"role": "user", "content": "?"}])

    def say(
        self,
        text: str,
        params: SamplingParams | None = None,
        *,
        max_tokens: int | None = 512,
        stop: Sequence[str] = (),
        lookup: int = 0,
    ) -> Generator[Chunk, None, None]:
        """Send a message; both it and the answer are remembered once the answer has ended.

        Args:
            text: the user's message.
            params: how tokens are chosen.
            max_tokens: the most tokens of the answer.
            stop: texts that end it.
            lookup: tokens to propose from earlier text, as `generate` takes it.

        Yields:
            Pieces of the answer.
        """
        from edgeq.api.channels import ChannelAnswer, has_channels  # which need `edgeq.serving`

        messages = [*self.messages, {"role": "user", "content": text}]
        self._asked = messages
        ids = self._tokenizer.encode_chat(messages)
        end_ids: Sequence[int] = self._tokenizer.turn_end_ids
        channels = None
        if has_channels(self.engine.model.files):
            channels = ChannelAnswer(self._tokenizer, ids, self._grammar is not None)
            ids, end_ids = channels.prompt, channels.end_ids
        answer: list[str] = []
        try:
            for chunk in generate(
                self.engine,
                self._tokenizer,
                self.engine.reuse(ids),
                params,
                max_tokens=max_tokens,
                stop=stop,
                lookup=lookup,
                end_ids=end_ids,
                shown=channels.shown if channels else (),
                constraint=None if self._grammar is None else self._grammar.start(),
                draft=self.draft,
                mtp=self.mtp,
            ):
                if channels:
                    text = channels.text(chunk.text, chunk.finish_reason is not None)
                    chunk = replace(chunk, text=text)
                self.last = chunk
                answer.append(chunk.text)
                yield chunk
        finally:
            if said := (channels.said if channels else "".join(answer)).strip():
                self.messages = [*messages, {"role": "assistant", "content": said}]

    def regenerate(
        self,
        params: SamplingParams | None = None,
        *,
        max_tokens: int | None = 512,
        stop: Sequence[str] = (),
        lookup: int = 0,
    ) -> Generator[Chunk, None, None]:
        """Answer the last message again; the new answer replaces the old one.

        Args:
            params, max_tokens, stop, lookup: as for `say`. With temperature 0, or the same seed,
                the answer is the same again.

        Yields:
            Pieces of the answer.

        Raises:
            UsageError: there is no message to answer yet.
        """
        if not self._asked:
            raise UsageError("there is no message to answer again; send a message first")
        before, asked = self.messages, self._asked
        self.messages = asked[:-1]
        pieces = self.say(
            asked[-1]["content"], params, max_tokens=max_tokens, stop=stop, lookup=lookup
        )
        try:
            with closing(pieces):
                yield from pieces
        finally:
            if self.messages == asked[:-1]:  # the answer ended before it had any text
                self.messages = before

    def save(self, path: str | Path) -> None:
        """Write the messages to a JSON file, which `load` reads.

        Args:
            path: the file to write. An existing file must be a saved conversation.

        Raises:
            UsageError: the file exists and is not a saved conversation, or there are no messages.
            EdgeqError: the file cannot be written.
        """
        path = Path(path)
        if not self.messages:
            raise UsageError("there are no messages to save yet")
        check_target(path)
        if path.exists():
            try:
                read_messages(path)
            except FormatError as err:
                raise UsageError(
                    f"{path} exists and is not a saved conversation; give another file name"
                ) from err
        document = {"format": FORMAT, "version": 1, "messages": self.messages}
        text = json.dumps(document, ensure_ascii=False, indent=1) + "\n"
        write_whole(path, [text.encode("utf-8", "surrogatepass")], "the conversation")

    def load(self, path: str | Path) -> None:
        """Continue a conversation that `save` wrote, with the same model or with another.

        Raises:
            FormatError: the file cannot be read, or is not a saved conversation.
            UnsupportedError: the model's chat template does not accept these messages.
        """
        messages = read_messages(Path(path))
        self._tokenizer.encode_chat(messages)
        first, roles = messages[0], [one["role"] for one in messages]
        self.last = None
        self.system = first["content"] if first["role"] == "system" else None
        self._asked = []
        if roles[-1] == "user":  # the message has no answer yet; `regenerate` answers it
            self._asked, messages = messages, messages[:-1]
        elif roles[-2:] == ["user", "assistant"]:
            self._asked = messages[:-1]
        self.messages = messages


def read_messages(path: Path) -> list[dict[str, str]]:
    """The messages of a saved conversation, at least one.

    Raises:
        FormatError: the file cannot be read, or is not a saved conversation.
    """
    try:
        if path.exists() and not path.is_file():  # reading a device or a pipe may never end
            raise FormatError(f"{path} is not a saved conversation: it is not a regular file")
        if path.stat().st_size > _LARGEST:
            raise FormatError(
                f"{path} is not a saved conversation: it is larger than {_LARGEST >> 20} MiB"
            )
        document: Any = json.loads(path.read_bytes())
    except OSError as err:
        raise FormatError(f"{path} cannot be read: {err.strerror}") from err
    except (ValueError, RecursionError) as err:
        raise FormatError(f"{path} is not a saved conversation: it is not JSON") from err
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise FormatError(
            f"{path} is not a saved conversation; give a file that /save or Conversation.save wrote"
        )
    if document.get("version") != 1:
        raise FormatError(
            f"{path} is a saved conversation of version {document.get('version')!r}, and this "
            "edgeq reads only version 1; use the edgeq that wrote it, or a newer one"
        )
    messages = document.get("messages")
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise FormatError(
            f"{path} is damaged: each of its messages must have a role ({', '.join(ROLES)}) and "
            "a content that is a text"
        )
    return [dict(one) for one in messages]


def _is_message(one: Any) -> bool:
    return (
        isinstance(one, dict)
        and set(one) == {"role", "content"}
        and one["role"] in ROLES
        and isinstance(one["content"], str)
    )
