"""A team of threads that run the same compiled function side by side.

The threads are Python's, woken by a queue; compiled code releases the interpreter lock, and
its own barriers keep the threads in step, so Python is touched only between calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from types import TracebackType

from edgeq.errors import UsageError

Work = Callable[[int], object]


class Team:
    """``threads`` - 1 waiting threads and the caller.

    Args:
        threads: at least 1.
    """

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise UsageError(f"threads is {threads}; use 1 or more")
        self.threads = threads
        self._tasks: list[SimpleQueue[Work | None]] = [SimpleQueue() for _ in range(threads - 1)]
        self._done: SimpleQueue[BaseException | None] = SimpleQueue()
        self._members = [
            threading.Thread(target=self._serve, args=(i + 1,), name=f"edgeq-{i + 1}", daemon=True)
            for i in range(threads - 1)
        ]
        for member in self._members:
            member.start()

    def _serve(self, tid: int) -> None:
        while (work := self._tasks[tid - 1].get()) is not None:
            try:
                work(tid)
            except BaseException as err:  # noqa: BLE001 - handed to the caller of run
                self._done.put(err)
            else:
                self._done.put(None)

    def run(self, work: Work, threads: int | None = None) -> None:
        """Call ``work(tid)`` on the first ``threads`` (or all), and wait for them.

        The caller is tid 0.
        """
        tasks = self._tasks[: (threads or self.threads) - 1]
        for task in tasks:
            task.put(work)
        try:
            work(0)
        finally:
            failures = [err for _ in tasks if (err := self._done.get()) is not None]
        if failures:
            raise failures[0]

    def close(self) -> None:
        """End the threads; the team cannot run again."""
        for task in self._tasks:
            task.put(None)
        for member in self._members:
            member.join()
        self._tasks, self._members = [], []

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()
