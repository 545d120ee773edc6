"""Transcendental functions and reductions on vectors of float32: the only implementation there is.

Each is a fixed sequence of operations that IEEE 754 defines, so its results are the same on every
processor, whatever the mathematical library.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from llvmlite import ir

from edgeq.compiler.llvm_ir import I32, V16F32, V16I32, const, declare, fma, take

Binary = Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value]


def floats(value: float) -> ir.Constant:
    """A constant in all lanes: the nearest float32."""
    # rounded here, as llvmlite writes constants with all digits of a double
    nearest = struct.unpack("f", struct.pack("f", value))[0]
    return ir.Constant(V16F32, [nearest] * 16)


def larger(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """The larger of two in each lane; the second where they cannot be compared."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def absolute(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Magnitudes of a vector of float32."""
    n = x.type.count
    return b.call(declare(b, f"llvm.fabs.v{n}f32", x.type, [x.type]), [x])


def tree(b: ir.IRBuilder, vector: ir.Value, combine: Binary) -> ir.Value:
    """Combine the lanes by halving, in a fixed order."""
    count = vector.type.count
    while count > 1:
        count //= 2
        low, high = list(range(count)), list(range(count, 2 * count))
        vector = combine(b, take(b, vector, low), take(b, vector, high))
    return b.extract_element(vector, const(0, I32))


def exp(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """e ** x on <16 x float> within 2 units in the last place; x is clamped to -87 .. 88.

    Source: Cephes expf: x = n ln 2 + r, a degree-5 polynomial on |r| <= ln 2 / 2.
    """
    x = larger(b, x, floats(-87.0))
    x = b.select(b.fcmp_ordered("<", x, floats(88.0)), x, floats(88.0))
    floor = declare(b, "llvm.floor.v16f32", V16F32, [V16F32])
    n = b.call(floor, [fma(b, x, floats(1.4426950408889634), floats(0.5))])
    r = fma(b, n, floats(-0.693359375), x)
    r = fma(b, n, floats(2.12194440e-4), r)
    p = floats(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5):
        p = fma(b, p, r, floats(c))
    y = b.fadd(fma(b, p, b.fmul(r, r), r), floats(1.0))
    power = b.shl(b.add(b.fptosi(n, V16I32), const(127, V16I32)), const(23, V16I32))
    return b.fmul(y, b.bitcast(power, V16F32))


def tanh(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """tanh(x) on <16 x float>, within 2e-7; NaN stays NaN.

    Source: Cephes tanhf: a polynomial where the magnitude is below 0.625, else
    1 - 2 / (e ** 2|x| + 1) with the sign of x.
    """
    z = b.fmul(x, x)
    p = floats(-5.70498872745e-3)
    for c in (2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1):
        p = fma(b, p, z, floats(c))
    small = fma(b, b.fmul(p, z), x, x)
    size = absolute(b, x)
    quotient = b.fdiv(floats(2.0), b.fadd(exp(b, b.fadd(size, size)), floats(1.0)))
    large = b.fsub(floats(1.0), quotient)
    large = b.select(b.fcmp_ordered("<", x, floats(0.0)), b.fsub(floats(0.0), large), large)
    result = b.select(b.fcmp_ordered("<", size, floats(0.625)), small, large)
    return b.select(b.fcmp_ordered("==", x, x), result, x)


def sigmoid(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """1 / (1 + e ** -x) on <16 x float>; NaN stays NaN."""
    e = exp(b, b.fsub(floats(0.0), x))
    result = b.fdiv(floats(1.0), b.fadd(e, floats(1.0)))
    return b.select(b.fcmp_ordered("==", x, x), result, x)


def softplus(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """log(1 + e ** x) on <16 x float>; NaN stays NaN.

    By log(1 + u) = 2 artanh(u / (2 + u)) with u = e ** -|x|, whose series ends at the 15th power.
    """
    u = exp(b, b.fsub(floats(0.0), absolute(b, x)))
    s = b.fdiv(u, b.fadd(u, floats(2.0)))
    square = b.fmul(s, s)
    total = floats(1 / 15)
    for power in range(13, 0, -2):
        total = fma(b, total, square, floats(1 / power))
    result = fma(b, b.fadd(s, s), total, larger(b, x, floats(0.0)))
    return b.select(b.fcmp_ordered("==", x, x), result, x)


def activation(b: ir.IRBuilder, x: ir.Value, is_gelu: ir.Value) -> ir.Value:
    """The gate's nonlinearity on <16 x float>: GELU by tanh where ``is_gelu`` is set, else SiLU.

    Both are x / (1 + e ** -z): with z = x, or z = 2 sqrt(2 / pi) (x + 0.044715 x ** 3), since
    0.5 (1 + tanh y) = 1 / (1 + e ** -2y).
    """
    cube = b.fmul(b.fmul(x, x), b.fmul(x, floats(0.044715)))
    z = b.select(is_gelu, b.fmul(b.fadd(x, cube), floats(1.5957691216057308)), x)
    e = exp(b, b.fsub(floats(0.0), z))
    return b.fdiv(x, b.fadd(e, floats(1.0)))
