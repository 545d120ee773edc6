"""Which engines of a batch generate an answer now, so that each knows whether it does so alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class RunningAnswers:
    """The answers that engines with a common decoder generate. Threads may share the object."""

    def __init__(self) -> None:
        self._running: set[object] = set()

    @contextmanager
    def runs(self, engine: object) -> Iterator[None]:
        """While the block runs, this engine generates an answer."""
        self._running.add(engine)
        try:
            yield
        finally:
            self._running.discard(engine)

    def alone(self, engine: object) -> bool:
        """Whether no other engine generates an answer.

        Otherwise tokens of several answers share a pass, which uses the arithmetic that verifying
        drafts would need.
        """
        return not self._running - {engine}
