"""Text to token ids and back, over the ``tokenizer.json`` that a model carries.

Encoding is the `tokenizers` library's. Decoding is done here from a table of each token's bytes,
read off the file's decoder: that makes a stream of single tokens and a whole sequence give the
same text by construction. Text that is not UTF-8 shows U+FFFD for each maximal broken part (the
Unicode standard's practice), where `tokenizers` shows one for every byte of a run.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import tokenizers

from edgeq.core.errors import FormatError, UnsupportedError, UsageError, unknown
from edgeq.importers.huggingface.tokenizer import end_ids, hf_tokenizer
from edgeq.importers.tokenizer.chat_templates import chat_templates
from edgeq.importers.tokenizer.tokenizer_json import from_printable

if TYPE_CHECKING:
    from edgeq.runtime.chat_template import Message

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_DECODERS = ("ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip")


class HasFiles(Protocol):
    """A model, of which a tokenizer needs the files."""

    @property
    def files(self) -> Mapping[str, bytes]:
        """Content of each tokenizer file by its name."""


class Tokenizer:
    """A model's tokenizer.

    Args:
        files: a model, its path, or its files; ``tokenizer.json`` is needed, and
            ``tokenizer_config.json``, ``special_tokens_map.json``, ``added_tokens.json`` and
            ``generation_config.json`` are read as Transformers reads them
            (`edgeq.importers.huggingface.tokenizer`).

    Attributes:
        bos: id of the beginning-of-text token, or None.
        eos_ids: ids that end a generation.
        add_bos: whether this tokenizer starts a text with BOS.
        text_bos: BOS if this tokenizer starts a text with it, else None. Chat models name tokens
            as BOS that only their templates write.
        has_chat_template: whether `encode_chat` can be used.
        vocab_size: one more than the highest id.

    Raises:
        UnsupportedError: no tokenizer.json, or one whose decoder edgeq does not know.
        FormatError: a file is damaged.

    Example:
        >>> tokenizer = edgeq.Tokenizer("model")
        >>> tokenizer.decode(tokenizer.encode("Once upon a time"))
        'Once upon a time'
    """

    def __init__(self, files: Mapping[str, bytes] | HasFiles | str | Path) -> None:
        if isinstance(files, str | Path):
            from edgeq.importers import load

            files = load(files)
        if not isinstance(files, Mapping):
            if not hasattr(files, "files"):
                raise UsageError(
                    f"a tokenizer is made of a model, its path or its files; this is a "
                    f"{type(files).__name__}"
                )
            files = files.files
        built = hf_tokenizer(files)
        self._built, self._files = built, files
        self.has_chat_template = bool(chat_templates(files))
        self._tokenizer = built.library
        self.add_bos = bool(built.prefix)
        self.bos = self._token_id(built.special.get("bos_token"))
        if self.bos is None and built.prefix:
            self.bos = built.prefix[0]
        self.text_bos = self.bos if self.add_bos else None
        self.eos_ids = end_ids(files, built)
        self._special = {
            i
            for i, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special or token.content in built.special.values()
        }
        self._table = _TokenTable(self._tokenizer, built.document, self._special)
        self.vocab_size = self._table.size

    def encode(self, text: str, add_bos: bool = True, add_eos: bool | None = None) -> list[int]:
        """Token ids of a text; special tokens written out in it are recognized.

        Args:
            text: any Unicode text.
            add_bos: put before the text what this tokenizer puts there (BOS, of most that do),
                unless the text (a rendered chat template, for example) starts with it already.
            add_eos: put after the text what this tokenizer puts there; as ``add_bos`` if None.
                Most tokenizers of decoders put nothing there. A prompt that is to be continued
                must not end in it.

        Raises:
            UsageError: the text holds half a surrogate pair and cannot be UTF-8.
        """
        if not isinstance(text, str):
            raise UsageError(f"the text is a {type(text).__name__}; give a string")
        try:
            ids = self._built.encode(text)
        except (UnicodeEncodeError, TypeError) as err:
            raise UsageError(f"the text is not valid Unicode and cannot be encoded: {err}") from err
        prefix, suffix = list(self._built.prefix), list(self._built.suffix)
        if add_bos and ids[: len(prefix)] != prefix:
            ids = prefix + ids
        if add_bos if add_eos is None else add_eos:
            ids += suffix
        return ids

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **extra: Any
    ) -> list[int]:
        """Token ids of a conversation by the model's chat template.

        The template writes its special tokens itself, BOS included; nothing is added to them.

        Args:
            messages: {"role": ..., "content": ...} each.
            add_generation_prompt: end with the opening of the assistant's turn.
            **extra: as of `edgeq.runtime.chat_template.render_chat`.

        Raises:
            UnsupportedError: the model has no chat template.
            UsageError: the template refuses the messages.
            FormatError: the template is damaged.
        """
        from edgeq.runtime.chat_template import render_chat

        text = render_chat(self._files, messages, add_generation_prompt, **extra)
        return self.encode(text, add_bos=False)

    @cached_property
    def turn_end_ids(self) -> tuple[int, ...]:
        """The special token that the chat template writes after an answer, if it writes one.

        Models are published whose listed end tokens lack it; a chat must stop there too.
        """
        from edgeq.runtime.chat_template import after_an_answer

        if not self.has_chat_template:
            return ()
        for token in self.encode(after_an_answer(self._files), add_bos=False):
            if token in self._special:
                return (token,)
            if self.token_bytes(token).strip():
                break
        return ()

    def __repr__(self) -> str:
        return (
            f"Tokenizer({self.vocab_size} tokens, bos={self.bos}, eos_ids={self.eos_ids}, "
            f"chat template: {'yes' if self.has_chat_template else 'no'})"
        )

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some tokens, special tokens left out."""
        stream = self.stream()
        return "".join(stream.push(token) for token in ids) + stream.flush()

    def stream(self, prompt: Sequence[int] = (), shown: Iterable[int] = ()) -> StreamDecoder:
        """A decoder fed one token at a time.

        Args:
            prompt: tokens that came before. With them the text is their continuation; without,
                a first SentencePiece space, which only marks a word's start, is left out.
            shown: special tokens that are written out, such as the start of a tool call.
        """
        decoder = StreamDecoder(self, frozenset(shown))
        for token in prompt:
            decoder.push(token)
        return decoder

    def token_bytes(self, token: int, first: bool = False) -> bytes:
        """The bytes a token stands for: none for special and unknown ids.

        Args:
            token: the id.
            first: it is the first of the text, where the space before a word goes.
        """
        inner, start = self._table.of(token)
        return start if first else inner

    @property
    def special_ids(self) -> frozenset[int]:
        """Special tokens, which are no text."""
        return frozenset(self._special)

    def token_name(self, token: int) -> str:
        """How the vocabulary writes a token, such as ``<|im_end|>``; empty for an unknown id."""
        return self._tokenizer.id_to_token(token) or ""

    def _token_id(self, token: str | None) -> int | None:
        if token is None:
            return None
        token_id: int | None = self._tokenizer.token_to_id(token)
        return token_id


class StreamDecoder:
    """Tokens in, text out, never half a UTF-8 character. Made by `Tokenizer.stream`."""

    def __init__(self, tokenizer: Tokenizer, shown: frozenset[int] = frozenset()) -> None:
        self._tokenizer, self._shown = tokenizer, shown
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._started = False

    def push(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        if token in self._shown:
            return self._utf8.decode(self._tokenizer.token_name(token).encode())
        raw = self._tokenizer.token_bytes(token, first=not self._started)
        self._started = self._started or bool(self._tokenizer.token_bytes(token))
        return self._utf8.decode(raw)

    def flush(self) -> str:
        """What is left at the end: U+FFFD if a character was cut short, otherwise nothing."""
        return self._utf8.decode(b"", final=True)


class _TokenTable:
    """The bytes of tokens, each found when it is first asked for: an answer has few of them.

    Attributes:
        size: one more than the largest id.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        document: Mapping[str, Any],
        special: Collection[int],
    ) -> None:
        self._tokenizer, self._special = tokenizer, special
        self._steps = _decoder_steps(document.get("decoder"))
        kinds = {step["type"] for step in self._steps}
        self._byte_level, self._fallback = "ByteLevel" in kinds, "ByteFallback" in kinds
        self._stripped = {
            step.get("content", " ") for step in self._steps if step["type"] == "Strip"
        }
        self._added = tokenizer.get_added_tokens_decoder()
        listed = document["model"]["vocab"]  # token -> id, or a list of tokens (Unigram)
        last = max(listed.values(), default=-1) if isinstance(listed, dict) else len(listed) - 1
        self.size: int = max([last, *self._added]) + 1
        self._found: dict[int, tuple[bytes, bytes]] = {}

    def of(self, token: int) -> tuple[bytes, bytes]:
        """The bytes of an id within a text and at the start of one; none of special and unknown
        ids."""
        if token not in self._found:
            if not 0 <= token < self.size or token in self._special:
                return b"", b""
            # an added token as it stands in a normalized text: in some with a space before it
            name = self._tokenizer.id_to_token(token)
            if not name and token in self._added:
                name = self._added[token].content
            self._found[token] = self._bytes(name or "")
        return self._found[token]

    def _bytes(self, token: str) -> tuple[bytes, bytes]:
        byte = _BYTE_TOKEN.fullmatch(token) if self._fallback else None
        if byte:
            raw = bytes((int(byte[1], 16),))
            return raw, b"" if chr(raw[0]) in self._stripped else raw
        if self._byte_level:
            return (from_printable(token),) * 2
        inner, start = _spaced(token, self._steps)
        return inner.encode(), start.encode()


def _decoder_steps(decoder: Any) -> list[dict[str, Any]]:
    if isinstance(decoder, dict) and decoder.get("type") == "Sequence":
        steps = decoder.get("decoders")
    else:
        steps = [decoder]
    if not isinstance(steps, list):
        raise FormatError("tokenizer.json: the decoder sequence holds no decoders")
    for step in steps:
        kind = step.get("type") if isinstance(step, dict) else None
        if kind not in _DECODERS:
            raise UnsupportedError(
                "tokenizer.json has a decoder edgeq cannot run: "
                + unknown("decoder", str(kind), _DECODERS)
            )
        if kind == "Replace" and "String" not in step.get("pattern", {}):
            raise UnsupportedError(
                f"tokenizer.json: a Replace decoder with the pattern {step.get('pattern')!r}; "
                "edgeq knows plain strings"
            )
        if kind == "Strip" and (step.get("start", 0) > 1 or step.get("stop", 0)):
            raise UnsupportedError(
                f"tokenizer.json: a Strip decoder with start {step.get('start', 0)} and stop "
                f"{step.get('stop', 0)}; edgeq strips one character, at the start of a text"
            )
    return steps


def _spaced(token: str, steps: list[dict[str, Any]]) -> tuple[str, str]:
    """A SentencePiece token's text within a text, and as its first token."""
    inner = start = token
    for step in steps:
        if step["type"] == "Replace":
            old, new = step["pattern"]["String"], step["content"]
            inner, start = inner.replace(old, new), start.replace(old, new)
        elif step["type"] == "Metaspace":
            mark = step.get("replacement", "▁")
            gone = step.get("prepend_scheme", "always") != "never"
            start = start.replace(mark, "" if gone else " ")
            inner = inner.replace(mark, " ")
        elif step["type"] == "Strip":
            count, char = step.get("start", 0), step.get("content", " ")
            for _ in range(count):
                start = start.removeprefix(char)
    return inner, start
