"""Emitting LLVM vector code: types, loads and stores by address, loops, shuffles.

Addresses are 64-bit integers. Nothing here lets the compiler reorder or contract floating-point
operations: a sum is in the order in which it is emitted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llvmlite import ir

I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
VOID = ir.VoidType()
V16I8, V64I8 = ir.VectorType(I8, 16), ir.VectorType(I8, 64)
V16I32, V16F32 = (ir.VectorType(t, 16) for t in (I32, F32))


def const(value: int, ty: ir.Type = I64) -> ir.Constant:
    """An integer constant, repeated if ``ty`` is a vector."""
    if isinstance(ty, ir.VectorType):
        return ir.Constant(ty, [value] * ty.count)
    return ir.Constant(ty, value)


def add(b: ir.IRBuilder, address: ir.Value, offset: int | ir.Value) -> ir.Value:
    """Address arithmetic in bytes."""
    if isinstance(offset, int):
        return address if offset == 0 else b.add(address, const(offset))
    return b.add(address, offset)


def load(b: ir.IRBuilder, address: ir.Value, ty: ir.Type, align: int = 1) -> ir.Value:
    """Load a value of any type from an integer address."""
    value = b.load(b.inttoptr(address, ty.as_pointer()))
    value.align = align
    return value


def store(b: ir.IRBuilder, value: ir.Value, address: ir.Value, align: int = 1) -> None:
    """Store a value at an integer address."""
    b.store(value, b.inttoptr(address, value.type.as_pointer())).align = align


def prefetch(b: ir.IRBuilder, address: ir.Value, level: int = 1) -> None:
    """Ask for the cache line at an address, which may be no valid one, in a level's cache."""
    pointer = I8.as_pointer()
    fn = declare(b, "llvm.prefetch.p0", VOID, [pointer, I32, I32, I32])
    b.call(fn, [b.inttoptr(address, pointer), *(const(n, I32) for n in (0, 4 - level, 1))])


def splat(b: ir.IRBuilder, value: ir.Value, ty: ir.VectorType) -> ir.Value:
    """A vector with every element equal to ``value``."""
    first = b.insert_element(ir.Constant(ty, ir.Undefined), value, const(0, I32))
    return b.shuffle_vector(
        first, ir.Constant(ty, ir.Undefined), const(0, ir.VectorType(I32, ty.count))
    )


def take(b: ir.IRBuilder, vector: ir.Value, indices: list[int]) -> ir.Value:
    """Elements of a vector by constant indices."""
    mask = ir.Constant(ir.VectorType(I32, len(indices)), indices)
    return b.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


def join(b: ir.IRBuilder, parts: list[ir.Value]) -> ir.Value:
    """Concatenate 2, 4, ... equal vectors."""
    while len(parts) > 1:
        count = parts[0].type.count * 2
        mask = ir.Constant(ir.VectorType(I32, count), list(range(count)))
        parts = [b.shuffle_vector(parts[i], parts[i + 1], mask) for i in range(0, len(parts), 2)]
    return parts[0]


@contextmanager
def loop(
    b: ir.IRBuilder, start: ir.Value, stop: ir.Value, step: int | ir.Value
) -> Iterator[ir.Value]:
    """Emit ``for i in range(start, stop, step)`` around what the caller emits; yields i."""
    before = b.block
    head, body, after = (b.append_basic_block(name) for name in ("head", "body", "after"))
    b.branch(head)
    b.position_at_end(head)
    i = b.phi(I64)
    i.add_incoming(start, before)
    b.cbranch(b.icmp_signed("<", i, stop), body, after)
    b.position_at_end(body)
    yield i
    i.add_incoming(add(b, i, step), b.block)
    b.branch(head)
    b.position_at_end(after)


def least(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """The smaller of two signed integers."""
    return b.select(b.icmp_signed("<", x, y), x, y)


def largest(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """The larger of two signed integers."""
    return b.select(b.icmp_signed(">", x, y), x, y)


def local(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """A variable with a first value: a stack slot that LLVM turns into a register."""
    with b.goto_entry_block():
        slot = b.alloca(value.type)
    b.store(value, slot)
    return slot


def pair_sums(b: ir.IRBuilder, vector: ir.Value, element: ir.Type) -> ir.Value:
    """Sums of neighbors, widened to ``element``: half as many lanes."""
    count = vector.type.count
    halves = [take(b, vector, list(range(i, count, 2))) for i in (0, 1)]
    if vector.type.element != element:
        halves = [b.sext(h, ir.VectorType(element, count // 2)) for h in halves]
    return b.add(halves[0], halves[1])


def declare(b: ir.IRBuilder, name: str, ret: ir.Type, args: list[ir.Type]) -> ir.Function:
    """An LLVM or C function by name, declared once per module."""
    known = b.module.globals.get(name)
    return known or ir.Function(b.module, ir.FunctionType(ret, args), name)


def fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """x * y + z with one rounding, on vectors of float."""
    return b.call(declare(b, f"llvm.fma.v{x.type.count}f32", x.type, [x.type] * 3), [x, y, z])
