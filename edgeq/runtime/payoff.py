"""Whether drafting with a smaller model is faster, and how many tokens to draft.

Both are computed from measured times. A draft of k tokens costs k passes of the small model, and
one pass of the large model over k + 1 rows. If a share ``a`` of the drafted tokens is accepted, it
gives (1 - a^(k+1)) / (1 - a) tokens on average (Leviathan et al. 2023, arXiv 2211.17192). If no k
is faster than decoding without a draft, drafting pauses. The pause is long enough that the time
that the trial has lost is a small share of it.
"""

from __future__ import annotations

import math

MOST = 16
"""The most tokens that are drafted at once."""
FIRST = 8
"""Number of tokens decoded without a draft before the first trial, to measure their time."""
TRIAL, TRIALS = 2, 2
"""A trial begins with this many tokens drafted at once, this many times."""
GAIN = 1.03
"""Drafting continues while it is at least this many times as fast as decoding without a draft."""
PAUSE, LONGEST_PAUSE = 256, 4096
"""Length of a pause in tokens after the first trial that was not faster, and the longest pause.
Each further trial that is not faster doubles the pause."""
LOSS = 0.015
"""The time that a trial loses is at most this share of the time of the pause after it."""
REFRESH = 16
"""After this many drafts one token is decoded without a draft, to measure its time again."""
_NEW = 0.2
"""Weight of a new measurement in an exponentially weighted mean."""


class Payoff:
    """The speedup by drafting, measured over all answers so far.

    Attributes:
        pays: whether drafting was faster than decoding without a draft in the last trial.
    """

    def __init__(self) -> None:
        self.pays = False
        self._step: float | None = None  # seconds for a token without a draft
        self._draft: float | None = None  # seconds for drafting one token
        self._row = 0.3  # time that each further row adds to a pass of the large model, in `_step`
        self._accepted, self._tried = 1.4, 2.0  # drafted tokens; the first ratio, 0.7, is a guess
        self._left, self._pause = FIRST, PAUSE
        self._lost = 0.0  # seconds that this trial took longer than decoding without a draft
        self._drafts = self._trials = 0  # drafts verified in all, and in this trial

    def next(self) -> tuple[int, int]:
        """Number of tokens to draft now, and if that is 0, how many to decode without a draft."""
        if self._left:
            return 0, self._left
        if self._draft is None or self._step is None or self._trials < TRIALS:
            return TRIAL, 0
        best = max(range(1, MOST + 1), key=self.gain)
        if self.gain(best) >= GAIN:
            self.pays = True
            self._pause = PAUSE
            if self._drafts and self._drafts % REFRESH == 0:
                self._drafts += 1
                self._left = 1
                return 0, 1
            return best, 0
        self.pays = False
        lost = max(0, math.ceil(self._lost / self._step / LOSS))
        self._left = max(self._pause, lost)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        self._lost, self._trials = 0.0, 0
        self._accepted, self._tried = self._accepted / 2, self._tried / 2
        return 0, self._left

    def gain(self, tokens: int) -> float:
        """The expected speedup over decoding without a draft if so many tokens are drafted."""
        assert self._step is not None
        assert self._draft is not None
        share = min(self._accepted / self._tried, 0.995)
        expected_tokens = (1 - share ** (tokens + 1)) / (1 - share)
        seconds = tokens * self._draft + self._step * (1 + self._row * tokens)
        return expected_tokens * self._step / seconds

    def plain(self, tokens: int, seconds: float) -> None:
        """Record the time of tokens that were decoded without a draft."""
        self._step = _mean(self._step, seconds / tokens)
        self._left = max(0, self._left - tokens)

    def drafted(
        self, tokens: int, accepted: int, draft_s: float, check_s: float, read_s: float
    ) -> None:
        """Record the times of a draft that was verified.

        Args:
            tokens: number of drafted tokens.
            accepted: number of tokens that were accepted.
            draft_s: seconds for drafting them.
            check_s: seconds for the large model's pass.
            read_s: seconds in which the small model read text that was not in its KV cache.
        """
        assert self._step is not None
        self._drafts += 1
        self._trials += 1
        self._draft = _mean(self._draft, draft_s / tokens)
        row = min(max((check_s / self._step - 1) / tokens, 0.0), 2.0)
        self._row += _NEW * (row - self._row)
        fade = 0.9
        self._accepted = fade * self._accepted + accepted
        self._tried = fade * self._tried + min(tokens, accepted + 1)
        seconds = draft_s + check_s + read_s
        self._lost = max(0.0, self._lost + seconds - (accepted + 1) * self._step)


def _mean(before: float | None, new: float) -> float:
    """An exponentially weighted mean; a value over twice the mean counts as twice the mean."""
    return new if before is None else before + _NEW * (min(new, 2 * before) - before)
