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


class SnapshotStore:
    """Snapshots of sequences of all models of a server. Threads may share the object.

    Args:
        limit: most bytes of all snapshots together; 0 keeps none.

    Attributes:
        nbytes: bytes of all snapshots.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self.lock = threading.RLock()
        self._kept: OrderedDict[tuple[PrefixCache, tuple[int, ...]], Snapshot] = OrderedDict()

    def of(self, cache: PrefixCache) -> dict[tuple[int, ...], Snapshot]:
        """The snapshots of one model by their tokens, the least recently used first."""
        with self.lock:
            return {tokens: one for (owner, tokens), one in self._kept.items() if owner is cache}

    def used(self, cache: PrefixCache, tokens: tuple[int, ...]) -> None:
        """Mark a snapshot as the most recently used one, if it is still kept."""
        with self.lock:
            if (cache, tokens) in self._kept:
                self._kept.move_to_end((cache, tokens))

    def keep(self, cache: PrefixCache, snapshot: Snapshot) -> None:
        """Keep a snapshot instead of those of its prefixes, within the limit."""
        tokens = snapshot.tokens
        with self.lock:
            for shorter in [kept for kept in self.of(cache) if tokens[: len(kept)] == kept]:
                self.nbytes -= self._kept.pop((cache, shorter)).nbytes
            self._kept[cache, tokens] = snapshot
            self.nbytes += snapshot.nbytes
            while self.nbytes > self.limit:
                self.nbytes -= self._kept.popitem(last=False)[1].nbytes


class PrefixCache:
    """Snapshots of sequences of one model. Threads may share the object.

    Args:
        store: where the snapshots are kept.
    """

    def __init__(self, store: SnapshotStore) -> None:
        self._store = store

    def __len__(self) -> int:
        return len(self._store.of(self))

    @property
    def nbytes(self) -> int:
        """Bytes of the snapshots of this model."""
        return sum(one.nbytes for one in self._store.of(self).values())

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
        kept = self._store.of(self)
        best = max(kept, key=lambda tokens: common_prefix(tokens, prompt), default=None)
        if best is None:
            return None
        self._store.used(self, best)
        return kept[best]

    def _keep(self, engine: Engine) -> None:
        """Keep a snapshot of an engine, unless a longer one is kept already or it is too large."""
        tokens = tuple(engine.tokens)
        kept = self._store.of(self)
        if not self._store.limit or any(one[: len(tokens)] == tokens for one in kept):
            return
        snapshot = engine.snapshot()
        if snapshot.nbytes <= self._store.limit:
            self._store.keep(self, snapshot)
