"""Gated short convolutions: c * convolution of (b * x), channel by channel.

A layer's cache is a ring of its inputs b * x in float32: position p lies at p modulo its length,
which holds the positions that a tap reaches and those of a guess that may be taken back. The taps
that lie in the same pass read b and x instead, so that the ring is written once a pass has read it.
Every output is the same sum in the same order, however many tokens a pass has.
"""

from __future__ import annotations

import numpy as np

from edgeq.runtime.kernels import abi
from edgeq.runtime.kernels.abi import Rows
from edgeq.runtime.kernels.primitives import compiled, floats, ints, records
from edgeq.runtime.kernels.row_ops import barrier

_F32 = 4

_caches = records(abi.CACHE)


@compiled
def _add_product(out, weight, b, x, n):
    """out += weight * (b * x) over n values."""
    target, w, first, second = floats(out, n), floats(weight, n), floats(b, n), floats(x, n)
    for i in range(n):
        target[i] += w[i] * (first[i] * second[i])


@compiled
def _add_kept(out, weight, kept, n):
    """out += weight * kept over n values."""
    target, w, source = floats(out, n), floats(weight, n), floats(kept, n)
    for i in range(n):
        target[i] += w[i] * source[i]


@compiled
def _output(step, cache, b, c, x, out, position, t):
    """Row t of a pass whose first token is at a position."""
    n, taps = step.width, step.tap_count
    at = out.address + t * out.stride
    target, gate = floats(at, n), floats(c.address + t * c.stride, n)
    for i in range(n):
        target[i] = np.float32(0)
    for tap in range(taps):
        back = taps - 1 - tap
        weight = step.taps + tap * n * _F32
        if back <= t:
            row = t - back
            _add_product(at, weight, b.address + row * b.stride, x.address + row * x.stride, n)
        elif back <= position + t:
            place = (position + t - back) % cache.length
            _add_kept(at, weight, cache.inputs + place * n * _F32, n)
    for i in range(n):
        target[i] *= gate[i]


@compiled
def _keep(step, cache, b, x, position, t):
    """Store the input of row t of a pass."""
    n = step.width
    place = (position + t) % cache.length
    kept = floats(cache.inputs + place * n * _F32, n)
    first, second = floats(b.address + t * b.stride, n), floats(x.address + t * x.stride, n)
    for i in range(n):
        kept[i] = first[i] * second[i]


@compiled
def convolve_one(step, cache, b, c, x, out, thread, position):
    """Decode: every thread computes the row it will read; the first one stores the input.

    No tap reads the place that is written.
    """
    _output(step, cache, b, c, x, out, position, 0)
    if thread.tid == 0:
        _keep(step, cache, b, x, position, 0)


@compiled
def convolve_batch(program, call, step, b, c, x, out, thread):
    """Decode of several sequences: each row is the next token of one with its own cache."""
    tables, positions = ints(call.tables, b.length), ints(call.positions, b.length)
    for t in range(thread.tid, b.length, thread.threads):
        cache = _caches(tables[t], program.layer_count)[step.layer]
        gate_in = Rows(b.address + t * b.stride, b.stride, 1)
        gate_out = Rows(c.address + t * c.stride, c.stride, 1)
        factor = Rows(x.address + t * x.stride, x.stride, 1)
        row = Rows(out.address + t * out.stride, out.stride, 1)
        _output(step, cache, gate_in, gate_out, factor, row, positions[t], 0)
        _keep(step, cache, gate_in, factor, positions[t], 0)
    barrier(thread)


@compiled
def convolve_prompt(step, cache, b, c, x, out, thread, position):
    """Prefill: rows are divided by token; then the inputs of the last ones are stored."""
    for t in range(thread.tid, b.length, thread.threads):
        _output(step, cache, b, c, x, out, position, t)
    barrier(thread)
    first = max(0, b.length - cache.length)
    for t in range(first + thread.tid, b.length, thread.threads):
        _keep(step, cache, b, x, position, t)
    barrier(thread)
