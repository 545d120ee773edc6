"""``/v1/responses``, the Responses API of OpenAI, for conversations of text."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

from edgeq.serving.answers import Generate, Totals, collect, new_id, sse
from edgeq.serving.failures import ApiError, wrong
from edgeq.serving.fields import Field, read, shown
from edgeq.serving.parts import Text
from edgeq.serving.requests import MODEL, STREAM, Call, chat_call
from edgeq.serving.served import ServedModel
from edgeq.serving.settings import ServerSettings
from edgeq.serving.worker import Ended, Piece, Started

RESPONSE = (
    Field("input", ("string", "array"), "A text, or messages with a role and a text each.",
          required=True, schema={"items": {"type": "object"}, "minItems": 1}),
    MODEL,
    Field("instructions", ("string",), "A system prompt."),
    Field("max_output_tokens", ("integer",), "The most tokens to generate.", 1, 1 << 31),
    Field("temperature", ("number",), "0 takes the most likely token.", 0, 2),
    Field("top_p", ("number",), "Keep the most likely tokens whose probabilities reach this sum.",
          0, 1),
    Field("text", ("object",), "{\"format\": {\"type\": \"json_schema\", \"name\": ..., "
          "\"schema\": {...}}} makes the answer JSON."),
    STREAM[0],
    Field("truncation", ("string",), "What to do with conversations that exceed the context: they "
          "are refused.", only=("disabled",)),
    Field("tools", ("array",), "Not offered here; use /v1/chat/completions.", only=([],)),
)  # fmt: skip
_CHAT_NAMES = {"max_output_tokens": "max_completion_tokens"}
_COPIED = ("model", "max_output_tokens", "temperature", "top_p", "stream")


def response_call(
    body: Mapping[str, Any], models: Mapping[str, ServedModel], settings: ServerSettings
) -> Call:
    """Check a request body of ``/v1/responses``; see `edgeq.serving.requests.chat_call`.

    Raises:
        ApiError: a field is invalid or asks for something that the server does not offer.
    """
    values = read(body, RESPONSE)
    given = values["input"]
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else list(given)
    for number, message in enumerate(messages):
        if isinstance(message, Mapping) and message.get("type", "message") != "message":
            raise wrong(
                f"input[{number}]",
                f"input[{number}] is {shown(message)}; this server takes only messages",
                "unsupported_value",
            )
        if isinstance(message, Mapping):  # earlier answers have the fields of a response
            dropped = ("type", "id", "status", "phase")
            messages[number] = {k: v for k, v in message.items() if k not in dropped}
    if values["instructions"]:
        messages.insert(0, {"role": "system", "content": values["instructions"]})
    chat = {_CHAT_NAMES.get(name, name): values[name] for name in _COPIED}
    chat["messages"] = messages
    if values["text"] is not None:
        chat["response_format"] = _format(values["text"])
    try:
        return replace(chat_call(chat, models, settings), asked=body)
    except ApiError as err:
        raise _renamed(err, bool(values["instructions"])) from err


def _renamed(error: ApiError, before: int) -> ApiError:
    """An error of a chat in the names of this interface's fields.

    Args:
        error: the error.
        before: how many messages of the chat precede those of ``input``.
    """

    def renamed(text: str) -> str:
        text = re.sub(r"\bmessages\[(\d+)\]", lambda m: f"input[{int(m[1]) - before}]", text)
        text = text.replace("response_format.json_schema", "text.format")
        return text.replace("response_format", "text.format")

    param = error.param and renamed(error.param)
    names = {"messages": "input", "text.format": "text"}
    return ApiError(
        error.status, error.code, renamed(str(error)), param and names.get(param, param),
        error.headers,
    )  # fmt: skip


def _format(text: Mapping[str, Any]) -> dict[str, Any]:
    """The field ``text`` as the ``response_format`` of a chat."""
    unknown_keys = [key for key in text if key not in ("format", "verbosity")]
    form = text.get("format") or {"type": "text"}
    if unknown_keys or not isinstance(form, Mapping):
        raise wrong("text", f'text is {shown(text)}; use {{"format": {{...}}}}')
    if form.get("type") == "json_schema":
        schema = {key: value for key, value in form.items() if key != "type"}
        return {"type": "json_schema", "json_schema": schema}
    return dict(form)


class _Reply:
    """The ``response`` object of an answer, which is filled while the answer is generated."""

    def __init__(self, call: Call) -> None:
        body = call.asked
        self.made: dict[str, Any] = {
            "id": new_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "metadata": body.get("metadata") or {},
            "model": call.served.name,
            "output": [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": call.jobs[0].params.temperature,
            "text": body.get("text") or {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": call.jobs[0].params.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def end(self, reason: str, totals: Totals) -> dict[str, Any]:
        """Complete the object with the status and the token counts."""
        cut = reason == "length"
        self.made["status"] = "incomplete" if cut else "completed"
        self.made["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
        self.made["usage"] = {
            "input_tokens": totals.prompt,
            "input_tokens_details": {"cached_tokens": totals.cached},
            "output_tokens": totals.generated,
            "output_tokens_details": {"reasoning_tokens": totals.reasoning},
            "total_tokens": totals.prompt + totals.generated,
        }
        return self.made


def _item(thought: bool, text: str | None, status: str) -> dict[str, Any]:
    """An item of the output; it has no content if the text is None."""
    content = [] if text is None else [_content(thought, text)]
    if thought:
        return {"type": "reasoning", "id": new_id("rs"), "summary": [], "content": content,
                "status": status}  # fmt: skip
    return {"type": "message", "id": new_id("msg"), "role": "assistant", "content": content,
            "status": status}  # fmt: skip


def _content(thought: bool, text: str) -> dict[str, Any]:
    if thought:
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


async def response(call: Call, start: Generate) -> dict[str, Any]:
    """The ``response`` object of a request."""
    reply, totals = _Reply(call), Totals()
    answer = await collect(start(0), call.splitter(), totals)
    status = "incomplete" if answer.finish == "length" else "completed"
    if answer.reasoning:
        reply.made["output"].append(_item(True, "".join(answer.reasoning), "completed"))
    reply.made["output"].append(_item(False, "".join(answer.content), status))
    return reply.end(answer.finish, totals)


class _EventWriter:
    """Makes the events of a streamed response: items are added, get text, and are completed."""

    def __init__(self, reply: _Reply) -> None:
        self._reply = reply
        self._number = 0
        self._open: tuple[bool, dict[str, Any]] | None = None
        self._text: list[str] = []

    def event(self, kind: str, **fields: Any) -> bytes:
        """An event with the next sequence number."""
        made = sse({"type": kind, "sequence_number": self._number, **fields}, kind)
        self._number += 1
        return made

    def whole(self, kind: str) -> bytes:
        """An event with the whole response."""
        return self.event(kind, response=self._reply.made)

    def add(self, part: Text) -> list[bytes]:
        """The events for a text, which opens a new item if it is of another kind than the last."""
        found = []
        if self._open is None or self._open[0] != part.reasoning:
            found += self.close("completed")
            item = _item(part.reasoning, None, "in_progress")
            self._open, self._text = (part.reasoning, item), []
            found.append(self.event("response.output_item.added", item=item, **self._place()))
            found.append(
                self.event("response.content_part.added", part=_content(part.reasoning, ""),
                           **self._where())
            )  # fmt: skip
        self._text.append(part.text)
        more: dict[str, Any] = {} if part.reasoning else {"logprobs": []}
        found.append(
            self.event(f"response.{self._kind()}.delta", delta=part.text, **self._where(), **more)
        )
        return found

    def close(self, status: str) -> list[bytes]:
        """The events that complete the open item; none if no item is open."""
        if self._open is None:
            return []
        thought, item = self._open
        text = "".join(self._text)
        part = _content(thought, text)
        more: dict[str, Any] = {} if thought else {"logprobs": []}
        whole = {**item, "content": [part], "status": status}
        found = [
            self.event(f"response.{self._kind()}.done", text=text, **self._where(), **more),
            self.event("response.content_part.done", part=part, **self._where()),
            self.event("response.output_item.done", item=whole, **self._place()),
        ]
        self._reply.made["output"].append(whole)
        self._open = None
        return found

    def _kind(self) -> str:
        assert self._open is not None
        return "reasoning_text" if self._open[0] else "output_text"

    def _place(self) -> dict[str, Any]:
        return {"output_index": len(self._reply.made["output"])}

    def _where(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open[1]["id"], "content_index": 0, **self._place()}


async def response_stream(call: Call, start: Generate) -> AsyncIterator[bytes]:
    """The server-sent events of a streamed response."""
    reply, totals, splitter = _Reply(call), Totals(), call.splitter()
    writer = _EventWriter(reply)
    events = start(0)
    try:
        async for one in events:
            if isinstance(one, Started):
                yield writer.whole("response.created")
                yield writer.whole("response.in_progress")
            elif isinstance(one, Piece | Ended):
                parts = splitter.push(one.text)
                if isinstance(one, Piece):
                    totals.reasoning += splitter.in_reasoning
                else:
                    parts += splitter.end()
                for part in parts:
                    for event in writer.add(part) if isinstance(part, Text) else ():
                        yield event
                if isinstance(one, Ended):
                    totals.add(one)
                    cut = one.reason == "length"
                    for event in writer.close("incomplete" if cut else "completed"):
                        yield event
                    reply.end(one.reason, totals)
                    yield writer.whole("response.incomplete" if cut else "response.completed")
    finally:
        await events.aclose()
