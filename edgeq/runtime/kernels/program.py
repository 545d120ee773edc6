"""The compiled decoder: runs a program of steps, every thread side by side.

A program is an array of `abi.STEP` records, made once for a model
(`edgeq.runtime.compiled_program`). Threads share a work counter and a barrier; between barriers
each takes the next rows that nobody has taken (so a slow or interrupted core takes fewer). A layer
of a plain decoder is

    NORM       add the branch before, norm, quantize
    LINEARS    q, k, v                               | barrier
    ATTENTION  rotary embedding, cache, attention    | barrier   (prompts: one more inside)
    QUANTIZE
    LINEARS    output projection                     | barrier
    NORM
    GATED      gate, up, activation                  | barrier
    QUANTIZE
    LINEARS    down projection                       | barrier

A layer with a short convolution has SHORT_CONV in place of ATTENTION, and one with a gated delta
net DELTA_NET. OUTPUT_GATE may follow ATTENTION. A layer with experts has LINEARS of the router and
EXPERTS in place of what follows the second NORM. Where layers have inputs of their own, LINEARS and
LAYER_INPUTS make those of all layers first, and each layer ends with NORM, LINEARS, OWN_INPUT and
LINEARS. A multi-token-prediction head has STATES and SUM between EMBED and its layer; a model that
has one keeps the states of its last positions.

With one token (decode) the cheap steps - residual, norms, quantization - are repeated by every
thread in rows of its own, which costs less than sharing them would; with many tokens (prefill)
they are divided by token, and end with a barrier too.
"""

from __future__ import annotations

import numpy as np
from numba import types

from edgeq.formats.packing import TILE
from edgeq.runtime.kernels import abi
from edgeq.runtime.kernels.abi import Rows, Step, Thread
from edgeq.runtime.kernels.attention import attend_batch, attend_one, attend_prompt
from edgeq.runtime.kernels.delta_net import gate_output, recur, recur_batch
from edgeq.runtime.kernels.experts import mix
from edgeq.runtime.kernels.layer_inputs import make_inputs, use_input
from edgeq.runtime.kernels.matmul import matmul
from edgeq.runtime.kernels.primitives import (
    compiled,
    floats,
    gate,
    ints,
    quantize_row,
    records,
    softcap,
)
from edgeq.runtime.kernels.row_ops import (
    add_rows,
    argmax,
    barrier,
    copy_row,
    embedding_row,
    multiply_row,
    next_tiles,
    own_rows,
    quantize_padded,
    rms_norm,
    stamp,
)
from edgeq.runtime.kernels.short_conv import convolve_batch, convolve_one, convolve_prompt

(
    _EMBED, _NORM, _QUANTIZE, _LINEARS, _GATED, _ATTENTION, _HEAD, _SHORT_CONV, _DELTA_NET,
    _OUTPUT_GATE, _EXPERTS, _LAYER_INPUTS, _OWN_INPUT, _STATES, _SUM,
) = (int(kind) for kind in Step)  # fmt: skip
_F32 = 4
_ONE = np.float32(1)

_calls, _programs, _steps = records(abi.CALL), records(abi.PROGRAM), records(abi.STEP)
_linears, _rows = records(abi.LINEAR), records(abi.ROWS)
_attentions, _caches = records(abi.ATTENTION), records(abi.CACHE)


@compiled
def _embed(scale, out, lin, ids, thread):
    """Embedding rows of the tokens."""
    if out.length == 1:
        embedding_row(lin, ids[0], out.address, scale)
        return
    for t in range(thread.tid, out.length, thread.threads):
        embedding_row(lin, ids[t], out.address + t * out.stride, scale)


@compiled
def _load_states(call, step, out, thread):
    """The states that the call points to."""
    if out.length == 1:
        copy_row(call.states, out.address, step.width)
        return
    for t in range(thread.tid, out.length, thread.threads):
        copy_row(call.states + t * call.states_stride, out.address + t * out.stride, step.width)


@compiled
def _sum(step, x, branch, out, thread):
    """out = x + branch: in this thread's own row (decode), or its share of them (prefill).

    All threads have read x and branch before the next step writes them.
    """
    first = 0 if x.length == 1 else thread.tid
    for t in range(first, x.length, thread.threads):
        one = floats(x.address + t * x.stride, step.width)
        other = floats(branch.address + t * branch.stride, step.width)
        target = floats(out.address + t * out.stride, step.width)
        for i in range(step.width):
            target[i] = one[i] + other[i]
    barrier(thread)


@compiled
def _keep_states(program, call, normed, thread, position):
    """Keep the final norm of each token in its sequence's ring."""
    for t in range(thread.tid, normed.length, thread.threads):
        at, table = position + t, call.caches
        if call.tables:
            table = ints(call.tables, normed.length)[t]
            at = ints(call.positions, normed.length)[t]
        cache = _caches(table, program.layer_count + 1)[program.layer_count]
        place = cache.inputs + at % cache.length * program.hidden * _F32
        copy_row(normed.address + t * normed.stride, place, program.hidden)


@compiled
def _norm_row(step, eps, x, branch, out, acts):
    """x += branch (normed first if there is a post norm) * scale; norm x to out; quantize that."""
    if branch:
        if step.post_norm:
            rms_norm(branch, step.post_norm, out, step.width, eps)
            add_rows(x, out, step.scale, step.width)
        else:
            add_rows(x, branch, step.scale, step.width)
    if step.stream_scale:
        multiply_row(x, floats(step.stream_scale, 1)[0], step.width)
    if step.norm:
        rms_norm(x, step.norm, out, step.width, eps)
        quantize_row(out, acts, step.blocks)
    else:
        quantize_row(x, acts, step.blocks)


@compiled
def _norm(eps, step, x, branch, out, acts, thread):
    """`_norm_row` for every token: in this thread's own row (decode), or its share (prefill)."""
    if x.length == 1:
        _norm_row(step, eps, x.address, branch.address, out.address, acts.address)
        return
    for t in range(thread.tid, x.length, thread.threads):
        _norm_row(
            step,
            eps,
            x.address + t * x.stride,
            branch.address + t * branch.stride,
            out.address + t * out.stride,
            acts.address + t * acts.stride,
        )
    barrier(thread)


@compiled
def _quantize(step, x, acts, thread):
    """Quantize rows for the next linears: this thread's own row (decode), or its share."""
    if x.length == 1:
        quantize_padded(x.address, step.width, acts.address, step.blocks)
        return
    for t in range(thread.tid, x.length, thread.threads):
        row = x.address + t * x.stride
        quantize_padded(row, step.width, acts.address + t * acts.stride, step.blocks)
    barrier(thread)


@compiled
def _multiply(step, rows, linears, x, acts, thread):
    """Linears of one input, as one range of tiles that the threads share."""
    tiles = 0
    for i in range(step.linears):
        tiles += linears[step.linear + i].tiles
    while True:
        first, last = next_tiles(thread, tiles)
        if first == last:
            break
        base = 0
        for i in range(step.linears):
            lin = linears[step.linear + i]
            begin, end = max(first, base), min(last, base + lin.tiles)
            if begin < end:
                out = own_rows(rows[step.out + i], thread, x.length)
                matmul(lin, x, acts, out, begin - base, end - base)
            base += lin.tiles
    barrier(thread)


@compiled
def _gated(step, linears, x, acts, gated, up, thread):
    """gate and up for the same rows by the same thread, then act(gate) * up in place of gate."""
    gate_lin, up_lin = linears[step.linear], linears[step.linear + 1]
    while True:
        first, last = next_tiles(thread, gate_lin.tiles)
        if first == last:
            break
        matmul(gate_lin, x, acts, gated, first, last)
        matmul(up_lin, x, acts, up, first, last)
        for t in range(x.length):
            at = first * TILE * _F32
            gate(
                gated.address + t * gated.stride + at,
                up.address + t * up.stride + at,
                (last - first) * TILE,
                step.activation,
            )
    barrier(thread)


@compiled
def _head(step, lin, x, acts, call, thread):
    """Logits of the last ``outputs`` tokens, scaled or capped."""
    outputs = call.outputs
    if outputs:
        skip = x.length - outputs
        last_x = Rows(x.address + skip * x.stride, x.stride, outputs)
        last_acts = Rows(acts.address + skip * acts.stride, acts.stride, outputs)
        logits = Rows(call.logits, call.logits_stride, outputs)
        while True:
            first, last = next_tiles(thread, lin.tiles)
            if first == last:
                break
            matmul(lin, last_x, last_acts, logits, first, last)
            if step.softcap or step.scale != _ONE:
                _finish_logits(step, logits, first * TILE, (last - first) * TILE)
    barrier(thread)


@compiled
def _finish_logits(step, logits, start, n):
    """Scale or cap ``n`` logits of each row, from ``start`` on."""
    for t in range(logits.length):
        at = logits.address + t * logits.stride + start * _F32
        if step.softcap:
            softcap(at, n, step.softcap)
        else:
            multiply_row(at, step.scale, n)


@compiled
def _run(program, call, thread, position, ids):
    """Run the program once, for ``call.tokens`` tokens at ``position``."""
    tokens = call.tokens
    steps = _steps(program.steps, program.step_count)
    linears = _linears(program.linears, program.linear_count)
    rows = _rows(program.rows, program.row_count)
    attentions = _attentions(program.attentions, program.layer_count)
    caches = _caches(call.caches, program.layer_count)
    stamp(program.times, thread, -1)
    for number in range(program.step_count):
        step = steps[number]
        kind = step.kind
        x = own_rows(rows[step.x], thread, tokens)
        out = own_rows(rows[step.out], thread, tokens)
        acts = own_rows(rows[step.acts], thread, tokens)
        if kind == _NORM:
            branch = Rows(0, 0, tokens)
            if step.branch >= 0:
                branch = own_rows(rows[step.branch], thread, tokens)
            _norm(program.eps, step, x, branch, out, acts, thread)
        elif kind == _LINEARS:
            _multiply(step, rows, linears, x, acts, thread)
        elif kind == _QUANTIZE:
            _quantize(step, x, acts, thread)
        elif kind == _GATED:
            up = own_rows(rows[step.out + 1], thread, tokens)
            _gated(step, linears, x, acts, out, up, thread)
        elif kind == _ATTENTION:
            k = own_rows(rows[step.x + 1], thread, tokens)
            v = own_rows(rows[step.x + 2], thread, tokens)
            layer, cache = attentions[step.layer], caches[step.layer]
            if call.tables:
                attend_batch(program, call, step.layer, layer, x, k, v, out, thread)
            elif tokens == 1:
                attend_one(program, layer, cache, x, k, v, out, thread, position)
            else:
                attend_prompt(program, layer, cache, x, k, v, out, thread, position)
        elif kind == _SHORT_CONV:
            c = own_rows(rows[step.x + 1], thread, tokens)
            factor = own_rows(rows[step.x + 2], thread, tokens)
            cache = caches[step.layer]
            if call.tables:
                convolve_batch(program, call, step, x, c, factor, out, thread)
            elif tokens == 1:
                convolve_one(step, cache, x, c, factor, out, thread, position)
            else:
                convolve_prompt(step, cache, x, c, factor, out, thread, position)
        elif kind == _DELTA_NET:
            z = own_rows(rows[step.x + 1], thread, tokens)
            beta = own_rows(rows[step.x + 2], thread, tokens)
            decay = own_rows(rows[step.x + 3], thread, tokens)
            cache = caches[step.layer]
            if call.tables:
                recur_batch(program, call, step, x, z, beta, decay, out, thread)
            else:
                recur(program, step, cache, x, z, beta, decay, out, thread, position)
        elif kind == _OUTPUT_GATE:
            gates = own_rows(rows[step.branch], thread, tokens)
            gate_output(step, x, gates, thread)
        elif kind == _EXPERTS:
            mix(step, rows, linears, x, acts, out, thread)
        elif kind == _LAYER_INPUTS:
            spare = rows[step.out]
            room = spare.address + thread.tid * spare.stride
            make_inputs(program.eps, step, linears[step.linear], x, ids, room, thread)
        elif kind == _OWN_INPUT:
            inputs = own_rows(rows[step.branch], thread, tokens)
            use_input(step, x, inputs, out, acts, thread)
        elif kind == _STATES:
            _load_states(call, step, out, thread)
        elif kind == _SUM:
            other = own_rows(rows[step.branch], thread, tokens)
            _sum(step, x, other, out, thread)
        elif kind == _EMBED:
            _embed(program.embed_scale, out, linears[step.linear], ids, thread)
        else:
            _head(step, linears[step.linear], x, acts, call, thread)
        stamp(program.times, thread, number)
    if program.keeps_states:
        normed = own_rows(rows[program.normed], thread, tokens)
        _keep_states(program, call, normed, thread, position)


def decoder(call_at, tid):
    """What each thread runs: the `abi.CALL` at an address. One entry point, compiled once.

    With ``greedy`` 0: ``tokens`` tokens ``ids`` of a sequence, logits of the last ``outputs``; with
    ``tables`` each token is the next of another sequence.
    Else: ``greedy`` tokens after ``ids[0]``, into ``chosen``, with no Python in between.
    """
    call = _calls(call_at, 1)[0]
    program = _programs(call.program, 1)[0]
    thread = Thread(tid, call.threads, program.sync)
    for number in range(max(call.greedy, 1)):
        ids = ints(call.chosen + 8 * (number - 1) if number else call.ids, call.tokens)
        _run(program, call, thread, call.position + number, ids)
        if call.greedy:
            head = _linears(program.linears, program.linear_count)[program.linear_count - 1]
            best = argmax(floats(call.logits, head.n))  # every thread finds the same
            if thread.tid == 0:
                ints(call.chosen, call.greedy)[number] = best
            barrier(thread)
            stamp(program.times, thread, program.step_count)


TYPES = {decoder: types.void(types.int64, types.int64)}
"""What a thread pool calls, by address (see `jit`)."""
