from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.core.errors import FormatError, SchemeError
from edgeq.formats.schemes import QuantScheme, parse_scheme
from edgeq.formats.tensor import bf16_to_float32
from edgeq.quant.rounders.qparams import (
    MAX_SCALE,
    MIN_SCALE,
    WeightParams,
    check_finite,
    from_range,
    round_steps,
    snap_scales,
    to_codes,
)


def scheme_of(text: str) -> QuantScheme:
    scheme = parse_scheme(text)
    assert isinstance(scheme, QuantScheme)
    return scheme


def lattice() -> np.ndarray:
    """Every positive number that float16 and bfloat16 share."""
    every = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    return every[(every.view(np.uint32) & 0xFFFF) == 0].astype(np.float64)


LATTICE = lattice()


def test_the_ends_of_the_lattice() -> None:
    assert LATTICE[0] == MIN_SCALE
    assert LATTICE[-1] == MAX_SCALE


@settings(max_examples=300, deadline=None)
@given(st.floats(0, 65000, width=32))
def test_scales_are_on_the_lattice_and_near(ideal: float) -> None:
    near = float(snap_scales(np.array([ideal], np.float32))[0])
    assert near in LATTICE
    above = float(snap_scales(np.array([ideal], np.float32), up=True)[0])
    assert above in LATTICE
    assert above >= ideal
    best = LATTICE[np.argmin(np.abs(LATTICE - ideal))]
    # two roundings, to bfloat16 and then to float16, may miss the nearest subnormal by a step
    slack = 1.0 if ideal >= 2.0**-14 else 2.0
    assert abs(near - ideal) <= slack * abs(best - ideal) + 2.0**-24 * (slack - 1)
    assert above == LATTICE[np.searchsorted(LATTICE, ideal)]


def test_every_lattice_point_stays() -> None:
    points = LATTICE.astype(np.float32)
    assert np.array_equal(snap_scales(points), points)
    assert np.array_equal(snap_scales(points, up=True), points)
    assert np.array_equal(points.astype(np.float16).astype(np.float32), points)
    assert np.array_equal(bf16_to_float32((points.view(np.uint32) >> 16).astype(np.uint16)), points)


def test_tiny_scales_become_the_smallest() -> None:
    tiny = np.array([0, 1e-45, 1e-30, 1e-9], np.float32)
    assert (snap_scales(tiny) == MIN_SCALE).all()
    assert (snap_scales(-tiny[1:]) == -MIN_SCALE).all()
    assert (snap_scales(-tiny[:1]) == MIN_SCALE).all()  # there is no negative zero


def test_negative_scales_are_the_mirrored_ones() -> None:
    points = np.random.default_rng(0).lognormal(-6, 3, 500).astype(np.float32)
    assert np.array_equal(snap_scales(-points), -snap_scales(points))
    with pytest.raises(SchemeError, match=r"needs a scale of 65500.*ends at 65504"):
        snap_scales(np.array([-65500], np.float32))


@pytest.mark.parametrize("ideal", [65500.0, 1e6, np.inf])
def test_scales_beyond_float16_are_refused_by_name(ideal: float) -> None:
    with pytest.raises(SchemeError, match=r"tensor blk\.w needs a scale of .* keep it floating"):
        snap_scales(np.array([1, ideal], np.float32), "blk.w")


@pytest.mark.parametrize(
    ("text", "low", "high", "scale", "zero"),
    [
        ("w4-g32", -8.0, 3.0, 1.0, None),
        ("w4-g32", -1.0, 7.0, 1.0, None),
        ("w2-g32", -2.0, 0.0, 1.0, None),
        ("w3-g32", 0.0, 3.0, 1.0, None),
        ("w8-g32", -127.0, 5.0, 1.0, None),
        ("w8-g32", -5.0, 127.0, 1.0, None),
        ("w4-g32-asym", -5.0, 10.0, 1.0, 5),
        ("w4-g32-asym", 0.0, 15.0, 1.0, 0),
        ("w4-g32-asym", -15.0, 0.0, 1.0, 15),
        ("w2-g16", -1.0, 2.0, 1.0, 1),
        ("w8-g32-asym", -55.0, 200.0, 1.0, 55),
        ("w4-g32", 0.0, 0.0, MIN_SCALE, None),
        ("w4-g32-asym", 0.0, 0.0, MIN_SCALE, 0),
    ],
)
def test_ranges_to_parameters(
    text: str, low: float, high: float, scale: float, zero: int | None
) -> None:
    params = from_range(
        np.array([[low]], np.float32), np.array([[high]], np.float32), scheme_of(text)
    )
    assert params.scales.tolist() == [[scale]]
    assert (None if params.zero_points is None else params.zero_points.tolist()) == (
        None if zero is None else [[zero]]
    )


def test_a_palette_spans_its_group() -> None:
    table = np.array([-100, -20, 15, 127], np.int8)
    low, high = np.array([[-0.3, -12.7]], np.float32), np.array([[12.7, 0.5]], np.float32)
    params = from_range(low, high, scheme_of("w2-g16-palette"), "x", table)
    assert params.scales.tolist() == [[pytest.approx(0.1, rel=2**-8)] * 2]
    assert params.palette is table


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(-127, 127), min_size=16, max_size=16),
    st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=60),
)
def test_the_nearest_of_a_palette(table: list[int], values: list[float]) -> None:
    palette = np.array(sorted(table), np.int8)
    steps = np.array(values, np.float32)
    got = round_steps(steps, scheme_of("w4-g32-palette"), None, palette, out=np.empty_like(steps))
    distance = np.abs(steps[:, None].astype(np.float64) - palette).min(axis=1)
    assert (np.abs(got - steps.astype(np.float64)) == distance).all()
    params = WeightParams(np.ones((1, 1), np.float32), None, palette)
    codes = to_codes(got[None, None], params, scheme_of("w4-g32-palette"))
    assert np.array_equal(palette[codes[0]], got)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_bad_weight_is_named(bad: float) -> None:
    w = np.zeros((4, 5), np.float32)
    check_finite(w, "x")
    w[2, 3] = w[3, 0] = bad
    with pytest.raises(FormatError, match=rf"tensor a\.weight holds {bad} at \[102, 3\]"):
        check_finite(w, "a.weight", 100)
    with pytest.raises(FormatError, match=r"at \[3\]"):
        check_finite(w[2], "norm")
