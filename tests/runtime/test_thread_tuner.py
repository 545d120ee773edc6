"""The choice of threads while decoding, on made-up times."""

from __future__ import annotations

from collections.abc import Callable

from edgeq.runtime.thread_tuner import ThreadTuner


def run(pace: ThreadTuner, tokens: int, cost: Callable[[int], float]) -> dict[int, int]:
    """Decode so many tokens, ``cost(threads)`` seconds each: tokens done with each count."""
    done: dict[int, int] = {}
    while tokens > 0:
        threads, burst = pace.next(tokens)
        assert 1 <= burst <= tokens
        pace.record(threads, burst, burst * cost(threads))
        done[threads] = done.get(threads, 0) + burst
        tokens -= burst
    return done


def test_one_thread_is_never_questioned() -> None:
    assert run(ThreadTuner(1), 1000, lambda _: 0.01) == {1: 1000}


def test_all_threads_where_they_help() -> None:
    done = run(ThreadTuner(4), 2000, lambda threads: 0.02 / threads)
    assert done[4] > 0.95 * 2000


def test_fewer_where_one_core_spends_the_bandwidth() -> None:
    done = run(ThreadTuner(2), 2000, lambda threads: 0.02 if threads == 1 else 0.03)
    assert done[1] > 0.96 * 2000


def test_a_busy_neighbor_is_noticed_and_forgotten() -> None:
    pace = ThreadTuner(2)
    run(pace, 500, lambda threads: 0.02 / threads)
    busy = run(pace, 500, lambda threads: 0.02 if threads == 1 else 0.05)
    assert busy[1] > 0.9 * 500
    quiet = run(pace, 1000, lambda threads: 0.02 / threads)
    assert quiet[2] > 0.8 * 1000


def test_the_first_burst_counts_for_nothing() -> None:
    pace = ThreadTuner(2)
    threads, burst = pace.next(100)
    pace.record(threads, burst, 10.0)  # reading pages from disk
    assert run(pace, 1000, lambda n: 0.02 / n)[2] > 0.9 * 1000
