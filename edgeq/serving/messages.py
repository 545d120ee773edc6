"""Check the messages of a conversation and convert them to the form that chat templates take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeq.serving.failures import wrong
from edgeq.serving.fields import shown, strict_json

ROLES = ("assistant", "developer", "system", "tool", "user")


def checked_messages(messages: list[Any]) -> list[dict[str, Any]]:
    """Check the messages of a request.

    Returns:
        messages with a role and a text each, for a chat template.

    Raises:
        ApiError: there is no message, or one has an invalid role or content.
    """
    if not messages:
        raise wrong("messages", "there are no messages; give at least one")
    return [_message(one, f"messages[{number}]") for number, one in enumerate(messages)]


_MESSAGE_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", "refusal",
                 "reasoning_content", "annotations", "audio", "function_call"}  # fmt: skip


def _message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise wrong(place, f"{place} is {shown(message)}; use an object with role and content")
    unknown_keys = [key for key in message if key not in _MESSAGE_KEYS]
    if unknown_keys:
        raise wrong(
            place,
            f"{place} has the key {unknown_keys[0][:60]!r}, which this server does not know; leave "
            "it out",
            "unknown_parameter",
        )
    role = message.get("role")
    if role not in ROLES:
        raise wrong(
            f"{place}.role", f"{place}.role is {shown(role)}; use one of {', '.join(ROLES)}"
        )
    for key in ("audio", "function_call"):
        if message.get(key) is not None:
            raise wrong(
                f"{place}.{key}",
                f"{place}.{key} is not offered by this server; leave it out",
                "unsupported_value",
            )
    made: dict[str, Any] = {
        "role": "system" if role == "developer" else role,
        "content": _content(message.get("content"), f"{place}.content"),
    }
    for key in ("name", "tool_call_id", "reasoning_content"):
        if message.get(key) is not None:
            made[key] = _text(message[key], f"{place}.{key}")
    if message.get("tool_calls") is not None:
        calls = _earlier_calls(message["tool_calls"], f"{place}.tool_calls")
        made |= {"tool_calls": calls} if calls else {}
    if made["content"] == "" and message.get("content") is None and role != "assistant":
        raise wrong(
            f"{place}.content",
            f"{place}.content is missing; give a text",
            "missing_required_parameter",
        )
    return made


def _earlier_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Tool calls of an earlier answer, with their arguments as objects, which templates expect."""
    if not isinstance(calls, list):
        raise wrong(place, f"{place} is {shown(calls)}; use a list of calls")
    found = []
    for number, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        held = function.get("arguments") if isinstance(function, Mapping) else None
        if isinstance(held, str):
            try:
                held = strict_json(held)
            except (ValueError, RecursionError):
                held = None
        if not isinstance(name, str) or not isinstance(held, dict):
            raise wrong(
                f"{place}[{number}]",
                f"{place}[{number}] is {shown(call)}; use a function with a name, and with a JSON "
                "object as text for its arguments",
            )
        name_of_call = call.get("id")
        made = {"name": name, "arguments": held}
        found.append(
            {
                "id": "" if name_of_call is None else _text(name_of_call, f"{place}[{number}].id"),
                "type": "function",
                "function": made,
            }
        )
    return found


def _content(content: Any, place: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong(place, f"{place} is {shown(content)}; use a text or a list of text parts")
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "input_text", "output_text"):
            raise wrong(
                f"{place}[{number}]",
                f"{place}[{number}] is {shown(part)}; this server takes only text: "
                '{"type": "text", "text": ...}',
                "unsupported_value",
            )
        texts.append(_text(part.get("text"), f"{place}[{number}].text"))
    return "".join(texts)


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise wrong(place, f"{place} is {shown(value)}; use a text")
    return value
