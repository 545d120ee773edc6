"""Threads for compiled code: independent pieces of one piece of work.

No result depends on the number of threads: a piece writes what no other one reads or writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from itertools import pairwise

from edgeq.core.cpu import available_cores

_threads: ContextVar[int] = ContextVar("threads", default=0)


@contextmanager
def thread_limit(threads: int | None) -> Iterator[None]:
    """Use at most so many threads within the block; None for one of each core."""
    token = _threads.set(threads or 0)
    try:
        yield
    finally:
        _threads.reset(token)


def thread_count() -> int:
    """How many threads a piece of work may use here."""
    return _threads.get() or available_cores()


def run_pieces(work: Sequence[Callable[[], None]]) -> None:
    """Call all functions, side by side on the threads there are."""
    threads = thread_count()
    if threads == 1 or len(work) == 1:
        for piece in work:
            piece()
        return
    pending = [_pool(threads - 1).submit(piece) for piece in work[1:]]
    work[0]()
    for future in pending:
        future.result()


def ranges(total: int, step: int, pieces: int) -> list[tuple[int, int]]:
    """``0:total`` in at most so many ranges of about equal length, cut at multiples of a step."""
    steps = -(-total // step)
    pieces = max(1, min(pieces, steps))
    cuts = [min(total, steps * i // pieces * step) for i in range(pieces + 1)]
    return [(a, b) for a, b in pairwise(cuts) if a < b]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="edgeq-kernels")
