"""Operators of MIL that move, take, place and order numbers, in NumPy.

Source: coremltools' definitions, ops/defs/iOS15 to iOS18 (tensor_operation,
tensor_transformation, scatter_gather).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.coreml.exec.weights import Packed
from edgeq.core.errors import UsageError

Array = NDArray[Any]
Op = Callable[..., Any]


def ints(values: Any) -> list[int]:
    """Numbers given as an array, a list or one scalar."""
    return [int(v) for v in np.asarray(values).reshape(-1)]


# --- shapes -----------------------------------------------------------------------------------


def reshape(x: Array, shape: Any) -> Array:
    """Another shape; 0 keeps a dimension and -1 is what is left."""
    wanted = ints(shape)
    return x.reshape([x.shape[i] if d == 0 and x.size else d for i, d in enumerate(wanted)])


def reshape_like(
    x: Array, ref_tensors: Sequence[Array], begins: Any, ends: Any, end_masks: Any
) -> Array:
    """A shape put together from slices of other tensors' shapes."""
    shape: list[int] = []
    for ref, begin, end, mask in zip(
        ref_tensors, ints(begins), ints(ends), ints(end_masks), strict=True
    ):
        shape += ref.shape[begin : None if mask else end]
    return x.reshape(shape)


def squeeze(x: Array, axes: Any = None) -> Array:
    """Remove dimensions of size 1."""
    return np.squeeze(x, None if axes is None else tuple(ints(axes)))


def expand_dims(x: Array, axes: Any) -> Array:
    """Insert dimensions of size 1 at these positions."""
    return np.expand_dims(x, tuple(ints(axes)))


def flatten2d(x: Array, axis: int = 1) -> Array:
    """Flatten to a matrix whose columns are the dimensions from ``axis`` on."""
    return x.reshape(math.prod(x.shape[: int(axis)]), -1)


def depth_to_space(x: Array, block_size: int) -> Array:
    """[N, C, H, W] -> [N, C/b/b, H*b, W*b]; the block is the outer part of the channels."""
    n, c, h, w = x.shape
    b = int(block_size)
    x = x.reshape(n, b, b, c // (b * b), h, w).transpose(0, 3, 4, 1, 5, 2)
    return x.reshape(n, c // (b * b), h * b, w * b)


def space_to_depth(x: Array, block_size: int) -> Array:
    """The inverse of `depth_to_space`."""
    n, c, h, w = x.shape
    b = int(block_size)
    x = x.reshape(n, c, h // b, b, w // b, b).transpose(0, 3, 5, 1, 2, 4)
    return x.reshape(n, c * b * b, h // b, w // b)


def pixel_shuffle(x: Array, upscale_factor: int) -> Array:
    """[N, C*r*r, H, W] -> [N, C, H*r, W*r]; the block is the inner part of the channels."""
    n, c, h, w = x.shape
    r = int(upscale_factor)
    x = x.reshape(n, c // (r * r), r, r, h, w).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(n, c // (r * r), h * r, w * r)


def pixel_unshuffle(x: Array, downscale_factor: int) -> Array:
    """The inverse of `pixel_shuffle`."""
    n, c, h, w = x.shape
    r = int(downscale_factor)
    x = x.reshape(n, c, h // r, r, w // r, r).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(n, c * r * r, h // r, w // r)


def space_to_batch(x: Array, block_shape: Any, paddings: Any) -> Array:
    """Blocks of the two dimensions after the channels become batches, the block outermost."""
    (b0, b1), pads = ints(block_shape), np.asarray(paddings).tolist()
    x = np.pad(x, [(0, 0), (0, 0), *pads])
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // b0, b0, w // b1, b1).transpose(3, 5, 0, 1, 2, 4)
    return x.reshape(n * b0 * b1, c, h // b0, w // b1)


def batch_to_space(x: Array, block_shape: Any, crops: Any) -> Array:
    """The inverse of `space_to_batch`."""
    (b0, b1), ((top, bottom), (left, right)) = ints(block_shape), np.asarray(crops).tolist()
    n, c, h, w = x.shape
    x = x.reshape(b0, b1, n // (b0 * b1), c, h, w).transpose(2, 3, 4, 0, 5, 1)
    x = x.reshape(n // (b0 * b1), c, h * b0, w * b1)
    return x[:, :, top : h * b0 - bottom, left : w * b1 - right]


def concat(values: Sequence[Array], axis: int, interleave: bool = False) -> Array:
    """Concatenate along an axis, or interleave."""
    if not interleave:
        return np.concatenate(values, int(axis))
    at = int(axis) % values[0].ndim
    stacked = np.stack(values, at + 1)
    shape = list(values[0].shape)
    shape[at] *= len(values)
    return stacked.reshape(shape)


def split(
    x: Array, axis: int, num_splits: int | None = None, split_sizes: Any = None
) -> tuple[Array, ...]:
    """Split into equal parts, or into parts of given sizes."""
    if split_sizes is None:
        return tuple(np.split(x, int(num_splits or 1), int(axis)))
    return tuple(np.split(x, np.cumsum(ints(split_sizes))[:-1], int(axis)))


def pad(x: Array, pad: Any, mode: str = "constant", constant_val: Any = 0.0) -> Array:
    """Before and after the last dimensions."""
    pairs = np.asarray(pad).reshape(-1, 2).tolist()
    full = [(0, 0)] * (x.ndim - len(pairs)) + [(int(a), int(b)) for a, b in pairs]
    if mode == "constant":
        return np.pad(x, full, constant_values=constant_val)
    return np.pad(x, full, mode="edge" if mode == "replicate" else "reflect")


def reverse(x: Array, axes: Any = None) -> Array:
    """Backwards along some axes, or all."""
    return np.flip(x, None if axes is None else tuple(ints(axes)))


def reverse_sequence(x: Array, lengths: Any, seq_axis: int = 0, batch_axis: int = 0) -> Array:
    """The first ``lengths[i]`` entries of each batch backwards."""
    moved = np.moveaxis(x, (int(batch_axis), int(seq_axis)), (0, 1)).copy()
    for i, n in enumerate(ints(lengths)):
        moved[i, :n] = moved[i, :n][::-1].copy()
    return np.moveaxis(moved, (0, 1), (int(batch_axis), int(seq_axis)))


def sliding_windows(x: Array, axis: int, size: int, stride: int = 1) -> Array:
    """Windows along an axis: [..., windows, size, ...]."""
    at = int(axis) % x.ndim
    views = np.lib.stride_tricks.sliding_window_view(x, int(size), at)
    return np.moveaxis(views.take(range(0, views.shape[at], int(stride)), at), -1, at + 1)


# --- slices -----------------------------------------------------------------------------------


def _slices(
    rank: int, begin: Any, end: Any, stride: Any, begin_mask: Any, end_mask: Any, squeeze_mask: Any
) -> tuple[Any, ...]:
    begins, ends = ints(begin), ints(end)
    steps = [1] * rank if stride is None else ints(stride)

    def flags(mask: Any) -> list[int]:
        return [0] * rank if mask is None else ints(mask)

    open_begin, open_end, single = flags(begin_mask), flags(end_mask), flags(squeeze_mask)
    return tuple(
        begins[i]
        if single[i]
        else slice(None if open_begin[i] else begins[i], None if open_end[i] else ends[i], steps[i])
        for i in range(rank)
    )


def slice_by_index(
    x: Array, begin: Any, end: Any, stride: Any = None,
    begin_mask: Any = None, end_mask: Any = None, squeeze_mask: Any = None,
) -> Array:  # fmt: skip
    """A slice of each dimension; a mask opens an end, or takes one entry."""
    at = _slices(x.ndim, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    return np.asarray(x[at])


def slice_by_size(x: Array, begin: Any, size: Any) -> Array:
    """So many entries of each dimension; -1 is all that follow."""
    at = [slice(b, None if n == -1 else b + n)
          for b, n in zip(ints(begin), ints(size), strict=True)]  # fmt: skip
    return x[tuple(at)]


def slice_update(
    x: Array, update: Array, begin: Any, end: Any, stride: Any = None,
    begin_mask: Any = None, end_mask: Any = None, squeeze_mask: Any = None,
    *, in_place: bool = False,
) -> Array:  # fmt: skip
    """A copy of x with a slice replaced, or x itself if in place."""
    at = _slices(x.ndim, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    if x[at].shape != update.shape:
        raise UsageError(
            f"slice_update: {list(update.shape)} for a slice of {list(x[at].shape)}; "
            "is the position past the end of the cache?"
        )
    out = x if in_place else x.copy()
    out[at] = update
    return out


# --- gather and scatter -----------------------------------------------------------------------


def gather(x: Any, indices: Any, axis: int = 0, batch_dims: int = 0, **_: Any) -> Array:
    """Entries of an axis by their numbers, for each batch."""
    where, at, batches = np.asarray(indices), int(axis), int(batch_dims)
    if isinstance(x, Packed):
        if not at % len(x.shape) and not batches:
            return x.taken(where)
        x = x.array()
    if batches == 0:
        return np.take(x, where, axis=at)
    at %= x.ndim
    lead = x.shape[:batches]
    flat_x = x.reshape(-1, *x.shape[batches:])
    flat_i = where.reshape(-1, *where.shape[batches:])
    rows = [np.take(a, i, axis=at - batches) for a, i in zip(flat_x, flat_i, strict=True)]
    return np.stack(rows).reshape(*lead, *rows[0].shape)


def gather_along_axis(x: Array, indices: Array, axis: int = 0, **_: Any) -> Array:
    """Entries by numbers that differ along the other axes."""
    return np.take_along_axis(x, indices, int(axis))


def gather_nd(x: Array, indices: Array, batch_dims: int = 0, **_: Any) -> Array:
    """Entries by tuples of numbers."""
    batches = int(batch_dims)
    if batches == 0:
        return np.asarray(x[tuple(np.moveaxis(indices, -1, 0))])
    lead = x.shape[:batches]
    flat_x = x.reshape(-1, *x.shape[batches:])
    flat_i = indices.reshape(-1, *indices.shape[batches:])
    rows = [a[tuple(np.moveaxis(i, -1, 0))] for a, i in zip(flat_x, flat_i, strict=True)]
    return np.stack(rows).reshape(*lead, *rows[0].shape)


_SCATTER: dict[str, Callable[[Array, Any, Array], None]] = {
    "add": lambda out, at, new: np.add.at(out, at, new),
    "sub": lambda out, at, new: np.subtract.at(out, at, new),
    "mul": lambda out, at, new: np.multiply.at(out, at, new),
    "div": lambda out, at, new: np.divide.at(out, at, new),
    "max": lambda out, at, new: np.maximum.at(out, at, new),
    "min": lambda out, at, new: np.minimum.at(out, at, new),
    "update": lambda out, at, new: out.__setitem__(at, new),
}


def scatter(
    data: Array, indices: Any, updates: Array, axis: int = 0, mode: str = "add", **_: Any
) -> Array:
    """A copy of data with entries of an axis changed."""
    out, at = data.copy(), int(axis) % data.ndim
    where = np.asarray(indices)
    front = np.moveaxis(out, at, 0)
    new = np.moveaxis(updates, range(at, at + where.ndim), range(where.ndim))
    _SCATTER[mode](front, where, new)
    return out


def scatter_along_axis(
    data: Array, indices: Array, updates: Array, axis: int = 0, mode: str = "add", **_: Any
) -> Array:
    """A copy of data with entries changed by numbers that differ along the other axes."""
    out = data.copy()
    grid: list[Any] = list(np.indices(indices.shape, sparse=True))
    at = int(axis) % data.ndim
    grid[at] = np.where(indices < 0, indices + data.shape[at], indices)
    _SCATTER[mode](out, tuple(grid), updates)
    return out


def scatter_nd(data: Array, indices: Array, updates: Array, mode: str = "add", **_: Any) -> Array:
    """A copy of data with entries changed by tuples of numbers."""
    out = data.copy()
    _SCATTER[mode](out, tuple(np.moveaxis(indices, -1, 0)), updates)
    return out


# --- made, counted, ordered -------------------------------------------------------------------


def band_part(x: Array, lower: int = -1, upper: int = -1) -> Array:
    """Zero outside a band around the diagonal."""
    below = np.subtract.outer(np.arange(x.shape[-2]), np.arange(x.shape[-1]))
    keep = np.ones(below.shape, bool)
    if lower >= 0:
        keep &= below <= lower
    if upper >= 0:
        keep &= -below <= upper
    return np.where(keep, x, np.zeros((), x.dtype))


def cumsum(x: Array, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Array:
    """Running sums."""
    at = int(axis)
    values = np.flip(x, at) if reverse else x
    total = np.cumsum(values, axis=at, dtype=x.dtype)
    if exclusive:
        total = total - values
    return np.flip(total, at) if reverse else total


def one_hot(
    indices: Array, one_hot_vector_size: Any, axis: int = -1, on_value: Any = 1, off_value: Any = 0
) -> Array:
    """on_value at each index along a new axis, off_value elsewhere."""
    size = int(np.asarray(one_hot_vector_size).item())
    hit = np.arange(size) == np.asarray(indices)[..., None]
    return np.moveaxis(np.where(hit, on_value, off_value), -1, int(axis))


def range_1d(end: Any, start: Any, step: Any) -> Array:
    """start, start + step ... before end."""
    first, last, by = (np.asarray(v).item() for v in (start, end, step))
    return np.asarray(np.arange(first, last, by, dtype=np.asarray(start).dtype))


def topk(
    x: Array, k: Any = 1, axis: int = -1, ascending: bool = False,
    sort: bool = True, return_indices: bool = True, output_indices_dtype: str = "int32",
) -> Any:  # fmt: skip
    """The largest or smallest k along an axis, in order, and where they were."""
    del sort  # sorted is one of the orders that unsorted allows
    order = argsort(x, axis, ascending)
    order = order.take(range(int(k) if int(k) >= 0 else x.shape[int(axis)]), int(axis))
    values = np.take_along_axis(x, order, int(axis))
    return (values, order.astype(output_indices_dtype)) if return_indices else values


def argsort(x: Array, axis: int = -1, ascending: bool = False) -> Array:
    """Indices in the order of the values; equal ones in the order they lie."""
    signed = x if ascending else -x.astype(np.float64)
    return np.argsort(signed, axis=int(axis), kind="stable")


def fill(shape: Any, value: Any = 0.0) -> Array:
    """A tensor of one value."""
    return np.full(ints(shape), np.asarray(value).reshape(()))


def fill_like(ref_tensor: Array, value: Any = 0.0) -> Array:
    """A tensor of one value with another tensor's shape."""
    return fill(ref_tensor.shape, value)


OPS: dict[str, Op] = {
    "argsort": argsort,
    "band_part": band_part,
    "batch_to_space": batch_to_space,
    "concat": concat,
    "cumsum": cumsum,
    "depth_to_space": depth_to_space,
    "expand_dims": expand_dims,
    "fill": fill,
    "fill_like": fill_like,
    "flatten2d": flatten2d,
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "gather_nd": gather_nd,
    "non_zero": lambda x: np.argwhere(x),
    "one_hot": one_hot,
    "pad": pad,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "range_1d": range_1d,
    "reshape": reshape,
    "reshape_like": reshape_like,
    "reverse": reverse,
    "reverse_sequence": reverse_sequence,
    "scatter": scatter,
    "scatter_along_axis": scatter_along_axis,
    "scatter_nd": scatter_nd,
    "shape": lambda x: np.array(x.shape, np.int32),
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "slice_update": slice_update,
    "sliding_windows": sliding_windows,
    "space_to_batch": space_to_batch,
    "space_to_depth": space_to_depth,
    "split": split,
    "squeeze": squeeze,
    "stack": lambda values, axis: np.stack(values, int(axis)),
    "tile": lambda x, reps: np.tile(x, ints(reps)),
    "topk": topk,
    "transpose": lambda x, perm: np.transpose(x, ints(perm)),
}
"""The operators of this module by MIL's names."""
