"""GGUF's own bytes: the file's header, and blocks of 32 weights with their scale.

    Q4_0   f16 d, 16 bytes: low nibbles are weights 0..15, high ones 16..31   d * (q - 8)
    Q4_1   f16 d, f16 m, 16 bytes of nibbles likewise                        d * q + m
    Q5_0   f16 d, u32 of fifth bits (bit j: weight j), 16 bytes likewise     d * (q - 16)
    Q8_0   f16 d, 32 int8                                                    d * q

The blocks of `edgeq.converters.gguf.blocks` hold what other programs quantized.
The file's layout is drawn in `edgeq.importers.gguf.file`, which reads it.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and ggml-common.h
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.validate.kernels import GGML_BLOCK
from edgeq.formats.packing import round_up
from edgeq.importers.gguf.file import TENSOR_TYPES

ALIGN = 32
"""Bytes; where tensors begin."""
Kind = Literal[
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0",
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4", "TQ2_0",
]  # fmt: skip
"""Types of integers."""
NUMBERS = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}
"""Type -> its number in the file."""
_BLOCKS = {name: (weights, nbytes) for name, weights, nbytes in TENSOR_TYPES.values()}
"""Type -> weights and bytes of a block; a float is a block of its own."""
BLOCK_BYTES = {name: nbytes for name, (weights, nbytes) in _BLOCKS.items() if weights > 1}
"""Type of integers -> bytes of a block."""
BLOCK_WEIGHTS = {name: weights for name, (weights, nbytes) in _BLOCKS.items()}
"""Type -> weights of a block."""


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as the header announces it.

    Args:
        name: GGUF's name.
        type: a key of `NUMBERS`.
        shape: outermost dimension first.
        stacked: matrices or vectors of one shape, one below the other, which the header gives as
            a dimension of their own; 0 for a tensor that is not so made.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    stacked: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        weights, nbytes = _BLOCKS[self.type]
        return math.prod(self.shape) // weights * nbytes


def header(keys: Mapping[str, Any], entries: Sequence[TensorEntry]) -> bytes:
    """Everything before the tensors' data, which follows in the order of the entries.

    Each tensor's data begins at a multiple of `ALIGN` after the header's end.

    Args:
        keys: metadata; bool, int (u32), float (f32), str, or a list of one of these (of int: i32).
        entries: the tensors.
    """
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(entries), len(keys))]
    for key, value in keys.items():
        parts += [_string(key), _value(value)]
    offset = 0
    for entry in entries:
        dims = entry.shape[::-1]
        if entry.stacked:
            dims = (*dims[:-1], dims[-1] // entry.stacked, entry.stacked)
        parts.append(_string(entry.name))
        parts.append(struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
        parts.append(struct.pack("<IQ", NUMBERS[entry.type], offset))
        offset += round_up(entry.nbytes, ALIGN)
    whole = b"".join(parts)
    return whole.ljust(round_up(len(whole), ALIGN), b"\0")


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    first = value[0] if value else ""
    if isinstance(first, str):
        body = b"".join(_string(text) for text in value)
        return struct.pack("<IIQ", 9, 8, len(value)) + body
    kind, code = (6, "f") if isinstance(first, float) else (5, "i")
    return struct.pack(f"<IIQ{len(value)}{code}", 9, kind, len(value), *value)


def pack_blocks(
    kind: Kind,
    levels: NDArray[np.int16],
    scales: NDArray[np.float32],
    zero_points: NDArray[np.int16] | None = None,
) -> NDArray[np.uint8]:
    """Rows of blocks.

    Args:
        kind: the type.
        levels: int16 [R, K], K a multiple of 32; signed, but for Q4_1 codes of 0 .. 15.
        scales: [R, K/32], exact in float16.
        zero_points: [R, K/32], for Q4_1, with ``scale * zero_point`` exact in float16.

    Returns:
        uint8 [R, K/32 * bytes of a block].
    """
    rows, k = levels.shape
    blocks = k // GGML_BLOCK
    out = np.empty((rows, blocks, BLOCK_BYTES[kind]), np.uint8)
    out[..., :2] = _half(scales)
    values = levels.reshape(rows, blocks, GGML_BLOCK)
    if kind == "Q8_0":
        out[..., 2:] = values.astype(np.int8).view(np.uint8)
        return out.reshape(rows, -1)
    if kind == "Q4_1":
        assert zero_points is not None
        out[..., 2:4] = _half(minimum(scales, zero_points))
        codes = values.astype(np.uint8)
    else:
        codes = (values + (16 if kind == "Q5_0" else 8)).astype(np.uint8)
    if kind == "Q5_0":
        out[..., 2:6] = np.packbits(codes >> 4, axis=-1, bitorder="little")
    half = GGML_BLOCK // 2
    out[..., -half:] = (codes[..., :half] & 15) | (codes[..., half:] << 4)
    return out.reshape(rows, -1)


def unpack_blocks(
    kind: Kind, data: NDArray[np.uint8]
) -> tuple[NDArray[np.int16], NDArray[np.float32], NDArray[np.int16] | None]:
    """The inverse of `pack_blocks`.

    Args:
        kind: the type.
        data: uint8 [R, K/32 * bytes of a block].

    Returns:
        levels int16 [R, K], scales float32 [R, K/32], and for Q4_1 zero points int16 [R, K/32].
    """
    blocks = data.reshape(data.shape[0], -1, BLOCK_BYTES[kind])
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].astype(np.float32)
    if kind == "Q8_0":
        codes = np.ascontiguousarray(blocks[..., 2:]).view(np.int8).astype(np.int16)
        return codes.reshape(data.shape[0], -1), scales, None
    half = GGML_BLOCK // 2
    nibbles = blocks[..., -half:]
    levels = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1).astype(np.int16)
    zeros: NDArray[np.int16] | None = None
    if kind == "Q5_0":
        fifth = np.unpackbits(blocks[..., 2:6], axis=-1, bitorder="little")
        levels += (fifth.astype(np.int16) << 4) - 16
    elif kind == "Q4_0":
        levels -= 8
    else:
        least = np.ascontiguousarray(blocks[..., 2:4]).view(np.float16)[..., 0].astype(np.float32)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(scales == 0, 0, -least / scales)
        zeros = np.rint(ratio).astype(np.int16)
    return levels.reshape(data.shape[0], -1), scales, zeros


def minimum(scales: NDArray[np.float32], zero_points: NDArray[np.int16]) -> NDArray[np.float32]:
    """Q4_1's m, the value of code 0: float32, exact."""
    return -scales * zero_points.astype(np.float32)


def minimum_is_exact(scales: NDArray[np.float32], zero_points: NDArray[np.int16]) -> bool:
    """Whether float16 holds every m of these groups."""
    wanted = minimum(scales, zero_points)
    return bool((wanted.astype(np.float16).astype(np.float32) == wanted).all())


def _half(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Float16 as its two bytes, little-endian: uint8 [..., 2]."""
    return values.astype("<f2")[..., None].view(np.uint8)
