from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeq.formats.packing import pack, round_up, tile_params, unpack, untile_params

ALL_BITS = (2, 3, 4, 8)


def ramp(bits: int) -> NDArray[np.uint8]:
    """Codes [16, 32] that differ along rows and columns."""
    r, k = np.indices((16, 32))
    return ((5 * r + 3 * k + r * k) % (1 << bits)).astype(np.uint8)


def slow_pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Bit by bit from the drawing in the docstring."""
    n, k = codes.shape
    out = np.zeros((n // 16, k // 32, bits, 16, 4), np.uint8)
    for row in range(n):
        for column in range(k):
            code, j = int(codes[row, column]), column % 32
            c = j % 4
            at = out[row // 16, column // 32, :, row % 16, c]
            if bits == 8:
                at[j // 4] = code
            elif bits == 4:
                at[j // 8] |= code << (4 if j % 8 >= 4 else 0)
            else:
                at[j // 16] |= (code & 3) << (2 * (j % 16 // 4))
                if bits == 3:
                    at[2] |= (code >> 2) << (j // 4)
    return out.reshape(n // 16, k // 32, bits * 64)


# The first 12 bytes of each plane of ramp(bits).
GOLDEN = {
    2: (
        "00ffaa5555555555aaff0055",
        "00ffaa5555555555aaff0055",
    ),
    3: (
        "00ffaa5555555555aaff0055",
        "00ffaa5555555555aaff0055",
        "aaaa55aaff00ff00aa5555aa",
    ),
    4: (
        "c0f326595599dd11ea3f84d9",
        "487baed15599dd1162b70c51",
        "c0f326595599dd11ea3f84d9",
        "487baed15599dd1162b70c51",
    ),
    8: (
        "0003060905090d110a0f1419",
        "0c0f121515191d211e23282d",
        "181b1e2125292d3132373c41",
        "24272a2d35393d41464b5055",
        "3033363945494d515a5f6469",
        "3c3f424555595d616e73787d",
        "484b4e5165696d7182878c91",
        "54575a5d75797d81969ba0a5",
    ),
}


@pytest.mark.parametrize("bits", ALL_BITS)
def test_golden_bytes(bits: int) -> None:
    packed = pack(ramp(bits), bits)
    assert packed.shape == (1, 1, bits * 64)
    planes = packed.reshape(bits, 64)
    assert tuple(plane[:12].tobytes().hex() for plane in planes) == GOLDEN[bits]


@pytest.mark.parametrize("bits", ALL_BITS)
def test_against_the_drawing(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (48, 96), np.uint8)
    assert np.array_equal(pack(codes, bits), slow_pack(codes, bits))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ALL_BITS), st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_unpack_undoes_pack(bits: int, tiles: int, blocks: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (16 * tiles, 32 * blocks), np.uint8)
    packed = pack(codes, bits)
    assert packed.flags.c_contiguous
    assert packed.nbytes == codes.size * bits // 8
    assert np.array_equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_strided_codes_pack_alike(bits: int) -> None:
    wide = np.random.default_rng(0).integers(0, 1 << bits, (32, 128), np.uint8)
    part = wide[:, 32:96]
    assert np.array_equal(pack(part, bits), pack(part.copy(), bits))


def test_unpadded_codes_and_other_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="must be padded"):
        pack(np.zeros((15, 32), np.uint8), 4)
    with pytest.raises(ValueError, match="must be padded"):
        pack(np.zeros((16, 33), np.uint8), 4)
    with pytest.raises(ValueError, match="bits is 7"):
        pack(np.zeros((16, 32), np.uint8), 7)
    with pytest.raises(ValueError, match="256 bytes, got 128"):
        unpack(np.zeros((1, 1, 128), np.uint8), 4)


def test_tiled_parameters() -> None:
    values = np.arange(32 * 3).reshape(32, 3)
    tiled = tile_params(values)
    assert tiled.shape == (2, 3, 16)
    assert tiled[1, 2, 5] == values[16 + 5, 2]
    assert np.array_equal(untile_params(tiled), values)


def test_round_up() -> None:
    assert [round_up(v, 16) for v in (0, 1, 16, 17)] == [0, 16, 16, 32]
