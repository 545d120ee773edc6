"""How models write calls of tools: one syntax for each family of chat templates.

    hermes   ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` (Qwen, Hermes, SmolLM3)
    llama3   ``{"name": ..., "parameters": {...}}`` as the whole answer (Llama 3.1 and later)
    mistral  ``[TOOL_CALLS][{"name": ..., "arguments": {...}}]``, or
             ``[TOOL_CALLS]name[ARGS]{...}`` of later models

`edgeq.serving.tool_families` has those that are no JSON.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

_PYTHON_TAG = "<|python_tag|>"
_CALLS, _ARGS = "[TOOL_CALLS]", "[ARGS]"
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_MARKS = re.compile(r"(</?tool_call>|<\|?tool_call_?\w*\|?>|\[TOOL_CALLS\]|</?\w+_function_call>|"
                    r"<escape>|<\|\"\|>|<\|(?:channel|constrain|message)\|>)")  # fmt: skip
"""Texts that may be tokens of their own."""
_DATA = ("const", "default", "enum", "examples")
"""Keywords of JSON schemas whose values are data."""
_NAMED = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")
"""Keywords whose values are schemas by name."""
SPACED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as Python writes it, which is what the models were trained on."""


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool.

    Args:
        name: of the tool.
        arguments: a JSON object.
        id: that the tool's answer refers to.
    """

    name: str
    arguments: dict[str, Any]
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    @property
    def is_json(self) -> bool:
        """Whether JSON can hold the arguments, which it cannot if one is infinite or NaN."""
        try:
            json.dumps(self.arguments, allow_nan=False)
        except (ValueError, RecursionError):
            return False
        return True

    def as_openai(self) -> dict[str, Any]:
        """An entry of ``tool_calls``."""
        arguments = json.dumps(self.arguments, ensure_ascii=False)
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": arguments},
        }


@dataclass(frozen=True)
class ToolSyntax:
    """How a family writes calls, as JSON; families that write otherwise are subclasses.

    Args:
        name: of the family.
        marks: texts that begin a call.
        end: text that ends it; empty if the end of the answer does.
        before, after: what a call is written between when the answer must be one.
        arguments: the key of the arguments.
        begins: how an answer begins that is a call as a whole; empty if none is.
        tools: that may be called, as a request gives them.
    """

    name: str
    marks: tuple[str, ...]
    end: str
    before: str
    after: str
    arguments: str = "arguments"
    begins: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()

    def knowing(self, tools: Sequence[Mapping[str, Any]]) -> Self:
        """The same, where arguments are read as the parameters of these tools say."""
        return replace(self, tools=tuple(tools))

    def inner(self, text: str) -> str:
        """A text without the marks around it."""
        text = text.strip()
        for mark in self.marks:
            text = text.removeprefix(mark)
        return text.removesuffix(self.end).strip() if self.end else text.strip()

    def read(self, text: str) -> list[ToolCall]:
        """The calls that a text from a mark to an end holds; none if it is no call."""
        text = self.inner(text)
        if self.name == "mistral" and _ARGS in text:
            calls = [_named(part) for part in text.split(_CALLS)]
            return [call for call in calls if call] if all(calls) else []
        separator = ";" if self.name == "llama3" else None
        return calls_of(json_values(text, separator), self.arguments)

    @property
    def tokens(self) -> tuple[str, ...]:
        """Names of tokens that are part of the syntax."""
        return (*self.marks, *((self.end,) if self.end else ()), _ARGS)

    def grammar(
        self, tools: Sequence[Mapping[str, Any]], special: Callable[[str], int | None]
    ) -> str:
        """A grammar, in Lark's syntax, of an answer that is a call of one of these tools.

        Args:
            tools: as the request gives them.
            special: the id of a special token by its name; None if it is ordinary text.
        """
        rule = " ".join([*literals(self.before, special), "call", *literals(self.after, special)])
        schema = json.dumps({**self.schema(tools), "x-guidance": SPACED})
        return f"start: {rule}\ncall: %json {schema}\n"

    def schema(self, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The JSON schema of a call of one of these tools."""
        options = []
        for number, tool in enumerate(tools):
            place = "#" if len(tools) == 1 else f"#/anyOf/{number}"
            held = tool["function"].get("parameters") or {"type": "object"}
            options.append(
                {
                    "type": "object",
                    "properties": {
                        "name": {"const": tool["function"]["name"]},
                        self.arguments: moved(held, f"{place}/properties/{self.arguments}"),
                    },
                    "required": ["name", self.arguments],
                    "additionalProperties": False,
                }
            )
        return options[0] if len(options) == 1 else {"anyOf": options}


HERMES = ToolSyntax("hermes", (_OPEN,), _CLOSE, f"{_OPEN}\n", f"\n{_CLOSE}")
LLAMA3 = ToolSyntax("llama3", (_PYTHON_TAG,), "", "", "", "parameters", "{")
MISTRAL = ToolSyntax("mistral", (_CALLS,), "", f"{_CALLS}[", "]")


def moved(schema: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A JSON schema whose references still hold where it is a part of another schema.

    Args:
        schema: the schema, as a document of its own.
        place: where it is put, such as ``#/properties/arguments``.
    """
    if "$id" in schema:  # its references are relative to it
        return dict(schema)

    def part(value: Any, names: bool) -> Any:
        """A part of the schema; ``names`` says that its keys are names and not keywords."""
        if isinstance(value, list):
            return [part(one, False) for one in value]
        if not isinstance(value, Mapping):
            return value
        made = {}
        for key, held in value.items():
            if not names and key == "$ref" and isinstance(held, str) and held.startswith("#"):
                made[key] = place + held[1:]
            elif not names and key in _DATA:
                made[key] = held
            else:
                made[key] = part(held, not names and key in _NAMED)
        return made

    found: dict[str, Any] = part(schema, False)
    return found


def literals(text: str, special: Callable[[str], int | None]) -> list[str]:
    """A text as parts of a rule: special tokens by their ids, the rest as strings."""
    found = []
    for part in _MARKS.split(text):
        if part:
            token = special(part)
            found.append(json.dumps(part) if token is None else f"<[{token}]>")
    return found


def json_values(text: str, separator: str | None) -> list[Any]:
    """JSON values one after another; none if something else is among them."""
    decoder, place, found = json.JSONDecoder(), 0, []
    while place < len(text):
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            return []
        found += value if isinstance(value, list) else [value]
        rest = text[place:].lstrip()
        if separator and rest.startswith(separator):
            rest = rest[len(separator) :].lstrip()
        place = len(text) - len(rest)
    return found


def calls_of(values: Sequence[Any], key: str) -> list[ToolCall]:
    """The calls that JSON values are; none if one is no call.

    Args:
        values: such as ``{"name": ..., "arguments": {...}}``.
        key: of the arguments.
    """
    calls = []
    for value in values:
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            return []
        arguments = value.get(key, value.get("arguments", value.get("parameters", {})))
        if isinstance(arguments, str):  # some models write the arguments as a text of JSON
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return []
        if not isinstance(arguments, dict):
            return []
        calls.append(ToolCall(value["name"], arguments))
    return calls


def _named(text: str) -> ToolCall | None:
    """A call as ``name[ARGS]{...}``."""
    match = re.fullmatch(r"\s*([\w.-]+)(?:\[CALL_ID\]\w+)?\[ARGS\]\s*(\{.*\})\s*", text, re.DOTALL)
    if not match:
        return None
    try:
        return ToolCall(match[1], json.loads(match[2]))
    except (ValueError, RecursionError):
        return None
