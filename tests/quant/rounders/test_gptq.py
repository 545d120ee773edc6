from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeq.core.errors import SchemeError, UsageError
from edgeq.formats.schemes import QuantScheme, parse_scheme
from edgeq.formats.tensor import QuantTensor
from edgeq.importers import load
from edgeq.quant import quantize_tensor
from edgeq.quant.decoder.calibrate import cut_windows
from edgeq.quant.decoder.replay import Replay
from edgeq.quant.rounders import gptq as module
from edgeq.quant.rounders import hessian as hessian_module
from edgeq.quant.rounders.gptq import Hessian, weighted_error
from edgeq.quant.rounders.gptq_block import Grid, candidates, search
from edgeq.quant.rounders.hessian import Factor, damped
from edgeq.quant.rounders.qparams import snap_scales
from edgeq.runtime.tokenizer import Tokenizer
from tests.paths import DEMO

TEXTS = (
    "w4-g32", "w3-g16", "w2-g16-asym", "w4-g64-asym", "w8-g128", "w4-channel", "w3-channel-asym",
    "w4-tensor", "w4-tensor-asym", "w4-g32-palette", "w3-channel-palette", "w2-tensor-palette",
)  # fmt: skip

Array = NDArray[np.float32]


def scheme_of(text: str) -> QuantScheme:
    scheme = parse_scheme(text)
    assert isinstance(scheme, QuantScheme)
    return scheme


def weights(n: int, k: int, seed: int = 0) -> Array:
    return (np.random.default_rng(seed).standard_normal((n, k)) * 0.05).astype(np.float32)


def inputs(t: int, k: int, seed: int = 1) -> Array:
    """Correlated, and some much larger than others, as a model's are."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((t, k)) @ (0.5 * rng.standard_normal((k, k)) / k**0.5 + np.eye(k))
    return (mixed * rng.lognormal(0, 1, k)).astype(np.float32)


def hessian_of(x: Array) -> Hessian:
    hessian = Hessian(x.shape[1])
    hessian.add(x)
    return hessian


def gptq(w: Array, scheme: QuantScheme, hessian: Hessian, **options: Any) -> QuantTensor:
    return quantize_tensor(w, scheme, "gptq", hessian=hessian, **options)


def errors(w: Array, tensor: QuantTensor, hessian: Hessian) -> NDArray[np.float64]:
    """Each row's, in float64."""
    e = w.astype(np.float64) - tensor.numpy()
    return np.einsum("nk,nk->n", e @ hessian.matrix.astype(np.float64), e)


# --- second moments ---------------------------------------------------------------------------


@pytest.mark.parametrize("strip", [7, 1024])
def test_moments_are_those_of_all_tokens(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian_module, "STRIP", strip)
    x, x_float, shift = inputs(60, 33), inputs(60, 33, 2), weights(60, 5)
    hessian = Hessian(33, crossed=True)
    for part in (slice(0, 1), slice(1, 40), slice(40, 60)):
        hessian.add(x[part], x_float[part], shift[part])
        assert hessian.n == part.stop  # reading in between changes nothing
        assert hessian.matrix.shape == (33, 33)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(hessian.matrix, wide.T @ wide / 60, rtol=1e-4, atol=1e-5)
    assert np.array_equal(hessian.matrix, hessian.matrix.T)
    assert hessian.cross is not None
    np.testing.assert_allclose(hessian.cross, x_float.T @ wide / 60, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(hessian.diagonal, (wide**2).mean(axis=0), rtol=1e-5)
    w, w_hat = weights(9, 33), weights(9, 33, 5)
    want = ((wide @ (w - w_hat).T.astype(np.float64)) ** 2).sum() / 60
    assert weighted_error(w, w_hat, hessian) == pytest.approx(want, rel=1e-4)
    assert weighted_error(w, w_hat, None) == pytest.approx(((w - w_hat) ** 2).sum(), rel=1e-5)


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="width of 31; this Hessian is of 32"):
        Hessian(32).add(inputs(4, 31))
    with pytest.raises(UsageError, match="crossed=True"):
        Hessian(32).add(inputs(4, 32), inputs(4, 32))
    with pytest.raises(UsageError, match="needs the float model's inputs too"):
        Hessian(32, crossed=True).add(inputs(4, 32))


@pytest.mark.parametrize("k", [1, 7, 256, 300, 513])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_factors(k: int, dtype: type[np.floating[Any]]) -> None:
    x = inputs(2 * k + 8, k).astype(np.float64)
    matrix = x.T @ x / len(x)
    factor = Factor.of(matrix.astype(dtype))
    mix = factor.mix.astype(np.float64)
    assert not np.tril(mix, -1).any()
    assert (np.diagonal(mix) == 1).all()
    np.testing.assert_allclose(mix * factor.pivots @ mix.T, matrix, atol=1e-5 * matrix.max())
    solved = factor.solve(weights(3, k)) @ matrix
    np.testing.assert_allclose(solved, weights(3, k), atol=5e-3 * 0.05)


# --- against the textbook ---------------------------------------------------------------------


def textbook(
    w: Array, scheme: QuantScheme, hessian: Hessian, params: QuantTensor | None, order: list[int]
) -> NDArray[np.float64]:
    """Frantar et al.'s algorithm 1 without blocks: column by column, with the inverse Hessian.

    Scales are ``params``' or, without, span the range of a group's weights when it is come to.
    """
    h = hessian.matrix.astype(np.float64)
    inverse = np.linalg.inv(h + 0.01 * np.mean(np.diag(h)) * np.eye(len(h)))
    left, out = w.astype(np.float64), np.zeros(w.shape)
    size = scheme.group_size or w.shape[1]
    top = (1 << scheme.bits) - 1
    for k in order:
        g = k // size
        if params is not None:
            s, z = (p[:, g].astype(np.float64) for p in params.row_params())
        elif k % size == 0:
            part = left[:, k : k + size].astype(np.float32)
            low, high = np.minimum(part.min(axis=1), 0), np.maximum(part.max(axis=1), 0)
            if scheme.symmetric:
                ideal = np.maximum(high / (top // 2), low / -(top // 2 + 1))
                s, z = snap_scales(ideal.astype(np.float32)), np.full(len(w), top // 2 + 1.0)
            else:
                s = snap_scales((high - low) / np.float32(top))
                z = np.clip(np.round(-low / s), 0, top)
            s = s.astype(np.float64)
        out[:, k] = s * (np.clip(np.round(left[:, k] / s) + z, 0, top) - z)
        wrong = (left[:, k] - out[:, k]) / inverse[k, k]
        left -= np.outer(wrong, inverse[k])
        inverse -= np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return out


@pytest.mark.parametrize("text", ["w4-g32", "w3-g16", "w2-g16-asym", "w4-g64-asym"])
@pytest.mark.parametrize("k", [172, 64])
def test_plain_gptq_is_the_textbook_s(text: str, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the search for scales that is ours: each group spans its range."""

    def first(target: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray | None]:
        scales, zeros = candidates(target, grid)
        return scales[:1], None if zeros is None else zeros[:1]

    monkeypatch.setattr(module, "candidates", first)
    monkeypatch.setattr(module, "search", partial(search, refits=0))
    w, scheme, hessian = weights(40, k), scheme_of(text), hessian_of(inputs(600, k))
    got = gptq(w, scheme, hessian, act_order=False, sweeps=0)
    want = textbook(w, scheme, hessian, None, list(range(k)))
    error = weighted_error(w, want.astype(np.float32), hessian)
    assert weighted_error(w, got.numpy(), hessian) == pytest.approx(error, rel=0.01)
    assert (np.abs(got.numpy() - want) < 1e-6).mean() > 0.97


@pytest.mark.parametrize("text", ["w4-tensor", "w3-tensor-asym", "w4-channel", "w3-channel-asym"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("block", [128, 20])
def test_long_rows_are_the_textbook_s(text: str, act_order: bool, block: int) -> None:
    w, scheme, hessian = weights(40, 172), scheme_of(text), hessian_of(inputs(600, 172))
    got = gptq(w, scheme, hessian, act_order=act_order, block=block, sweeps=0)
    order = np.argsort(-hessian.diagonal, kind="stable") if act_order else np.arange(172)
    want = textbook(w, scheme, hessian, got, order.tolist())
    error = weighted_error(w, want.astype(np.float32), hessian)
    assert weighted_error(w, got.numpy(), hessian) == pytest.approx(error, rel=0.01)
    assert (np.abs(got.numpy() - want) < 1e-6).mean() > 0.97


@pytest.mark.parametrize("text", ["w4-g32", "w3-g32", "w2-g16-asym"])
def test_searched_scales_beat_the_textbook_s(text: str) -> None:
    w, scheme, hessian = weights(40, 192), scheme_of(text), hessian_of(inputs(800, 192))
    plain = textbook(w, scheme, hessian, None, list(range(192))).astype(np.float32)
    got = gptq(w, scheme, hessian)
    assert weighted_error(w, got.numpy(), hessian) < 0.85 * weighted_error(w, plain, hessian)


# --- what must hold ---------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("k", [172, 33])
def test_outputs_err_less_than_by_any_other_method(text: str, k: int) -> None:
    w, scheme, hessian = weights(35, k), scheme_of(text), hessian_of(inputs(500, k))
    got = quantize_tensor(w, scheme, "gptq", hessian=hessian)
    assert got.shape == w.shape
    known = {"importance": hessian.diagonal}
    others = [
        quantize_tensor(w, scheme, "rtn"),
        quantize_tensor(w, scheme, "mse"),
        quantize_tensor(w, scheme, "imatrix", **known),
    ]
    least = min(weighted_error(w, other.numpy(), hessian) for other in others)
    assert weighted_error(w, got.numpy(), hessian) < (0.7 if k > 100 else 0.8) * least


def test_no_layer_errs_more_than_rounded_to_nearest() -> None:
    model = load(DEMO)
    tokenizer = Tokenizer(model.files)
    ids = tokenizer.encode((DEMO / "heldout.txt").read_text("utf-8"), add_bos=False)
    windows = cut_windows(ids[:192], context=64, bos=tokenizer.bos).windows
    seen = 0
    for step in Replay(model, windows):
        if step.group.kind == "head":
            continue
        hessian = Hessian(next(iter(step.weights.values())).shape[1])
        for x in step.inputs():
            hessian.add(x)
        scheme = scheme_of(("w4-g32", "w3-g32", "w2-g16-asym")[seen % 3])
        for name, w in step.weights.items():
            got = quantize_tensor(w, scheme, "gptq", hessian=hessian, name=name, sweeps=0)
            rtn = quantize_tensor(w, scheme, "rtn", name=name)
            assert weighted_error(w, got.numpy(), hessian) < 0.9 * weighted_error(
                w, rtn.numpy(), hessian
            )
            seen += 1
    assert seen == 7 * model.config.layers


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(TEXTS), st.sampled_from([1, 2, 15, 17, 31, 32, 33, 65, 100]),
    st.sampled_from([1, 7, 16, 33]), st.integers(1, 90), st.integers(0, 2**31),
)  # fmt: skip
def test_awkward_shapes_and_few_tokens(text: str, k: int, n: int, t: int, seed: int) -> None:
    w, scheme = weights(n, k, seed), scheme_of(text)
    hessian = hessian_of(inputs(t, k, seed))
    damped_hessian = hessian_of(inputs(t, k, seed))
    damped_hessian.matrix[:] = damped(hessian.matrix, 0.01)
    previous = None
    for sweeps in (0, 1, 3):
        got = gptq(w, scheme, hessian, sweeps=sweeps)
        assert got.shape == (n, k)
        now = errors(w, got, damped_hessian)
        if previous is not None:  # no row grows worse
            assert (now <= previous * (1 + 1e-3) + 1e-9).all()
        previous = now


def test_a_row_does_not_depend_on_the_rows_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    w, hessian = weights(50, 100), hessian_of(inputs(300, 100))
    for text in ("w4-g32", "w2-g16-asym", "w3-channel-asym", "w4-tensor", "w3-g32-palette"):
        scheme = scheme_of(text)
        whole = gptq(w, scheme, hessian)
        monkeypatch.setattr(module, "ROWS", 16)
        parts = gptq(w, scheme, hessian)
        monkeypatch.undo()
        assert (whole.codes() == parts.codes()).mean() > 0.99
        total = errors(w, whole, hessian).sum()
        assert errors(w, parts, hessian).sum() == pytest.approx(total, rel=0.01)


def test_the_order_is_by_groups_and_their_inputs() -> None:
    """So the order of groups, and of columns within, makes no difference to what comes out."""
    w, x = weights(20, 96), inputs(400, 96)
    rng = np.random.default_rng(3)
    shuffled = np.concatenate([g * 32 + rng.permutation(32) for g in (2, 0, 1)])
    scheme = scheme_of("w4-g32")
    got = gptq(w, scheme, hessian_of(x)).numpy()[:, shuffled]
    moved = gptq(w[:, shuffled], scheme, hessian_of(x[:, shuffled])).numpy()
    assert (np.abs(moved - got) < 1e-6).mean() > 0.98
    plain = gptq(w, scheme, hessian_of(x), act_order=False).numpy()[:, shuffled]
    assert (np.abs(plain - got) > 1e-6).any()


@pytest.mark.parametrize(
    ("text", "most"), [("w3-g32", 0.9), ("w4-g32", 0.94), ("w4-g64", 0.94), ("w5-g32", 0.98)]
)
def test_signed_scales_lower_the_error(text: str, most: float) -> None:
    scheme, w, hessian = scheme_of(text), weights(96, 192), hessian_of(inputs(800, 192))
    plain = gptq(w, scheme, hessian)
    signed = gptq(w, scheme, hessian, signed_scales=True)
    assert (plain.row_params()[0] > 0).all()
    scales, _ = signed.row_params()
    assert 0.2 < (scales < 0).mean() < 0.8
    assert np.array_equal(snap_scales(scales), scales)
    assert errors(w, signed, hessian).sum() < most * errors(w, plain, hessian).sum()


def test_signed_scales_serve_weights_of_either_sign_alike() -> None:
    scheme, w, hessian = scheme_of("w4-g32"), weights(48, 96), hessian_of(inputs(400, 96))
    one, other = (gptq(v, scheme, hessian, signed_scales=True) for v in (w, -w))
    np.testing.assert_allclose(
        errors(w, one, hessian), errors(-w, other, hessian), rtol=0.02, atol=1e-9
    )


@pytest.mark.parametrize(
    "text", ["w8-g32", "w4-g32-asym", "w4-g32-palette", "w4-channel", "w3-tensor"]
)
def test_scales_stay_positive_where_a_sign_gains_nothing(text: str) -> None:
    scheme, w, hessian = scheme_of(text), weights(32, 96), hessian_of(inputs(300, 96))
    plain = gptq(w, scheme, hessian)
    signed = gptq(w, scheme, hessian, signed_scales=True)
    assert np.array_equal(plain.codes(), signed.codes())
    assert np.array_equal(plain.row_params()[0], signed.row_params()[0])


def test_groups_of_zeros_have_a_positive_scale() -> None:
    w = weights(16, 96)
    w[:, 32:64] = 0
    got = gptq(w, scheme_of("w4-g32"), hessian_of(inputs(300, 96)), signed_scales=True)
    # the middle group makes up for the errors of the others, but for the rows without any
    empty = gptq(0 * w, scheme_of("w4-g32"), hessian_of(inputs(300, 96)), signed_scales=True)
    assert np.isfinite(got.numpy()).all()
    assert (empty.row_params()[0] > 0).all()
    assert not empty.numpy().any()


def test_inputs_never_seen() -> None:
    """Dead columns are rounded to nearest, and with no live one all are as by least squares."""
    w, x = weights(20, 64), inputs(300, 64)
    x[:, [3, 40, 63]] = 0
    scheme = scheme_of("w4-g32")
    got = gptq(w, scheme, hessian_of(x))
    scales, _ = got.row_params()
    step = np.repeat(scales, 32, axis=1)[:, [3, 40, 63]]
    dead = w[:, [3, 40, 63]]
    inside = np.abs(dead) < 6.9 * step
    assert (np.abs(got.numpy()[:, [3, 40, 63]] - dead)[inside] <= 0.501 * step[inside]).all()
    blind = gptq(w, scheme, hessian_of(np.zeros((5, 64), np.float32)))
    mse = quantize_tensor(w, scheme, "mse")
    assert ((blind.numpy() - w) ** 2).sum() <= 1.001 * ((mse.numpy() - w) ** 2).sum()


def test_outputs_follow_the_float_model_s() -> None:
    """Crossed moments make up for the error of the inputs, and a shift for what is beside them."""
    w = weights(40, 64)
    x_float = inputs(4000, 64)
    rng = np.random.default_rng(7)
    noise = rng.standard_normal(x_float.shape) @ rng.standard_normal((64, 64)) * 0.03
    x = (x_float * 0.93 + noise).astype(np.float32)
    shift = (x @ weights(64, 40, 9)).astype(np.float32)
    scheme = scheme_of("w4-g32")
    plain, crossed, shifted = hessian_of(x), Hessian(64, crossed=True), Hessian(64, crossed=True)
    crossed.add(x, x_float)
    shifted.add(x, x_float, shift)
    assert plain.target(w) is w

    def distance(hessian: Hessian, beside: Array | float) -> float:
        got = gptq(w, scheme, hessian).numpy()
        return float(((x_float @ w.T + beside - x @ got.T) ** 2).sum())

    assert distance(crossed, 0) < 0.8 * distance(plain, 0)
    assert distance(shifted, shift) < 0.1 * distance(crossed, shift)


@pytest.mark.parametrize("tokens_per_weight", [0.5, 2, 8, 64])
def test_what_is_made_up_for_is_not_the_noise_of_the_text(
    tokens_per_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On other tokens the targets err less than the weights themselves, however short the text."""
    k, rng = 64, np.random.default_rng(3)
    w, lasting = weights(32, k), weights(k, 32, 5) * 0.3

    mixing = np.linalg.qr(rng.standard_normal((k, k)))[0]
    size = rng.lognormal(0, 1, k)

    def text(n: int) -> Array:
        return np.asarray((rng.standard_normal((n, k)) * size) @ mixing, np.float32)

    x, other = text(int(tokens_per_weight * k)), text(4000)
    shift = (x @ lasting + 0.5 * rng.standard_normal((len(x), 32))).astype(np.float32)

    def missed() -> float:
        hessian = Hessian(k)
        hessian.add(x, None, shift)
        return float((((hessian.target(w) - w) @ other.T - (other @ lasting).T) ** 2).sum())

    nothing = float(((other @ lasting) ** 2).sum())
    with_ridge = missed()
    assert with_ridge < nothing
    monkeypatch.setattr(hessian_module, "TARGET_DAMPING", 1e-3)
    without = missed()
    if tokens_per_weight <= 2:
        assert with_ridge < 0.7 * without
    assert with_ridge < 1.3 * without


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"damping": -0.1}, "damping is -0.1"),
        ({"damping": float("nan")}, "damping is nan"),
        ({"block": 0}, "block is 0"),
        ({"sweeps": -1}, "sweeps is -1"),
        ({"hessian": Hessian(31)}, "31 wide and up.w has rows of 32 weights"),
        ({"hessian": Hessian(32)}, "no inputs of up.w were seen"),
        ({"damping": 0.0}, "too singular for a damping of 0.0; use a larger one"),
    ],
)
def test_gptq_refuses_wrong_options(options: dict[str, Any], words: str) -> None:
    known = {"hessian": hessian_of(inputs(5, 32)), **options}
    with pytest.raises(UsageError, match=words):
        gptq(weights(4, 32), scheme_of("w4-g32"), name="up.w", **known)


def test_scales_beyond_float16_are_refused() -> None:
    w = weights(4, 32) * np.float32(1e9)
    with pytest.raises(SchemeError, match=r"tensor up\.w needs a scale"):
        gptq(w, scheme_of("w4-g32"), hessian_of(inputs(50, 32)), name="up.w")
