"""Blocks of GGUF's types from a scheme's integers: the inverse of `edgeq.importers.gguf.blocks`.

A scheme that stands for the values of a type of GGUF is written in that type: two-level scales as
Q2_K to Q6_K and IQ4_XS, minimums as Q4_1 and Q5_1, the tables of IQ4_NL and MXFP4 in 4 bits, two
bits in groups of 256 as TQ2_0. A tensor that came from a GGUF file becomes the very bytes that it
was; one of TQ1_0 becomes TQ2_0, with the same values.

Source: the block layouts of https://github.com/ggml-org/ggml (ggml-common.h, ggml-quants.c).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.encoding import spread
from edgeq.converters.gguf.bytes import Kind
from edgeq.converters.validate.kernels import GGML_BLOCK
from edgeq.formats.schemes import SUPERBLOCK
from edgeq.formats.tensor import QuantTensor
from edgeq.formats.two_level import TwoLevelScales, unpack_scales
from edgeq.importers.gguf.blocks import FP4_TABLE, IQ4_TABLE, TERNARY, TYPES

Bytes = NDArray[np.uint8]
Halves = NDArray[np.float16]
_SMALL = ("Q4_1", "Q5_1", "IQ4_NL", "MXFP4")
"""Types with blocks of 32."""


def exact_type(tensor: QuantTensor) -> Kind | None:
    """The type whose blocks are a tensor's own integers, scales and minimums or table.

    Returns:
        None where there is none; a type may hold the same values in another way.
    """
    scheme, group = tensor.scheme, tensor.scheme.group_size
    if scheme.two_level:
        for kind, form in TYPES.items():
            if form.scheme == scheme and _same_table(tensor, form.palette):
                return cast(Kind, kind)
        return None
    if scheme == TERNARY:
        return "TQ2_0" if tensor.shape[1] % SUPERBLOCK == 0 else None
    if group is not None and group % GGML_BLOCK:
        return None
    if scheme.minimum:
        return "Q4_1" if scheme.bits <= 4 else "Q5_1" if scheme.bits == 5 else None
    if _same_table(tensor, IQ4_TABLE):
        return "IQ4_NL"
    if _same_table(tensor, FP4_TABLE) and _powers_of_two(tensor.row_params()[0]):
        return "MXFP4"
    return None


def block_rows(kind: Kind, tensor: QuantTensor, start: int, stop: int) -> Bytes:
    """Rows of a tensor in the type that `exact_type` gives.

    Args:
        kind: the type.
        tensor: [N, K], K a multiple of the type's block.
        start, stop: the rows.

    Returns:
        uint8 [rows, bytes of a row].
    """
    rows, k = stop - start, tensor.shape[1]
    size = GGML_BLOCK if kind in _SMALL else SUPERBLOCK
    codes = tensor.codes(start, stop).reshape(rows, k // size, size)
    if tensor.scheme.two_level:
        tiles, part = tensor.tiles(start, stop)
        parts = unpack_scales(tensor.scheme, cast(Bytes, tensor.scales[tiles]))
        blocks = _TWO_LEVEL[kind](codes, _Scales(parts, part, codes.shape[1]))
    elif kind == "TQ2_0":
        d = -tensor.row_params(start, stop)[0].astype(np.float16)
        blocks = [_quarters(np.uint8(3) - codes), _half(d)]
    else:
        scales = _of_blocks(tensor, tensor.row_params(start, stop)[0])
        blocks = [_exponents(scales) if kind == "MXFP4" else _half(scales)]
        least = tensor.row_minimums(start, stop)
        if least is not None:
            blocks.append(_half(_of_blocks(tensor, least)))
        if kind == "Q5_1":
            blocks.append(np.packbits(codes >> 4, axis=-1, bitorder="little"))
        blocks.append(_paired(codes))
    return np.concatenate(blocks, axis=-1).reshape(rows, -1)


def _same_table(tensor: QuantTensor, table: NDArray[np.int8] | None) -> bool:
    if tensor.palette is None or table is None:
        return tensor.palette is table
    return np.array_equal(tensor.palette, table)


def _powers_of_two(scales: NDArray[np.float32]) -> bool:
    return bool((np.frexp(scales)[0] == 0.5).all())


def _of_blocks(tensor: QuantTensor, params: NDArray[np.float32]) -> Halves:
    """Parameters of groups as those of blocks of 32, in float16, which holds them."""
    spread_out = spread(params, tensor.shape[1], tensor.scheme.group_size, GGML_BLOCK)
    return spread_out.astype(np.float16)


def _half(values: Halves) -> Bytes:
    """Float16 as its two bytes, little-endian: uint8 [..., 2]."""
    return values.astype("<f2")[..., None].view(np.uint8)


def _exponents(scales: Halves) -> Bytes:
    """Powers of two as MXFP4 holds them, one byte each; its table is of half the values of ours."""
    return (np.frexp(scales.astype(np.float32))[1] - 1 + 128).astype(np.uint8)[..., None]


def _paired(codes: Bytes) -> Bytes:
    """The first half of each run as low nibbles, the second as high ones: [..., 2n] -> [..., n]."""
    n = codes.shape[-1] // 2
    return (codes[..., :n] & np.uint8(15)) | (codes[..., n:] << np.uint8(4))


class _Scales:
    """Two-level scales of some rows, block by block."""

    def __init__(self, parts: TwoLevelScales, rows: slice, blocks: int) -> None:
        def of_groups(values: NDArray[np.int8] | None) -> Bytes:
            if values is None:
                return np.empty(0, np.uint8)
            return values[rows].reshape(-1, blocks, values.shape[1] // blocks).view(np.uint8)

        def of_blocks(values: Halves | None) -> Bytes:
            return np.empty(0, np.uint8) if values is None else _half(values[rows])

        self.scales, self.minimums = of_groups(parts.group_scales), of_groups(parts.group_minimums)
        self.d = of_blocks(parts.upper_scales)
        # ggml subtracts dmin
        self.dmin = of_blocks(None if parts.upper_minimums is None else -parts.upper_minimums)


def _six_bit_scales(of: _Scales) -> Bytes:
    """Scales and minimums of Q4_K and Q5_K, 6 bits each: 12 bytes."""
    scales, minimums = of.scales, of.minimums
    low = scales[..., :4] | ((scales[..., 4:] >> 4) << 6)
    mid = minimums[..., :4] | ((minimums[..., 4:] >> 4) << 6)
    high = (scales[..., 4:] & 15) | ((minimums[..., 4:] & 15) << 4)
    return np.concatenate([low, mid, high], axis=-1)


def _bit_planes(codes: Bytes, bit: int) -> Bytes:
    """One bit of each of 256 weights: bit i of byte l is that of weight 32 i + l."""
    planes = (codes >> np.uint8(bit)) & np.uint8(1)
    planes = planes.reshape(*codes.shape[:2], 8, 32).swapaxes(-1, -2)
    return np.packbits(planes, axis=-1, bitorder="little")[..., 0]


def _quarters(codes: Bytes) -> Bytes:
    """Two bits of each weight: byte l of a run of 32 holds those of weights l, 32+l, 64+l, 96+l."""
    runs = (codes & np.uint8(3)).reshape(*codes.shape[:2], 2, 4, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    quarters: Bytes = np.bitwise_or.reduce(runs << shifts, axis=-2)
    return quarters.reshape(*codes.shape[:2], 64)


def _nibbles(codes: Bytes, runs: int) -> Bytes:
    """Low four bits, each run by itself."""
    return _paired(codes.reshape(*codes.shape[:2], runs, -1)).reshape(*codes.shape[:2], 128)


def _q2_k(codes: Bytes, of: _Scales) -> list[Bytes]:
    return [of.scales | (of.minimums << np.uint8(4)), _quarters(codes), of.d, of.dmin]


def _q3_k(codes: Bytes, of: _Scales) -> list[Bytes]:
    scales = of.scales + np.uint8(32)
    high = (scales >> np.uint8(4)).reshape(*scales.shape[:2], 4, 4)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    above = np.bitwise_or.reduce(high << shifts, axis=-2)
    return [_bit_planes(codes, 2), _quarters(codes), _paired(scales), above, of.d]


def _q4_k(codes: Bytes, of: _Scales) -> list[Bytes]:
    return [of.d, of.dmin, _six_bit_scales(of), _nibbles(codes, 4)]


def _q5_k(codes: Bytes, of: _Scales) -> list[Bytes]:
    return [of.d, of.dmin, _six_bit_scales(of), _bit_planes(codes, 4), _nibbles(codes, 4)]


def _q6_k(codes: Bytes, of: _Scales) -> list[Bytes]:
    return [_nibbles(codes, 2), _quarters(codes >> np.uint8(4)), of.scales, of.d]


def _iq4_xs(codes: Bytes, of: _Scales) -> list[Bytes]:
    scales = of.scales + np.uint8(32)
    shifts = np.arange(0, 16, 2, dtype=np.uint16)
    above = np.bitwise_or.reduce((scales >> 4).astype("<u2") << shifts, axis=-1, keepdims=True)
    low = (scales[..., 0::2] & np.uint8(15)) | ((scales[..., 1::2] & np.uint8(15)) << np.uint8(4))
    return [of.d, above.astype("<u2").view(np.uint8), low, _nibbles(codes, 8)]


_TWO_LEVEL: dict[str, Callable[[Bytes, _Scales], list[Bytes]]] = {
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_XS": _iq4_xs,
}  # fmt: skip
