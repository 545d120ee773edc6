"""Split an answer into content, reasoning and tool calls while it is generated.

A splitter gets the text of an answer in pieces and returns each part as soon as it is certain. Text
that may be the beginning of a marker, such as ``<think>``, is held back until the following text
decides.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from edgeq.serving.tools import ToolCall, ToolSyntax

THINK, THOUGHT = "<think>", "</think>"


@dataclass(frozen=True)
class Text:
    """A part of an answer that is text.

    Args:
        text: the text, which is not empty.
        reasoning: whether the text is reasoning rather than content.
    """

    text: str
    reasoning: bool = False


Part = Text | ToolCall


class AnswerSplitter(Protocol):
    """Splits an answer into parts while it is generated."""

    @property
    def in_reasoning(self) -> bool:
        """Whether the text that comes next is reasoning."""

    def push(self, text: str) -> list[Part]:
        """Add text and return the parts that it completes."""

    def end(self) -> list[Part]:
        """End the answer and return the remaining parts."""


class Plain:
    """A splitter that returns all text as content."""

    in_reasoning = False

    def push(self, text: str) -> list[Part]:
        """Add text and return the parts that it completes."""
        return [Text(text)] if text else []

    def end(self) -> list[Part]:
        """End the answer and return the remaining parts."""
        return []


class BufferedSplitter(ABC):
    """A splitter that holds text back until it is certain what it is part of."""

    def __init__(self, buffer: str = "") -> None:
        self._buffer = buffer

    def push(self, text: str) -> list[Part]:
        """Add text and return the parts that it completes."""
        self._buffer += text
        return self._parts(final=False)

    def end(self) -> list[Part]:
        """End the answer and return the remaining parts."""
        return self._parts(final=True)

    def _parts(self, final: bool) -> list[Part]:
        found: list[Part] = []
        while self._step(found, final):
            pass
        return found

    @abstractmethod
    def _step(self, found: list[Part], final: bool) -> bool:
        """Move one part from the buffer to ``found``; False if more text is needed."""


class Splitter(BufferedSplitter):
    """Splits an answer into content, reasoning and tool calls.

    Args:
        thinks: whether text between the markers of reasoning is returned as reasoning.
        inside: whether the prompt ends within reasoning.
        syntax: the syntax of tool calls; None if the request has no tools.
        single: whether to return only the first tool call, and nothing after it.
    """

    def __init__(
        self, thinks: bool, inside: bool, syntax: ToolSyntax | None, single: bool = False
    ) -> None:
        super().__init__()
        self._syntax, self._single = syntax, single
        self._thinks = thinks
        self.in_reasoning = inside
        self._calling = False
        self._called = self._said = self._after_call = False
        self._trim = inside  # whether to remove line feeds before the next text

    def _step(self, found: list[Part], final: bool) -> bool:
        if self._single and self._called:
            return False
        if self._calling:
            return self._take_calls(found, final)
        begun = self._buffer.lstrip()
        free = not (self._said or self.in_reasoning)
        if self._syntax and self._syntax.begins and free and begun:
            self._calling = begun.startswith(self._syntax.begins)
            if self._calling:
                return True
        marks = [THOUGHT] if self.in_reasoning else self._marks()
        place, mark = first_mark(self._buffer, marks)
        if mark is None:
            stop = len(self._buffer) if final else certain_length(self._buffer, marks)
            # white space may precede a tool call at the beginning of the answer
            if not final and self._syntax and not self._buffer[:stop].strip() and not found:
                return False
            self._say(found, self._buffer[:stop])
            self._buffer = self._buffer[stop:]
            return False
        self._say(found, self._buffer[:place])
        if mark in (THINK, THOUGHT):
            self._buffer = self._buffer[place + len(mark) :]
            self.in_reasoning, self._trim = mark == THINK, True
            return True
        self._buffer = self._buffer[place:]
        self._calling = True
        return True

    def _marks(self) -> list[str]:
        marks = [THINK] if self._thinks else []
        return marks + (list(self._syntax.marks) if self._syntax else [])

    def _say(self, found: list[Part], text: str) -> None:
        if self._trim:
            text = text.lstrip("\n")
        if self._after_call:
            text = text.lstrip()  # line feeds between calls
        if text:
            self._trim = self._after_call = False
            self._said = self._said or not self.in_reasoning
            found.append(Text(text, self.in_reasoning))

    def _take_calls(self, found: list[Part], final: bool) -> bool:
        assert self._syntax is not None
        end = self._syntax.end
        stop = self._buffer.find(end) + len(end) if end and end in self._buffer else None
        if stop is None and not final:
            return False
        raw = self._buffer[:stop]
        self._buffer = "" if stop is None else self._buffer[stop:]
        self._calling = False
        calls = self._syntax.read(raw)
        if calls and all(one.is_json for one in calls):
            found += calls[:1] if self._single else calls
            self._called = self._after_call = True
        elif raw:  # the text is not a valid call
            self._said = True
            found.append(Text(raw))
        return bool(self._buffer)


def first_mark(text: str, marks: Sequence[str]) -> tuple[int, str | None]:
    """Position of the first marker in a text, and the marker; the length and None without one."""
    places = [(place, mark) for mark in marks if (place := text.find(mark)) >= 0]
    return min(places) if places else (len(text), None)


def certain_length(text: str, marks: Sequence[str]) -> int:
    """Number of leading characters that cannot belong to the beginning of a marker."""
    longest = max(map(len, marks), default=0)
    for start in range(max(0, len(text) - longest + 1), len(text)):
        if any(mark.startswith(text[start:]) for mark in marks):
            return start
    return len(text)
