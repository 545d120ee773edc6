"""The text of a chat with a model whose answers are messages in channels (gpt-oss)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgeq.importers.tokenizer.chat_templates import chat_templates
from edgeq.runtime.tokenizer import Tokenizer
from edgeq.serving.harmony import (
    ENDS,
    HARMONY,
    HarmonySplitter,
    begun_answer,
    go_on,
    is_harmony,
)
from edgeq.serving.parts import THINK, THOUGHT, Part, Text


class ChannelAnswer:
    """An answer as a chat shows it, with reasoning between the usual marks.

    Args:
        tokenizer: of the model.
        prompt: the tokens before the answer.
        formed: whether a grammar gives the form of the answer.

    Attributes:
        prompt: the tokens before the answer, in the channel for answers if its form is given.
        end_ids: tokens that end it.
        shown: special tokens that the text must have.
        said: what is no reasoning, so far.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], formed: bool) -> None:
        special = {tokenizer.token_name(i): i for i in sorted(tokenizer.special_ids)}
        self.shown = [special[name] for name in HARMONY.tokens if name in special]
        self.end_ids = [special[name] for name in ENDS if name in special]
        stream = tokenizer.stream(shown=self.shown)
        begun = begun_answer("".join(map(stream.push, prompt[-64:])))
        self.prompt = list(prompt)
        if formed:
            more, begun = go_on(begun, call=False)
            self.prompt += tokenizer.encode(more, add_bos=False)
        self._splitter = HarmonySplitter(begun)
        self._thinks = False
        self.said = ""

    def text(self, piece: str, last: bool) -> str:
        """What to show of a piece of the answer.

        Args:
            piece: of the text, with the marks of channels.
            last: whether the answer ends with it.
        """
        parts = self._splitter.push(piece)
        if last:
            parts += self._splitter.end()
        shown = "".join(map(self._shown, parts))
        if last and self._thinks:
            shown += f"\n{THOUGHT}"
        return shown

    def _shown(self, part: Part) -> str:
        if not isinstance(part, Text):
            return ""  # a chat has no tools
        before = ""
        if part.reasoning != self._thinks:
            before = f"{THINK}\n" if part.reasoning else f"\n{THOUGHT}\n\n"
        self._thinks = part.reasoning
        if not part.reasoning:
            self.said += part.text
        return before + part.text


def has_channels(files: Mapping[str, bytes]) -> bool:
    """Whether the model of these files answers in channels."""
    return any(map(is_harmony, chat_templates(files).values()))
