"""Attention over a cache held the way the matmul kernels read weights.

For each key/value head, an 8-bit cache is two packed matrices (see `edgeq.formats.packing`):

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

from typing import Any, NamedTuple

import numpy as np

from edgeq.formats.packing import LANE, TILE
from edgeq.formats.schemes import K_BLOCK
from edgeq.model.memory_layout import CHUNK, PART_HEAD
from edgeq.runtime.kernels.abi import PackedWeights, Rows
from edgeq.runtime.kernels.matmul import call_kernel
from edgeq.runtime.kernels.microkernel import ACT_BLOCK, NO_SHIFT
from edgeq.runtime.kernels.primitives import (
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

_ZERO, _ONE, _MAX_CODE, _LEVELS, _TINY = (np.float32(v) for v in (0, 1, 127, 255, 1e-30))
_F32, _F16, _U8 = 4, 2, 1  # bytes
_PLANE = TILE * LANE
"""Bytes of four columns of a packed tile's 16 rows."""
_TILE_BITS, _LANE_BITS = TILE.bit_length() - 1, LANE.bit_length() - 1
"""Shifts in place of divisions: Numba divides whole numbers with Python's rules for signs, which
costs much in a loop over dimensions."""
_TILES = CHUNK // TILE
"""Tiles of a chunk, each with one center."""
_FLOAT_STEP = 64
"""Positions that the values' float product is padded to."""


@compiled
def append_key_value(cache, head, slot, k, v):
    """Store one position's key and value (float32 at addresses ``k`` and ``v``)."""
    if cache.bits == 16:
        _append_floats(cache, head, slot, k, v)
    else:
        _append_key(cache, head, slot, k)
        _append_value(cache, head, slot, v)


@compiled
def _append_floats(cache, head, slot, k, v):
    """Store a key as a row, and a value as a column, of float16."""
    length = cache.length
    keys = cache.keys + (head * length + slot) * cache.dim_k * _F16
    values = cache.values + (head * cache.dim_v * length + slot) * _F16
    source_k, source_v = floats(k, cache.dim), floats(v, cache.dim)
    for i in range(cache.dim):
        put_f16(keys + i * _F16, source_k[i])
        put_f16(values + i * length * _F16, source_v[i])


@compiled
def _append_value(cache, head, slot, v):
    """Store a value as a column of 8-bit codes with one scale."""
    length, dim_v = cache.length, cache.dim_v
    block, within = slot // K_BLOCK, slot % K_BLOCK
    values = bytes_at(
        cache.values
        + head * dim_v * length
        + block * K_BLOCK * TILE
        + within // LANE * _PLANE
        + within % LANE,
        dim_v * length,
    )
    largest = vector_absmax(v, cache.dim)
    factor = _MAX_CODE / largest if largest > _TINY else _ZERO
    put_f32(cache.value_scales + (head * length + slot) * _F32, largest / _MAX_CODE)
    source = floats(v, cache.dim)
    for i in range(cache.dim):
        code = np.uint8(np.int32(np.rint(source[i] * factor)) + 128)
        values[(i >> _TILE_BITS) * TILE * length + (i & (TILE - 1)) * LANE] = code


@compiled
def _append_key(cache, head, slot, k):
    """Store a key as its difference from its tile's center, 8 bits with scale and zero point."""
    length, dim, dim_k = cache.length, cache.dim, cache.dim_k
    row = head * length + slot
    center = cache.centers + (row // CHUNK * dim_k * _TILES + slot % CHUNK // TILE) * _F16
    x = floats(k, dim)
    low = high = _ZERO
    for i in range(dim):
        at = center + i * _TILES * _F16
        x[i] -= put_f16(at, x[i]) if slot & (TILE - 1) == 0 else get_f16(at)
        low, high = min(low, x[i]), max(high, x[i])
    scale = put_f16(cache.key_scales + row * _F16, (high - low) / _LEVELS)
    factor = _ONE / scale if scale > _ZERO else _ZERO
    zero = np.rint(-low * factor)
    put_u8(cache.key_zeros + row, np.int64(min(zero, _LEVELS)))
    keys = bytes_at(cache.keys + (row - slot % TILE) * dim_k + slot % TILE * LANE, TILE * dim_k)
    for i in range(dim):
        code = min(max(np.rint(x[i] * factor) + zero, _ZERO), _LEVELS)
        keys[(i >> _LANE_BITS) * _PLANE + (i & (LANE - 1))] = np.uint8(np.int32(code))


class Queries(NamedTuple):
    """The query rows of some tokens and of the heads that share a key/value head."""

    values: Rows
    """float32."""
    codes: Rows
    """The same quantized, then as many rows of what that rounding left."""
    first: Any
    """int64 [rows]: row r sees positions first[r] <= position < last[r]."""
    last: Any


@compiled
def attend_chunk(program, layer, cache, head, chunk, queries, work, out):
    """Attention of some query rows over one chunk of a key/value head.

    Args:
        program, layer, cache: `abi.PROGRAM`, and the layer's `abi.ATTENTION` and `abi.CACHE`.
        head, chunk: which key/value head, which 256 positions.
        queries: `Queries`.
        work: `abi.AttentionWork`; uses scores and probabilities.
        out: `abi.Rows` of partial results: max, sum, ..., then at `PART_HEAD` the output [D].
    """
    start = chunk * CHUNK
    top = queries.last[0]
    for r in range(1, queries.values.length):
        top = max(top, queries.last[r])
    tiles = (min(top - start, CHUNK) + TILE - 1) // TILE
    # whole blocks: what lies past the last key is multiplied by zero, and so the order of a sum
    # does not depend on where it ends
    if cache.bits == 8:
        _attend_codes(program, layer, cache, head, start, tiles, queries, work, out)
    else:
        _attend_floats(layer, cache, head, start, tiles, queries, work, out)


@compiled
def _attend_codes(program, layer, cache, head, start, tiles, queries, work, out):
    """`attend_chunk` over so many tiles of an 8-bit cache."""
    length, dim_k, dim_v, rows = cache.length, cache.dim_k, cache.dim_v, queries.values.length
    slot = start % length  # a layer with a window keeps no more: its cache is a ring
    at = head * length + slot
    width = (tiles * TILE + K_BLOCK - 1) // K_BLOCK * K_BLOCK
    scores = Rows(work.scores, CHUNK * _F32, 2 * rows)
    keys = PackedWeights(
        codes=cache.keys + at * dim_k,
        code_step=TILE * dim_k,
        scales=cache.key_scales + at * _F16,
        scale_step=TILE * _F16,
        zeros=cache.key_zeros + at,
        zero_step=TILE * _U8,
        blocks=dim_k // K_BLOCK,
        shift=NO_SHIFT,
    )
    codes = Rows(queries.codes.address, queries.codes.stride, 2 * rows)
    call_kernel(cache.key_kernel, keys, codes, scores, 0, tiles)
    center = cache.centers + at // CHUNK * dim_k * _TILES * _F16
    probabilities = Rows(work.probabilities, CHUNK // K_BLOCK * ACT_BLOCK, rows)
    for r in range(rows):
        row, rest = scores.address + r * scores.stride, scores.address + (rows + r) * scores.stride
        part = out.address + r * out.stride
        # q . center of the chunk's 16 tiles, kept for a moment where the output will be
        centers = part + PART_HEAD * _F32
        query = queries.values.address + r * queries.values.stride
        center_scores(center, query, dim_k, centers)
        low, high = max(0, queries.first[r] - start), min(CHUNK, queries.last[r] - start)
        v_scales = cache.value_scales + at * _F32
        softmax(row, rest, centers, v_scales, layer.scale, low, high, tiles, part)
        _clear(row, tiles * TILE, width)
        quantize_row(row, probabilities.address + r * probabilities.stride, width // K_BLOCK)
    values = PackedWeights(
        codes=cache.values + head * dim_v * length + slot * TILE,
        code_step=TILE * length,
        scales=program.ones,
        scale_step=0,
        zeros=0,
        zero_step=0,
        blocks=width // K_BLOCK,
        shift=NO_SHIFT,
    )
    output = Rows(out.address + PART_HEAD * _F32, out.stride, rows)
    call_kernel(cache.value_kernel, values, probabilities, output, 0, dim_v // TILE)


@compiled
def _attend_floats(layer, cache, head, start, tiles, queries, work, out):
    """`attend_chunk` over so many tiles of a float16 cache."""
    length, dim, dim_k, rows = cache.length, cache.dim, cache.dim_k, queries.values.length
    slot = start % length
    width = (tiles * TILE + _FLOAT_STEP - 1) // _FLOAT_STEP * _FLOAT_STEP
    row_bytes = CHUNK * _F32
    # the softmax of 8-bit caches, with nothing to add, and values of scale 1
    nothing, v_scales = work.scores + rows * row_bytes, work.scores + 2 * rows * row_bytes
    zeros, ones = floats(nothing, CHUNK), floats(v_scales, CHUNK)
    for j in range(CHUNK):
        zeros[j], ones[j] = _ZERO, _ONE
    for r in range(rows):
        row, part = work.scores + r * row_bytes, out.address + r * out.stride
        query = queries.values.address + r * queries.values.stride
        low, high = max(0, queries.first[r] - start), min(CHUNK, queries.last[r] - start)
        s = floats(row, CHUNK)
        for j in range(low, high):
            key = cache.keys + (head * length + slot + j) * dim_k * _F16
            s[j] = dot_f16(key, query, dim_k)
        softmax(row, nothing, nothing, v_scales, layer.scale, low, high, tiles, part)
        _clear(row, tiles * TILE, width)
        output = floats(part + PART_HEAD * _F32, dim)
        for i in range(dim):
            values = cache.values + ((head * cache.dim_v + i) * length + slot) * _F16
            output[i] = dot_f16(values, row, width)


@compiled
def _clear(row, start, stop):
    x = floats(row, stop)
    for j in range(start, stop):
        x[j] = _ZERO


@compiled
def finish(total, out, dim):
    """out = output / sum."""
    a, target = floats(total, PART_HEAD + dim), floats(out, dim)
    for i in range(dim):
        target[i] = a[PART_HEAD + i] / a[1]
