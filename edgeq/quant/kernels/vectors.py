"""Sums, softmax and the gate's nonlinearity over rows of float32, as LLVM code.

A sum keeps 16 partial results, combines them by halving, and adds what is left over one by one.
"""

from __future__ import annotations

from llvmlite import ir

from edgeq.compiler.llvm_ir import (
    F32,
    I64,
    V16F32,
    VOID,
    const,
    declare,
    load,
    local,
    loop,
    splat,
    store,
)
from edgeq.compiler.vector_math import activation, exp, floats, larger, tanh, tree

_F64 = ir.DoubleType()


def define_row_products(mod: ir.Module, name: str, wide: bool) -> None:
    """``out[r] = sum over k of a[r, k] b[r, k]``: float32, or float64 for float32 factors.

    Arguments: a, the bytes between its rows, b, the bytes between its rows, out, rows, n.
    """
    fn = ir.Function(mod, ir.FunctionType(VOID, [I64] * 7), name)
    x, x_row, y, y_row, out, rows, n = fn.args
    b = ir.IRBuilder(fn.append_basic_block())
    element = _F64 if wide else F32
    vector = ir.VectorType(element, 16)
    size, bits = (8, 64) if wide else (4, 32)
    fma_vector = declare(b, f"llvm.fma.v16f{bits}", vector, [vector] * 3)
    fma_one = declare(b, f"llvm.fma.f{bits}", element, [element] * 3)
    zero = ir.Constant(vector, [0.0] * 16)
    whole = b.and_(n, const(-16))

    def factors(i: ir.Value, row: ir.Value, ty: ir.Type, to: ir.Type) -> list[ir.Value]:
        values = []
        for base, stride in ((x, x_row), (y, y_row)):
            value = load(b, b.add(b.add(base, b.mul(row, stride)), b.shl(i, const(2))), ty, 4)
            values.append(b.fpext(value, to) if wide else value)
        return values

    with loop(b, const(0), rows, 1) as row:
        lanes = local(b, zero)
        with loop(b, const(0), whole, 16) as i:
            b.store(b.call(fma_vector, [*factors(i, row, V16F32, vector), b.load(lanes)]), lanes)
        total = local(b, tree(b, b.load(lanes), lambda b, p, q: b.fadd(p, q)))
        with loop(b, whole, n, 1) as i:
            b.store(b.call(fma_one, [*factors(i, row, F32, element), b.load(total)]), total)
        store(b, b.load(total), b.add(out, b.mul(row, const(size))), size)
    b.ret_void()


def define_column_sums(mod: ir.Module, name: str, square: bool) -> None:
    """``out[k] += sum over r of x[r, k]``, or of its square, in float64, one row after the other.

    Arguments: x, the bytes between its rows, out, rows, n.
    """
    fn = ir.Function(mod, ir.FunctionType(VOID, [I64] * 5), name)
    x, x_row, out, rows, n = fn.args
    b = ir.IRBuilder(fn.append_basic_block())
    wide = ir.VectorType(_F64, 16)
    whole = b.and_(n, const(-16))

    def add(i: ir.Value, row: ir.Value, ty: ir.Type, to: ir.Type) -> None:
        place = b.add(b.add(x, b.mul(row, x_row)), b.shl(i, const(2)))
        value = b.fpext(load(b, place, ty, 4), to)
        if square:  # exact in float64
            value = b.fmul(value, value)
        total = b.add(out, b.shl(i, const(3)))
        store(b, b.fadd(load(b, total, to, 8), value), total, 8)

    with loop(b, const(0), rows, 1) as row:
        with loop(b, const(0), whole, 16) as i:
            add(i, row, V16F32, wide)
        with loop(b, whole, n, 1) as i:
            add(i, row, F32, _F64)
    b.ret_void()


def define_softmax_rows(mod: ir.Module) -> None:
    """Softmax of rows in place; -inf becomes 0. Arguments: x, rows, n (a multiple of 16)."""
    fn = ir.Function(mod, ir.FunctionType(VOID, [I64] * 3), "edgeq_softmax_rows")
    x, rows, n = fn.args
    b = ir.IRBuilder(fn.append_basic_block())
    least = floats(-3.0e38)
    with loop(b, const(0), rows, 1) as row:
        start = b.add(x, b.mul(b.mul(row, n), const(4)))
        top = local(b, least)
        with loop(b, const(0), n, 16) as i:
            value = load(b, b.add(start, b.shl(i, const(2))), V16F32, 4)
            b.store(larger(b, value, b.load(top)), top)
        peak = splat(b, tree(b, b.load(top), larger), V16F32)
        total = local(b, floats(0.0))
        with loop(b, const(0), n, 16) as i:
            at = b.add(start, b.shl(i, const(2)))
            value = load(b, at, V16F32, 4)
            p = exp(b, b.fsub(value, peak))
            p = b.select(b.fcmp_ordered(">", value, least), p, floats(0.0))
            b.store(b.fadd(b.load(total), p), total)
            store(b, p, at, 4)
        whole = splat(b, tree(b, b.load(total), lambda b, p, q: b.fadd(p, q)), V16F32)
        with loop(b, const(0), n, 16) as i:
            at = b.add(start, b.shl(i, const(2)))
            store(b, b.fdiv(load(b, at, V16F32, 4), whole), at, 4)
    b.ret_void()


def define_activation(mod: ir.Module) -> None:
    """x = activation(x) in place. Arguments: x, n (a multiple of 16), 1 for GELU or 0 for SiLU."""
    fn = ir.Function(mod, ir.FunctionType(VOID, [I64] * 3), "edgeq_activation")
    x, n, kind = fn.args
    b = ir.IRBuilder(fn.append_basic_block())
    is_gelu = splat(b, b.icmp_signed("==", kind, const(1)), ir.VectorType(ir.IntType(1), 16))
    with loop(b, const(0), n, 16) as i:
        at = b.add(x, b.shl(i, const(2)))
        store(b, activation(b, load(b, at, V16F32, 4), is_gelu), at, 4)
    b.ret_void()


def define_tanh(mod: ir.Module) -> None:
    """x = tanh(x) in place. Arguments: x, n (a multiple of 16)."""
    fn = ir.Function(mod, ir.FunctionType(VOID, [I64] * 2), "edgeq_tanh")
    x, n = fn.args
    b = ir.IRBuilder(fn.append_basic_block())
    with loop(b, const(0), n, 16) as i:
        at = b.add(x, b.shl(i, const(2)))
        store(b, tanh(b, load(b, at, V16F32, 4)), at, 4)
    b.ret_void()


def define_cholesky(mod: ir.Module) -> None:
    """A block as ``U U^T``, U upper triangular in its upper triangle, in float64.

    Arguments: the block, bytes between its rows, n, and where to count pivots that are not positive
    (an int64).
    """
    fn = ir.Function(mod, ir.FunctionType(VOID, [I64] * 4), "edgeq_cholesky64")
    a, stride, n, failed = fn.args
    b = ir.IRBuilder(fn.append_basic_block())
    root = declare(b, "llvm.sqrt.f64", _F64, [_F64])

    def at(i: ir.Value, j: ir.Value) -> ir.Value:
        return b.add(b.add(a, b.mul(i, stride)), b.shl(j, const(3)))

    def reduced(i: ir.Value, j: ir.Value) -> ir.Value:
        """The element less the products of what is to the right in both rows."""
        total = local(b, load(b, at(i, j), _F64, 8))
        with loop(b, b.add(j, const(1)), n, 1) as k:
            left = b.fneg(load(b, at(i, k), _F64, 8))
            b.store(_fma(b, left, load(b, at(j, k), _F64, 8), b.load(total)), total)
        return b.load(total)

    with loop(b, const(0), n, 1) as done:
        j = b.sub(b.sub(n, const(1)), done)
        square = reduced(j, j)
        good = b.fcmp_ordered(">", square, ir.Constant(_F64, 0.0))
        bad = b.zext(b.not_(good), I64)
        store(b, b.add(load(b, failed, I64, 8), bad), failed, 8)
        pivot = b.call(root, [b.select(good, square, ir.Constant(_F64, 1.0))])
        store(b, pivot, at(j, j), 8)
        with loop(b, const(0), j, 1) as i:
            store(b, b.fdiv(reduced(i, j), pivot), at(i, j), 8)
    b.ret_void()


def define_upper_inverse(mod: ir.Module) -> None:
    """The inverse of an upper triangular block in float64, both without gaps between rows.

    Arguments: the block, its inverse (zeros below the diagonal), n.
    """
    fn = ir.Function(mod, ir.FunctionType(VOID, [I64] * 3), "edgeq_upper_inverse64")
    u, x, n = fn.args
    b = ir.IRBuilder(fn.append_basic_block())

    def at(base: ir.Value, i: ir.Value, j: ir.Value) -> ir.Value:
        return b.add(base, b.shl(b.add(b.mul(i, n), j), const(3)))

    one = ir.Constant(_F64, 1.0)
    with loop(b, const(0), n, 1) as j:
        store(b, b.fdiv(one, load(b, at(u, j, j), _F64, 8)), at(x, j, j), 8)
        with loop(b, const(0), j, 1) as done:
            i = b.sub(b.sub(j, const(1)), done)
            total = local(b, ir.Constant(_F64, 0.0))
            with loop(b, b.add(i, const(1)), b.add(j, const(1)), 1) as k:
                left, right = load(b, at(u, i, k), _F64, 8), load(b, at(x, k, j), _F64, 8)
                b.store(_fma(b, left, right, b.load(total)), total)
            value = b.fneg(b.fdiv(b.load(total), load(b, at(u, i, i), _F64, 8)))
            store(b, value, at(x, i, j), 8)
    b.ret_void()


def _fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    return b.call(declare(b, "llvm.fma.f64", _F64, [_F64] * 3), [x, y, z])
