"""Constraints on the form of an answer: JSON, a JSON schema, a grammar, or a tool call."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from edgeq.core.errors import EdgeqError, UnsupportedError, unknown
from edgeq.runtime.constraint import Grammar
from edgeq.serving.failures import of_request, wrong
from edgeq.serving.fields import Field, shown
from edgeq.serving.harmony import FINAL
from edgeq.serving.served import ServedModel
from edgeq.serving.tools import SPACED, literals

MAX_TOOLS = 128
FORMATS = ("text", "json_object", "json_schema")
FORMS = (
    Field("response_format", ("object",), "What the answer must be: {\"type\": \"json_object\"}, "
          "or {\"type\": \"json_schema\", \"json_schema\": {\"name\": ..., \"schema\": {...}}}.",
          schema={"properties": {"type": {"enum": [*FORMATS]}}, "required": ["type"]}),
    Field("grammar", ("string",), "A grammar of the answer, in llguidance's variant of Lark."),
    Field("tools", ("array",), "Functions that the model may call.",
          schema={"items": {"type": "object"}, "maxItems": MAX_TOOLS}),
    Field("tool_choice", ("string", "object"), "\"none\", \"auto\", \"required\", or the function "
          "that must be called."),
    Field("parallel_tool_calls", ("boolean",), "Whether an answer may hold several calls; false "
          "ends it after the first."),
)  # fmt: skip


def tool_choice(
    tools: list[Any] | None, choice: str | Mapping[str, Any] | None
) -> tuple[list[dict[str, Any]], bool]:
    """Check the tools of a request and its choice among them.

    Args:
        tools: field ``tools`` of the request.
        choice: field ``tool_choice`` of the request.

    Returns:
        the tools that the prompt describes, and whether the answer must call one of them.

    Raises:
        ApiError: a tool is not a valid function, or the choice is none of the tools.
    """
    named = choice.get("function") if isinstance(choice, Mapping) else None
    name = named.get("name") if isinstance(named, Mapping) else None
    if isinstance(choice, Mapping) and not isinstance(name, str):
        raise wrong(
            "tool_choice",
            f"tool_choice is {shown(choice)}; name a function: "
            '{"type": "function", "function": {"name": ...}}',
        )
    if isinstance(choice, str) and choice not in ("none", "auto", "required"):
        raise wrong("tool_choice", f"tool_choice is {shown(choice)}; use none, auto or required")
    checked = [_tool(one, f"tools[{number}]") for number, one in enumerate(tools or [])]
    if len(checked) > MAX_TOOLS:
        raise wrong("tools", f"there are {len(checked)} tools; use up to {MAX_TOOLS}")
    if not checked and choice not in (None, "none", "auto"):
        raise wrong("tool_choice", "tool_choice asks for a call, but there are no tools")
    if not checked or choice == "none":
        return [], False
    if name is None:
        return checked, choice == "required"
    only = [one for one in checked if one["function"]["name"] == name]
    if not only:
        names = [one["function"]["name"] for one in checked]
        raise wrong("tool_choice", unknown("function", name[:100], names))
    return only, True


def _tool(tool: Any, place: str) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type") != "function":
        raise wrong(
            place,
            f'{place} is {shown(tool)}; use {{"type": "function", "function": {{"name": ...}}}}',
        )
    name, about = function.get("name"), function.get("description")
    if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name)):
        raise wrong(
            f"{place}.function.name",
            f"{place}.function.name is {shown(name)}; use 1 to 64 letters, digits, underscores, "
            "dots and hyphens",
        )
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise wrong(
            f"{place}.function.parameters",
            f"{place}.function.parameters is {shown(parameters)}; use a JSON schema",
        )
    made: dict[str, Any] = {"name": name}
    if about is not None:
        if not isinstance(about, str):
            raise wrong(
                f"{place}.function.description",
                f"{place}.function.description is {shown(about)}; use a text",
            )
        made["description"] = about
    made["parameters"] = dict(parameters or {"type": "object", "properties": {}})
    return {"type": "function", "function": made}


def answer_grammar(
    values: Mapping[str, Any], served: ServedModel, tools: list[dict[str, Any]], forced: bool
) -> Grammar | None:
    """The grammar that an answer must follow; None if the answer is not constrained.

    Args:
        values: checked fields of the request.
        served: the model.
        tools: the tools that the prompt describes.
        forced: whether the answer must call one of them.

    Raises:
        ApiError: the request asks for several constraints, or one of them is invalid.
    """
    form = values["response_format"]
    kind = "text" if form is None else form.get("type")
    if kind not in FORMATS:
        raise wrong(
            "response_format",
            f"response_format.type is {shown(kind)}; use one of {', '.join(FORMATS)}",
        )
    wanted = [kind != "text", values["grammar"] is not None, forced]
    if sum(wanted) > 1:
        raise wrong(
            "response_format",
            "the request has several of response_format, grammar and a tool_choice that requires a "
            "call; use one of them",
        )
    if forced:
        return _made(lambda: served.grammars().lark(_calls(tools, served)), "tools")
    if values["grammar"] is not None:
        return _made(lambda: served.grammars().lark(values["grammar"]), "grammar")
    schema: Any = {"type": "object"}
    if kind == "json_schema":
        held = form.get("json_schema")
        schema = held.get("schema") if isinstance(held, Mapping) else None
        if not isinstance(schema, Mapping):
            raise wrong(
                "response_format",
                f"response_format.json_schema is {shown(held)}; use "
                '{"name": ..., "schema": {...}}',
            )
    if kind == "text":
        return None
    if tools:
        return _made(
            lambda: served.grammars().lark(_json_or_call(schema, tools, served)), "response_format"
        )
    return _made(lambda: served.grammars().json_schema(schema), "response_format")


def _calls(tools: list[dict[str, Any]], served: ServedModel) -> str:
    """The grammar of an answer that is a call of one of the tools."""
    return served.syntax.grammar(tools, _special(served).get)


def _special(served: ServedModel) -> dict[str, int]:
    """The ids of special tokens by their names."""
    return {served.tokenizer.token_name(i): i for i in served.tokenizer.special_ids}


def _json_or_call(
    schema: Mapping[str, Any], tools: list[dict[str, Any]], served: ServedModel
) -> str:
    """The grammar of an answer that is JSON of a schema, or a call of one of the tools.

    Raises:
        UnsupportedError: the syntax of calls cannot be held to the parameters of a tool.
    """
    try:
        call = _calls(tools, served)
    except UnsupportedError as err:
        raise UnsupportedError(f"a response_format and tools cannot be used together: {err}") from (
            err
        )
    value = json.dumps({**schema, "x-guidance": SPACED})
    head = literals(FINAL, _special(served).get) if served.harmony else []
    rules = f"start: {' '.join([*head, 'json_answer'])} | tool_call\njson_answer: %json {value}\n"
    return rules + call.replace("start:", "tool_call:", 1)


def _made(make: Callable[[], Grammar], param: str) -> Grammar:
    try:
        return make()
    except EdgeqError as err:
        raise of_request(err, param) from err
