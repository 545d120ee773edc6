"""Tensors of a model: quantized and packed, or floating point as views of a file.

Both kinds have `shape`, `nbytes` (bytes in memory, padding included) and `rows(a, b)` (float32
values of some rows), so that the reference, the rounders and the converters treat them alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import SchemeError, check_type, unknown
from edgeq.formats.packing import TILE, pack, round_up, tile_params, unpack, untile_params
from edgeq.formats.schemes import SUPERBLOCK, FloatType, QuantScheme
from edgeq.formats.two_level import TwoLevelScales, offsets, pack_scales, products, unpack_scales

BLOCK_ELEMENTS = 1 << 20
"""Elements of a tensor that are worked on at once where nothing else is said."""
CACHED_ELEMENTS = 1 << 17
"""Weights dequantized at once, so that the intermediate arrays stay in the cache."""


def row_blocks(
    shape: Sequence[int], elements: int = BLOCK_ELEMENTS, *, multiple: int = 1
) -> Iterator[slice]:
    """Cut a tensor into runs of whole rows, so that it can be worked on in bounded memory.

    Args:
        shape: of the tensor; rows are along the first axis.
        elements: most elements of a run, though a run has at least ``multiple`` rows.
        multiple: rows of every run but the last are a multiple of this.

    Example:
        >>> [(part.start, part.stop) for part in row_blocks((10, 4), 16)]
        [(0, 4), (4, 8), (8, 10)]
    """
    step = elements // max(math.prod(shape[1:]), 1) // multiple * multiple
    step = max(multiple, step)
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


@runtime_checkable
class Tensor(Protocol):
    """The interface of every tensor of a model."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape, without padding."""

    @property
    def nbytes(self) -> int:
        """Bytes held, padding, scales and tables included."""

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows ``start:stop`` along the first axis as float32 (a copy)."""

    def numpy(self) -> NDArray[np.float32]:
        """The whole tensor as float32 (a copy)."""


def bf16_to_float32(raw: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Widen bfloat16 bit patterns, exactly."""
    wide = raw.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def float32_to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round finite float32 to the nearest bfloat16, ties to even, as bit patterns.

    Values beyond the largest bfloat16 become infinite.
    """
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


@dataclass(frozen=True, eq=False)
class FloatTensor:
    """A floating-point tensor, usually a view of a memory-mapped file.

    Args:
        dtype: "float32", "float16" or "bfloat16".
        data: the array; float32, float16, or uint16 bit patterns of bfloat16.
    """

    dtype: FloatType
    data: NDArray[np.generic]

    def __post_init__(self) -> None:
        known = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
        if self.dtype not in known:
            raise SchemeError(unknown("float type of a tensor", str(self.dtype), known))
        want = known[self.dtype]
        check_type("data", self.data, np.ndarray)
        if self.data.dtype != want:
            raise SchemeError(
                f"a {self.dtype} tensor holds {np.dtype(want)}, got {self.data.dtype}"
            )

    def __repr__(self) -> str:
        return f"<FloatTensor {self.dtype} {list(self.shape)}, {self.nbytes} bytes>"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        return self.data.shape

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.data.nbytes

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows ``start:stop`` as float32 (a copy)."""
        part = self.data[start:stop]
        if self.dtype == "bfloat16":
            return bf16_to_float32(part.view(np.uint16))
        return part.astype(np.float32)

    def numpy(self) -> NDArray[np.float32]:
        """The whole tensor as float32 (a copy)."""
        return self.rows(0, self.shape[0])


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """A quantized weight matrix in the packed tile layout of `edgeq.formats.packing`.

    The value of a weight is ``scale * (code - zero_point)``, or ``scale * code + minimum`` if the
    scheme has a minimum.

    Args:
        scheme: how it was quantized.
        shape: (N, K), unpadded.
        packed: uint8 [tiles, blocks, bits*64], tiles = ceil(N/16), blocks = padded K / 32.
        scales: float16 [tiles, groups, 16]; rows past N are 0. With two-level scales uint8
            [tiles, K / 256, bytes], see `edgeq.formats.two_level`, minimums included.
        zero_points: uint8 [tiles, groups, 16] if the scheme has them, else None.
        palette: int8 [2**bits] if the scheme has a codebook: the weight is
            ``scale * palette[code]``; else None.
        minimums: float16 [tiles, groups, 16] if the scheme has a minimum and its scales have one
            level, else None.

    Raises:
        SchemeError: a part has another shape or type than the scheme asks for.
    """

    scheme: QuantScheme
    shape: tuple[int, int]
    packed: NDArray[np.uint8]
    scales: NDArray[np.float16] | NDArray[np.uint8]
    zero_points: NDArray[np.uint8] | None = None
    palette: NDArray[np.int8] | None = None
    minimums: NDArray[np.float16] | None = None

    def __repr__(self) -> str:
        return f"<QuantTensor {self.scheme} {list(self.shape)}, {self.nbytes} bytes>"

    def __post_init__(self) -> None:
        check_type("scheme", self.scheme, QuantScheme)
        check_type("shape", self.shape, tuple, list)
        if len(self.shape) != 2:
            raise SchemeError(f"a quantized tensor is a matrix; its shape is {list(self.shape)}")
        wants = part_shapes(self.scheme, self.shape)
        for part, (dtype, shape) in wants.items():
            got = getattr(self, part)
            check_type(part, got, np.ndarray, None)
            if got is None or got.dtype != dtype or got.shape != shape:
                actual = "nothing" if got is None else f"{got.dtype} {list(got.shape)}"
                raise SchemeError(
                    f"{part} of a {self.scheme} tensor [{self.shape[0]}, {self.shape[1]}] "
                    f"must be {np.dtype(dtype)} {list(shape)}, got {actual}"
                )
        for part in ("zero_points", "palette", "minimums"):
            if part not in wants and getattr(self, part) is not None:
                raise SchemeError(f"a {self.scheme} tensor has no {part}")

    @classmethod
    def from_codes(
        cls,
        scheme: QuantScheme,
        codes: NDArray[np.uint8],
        scales: NDArray[np.floating] | TwoLevelScales,
        zero_points: NDArray[np.integer] | None = None,
        palette: NDArray[np.int8] | None = None,
        minimums: NDArray[np.floating] | None = None,
    ) -> QuantTensor:
        """Build from plain codes.

        Args:
            scheme: the scheme.
            codes: uint8 [N, K], unpadded.
            scales: [N, G] (or [1, 1] for granularity "tensor"); must be exact in float16. With
                two-level scales their parts; K is then a multiple of 256.
            zero_points: [N, G] if the scheme has them.
            palette: int8 [2**bits] if the scheme has a codebook.
            minimums: [N, G] if the scheme has a minimum and its scales have one level; must be
                exact in float16.
        """
        n, k = codes.shape
        np_, kp, g = round_up(n, TILE), scheme.padded_k(k), scheme.n_groups(k)

        def tiled(values: NDArray[np.generic], dtype: type[np.generic], fill: int = 0) -> Any:
            whole = np.full((np_, g), fill, dtype)
            whole[:n] = values
            return tile_params(whole)

        full = np.full((np_, kp), 0 if scheme.minimum else scheme.mid, np.uint8)
        zero: NDArray[np.uint8] | None = None
        if zero_points is not None:
            zero = tiled(zero_points, np.uint8, scheme.mid)
            full[:] = np.repeat(untile_params(zero), kp // g, axis=1)  # padding is worth exactly 0
        full[:n, :k] = codes
        return cls(
            scheme,
            (n, k),
            pack(full, scheme.bits),
            pack_scales(scheme, scales)
            if isinstance(scales, TwoLevelScales)
            else tiled(scales, np.float16),
            zero,
            palette,
            None if minimums is None else tiled(minimums, np.float16),
        )

    @property
    def nbytes(self) -> int:
        """Bytes held, padding, scales and tables included."""
        parts = (self.packed, self.scales, self.zero_points, self.palette, self.minimums)
        return sum(p.nbytes for p in parts if p is not None)

    @cached_property
    def bpw(self) -> float:
        """Bits held per weight, with scales, zero points and padding counted."""
        return 8.0 * self.nbytes / (self.shape[0] * self.shape[1])

    def codes(self, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
        """Codes of rows ``start:stop``, uint8 [rows, K], unpadded."""
        tiles, part = self.tiles(start, stop)
        return unpack(self.packed[tiles], self.scheme.bits)[part, : self.shape[1]]

    def row_params(
        self, start: int = 0, stop: int | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Scales float32 [rows, G] and zero points uint8 [rows, G] of rows ``start:stop``.

        The zero points of a scheme with a minimum are 0.
        """
        tiles, part = self.tiles(start, stop)
        if self.scheme.two_level:
            two = unpack_scales(self.scheme, self.scales[tiles])  # type: ignore[arg-type]
            scales = products(self.scheme, two.group_scales[part], two.upper_scales[part])
        else:
            scales = untile_params(self.scales[tiles])[part].astype(np.float32)
        if self.zero_points is None:
            zero = 0 if self.scheme.minimum else self.scheme.mid
            return scales, np.full(scales.shape, zero, np.uint8)
        return scales, untile_params(self.zero_points[tiles])[part]  # type: ignore[return-value]

    def row_minimums(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32] | None:
        """Minimums float32 [rows, G] of rows ``start:stop``; None if the scheme has none."""
        tiles, part = self.tiles(start, stop)
        if self.minimums is not None:
            return untile_params(self.minimums[tiles])[part].astype(np.float32)
        if not self.scheme.minimum:
            return None
        two = unpack_scales(self.scheme, self.scales[tiles])  # type: ignore[arg-type]
        assert two.group_minimums is not None
        assert two.upper_minimums is not None
        return products(self.scheme, two.group_minimums[part], two.upper_minimums[part])

    def tiles(self, start: int, stop: int | None) -> tuple[slice, slice]:
        """The tiles that hold rows ``start:stop``, and where these are among the tiles' rows."""
        stop = self.shape[0] if stop is None else min(stop, self.shape[0])
        first = start // TILE
        return slice(first, -(-stop // TILE)), slice(start - first * TILE, stop - first * TILE)

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows ``start:stop``, dequantized."""
        n, k = self.shape
        stop = min(stop, n)
        out = np.empty((max(stop - start, 0), k), np.float32)
        for part in row_blocks(out.shape, CACHED_ELEMENTS, multiple=TILE):
            self._dequantize(start + part.start, start + part.stop, out[part])
        return out

    def _dequantize(self, start: int, stop: int, out: NDArray[np.float32]) -> None:
        k = self.shape[1]
        codes = self.codes(start, stop)
        scales, zeros = self.row_params(start, stop)
        size = self.scheme.group_size or k
        if self.palette is not None:
            out[:] = self.palette[codes]
        else:
            np.subtract(codes, np.repeat(zeros, size, axis=1)[:, :k], out=out, dtype=np.float32)
        out *= np.repeat(scales, size, axis=1)[:, :k]
        minimums = self.row_minimums(start, stop)
        if minimums is not None:
            out += np.repeat(minimums, size, axis=1)[:, :k]

    def numpy(self) -> NDArray[np.float32]:
        """The whole tensor as float32 (a copy)."""
        return self.rows(0, self.shape[0])


def part_shapes(
    scheme: QuantScheme, shape: tuple[int, int]
) -> dict[str, tuple[type[np.generic], tuple[int, ...]]]:
    """The arrays a quantized tensor is made of: part name -> (dtype, shape)."""
    tiles = round_up(shape[0], TILE) // TILE
    groups = scheme.n_groups(shape[1])
    parts: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {
        "packed": (np.uint8, (tiles, scheme.padded_k(shape[1]) // 32, scheme.bits * 64)),
        "scales": (np.float16, (tiles, groups, TILE)),
    }
    if scheme.two_level:
        records = scheme.padded_k(shape[1]) // SUPERBLOCK
        parts["scales"] = (np.uint8, (tiles, records, offsets(scheme).nbytes))
    elif scheme.minimum:
        parts["minimums"] = (np.float16, (tiles, groups, TILE))
    if scheme.has_zero_points:
        parts["zero_points"] = (np.uint8, (tiles, groups, TILE))
    if scheme.codebook:
        parts["palette"] = (np.int8, (scheme.n_codes,))
    return parts


def part_nbytes(scheme: QuantScheme, shape: tuple[int, int]) -> list[int]:
    """Bytes of each array a quantized tensor is made of, in the order of `part_shapes`."""
    parts = part_shapes(scheme, shape).values()
    return [math.prod(size) * np.dtype(dtype).itemsize for dtype, size in parts]
