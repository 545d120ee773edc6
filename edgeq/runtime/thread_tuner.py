"""How many threads decode: as many as make it faster, found out while running.

More threads are not always faster. Memory bandwidth may be spent by one core; and where another
program keeps a core busy, a team waits at every barrier for its slowest member, so that one
thread alone is better than two. Results do not depend on the number of threads, so it can be
chosen again at any token.
"""

from __future__ import annotations

PROBE_SECONDS = (0.2, 4.0)
"""Decoding time between two tries of the counts that are not in use: at first, and at most; it
doubles as long as nothing changes."""
BURST_SECONDS = 0.025
"""Aim for the time between two decisions."""
TRY_SECONDS = 0.008
"""Aim for the time of a try: long against the waking of threads."""
_SLOWER = 1.25  # against its own average: something else has started, look at once
_BETTER = 0.97  # another count must be this much faster to be worth a change
_BLEND = 0.3  # weight of the newest measurement


class ThreadTuner:
    """Chooses the thread count for the next burst of tokens.

    Args:
        threads: the most to use.

    Attributes:
        current: the count that was fastest so far.
    """

    def __init__(self, threads: int) -> None:
        self._counts = sorted({threads, -(-threads // 2), 1}, reverse=True)
        self._seconds: dict[int, float] = {}  # per token
        self.current = threads
        self._to_try = [] if threads == 1 else list(self._counts)
        self._since_probe, self._patience = 0.0, PROBE_SECONDS[0]
        self._warm = False

    def next(self, remaining: int) -> tuple[int, int]:
        """(threads, tokens) of the next burst, given how many tokens are still wanted."""
        threads = self._to_try[0] if self._to_try else self.current
        seconds = self._seconds.get(threads, TRY_SECONDS / 2)
        aim = TRY_SECONDS if self._to_try else BURST_SECONDS
        return threads, max(1, min(remaining, round(aim / seconds)))

    def record(self, threads: int, tokens: int, seconds: float) -> None:
        """Tell how long a burst took."""
        each = seconds / tokens
        if not self._warm:  # pages are being read, code is cold: says nothing
            self._warm = True
            return
        before = self._seconds.get(threads)
        probing = bool(self._to_try)
        if before is None or probing:
            self._seconds[threads] = each
        else:
            self._seconds[threads] = before + _BLEND * (each - before)
        if probing:
            self._to_try.remove(threads)
            if not self._to_try:
                self._settle()
            return
        self._since_probe += seconds
        slowed = before is not None and each > _SLOWER * before
        if len(self._counts) > 1 and (slowed or self._since_probe > self._patience):
            self._to_try = [c for c in self._counts if c != self.current]

    def _settle(self) -> None:
        """Every count has been tried: take the fastest."""
        self._since_probe = 0.0
        self._patience = min(2 * self._patience, PROBE_SECONDS[1])
        best = min(self._seconds, key=lambda count: self._seconds[count])
        if self._seconds[best] < _BETTER * self._seconds.get(self.current, float("inf")):
            self.current, self._patience = best, PROBE_SECONDS[0]
