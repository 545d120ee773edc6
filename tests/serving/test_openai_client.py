"""OpenAI's own client against a running server."""

from __future__ import annotations

import math
from typing import Any

import pytest

import edgeq
from edgeq.importers import load
from edgeq.runtime.tokenizer import Tokenizer
from tests.paths import DEMO
from tests.real_models import SMOLLM2, real_model

openai = pytest.importorskip("openai")
HELLO = [{"role": "user", "content": "Tell me."}]


def continued(text: str, n: int) -> str:
    """What the engine says itself, without a server."""
    model = load(DEMO)
    tokenizer = Tokenizer(model)
    with edgeq.Engine(model, threads=1) as engine:
        greedy = edgeq.SamplingParams(temperature=0)
        chunks = edgeq.generate(engine, tokenizer, text, greedy, max_tokens=n)
        return "".join(chunk.text for chunk in chunks)


def test_models_are_listed(openai_client: Any) -> None:
    assert [one.id for one in openai_client.models.list()] == ["talker", "tale", "caller"]
    assert openai_client.models.retrieve("tale").owned_by == "edgeq"
    with pytest.raises(openai.NotFoundError) as caught:
        openai_client.models.retrieve("tail")
    assert caught.value.code == "model_not_found"
    assert "did you mean 'tale'" in str(caught.value)


def test_a_chat_is_what_the_engine_says(openai_client: Any) -> None:
    answer = openai_client.chat.completions.create(
        model="talker", messages=HELLO, temperature=0, max_tokens=12
    )
    choice = answer.choices[0]
    assert choice.message.content == continued("Tell me. Once upon a time", 12)
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    usage = answer.usage
    n_prompt = len(Tokenizer(load(DEMO)).encode("Tell me. Once upon a time", add_bos=False))
    assert (usage.prompt_tokens, usage.completion_tokens) == (n_prompt, 12)
    assert usage.total_tokens == n_prompt + 12


def test_a_stream_is_the_same_text(openai_client: Any) -> None:
    asked: dict[str, Any] = {"model": "talker", "messages": HELLO, "temperature": 0,
                             "max_completion_tokens": 12}  # fmt: skip
    events = list(
        openai_client.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        )
    )
    whole = openai_client.chat.completions.create(**asked)
    *texts, usage = events
    said = "".join(event.choices[0].delta.content or "" for event in texts)
    assert said == whole.choices[0].message.content
    assert texts[0].choices[0].delta.role == "assistant"
    assert texts[-1].choices[0].finish_reason == "length"
    assert (usage.choices, usage.usage.completion_tokens) == ([], 12)
    assert usage.usage.prompt_tokens == whole.usage.prompt_tokens
    # every event has a choice unless the numbers of tokens are asked for
    for event in openai_client.chat.completions.create(**asked, stream=True):
        assert len(event.choices) == 1


def test_completions_continue_texts_and_tokens(openai_client: Any) -> None:
    ids = Tokenizer(load(DEMO)).encode("Once upon a time")
    asked: dict[str, Any] = {"model": "tale", "temperature": 0, "max_tokens": 6}
    expected = continued("Once upon a time", 6)
    for prompt, texts in (("Once upon a time", [expected]), (ids, [expected]),
                          (["Once upon a time", ids], [expected] * 2)):  # fmt: skip
        answer = openai_client.completions.create(prompt=prompt, **asked)
        assert [choice.text for choice in answer.choices] == texts
        parts = [""] * len(texts)
        for event in openai_client.completions.create(prompt=prompt, stream=True, **asked):
            parts[event.choices[0].index] += event.choices[0].text
        assert parts == texts
    echoed = openai_client.completions.create(prompt="Once upon a time", echo=True, **asked)
    assert echoed.choices[0].text == "Once upon a time" + expected


def test_stop_seed_and_biases(openai_client: Any) -> None:
    def said(**more: Any) -> Any:
        asked = {"model": "tale", "prompt": "Once upon a time", "max_tokens": 20, **more}
        return openai_client.completions.create(**asked).choices[0]

    greedy = said(temperature=0).text
    word = greedy.split()[3]
    stopped = said(temperature=0, stop=[word])
    assert stopped.text == greedy[: greedy.index(word)]
    assert stopped.finish_reason == "stop"
    warm = [said(temperature=2, seed=seed).text for seed in (5, 5, -6)]
    assert warm[0] == warm[1] != warm[2]
    assert said(temperature=1, top_p=0).text == greedy
    assert said(temperature=1, extra_body={"top_k": 1}).text == greedy
    first = Tokenizer(load(DEMO)).encode(greedy, add_bos=False)[0]
    assert said(temperature=0, logit_bias={str(first): -100}).text != greedy
    penalized = said(temperature=0, frequency_penalty=2, presence_penalty=2, max_tokens=60).text
    words = penalized.split()
    assert len(set(words)) > 0.8 * len(words)


def test_log_probabilities(openai_client: Any) -> None:
    answer = openai_client.chat.completions.create(
        model="talker", messages=HELLO, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    choice = answer.choices[0]
    assert "".join(one.token for one in choice.logprobs.content) == choice.message.content
    for one in choice.logprobs.content:
        assert len(one.top_logprobs) == 3
        assert one.logprob == one.top_logprobs[0].logprob <= 0  # greedy takes the most likely
        assert bytes(one.bytes).decode() == one.token
        assert sum(math.exp(top.logprob) for top in one.top_logprobs) <= 1 + 1e-6
    # each token's probability is the same whether it was chosen or given
    asked: dict[str, Any] = {"model": "tale", "temperature": 0, "logprobs": 2}
    made = openai_client.completions.create(prompt="Once upon a time", max_tokens=4, **asked)
    whole = "Once upon a time" + made.choices[0].text
    given = openai_client.completions.create(prompt=whole, max_tokens=0, echo=True, **asked)
    scored = given.choices[0].logprobs
    assert given.choices[0].text == whole
    assert scored.tokens[0] == "<|bos|>"
    assert "".join(scored.tokens[1:]) == whole
    assert scored.token_logprobs[0] is None
    assert scored.token_logprobs[-4:] == pytest.approx(made.choices[0].logprobs.token_logprobs)
    assert scored.text_offset[-1] == len(whole) - len(scored.tokens[-1])


@pytest.mark.parametrize(
    ("asked", "error", "code", "param"),
    [
        ({"model": "nothing"}, "NotFoundError", "model_not_found", "model"),
        ({"temperature": 3}, "BadRequestError", "invalid_value", "temperature"),
        ({"n": 2}, "BadRequestError", "unsupported_value", "n"),
        ({"messages": []}, "BadRequestError", "invalid_value", "messages"),
        ({"messages": [{"role": "user", "content": "word " * 300}]}, "BadRequestError",
         "context_length_exceeded", "messages"),
        ({"messages": [{"role": "user", "content": "refuse"}]}, "BadRequestError", "invalid_value",
         "messages"),
        ({"model": "tale"}, "BadRequestError", "unsupported_value", "messages"),
        ({"extra_body": {"grammer": "x"}}, "BadRequestError", "unknown_parameter", "grammer"),
        ({"messages": [{"role": "user", "content": "x" * 200_000}]}, "APIStatusError",
         "body_too_large", None),
    ],
)  # fmt: skip
def test_errors_are_the_client_s_types(
    openai_client: Any, asked: dict[str, Any], error: str, code: str, param: str | None
) -> None:
    with pytest.raises(getattr(openai, error)) as caught:
        openai_client.chat.completions.create(
            **{"model": "talker", "messages": HELLO, "max_tokens": 4, **asked}
        )
    assert (caught.value.code, caught.value.param) == (code, param)


def test_a_wrong_key_is_an_authentication_error(talker: Any) -> None:
    settings = edgeq.ServerSettings(port=0, parallel=1, api_key="secret")
    with edgeq.Server(talker, settings, context=64, threads=1) as server:
        for key in ("wrong", "secre", "secret2"):
            with openai.OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0) as client:
                with pytest.raises(openai.AuthenticationError) as caught:
                    client.models.list()
                assert caught.value.code == "invalid_api_key"
        with openai.OpenAI(base_url=server.url + "/v1", api_key="secret") as client:
            assert [one.id for one in client.models.list()] == ["talker"]


def test_a_real_model_answers() -> None:
    path = real_model(SMOLLM2)
    settings = edgeq.ServerSettings(port=0, parallel=1)
    with (
        edgeq.Server(f"smol={path}", settings, context=512, threads=1) as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client,
    ):
        talk = [{"role": "user", "content": "What is the capital of Germany?"}]
        asked: dict[str, Any] = {"model": "smol", "temperature": 0, "max_tokens": 30}
        answer = client.chat.completions.create(messages=talk, **asked)
        message = answer.choices[0].message
        assert "Berlin" in message.content
        assert answer.choices[0].finish_reason == "stop"
        talk.append(message.model_dump(exclude_none=True))
        talk.append({"role": "user", "content": "And of Italy?"})
        following = client.chat.completions.create(messages=talk, **asked)
        assert "Rome" in following.choices[0].message.content
        # the first turn was not run again
        assert following.usage.prompt_tokens_details.cached_tokens >= answer.usage.total_tokens - 1
