"""``/v1/embeddings``: OpenAI's client, what is refused, and clients that leave."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeq
from edgeq.core.errors import UsageError
from tests.families import random_model, tiny_config
from tests.paths import DEMO
from tests.sentence_models import write_tokenizer
from tests.serving.plain_http import ask, begin, metric

PATH = "/v1/embeddings"
TEXTS = ["The dog ran in the park.", "Once upon a time", "She ate a cake."]


def test_openai_s_client(openai_client: Any, server: edgeq.Server) -> None:
    want = edgeq.embed(DEMO, TEXTS, threads=1, context=256)
    whole = openai_client.embeddings.create(model="tale", input=TEXTS)  # sent as base64
    assert [one.index for one in whole.data] == [0, 1, 2]
    got = np.array([one.embedding for one in whole.data], np.float32)
    assert np.array_equal(got, want)
    tokenizer = edgeq.Tokenizer(DEMO)
    ids = [tokenizer.encode(text, add_eos=True) for text in TEXTS]
    assert whole.usage.prompt_tokens == whole.usage.total_tokens == sum(map(len, ids))
    floats = openai_client.embeddings.create(model="tale", input=TEXTS[0], encoding_format="float")
    assert np.array_equal(np.array(floats.data[0].embedding, np.float32), want[0])
    assert np.allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
    for tokens in (ids[1], [ids[1]]):
        by_ids = openai_client.embeddings.create(model="tale", input=tokens)
        assert np.array_equal(np.array(by_ids.data[0].embedding, np.float32), want[1])
    width = ask(server, "/props").json["models"][1]["hidden"]
    assert len(floats.data[0].embedding) == width
    same = openai_client.embeddings.create(model="tale", input="a", dimensions=width)
    assert len(same.data[0].embedding) == width
    short = openai_client.embeddings.create(model="tale", input=TEXTS, dimensions=8)
    again = edgeq.embed(DEMO, TEXTS, threads=1, context=256, dimensions=8)
    assert np.array_equal(np.array([one.embedding for one in short.data], np.float32), again)


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "input", "missing_required_parameter"),
        ({"input": ""}, "input", "empty_prompt"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": 7}, "input", "invalid_type"),
        ({"input": [[]]}, "input", "empty_prompt"),
        ({"input": ["a", 7]}, "input", "invalid_value"),
        ({"input": [-1]}, "input", "invalid_value"),
        ({"input": [[9999]]}, "input", "invalid_value"),
        ({"input": [True]}, "input", "invalid_value"),
        ({"input": "a " * 500}, "input", "context_length_exceeded"),
        ({"input": ["a"] * 2049}, "input", "invalid_value"),
        ({"input": "a", "dimensions": 9999}, "dimensions", "invalid_value"),
        ({"input": "a", "dimensions": 0}, "dimensions", "invalid_value"),
        ({"input": "a", "prompt_name": "query"}, "prompt_name", "invalid_value"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "unsupported_value"),
        ({"input": "a", "pooling": "cls"}, "pooling", "unknown_parameter"),
        ({"input": "\ud800"}, None, "invalid_json"),
    ],
)
def test_what_is_refused(server: edgeq.Server, body: Any, param: str | None, code: str) -> None:
    reply = ask(server, PATH, {"model": "tale", **body})
    assert (reply.status, reply.code, reply.json["error"]["param"]) == (400, code, param)


def test_an_unknown_model(server: edgeq.Server) -> None:
    assert ask(server, PATH, {"model": "none", "input": "a"}).code == "model_not_found"
    with pytest.raises(UsageError, match="pooling"):
        edgeq.ServerSettings(pooling="max")


def test_beside_answers(server: edgeq.Server) -> None:
    """Slots are shared; neither changes the other."""
    body = {"model": "tale", "prompt": "Once upon a time", "max_tokens": 20, "temperature": 0}
    alone = ask(server, "/v1/completions", body).json["choices"]
    vectors = ask(server, PATH, {"model": "tale", "input": TEXTS}).json["data"]

    def one(number: int) -> bool:
        if number % 2:
            return bool(ask(server, "/v1/completions", body).json["choices"] == alone)
        return bool(ask(server, PATH, {"model": "tale", "input": TEXTS}).json["data"] == vectors)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(one, range(24)))


def test_a_client_that_leaves_frees_the_slot(server: edgeq.Server) -> None:
    before = metric(server, 'edgeq_prompt_tokens_total{model="tale"}')
    begin(server, PATH, {"model": "tale", "input": ["a b c d e f g h " * 20] * 2000}).close()
    for _ in range(500):
        if not metric(server, 'edgeq_requests_running{model="tale"}'):
            break
        time.sleep(0.02)
    else:
        pytest.fail("the slot is still in use")
    assert metric(server, 'edgeq_prompt_tokens_total{model="tale"}') == before


def test_a_client_that_leaves_within_a_text_frees_the_slot() -> None:
    """A text of many batches is not run to its end."""
    settings = edgeq.ServerSettings(port=0, parallel=1)
    model = edgeq.load(DEMO)
    model = replace(model, config=replace(model.config, context=1 << 15))
    with edgeq.Server([("long", model)], settings, context=1 << 15, threads=1) as server:
        engine = server.service.models["long"].engines[0]
        longest = 0
        begun = begin(server, PATH, {"model": "long", "input": [5] * 30_000})
        for _ in range(1000):
            longest = max(longest, engine.n_past)
            if longest:
                break
            time.sleep(0.002)
        begun.close()
        for _ in range(3000):
            longest = max(longest, engine.n_past)
            if not metric(server, 'edgeq_requests_running{model="long"}'):
                break
            time.sleep(0.002)
        assert 0 < longest < 30_000


def test_conversations_are_kept() -> None:
    settings = edgeq.ServerSettings(port=0, parallel=1)
    body = {"prompt": "Once upon a time there was a dog. " * 8, "max_tokens": 4, "temperature": 0}
    with edgeq.Server(DEMO, settings, threads=1) as server:
        ask(server, "/v1/completions", body)
        ask(server, PATH, {"input": TEXTS})
        usage = ask(server, "/v1/completions", body).json["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= usage["prompt_tokens"] - 1


def test_a_model_that_sees_both_ways(tmp_path: Path) -> None:
    """A text of several batches is run as a whole, and the model answers no chat."""
    write_tokenizer(tmp_path, "<bos> $A <eos>")
    config = tiny_config("gemma3", vocab=300, context=400)
    blocks = tuple(replace(block, causal=False) for block in config.blocks)
    model = random_model(replace(config, blocks=blocks))
    files = {name: (tmp_path / name).read_bytes() for name in ("tokenizer.json",)}
    edgeq.save(edgeq.Model(model.config, model.tensors, files), tmp_path / "g.edgeq")
    texts = ["a dog, " * 40, "Once"]
    want = edgeq.embed(tmp_path / "g.edgeq", texts, pooling="mean", threads=1, context=300)
    settings = edgeq.ServerSettings(port=0, pooling="mean")
    with edgeq.Server([("g", tmp_path / "g.edgeq")], settings, context=300, threads=1) as made:
        data = ask(made, PATH, {"input": texts}).json["data"]
        got = np.array([one["embedding"] for one in data], np.float32)
        assert np.array_equal(got, want)
        assert ask(made, PATH, {"input": "a" * 400}).code == "context_length_exceeded"
        refused = ask(made, "/v1/completions", {"prompt": "Once"})
        assert "cannot generate text" in refused.json["error"]["message"]
