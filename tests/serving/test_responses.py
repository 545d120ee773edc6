"""``/v1/responses``, by OpenAI's own client."""

from __future__ import annotations

import json
from typing import Any

import pytest

import edgeq
from tests.serving.plain_http import ask

openai = pytest.importorskip("openai")
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"


def test_a_response_is_the_chat_s_answer(server: edgeq.Server, openai_client: Any) -> None:
    made = openai_client.responses.create(
        model="talker", input="Tell me.", temperature=0, max_output_tokens=8
    )
    chat = {"messages": [{"role": "user", "content": "Tell me."}], "temperature": 0,
            "max_tokens": 8}  # fmt: skip
    said = ask(server, CHAT, chat).json
    assert made.output_text == said["choices"][0]["message"]["content"]
    assert (made.status, made.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert made.usage.output_tokens == 8
    assert made.usage.input_tokens == said["usage"]["prompt_tokens"]
    following = openai_client.responses.create(
        model="talker", temperature=0, max_output_tokens=4, instructions="Be brief.",
        input=[{"role": "user", "content": "Tell me."},
               *[one.model_dump() for one in made.output],
               {"role": "user", "content": [{"type": "input_text", "text": "And?"}]}],
    )  # fmt: skip
    assert following.usage.input_tokens > made.usage.total_tokens


def test_a_stream_has_the_same_text(openai_client: Any) -> None:
    asked: dict[str, Any] = {"model": "talker", "input": "Tell me.", "temperature": 0,
                             "max_output_tokens": 8}  # fmt: skip
    events = list(openai_client.responses.create(**asked, stream=True))
    whole = openai_client.responses.create(**asked)
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done",
        "response.incomplete",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text == events[-1].response.output_text


def test_a_schema_is_kept(server: edgeq.Server) -> None:
    pytest.importorskip("llguidance")
    form = {"format": {"type": "json_schema", "name": "x", "schema": {"enum": ["yes", "no"]}}}
    made = ask(server, RESPONSES, {"input": "Well?", "model": "caller", "text": form}).json
    assert json.loads(made["output"][0]["content"][0]["text"]) in ("yes", "no")
    assert made["status"] == "completed"


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call_output", "output": "1"}]}, "input[0]"),
        ({"input": [{"role": "nobody", "content": "a"}]}, "input[0].role"),
        ({"input": "a", "text": {"format": {"type": "xml"}}}, "text"),
        ({"input": "a", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools"),
    ],
)
def test_what_cannot_be_asked_for(server: edgeq.Server, asked: Any, param: str) -> None:
    reply = ask(server, RESPONSES, asked)
    assert (reply.status, reply.json["error"]["param"]) == (400, param)


def test_errors_name_the_fields_of_this_interface(server: edgeq.Server) -> None:
    picture = {"role": "user", "content": [{"type": "input_image"}]}
    hello = {"role": "user", "content": "Hello."}
    for instructions in ({}, {"instructions": "Be brief."}):
        error = ask(server, RESPONSES, {**instructions, "input": [hello, picture]}).json["error"]
        assert error["param"] == "input[1].content[0]"
        assert error["message"].startswith("input[1].content[0] is")
    form = {"type": "json_schema", "name": "x", "schema": 1}
    error = ask(server, RESPONSES, {"input": "a", "text": {"format": form}}).json["error"]
    assert error["param"] == "text"
    assert error["message"].startswith("text.format is")
