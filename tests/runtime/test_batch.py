"""Engines whose tokens are decoded together give what each gives alone, bit for bit."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.core.errors import UsageError
from edgeq.importers import load
from edgeq.model.model import Model
from edgeq.runtime.engine import Engine
from edgeq.runtime.generate import generate
from edgeq.runtime.sampling import SamplingParams
from edgeq.runtime.shared_decoder import SharedDecoder, TokenRequest
from edgeq.runtime.tokenizer import Tokenizer
from edgeq.runtime.weights import WeightArena
from tests.conftest import small_checkpoint
from tests.families import quantized, random_model, tiny_config

PROMPTS = [[1, 5, 9], [7], list(range(2, 40)), [3, 3, 3, 3], [11, 12]]


def tiny(family: str) -> Model:
    return quantized(random_model(tiny_config(family, context=1024, eos=()), 1), "w4-g32")


def close(engines: list[Engine]) -> None:
    for engine in engines:
        engine.close()


def alone(model: Any, prompt: list[int], steps: int, **settings: Any) -> list[np.ndarray]:
    """Logits after the prompt and after each greedy token, of an engine of its own."""
    with Engine(model, **settings) as engine:
        rows = [engine.forward(prompt)]
        for _ in range(steps):
            rows.append(engine.forward([int(rows[-1].argmax())]))
    return rows


@pytest.mark.parametrize("kv_bits", [4, 8, 16])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "lfm2", "qwen3_5"])
def test_one_pass_gives_each_row_its_own_result(family: str, threads: int, kv_bits: int) -> None:
    """Passes of the kernel itself: prompts of different lengths, every sequence in each pass."""
    model = tiny(family)
    settings: Any = {"threads": threads, "kv_bits": kv_bits, "context": 400}
    steps = 12
    expected = [alone(model, prompt, steps, **settings) for prompt in PROMPTS]
    shared = SharedDecoder(model, sequences=len(PROMPTS), **settings)
    last = [
        shared.forward(number, np.array(prompt), 0, 1)[0] for number, prompt in enumerate(PROMPTS)
    ]
    for row, rows in zip(last, expected, strict=True):
        assert (row == rows[0]).all()
    for step in range(1, steps + 1):
        requests = [
            TokenRequest(number, int(row.argmax()), len(prompt) + step - 1)
            for number, (row, prompt) in enumerate(zip(last, PROMPTS, strict=True))
        ]
        shared.run_pass(requests)
        last = [request.logits[0] for request in requests if request.logits is not None]
        for row, rows in zip(last, expected, strict=True):
            assert (row == rows[step]).all()
    for number in range(len(PROMPTS)):
        shared.close(number)


def test_chunks_of_long_sequences_are_merged_by_sequence() -> None:
    """Sequences on both sides of the 256 positions of a chunk."""
    model = tiny("llama")
    chance = np.random.default_rng(0)
    prompts = [chance.integers(0, 30, n).tolist() for n in (250, 3, 600, 255, 511)]
    expected = [alone(model, prompt, 8, threads=1, context=700) for prompt in prompts]
    engines = Engine.batch(model, len(prompts), threads=2, context=700)

    def run(number: int) -> bool:
        rows = [engines[number].forward(prompts[number])]
        for _ in range(8):
            rows.append(engines[number].forward([int(rows[-1].argmax())]))
        return all((a == b).all() for a, b in zip(rows, expected[number], strict=True))

    with ThreadPoolExecutor(len(prompts)) as pool:
        assert all(pool.map(run, range(len(prompts))))
    close(engines)


@pytest.mark.parametrize("greedy", [True, False])
def test_threads_that_come_and_go(greedy: bool) -> None:
    """Sequences join and leave between passes; some sample, some are greedy; none waits forever."""
    model = load(small_checkpoint())
    tokenizer = Tokenizer(model)
    texts = ["Once upon a time", "The little fox", "Tom", "Lily had a", "A big tree", "One day"]
    params = [
        SamplingParams(temperature=0) if greedy or n % 2 else SamplingParams(seed=n)
        for n in range(len(texts))
    ]

    def said(engine: Engine, number: int) -> list[int | None]:
        engine.reset()
        chunks = generate(engine, tokenizer, texts[number], params[number],
                          max_tokens=10 + 13 * number)  # fmt: skip
        return [chunk.token for chunk in chunks]

    with Engine(model, threads=1, context=200) as single:
        expected = [said(single, number) for number in range(len(texts))]
    engines = Engine.batch(model, 3, threads=1, context=200)
    free = list(engines)
    lock = threading.Lock()

    def one(number: int) -> bool:
        time.sleep(number % 5 / 200)
        with lock:
            engine = free.pop()
        try:
            return said(engine, number % len(texts)) == expected[number % len(texts)]
        finally:
            with lock:
                free.append(engine)

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(one, range(24)))
    close(engines)


def test_snapshots_go_from_one_to_another(tmp_path: Path) -> None:
    model = tiny("llama")
    first, second = Engine.batch(model, 2, threads=1, context=64)
    first.forward(PROMPTS[2])
    second.restore(first.snapshot())
    assert second.tokens == first.tokens
    assert (first.forward([4]) == second.forward([4])).all()
    with Engine(model, threads=1, context=64) as other:
        other.restore(first.snapshot())
        assert (other.forward([5]) == first.forward([5])).all()
    with Engine(tiny("qwen3"), threads=1) as stranger, pytest.raises(UsageError, match="another"):
        stranger.restore(first.snapshot())
    close([first, second])


def test_weights_are_shared() -> None:
    model = load(small_checkpoint())
    decoders = [SharedDecoder(model, 64, 1, 8, mmap=False) for _ in range(2)]
    assert decoders[0].arena is decoders[1].arena is WeightArena.of(model)
    for decoder in decoders:
        decoder.close(0)


def test_numbers_of_engines() -> None:
    with pytest.raises(UsageError, match="use 1 to 64"):
        Engine.batch(tiny("llama"), 0)
    engines = Engine.batch(tiny("llama"), 2, backend="numpy")
    assert (engines[0].forward([1]) == engines[1].forward([1])).all()
    close(engines)


def test_greedy_sequences_share_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that only ask for many greedy tokens, as answers at temperature 0 do."""
    model, steps = tiny("llama"), 48
    with Engine(model, context=64, threads=1) as engine:
        token = int(engine.forward(PROMPTS[0]).argmax())
        expected = engine.greedy(token, steps)
    sizes: list[int] = []
    passed = SharedDecoder.run_pass

    def counted(self: SharedDecoder, requests: list[TokenRequest]) -> None:
        sizes.append(len(requests))
        passed(self, requests)

    monkeypatch.setattr(SharedDecoder, "run_pass", counted)
    engines = Engine.batch(model, 2, context=64, threads=1)
    both = threading.Barrier(2)

    def answer(engine: Engine) -> list[int]:
        engine.reset()
        engine.forward(PROMPTS[0])
        both.wait()
        return engine.greedy(token, steps)

    try:
        with ThreadPoolExecutor(2) as pool:
            for _ in range(200):  # one thread may be done before the other begins
                assert list(pool.map(answer, engines)) == [expected, expected]
                if 2 in sizes:
                    break
    finally:
        close(engines)
    assert 2 in sizes
