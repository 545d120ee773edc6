"""Codes <-> bytes: the one byte layout of packed weights, shaped by the matmul kernels.

A matrix of codes [N, K] is cut into tiles of 16 rows and blocks of 32 columns (N and K are
padded). A block of ``b``-bit codes takes ``b * 64`` bytes: ``b`` planes of 64 bytes, one byte
for each (row r of 16, column c of 4), r outermost:

    packed[tile, block, plane, r, c]       uint8 [ceil(N/16), Kp/32, b, 16, 4]

    8 bits   plane j (0..7)  byte = code of column 4j+c
    4 bits   plane j (0..3)  low nibble  = code of column 8j+c
                             high nibble = code of column 8j+4+c
    2 bits   plane j (0..1)  bits 2i,2i+1 = code of column 16j+4i+c,  i = 0..3
    3 bits   planes 0..1     the low two bits of every code, laid out as for 2 bits
             plane 2         bit i = the code's high bit of column 4i+c,  i = 0..7
    5 bits   planes 0..3     the low four bits of every code, laid out as for 4 bits
             plane 4         the fifth bits, laid out as the high bits of 3-bit codes
    6 bits   planes 0..3     the low four bits of every code, laid out as for 4 bits
             planes 4..5     the two high bits of every code, laid out as for 2 bits

Unpacked, every block is eight 64-byte vectors of (16 rows x 4 columns): just what one
``vpdpbusd`` (AVX-512), two (AVX2) or four ``sdot`` by lane (ARM) multiply by four activations,
leaving one sum per row and lane, with no horizontal additions. Scales and zero points are kept
as [tiles, groups, 16] so that one load gives the 16 rows of a tile.

The same codes row-major, low nibble first (the order of ONNX, TFLite and Core ML), come from
`unpack` followed by the target's own packing; nothing is ever requantized.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.schemes import BITS, K_BLOCK

TILE = 16
"""Rows per tile."""
LANE = 4
"""Columns per byte vector: the width of one integer dot-product lane."""


def round_up(value: int, step: int) -> int:
    """The smallest multiple of ``step`` that is at least ``value``."""
    return -(-value // step) * step


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack codes into the tile layout.

    Args:
        codes: uint8 [N, K] with N a multiple of 16 and K of 32 (pad first), values < 2**bits.
        bits: one of `edgeq.formats.schemes.BITS`.

    Returns:
        uint8 [N/16, K/32, bits*64], C-contiguous.
    """
    n, k = codes.shape
    if n % TILE or k % K_BLOCK:
        raise ValueError(f"codes [{n}, {k}] must be padded to multiples of {TILE} and {K_BLOCK}")
    # v[tile, block, j, r, c]: the eight 64-byte vectors of each block; moved by whole lanes,
    # as uint32, because NumPy copies runs of four bytes five times slower
    lanes = np.ascontiguousarray(codes).view(np.uint32)
    lanes = lanes.reshape(n // TILE, TILE, k // K_BLOCK, 8).transpose(0, 2, 3, 1)
    v = np.ascontiguousarray(lanes).view(np.uint8).reshape(*lanes.shape, LANE)
    if bits == 8:
        planes = v
    elif bits == 4:
        planes = _pack4(v)
    elif bits == 2:
        planes = _pack2(v)
    elif bits == 3:
        planes = np.concatenate([_pack2(v & np.uint8(3)), _pack1(v >> np.uint8(2))], axis=2)
    elif bits == 5:
        planes = np.concatenate([_pack4(v & np.uint8(15)), _pack1(v >> np.uint8(4))], axis=2)
    elif bits == 6:
        planes = np.concatenate([_pack4(v & np.uint8(15)), _pack2(v >> np.uint8(4))], axis=2)
    else:
        raise ValueError(f"bits is {bits}; use one of {', '.join(map(str, BITS))}")
    return np.ascontiguousarray(planes).reshape(n // TILE, k // K_BLOCK, bits * 64)


def _pack4(v: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return v[:, :, 0::2] | (v[:, :, 1::2] << np.uint8(4))


def _pack1(v: NDArray[np.uint8]) -> NDArray[np.uint8]:
    plane = v[:, :, :1].copy()
    for i in range(1, 8):
        plane[:, :, 0] |= v[:, :, i] << np.uint8(i)
    return plane


def _pack2(v: NDArray[np.uint8]) -> NDArray[np.uint8]:
    quarters = v.reshape(*v.shape[:2], 2, 4, TILE, LANE)
    packed = quarters[:, :, :, 0].copy()
    for i in range(1, 4):
        packed |= quarters[:, :, :, i] << np.uint8(2 * i)
    return packed


def unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The inverse of `pack`.

    Args:
        packed: uint8 [tiles, blocks, bits*64].
        bits: one of `edgeq.formats.schemes.BITS`.

    Returns:
        uint8 codes [tiles*16, blocks*32].
    """
    tiles, blocks, nbytes = packed.shape
    if nbytes != bits * 64:
        raise ValueError(f"a block of {bits}-bit codes has {bits * 64} bytes, got {nbytes}")
    planes = packed.reshape(tiles, blocks, bits, TILE, LANE)
    v = np.empty((tiles, blocks, 8, TILE, LANE), np.uint8)
    if bits == 8:
        v[:] = planes
    elif bits >= 4:
        v[:, :, 0::2] = planes[:, :, :4] & 15
        v[:, :, 1::2] = planes[:, :, :4] >> 4
        for i in range(8):
            if bits == 5:
                v[:, :, i] |= ((planes[:, :, 4] >> i) & 1) << 4
            elif bits == 6:
                v[:, :, i] |= ((planes[:, :, 4 + i // 4] >> (2 * (i % 4))) & 3) << 4
    else:
        for i in range(8):
            v[:, :, i] = (planes[:, :, i // 4] >> (2 * (i % 4))) & 3
            if bits == 3:
                v[:, :, i] |= ((planes[:, :, 2] >> i) & 1) << 2
    lanes = v.view(np.uint32)[..., 0].transpose(0, 3, 1, 2)
    return np.ascontiguousarray(lanes).view(np.uint8).reshape(tiles * TILE, blocks * K_BLOCK)


def tile_params(values: NDArray[np.generic]) -> NDArray[np.generic]:
    """Per-row parameters [N, G] -> [N/16, G, 16], the order the kernels load them in."""
    n, g = values.shape
    return np.ascontiguousarray(values.reshape(n // TILE, TILE, g).transpose(0, 2, 1))


def untile_params(values: NDArray[np.generic]) -> NDArray[np.generic]:
    """[tiles, G, 16] -> [tiles*16, G], the inverse of `tile_params`."""
    tiles, g, _ = values.shape
    return values.transpose(0, 2, 1).reshape(tiles * TILE, g)
