"""Answers taken apart: thought and calls of tools, by family, however the text is cut."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edgeq.serving.parts import Splitter, Text
from edgeq.serving.tools import HERMES, LLAMA3, MISTRAL, ToolCall, ToolSyntax, syntax_of

CALL = '{"name": "weather", "arguments": {"city": "Köln {}"}}'
LLAMA_CALL = CALL.replace("arguments", "parameters")
WEATHER = ("weather", {"city": "Köln {}"})


def taken_apart(
    text: str, size: int, syntax: ToolSyntax | None = None, inside: bool = False
) -> tuple[str, str, list[tuple[str, Any]]]:
    """(said, thought, calls) of a text that comes in pieces of some characters."""
    splitter = Splitter(True, inside, syntax)
    parts = []
    for start in range(0, len(text), size):
        parts += splitter.push(text[start : start + size])
    parts += splitter.end()
    said = "".join(p.text for p in parts if isinstance(p, Text) and not p.reasoning)
    thought = "".join(p.text for p in parts if isinstance(p, Text) and p.reasoning)
    return said, thought, [(p.name, p.arguments) for p in parts if isinstance(p, ToolCall)]


SIZES = [1, 2, 3, 7, 1000]


@pytest.mark.parametrize("size", SIZES)
def test_thought_is_told_apart(size: int) -> None:
    assert taken_apart("Hello.", size) == ("Hello.", "", [])
    whole = "<think>\nOne < two.\n</think>\n\nThree."
    assert taken_apart(whole, size) == ("Three.", "One < two.\n", [])
    assert taken_apart("One.\n</think>\nTwo.", size, inside=True) == ("Two.", "One.\n", [])
    assert taken_apart("<think>never ends </thin", size) == ("", "never ends </thin", [])
    assert taken_apart("a <thin b <", size) == ("a <thin b <", "", [])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("syntax", "text", "said", "calls"),
    [
        (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", "", [WEATHER]),
        (HERMES, f"I look.\n<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>",
         "I look.\n", [WEATHER, WEATHER]),
        (HERMES, f"<think>\nHm.\n</think>\n\n<tool_call>\n{CALL}\n</tool_call>", "", [WEATHER]),
        (HERMES, f"<tool_call>\n{CALL}", "", [WEATHER]),  # cut short before the mark
        (HERMES, "<tool_call>{no}</tool_call> text", "<tool_call>{no}</tool_call> text", []),
        (HERMES, "No tool is needed < here.", "No tool is needed < here.", []),
        (LLAMA3, LLAMA_CALL, "", [WEATHER]),
        (LLAMA3, f"  \n{LLAMA_CALL}; {LLAMA_CALL}", "", [WEATHER, WEATHER]),
        (LLAMA3, f"<|python_tag|>{LLAMA_CALL}", "", [WEATHER]),
        (LLAMA3, '{"type": "function", ' + LLAMA_CALL[1:], "", [WEATHER]),
        (LLAMA3, '{"answer": 1}', '{"answer": 1}', []),
        (LLAMA3, "See {x}.", "See {x}.", []),
        (MISTRAL, f"[TOOL_CALLS][{CALL}, {CALL}]", "", [WEATHER, WEATHER]),
        (MISTRAL, '[TOOL_CALLS]weather[ARGS]{"city": "Köln {}"}', "", [WEATHER]),
        (MISTRAL, '[TOOL_CALLS]weather[ARGS]{"city": "Köln {}"}'
                  '[TOOL_CALLS]weather[CALL_ID]x[ARGS]{"city": "Köln {}"}', "",
         [WEATHER, WEATHER]),
        (MISTRAL, "[TOOL] is no call", "[TOOL] is no call", []),
    ],
)  # fmt: skip
def test_calls_are_read(
    size: int, syntax: ToolSyntax, text: str, said: str, calls: list[Any]
) -> None:
    found = taken_apart(text, size, syntax)
    assert (found[0], found[2]) == (said, calls)


def test_a_call_has_openai_s_form() -> None:
    call = ToolCall("weather", {"city": "Köln"}).as_openai()
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    assert json.loads(call["function"]["arguments"]) == {"city": "Köln"}


def test_the_template_tells_the_syntax() -> None:
    assert syntax_of("{% if tools %}<tool_call>{% endif %}") is HERMES
    assert syntax_of("{{ tools }}[AVAILABLE_TOOLS][TOOL_CALLS]") is MISTRAL
    assert syntax_of('{{ tools }}{"name": x, "parameters": y}<|python_tag|>') is LLAMA3
    assert syntax_of("{{ tools }}<tool_call><function=x>") is None  # another syntax
    assert syntax_of("{{ messages }}") is None
