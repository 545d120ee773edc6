"""Answers of a form that was asked for: JSON of a schema, a grammar, calls of tools."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

import edgeq
from edgeq.core.errors import UsageError
from edgeq.serving.tools import HERMES
from tests.real_models import SMOLLM2, real_model
from tests.serving.plain_http import ask

pytest.importorskip("llguidance")
openai = pytest.importorskip("openai")
HELLO = [{"role": "user", "content": "Tell me."}]
CHAT = "/v1/chat/completions"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "likes": {"type": "array", "items": {"enum": ["lamps", "trees"]}, "maxItems": 2},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {
        "name": name, "description": "Of a city.",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}},
                       "required": ["city"], "additionalProperties": False},
    }} for name in ("weather", "time")
]  # fmt: skip

ENDLESS = {"$ref": "#/$defs/x", "$defs": {"x": {"$ref": "#/$defs/x"}}}
"""A schema that is read without complaint, and that no value follows."""


@pytest.mark.parametrize("temperature", [0, 1, 2])
def test_a_schema_is_kept_even_by_a_model_that_knows_no_json(
    openai_client: Any, temperature: float
) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    answer = openai_client.chat.completions.create(
        model="talker", messages=HELLO, response_format=form, temperature=temperature, seed=3
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "stop"
    person = json.loads(choice.message.content)
    assert list(person) == ["name", "age", "likes"]
    assert type(person["age"]) is int
    assert 0 <= person["age"] <= 150
    assert set(person["likes"]) <= {"lamps", "trees"}


def test_objects_and_grammars(server: edgeq.Server) -> None:
    asked = {"messages": HELLO, "seed": 1, "temperature": 2}
    form = {"type": "json_object"}
    cut = ask(server, CHAT, {**asked, "response_format": form, "max_tokens": 5}).json
    assert cut["choices"][0]["message"]["content"].startswith("{")
    said = ask(server, CHAT, {**asked, "grammar": "start: /[a-c]{4}/"}).json["choices"][0]
    assert set(said["message"]["content"]) <= set("abc")
    assert (len(said["message"]["content"]), said["finish_reason"]) == (4, "stop")


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}},
         "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
         "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": ENDLESS}}},
         "response_format"),
        ({"grammar": "start: nothing"}, "grammar"),
        ({"grammar": "start: \"a\"", "response_format": {"type": "json_object"}},
         "response_format"),
        ({"tools": [{}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"function": {"name": "wether"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_for(server: edgeq.Server, asked: dict[str, Any], param: str) -> None:
    reply = ask(server, CHAT, {"model": "caller", "messages": HELLO, **asked})
    assert reply.status == 400, reply.raw
    assert reply.json["error"]["param"] == param


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", {"weather", "time"}), ({"type": "function", "function": {"name": "time"}},
                                         {"time"})],
)  # fmt: skip
def test_a_tool_that_must_be_called_is(
    openai_client: Any, choice: Any, names: set[str], stream: bool
) -> None:
    asked: dict[str, Any] = {"model": "caller", "messages": HELLO, "tools": TOOLS,
                             "tool_choice": choice, "temperature": 1.5, "seed": 4}  # fmt: skip
    if stream:
        events = list(openai_client.chat.completions.create(**asked, stream=True))
        assert events[-1].choices[0].finish_reason == "tool_calls"
        assert not any(event.choices[0].delta.content for event in events)
        calls = [one for e in events for one in e.choices[0].delta.tool_calls or ()]
    else:
        answer = openai_client.chat.completions.create(**asked).choices[0]
        assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
        calls = answer.message.tool_calls
    assert len(calls) == 1
    assert calls[0].function.name in names
    assert json.loads(calls[0].function.arguments)["city"] in ("Rome", "Oslo")


@pytest.mark.parametrize("count", [1, 2])
def test_parameters_may_refer_to_definitions(server: edgeq.Server, count: int) -> None:
    """As those that Pydantic writes do, also to themselves."""
    parameters = {
        "$defs": {"Room": {"enum": ["hall", "attic"]}},
        "type": "object", "additionalProperties": False, "required": ["room", "then"],
        "properties": {"room": {"$ref": "#/$defs/Room"},
                       "then": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    }  # fmt: skip
    tools = [{"type": "function", "function": {"name": f"light{n}", "parameters": parameters}}
             for n in range(count)]  # fmt: skip
    body = {"model": "caller", "messages": HELLO, "tools": tools, "tool_choice": "required"}
    choice = ask(server, CHAT, body).json["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"])["room"] in ("hall", "attic")

    served = server.service.models["caller"]
    grammar = served.grammars().lark(HERMES.grammar(tools, {}.get))  # type: ignore[arg-type]

    def follows(arguments: str) -> bool:
        text = f'<tool_call>\n{{"name": "light{count - 1}", "arguments": {arguments}}}'
        constraint = grammar.start()
        try:
            for token in served.tokenizer.encode(text, add_bos=False):
                constraint.accept(token)
        except UsageError:
            return False
        return True

    nested = '{"room": "attic", "then": {"room": "hall", "then": null}}'
    assert follows(nested)
    assert not follows(nested.replace("hall", "cellar"))
    assert not follows('{"room": "attic", "then": {"name": "light0", "arguments": null}}')


def test_a_schema_that_fails_within_the_answer_is_the_request_s_fault(
    server: edgeq.Server,
) -> None:
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}, "required": ["a"],
              "$defs": ENDLESS["$defs"]}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    asked = {"model": "talker", "messages": HELLO, "response_format": form}
    large = {"type": "array", "items": {"$ref": "#"}, "minItems": 100_000}
    for stream, one in itertools.product((False, True), (schema, large)):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": one}}
        reply = ask(server, CHAT, {**asked, "stream": stream, "response_format": form})
        assert b"cannot be" in reply.raw
        assert reply.status == 400 or (stream and b'"invalid_request_error"' in reply.raw)
    assert ask(server, CHAT, {**asked, "response_format": None, "max_tokens": 2}).status == 200


def test_with_tools_an_answer_is_json_or_a_call(server: edgeq.Server) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}}
    asked = {"model": "caller", "messages": HELLO, "tools": TOOLS, "response_format": form,
             "temperature": 1.5}  # fmt: skip
    kinds = set()
    for seed in range(12):
        # the model of the tests writes neither, so it is pushed to one or the other
        first = ask(server, "/tokenize", {"model": "caller", "content": '<"'}).json["tokens"]
        biases = {str(token): (100 if seed % 2 else -100) for token in first[:1]}
        choice = ask(server, CHAT, {**asked, "seed": seed, "logit_bias": biases}).json["choices"][0]
        message = choice["message"]
        if message.get("tool_calls"):
            assert choice["finish_reason"] == "tool_calls"
            call = message["tool_calls"][0]["function"]
            assert json.loads(call["arguments"])["city"] in ("Rome", "Oslo")
        else:
            assert json.loads(message["content"]) in ("yes", "no")
        kinds.add("call" if message.get("tool_calls") else "json")
    assert kinds == {"call", "json"}


def test_the_tool_s_answer_goes_back(openai_client: Any) -> None:
    """As the client's own objects: the call, and what the tool said."""
    asked: dict[str, Any] = {"model": "caller", "tools": TOOLS}
    first = openai_client.chat.completions.create(
        messages=HELLO, tool_choice="required", **asked
    ).choices[0].message  # fmt: skip
    told = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "Sunny."}
    talk = [*HELLO, first, told]
    answer = openai_client.chat.completions.create(
        messages=talk, max_tokens=4, tool_choice="none", **asked
    )
    assert answer.choices[0].message.tool_calls is None


def test_thought_is_apart(server: edgeq.Server) -> None:
    """The template opens a thought, which this model never ends."""
    asked = {"model": "caller", "messages": HELLO, "max_tokens": 6, "temperature": 0}
    plain = ask(server, CHAT, asked).json["choices"][0]["message"]
    assert plain["content"]
    assert "reasoning_content" not in plain
    thinking = {**asked, "chat_template_kwargs": {"enable_thinking": True}}
    reply = ask(server, CHAT, thinking).json
    message = reply["choices"][0]["message"]
    assert (message["content"], bool(message["reasoning_content"])) == ("", True)
    assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] == 6
    reserved = {**asked, "chat_template_kwargs": {"messages": []}}
    assert ask(server, CHAT, reserved).code == "invalid_value"


def test_a_model_that_knows_no_tools_calls_them_too(talker: Any) -> None:
    """The template of this model has no tools: the prompt describes them, a grammar holds it."""
    settings = edgeq.ServerSettings(port=0, parallel=1)
    with (
        edgeq.Server(str(talker), settings, context=600, threads=1) as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        asked: dict[str, Any] = {"model": "talker", "messages": HELLO, "tools": TOOLS, "seed": 4,
                                 "tool_choice": "required", "temperature": 1.5}  # fmt: skip
        streamed = []
        for event in client.chat.completions.create(**asked, stream=True):
            streamed += event.choices[0].delta.tool_calls or ()
        assert event.choices[0].finish_reason == "tool_calls"
        message = client.chat.completions.create(**asked).choices[0].message
        for (call,) in (streamed, message.tool_calls):
            assert call.function.name in ("weather", "time")
            assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
        told = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Sunny."}
        talk = [*HELLO, message, told]
        with_tools = client.chat.completions.create(
            model="talker", messages=talk, tools=TOOLS, max_tokens=4
        )
        without = client.chat.completions.create(model="talker", messages=talk, max_tokens=4)
        # the description is part of the prompt
        assert with_tools.usage.prompt_tokens > without.usage.prompt_tokens + 200


@pytest.mark.slow
def test_a_real_model_calls_ten_tools_validly() -> None:
    """50 of 50 answers are calls with arguments that the schemas allow, as OpenAI's client says."""
    arguments: dict[str, Any] = {
        "get_weather": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["C", "F"]}},
        "get_time": {"zone": {"enum": ["UTC", "CET", "EST"]}},
        "add": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "light": {"room": {"enum": ["kitchen", "hall"]}, "on": {"type": "boolean"}},
        "send": {"to": {"type": "string", "maxLength": 15}, "text": {"type": "string",
                                                                     "maxLength": 30}},
        "translate": {"text": {"type": "string", "maxLength": 30}, "to": {"enum": ["de", "fr"]}},
        "set_timer": {"minutes": {"type": "integer", "minimum": 1, "maximum": 90}},
        "search": {"words": {"type": "array", "items": {"type": "string", "maxLength": 10},
                             "minItems": 1, "maxItems": 3}},
        "volume": {"level": {"type": "number", "minimum": 0, "maximum": 1}},
        "stop": {},
    }  # fmt: skip
    tools = [
        {"type": "function", "function": {"name": name, "description": f"Use it to {name}.",
         "parameters": {"type": "object", "properties": properties, "required": [*properties],
                        "additionalProperties": False}}}
        for name, properties in arguments.items()
    ]  # fmt: skip
    prompts = ["What is the weather in Oslo?", "Turn on the light.", "Add 3 and 4.",
               "Say good morning in German.", "Stop!"]  # fmt: skip
    settings = edgeq.ServerSettings(port=0, parallel=2)
    jsonschema = pytest.importorskip("jsonschema_rs")  # comes with schemathesis
    with (
        edgeq.Server(str(real_model(SMOLLM2)), settings, context=2048, threads=1) as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        model = client.models.list().data[0].id
        for name in arguments:
            choice = {"type": "function", "function": {"name": name}}
            for number, prompt in enumerate(prompts):
                asked = choice if number % 2 else "required"
                answer = client.chat.completions.create(
                    model=model, messages=[{"role": "user", "content": prompt}], tools=tools,
                    tool_choice=asked, temperature=1, seed=number,
                ).choices[0]  # fmt: skip
                assert answer.finish_reason == "tool_calls"
                (call,) = answer.message.tool_calls
                assert call.function.name == (name if number % 2 else call.function.name)
                one = tools[[*arguments].index(call.function.name)]["function"]
                jsonschema.validate(one["parameters"], json.loads(call.function.arguments))
