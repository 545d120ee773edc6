"""The parts of an answer: what is said, what is thought, and which tools are called.

A splitter is fed the text of an answer piece by piece and gives its parts as soon as they are
certain: text that may be the start of a mark is withheld until it is one or is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgeq.serving.tools import ToolCall, ToolSyntax

THINK, THOUGHT = "<think>", "</think>"


@dataclass(frozen=True)
class Text:
    """Some text.

    Args:
        text: not empty.
        reasoning: it is thought, not said.
    """

    text: str
    reasoning: bool = False


Part = Text | ToolCall


class Plain:
    """Leaves text as it is."""

    in_reasoning = False

    def push(self, text: str) -> list[Part]:
        """The parts that this text completes."""
        return [Text(text)] if text else []

    def end(self) -> list[Part]:
        """The parts that the end completes."""
        return []


class Splitter:
    """Takes an answer apart as it grows.

    Args:
        thinks: whether thought between marks is told apart.
        inside: the prompt ends within a thought.
        syntax: how the model writes calls of tools; None if it was given no tools.
        single: give the first call only, and nothing after it.
    """

    def __init__(
        self, thinks: bool, inside: bool, syntax: ToolSyntax | None, single: bool = False
    ) -> None:
        self._syntax, self._single = syntax, single
        self._thinks = thinks
        self.in_reasoning = inside
        self._buffer = ""
        self._calling = False
        self._called = self._said = self._after_call = False
        self._trim = inside  # leave out line ends at the start of what follows

    def push(self, text: str) -> list[Part]:
        """The parts that this text completes."""
        self._buffer += text
        found: list[Part] = []
        while self._step(found, final=False):
            pass
        return found

    def end(self) -> list[Part]:
        """The parts that the end completes."""
        found: list[Part] = []
        while self._step(found, final=True):
            pass
        return found

    def _step(self, found: list[Part], final: bool) -> bool:
        """Take one part from the buffer; False if it needs more text."""
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
        place, mark = _first(self._buffer, marks)
        if mark is None:
            stop = len(self._buffer) if final else _certain(self._buffer, marks)
            # whitespace alone may come before a call that begins the answer
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
            text = text.lstrip()  # line ends between calls
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
        elif raw:  # no call after all
            self._said = True
            found.append(Text(raw))
        return bool(self._buffer)


def _first(text: str, marks: Sequence[str]) -> tuple[int, str | None]:
    """The first place of a mark, and which."""
    places = [(place, mark) for mark in marks if (place := text.find(mark)) >= 0]
    return min(places) if places else (len(text), None)


def _certain(text: str, marks: Sequence[str]) -> int:
    """How much of a text cannot be the start of a mark."""
    longest = max(map(len, marks), default=0)
    for start in range(max(0, len(text) - longest + 1), len(text)):
        if any(mark.startswith(text[start:]) for mark in marks):
            return start
    return len(text)
