"""The integers of GGUF's quantized types: blocks of bytes to codes and scales, bit for bit.

Each type has a scheme of edgeq's that stands for exactly the same values (`SCHEMES`), so nothing is
rounded. Where ggml computes ``d * scale * q - dmin * minimum``, the float16 number ``dmin`` is kept
with its sign turned.

Source: the block layouts of https://github.com/ggml-org/ggml (ggml-common.h, ggml-quants.c).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import UnsupportedError
from edgeq.formats.schemes import QuantScheme, parse_scheme
from edgeq.formats.tensor import QuantTensor
from edgeq.formats.two_level import TwoLevelScales

Bytes = NDArray[np.uint8]
Number = TypeVar("Number", bound=np.generic)

IQ4_TABLE = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8
)
"""Values of the codes of IQ4_NL and IQ4_XS."""
FP4_TABLE = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
"""Twice the values of the codes of MXFP4."""


TERNARY = QuantScheme(2, group_size=256)
"""The scheme of TQ1_0 and TQ2_0. Two bits a weight, as TQ2_0 has them; TQ1_0 has 1.6."""


class _Parts(NamedTuple):
    """What a row of blocks holds; arguments of `QuantTensor.from_codes`."""

    codes: Bytes
    scales: NDArray[np.float16] | TwoLevelScales
    minimums: NDArray[np.float16] | None = None


class BlockType(NamedTuple):
    """How a type of GGUF is read.

    Args:
        scheme: which scheme of edgeq's has the same values.
        read: from uint8 [rows, blocks, bytes of a block].
        palette: the table that codes index, if any.
    """

    scheme: QuantScheme
    read: Callable[[Bytes], _Parts]
    palette: NDArray[np.int8] | None = None


def quant_rows(kind: str, data: Bytes, columns: int) -> QuantTensor:
    """Rows of a quantized GGUF tensor, packed.

    Args:
        kind: GGUF's name of the type, one of `TYPES`.
        data: uint8 [rows, bytes of a row].
        columns: weights of a row.

    Raises:
        UnsupportedError: a scale that float16 cannot hold (MXFP4).
    """
    form = TYPES[kind]
    blocks = columns // form.scheme.padded_k(1)
    parts = form.read(np.ascontiguousarray(data).reshape(len(data), blocks, -1))
    return QuantTensor.from_codes(
        form.scheme, parts.codes, parts.scales, palette=form.palette, minimums=parts.minimums
    )


def _half(blocks: Bytes, at: int) -> NDArray[np.float16]:
    """The float16 number at a byte of each block, [rows, blocks]."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2")[..., 0].astype(np.float16)


def _nibbles(packed: Bytes) -> Bytes:
    """Low nibbles of a run of bytes, then its high ones: [..., n] -> [..., 2n]."""
    return np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1)


def _flat(codes: NDArray[Number]) -> NDArray[Number]:
    return codes.reshape(len(codes), -1)


def _fifth_bits(blocks: Bytes, at: int) -> Bytes:
    """The fifth bits of 32 codes, each worth 16, from four bytes that hold them in order."""
    bits = np.unpackbits(blocks[..., at : at + 4], axis=-1, bitorder="little")
    return bits << np.uint8(4)


def _q4_0(blocks: Bytes) -> _Parts:
    return _Parts(_flat(_nibbles(blocks[..., 2:])), _half(blocks, 0))


def _q4_1(blocks: Bytes) -> _Parts:
    return _Parts(_flat(_nibbles(blocks[..., 4:])), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: Bytes) -> _Parts:
    codes = _nibbles(blocks[..., 6:]) | _fifth_bits(blocks, 2)
    return _Parts(_flat(codes), _half(blocks, 0))


def _q5_1(blocks: Bytes) -> _Parts:
    codes = _nibbles(blocks[..., 8:]) | _fifth_bits(blocks, 4)
    return _Parts(_flat(codes), _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: Bytes) -> _Parts:
    return _Parts(_flat(blocks[..., 2:] ^ np.uint8(128)), _half(blocks, 0))


def _mxfp4(blocks: Bytes) -> _Parts:
    codes = _flat(_nibbles(blocks[..., 1:]))
    return _Parts(codes, mxfp4_scales(blocks[..., 0], codes))


def mxfp4_scales(exponents: Bytes, codes: Bytes) -> NDArray[np.float16]:
    """The scales of MXFP4, for `FP4_TABLE`.

    Args:
        exponents: uint8 [rows, blocks], of each scale, plus 127.
        codes: uint8 [rows, 32 * blocks]. A block of zeros may have any scale: one that float16
            cannot hold becomes the nearest that it can, with the same values.

    Raises:
        UnsupportedError: another scale that float16 cannot hold.
    """
    powers = exponents.astype(np.int32) - 128  # half of the scales, as the table is doubled
    zeros = ((codes.reshape(*powers.shape, -1) & np.uint8(7)) == 0).all(axis=-1)
    zeros &= exponents != 255  # which stands for no number
    powers = np.where(zeros, np.clip(powers, -24, 15), powers)
    beyond = powers[(powers < -24) | (powers > 15)]
    if beyond.size:
        raise UnsupportedError(
            f"an MXFP4 block has the scale 2**{beyond[0]}, which float16 cannot hold; edgeq keeps "
            "scales from 2**-24 to 2**15"
        )
    scales: NDArray[np.float16] = np.ldexp(np.float32(1), powers).astype(np.float16)
    return scales


def _six_bit_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Scales and minimums of Q4_K and Q5_K: uint8 [..., 12] -> two of [..., 8], 6 bits each."""
    low, mid, high = (packed[..., 4 * i : 4 * i + 4] for i in range(3))
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], axis=-1)
    minimums = np.concatenate([mid & 63, (high >> 4) | ((mid >> 6) << 4)], axis=-1)
    return scales, minimums


def _two_level(blocks: Bytes, d: int, scales: Bytes, dmin: int, minimums: Bytes) -> TwoLevelScales:
    return TwoLevelScales(
        _flat(scales).view(np.int8), _half(blocks, d),
        _flat(minimums).view(np.int8), -_half(blocks, dmin),
    )  # fmt: skip


def _bit_planes(packed: Bytes) -> Bytes:
    """One bit of each of 256 weights, [..., 32] -> [..., 8, 32].

    Bit i of byte l is that of weight 32 i + l.
    """
    return np.unpackbits(packed[..., None], axis=-1, bitorder="little").swapaxes(-1, -2)


def _q4_k(blocks: Bytes) -> _Parts:
    scales, minimums = _six_bit_scales(blocks[..., 4:16])
    codes = _nibbles(blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32))
    return _Parts(_flat(codes), _two_level(blocks, 0, scales, 2, minimums))


def _q5_k(blocks: Bytes) -> _Parts:
    scales, minimums = _six_bit_scales(blocks[..., 4:16])
    codes = _nibbles(blocks[..., 48:].reshape(*blocks.shape[:2], 4, 32))
    fifth = _bit_planes(blocks[..., 16:48])
    codes = codes.reshape(*blocks.shape[:2], 8, 32) | (fifth << np.uint8(4))
    return _Parts(_flat(codes), _two_level(blocks, 0, scales, 2, minimums))


def _quarters(packed: Bytes) -> Bytes:
    """Two bits of each weight: byte l of a run of 32 holds those of weights l, 32+l, 64+l, 96+l."""
    runs = packed.reshape(*packed.shape[:2], -1, 1, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    return (runs >> shifts) & np.uint8(3)


def _q6_k(blocks: Bytes) -> _Parts:
    low = _nibbles(blocks[..., :128].reshape(*blocks.shape[:2], 2, 64))
    high = _quarters(blocks[..., 128:192]).reshape(low.shape)
    scales = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8)
    return _Parts(
        _flat(low | (high << np.uint8(4))),
        TwoLevelScales(_flat(scales), _half(blocks, 208)),
    )


def _q2_k(blocks: Bytes) -> _Parts:
    both = blocks[..., :16]
    scales = _two_level(blocks, 80, both & np.uint8(15), 82, both >> np.uint8(4))
    return _Parts(_flat(_quarters(blocks[..., 16:80])), scales)


def _q3_k(blocks: Bytes) -> _Parts:
    low = _quarters(blocks[..., 32:96]).reshape(*blocks.shape[:2], 8, 32)
    third = _bit_planes(blocks[..., :32])
    packed = blocks[..., 96:108]
    high = packed[..., None, 8:12] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = (high & np.uint8(3)).reshape(*blocks.shape[:2], 16)
    scales = (_nibbles(packed[..., :8]) | (high << np.uint8(4))).view(np.int8) - np.int8(32)
    return _Parts(
        _flat(low | (third << np.uint8(2))), TwoLevelScales(_flat(scales), _half(blocks, 108))
    )


def _iq4_xs(blocks: Bytes) -> _Parts:
    above = np.ascontiguousarray(blocks[..., 2:4]).view("<u2")
    high = ((above >> np.arange(0, 16, 2, dtype=np.uint16)) & 3).astype(np.uint8)
    low = blocks[..., 4:8, None]
    low = np.concatenate([low & np.uint8(15), low >> np.uint8(4)], axis=-1)
    scales = (low.reshape(high.shape) | (high << np.uint8(4))).view(np.int8) - np.int8(32)
    codes = _nibbles(blocks[..., 8:].reshape(*blocks.shape[:2], 8, 16))
    return _Parts(_flat(codes), TwoLevelScales(_flat(scales), _half(blocks, 0)))


def _ternary(twos: Bytes, d: NDArray[np.float16]) -> _Parts:
    """Codes of 0 to 3 that stand for ``d * (code - 1)``, as ours that stand for
    ``-d * (ours - 2)``: so all four have one."""
    return _Parts(np.uint8(3) - _flat(twos), -d)


def _tq2_0(blocks: Bytes) -> _Parts:
    return _ternary(_quarters(blocks[..., :64]), _half(blocks, 64))


def _trits(packed: Bytes, count: int) -> Bytes:
    """Digits of base 3, the first one the highest: [..., n] -> [..., count, n].

    A byte is the fraction of 256 that the digits are after the point.
    """
    powers = (3 ** np.arange(count)).astype(np.uint8)[:, None]
    fractions = packed[..., None, :] * powers  # what is before the point is lost
    return ((fractions.astype(np.uint16) * 3) >> 8).astype(np.uint8)


def _tq1_0(blocks: Bytes) -> _Parts:
    runs = (
        _trits(blocks[..., :32], 5),
        _trits(blocks[..., 32:48], 5),
        _trits(blocks[..., 48:52], 4),
    )
    codes = np.concatenate([run.reshape(*blocks.shape[:2], -1) for run in runs], axis=-1)
    return _ternary(codes, _half(blocks, 52))


def _type(
    scheme: str, read: Callable[[Bytes], _Parts], palette: NDArray[np.int8] | None = None
) -> BlockType:
    parsed = parse_scheme(scheme)
    assert isinstance(parsed, QuantScheme)
    return BlockType(parsed, read, palette)


TYPES: Mapping[str, BlockType] = {
    "Q4_0": _type("w4-g32", _q4_0),
    "Q4_1": _type("w4-g32-min", _q4_1),
    "Q5_0": _type("w5-g32", _q5_0),
    "Q5_1": _type("w5-g32-min", _q5_1),
    "Q8_0": _type("w8-g32", _q8_0),
    "Q2_K": _type("w2-g16x256-min", _q2_k),
    "Q3_K": _type("w3-g16x256", _q3_k),
    "Q4_K": _type("w4-g32x256-min", _q4_k),
    "Q5_K": _type("w5-g32x256-min", _q5_k),
    "Q6_K": _type("w6-g16x256", _q6_k),
    "IQ4_NL": _type("w4-g32-palette", _q4_0, IQ4_TABLE),
    "IQ4_XS": _type("w4-g32x256-palette", _iq4_xs, IQ4_TABLE),
    "MXFP4": _type("w4-g32-palette", _mxfp4, FP4_TABLE),
    "TQ1_0": _type(str(TERNARY), _tq1_0),
    "TQ2_0": _type(str(TERNARY), _tq2_0),
}
"""Types of GGUF whose integers edgeq keeps."""
