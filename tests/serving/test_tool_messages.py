"""Conversations with tools, in the forms that published chat templates demand."""

from __future__ import annotations

import json
from typing import Any

import pytest

import edgeq
from edgeq.core.errors import UsageError
from edgeq.serving.messages import checked_messages
from edgeq.serving.prefix_cache import SnapshotStore
from edgeq.serving.tool_messages import named_results, taught, with_short_ids
from tests.chat_models import chat_copy


def call(name: str, of: str, **arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"id": of, "type": "function", "function": function}


TALK = checked_messages([
    {"role": "user", "content": "Weather and time in Oslo?"},
    {"role": "assistant", "content": None, "tool_calls": [
        call("weather", "call_000000000000000000000001", city="Oslo"),
        call("time", "call_000000000000000000000002", city="Oslo"),
    ]},
    {"role": "tool", "tool_call_id": "call_000000000000000000000001", "content": "Sunny."},
    {"role": "tool", "tool_call_id": "call_000000000000000000000002", "content": "Noon."},
])  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]

# what the templates of Hermes 2 and 3 and of Mistral 7B and Nemo demand of messages
NEEDS_NAMES = (
    "{% for m in messages %}{% if m.role == 'tool' %}{% if m.name is not defined %}"
    "{{ raise_exception('a name is needed') }}{% endif %}{{ m.name }}: {{ m.content }}|{% endif %}"
    "{% endfor %}"
)
NEEDS_SHORT_IDS = (
    "{% for m in messages %}{% if m.tool_calls is defined %}{% for c in m.tool_calls %}"
    "{% if c.id|length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
    "{{ c.function.name }}={{ c.id }}|{% endfor %}"
    "{% elif m.role == 'tool' %}{% if m.tool_call_id|length != 9 %}"
    "{{ raise_exception('ids have 9 characters') }}{% endif %}{{ m.tool_call_id }}|{% endif %}"
    "{% endfor %}"
)


def rendered(template: str, talk: Any) -> str:
    return edgeq.render_chat({"chat_template.jinja": template.encode()}, talk)


def test_results_have_the_names_of_their_tools() -> None:
    with pytest.raises(UsageError, match="a name is needed"):
        rendered(NEEDS_NAMES, TALK)
    assert rendered(NEEDS_NAMES, named_results(TALK)) == "weather: Sunny.|time: Noon.|"
    own = [{"role": "tool", "content": "x", "name": "mine", "tool_call_id": "of nobody"}]
    assert named_results([*TALK, *own])[-1]["name"] == "mine"
    unknown = [{"role": "tool", "content": "x", "tool_call_id": "of nobody"}]
    assert "name" not in named_results([*TALK, *unknown])[-1]


def test_ids_are_short_where_the_template_needs_it() -> None:
    with pytest.raises(UsageError, match="ids have 9 characters"):
        rendered(NEEDS_SHORT_IDS, TALK)
    text = rendered(NEEDS_SHORT_IDS, with_short_ids(TALK))
    first, second, *results = text.rstrip("|").split("|")
    assert (first.split("=")[0], second.split("=")[0]) == ("weather", "time")
    assert [first.split("=")[1], second.split("=")[1]] == results
    assert results[0] != results[1]
    assert all(len(one) == 9 and one.isalnum() for one in results)
    kept = with_short_ids([{"role": "tool", "content": "", "tool_call_id": "aB3456789"}])
    assert kept[0]["tool_call_id"] == "aB3456789"


def test_an_empty_list_of_calls_is_none() -> None:
    """Llama 3's template asks only whether a message has the key."""
    (message,) = checked_messages([{"role": "assistant", "content": "Hi.", "tool_calls": []}])
    assert "tool_calls" not in message


def test_tools_are_taught_in_the_system_prompt() -> None:
    made = taught(TALK, TOOLS, True)
    assert [one["role"] for one in made] == ["system", "user", "assistant", "user"]
    assert json.dumps(TOOLS[0]["function"]) in made[0]["content"]
    assert set(made[2]) == {"role", "content"}
    assert made[2]["content"].count("<tool_call>") == 2
    assert made[3]["content"].index("Sunny.") < made[3]["content"].index("Noon.")
    thought = [{"role": "assistant", "content": "Hi.", "reasoning_content": "Hm."}]
    assert taught(thought, [], True) == thought
    system = [{"role": "system", "content": "Be brief."}, *TALK]
    first = taught(system, TOOLS, True)[0]["content"]
    assert first.startswith("Be brief.\n\n")
    assert taught(system, [], True)[0]["content"] == "Be brief."
    without = taught(TALK, TOOLS, False)
    assert without[0]["role"] == "user"
    assert without[0]["content"].endswith("Weather and time in Oslo?")


def test_whether_a_template_writes_system_messages(tmp_path: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from edgeq.serving.served import ServedModel

    refuses = "{{ raise_exception('no system') if messages[0].role == 'system' }}"
    ignores = "{% for m in messages %}{{ m.content if m.role != 'system' }}{% endfor %}"
    writes = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for number, (template, takes) in enumerate(((refuses, 0), (ignores, 0), (writes, 1))):
        model = edgeq.load(chat_copy(tmp_path / str(number), template))
        with ThreadPoolExecutor(1) as pool:
            served = ServedModel(
                "x", model, edgeq.ServerSettings(), pool, SnapshotStore(0), context=64
            )
            assert served.takes_system == bool(takes)
            served.close()
