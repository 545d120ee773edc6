"""Calls of tools that are no JSON, and which syntax a chat template teaches.

    xml      ``<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>``,
             without quotes and with line ends between (Qwen3-Coder and later Qwen)
    lfm2     ``<|tool_call_start|>[name(key="value")]<|tool_call_end|>``: a Python list of calls
    gemma    ``<start_function_call>call:name{key:<escape>text<escape>,n:1}<end_function_call>``
             (FunctionGemma), with other marks in Gemma 4

Sources: the model cards of Qwen3-Coder and LFM2; Google's "FunctionGemma formatting and best
practices".
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeq.core.errors import UnsupportedError
from edgeq.serving.harmony import HARMONY, is_harmony
from edgeq.serving.tools import (
    HERMES,
    LLAMA3,
    MISTRAL,
    ToolCall,
    ToolSyntax,
    calls_of,
    json_values,
    literals,
)

Special = Callable[[str], int | None]
_NAME = r"[\w.-]+"
_NAMED = re.compile(
    r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|(?<![\w.-])([\w.-]+)(\s*(?:=|\())",
    re.DOTALL,
)
"""A text between quotes, or the name of a function or an argument before ``(`` or ``=``."""


@dataclass(frozen=True)
class ArgumentSyntax(ToolSyntax):
    """A syntax that writes one argument after another, each with its key."""

    def properties(self, tool: str) -> Mapping[str, Any]:
        """The schemas of a tool's parameters; none of one that is not known."""
        for one in self.tools:
            if one["function"]["name"] == tool:
                found = (one["function"].get("parameters") or {}).get("properties")
                return found if isinstance(found, Mapping) else {}
        return {}

    def grammar(self, tools: Sequence[Mapping[str, Any]], special: Special) -> str:
        """As of `ToolSyntax`: required arguments first, then any of the others in their order.

        Raises:
            UnsupportedError: a schema that this syntax cannot be held to.
        """
        rules, names = [], []
        for number, tool in enumerate(tools):
            function = tool["function"]
            schema = function.get("parameters") or {}
            properties = schema.get("properties") or {}
            if "$defs" in json.dumps(schema) or "$ref" in json.dumps(schema):
                raise UnsupportedError(
                    f"the parameters of {function['name']} refer to definitions, and calls of this "
                    "model cannot be held to those; use tool_choice auto, or write them out"
                )
            required = [key for key in schema.get("required") or () if key in properties]
            optional = [key for key in properties if key not in required]
            written = {}
            for place, key in enumerate([*required, *optional]):
                value = f"v{number}_{place}"
                rules += self.value_rule(value, f"{function['name']}.{key}", properties[key],
                                         special)  # fmt: skip
                written[key] = [*literals(self.open_argument(key), special), value]
            body = [*literals(self.open_call(function["name"]), special),
                    *self._arguments([written[key] for key in required],
                                     [written[key] for key in optional]),
                    *literals(self.close_call, special)]  # fmt: skip
            rules.append(f"call{number}: {' '.join(body)}")
            names.append(f"call{number}")
        start = [*literals(self.before, special), f"({' | '.join(names)})",
                 *literals(self.after, special)]  # fmt: skip
        return "\n".join([f"start: {' '.join(start)}", *rules]) + "\n"

    def _arguments(self, required: list[list[str]], optional: list[list[str]]) -> list[str]:
        """All of some arguments and any of others, in their order, with separators between."""
        comma = [json.dumps(self.separator)] if self.separator else []

        def maybe(others: list[list[str]]) -> list[str]:
            return [part for one in others for part in ("(", *comma, *one, ")?")]

        if required:
            found = list(required[0])
            for one in required[1:]:
                found += [*comma, *one]
            return found + maybe(optional)
        if not comma or not optional:
            return maybe(optional)
        starts = [
            " ".join([*one, *maybe(optional[place + 1 :])]) for place, one in enumerate(optional)
        ]
        return ["(", " | ".join(starts), ")?"]

    separator = ", "
    close_call = ""

    def open_call(self, name: str) -> str:
        """How a call begins."""
        raise NotImplementedError

    def open_argument(self, key: str) -> str:
        """How an argument begins."""
        raise NotImplementedError

    def value_rule(self, rule: str, where: str, schema: Any, special: Special) -> list[str]:
        """Rules for a value of a schema; JSON where the syntax has no other form."""
        return [f"{rule}: %json {json.dumps(schema)}"]

    def text_rule(
        self, rule: str, where: str, schema: Any, before: list[str], after: list[str], free: str
    ) -> list[str]:
        """Rules for a text that is written without JSON's quotes.

        Args:
            rule: its name.
            where: what the value is of, for a message.
            schema: of the value.
            before, after: what it stands between.
            free: the terminal of any text that it may hold.

        Raises:
            UnsupportedError: the schema asks of the text what cannot be promised.
        """
        allowed = schema.get("enum") or ([schema["const"]] if "const" in schema else None)
        if allowed and all(isinstance(one, str) for one in allowed):
            body = "(" + " | ".join(json.dumps(one) for one in allowed) + ")"
        elif allowed or set(schema) - {"type", "description", "title", "default", "examples"}:
            raise UnsupportedError(
                f"the parameter {where} has a schema that a call of this model cannot be held to; "
                "use tool_choice auto, or a plain string, an enum, a number or a boolean"
            )
        else:
            rules = [f"{rule}: {' '.join([*before, rule.upper(), *after])}"]
            return [*rules, f"{rule.upper()}: {free}"]
        return [f"{rule}: {' '.join([*before, body, *after])}"]


def _is_text(schema: Any) -> bool:
    if not isinstance(schema, Mapping):
        return False
    values = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
    return schema.get("type") == "string" or bool(
        values and all(isinstance(one, str) for one in values)
    )


@dataclass(frozen=True)
class XmlSyntax(ArgumentSyntax):
    """Qwen3-Coder's."""

    separator = ""
    close_call = "</function>"

    def open_call(self, name: str) -> str:
        """How a call begins."""
        return f"<function={name}>\n"

    def open_argument(self, key: str) -> str:
        """How an argument begins."""
        return f"<parameter={key}>\n"

    def value_rule(self, rule: str, where: str, schema: Any, special: Special) -> list[str]:
        """Texts without quotes, all else as JSON; each with what ends an argument."""
        close = literals("\n</parameter>\n", special)
        if not _is_text(schema):
            inside = super().value_rule(f"{rule}_json", where, schema, special)
            return [*inside, f"{rule}: {rule}_json {' '.join(close)}"]
        free = r"(/(?s:.*)/ & ~/(?s:.*<\/parameter>.*)/)"  # anything but the mark of the end
        found = self.text_rule(rule, where, schema, [], close, free)
        if found[-1].startswith(rule.upper()):  # one terminal, as a text may hold line ends too
            return [f"{rule}: {rule.upper()}", f"{found[-1]} {' '.join(close)}"]
        return found

    def read(self, text: str) -> list[ToolCall]:
        """The calls; none if the text is no call, or ends before its first call does."""
        if "</function>" not in text and self.end not in text:
            return []  # an argument may have been cut
        calls = [
            self._call(one) for one in re.split(r"</function>\s*(?=<function=)", self.inner(text))
        ]
        return [one for one in calls if one] if all(calls) else []

    def _call(self, text: str) -> ToolCall | None:
        """One call; None if the text is none."""
        match = re.fullmatch(rf"(?:<function=)?({_NAME})>(.*?)(?:</function>)?", text, re.DOTALL)
        if not match:
            return None
        properties = self.properties(match[1])
        place = 0
        found: dict[str, Any] = {}
        body = match[2].strip("\n")
        pattern = re.compile(
            r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?(?:</parameter>|(?=\s*<parameter=)|\Z)", re.DOTALL
        )
        while place < len(body):
            one = pattern.match(body, place)
            if not one or one.end() == place:
                return None if body[place:].strip() else ToolCall(match[1], found)
            found[one[1].strip()] = _typed(one[2], properties.get(one[1].strip()))
            place = one.end()
        return ToolCall(match[1], found)


def _typed(text: str, schema: Any) -> Any:
    """A value written without quotes, as its schema says; a text where that says nothing else."""
    if schema is None or _is_text(schema):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = {"True": True, "False": False, "None": None}.get(text.strip(), text)
    allowed = _types(schema)
    # a text that may be null, or one of several types, can look like a number
    return text if "string" in allowed and not allowed & _types_of(value) else value


def _types(schema: Any) -> set[str]:
    """The types that a schema names, at its own level and in its alternatives."""
    if not isinstance(schema, Mapping):
        return set()
    named = schema.get("type") or ()
    found = {named} if isinstance(named, str) else {one for one in named if isinstance(one, str)}
    for key in ("anyOf", "oneOf"):
        alternatives = schema.get(key)
        for one in alternatives if isinstance(alternatives, list) else ():
            found |= _types(one)
    return found


def _types_of(value: Any) -> set[str]:
    """The names that JSON schemas have for a value's type."""
    if isinstance(value, bool) or value is None:
        return {"null" if value is None else "boolean"}
    if isinstance(value, int):
        return {"integer", "number"}
    return {{float: "number", str: "string", list: "array", dict: "object"}[type(value)]}


@dataclass(frozen=True)
class PythonSyntax(ArgumentSyntax):
    """LFM2's."""

    close_call = ")"

    def open_call(self, name: str) -> str:
        """How a call begins."""
        return f"{name}("

    def open_argument(self, key: str) -> str:
        """How an argument begins."""
        return f"{key}="

    def read(self, text: str) -> list[ToolCall]:
        """The calls; none if the text is no call."""
        text = self.inner(text)
        if as_json := calls_of(json_values(text, None), self.arguments):
            return as_json
        try:
            written, names = _with_names(text.strip())
            with warnings.catch_warnings():  # of escapes that Python does not know
                warnings.simplefilter("ignore")
                parsed = ast.parse(written, mode="eval").body
            listed = parsed.elts if isinstance(parsed, ast.List) else [parsed]
            return [_python_call(one, names) for one in listed]
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            return []


def _with_names(text: str) -> tuple[str, dict[str, str]]:
    """A text in which names of functions and arguments are words that Python reads as names.

    A tool may be called ``get-weather`` and an argument ``from``, which Python has other uses for.

    Returns:
        The text, and what each of these words stands for.
    """
    names: dict[str, str] = {}

    def word(match: re.Match[str]) -> str:
        if match[1] is None:  # a text between quotes
            return match[0]
        made = f"name{len(names)}"
        names[made] = match[1]
        return made + match[2]

    return _NAMED.sub(word, text), names


def _python_call(node: ast.expr, names: Mapping[str, str]) -> ToolCall:
    """A call with keywords, whose values are constants.

    Args:
        node: of the syntax tree.
        names: as of `_with_names`.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(node, ast.Call) or node.args or not isinstance(node.func, ast.Name):
        raise ValueError("no call with keywords")
    arguments = {}
    for one in node.keywords:
        if one.arg is None:
            raise ValueError("unpacked keywords")
        arguments[names[one.arg]] = _constant(one.value)
    return ToolCall(names[node.func.id], arguments)


def _constant(node: ast.expr) -> Any:
    """A constant of Python's or JSON's; never run.

    Raises:
        ValueError: it is none, or JSON cannot hold it.
    """
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_constant(one) for one in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_constant(key) for key in node.keys if key is not None]
        if len(keys) != len(node.keys) or not all(isinstance(key, str) for key in keys):
            raise ValueError("a key is no text")
        return dict(zip(keys, map(_constant, node.values), strict=True))
    value = ast.literal_eval(node)
    if isinstance(value, str):  # JSON escapes what lies beyond 16 bits as two halves
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if value is not None and not isinstance(value, bool | int | float):
        raise ValueError("JSON has no such value")
    return value


@dataclass(frozen=True)
class GemmaSyntax(ArgumentSyntax):
    """FunctionGemma's and Gemma 4's.

    Args:
        quote: the token around texts.
    """

    quote: str = "<escape>"

    separator = ","
    close_call = "}"

    def open_call(self, name: str) -> str:
        """How a call begins."""
        return f"call:{name}{{"

    def open_argument(self, key: str) -> str:
        """How an argument begins."""
        return f"{key}:"

    @property
    def tokens(self) -> tuple[str, ...]:
        """Names of tokens that are part of the syntax."""
        return (*self.marks, self.end, self.quote)

    def value_rule(self, rule: str, where: str, schema: Any, special: Special) -> list[str]:
        """Texts between quotes, numbers and booleans; lists and objects are refused.

        Raises:
            UnsupportedError: a list, an object, or a text of a special kind.
        """
        quote = literals(self.quote, special)
        if _is_text(schema):
            plain = special(self.quote) is None  # or no text can be taken for the token
            free = "/[^<]+/" if plain else "/(?s:.+)/"
            return self.text_rule(rule, where, schema, quote, quote, free)
        if not isinstance(schema, Mapping) or schema.get("type") not in (
            "number", "integer", "boolean",
        ):  # fmt: skip
            raise UnsupportedError(
                f"the parameter {where} has a schema that a call of this model cannot be held to; "
                "use tool_choice auto, or a plain string, an enum, a number or a boolean"
            )
        return super().value_rule(rule, where, schema, special)

    def read(self, text: str) -> list[ToolCall]:
        """The calls; none if the text is no call."""
        match = re.fullmatch(rf"call:({_NAME})(\{{.*\}})", self.inner(text), re.DOTALL)
        if not match:
            return []
        pieces = [piece for piece in self._pieces(match[2]) if piece]
        try:
            value, rest = _gemma_value(pieces)
        except (ValueError, IndexError, RecursionError):
            return []
        return [ToolCall(match[1], value)] if not rest and isinstance(value, dict) else []

    def _pieces(self, text: str) -> Iterable[Any]:
        """Punctuation and words as they are, texts between quotes as tuples of one."""
        parts = text.split(self.quote)
        for number, part in enumerate(parts):
            if number % 2:
                yield (part,)
            else:
                yield from (one.strip() for one in re.split(r"([{}\[\]:,])", part))


def _gemma_value(pieces: list[Any]) -> tuple[Any, list[Any]]:
    """A value, and the pieces after it.

    Raises:
        ValueError, IndexError: there is none.
    """
    first, rest = pieces[0], pieces[1:]
    if isinstance(first, tuple):
        return first[0], rest
    if first not in ("{", "["):
        return json.loads(first), rest
    found: list[Any] = []
    close = "}" if first == "{" else "]"
    while rest[0] != close:
        if found:
            if rest[0] != ",":
                raise ValueError("no comma")
            rest = rest[1:]
        key: Any = None
        if first == "{":
            key, colon, rest = rest[0], rest[1], rest[2:]
            key = key[0] if isinstance(key, tuple) else key
            if colon != ":":
                raise ValueError("no colon")
        value, rest = _gemma_value(rest)
        found.append((key, value))
    return (dict(found) if first == "{" else [value for _, value in found]), rest[1:]


XML = XmlSyntax("xml", ("<tool_call>", "<function="), "</tool_call>", "<tool_call>\n",
                "\n</tool_call>")  # fmt: skip
LFM2 = PythonSyntax("lfm2", ("<|tool_call_start|>",), "<|tool_call_end|>", "<|tool_call_start|>[",
                    "]<|tool_call_end|>")  # fmt: skip
FUNCTION_GEMMA = GemmaSyntax("gemma", ("<start_function_call>",), "<end_function_call>",
                             "<start_function_call>", "<end_function_call>")  # fmt: skip
GEMMA4 = GemmaSyntax("gemma4", ("<|tool_call>",), "<tool_call|>", "<|tool_call>", "<tool_call|>",
                     quote='<|"|>')  # fmt: skip


def syntax_of(template: str) -> ToolSyntax | None:
    """The syntax that a chat template teaches; None if it knows no tools, or in another way.

    The template decides: it holds the marks that the model was trained on.
    """
    if "tools" not in template:
        return None
    if is_harmony(template):
        return HARMONY
    for mark, syntax in (
        ("<start_function_call>", FUNCTION_GEMMA), ("<start_function_declaration>", FUNCTION_GEMMA),
        ("<|tool_call>", GEMMA4), ("<|tool_list_start|>", LFM2), ("<|tool_call_start|>", LFM2),
        ("[TOOL_CALLS]", MISTRAL),
    ):  # fmt: skip
        if mark in template:
            return syntax
    if "<function=" in template:
        return XML if "<parameter=" in template and "<tool_call>" in template else None
    if "<tool_call>" in template:
        return HERMES
    if '"parameters"' in template and ("ipython" in template or "<|python_tag|>" in template):
        return LLAMA3
    return None
