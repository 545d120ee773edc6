"""What is computed between matmuls: norms, rotary embedding, embedding rows; and the barrier.

No fast-math anywhere: every value is computed in one defined order, so that one, two or four
threads, whole prompts and single tokens give the same bits.
"""

from __future__ import annotations

import time

import numpy as np

from edgeq.formats.packing import LANE, TILE
from edgeq.formats.schemes import K_BLOCK, SUPERBLOCK, QuantScheme
from edgeq.formats.two_level import offsets
from edgeq.runtime.kernels.abi import (
    FIRST_QUANT,
    FLOAT_KINDS,
    KIND_ASYMMETRIC,
    KIND_HALF,
    KIND_MINIMUM,
    KIND_NIBBLES,
    KIND_PALETTE,
    KIND_TWO_LEVEL,
    SYNC_ARRIVED,
    SYNC_GENERATION,
    SYNC_WORK,
    TIMES_CLOCK,
    TIMES_LAST,
    TIMES_SUMS,
    Rows,
)
from edgeq.runtime.kernels.microkernel import ACT_BLOCK
from edgeq.runtime.kernels.primitives import (
    atomic_add,
    atomic_load,
    atomic_store,
    bytes_at,
    clock_gettime,
    compiled,
    floats,
    get_bf16,
    get_f16,
    ints,
    pause,
    quantize_row,
    signed_bytes_at,
    usleep,
    vector_sumsq,
)

_SPINS = 4000  # some 100 microseconds: longer than a phase of a quiet machine is uneven
_NAP = np.uint32(20)  # microseconds

_CLOCK = np.int32(time.CLOCK_MONOTONIC)  # which Python's perf_counter_ns reads too

_ZERO, _ONE = np.float32(0), np.float32(1)
_F32, _F16 = 4, 2  # bytes
_KIND_F32, _KIND_F16 = FLOAT_KINDS["float32"], FLOAT_KINDS["float16"]
_SUPERBLOCK = np.int64(SUPERBLOCK)
_WITH_MINIMUM = offsets(QuantScheme(4, symmetric=False, minimum=True, two_level=True))
_UPPER_MINIMUMS, _GROUP_SCALES_OF_MINIMUM = (
    _WITH_MINIMUM.upper_minimums,
    _WITH_MINIMUM.group_scales,
)
_GROUP_SCALES = offsets(QuantScheme(4, two_level=True)).group_scales
"""Places in a record of two-level scales."""
_PLANE = TILE * LANE
"""Bytes of a plane of packed codes."""
_LANE_BITS, _HALF_BITS, _BLOCK_BITS = (
    width.bit_length() - 1 for width in (LANE, K_BLOCK // 2, K_BLOCK)
)
"""Shifts in place of divisions; see `attention_chunk`."""


@compiled
def nanoseconds(room):
    """The monotonic clock; ``room`` is 16 bytes to write it to."""
    clock_gettime(_CLOCK, room)
    parts = ints(room, 2)
    return parts[0] * 1_000_000_000 + parts[1]


@compiled
def stamp(times, thread, number):
    """Add the nanoseconds since the last call to a sum of ``times``, unless that is 0.

    The first thread's time: it waits at every barrier as the others do. A negative number only
    starts the clock.
    """
    if times and not thread.tid:
        now = nanoseconds(times + 8 * TIMES_CLOCK)
        head = ints(times, TIMES_SUMS)
        if number >= 0:
            ints(times + 8 * (TIMES_SUMS + number), 1)[0] += now - head[TIMES_LAST]
        head[TIMES_LAST] = now


@compiled
def own_rows(rows, thread, tokens):
    """The rows of a buffer (`abi.ROWS`) that a thread works on.

    Those of all tokens; while one token is decoded, the thread's own row of a private buffer.
    """
    skip = thread.tid * rows.stride if rows.private and tokens == 1 else 0
    return Rows(rows.address + skip, rows.stride, tokens)


@compiled
def barrier(thread):
    """Wait for all threads; the last to arrive resets the work counter.

    Spins first, then sleeps. A thread that is late by so much has lost its core to another
    program, and the scheduler moves it to a core that sleeps (not to one that spins or yields).
    """
    sync = thread.sync
    if thread.threads == 1:
        atomic_store(sync + SYNC_WORK, 0)
        return
    generation = atomic_load(sync + SYNC_GENERATION)
    if atomic_add(sync + SYNC_ARRIVED, 1) == thread.threads - 1:
        atomic_store(sync + SYNC_ARRIVED, 0)
        atomic_store(sync + SYNC_WORK, 0)
        atomic_add(sync + SYNC_GENERATION, 1)
        return
    spins = 0
    while atomic_load(sync + SYNC_GENERATION) == generation:
        spins = wait(spins)


@compiled
def wait(spins):
    """Wait one more turn for another thread, after ``spins`` turns; returns the new count."""
    if spins < _SPINS:
        pause()
    else:
        usleep(_NAP)
    return spins + 1


@compiled
def next_task(thread):
    """Number of the next task since the last barrier that no thread has taken."""
    return atomic_add(thread.sync + SYNC_WORK, 1)


@compiled
def next_tiles(thread, tiles):
    """The next range of tiles that no thread has taken; empty when there are none left.

    Half of what is left is divided between the threads, then half of the rest, and so on: large
    pieces first, and an end that all reach together.
    """
    threads = thread.threads
    while True:
        task = next_task(thread)
        left = tiles >> (task // threads)
        if threads == 1 or left == 0:
            return (0, tiles) if threads == 1 and task == 0 else (tiles, tiles)
        half, part = left - (left >> 1), task % threads
        first = tiles - left + half * part // threads
        last = tiles - left + half * (part + 1) // threads
        if first < last:
            return first, last


@compiled
def quantize_twice(x, first, second, blocks, rest):
    """Quantize a row to ``first``, and what that rounding left to ``second`` (rest: scratch)."""
    quantize_row(x, first, blocks)
    source, left = floats(x, blocks * K_BLOCK), floats(rest, blocks * K_BLOCK)
    for b in range(blocks):
        at = first + b * ACT_BLOCK  # the codes of a block, then its scale
        codes, scale = signed_bytes_at(at, K_BLOCK), floats(at + K_BLOCK, 1)[0]
        for i in range(K_BLOCK):
            column = b * K_BLOCK + i
            left[column] = source[column] - scale * np.float32(codes[i])
    quantize_row(rest, second, blocks)


@compiled
def quantize_padded(x, width, acts, blocks):
    """Quantize a row of ``width`` values, with zeros up to whole blocks, which are stored too.

    Layers may differ in their width: where one is narrower than the layer before it, the rows of
    that layer have left values there.
    """
    clear_row(x, width, blocks * K_BLOCK)
    quantize_row(x, acts, blocks)


@compiled
def clear_row(x, start, stop):
    """Zeros at values ``start:stop`` of a row."""
    values = floats(x, stop)
    for i in range(start, stop):
        values[i] = _ZERO


@compiled
def inverse_rms(x, n, eps):
    """1 / sqrt(mean of the squares of n values + eps)."""
    return _ONE / np.sqrt(vector_sumsq(x, n) / np.float32(n) + eps)


@compiled
def scale_row(x, factor, weight, out, n):
    """out = x * factor * weight over n values; out may be x."""
    source, scale, target = floats(x, n), floats(weight, n), floats(out, n)
    for i in range(n):
        target[i] = (source[i] * factor) * scale[i]


@compiled
def rms_norm(x, weight, out, n, eps):
    """out = x / rms(x) * weight over n values; out may be x."""
    scale_row(x, inverse_rms(x, n, eps), weight, out, n)


@compiled
def copy_row(x, out, n):
    """out = x over n values."""
    source, target = floats(x, n), floats(out, n)
    for i in range(n):
        target[i] = source[i]


@compiled
def add_rows(x, y, factor, n):
    """x += y * factor over n values."""
    target, source = floats(x, n), floats(y, n)
    for i in range(n):
        target[i] += source[i] * factor


@compiled
def multiply_row(x, factor, n):
    """x *= factor over n values."""
    target = floats(x, n)
    for i in range(n):
        target[i] *= factor


@compiled
def rotate(x, cos, sin, half):
    """Rotary embedding in place on the first 2 * half values (Hugging Face's half split)."""
    v, c, s = floats(x, 2 * half), floats(cos, half), floats(sin, half)
    for i in range(half):
        a, b = v[i], v[i + half]
        v[i] = a * c[i] - b * s[i]
        v[i + half] = b * c[i] + a * s[i]


@compiled
def hadamard(x, n):
    """n values times an orthonormal Hadamard matrix, in place; see `edgeq.runtime.activations`."""
    v, size, half = floats(x, n), n & -n, 1
    while half < size:
        for first in range(0, n, 2 * half):
            for i in range(first, first + half):
                a, b = v[i], v[i + half]
                v[i], v[i + half] = a + b, a - b
        half *= 2
    factor = _ONE / np.sqrt(np.float32(size))
    for i in range(n):
        v[i] *= factor


@compiled
def embedding_row(lin, row, out, scale):
    """Row ``row`` of an embedding matrix, dequantized, times ``scale``."""
    embedding_part(lin, row, 0, lin.k, out, scale)


@compiled
def embedding_part(lin, row, begin, count, out, scale):
    """``count`` columns of a row of an embedding matrix, from ``begin`` on; nothing else is read.

    They are dequantized and multiplied by ``scale``.
    """
    k, kind = lin.k, lin.kind
    x = floats(out, count)
    if kind == _KIND_F32:
        source = floats(lin.codes + (row * k + begin) * _F32, count)
        for i in range(count):
            x[i] = source[i] * scale
        return
    if kind < FIRST_QUANT:
        at = lin.codes + (row * k + begin) * _F16
        for i in range(count):
            value = get_f16(at + _F16 * i) if kind == _KIND_F16 else get_bf16(at + _F16 * i)
            x[i] = value * scale
        return
    tile, r = row // TILE, row % TILE
    bits = lin.code_step // (lin.blocks * _PLANE)
    kind -= FIRST_QUANT
    half, minimum, two_level = kind & KIND_HALF, kind & KIND_MINIMUM, kind & KIND_TWO_LEVEL
    codes = bytes_at(lin.codes + tile * lin.code_step, lin.code_step)
    scales, zeros = lin.scales + tile * lin.scale_step, lin.zeros + tile * lin.zero_step
    for target in range(count):
        i = begin + target
        # column i is column c of vector j of its block: see `edgeq.formats.packing`
        block, j, c = i >> _BLOCK_BITS, (i >> _LANE_BITS) & 7, i & (LANE - 1)
        at = block * bits * _PLANE + r * LANE + c
        if bits == 8:
            code = np.int32(codes[at + j * _PLANE])
        elif bits >= 4:
            code = np.int32((codes[at + (j >> 1) * _PLANE] >> (4 * (j & 1))) & 15)
            if bits == 5:
                code |= np.int32(((codes[at + 4 * _PLANE] >> j) & 1) << 4)
            elif bits == 6:
                high = codes[at + (4 + (j >> 2)) * _PLANE] >> (2 * (j & 3))
                code |= np.int32((high & 3) << 4)
        else:
            code = np.int32((codes[at + (j >> 2) * _PLANE] >> (2 * (j & 3))) & 3)
            if bits == 3:
                code |= np.int32(((codes[at + 2 * _PLANE] >> j) & 1) << 2)
        group = i >> _HALF_BITS if half else block >> lin.shift
        if two_level:
            weight_scale, least = _two_level(lin, scales, kind, group, r)
        else:
            weight_scale, least = get_f16(scales + (group * TILE + r) * _F16), np.float32(0)
            if minimum:
                least = get_f16(zeros + (group * TILE + r) * _F16)
        if kind & KIND_PALETTE:
            x[target] = np.float32(signed_bytes_at(zeros, TILE)[code]) * weight_scale * scale
            continue
        if minimum:
            x[target] = (np.float32(code) * weight_scale + least) * scale
            continue
        zero = np.int32(1 << (bits - 1))
        if kind & KIND_ASYMMETRIC:
            zero = np.int32(bytes_at(zeros + group * TILE, TILE)[r])
        x[target] = np.float32(code - zero) * weight_scale * scale


@compiled
def _two_level(lin, records, kind, group, r):
    """Scale and minimum of a group of row ``r`` of a tile; see `edgeq.formats.two_level`."""
    groups = _SUPERBLOCK // (K_BLOCK // 2 if kind & KIND_HALF else K_BLOCK)
    nbytes = lin.scale_step // (lin.blocks * K_BLOCK // _SUPERBLOCK)
    record = bytes_at(records + group // groups * nbytes, nbytes)
    upper = records + group // groups * nbytes + _F16 * r
    at = (group % groups) * TILE + r
    if not kind & KIND_MINIMUM:
        return get_f16(upper) * np.float32(np.int8(record[_GROUP_SCALES + at])), np.float32(0)
    first = np.int32(record[_GROUP_SCALES_OF_MINIMUM + at])
    if kind & KIND_NIBBLES:
        scale, least = first & 15, first >> 4
    else:
        after = _GROUP_SCALES_OF_MINIMUM + groups * TILE
        scale, least = first, np.int32(record[after + at])
    minimum = get_f16(upper + _UPPER_MINIMUMS) * np.float32(least)
    return get_f16(upper) * np.float32(scale), minimum


@compiled
def argmax(x):
    """The lowest index of the largest value."""
    best = 0
    for i in range(1, x.size):
        if x[i] > x[best]:
            best = i
    return best
