"""Draft models change the speed of an answer and nothing of its tokens; they rest if too slow."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.core.errors import FormatError, UsageError
from edgeq.formats.tensor import FloatTensor
from edgeq.importers import load
from edgeq.model.memory_layout import draft_bytes
from edgeq.model.model import Model
from edgeq.runtime.draft import Draft, check_same_tokens, open_drafts
from edgeq.runtime.engine import Engine
from edgeq.runtime.generate import Chunk, generate
from edgeq.runtime.payoff import FIRST, LONGEST_PAUSE, MOST, PAUSE, REFRESH, Payoff
from edgeq.runtime.sampling import Sampler, SamplingParams
from tests.families import quantized, random_model, tiny_config
from tests.paths import DEMO
from tests.runtime.test_generate import Letters

GREEDY = SamplingParams(temperature=0.0)
PROMPT = np.random.default_rng(7).integers(3, 100, 90).tolist()
SAMPLED = SamplingParams(temperature=0.9, top_k=0, top_p=1, min_p=0, seed=3)


def tiny(family: str = "llama", bits: int = 4, **over: Any) -> Model:
    config = tiny_config(family, **{"context": 1024, "eos": (), **over})
    return quantized(random_model(config, 1), f"w{bits}-g32")


def made(engine: Engine, params: SamplingParams = GREEDY, **options: Any) -> list[Chunk]:
    engine.reset()
    return list(generate(engine, Letters(), PROMPT, params, **{"max_tokens": 300, **options}))


def tokens(chunks: list[Chunk]) -> list[int]:
    return [chunk.token for chunk in chunks if chunk.token is not None]


@pytest.fixture
def pair() -> Iterator[tuple[Engine, Engine]]:
    """A large model and a small one, which is the same model with coarser weights."""
    large = Engine(tiny(bits=8), threads=1)
    small = Engine(tiny(bits=3), threads=1, context=512)
    with large, small:
        yield large, small


@pytest.mark.parametrize(
    ("family", "kv_bits"), [("llama", 8), ("gemma3", 16), ("qwen3", 4), ("lfm2", 8), ("qwen3_5", 8)]
)
def test_greedy_tokens_are_the_same_bit_for_bit(family: str, kv_bits: Any) -> None:
    model, rough = tiny(family, 8), tiny(family, 3)
    with Engine(model, threads=2, kv_bits=kv_bits) as engine, Engine(rough, threads=1) as small:
        want = made(engine)
        state = engine.tokens
        for number in (1, 3, MOST, None):
            got = made(engine, draft=Draft(small, model, number))
            assert tokens(got) == tokens(want)
            assert engine.tokens == state
            if number:
                assert 0 < got[-1].n_accepted < got[-1].n_drafted


@pytest.mark.parametrize(
    "params",
    [
        SAMPLED,
        SamplingParams(temperature=0.7, seed=4),
        SamplingParams(temperature=1.5, seed=5, repetition_penalty=1.3, repeat_last_n=-1),
        SamplingParams(temperature=0.8, seed=6, presence_penalty=0.5, frequency_penalty=0.2,
                       logit_bias={7: 2.0, 9: -100}),
        SamplingParams(temperature=0.0, repetition_penalty=1.2),
    ],
)  # fmt: skip
def test_a_seed_gives_the_same_answer_however_many_tokens_are_drafted(
    pair: tuple[Engine, Engine], params: SamplingParams
) -> None:
    engine, small = pair
    want = made(engine, params, logprobs=2)
    for number in (1, 4, None):
        got = made(engine, params, logprobs=2, draft=Draft(small, engine.model, number))
        assert tokens(got) == tokens(want)
        assert [one.logprobs for one in got] == [one.logprobs for one in want]
        if number:
            assert got[-1].n_accepted > 0


class Alternating:
    """Even tokens and odd ones in turn."""

    def __init__(self, vocab: int) -> None:
        self._even, self._turn = np.arange(vocab) % 2 == 0, True

    def allowed(self) -> Any:
        return self._even if self._turn else ~self._even

    def accept(self, token: int) -> None:
        assert self.allowed()[token]
        self._turn = not self._turn


def test_a_constraint_is_kept_to(pair: tuple[Engine, Engine]) -> None:
    engine, small = pair
    vocab = engine.config.vocab
    for params in (GREEDY, SAMPLED):
        want = tokens(made(engine, params, constraint=Alternating(vocab)))
        assert [token % 2 for token in want[:4]] == [0, 1, 0, 1]
        draft = Draft(small, engine.model, 3)
        assert tokens(made(engine, params, constraint=Alternating(vocab), draft=draft)) == want


def test_a_draft_keeps_to_the_constraint_too(pair: tuple[Engine, Engine]) -> None:
    """The same model drafts for itself: with the constraint all of its tokens are right."""
    engine, _ = pair
    with Engine(engine.model, threads=1) as same:
        for params in (GREEDY, SAMPLED):
            draft = Draft(same, engine.model, 4)
            draft.payoff.pays = True
            limits = Alternating(engine.config.vocab)
            last = made(engine, params, draft=draft, constraint=limits)[-1]
            assert last.n_accepted == last.n_drafted > 200


def test_a_grammar_ends_with_and_without_a_draft() -> None:
    pytest.importorskip("llguidance")
    from edgeq.runtime.constraint import GrammarVocabulary
    from edgeq.runtime.tokenizer import Tokenizer

    model = load(DEMO)
    tokenizer = Tokenizer(model)
    grammar = GrammarVocabulary.of(model, tokenizer).json_schema(
        {"type": "array", "items": {"enum": ["lamp", "tree"]}, "minItems": 3, "maxItems": 9}
    )
    with Engine(model, threads=1) as engine, Engine(model, threads=1) as small:
        for seed in range(5):
            params = SamplingParams(temperature=1.5, seed=seed)
            found = []
            for draft in (None, Draft(small, model, 5)):
                engine.reset()
                chunks = list(generate(engine, tokenizer, "Once", params, draft=draft,
                                       constraint=grammar.start()))  # fmt: skip
                found.append(tokens(chunks))
                assert chunks[-1].finish_reason == "stop"
            assert found[0] == found[1]
            # the end token is drafted too, and counts as the one token more of its pass
            assert chunks[-1].n_drafted - 1 <= chunks[-1].n_accepted > 5


def test_the_distribution_is_the_large_model_s(pair: tuple[Engine, Engine]) -> None:
    """Two drafted tokens of many seeds, by a chi-square test, against exact probabilities."""
    model, rough = (tiny(bits=bits, vocab=16) for bits in (8, 3))
    prompt = [3, 7, 5]
    with Engine(model, threads=1) as engine, Engine(rough, threads=1) as small:

        def probabilities(text: list[int]) -> Any:
            engine.reset()
            logits = engine.forward(text).astype(np.float64) / 0.9
            weights = np.exp(logits - logits.max())
            return weights / weights.sum()

        first = probabilities(prompt)
        given = int(first.argmax())  # the token before the drafted ones, as a constraint below
        second = probabilities([*prompt, given])
        third = {token: probabilities([*prompt, given, token]) for token in range(16)}

        class Begins:
            """The first token is given; the others are free."""

            def __init__(self) -> None:
                self.n = 0

            def allowed(self) -> Any:
                return np.arange(16) == given if not self.n else np.ones(16, bool)

            def accept(self, token: int) -> None:
                self.n += 1

        draft, counts, n = Draft(small, model, 2), Counter[tuple[int, ...]](), 3000
        drafted = accepted = 0
        for seed in range(n):
            params = SamplingParams(temperature=0.9, top_k=0, top_p=1, min_p=0, seed=seed)
            engine.reset()
            chunks = list(generate(engine, Letters(), prompt, params, max_tokens=4,
                                   draft=draft, constraint=Begins()))  # fmt: skip
            counts[tuple(tokens(chunks)[1:3])] += 1
            drafted += chunks[-1].n_drafted
            accepted += chunks[-1].n_accepted
    assert 0.2 < accepted / drafted < 1
    expected = {(a, b): n * second[a] * third[a][b] for a in range(16) for b in range(16)}
    large = {pair_: e for pair_, e in expected.items() if e >= 5}
    rest = n - sum(large.values())
    seen = n - sum(counts[pair_] for pair_ in large)
    square = sum((counts[pair_] - e) ** 2 / e for pair_, e in large.items())
    square += (seen - rest) ** 2 / max(rest, 1e-9)
    degrees = len(large)
    assert degrees >= 20
    assert square < degrees + 5 * np.sqrt(2 * degrees), (square, degrees)  # seeds are fixed


def test_the_acceptance_is_what_the_models_say(pair: tuple[Engine, Engine]) -> None:
    """Counted anew from the two models' own greedy tokens."""
    engine, small = pair
    n, number = 120, 3
    text = [*PROMPT, *tokens(made(engine, max_tokens=n))]
    drafted = accepted = 0
    at = len(PROMPT) + 1  # the first token comes without a draft
    with Engine(small.model, threads=1) as other:
        while at < len(text):
            wanted = min(number, len(text) - at - 1)
            right = 0
            if wanted:
                other.reset()
                guess = int(other.forward(text[:at]).argmax())
                guesses = [guess, *other.greedy(guess, wanted - 1)]
                while right < wanted and guesses[right] == text[at + right]:
                    right += 1
            drafted, accepted, at = drafted + wanted, accepted + right, at + right + 1
    whole = Draft(Engine(small.model, threads=1), engine.model, number)
    with whole.engine:
        list(whole.engine.greedy(1, 1))  # something else was there before
        whole.payoff.pays = True  # so that it reads all of this text
        last = made(engine, max_tokens=n, draft=whole)[-1]
    assert (last.n_drafted, last.n_accepted) == (drafted, accepted)
    assert 0 < accepted < drafted


def test_a_model_that_drafts_for_itself_is_always_right(pair: tuple[Engine, Engine]) -> None:
    engine, _ = pair
    with Engine(engine.model, threads=1) as same:
        for params in (GREEDY, SAMPLED):
            draft = Draft(same, engine.model, 4)
            draft.payoff.pays = True
            last = made(engine, params, draft=draft)[-1]
            assert last.n_accepted == last.n_drafted > 200


def test_it_ends_where_it_would_without() -> None:
    model, rough = tiny(bits=8, context=300), tiny(bits=3, context=300)
    with Engine(model, threads=1) as engine, Engine(rough, threads=1) as small:
        everything = made(engine, max_tokens=None)
        assert everything[-1].finish_reason == "length"
        text = "".join(chunk.text for chunk in everything)
        stops: list[dict[str, Any]] = [{}, {"stop": [text[70:73]]}]
        stops += [{"max_tokens": n} for n in (1, 2, 3, 50)]
        end = max(set(tokens(everything)), key=tokens(everything).index)
        stops.append({"end_ids": [end]})
        for options in stops:
            want = made(engine, **{"max_tokens": None, **options})
            state = engine.tokens
            for number in (1, 5):
                draft = Draft(small, model, number)
                got = made(engine, draft=draft, **{"max_tokens": None, **options})
                assert [c.token for c in got] == [c.token for c in want]
                assert "".join(c.text for c in got) == "".join(c.text for c in want)
                assert got[-1].finish_reason == want[-1].finish_reason
                assert engine.tokens == state


@pytest.mark.parametrize("taken", [1, 2, 40, 101])
def test_closed_early_the_cache_holds_what_was_seen(
    pair: tuple[Engine, Engine], taken: int
) -> None:
    engine, small = pair
    stream = generate(engine, Letters(), PROMPT, GREEDY, draft=Draft(small, engine.model, 5))
    seen = [next(stream).token for _ in range(taken)]
    stream.close()
    assert engine.tokens == [*PROMPT, *seen[:-1]]


def test_texts_longer_than_the_draft_s_context() -> None:
    """It begins anew with the last tokens; the answer is the same."""
    model, rough = tiny(bits=8), tiny(bits=3)
    with Engine(model, threads=1) as engine, Engine(rough, threads=1, context=64) as small:
        want = made(engine, max_tokens=500)
        got = made(engine, max_tokens=500, draft=Draft(small, model, 4))
        assert tokens(got) == tokens(want)
        assert got[-1].n_accepted > 0


def test_conversations_read_only_what_is_new(pair: tuple[Engine, Engine]) -> None:
    engine, small = pair
    draft = Draft(small, engine.model, 4)
    chunks = made(engine, draft=draft, max_tokens=20)
    text = [*PROMPT, *tokens(chunks)]
    assert len(draft.missing([*text, 5, 6])) < 20
    assert len(draft.missing([9] * 40)) == 40  # another text
    assert len(draft.missing([9] * 400)) == 64  # of which little is tried first
    draft.payoff.pays = True
    assert len(draft.missing([8] * 400)) == 256


def test_what_is_refused(pair: tuple[Engine, Engine], tmp_path: Path) -> None:
    engine, small = pair
    for wrong in (0, MOST + 1, 1.5, True):
        with pytest.raises(UsageError, match=r"tokens is .*; give an integer from 1 to 16"):
            Draft(small, engine.model, wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="vocabulary of 50 tokens and the model one of 103"):
        check_same_tokens(tiny(vocab=50), tiny(vocab=103))
    with (
        Engine(tiny(), threads=1, context=20) as short,
        pytest.raises(UsageError, match="64 or mo"),
    ):
        Draft(short, engine.model)
    draft = Draft(small, engine.model)
    with pytest.raises(UsageError, match="do not work together"):
        made(engine, draft=draft, lookup=3)
    folder = tmp_path / "other"
    shutil.copytree(DEMO, folder)
    document = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    vocab = document["model"]["vocab"]
    vocab["Ġlittle"], vocab["Ġgirl"] = vocab["Ġgirl"], vocab["Ġlittle"]
    (folder / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    check_same_tokens(load(DEMO), load(DEMO))
    with pytest.raises(UsageError, match=r"token \d+ is 'Ġ\w+' in the draft model and 'Ġ\w+' in"):
        check_same_tokens(load(folder), load(DEMO))


def test_a_broken_draft_model_is_named(pair: tuple[Engine, Engine]) -> None:
    engine, _ = pair
    broken = random_model(tiny_config("llama", context=1024, eos=()), 1)
    norm = FloatTensor("float32", np.full(broken.config.hidden, np.nan, np.float32))
    broken = replace(broken, tensors={**broken.tensors, "model.norm.weight": norm})
    with (
        Engine(broken, threads=1) as small,
        pytest.raises(FormatError, match=r"^the draft model: "),
    ):
        made(engine, SAMPLED, draft=Draft(small, engine.model, 2))


def test_a_draft_rests_where_the_small_model_lacks_a_token(pair: tuple[Engine, Engine]) -> None:
    engine, small = pair
    vocab = engine.config.vocab  # of the small model; the large one is padded to more
    text = Draft(small, engine.model, 3).begin([*PROMPT, vocab], Sampler(GREEDY, vocab + 9))
    assert text.propose(3) == []
    text.extend([5])
    assert text.propose(3) == []  # it is among the tokens to be read
    text.extend([7] * 80)
    assert len(text.propose(3)) == 3


def test_one_engine_cannot_do_both(pair: tuple[Engine, Engine]) -> None:
    engine, _ = pair
    with pytest.raises(UsageError, match="needs an engine of its own"):
        made(engine, draft=Draft(engine, engine.model))


@pytest.mark.parametrize("large", [False, True])
def test_engines_closed_while_drafting(large: bool) -> None:
    engine, small = Engine(tiny(bits=8), threads=2), Engine(tiny(bits=3), threads=2)
    chunks = generate(engine, Letters(), PROMPT, GREEDY, draft=Draft(small, engine.model, 3))
    for _ in range(9):
        next(chunks)
    (engine if large else small).close()
    with pytest.raises(UsageError, match="the engine is closed"):
        list(chunks)
    engine.close()
    small.close()
    for call in (lambda: engine.forward(PROMPT), lambda: engine.greedy(5, 3), engine.snapshot):
        with pytest.raises(UsageError, match="the engine is closed"):
            call()


@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_beside_other_answers_nothing_is_drafted(backend: str) -> None:
    """One pass for several answers needs the arithmetic that verifying drafts would take."""
    model, rough = tiny(bits=8, layers=1), tiny(bits=3, layers=1)
    first, other = Engine.batch(model, 2, threads=1, context=256, backend=backend)
    with first, other, Engine(rough, threads=1, backend=backend) as small:
        repeating = np.tile(PROMPT[:5], 6).tolist()

        def answer(lookup: int) -> list[Chunk]:
            # a new draft tries, whatever the times of earlier ones were
            how: dict[str, Any] = {"lookup": 4} if lookup else {"draft": Draft(small, model)}
            first.reset()
            return list(generate(first, Letters(), repeating, GREEDY, max_tokens=40, **how))

        for lookup in (0, 4):
            alone = answer(lookup)
            assert alone[-1].n_drafted > 0
            other.reset()
            running = generate(other, Letters(), PROMPT, GREEDY, max_tokens=20)
            next(running), next(running)
            beside = answer(lookup)
            assert tokens(beside) == tokens(alone)
            # engines of NumPy share no passes
            assert (beside[-1].n_drafted > 0) == (backend == "numpy")
            running.close()
            assert answer(lookup)[-1].n_drafted > 0
        first.reset()
        other.reset()
        # who asks for a number of tokens gets it
        running = generate(other, Letters(), PROMPT, GREEDY, max_tokens=20)
        next(running), next(running)
        fixed = Draft(small, model, 2)
        last = list(generate(first, Letters(), repeating, GREEDY, max_tokens=20, draft=fixed))[-1]
        assert last.n_drafted > 0
        running.close()


def test_the_sampler_looks_ahead_without_moving() -> None:
    params = SamplingParams(temperature=1.0, seed=1, presence_penalty=0.4, repetition_penalty=1.2)
    logits = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32)
    sampler = Sampler(params, 40)
    sampler.sample(logits[0])
    ahead = sampler.ahead()
    seen = [ahead.sample(row) for row in logits[1:]]
    assert [sampler.sample(row) for row in logits[1:]] == seen


# When drafting pays, with times that are made up


def play(
    draft_s: float, right: float, row_s: float, tokens: int, payoff: Payoff | None = None
) -> tuple[float, int]:
    """Seconds for some tokens (each takes 1 s without a draft), and how many were drafted."""
    payoff = payoff or Payoff()
    rng = np.random.default_rng(0)
    seconds, done, drafted = 0.0, 0, 0
    while done < tokens:
        wanted, plain = payoff.next()
        if not wanted:
            n = min(plain, 4)
            payoff.plain(n, 1.0 * n)
            seconds, done = seconds + n, done + n
            continue
        hits = int(np.argmin(np.append(rng.random(wanted) < right, False)))
        drafting, checking = draft_s * wanted, 1 + row_s * wanted
        payoff.drafted(wanted, hits, drafting, checking, 0.0)
        seconds, done, drafted = seconds + drafting + checking, done + hits + 1, drafted + wanted
    return seconds, drafted


@pytest.mark.parametrize(("draft_s", "right", "row_s", "least"), [
    (0.1, 0.9, 0.2, 1.3), (0.05, 0.8, 0.1, 1.6), (0.1, 1.0, 0.1, 2.5), (0.2, 0.7, 0.05, 1.3),
])  # fmt: skip
def test_it_drafts_where_that_pays(
    draft_s: float, right: float, row_s: float, least: float
) -> None:
    seconds, drafted = play(draft_s, right, row_s, 600)
    assert drafted
    assert 600 / seconds > least


@pytest.mark.parametrize(("draft_s", "right", "row_s"), [
    (0.3, 0.0, 0.4), (0.9, 0.5, 0.3), (1.5, 1.0, 0.5), (0.2, 0.2, 0.2), (0.1, 0.9, 1.0),
])  # fmt: skip
@pytest.mark.parametrize("tokens", [256, 2000])
def test_it_rests_where_it_does_not(
    draft_s: float, right: float, row_s: float, tokens: int
) -> None:
    """Never slower by more than 3 %."""
    seconds, _ = play(draft_s, right, row_s, tokens)
    assert seconds / tokens < 1.03
    payoff = Payoff()
    play(draft_s, right, row_s, 256, payoff)
    again, _ = play(draft_s, right, row_s, 256, payoff)  # what was learned lasts
    assert again / 256 < 1.03


def test_pauses_grow_and_end() -> None:
    payoff = Payoff()
    assert payoff.next() == (0, FIRST)
    payoff.plain(FIRST, FIRST)
    seen = []
    for _ in range(6):
        while (wanted := payoff.next()[0]) and not payoff._left:
            payoff.drafted(wanted, 0, 0.1 * wanted, 1 + 0.1 * wanted, 0.0)
        seen.append(payoff.next()[1])
        payoff.plain(seen[-1], seen[-1])
    assert seen[:2] == [PAUSE, 2 * PAUSE]
    assert seen[-1] == LONGEST_PAUSE
    assert not payoff.pays
    for _ in range(40):  # now the small model is right
        wanted, plain = payoff.next()
        if wanted:
            payoff.drafted(wanted, wanted, 0.1 * wanted, 1 + 0.1 * wanted, 0.0)
        else:
            payoff.plain(plain, plain)
    assert payoff.pays
    assert REFRESH < 40


def test_the_memory_of_a_draft_is_what_is_planned() -> None:
    model = load(DEMO)
    drafts = open_drafts(DEMO, model, 2, threads=1)
    try:
        held = sum(draft.engine.kv_bytes for draft in drafts) + drafts[0].engine.scratch_bytes
    finally:
        for draft in drafts:
            draft.close()
    assert held == draft_bytes(model.config, 1, sequences=2)
