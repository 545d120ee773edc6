"""Choosing the next token: parameters, pure filters on logits, and the seeded sampler.

Logits are changed first: biases, penalties, the mask of a constraint. Then filters apply in
llama.cpp's order: top-k, top-p, min-p, temperature. They work on candidates sorted by falling
logit, so that each filter is a count of how many of them stay.

The token is drawn by a race: each candidate arrives at a random time, exponentially distributed
with its probability as the rate, and the first one is chosen. (In logarithms this is the Gumbel-max
trick.) A candidate's random number depends on the seed, on how many tokens were drawn before, and
on its id. Two models that draw with the same seed therefore choose the same token wherever their
distributions are similar, which speculative decoding relies on (`edgeq.runtime.draft`).
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, UsageError

Logits = NDArray[np.floating]
NOT_FINITE = "the model's logits are not finite; its file is damaged or holds NaN or Inf"
COLDEST = 1e-30
"""Lower temperatures are treated as this one: float32 can still represent every quotient, and all
but the largest logits have probability 0."""

_WHOLE: tuple[type, ...] = (int, np.integer)
_REAL: tuple[type, ...] = (int, float, np.integer, np.floating)
_NUMBERS: dict[str, tuple[type, ...]] = {
    "temperature": _REAL,
    "top_k": _WHOLE,
    "top_p": _REAL,
    "min_p": _REAL,
    "repetition_penalty": _REAL,
    "repeat_last_n": _WHOLE,
    "presence_penalty": _REAL,
    "frequency_penalty": _REAL,
    "seed": _WHOLE,
}
"""Types that each parameter may have."""


@dataclass(frozen=True)
class SamplingParams:
    """How a token is chosen from logits.

    Args:
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: of those, keep the fewest whose probabilities reach this sum; 1 keeps all.
        min_p: of those, keep the ones at least this fraction as likely as the first; 0 keeps all.
        repetition_penalty: recent tokens' logits are divided by it (multiplied, if negative);
            1 is off.
        repeat_last_n: how many recent tokens are penalized, the prompt's included; 0 for none,
            -1 for all.
        seed: of the random numbers, 0 .. 2**64-1; None takes one from the operating system.
        presence_penalty: subtracted from the logits of tokens that were generated before; 0 is
            off. The prompt's tokens do not count.
        frequency_penalty: subtracted once for each time a token was generated before; 0 is off.
        logit_bias: token id -> what is added to its logit.

    Raises:
        UsageError: a parameter is not a number, or outside its range.

    Example:
        >>> edgeq.SamplingParams(temperature=0.5, seed=1).top_k
        40
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repetition_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        for name, kinds in _NUMBERS.items():
            value = getattr(self, name)
            if value is None and name == "seed":
                continue
            if isinstance(value, bool | np.bool_) or not isinstance(value, kinds):
                wanted = "a number" if float in kinds else "a whole number"
                raise UsageError(f"{name} is {value!r}; use {wanted}")

        def check(name: str, ok: bool, allowed: str) -> None:
            if not ok:
                raise UsageError(f"{name} is {getattr(self, name)}; use {allowed}")

        check(
            "temperature",
            math.isfinite(self.temperature) and self.temperature >= 0,
            "0 (the most likely token) or more, such as 0.8",
        )
        check("top_k", self.top_k >= 0, "0 (off) or more, such as 40")
        check("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1 (off), such as 0.95")
        check("min_p", 0 <= self.min_p <= 1, "0 (off) to 1, such as 0.05")
        check(
            "repetition_penalty",
            math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
            "more than 0; 1 is off, 1.1 is usual",
        )
        check("repeat_last_n", self.repeat_last_n >= -1, "-1 (all), 0 (off) or more")
        for name in ("presence_penalty", "frequency_penalty"):
            check(name, math.isfinite(getattr(self, name)), "a finite number; 0 is off")
        _check_bias(self.logit_bias)
        check("seed", self.seed is None or 0 <= self.seed < 1 << 64, "0 to 2**64-1, or none")

    @property
    def plain_greedy(self) -> bool:
        """Whether the choice is always the largest logit, whatever came before."""
        return self.temperature == 0 and not self.changes_logits

    @property
    def changes_logits(self) -> bool:
        """Whether a penalty or a bias changes the logits."""
        return self.penalizes or self.counts or bool(self.logit_bias)

    @property
    def counts(self) -> bool:
        """Whether it matters how often a token was generated."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def penalizes(self) -> bool:
        """Whether recent tokens matter."""
        return self.repetition_penalty != 1 and self.repeat_last_n != 0


def penalize(logits: Logits, recent: Iterable[int], penalty: float) -> Logits:
    """Make recent tokens less likely: positive logits / penalty, negative ones * penalty.

    Args:
        logits: [V].
        recent: token ids; each counts once.
        penalty: 1 changes nothing.

    Returns:
        A new array [V].

    Source: Keskar et al. 2019 (arXiv 1909.05858), with the sign rule of common implementations.
    """
    out = logits.copy()
    ids = np.unique(np.fromiter(recent, np.int64))
    values = out[ids]
    out[ids] = np.where(values > 0, values / penalty, values * penalty)
    return out


def top_k_ids(logits: Logits, k: int) -> NDArray[np.int64]:
    """Ids of the k largest logits, by falling logit; the lower id first among equals.

    Args:
        logits: [V], free of NaN.
        k: at least 1; more than V gives all V.
    """
    v = logits.size
    if k >= v:
        return falling(logits, np.arange(v))
    ids: NDArray[np.int64] = np.arange(v)
    run = v // (8 * k)
    if run > 1:
        # The k-th largest of the maxima of runs is no more than the k-th largest logit: one
        # cheap pass leaves few candidates of a large vocabulary.
        whole = v // run * run
        maxima = logits[:whole].reshape(-1, run).max(axis=1)
        bound = np.partition(maxima, maxima.size - k)[maxima.size - k]
        ids = np.flatnonzero(logits >= bound)
    if ids.size > 4 * k:
        bound = np.partition(logits[ids], ids.size - k)[ids.size - k]
        ids = ids[logits[ids] >= bound]
    return falling(logits, ids)[:k]


def falling(logits: Logits, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """``ids`` (ascending) sorted by falling logit; the lower id first among equals."""
    return ids[np.argsort(-logits[ids], kind="stable")]


def top_p_count(logits: Logits, p: float, total: float | None = None) -> int:
    """How many of the sorted candidates reach probability ``p``; at least one.

    Args:
        logits: [C], falling.
        p: the sum to reach.
        total: sum of exp(logit - logits[0]) of all candidates if these are only the first of
            them, else None.

    Returns:
        The fewest whose probabilities sum to p or more; C if none do.

    Source: Holtzman et al. 2019 (arXiv 1904.09751).
    """
    weights = np.exp(logits.astype(np.float64) - logits[0])
    sums = np.cumsum(weights)
    reach = p * (sums[-1] if total is None else total)
    return min(int(np.searchsorted(sums, reach)) + 1, logits.size)


def min_p_count(logits: Logits, p: float) -> int:
    """How many of the sorted candidates are at least ``p`` times as likely as the first.

    Args:
        logits: [C], falling.
        p: 0 keeps all.

    Source: Nguyen et al. 2024 (arXiv 2407.01082).
    """
    if p <= 0:
        return logits.size
    return int(np.count_nonzero(logits >= logits[0] + math.log(p)))


def penalize_counts(
    logits: Logits, counts: Mapping[int, int], presence: float, frequency: float
) -> Logits:
    """Lower the logits of tokens that were generated before.

    Args:
        logits: [V].
        counts: token id -> how often it was generated, at least once.
        presence: subtracted once from each.
        frequency: subtracted as often as the token was generated.

    Returns:
        A new array [V].

    Source: https://platform.openai.com/docs/api-reference (frequency and presence penalties)
    """
    out = logits.copy()
    ids = np.fromiter(counts, np.int64, len(counts))
    times = np.fromiter(counts.values(), np.float64, len(counts))
    out[ids] -= presence + frequency * times
    return out


def log_probabilities(logits: Logits) -> NDArray[np.float64]:
    """The natural logarithm of each token's probability, float64 [V], from logits [V]."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    return wide - math.log(np.exp(wide).sum())


def exponentials(key: np.uint64, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Numbers of the standard exponential distribution, independent, one for each token.

    Args:
        key: 64 random bits.
        ids: token ids [C]; the number of a token does not depend on which others there are.

    Source: the logarithms of uniform numbers, which are the outputs with these indices of
    SplitMix64 (Steele et al. 2014) from the state ``key``.
    """
    bits = ids.astype(np.uint64)
    bits += np.uint64(1)
    bits *= np.uint64(0x9E3779B97F4A7C15)
    bits += key
    bits ^= bits >> np.uint64(30)
    bits *= np.uint64(0xBF58476D1CE4E5B9)
    bits ^= bits >> np.uint64(27)
    bits *= np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    bits >>= np.uint64(11)
    uniform = bits.astype(np.float64)
    uniform += 0.5
    uniform *= 2.0**-53
    found: NDArray[np.float64] = -np.log(uniform)
    return found


class Sampler:
    """Draws tokens from logits with a seeded generator (PCG64).

    Args:
        params: how tokens are chosen.
        vocab: number of logits.
    """

    def __init__(self, params: SamplingParams, vocab: int) -> None:
        self.params = params
        self.vocab = vocab
        self._rng = np.random.Generator(np.random.PCG64(params.seed))
        last = params.repeat_last_n
        self._recent: deque[int] = deque(maxlen=None if last < 0 else last)
        self._counts: Counter[int] = Counter()
        self._biased = _bias_arrays(params.logit_bias, vocab)

    def ahead(self) -> Sampler:
        """A copy that draws with the same random numbers; what it chooses changes nothing here."""
        copied = Sampler(self.params, self.vocab)
        copied._rng.bit_generator.state = self._rng.bit_generator.state
        copied._recent, copied._counts = self._recent.copy(), self._counts.copy()
        return copied

    def accept(self, tokens: Iterable[int]) -> None:
        """Count tokens that `sample` did not choose, such as the prompt's, as recent."""
        if self.params.penalizes:
            self._recent.extend(tokens)

    def sample(self, logits: Logits, allowed: NDArray[np.bool_] | None = None) -> int:
        """Choose the next token and remember it as recent.

        Args:
            logits: [V].
            allowed: [V], the tokens that may be chosen, at least one; all of them if None.

        Raises:
            UsageError: not one row of V logits.
            FormatError: a logit is NaN or all are infinite, so the model is damaged.
        """
        if logits.shape != (self.vocab,):
            raise UsageError(f"logits have shape {list(logits.shape)}; this needs [{self.vocab}]")
        if not np.isfinite(logits.max()):  # NaN if any is
            raise FormatError(NOT_FINITE)
        params = self.params
        if self._biased is not None:
            ids, biases = self._biased
            logits = logits.copy()
            logits[ids] += biases
        if params.penalizes and self._recent:
            logits = penalize(logits, self._recent, params.repetition_penalty)
        if params.counts and self._counts:
            logits = penalize_counts(
                logits, self._counts, params.presence_penalty, params.frequency_penalty
            )
        if allowed is not None:
            logits = np.where(allowed, logits, -np.inf)
        token = int(np.argmax(logits)) if params.temperature == 0 else self._draw(logits)
        self.accept((token,))
        if params.counts:
            self._counts[token] += 1
        return token

    def _draw(self, logits: Logits) -> int:
        ids = self.candidates(logits)
        ids = ids[logits[ids] > -np.inf]
        candidates = logits[ids]
        temperature = max(self.params.temperature, COLDEST)
        weights = np.exp((candidates - candidates.max()) / temperature)
        key = self._rng.integers(1 << 64, dtype=np.uint64)  # another one for each draw
        with np.errstate(divide="ignore"):  # a token without any weight is never the first
            return int(ids[(exponentials(key, ids) / weights).argmin()])

    def candidates(self, logits: Logits) -> NDArray[np.int64]:
        """Ids that pass top-k, top-p and min-p, by falling logit (by id if all three are off)."""
        params = self.params
        if not params.top_k:
            return _without_top_k(logits, params.top_p, params.min_p)
        ids = top_k_ids(logits, params.top_k)
        ids = ids[: top_p_count(logits[ids], params.top_p)] if params.top_p < 1 else ids
        return ids[: min_p_count(logits[ids], params.min_p)]


def _bias_arrays(
    bias: Mapping[int, float] | None, vocab: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
    """Ids and biases, checked against the vocabulary."""
    if not bias:
        return None
    outside = [token for token in bias if not 0 <= token < vocab]
    if outside:
        raise UsageError(
            f"logit_bias names the token {outside[0]}, but the model's tokens are 0 to {vocab - 1}"
        )
    return np.array([*bias], np.int64), np.array([*bias.values()], np.float32)


def _check_bias(bias: Any) -> None:
    if bias is None:
        return
    good = isinstance(bias, Mapping) and all(
        isinstance(token, _WHOLE)
        and isinstance(value, _REAL)
        and not isinstance(token, bool)
        and not isinstance(value, bool)
        and math.isfinite(float(value))  # type: ignore[arg-type]
        for token, value in bias.items()
    )
    if not good:
        raise UsageError(
            f"logit_bias is {bias!r:.60}; use a dictionary of token ids to finite numbers"
        )


def _without_top_k(logits: Logits, top_p: float, min_p: float) -> NDArray[np.int64]:
    """top-p then min-p over the whole vocabulary, sorting no more of it than needed."""
    largest = logits.max()
    ids: NDArray[np.int64] = np.arange(logits.size)
    if min_p:
        # both filters keep a run from the top, so that their order does not matter
        ids = falling(logits, np.flatnonzero(logits >= largest + math.log(min_p)))
    if top_p == 1:
        return ids
    total = float(np.exp(logits - largest).sum(dtype=np.float64))
    if min_p:
        return ids[: top_p_count(logits[ids], top_p, total)]
    k = 256
    while True:
        ids = top_k_ids(logits, k)
        n = top_p_count(logits[ids], top_p, total)
        if n < ids.size or ids.size == logits.size:
            return ids[:n]
        k *= 8
