"""The NumPy backend: exact integer sums, the rounded cache, and closeness to the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgeq import importers
from edgeq.evaluation.text import kl_divergence, log_softmax
from edgeq.formats.dynamic_quant import quantize_vectors
from edgeq.formats.packing import TILE
from edgeq.formats.tensor import FloatTensor, QuantTensor
from edgeq.model.reference import Reference
from edgeq.model.reference_cache import KV
from edgeq.runtime.activations import (
    VALUE_ZERO,
    hadamard,
    quantize_blocks,
    quantize_keys,
    quantize_twice,
    quantize_values,
)
from edgeq.runtime.engine import Engine
from edgeq.runtime.numpy_backend import IntegerKV, PackedLinear
from edgeq.runtime.tokenizer import Tokenizer
from tests.conftest import small_checkpoint, story_text
from tests.families import FAMILIES, MIXTURES, quantized, random_model, rounded, tiny_config

SCHEMES = (
    "w4-g32", "w4-g128", "w3-g32", "w2-g16", "w2-g16-asym", "w4-g16-asym", "w8-g16", "w8-g64-asym",
    "w8-channel", "w8-channel-asym", "w4-tensor", "w4-tensor-asym", "w3-g256", "w4-g32-palette",
    "w2-channel-palette",
)  # fmt: skip
RNG = np.random.default_rng(3)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def by_hand(x: np.ndarray, weight: QuantTensor) -> np.ndarray:
    """The documented sum, one output at a time, in Python integers and float64."""
    n, k = weight.shape
    scheme = weight.scheme
    q, s = quantize_blocks(x, scheme.padded_k(k))
    codes = weight.codes().astype(np.int64)
    scales, zeros = weight.row_params()
    size = scheme.group_size or k
    out = np.zeros((len(x), n))
    for row in range(n):
        group = np.arange(k) // size
        if weight.palette is not None:
            steps = weight.palette.astype(np.int64)[codes[row]]
        else:
            steps = codes[row] - zeros[row, group].astype(np.int64)
        for m in range(len(x)):
            products = q[m, :k].astype(np.int64) * steps
            for run in range(0, k, 16):
                part = slice(run, min(run + 16, k))
                scale = float(s[m, run // 32]) * float(scales[row, run // size])
                out[m, row] += int(products[part].sum()) * scale
    return out


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 31), (17, 33), (33, 172)])
def test_products_are_the_documented_sums(scheme: str, n: int, k: int) -> None:
    weight = rounded(normal(n, k), scheme)
    for m in (1, 3):
        x = normal(m, k)
        want = by_hand(x, weight)
        bound = 1e-6 * (np.abs(x) @ np.abs(weight.numpy()).T).max() + 1e-30
        for keep in (True, False):
            got = PackedLinear(keep=keep)("w", x, weight)
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, want, atol=bound)


def test_unpacking_in_blocks_of_rows_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = rounded(normal(70, 96), "w4-g32"), normal(5, 96)
    want = PackedLinear(keep=False)("w", x, weight)
    monkeypatch.setattr("edgeq.runtime.numpy_backend.UNPACK_WEIGHTS", 96 * 19)
    np.testing.assert_array_equal(PackedLinear(keep=False)("w", x, weight), want)


def test_float_tensors_are_multiplied_as_floats() -> None:
    w, x = normal(5, 40), normal(3, 40)
    got = PackedLinear(keep=True)("w", x, FloatTensor("float16", w.astype(np.float16)))
    np.testing.assert_allclose(got, x @ w.astype(np.float16).astype(np.float32).T, rtol=1e-6)


def test_vectors_are_rounded_to_the_nearest_step() -> None:
    x = normal(50, 32) * np.exp(normal(50, 1) * 8)
    codes, scales = quantize_vectors(x)
    assert codes.dtype == np.int8
    assert (np.abs(codes).max(axis=1) == 127).all()
    error = np.abs(codes * scales[:, None].astype(np.float64) - x)
    assert (error <= scales[:, None] * 0.50001).all()


def test_zero_and_vanishing_vectors_are_zero() -> None:
    for value in (0.0, 1e-31, np.float32(1e-45)):
        codes, scales = quantize_vectors(np.full((1, 32), value, np.float32))
        assert not codes.any()
        assert not scales.any()
    codes, scales = quantize_keys(np.zeros((1, 1, 8), np.float32))[:2]
    assert not codes.any()
    assert not scales.any()


def test_blocks_are_padded_with_zeros() -> None:
    codes, scales = quantize_blocks(normal(2, 40), 128)
    assert codes.shape == (2, 128)
    assert scales.shape == (2, 4)
    assert not codes[:, 40:].any()
    assert not scales[:, 2:].any()


def test_twice_is_sixteen_bits() -> None:
    x = normal(4, 40)
    (a, sa), (b, sb) = quantize_twice(x)
    both = a * np.repeat(sa, 32, axis=1) + b * np.repeat(sb, 32, axis=1)
    assert np.abs(both[:, :40] - x).max() < np.abs(x).max() / 127 / 127


def test_keys_use_all_levels_of_a_lopsided_range() -> None:
    x = (normal(9, 2, 24) + 3).clip(-1)
    codes, scales, zeros = quantize_keys(x)
    assert codes.dtype == zeros.dtype == np.uint8
    steps = codes.astype(int) - zeros[..., None]
    error = np.abs(scales[..., None].astype(np.float64) * steps - x)
    # half a step, and what a float16 scale loses over 255 steps
    assert (error <= scales[..., None] * 0.7).all()
    assert codes.max() >= 254


def test_keys_of_4_bits_use_their_16_levels() -> None:
    x = (normal(9, 2, 24) + 3).clip(-1)
    codes, scales, zeros = quantize_keys(x, 4)
    steps = codes.astype(int) - zeros[..., None]
    error = np.abs(scales[..., None].astype(np.float64) * steps - x)
    assert (error <= scales[..., None] * 0.51).all()
    assert codes.max() == 15


def test_values_of_4_bits_reach_their_largest() -> None:
    x = normal(9, 2, 24)
    codes, scales = quantize_values(x)
    values = scales[..., None] * (codes.astype(np.float32) - VALUE_ZERO)
    at = np.abs(x).argmax(axis=-1, keepdims=True)
    np.testing.assert_allclose(np.take_along_axis(values, at, -1), np.take_along_axis(x, at, -1))
    # the far end of the other side has no code of its own
    assert (np.abs(values - x) <= np.abs(scales[..., None]) * 1.001).all()
    for value in (0.0, 1e-31):
        codes, scales = quantize_values(np.full((1, 1, 32), value, np.float32))
        assert (codes == VALUE_ZERO).all()
        assert not scales.any()


@pytest.mark.parametrize("dim", [1, 2, 12, 64, 80, 128])
def test_a_hadamard_matrix_is_its_own_inverse_and_spreads_an_outlier(dim: int) -> None:
    x = normal(3, dim)
    np.testing.assert_allclose(hadamard(hadamard(x)), x, atol=1e-6)
    y = normal(3, dim)
    np.testing.assert_allclose((hadamard(x) * hadamard(y)).sum(-1), (x * y).sum(-1), atol=1e-4)
    outlier = np.zeros(dim, np.float32)
    outlier[0] = 1
    run = dim & -dim
    np.testing.assert_allclose(np.abs(hadamard(outlier)[:run]), run**-0.5, rtol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
@pytest.mark.parametrize("sizes", [(1,) * 40, (19, 1, 20), (300, 1, 5, 260)])
@pytest.mark.parametrize(("bits", "bound"), [(8, 0.04), (4, 0.7)])
def test_integer_attention_is_near_float(
    family: str, sizes: tuple[int, ...], bits: int, bound: float
) -> None:
    """Windows, chunks of 256 and spans of centers cut at any place."""
    config = tiny_config(family, context=600)
    exact, packed = KV(config), IntegerKV(config, 600, bits)
    rng = np.random.default_rng(0)
    shared = 8 * rng.normal(size=(config.kv_heads, config.head_dim))  # what centers are for
    for n in sizes:
        k = (rng.normal(size=(n, config.kv_heads, config.head_dim)) + shared).astype(np.float32)
        v = rng.normal(size=k.shape).astype(np.float32)
        q = rng.normal(size=(n, config.heads, config.head_dim)).astype(np.float32)
        for layer in range(config.layers):
            exact.append(layer, k, v)
            packed.append(layer, k, v)
            want, got = exact.attend(layer, q), packed.attend(layer, q)
            assert np.abs(got - want).max() < bound
        exact.advance(n)
        packed.advance(n)


@pytest.mark.parametrize("bits", [4, 8])
def test_cache_is_the_same_however_it_was_filled(bits: int) -> None:
    config = tiny_config("llama")
    k, v = normal(40, 2, 12), normal(40, 2, 12)
    whole, parts = (IntegerKV(config, 64, bits) for _ in range(2))
    whole.append(0, k, v)
    for a, b in ((0, 5), (5, 6), (6, 40)):
        parts.append(0, k[a:b], v[a:b])
        parts.advance(b - a)
    whole.advance(40)
    q = normal(1, 4, 12)
    for cache in (whole, parts):
        cache.append(0, k[:1], v[:1])
    np.testing.assert_array_equal(whole.attend(0, q), parts.attend(0, q))


def test_kv_bytes() -> None:
    model = quantized(random_model(tiny_config("llama", context=64)), "w4-g32")
    with Engine(model, backend="numpy", kv_bits=8) as eight:
        # layers * tokens * kv heads * (codes of k and v, f16 + u8 of k, f32 of v), and centers
        assert eight.kv_bytes == 2 * (64 * 2 * (24 + 3 + 4) + 64 // TILE * 2 * 12 * 2)
    with Engine(model, backend="numpy", kv_bits=16) as sixteen:
        assert sixteen.kv_bytes == 2 * 64 * 2 * 24 * 2


@pytest.mark.parametrize("kv_bits", [4, 8, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_engine_is_near_the_reference(family: str, kv_bits: Any) -> None:
    model = quantized(random_model(tiny_config(family)), "w4-g32")
    tokens = np.random.default_rng(2).integers(3, 101, 60)
    want = Reference(model).forward(tokens)
    with Engine(model, backend="numpy", kv_bits=kv_bits) as engine:
        whole = engine.forward(tokens, all_logits=True)
        kl = kl_divergence(log_softmax(want), log_softmax(whole))
        # rounded activations cost something, and not much; a cache of 4 bits costs more, and most
        # where it takes tokens past a tie of the router
        most = 4e-3 if kv_bits > 4 else 0.1 if family in MIXTURES else 5e-2
        assert 1e-6 < kl.mean() < most
        engine.truncate(10)
        steps = np.stack([engine.forward([t]) for t in tokens[10:]])
        # the same but for float order, which may tip a rounding here and there
        assert np.median(np.abs(steps - whole[10:]).max(axis=1)) < 1e-4
        assert np.abs(steps - whole[10:]).max() < 0.15
        engine.reset()
        last = engine.forward(tokens)
        np.testing.assert_allclose(last, whole[-1], atol=0.15)


def test_greedy_is_repeated_argmax() -> None:
    model = quantized(random_model(tiny_config("qwen2", tied=False)), "w8-channel")
    with Engine(model, backend="numpy") as engine:
        engine.forward([5, 6, 7])
        burst = engine.greedy(8, 20)
        assert engine.n_past == 23
        engine.truncate(3)
        token, steps = 8, []
        for _ in range(20):
            token = int(engine.forward([token]).argmax())
            steps.append(token)
    assert burst == steps


def test_int8_cache_costs_little_on_a_real_model() -> None:
    """Float weights, so that nothing but the cache differs: at most 1e-3 nats."""
    model = importers.load(small_checkpoint())
    text = story_text().read_text("utf-8")
    ids = Tokenizer(model.files).encode(text[:1500])
    with (
        Engine(model, backend="numpy", kv_bits=8) as eight,
        Engine(model, backend="numpy", kv_bits=16) as sixteen,
    ):
        a, b = (log_softmax(e.forward(ids[:512], all_logits=True)) for e in (sixteen, eight))
    assert kl_divergence(a, b).mean() < 1e-3
