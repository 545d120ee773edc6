"""Online choice of the number of threads that decode.

More threads are not always faster. One core may use up the memory bandwidth; and where another
program keeps a core busy, all threads wait at every barrier for the slowest, so that one thread
alone is faster than two. Results do not depend on the number of threads, so it can be changed at
any token.
"""

from __future__ import annotations

PROBE_SECONDS = (0.2, 4.0)
"""Decoding time between two measurements of the counts that are not in use: at first, and at
most; it doubles as long as nothing changes."""
BURST_SECONDS = 0.025
"""Target for the time between two decisions."""
TRY_SECONDS = 0.008
"""Target for the time of a measurement: long compared with waking a thread."""
_SLOWER = 1.25  # times its own average: another program may have started, so measure at once
_BETTER = 0.97  # a change must be at least this much faster
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
        """Take the time of a burst into account."""
        each = seconds / tokens
        if not self._warm:  # the first burst reads pages and compiles: not representative
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
        """Choose the fastest count, once every one was measured."""
        self._since_probe = 0.0
        self._patience = min(2 * self._patience, PROBE_SECONDS[1])
        best = min(self._seconds, key=lambda count: self._seconds[count])
        if self._seconds[best] < _BETTER * self._seconds.get(self.current, float("inf")):
            self.current, self._patience = best, PROBE_SECONDS[0]
