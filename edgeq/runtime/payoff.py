"""Whether drafts of a smaller model pay, and how many tokens to draft, from measured times.

A draft of k tokens costs k passes of the small model, and a pass of the large one over k + 1 rows.
With a share ``a`` of drafted tokens that are right, it gives (1 - a^(k+1)) / (1 - a) tokens
(Leviathan et al. 2023, arXiv 2211.17192). Where no k is faster than decoding without a draft, there
is a pause that is long compared with what the trial has cost.
"""

from __future__ import annotations

import math

MOST = 16
"""Most tokens drafted at once."""
FIRST = 8
"""Tokens decoded without a draft before the first trial, to know their time."""
TRIAL, TRIALS = 2, 2
"""Tokens drafted at once at the beginning of a trial, and how often."""
GAIN = 1.03
"""Drafting goes on where it is at least this much faster."""
PAUSE, LONGEST_PAUSE = 256, 4096
"""Tokens without a draft after the first trial that did not pay; doubled after each further one."""
LOSS = 0.015
"""The share of a pause's time that the trial before it may have lost."""
REFRESH = 16
"""Drafts after which one token is decoded without, so that its time stays known."""
_NEW = 0.2
"""Weight of a new measurement in a mean; older ones fade."""


class Payoff:
    """What drafting gains, learned from answer to answer.

    Attributes:
        pays: whether the last trial was faster than decoding without a draft.
    """

    def __init__(self) -> None:
        self.pays = False
        self._step: float | None = None  # seconds of a token without a draft
        self._draft: float | None = None  # seconds of a drafted token
        self._row = 0.3  # what each further row adds to a pass of the large model, in steps
        self._right, self._tried = 1.4, 2.0  # drafted tokens; begins with some hope
        self._left, self._pause = FIRST, PAUSE
        self._lost = 0.0  # seconds of this trial beyond what its tokens cost without it
        self._drafts = self._trials = 0  # checked so far, and in this trial

    def next(self) -> tuple[int, int]:
        """Tokens to draft now, and where that is 0, how many to decode before asking again."""
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
        self._right, self._tried = self._right / 2, self._tried / 2
        return 0, self._left

    def gain(self, tokens: int) -> float:
        """How many times as fast it should be to draft so many tokens at once."""
        assert self._step is not None
        assert self._draft is not None
        share = min(self._right / self._tried, 0.995)
        given = (1 - share ** (tokens + 1)) / (1 - share)
        taken = tokens * self._draft + self._step * (1 + self._row * tokens)
        return given * self._step / taken

    def plain(self, tokens: int, seconds: float) -> None:
        """Some tokens were decoded without a draft."""
        self._step = _mean(self._step, seconds / tokens)
        self._left = max(0, self._left - tokens)

    def drafted(
        self, tokens: int, right: int, draft_s: float, check_s: float, more_s: float
    ) -> None:
        """A draft was checked.

        Args:
            tokens: that were drafted.
            right: how many of them, from the first, were right.
            draft_s: seconds for drafting them.
            check_s: seconds of the large model.
            more_s: seconds for text that the small model had not read.
        """
        assert self._step is not None
        self._drafts += 1
        self._trials += 1
        self._draft = _mean(self._draft, draft_s / tokens)
        row = min(max((check_s / self._step - 1) / tokens, 0.0), 2.0)
        self._row += _NEW * (row - self._row)
        fade = 0.9
        self._right = fade * self._right + right
        self._tried = fade * self._tried + min(tokens, right + 1)
        self._lost = max(0.0, self._lost + draft_s + check_s + more_s - (right + 1) * self._step)


def _mean(before: float | None, new: float) -> float:
    """A mean in which older values fade; a single one that is far off counts as twice the mean."""
    return new if before is None else before + _NEW * (min(new, 2 * before) - before)
