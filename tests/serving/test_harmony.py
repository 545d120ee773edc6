"""Harmony: gpt-oss's channels are reasoning, content and calls, however the text is cut."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

import edgeq
from edgeq.serving.harmony import FINAL, HARMONY, HarmonySplitter, is_harmony, with_thinking
from edgeq.serving.parts import Text
from edgeq.serving.tool_families import syntax_of
from edgeq.serving.tools import ToolCall
from tests.chat_models import chat_copy
from tests.serving.plain_http import ask

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
SIZES = [1, 2, 3, 7, 1000]
WEATHER = ("get_current_weather", {"location": "San Francisco"})
CALL = '{"location": "San Francisco"}'


def taken_apart(text: str, size: int, **how: Any) -> tuple[str, str, list[tuple[str, Any]]]:
    """(said, thought, calls) of a text that comes in pieces of some characters."""
    splitter = HarmonySplitter(**how)
    parts = []
    for start in range(0, len(text), size):
        parts += splitter.push(text[start : start + size])
    parts += splitter.end()
    said = "".join(p.text for p in parts if isinstance(p, Text) and not p.reasoning)
    thought = "".join(p.text for p in parts if isinstance(p, Text) and p.reasoning)
    return said, thought, [(p.name, p.arguments) for p in parts if isinstance(p, ToolCall)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("text", "said", "thought", "calls"),
    [
        # the examples of the published description, from where the prompt ends
        (
            '<|channel|>analysis<|message|>User asks: "What is 2 + 2?" Simple arithmetic. Provide '
            "answer.<|end|><|start|>assistant<|channel|>final<|message|>2 + 2 = 4.<|return|>",
            "2 + 2 = 4.",
            'User asks: "What is 2 + 2?" Simple arithmetic. Provide answer.',
            [],
        ),
        (
            "<|channel|>analysis<|message|>Need to use function get_current_weather.<|end|>"
            "<|start|>assistant<|channel|>commentary to=functions.get_current_weather "
            f"<|constrain|>json<|message|>{CALL}<|call|>",
            "",
            "Need to use function get_current_weather.",
            [WEATHER],
        ),
        # the tool before the channel, and the type without its mark
        (
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant "
            f"to=functions.get_current_weather<|channel|>commentary json<|message|>{CALL}",
            "",
            "Hm.",
            [WEATHER],
        ),
        # a preamble is content
        (
            "<|channel|>analysis<|message|>A plan.<|end|><|start|>assistant<|channel|>commentary"
            "<|message|>**Action plan**: 1. Look.<|end|><|start|>assistant<|channel|>commentary "
            f"to=functions.get_current_weather <|constrain|>json<|message|>{CALL}<|call|>",
            "**Action plan**: 1. Look.",
            "A plan.",
            [WEATHER],
        ),
        ("<|channel|>final<|message|>Hello.", "Hello.", "", []),
        ("<|channel|>analysis<|message|>Cut sho", "", "Cut sho", []),
        ("<|channel|>analysis<|message|>One.<|end|><|start|>assis", "", "One.", []),
        ("<|channel|>analysis<|mess", "", "", []),
        ("", "", "", []),
        # messages of one kind stay apart
        (
            "<|channel|>commentary<|message|>One.<|end|><|start|>assistant<|channel|>final"
            "<|message|>Two.<|return|>",
            "One.\n\nTwo.",
            "",
            [],
        ),
        # what is no call is content, and so is an answer in no channel
        (
            "<|channel|>commentary to=functions.f <|constrain|>json<|message|>no JSON<|call|>",
            "no JSON",
            "",
            [],
        ),
        ("An answer < without | channels.", "An answer < without | channels.", "", []),
        ("to be, or not", "to be, or not", "", []),
        ("a <|channel> b", "a <|channel> b", "", []),
    ],
)
def test_channels(size: int, text: str, said: str, thought: str, calls: list[Any]) -> None:
    assert taken_apart(text, size, tools=True) == (said, thought, calls)


@pytest.mark.parametrize("size", SIZES)
def test_what_a_request_has_not_asked_for(size: int) -> None:
    text = f"<|channel|>commentary to=functions.f <|constrain|>json<|message|>{CALL}<|call|>"
    assert taken_apart(text, size) == (CALL, "", [])
    assert taken_apart('{"a": 1}', size, begun=FINAL) == ('{"a": 1}', "", [])
    twice = f"{text}<|start|>assistant{text}"
    assert len(taken_apart(twice, size, tools=True)[2]) == 2
    assert len(taken_apart(twice, size, tools=True, single=True)[2]) == 1


def test_text_comes_as_soon_as_it_is_certain() -> None:
    splitter = HarmonySplitter()
    assert not splitter.push("<|channel|>analysis")
    assert not splitter.in_reasoning
    assert splitter.push("<|message|>One <") == [Text("One ", True)]
    assert splitter.in_reasoning
    assert splitter.push("two") == [Text("<two", True)]
    assert not splitter.push("<|end|><|start|>assistant<|channel|>")
    assert splitter.push("final<|message|>Three") == [Text("Three")]
    assert not splitter.in_reasoning
    assert not splitter.end()


def test_the_template_tells_harmony() -> None:
    template = "{{ tools }}<|start|>assistant<|channel|>final<|message|>{{ content }}<|return|>"
    assert is_harmony(template)
    assert syntax_of(template) is HARMONY
    assert not is_harmony("<|im_start|>assistant<think>")


def test_earlier_reasoning_has_the_templates_name() -> None:
    talk = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "", "reasoning_content": "Hm."},
    ]
    assert with_thinking(talk) == [talk[0], {"role": "assistant", "content": "", "thinking": "Hm."}]


def test_the_grammar_of_a_call_names_its_tokens() -> None:
    function = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": function}]
    special = {"<|channel|>": 5, "<|constrain|>": 6, "<|message|>": 7}
    start, call, arguments = HARMONY.grammar(tools, special.get).splitlines()
    assert start == "start: call0"
    assert call == 'call0: <[5]> "commentary to=functions.f " <[6]> "json" <[7]> call0_json'
    assert arguments.startswith('call0_json: %json {"type": "object"')


HARMONY_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if tools %}{{ tools[0].function.name }}{% endif %}"
    "{% if add_generation_prompt %}<|start|>assistant{% if effort is defined %}<|channel|>analysis"
    "<|message|>Once upon{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def harmony_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[edgeq.Server]:
    """The demo model, said to answer in channels, whose marks are ordinary text to it."""
    folder = chat_copy(tmp_path_factory.mktemp("harmony") / "m", HARMONY_TEMPLATE)
    settings = edgeq.ServerSettings(port=0, parallel=1)
    with edgeq.Server([("m", folder)], settings, context=500, threads=1) as server:
        yield server


def test_a_server_tells_channels_apart(harmony_server: edgeq.Server) -> None:
    asked: dict[str, Any] = {"messages": HELLO, "max_tokens": 8, "temperature": 0}
    thinking = {**asked, "chat_template_kwargs": {"effort": "low"}}
    reply = ask(harmony_server, CHAT, thinking).json
    message = reply["choices"][0]["message"]
    assert message["content"] == ""
    assert message["reasoning_content"]
    assert "Once upon" not in message["reasoning_content"]  # which the prompt holds
    assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] == 8
    plain = ask(harmony_server, CHAT, asked).json["choices"][0]["message"]
    assert plain["content"]  # of a model that knows no channels
    assert "reasoning_content" not in plain


def test_forms_that_a_request_gives(harmony_server: edgeq.Server) -> None:
    """JSON is the text of the channel for answers, and a call is a message to a function."""
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    function = {"name": "look", "parameters": schema}
    tools = [{"type": "function", "function": function}]
    for kwargs in ({}, {"effort": "low"}):
        asked: dict[str, Any] = {"messages": HELLO, "max_tokens": 90, "temperature": 0,
                                 "chat_template_kwargs": kwargs}  # fmt: skip
        message = ask(harmony_server, CHAT, {**asked, "response_format": form}).json
        assert json.loads(message["choices"][0]["message"]["content"])["ok"] in (True, False)
        reply = ask(harmony_server, CHAT, {**asked, "tools": tools, "tool_choice": "required"})
        choice = reply.json["choices"][0]
        (call,) = choice["message"]["tool_calls"]
        assert (choice["finish_reason"], call["function"]["name"]) == ("tool_calls", "look")
        assert json.loads(call["function"]["arguments"])["ok"] in (True, False)


def test_json_or_a_call(harmony_server: edgeq.Server) -> None:
    """With tools and a form, the answer chooses the channel, and either is read."""
    schema = {"enum": ["yes", "no"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    parameters = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
                  "additionalProperties": False}  # fmt: skip
    tools = [{"type": "function", "function": {"name": "look", "parameters": parameters}}]
    tokenizer = edgeq.Tokenizer(edgeq.demo_model())
    starts = {i: tokenizer.token_bytes(i)[:1] for i in range(tokenizer.vocab_size)}
    kinds = []
    for unlikely in (b"c", b"f"):  # commentary begins with the one, and final with the other
        bias = {str(i): -100 for i, start in starts.items() if start == unlikely}
        asked: dict[str, Any] = {"messages": HELLO, "max_tokens": 90, "temperature": 0,
                                 "logit_bias": bias, "tools": tools,
                                 "response_format": form}  # fmt: skip
        message = ask(harmony_server, CHAT, asked).json["choices"][0]["message"]
        if message.get("tool_calls"):
            arguments = json.loads(message["tool_calls"][0]["function"]["arguments"])
            assert arguments["ok"] in (True, False)
        else:
            assert json.loads(message["content"]) in ("yes", "no")
        kinds.append("call" if message.get("tool_calls") else "json")
    assert kinds == ["json", "call"]
