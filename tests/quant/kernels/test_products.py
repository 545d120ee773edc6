"""Products, sums and factors against float64 NumPy, at awkward sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgeq.quant.kernels import products
from edgeq.quant.kernels.parallel import thread_limit

SIZES = (1, 2, 3, 7, 15, 16, 17, 31, 33, 172)
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", SIZES)
def test_products_are_those_of_float64(n: int, dtype: type[Any]) -> None:
    tolerance = 2e-6 if dtype is np.float32 else 1e-14
    for m, k in ((1, 1), (3, 700), (13, 256), (30, 257)):
        a, b = (RNG.normal(size=(rows, k)).astype(dtype) for rows in (m, n))
        exact = a.astype(np.float64) @ b.astype(np.float64).T
        got = products.product(a, b)
        bound = tolerance * (np.abs(a).astype(np.float64) @ np.abs(b).T)
        assert (np.abs(got - exact) <= bound).all()
        # strides and threads change nothing
        fortran = products.product(np.asfortranarray(a), np.asfortranarray(b))
        np.testing.assert_array_equal(got, fortran)
        out = np.full((m, n + 3), 7, dtype)
        products.product(a, b, out[:, :n], accumulate=True, negate=True)
        assert (out[:, n:] == 7).all()
        assert (np.abs(out[:, :n] - (7 - exact)) <= bound + 7 * tolerance).all()


@pytest.mark.parametrize("n", SIZES)
def test_sums_over_rows_add_one_row_after_the_other(n: int) -> None:
    for m in SIZES:
        x = RNG.normal(size=(m, n + 3)).astype(np.float32)[:, 1 : n + 1]
        wide = x.astype(np.float64)
        np.testing.assert_array_equal(products.column_sums(x), np.add.accumulate(wide)[-1])
        np.testing.assert_array_equal(products.column_squares(x), np.add.accumulate(wide**2)[-1])
        np.testing.assert_array_equal(
            products.column_sums(np.asfortranarray(x)), products.column_sums(x)
        )
    np.testing.assert_array_equal(products.column_sums(np.zeros((0, n), np.float32)), np.zeros(n))


def test_threads_and_parts_give_the_same_bits() -> None:
    a, b = (RNG.normal(size=(n, 600)).astype(np.float32) for n in (300, 400))
    with thread_limit(1):
        whole = products.product(a, b)
    for threads in (2, 3, 5):
        with thread_limit(threads):
            np.testing.assert_array_equal(products.product(a, b), whole)
    np.testing.assert_array_equal(products.product(a[17:50], b[3:90]), whole[17:50, 3:90])


@pytest.mark.parametrize("k", [*SIZES, 256])
def test_moments_of_a_stack_have_the_bits_of_products(k: int) -> None:
    for count, t in ((1, 1), (3, 512), (5, 257)):
        x = RNG.normal(size=(t, count, k)).astype(np.float32).swapaxes(0, 1)
        out = RNG.normal(size=(count, k, k)).astype(np.float32)
        want = out.copy()
        for part, matrix in zip(x, want, strict=True):
            products.product(part.T, part.T, matrix, accumulate=True)
        products.products(x.swapaxes(1, 2), x.swapaxes(1, 2), out)
        np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("n", SIZES)
def test_a_stack_is_each_product(n: int) -> None:
    a, b = (RNG.normal(size=(5, rows, 37)).astype(np.float32) for rows in (3, n))
    turned = np.ascontiguousarray(b.transpose(0, 2, 1)).transpose(0, 2, 1)
    for threads in (1, 3):
        with thread_limit(threads):
            for other in (b, turned):
                got = products.products(a, other)
                for x, y, z in zip(a, b, got, strict=True):
                    np.testing.assert_array_equal(z, products.product(x, y))


@pytest.mark.parametrize("n", SIZES)
def test_sums_and_softmax(n: int) -> None:
    x, y = RNG.normal(size=(2, 5, n)).astype(np.float32)
    exact = (x.astype(np.float64) * y).sum(axis=-1)
    np.testing.assert_allclose(products.row_products(x, y), exact, atol=1e-5)
    np.testing.assert_allclose(products.row_products(x, y, wide=True), exact, atol=1e-13)
    np.testing.assert_allclose(products.squares(x), np.square(x, dtype=np.float64).sum())
    np.testing.assert_allclose(products.total(exact), exact.sum(), atol=1e-13)
    scores = x * np.float32(10)
    scores[:, 1:][RNG.random((5, n - 1)) < 0.3] = -np.inf
    weights = np.exp(scores.astype(np.float64) - scores.max(axis=-1, keepdims=True))
    want = weights / weights.sum(axis=-1, keepdims=True)
    got = products.softmax(scores)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert (got[np.isinf(scores)] == 0).all()


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gates(kind: str) -> None:
    x = np.linspace(-30, 30, 1001).astype(np.float32)
    wide = x.astype(np.float64)
    cube = np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)
    want = wide / (1 + np.exp(-wide)) if kind == "silu" else 0.5 * wide * (1 + np.tanh(cube))
    np.testing.assert_allclose(products.activation(kind, x), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", SIZES)
def test_factors(n: int, dtype: type[Any]) -> None:
    x = RNG.normal(size=(2 * n + 5, n))
    matrix = x.T @ x / len(x) + 0.01 * np.eye(n)
    root = products.upper_root(matrix.astype(dtype))
    assert (np.tril(root, -1) == 0).all()
    np.testing.assert_allclose(root @ root.T, matrix, atol=1e-5 if dtype is np.float32 else 1e-13)
    np.testing.assert_allclose(products.upper_inverse(root) @ root, np.eye(n), atol=1e-5)


def test_a_matrix_that_is_not_positive_definite_is_refused() -> None:
    with pytest.raises(np.linalg.LinAlgError):
        products.upper_root(np.diag([1.0, -1.0, 1.0]))
