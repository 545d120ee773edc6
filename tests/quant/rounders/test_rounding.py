from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, SchemeError, UsageError
from edgeq.formats.schemes import BITS, QuantScheme, parse_scheme
from edgeq.formats.tensor import QuantTensor
from edgeq.quant import METHODS, quantize_tensor
from edgeq.quant.rounders.qparams import group_view
from edgeq.quant.rounders.rounding import METHOD_INPUTS, find_shared, round_rows, sqnr_db

TEXTS = (
    *(f"w{b}-{g}{s}" for b in BITS for g in ("g16", "g32", "channel", "tensor")
      for s in ("-sym", "-asym")),
    "w4-g64", "w4-g128", "w4-g256", "w3-g256-asym",
)  # fmt: skip
PLAIN = [method for method in METHODS if method not in METHOD_INPUTS]
SIZES = (1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 64, 65, 100, 172)


def scheme_of(text: str) -> QuantScheme:
    scheme = parse_scheme(text)
    assert isinstance(scheme, QuantScheme)
    return scheme


def weights(n: int, k: int, seed: int = 0, heavy: bool = False) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    w = rng.standard_t(3, (n, k)) if heavy else rng.standard_normal((n, k))
    return (w * 0.02).astype(np.float32)


def slow_snap(ideal: float, up: bool) -> float:
    """To 8 significant bits, then to a whole number of 2**-24: by exact arithmetic on floats."""
    if ideal <= 0:
        return 2.0**-24
    to_whole = math.ceil if up else round  # Python rounds ties to even
    step = 2.0 ** (math.frexp(ideal)[1] - 8)
    snapped = to_whole(ideal / step) * step
    snapped = to_whole(snapped / 2.0**-24) * 2.0**-24 if snapped < 2.0**-14 else snapped
    return max(snapped, 2.0**-24)


def slow_rtn(
    w: NDArray[np.float32], scheme: QuantScheme
) -> tuple[NDArray[np.uint8], NDArray[np.float64], NDArray[np.uint8] | None]:
    """Codes, scales and zero points, one group after another, in plain loops."""
    n, k = w.shape
    size = scheme.group_size or k
    codes = np.zeros((n, k), np.uint8)
    groups = scheme.n_groups(k)
    scales, zeros = np.full((n, groups), 2.0**-24), np.zeros((n, groups), np.uint8)
    low_all, high_all = min(0.0, float(w.min())), max(0.0, float(w.max()))
    f32 = np.float32
    for i in range(n):
        for g in range(groups):
            part = w[i, g * size : (g + 1) * size]
            low, high = low_all, high_all
            if scheme.granularity != "tensor":
                low, high = min([0.0, *part.tolist()]), max([0.0, *part.tolist()])
            top = (1 << scheme.bits) - 1
            if scheme.symmetric:
                most, least = top // 2, -(top // 2) - (0 if scheme.bits == 8 else 1)
                ideal = max(float(f32(high) / f32(most)), float(f32(low) / f32(least)))
                scale, zero = slow_snap(ideal, up=False), top // 2 + 1
                bottom = 1 if scheme.bits == 8 else 0
            else:
                ideal = float((f32(high) - f32(low)) / f32(top))
                scale = slow_snap(ideal, up=scheme.bits == 8)
                zero = min(max(round(float(f32(-low) / f32(scale))), 0), top)
                bottom = 0
            scales[i, g], zeros[i, g] = scale, zero
            for j, value in enumerate(part):
                level = round(float(value / f32(scale)))
                codes[i, g * size + j] = min(max(level + zero, bottom), top)
    return codes, scales, None if scheme.symmetric else zeros


def check_against_slow(w: NDArray[np.float32], scheme: QuantScheme) -> None:
    got = quantize_tensor(w, scheme, "rtn")
    codes, scales, zeros = slow_rtn(w, scheme)
    assert np.array_equal(got.codes(), codes)
    got_scales, got_zeros = got.row_params()
    assert np.array_equal(got_scales, scales)
    if zeros is not None:
        assert np.array_equal(got_zeros, zeros)


@pytest.mark.parametrize("text", TEXTS)
def test_rtn_is_what_plain_loops_give(text: str) -> None:
    check_against_slow(weights(19, 100), scheme_of(text))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(TEXTS), st.sampled_from(SIZES), st.sampled_from(SIZES),
    st.integers(0, 2**31), st.sampled_from([1e-7, 1e-3, 1.0, 3e4]),
)  # fmt: skip
def test_rtn_on_awkward_shapes_and_sizes(text: str, n: int, k: int, seed: int, size: float) -> None:
    w = weights(min(n, 33), k, seed, heavy=True) * np.float32(size)
    check_against_slow(w, scheme_of(text))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.37, 1e-12, 7e-8])
def test_constant_and_zero_rows(text: str, value: float) -> None:
    scheme = scheme_of(text)
    w = np.full((3, 40), value, np.float32)
    for method in PLAIN:
        got = quantize_tensor(w, scheme, method)
        scales, _ = got.row_params()
        assert (scales > 0).all()
        assert np.abs(got.numpy() - w).max() <= max(scales.max() / 2, abs(value) * 2**-7)
        if value == 0:
            assert not got.numpy().any()


@pytest.mark.parametrize("text", TEXTS)
def test_rounding_errs_by_half_a_scale_at_most(text: str) -> None:
    scheme = scheme_of(text)
    w = weights(33, 100, heavy=True)
    got = quantize_tensor(w, scheme)
    scales, zeros = got.row_params()
    size = scheme.group_size or 100
    scale = np.repeat(scales, size, axis=1)[:, :100].astype(np.float64)
    zero = np.repeat(zeros, size, axis=1)[:, :100].astype(np.float64)
    bottom = 1 if scheme.symmetric and scheme.bits == 8 else 0
    lowest, highest = (bottom - zero) * scale, (scheme.n_codes - 1 - zero) * scale
    inside = (w >= lowest) & (w <= highest)
    error = np.abs(got.numpy() - w.astype(np.float64)) / scale
    assert inside.mean() > 0.8
    assert error[inside].max() <= 0.5 + 1e-4
    # what lies outside is there by the rounding of scale and zero point only
    assert error.max() <= (0.5 + (scheme.n_codes - 1) * 2**-8 if scheme.bits < 8 else 1.01)


@pytest.mark.parametrize("text", [t for t in TEXTS if not t.endswith("asym")])
def test_symmetric_codes_stay_on_their_side(text: str) -> None:
    scheme = scheme_of(text)
    codes = quantize_tensor(weights(32, 96, heavy=True), scheme).codes()
    assert codes.max() <= scheme.n_codes - 1
    assert codes.min() >= (1 if scheme.bits == 8 else 0)
    # a negated row has the mirrored codes wherever neither end is cut
    w = weights(16, 64)
    plus, minus = quantize_tensor(w, scheme), quantize_tensor(-w, scheme)
    if scheme.bits == 8:
        both = plus.codes().astype(int) + minus.codes()
        assert (both == 2 * scheme.mid).all()


def group_errors(w: NDArray[np.float32], tensor: QuantTensor) -> NDArray[np.float64]:
    n, k = w.shape
    size = tensor.scheme.group_size or k
    error = np.zeros((n, tensor.scheme.padded_k(k) if tensor.scheme.group_size else k))
    error[:, :k] = (tensor.numpy() - w.astype(np.float64)) ** 2
    sums = error.reshape(n, -1, size).sum(axis=2)
    return sums.sum(keepdims=True) if tensor.scheme.granularity == "tensor" else sums


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(TEXTS), st.sampled_from(SIZES), st.sampled_from(SIZES), st.integers(0, 2**31)
)
def test_mse_is_no_worse_than_rtn_in_any_group(text: str, n: int, k: int, seed: int) -> None:
    scheme, w = scheme_of(text), weights(min(n, 33), k, seed, heavy=True)
    rtn = group_errors(w, quantize_tensor(w, scheme, "rtn"))
    mse = group_errors(w, quantize_tensor(w, scheme, "mse"))
    assert (mse <= rtn * (1 + 1e-4) + 1e-15).all()


@pytest.mark.parametrize(
    ("text", "gain_db"),
    [("w2-g16", 1.0), ("w3-g32", 1.0), ("w4-g32", 0.4), ("w4-channel", 1.5), ("w8-tensor", 0.5)],
)
def test_mse_gains_what_clipping_is_known_to_gain(text: str, gain_db: float) -> None:
    w, scheme = weights(64, 1024), scheme_of(text)
    ratios = [sqnr_db(r.signal, r.noise) for r in (round_rows(w, scheme, m) for m in PLAIN)]
    assert ratios[1] >= ratios[0] + gain_db


def test_mse_is_near_the_best_of_all_scales() -> None:
    w = weights(300, 32)
    got = group_errors(w, quantize_tensor(w, scheme_of("w4-g32"), "mse"))[:, 0]
    best = np.full(300, np.inf)
    for factor in np.linspace(0.6, 1.2, 1500):
        scale = factor * np.abs(w).max(axis=1, keepdims=True).astype(np.float64) / 7
        error = (np.clip(np.rint(w / scale), -8, 7) * scale - w) ** 2
        best = np.minimum(best, error.sum(axis=1))
    assert (got <= 1.2 * best).all()
    assert got.sum() <= 1.01 * best.sum()


def test_mse_survives_an_outlier() -> None:
    w = weights(1, 4096)
    w[0, 7] = 0.4  # twenty times the spread
    rtn, mse = (round_rows(w, scheme_of("w4-channel"), m) for m in PLAIN)
    assert mse.noise < 0.6 * rtn.noise


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("text", ["w4-g32", "w3-g64-asym", "w8-channel", "w4-g256"])
def test_padding_changes_nothing(text: str, method: str) -> None:
    scheme, w = scheme_of(text), weights(17, 70)
    padded = np.zeros((32, 256), np.float32)
    padded[:17, :70] = w
    got, want = quantize_tensor(w, scheme, method), quantize_tensor(padded, scheme, method)
    assert np.array_equal(got.codes(), want.codes(0, 17)[:, :70])
    groups = scheme.n_groups(70)
    assert np.array_equal(got.row_params()[0], want.row_params(0, 17)[0][:, :groups])


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("text", ["w4-g32", "w2-g16", "w8-channel-asym"])
def test_rows_are_independent(text: str, method: str) -> None:
    scheme, w = scheme_of(text), weights(48, 96)
    whole = quantize_tensor(w, scheme, method)
    part = quantize_tensor(w[16:32], scheme, method)
    assert np.array_equal(part.packed, whole.packed[1:2])
    assert np.array_equal(part.scales, whole.scales[1:2])


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("method", PLAIN)
def test_reported_noise_is_the_error_of_the_result(text: str, method: str) -> None:
    w = weights(20, 90)
    got = round_rows(w, scheme_of(text), method)
    error = ((got.packed(scheme_of(text)).numpy() - w.astype(np.float64)) ** 2).sum()
    assert got.noise == pytest.approx(error, rel=1e-3)
    assert got.signal == pytest.approx((w.astype(np.float64) ** 2).sum(), rel=1e-5)


def test_sqnr() -> None:
    assert sqnr_db(100.0, 1.0) == pytest.approx(20)
    assert sqnr_db(1.0, 0.0) is None
    assert sqnr_db(0.0, 0.0) is None


def inputs_square(k: int, seed: int = 0) -> NDArray[np.float32]:
    """Mean squares of inputs, some of them outliers and one never seen."""
    square = np.random.default_rng(seed).lognormal(0, 2, k).astype(np.float32)
    square[k // 2] = 0
    return square


def weighted_group_errors(
    w: NDArray[np.float32], tensor: QuantTensor, square: NDArray[np.float32]
) -> NDArray[np.float64]:
    root = np.sqrt(square.astype(np.float64))
    n, k = w.shape
    size = tensor.scheme.group_size or k
    error = np.zeros((n, tensor.scheme.padded_k(k) if tensor.scheme.group_size else k))
    error[:, :k] = ((tensor.numpy() - w.astype(np.float64)) * root) ** 2
    sums = error.reshape(n, -1, size).sum(axis=2)
    return sums.sum(keepdims=True) if tensor.scheme.granularity == "tensor" else sums


@pytest.mark.parametrize("text", TEXTS)
def test_importance_lowers_the_weighted_error_of_every_group(text: str) -> None:
    w, scheme, square = weights(33, 172, heavy=True), scheme_of(text), inputs_square(172)
    rtn = weighted_group_errors(w, quantize_tensor(w, scheme, "rtn"), square)
    mse = weighted_group_errors(w, quantize_tensor(w, scheme, "mse"), square)
    tensor = quantize_tensor(w, scheme, "imatrix", importance=square)
    got = weighted_group_errors(w, tensor, square)
    assert (got <= rtn * (1 + 1e-4) + 1e-15).all()
    if scheme.bits < 8:
        assert got.sum() < (0.95 if scheme.granularity == "group" else 1.0001) * mse.sum()


@pytest.mark.parametrize("value", [0.0, 1.0, 4.0])
def test_even_importance_is_none(value: float) -> None:
    w, scheme = weights(20, 100), scheme_of("w4-g32")
    even = np.full(100, value, np.float32)
    got = quantize_tensor(w, scheme, "imatrix", importance=even)
    want = quantize_tensor(w, scheme, "mse")
    assert np.array_equal(got.packed, want.packed)
    assert np.array_equal(got.scales, want.scales)


def test_what_rows_share_may_be_found_before() -> None:
    w, square = weights(48, 100, heavy=True), inputs_square(100)
    for text in ("w4-tensor", "w4-g32-palette", "w3-tensor-palette", "w4-g32"):
        scheme = scheme_of(text)
        for method in ("rtn", "mse", "imatrix"):
            known = {"importance": square} if method == "imatrix" else {}
            whole = quantize_tensor(w, scheme, method, **known)
            chunks = [group_view(w[a : a + 16], scheme) for a in (0, 16, 32)]
            shared = find_shared(chunks, scheme, method, 100, **known)
            for i in range(3):
                part = w[16 * i : 16 * i + 16]
                got = round_rows(part, scheme, method, shared=shared, **known).packed(scheme)
                assert np.array_equal(got.packed[0], whole.packed[i])
                assert np.array_equal(got.scales[0], whole.scales[i])
                if whole.palette is not None:
                    assert np.array_equal(got.palette, whole.palette)


def test_rounding_refuses_wrong_arguments() -> None:
    scheme = scheme_of("w4-g32")
    w = weights(4, 32)
    with pytest.raises(UsageError, match="unknown method 'mes'; did you mean 'mse'"):
        quantize_tensor(w, scheme, "mes")
    with pytest.raises(UsageError, match=r"gptq needs the hessian of up.w's inputs.*--calib TEXT"):
        quantize_tensor(w, scheme, "gptq", name="up.w")
    with pytest.raises(UsageError, match=r"imatrix needs the importance of .*--calib TEXT"):
        quantize_tensor(w, scheme, "imatrix")
    with pytest.raises(UsageError, match=r"shape \[31\] and its rows have 32 weights"):
        quantize_tensor(w, scheme, "imatrix", importance=np.ones(31, np.float32))
    with pytest.raises(SchemeError, match=r"tensor norm has shape \[32\]; only matrices"):
        quantize_tensor(w[0], scheme, name="norm")
    with pytest.raises(SchemeError, match="tensor big needs a scale"):
        quantize_tensor(w * np.float32(1e9), scheme, name="big")
    w[1, 2] = np.nan
    with pytest.raises(FormatError, match=r"tensor x holds nan at \[1, 2\]"):
        quantize_tensor(w, scheme, name="x")
