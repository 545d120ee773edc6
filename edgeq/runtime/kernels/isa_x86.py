"""Byte dot products of x86-64: AVX-512-VNNI, AVX-VNNI, and AVX2 without either."""

from __future__ import annotations

from llvmlite import ir

from edgeq.compiler.llvm_ir import I8, I16, I32, V16I32, V64I8, const, declare, join, take
from edgeq.runtime.kernels.microkernel import Isa, products_in_16_bits, runs

_V32I8, _V16I16, _V8I32 = (ir.VectorType(t, n) for t, n in ((I8, 32), (I16, 16), (I32, 8)))
_AHEAD = 6144
"""Hardware prefetchers stop at the end of every 4 KiB page: look more than a page ahead."""
_LOW, _HIGH = list(range(32)), list(range(32, 64))


class _Ymm(Isa):
    """What the kernels on 256-bit registers have in common: the tile's rows in two halves."""

    prefetch = _AHEAD
    tokens = (1, 2)
    float_lanes = 8
    float_panel = 32

    def lookup(self, b: ir.IRBuilder, table: ir.Value, codes: ir.Value) -> ir.Value:
        """``vpshufb`` on each half; it looks up in each 16-byte lane."""
        shuffle = declare(b, "llvm.x86.avx2.pshuf.b", _V32I8, [_V32I8, _V32I8])
        twice = join(b, [table, table])
        return join(b, [b.call(shuffle, [twice, take(b, codes, half)]) for half in (_LOW, _HIGH)])


class Avx512Vnni(Isa):
    """``vpdpbusd`` on 512-bit registers: 16 rows x 4 columns each."""

    name = "avx512vnni"
    prefetch = _AHEAD
    tokens = (1, 2, 3, 4, 8)
    float_lanes = 16
    float_panel = 32
    float_tokens = (5, 3, 1)
    signed8 = False

    def bits(self, b: ir.IRBuilder, codes: ir.Value, n: int, mask: int) -> ir.Value:
        """A shift of words and a mask.

        For a shift of bytes LLVM takes ``vgf2p8affineqb``, which on AMD's processors waits for the
        same two units as ``vpdpbusd``.
        """
        words = ir.VectorType(I16, codes.type.count // 2)
        if n:
            pairs, by = b.bitcast(codes, words), const(abs(n), words)
            codes = b.bitcast(b.lshr(pairs, by) if n > 0 else b.shl(pairs, by), codes.type)
        return b.and_(codes, const(mask, codes.type))

    def lookup(self, b: ir.IRBuilder, table: ir.Value, codes: ir.Value) -> ir.Value:
        """``vpshufb`` on all codes at once."""
        shuffle = declare(b, "llvm.x86.avx512.pshuf.b.512", V64I8, [V64I8, V64I8])
        return b.call(shuffle, [join(b, [table] * 4), codes])

    def dot(
        self,
        b: ir.IRBuilder,
        start: ir.Value,
        weights: list[ir.Value],
        acts: list[ir.Value],
        bits: int,
    ) -> ir.Value:
        """One instruction per byte vector."""
        vpdpbusd = declare(b, "llvm.x86.avx512.vpdpbusd.512", V16I32, [V16I32, V64I8, V64I8])
        for w, a in zip(weights, acts, strict=True):
            start = b.call(vpdpbusd, [start, w, b.bitcast(a, V64I8)])
        return start


class AvxVnni(_Ymm):
    """``vpdpbusd`` on 256-bit registers: the tile's rows in two halves."""

    name = "avxvnni"
    signed8 = False

    def dot(
        self,
        b: ir.IRBuilder,
        start: ir.Value,
        weights: list[ir.Value],
        acts: list[ir.Value],
        bits: int,
    ) -> ir.Value:
        """Two instructions per byte vector."""
        vpdpbusd = declare(b, "llvm.x86.avx512.vpdpbusd.256", _V8I32, [_V8I32, _V32I8, _V32I8])
        parts = [take(b, start, list(range(8))), take(b, start, list(range(8, 16)))]
        for w, a in zip(weights, acts, strict=True):
            a8 = take(b, b.bitcast(a, V64I8), _LOW)
            parts = [
                b.call(vpdpbusd, [p, take(b, w, half), a8])
                for p, half in zip(parts, (_LOW, _HIGH), strict=True)
            ]
        return join(b, parts)


class Avx2(_Ymm):
    """``vpmaddubsw`` then ``vpmaddwd``; 8-bit weights by the sign trick, as 255 * 127 * 2
    would saturate 16 bits."""

    name = "avx2"
    signed8 = True

    def dot(
        self,
        b: ir.IRBuilder,
        start: ir.Value,
        weights: list[ir.Value],
        acts: list[ir.Value],
        bits: int,
    ) -> ir.Value:
        """Sums stay in 16 bits as long as they fit (over a block of 4-bit codes:
        8 * 2 * 15 * 127 < 2**15); 8-bit codes are widened at once."""
        maddubs = declare(b, "llvm.x86.avx2.pmadd.ub.sw", _V16I16, [_V32I8, _V32I8])
        maddwd = declare(b, "llvm.x86.avx2.pmadd.wd", _V8I32, [_V16I16, _V16I16])
        sign = declare(b, "llvm.x86.avx2.psign.b", _V32I8, [_V32I8, _V32I8])
        absolute = declare(b, "llvm.abs.v32i8", _V32I8, [_V32I8, ir.IntType(1)])
        ones = const(1, _V16I16)
        together = max(1, products_in_16_bits(bits) // 2)
        out = []
        for rows, part in ((_LOW, range(8)), (_HIGH, range(8, 16))):
            total = take(b, start, list(part))
            for run in runs(list(zip(weights, acts, strict=True)), together):
                short: ir.Value | None = None
                for w, a in run:
                    w8, a8 = take(b, w, rows), take(b, b.bitcast(a, V64I8), _LOW)
                    if bits == 8:
                        a8 = b.call(sign, [a8, w8])
                        w8 = b.call(absolute, [w8, ir.Constant(ir.IntType(1), 0)])
                    product = b.call(maddubs, [w8, a8])
                    short = product if short is None else b.add(short, product)
                total = b.add(total, b.call(maddwd, [short, ones]))
            out.append(total)
        return join(b, out)
