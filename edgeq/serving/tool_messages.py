"""Conversations with tools, in the form that the chat template of a model takes.

A model whose template knows no tools gets their descriptions in the system prompt, and calls and
results as text between the marks of Hermes (`edgeq.serving.tools.HERMES`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_HOW = """You can call functions. Their signatures are between <tools> and </tools>, one in a line:
<tools>
{tools}
</tools>

To call one, answer with its name and its arguments as a JSON object between <tool_call> and \
</tool_call>:
<tool_call>
{{"name": "FUNCTION", "arguments": {{"ARGUMENT": "VALUE"}}}}
</tool_call>"""
_RESULT, _AFTER = "<tool_response>\n", "\n</tool_response>"
_SHORT = 9
"""Length of the ids that Mistral's templates take."""


def taught(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], system: bool
) -> list[dict[str, Any]]:
    """A conversation in which tools, calls and results are text of ordinary messages.

    Args:
        messages: as `edgeq.serving.messages.checked_messages` returns them.
        tools: as a request gives them; they are described if there are any.
        system: whether the template writes system messages; otherwise the tools are described at
            the beginning of the first message.
    """
    made: list[dict[str, Any]] = []
    before = ""  # role of the message before
    for message in messages:
        one = {k: v for k, v in message.items() if k not in ("tool_calls", "tool_call_id")}
        if message["role"] == "tool":
            text = f"{_RESULT}{message['content']}{_AFTER}"
            if before == "tool":  # another result of the same answer's calls
                made[-1]["content"] += f"\n{text}"
                continue
            one = {"role": "user", "content": text}
        for call in message.get("tool_calls", ()):
            text = f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
            one["content"] += ("\n" if one["content"] else "") + text
        made.append(one)
        before = message["role"]
    if tools:
        lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        about = _HOW.format(tools=lines)
        if made[0]["role"] == "system":
            made[0]["content"] += f"\n\n{about}"
        elif system:
            made.insert(0, {"role": "system", "content": about})
        else:
            made[0]["content"] = f"{about}\n\n{made[0]['content']}"
    return made


def named_results(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A conversation in which each result of a tool has the name of its tool.

    Some templates need it, and OpenAI's clients give only the id of the call.
    """
    names: dict[str, str] = {}
    made = []
    for message in messages:
        one = dict(message)
        names |= {call["id"]: call["function"]["name"] for call in one.get("tool_calls", ())}
        name = names.get(one.get("tool_call_id", ""))
        if one["role"] == "tool" and name is not None:
            one.setdefault("name", name)
        made.append(one)
    return made


def with_short_ids(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A conversation whose calls have ids of nine letters and digits, as Mistral's templates need.

    Equal ids remain equal, so that results still refer to their calls.
    """
    made = []
    for message in messages:
        one = dict(message)
        if "tool_call_id" in one:
            one["tool_call_id"] = _short(one["tool_call_id"])
        if "tool_calls" in one:
            one["tool_calls"] = [{**call, "id": _short(call["id"])} for call in one["tool_calls"]]
        made.append(one)
    return made


def _short(name: str) -> str:
    if re.fullmatch(rf"[A-Za-z0-9]{{{_SHORT}}}", name):
        return name
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:_SHORT]
