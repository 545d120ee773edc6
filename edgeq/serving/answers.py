"""Responses of chats and completions in the OpenAI API: whole, or as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeq.runtime.generate import Logprobs
from edgeq.runtime.tokenizer import Tokenizer
from edgeq.serving.failures import ApiError
from edgeq.serving.parts import AnswerSplitter, Part, Plain
from edgeq.serving.requests import Call
from edgeq.serving.tools import ToolCall
from edgeq.serving.worker import Ended, Event, Piece, Scored, Started

DONE = b"data: [DONE]\n\n"
Events = AsyncGenerator[Event, None]
Generate = Callable[[int], Events]
"""Starts the job with the given number and returns its events."""


def new_id(kind: str) -> str:
    """A new identifier such as ``chatcmpl-4b0f...``."""
    return f"{kind}-{uuid.uuid4().hex}"


def sse(data: Mapping[str, Any], event: str | None = None) -> bytes:
    """Encode a server-sent event.

    Args:
        data: the JSON object that the event carries.
        event: name of the event; None for an event without a name.
    """
    named = f"event: {event}\n" if event else ""
    return f"{named}data: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


@dataclass
class Totals:
    """Token counts and times, in seconds, of all answers of one request."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0
    reasoning: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    drafted: int = 0
    accepted: int = 0

    def add(self, ended: Ended) -> None:
        """Add the counts and times of one answer."""
        self.prompt += ended.n_prompt
        self.cached += ended.n_cached
        self.generated += ended.n_generated
        self.prefill_s += ended.prefill_s
        self.decode_s += ended.decode_s
        self.drafted += ended.n_drafted
        self.accepted += ended.n_accepted

    def usage(self) -> dict[str, Any]:
        """The ``usage`` object of the OpenAI API."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt + self.generated,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
        }

    def timings(self) -> dict[str, Any]:
        """The ``timings`` object with the names of llama.cpp: token counts and milliseconds."""
        return {
            "cache_n": self.cached,
            "prompt_n": self.prompt - self.cached,
            "prompt_ms": round(1e3 * self.prefill_s, 3),
            "predicted_n": self.generated,
            "predicted_ms": round(1e3 * self.decode_s, 3),
            **(
                {"draft_n": self.drafted, "draft_n_accepted": self.accepted} if self.drafted else {}
            ),
        }


@dataclass
class Answer:
    """A complete answer, collected from its events."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    tokens: list[Piece] = field(default_factory=list)
    scored: tuple[Logprobs | None, ...] = ()
    finish: str = "stop"

    def take(self, parts: Sequence[Part]) -> None:
        """Append the parts that a splitter returned."""
        for part in parts:
            if isinstance(part, ToolCall):
                self.calls.append(part)
            else:
                (self.reasoning if part.reasoning else self.content).append(part.text)


def finish_reason(ended: Ended, called: bool) -> str:
    """The ``finish_reason`` of the OpenAI API.

    Args:
        ended: the end of the answer.
        called: whether the answer holds tool calls.
    """
    return "tool_calls" if called and ended.reason == "stop" else ended.reason


async def collect(events: Events, splitter: AnswerSplitter, totals: Totals) -> Answer:
    """Collect the events of an answer until it ends.

    Args:
        events: the events of one answer.
        splitter: splits its text into content, reasoning and tool calls.
        totals: counts to which the answer is added.

    Raises:
        ApiError: generation failed.
    """
    answer = Answer()
    async for event in events:
        if isinstance(event, Scored):
            answer.scored = event.logprobs
        elif isinstance(event, Piece):
            answer.tokens.append(event)
            answer.take(splitter.push(event.text))
            totals.reasoning += splitter.in_reasoning
        elif isinstance(event, Ended):
            answer.take(splitter.push(event.text))
            answer.take(splitter.end())
            answer.finish = finish_reason(event, bool(answer.calls))
            totals.add(event)
    return answer


# --- chats ------------------------------------------------------------------------------------


async def chat(call: Call, start: Generate) -> dict[str, Any]:
    """The ``chat.completion`` object of a request."""
    totals = Totals()
    answer = await collect(start(0), call.splitter(), totals)
    message: dict[str, Any] = {
        "role": "assistant", "content": "".join(answer.content), "refusal": None,
    }  # fmt: skip
    if answer.reasoning:
        message["reasoning_content"] = "".join(answer.reasoning)
    if answer.calls:
        message["content"] = message["content"].strip() or None
        message["tool_calls"] = [one.as_openai() for one in answer.calls]
    choice: dict[str, Any] = {
        "index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish,
    }  # fmt: skip
    if call.jobs[0].logprobs is not None:
        choice["logprobs"] = {
            "content": [chat_logprob(call.served.tokenizer, one) for one in answer.tokens],
            "refusal": None,
        }
    return {
        **_head("chatcmpl", "chat.completion", call),
        "choices": [choice],
        "usage": totals.usage(),
        "timings": totals.timings(),
    }


async def chat_stream(call: Call, start: Generate) -> AsyncIterator[bytes]:
    """The ``chat.completion.chunk`` events of a request. The first comes once a slot is free."""
    head = _head("chatcmpl", "chat.completion.chunk", call)
    totals, splitter = Totals(), call.splitter()
    calls = 0

    def event(delta: dict[str, Any], **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        return _choice_event(head, choice, call, totals)

    events = start(0)
    try:
        async for one in events:
            if isinstance(one, Started):
                yield event({"role": "assistant", "content": ""})
            elif isinstance(one, Piece):
                logprobs = None
                if one.logprobs is not None:
                    entry = chat_logprob(call.served.tokenizer, one)
                    logprobs = {"content": [entry], "refusal": None}
                parts = splitter.push(one.text)
                totals.reasoning += splitter.in_reasoning
                if not parts and logprobs is not None:
                    yield event({}, logprobs=logprobs)
                for part in parts:
                    yield event(_delta(part, calls), logprobs=logprobs)
                    calls += isinstance(part, ToolCall)
                    logprobs = None
            elif isinstance(one, Ended):
                for part in [*splitter.push(one.text), *splitter.end()]:
                    yield event(_delta(part, calls))
                    calls += isinstance(part, ToolCall)
                totals.add(one)
                yield event({}, finish_reason=finish_reason(one, bool(calls)))
    finally:
        await events.aclose()
    for last in _last(head, call, totals):
        yield last


def _delta(part: Part, index: int) -> dict[str, Any]:
    if isinstance(part, ToolCall):
        return {"tool_calls": [{"index": index, **part.as_openai()}]}
    return {"reasoning_content" if part.reasoning else "content": part.text}


def chat_logprob(tokenizer: Tokenizer, piece: Piece) -> dict[str, Any]:
    """The entry of one token in the ``logprobs`` of a chat."""
    assert piece.logprobs is not None
    return {
        **_token_logprob(tokenizer, piece.token, piece.logprobs.chosen),
        "top_logprobs": [_token_logprob(tokenizer, *one) for one in piece.logprobs.top],
    }


def _token_logprob(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token)
    return {
        "token": _token_text(tokenizer, token),
        "logprob": max(logprob, -9999.0),
        "bytes": list(raw) if raw else None,
    }


def _token_text(tokenizer: Tokenizer, token: int) -> str:
    raw = tokenizer.token_bytes(token)
    return raw.decode("utf-8", "replace") if raw else tokenizer.token_name(token)


# --- completions ------------------------------------------------------------------------------


async def completion(call: Call, start: Generate) -> dict[str, Any]:
    """The ``text_completion`` object of a request."""
    totals, choices = Totals(), []
    for number, (job, before) in enumerate(zip(call.jobs, call.prompts, strict=True)):
        answer = await collect(start(number), Plain(), totals)
        logprobs = None
        if job.logprobs is not None:
            tokens = [(one.token, one.logprobs) for one in answer.tokens]
            if job.score_prompt:
                tokens = [*zip(job.prompt, answer.scored, strict=True), *tokens]
            logprobs = _completion_logprobs(call.served.tokenizer, tokens)
        choices.append(
            {
                "index": number,
                "text": before + "".join(answer.content),
                "logprobs": logprobs,
                "finish_reason": answer.finish,
            }
        )
    return {
        **_head("cmpl", "text_completion", call),
        "choices": choices,
        "usage": totals.usage(),
        "timings": totals.timings(),
    }


async def completion_stream(call: Call, start: Generate) -> AsyncIterator[bytes]:
    """The ``text_completion`` events of a request."""
    head, totals = _head("cmpl", "text_completion", call), Totals()
    tokenizer = call.served.tokenizer
    for number, before in enumerate(call.prompts):

        def event(text: str, number: int = number, **more: Any) -> bytes:
            choice = {"index": number, "text": text, "logprobs": None, "finish_reason": None}
            return _choice_event(head, {**choice, **more}, call, totals)

        events = start(number)
        try:
            async for one in events:
                if isinstance(one, Started):
                    yield event(before)
                elif isinstance(one, Scored):
                    scored = list(zip(call.jobs[number].prompt, one.logprobs, strict=True))
                    yield event("", logprobs=_completion_logprobs(tokenizer, scored))
                elif isinstance(one, Piece) and (one.text or one.logprobs):
                    listed = [(one.token, one.logprobs)] if one.logprobs else []
                    logprobs = _completion_logprobs(tokenizer, listed) if listed else None
                    yield event(one.text, logprobs=logprobs)
                elif isinstance(one, Ended):
                    totals.add(one)
                    yield event(one.text, finish_reason=one.reason)
        finally:
            await events.aclose()
    for last in _last(head, call, totals):
        yield last


def _completion_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[tuple[int, Logprobs | None]]
) -> dict[str, Any]:
    texts = [_token_text(tokenizer, token) for token, _ in tokens]
    offsets = [0]
    for text, (token, _) in zip(texts, tokens, strict=True):  # special tokens add no text
        offsets.append(offsets[-1] + (len(text) if tokenizer.token_bytes(token) else 0))
    return {
        "tokens": texts,
        "token_logprobs": [one and max(one.chosen, -9999.0) for _, one in tokens],
        "top_logprobs": [
            one and {_token_text(tokenizer, i): max(logprob, -9999.0) for i, logprob in one.top}
            for _, one in tokens
        ],
        "text_offset": offsets[:-1],
    }


# --- both -------------------------------------------------------------------------------------


def _head(kind: str, name: str, call: Call) -> dict[str, Any]:
    return {
        "id": new_id(kind),
        "object": name,
        "created": int(time.time()),
        "model": call.served.name,
        "system_fingerprint": call.served.fingerprint,
    }


def _choice_event(
    head: Mapping[str, Any], choice: Mapping[str, Any], call: Call, totals: Totals
) -> bytes:
    """An event with one choice; the last event of an answer also holds the timings."""
    more = {"timings": totals.timings()} if choice["finish_reason"] else {}
    return sse({**head, "choices": [choice], **({"usage": None} if call.include_usage else {}),
                **more})  # fmt: skip


def _last(head: Mapping[str, Any], call: Call, totals: Totals) -> Iterator[bytes]:
    """The events after the answers: the token counts if the client asked for them, and the end."""
    if call.include_usage:  # clients that did not ask expect a choice in every event
        yield sse({**head, "choices": [], "usage": totals.usage(), "timings": totals.timings()})
    yield DONE


async def with_errors(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Forward a stream of events; an error ends it with an event that describes the error."""
    try:
        async for one in stream:
            yield one
    except ApiError as err:
        yield sse(err.body())
