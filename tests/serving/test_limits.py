"""What a server refuses, and what becomes of clients that leave."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import edgeq
from edgeq.core.errors import DoesNotFitError, MissingDependencyError, UsageError
from edgeq.importers import load
from edgeq.serving.prefix_cache import PrefixCache, SnapshotStore
from edgeq.serving.settings import ServerSettings
from edgeq.serving.slots import SlotPool
from edgeq.serving.worker import AnswerJob, Ended, Event, Piece, Worker
from tests.chat_models import endless_copy
from tests.paths import DEMO, ROOT
from tests.serving.plain_http import ask, begin, everything, metric

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LONG: dict[str, Any] = {"model": "tale", "prompt": "Once", "max_tokens": 200, "temperature": 1.5}
RUNNING = 'edgeq_requests_running{model="tale"}'
CALLED = {"name": "weather", "arguments": "{}"}
WAITING = 'edgeq_requests_waiting{model="tale"}'


def within(seconds: float, true: Callable[[], bool]) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (b"[1]", 400, "invalid_json"),
        (b'"text"', 400, "invalid_json"),
        (b"\xff\xfe", 400, "invalid_json"),
        (b'{"prompt": NaN}', 400, "invalid_json"),
        (b'{"prompt": "a", "temperature": 1e999}', 400, "invalid_json"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
        (b"[" * 50_000, 400, "invalid_json"),
        (b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}", 400, "invalid_json"),
        (b"{}", 400, "missing_required_parameter"),
        (b'{"prompt": ""}', 200, None),  # BOS alone
        (b'{"prompt": []}', 400, "invalid_value"),
        (b'{"prompt": [[]]}', 400, "invalid_value"),
        (b'{"prompt": [true]}', 400, "invalid_value"),
        (b'{"prompt": [-1]}', 400, "invalid_value"),
        (b'{"prompt": [99999999999999999999]}', 400, "invalid_value"),
        (b'{"prompt": "\\ud800"}', 400, "invalid_json"),
        (b'{"prompt": "a", "\\ud800": 1}', 400, "invalid_json"),
        (b'{"prompt": "a", "metadata": {"x": "\\udc00"}}', 400, "invalid_json"),
        (b'{"prompt": "a", "stop": ["\xed\xa0\x80"]}', 400, "invalid_json"),
        (b'{"prompt": "\\ud83d\\ude00", "max_tokens": 1}', 200, None),  # a whole pair
        (b'{"prompt": "a", "max_tokens": 0}', 400, "invalid_value"),
        (b'{"prompt": "a", "max_tokens": -1}', 400, "invalid_value"),
        (b'{"prompt": "a", "max_tokens": 1.5}', 400, "invalid_type"),
        (b'{"prompt": "a", "max_tokens": true}', 400, "invalid_type"),
        (b'{"prompt": "a", "logit_bias": {"x": 1}}', 400, "invalid_value"),
        (b'{"prompt": "a", "logit_bias": {"1": "x"}}', 400, "invalid_value"),
        (b'{"prompt": "a", "logit_bias": {"99999": 1}}', 400, "invalid_value"),
        (b'{"prompt": "a", "stop": ["a", ""]}', 400, "invalid_value"),
        (b'{"prompt": "a", "stop": [1]}', 400, "invalid_value"),
        (b'{"prompt": "a", "stream_options": {}}', 400, "invalid_value"),
        (b'{"prompt": "a", "stream": true, "stream_options": {"x": 1}}', 400, "unknown_parameter"),
        (b'{"prompt": "a", "best_of": 3}', 400, "unsupported_value"),
        (b'{"prompt": "a", "user": "me", "metadata": {}}', 200, None),
        (b'{"prompt": "a", "temperature": null, "stop": null}', 200, None),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, bytes) else str(value),
)
def test_bodies(server: edgeq.Server, body: bytes, status: int, code: str | None) -> None:
    reply = ask(server, TEXT, body)
    assert reply.status == status, reply.raw
    if code is not None:
        assert reply.code == code


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("text", "invalid_value"),
        ({"role": "nobody", "content": "a"}, "invalid_value"),
        ({"content": "a"}, "invalid_value"),
        ({"role": "user"}, "missing_required_parameter"),
        ({"role": "user", "content": 1}, "invalid_value"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "unsupported_value"),
        ({"role": "user", "content": "a", "extra": 1}, "unknown_parameter"),
        ({"role": "assistant", "tool_calls": {}}, "invalid_value"),
        ({"role": "assistant", "tool_calls": [{"id": {}, "function": CALLED}]}, "invalid_value"),
        (
            {"role": "assistant", "tool_calls": [{"function": {**CALLED, "arguments": "[]"}}]},
            "invalid_value",
        ),
        (
            {
                "role": "assistant",
                "tool_calls": [{"function": {**CALLED, "arguments": '{"a": NaN}'}}],
            },
            "invalid_value",
        ),
    ],
)
def test_messages(server: edgeq.Server, message: Any, code: str) -> None:
    reply = ask(server, CHAT, {"messages": [message]})
    assert (reply.status, reply.code) == (400, code)
    assert reply.json["error"]["param"].startswith("messages[0]")


def test_limits_are_given_in_full(server: edgeq.Server) -> None:
    for field, value, said in (
        ("max_tokens", 1 << 40, "use 0 to 2147483648"),
        ("seed", 1 << 70, "use -9223372036854775808 to 9223372036854775807"),
        ("top_p", 1.5, "use 0 to 1"),
        ("repetition_penalty", 0, "use 0.01 to 100"),
    ):
        reply = ask(server, TEXT, {"prompt": "a", field: value})
        assert reply.json["error"]["message"].endswith(said)


def test_text_parts_are_one_text(server: edgeq.Server) -> None:
    parts = [{"type": "text", "text": "Tell "}, {"type": "text", "text": "me."}]
    asked = {"temperature": 0, "max_tokens": 4}
    whole, split = (
        ask(server, CHAT, {"messages": [{"role": "user", "content": content}], **asked}).json
        for content in ("Tell me.", parts)
    )
    assert split["choices"] == whole["choices"]


def test_what_is_no_request(server: edgeq.Server) -> None:
    assert ask(server, "/v2/nothing").code == "unknown_url"
    assert ask(server, TEXT).code == "method_not_allowed"
    typed = {"Content-Type": "text/plain"}  # what a page of another site may send unasked
    assert ask(server, TEXT, b"{}", headers=typed).status == 415
    assert ask(server, TEXT, b"x" * 100_001).status == 413
    assert ask(server, TEXT, b"{}", headers={"Content-Length": "9" * 30}).status in (400, 413)


def test_only_localhost_is_this_server(server: edgeq.Server) -> None:
    """A page of a site whose name points here must not reach the server."""
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example"):
        reply = ask(server, "/v1/models", headers={"Host": host})
        assert (reply.status, reply.code) == (403, "wrong_host")
    for host in ("localhost", "localhost:1", "127.0.0.1:8080", "[::1]:8080", "127.0.0.2"):
        assert ask(server, "/v1/models", headers={"Host": host}).status == 200


def test_other_origins_need_leave(talker: Path) -> None:
    origin = {"Origin": "https://page.example"}
    own = "authorization, content-type, x-stainless-os"  # what OpenAI's client for browsers sends
    wanted = {**origin, "Access-Control-Request-Method": "POST",
              "Access-Control-Request-Headers": own}  # fmt: skip
    for origins, allowed in (((), None), (("https://page.example",), "https://page.example")):
        settings = ServerSettings(port=0, parallel=1, cors_origins=origins, api_key="k")
        with edgeq.Server(talker, settings, context=64, threads=1) as server:
            reply = ask(server, TEXT, method="OPTIONS", headers=wanted)
            assert reply.headers.get("access-control-allow-origin") == allowed
            assert (reply.status == 200) == (allowed is not None)
            if allowed is not None:
                asked = reply.headers["access-control-allow-headers"].lower().split(", ")
                assert {"authorization", "content-type", "x-stainless-os"} <= set(asked)
            refused = ask(server, "/v1/models", headers=origin)  # a page may read why
            assert (refused.status, refused.code) == (401, "invalid_api_key")
            assert refused.headers.get("access-control-allow-origin") == allowed


def test_a_client_that_leaves_frees_its_slot(server: edgeq.Server) -> None:
    for path, body in (
        (TEXT, LONG),
        (TEXT, {**LONG, "stream": True}),
        (TEXT, {**LONG, "prompt": ["Once"] * 64}),
    ):
        connections = [begin(server, path, body) for _ in range(6)]
        within(20, lambda: metric(server, RUNNING) == 2 and metric(server, WAITING) > 0)
        for connection in connections:
            connection.close()
        within(5, lambda: metric(server, RUNNING) == 0 and metric(server, WAITING) == 0)
    assert ask(server, TEXT, {**LONG, "max_tokens": 2}).status == 200


def test_a_full_queue_is_a_429(talker: Path) -> None:
    settings = ServerSettings(port=0, parallel=1, queue=1)
    with edgeq.Server([("tale", DEMO)], settings, context=256, threads=1) as server:
        body = {**LONG, "prompt": ["Once"] * 64}
        connections = [begin(server, TEXT, body)]
        within(20, lambda: metric(server, RUNNING) == 1)
        connections.append(begin(server, TEXT, body))
        within(20, lambda: metric(server, WAITING) == 1)
        for stream in (False, True):
            reply = ask(server, TEXT, {**LONG, "stream": stream})
            assert (reply.status, reply.code) == (429, "queue_full")
            assert int(reply.headers["retry-after"]) > 0
        for connection in connections:
            connection.close()
        within(5, lambda: metric(server, RUNNING) == 0)


def test_an_answer_ends_when_its_time_is_over() -> None:
    """With no time at all: after the first batch of a prompt, or the first token."""
    model = load(DEMO)
    engine = edgeq.Engine(model, threads=1, context=400)
    tokenizer = edgeq.Tokenizer(model)

    async def events(n_prompt: int) -> list[Event]:
        with ThreadPoolExecutor(1) as pool:
            worker = Worker(
                tokenizer, SlotPool([engine], 1), PrefixCache(SnapshotStore(0)), pool, timeout_s=0
            )
            job = AnswerJob(prompt=(5,) * n_prompt, params=edgeq.SamplingParams(), max_tokens=50)
            found = [event async for event in worker.events(job)]
            await asyncio.sleep(0)  # the slot is given back
        return found

    _, piece, ended = asyncio.run(events(10))
    assert isinstance(piece, Piece)
    assert isinstance(ended, Ended)
    assert (ended.reason, ended.n_generated) == ("length", 1)
    _, ended = asyncio.run(events(300))
    assert isinstance(ended, Ended)
    assert (ended.reason, ended.n_generated, ended.n_prompt) == ("length", 0, 300)
    engine.close()


def test_caches_of_earlier_conversations_are_kept(talker: Path) -> None:
    settings = ServerSettings(port=0, parallel=1, prefix_bytes=1 << 20)
    texts = [f"{name} had a lamp. " * 12 for name in ("Tom", "Lily", "Ben")]
    with edgeq.Server([("tale", DEMO)], settings, context=256, threads=1) as server:
        asked = {"model": "tale", "max_tokens": 12, "temperature": 0}

        def say(text: str) -> tuple[str, int]:
            reply = ask(server, TEXT, {**asked, "prompt": text}).json
            cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
            return reply["choices"][0]["text"], cached

        first = [say(text) for text in texts]
        again = [say(text) for text in texts]
        assert [text for text, _ in again] == [text for text, _ in first]
        assert all(cached > 40 for _, cached in again), again
        assert all(cached <= 1 for _, cached in first), first
        kept = metric(server, 'edgeq_prefix_cache_bytes{model="tale"}')
        assert 0 < kept <= settings.prefix_bytes
        assert metric(server, 'edgeq_prefix_cache_hits_total{model="tale"}') == 3
        assert say(texts[-1] + " He")[1] > 40  # which its slot holds still
        assert metric(server, 'edgeq_prefix_cache_hits_total{model="tale"}') == 4
        assert metric(server, 'edgeq_prompts_total{model="tale"}') == 7


def test_addresses_that_others_reach_need_a_key() -> None:
    with pytest.raises(UsageError, match="needs an API key"):
        ServerSettings(host="0.0.0.0")
    assert ServerSettings(host="0.0.0.0", api_key="k").api_key == "k"
    assert ServerSettings(host="0.0.0.0", insecure=True).insecure
    assert "k-secret" not in repr(ServerSettings(api_key="k-secret"))
    for wrong in ({"port": 70_000}, {"parallel": 0}, {"api_key": ""}, {"api_key": "\n"}):
        with pytest.raises(UsageError):
            ServerSettings(**wrong)


def test_an_address_in_use_is_an_error(server: edgeq.Server) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1 port {port}"):
        edgeq.Server(DEMO, ServerSettings(port=port))


def test_missing_packages_are_named_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "starlette", None)
    with pytest.raises(MissingDependencyError, match=r"edgeq\[serve\]"):
        edgeq.Server("no such model")


def test_caches_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ServerSettings(port=0, parallel=64)
    with edgeq.Server(DEMO, settings, threads=1) as server:
        model = server.service.models["demo_model"]
        held = sum(engine.kv_bytes for engine in model.engines) + model.engines[0].scratch_bytes
    for free, fits in ((held, True), (held - 1, False)):
        monkeypatch.setattr("edgeq.serving.served.available_bytes", lambda free=free: free)
        if fits:
            edgeq.Server(DEMO, settings, threads=1).close()
        else:
            with pytest.raises(DoesNotFitError, match="the KV caches of 64 answers of 512 tokens"):
                edgeq.Server(DEMO, settings, threads=1)


def test_models_need_different_names() -> None:
    with pytest.raises(UsageError, match="two models have the name 'demo_model'"):
        edgeq.Server([DEMO, DEMO], ServerSettings(port=0))


def command(*args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "edgeq", "serve", *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_sigterm_lets_answers_end(tmp_path: Path) -> None:
    """And the log has neither prompts nor answers."""
    process = command(DEMO, "--port", 0, "-c", 256, "-t", 1)
    try:
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(4)]
        match = re.search(r"OpenAI API {2}(http://\S+)/v1", "".join(lines))
        assert match, lines

        class Place:
            url = match[1]

        asked = {**LONG, "model": "demo_model", "prompt": ["Once upon a time"] * 32,
                 "temperature": 0}  # fmt: skip
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(ask, Place(), TEXT, asked)
            within(20, lambda: metric(Place(), RUNNING.replace("tale", "demo_model")) == 1)
            process.send_signal(signal.SIGTERM)
            reply = answer.result()
        assert reply.status == 200
        assert len(reply.json["choices"]) == 32
        log = process.stderr.read()
        assert process.wait(30) == 0, log
        assert "POST /v1/completions 200" in log
        assert "Once upon" not in log
        assert "Traceback" not in log
    finally:
        process.kill()
        process.communicate()


def test_what_takes_longer_than_the_drain_ends_in_order(talker: Path, tmp_path: Path) -> None:
    """A stream ends with the tokens it has, and what has no answer yet is told why."""
    endless = endless_copy(talker, tmp_path / "endless")
    process = command(f"tale={endless}", "--port", 0, "-c", 512, "-t", 1, "--parallel", 1,
                      "--drain", 0, "--backend", "numpy")  # fmt: skip
    try:
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(4)]
        match = re.search(r"OpenAI API {2}(http://\S+)/v1", "".join(lines))
        assert match, lines
        server: Any = type("Place", (), {"url": match[1]})
        asked = {**LONG, "max_tokens": 500, "temperature": 0, "stream": True}  # without an end
        long = begin(server, TEXT, asked)
        within(20, lambda: metric(server, RUNNING) == 1)
        waits = begin(server, TEXT, LONG)
        within(20, lambda: metric(server, WAITING) == 1)
        half = begin(server, TEXT, LONG, sent=20)
        process.send_signal(signal.SIGTERM)
        told = [everything(one) for one in (long, waits, half)]
        log = process.stderr.read()
        assert process.wait(60) == 0, log
        assert b'"finish_reason":"length"' in told[0]
        assert b"data: [DONE]\n\n" in told[0]
        for one in told[1:]:
            assert one.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: " in one
            assert b'"code":"shutting_down"' in one
        assert "Traceback" not in log
    finally:
        process.kill()
        process.communicate()


def test_the_command_refuses_before_it_opens_models() -> None:
    for args, code, said in (
        ((), 2, "Missing argument 'MODEL'"),
        (("x", "--host", "0.0.0.0"), 1, "needs an API key"),
        (("x", "--port", 0), 1, "x"),
    ):
        process = command(*args)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == code, errors
        assert said in errors
        assert "Traceback" not in errors


def test_the_description_says_that_unknown_fields_are_refused(server: edgeq.Server) -> None:
    paths = ask(server, "/openapi.json").json["paths"]
    posted = [(path, methods["post"]) for path, methods in paths.items() if "post" in methods]
    assert len(posted) >= 6
    for path, operation in posted:
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        assert schema["additionalProperties"] is False
        assert ask(server, path, {"never_heard_of": 1}).code == "unknown_parameter"


def test_models_share_the_memory_for_earlier_conversations(talker: Path) -> None:
    """A model that is asked often takes the place of one that is not."""
    texts = [f"{name} had a lamp. " * 12 for name in ("Tom", "Lily", "Ben", "Sam", "Anna")]
    sizes = []
    for limit in (1 << 30, 0, 200_000):
        settings = ServerSettings(port=0, parallel=1, prefix_bytes=limit)
        models: list[Any] = [("talker", talker), ("tale", DEMO)]
        with edgeq.Server(models, settings, context=256, threads=1) as server:
            for model in ("talker", "tale"):
                for text in texts:
                    body = {"model": model, "prompt": text, "max_tokens": 1}
                    assert ask(server, TEXT, body).status == 200
            names = [f'edgeq_prefix_cache_bytes{{model="{name}"}}' for name in ("talker", "tale")]
            sizes.append([metric(server, name) for name in names])
    (first, second), none, (idle, asked) = sizes
    assert first == second > 200_000  # four sequences of each; the fifth is in the slot
    assert none == [0, 0]
    assert idle < asked
    assert 0 < idle + asked <= 200_000


def test_a_connection_without_headers_is_closed(
    server: edgeq.Server, talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that sends nothing, half of a request, or half of a second one; no answer is cut off."""
    monkeypatch.setattr("edgeq.serving.server.HEADERS_S", 0.2)
    where = urlsplit(server.url)
    health = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for sent in (b"", health[:20], health + health[:20]):
        with socket.create_connection((where.hostname, where.port), timeout=60) as connection:
            connection.sendall(sent)
            told = b""
            while more := connection.recv(1 << 16):
                told += more
            assert told.count(b"HTTP/1.1 200") == (sent.count(b"\r\n\r\n"))
    endless = endless_copy(talker, tmp_path / "endless")
    settings = ServerSettings(port=0, parallel=1, timeout_s=1)
    with edgeq.Server(endless, settings, context=512, backend="numpy") as slow:
        reply = ask(slow, TEXT, {"prompt": "Once", "max_tokens": 500, "stream": True})
        assert reply.raw.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [(TEXT, {}, 413), (TEXT, {"Host": "evil.example"}, 403), ("/nothing", {}, 404),
     (TEXT, {"Content-Type": "text/plain"}, 415), ("/health", {}, 405)],
)  # fmt: skip
def test_a_refusal_waits_for_the_end_of_the_body(
    server: edgeq.Server, path: str, headers: dict[str, str], status: int
) -> None:
    """A client that closes afterwards would otherwise get a reset connection."""
    raw = b"x" * (8 << 20)
    assert ask(server, path, raw, headers={**headers, "Connection": "close"}).status == status


def test_a_client_that_asks_before_it_sends_need_not_send(server: edgeq.Server) -> None:
    where = urlsplit(server.url)
    head = (f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            "Expect: 100-continue\r\nConnection: close\r\n")  # fmt: skip
    raw = json.dumps({"prompt": "Once", "max_tokens": 1}).encode()
    for size, told in ((len(raw), b"HTTP/1.1 100 "), (9 << 20, b"HTTP/1.1 413 ")):
        with socket.create_connection((where.hostname, where.port), timeout=60) as connection:
            connection.sendall(f"{head}Content-Length: {size}\r\n\r\n".encode())
            assert connection.recv(1 << 16).startswith(told)
            if size == len(raw):
                connection.sendall(raw)
                assert b"HTTP/1.1 200 " in connection.recv(1 << 16)
