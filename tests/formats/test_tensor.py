from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeq.core.errors import SchemeError
from edgeq.formats.schemes import QuantScheme, parse_scheme
from edgeq.formats.tensor import (
    FloatTensor,
    QuantTensor,
    Tensor,
    bf16_to_float32,
    float32_to_bf16,
    part_shapes,
)

SCHEMES = ("w2-g16", "w3-g32", "w4-g32", "w4-g128-asym", "w8-channel", "w8-tensor-asym",
           "w4-g32-palette")  # fmt: skip


def scheme_of(text: str) -> QuantScheme:
    scheme = parse_scheme(text)
    assert isinstance(scheme, QuantScheme)
    return scheme


def random_tensor(text: str, n: int, k: int, seed: int = 0) -> tuple[QuantTensor, NDArray]:
    """A tensor of random codes, and its weights computed one by one."""
    scheme, rng = scheme_of(text), np.random.default_rng(seed)
    groups = scheme.n_groups(k)
    codes = rng.integers(0, scheme.n_codes, (n, k), np.uint8)
    scales = rng.integers(1, 200, (n, groups)) / np.float16(256)
    zeros = None if scheme.symmetric else rng.integers(0, scheme.n_codes, (n, groups), np.uint8)
    palette = None
    if scheme.codebook:
        palette = rng.integers(-127, 128, scheme.n_codes).astype(np.int8)
    tensor = QuantTensor.from_codes(scheme, codes, scales, zeros, palette)
    weights = np.zeros((n, k))
    for i in range(n):
        for j in range(k):
            g = j // scheme.group_size if scheme.group_size else 0
            zero = scheme.mid if zeros is None else int(zeros[i, g])
            level = int(palette[codes[i, j]]) if palette is not None else int(codes[i, j]) - zero
            weights[i, j] = float(scales[i, g]) * level
    assert np.array_equal(tensor.codes(), codes)
    return tensor, weights


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (15, 31), (16, 32), (17, 33), (33, 172)])
def test_values_are_scale_times_level(text: str, n: int, k: int) -> None:
    tensor, weights = random_tensor(text, n, k)
    assert isinstance(tensor, Tensor)
    assert tensor.shape == (n, k)
    assert np.array_equal(tensor.numpy(), weights)
    assert tensor.numpy().dtype == np.float32


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SCHEMES), st.integers(1, 50), st.integers(1, 70), st.data())
def test_any_rows(text: str, n: int, k: int, data: st.DataObject) -> None:
    tensor, weights = random_tensor(text, n, k)
    start = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(start, n + 20))
    assert np.array_equal(tensor.rows(start, stop), weights[start:stop])


@pytest.mark.parametrize("text", [t for t in SCHEMES if "palette" not in t])
def test_padding_is_worth_zero(text: str) -> None:
    tensor, _ = random_tensor(text, 17, 33)
    scheme = tensor.scheme
    whole = QuantTensor(scheme, (32, scheme.padded_k(33)), tensor.packed, tensor.scales,
                        tensor.zero_points)  # fmt: skip
    values = whole.numpy()
    assert not values[17:].any()
    assert not values[:, 33:].any()
    assert values[:17, :33].any()


def test_bits_per_weight_count_everything_held() -> None:
    tensor, _ = random_tensor("w4-g32", 32, 64)
    assert tensor.nbytes == 32 * 64 // 2 + 32 * 2 * 2
    assert tensor.bpw == 4.5
    padded, _ = random_tensor("w4-g32", 17, 64)
    assert padded.bpw == pytest.approx(4.5 * 32 / 17)
    asym, _ = random_tensor("w2-g16", 16, 64)
    assert asym.bpw == 2 + (16 + 8) / 16


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("packed", np.zeros((1, 1, 64), np.uint8), r"packed .* must be uint8 \[1, 1, 128\]"),
        ("scales", np.zeros((1, 2, 16), np.float32), "scales .* got float32"),
        ("zero_points", None, "zero_points .* got nothing"),
        ("palette", np.zeros(4, np.int8), "has no palette"),
    ],
)
def test_wrong_parts_are_refused(part: str, value: NDArray | None, words: str) -> None:
    shapes = part_shapes(scheme_of("w2-g16"), (16, 32))
    parts = {name: np.zeros(shape, dtype) for name, (dtype, shape) in shapes.items()}
    QuantTensor(scheme_of("w2-g16"), (16, 32), **parts)
    with pytest.raises(SchemeError, match=words):
        QuantTensor(scheme_of("w2-g16"), (16, 32), **{**parts, part: value})


def test_float_tensors_widen_exactly() -> None:
    values = np.array([[1.0, -2.5], [0.125, 3e38], [-0.0, 1e-30]], np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    brain = FloatTensor("bfloat16", bits)
    assert brain.nbytes == 12
    assert np.array_equal(brain.numpy(), (bits.astype(np.uint32) << 16).view(np.float32))
    assert np.array_equal(brain.rows(1, 2), brain.numpy()[1:2])
    half = FloatTensor("float16", np.array([1.5, 65504], np.float16))
    assert half.numpy().tolist() == [1.5, 65504]
    with pytest.raises(SchemeError, match="a bfloat16 tensor holds uint16, got float32"):
        FloatTensor("bfloat16", values)


def test_bfloat16_is_the_nearest_with_ties_to_even() -> None:
    # 1 + 2**-7 is one step above 1: half a step is a tie
    given_ = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -(1 + 2**-8)], np.float32)
    rounded = bf16_to_float32(float32_to_bf16(given_))
    assert rounded.tolist() == [1, 1, 1 + 2**-6, 1 + 2**-7, -1]
    assert np.isinf(bf16_to_float32(float32_to_bf16(np.array([3.4e38], np.float32)))).all()


@settings(max_examples=200, deadline=None)
@given(st.floats(-(2.0**126), 2.0**126, width=32))
def test_bfloat16_is_never_further_than_its_neighbors(value: float) -> None:
    bits = float32_to_bf16(np.array([value], np.float32))
    near = bf16_to_float32(bits)[0].astype(np.float64)
    around = [(bits + np.uint16(1)), (bits - np.uint16(1)) if bits[0] & 0x7FFF else bits]
    for other in around:
        assert abs(near - value) <= abs(float(bf16_to_float32(other)[0]) - value)
