"""Attention over a cache held the way the matmul kernels read weights.

For each key/value head, an 8-bit cache is two packed matrices (see `edgeq.packing`):

    K   [S, D]   one row per position, with a float16 scale and a zero point; scores = K . q
    V^T [D, S]   one row per dimension, blocks of 32 positions;  output = V^T . p

with q and p quantized like any activation (the values' scales are folded into p first). Keys
have a large part in common from one position to the next, which would cost them most of their
eight bits: of every 16 positions the first key is kept in float16 as a center, the keys are
stored as differences from it, and q . center is added to the tile's scores.

A 16-bit cache holds the same two matrices as rows of float16. Either way both products are the
linear layers' own kernels, and all query heads that share a key/value head go through in one
pass: the cache is read once a step.

Keys are taken in chunks of 256 positions; each chunk gives (max, sum, output), and chunks are
merged in ascending order, whoever computed them. So the result does not depend on threads,
nor on whether a position was part of a prompt or generated.
"""

from __future__ import annotations

import numpy as np

from edgeq.runtime.kernels.matmul import quant_matmul
from edgeq.runtime.kernels.plan import (
    C_BITS,
    C_CENTERS,
    C_DIM,
    C_DIM_K,
    C_DIM_V,
    C_K,
    C_K_KERNEL,
    C_K_SCALES,
    C_K_ZEROS,
    C_LENGTH,
    C_V,
    C_V_KERNEL,
    C_V_SCALES,
    CHUNK,
    PART_HEAD,
)
from edgeq.runtime.kernels.tile import ACT_BLOCK, NO_SHIFT
from edgeq.runtime.kernels.vector import (
    bytes_at,
    center_scores,
    compiled,
    dot_f16,
    floats,
    get_f16,
    put_f16,
    put_f32,
    put_u8,
    quantize_row,
    softmax,
    vector_absmax,
)

_ZERO, _MAX_CODE, _LEVELS, _TINY = (np.float32(v) for v in (0, 127, 255, 1e-30))


@compiled
def append_key_value(cache, head, slot, k, v):  # type: ignore[no-untyped-def]
    """Store one position's key and value (float32 at addresses ``k`` and ``v``)."""
    length, dim = cache[C_LENGTH], cache[C_DIM]
    dim_k, dim_v = cache[C_DIM_K], cache[C_DIM_V]
    if cache[C_BITS] == 16:
        keys = cache[C_K] + (head * length + slot) * dim_k * 2
        values = cache[C_V] + (head * dim_v * length + slot) * 2
        source_k, source_v = floats(k, dim), floats(v, dim)
        for i in range(dim):
            put_f16(keys + 2 * i, source_k[i])
            put_f16(values + 2 * i * length, source_v[i])
        return
    _append_key(cache, head, slot, k)
    values = bytes_at(
        cache[C_V]
        + head * dim_v * length
        + (slot >> 5) * 512
        + ((slot & 31) >> 2) * 64
        + (slot & 3),
        dim_v * length,
    )
    largest = vector_absmax(v, dim)
    factor = _MAX_CODE / largest if largest > _TINY else _ZERO
    put_f32(cache[C_V_SCALES] + (head * length + slot) * 4, largest / _MAX_CODE)
    source = floats(v, dim)
    for i in range(dim):
        code = np.uint8(np.int32(np.rint(source[i] * factor)) + 128)
        values[(i >> 4) * 16 * length + (i & 15) * 4] = code


@compiled
def _append_key(cache, head, slot, k):  # type: ignore[no-untyped-def]
    """Store a key as its difference from its tile's center, 8 bits with scale and zero point."""
    length, dim, dim_k = cache[C_LENGTH], cache[C_DIM], cache[C_DIM_K]
    row = head * length + slot
    center = cache[C_CENTERS] + ((row // CHUNK) * dim_k * 16 + (slot % CHUNK) // 16) * 2
    x = floats(k, dim)
    low = high = _ZERO
    for i in range(dim):
        at = center + i * 32
        x[i] -= put_f16(at, x[i]) if slot % 16 == 0 else get_f16(at)
        low, high = min(low, x[i]), max(high, x[i])
    scale = put_f16(cache[C_K_SCALES] + row * 2, (high - low) / _LEVELS)
    factor = np.float32(1) / scale if scale > _ZERO else _ZERO
    zero = np.rint(-low * factor)
    put_u8(cache[C_K_ZEROS] + row, np.int64(min(zero, _LEVELS)))
    keys = bytes_at(cache[C_K] + (row - slot % 16) * dim_k + (slot % 16) * 4, 16 * dim_k)
    for i in range(dim):
        code = min(max(np.rint(x[i] * factor) + zero, _ZERO), _LEVELS)
        keys[(i >> 2) * 64 + (i & 3)] = np.uint8(np.int32(code))


@compiled
def attend_chunk(  # type: ignore[no-untyped-def]
    cache,
    head,
    chunk,
    q,
    q_stride,
    q_acts,
    q_act_stride,
    rows,
    first,
    last,
    scale,
    ones,
    scores,
    p_acts,
    part,
    part_stride,
):
    """Attention of some query rows over one chunk of a key/value head.

    Args:
        cache: the layer's cache record.
        head, chunk: which key/value head, which 256 positions.
        q, q_stride: query rows, float32.
        q_acts, q_act_stride: the same quantized, then as many rows of what that left.
        rows: how many.
        first, last: int64 arrays: row r sees positions first[r] <= position < last[r].
        scale: address of the factor on the scores.
        ones: address of 16 float16 ones.
        scores: float32 scratch [2 * rows + 1, CHUNK].
        p_acts: scratch for quantized probabilities [rows, CHUNK / 32 activation blocks].
        part, part_stride: out, one per row: max, sum, ..., then at `PART_HEAD` the output [D].
    """
    length, dim = cache[C_LENGTH], cache[C_DIM]
    dim_k, dim_v = cache[C_DIM_K], cache[C_DIM_V]
    start = chunk * CHUNK
    slot = start % length  # a layer with a window keeps no more than that: its cache is a ring
    top = last[0]
    for r in range(1, rows):
        top = max(top, last[r])
    tiles = (min(top - start, CHUNK) + 15) // 16
    eight = cache[C_BITS] == 8
    # whole blocks of 32 for the integer product, of 64 for the float one: what lies past the
    # last key is multiplied by zero, and so the order of a sum does not depend on where it ends
    step = 32 if eight else 64
    width = (tiles * 16 + step - 1) // step * step
    if eight:
        quant_matmul(
            cache[C_K_KERNEL],
            cache[C_K] + (head * length + slot) * dim_k,
            16 * dim_k,
            cache[C_K_SCALES] + (head * length + slot) * 2,
            32,
            cache[C_K_ZEROS] + head * length + slot,
            16,
            dim_k // 32,
            NO_SHIFT,
            q_acts,
            q_act_stride,
            2 * rows,
            scores,
            CHUNK * 4,
            0,
            tiles,
        )
    p_stride = CHUNK // 32 * ACT_BLOCK
    row_bytes = CHUNK * 4
    v_scales = cache[C_V_SCALES] + (head * length + slot) * 4
    if not eight:  # the same softmax with nothing to add, and values of scale 1
        v_scales = scores + 2 * rows * row_bytes
        zeros, ones_row = floats(scores + rows * row_bytes, CHUNK), floats(v_scales, CHUNK)
        for j in range(CHUNK):
            zeros[j], ones_row[j] = _ZERO, np.float32(1)
    for r in range(rows):
        row = scores + r * row_bytes
        s = floats(row, CHUNK)
        low, high = max(first[r] - start, 0), min(last[r] - start, CHUNK)
        out = part + r * part_stride
        if eight:
            # q . center of the chunk's 16 tiles, kept for a moment where the output will be
            centers, rest = out + PART_HEAD * 4, scores + (rows + r) * row_bytes
            center_scores(
                cache[C_CENTERS] + (head * length + slot) // CHUNK * dim_k * 32,
                q + r * q_stride,
                dim_k,
                centers,
            )
        else:
            centers = rest = scores + rows * row_bytes
            for j in range(low, high):
                key = cache[C_K] + (head * length + slot + j) * dim_k * 2
                s[j] = dot_f16(key, q + r * q_stride, dim_k)
        softmax(row, rest, centers, v_scales, scale, low, high, tiles, out)
        for j in range(tiles * 16, width):
            s[j] = _ZERO
        if eight:
            quantize_row(row, p_acts + r * p_stride, width // 32)
        else:
            output = floats(out + PART_HEAD * 4, dim)
            for i in range(dim):
                values = cache[C_V] + ((head * dim_v + i) * length + slot) * 2
                output[i] = dot_f16(values, row, width)
    if eight:
        quant_matmul(
            cache[C_V_KERNEL],
            cache[C_V] + head * dim_v * length + slot * 16,
            16 * length,
            ones,
            0,
            0,
            0,
            width // 32,
            NO_SHIFT,
            p_acts,
            p_stride,
            rows,
            part + PART_HEAD * 4,
            part_stride,
            0,
            dim_v // 16,
        )


@compiled
def finish(total, out, dim):  # type: ignore[no-untyped-def]
    """out = output / sum."""
    a, target = floats(total, PART_HEAD + dim), floats(out, dim)
    for i in range(dim):
        target[i] = a[PART_HEAD + i] / a[1]
