"""Products, sums and factors of NumPy arrays whose bits depend on nothing but their inputs.

The same on every processor and with any number of threads: each sum is in one order
(`edgeq.quant.kernels.gemm`, `edgeq.quant.kernels.vectors`). BLAS and NumPy's own sums are not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.quant.kernels.library import function, registers
from edgeq.quant.kernels.parallel import ranges, run_pieces, thread_count
from edgeq.quant.kernels.shapes import LANES, gemm_scratch

SMALL = 1 << 20
"""Multiplications below which one thread is as fast as two."""
PANEL = 64
"""Columns factored at once: part of the order."""

Float = np.floating[Any]


def product(
    a: NDArray[Float],
    b: NDArray[Float],
    out: NDArray[Float] | None = None,
    *,
    accumulate: bool = False,
    negate: bool = False,
) -> NDArray[Any]:
    """``a b^T``.

    Args:
        a: float32 or float64 [M, K]; any strides.
        b: of the same type, [N, K]; any strides.
        out: takes the result, [M, N]; rows without gaps between elements.
        accumulate: add to what is in ``out``.
        negate: the negative of the product.
    """
    (m, k), n = a.shape, len(b)
    dtype = np.dtype(a.dtype)
    assert (b.dtype, b.shape[1]) == (dtype, k), (a.shape, a.dtype, b.shape, b.dtype)
    if out is None:
        out = np.empty((m, n), dtype)
    assert (out.dtype, out.shape) == (dtype, (m, n))
    if not k or not m or not n:
        if not accumulate:
            out[...] = 0
        return out
    assert n == 1 or out.strides[1] == dtype.itemsize
    call = function(f"edgeq_gemm_{dtype.name}")
    tile = registers().tile
    width = LANES[dtype.name] * tile.vectors
    threads = thread_count() if m * n * k > SMALL else 1
    by_columns = n >= 4 * width * threads or n >= m
    pieces = []
    for first, last in ranges(n, width, threads) if by_columns else ranges(m, tile.rows, threads):
        left = a if by_columns else a[first:last]
        right = b[first:last] if by_columns else b
        to = out[:, first:last] if by_columns else out[first:last]

        def piece(x: NDArray[Any] = left, y: NDArray[Any] = right, z: NDArray[Any] = to) -> None:
            scratch = np.empty(gemm_scratch(tile) + 64, np.uint8)
            at = scratch.ctypes.data + -scratch.ctypes.data % 64
            call(
                x.ctypes.data, *x.strides, y.ctypes.data, *y.strides, z.ctypes.data, z.strides[0],
                len(x), len(y), k, int(accumulate), int(negate), at,
            )  # fmt: skip

        pieces.append(piece)
    run_pieces(pieces)
    return out


def products(
    a: NDArray[np.float32], b: NDArray[np.float32], out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """``a b^T`` of each of several matrices, in the order of `product`.

    Args:
        a: float32 [S, M, K]; any strides.
        b: float32 [S, N, K]; any strides.
        out: float32 [S, M, N], contiguous; the products are added to it.

    Returns:
        float32 [S, M, N].
    """
    (count, m, k), n = a.shape, b.shape[1]
    assert (len(b), b.shape[2]) == (count, k), (a.shape, b.shape)
    accumulate = out is not None
    if out is None:
        out = np.zeros((count, m, n), np.float32)
    assert (out.shape, out.flags.c_contiguous) == ((count, m, n), True)
    if not out.size or not k:
        return out
    result = out
    call, tile = function("edgeq_gemms_float32"), registers().tile
    threads = thread_count() if count * m * n * k > SMALL else 1

    def piece(first: int, last: int) -> None:
        scratch = np.empty(gemm_scratch(tile) + 64, np.uint8)
        aligned = scratch.ctypes.data + -scratch.ctypes.data % 64
        x, y, z = a[first:last], b[first:last], result[first:last]
        call(
            x.ctypes.data, *x.strides[1:], y.ctypes.data, *y.strides[1:], z.ctypes.data,
            z.strides[1], m, n, k, int(accumulate), 0, aligned,
            last - first, x.strides[0], y.strides[0], z.strides[0],
        )  # fmt: skip

    run_pieces([lambda a=a, b=b: piece(a, b) for a, b in ranges(count, 1, threads)])  # type: ignore[misc]
    return out


def row_products(
    a: NDArray[np.float32], b: NDArray[np.float32], *, wide: bool = False
) -> NDArray[Any]:
    """Sums of products along the last axis, float32 (or float64 if ``wide``).

    Args:
        a, b: float32 of one shape [..., n], or of shapes that broadcast to each other.
        wide: convert to float64 before multiplying.
    """
    a, b = np.broadcast_arrays(a, b)
    shape, n = a.shape[:-1], a.shape[-1]
    x, y = (_rows(v, n) for v in (a, b))
    out = np.zeros(len(x), np.float64 if wide else np.float32)
    name = "edgeq_row_products64" if wide else "edgeq_row_products"
    if out.size:
        function(name)(
            x.ctypes.data, x.strides[0], y.ctypes.data, y.strides[0], out.ctypes.data, len(x), n
        )
    return out.reshape(shape)


def total(values: NDArray[Any]) -> float:
    """The sum of all values in float64, in rows of 1024, one after the other."""
    flat = np.ascontiguousarray(values, np.float64).reshape(-1)
    full = np.zeros(-(-max(flat.size, 1) // 1024) * 1024)
    full[: flat.size] = flat
    part = full.reshape(-1, 1024)
    while part.shape[1] > 1:
        half = part.shape[1] // 2
        part = part[:, :half] + part[:, half:]
    return float(np.add.accumulate(part[:, 0])[-1])


def squares(w: NDArray[np.float32]) -> float:
    """The sum of squares of all elements, float64."""
    if not w.size:
        return 0.0
    rows = np.ascontiguousarray(w, np.float32).reshape(len(w), -1)
    return total(row_products(rows, rows, wide=True))


def column_sums(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """Sums over rows of float32 [M, K]: float64 [K], one row after the other."""
    return _over_rows("edgeq_column_sums", x)


def column_squares(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """Sums of squares over rows of float32 [M, K]: float64 [K], one row after the other."""
    return _over_rows("edgeq_column_squares", x)


def _over_rows(name: str, x: NDArray[np.float32]) -> NDArray[np.float64]:
    rows = _rows(x, x.shape[1])
    sums = np.zeros(x.shape[1])
    if rows.size:
        function(name)(rows.ctypes.data, rows.strides[0], sums.ctypes.data, *rows.shape)
    return sums


def softmax(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Softmax along the last axis; -inf marks what may not be seen."""
    n = scores.shape[-1]
    padded = np.full((*scores.shape[:-1], -(-n // 16) * 16), -np.inf, np.float32)
    padded[..., :n] = scores
    rows = padded.reshape(-1, padded.shape[-1])
    call = function("edgeq_softmax_rows")
    threads = thread_count() if padded.size > SMALL // 8 else 1
    run_pieces([
        lambda a=a, b=b: call(rows[a:].ctypes.data, b - a, rows.shape[1])  # type: ignore[misc]
        for a, b in ranges(len(rows), 1, threads)
    ])  # fmt: skip
    return padded[..., :n]


def activation(kind: str, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The gate's nonlinearity: "silu", or "gelu_tanh"."""
    return _elementwise("edgeq_activation", x, int(kind != "silu"))


def softcap(x: NDArray[np.float32], cap: float) -> NDArray[np.float32]:
    """``cap * tanh(x / cap)``."""
    divisor = np.float32(cap)
    return _elementwise("edgeq_tanh", x / divisor) * divisor


def _elementwise(name: str, x: NDArray[np.float32], *arguments: int) -> NDArray[np.float32]:
    """A function of the module on a copy of x."""
    out = np.zeros(-(-x.size // 16) * 16, np.float32)
    out[: x.size] = x.reshape(-1)
    call = function(name)
    threads = thread_count() if x.size > SMALL // 8 else 1
    run_pieces([
        lambda a=a, b=b: call(out[a:].ctypes.data, b - a, *arguments)  # type: ignore[misc]
        for a, b in ranges(len(out), 16, threads)
    ])  # fmt: skip
    return out[: x.size].reshape(x.shape)


def upper_root(matrix: NDArray[Any]) -> NDArray[Any]:
    """U with ``U U^T`` equal to a matrix, U upper triangular: in place.

    Args:
        matrix: float64 or float32 [K, K]; blocks on the diagonal are factored in float64.

    Raises:
        numpy.linalg.LinAlgError: it is not positive definite.
    """
    k, dtype = len(matrix), matrix.dtype
    failed = np.zeros(1, np.int64)
    for start in range((k - 1) // PANEL * PANEL, -1, -PANEL):
        stop = min(start + PANEL, k)
        panel = matrix[:stop, start:stop]
        if stop < k:
            product(
                matrix[:stop, stop:], matrix[start:stop, stop:], panel,
                accumulate=True, negate=True,
            )  # fmt: skip
        block = panel[start:].astype(np.float64)
        function("edgeq_cholesky64")(
            block.ctypes.data, block.strides[0], len(block), failed.ctypes.data
        )
        if failed[0]:
            raise np.linalg.LinAlgError("the matrix is not positive definite")
        root = np.triu(block)
        panel[start:] = root
        if start:
            panel[:start] = product(panel[:start].copy(), upper_inverse(root).astype(dtype))
        matrix[stop:, start:stop] = 0
    return matrix


def upper_inverse(root: NDArray[Any]) -> NDArray[np.float64]:
    """The inverse of an upper triangular matrix [K, K] in float64; small ones only."""
    root = np.ascontiguousarray(root, np.float64)
    out = np.zeros_like(root)
    function("edgeq_upper_inverse64")(root.ctypes.data, out.ctypes.data, len(root))
    return out


def _rows(v: NDArray[np.float32], n: int) -> NDArray[np.float32]:
    if v.strides[-1] != 4 or v.dtype != np.float32:
        v = np.ascontiguousarray(v, np.float32)
    return v.reshape(-1, n)
