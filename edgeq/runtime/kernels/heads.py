"""Attention of one layer, shared between threads: decode by chunks of keys, prefill by queries."""

from __future__ import annotations

from edgeq.runtime.kernels.attention import append_key_value, attend_chunk, finish
from edgeq.runtime.kernels.ops import barrier, next_chunk, quantize_twice, rms_norm, rotate
from edgeq.runtime.kernels.plan import (
    C_LENGTH,
    CHUNK,
    F_EPS,
    P_ATT,
    P_ATTN_SCALE,
    P_DIM,
    P_HEADS,
    P_K,
    P_KV_HEADS,
    P_KV_STRIDE,
    P_MAX_CHUNKS,
    P_ONES,
    P_PART,
    P_PART_STRIDE,
    P_Q,
    P_Q_STRIDE,
    P_QK_NORM,
    P_QUERY_BLOCK,
    P_ROPE_HALF,
    P_SCRATCH,
    P_SCRATCH_STRIDE,
    P_SYNC,
    P_V,
    PART_HEAD,
    Y_COS,
    Y_NORM_K,
    Y_NORM_Q,
    Y_SIN,
    Y_WINDOW,
)
from edgeq.runtime.kernels.tile import ACT_BLOCK
from edgeq.runtime.kernels.vector import compiled, floats, ints, merge


@compiled
def _query_rows(  # type: ignore[no-untyped-def]
    plan, f, layer, head, token, tokens, position, q_out, q_stride, acts, act_stride
):
    """The query rows of one key/value head: normed, rotated, quantized into scratch.

    Queries are quantized twice, what the first rounding left as rows of its own: eight bits
    alone would cost as much as the keys' own rounding, and the keys are read once anyway.
    """
    group = plan[P_HEADS] // plan[P_KV_HEADS]
    dim, half = plan[P_DIM], plan[P_ROPE_HALF]
    for t in range(tokens):
        for g in range(group):
            source = plan[P_Q] + (token + t) * plan[P_Q_STRIDE] + (head * group + g) * dim * 4
            row = t * group + g
            target = q_out + row * q_stride
            a, b = floats(source, dim), floats(target, dim)
            for i in range(dim):
                b[i] = a[i]
            if plan[P_QK_NORM]:
                rms_norm(target, layer[Y_NORM_Q], target, dim, f[F_EPS])
            at = (position + t) * half * 4
            rotate(target, layer[Y_COS] + at, layer[Y_SIN] + at, half)
            quantize_twice(
                target,
                acts + row * act_stride,
                acts + (tokens * group + row) * act_stride,
                act_stride // ACT_BLOCK,
                q_out + tokens * group * q_stride,
            )


@compiled
def _append(plan, f, layer, cache, head, token, position):  # type: ignore[no-untyped-def]
    """Norm and rotate one token's key, and store key and value in the cache."""
    dim = plan[P_DIM]
    k = plan[P_K] + token * plan[P_KV_STRIDE] + head * dim * 4
    v = plan[P_V] + token * plan[P_KV_STRIDE] + head * dim * 4
    if plan[P_QK_NORM]:
        rms_norm(k, layer[Y_NORM_K], k, dim, f[F_EPS])
    at = position * plan[P_ROPE_HALF] * 4
    rotate(k, layer[Y_COS] + at, layer[Y_SIN] + at, plan[P_ROPE_HALF])
    append_key_value(cache, head, position % cache[C_LENGTH], k, v)


@compiled
def attend_one(plan, f, layer, cache, tid, threads, position):  # type: ignore[no-untyped-def]
    """Decode: (key/value head, chunk) pairs are shared out; partial results go to `P_PART`."""
    kv_heads, dim = plan[P_KV_HEADS], plan[P_DIM]
    group = plan[P_HEADS] // kv_heads
    start = max(0, position - layer[Y_WINDOW] + 1) if layer[Y_WINDOW] else 0
    low, high = start // CHUNK, position // CHUNK + 1
    q, q_stride, acts, act_stride, scores, p_acts, parts = _scratch(plan, tid)
    first, last = ints(parts, group), ints(parts + group * 8, group)
    for g in range(group):
        first[g], last[g] = start, position + 1
    ready = -1
    while True:
        task = next_chunk(plan[P_SYNC])
        if task >= kv_heads * (high - low):
            break
        head, chunk = task // (high - low), low + task % (high - low)
        if head != ready:
            _query_rows(plan, f, layer, head, 0, 1, position, q, q_stride, acts, act_stride)
            ready = head
        if chunk == high - 1:
            _append(plan, f, layer, cache, head, 0, position)
        part = plan[P_PART] + (head * group * plan[P_MAX_CHUNKS] + chunk) * plan[P_PART_STRIDE]
        attend_chunk(
            cache,
            head,
            chunk,
            q,
            q_stride,
            acts,
            act_stride,
            group,
            first,
            last,
            plan[P_ATTN_SCALE],
            plan[P_ONES],
            scores,
            p_acts,
            part,
            plan[P_MAX_CHUNKS] * plan[P_PART_STRIDE],
        )
    barrier(plan[P_SYNC], threads)
    out = plan[P_ATT] + tid * plan[P_Q_STRIDE]
    for h in range(plan[P_HEADS]):
        base = plan[P_PART] + h * plan[P_MAX_CHUNKS] * plan[P_PART_STRIDE]
        total = p_acts  # free by now
        _copy_part(base + low * plan[P_PART_STRIDE], total, dim)
        for chunk in range(low + 1, high):
            merge(total, base + chunk * plan[P_PART_STRIDE], plan[P_PART_STRIDE] // 4)
        finish(total, out + h * dim * 4, dim)


@compiled
def _copy_part(source, target, dim):  # type: ignore[no-untyped-def]
    a, b = floats(source, PART_HEAD + dim), floats(target, PART_HEAD + dim)
    for i in range(PART_HEAD + dim):
        b[i] = a[i]


@compiled
def _scratch(plan, tid):  # type: ignore[no-untyped-def]
    """This thread's scratch: query rows, their codes, scores, probabilities, partial results."""
    rows = plan[P_QUERY_BLOCK] * (plan[P_HEADS] // plan[P_KV_HEADS])
    dim = (plan[P_DIM] + 31) // 32 * 32
    q_stride, act_stride = dim * 4, dim // 32 * ACT_BLOCK
    q = plan[P_SCRATCH] + tid * plan[P_SCRATCH_STRIDE]
    acts = q + (rows + 1) * q_stride
    scores = acts + 2 * rows * act_stride
    p_acts = scores + (2 * rows + 1) * CHUNK * 4
    parts = p_acts + max(rows * (CHUNK // 32) * ACT_BLOCK, plan[P_PART_STRIDE])
    return q, q_stride, acts, act_stride, scores, p_acts, parts


@compiled
def attend_many(plan, f, layer, cache, tid, threads, tokens, position):  # type: ignore[no-untyped-def]
    """Prefill: all tokens are appended, then (head, block of queries) pairs are shared out."""
    kv_heads, dim = plan[P_KV_HEADS], plan[P_DIM]
    for t in range(tokens):
        if (position + t) // 16 % threads == tid:  # positions that share a center go together
            for head in range(kv_heads):
                _append(plan, f, layer, cache, head, t, position + t)
    barrier(plan[P_SYNC], threads)
    group, block = plan[P_HEADS] // kv_heads, plan[P_QUERY_BLOCK]
    q, q_stride, acts, act_stride, scores, p_acts, parts = _scratch(plan, tid)
    stride = plan[P_PART_STRIDE]
    totals = parts + group * block * stride
    spans = totals + group * block * stride
    first, last = ints(spans, group * block), ints(spans + group * block * 8, group * block)
    blocks = (tokens + block - 1) // block
    while True:
        task = next_chunk(plan[P_SYNC])
        if task >= kv_heads * blocks:
            break
        head, t0 = task % kv_heads, (blocks - 1 - task // kv_heads) * block
        n = min(block, tokens - t0)
        rows = n * group
        _query_rows(plan, f, layer, head, t0, n, position + t0, q, q_stride, acts, act_stride)
        for r in range(rows):
            here = position + t0 + r // group
            first[r] = max(0, here - layer[Y_WINDOW] + 1) if layer[Y_WINDOW] else 0
            last[r] = here + 1
        low, high = first[0] // CHUNK, (last[rows - 1] - 1) // CHUNK + 1
        for chunk in range(low, high):
            attend_chunk(
                cache,
                head,
                chunk,
                q,
                q_stride,
                acts,
                act_stride,
                rows,
                first,
                last,
                plan[P_ATTN_SCALE],
                plan[P_ONES],
                scores,
                p_acts,
                totals if chunk == low else parts,
                stride,
            )
            if chunk > low:
                for r in range(rows):
                    merge(totals + r * stride, parts + r * stride, stride // 4)
        for r in range(rows):
            out = plan[P_ATT] + (t0 + r // group) * plan[P_Q_STRIDE]
            finish(totals + r * stride, out + (head * group + r % group) * dim * 4, dim)
    barrier(plan[P_SYNC], threads)
