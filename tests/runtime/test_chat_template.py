"""Chat templates, against Transformers' own rendering, and templates that mean harm."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from edgeq.core.errors import EdgeqError, FormatError, UnsupportedError, UsageError
from edgeq.runtime.chat_template import render_chat

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' "
    "+ message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{#- a comment -#}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {{ message['content'] | trim }}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\\n'}}
{%- endif -%}
"""
BLOCKS = """
{% for message in messages %}
    {% if loop.index > 2 %}
        {% break %}
    {% endif %}
    {% generation %}
{{ message.content }}
    {% endgeneration %}
{% endfor %}
{{ {"a": "<é&'>", "b": [1, none]} | tojson }}{{ eos_token }}
"""
TALK = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Hi <there> & é 😀"},
    {"role": "assistant", "content": "Hello.\n"},
    {"role": "user", "content": "Bye"},
]
SPECIAL = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}


def with_template(template: Any) -> dict[str, bytes]:
    return {"tokenizer_config.json": json.dumps(SPECIAL | {"chat_template": template}).encode()}


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA, BLOCKS])
@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize("tools", [None, [{"name": "f", "parameters": {"x": "é<"}}]])
def test_as_transformers_renders(template: str, generation: bool, tools: Any) -> None:
    transformers = pytest.importorskip("transformers")
    import tokenizers

    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()),
        bos_token="<s>",
        eos_token="</s>",
    )
    for messages in (TALK, TALK[1:2]):
        want = theirs.apply_chat_template(
            messages,
            tools=tools,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=generation,
        )
        got = render_chat(with_template(template), messages, generation, tools=tools)
        assert got == want


def test_where_the_template_is_found() -> None:
    made = with_template("config") | {"chat_template.jinja": b"file"}
    assert render_chat(made, []) == "file"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    assert render_chat(with_template(named), []) == "plain"
    assert render_chat(with_template(named), [], tools=[{"name": "f"}]) == "tools"
    assert render_chat(with_template(named), [], chat_template="tool_use") == "tools"
    with pytest.raises(UnsupportedError, match=r"unknown chat template 'rag' \(known: default, t"):
        render_chat(with_template(named), [], chat_template="rag")
    with pytest.raises(UnsupportedError, match=r"no chat template .* use edgeq run with a prompt"):
        render_chat({}, TALK)


def test_variables_reach_the_template() -> None:
    made = with_template("{{ enable_thinking }}{{ documents }}{{ nothing_of_the_kind }}")
    assert render_chat(made, TALK, enable_thinking=False) == "FalseNone"
    assert re.fullmatch(
        r"20\d\d-\d\d", render_chat(with_template("{{ strftime_now('%Y-%m') }}"), [])
    )


def test_a_template_may_refuse_messages() -> None:
    with pytest.raises(UsageError, match="rejects these messages: Conversation roles must"):
        render_chat(with_template(GEMMA), TALK[2:])


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ ''.__class__ }}", "attribute '__class__' of a str is not for templates"),
        ("{{ ''['__class__'] }}", "attribute '__class__' of a str"),
        ("{{ ''|attr('__class__') }}", "attribute '__class__' of a str"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "'__class__' of a list"),
        ("{{ raise_exception.__globals__ }}", "'__globals__' of a function"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "'__init__' of a type"),
        ("{{ '{0.__class__}'.format(1) }}", "'__class__' of a int"),
        ("{{ messages.append(1) }}", "uses something that edgeq does not allow"),
        ("{{ 'a' * 10000000000 }}", "a repetition of 10000000000 is too long"),
        ("{{ 10000000000 * [1] }}", "a repetition of 10000000000 is too long"),
        ("{{ 9 ** 9 ** 9 }}", "powers are not for templates"),
        ("{% for i in range(10000000) %}{% endfor %}", "failed: Range too big"),
        ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "more than 16000000 char"),
        ("{% for m in messages %}", r"line 1: Unexpected end of template"),
        ("\n{% if %}", "line 2"),
        ("{{ messages | nothing }}", "No filter named 'nothing'"),
        ("{{ 1 / 0 }}", "failed: division by zero"),
        ("{{ messages[0].content + 1 }}", "failed: can only concatenate"),
        ("{{ messages[9].content.x }}", "is undefined|no element"),
        ("{% include 'other' %}", "failed: no loader for this environment"),
        ("{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}", "failed: maximum recursion"),
    ],
)
def test_templates_that_fail(template: str, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        render_chat(with_template(template), TALK)


@pytest.mark.parametrize("template", [7, [7], [{"name": "default"}], {"default": 1}])
def test_templates_that_are_none(template: Any) -> None:
    with pytest.raises(FormatError, match="must be text or a list of named templates"):
        render_chat(with_template(template), TALK)


def test_files_that_are_damaged() -> None:
    for made in (
        {"tokenizer_config.json": b"{"},
        {"tokenizer_config.json": b"[]"},
        {"chat_template.jinja": b"\xff"},
    ):
        with pytest.raises(EdgeqError, match=r"is not JSON|holds a list|is not UTF-8 text"):
            render_chat(made, TALK)


def test_messages_are_not_changed() -> None:
    made = with_template("{% set messages = messages[1:] %}{{ messages | length }}")
    assert render_chat(made, TALK) == "3"
    assert len(TALK) == 4
