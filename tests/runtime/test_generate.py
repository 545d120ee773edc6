"""Generation through a real engine: streams, stops, limits and the state left behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from edgeq import importers
from edgeq.core.errors import UsageError
from edgeq.model.model import Model
from edgeq.runtime.engine import Engine
from edgeq.runtime.generate import Chunk, generate, next_burst, split_at_stop
from edgeq.runtime.sampling import SamplingParams
from edgeq.runtime.tokenizer import StreamDecoder, Tokenizer
from tests.conftest import need, small_checkpoint
from tests.families import quantized, random_model, tiny_config

GREEDY = SamplingParams(temperature=0.0)
STEPS = SamplingParams(top_k=1)
"""The same choices as greedy, but token by token."""


class Letters(Tokenizer):
    """A tokenizer of one character a token; "é" is two tokens, each half of its UTF-8."""

    def __init__(self) -> None:
        self.eos_ids = ()

    def stream(self, prompt: Any = ()) -> StreamDecoder:
        return LetterStream()


class LetterStream(StreamDecoder):
    def __init__(self) -> None:
        self.half = False

    def push(self, token: int) -> str:
        if token == 100:
            self.half = not self.half
            return "" if self.half else "é"
        return chr(ord("0") + token)


@pytest.fixture
def engine() -> Iterator[Engine]:
    model = quantized(random_model(tiny_config("llama", tied=False, eos=()), seed=1), "w8-g32")
    with Engine(model, backend="numpy") as made:
        yield made


def chunks(engine: Engine, prompt: list[int], params: SamplingParams, **over: Any) -> list[Chunk]:
    engine.reset()
    return list(generate(engine, Letters(), prompt, params, **over))


def text_of(made: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in made)


def tokens_of(made: list[Chunk]) -> list[int]:
    return [chunk.token for chunk in made if chunk.token is not None]


PROMPT = [3, 4, 5, 6]


def test_one_chunk_a_token_and_one_to_end(engine: Engine) -> None:
    made = chunks(engine, PROMPT, GREEDY, max_tokens=9)
    assert [c.n_generated for c in made] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 9]
    assert [c.finish_reason for c in made] == [None] * 9 + ["length"]
    assert made[-1].token is None
    assert all(c.n_prompt == 4 for c in made)
    assert made[0].prefill_s > 0
    assert made[0].decode_s == 0
    assert made[-1].decode_s > 0
    assert made[0].decode_tokens_per_s is None
    assert made[-1].decode_tokens_per_s == pytest.approx(8 / made[-1].decode_s)
    assert made[-1].prefill_tokens_per_s == pytest.approx(4 / made[-1].prefill_s)


def test_bursts_and_steps_give_the_same(engine: Engine) -> None:
    bursts = chunks(engine, PROMPT, GREEDY, max_tokens=40)
    state = engine.n_past
    steps = chunks(engine, PROMPT, STEPS, max_tokens=40)
    assert tokens_of(bursts) == tokens_of(steps)
    assert len(tokens_of(bursts)) == 40
    assert engine.n_past == state == 4 + 39  # the last token was not fed


def test_tokens_are_the_engines_own_argmax(engine: Engine) -> None:
    want: list[int] = []
    step = list(PROMPT)
    for _ in range(12):
        step = [int(engine.forward(step).argmax())]
        want += step
    assert tokens_of(chunks(engine, PROMPT, GREEDY, max_tokens=12)) == want


def test_seeded_sampling_repeats(engine: Engine) -> None:
    def run(seed: int) -> list[int]:
        params = SamplingParams(seed=seed, temperature=1.5)
        return tokens_of(chunks(engine, PROMPT, params, max_tokens=20))

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_repetition_penalty_counts_the_prompt(engine: Engine) -> None:
    first = tokens_of(chunks(engine, PROMPT, GREEDY, max_tokens=1))[0]
    engine.reset()
    after = int(engine.forward([*PROMPT, first]).argmax())
    params = SamplingParams(temperature=0.0, repetition_penalty=1e6)
    punished = tokens_of(chunks(engine, [*PROMPT, first, after], params, max_tokens=20))
    assert not set(punished) & {*PROMPT, first, after}
    assert len(set(punished)) == 20


def test_end_token_stops_and_is_not_shown(engine: Engine) -> None:
    free = tokens_of(chunks(engine, PROMPT, GREEDY, max_tokens=30))
    place = next(i for i in range(5, 30) if free[i] not in free[:i])
    tokenizer = Letters()
    tokenizer.eos_ids = (free[place],)
    for params in (GREEDY, STEPS):
        engine.reset()
        made = list(generate(engine, tokenizer, PROMPT, params, max_tokens=30))
        assert tokens_of(made) == free[:place]
        assert made[-1].finish_reason == "stop"
        assert made[-1].n_generated == place
        assert engine.n_past == 4 + place  # what a burst computed beyond is gone


def test_the_configs_end_tokens_count_too(engine: Engine) -> None:
    first = tokens_of(chunks(engine, PROMPT, GREEDY, max_tokens=1))[0]
    model = quantized(
        random_model(tiny_config("llama", tied=False, eos=(first,)), seed=1), "w8-g32"
    )
    made = chunks(Engine(model, backend="numpy"), PROMPT, GREEDY, max_tokens=5)
    assert [(c.text, c.token, c.finish_reason) for c in made] == [("", None, "stop")]


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("params", [GREEDY, STEPS], ids=["bursts", "steps"])
def test_stop_string_spans_tokens_and_is_never_shown(
    engine: Engine, length: int, params: SamplingParams
) -> None:
    whole = text_of(chunks(engine, PROMPT, GREEDY, max_tokens=30))
    stop = whole[7 : 7 + length]
    place = whole.index(stop)
    made = chunks(engine, PROMPT, params, max_tokens=30, stop=["never", stop])
    assert text_of(made) == whole[:place]
    assert made[-1].finish_reason == "stop"
    assert tokens_of(made) == [ord(c) - ord("0") for c in whole[: place + length]]
    assert engine.n_past == 4 + len(tokens_of(made)) - 1


def test_text_that_was_no_stop_string_after_all_is_shown(engine: Engine) -> None:
    whole = text_of(chunks(engine, PROMPT, GREEDY, max_tokens=12))
    made = chunks(
        engine, PROMPT, GREEDY, max_tokens=12, stop=[whole[3:6] + "\0", whole[-2:] + "\0"]
    )
    assert text_of(made) == whole
    assert made[3].text == ""  # held back
    assert made[-1].text.endswith(whole[-1])  # given when nothing more can come
    assert made[-1].finish_reason == "length"


class HalfStream(LetterStream):
    def push(self, token: int) -> str:
        return super().push(100)


class Halves(Letters):
    """Every token is half an "é"."""

    def stream(self, prompt: Any = ()) -> LetterStream:
        return HalfStream()


def test_half_a_character_is_never_shown(engine: Engine) -> None:
    made = list(generate(engine, Halves(), PROMPT, GREEDY, max_tokens=5))
    assert [c.text for c in made] == ["", "é", "", "é", "", ""]


def test_context_fills_and_ends_by_length(engine: Engine) -> None:
    for params in (GREEDY, STEPS):
        made = chunks(engine, PROMPT, params)
        assert made[-1].finish_reason == "length"
        assert made[-1].n_generated == engine.context - 4 + 1  # the last is shown, not fed
        assert engine.n_past == engine.context


def test_a_prompt_that_fills_the_context_gives_one_token(engine: Engine) -> None:
    made = chunks(engine, [3] * 64, GREEDY, max_tokens=10)
    assert [c.finish_reason for c in made] == [None, "length"]


def test_a_longer_prompt_is_refused_before_anything_runs(engine: Engine) -> None:
    with pytest.raises(UsageError, match=r"65 tokens and the context holds 64; shorten .* 64\)"):
        generate(engine, Letters(), [3] * 65, GREEDY, max_tokens=1)
    assert engine.n_past == 0
    engine.forward([3] * 60)
    with pytest.raises(UsageError, match="5 tokens after 60 in the cache"):
        generate(engine, Letters(), [3] * 5, GREEDY, max_tokens=1)


def test_generation_continues_what_the_cache_holds(engine: Engine) -> None:
    whole = tokens_of(chunks(engine, [*PROMPT, 7, 8], GREEDY, max_tokens=6))
    engine.reset()
    engine.forward(PROMPT)
    made = list(generate(engine, Letters(), [7, 8], GREEDY, max_tokens=6))
    assert tokens_of(made) == whole
    assert made[0].n_prompt == 2


@pytest.mark.parametrize("params", [GREEDY, STEPS], ids=["bursts", "steps"])
@pytest.mark.parametrize("taken", [1, 2, 3, 9])
def test_closing_early_leaves_what_was_seen(
    engine: Engine, params: SamplingParams, taken: int
) -> None:
    stream = generate(engine, Letters(), PROMPT, params, max_tokens=40)
    for _ in range(taken):
        next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert engine.n_past == 4 + taken - 1


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt has no tokens"),
        ([3], {"max_tokens": 0}, "max_tokens is 0"),
        ([3], {"stop": "end"}, "give a list of strings"),
        ([3], {"stop": ["end", ""]}, "a stop string is empty"),
    ],
)
def test_wrong_options_are_refused(
    engine: Engine, prompt: list[int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        generate(engine, Letters(), prompt, GREEDY, **options)


def test_split_at_stop() -> None:
    assert split_at_stop("abc", []) == ("abc", "", False)
    assert split_at_stop("abc", ["cd", "xyz"]) == ("ab", "c", False)
    assert split_at_stop("abcde", ["cd"]) == ("ab", "", True)
    assert split_at_stop("aab", ["aabc", "bc"]) == ("", "aab", False)  # the longest wins
    assert split_at_stop("xaby", ["by", "ab"]) == ("x", "", True)  # the earliest wins
    assert split_at_stop("<<", ["<|end|>"]) == ("<", "<", False)


def test_bursts_adapt_to_thirty_milliseconds() -> None:
    assert next_burst(1, 0.001) == 2
    assert next_burst(16, 0.001) == 32
    assert next_burst(32, 0.064) == 15
    assert next_burst(4, 1.0) == 1
    assert next_burst(8, 0.0) == 16


def stories() -> Model:
    return importers.load(need("models/stories260K"))


@pytest.mark.parametrize("kv_bits", [8, 16])
def test_stories260k_in_int8_tells_its_golden_sentence(kv_bits: Any) -> None:
    model = quantized(stories(), "w8-g32")
    tokenizer = Tokenizer(model.files)
    prompt = tokenizer.encode("Once upon a time")
    with Engine(model, backend="numpy", kv_bits=kv_bits) as engine:
        made = list(generate(engine, tokenizer, prompt, GREEDY, max_tokens=70))
    # the published text ends here; what follows hangs on the rounding of the weights
    assert text_of(made).startswith(
        ", there was a little girl named Lily. She loved to play outside in the park. One day, "
        "she saw a big, red ball. She wanted to play with it, but it was too high."
    )
    assert made[-1].finish_reason == "length"
    assert made[-1].n_generated == 70


def test_a_trained_model_stops_at_a_string_across_tokens() -> None:
    model = importers.load(small_checkpoint())
    tokenizer = Tokenizer(model.files)
    with Engine(model, backend="numpy") as engine:
        prompt = tokenizer.encode("Once upon a time")
        whole = text_of(list(generate(engine, tokenizer, prompt, GREEDY, max_tokens=40)))
        engine.reset()
        before, named, after = whole.partition(" named ")
        stop = f"{before[-5:]}{named}{after[0]}"  # ends within a word, and spans several tokens
        assert named
        made = list(generate(engine, tokenizer, prompt, GREEDY, max_tokens=70, stop=[stop]))
    assert text_of(made) == before[:-5]
    assert np.all([c.text.isascii() for c in made])
