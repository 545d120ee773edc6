"""A pool of threads that run the same compiled function side by side.

The threads are Python's, but Python code runs only when they start and end: compiled code gives
them their work and waits for it (`edgeq.runtime.kernels.thread_pool`), without the
interpreter lock.
"""

from __future__ import annotations

import threading
from types import TracebackType

import numpy as np

from edgeq.core.cpu import available_cores
from edgeq.core.errors import EdgeqError, UsageError
from edgeq.runtime.kernels import pool_functions
from edgeq.runtime.kernels.abi import JOB, WORKER

SPIN_NS = 1_000_000
"""How long a thread spins for more work before it sleeps: longer than sampling a token takes, and
too short to matter for a battery."""


class ThreadPool:
    """``threads`` - 1 waiting threads and the caller.

    Args:
        threads: at least 1.
    """

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise UsageError(f"threads is {threads}; use 1 or more")
        self.threads = threads
        raw = np.zeros(JOB.itemsize + WORKER.itemsize * (threads + 1), np.uint8)
        start = -raw.ctypes.data % WORKER.itemsize
        self._job = raw[start : start + JOB.itemsize].view(JOB)[0]
        self._address = raw.ctypes.data + start
        self._memory = raw
        init, self._run, self._worker = pool_functions()
        init(self._address, threads)
        self._workers = [
            threading.Thread(target=self._serve, args=(tid,), name=f"edgeq-{tid}", daemon=True)
            for tid in range(1, threads)
        ]
        for worker in self._workers:
            worker.start()

    def _serve(self, tid: int) -> None:
        # with fewer cores than threads, spinning would take the core that the work needs
        self._worker(self._address, tid, SPIN_NS if self.threads <= available_cores() else 0)

    def call(self, function: int, args: int, threads: int | None = None) -> None:
        """Call a compiled function on the first ``threads`` (or all), and wait for them.

        Args:
            function: its address; it is called with ``args`` and a thread's number, in Numba's
                calling convention. The caller is number 0.
            args: the address of what all of them get.
            threads: how many take part.

        Raises:
            EdgeqError: the function failed.
        """
        self._job["function"], self._job["args"] = function, args
        if self._run(self._address, threads or self.threads):
            raise EdgeqError("compiled code failed; please report it with the model and the prompt")

    def close(self) -> None:
        """End the threads; the pool cannot run again."""
        if self._workers:
            self.call(0, 0)
        for worker in self._workers:
            worker.join()
        self._workers = []

    def __enter__(self) -> ThreadPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()
