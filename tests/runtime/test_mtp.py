"""Multi-token-prediction heads change the speed of an answer and nothing of its tokens."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.model.memory_layout import DRAFT_CONTEXT, KEPT_STATES, draft_bytes, kv_bytes
from edgeq.model.model import Model
from edgeq.model.mtp import mtp_config, mtp_model, without_mtp
from edgeq.model.reference import Reference
from edgeq.runtime.engine import Engine
from edgeq.runtime.generate import Chunk, generate
from edgeq.runtime.mtp import MtpDraft
from edgeq.runtime.sampling import SamplingParams
from tests.mtp_models import tiny
from tests.runtime.test_draft import SAMPLED, Alternating
from tests.runtime.test_generate import Letters

GREEDY = SamplingParams(temperature=0.0)
PROMPT = np.random.default_rng(7).integers(3, 100, 90).tolist()


def made(engine: Engine, params: SamplingParams = GREEDY, **options: Any) -> list[Chunk]:
    engine.reset()
    return list(generate(engine, Letters(), PROMPT, params, **{"max_tokens": 100, **options}))


def tokens(chunks: list[Chunk]) -> list[int]:
    return [chunk.token for chunk in chunks if chunk.token is not None]


def drafting(engine: Engine, number: int | None) -> MtpDraft:
    """The engine's head, which drafts so many tokens at once."""
    assert engine.mtp is not None
    engine.mtp.tokens = number
    return engine.mtp


class WithNorm(Reference):
    """The reference, with the final norm of its last pass."""

    final_norm: NDArray[np.float32]

    def _result(self, name: str, value: NDArray[np.float32]) -> NDArray[np.float32]:
        if name == "final_norm":
            self.final_norm = value
        return value


def states_of(model: Model, text: list[int]) -> NDArray[np.float32]:
    """The final norm of every position, by the reference."""
    reference = WithNorm(without_mtp(model))
    reference.forward(text)
    return reference.final_norm


def head_logits(model: Model, text: list[int], start: int = 1) -> NDArray[np.float32]:
    """The head's guesses after each token of a text from ``start`` on, by the reference."""
    states = states_of(model, text)[start - 1 : len(text) - 1]
    return Reference(mtp_model(model)).forward(text[start:], states=states)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("family", ["qwen3_5", "qwen2"])
def test_heads_guess_what_the_reference_guesses(family: str, backend: str) -> None:
    """From the model's states, and then from the head's own."""
    model = tiny(family, None)
    with Engine(model, backend=backend, threads=2, kv_bits=16) as engine:
        head = drafting(engine, 3).engine
        engine.forward(PROMPT[:50])
        got = head.forward(PROMPT[1:51])
        want = head_logits(model, PROMPT[:51])[-1]
        assert np.abs(got - want).max() < 5e-3 * np.ptp(want)
        # and on from its own state
        reference = WithNorm(mtp_model(model))
        cache = reference.new_cache()
        reference.forward(PROMPT[1:51], cache, states=states_of(model, PROMPT[:50]))
        first = [int(got.argmax())]
        want = reference.forward(first, cache, states=reference.final_norm[-1:])[-1]
        got = head.forward(first)
        assert np.abs(got - want).max() < 5e-3 * np.ptp(want)
        assert head.tokens == PROMPT[1:51]  # but not what follows its own state


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_the_states_of_the_last_positions_are_kept(backend: str) -> None:
    """However they were run: as a prompt, one by one, greedily, or again after a cut."""
    model = tiny(scheme=None)
    with Engine(model, backend=backend, threads=2, kv_bits=16) as engine:
        run = engine._run
        engine.forward(PROMPT)
        engine.forward(PROMPT[:1])
        engine.truncate(85)
        engine.forward(PROMPT[:5], all_logits=True)
        engine.greedy(engine.tokens[-1], 12)
        assert run.states() == range(engine.n_past)
        want = states_of(model, engine.tokens)
        got = run.state_rows(0, engine.n_past)
        assert np.abs(got - want).max() < 5e-3 * np.ptp(want)
        engine.forward(np.resize(PROMPT, KEPT_STATES).tolist())
        assert run.states() == range(engine.n_past - KEPT_STATES, engine.n_past)
        want = states_of(model, engine.tokens)[-KEPT_STATES:]
        got = run.state_rows(engine.n_past - KEPT_STATES, engine.n_past)
        assert np.abs(got - want).max() < 5e-3 * np.ptp(want)
        engine.truncate(10)  # before all that are kept
        assert not run.states()
        engine.reset()
        assert run.states() == range(0)


@pytest.mark.parametrize(
    ("family", "kv_bits", "threads"), [("qwen3_5", 8, 1), ("qwen3_5", 4, 4), ("llama", 16, 3)]
)
def test_greedy_tokens_are_the_same_bit_for_bit(family: str, kv_bits: Any, threads: int) -> None:
    with Engine(tiny(family), threads=threads, kv_bits=kv_bits) as engine:
        want = made(engine, mtp=False)
        assert want[-1].n_drafted == 0
        state = engine.tokens
        for number in (1, 3, None):
            drafting(engine, number)
            got = made(engine)
            assert tokens(got) == tokens(want)
            assert engine.tokens == state
            if number:
                assert 0 < got[-1].n_accepted < got[-1].n_drafted


def test_threads_and_backends_do_not_change_the_tokens() -> None:
    model = tiny(scheme="w8-g32")
    wanted: list[list[int]] = []
    for threads in (1, 2, 3, 4):
        with Engine(model, threads=threads) as engine:
            drafting(engine, 2)
            wanted.append(tokens(made(engine, max_tokens=60)))
    assert all(one == wanted[0] for one in wanted)
    with Engine(model, backend="numpy") as engine:
        plain = tokens(made(engine, max_tokens=40, mtp=False))
        drafting(engine, 2)
        got = made(engine, max_tokens=40)
        assert tokens(got) == plain
        assert got[-1].n_accepted > 0


@pytest.mark.parametrize(
    "params",
    [
        SAMPLED,
        SamplingParams(temperature=1.5, seed=5, repetition_penalty=1.3, repeat_last_n=-1),
        SamplingParams(temperature=0.0, repetition_penalty=1.2),
    ],
)
def test_a_seed_gives_the_same_answer(params: SamplingParams) -> None:
    with Engine(tiny(), threads=2) as engine:
        want = made(engine, params, logprobs=2, mtp=False)
        for number in (1, 4, None):
            drafting(engine, number)
            got = made(engine, params, logprobs=2)
            assert tokens(got) == tokens(want)
            assert [one.logprobs for one in got] == [one.logprobs for one in want]
            if number:
                assert got[-1].n_accepted > 0
        vocab = engine.config.vocab
        want = made(engine, params, constraint=Alternating(vocab), mtp=False)
        drafting(engine, 3)
        assert tokens(made(engine, params, constraint=Alternating(vocab))) == tokens(want)


def test_states_of_the_head_that_were_guessed_are_made_again() -> None:
    """After a draft, the head's cache is what it would be without one."""
    model = tiny(scheme=None)
    with Engine(model, threads=2, kv_bits=16) as engine:
        draft = drafting(engine, 4)
        made(engine, max_tokens=30)
        text = [*engine.tokens, 5]
        engine.reset()
        engine.forward(text[:-1])
        missing = draft.missing(text)
        got = draft.engine.forward(missing)
        head = draft.engine
        want = head_logits(model, text, head.start)[-1]
        assert np.abs(got - want).max() < 5e-3 * np.ptp(want)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_a_loaded_state_goes_on_with_drafts(backend: str, tmp_path: Path) -> None:
    """The states of its positions are gone; drafts begin with those of the tokens after."""
    model = tiny()
    with Engine(model, backend=backend, threads=2) as engine:
        engine.forward(PROMPT[:-10])
        engine.save_state(tmp_path / "state")
        kept = engine.snapshot()
        engine.reset()
        options: dict[str, Any] = {"max_tokens": 40}
        want = tokens(made(engine, mtp=False, **options))
        drafting(engine, 2)
        for restore in (
            lambda: engine.load_state(tmp_path / "state"),
            lambda: engine.restore(kept),
        ):
            restore()
            got = list(generate(engine, Letters(), engine.reuse(PROMPT), GREEDY, **options))
            assert tokens(got) == want
            assert got[-1].n_accepted > 0


def test_long_answers_start_the_heads_cache_again() -> None:
    """It has room for fewer tokens than the model's."""
    with Engine(tiny(context=1500), threads=2, context=1500) as engine:
        want = made(engine, mtp=False, max_tokens=1300)
        drafting(engine, 2)
        got = made(engine, max_tokens=1300)
        assert tokens(got) == tokens(want)
        assert got[-1].n_accepted > 100
        head = engine.mtp.engine
        assert head.start > 1
        assert head.context == DRAFT_CONTEXT


def test_another_text_does_not_use_the_cache_of_the_last() -> None:
    with Engine(tiny(), threads=2) as engine:
        drafting(engine, 2)
        made(engine)
        other = [int(token) for token in np.random.default_rng(3).integers(3, 100, 50)]
        engine.reset()
        want = list(generate(engine, Letters(), other, GREEDY, max_tokens=40, mtp=False))
        engine.reset()
        got = list(generate(engine, Letters(), other, GREEDY, max_tokens=40))
        assert tokens(got) == tokens(want)
        assert got[-1].n_accepted > 0


def test_engines_of_a_batch_share_a_head() -> None:
    model = tiny()
    with Engine(model, threads=1) as alone:
        want = tokens(made(alone, mtp=False, max_tokens=60))
    engines = Engine.batch(model, 2, threads=2)
    found: dict[int, list[int]] = {}

    def work(number: int) -> None:
        found[number] = tokens(made(engines[number], max_tokens=60))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: want, 1: want}
    drafting(engines[1], 2)
    got = made(engines[1], max_tokens=60)
    assert tokens(got) == want
    assert got[-1].n_accepted > 0
    for engine in engines:
        engine.close()


def test_memory_is_what_plans_count() -> None:
    model = tiny(context=256)
    with Engine(model, threads=2, context=200) as engine:
        assert engine.kv_bytes == kv_bytes(model.config, 200)
        bare = replace(model.config, mtp=None)
        assert engine.kv_bytes - kv_bytes(bare, 200) == KEPT_STATES * model.config.hidden * 4
        assert engine.mtp is not None
        run = engine.mtp.engine._run
        assert run.kv_bytes + run.scratch_bytes == draft_bytes(mtp_config(model.config), 2)


def test_models_without_a_head_draft_nothing() -> None:
    model = without_mtp(tiny())
    with Engine(model, threads=1) as engine:
        assert engine.mtp is None
        assert made(engine, max_tokens=5)[-1].n_drafted == 0
    with Engine(tiny(context=40), threads=1) as engine:  # too short to draft in
        assert engine.mtp is None
    with Engine(tiny(), threads=1) as engine:
        engine.close()
        assert engine.mtp is None
