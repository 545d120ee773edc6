"""How the kernels of a target's runtime round what they multiply, repeated in NumPy.

Fast kernels round the inputs of a product to 8 bits while they run. A file that is right then
differs from exact arithmetic by that rounding, far more than by any small fault. So that a fault
can be told from it, each step is compared with the reference computed with the same rounding:

    LiteRT        every token's inputs over one range from min(x, 0) to max(x, 0) in 255 steps;
                  scales of groups of weights, which files hold as float16, to bfloat16
    onnxruntime   every block of a token's inputs, as long as the weights' groups, by max|x| / 127
    llama.cpp     every block of 32 inputs by max|x| / 127, a scale in float16 (Q8_0; Q8_1 for Q4_1
                  and Q5_1); every block of 256 by its largest / -127 for blocks of 256 (Q8_K)

Source: XNNPACK's ``xnn_f32_qd8_asymmetric_quantization_params`` and, for bfloat16 scales, its
``qb4-packw`` kernels, which all of its 4-bit kernels for groups read from; onnxruntime's
``MlasQNBitGemm`` (CompInt8, QuantizeARow); ggml's ``quantize_row_q8_0_ref``,
``quantize_row_q8_1_ref`` and ``quantize_row_q8_K_ref``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, cast

import numpy as np

from edgeq.converters.encoding import spread
from edgeq.formats.mapped_file import release
from edgeq.formats.schemes import SUPERBLOCK
from edgeq.formats.tensor import QuantTensor, Tensor, bf16_to_float32, float32_to_bf16
from edgeq.importers.gguf.file import TENSOR_TYPES
from edgeq.model.formulas import Array, Linear, dense
from edgeq.model.reference import CacheRounding

SUPERBLOCKS = frozenset(name for name, weights, _ in TENSOR_TYPES.values() if weights == SUPERBLOCK)
"""Types of GGUF whose blocks have 256 weights."""
GGML_BLOCK = 32
"""Weights of the other types' blocks, and inputs that share a scale in llama.cpp."""


@dataclass(frozen=True)
class Kernels:
    """How the kernels of targets round, repeated in NumPy.

    Args:
        products: how it may multiply, the likeliest first; exactly if there is none.
        cache: how it rounds keys and values; not at all if None.
        rounding: what is rounded, a sentence; empty if nothing is.
        alternatives: how to avoid it, a sentence.
    """

    products: tuple[Linear, ...] = (dense,)
    cache: CacheRounding | None = None
    rounding: str = ""
    alternatives: str = ""

    @property
    def rounds(self) -> bool:
        """Whether results differ from exact arithmetic by more than float32's own precision."""
        return bool(self.rounding)


def sparing(product: Linear) -> Linear:
    """The same products; the pages of the source's file are given back after each.

    Every pass reads the whole file, whose pages would count as this process's memory.
    """

    def spared(name: str, x: Array, weight: Tensor) -> Array:
        out = product(name, x, weight)
        release(weight)
        return out

    return spared


def on_rounded(
    rounded: Callable[[Array], Array],
    *,
    bfloat16_group_scales: bool = False,
    exact: Callable[[str, QuantTensor], bool] = lambda name, weight: False,
) -> Linear:
    """Products of quantized matrices with inputs that were rounded; others are exact.

    Args:
        rounded: inputs [T, K] -> the same after rounding.
        bfloat16_group_scales: round the scales of groups to bfloat16 as well. Its 8 significant
            bits change a product by about 0.1 %, the same for every token.
        exact: (name, matrix) -> whether the products of a quantized matrix are exact too.
    """

    def product(name: str, x: Array, weight: Tensor) -> Array:
        if not isinstance(weight, QuantTensor) or exact(name, weight):
            return dense(name, x, weight)
        if bfloat16_group_scales and weight.scheme.group_size is not None:
            weight = with_bfloat16_scales(weight)
        return dense(name, rounded(x), weight)

    return product


def with_bfloat16_scales(weight: QuantTensor) -> QuantTensor:
    """The same integers with every scale rounded to the nearest bfloat16.

    A float16 that is rounded to the 8 significant bits of bfloat16 is still a float16, save above
    65280, which no scale of weights comes near.
    """
    scales = bf16_to_float32(float32_to_bf16(weight.scales.astype(np.float32)))
    return replace(weight, scales=scales.astype(np.float16))


def one_range(x: Array) -> Array:
    """Round each row of x [T, K] to 255 steps from min(x, 0) to max(x, 0): float32 [T, K]."""
    low = np.minimum(x.min(axis=1, keepdims=True), np.float32(0))
    high = np.maximum(x.max(axis=1, keepdims=True), np.float32(0))
    width = high - low
    scale = np.where(width > 0, np.float32(255) / np.where(width > 0, width, 1), np.float32(1))
    below, above = np.float32(-128) - low * scale, np.float32(127) - high * scale
    # the end that is nearer to a whole number gives the zero point
    nearer_low = (np.float32(-128) + low * scale) + (np.float32(127) + high * scale) > 0
    zero = np.rint(np.clip(np.where(nearer_low, below, above), -128, 127))
    codes = np.clip(np.rint(x * scale) + zero, -128, 127)
    return cast(Array, ((codes - zero) / scale).astype(np.float32))


def one_magnitude(x: Array) -> Array:
    """Round each row of x [T, K] to int8 times max|x| / 127: float32 [T, K]."""
    return by_blocks(x, x.shape[1])


def by_blocks(x: Array, size: int, *, half_scales: bool = False) -> Array:
    """Blocks of x [T, K] as int8 times max|x| / 127 of the block.

    Args:
        x: float32 [T, K].
        size: inputs of a block; the last one may be shorter.
        half_scales: codes are found with the scale in float32, and multiplied in float16.

    Returns:
        float32 [T, K].
    """
    codes, scale = _block_codes(x, size)
    if half_scales:
        scale = scale.astype(np.float16).astype(np.float32)
    return (codes * scale).reshape(x.shape[0], -1)[:, : x.shape[1]]


def _block_codes(x: Array, size: int) -> tuple[Array, Array]:
    """Codes [T, B, size] and scales [T, B, 1]."""
    rows, k = x.shape
    padded = np.zeros((rows, -(-k // size) * size), np.float32)
    padded[:, :k] = x
    blocks = padded.reshape(rows, -1, size)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    return np.rint(blocks * inverse), scale


def ggml(kinds: dict[str, str]) -> Linear:
    """llama.cpp's products.

    Args:
        kinds: our name of each matrix -> its type in the file.
    """

    def product(name: str, x: Array, weight: Tensor) -> Array:
        kind = kinds.get(name, "F32")
        if kind == "F16":
            return dense(name, x.astype(np.float16).astype(np.float32), weight)
        if kind == "BF16":
            return dense(name, bf16_to_float32(float32_to_bf16(x)), weight)
        if kind == "F32":
            return dense(name, x, weight)
        if kind in SUPERBLOCKS:
            return dense(name, _q8_k(x), weight)
        out = dense(name, by_blocks(x, GGML_BLOCK, half_scales=True), weight)
        return out + _q8_1_sums(x, weight) if kind in ("Q4_1", "Q5_1") else out

    return product


def _q8_k(x: Array) -> Array:
    """Blocks of 256 of x [T, K] as Q8_K: the largest becomes -127 or its negative, 127 at most."""
    blocks = x.reshape(x.shape[0], -1, SUPERBLOCK)
    where = np.abs(blocks).argmax(axis=-1)[..., None]
    largest = np.take_along_axis(blocks, where, axis=-1)
    inverse = np.divide(np.float32(-127), largest, out=np.zeros_like(largest), where=largest != 0)
    scale = np.divide(np.float32(1), inverse, out=np.zeros_like(largest), where=inverse != 0)
    codes = np.minimum(np.rint(blocks * inverse), np.float32(127))
    return cast(Array, (codes * scale).reshape(x.shape))


def _q8_1_sums(x: Array, weight: Tensor) -> Array:
    """What Q8_1's sums of blocks, in float16, add to a product with Q4_1 or Q5_1: [T, N]."""
    assert isinstance(weight, QuantTensor)
    codes, scale = _block_codes(x, GGML_BLOCK)
    totals = codes.sum(axis=-1)
    rounded = (scale[..., 0] * totals).astype(np.float16).astype(np.float32)
    used = scale[..., 0].astype(np.float16).astype(np.float32) * totals
    least = weight.row_minimums()
    if least is None:
        scales, zeros = weight.row_params()
        least = -scales * zeros
    of_blocks = spread(least, weight.shape[1], weight.scheme.group_size, GGML_BLOCK)
    return cast(Array, (rounded - used) @ of_blocks.T.astype(np.float32))


def half(kind: Literal["k", "v"], layer: int, values: Array) -> Array:
    """A cache of float16."""
    return values.astype(np.float16).astype(np.float32)


def head_magnitude(kind: Literal["k", "v"], layer: int, values: Array) -> Array:
    """A cache of int8 with a scale for each position and head: its largest magnitude / 127."""
    tiny = np.finfo(np.float32).tiny
    scale = np.abs(values).max(axis=-1, keepdims=True) * np.float32(1 / 127)
    scale = np.maximum(scale, tiny)
    return cast(Array, np.rint(values / scale) * scale)
