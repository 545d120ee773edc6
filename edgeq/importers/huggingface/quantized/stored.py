"""Matrices that another library quantized, as a checkpoint's files store them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.formats.kept import KeptTensor
from edgeq.formats.schemes import GROUP_SIZES, QuantScheme
from edgeq.formats.tensor import FloatTensor, QuantTensor, bf16_to_float32


@dataclass(frozen=True)
class StoredRows:
    """The integers and numbers of some rows; arguments of `QuantTensor.from_codes`.

    Args:
        codes: uint8 [rows, K].
        scales: float16 [rows, G].
        zero_points: uint8 [rows, G] if the scheme has them.
        minimums: float16 [rows, G] if the scheme has them.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float16]
    zero_points: NDArray[np.uint8] | None = None
    minimums: NDArray[np.float16] | None = None


@dataclass(frozen=True, eq=False)
class KeptMatrix(KeptTensor):
    """A quantized matrix of a checkpoint; its ``source_type`` is as "GPTQ w4-g128".

    Args:
        data: the largest of its arrays, a view of the file.
        read: gives rows ``start:stop``.
        first: the row of the stored matrix that is row 0 here.
        order: int [N], which of the rows from `first` on each row is; None for that order.
            Neighbors must come from near one another.
        palette: int8 [2**bits], the table that codes index, if the scheme has one.
    """

    data: NDArray[Any]
    read: Callable[[int, int], StoredRows]
    first: int = 0
    order: NDArray[np.intp] | None = None
    palette: NDArray[np.int8] | None = None

    def part(self, start: int, stop: int) -> KeptMatrix:
        """Rows ``start:stop`` as a matrix of their own."""
        nbytes = self.nbytes * (stop - start) // self.shape[0]
        shape = (stop - start, self.shape[1])
        return replace(self, shape=shape, nbytes=nbytes, first=self.first + start)

    def quantized(self, start: int, stop: int) -> QuantTensor:
        """Rows ``start:stop``, packed; no others are read.

        Raises:
            FormatError: a number among them is damaged.
            UnsupportedError: a scale that float16 cannot hold.
        """
        stop = min(stop, self.shape[0])
        if self.order is None:
            rows = self.read(self.first + start, self.first + stop)
        else:
            rows = self._picked(self.order[start:stop])
        return QuantTensor.from_codes(
            self.scheme, rows.codes, rows.scales, rows.zero_points, self.palette, rows.minimums
        )

    def _picked(self, order: NDArray[np.intp]) -> StoredRows:
        """Rows in another order, of one run of stored rows."""
        low = int(order.min())
        run = self.read(self.first + low, self.first + int(order.max()) + 1)
        parts = (run.codes, run.scales, run.zero_points, run.minimums)
        return StoredRows(*(None if p is None else p[order - low] for p in parts))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Grouping:
    """Maps the groups of a checkpoint to those of a scheme.

    Args:
        size: weights of a group of the scheme; None for a scale a row.
        repeat: how many groups of the scheme one group of the checkpoint is.
        stored: how many groups of a row the checkpoint has.
    """

    size: int | None
    repeat: int
    stored: int

    def scheme(self, bits: int, *, symmetric: bool, minimum: bool = False) -> QuantScheme:
        """The scheme of these groups."""
        return QuantScheme(
            bits,
            symmetric=symmetric,
            granularity="group" if self.size else "channel",
            group_size=self.size,
            minimum=minimum,
        )

    def spread(self, values: NDArray[Any], scheme: QuantScheme, columns: int) -> NDArray[Any]:
        """Numbers of stored groups [rows, stored] -> of the scheme's groups [rows, G]."""
        values = np.repeat(values, self.repeat, axis=1) if self.repeat > 1 else values
        missing = scheme.n_groups(columns) - values.shape[1]  # of the padding
        if missing:
            values = np.concatenate([values, np.repeat(values[:, -1:], missing, axis=1)], axis=1)
        return values


def grouping(name: str, group_size: int, columns: int) -> Grouping:
    """Find the scheme's groups that hold a checkpoint's groups exactly.

    Args:
        name: the matrix, for messages.
        group_size: weights of a group; -1 for a whole row.
        columns: K.

    Raises:
        FormatError: the size does not divide a row.
        UnsupportedError: no group size of edgeq divides it.
    """
    if group_size == -1:
        return Grouping(None, 1, 1)
    if group_size <= 0 or columns % group_size:
        raise FormatError(
            f"tensor {name} has rows of {columns} weights, which groups of {group_size} do not "
            "divide; group_size must be a divisor, or -1 for a scale for each row"
        )
    sizes = [size for size in GROUP_SIZES if group_size % size == 0]
    if sizes:
        return Grouping(sizes[-1], group_size // sizes[-1], columns // group_size)
    if group_size == columns:
        return Grouping(None, 1, 1)
    raise UnsupportedError(
        f"tensor {name} has groups of {group_size} weights; edgeq keeps groups of multiples of "
        f"{GROUP_SIZES[0]}, so quantize the float checkpoint with one of them"
    )


def exact_half(values: NDArray[Any], dtype: str, name: str) -> NDArray[np.float16]:
    """Scales or minimums as float16, never rounded.

    Args:
        values: the stored numbers; bfloat16 as its uint16 bit patterns.
        dtype: safetensors' name of their type: "F16", "BF16" or "F32".
        name: their tensor, for messages.

    Raises:
        FormatError: one is not finite.
        UnsupportedError: one is not exact in float16.
    """
    if dtype == "F16":
        half = np.ascontiguousarray(values).astype(np.float16)
        if not np.isfinite(half).all():
            raise FormatError(f"tensor {name} holds a number that is not finite; it is damaged")
        return half
    wide = np.ascontiguousarray(values)
    wide = bf16_to_float32(wide) if dtype == "BF16" else wide.astype(np.float32)
    if not np.isfinite(wide).all():
        raise FormatError(f"tensor {name} holds a number that is not finite; it is damaged")
    with np.errstate(over="ignore"):
        half = wide.astype(np.float16)
    lost = half.astype(np.float32) != wide
    if lost.any():
        worst = float(wide[lost][0])
        raise UnsupportedError(
            f"tensor {name} holds {worst:.9g} as {dtype}, which float16 cannot hold exactly, and "
            "edgeq does not round scales of others; save the checkpoint with float16 scales, or "
            "quantize the float checkpoint with edgeq quantize"
        )
    return half


def unpack_fields(words: NDArray[Any], bits: int, count: int) -> NDArray[np.uint8]:
    """Fields of a little-endian stream of bits: [rows, words] -> uint8 [rows, count].

    Field i lies in bits ``i * bits`` to ``(i + 1) * bits``, across words where it must.

    Args:
        words: 32-bit integers, each row a stream of its own.
        bits: of a field, 1 to 8.
        count: fields of a row; what is behind them is padding.

    Example:
        >>> unpack_fields(np.array([[0x87654321]], np.uint32), 4, 8).tolist()
        [[1, 2, 3, 4, 5, 6, 7, 8]]
    """
    stream = np.ascontiguousarray(words).astype("<u4", copy=False).view(np.uint8)
    if bits == 8:
        return stream[:, :count]
    if bits in (2, 4):
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        fields = (stream[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)
        return fields.reshape(len(words), -1)[:, :count]
    single = np.unpackbits(stream, axis=1, count=bits * count, bitorder="little")
    fields = single.reshape(len(words), count, bits)
    return np.packbits(fields, axis=2, bitorder="little")[:, :, 0]


Tensors = FloatTensor | KeptMatrix
"""What a checkpoint gives for a name."""
