"""A mixture of experts: each token goes through the few experts with the highest scores.

    route      the experts of each token and their weights, from the router's logits
    plan       rows of tokens grouped by expert: a row for each token and expert it goes through
    gather     the tokens' inputs, copied into these rows
    gate, up   for each expert that has rows, shared by tiles; then the activation
    quantize   the rows between
    down       for each expert that has rows
    sum        each token's rows times their weights, the lowest expert first

While one token is decoded its rows are its experts, nothing is gathered, and the thread that has
computed a range of columns of all of them adds them up. Weights of no other expert are read. Every
output is the same sum in the same order, however many tokens a pass has.

The plan is memory that all threads share: int64 of the rows' experts by token, the places of these
rows, the token of each row, the first row of each expert, and the experts that have rows; then the
float32 weights by token.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from edgeq.formats.packing import TILE
from edgeq.model.formulas import SIGMOID_SUM_EPS
from edgeq.runtime.kernels import abi
from edgeq.runtime.kernels.abi import Rows
from edgeq.runtime.kernels.matmul import matmul
from edgeq.runtime.kernels.primitives import compiled, floats, gate, ints, quantize_row, records
from edgeq.runtime.kernels.row_ops import barrier, copy_row, next_tiles

_F32, _I64 = 4, 8
_ZERO, _ONE = np.float32(0), np.float32(1)
_LEAST = np.float32(-np.inf)
_SUM_EPS = SIGMOID_SUM_EPS
_MATRICES = 3
"""Matrices of an expert: gate, up and down, one after the other in the program's linears."""

_experts = records(abi.EXPERTS)


class RowPlan(NamedTuple):
    """Addresses of the parts of the plan."""

    chosen: int
    places: int
    tokens: int
    firsts: int
    active: int
    weights: int


@compiled
def _plan(spec):
    """Where the parts of the plan lie."""
    rows = spec.room * _I64
    chosen = spec.plan
    places = chosen + rows
    tokens = places + rows
    firsts = tokens + rows
    active = firsts + (spec.count + 1) * _I64
    weights = active + (spec.count + 1) * _I64
    return RowPlan(chosen, places, tokens, firsts, active, weights)


@compiled
def _route(spec, logits, chosen, weights):
    """The experts of a token in ascending order, and their weights; changes the logits."""
    n, k = spec.count, spec.chosen
    scores, picked, shares = floats(logits, n), ints(chosen, k), floats(weights, k)
    largest, total = _LEAST, _ZERO
    for e in range(n):
        if scores[e] > largest:
            largest = scores[e]
    if spec.sigmoid:
        for e in range(n):
            scores[e] = _ONE / (_ONE + np.exp(-scores[e]))
    elif not spec.normalize:
        for e in range(n):
            total += np.exp(scores[e] - largest)
    for j in range(k):
        best, most = -1, _LEAST
        for e in range(n):
            score = scores[e]
            if spec.bias:
                score += floats(spec.bias, n)[e]
            taken = False
            for before in range(j):
                taken = taken or picked[before] == e
            if not taken and (best < 0 or score > most):
                best, most = e, score
        picked[j] = best
    for j in range(1, k):  # in ascending order
        expert, at = picked[j], j
        while at > 0 and picked[at - 1] > expert:
            picked[at] = picked[at - 1]
            at -= 1
        picked[at] = expert
    for j in range(k):
        score = scores[picked[j]]
        shares[j] = score if spec.sigmoid else np.exp(score - largest)
    if spec.normalize:
        total = _ZERO
        for j in range(k):
            total += shares[j]
        if spec.sigmoid:
            total += _SUM_EPS
    elif spec.sigmoid:
        total = _ONE
    for j in range(k):
        shares[j] = shares[j] / total * spec.scale


@compiled
def _group(spec, plan, tokens):
    """Place the rows of all tokens expert by expert, those of an expert in the tokens' order."""
    k, rows = spec.chosen, tokens * spec.chosen
    chosen, places = ints(plan.chosen, rows), ints(plan.places, rows)
    of_rows, firsts = ints(plan.tokens, rows), ints(plan.firsts, spec.count + 1)
    active = ints(plan.active, spec.count + 1)
    for e in range(spec.count + 1):
        firsts[e] = 0
    for row in range(rows):
        firsts[chosen[row] + 1] += 1
    some = 0
    for e in range(spec.count):
        if firsts[e + 1]:
            active[some] = e
            some += 1
        firsts[e + 1] += firsts[e]
    active[spec.count] = some
    for row in range(rows):
        place = firsts[chosen[row]]
        firsts[chosen[row]] += 1
        places[row], of_rows[place] = place, row // k
    for e in range(spec.count, 0, -1):
        firsts[e] = firsts[e - 1]
    firsts[0] = 0


@compiled
def _part(rows, first, last):
    """Rows ``first:last`` of a buffer."""
    return Rows(rows.address + first * rows.stride, rows.stride, last - first)


@compiled
def _gather(spec, plan, x, acts, inputs, codes, rows, thread):
    """The inputs of every row: floats, quantized values, or both."""
    of_rows = ints(plan.tokens, rows)
    for row in range(thread.tid, rows, thread.threads):
        token = of_rows[row]
        if spec.floats:
            copy_row(x.address + token * x.stride, inputs.address + row * inputs.stride, spec.width)
        if spec.quantized:
            # quantized rows are copied as floats, bit by bit
            source, target = acts.address + token * acts.stride, codes.address + row * codes.stride
            words, copies = ints(source, spec.words), ints(target, spec.words)
            for i in range(spec.words):
                copies[i] = words[i]


@compiled
def _act(spec, step, linears, plan, x, acts, gated, up, one, thread):
    """activation(gate) * up of every row."""
    firsts, active = ints(plan.firsts, spec.count + 1), ints(plan.active, spec.count + 1)
    tiles = linears[step.linear].tiles
    while True:
        first, last = next_tiles(thread, active[spec.count] * tiles)
        if first == last:
            break
        while first < last:
            number = first // tiles
            begin = first - number * tiles
            end = min(tiles, begin + last - first)
            expert = active[number]
            low, high = firsts[expert], firsts[expert + 1]
            gates, ups = _part(gated, low, high), _part(up, low, high)
            inputs, codes = x, acts
            if not one:
                inputs, codes = _part(x, low, high), _part(acts, low, high)
            at = step.linear + _MATRICES * expert
            matmul(linears[at], inputs, codes, gates, begin, end)
            matmul(linears[at + 1], inputs, codes, ups, begin, end)
            for row in range(high - low):
                gate(
                    gates.address + row * gates.stride + begin * TILE * _F32,
                    ups.address + row * ups.stride + begin * TILE * _F32,
                    (end - begin) * TILE,
                    step.activation,
                )
            first += end - begin
    barrier(thread)


@compiled
def _down(spec, step, linears, plan, acts, codes, outputs, thread):
    """The down projection of every row."""
    firsts, active = ints(plan.firsts, spec.count + 1), ints(plan.active, spec.count + 1)
    tiles = linears[step.linear + 2].tiles
    while True:
        first, last = next_tiles(thread, active[spec.count] * tiles)
        if first == last:
            break
        while first < last:
            number = first // tiles
            begin = first - number * tiles
            end = min(tiles, begin + last - first)
            expert = active[number]
            low, high = firsts[expert], firsts[expert + 1]
            lin = linears[step.linear + _MATRICES * expert + 2]
            matmul(
                lin,
                _part(acts, low, high),
                _part(codes, low, high),
                _part(outputs, low, high),
                begin,
                end,
            )
            first += end - begin
    barrier(thread)


@compiled
def _sum(spec, plan, outputs, out, token, first, n):
    """``n`` columns of a token's output, from column ``first`` on."""
    k = spec.chosen
    places = ints(plan.places + token * k * _I64, k)
    weights = floats(plan.weights + token * k * _F32, k)
    target = floats(out.address + token * out.stride + first * _F32, n)
    for i in range(n):
        target[i] = _ZERO
    for j in range(k):
        source = floats(outputs.address + places[j] * outputs.stride + first * _F32, n)
        weight = weights[j]
        for i in range(n):
            target[i] += weight * source[i]


@compiled
def _down_one(spec, step, linears, plan, acts, codes, outputs, out, thread):
    """The down projections of one token, added up by the thread that has computed them."""
    active = ints(plan.active, spec.count + 1)
    tiles = linears[step.linear + 2].tiles
    while True:
        first, last = next_tiles(thread, tiles)
        if first == last:
            break
        for row in range(spec.chosen):  # the rows of one token are its experts
            lin = linears[step.linear + _MATRICES * active[row] + 2]
            matmul(
                lin,
                _part(acts, row, row + 1),
                _part(codes, row, row + 1),
                _part(outputs, row, row + 1),
                first,
                last,
            )
        _sum(spec, plan, outputs, out, 0, first * TILE, (last - first) * TILE)
    barrier(thread)


@compiled
def mix(step, rows, linears, x, acts, out, thread):
    """Run the experts of every row of x; the router's logits are in the rows before theirs."""
    spec = _experts(step.experts, 1)[0]
    tokens, count = x.length, x.length * spec.chosen
    plan = _plan(spec)
    at = spec.rows
    router = rows[at]
    inputs = Rows(rows[at + 1].address, rows[at + 1].stride, count)
    codes = Rows(rows[at + 2].address, rows[at + 2].stride, count)
    gated = Rows(rows[at + 3].address, rows[at + 3].stride, count)
    up = Rows(rows[at + 4].address, rows[at + 4].stride, count)
    between = Rows(rows[at + 5].address, rows[at + 5].stride, count)
    outputs = Rows(rows[at + 6].address, rows[at + 6].stride, count)
    k = spec.chosen
    for t in range(thread.tid, tokens, thread.threads):
        logits = router.address + t * router.stride
        _route(spec, logits, plan.chosen + t * k * _I64, plan.weights + t * k * _F32)
    if tokens > 1:
        barrier(thread)
    if thread.tid == 0:
        _group(spec, plan, tokens)
    barrier(thread)
    if tokens > 1:
        _gather(spec, plan, x, acts, inputs, codes, count, thread)
        barrier(thread)
        _act(spec, step, linears, plan, inputs, codes, gated, up, False, thread)
    else:
        _act(spec, step, linears, plan, x, acts, gated, up, True, thread)
    if spec.blocks:
        for row in range(thread.tid, count, thread.threads):
            quantize_row(
                gated.address + row * gated.stride,
                between.address + row * between.stride,
                spec.blocks,
            )
        barrier(thread)
    if tokens == 1:
        _down_one(spec, step, linears, plan, gated, between, outputs, out, thread)
        return
    _down(spec, step, linears, plan, gated, between, outputs, thread)
    for t in range(thread.tid, tokens, thread.threads):
        _sum(spec, plan, outputs, out, t, 0, spec.width)
    barrier(thread)
