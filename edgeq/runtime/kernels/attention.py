"""Attention of one layer, shared between threads: decode by chunks of keys, prompts by queries."""

from __future__ import annotations

from edgeq.formats.schemes import K_BLOCK
from edgeq.model.memory_layout import CHUNK, PART_HEAD
from edgeq.runtime.kernels import abi
from edgeq.runtime.kernels.abi import AttentionWork, Rows
from edgeq.runtime.kernels.attention_chunk import Queries, append_key_value, attend_chunk, finish
from edgeq.runtime.kernels.microkernel import ACT_BLOCK
from edgeq.runtime.kernels.primitives import compiled, ints, merge, quantize_row, records
from edgeq.runtime.kernels.row_ops import (
    barrier,
    clear_row,
    copy_row,
    hadamard,
    inverse_rms,
    multiply_row,
    next_task,
    quantize_twice,
    rms_norm,
    rotate,
    scale_row,
)

_F32, _I64 = 4, 8  # bytes
_caches = records(abi.CACHE)


@compiled
def _thread_work(program, thread):
    """Where this thread's own memory lies."""
    base = program.work + thread.tid * program.work_stride
    return AttentionWork(
        queries=base + program.work_queries,
        codes=base + program.work_codes,
        key=base + program.work_key,
        scores=base + program.work_scores,
        probabilities=base + program.work_probabilities,
        parts=base + program.work_parts,
        totals=base + program.work_totals,
        spans=base + program.work_spans,
    )


@compiled
def _room_for_queries(layer, work, tokens):
    """Room in this thread's memory for the queries of ``tokens`` tokens."""
    blocks = (layer.dim + K_BLOCK - 1) // K_BLOCK
    rows = tokens * (layer.heads // layer.kv_heads)
    return Queries(
        Rows(work.queries, blocks * K_BLOCK * _F32, rows),
        Rows(work.codes, blocks * ACT_BLOCK, rows),
        ints(work.spans, rows),
        ints(work.spans + rows * _I64, rows),
    )


@compiled
def _copy_head(program, layer, row, head, heads, norm, cos, sin, position, target):
    """Copy one head of q or k from its row to ``target``, normed and rotated, or rotated and
    normed.

    Args:
        program, layer: `abi.PROGRAM` and the layer's `abi.ATTENTION`.
        row: address of float32 [heads, D].
        head, heads: which of how many.
        norm: address of the norm's weight, or 0.
        cos, sin: addresses of the rotary tables, or 0.
        position: of the token.
        target: address of float32 [D].
    """
    dim = layer.dim
    source = row + head * dim * _F32
    if norm and layer.norm_last:
        copy_row(source, target, dim)
    elif norm and layer.norm_spans_heads:
        factor = inverse_rms(row, heads * dim, program.eps)
        scale_row(source, factor, norm + head * dim * _F32, target, dim)
    elif norm:
        rms_norm(source, norm, target, dim, program.eps)
    else:
        copy_row(source, target, dim)
    at = position * layer.rope_half * _F32
    rotate(target, cos + at, sin + at, layer.rope_half)
    if norm and layer.norm_last:
        rms_norm(target, norm, target, dim, program.eps)


@compiled
def _fill_queries(program, layer, cache, head, q, position, queries):
    """The query rows of one key/value head: normed, rotated, quantized. Past the values of a head,
    which may be fewer than those of a layer before, there are zeros up to a whole block.

    Beside keys of eight bits queries are quantized twice, what the first rounding left as rows of
    its own: eight bits alone would cost as much as the keys' own rounding, and the keys are read
    once anyway. Beside keys of four bits the first rounding is enough.
    """
    group = layer.heads // layer.kv_heads
    values, codes = queries.values, queries.codes
    rest = values.address + values.length * values.stride
    for t in range(q.length):
        for g in range(group):
            row, at = t * group + g, q.address + t * q.stride
            target = values.address + row * values.stride
            # fmt: off
            _copy_head(program, layer, at, head * group + g, layer.heads, layer.norm_q,
                       layer.cos_q, layer.sin_q, position + t, target)
            # fmt: on
            clear_row(target, layer.dim, codes.stride // ACT_BLOCK * K_BLOCK)
            first = codes.address + row * codes.stride
            if cache.bits == 4:
                hadamard(target, layer.dim)
                quantize_row(target, first, codes.stride // ACT_BLOCK)
                continue
            second = codes.address + (codes.length + row) * codes.stride
            quantize_twice(target, first, second, codes.stride // ACT_BLOCK, rest)


@compiled
def _append(program, layer, cache, head, k, v, position, work):
    """Norm and rotate one token's key, norm its value if the layer does, and store both.

    The value is normed, and for a cache of 4 bits multiplied by a Hadamard matrix, where it lies.
    """
    # fmt: off
    _copy_head(program, layer, k, head, layer.kv_heads, layer.norm_k, layer.cos_k, layer.sin_k,
               position, work.key)
    # fmt: on
    value = v + head * layer.dim * _F32
    if layer.norm_values:
        multiply_row(value, inverse_rms(value, layer.dim, program.eps), layer.dim)
    if cache.bits == 4:
        hadamard(work.key, layer.dim)
        hadamard(value, layer.dim)
    append_key_value(cache, head, position % cache.length, work.key, value)


@compiled
def _finish(layer, cache, head, total, out):
    """The output of all chunks of a query head from their sums."""
    finish(total, out, layer.dim, layer.sinks, head)
    if cache.bits == 4:
        hadamard(out, layer.dim)


@compiled
def _first_seen(layer, position):
    """The first position that the token at a position sees."""
    return max(0, position - layer.window + 1) if layer.window else 0


@compiled
def _end_seen(layer, position, length):
    """One more than the last of ``length`` positions that the token at a position sees."""
    if not layer.both_ways:
        return position + 1
    return min(length, position + layer.window) if layer.window else length


@compiled
def _attend_part(program, layer, cache, head, chunk, queries, work, parts):
    """The partial results of one token's queries of a key/value head, of one chunk."""
    stride = program.chunks * program.part_stride
    group = layer.heads // layer.kv_heads
    part = parts + head * group * stride + chunk * program.part_stride
    attend_chunk(program, layer, cache, head, chunk, queries, work, Rows(part, stride, group))


@compiled
def _merge_parts(program, layer, cache, low, high, work, parts, row):
    """One token's output row from the partial results of chunks ``low:high``."""
    total = work.probabilities  # free by now
    for h in range(layer.heads):
        part = parts + h * program.chunks * program.part_stride
        copy_row(part + low * program.part_stride, total, PART_HEAD + layer.dim)
        for chunk in range(low + 1, high):
            merge(total, part + chunk * program.part_stride, program.part_stride // _F32)
        _finish(layer, cache, h, total, row + h * layer.dim * _F32)


@compiled
def attend_one(program, layer, cache, q, k, v, out, thread, position):
    """Decode: (key/value head, chunk) pairs are shared out; partial results are then merged."""
    group = layer.heads // layer.kv_heads
    start = _first_seen(layer, position)
    low, high = start // CHUNK, position // CHUNK + 1
    work = _thread_work(program, thread)
    queries = _room_for_queries(layer, work, 1)
    for g in range(group):
        queries.first[g], queries.last[g] = start, position + 1
    ready = -1
    while True:
        task = next_task(thread)
        if task >= layer.kv_heads * (high - low):
            break
        head, chunk = task // (high - low), low + task % (high - low)
        if head != ready:
            _fill_queries(program, layer, cache, head, q, position, queries)
            ready = head
        if chunk == high - 1 and not layer.borrowed:
            _append(program, layer, cache, head, k.address, v.address, position, work)
        _attend_part(program, layer, cache, head, chunk, queries, work, program.parts)
    barrier(thread)
    _merge_parts(program, layer, cache, low, high, work, program.parts, out.address)


@compiled
def attend_batch(program, call, number, layer, q, k, v, out, thread):
    """Decode of several sequences: each row is the next token of a sequence with its own cache.

    The tasks of `attend_one` of all sequences are one range that the threads share.
    """
    group = layer.heads // layer.kv_heads
    tables, positions = ints(call.tables, q.length), ints(call.positions, q.length)
    stride = layer.heads * program.chunks * program.part_stride  # of a sequence's partial results
    work = _thread_work(program, thread)
    queries = _room_for_queries(layer, work, 1)
    task, base = next_task(thread), 0
    for b in range(q.length):
        position = positions[b]
        cache = _caches(tables[b], program.layer_count)[number]
        start = _first_seen(layer, position)
        low, high = start // CHUNK, position // CHUNK + 1
        for g in range(group):
            queries.first[g], queries.last[g] = start, position + 1
        row = Rows(q.address + b * q.stride, q.stride, 1)
        key, value = k.address + b * k.stride, v.address + b * v.stride
        tasks, ready = layer.kv_heads * (high - low), -1
        while task < base + tasks:
            head, chunk = (task - base) // (high - low), low + (task - base) % (high - low)
            if head != ready:
                _fill_queries(program, layer, cache, head, row, position, queries)
                ready = head
            if chunk == high - 1 and not layer.borrowed:
                _append(program, layer, cache, head, key, value, position, work)
            parts = program.parts + b * stride
            _attend_part(program, layer, cache, head, chunk, queries, work, parts)
            task = next_task(thread)
        base += tasks
    barrier(thread)
    for b in range(thread.tid, q.length, thread.threads):
        position = positions[b]
        cache = _caches(tables[b], program.layer_count)[number]
        low, high = _first_seen(layer, position) // CHUNK, position // CHUNK + 1
        # fmt: off
        _merge_parts(program, layer, cache, low, high, work, program.parts + b * stride,
                     out.address + b * out.stride)
        # fmt: on
    barrier(thread)


@compiled
def attend_prompt(program, layer, cache, q, k, v, out, thread, position):
    """Prefill: all tokens are appended, then (head, block of queries) pairs are shared out."""
    tokens, kv_heads, dim = q.length, layer.kv_heads, layer.dim
    group = layer.heads // kv_heads
    work = _thread_work(program, thread)
    for t in range(0 if layer.borrowed else tokens):
        # positions that share a center go together
        if (position + t) // cache.span % thread.threads == thread.tid:
            for head in range(kv_heads):
                k_row, v_row = k.address + t * k.stride, v.address + t * v.stride
                _append(program, layer, cache, head, k_row, v_row, position + t, work)
    barrier(thread)
    stride = program.part_stride
    blocks = (tokens + layer.query_block - 1) // layer.query_block
    while True:
        task = next_task(thread)
        if task >= kv_heads * blocks:
            break
        head, t0 = task % kv_heads, (blocks - 1 - task // kv_heads) * layer.query_block
        n = min(layer.query_block, tokens - t0)
        queries = _room_for_queries(layer, work, n)
        rows = queries.values.length
        block = Rows(q.address + t0 * q.stride, q.stride, n)
        _fill_queries(program, layer, cache, head, block, position + t0, queries)
        for r in range(rows):
            here = position + t0 + r // group
            queries.first[r] = _first_seen(layer, here)
            queries.last[r] = _end_seen(layer, here, position + tokens)
        low, high = queries.first[0] // CHUNK, (queries.last[rows - 1] - 1) // CHUNK + 1
        for chunk in range(low, high):
            part = Rows(work.totals if chunk == low else work.parts, stride, rows)
            attend_chunk(program, layer, cache, head, chunk, queries, work, part)
            if chunk > low:
                for r in range(rows):
                    merge(work.totals + r * stride, work.parts + r * stride, stride // _F32)
        for r in range(rows):
            row = out.address + (t0 + r // group) * out.stride
            one = head * group + r % group
            _finish(layer, cache, one, work.totals + r * stride, row + one * dim * _F32)
    barrier(thread)
