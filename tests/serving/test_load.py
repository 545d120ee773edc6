"""A server under load of clients that leave and send nonsense; and a fuzzer of its interface."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

import edgeq
from tests.paths import DEMO, ROOT
from tests.serving.plain_http import ask, begin, metric

PROMPTS = ("Once upon a time", "The little fox", "Tom had a lamp and", "Lily saw a big tree")
REQUESTS, CONNECTIONS, SECONDS = 300, 16, 60
"""At least so many requests, and for so long."""


@pytest.mark.heavy
def test_300_requests_from_16_connections() -> None:
    """No stuck slot, no fault of the server, greedy answers as served alone, no growing memory."""
    process = subprocess.Popen(
        [sys.executable, "-m", "edgeq", "serve", f"tale={DEMO}", "--port", "0", "-c", "256",
         "-t", "1", "--queue", "64", "--cache-ram", "1"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(4)]
        match = re.search(r"OpenAI API {2}(http://\S+)/v1", "".join(lines))
        assert match, lines

        class Place:
            url = match[1]

        server: Any = Place()
        with ThreadPoolExecutor(1) as reader:
            log = reader.submit(process.stderr.read)  # a full pipe would stop the server
            _load(server)
            process.terminate()
            assert process.wait(60) == 0
            assert "Traceback" not in log.result()
    finally:
        process.kill()
        process.communicate()


def _load(server: Any) -> None:
    path = "/v1/completions"
    asked = {"model": "tale", "temperature": 0, "max_tokens": 40}
    alone = {
        prompt: ask(server, path, {**asked, "prompt": prompt}).json["choices"][0]["text"]
        for prompt in PROMPTS
    }

    def one(number: int) -> tuple[str, int]:
        chance = random.Random(number)
        prompt = chance.choice(PROMPTS)
        kind = chance.choice(("whole", "whole", "stream", "leave", "leave", "broken"))
        if kind == "whole":
            reply = ask(server, path, {**asked, "prompt": prompt})
            assert reply.json["choices"][0]["text"] == alone[prompt]
            return kind, reply.status
        if kind == "stream":
            reply = ask(server, path, {**asked, "prompt": prompt, "stream": True})
            pieces = re.findall(r'"text":"((?:[^"\\]|\\.)*)"', reply.raw.decode())
            assert "".join(pieces).encode().decode("unicode_escape") == alone[prompt]
            assert reply.raw.endswith(b"data: [DONE]\n\n")
            return kind, reply.status
        if kind == "leave":
            stream = chance.random() < 0.5
            body = {**asked, "prompt": [prompt] * 8, "temperature": 1, "stream": stream}
            connection = begin(server, path, body)
            time.sleep(chance.random() / 5)
            if chance.random() < 0.5:
                with suppress(OSError):
                    connection.recv(100)
            connection.close()
            return kind, 0
        raw = chance.choice((b"{", b"\xff", b'{"prompt": 1}', b'{"prompt": "a", "stop": {}}'))
        return kind, ask(server, path, raw).status

    before, started = metric(server, "edgeq_resident_memory_bytes"), time.monotonic()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        found = list(pool.map(one, range(REQUESTS // 3)))
        middle = metric(server, "edgeq_resident_memory_bytes")
        while len(found) < REQUESTS or time.monotonic() - started < SECONDS:
            found += pool.map(one, range(len(found), len(found) + REQUESTS // 3))
    statuses = Counter(found)
    assert {status for kind, status in statuses if kind in ("whole", "stream")} == {200}
    assert {status for kind, status in statuses if kind == "broken"} == {400}
    for _ in range(500):
        busy = [metric(server, f'edgeq_requests_{what}{{model="tale"}}')
                for what in ("running", "waiting")]  # fmt: skip
        if busy == [0, 0]:
            break
        time.sleep(0.02)
    assert busy == [0, 0]
    after = metric(server, "edgeq_resident_memory_bytes")
    memory = f"memory {before / 1e6:.1f}, {middle / 1e6:.1f}, {after / 1e6:.1f} MB"
    print(f"{len(found)} requests in {time.monotonic() - started:.0f} s; {memory}; {statuses}")
    assert after <= middle * 1.05, memory


@pytest.mark.slow
def test_no_request_of_a_fuzzer_breaks_the_server(server: edgeq.Server) -> None:
    """Bodies made from the server's own description, by schemathesis, right and wrong ones."""
    schemathesis = pytest.importorskip("schemathesis")
    hypothesis = pytest.importorskip("hypothesis")
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    tried: Counter[str] = Counter()
    settings = hypothesis.settings(
        max_examples=25, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    for result in schema.get_all_operations():
        operation = result.ok()

        @hypothesis.given(case=operation.as_strategy())
        @settings
        def run(case: Any) -> None:
            if isinstance(case.body, dict):  # what is right must not take long
                case.body["max_tokens"] = 2
                case.body.pop("grammar", None)
            response = case.call()
            assert response.status_code < 500, response.text
            if response.status_code >= 400:
                assert response.json()["error"]["code"]
            tried[case.path] += 1

        run()
    assert set(tried) >= {"/v1/chat/completions", "/v1/completions", "/tokenize", "/props"}
    assert ask(server, "/health").status == 200
