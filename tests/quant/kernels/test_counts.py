"""Compiled histograms and errors of rounding, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from edgeq.quant.kernels.counts import count_in_bins, rounding_sums

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("bins", [2, 7, 2048, 8192])
@pytest.mark.parametrize("edge", [1e-30, 0.3, 1.0, 7e6])
def test_counts_are_those_of_numpy(bins: int, edge: float) -> None:
    edges = np.linspace(-edge, edge, bins + 1, dtype=np.float32)
    x = (RNG.normal(size=(3, 2001)) * edge / 2).astype(np.float32)
    x[0, : len(edges)] = edges[: x.shape[1]]  # values on edges, and right below and above
    x[1, : len(edges)] = np.nextafter(edges, np.float32(np.inf))[: x.shape[1]]
    x[2, : len(edges)] = np.nextafter(edges, np.float32(-np.inf))[: x.shape[1]]
    counts = np.ones(bins, np.int64)
    count_in_bins(x, edges, counts)
    np.testing.assert_array_equal(counts - 1, np.histogram(x, edges)[0])


def test_nothing_is_counted_of_nothing() -> None:
    counts = np.zeros(4, np.int64)
    count_in_bins(np.zeros((0, 3), np.float32), np.linspace(-1, 1, 5, dtype=np.float32), counts)
    assert not counts.any()


@pytest.mark.parametrize("bins", [1, 2, 3, 7, 8, 9, 172])
@pytest.mark.parametrize("levels", [3, 255])
def test_sums_are_those_of_numpy(bins: int, levels: int) -> None:
    counts = RNG.integers(0, 9, bins).astype(np.float64)
    lower = np.sort(RNG.normal(size=bins))
    upper = lower + 0.01
    ranges = [(-1.0, 1.0), (-0.2, 3.0), (0.0, 0.5), (-2.0, 0.0)]
    want = []
    for low, high in ranges:
        step = (high - low) / levels
        least = np.rint(low / step)

        def integral(u: np.ndarray, least: float = least) -> np.ndarray:
            inside = np.clip(u, least - 0.5, least + levels + 0.5)
            nearest = np.clip(np.rint(inside), least, least + levels)
            return nearest / 12 + (u - nearest) ** 3 / 3

        want.append(counts @ (integral(upper / step) - integral(lower / step)))
    np.testing.assert_allclose(rounding_sums(counts, lower, upper, ranges, levels), want, 1e-9)
