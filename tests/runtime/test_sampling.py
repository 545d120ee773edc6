"""Sampling: each filter against its definition, and draws against their distribution."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.core.errors import FormatError, UsageError
from edgeq.runtime.sampling import (
    Sampler,
    SamplingParams,
    exponentials,
    log_probabilities,
    min_p_count,
    penalize,
    penalize_counts,
    top_k_ids,
    top_p_count,
)

OFF: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0}


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    p = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    return p / p.sum()


def draws(logits: np.ndarray, n: int, **params: Any) -> np.ndarray:
    sampler = Sampler(SamplingParams(**{"seed": 11, **params}), logits.size)
    return np.bincount([sampler.sample(logits) for _ in range(n)], minlength=logits.size)


def assert_distributed(counts: np.ndarray, p: np.ndarray) -> None:
    """Chi-square at the 0.1 % level (Wilson-Hilferty), and nothing where p is 0."""
    assert counts[p == 0].sum() == 0
    live = p > 0
    if live.sum() == 1:
        return
    want = p[live] * counts.sum()
    assert want.min() > 5, "too few draws for a chi-square test"
    chi2 = ((counts[live] - want) ** 2 / want).sum()
    k = live.sum() - 1
    limit = k * (1 - 2 / (9 * k) + 3.09 * math.sqrt(2 / (9 * k))) ** 3
    assert chi2 < limit


LOGITS = np.array([1.0, 3.0, 2.5, -1.0, 0.0, 2.0, 1.5, 0.5], np.float32)


def keep(logits: np.ndarray, ids: list[int]) -> np.ndarray:
    kept = np.full_like(logits, -np.inf)
    kept[ids] = logits[ids]
    return kept


@pytest.mark.parametrize(
    ("params", "p"),
    [
        ({}, softmax(LOGITS)),
        ({"temperature": 0.8}, softmax(LOGITS, 0.8)),
        ({"temperature": 2.0}, softmax(LOGITS, 2.0)),
        ({"top_k": 3}, softmax(keep(LOGITS, [1, 2, 5]))),
        ({"top_k": 3, "temperature": 3.0}, softmax(keep(LOGITS, [1, 2, 5]), 3.0)),
        # probabilities fall as .39 .24 .14 .09: .6 needs the first two, .7 the first three
        ({"top_p": 0.6}, softmax(keep(LOGITS, [1, 2]))),
        ({"top_p": 0.7}, softmax(keep(LOGITS, [1, 2, 5]))),
        # e^-1 = .37, e^-1.5 = .22 of the first's probability
        ({"min_p": 0.3}, softmax(keep(LOGITS, [1, 2, 5]))),
        # top-p looks at what top-k left: .39 of .77 is .51
        ({"top_k": 3, "top_p": 0.5}, softmax(keep(LOGITS, [1]))),
        # filters come before the temperature, which would widen them
        ({"top_p": 0.6, "min_p": 0.05, "temperature": 5.0}, softmax(keep(LOGITS, [1, 2]), 5.0)),
    ],
)
def test_draws_are_distributed_as_defined(params: dict[str, Any], p: np.ndarray) -> None:
    assert_distributed(draws(LOGITS, 4000, **{**OFF, **params}), p)


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = np.array([0.0, 2.0, 1.0, 2.0], np.float32)
    assert draws(logits, 20, temperature=0.0).tolist() == [0, 20, 0, 0]


def test_the_coldest_temperature_takes_the_largest_logit() -> None:
    logits = np.array([1.0, 900.0, 899.0, -4e4], np.float32)
    for temperature in (5e-324, 1e-300, 1e-20):
        assert draws(logits, 20, temperature=temperature).tolist() == [0, 20, 0, 0]


def test_seed_repeats_and_differs() -> None:
    def run(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(**{**OFF, "seed": seed}), LOGITS.size)
        return [sampler.sample(LOGITS) for _ in range(40)]

    assert run(3) == run(3)
    assert run(3) != run(4)
    assert run(None) != run(None)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 700), st.integers(1, 60), st.integers(0, 2**32), st.sampled_from([2, 1000]))
def test_top_k_is_the_stable_sort(v: int, k: int, seed: int, levels: int) -> None:
    """Few levels make many ties, which the lower id wins."""
    logits = np.random.default_rng(seed).integers(0, levels, v).astype(np.float32)
    want = np.argsort(-logits, kind="stable")[:k]
    np.testing.assert_array_equal(top_k_ids(logits, k), want)


def test_top_k_of_a_large_vocabulary() -> None:
    logits = np.random.default_rng(0).normal(size=151_936).astype(np.float32)
    for k in (1, 40, 5000, 151_936, 200_000):
        want = np.argsort(-logits, kind="stable")[:k]
        np.testing.assert_array_equal(top_k_ids(logits, k), want)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 3000),
    st.floats(0.01, 1.0),
    st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    st.integers(0, 2**32),
)
def test_filters_without_top_k_equal_the_full_sort(
    v: int, top_p: float, min_p: float, seed: int
) -> None:
    logits = (3 * np.random.default_rng(seed).normal(size=v)).astype(np.float32)
    params = SamplingParams(top_k=0, top_p=top_p, min_p=min_p)
    order = np.argsort(-logits, kind="stable")
    if top_p < 1:
        order = order[: top_p_count(logits[order], top_p)]
    order = order[: min_p_count(logits[order], min_p)]
    got = Sampler(params, v).candidates(logits)
    assert set(got.tolist()) == set(order.tolist())


def test_top_p_count() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    assert [top_p_count(logits, p) for p in (0.01, 0.49, 0.51, 0.79, 0.81, 0.96, 1.0)] == [
        1, 1, 2, 2, 3, 4, 4,
    ]  # fmt: skip
    assert top_p_count(logits[:2], 0.79, total=1 / 0.5) == 2
    assert top_p_count(logits[:2], 0.95, total=1 / 0.5) == 2


def test_min_p_count() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    assert [min_p_count(logits, p) for p in (0.0, 0.09, 0.11, 0.31, 0.61, 1.0)] == [
        4, 4, 3, 2, 1, 1,
    ]  # fmt: skip


def test_penalize() -> None:
    logits = np.array([2.0, -2.0, 0.0, 4.0], np.float32)
    got = penalize(logits, [0, 1, 1, 2], 2.0)
    assert got.tolist() == [1.0, -4.0, 0.0, 4.0]
    assert logits.tolist() == [2.0, -2.0, 0.0, 4.0]


def test_penalty_looks_at_the_last_n_of_prompt_and_choices() -> None:
    logits = np.array([3.0, 2.9, 2.8, 2.7, 2.6], np.float32)
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0, repeat_last_n=2)
    sampler = Sampler(params, 5)
    sampler.accept([4, 0, 1])  # 4 is forgotten: two are remembered
    assert [sampler.sample(logits) for _ in range(4)] == [2, 0, 1, 2]
    everything = Sampler(SamplingParams(temperature=0.0, repetition_penalty=2, repeat_last_n=-1), 5)
    assert [everything.sample(logits) for _ in range(6)] == [0, 1, 2, 3, 4, 0]


def test_plain_greedy() -> None:
    assert SamplingParams(temperature=0.0).plain_greedy
    assert SamplingParams(temperature=0.0, repetition_penalty=1.2, repeat_last_n=0).plain_greedy
    assert not SamplingParams(temperature=0.0, repetition_penalty=1.2).plain_greedy
    assert not SamplingParams().plain_greedy


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
        ("repeat_last_n", -2),
        ("seed", -1),
        ("seed", 1 << 64),
    ],
)
def test_numbers_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=rf"^{name} is {value}; use "):
        SamplingParams(**{name: value})


def test_damaged_logits_are_refused() -> None:
    sampler = Sampler(SamplingParams(), 3)
    for bad in ([0.0, np.nan, 1.0], [np.inf, 0.0, 0.0], [-np.inf] * 3):
        with pytest.raises(FormatError, match="not finite"):
            sampler.sample(np.array(bad, np.float32))
    with pytest.raises(UsageError, match=r"shape \[4\]; this needs \[3\]"):
        sampler.sample(np.zeros(4, np.float32))


def test_impossible_tokens_may_be_minus_infinity() -> None:
    logits = np.array([0.0, -np.inf, 1.0, -np.inf], np.float32)
    for params in (OFF, {}, {"top_k": 0}, {"top_k": 0, "min_p": 0.0}):
        assert draws(logits, 50, **params)[[1, 3]].tolist() == [0, 0]


# --- biases, counts, masks, log-probabilities ---------------------------------------------------


def test_penalties_count_what_was_generated() -> None:
    logits = np.array([1.0, 3.0, 2.5, 2.0], np.float32)
    out = penalize_counts(logits, {1: 2, 3: 1}, presence=0.5, frequency=0.25)
    assert out.tolist() == [1.0, 3.0 - 0.5 - 2 * 0.25, 2.5, 2.0 - 0.5 - 0.25]
    assert logits.tolist() == [1.0, 3.0, 2.5, 2.0]
    sampler = Sampler(SamplingParams(temperature=0, frequency_penalty=0.4), 4)
    sampler.accept([1, 1, 1])  # the prompt's tokens do not count
    assert [sampler.sample(logits) for _ in range(6)] == [1, 1, 2, 1, 2, 3]
    once = Sampler(SamplingParams(temperature=0, presence_penalty=0.6), 4)
    assert [once.sample(logits) for _ in range(5)] == [1, 2, 1, 1, 1]


def test_a_bias_is_added_to_its_logit() -> None:
    logits = np.array([1.0, 3.0, 2.5, 2.0], np.float32)
    for bias, token in (({}, 1), ({1: -0.6}, 2), ({0: 2.5}, 0), ({1: -100, 2: -100}, 3)):
        assert Sampler(SamplingParams(temperature=0, logit_bias=bias), 4).sample(logits) == token
    assert logits.tolist() == [1.0, 3.0, 2.5, 2.0]
    with pytest.raises(UsageError, match="logit_bias names the token 4"):
        Sampler(SamplingParams(logit_bias={4: 1}), 4)
    for wrong in ([], {1: float("nan")}, {"1": 1}, {1: True}, 3):
        with pytest.raises(UsageError, match="logit_bias is"):
            SamplingParams(logit_bias=wrong)  # type: ignore[arg-type]
    for name in ("presence_penalty", "frequency_penalty"):
        with pytest.raises(UsageError, match=name):
            SamplingParams(**{name: float("inf")})
    assert SamplingParams(temperature=0, logit_bias={}).plain_greedy
    assert not SamplingParams(temperature=0, logit_bias={1: 1}).plain_greedy
    assert not SamplingParams(temperature=0, presence_penalty=1).plain_greedy


def test_only_what_is_allowed_is_drawn() -> None:
    chance = np.random.default_rng(3)
    logits = (10 * chance.standard_normal(500)).astype(np.float32)
    allowed = np.zeros(500, np.bool_)
    allowed[chance.choice(500, 5, replace=False)] = True
    allowed[int(logits.argmax())] = False
    for params in (
        SamplingParams(temperature=0), SamplingParams(seed=1), SamplingParams(top_k=0, seed=1),
        SamplingParams(top_k=0, top_p=1, min_p=0, temperature=50, seed=1),
    ):  # fmt: skip
        sampler = Sampler(params, 500)
        drawn = {sampler.sample(logits, allowed) for _ in range(200)}
        assert drawn <= set(np.flatnonzero(allowed).tolist())
    assert len(drawn) == 5  # the last one draws nearly evenly


def test_log_probabilities_are_those_of_softmax() -> None:
    logits = np.array([1e4, 1e4 - 1, -1e4, 0], np.float32)
    logs = log_probabilities(logits)
    assert np.exp(logs).sum() == pytest.approx(1)
    assert logs[:2].tolist() == pytest.approx([-math.log1p(math.exp(-1)),
                                               -1 - math.log1p(math.exp(-1))])  # fmt: skip


@pytest.mark.parametrize("params", [{}, {"top_k": 5}, {"temperature": 0.6, "min_p": 0.05}])
def test_two_models_choose_the_same_token_as_often_as_their_distributions_say(
    params: dict[str, Any],
) -> None:
    """The chance is that of Daliri et al. 2024, and more than (1 - d) / (1 + d)."""
    rng = np.random.default_rng(4)
    large = (2 * rng.normal(size=30)).astype(np.float32)
    small = large + rng.normal(size=30).astype(np.float32) / 2
    full = {**OFF, **params}
    p, q = (_probabilities(logits, full) for logits in (large, small))
    chance = sum(
        1 / np.maximum(p / p[i], q / q[i]).sum() for i in range(30) if p[i] > 0 and q[i] > 0
    )
    distance = np.abs(p - q).sum() / 2
    assert (1 - distance) / (1 + distance) <= chance <= 1 - distance
    n = 4000
    same = 0
    for seed in range(n):
        sampler = Sampler(SamplingParams(**{**full, "seed": seed}), 30)
        same += sampler.ahead().sample(small) == sampler.sample(large)
    assert abs(same / n - chance) < 4 * np.sqrt(chance * (1 - chance) / n)


def _probabilities(logits: np.ndarray, params: dict[str, Any]) -> np.ndarray:
    ids = Sampler(SamplingParams(**params), logits.size).candidates(logits)
    return softmax(keep(logits, ids.tolist()), params["temperature"])


def test_numbers_of_neighboring_tokens_and_keys_are_independent() -> None:
    ids = np.arange(64)
    rng = np.random.Generator(np.random.PCG64(0))
    rows = np.array(
        [exponentials(rng.integers(1 << 64, dtype=np.uint64), ids) for _ in range(4000)]
    )
    near = np.array([exponentials(np.uint64(key), ids) for key in range(4000)])
    for numbers in (rows, near):
        uniform = np.exp(-numbers)
        assert abs(uniform.mean() - 0.5) < 0.003
        counts = np.histogram(uniform, 50, (0, 1))[0]
        expected = uniform.size / 50
        assert ((counts - expected) ** 2 / expected).sum() < 49 + 5 * np.sqrt(2 * 49)
        related = np.corrcoef(uniform, rowvar=False) - np.eye(64)
        assert np.abs(related).max() < 5.5 / np.sqrt(4000)
        following = (uniform[1:] - 0.5) * (uniform[:-1] - 0.5) * 12
        assert abs(following.mean()) < 5 / np.sqrt(following.size)
