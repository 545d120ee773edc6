"""Threads that get compiled work without Python: nobody is forgotten, asleep or awake."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

import pytest

from edgeq.errors import EdgeqError, UsageError
from edgeq.runtime import threads as module
from edgeq.runtime.threads import Team

KIND = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * 4)
"""The convention of compiled functions: room for a result and an error, arguments, a number."""


def job(work: Callable[[int, int], int]) -> tuple[object, int]:
    """A Python function (first argument, tid) -> status as one by address; keep the first."""
    held = KIND(lambda _room, _error, args, tid: work(ctypes.c_int64.from_address(args).value, tid))
    return held, ctypes.cast(held, ctypes.c_void_p).value or 0


@pytest.fixture(params=[0, 20_000, 50_000_000], ids=["asleep", "dozing", "awake"])
def linger(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(module, "LINGER_NS", request.param)
    monkeypatch.setattr(module, "available_cores", lambda: 64)
    return int(request.param)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_thread_does_every_job_once(threads: int, linger: int) -> None:
    seen: list[tuple[int, int]] = []
    held, address = job(lambda value, tid: seen.append((value, tid)) or 0)
    with Team(threads) as team:
        for value in range(400):
            team.call(address, [value])
            if value % 40 == 0:
                time.sleep(0.002)  # some lie down in between
            # what was posted is done when call returns
            assert sorted(seen) == [(value, tid) for tid in range(threads)]
            seen.clear()
    assert held


def test_some_threads_take_part_and_the_others_do_not(linger: int) -> None:
    seen: list[tuple[int, int]] = []
    held, address = job(lambda value, tid: seen.append((value, tid)) or 0)
    with Team(4) as team:
        for value in range(200):
            count = 1 + value % 4
            team.call(address, [value], count)
            assert sorted(seen) == [(value, tid) for tid in range(count)]
            seen.clear()
    assert held


def test_a_failure_is_told_once(linger: int) -> None:
    held, address = job(lambda value, tid: int(value == 1 and tid == 1))
    with Team(2) as team:
        team.call(address, [0])
        with pytest.raises(EdgeqError, match=r"compiled code failed; its arguments were \[1\]"):
            team.call(address, [1])
        team.call(address, [2])
    assert held


def test_closing_ends_the_threads_and_may_be_repeated(linger: int) -> None:
    team = Team(3)
    members = list(team._members)
    assert all(member.is_alive() for member in members)
    team.close()
    assert not any(member.is_alive() for member in members)
    team.close()


def test_a_team_needs_a_thread() -> None:
    with pytest.raises(UsageError, match="threads is 0; use 1 or more"):
        Team(0)
