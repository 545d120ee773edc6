"""Observers: ranges of known samples, and of ONNX Runtime's calibrators on the same ones."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest

from edgeq.core.errors import FormatError, UsageError
from edgeq.quant.histogram import MAX_BINS, Histogram, squared_errors
from edgeq.quant.observers import (
    OBSERVERS,
    Entropy,
    LeastSquares,
    MinMax,
    MovingAverage,
    Percentile,
    observer_named,
)

Batches = list[np.ndarray]


def batches(kind: str, n: int = 20001, count: int = 6) -> Batches:
    """Pieces of samples whose range grows from piece to piece."""
    rng = np.random.default_rng(len(kind))
    draw = {
        "normal": lambda i: rng.normal(size=n),
        "laplace": lambda i: rng.laplace(size=n),
        "heavy": lambda i: rng.standard_t(4, size=n),
        "gated": lambda i: np.maximum(rng.normal(size=n), 0) * rng.normal(size=n),
        "off center": lambda i: 0.3 * rng.normal(size=n) + 1 + 0.5 * i,
        "one sided": lambda i: np.maximum(rng.normal(size=n) * (1 + 0.2 * i), 0),
    }[kind]
    return [draw(i).astype(np.float32) for i in range(count)]


KINDS = ("normal", "laplace", "heavy", "gated", "off center", "one sided")


def fed(observer: Any, pieces: Batches) -> Any:
    for piece in pieces:
        observer.add(piece)
    return observer


def theirs(method: str, bins: int, pieces: Batches) -> tuple[float, float]:
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    collector = calibrate.HistogramCollector(method, False, bins, 128, 99.99, "same")
    with contextlib.redirect_stdout(io.StringIO()):
        for piece in pieces:
            collector.collect({"x": [piece]})
        low, high = collector.compute_collection_result()["x"][:2]
    return float(low), float(high)


@pytest.mark.parametrize("bins", [512, 2048])
@pytest.mark.parametrize("kind", KINDS)
def test_percentile_is_onnxruntime_s(kind: str, bins: int) -> None:
    pieces = batches(kind)
    got = fed(Percentile(percentile=99.99, bins=bins), pieces).range()
    low, high = theirs("percentile", bins, pieces)
    # equal but for zero, which is always in ours
    assert got == pytest.approx((min(low, 0), max(high, 0)), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("bins", [512, 1024])
@pytest.mark.parametrize("kind", KINDS)
def test_entropy_is_onnxruntime_s(kind: str, bins: int) -> None:
    pieces = batches(kind, n=2001, count=4)
    got = fed(Entropy(bins=bins), pieces).range()
    low, high = theirs("entropy", bins, pieces)
    assert got == pytest.approx((min(low, 0), max(high, 0)), rel=1e-6, abs=1e-6)


def test_minmax_is_the_whole_range_and_zero() -> None:
    pieces = [np.array([[0.5, -2.0]], np.float32), np.array([3.0], np.float32), np.empty(0, "f4")]
    assert fed(MinMax(), pieces).range() == (-2.0, 3.0)
    assert fed(MinMax(), [np.array([2.0, 3.0], np.float32)]).range() == (0.0, 3.0)
    assert fed(MinMax(), [np.array([-2.0, -3.0], np.float32)]).range() == (-3.0, 0.0)


def test_moving_average_by_hand() -> None:
    pieces = [np.array(p, np.float32) for p in ([-1, 2], [-3, 4], [-1, 2])]
    low, high = fed(MovingAverage(constant=0.5), pieces).range()
    assert (low, high) == (-1.5, 2.5)
    assert fed(MovingAverage(constant=1.0), pieces).range() == (-1.0, 2.0)
    spiked = fed(MovingAverage(), [*pieces, np.array([100], np.float32)]).range()
    assert 2 < spiked[1] < 20


def test_percentile_keeps_its_part() -> None:
    for kind in KINDS:
        pieces = batches(kind)
        low, high = fed(Percentile(percentile=99.0), pieces).range()
        x = np.concatenate(pieces)
        outside = np.mean((x < low) | (x > high))
        assert 0.003 < outside < 0.013, kind
    everything = fed(Percentile(percentile=100), batches("normal")).range()
    widest = fed(MinMax(), batches("normal")).range()
    assert everything == pytest.approx(widest, rel=0.01)


def rounding_error(x: np.ndarray, low: float, high: float) -> float:
    step = (high - low) / 255
    zero = np.rint(-low / step)
    codes = np.clip(np.rint(x / step) + zero, 0, 255)
    return float(np.mean((x - (codes - zero) * step) ** 2))


@pytest.mark.parametrize("kind", KINDS)
def test_mse_is_the_best_of_all(kind: str) -> None:
    """No range of a finer search, on the samples themselves, is better by more than 3 %."""
    pieces = batches(kind, n=4001)
    x = np.concatenate(pieces).astype(np.float64)
    low, high = fed(LeastSquares(), pieces).range()
    got = rounding_error(x, low, high)
    whole = fed(MinMax(), pieces).range()
    parts = np.linspace(0.1, 1.0, 28)
    tried = [
        rounding_error(x, whole[0] * a, whole[1] * b)
        for a in (parts if whole[0] else [0.0])
        for b in (parts if whole[1] else [0.0])
    ]
    assert got <= 1.03 * min(tried)
    for name in ("minmax", "entropy", "percentile"):
        assert got <= 1.03 * rounding_error(x, *fed(observer_named(name), pieces).range())


def test_mse_without_outliers_keeps_the_range() -> None:
    x = np.random.default_rng(0).uniform(-1, 3, 50000).astype(np.float32)
    low, high = fed(LeastSquares(), [x]).range()
    assert (low, high) == pytest.approx((-1, 3), rel=0.02)


def test_mse_cuts_an_outlier_off_where_that_pays() -> None:
    x = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    x[0] = 40
    assert fed(LeastSquares(levels=15), [x]).range()[1] < 5
    x[:20000] = 40  # no outlier any more
    assert fed(LeastSquares(levels=15), [x]).range()[1] > 30


def test_squared_error_of_a_histogram_is_that_of_its_samples() -> None:
    """Against plain rounding of samples spread evenly over the bins."""
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 5, 64)
    edges = np.linspace(-2, 2, 65)
    histogram = Histogram(64)
    middles = np.repeat((edges[1:] + edges[:-1]) / 2, counts)
    histogram.add(np.array([-2, 2], np.float32))  # so wide is the first piece
    histogram.add(middles.astype(np.float32))
    counts[[0, -1]] += 1
    spread = (np.arange(2000) + 0.5) / 2000
    for ends in ((-2.0, 2.0), (-0.5, 1.7), (0.0, 0.3), (-1.0, 0.0)):
        step = (ends[1] - ends[0]) / 15
        lowest = np.rint(ends[0] / step)
        total = 0.0
        for count, start in zip(counts, edges, strict=False):
            x = start + spread * (edges[1] - edges[0])
            level = np.clip(np.rint(x / step), lowest, lowest + 15)
            total += count * np.mean((x - level * step) ** 2)
        assert squared_errors(histogram, [ends], 15) == pytest.approx([total], rel=1e-4)


def test_a_histogram_counts_as_if_it_had_known_its_range() -> None:
    pieces = batches("off center")
    h = fed(Histogram(256), pieces)
    x = np.concatenate(pieces)
    assert h.counts.sum() == x.size
    assert (h.low, h.high) == (x.min(), x.max())
    want = np.histogram(x.astype(np.float64), h.edges())[0]
    # samples at an edge may be counted on either side of it
    assert np.abs(h.counts - want).sum() <= 1e-3 * x.size


def test_a_histogram_stays_bounded() -> None:
    rng = np.random.default_rng(2)
    pieces = [(rng.normal(size=999) * 10.0**p).astype(np.float32) for p in range(-9, 9)]
    h = fed(Histogram(), pieces)
    assert h.counts.size <= MAX_BINS
    assert h.counts.size % 2 == 0
    assert h.counts.sum() == 18 * 999
    assert h.limit >= np.abs(np.concatenate(pieces)).max()
    x = np.concatenate(pieces)
    middle = h.counts.size // 2
    assert h.counts[:middle].sum() == pytest.approx((x < 0).sum(), abs=2)
    for name in OBSERVERS:
        low, high = fed(observer_named(name), pieces).range()
        assert x.min() <= low <= 0 <= high <= x.max()


@pytest.mark.parametrize("name", OBSERVERS)
def test_corner_cases(name: str) -> None:
    def new() -> Any:
        return observer_named(name)

    with pytest.raises(UsageError, match="nothing was observed"):
        new().range()
    zeros = np.zeros((3, 4), np.float32)
    assert fed(new(), [zeros]).range() == (0, 0)
    low, high = fed(new(), [zeros, np.linspace(-1, 2, 999, dtype=np.float32), zeros[:0]]).range()
    assert low <= 0 < high <= 2
    assert type(low) is type(high) is float
    for tiny in (1e-29, 1e-31, 1e-44):
        low, high = fed(new(), [np.full(9, tiny, np.float32)]).range()
        assert low <= 0 <= high <= 1.01 * tiny
        low, high = fed(new(), [np.full(9, tiny, "f4"), np.linspace(0, 1, 999, dtype="f4")]).range()
        assert 0.09 < high <= 1
    assert str(fed(new(), [np.ones(9, np.float32)]).range()[0]) == "0.0"  # and not -0.0
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(FormatError, match="must be finite"):
            new().add(np.array([1, bad], np.float32))


def test_options_out_of_range() -> None:
    with pytest.raises(UsageError, match="did you mean 'percentile'"):
        observer_named("percentil")
    for wrong in (
        lambda: Percentile(percentile=101),
        lambda: MovingAverage(constant=0),
        lambda: Histogram(bins=7),
        lambda: LeastSquares(levels=0),
    ):
        with pytest.raises(UsageError, match="is"):
            wrong()
