"""Attention over a cache held the way the matmul kernels read weights.

For each key/value head, a cache of 8 or 4 bits is two packed matrices (see
`edgeq.formats.packing`):

    K   [S, D]   one row per position, with a float16 scale and a zero point; scores = K . q
    V^T [D, S]   one row per dimension, blocks of 32 positions;  output = V^T . p

with q and p quantized like any activation (the values' scales are folded into p first). Keys
have a large part in common from one position to the next, which would cost them most of their
bits: of every 16 positions (64 with 4 bits) the first key is kept in float16 as a center, the keys
are stored as differences from it, and q . center is added to the scores of these positions.

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
from edgeq.runtime.kernels.abi import FloatWeights, PackedWeights, Rows
from edgeq.runtime.kernels.matmul import call_kernel
from edgeq.runtime.kernels.microkernel import ACT_BLOCK, NO_SHIFT
from edgeq.runtime.kernels.primitives import (
    bytes_at,
    center_scores,
    center_scores_4,
    compiled,
    floats,
    get_f16,
    put_f16,
    put_f32,
    put_u8,
    quantize_row,
    softcap,
    softmax,
    vector_absmax,
)
from edgeq.runtime.kernels.row_ops import clear_row

_ZERO, _ONE, _MAX_CODE, _TINY = (np.float32(v) for v in (0, 1, 127, 1e-30))
_EIGHT, _FIFTEEN, _LEVELS = (np.float32(v) for v in (8, 15, 255))
_F32, _F16, _U8 = 4, 2, 1  # bytes
_PLANE = TILE * LANE
"""Bytes of four columns of a packed tile's 16 rows."""
_TILE_BITS, _LANE_BITS, _PAIR_BITS = (n.bit_length() - 1 for n in (TILE, LANE, 2 * LANE))
"""Shifts in place of divisions: Numba divides whole numbers with Python's rules for signs, which
costs much in a loop over dimensions."""


@compiled
def append_key_value(cache, head, slot, k, v):
    """Store one position's key and value (float32 at addresses ``k`` and ``v``)."""
    if cache.bits == 16:
        _append_floats(cache, head, slot, k, v)
    else:
        _append_key(cache, head, slot, k)
        if cache.bits == 8:
            _append_value(cache, head, slot, v)
        else:
            _append_value_4(cache, head, slot, v)


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
def _append_value_4(cache, head, slot, v):
    """Store a value as a column of 4-bit codes with one scale; a byte holds two positions."""
    length, dim_v = cache.length, cache.dim_v
    source = floats(v, cache.dim)
    low, high = source[0], source[0]
    for i in range(cache.dim):
        low, high = min(low, source[i]), max(high, source[i])
    furthest = high if high > -low else low
    scale = furthest / -_EIGHT if abs(furthest) > _TINY else _ZERO
    factor = _ONE / scale if scale != _ZERO else _ZERO
    put_f32(cache.value_scales + (head * length + slot) * _F32, scale)
    within = slot % K_BLOCK
    begin = head * dim_v * length + slot // K_BLOCK * K_BLOCK * TILE
    at = (begin >> 1) + (within >> _PAIR_BITS) * _PLANE + within % LANE
    values = bytes_at(cache.values + at, dim_v * length)
    shift = within & LANE  # 0 for the lower half of a byte, 4 for the upper one
    for i in range(cache.dim):
        code = np.int32(min(max(np.rint(source[i] * factor) + _EIGHT, _ZERO), _FIFTEEN))
        place = (i >> _TILE_BITS) * TILE * (length >> 1) + (i & (TILE - 1)) * LANE
        values[place] = np.uint8((values[place] & (240 >> shift)) | (code << shift))


@compiled
def _append_key(cache, head, slot, k):
    """Store a key as its difference from its center, as codes with a scale and a zero point."""
    length, dim, dim_k = cache.length, cache.dim, cache.dim_k
    row, centers = head * length + slot, CHUNK // cache.span
    center = cache.centers + (row // CHUNK * dim_k * centers + slot % CHUNK // cache.span) * _F16
    x = floats(k, dim)
    low = high = _ZERO
    is_center = slot % cache.span == 0
    for i in range(dim):
        at = center + i * centers * _F16
        x[i] -= put_f16(at, x[i]) if is_center else get_f16(at)
        low, high = min(low, x[i]), max(high, x[i])
    levels = _LEVELS if cache.bits == 8 else _FIFTEEN
    scale = put_f16(cache.key_scales + row * _F16, (high - low) / levels)
    factor = _ONE / scale if scale > _ZERO else _ZERO
    zero = np.rint(-low * factor)
    put_u8(cache.key_zeros + row, np.int64(min(zero, levels)))
    tile = (row - slot % TILE) * dim_k * cache.bits // 8
    keys = bytes_at(cache.keys + tile + slot % TILE * LANE, TILE * dim_k)
    for i in range(dim):
        code = np.int32(min(max(np.rint(x[i] * factor) + zero, _ZERO), levels))
        if cache.bits == 8:
            keys[(i >> _LANE_BITS) * _PLANE + (i & (LANE - 1))] = np.uint8(code)
            continue
        place = (i >> _PAIR_BITS) * _PLANE + (i & (LANE - 1))
        keys[place] = np.uint8(code if i & LANE == 0 else keys[place] | (code << 4))


class Queries(NamedTuple):
    """The query rows of some tokens and of the heads that share a key/value head."""

    values: Rows
    """float32."""
    codes: Rows
    """The same quantized, then (with keys of 8 bits) as many rows of what that rounding left."""
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
    if cache.bits < 16:
        _attend_codes(program, layer, cache, head, start, tiles, queries, work, out)
    else:
        _attend_floats(layer, cache, head, start, tiles, queries, work, out)


@compiled
def _attend_codes(program, layer, cache, head, start, tiles, queries, work, out):
    """`attend_chunk` over so many tiles of a cache of 8 or 4 bits."""
    length, dim_k, dim_v, rows = cache.length, cache.dim_k, cache.dim_v, queries.values.length
    slot = start % length  # a layer with a window keeps no more: its cache is a ring
    at = head * length + slot
    width = (tiles * TILE + K_BLOCK - 1) // K_BLOCK * K_BLOCK
    scores = Rows(work.scores, CHUNK * _F32, 2 * rows)
    keys = PackedWeights(
        codes=cache.keys + at * dim_k * cache.bits // 8,
        code_step=TILE * dim_k * cache.bits // 8,
        scales=cache.key_scales + at * _F16,
        scale_step=TILE * _F16,
        zeros=cache.key_zeros + at,
        zero_step=TILE * _U8,
        blocks=dim_k // K_BLOCK,
        shift=NO_SHIFT,
    )
    roundings = 2 if cache.bits == 8 else 1
    codes = Rows(queries.codes.address, queries.codes.stride, roundings * rows)
    call_kernel(cache.key_kernel, keys, codes, scores, 0, tiles)
    nothing = scores.address + rows * scores.stride
    if roundings == 1:
        clear_row(nothing, 0, CHUNK)
    center = cache.centers + at // CHUNK * dim_k * (CHUNK // cache.span) * _F16
    probabilities = Rows(work.probabilities, CHUNK // K_BLOCK * ACT_BLOCK, rows)
    for r in range(rows):
        row = scores.address + r * scores.stride
        rest = nothing + r * scores.stride if roundings == 2 else nothing
        part = out.address + r * out.stride
        # q . center of the chunk's 16 tiles, kept for a moment where the output will be
        centers = part + PART_HEAD * _F32
        query = queries.values.address + r * queries.values.stride
        if cache.span == TILE:
            center_scores(center, query, dim_k, centers)
        else:
            center_scores_4(center, query, dim_k, centers)
        low, high = max(0, queries.first[r] - start), min(CHUNK, queries.last[r] - start)
        v_scales = cache.value_scales + at * _F32
        scale = layer.scale
        if layer.softcap:
            scale = _cap(layer, row, rest, centers, tiles)
        softmax(row, rest, centers, v_scales, scale, low, high, tiles, part)
        clear_row(row, tiles * TILE, width)
        quantize_row(row, probabilities.address + r * probabilities.stride, width // K_BLOCK)
    values = PackedWeights(
        codes=cache.values + (head * dim_v * length + slot * TILE) * cache.bits // 8,
        code_step=TILE * length * cache.bits // 8,
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
    length, dim_k, dim_v, rows = cache.length, cache.dim_k, cache.dim_v, queries.values.length
    at, width = head * length + start % length, tiles * TILE
    scores = Rows(work.scores, CHUNK * _F32, rows)
    keys = FloatWeights(cache.keys + at * dim_k * _F16, dim_k * _F16, width, dim_k)
    call_kernel(cache.key_kernel, keys, queries.values, scores, 0, tiles)
    # the softmax of 8-bit caches, with nothing to add, and values of scale 1
    nothing = scores.address + rows * scores.stride
    v_scales = scores.address + 2 * rows * scores.stride
    zeros, ones = floats(nothing, CHUNK), floats(v_scales, CHUNK)
    for j in range(CHUNK):
        zeros[j], ones[j] = _ZERO, _ONE
    for r in range(rows):
        low, high = max(0, queries.first[r] - start), min(CHUNK, queries.last[r] - start)
        row, part = scores.address + r * scores.stride, out.address + r * out.stride
        scale = layer.scale
        if layer.softcap:
            softcap(row, width, layer.softcap)
            scale = layer.softcap + 2 * _F32
        softmax(row, nothing, nothing, v_scales, scale, low, high, tiles, part)
    at = (head * dim_v * length + start % length) * _F16
    values = FloatWeights(cache.values + at, length * _F16, dim_v, width)
    output = Rows(out.address + PART_HEAD * _F32, out.stride, rows)
    call_kernel(cache.value_kernel, values, scores, output, 0, dim_v // TILE)


@compiled
def _cap(layer, row, rest, centers, tiles):
    """Make ``row`` capped scores, ``rest`` and ``centers`` 0; returns where their scale of 1 is."""
    scores, more, shared = floats(row, CHUNK), floats(rest, CHUNK), floats(centers, CHUNK // TILE)
    for t in range(tiles):
        for j in range(t * TILE, (t + 1) * TILE):
            scores[j] += more[j]
            scores[j] += shared[t]
            more[j] = _ZERO
        shared[t] = _ZERO
    softcap(row, tiles * TILE, layer.softcap)
    return layer.softcap + 2 * _F32


@compiled
def finish(total, out, dim):
    """out = output / sum."""
    a, target = floats(total, PART_HEAD + dim), floats(out, dim)
    for i in range(dim):
        target[i] = a[PART_HEAD + i] / a[1]
