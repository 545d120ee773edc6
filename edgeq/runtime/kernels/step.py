"""The whole decoder as one compiled function that every thread runs side by side.

Threads share a work counter and a barrier; between barriers each takes the next chunk of rows
nobody has taken (so a slow or interrupted core takes fewer). Per layer:

    norm + quantize -> q, k, v          | barrier
    rope, cache append, attention       | barrier   (prompts: one more, between append and use)
    quantize -> output projection       | barrier
    norm + quantize -> gate, up, act    | barrier
    quantize -> down                    | barrier

With one token (decode) the cheap steps - residual, norms, quantization - are repeated by every
thread in memory of its own, which costs less than sharing them would; with many tokens
(prefill) they are divided by token.
"""

from __future__ import annotations

from numba import types

from edgeq.runtime.kernels.heads import attend_many, attend_one
from edgeq.runtime.kernels.matmul import matmul
from edgeq.runtime.kernels.ops import (
    add_rows,
    argmax,
    barrier,
    embedding_row,
    next_tiles,
    rms_norm,
    stamp,
)
from edgeq.runtime.kernels.plan import (
    C_FIELDS,
    DOWN_PROJ,
    F_EMBED_SCALE,
    F_EPS,
    F_FIELDS,
    GATE_PROJ,
    K_PROJ,
    L_FIELDS,
    L_N,
    L_TILES,
    O_PROJ,
    P_ACT_KIND,
    P_ACTS,
    P_ACTS_STRIDE,
    P_ATT,
    P_BRANCH,
    P_FFN_STRIDE,
    P_FIELDS,
    P_FINAL_NORM,
    P_GATE,
    P_HIDDEN,
    P_HIDDEN_STRIDE,
    P_K,
    P_KV_STRIDE,
    P_LAYERS,
    P_NORMED,
    P_POST_NORMS,
    P_Q,
    P_Q_STRIDE,
    P_SYNC,
    P_UP,
    P_V,
    P_X,
    P_X_OWN,
    PER_LAYER,
    Q_PROJ,
    S_ARGMAX,
    S_ATTENTION,
    S_DOWN_PROJ,
    S_EMBED,
    S_FINAL_NORM,
    S_GATE_UP,
    S_HEAD,
    S_NORM_FFN,
    S_NORM_IN,
    S_O_PROJ,
    S_PER_LAYER,
    S_QKV,
    UP_PROJ,
    Y_FIELDS,
    Y_NORM_IN,
    Y_NORM_POST_ATT,
    Y_NORM_POST_FFN,
    Y_NORM_PRE_FFN,
)
from edgeq.runtime.kernels.vector import compiled, floats, gate, ints, quantize_row, table


@compiled
def _project(  # type: ignore[no-untyped-def]
    plan, threads, lin, x, x_stride, acts, tokens, out, out_stride
):
    """One linear, shared between threads by chunks of tiles."""
    tiles = lin[L_TILES]
    while True:
        first, last = next_tiles(plan[P_SYNC], tiles, threads)
        if first == last:
            break
        matmul(
            lin,
            x,
            x_stride,
            acts,
            plan[P_ACTS_STRIDE],
            tokens,
            out,
            out_stride,
            first,
            last,
        )


@compiled
def _residual(plan, f, x, branch, post, weight, normed, acts):  # type: ignore[no-untyped-def]
    """x += branch (normed first if ``post``); then norm x and quantize it for the next linears."""
    n = plan[P_HIDDEN]
    if branch:
        if post:
            rms_norm(branch, post, normed, n, f[F_EPS])
            add_rows(x, normed, n)
        else:
            add_rows(x, branch, n)
    rms_norm(x, weight, normed, n, f[F_EPS])
    quantize_row(normed, acts, plan[P_HIDDEN_STRIDE] // 128)


@compiled
def _residuals(plan, f, tid, threads, tokens, branch, post, weight):  # type: ignore[no-untyped-def]
    """`_residual` for every token: this thread's own copy (decode), or its share (prefill)."""
    if tokens == 1:
        _residual(
            plan,
            f,
            plan[P_X_OWN] + tid * plan[P_HIDDEN_STRIDE],
            branch,
            post,
            weight,
            plan[P_NORMED] + tid * plan[P_HIDDEN_STRIDE],
            plan[P_ACTS] + tid * plan[P_ACTS_STRIDE],
        )
        return
    for t in range(tid, tokens, threads):
        at = t * plan[P_HIDDEN_STRIDE]
        _residual(
            plan,
            f,
            plan[P_X] + at,
            branch + at if branch else 0,
            post,
            weight,
            plan[P_NORMED] + at,
            plan[P_ACTS] + t * plan[P_ACTS_STRIDE],
        )
    barrier(plan[P_SYNC], threads)


@compiled
def _quantize(plan, tid, threads, tokens, x, stride, acts):  # type: ignore[no-untyped-def]
    """Quantize rows at ``x`` for the next linear: this thread's row (decode), or its share."""
    if tokens == 1:
        quantize_row(x, acts, stride // 128)
        return
    for t in range(tid, tokens, threads):
        quantize_row(x + t * stride, acts + t * plan[P_ACTS_STRIDE], stride // 128)
    barrier(plan[P_SYNC], threads)


@compiled
def _feed_forward(plan, linears, tid, threads, tokens, x, acts):  # type: ignore[no-untyped-def]
    """gate and up for the same rows by the same thread, then act(gate) * up in place."""
    g, u, stride = linears[GATE_PROJ], linears[UP_PROJ], plan[P_FFN_STRIDE]
    tiles = g[L_TILES]
    while True:
        first, last = next_tiles(plan[P_SYNC], tiles, threads)
        if first == last:
            break
        matmul(
            g,
            x,
            plan[P_HIDDEN_STRIDE],
            acts,
            plan[P_ACTS_STRIDE],
            tokens,
            plan[P_GATE],
            stride,
            first,
            last,
        )
        matmul(
            u,
            x,
            plan[P_HIDDEN_STRIDE],
            acts,
            plan[P_ACTS_STRIDE],
            tokens,
            plan[P_UP],
            stride,
            first,
            last,
        )
        for t in range(tokens):
            at = t * stride + first * 64
            gate(plan[P_GATE] + at, plan[P_UP] + at, (last - first) * 16, plan[P_ACT_KIND])
    barrier(plan[P_SYNC], threads)


@compiled
def _forward(  # type: ignore[no-untyped-def]
    plan,
    f,
    linears,
    layers,
    caches,
    tid,
    threads,
    tokens,
    position,
    ids,
    outputs,
    logits,
    logits_stride,
):
    """Run ``tokens`` tokens; logits of the last ``outputs`` of them."""
    decode = tokens == 1
    hidden_stride = plan[P_HIDDEN_STRIDE]
    count = plan[P_LAYERS]
    others = count * S_PER_LAYER
    stamp(plan, tid, -1)
    embed = linears[count * PER_LAYER]
    if decode:
        embedding_row(embed, ids[0], plan[P_X_OWN] + tid * hidden_stride, f[F_EMBED_SCALE])
    else:
        for t in range(tid, tokens, threads):
            embedding_row(embed, ids[t], plan[P_X] + t * hidden_stride, f[F_EMBED_SCALE])
    stamp(plan, tid, others + S_EMBED)
    mine = tid if decode else 0
    normed = plan[P_NORMED] + mine * hidden_stride
    acts = plan[P_ACTS] + mine * plan[P_ACTS_STRIDE]
    branch, post = 0, 0
    for i in range(count):
        layer, cache, at = layers[i], caches[i], i * S_PER_LAYER
        lin = linears[i * PER_LAYER : (i + 1) * PER_LAYER]
        _residuals(plan, f, tid, threads, tokens, branch, post, layer[Y_NORM_IN])
        stamp(plan, tid, at + S_NORM_IN)
        _qkv(plan, threads, lin, normed, acts, tokens)
        stamp(plan, tid, at + S_QKV)
        if decode:
            attend_one(plan, f, layer, cache, tid, threads, position)
        else:
            attend_many(plan, f, layer, cache, tid, threads, tokens, position)
        stamp(plan, tid, at + S_ATTENTION)
        att = plan[P_ATT] + mine * plan[P_Q_STRIDE]
        _quantize(plan, tid, threads, tokens, att, plan[P_Q_STRIDE], acts)
        _project(
            plan,
            threads,
            lin[O_PROJ],
            att,
            plan[P_Q_STRIDE],
            acts,
            tokens,
            plan[P_BRANCH],
            hidden_stride,
        )
        barrier(plan[P_SYNC], threads)
        stamp(plan, tid, at + S_O_PROJ)
        branch, post = plan[P_BRANCH], layer[Y_NORM_POST_ATT] if plan[P_POST_NORMS] else 0
        before_ffn = layer[Y_NORM_PRE_FFN] if plan[P_POST_NORMS] else layer[Y_NORM_POST_ATT]
        _residuals(plan, f, tid, threads, tokens, branch, post, before_ffn)
        stamp(plan, tid, at + S_NORM_FFN)
        _feed_forward(plan, lin, tid, threads, tokens, normed, acts)
        stamp(plan, tid, at + S_GATE_UP)
        _quantize(plan, tid, threads, tokens, plan[P_GATE], plan[P_FFN_STRIDE], acts)
        _project(
            plan,
            threads,
            lin[DOWN_PROJ],
            plan[P_GATE],
            plan[P_FFN_STRIDE],
            acts,
            tokens,
            plan[P_BRANCH],
            hidden_stride,
        )
        barrier(plan[P_SYNC], threads)
        stamp(plan, tid, at + S_DOWN_PROJ)
        post = layer[Y_NORM_POST_FFN] if plan[P_POST_NORMS] else 0
    _residuals(plan, f, tid, threads, tokens, branch, post, plan[P_FINAL_NORM])
    stamp(plan, tid, others + S_FINAL_NORM)
    if outputs:
        skip = 0 if decode else tokens - outputs
        _project(
            plan,
            threads,
            linears[count * PER_LAYER + 1],
            normed + skip * hidden_stride,
            hidden_stride,
            acts + skip * plan[P_ACTS_STRIDE],
            outputs,
            logits,
            logits_stride,
        )
    barrier(plan[P_SYNC], threads)
    stamp(plan, tid, others + S_HEAD)


@compiled
def _qkv(plan, threads, lin, x, acts, tokens):  # type: ignore[no-untyped-def]
    """q, k and v as one range of tiles."""
    q_tiles, kv_tiles = lin[Q_PROJ][L_TILES], lin[K_PROJ][L_TILES]
    tiles = q_tiles + 2 * kv_tiles
    while True:
        first, last = next_tiles(plan[P_SYNC], tiles, threads)
        if first == last:
            break
        for part in range(3):
            base = 0 if part == 0 else q_tiles + (part - 1) * kv_tiles
            end = q_tiles if part == 0 else base + kv_tiles
            a, b = max(first, base), min(last, end)
            if a < b:
                out = plan[P_Q] if part == 0 else (plan[P_K] if part == 1 else plan[P_V])
                stride = plan[P_Q_STRIDE] if part == 0 else plan[P_KV_STRIDE]
                matmul(
                    lin[part],
                    x,
                    plan[P_HIDDEN_STRIDE],
                    acts,
                    plan[P_ACTS_STRIDE],
                    tokens,
                    out,
                    stride,
                    a - base,
                    b - base,
                )
    barrier(plan[P_SYNC], threads)


def decoder(args_at, tid):  # type: ignore[no-untyped-def]
    """What each thread runs. One entry point for both uses, so that it is compiled once.

    With ``steps`` 0: one batch of ``tokens`` tokens ``ids``, logits of the last ``outputs``.
    Else: ``steps`` greedy tokens after ``ids[0]``, into ``found``, with no Python in between.
    Arguments are integers at an address, arrays among them by address: it is called without
    Numba (see `native`).
    """
    args = ints(args_at, ARGUMENTS)
    plan, f = ints(args[0], P_FIELDS), floats(args[1], F_FIELDS)
    count = plan[P_LAYERS]
    linears = table(args[2], count * PER_LAYER + 2, L_FIELDS)
    layers, caches = table(args[3], count, Y_FIELDS), table(args[4], count, C_FIELDS)
    threads, tokens, position, ids_at = args[5], args[6], args[7], args[8]
    outputs, logits, logits_stride = args[9], args[10], args[11]
    steps, found_at = args[12], args[13]
    scores = floats(logits, linears[count * PER_LAYER + 1][L_N])
    for step in range(max(steps, 1)):
        ids = ints(found_at + 8 * (step - 1) if step else ids_at, tokens)
        # fmt: off
        _forward(plan, f, linears, layers, caches, tid, threads, tokens, position + step, ids,
                 outputs, logits, logits_stride)
        # fmt: on
        if steps:
            best = argmax(scores)  # every thread finds the same
            if tid == 0:
                ints(found_at, steps)[step] = best
            barrier(plan[P_SYNC], threads)
            stamp(plan, tid, count * S_PER_LAYER + S_ARGMAX)


ARGUMENTS = 14
TYPES = {decoder: types.void(types.int64, types.int64)}
"""What a team calls, by address (see `native`)."""
