"""Perplexity, KL and agreement: against models whose answers are known, and stories260K."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgeq import importers
from edgeq.core.errors import FormatError, UsageError
from edgeq.evaluation.text import Evaluation, kl_divergence, log_softmax, perplexity, windows
from edgeq.model.reference import Reference
from edgeq.runtime.tokenizer import Tokenizer
from tests.conftest import need
from tests.families import quantized, random_model, tiny_config

V = 7
KEYS = (
    "protocol n_tokens nll_per_token ppl bits_per_byte kl_mean kl_p99 kl_max top1_agreement "
    "base_nll_per_token base_ppl flips flips_base_right flips_right"
)


def uniform(tokens: np.ndarray) -> np.ndarray:
    return np.zeros((len(tokens), V), np.float32)


def bigram(tokens: np.ndarray) -> np.ndarray:
    """Prefers the token after the last one by a factor of e**2."""
    logits = np.zeros((len(tokens), V), np.float32)
    logits[np.arange(len(tokens)), (tokens + 1) % V] = 2.0
    return logits


def recorder(calls: list[list[int]]) -> Callable[[np.ndarray], np.ndarray]:
    def logits(tokens: np.ndarray) -> np.ndarray:
        calls.append(tokens.tolist())
        return uniform(tokens)

    return logits


def test_uniform_model_has_perplexity_v() -> None:
    got = perplexity(uniform, [1, 2, 3, 4, 5], context=3, bos=0)
    assert got.n_tokens == 5
    assert got.ppl == pytest.approx(V)
    assert got.nll_per_token == pytest.approx(math.log(V))
    assert got.bits_per_byte is None
    assert got.kl_mean is None
    assert list(got.to_dict()) == KEYS.split()


def test_known_likelihood() -> None:
    """Two of four transitions are the favored one."""
    got = perplexity(bigram, [1, 2, 5, 6, 3], context=16)
    total = math.log(math.e**2 + V - 1)
    assert got.n_tokens == 4
    assert got.nll_per_token == pytest.approx(total - 2 * 2 / 4)


def test_windows_with_bos_score_every_token() -> None:
    calls: list[list[int]] = []
    got = perplexity(recorder(calls), [1, 2, 3, 4, 5], context=3, bos=0)
    assert calls == [[0, 1, 2], [0, 3, 4], [0, 5]]
    assert got.n_tokens == 5
    assert "3 tokens, each starting with BOS, every token after the first" in got.protocol


def test_windows_without_bos_score_all_but_each_first() -> None:
    calls: list[list[int]] = []
    got = perplexity(recorder(calls), [1, 2, 3, 4, 5, 6, 1], context=3)
    assert calls == [[1, 2, 3], [4, 5, 6]]  # the last window would score nothing
    assert got.n_tokens == 4
    assert "no BOS" in got.protocol


def test_half_is_llama_cpps() -> None:
    """BOS and text are cut into whole windows; n - n/2 - 1 tokens of each are scored."""
    calls: list[list[int]] = []
    text = [1, 2, 3, 4, 5, 6, 1, 2, 3, 4]
    got = perplexity(recorder(calls), text, context=4, bos=0, score="half")
    assert calls == [[0, 1, 2, 3], [0, 5, 6, 1]]
    assert got.n_tokens == 2
    assert "past the middle" in got.protocol
    assert list(windows(11, 4, True, "half")) == [
        (slice(0, 4), slice(3, 4)),
        (slice(4, 8), slice(7, 8)),
    ]
    assert [s.stop - s.start for _, s in windows(1024, 512, False, "half")] == [255, 255]


@pytest.mark.parametrize("score", ["all", "half"])
@pytest.mark.parametrize("bos", [None, 0])
def test_scored_positions_line_up(score: Any, bos: int | None) -> None:
    """A model that knows each next token of 1 2 3 .. scores nearly nothing in every protocol."""

    def sure(tokens: np.ndarray) -> np.ndarray:
        return 20 * bigram(tokens)

    text = [(i % (V - 1)) + 1 for i in range(64)]
    follows = [t for t in text if t]  # 1 .. 6, 1 .. 6

    def logits(tokens: np.ndarray) -> np.ndarray:
        out = sure(tokens)
        out[tokens == 6] = 0
        out[tokens == 6, 1] = 40
        if tokens[0] == 0:  # after BOS the next is whatever the window begins with
            out[0] = 0
            out[0, tokens[1]] = 40
        return out

    got = perplexity(logits, follows, context=10, bos=bos, score=score)
    assert got.nll_per_token < 1e-6


def test_kl_and_agreement() -> None:
    got = perplexity(uniform, [1, 2, 3, 4, 5], context=3, bos=0, base=bigram)
    p = np.full(V, 1.0)
    p[0] = math.e**2
    p /= p.sum()
    want = float((p * np.log(p * V)).sum())
    assert got.kl_mean == pytest.approx(want)
    assert got.kl_p99 == pytest.approx(want)
    assert got.kl_max == pytest.approx(want)
    assert got.top1_agreement == pytest.approx(0.0)  # uniform prefers token 0, which none follows
    same = perplexity(bigram, [1, 2, 3, 4, 5], context=3, bos=0, base=bigram)
    assert (same.kl_mean, same.kl_max, same.top1_agreement) == (0.0, 0.0, 1.0)


def test_kl_percentile_and_maximum_are_of_tokens() -> None:
    def mostly(tokens: np.ndarray) -> np.ndarray:
        out = bigram(tokens)
        out[tokens == 3] = 0
        return out

    got = perplexity(mostly, [1, 2, 3, 4, 5, 6], context=9, bos=0, base=bigram)
    assert got.top1_agreement == pytest.approx(5 / 6)
    assert got.kl_max is not None
    assert got.kl_mean == pytest.approx(got.kl_max / 6)
    assert got.kl_p99 == pytest.approx(np.percentile([0] * 5 + [got.kl_max], 99))


def test_flips_count_who_was_right() -> None:
    """The base prefers the successor; the model 6 after a 2 or 3, else the successor too."""

    def stubborn(tokens: np.ndarray) -> np.ndarray:
        out = bigram(tokens)
        changed = (tokens == 2) | (tokens == 3)
        out[changed] = 0
        out[changed, 6] = 1
        return out

    # after 2 come 3 (base right) and 6 (model right), after 3 comes 5 (neither), after 5 comes 2
    got = perplexity(stubborn, [2, 3, 5, 2, 6], context=16, base=bigram)
    assert (got.flips, got.flips_base_right, got.flips_right) == (3, 1, 1)
    assert got.top1_agreement == pytest.approx(1 / 4)
    plain = perplexity(bigram, [2, 3, 5, 2, 6], context=16)
    assert got.base_nll_per_token == pytest.approx(plain.nll_per_token)
    assert got.base_ppl == pytest.approx(plain.ppl)
    assert (plain.flips, plain.base_ppl) == (None, None)


def test_log_softmax_is_stable() -> None:
    logits = np.array([[1e4, 1e4 - 1, -1e4]], np.float32)
    got = log_softmax(logits)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got[0, :2], [-0.31326169, -1.31326169])
    assert kl_divergence(got, got).tolist() == [0.0]


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(tiny_config("llama"))
    tokens = np.random.default_rng(0).integers(3, 101, 70)
    base, other = Reference(model).forward, Reference(quantized(model, "w4-g32")).forward
    want = perplexity(other, tokens, context=32, base=base)
    monkeypatch.setattr("edgeq.evaluation.text.BLOCK_ELEMENTS", 300)
    got = perplexity(other, tokens, context=32, base=base)
    assert got.to_dict() == pytest.approx(want.to_dict())
    assert want.kl_mean is not None
    assert want.kl_mean > 0.01


def test_bits_per_byte_counts_the_scored_text() -> None:
    def decode(ids: list[int]) -> str:  # token 3 takes three bytes
        return "".join("€" if i == 3 else "ab"[i % 2] for i in ids)

    with_bos = perplexity(uniform, [1, 2, 3, 4, 5], context=3, bos=0, decode=decode)
    assert with_bos.bits_per_byte == pytest.approx(5 * math.log2(V) / 7)
    without = perplexity(uniform, [1, 2, 4, 3, 5, 6], context=3, decode=decode)
    assert without.n_tokens == 4  # 1 and the three bytes of 3 are not scored
    assert without.bits_per_byte == pytest.approx(4 * math.log2(V) / 4)
    half = perplexity(uniform, [1] * 9, context=4, decode=decode, score="half")
    assert half.bits_per_byte is None


def test_max_tokens_and_progress() -> None:
    seen: list[tuple[str, int, int]] = []
    got = perplexity(
        uniform,
        [1] * 50,
        context=5,
        bos=0,
        max_tokens=9,
        progress=lambda *event: seen.append(event),
    )
    assert got.n_tokens == 9
    assert seen == [("windows", 1, 3), ("windows", 2, 3), ("windows", 3, 3)]
    assert "first 9 tokens" in got.protocol


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([], {}, "the text has no tokens"),
        ([1], {}, "has 1 tokens and scoring 'all' needs at least 2"),
        ([1] * 7, {"score": "half"}, "has 7 tokens and scoring 'half' needs at least 8"),
        ([1, 2], {"context": 1}, "context is 1 tokens"),
        ([1, 2], {"context": 3, "score": "half"}, "context is 3 tokens"),
        ([1, 2], {"score": "most"}, r"unknown score 'most' \(known: all, half\)"),
        ([1, 2], {"max_tokens": 0}, "max_tokens is 0"),
        ([5, 2], {"bos": 5}, r"start with BOS \(5\)"),
    ],
)
def test_impossible_requests_are_refused(
    tokens: list[int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        perplexity(uniform, tokens, **{"context": 8, **options})


def test_damaged_or_foreign_logits_are_refused() -> None:
    def broken(tokens: np.ndarray) -> np.ndarray:
        out = uniform(tokens)
        out[1, 2] = np.nan
        return out

    with pytest.raises(FormatError, match="the model gives logits that are not finite"):
        perplexity(broken, [1, 2, 3], context=8)
    with pytest.raises(FormatError, match="the base model gives logits that are not finite"):
        perplexity(uniform, [1, 2, 3], context=8, base=broken)
    with pytest.raises(UsageError, match="7 tokens in its vocabulary and the base model 6"):
        perplexity(uniform, [1, 2, 3], context=8, base=lambda t: uniform(t)[:, :6])
    with pytest.raises(UsageError, match=r"gave logits \[7\] for 3 tokens"):
        perplexity(lambda t: uniform(t)[0], [1, 2, 3], context=8)


def test_stories260k_as_published() -> None:
    """Float32 is at 1.3 nats a token on single training stories, at 2 over a stream of them."""
    model = importers.load(need("models/stories260K"))
    text = need("data/text_tinystories_train/tinystories_train_2MB.txt").read_text("utf-8")[:4000]
    tokenizer = Tokenizer(model.files)
    tokens = tokenizer.encode(text, add_bos=False)
    reference = Reference(model, keep=True)
    got = perplexity(
        reference.forward, tokens, context=256, bos=tokenizer.bos, decode=tokenizer.decode
    )
    assert got.n_tokens == len(tokens)
    assert 1.2 < got.nll_per_token < 2.3
    assert got.bits_per_byte == pytest.approx(
        got.nll_per_token * len(tokens) / math.log(2) / len(text.encode())
    )
    int8 = Reference(quantized(model, "w8-g32"), keep=True).forward
    near = perplexity(
        int8, tokens, context=256, bos=tokenizer.bos, base=reference.forward, max_tokens=500
    )
    int4 = Reference(quantized(model, "w4-g32"), keep=True).forward
    far = perplexity(
        int4, tokens, context=256, bos=tokenizer.bos, base=reference.forward, max_tokens=500
    )
    assert isinstance(near, Evaluation)
    assert near.kl_mean is not None
    assert far.kl_mean is not None
    assert near.kl_mean < 0.01 < far.kl_mean
    assert near.top1_agreement is not None
    assert near.top1_agreement > 0.95
