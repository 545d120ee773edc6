"""Answers taken apart: thought and calls of tools, by family, however the text is cut."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edgeq.core.errors import UnsupportedError
from edgeq.serving.parts import Splitter, Text
from edgeq.serving.tool_families import FUNCTION_GEMMA, GEMMA4, LFM2, XML, syntax_of
from edgeq.serving.tools import HERMES, LLAMA3, MISTRAL, ToolCall, ToolSyntax, moved

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
        # Hermes 2 and 3 write the arguments first, and a space after the mark
        (HERMES, '<tool_call>\n{"arguments": {"city": "Köln {}"}, "name": "weather"}\n'
                 "</tool_call> ", "", [WEATHER]),
        (HERMES, f"<think>\n<tool_call>{CALL}</tool_call>?\n</think>\n\nNo.", "No.", []),
        (HERMES, f"<think>\nHm.</think><tool_call>{CALL}</tool_call>Then:"
                 f"<tool_call>{CALL}</tool_call>.", "Then:.", [WEATHER, WEATHER]),
        (HERMES, f"<tool_call>{CALL[:-1]}</tool_call><tool_call>{CALL}</tool_call>",
         f"<tool_call>{CALL[:-1]}</tool_call>", [WEATHER]),
        (HERMES, "<tool_call>" + '{"a":' * 3000 + "</tool_call>",
         "<tool_call>" + '{"a":' * 3000 + "</tool_call>", []),
        (HERMES, '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Köln {}\\"}"}'
                 "</tool_call>", "", [WEATHER]),
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
        (MISTRAL, f'[TOOL_CALLS] [{CALL[:-1]}, "id": "aB3456789"}}]', "", [WEATHER]),
        (MISTRAL, f"[TOOL_CALLS] [{CALL}", f"[TOOL_CALLS] [{CALL}", []),
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
    assert syntax_of("{{ tools }}<tool_call><function=x><parameter=y>") is XML
    assert syntax_of("{{ tools }}<function=x>{...}</function>") is None  # another syntax
    assert syntax_of("{{ tools }}<|tool_list_start|>") is LFM2
    assert syntax_of("{{ tools }}<start_function_declaration>") is FUNCTION_GEMMA
    assert syntax_of("{{ tools }}<|tool_call>call:") is GEMMA4
    assert syntax_of("{{ messages }}") is None


@pytest.mark.parametrize("size", SIZES)
def test_a_single_call_is_the_first(size: int) -> None:
    for syntax, text in (
        (HERMES, f"Hm. <tool_call>{CALL}</tool_call> <tool_call>{CALL}</tool_call> Done."),
        (MISTRAL, f"Hm. [TOOL_CALLS][{CALL}, {CALL}]"),
    ):
        splitter, parts = Splitter(False, False, syntax, single=True), []
        for start in range(0, len(text), size):
            parts += splitter.push(text[start : start + size])
        parts += splitter.end()
        calls = [(p.name, p.arguments) for p in parts if isinstance(p, ToolCall)]
        assert calls == [WEATHER]
        assert "".join(p.text for p in parts if isinstance(p, Text)).strip() == "Hm."


def tool(name: str, required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


LIGHT = tool(
    "light", ("room",), room={"type": "string"}, level={"type": "integer"}, on={"type": "boolean"},
    colors={"type": "array", "items": {"type": "string"}}, note={},
)  # fmt: skip
LIGHT_CALL = ("light", {"room": "Küche, 7", "level": 7, "on": True, "colors": ["red", "b"]})
XML_CALL = """<tool_call>
<function=light>
<parameter=room>
Küche, 7
</parameter>
<parameter=level>
7
</parameter>
<parameter=on>
true
</parameter>
<parameter=colors>
["red", "b"]
</parameter>
</function>
</tool_call>"""
LFM2_CALL = (
    '<|tool_call_start|>[light(room="Küche, 7", level=7, on=True, colors=["red", "b"])]'
    "<|tool_call_end|>"
)
GEMMA_CALL = (
    "<start_function_call>call:light{room:<escape>Küche, 7<escape>,level:7,on:true,"
    "colors:[<escape>red<escape>,<escape>b<escape>]}<end_function_call>"
)
GEMMA4_CALL = (
    GEMMA_CALL.replace("<start_function_call>", "<|tool_call>")
    .replace("<end_function_call>", "<tool_call|>")
    .replace("<escape>", '<|"|>')
)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("syntax", "text", "said", "calls"),
    [
        (XML, XML_CALL, "", [LIGHT_CALL]),
        (XML, f"I look.\n{XML_CALL}\n{XML_CALL}", "I look.\n", [LIGHT_CALL, LIGHT_CALL]),
        (XML, XML_CALL.removeprefix("<tool_call>\n"), "", [LIGHT_CALL]),  # models forget it
        (XML, XML_CALL.replace("true", "True"), "", [LIGHT_CALL]),
        (XML, "<tool_call>\n<function=light>\n</function>\n</tool_call>", "", [("light", {})]),
        (XML, "<tool_call>\n<function=light>\n<parameter=room>\na\n\n<b> {\n</parameter>\n"
              "</function>\n</tool_call>", "", [("light", {"room": "a\n\n<b> {"})]),
        (XML, "<tool_call>\n<function=light>\n<parameter=room>\n12\n</parameter>\n"
              "<parameter=note>\n12\n</parameter>\n<parameter=else>\n12\n</parameter>\n"
              "</function>\n</tool_call>", "",
         [("light", {"room": "12", "note": 12, "else": "12"})]),
        (XML, "<tool_call>no</tool_call>", "<tool_call>no</tool_call>", []),
        (XML, "<function=stop>\n</function>\n<function=stop>\n</function>", "",
         [("stop", {}), ("stop", {})]),
        (XML, f"{XML_CALL} Done.", "Done.", [LIGHT_CALL]),
        # cut within an argument
        (XML, XML_CALL[:45], XML_CALL[:45], []),
        (LFM2, '<|tool_call_start|>[get-weather(from="x(a=1)", class=1)]<|tool_call_end|> Done.',
         "Done.", [("get-weather", {"from": "x(a=1)", "class": 1})]),
        (LFM2, '<|tool_call_start|>["x".f(a=1), f(a=1)(b=2)]<|tool_call_end|>',
         '<|tool_call_start|>["x".f(a=1), f(a=1)(b=2)]<|tool_call_end|>', []),
        # what JSON cannot hold
        (LFM2, "<|tool_call_start|>[light(level=1e999)]<|tool_call_end|>",
         "<|tool_call_start|>[light(level=1e999)]<|tool_call_end|>", []),
        (FUNCTION_GEMMA, "<start_function_call>call:light{level:NaN}<end_function_call>",
         "<start_function_call>call:light{level:NaN}<end_function_call>", []),
        (HERMES, '<tool_call>{"name": "light", "arguments": {"level": NaN}}</tool_call>',
         '<tool_call>{"name": "light", "arguments": {"level": NaN}}</tool_call>', []),
        (LFM2, LFM2_CALL, "", [LIGHT_CALL]),
        (LFM2, LFM2_CALL + "Done.", "Done.", [LIGHT_CALL]),
        (LFM2, "<|tool_call_start|>[a.b(), light(on=true, note=None)]<|tool_call_end|>", "",
         [("a.b", {}), ("light", {"on": True, "note": None})]),
        (LFM2, '<|tool_call_start|>[{"name": "light", "arguments": {"on": true}}]<|tool_call_end|>',
         "", [("light", {"on": True})]),
        (LFM2, '<|tool_call_start|>[light(room="\\ud83d\\ude00")]<|tool_call_end|>', "",
         [("light", {"room": "\N{GRINNING FACE}"})]),
        (LFM2, "<|tool_call_start|>[light(7)]<|tool_call_end|>",
         "<|tool_call_start|>[light(7)]<|tool_call_end|>", []),
        (LFM2, '<|tool_call_start|>[light(room=__import__("os"))]<|tool_call_end|>',
         '<|tool_call_start|>[light(room=__import__("os"))]<|tool_call_end|>', []),
        (FUNCTION_GEMMA, GEMMA_CALL, "", [LIGHT_CALL]),
        (FUNCTION_GEMMA, GEMMA_CALL + GEMMA_CALL, "", [LIGHT_CALL, LIGHT_CALL]),
        (FUNCTION_GEMMA, "<start_function_call>call:light{note:{a:1,b:{c:[]}}}<end_function_call>",
         "", [("light", {"note": {"a": 1, "b": {"c": []}}})]),
        (FUNCTION_GEMMA, "<start_function_call>call:light{room:<escape>a}:,{<escape>}"
                         "<end_function_call>", "", [("light", {"room": "a}:,{"})]),
        (FUNCTION_GEMMA, "<start_function_call>call:light{}<end_function_call>", "",
         [("light", {})]),
        (FUNCTION_GEMMA, "<start_function_call>call:light{room:}<end_function_call>",
         "<start_function_call>call:light{room:}<end_function_call>", []),
        (GEMMA4, GEMMA4_CALL, "", [LIGHT_CALL]),
    ],
)  # fmt: skip
def test_calls_that_are_no_json(
    syntax: ToolSyntax, text: str, said: str, calls: list[Any], size: int
) -> None:
    assert taken_apart(text, size, syntax.knowing([LIGHT])) == (said, "", calls)


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "2024", "2024"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "null", None),
        ({"type": ["string", "null"]}, "true", "true"),
        ({"type": ["string", "null"]}, '"2024"', "2024"),
        ({"oneOf": [{"type": "string"}, {"type": "integer"}]}, "7", 7),
        ({"oneOf": [{"type": "string"}, {"type": "integer"}]}, "7.5", "7.5"),
        ({"type": "number"}, "7", 7),
        ({"$ref": "#/$defs/x"}, "7", 7),
    ],
)
def test_what_may_be_a_text_stays_one(schema: dict[str, Any], text: str, value: Any) -> None:
    call = f"<function=light>\n<parameter=room>\n{text}\n</parameter>\n</function>"
    (found,) = XML.knowing([tool("light", room=schema)]).read(call)
    assert found.arguments == {"room": value}


def test_a_brace_within_thought_begins_no_call() -> None:
    text = f"I may answer {LLAMA_CALL}</think>So."
    for size in range(1, len(text) + 1):
        said, thought, calls = taken_apart(text, size, LLAMA3, inside=True)
        assert (said, calls) == ("So.", [])
        assert thought == text.partition("</think>")[0]


def test_a_forced_text_may_hold_markup() -> None:
    pytest.importorskip("llguidance")
    from edgeq.importers import load
    from edgeq.runtime.constraint import GrammarVocabulary
    from edgeq.runtime.tokenizer import Tokenizer
    from tests.paths import DEMO

    model = load(DEMO)
    tokenizer = Tokenizer(model)
    made = XML.grammar([tool("light", ("room",), room={"type": "string"})], {}.get)  # type: ignore[arg-type]
    constraint = GrammarVocabulary.of(model, tokenizer).lark(made).start()
    text = "if (a << b < c) {\n  </p> <b\n}"
    call = XML_CALL.partition("Küche")[0] + text + "\n</parameter>\n</function>\n</tool_call>"
    for token in tokenizer.encode(call, add_bos=False, add_eos=False):
        assert constraint.allowed()[token]
        constraint.accept(token)
    assert XML.read(call)[0].arguments == {"room": text}


FORCED = [
    tool("light", ("room",), room={"type": "string"}, level={"type": "integer"},
         mode={"enum": ["day", "night"]}),
    tool("stop"),
    tool("wait", seconds={"type": "number", "minimum": 0, "maximum": 9}, loud={"type": "boolean"}),
]  # fmt: skip


@pytest.mark.parametrize("syntax", [XML, LFM2, FUNCTION_GEMMA, GEMMA4])
def test_a_forced_call_is_one_that_is_read(syntax: ToolSyntax) -> None:
    """Random texts of the grammar, token by token, are calls with what their schemas allow."""
    pytest.importorskip("llguidance")
    import random

    from edgeq.importers import load
    from edgeq.runtime.constraint import GrammarVocabulary
    from edgeq.runtime.tokenizer import Tokenizer
    from tests.paths import DEMO

    model = load(DEMO)
    tokenizer = Tokenizer(model)
    grammar = GrammarVocabulary.of(model, tokenizer).lark(
        syntax.grammar(FORCED, {}.get)  # type: ignore[arg-type]
    )
    stops = {
        i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) in (b'"', b"<", b"\n")
    }
    mark = tokenizer.encode("\n</parameter>\n", add_bos=False, add_eos=False)
    names = []
    for seed in range(40):
        chance, constraint = random.Random(seed), grammar.start()
        ids: list[int] = []
        coming: list[int] = []
        while len(ids) < 400:
            allowed = constraint.allowed().nonzero()[0].tolist()
            if any(one in tokenizer.eos_ids for one in allowed):
                break
            ending = [one for one in allowed if one in stops]  # or free texts would not end
            if not coming and syntax is XML and chance.random() < 0.2:
                coming = [*mark]
            token = coming.pop(0) if coming else -1
            if token not in allowed:
                coming = []
                token = chance.choice(ending if ending and chance.random() < 0.3 else allowed)
            constraint.accept(token)
            ids.append(token)
        else:
            continue  # an answer that is cut is no call
        text = tokenizer.decode(ids)
        (call,) = syntax.knowing(FORCED).read(text) or [None]
        assert call is not None, text
        names.append(call.name)
        if call.name == "light":
            assert isinstance(call.arguments["room"], str)
            assert isinstance(call.arguments.get("level", 1), int)
            assert call.arguments.get("mode", "day") in ("day", "night")
        if call.name == "wait":
            assert 0 <= call.arguments.get("seconds", 0) <= 9
            assert set(call.arguments) <= {"seconds", "loud"}
    assert len(names) > 10
    assert set(names) == {"light", "stop", "wait"}


@pytest.mark.parametrize("schema", [
    {"type": "string", "pattern": "a+"}, {"$ref": "#/$defs/x"}, {"type": "string", "maxLength": 3},
])  # fmt: skip
def test_what_a_forced_call_cannot_be_held_to_is_named(schema: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="light"):
        XML.grammar([tool("light", room=schema)], {}.get)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="light"):
        FUNCTION_GEMMA.grammar([tool("light", room={"type": "array"})], {}.get)  # type: ignore[arg-type]


def test_references_within_parameters_still_hold() -> None:
    """They begin at the parameters, which are a part of the schema of a call."""
    inner = {
        "$defs": {"city": {"type": "object", "properties": {"$ref": {"type": "string"}}}},
        "properties": {"to": {"$ref": "#/$defs/city"}, "via": {"items": {"$ref": "#"}},
                       "enum": {"$ref": "#/$defs/city"}},
        "default": {"$ref": "#/as/data"}, "enum": [{"$ref": "#"}],
    }  # fmt: skip
    found = moved(inner, "#/properties/arguments")
    at = "#/properties/arguments"
    assert found["properties"] == {
        "to": {"$ref": f"{at}/$defs/city"}, "via": {"items": {"$ref": at}},
        "enum": {"$ref": f"{at}/$defs/city"},
    }  # fmt: skip
    assert {key: found[key] for key in ("$defs", "default", "enum")} == {
        key: inner[key] for key in ("$defs", "default", "enum")
    }
    assert moved({**inner, "$id": "https://example.org/x"}, at)["properties"] == inner["properties"]
