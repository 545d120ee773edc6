"""The scales of schemes with two levels, as GGUF's K-quants have them.

The scale of a group is an 8-bit integer times a float16 scale that 256 weights of a row share; with
a minimum, the group's minimum is an integer times a float16 minimum likewise. All numbers of 16
rows and 256 columns lie together in one record of bytes, so that a kernel reads one stream:

    float16 upper_scales[16]                 one of each row
    float16 upper_minimums[16]               if the scheme has a minimum
    int8    group_scales[groups][16]         groups = 256 / group_size
    int8    group_minimums[groups][16]       if the scheme has a minimum

With 2 bits and a minimum, ``group_scales`` are bytes that hold the scale in the low four bits and
the minimum in the high four, and there are no ``group_minimums``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.packing import TILE, round_up, tile_params, untile_params
from edgeq.formats.schemes import SUPERBLOCK, QuantScheme

_HALF = 2  # bytes of a float16


class TwoLevelScales(NamedTuple):
    """The numbers that make up the scales of a matrix [N, K] with G groups a row.

    Args:
        group_scales: int8 [N, G].
        upper_scales: float16 [N, G * group_size / 256].
        group_minimums: int8 [N, G], or None without a minimum.
        upper_minimums: float16, of the shape of ``upper_scales``, or None.
    """

    group_scales: NDArray[np.int8]
    upper_scales: NDArray[np.float16]
    group_minimums: NDArray[np.int8] | None = None
    upper_minimums: NDArray[np.float16] | None = None


class Offsets(NamedTuple):
    """Where the parts of a record begin, in bytes, and how long it is."""

    upper_scales: int
    upper_minimums: int
    group_scales: int
    group_minimums: int
    nbytes: int


def offsets(scheme: QuantScheme) -> Offsets:
    """The places in a record of a scheme with two-level scales."""
    groups = groups_per_record(scheme) * TILE
    group_scales = _HALF * TILE * (2 if scheme.minimum else 1)
    group_minimums = group_scales + groups
    apart = scheme.minimum and not scheme.packs_nibbles
    return Offsets(0, _HALF * TILE, group_scales, group_minimums, group_minimums + groups * apart)


def groups_per_record(scheme: QuantScheme) -> int:
    """Groups of a row that share an upper scale."""
    assert scheme.group_size is not None  # two-level scales are of groups
    return SUPERBLOCK // scheme.group_size


def pack_scales(scheme: QuantScheme, parts: TwoLevelScales) -> NDArray[np.uint8]:
    """Records of a matrix.

    Args:
        scheme: with two-level scales.
        parts: of its N rows.

    Returns:
        uint8 [ceil(N / 16), records of a row, bytes of a record]; rows past N are 0.
    """
    n, records = parts.upper_scales.shape
    tiles, at = round_up(n, TILE) // TILE, offsets(scheme)
    out = np.zeros((tiles, records, at.nbytes), np.uint8)

    def put(start: int, values: NDArray[np.generic], per_record: int) -> None:
        whole = np.zeros((tiles * TILE, values.shape[1]), values.dtype)
        whole[:n] = values
        packed = tile_params(whole).reshape(tiles, records, -1).view(np.uint8)
        out[:, :, start : start + per_record * TILE * values.dtype.itemsize] = packed

    groups, scales = groups_per_record(scheme), parts.group_scales
    put(at.upper_scales, parts.upper_scales, 1)
    if parts.upper_minimums is not None and parts.group_minimums is not None:
        put(at.upper_minimums, parts.upper_minimums, 1)
        if scheme.packs_nibbles:
            scales = scales | (parts.group_minimums << np.int8(4))
        else:
            put(at.group_minimums, parts.group_minimums, groups)
    put(at.group_scales, scales, groups)
    return out


def unpack_scales(scheme: QuantScheme, records: NDArray[np.uint8]) -> TwoLevelScales:
    """The inverse of `pack_scales`, for whole tiles.

    Args:
        scheme: with two-level scales.
        records: uint8 [tiles, records of a row, bytes of a record].
    """
    tiles, count, _ = records.shape
    at, groups = offsets(scheme), groups_per_record(scheme)

    def get(start: int, dtype: type[np.generic], per_record: int) -> NDArray[np.generic]:
        size = per_record * TILE * np.dtype(dtype).itemsize
        part = np.ascontiguousarray(records[:, :, start : start + size]).view(dtype)
        return untile_params(part.reshape(tiles, count * per_record, TILE))

    upper, scales = get(at.upper_scales, np.float16, 1), get(at.group_scales, np.int8, groups)
    if not scheme.minimum:
        return TwoLevelScales(scales, upper)  # type: ignore[arg-type]
    upper_minimums = get(at.upper_minimums, np.float16, 1)
    if scheme.packs_nibbles:
        both = scales.view(np.uint8)
        scales = (both & np.uint8(15)).view(np.int8)
        minimums: NDArray[np.generic] = (both >> np.uint8(4)).view(np.int8)
    else:
        minimums = get(at.group_minimums, np.int8, groups)
    return TwoLevelScales(scales, upper, minimums, upper_minimums)  # type: ignore[arg-type]


def products(
    scheme: QuantScheme, integers: NDArray[np.int8], upper: NDArray[np.float16]
) -> NDArray[np.float32]:
    """Integers of groups times the float16 numbers above them: exact in float32.

    Args:
        scheme: with two-level scales.
        integers: int8 [rows, G].
        upper: float16 [rows, records of a row].

    Returns:
        float32 [rows, G].
    """
    wide = np.repeat(upper.astype(np.float32), groups_per_record(scheme), axis=1)
    return wide * integers.astype(np.float32)
