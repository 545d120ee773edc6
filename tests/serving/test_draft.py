"""A server with a draft model: the answers are those without, alone and side by side."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import edgeq
from tests.paths import DEMO
from tests.serving.plain_http import ask, metric

PROMPTS = ("Once upon a time", "The little fox", "Tom had a lamp and", "Lily saw a big tree")
PATH = "/v1/completions"


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[edgeq.Server]:
    small = tmp_path_factory.mktemp("draft") / "small.edgeq"
    edgeq.quantize(DEMO, small, fast=True, threads=1)
    for model in (DEMO, small):  # compiles what is not in the cache, which may take long
        list(edgeq.run(model, "Once", max_tokens=2, threads=1))
    models: list[Any] = [("tale", DEMO)]
    settings = edgeq.ServerSettings(port=0, parallel=3)
    with edgeq.Server(models, settings, draft=small, context=256, threads=1) as made:
        for slot in made.service.models["tale"].slots.slots:
            assert slot.draft is not None
            slot.draft.tokens = 3  # whatever the times are
        yield made


@pytest.mark.parametrize("more", [{"temperature": 0}, {"temperature": 1, "seed": 5},
                                  {"temperature": 1, "seed": 6, "presence_penalty": 0.5,
                                   "logprobs": 2}])  # fmt: skip
def test_answers_are_the_same(
    drafting: edgeq.Server, server: edgeq.Server, more: dict[str, Any]
) -> None:
    def answer(place: edgeq.Server, prompt: str) -> Any:
        body = {"model": "tale", "prompt": prompt, "max_tokens": 40, **more}
        return ask(place, PATH, body).json

    alone = [answer(server, prompt)["choices"] for prompt in PROMPTS]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: answer(drafting, prompt), PROMPTS))
    assert [one["choices"] for one in found] == alone
    assert all(one["timings"]["draft_n_accepted"] > 0 for one in found)
    assert all(one["timings"]["draft_n_accepted"] <= one["timings"]["draft_n"] for one in found)


@pytest.mark.parametrize("more", [{"temperature": 0.7, "seed": 5}, {"temperature": 0},
                                  {"temperature": 1, "seed": 6, "logprobs": 2,
                                   "frequency_penalty": 0.5}])  # fmt: skip
def test_answers_with_prompt_lookup_are_the_same(
    server: edgeq.Server, more: dict[str, Any]
) -> None:
    prompt = "Tom had a red lamp. Lily had a red lamp. Tom had a red"
    body = {"model": "tale", "prompt": prompt, "max_tokens": 60, **more}
    alone = ask(server, PATH, body).json["choices"]
    settings = edgeq.ServerSettings(port=0, parallel=1, lookup=8)
    models: list[Any] = [("tale", DEMO)]
    with edgeq.Server(models, settings, context=256, threads=1) as looking:
        reply = ask(looking, PATH, body).json
    assert reply["choices"] == alone
    assert reply["timings"]["draft_n"] > 0


def test_the_counters_know_of_drafts(drafting: edgeq.Server, server: edgeq.Server) -> None:
    body = {"model": "tale", "prompt": PROMPTS[0], "max_tokens": 20, "temperature": 0}
    timings = ask(drafting, PATH, body).json["timings"]
    drafted = metric(drafting, 'edgeq_drafted_tokens_total{model="tale"}')
    accepted = metric(drafting, 'edgeq_accepted_tokens_total{model="tale"}')
    assert drafted >= timings["draft_n"] > 0
    assert drafted >= accepted >= timings["draft_n_accepted"] > 0
    assert "draft_n" not in ask(server, PATH, body).json["timings"]


def test_a_client_that_leaves_frees_the_slot(drafting: edgeq.Server) -> None:
    from tests.serving.plain_http import begin

    body = {"model": "tale", "prompt": [PROMPTS[0]] * 8, "temperature": 1, "stream": True}
    connection = begin(drafting, PATH, body)
    connection.recv(100)
    connection.close()
    greedy = {"model": "tale", "prompt": PROMPTS[1], "max_tokens": 12, "temperature": 0}
    first = ask(drafting, PATH, greedy).json["choices"][0]["text"]
    assert all(ask(drafting, PATH, greedy).json["choices"][0]["text"] == first for _ in range(4))


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(edgeq.FormatError):
        edgeq.Server(str(DEMO), edgeq.ServerSettings(port=0), draft=tmp_path / "none")


def test_caches_of_the_draft_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused where the model alone would fit."""
    from edgeq.core.cpu import available_cores
    from edgeq.importers import load
    from edgeq.model.memory_layout import kv_bytes, scratch_bytes

    config = load(DEMO).config
    alone = 2 * kv_bytes(config, 256) + scratch_bytes(config, 256, available_cores(), 2)
    monkeypatch.setattr("edgeq.serving.served.available_bytes", lambda: alone + 1000)
    settings = edgeq.ServerSettings(port=0, parallel=2)
    models: list[Any] = [("tale", DEMO)]
    with edgeq.Server(models, settings, context=256):
        pass
    with pytest.raises(edgeq.DoesNotFitError, match="the KV caches of 2 answers"):
        edgeq.Server(models, settings, context=256, draft=DEMO)
