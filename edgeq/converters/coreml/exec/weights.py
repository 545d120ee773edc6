"""Compressed constants: decompressed row by row, when they are needed.

A constant of an ML Program may be integers with scales, indices into tables, or a mask and what
it leaves. `decompress` makes of such an operator a `Packed`, which gives any rows of it, so that
a product with a large matrix never holds it whole; small ones are kept once they were made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.coreml.exec.blob import KINDS, Blob
from edgeq.converters.coreml.exec.load import MilTensor
from edgeq.core.errors import UnsupportedError

Rows = Callable[[int, int], NDArray[Any]]


@dataclass(frozen=True)
class Packed:
    """A constant that is decompressed as it is read.

    Args:
        shape: of it.
        dtype: of what it gives.
        get: its rows ``start:stop`` along the first axis.
    """

    shape: tuple[int, ...]
    dtype: Any
    get: Rows

    @property
    def nbytes(self) -> int:
        """Bytes of the whole, decompressed."""
        return math.prod(self.shape) * int(np.dtype(self.dtype).itemsize)

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Rows ``start:stop``."""
        return self.get(start, stop).astype(self.dtype, copy=False)

    def taken(self, indices: NDArray[Any]) -> NDArray[Any]:
        """Rows by their numbers, as `np.take` gives them; no others are decompressed."""
        wanted = np.take(np.arange(self.shape[0]), indices)
        unique, places = np.unique(wanted, return_inverse=True)
        if not unique.size:
            return np.empty((*wanted.shape, *self.shape[1:]), self.dtype)
        rows = np.concatenate([self.rows(int(i), int(i) + 1) for i in unique])
        return np.asarray(rows[places.reshape(wanted.shape)])

    def array(self) -> NDArray[Any]:
        """The whole."""
        return self.rows(0, self.shape[0])


Source = MilTensor | Packed
"""Either gives ``rows`` and a ``shape``."""


def decompress(op: str, inputs: Mapping[str, Any], dtype: Any) -> Packed | tuple[Any, ...]:
    """The constant that a ``constexpr_`` operator computes.

    Args:
        op: its type.
        inputs: its constants: `Tensor`, or the `Packed` that another such operator gave.
        dtype: NumPy type of its first result.

    Raises:
        UnsupportedError: it is not known.
    """
    if op not in _OPS:
        raise UnsupportedError(f"the operator {op} cannot be executed")
    decompressed = _OPS[op](**inputs)
    first, second = decompressed
    return Packed(first, dtype, second) if callable(second) else (first, second)


def _whole(value: Any) -> Any:
    if isinstance(value, MilTensor):
        return value.get()
    return value.array() if isinstance(value, Packed) else value


def _wide(values: NDArray[Any]) -> NDArray[Any]:
    """Convert to float32, which holds differences of small integers exactly."""
    return values.astype(np.float32)


def _repeated(params: NDArray[Any], shape: tuple[int, ...], start: int, stop: int) -> NDArray[Any]:
    """Parameters of blocks, repeated over rows ``start:stop`` of a tensor of that shape."""
    rows = params[np.arange(start, stop) // (shape[0] // params.shape[0])]
    for axis in range(1, len(shape)):
        times = shape[axis] // rows.shape[axis]
        if times > 1 and rows.shape[axis] > 1:  # one alone broadcasts
            rows = np.repeat(rows, times, axis)
    return np.asarray(rows)


def _blockwise(data: Source, scale: Any, offset: Any = None) -> tuple[Any, Rows]:
    scales, zeros = _wide(_whole(scale)), None if offset is None else _wide(_whole(offset))

    def rows(start: int, stop: int) -> NDArray[Any]:
        values = _wide(data.rows(start, stop))
        if zeros is not None:
            values -= _repeated(zeros, data.shape, start, stop)
        values *= _repeated(scales, data.shape, start, stop)
        return values

    return data.shape, rows


def _affine(quantized_data: Source, zero_point: Any, scale: Any, axis: Any) -> tuple[Any, Rows]:
    shape = quantized_data.shape
    at = int(_whole(axis)) % len(shape)

    def params(value: Any) -> NDArray[Any]:
        array = _wide(np.asarray(_whole(value)))
        return array.reshape([-1 if i == at else 1 for i in range(len(shape))])

    scales, zeros = params(scale), params(zero_point)

    def rows(start: int, stop: int) -> NDArray[Any]:
        values = _wide(quantized_data.rows(start, stop))
        values -= _repeated(zeros, shape, start, stop)
        values *= _repeated(scales, shape, start, stop)
        return values

    return shape, rows


def _lut(indices: Source, lut: Any, shape: Any = None, vector_axis: Any = None) -> tuple[Any, Rows]:
    table = np.asarray(_whole(lut))
    if shape is not None:
        return _lut16(indices, table, tuple(int(d) for d in _whole(shape)))
    size = table.shape[-1]
    axis = 0 if vector_axis is None else int(_whole(vector_axis)) % len(indices.shape)
    full = tuple(d * size if i == axis else d for i, d in enumerate(indices.shape))

    def looked_up(start: int, stop: int) -> NDArray[Any]:
        values = indices.rows(start, stop).astype(np.intp)
        if table.shape[:-2] == (1,) * values.ndim:
            looked = table.reshape(table.shape[-2:])[values]
        else:
            grid = _repeated(table, (*indices.shape, *table.shape[-2:]), start, stop)
            grid = np.broadcast_to(grid, (*values.shape, *table.shape[-2:]))
            looked = np.take_along_axis(grid, values[..., None, None], axis=-2)[..., 0, :]
        looked = np.moveaxis(looked, -1, axis + 1)
        return looked.reshape(-1, *full[1:])

    def rows(start: int, stop: int) -> NDArray[Any]:
        if axis or size == 1:
            return looked_up(start, stop)
        first = start // size
        return looked_up(first, -(-stop // size))[start - first * size : stop - first * size]

    return full, rows


def _lut16(indices: Source, table: NDArray[Any], shape: tuple[int, ...]) -> tuple[Any, Rows]:
    bits = int(table.size).bit_length() - 1
    blob = Blob(KINDS[f"uint{bits}"], math.prod(shape), np.asarray(_whole(indices)).reshape(-1))
    size = math.prod(shape[1:])

    def rows(start: int, stop: int) -> NDArray[Any]:
        return np.asarray(table[blob.read(start * size, stop * size)].reshape(-1, *shape[1:]))

    return shape, rows


def _sparse(nonzero_data: Any, mask: Any, shape: Any = None) -> tuple[Any, Rows]:
    bits = np.asarray(_whole(mask))
    if shape is not None:
        size = tuple(int(d) for d in _whole(shape))
        bits = Blob(KINDS["uint1"], math.prod(size), bits.reshape(-1)).read().reshape(size)
    dense = np.zeros(bits.shape, np.asarray(_whole(nonzero_data)).dtype)
    dense[bits != 0] = _whole(nonzero_data)
    return bits.shape, lambda start, stop: dense[start:stop]


def _sparse_of(mask: Any, dense: tuple[Any, Rows]) -> tuple[Any, Any]:
    shape, rows = dense
    bits = np.asarray(_whole(mask)).reshape(shape)
    return mask, rows(0, shape[0])[bits != 0]


def _as_packed(shape_and_rows: tuple[Any, Rows], dtype: Any) -> Packed:
    return Packed(shape_and_rows[0], dtype, shape_and_rows[1])


def _sparse_blockwise(
    data_mask: Any, nonzero_data: Any, scale: Any, offset: Any = None
) -> tuple[Any, Any]:
    dense = _as_packed(_sparse(nonzero_data, data_mask), np.float32)
    return _sparse_of(data_mask, _blockwise(dense, scale, offset))


def _sparse_lut(
    indices_mask: Any, indices_nonzero_data: Any, lut: Any, vector_axis: Any = None
) -> tuple[Any, Any]:
    if np.asarray(_whole(lut)).shape[-1] > 1:
        raise UnsupportedError("constexpr_lut_to_sparse with vectors cannot be executed")
    dense = _as_packed(_sparse(indices_nonzero_data, indices_mask), np.uint8)
    return _sparse_of(indices_mask, _lut(dense, lut, None, vector_axis))


def _cast(source_val: Any, output_dtype: Any) -> tuple[Any, Rows]:
    del output_dtype  # the operator's result has that type
    return source_val.shape, source_val.rows


_OPS: dict[str, Callable[..., Any]] = {
    "constexpr_blockwise_shift_scale": _blockwise,
    "constexpr_affine_dequantize": _affine,
    "constexpr_lut_to_dense": _lut,
    "constexpr_sparse_to_dense": _sparse,
    "constexpr_sparse_blockwise_shift_scale": _sparse_blockwise,
    "constexpr_lut_to_sparse": _sparse_lut,
    "constexpr_cast": _cast,
}
KNOWN = frozenset(_OPS)
"""The operators `decompress` knows."""
