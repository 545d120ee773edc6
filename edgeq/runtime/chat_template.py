"""Chat templates: messages -> the text a model was trained on, by sandboxed Jinja.

A template comes with the model and is not trusted: it runs in Jinja's immutable sandbox, cannot
read Python's internal attributes, and cannot build texts of gigabytes.

Source: https://huggingface.co/docs/transformers/chat_templating (the names a template may use)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from edgeq.core.errors import EdgeqError, FormatError, UnsupportedError, UsageError, unknown
from edgeq.importers.huggingface.tokenizer import special_tokens
from edgeq.importers.tokenizer.chat_templates import DEFAULT, chat_templates

MAX_CHARACTERS = 16_000_000
"""The longest text a template may render or build by ``*``."""

Message = Mapping[str, Any]


def render_chat(
    files: Mapping[str, bytes],
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    **extra: Any,
) -> str:
    """Render messages by the model's chat template.

    Args:
        files: the model's files, which hold one template or several
            (`edgeq.importers.tokenizer.chat_templates`): "tool_use" is used with ``tools``,
            otherwise "default".
        messages: {"role": ..., "content": ...} each.
        add_generation_prompt: end with the opening of the assistant's turn.
        **extra: further variables of the template (tools, documents, enable_thinking ...);
            ``chat_template`` names one of several templates.

    Raises:
        UnsupportedError: the model has no chat template, or none of that name.
        UsageError: these are not messages, or the template itself rejects them.
        FormatError: the template is damaged, fails, or uses something that is not allowed.

    Example:
        >>> model = edgeq.load("chat.edgeq")
        >>> edgeq.render_chat(model.files, [{"role": "user", "content": "Hello"}])
        'user: Hello\\nassistant:'
    """
    items = None
    if not isinstance(messages, str | bytes | Mapping) and hasattr(messages, "__iter__"):
        items = list(messages)
    if items is None or not all(isinstance(message, Mapping) for message in items):
        raise UsageError(
            "messages are a list of dictionaries such as {'role': 'user', 'content': 'Hello'}, "
            f"not {messages!r:.60}"
        )
    source = _template(files, extra.pop("chat_template", None), bool(extra.get("tools")))
    variables = {
        **special_tokens(files),
        "messages": [dict(message) for message in items],
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        **extra,
    }
    try:
        pieces, length = [], 0
        for piece in _environment().from_string(source).generate(**variables):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_CHARACTERS:
                raise OverflowError(f"it renders more than {MAX_CHARACTERS} characters")
    except _RefusedError as err:
        raise UsageError(f"the chat template of the model rejects these messages: {err}") from err
    except jinja2.exceptions.SecurityError as err:
        raise FormatError(
            f"the chat template of the model uses something that edgeq does not allow: {err}; "
            "it may be malicious"
        ) from err
    except jinja2.TemplateSyntaxError as err:
        raise FormatError(f"the model's chat template, line {err.lineno}: {err.message}") from err
    except (
        jinja2.TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        RecursionError,
        TypeError,
        ValueError,
    ) as err:
        raise FormatError(
            f"the model's chat template failed: {err}; "
            "check that messages have a role and a content"
        ) from err
    return "".join(pieces)


def _template(files: Mapping[str, bytes], name: str | None, tools: bool) -> str:
    named = chat_templates(files)
    if not named:
        raise UnsupportedError(
            "the model has no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json): it may be a base model; use edgeq run with a prompt"
        )
    if name is None:
        name = "tool_use" if tools and "tool_use" in named else DEFAULT
    if name not in named:
        raise UnsupportedError(unknown("chat template", name, named))
    return named[name]


def after_an_answer(files: Mapping[str, bytes]) -> str:
    """The text that the template writes after an answer; empty if that cannot be determined.

    Args:
        files: the model's files.
    """
    answer = "An answer."
    talk = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": answer}]
    try:
        text = render_chat(files, talk, add_generation_prompt=False)
    except EdgeqError:
        return ""
    _, answered, after = text.rpartition(answer)
    return after if answered else ""


class _RefusedError(jinja2.TemplateError):
    """A template's own ``raise_exception``."""


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "**"))

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        # Jinja hands out an undefined value that only fails when used; fail at once
        raise jinja2.exceptions.SecurityError(
            f"attribute {attribute!r} of a {type(obj).__name__} is not for templates"
        )

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        if operator == "**":
            raise jinja2.exceptions.SecurityError("powers are not for templates")
        for sequence, times in ((left, right), (right, left)):
            if (
                isinstance(sequence, str | bytes | list | tuple)
                and isinstance(times, int)
                and len(sequence) * times > MAX_CHARACTERS
            ):
                raise jinja2.exceptions.SecurityError(f"a repetition of {times} is too long")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _GenerationTag],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _refuse(message: str) -> str:
    raise _RefusedError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes <, > and & for HTML, which models never saw
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
