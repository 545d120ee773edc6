"""A team of threads that run the same compiled function side by side.

The threads are Python's, but Python is touched only when they start and end: compiled code hands
them their work and waits for it (`edgeq.runtime.kernels.desks`), without the interpreter lock.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType

import numpy as np

from edgeq.cpu import available_cores
from edgeq.errors import EdgeqError, UsageError
from edgeq.runtime.kernels import crew
from edgeq.runtime.kernels.plan import J_ARGS, J_DESK, J_DESKS, J_FUNCTION

LINGER_NS = 1_000_000
"""How long a thread looks out for more work before it sleeps: longer than drawing a token from the
logits takes, and short beside anything that a battery would feel."""


class Team:
    """``threads`` - 1 waiting threads and the caller.

    Args:
        threads: at least 1.
    """

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise UsageError(f"threads is {threads}; use 1 or more")
        self.threads = threads
        self._raw = np.zeros(J_DESKS + J_DESK * (threads + 1), np.uint8)
        start = -self._raw.ctypes.data % J_DESK
        self._job = self._raw.ctypes.data + start
        self._fields = self._raw[start : start + J_DESKS].view(np.int64)
        hire, self._lead, self._serve = crew()
        hire(self._job, threads)
        self._members = [
            threading.Thread(target=self._live, args=(tid,), name=f"edgeq-{tid}", daemon=True)
            for tid in range(1, threads)
        ]
        for member in self._members:
            member.start()

    def _live(self, tid: int) -> None:
        # with fewer cores than threads, looking out would take the core the work needs
        self._serve(self._job, tid, LINGER_NS if self.threads <= available_cores() else 0)

    def call(self, function: int, args: Sequence[int], threads: int | None = None) -> None:
        """Call a compiled function on the first ``threads`` (or all), and wait for them.

        Args:
            function: its address; it is called with the address of ``args`` as int64 and a
                thread's number, in Numba's calling convention. The caller is number 0.
            args: what all of them get.
            threads: how many take part.

        Raises:
            EdgeqError: the function failed.
        """
        values = np.array(args, np.int64)
        self._fields[J_FUNCTION // 8], self._fields[J_ARGS // 8] = function, values.ctypes.data
        if self._lead(self._job, threads or self.threads):
            raise EdgeqError(f"compiled code failed; its arguments were {list(args)}")

    def close(self) -> None:
        """End the threads; the team cannot run again."""
        if self._members:
            self.call(0, ())
        for member in self._members:
            member.join()
        self._members = []

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()
