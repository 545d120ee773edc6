"""``/v1/rerank``: what `edgeq.rerank` gives, in order; and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import edgeq
from tests.families import random_model, tiny_config
from tests.sentence_models import TEXTS, write_tokenizer
from tests.serving.plain_http import ask, metric

PATH = "/v1/rerank"
DOCUMENTS = [*TEXTS, "yes no yes"]


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of the family qwen3, with a tokenizer that has the tokens of the prompt."""
    folder = tmp_path_factory.mktemp("reranker")
    write_tokenizer(folder)
    model = random_model(tiny_config("qwen3", context=1024, vocab=300))
    files = {"tokenizer.json": (folder / "tokenizer.json").read_bytes()}
    edgeq.save(edgeq.Model(model.config, model.tensors, files), folder / "r.edgeq")
    return folder / "r.edgeq"


@pytest.fixture(scope="module")
def ranking(reranker: Path, talker: Path) -> Iterator[edgeq.Server]:
    settings = edgeq.ServerSettings(port=0, parallel=2)
    models: list[Any] = [("ranker", reranker), ("talker", talker)]
    with edgeq.Server(models, settings, context=700, threads=1) as made:
        yield made


def test_documents_in_order(ranking: edgeq.Server, reranker: Path) -> None:
    want = edgeq.rerank(reranker, "what is warm?", DOCUMENTS, threads=1, context=700)
    order = sorted(range(len(DOCUMENTS)), key=lambda number: -want[number])
    body = {"query": "what is warm?", "documents": DOCUMENTS}
    before = metric(ranking, 'edgeq_prompt_tokens_total{model="ranker"}')
    reply = ask(ranking, PATH, body).json
    assert [one["index"] for one in reply["results"]] == order
    scores = [one["relevance_score"] for one in reply["results"]]
    assert scores == pytest.approx([float(want[number]) for number in order], abs=1e-6)
    assert len(set(scores)) == len(DOCUMENTS)
    assert all("document" not in one for one in reply["results"])
    assert reply["model"] == "ranker"
    assert reply["usage"]["total_tokens"] > 0
    after = metric(ranking, 'edgeq_prompt_tokens_total{model="ranker"}')
    assert after - before == reply["usage"]["prompt_tokens"]
    objects = [{"text": text} for text in DOCUMENTS]
    short = ask(
        ranking, PATH,
        {**body, "documents": objects, "top_n": 2, "return_documents": True, "model": "ranker"},
    ).json  # fmt: skip
    assert [one["document"]["text"] for one in short["results"]] == [
        DOCUMENTS[number] for number in order[:2]
    ]
    other = ask(ranking, PATH, {**body, "instruction": "Judge the color"}).json["results"]
    assert [one["relevance_score"] for one in other] != scores


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"documents": ["a"]}, "query", "missing_required_parameter"),
        ({"query": "a"}, "documents", "missing_required_parameter"),
        ({"query": "a", "documents": []}, "documents", "invalid_value"),
        ({"query": "a", "documents": "a"}, "documents", "invalid_type"),
        ({"query": "a", "documents": [7]}, "documents", "invalid_value"),
        ({"query": "a", "documents": [{"title": "a"}]}, "documents", "invalid_value"),
        ({"query": "a", "documents": ["a " * 900]}, "documents", "context_length_exceeded"),
        ({"query": "a", "documents": ["a"], "top_n": 0}, "top_n", "invalid_value"),
        ({"query": "a", "documents": ["a"], "model": "talker"}, "model", "unsupported_value"),
    ],
)
def test_what_is_refused(ranking: edgeq.Server, body: Any, param: str, code: str) -> None:
    reply = ask(ranking, PATH, body)
    assert (reply.status, reply.code, reply.json["error"]["param"]) == (400, code, param)
