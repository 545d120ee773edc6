"""Counting values in bins, and what rounding the counted values costs, as LLVM code."""

from __future__ import annotations

from llvmlite import ir

from edgeq.compiler.llvm_ir import F32, I64, VOID, add, const, declare, load, local, loop, store
from edgeq.compiler.vector_math import tree

_F64 = ir.DoubleType()
_LANES = 8
_VECTOR = ir.VectorType(_F64, _LANES)


def define_histogram(mod: ir.Module) -> None:
    """Add float32 values to the counts of bins of about equal width, as `numpy.histogram` does.

    Bin i holds edges[i] <= x < edges[i + 1], the last one its end too; values outside are left out.
    Arguments: values, how many, edges (float32), bins, counts (int64).
    """
    fn = ir.Function(mod, ir.FunctionType(VOID, [I64] * 5), "edgeq_histogram")
    x, n, edges, bins, counts = fn.args
    b = ir.IRBuilder(fn.append_basic_block())

    def edge(i: ir.Value) -> ir.Value:
        return load(b, add(b, edges, b.shl(i, const(2))), F32, 4)

    last = b.sub(bins, const(1))
    low, high = edge(const(0)), edge(bins)
    start = b.fpext(low, _F64)
    scale = b.fdiv(b.sitofp(bins, _F64), b.fsub(b.fpext(high, _F64), start))
    with loop(b, const(0), n, 1) as i:
        value = load(b, add(b, x, b.shl(i, const(2))), F32, 4)
        inside = b.and_(b.fcmp_ordered(">=", value, low), b.fcmp_ordered("<=", value, high))
        with b.if_then(inside):
            guess = b.fptosi(b.fmul(b.fsub(b.fpext(value, _F64), start), scale), I64)
            at = b.select(b.icmp_signed(">", guess, last), last, guess)
            # edges are rounded to float32, so that the guess may be one off
            less = b.zext(b.fcmp_ordered("<", value, edge(at)), I64)
            at = b.sub(at, less)
            beyond = b.fcmp_ordered(">=", value, edge(b.add(at, const(1))))
            more = b.zext(b.and_(beyond, b.icmp_signed("<", at, last)), I64)
            place = add(b, counts, b.shl(b.add(at, more), const(3)))
            store(b, b.add(load(b, place, I64, 8), const(1)), place, 8)
    b.ret_void()


def define_rounding_errors(mod: ir.Module) -> None:
    """Sums of counts times the integral of (u - nearest level)^2 over each bin, for some ranges.

    Integrals are in steps of a range; a bin's values are evenly spread, see
    `edgeq.quant.histogram.squared_errors`. Arguments: counts, lower and upper ends of bins (each
    float64, padded to 8), how many with the padding, ranges (float64 pairs), how many, sums
    (float64), levels.
    """
    fn = ir.Function(mod, ir.FunctionType(VOID, [I64] * 8), "edgeq_rounding_errors")
    counts, lower, upper, n, ranges, m, out, levels = fn.args
    b = ir.IRBuilder(fn.append_basic_block())
    steps = b.sitofp(levels, _F64)
    rint = declare(b, "llvm.rint.f64", _F64, [_F64])
    rints = declare(b, f"llvm.rint.v{_LANES}f64", _VECTOR, [_VECTOR])

    def all_lanes(value: ir.Value) -> ir.Value:
        first = b.insert_element(
            ir.Constant(_VECTOR, ir.Undefined), value, const(0, ir.IntType(32))
        )
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), [0] * _LANES)
        return b.shuffle_vector(first, ir.Constant(_VECTOR, ir.Undefined), zeros)

    def number(value: float) -> ir.Value:
        return ir.Constant(_VECTOR, [value] * _LANES)

    def limited(value: ir.Value, low: ir.Value, high: ir.Value) -> ir.Value:
        value = b.select(b.fcmp_ordered("<", value, low), low, value)
        return b.select(b.fcmp_ordered(">", value, high), high, value)

    with loop(b, const(0), m, 1) as i:
        at = add(b, ranges, b.shl(i, const(4)))
        low, high = (load(b, add(b, at, 8 * k), _F64, 8) for k in (0, 1))
        size = b.fdiv(b.fsub(high, low), steps)
        first = b.call(rint, [b.fdiv(low, size)])
        step, least = all_lanes(size), all_lanes(first)
        most = all_lanes(b.fadd(first, steps))
        half = number(0.5)
        ends = b.fsub(least, half), b.fadd(most, half)

        def integral(edge: ir.Value) -> ir.Value:
            u = b.fdiv(edge, step)
            inside = limited(u, *ends)
            nearest = limited(b.call(rints, [inside]), least, most)
            rest = b.fsub(u, nearest)
            cube = b.fdiv(b.fmul(b.fmul(rest, rest), rest), number(3.0))
            return b.fadd(b.fdiv(nearest, number(12.0)), cube)

        total = local(b, number(0.0))
        with loop(b, const(0), n, _LANES) as j:
            where = b.shl(j, const(3))
            count, begin, end = (
                load(b, add(b, base, where), _VECTOR, 8) for base in (counts, lower, upper)
            )
            part = b.fmul(count, b.fsub(integral(end), integral(begin)))
            b.store(b.fadd(b.load(total), part), total)
        whole = tree(b, b.load(total), lambda b, p, q: b.fadd(p, q))
        store(b, whole, add(b, out, b.shl(i, const(3))), 8)
    b.ret_void()
