"""Products, convolutions, pooling, norms and attention of MIL in NumPy.

Source: coremltools' definitions, ops/defs/iOS15 (linear, conv, pool, normalization), iOS17
(quantization_ops) and iOS18 (transformers).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.coreml.exec.ops_math import channels, softmax
from edgeq.converters.coreml.exec.ops_shape import ints
from edgeq.converters.coreml.exec.weights import Packed
from edgeq.core.errors import UnsupportedError

Array = NDArray[Any]
Op = Callable[..., Any]
BLOCK = 1 << 22
"""Weights decompressed at once in a product."""

# --- products ---------------------------------------------------------------------------------


def linear(x: Array, weight: Any, bias: Any = None) -> Array:
    """x [..., K] times weight [N, K], transposed, plus bias [N]."""
    if isinstance(weight, Packed):
        n, k = weight.shape
        step = max(1, BLOCK // k)
        out = np.empty((*x.shape[:-1], n), np.float32)
        for a in range(0, n, step):
            out[..., a : a + step] = x @ weight.rows(a, min(a + step, n)).astype(np.float32).T
    else:
        out = x @ weight.T
    return out if bias is None else out + bias


def matmul(x: Array, y: Array, transpose_x: bool = False, transpose_y: bool = False) -> Array:
    """x @ y, broadcast over all but the last two dimensions."""
    if transpose_x and x.ndim > 1:
        x = np.swapaxes(x, -1, -2)
    if transpose_y and y.ndim > 1:
        y = np.swapaxes(y, -1, -2)
    return np.asarray(np.matmul(x, y))


def einsum(values: Sequence[Array], equation: str) -> Array:
    """NumPy's, of float32."""
    return np.asarray(np.einsum(equation, *values))


def attention(query: Array, key: Array, value: Array, attn_mask: Array | None = None) -> Array:
    """softmax(query key / sqrt(E) + mask) value; a mask of flags says what may be seen."""
    scores = matmul(query, key, transpose_y=True) / np.float32(math.sqrt(query.shape[-1]))
    if attn_mask is not None:
        if attn_mask.dtype == np.bool_:
            attn_mask = np.where(attn_mask, np.float32(0), np.float32(-np.inf))
        scores = scores + attn_mask
    return np.asarray(np.matmul(softmax(scores), value))


# --- windows over space -----------------------------------------------------------------------


def pads(
    kind: str, pad: Any, size: Sequence[int], kernel: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """Padding before and after each dimension of space.

    Args:
        kind: "valid", "custom", "same" or "same_lower".
        pad: before and after each dimension, for "custom".
        size: of the dimensions.
        kernel: of the window, dilation counted in.
        strides: of the window.
    """
    if kind == "valid" or (kind == "custom" and pad is None):
        return [(0, 0)] * len(size)
    if kind == "custom":
        flat = ints(pad)
        return list(zip(flat[0::2], flat[1::2], strict=True))
    if kind not in ("same", "same_lower"):
        raise UnsupportedError(f"padding of kind {kind!r} cannot be executed")
    pairs = []
    for n, k, s in zip(size, kernel, strides, strict=True):
        total = max(0, (-(-n // s) - 1) * s + k - n)
        small, large = total // 2, total - total // 2
        pairs.append((large, small) if kind == "same_lower" else (small, large))
    return pairs


def _windows(
    x: Array, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> Array:
    """[N, C, *space] -> [N, C, *places, *kernel], a view."""
    rank = len(kernel)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    axes = tuple(range(2, 2 + rank))
    views = np.lib.stride_tricks.sliding_window_view(x, reach, axis=axes)
    at = [slice(None)] * 2 + [slice(None, None, s) for s in strides]
    return np.asarray(views[tuple(at + [slice(None, None, d) for d in dilations])])


def conv(
    x: Array, weight: Array, bias: Any = None, strides: Any = None, pad_type: str = "valid",
    pad: Any = None, dilations: Any = None, groups: int = 1,
) -> Array:  # fmt: skip
    """Convolution [N, C, *space] with weight [M, C/groups, *kernel]."""
    rank = x.ndim - 2
    kernel = weight.shape[2:]
    steps = ints(strides) if strides is not None else [1] * rank
    spread = ints(dilations) if dilations is not None else [1] * rank
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, spread, strict=True)]
    around = pads(str(pad_type), pad, x.shape[2:], reach, steps)
    views = _windows(np.pad(x, [(0, 0), (0, 0), *around]), kernel, steps, spread)
    g, m = int(groups), weight.shape[0]
    n, c = views.shape[:2]
    places = views.shape[2 : 2 + rank]
    # kernels before places, so that the copy runs along rows of the image
    order = (0, 1, *range(2 + rank, 2 + 2 * rank), *range(2, 2 + rank))
    columns = views.transpose(order).reshape(n, g, c // g * math.prod(kernel), -1)
    out = weight.reshape(g, m // g, -1) @ columns  # [N, g, M/g, places]
    out = out.reshape(n, m, *places)
    return out if bias is None else out + channels(bias, out.ndim)


def conv_transpose(
    x: Array, weight: Array, bias: Any = None, pad: Any = None, output_shape: Any = None,
    pad_type: str = "valid", strides: Any = None, dilations: Any = None, groups: int = 1,
) -> Array:  # fmt: skip
    """The transpose of `conv`, weight [C, M/groups, *kernel]."""
    rank, g = x.ndim - 2, int(groups)
    steps = ints(strides) if strides is not None else [1] * rank
    spread = ints(dilations) if dilations is not None else [1] * rank
    kernel = weight.shape[2:]
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, spread, strict=True)]
    n, c = x.shape[:2]
    m = weight.shape[1] * g
    full = [(d - 1) * s + r for d, s, r in zip(x.shape[2:], steps, reach, strict=True)]
    out = np.zeros((n, m, *full), np.float32)
    grouped = x.reshape(n, g, c // g, -1)
    filters = weight.reshape(g, c // g, m // g, *kernel)
    for at in np.ndindex(*kernel):
        part = filters[(slice(None), slice(None), slice(None), *at)]  # [g, C/g, M/g]
        piece = np.swapaxes(part, -1, -2)[None] @ grouped
        where = tuple(
            slice(i * d, i * d + (size - 1) * s + 1, s)
            for i, d, size, s in zip(at, spread, x.shape[2:], steps, strict=True)
        )
        out[(slice(None), slice(None), *where)] += piece.reshape(n, m, *x.shape[2:])
    out = _cropped(out, str(pad_type), pad, output_shape, x.shape[2:], steps)
    return out if bias is None else out + channels(bias, out.ndim)


def _cropped(
    out: Array, kind: str, pad: Any, output_shape: Any, size: Sequence[int], steps: Sequence[int]
) -> Array:
    """Remove what the padding of the convolution would have added."""
    full = out.shape[2:]
    if output_shape is not None:
        wanted = ints(output_shape)[2:]
    elif kind == "same":
        wanted = [d * s for d, s in zip(size, steps, strict=True)]
    else:
        around = pads(kind, pad, size, size, steps)
        wanted = [f - a - b for f, (a, b) in zip(full, around, strict=True)]
    if kind == "custom" and pad is not None:
        begins = ints(pad)[0::2]
    else:
        begins = [max(0, f - w) // 2 for f, w in zip(full, wanted, strict=True)]
    missing = [max(0, b + w - f) for b, w, f in zip(begins, wanted, full, strict=True)]
    out = np.pad(out, [(0, 0), (0, 0), *((0, extra) for extra in missing)])
    at = tuple(slice(b, b + w) for b, w in zip(begins, wanted, strict=True))
    return out[(slice(None), slice(None), *at)]


def pool(
    kind: str, x: Array, kernel_sizes: Any, strides: Any = None, pad_type: str = "valid",
    pad: Any = None, ceil_mode: bool = False, exclude_padding_from_average: bool = False,
) -> Array:  # fmt: skip
    """Maximum, mean or root of the sum of squares of each window.

    Args:
        kind: "max", "avg" or "l2".
        x: [N, C, *space].
        kernel_sizes, strides, pad_type, pad, ceil_mode: the window.
        exclude_padding_from_average: divide by what lies inside x alone.
    """
    rank = x.ndim - 2
    kernel = ints(kernel_sizes)
    steps = ints(strides) if strides is not None else [1] * rank
    around = pads(str(pad_type), pad, x.shape[2:], kernel, steps)
    extra = [0] * rank
    if ceil_mode:
        for i, (n, k, s, (a, b)) in enumerate(zip(x.shape[2:], kernel, steps, around, strict=True)):
            places = -(-(n + a + b - k) // s) + 1
            if (places - 1) * s >= n + a and (a or b):
                places -= 1  # a window may not begin past the padding before
            extra[i] = max(0, (places - 1) * s + k - (n + a + b))
    edges = [(a, b + e) for (a, b), e in zip(around, extra, strict=True)]
    padding: list[tuple[int, int]] = [(0, 0), (0, 0), *edges]
    fill = -np.inf if kind == "max" else 0.0
    views = _windows(np.pad(x, padding, constant_values=fill), kernel, steps, [1] * rank)
    over = tuple(range(-rank, 0))
    if kind == "max":
        return np.asarray(views.max(axis=over))
    if kind == "l2":
        return np.asarray(np.sqrt(np.square(views).sum(axis=over)))
    total = views.sum(axis=over)
    if not exclude_padding_from_average:
        # Core ML counts what ceil_mode adds at the end like any other padding
        return np.asarray(total / np.float32(math.prod(kernel)))
    ones = np.pad(np.ones((1, 1, *x.shape[2:]), np.float32), padding)
    return np.asarray(total / _windows(ones, kernel, steps, [1] * rank).sum(axis=over))


# --- norms ------------------------------------------------------------------------------------


def batch_norm(
    x: Array, mean: Any, variance: Any, gamma: Any = None, beta: Any = None, epsilon: float = 1e-5
) -> Array:
    """Subtract the mean of each channel and divide by its standard deviation."""
    y = (x - channels(mean, x.ndim)) / np.sqrt(channels(variance, x.ndim) + epsilon)
    return _affine(y, gamma, beta)


def instance_norm(x: Array, gamma: Any = None, beta: Any = None, epsilon: float = 1e-5) -> Array:
    """Normalize each channel of each sample to mean 0 and standard deviation 1."""
    return _affine(_standard(x, tuple(range(2, x.ndim)), epsilon), gamma, beta)


def layer_norm(
    x: Array, axes: Any = None, gamma: Any = None, beta: Any = None, epsilon: float = 1e-5
) -> Array:
    """Mean 0 and deviation 1 over some axes; gamma and beta have the shape of those."""
    over = tuple(sorted(a % x.ndim for a in (range(x.ndim) if axes is None else ints(axes))))
    y = _standard(x, over, epsilon)
    shape = [d if i in over else 1 for i, d in enumerate(x.shape)]
    if gamma is not None:
        y = y * np.reshape(gamma, shape)
    return y if beta is None else y + np.reshape(beta, shape)


def _standard(x: Array, over: tuple[int, ...], epsilon: float) -> Array:
    less = x - x.mean(axis=over, keepdims=True)
    return np.asarray(
        less / np.sqrt(np.square(less).mean(axis=over, keepdims=True) + np.float32(epsilon))
    )


def _affine(y: Array, gamma: Any, beta: Any) -> Array:
    if gamma is not None:
        y = y * channels(gamma, y.ndim)
    return y if beta is None else y + channels(beta, y.ndim)


def l2_norm(x: Array, epsilon: float = 1e-6) -> Array:
    """Divided by the root of the sum of squares over the last three dimensions."""
    return np.asarray(x / np.sqrt(np.square(x).sum(axis=(-3, -2, -1), keepdims=True) + epsilon))


def local_response_norm(
    x: Array, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Array:
    """Divided by a power of the squares of neighboring channels."""
    n, c = int(size), x.shape[1]
    squares = np.pad(np.square(x), [(0, 0), (n // 2, (n - 1) // 2), *[(0, 0)] * (x.ndim - 2)])
    total = np.stack([squares[:, i : i + n].sum(axis=1) for i in range(c)], axis=1)
    return x / (k + alpha / n * total) ** beta


# --- integers ---------------------------------------------------------------------------------


def _along(params: Any, x: Array, axis: Any) -> Array:
    array = np.asarray(params)
    if axis is None or array.ndim == 0:
        return array.reshape((1,) * x.ndim) if array.size == 1 else array
    at = int(axis) % x.ndim
    return array.reshape([-1 if i == at else 1 for i in range(x.ndim)])


def quantize(
    input: Array, scale: Any, output_dtype: str, zero_point: Any = None, axis: Any = None
) -> Array:
    """round(input / scale) + zero_point, as int8 or uint8."""
    info = np.iinfo(output_dtype)
    codes = np.rint(input / _along(scale, input, axis))
    if zero_point is not None:
        codes = codes + _along(zero_point, input, axis)
    return np.clip(codes, info.min, info.max).astype(output_dtype)


def dequantize(input: Array, scale: Any, zero_point: Any = None, axis: Any = None) -> Array:
    """scale * (input - zero_point)."""
    values = input.astype(np.float32)
    if zero_point is not None:
        values = values - _along(zero_point, input, axis).astype(np.float32)
    return values * _along(scale, input, axis)


OPS: dict[str, Op] = {
    "avg_pool": lambda **a: pool("avg", **a),
    "batch_norm": batch_norm,
    "conv": conv,
    "conv_transpose": conv_transpose,
    "dequantize": dequantize,
    "einsum": einsum,
    "instance_norm": instance_norm,
    "l2_norm": l2_norm,
    "l2_pool": lambda **a: pool("l2", **a),
    "layer_norm": layer_norm,
    "linear": linear,
    "local_response_norm": local_response_norm,
    "matmul": matmul,
    "max_pool": lambda **a: pool("max", **a),
    "quantize": quantize,
    "scaled_dot_product_attention": attention,
}
"""The operators of this module by MIL's names."""
