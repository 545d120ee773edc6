"""A cache of the KV caches of earlier sequences, for prompts that begin with the same tokens.

An engine holds one sequence. When another conversation replaces it, a copy of the old sequence is
kept here, within a limit of bytes; the least recently used copies are removed first.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from edgeq.runtime.engine import Engine
from edgeq.runtime.kv_state import Snapshot

WORTH = 32
"""Sequences with fewer new tokens than this are not kept, because running them again is cheap."""


def common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Length, in tokens, of the longest common prefix of two sequences."""
    most = min(len(a), len(b))
    if a[:most] == b[:most]:
        return most
    low, high = 0, most  # a[:low] agrees, a[:high] does not
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


class PrefixCache:
    """Snapshots of sequences of one model. Threads may share the object.

    Args:
        limit: most bytes of all snapshots together; 0 keeps none.

    Attributes:
        nbytes: bytes of all snapshots.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: OrderedDict[tuple[int, ...], Snapshot] = OrderedDict()
        self._lock = threading.Lock()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def prepare(self, engine: Engine, prompt: tuple[int, ...]) -> list[int]:
        """Restore the longest known prefix of a prompt in an engine.

        The sequence that the engine holds is kept as a snapshot if it is long enough.

        Returns:
            the tokens of the prompt that are still to be run, at least one.
        """
        here = common_prefix(tuple(engine.tokens), prompt)
        if engine.n_past - here >= WORTH:
            self._keep(engine)
        found = self._best(prompt)
        if found is not None and common_prefix(found.tokens, prompt) >= here + WORTH:
            engine.restore(found)
        return engine.reuse(prompt)

    def _best(self, prompt: tuple[int, ...]) -> Snapshot | None:
        with self._lock:
            best = max(self._kept, key=lambda tokens: common_prefix(tokens, prompt), default=None)
            if best is None:
                return None
            self._kept.move_to_end(best)
            return self._kept[best]

    def _keep(self, engine: Engine) -> None:
        """Keep a snapshot of an engine, unless a longer one is kept already or it is too large."""
        tokens = tuple(engine.tokens)
        with self._lock:
            if not self._limit or any(kept[: len(tokens)] == tokens for kept in self._kept):
                return
        snapshot = engine.snapshot()
        if snapshot.nbytes > self._limit:
            return
        with self._lock:
            for kept in [kept for kept in self._kept if tokens[: len(kept)] == kept]:
                self.nbytes -= self._kept.pop(kept).nbytes
            self._kept[tokens] = snapshot
            self.nbytes += snapshot.nbytes
            while self.nbytes > self._limit:
                self.nbytes -= self._kept.popitem(last=False)[1].nbytes
