"""Threads that get compiled work without Python: nobody is forgotten, asleep or awake."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable

import pytest

from edgeq.core.errors import EdgeqError, UsageError
from edgeq.runtime import thread_pool as module
from edgeq.runtime.thread_pool import ThreadPool

KIND = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * 4)
"""The convention of compiled functions: room for a result and an error, arguments, a number."""


def job(work: Callable[[int, int], int]) -> tuple[object, int]:
    """A Python function (first argument, tid) -> status as one by address; keep the first."""
    held = KIND(lambda _result, _error, value, tid: work(value, tid))
    return held, ctypes.cast(held, ctypes.c_void_p).value or 0


@pytest.fixture(params=[0, 20_000, 50_000_000], ids=["asleep", "dozing", "awake"])
def spin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(module, "SPIN_NS", request.param)
    monkeypatch.setattr(module, "available_cores", lambda: 64)
    return int(request.param)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_thread_does_every_job_once(threads: int, spin: int) -> None:
    seen: list[tuple[int, int]] = []
    held, address = job(lambda value, tid: seen.append((value, tid)) or 0)
    with ThreadPool(threads) as pool:
        for value in range(400):
            pool.call(address, value)
            if value % 40 == 0:
                time.sleep(0.002)  # some lie down in between
            # what was posted is done when call returns
            assert sorted(seen) == [(value, tid) for tid in range(threads)]
            seen.clear()
    assert held


def test_some_threads_take_part_and_the_others_do_not(spin: int) -> None:
    seen: list[tuple[int, int]] = []
    held, address = job(lambda value, tid: seen.append((value, tid)) or 0)
    with ThreadPool(4) as pool:
        for value in range(200):
            count = 1 + value % 4
            pool.call(address, value, count)
            assert sorted(seen) == [(value, tid) for tid in range(count)]
            seen.clear()
    assert held


def test_a_failure_is_reported_once(spin: int) -> None:
    held, address = job(lambda value, tid: int(value == 1 and tid == 1))
    with ThreadPool(2) as pool:
        pool.call(address, 0)
        with pytest.raises(EdgeqError, match=r"compiled code failed"):
            pool.call(address, 1)
        pool.call(address, 2)
    assert held


def test_closing_ends_the_threads_and_may_be_repeated(spin: int) -> None:
    before = set(threading.enumerate())
    pool = ThreadPool(3)
    workers = set(threading.enumerate()) - before
    assert len(workers) == 2  # the thread that calls is the third
    assert all(worker.is_alive() for worker in workers)
    pool.close()
    assert not any(worker.is_alive() for worker in workers)
    pool.close()


def test_a_pool_needs_a_thread() -> None:
    with pytest.raises(UsageError, match="threads is 0; use 1 or more"):
        ThreadPool(0)
