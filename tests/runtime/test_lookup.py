"""Prompt lookup: its guesses, and that it changes the speed of a text and nothing of its tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgeq.core.errors import UsageError
from edgeq.model.model import Model
from edgeq.runtime.compiled import CompiledBackend
from edgeq.runtime.engine import Engine
from edgeq.runtime.generate import Chunk, generate
from edgeq.runtime.lookup import MAX_DRAFT, DraftLength, Lookup
from edgeq.runtime.sampling import SamplingParams
from tests.families import quantized, random_model, tiny_config
from tests.runtime.test_draft import Alternating
from tests.runtime.test_generate import Letters

GREEDY = SamplingParams(temperature=0.0)
PROMPT = np.random.default_rng(7).integers(3, 100, 200).tolist()


def guess(text: list[int], n: int) -> list[int]:
    """The specification: what followed the latest place where the longest end stood before."""
    for length in (4, 3, 2):
        for place in range(len(text) - 1, length - 1, -1):
            if text[place - length : place] == text[len(text) - length :]:
                grown = list(text)
                for i in range(n):
                    grown.append(grown[place + i])
                return grown[len(text) :]
    return []


def test_drafts() -> None:
    assert Lookup([]).draft(3) == []
    assert Lookup([1]).draft(3) == []
    assert Lookup([1, 2, 3, 4]).draft(3) == []
    assert Lookup([1, 2, 3, 4, 1, 2]).draft(2) == [3, 4]
    assert Lookup([1, 2, 3, 4, 1, 2]).draft(0) == []
    assert Lookup([1, 2, 7, 1, 2, 8, 1, 2]).draft(2) == [8, 1]  # the latest
    assert Lookup([9, 1, 2, 7, 1, 2, 8, 9, 1, 2]).draft(1) == [7]  # the longest
    assert Lookup([5, 5, 5]).draft(4) == [5, 5, 5, 5]
    assert Lookup([1, 2, 1, 2]).draft(5) == [1, 2, 1, 2, 1]  # a loop goes round


def test_drafts_are_as_specified_however_the_text_came() -> None:
    rng = np.random.default_rng(5)
    for letters in (2, 3, 6):
        text: list[int] = []
        lookup = Lookup([])
        for _ in range(120):
            more = rng.integers(0, letters, rng.integers(1, 4)).tolist()
            lookup.extend(more)
            text += more
            assert lookup.draft(7) == guess(text, 7)


def test_draft_length() -> None:
    length = DraftLength(8)

    def step(accepted: int) -> int:
        drafted = length.next()
        length.record(drafted, min(accepted, drafted))
        return drafted

    assert [step(9), step(9), step(3), step(4), step(9), step(9)] == [8, 8, 8, 4, 8, 8]
    assert [step(0) for _ in range(12)] == [8, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert sum(step(0) for _ in range(200)) <= 200 // 16 + 1  # rejected drafts soon cost little
    while not step(1):
        pass
    assert [step(2), step(2), step(2)] == [2, 4, 3]
    length.record(0, 0)  # without a draft nothing changes
    assert length.next() == 3


def tiny(family: str, **over: Any) -> Model:
    config = tiny_config(family, **{"context": 1024, "eos": (), **over})
    return quantized(random_model(config, 1), "w4-g32")


def made(engine: Engine, prompt: list[int] = PROMPT, **options: Any) -> list[Chunk]:
    engine.reset()
    return list(generate(engine, Letters(), prompt, GREEDY, **options))


def tokens(chunks: list[Chunk]) -> list[int]:
    return [chunk.token for chunk in chunks if chunk.token is not None]


@pytest.mark.parametrize(
    ("family", "kv_bits"),
    [("llama", 16), ("gemma3", 8), ("lfm2", 8), ("qwen3_5", 8), ("gemma4", 8)],
)
def test_500_tokens_are_the_same_with_and_without(family: str, kv_bits: Any) -> None:
    model = tiny(family)
    with Engine(model, threads=1, kv_bits=kv_bits) as engine:
        want = tokens(made(engine, max_tokens=500))
        state = engine.tokens
    assert len(want) == 500
    for threads, lookup in ((1, 1), (2, 5), (3, 30), (4, MAX_DRAFT)):
        with Engine(model, threads=threads, kv_bits=kv_bits) as engine:
            chunks = made(engine, max_tokens=500, lookup=lookup)
            assert tokens(chunks) == want
            assert engine.tokens == state
            assert 0 < chunks[-1].n_accepted <= chunks[-1].n_drafted
            if threads > 2:
                continue
            assert tokens(made(engine, max_tokens=500)) == want
            # the prompt in pieces of another size
            engine.reset()
            engine.forward(PROMPT[:77])
            engine.forward(PROMPT[77:140])
            rest = list(
                generate(engine, Letters(), PROMPT[140:], GREEDY, max_tokens=500, lookup=lookup)
            )
            assert tokens(rest) == want
            assert rest[-1].n_reused == 140


def test_right_guesses_save_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(tiny("llama"), threads=1) as engine:
        passes = 0
        run = CompiledBackend.forward

        def counted(*args: Any) -> Any:
            nonlocal passes
            passes += 1
            return run(*args)

        monkeypatch.setattr(CompiledBackend, "forward", counted)
        monkeypatch.setattr(
            engine, "greedy", lambda token, n: [int(engine.forward([token]).argmax())]
        )
        last = made(engine, max_tokens=500, lookup=10)[-1]
        assert last.n_accepted > 100  # a random model soon repeats itself
        assert passes == 500 - last.n_accepted


def test_it_ends_where_it_would_without() -> None:
    with Engine(tiny("llama", context=300), threads=1) as engine:
        everything = made(engine)  # to the end of the context
        assert everything[-1].finish_reason == "length"
        text = "".join(chunk.text for chunk in everything)
        where = text.index(text[60:63]) + 1
        stops: list[dict[str, Any]] = [{}, {"stop": [text[where : where + 3]]}]
        stops += [{"max_tokens": n} for n in (1, 2, 3, 50)]
        for options in stops:
            want = made(engine, **options)
            state = engine.tokens
            for lookup in (1, 4, 30):
                got = made(engine, lookup=lookup, **options)
                assert [c.token for c in got] == [c.token for c in want]
                assert "".join(c.text for c in got) == "".join(c.text for c in want)
                assert got[-1].finish_reason == want[-1].finish_reason
                assert engine.tokens == state


def test_an_end_token_within_a_guess_ends_it() -> None:
    model = tiny("llama")
    with Engine(model, threads=1) as engine:
        free = tokens(made(engine, max_tokens=500))
    # a token first met where guesses are being accepted would be ideal; any late one must do
    end = max(set(free), key=free.index)
    with Engine(tiny("llama", eos=(end,)), threads=1) as engine:
        want = made(engine, max_tokens=500)
        state = engine.tokens
        got = made(engine, max_tokens=500, lookup=12)
        assert tokens(got) == tokens(want) == free[: free.index(end)]
        assert got[-1].finish_reason == "stop"
        assert engine.tokens == state


@pytest.mark.parametrize("taken", [1, 2, 100, 251])
def test_closed_early_the_cache_holds_what_was_seen(taken: int) -> None:
    with Engine(tiny("llama"), threads=1) as engine:
        stream = generate(engine, Letters(), PROMPT, GREEDY, max_tokens=500, lookup=16)
        seen = [next(stream).token for _ in range(taken)]
        stream.close()  # type: ignore[attr-defined]
        assert engine.tokens == [*PROMPT, *seen[:-1]]


@pytest.mark.parametrize("params", [
    SamplingParams(temperature=0.7, seed=1),
    SamplingParams(seed=2, top_k=3, repetition_penalty=1.1),
    SamplingParams(temperature=0, frequency_penalty=0.1),
    SamplingParams(temperature=0.3, seed=3, presence_penalty=0.5, logit_bias={7: 1.0}),
])  # fmt: skip
@pytest.mark.parametrize("even", [False, True])
def test_sampled_tokens_are_the_same_too(params: SamplingParams, even: bool) -> None:
    with Engine(tiny("llama"), threads=1) as engine:

        def answer(lookup: int) -> list[Chunk]:
            engine.reset()
            limits = Alternating(engine.config.vocab) if even else None
            return list(generate(engine, Letters(), np.tile(PROMPT[:12], 9), params, logprobs=2,
                                 max_tokens=200, lookup=lookup, constraint=limits))  # fmt: skip

        want = answer(0)
        state = engine.tokens
        for lookup in (1, 8):
            got = answer(lookup)
            assert tokens(got) == tokens(want)
            assert [one.logprobs for one in got] == [one.logprobs for one in want]
            assert engine.tokens == state
            assert got[-1].n_drafted > 0


@pytest.mark.parametrize(("lookup", "message"), [
    (-1, "lookup is -1; use 0"), (MAX_DRAFT + 1, "use 0 .off. to 64"),
])  # fmt: skip
def test_what_is_refused(lookup: int, message: str) -> None:
    with Engine(tiny("llama"), threads=1) as engine:
        with pytest.raises(UsageError, match=message):
            generate(engine, Letters(), PROMPT, GREEDY, lookup=lookup)
        assert engine.n_past == 0
