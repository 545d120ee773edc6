"""Byte dot products of AArch64: ``sdot`` where the core has it, ``smlal`` where it has not.

Both work on 16-byte registers of 4 rows x 4 columns, and leave the repetition of four activations
or of a scale over a register to instructions that take one lane of another register.
"""

from __future__ import annotations

from llvmlite import ir

from edgeq.compiler.llvm_ir import F32, I8, I16, I32, add, const, declare, join, load, take
from edgeq.formats.schemes import K_BLOCK
from edgeq.runtime.kernels.microkernel import Isa

_V8I8, _V16I8 = (ir.VectorType(I8, n) for n in (8, 16))
_V4F32 = ir.VectorType(F32, 4)
_V8I16, _V4I32 = ir.VectorType(I16, 8), ir.VectorType(I32, 4)


class _Neon128(Isa):
    """What the two have in common: activations and scales by lane."""

    signed8 = True
    float_tokens = (5, 3, 1)

    def rows(self, tokens: int) -> int:
        """Unpacked weights of 4 rows take 8 registers, which leaves 16 for tokens' totals."""
        return {1: 16, 2: 8}.get(tokens, 4)

    def after(self, b: ir.IRBuilder, address: ir.Value, total: ir.Value) -> ir.Value:
        """Finish one token before reading the next: the compiler would interleave several, which
        takes more registers than there are. (The processor still interleaves them.)"""
        kind = ir.FunctionType(address.type, [address.type, _V4F32])
        last = _split(b, total, 4)[-1]
        return b.asm(kind, "", "=r,0,w,~{memory}", [address, last], side_effect=True)

    def factor(self, b: ir.IRBuilder, value: int, ty: ir.Type) -> ir.Value:
        """A constant that the optimizer cannot turn into a shift: ``mul`` takes the other factor by
        lane, a shift would need it repeated over a register first."""
        register = _opaque(b, const(value, ir.VectorType(ty.element, 4)))
        return take(b, register, [0, 1, 2, 3] * (ty.count // 4))

    def activations(self, b: ir.IRBuilder, address: ir.Value) -> list[ir.Value]:
        """Lane j of two 16-byte loads, repeated over a register."""
        halves = [load(b, add(b, address, 16 * h), _V4I32) for h in range(2)]
        return [take(b, halves[j // 4], [j % 4] * 4) for j in range(8)]

    def lookup(self, b: ir.IRBuilder, table: ir.Value, codes: ir.Value) -> ir.Value:
        """``tbl`` on each register."""
        tbl = declare(b, "llvm.aarch64.neon.tbl1.v16i8", _V16I8, [_V16I8, _V16I8])
        return join(b, [b.call(tbl, [table, part]) for part in _split(b, codes, 16)])

    def repeated(self, b: ir.IRBuilder, address: ir.Value, field: int, ty: ir.Type) -> ir.Value:
        """A lane of the 16-byte tail, which is loaded whole and once."""
        tail = load(b, add(b, address, K_BLOCK), ir.VectorType(ty.element, 4))
        return take(b, tail, [field] * ty.count)


class Dotprod(_Neon128):
    """``sdot`` by lane: 16 products per instruction."""

    name = "dotprod"
    tokens = (1, 2, 8, 16)
    target_features = "+neon,+fp-armv8,+dotprod"

    def dot(
        self,
        b: ir.IRBuilder,
        start: ir.Value,
        weights: list[ir.Value],
        acts: list[ir.Value],
        bits: int,
    ) -> ir.Value:
        """One instruction per byte vector and four rows."""
        sdot = declare(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", _V4I32, [_V4I32, _V16I8, _V16I8])
        parts = _split(b, start, 4)
        for w, a in zip(weights, acts, strict=True):
            a8 = b.bitcast(a, _V16I8)
            parts = [
                b.call(sdot, [p, w8, a8]) for p, w8 in zip(parts, _split(b, w, 16), strict=True)
            ]
        return join(b, parts)


class Neon(_Neon128):
    """``smull``/``smlal``: 8 products per instruction, summed in 16 bits as long as they fit."""

    name = "neon"
    tokens = (1, 8)
    target_features = "+neon,+fp-armv8"

    def activations(self, b: ir.IRBuilder, address: ir.Value) -> list[ir.Value]:
        """Whole registers. The optimizer must not know that both halves are equal, or it does not
        use ``smlal2`` with the upper halves."""
        return [_opaque(b, a) for a in super().activations(b, address)]

    def dot(
        self,
        b: ir.IRBuilder,
        start: ir.Value,
        weights: list[ir.Value],
        acts: list[ir.Value],
        bits: int,
    ) -> ir.Value:
        """Eight products of 15 * 127, twice, or two of 128 * 127 stay below 2**15; codes of 5 and
        6 bits are added up like those of 8."""
        smull = declare(b, "llvm.aarch64.neon.smull.v8i16", _V8I16, [_V8I8, _V8I8])
        addp = declare(b, "llvm.aarch64.neon.addp.v8i16", _V8I16, [_V8I16, _V8I16])
        addp32 = declare(b, "llvm.aarch64.neon.addp.v4i32", _V4I32, [_V4I32, _V4I32])
        saddlp = declare(b, "llvm.aarch64.neon.saddlp.v4i32.v8i16", _V4I32, [_V8I16])
        low, high = list(range(8)), list(range(8, 16))
        quarters = zip(*(_split(b, w, 16) for w in weights), strict=True)
        out = []
        for part, ws in zip(_split(b, start, 4), quarters, strict=True):
            halves = []
            for lanes in (low, high):
                products = [
                    b.call(smull, [take(b, w, lanes), take(b, b.bitcast(a, _V16I8), lanes)])
                    for w, a in zip(ws, acts, strict=True)
                ]
                if bits > 4:
                    wide = [
                        b.call(saddlp, [b.add(products[i], products[i + 1])])
                        for i in range(0, len(products), 2)
                    ]
                    halves.append(_sum(b, wide))
                else:
                    halves.append(_sum(b, products))
            if bits > 4:
                whole = b.call(addp32, halves)
            else:
                whole = b.call(saddlp, [b.call(addp, halves)])
            out.append(b.add(whole, part))
        return join(b, out)


def _opaque(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """The same register, but unknown to the optimizer (by an empty piece of assembly)."""
    return b.asm(ir.FunctionType(value.type, [value.type]), "", "=w,0", [value], False)


def _split(b: ir.IRBuilder, vector: ir.Value, lanes: int) -> list[ir.Value]:
    """The registers of so many lanes that make up a vector."""
    starts = range(0, vector.type.count, lanes)
    return [take(b, vector, list(range(i, i + lanes))) for i in starts]


def _sum(b: ir.IRBuilder, terms: list[ir.Value]) -> ir.Value:
    """Their sum, added up one by one: each addition becomes part of its product."""
    total = terms[0]
    for term in terms[1:]:
        total = b.add(total, term)
    return total
