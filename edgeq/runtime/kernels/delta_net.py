"""Gated delta nets: a short convolution, and a state for each head that follows the delta rule.

`edgeq.model.delta_rule` has the formula. A task is a key head with its value heads: it convolves
and normalizes, and goes through the tokens of the pass one after the other, so that every output is
the same sum in the same order, however many tokens a pass has and however many threads run.

A layer's cache holds the state after the last token, a ring of inputs (qkv, beta and decay) in
float32 with position p at p modulo its length, and a copy of the state from before some of these
positions. A pass that begins before the end of the state, where a guess was taken back, starts from
the copy and goes through the kept inputs up to its first token again. The copy is renewed by a pass
of several tokens, which may be a guess, and before it is older than the ring.
"""

from __future__ import annotations

import numpy as np

from edgeq.formats.packing import TILE
from edgeq.model.memory_layout import MAX_DRAFT
from edgeq.runtime.kernels import abi
from edgeq.runtime.kernels.abi import Rows
from edgeq.runtime.kernels.primitives import (
    compiled,
    delta_gates,
    delta_rule,
    floats,
    gate,
    ints,
    records,
    sigmoid_gate,
    silu,
    vector_sumsq,
)
from edgeq.runtime.kernels.row_ops import barrier, copy_row, multiply_row, next_task, rms_norm

_F32 = 4
_ONE = np.float32(1)
_NORM_EPS = np.float32(1e-6)
_NEVER = -(1 << 40)
_POSITION, _SAVED = 0, 1
"""Places in `abi.CACHE.marks`."""

_caches, _deltas = records(abi.CACHE), records(abi.DELTA)


@compiled
def _padded(n):
    return (n + TILE - 1) // TILE * TILE


@compiled
def _convolve(delta, cache, qkv, position, t, first, n, out):
    """``n`` channels from the first of row ``t``, convolved and activated.

    Rows before 0 are those of the positions before the pass.
    """
    target = floats(out, n)
    for i in range(n):
        target[i] = np.float32(0)
    for tap in range(delta.tap_count):
        row = t - (delta.tap_count - 1 - tap)
        if row >= 0:
            at = qkv.address + row * qkv.stride
        elif position + row >= 0:
            at = cache.inputs + (position + row) % cache.length * delta.width * _F32
        else:
            continue
        source = floats(at + first * _F32, n)
        weight = floats(delta.taps + (tap * delta.channels + first) * _F32, n)
        for i in range(n):
            target[i] += weight[i] * source[i]
    silu(out, _padded(n))


@compiled
def _normalize(x, n, factor):
    """x = x / sqrt(sum of its squares + epsilon) * factor."""
    multiply_row(x, _ONE / np.sqrt(vector_sumsq(x, n) + _NORM_EPS) * factor, n)


@compiled
def _gates_of(delta, cache, beta, decay, position, t, head, out):
    """Strengths and decays of the value heads of a key head at row ``t``, one after the other."""
    group = delta.value_heads // delta.key_heads
    if t >= 0:
        b, a = beta.address + t * beta.stride, decay.address + t * decay.stride
    else:
        b = cache.inputs + (position + t) % cache.length * delta.width * _F32
        b += delta.channels * _F32
        a = b + delta.value_heads * _F32
    for start in range(0, group, TILE):
        n = min(TILE, group - start)
        first = (head * group + start) * _F32
        room = out + 2 * start * _F32
        copy_row(b + first, room, n)
        copy_row(a + first, room + TILE * _F32, n)
        delta_gates(room, room + TILE * _F32, delta.dt_bias + first, delta.rate + first)


@compiled
def _keep(delta, cache, qkv, beta, decay, position, head, t):
    """Store the inputs of a task at row ``t`` in the ring."""
    group, keys = delta.value_heads // delta.key_heads, delta.key_dim
    at = cache.inputs + (position + t) % cache.length * delta.width * _F32
    row = qkv.address + t * qkv.stride
    values = group * delta.value_dim
    for first, n in (
        (head * keys, keys),
        ((delta.key_heads + head) * keys, keys),
        (2 * delta.key_heads * keys + head * values, values),
    ):
        copy_row(row + first * _F32, at + first * _F32, n)
    first = head * group * _F32
    at += delta.channels * _F32
    copy_row(beta.address + t * beta.stride + first, at + first, group)
    at += delta.value_heads * _F32
    copy_row(decay.address + t * decay.stride + first, at + first, group)


@compiled
def _save_row(marks, position, tokens):
    """The row before which the state is copied, or `_NEVER`."""
    if tokens > 1:
        return max(0, tokens - 1 - MAX_DRAFT)
    saved = marks[_SAVED]
    if saved < 0 or saved > position or position - saved > MAX_DRAFT:
        return 0
    return _NEVER


@compiled
def _task(program, delta, cache, head, qkv, z, beta, decay, out, work, position):
    """One key head and its value heads, for all tokens of a pass."""
    marks = ints(cache.marks, 2)
    keys, values = delta.key_dim, delta.value_dim
    rows, columns = _padded(keys), _padded(values)
    size = keys * columns
    group = delta.value_heads // delta.key_heads
    query, key = work, work + rows * _F32
    value = key + rows * _F32
    read = value + columns * _F32
    gates = read + columns * _F32
    state = cache.state + head * group * size * _F32
    saved = cache.saved + head * group * size * _F32
    begin, save = 0, _save_row(marks, position, qkv.length)
    if position == 0:
        whole = floats(state, group * size)
        for i in range(group * size):
            whole[i] = np.float32(0)
    elif marks[_POSITION] != position:
        copy_row(saved, state, group * size)
        begin = marks[_SAVED] - position
    scale = _ONE / np.sqrt(np.float32(keys))
    for t in range(begin, qkv.length):
        _convolve(delta, cache, qkv, position, t, head * keys, keys, query)
        _convolve(delta, cache, qkv, position, t, (delta.key_heads + head) * keys, keys, key)
        _normalize(query, keys, scale)
        _normalize(key, keys, _ONE)
        _gates_of(delta, cache, beta, decay, position, t, head, gates)
        if t == save:
            copy_row(state, saved, group * size)
        for g in range(group):
            number = head * group + g
            first = 2 * delta.key_heads * keys + number * values
            _convolve(delta, cache, qkv, position, t, first, values, value)
            at = gates + (g // TILE * 2 * TILE + g % TILE) * _F32
            delta_rule(state + g * size * _F32, key, query, value, read, at, keys, columns)
            if t >= 0:
                rms_norm(read, delta.norm, read, values, program.eps)
                copy_row(z.address + t * z.stride + number * values * _F32, value, values)
                gate(value, read, columns, 0)
                place = g * delta.key_heads + head if delta.tiled_out else number
                copy_row(value, out.address + t * out.stride + place * values * _F32, values)
    for t in range(max(0, qkv.length - cache.length), qkv.length):
        _keep(delta, cache, qkv, beta, decay, position, head, t)


@compiled
def _mark(cache, position, tokens):
    """Note what the cache holds after a pass."""
    marks = ints(cache.marks, 2)
    save = _save_row(marks, position, tokens)
    if save >= 0:
        marks[_SAVED] = position + save
    marks[_POSITION] = position + tokens


@compiled
def recur(program, step, cache, qkv, z, beta, decay, out, thread, position):
    """The tokens of one sequence: key heads are shared out."""
    delta = _deltas(step.delta, 1)[0]
    work = program.work + thread.tid * program.work_stride + program.work_delta
    while True:
        head = next_task(thread)
        if head >= delta.key_heads:
            break
        _task(program, delta, cache, head, qkv, z, beta, decay, out, work, position)
    barrier(thread)
    if thread.tid == 0:
        _mark(cache, position, qkv.length)


@compiled
def recur_batch(program, call, step, qkv, z, beta, decay, out, thread):
    """Decode of several sequences: each row is the next token of one with its own cache."""
    delta = _deltas(step.delta, 1)[0]
    tables, positions = ints(call.tables, qkv.length), ints(call.positions, qkv.length)
    work = program.work + thread.tid * program.work_stride + program.work_delta
    while True:
        task = next_task(thread)
        if task >= delta.key_heads * qkv.length:
            break
        t, head = task // delta.key_heads, task % delta.key_heads
        cache = _caches(tables[t], program.layer_count)[step.layer]
        # fmt: off
        _task(program, delta, cache, head, _row(qkv, t), _row(z, t), _row(beta, t),
              _row(decay, t), _row(out, t), work, positions[t])
        # fmt: on
    barrier(thread)
    if thread.tid == 0:
        for t in range(qkv.length):
            _mark(_caches(tables[t], program.layer_count)[step.layer], positions[t], 1)


@compiled
def _row(rows, t):
    return Rows(rows.address + t * rows.stride, rows.stride, 1)


@compiled
def gate_output(step, x, gates, thread):
    """x *= sigmoid(gates): in this thread's own row (decode), or its share of them (prefill)."""
    if x.length == 1:
        sigmoid_gate(x.address, gates.address, step.width)
        return
    for t in range(thread.tid, x.length, thread.threads):
        sigmoid_gate(x.address + t * x.stride, gates.address + t * gates.stride, step.width)
    barrier(thread)
