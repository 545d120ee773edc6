"""Harmony, the form of gpt-oss's answers: messages, each in a channel.

    <|channel|>analysis<|message|>...<|end|>
    <|start|>assistant<|channel|>final<|message|>...<|return|>

An answer goes on where the prompt ends, after ``<|start|>assistant``. What stands before
``<|message|>`` names the channel and, of a call, the tool (``to=functions.NAME``, before the
channel or after it). Messages in the channel analysis are reasoning; those in final, and those in
commentary that call nothing, are content. ``<|end|>`` ends a message, ``<|return|>`` the answer,
and ``<|call|>`` an answer that waits for the result of a tool.

Source: https://cookbook.openai.com/articles/openai-harmony
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeq.serving.parts import BufferedSplitter, Part, Text, certain_length, first_mark
from edgeq.serving.tools import SPACED, ToolCall, ToolSyntax, literals

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
FINAL = f"{CHANNEL}final{MESSAGE}"
"""How a message begins that is the answer itself."""
ENDS = (CALL, RETURN)
"""Tokens that end an answer."""
_MARKS = (START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN)
_HEADS = (START, CHANNEL, MESSAGE, "to=")
_TOOL = "functions."


def is_harmony(template: str) -> bool:
    """Whether a chat template writes messages in channels."""
    return CHANNEL in template and MESSAGE in template


def begun_answer(prompt: str) -> str:
    """What a prompt holds of the first message of the answer, before its text."""
    _, author, begun = prompt.rpartition(f"{START}assistant")
    head, mark, _ = begun.partition(MESSAGE)
    return head + mark if author else ""


def go_on(begun: str, call: bool) -> tuple[str, str]:
    """What a prompt must go on with where the request gives the form of the answer.

    Args:
        begun: as of `begun_answer`; a message in it is ended.
        call: whether the answer may be a call, so that its grammar has the whole message.

    Returns:
        the text, and what there is of the answer with it.
    """
    again = f"{END}{START}assistant" if begun else ""
    return (again, "") if call else (again + FINAL, FINAL)


class HarmonySplitter(BufferedSplitter):
    """Splits an answer into content, reasoning and tool calls.

    Args:
        begun: what the prompt holds of the answer already, after ``<|start|>assistant``.
        tools: whether the request has tools; otherwise a call is content.
        single: whether to return only the first tool call, and nothing after it.
    """

    def __init__(self, begun: str = "", tools: bool = False, single: bool = False) -> None:
        super().__init__(begun)
        self._tools, self._single = tools, single
        self._channel: str | None = None  # of the message whose text follows; None in a header
        self._recipient = ""
        self._called = self._ended = False
        self._fresh = False  # whether nothing of the message has been returned
        self._said: set[bool] = set()  # kinds of text that there were, by whether it is reasoning

    @property
    def in_reasoning(self) -> bool:
        """Whether the text that comes next is reasoning."""
        return self._channel == "analysis"

    def _step(self, found: list[Part], final: bool) -> bool:
        if self._single and self._called:
            return False
        if self._channel is None:
            return self._take_header(final)
        place, mark = first_mark(self._buffer, (END, CALL, RETURN, START))
        whole = mark is not None or final
        if self._recipient:
            if whole:
                self._call(found, self._buffer[:place])
        else:
            stop = place if whole else certain_length(self._buffer, _MARKS)
            self._say(found, self._buffer[:stop])
            self._buffer = self._buffer[stop:]
            place = 0 if whole else place
        if not whole:
            return False
        skipped = 0 if mark in (None, START) else len(mark or "")
        self._buffer = self._buffer[place + skipped :]
        self._channel, self._recipient, self._ended = None, "", True
        return mark is not None

    def _take_header(self, final: bool) -> bool:
        """Read what stands before the text of a message; False if more text is needed."""
        place, mark = first_mark(self._buffer, (MESSAGE,))
        header = self._buffer[:place]
        if mark is None and not final:
            begun = header.lstrip()
            # an answer in no such form is content
            plain = begun and not any(
                begun.startswith(head) or head.startswith(begun) for head in _HEADS
            )
            if self._ended or not plain:
                return False
        elif mark is not None:
            channel = re.search(r"<\|channel\|>\s*(\w+)", header)
            to = re.search(r"\bto=([^\s<]+)", header)
            self._channel = channel[1] if channel else "final"
            self._recipient = to[1] if to and to[1].startswith(_TOOL) else ""
            self._buffer, self._fresh = self._buffer[place + len(MESSAGE) :], True
            return True
        elif not header.strip() or self._ended or CHANNEL in header:
            return False  # the answer ended before a message began
        self._channel, self._recipient, self._fresh = "final", "", True
        return True

    def _say(self, found: list[Part], text: str) -> None:
        if not text:
            return
        if self._fresh and self.in_reasoning in self._said:
            text = f"\n\n{text}"  # after another message of the same kind
        self._said.add(self.in_reasoning)
        self._fresh = False
        found.append(Text(text, self.in_reasoning))

    def _call(self, found: list[Part], text: str) -> None:
        call = _call_of(self._recipient.removeprefix(_TOOL), text) if self._tools else None
        if call is None:
            self._channel = "final"
            self._say(found, text)
        else:
            found.append(call)
            self._called = True


def _call_of(name: str, text: str) -> ToolCall | None:
    """A call with arguments as JSON; None if they are no object."""
    try:
        arguments = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        return None
    call = ToolCall(name, arguments) if isinstance(arguments, dict) else None
    return call if call is not None and call.is_json else None


@dataclass(frozen=True)
class HarmonySyntax(ToolSyntax):
    """Calls as messages to a function."""

    @property
    def tokens(self) -> tuple[str, ...]:
        """Names of tokens that are part of the syntax."""
        return _MARKS

    def grammar(
        self, tools: Sequence[Mapping[str, Any]], special: Callable[[str], int | None]
    ) -> str:
        """A grammar, in Lark's syntax, of an answer that is a call of one of these tools.

        Args:
            tools: as the request gives them.
            special: the id of a special token by its name; None if it is ordinary text.
        """
        names = [f"call{number}" for number in range(len(tools))]
        rules = [f"start: {' | '.join(names)}"]
        for name, tool in zip(names, tools, strict=True):
            function = tool["function"]
            head = f"{CHANNEL}commentary to={_TOOL}{function['name']} {CONSTRAIN}json{MESSAGE}"
            schema = {**(function.get("parameters") or {"type": "object"}), "x-guidance": SPACED}
            rules.append(f"{name}: {' '.join(literals(head, special))} {name}_json")
            rules.append(f"{name}_json: %json {json.dumps(schema)}")
        return "\n".join(rules) + "\n"


HARMONY = HarmonySyntax("harmony", (), "", "", "")


def with_thinking(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A conversation whose earlier reasoning has the name that the template of gpt-oss reads."""
    made = []
    for message in messages:
        one = {key: value for key, value in message.items() if key != "reasoning_content"}
        if "reasoning_content" in message:
            one["thinking"] = message["reasoning_content"]
        made.append(one)
    return made
