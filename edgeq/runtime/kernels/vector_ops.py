"""Native vector routines: quantizing rows, reductions, float rows, a streaming read.

Like the matmul kernels they are LLVM modules compiled once and called by name. Reductions keep
16 partial results and combine them in a fixed order, so that a sum does not depend on the ISA,
on how work was divided, or on what the optimizer made of the loop around it.
"""

from __future__ import annotations

from llvmlite import ir

from edgeq.compiler.llvm_ir import (
    F16,
    F32,
    I8,
    I32,
    I64,
    V16F32,
    V16I32,
    VOID,
    add,
    const,
    declare,
    fma,
    load,
    local,
    loop,
    splat,
    store,
    take,
)
from edgeq.compiler.vector_math import (
    Binary,
    absolute,
    activation,
    exp,
    floats,
    larger,
    sigmoid,
    softplus,
    tanh,
    tree,
)
from edgeq.formats.packing import TILE
from edgeq.formats.schemes import K_BLOCK
from edgeq.model.formulas import SWIGLU_ALPHA, SWIGLU_LIMIT
from edgeq.model.memory_layout import CHUNK
from edgeq.runtime.kernels.microkernel import ACT_BLOCK, Isa

_V32F32, _V32I32, _V32I8 = (ir.VectorType(t, K_BLOCK) for t in (F32, I32, I8))

SYMBOLS: dict[str, tuple[ir.Type, int]] = {
    "edgeq_quantize_row": (VOID, 3),
    "edgeq_sumsq": (F32, 2),
    "edgeq_absmax": (F32, 2),
    "edgeq_softmax": (VOID, 9),
    "edgeq_merge": (VOID, 3),
    "edgeq_gate": (VOID, 4),
    "edgeq_softcap": (VOID, 3),
    "edgeq_center_scores": (VOID, 4),
    "edgeq_center_scores_4": (VOID, 4),
    "edgeq_read": (I64, 2),
    "edgeq_silu": (VOID, 2),
    "edgeq_sigmoid_gate": (VOID, 3),
    "edgeq_delta_gates": (VOID, 4),
    "edgeq_delta_rule": (VOID, 8),
}
"""What the module defines: name -> (result, number of 64-bit integer arguments)."""


def module(isa: Isa) -> ir.Module:
    """All routines as one LLVM module (the same for every isa)."""
    mod = ir.Module("vector_ops")
    _quantize_row(mod)
    _reduction(
        mod, "edgeq_sumsq", 0.0, lambda b, s, x: fma(b, x, x, s), lambda b, x, y: b.fadd(x, y)
    )
    _reduction(mod, "edgeq_absmax", 0.0, lambda b, s, x: larger(b, s, absolute(b, x)), larger)
    _center_scores(mod, "edgeq_center_scores", 16)
    _center_scores(mod, "edgeq_center_scores_4", 4)
    _softmax(mod)
    _merge(mod)
    _gate(mod)
    _softcap(mod)
    _read(mod)
    _silu(mod)
    _sigmoid_gate(mod)
    _delta_gates(mod)
    _delta_rule(mod)
    return mod


def _define(mod: ir.Module, name: str) -> tuple[ir.Function, ir.IRBuilder]:
    ret, count = SYMBOLS[name]
    fn = ir.Function(mod, ir.FunctionType(ret, [I64] * count), name)
    return fn, ir.IRBuilder(fn.append_basic_block())


def _quantize_row(mod: ir.Module) -> None:
    """Quantize ``blocks`` * 32 floats at x to activation blocks (`ACT_BLOCK`) at out.

    scale = max|x| / 127, code = rint(x * (127 / max|x|)), ties to even; all zero where the
    largest is below 1e-30 (127 / max would overflow).
    """
    fn, b = _define(mod, "edgeq_quantize_row")
    x, out, blocks = fn.args
    zero, top_code = ir.Constant(F32, 0.0), ir.Constant(F32, 127.0)
    rint = declare(b, "llvm.rint.v32f32", _V32F32, [_V32F32])
    with loop(b, const(0), blocks, 1) as i:
        target = b.add(out, b.mul(i, const(ACT_BLOCK)))
        v = load(b, b.add(x, b.mul(i, const(4 * K_BLOCK))), _V32F32, 4)
        top = tree(b, absolute(b, v), larger)
        some = b.fcmp_ordered(">", top, ir.Constant(F32, 1e-30))
        factor = b.select(some, b.fdiv(top_code, top), zero)
        codes = b.fptosi(b.call(rint, [b.fmul(v, splat(b, factor, _V32F32))]), _V32I32)
        store(b, b.trunc(codes, _V32I8), target)
        store(b, b.select(some, b.fdiv(top, top_code), zero), add(b, target, K_BLOCK))
        halves = [take(b, codes, list(range(16 * h, 16 * h + 16))) for h in (0, 1)]
        sums = [tree(b, half, lambda b, p, q: b.add(p, q)) for half in halves]
        for j, value in enumerate((*sums, b.add(*sums))):
            store(b, b.neg(value), add(b, target, K_BLOCK + 4 + 4 * j))
    b.ret_void()


def _reduction(mod: ir.Module, name: str, start: float, step: Binary, combine: Binary) -> None:
    """Reduce ``n`` floats at x: 16 lanes, then the lanes, then the remaining values one by one."""
    fn, b = _define(mod, name)
    x, n = fn.args
    first = ir.Constant(V16F32, [start] * 16)
    lanes = local(b, first)
    whole = b.and_(n, const(-16))
    with loop(b, const(0), whole, 16) as i:
        v = load(b, b.add(x, b.shl(i, const(2))), V16F32, 4)
        b.store(step(b, b.load(lanes), v), lanes)
    total = local(b, tree(b, b.load(lanes), combine))
    with loop(b, whole, n, 1) as i:
        one = splat(b, load(b, b.add(x, b.shl(i, const(2))), F32, 4), V16F32)
        alone = b.extract_element(step(b, first, one), const(0, I32))
        b.store(combine(b, b.load(total), alone), total)
    b.ret(b.load(total))


def _halves(b: ir.IRBuilder, address: ir.Value, wide: ir.Type) -> ir.Value:
    """One float16 or a vector of them as float32."""
    short = ir.VectorType(F16, wide.count) if isinstance(wide, ir.VectorType) else F16
    return b.fpext(load(b, address, short, 2), wide)


def _center_scores(mod: ir.Module, name: str, count: int) -> None:
    """Products of a float32 query with ``count`` float16 centers stored as [n][count].

    16 floats out, one for each tile of a chunk: a center of several tiles repeats its product.
    """
    fn, b = _define(mod, name)
    centers, q, n, out = fn.args
    kind = ir.VectorType(F32, count)
    lanes = local(b, ir.Constant(kind, [0.0] * count))
    with loop(b, const(0), n, 1) as i:
        row = _halves(b, b.add(centers, b.mul(i, const(2 * count))), kind)
        x = splat(b, load(b, b.add(q, b.shl(i, const(2))), F32, 4), kind)
        b.store(fma(b, row, x, b.load(lanes)), lanes)
    tiles = CHUNK // TILE
    store(b, take(b, b.load(lanes), [tile * count // tiles for tile in range(tiles)]), out, 4)
    b.ret_void()


def _softmax(mod: ir.Module) -> None:
    """One query row's scores over a chunk of keys, in place: unnormalized probabilities.

    For key j of tile t: score = (scores[j] + rest[j] + centers[t]) * scale if first <= j < last.
    The score becomes e ** (score - max) * v_scales[j], or 0; max and the sum of e ** ... (without
    v_scales) go to head[0:2].
    Arguments: scores, rest, centers, v_scales, scale's address, first, last, tiles, head.
    """
    fn, b = _define(mod, "edgeq_softmax")
    scores, rest, centers, v_scales, scale_at, first, last, tiles, head = fn.args
    least, zero = floats(-3.0e38), floats(0.0)
    scale = splat(b, load(b, scale_at, F32, 4), V16F32)
    lane = ir.Constant(V16I32, list(range(16)))
    low, high = (splat(b, b.trunc(edge, I32), V16I32) for edge in (first, last))
    top = local(b, least)
    with loop(b, const(0), tiles, 1) as t:
        at = b.shl(t, const(6))
        center = splat(b, load(b, b.add(centers, b.shl(t, const(2))), F32, 4), V16F32)
        score = b.fadd(load(b, b.add(scores, at), V16F32, 4), load(b, b.add(rest, at), V16F32, 4))
        score = b.fmul(b.fadd(score, center), scale)
        j = b.add(splat(b, b.trunc(b.shl(t, const(4)), I32), V16I32), lane)
        seen = b.and_(b.icmp_signed(">=", j, low), b.icmp_signed("<", j, high))
        score = b.select(seen, score, least)
        store(b, score, b.add(scores, at), 4)
        b.store(larger(b, b.load(top), score), top)
    peak = tree(b, b.load(top), larger)
    shift = splat(b, peak, V16F32)
    total = local(b, zero)
    with loop(b, const(0), tiles, 1) as t:
        at = b.shl(t, const(6))
        score = load(b, b.add(scores, at), V16F32, 4)
        p = exp(b, b.fsub(score, shift))
        p = b.select(b.fcmp_ordered(">", score, floats(-1.0e38)), p, zero)
        b.store(b.fadd(b.load(total), p), total)
        store(b, b.fmul(p, load(b, b.add(v_scales, at), V16F32, 4)), b.add(scores, at), 4)
    store(b, peak, head, 4)
    store(b, tree(b, b.load(total), lambda b, x, y: b.fadd(x, y)), add(b, head, 4), 4)
    b.ret_void()


def _merge(mod: ir.Module) -> None:
    """Fold a later chunk's (max, sum, ..., output) into the running one, n floats in all.

    Both have `PART_HEAD` = 16 floats before the output, n is a multiple of 16.
    """
    fn, b = _define(mod, "edgeq_merge")
    total, part, n = fn.args
    maxima = [load(b, address, F32, 4) for address in (total, part)]
    sums = [load(b, add(b, address, 4), F32, 4) for address in (total, part)]
    zero = ir.Constant(F32, 0.0)
    # a chunk of which nothing was seen has no say in the maximum
    least = ir.Constant(F32, -3.0e38)
    maxima = [
        b.select(b.fcmp_ordered(">", s, zero), m, least) for m, s in zip(maxima, sums, strict=True)
    ]
    peak = larger(b, *maxima)
    shift = splat(b, peak, V16F32)
    weights = [
        b.select(
            splat(b, b.fcmp_ordered(">", s, zero), ir.VectorType(ir.IntType(1), 16)),
            exp(b, b.fsub(splat(b, m, V16F32), shift)),
            floats(0.0),
        )
        for m, s in zip(maxima, sums, strict=True)
    ]
    with loop(b, const(0), n, 16) as i:
        at = b.shl(i, const(2))
        x, y = (load(b, b.add(address, at), V16F32, 4) for address in (total, part))
        store(b, fma(b, y, weights[1], b.fmul(x, weights[0])), b.add(total, at), 4)
    store(b, peak, total, 4)
    b.ret_void()


def _gate(mod: ir.Module) -> None:
    """g = `edgeq.model.formulas.gated` of g and u for n floats, a multiple of 16.

    Kind 0 is SiLU of g times u, 1 is GELU by tanh times u, and 2 is the clamped SwiGLU.
    """
    fn, b = _define(mod, "edgeq_gate")
    g, u, n, kind = fn.args
    is_gelu = splat(b, b.icmp_signed("==", kind, const(1)), ir.VectorType(ir.IntType(1), 16))
    with b.if_else(b.icmp_signed("==", kind, const(2))) as (clamped, plain):
        for branch, result in ((clamped, _clamped_swiglu), (plain, _times_activation)):
            with branch, loop(b, const(0), n, 16) as i:
                at = b.shl(i, const(2))
                x, y = (load(b, b.add(address, at), V16F32, 4) for address in (g, u))
                store(b, result(b, x, y, is_gelu), b.add(g, at), 4)
    b.ret_void()


def _times_activation(b: ir.IRBuilder, x: ir.Value, y: ir.Value, is_gelu: ir.Value) -> ir.Value:
    return b.fmul(activation(b, x, is_gelu), y)


def _clamped_swiglu(b: ir.IRBuilder, x: ir.Value, y: ir.Value, is_gelu: ir.Value) -> ir.Value:
    """x * sigmoid(alpha x) * (y + 1) with x and y clamped; NaN stays NaN."""
    del is_gelu
    limit = float(SWIGLU_LIMIT)
    x, y = (b.select(b.fcmp_ordered(">", v, floats(limit)), floats(limit), v) for v in (x, y))
    y = b.select(b.fcmp_ordered("<", y, floats(-limit)), floats(-limit), y)
    glu = b.fmul(x, sigmoid(b, b.fmul(x, floats(float(SWIGLU_ALPHA)))))
    return b.fmul(glu, b.fadd(y, floats(1.0)))


def _softcap(mod: ir.Module) -> None:
    """x = tanh(x * factors[0]) * factors[1] for n floats, a multiple of 16, in place.

    Arguments: x, n, the address of the two factors.
    """
    fn, b = _define(mod, "edgeq_softcap")
    x, n, factors = fn.args
    inner, outer = (splat(b, load(b, add(b, factors, at), F32, 4), V16F32) for at in (0, 4))
    with loop(b, const(0), n, 16) as i:
        at = b.add(x, b.shl(i, const(2)))
        value = tanh(b, b.fmul(load(b, at, V16F32, 4), inner))
        store(b, b.fmul(value, outer), at, 4)
    b.ret_void()


def _silu(mod: ir.Module) -> None:
    """x = x * sigmoid(x) for n floats, a multiple of 16, in place."""
    fn, b = _define(mod, "edgeq_silu")
    x, n = fn.args
    with loop(b, const(0), n, 16) as i:
        at = b.add(x, b.shl(i, const(2)))
        value = load(b, at, V16F32, 4)
        store(b, b.fmul(value, sigmoid(b, value)), at, 4)
    b.ret_void()


def _sigmoid_gate(mod: ir.Module) -> None:
    """x = x * sigmoid(g) for n floats, a multiple of 16, in place."""
    fn, b = _define(mod, "edgeq_sigmoid_gate")
    x, g, n = fn.args
    with loop(b, const(0), n, 16) as i:
        at = b.shl(i, const(2))
        value, by = (load(b, b.add(address, at), V16F32, 4) for address in (x, g))
        store(b, b.fmul(value, sigmoid(b, by)), b.add(x, at), 4)
    b.ret_void()


def _delta_gates(mod: ir.Module) -> None:
    """Strengths and decays of 16 heads: beta = sigmoid(beta), in place, and
    decay = e ** (rate * softplus(decay + bias)), in place, with rates below zero."""
    fn, b = _define(mod, "edgeq_delta_gates")
    beta, decay, bias, rate = fn.args
    store(b, sigmoid(b, load(b, beta, V16F32, 4)), beta, 4)
    x = b.fadd(load(b, decay, V16F32, 4), load(b, bias, V16F32, 4))
    power = b.fmul(load(b, rate, V16F32, 4), softplus(b, x))
    store(b, b.select(b.fcmp_ordered("==", power, power), exp(b, power), power), decay, 4)
    b.ret_void()


def _delta_rule(mod: ir.Module) -> None:
    """The delta rule at one position of one head (`edgeq.model.delta_rule`).

    Arguments: state [keys][columns], k and q [keys], v and out [columns], the address of the
    strength, 16 floats before the decay; keys, and columns, a multiple of 16. Columns are
    independent of one another.
    """
    fn, b = _define(mod, "edgeq_delta_rule")
    state, k, q, v, out, gates, keys, columns = fn.args
    strength, decay = (splat(b, load(b, add(b, gates, at), F32, 4), V16F32) for at in (0, 4 * TILE))
    stride = b.shl(columns, const(2))
    whole = b.and_(columns, const(-4 * TILE))

    def run(first: ir.Value, count: int) -> None:
        """Columns from the first on, as ``count`` vectors."""
        places = [b.add(b.shl(first, const(2)), const(4 * TILE * j)) for j in range(count)]
        zero = ir.Constant(V16F32, [0.0] * TILE)
        recalled = [local(b, zero) for _ in places]
        with loop(b, const(0), keys, 1) as i:
            factor = splat(b, load(b, b.add(k, b.shl(i, const(2))), F32, 4), V16F32)
            row = b.add(state, b.mul(i, stride))
            for place, slot in zip(places, recalled, strict=True):
                b.store(fma(b, load(b, b.add(row, place), V16F32, 4), factor, b.load(slot)), slot)
        changes = []
        for place, slot in zip(places, recalled, strict=True):
            value = load(b, b.add(v, place), V16F32, 4)
            missing = b.fsub(value, b.fmul(b.load(slot), decay))
            changes.append(b.fmul(missing, strength))
        sums = [local(b, zero) for _ in places]
        for slot in sums:
            b.store(zero, slot)
        with loop(b, const(0), keys, 1) as i:
            at = b.shl(i, const(2))
            by_key, by_query = (splat(b, load(b, b.add(x, at), F32, 4), V16F32) for x in (k, q))
            row = b.add(state, b.mul(i, stride))
            for place, slot, change in zip(places, sums, changes, strict=True):
                old = b.fmul(load(b, b.add(row, place), V16F32, 4), decay)
                new = fma(b, by_key, change, old)
                store(b, new, b.add(row, place), 4)
                b.store(fma(b, by_query, new, b.load(slot)), slot)
        for place, slot in zip(places, sums, strict=True):
            store(b, b.load(slot), b.add(out, place), 4)

    with loop(b, const(0), whole, 4 * TILE) as first:
        run(first, 4)
    with loop(b, whole, columns, TILE) as first:
        run(first, 1)
    b.ret_void()


def _read(mod: ir.Module) -> None:
    """Read n bytes (a multiple of 512) and fold them into a digest, so that no load is dropped."""
    fn, b = _define(mod, "edgeq_read")
    x, n = fn.args
    lanes = [local(b, ir.Constant(V16I32, [0] * 16)) for _ in range(8)]
    with loop(b, const(0), n, 512) as i:
        for q, lane in enumerate(lanes):
            v = load(b, b.add(x, b.add(i, const(64 * q))), V16I32, 64)
            b.store(b.xor(b.load(lane), v), lane)
    digest = b.load(lanes[0])
    for lane in lanes[1:]:
        digest = b.xor(digest, b.load(lane))
    b.ret(b.zext(tree(b, digest, lambda b, p, q: b.xor(p, q)), I64))
