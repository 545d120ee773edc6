"""Rounding the columns of a block one after the other, as LLVM code: 16 rows of a matrix a vector.

Arrays are columns first, rows of the matrix along the last axis. See
`edgeq.quant.rounders.gptq_block` for what is computed; sums over columns are fused multiply-adds in
ascending order, so that no result depends on how many rows are worked on side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from llvmlite import ir

from edgeq.compiler.llvm_ir import (
    F32,
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
)
from edgeq.compiler.vector_math import floats, larger
from edgeq.quant.kernels.shapes import COST, FIT, ROUND

_VECTOR = 64
"""Bytes of 16 float32."""
Args = Mapping[str, ir.Value]
Body = Callable[[ir.IRBuilder, Args, ir.Value, int], None]


def define_round(mod: ir.Module, grid: str, width: int) -> None:
    """Levels of the cheapest of some scales, and what they cost (`shapes.ROUND`)."""
    _define(mod, f"edgeq_round_{grid}", ROUND, width, partial(_round, grid=grid))


def define_cost(mod: ir.Module, width: int) -> None:
    """What given levels cost (`shapes.COST`)."""
    _define(mod, "edgeq_cost", COST, width, _cost)


def define_fit(mod: ir.Module, width: int) -> None:
    """Products of levels with targets and with themselves, as errors count (`shapes.FIT`)."""
    _define(mod, "edgeq_fit", FIT, max(1, width // 2), _fit)


def _define(mod: ir.Module, name: str, names: tuple[str, ...], width: int, body: Body) -> None:
    """A function over rows ``first:last``, multiples of 16: so many vectors at once, then one."""
    fn = ir.Function(mod, ir.FunctionType(VOID, [I64] * len(names)), name)
    b = ir.IRBuilder(fn.append_basic_block())
    args = dict(zip(names, fn.args, strict=True))
    first, last = args["first"], args["last"]
    step = 16 * width
    whole = b.add(first, b.mul(b.sdiv(b.sub(last, first), const(step)), const(step)))
    with loop(b, first, whole, step) as row:
        body(b, args, b.shl(row, const(2)), width)
    with loop(b, whole, last, 16) as row:
        body(b, args, b.shl(row, const(2)), 1)
    b.ret_void()


def _round(b: ir.IRBuilder, args: Args, row: ir.Value, width: int, grid: str) -> None:
    columns, units = args["columns"], range(width)
    errors = args["scratch"]
    tried = b.add(errors, b.mul(columns, const(_VECTOR * width)))
    low, high = (splat(b, load(b, add(b, args["limits"], 4 * i), F32, 4), V16F32) for i in (0, 1))
    best = [local(b, floats(3.0e38)) for _ in units]
    winner = [local(b, const(0, V16I32)) for _ in units]
    double = floats(2.0 if grid == "palette" else 1.0)
    with loop(b, const(0), args["trials"], 1) as trial:
        scales = b.add(b.add(args["scales"], b.mul(trial, args["scales_trial"])), row)
        zeros = b.add(b.add(args["zeros"], b.mul(trial, args["scales_trial"])), row)
        cost = [local(b, floats(0.0)) for _ in units]
        with loop(b, const(0), columns, 1) as k:
            values = _mixed(b, args, k, errors, width)
            at = b.add(b.add(args["target"], b.mul(k, args["target_row"])), row)
            shift = b.mul(k, args["scales_column"])
            pivot = splat(b, load(b, _word(b, args["pivots"], k), F32, 4), V16F32)
            place = b.mul(k, const(_VECTOR * width))
            for u in units:
                target = load(b, add(b, at, _VECTOR * u), V16F32, 4)
                value = b.fadd(values[u], target)
                scale = load(b, b.add(add(b, scales, _VECTOR * u), shift), V16F32, 4)
                steps = b.fmul(value, b.fdiv(double, scale))
                if grid == "palette":
                    level = _from_table(b, args["table"], steps)
                else:
                    rint = declare(b, "llvm.rint.v16f32", V16F32, [V16F32])
                    level, zero = b.call(rint, [steps]), None
                    if grid == "zeros":
                        zero = load(b, b.add(add(b, zeros, _VECTOR * u), shift), V16F32, 4)
                        level = b.fadd(level, zero)
                    level = _between(b, level, low, high)
                    if zero is not None:
                        level = b.fsub(level, zero)
                rounded = b.fmul(level, scale)
                store(b, b.fsub(target, rounded), add(b, b.add(errors, place), _VECTOR * u), 4)
                store(b, level, add(b, b.add(tried, place), _VECTOR * u), 4)
                missed = b.fsub(value, rounded)
                b.store(fma(b, b.fmul(missed, missed), pivot, b.load(cost[u])), cost[u])
        wins = [b.fcmp_ordered("<", b.load(cost[u]), b.load(best[u])) for u in units]
        number = splat(b, b.trunc(trial, I32), V16I32)
        for u in units:
            b.store(b.select(wins[u], b.load(cost[u]), b.load(best[u])), best[u])
            b.store(b.select(wins[u], number, b.load(winner[u])), winner[u])
        with loop(b, const(0), columns, 1) as k:
            place = b.add(tried, b.mul(k, const(_VECTOR * width)))
            to = b.add(b.add(args["levels"], b.mul(k, args["levels_row"])), row)
            for u in units:
                new = load(b, add(b, place, _VECTOR * u), V16F32, 4)
                before = load(b, add(b, to, _VECTOR * u), V16F32, 4)
                store(b, b.select(wins[u], new, before), add(b, to, _VECTOR * u), 4)
    for u in units:
        store(b, b.load(best[u]), add(b, b.add(args["cost"], row), _VECTOR * u), 4)
        store(b, b.load(winner[u]), add(b, b.add(args["winner"], row), _VECTOR * u), 4)


def _cost(b: ir.IRBuilder, args: Args, row: ir.Value, width: int) -> None:
    errors, units = args["scratch"], range(width)
    cost = [local(b, floats(0.0)) for _ in units]
    with loop(b, const(0), args["columns"], 1) as k:
        values = _mixed(b, args, k, errors, width)
        target = b.add(b.add(args["target"], b.mul(k, args["target_row"])), row)
        levels = b.add(b.add(args["levels"], b.mul(k, args["levels_row"])), row)
        scales = b.add(b.add(args["scales"], b.mul(k, args["scales_column"])), row)
        pivot = splat(b, load(b, _word(b, args["pivots"], k), F32, 4), V16F32)
        place = b.add(errors, b.mul(k, const(_VECTOR * width)))
        for u in units:
            wanted, level, scale = (
                load(b, add(b, at, _VECTOR * u), V16F32, 4) for at in (target, levels, scales)
            )
            error = b.fsub(wanted, b.fmul(level, scale))
            store(b, error, add(b, place, _VECTOR * u), 4)
            missed = b.fadd(values[u], error)
            b.store(fma(b, b.fmul(missed, missed), pivot, b.load(cost[u])), cost[u])
    for u in units:
        store(b, b.load(cost[u]), add(b, b.add(args["cost"], row), _VECTOR * u), 4)


def _fit(b: ir.IRBuilder, args: Args, row: ir.Value, width: int) -> None:
    units = range(width)
    along, square = ([local(b, floats(0.0)) for _ in units] for _ in range(2))
    with loop(b, const(0), args["columns"], 1) as k:
        mixed = [[local(b, floats(0.0)) for _ in units] for _ in range(2)]
        weights = b.add(args["mix"], b.mul(b.mul(k, args["columns"]), const(4)))
        with loop(b, const(0), b.add(k, const(1)), 1) as j:
            factor = splat(b, load(b, _word(b, weights, j), F32, 4), V16F32)
            for sums, name in zip(mixed, ("levels", "target"), strict=True):
                at = b.add(b.add(args[name], b.mul(j, args[f"{name}_row"])), row)
                for u in units:
                    value = load(b, add(b, at, _VECTOR * u), V16F32, 4)
                    b.store(fma(b, factor, value, b.load(sums[u])), sums[u])
        pivot = splat(b, load(b, _word(b, args["pivots"], k), F32, 4), V16F32)
        for u in units:
            level, target = b.load(mixed[0][u]), b.load(mixed[1][u])
            weighted = b.fmul(pivot, level)
            b.store(fma(b, weighted, target, b.load(along[u])), along[u])
            b.store(fma(b, weighted, level, b.load(square[u])), square[u])
    for u in units:
        store(b, b.load(along[u]), add(b, b.add(args["along"], row), _VECTOR * u), 4)
        store(b, b.load(square[u]), add(b, b.add(args["square"], row), _VECTOR * u), 4)


def _mixed(
    b: ir.IRBuilder, args: Args, k: ir.Value, errors: ir.Value, width: int
) -> list[ir.Value]:
    """What the errors of the columns before k come to in column k."""
    sums = [local(b, floats(0.0)) for _ in range(width)]
    weights = b.add(args["mix"], b.mul(b.mul(k, args["columns"]), const(4)))
    with loop(b, const(0), k, 1) as j:
        factor = splat(b, load(b, _word(b, weights, j), F32, 4), V16F32)
        at = b.add(errors, b.mul(j, const(_VECTOR * width)))
        for u, slot in enumerate(sums):
            error = load(b, add(b, at, _VECTOR * u), V16F32, 4)
            b.store(fma(b, factor, error, b.load(slot)), slot)
    return [b.load(slot) for slot in sums]


def _word(b: ir.IRBuilder, base: ir.Value, index: ir.Value) -> ir.Value:
    return b.add(base, b.shl(index, const(2)))


def _between(b: ir.IRBuilder, value: ir.Value, low: ir.Value, high: ir.Value) -> ir.Value:
    value = larger(b, value, low)
    return b.select(b.fcmp_ordered("<", value, high), value, high)


def _from_table(b: ir.IRBuilder, table: ir.Value, steps: ir.Value) -> ir.Value:
    """The number of a table of 508 for the half step that each value lies in."""
    floor = declare(b, "llvm.floor.v16f32", V16F32, [V16F32])
    half = b.fadd(b.call(floor, [steps]), floats(254.0))
    half = _between(b, half, floats(0.0), floats(507.0))
    places = b.sext(b.fptosi(half, V16I32), ir.VectorType(I64, 16))
    pointers = b.inttoptr(
        b.add(splat(b, table, ir.VectorType(I64, 16)), b.shl(places, const(2, places.type))),
        ir.VectorType(F32.as_pointer(), 16),
    )
    bits = ir.VectorType(ir.IntType(1), 16)
    gather = declare(
        b, "llvm.masked.gather.v16f32.v16p0", V16F32, [pointers.type, I32, bits, V16F32]
    )
    return b.call(gather, [pointers, const(4, I32), ir.Constant(bits, [1] * 16), floats(0.0)])
