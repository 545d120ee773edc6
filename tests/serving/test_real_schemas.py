"""JSON of many schemas from a real chat model: the constraint does the work, not the model."""

from __future__ import annotations

import json
from typing import Any

import pytest

import edgeq
from tests.real_models import SMOLLM2, real_model

PROMPTS = (
    "Describe a person.", "Name a city and a number.", "Tell me a joke about lamps.",
    "List three fruits.", "Is the sky blue?",
)  # fmt: skip
TEXT = {"type": "string", "maxLength": 30}
SCHEMAS: tuple[dict[str, Any], ...] = (
    {"type": "object", "properties": {"name": TEXT, "age": {"type": "integer", "minimum": 0,
     "maximum": 120}}, "required": ["name", "age"], "additionalProperties": False},
    {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 3},
    {"enum": ["yes", "no", 7, None, {"a": [1]}]},
    {"type": "boolean"},
    {"type": "object", "properties": {"at": {"type": "object", "properties": {
     "lat": {"type": "integer", "minimum": -90, "maximum": 90}}, "required": ["lat"],
     "additionalProperties": False}}, "required": ["at"], "additionalProperties": False},
    {"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"},
    {"type": "string", "format": "date"},
    {"anyOf": [{"type": "integer", "minimum": 5, "maximum": 9}, {"type": "null"}]},
    {"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "object", "properties": {
     "v": {"type": "integer", "minimum": 0, "maximum": 9},
     "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/leaf"}]}},
     "required": ["v", "next"], "additionalProperties": False}, "leaf": {"const": "end"}}},
    {"type": "object", "properties": {"kind": {"enum": ["a", "b"]}, "tags": {"type": "array",
     "items": {"enum": ["x", "y"]}, "maxItems": 2}, "note": TEXT}, "required": ["kind"],
     "additionalProperties": False},
)  # fmt: skip


@pytest.mark.slow
def test_every_answer_is_of_its_schema() -> None:
    """By OpenAI's client, whole and streamed in turn."""
    openai = pytest.importorskip("openai")
    jsonschema_rs = pytest.importorskip("jsonschema_rs")
    pytest.importorskip("llguidance")
    settings = edgeq.ServerSettings(port=0, parallel=1)
    answers = set()
    with (
        edgeq.Server(real_model(SMOLLM2), settings, context=512, threads=1) as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        name = client.models.list().data[0].id
        for number, schema in enumerate(SCHEMAS):
            valid = jsonschema_rs.validator_for(schema)
            form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
            for seed, prompt in enumerate(PROMPTS):
                asked: dict[str, Any] = {
                    "model": name, "temperature": 1, "seed": 10 * number + seed,
                    "messages": [{"role": "user", "content": prompt}], "max_tokens": 200,
                    "response_format": form,
                }  # fmt: skip
                if seed % 2:
                    events = client.chat.completions.create(**asked, stream=True)
                    choices = [event.choices[0] for event in events]
                    text = "".join(choice.delta.content or "" for choice in choices)
                    reason = choices[-1].finish_reason
                else:
                    choice = client.chat.completions.create(**asked).choices[0]
                    text, reason = choice.message.content, choice.finish_reason
                assert reason == "stop", text
                assert valid.is_valid(json.loads(text)), (schema, text)
                answers.add(text)
    assert len(answers) > 25  # the model chooses within the schema
