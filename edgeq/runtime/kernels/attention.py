"""Attention of one layer, shared between threads: decode by chunks of keys, prompts by queries."""

from __future__ import annotations

from edgeq.formats.packing import TILE
from edgeq.formats.schemes import K_BLOCK
from edgeq.model.memory_layout import CHUNK, PART_HEAD
from edgeq.runtime.kernels.abi import Rows
from edgeq.runtime.kernels.attention_chunk import append_key_value, attend_chunk, finish
from edgeq.runtime.kernels.microkernel import ACT_BLOCK
from edgeq.runtime.kernels.primitives import compiled, floats, ints, merge
from edgeq.runtime.kernels.row_ops import barrier, next_chunk, quantize_twice, rms_norm, rotate

_F32, _I64 = 4, 8  # bytes


@compiled
def _work(program, layer, tid, tokens):  # type: ignore[no-untyped-def]
    """This thread's query rows and their codes, for the queries of ``tokens`` tokens."""
    base = program.work + tid * program.work_stride
    blocks = (layer.dim + K_BLOCK - 1) // K_BLOCK
    rows = tokens * (layer.heads // layer.kv_heads)
    queries = Rows(base + program.work_queries, blocks * K_BLOCK * _F32, rows)
    return queries, Rows(base + program.work_codes, blocks * ACT_BLOCK, rows)


@compiled
def _query_rows(program, layer, head, q, position, queries, codes):  # type: ignore[no-untyped-def]
    """The query rows of one key/value head: normed, rotated, quantized into this thread's memory.

    Queries are quantized twice, what the first rounding left as rows of its own: eight bits
    alone would cost as much as the keys' own rounding, and the keys are read once anyway.
    """
    group, dim = layer.heads // layer.kv_heads, layer.dim
    rest = queries.address + queries.length * queries.stride
    for t in range(q.length):
        at = (position + t) * layer.rope_half * _F32
        for g in range(group):
            row = t * group + g
            target = queries.address + row * queries.stride
            source = floats(q.address + t * q.stride + (head * group + g) * dim * _F32, dim)
            copy = floats(target, dim)
            for i in range(dim):
                copy[i] = source[i]
            if layer.norm_q:
                rms_norm(target, layer.norm_q, target, dim, program.eps)
            rotate(target, layer.cos + at, layer.sin + at, layer.rope_half)
            quantize_twice(
                target,
                codes.address + row * codes.stride,
                codes.address + (codes.length + row) * codes.stride,
                codes.stride // ACT_BLOCK,
                rest,
            )


@compiled
def _append(program, layer, cache, head, k, v, position):  # type: ignore[no-untyped-def]
    """Norm and rotate one token's key, and store key and value in the cache."""
    k_head, v_head = k + head * layer.dim * _F32, v + head * layer.dim * _F32
    if layer.norm_k:
        rms_norm(k_head, layer.norm_k, k_head, layer.dim, program.eps)
    at = position * layer.rope_half * _F32
    rotate(k_head, layer.cos + at, layer.sin + at, layer.rope_half)
    append_key_value(cache, head, position % cache.length, k_head, v_head)


@compiled
def _first_seen(layer, position):  # type: ignore[no-untyped-def]
    """The first position that the token at a position sees."""
    return max(0, position - layer.window + 1) if layer.window else 0


@compiled
def attend_one(program, layer, cache, q, k, v, out, tid, threads, position):  # type: ignore[no-untyped-def]
    """Decode: (key/value head, chunk) pairs are shared out; partial results are then merged."""
    group, dim = layer.heads // layer.kv_heads, layer.dim
    start = _first_seen(layer, position)
    low, high = start // CHUNK, position // CHUNK + 1
    queries, codes = _work(program, layer, tid, 1)
    base = program.work + tid * program.work_stride
    scores, probabilities = base + program.work_scores, base + program.work_probabilities
    spans = base + program.work_spans
    first, last = ints(spans, group), ints(spans + group * _I64, group)
    for g in range(group):
        first[g], last[g] = start, position + 1
    head_stride = program.chunks * program.part_stride
    ready = -1
    while True:
        task = next_chunk(program.sync)
        if task >= layer.kv_heads * (high - low):
            break
        head, chunk = task // (high - low), low + task % (high - low)
        if head != ready:
            _query_rows(program, layer, head, q, position, queries, codes)
            ready = head
        if chunk == high - 1:
            _append(program, layer, cache, head, k.address, v.address, position)
        part = program.parts + head * group * head_stride + chunk * program.part_stride
        # fmt: off
        attend_chunk(cache, head, chunk, queries, codes, first, last, layer.scale, program.ones,
                     scores, probabilities, Rows(part, head_stride, group))
        # fmt: on
    barrier(program.sync, threads)
    total = probabilities  # free by now
    for h in range(layer.heads):
        part = program.parts + h * head_stride
        _copy_part(part + low * program.part_stride, total, dim)
        for chunk in range(low + 1, high):
            merge(total, part + chunk * program.part_stride, program.part_stride // _F32)
        finish(total, out.address + h * dim * _F32, dim)


@compiled
def _copy_part(source, target, dim):  # type: ignore[no-untyped-def]
    a, b = floats(source, PART_HEAD + dim), floats(target, PART_HEAD + dim)
    for i in range(PART_HEAD + dim):
        b[i] = a[i]


@compiled
def attend_prompt(program, layer, cache, q, k, v, out, tid, threads, position):  # type: ignore[no-untyped-def]
    """Prefill: all tokens are appended, then (head, block of queries) pairs are shared out."""
    tokens, kv_heads, dim = q.length, layer.kv_heads, layer.dim
    group = layer.heads // kv_heads
    for t in range(tokens):
        if (position + t) // TILE % threads == tid:  # positions that share a center go together
            for head in range(kv_heads):
                k_row, v_row = k.address + t * k.stride, v.address + t * v.stride
                _append(program, layer, cache, head, k_row, v_row, position + t)
    barrier(program.sync, threads)
    base = program.work + tid * program.work_stride
    scores, probabilities = base + program.work_scores, base + program.work_probabilities
    parts, totals = base + program.work_parts, base + program.work_totals
    spans, stride = base + program.work_spans, program.part_stride
    most = layer.query_block * group
    first, last = ints(spans, most), ints(spans + most * _I64, most)
    blocks = (tokens + layer.query_block - 1) // layer.query_block
    while True:
        task = next_chunk(program.sync)
        if task >= kv_heads * blocks:
            break
        head, t0 = task % kv_heads, (blocks - 1 - task // kv_heads) * layer.query_block
        n = min(layer.query_block, tokens - t0)
        queries, codes = _work(program, layer, tid, n)
        block = Rows(q.address + t0 * q.stride, q.stride, n)
        _query_rows(program, layer, head, block, position + t0, queries, codes)
        for r in range(queries.length):
            here = position + t0 + r // group
            first[r], last[r] = _first_seen(layer, here), here + 1
        low, high = first[0] // CHUNK, (last[queries.length - 1] - 1) // CHUNK + 1
        for chunk in range(low, high):
            part = Rows(totals if chunk == low else parts, stride, queries.length)
            # fmt: off
            attend_chunk(cache, head, chunk, queries, codes, first, last, layer.scale,
                         program.ones, scores, probabilities, part)
            # fmt: on
            if chunk > low:
                for r in range(queries.length):
                    merge(totals + r * stride, parts + r * stride, stride // _F32)
        for r in range(queries.length):
            row = out.address + (t0 + r // group) * out.stride
            finish(totals + r * stride, row + (head * group + r % group) * dim * _F32, dim)
    barrier(program.sync, threads)
