"""The matmul micro-kernel: one tile of 16 packed rows times a few quantized activation rows.

Written once as LLVM vector code and compiled for every ISA; only the integer dot product
(`Isa.dot`) and how the tile is divided to fit the registers (`Isa.rows`) differ between
machines. For token m and tile row r it computes,
block after block (32 columns each) and always in this order:

    out[m, r] = fma(float(sum_k a[m, k] * (code[r, k] - zero_point[r])), s_a[m] * s_w[r], out[m, r])

so that the result does not depend on how rows, tokens or threads were divided. With a minimum there
is no zero point, and after each of these steps comes a second:

    out[m, r] = fma(-float(sum_k a[m, k]) * s_a[m], -minimum[r], out[m, r])

A quantized activation row is a run of 48-byte blocks (`ACT_BLOCK`):

    int8 codes[32] · float32 scale · int32 -sum(codes[0:16]) · -sum(codes[16:32]) · -sum(codes)

The negated sums fold the weights' zero point into the accumulator's start value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from llvmlite import ir

from edgeq.compiler.llvm_ir import (
    F16,
    F32,
    I8,
    I16,
    I32,
    I64,
    V16I8,
    V16I32,
    V64I8,
    VOID,
    add,
    const,
    fma,
    load,
    pair_sums,
    prefetch,
    splat,
    store,
)
from edgeq.formats.packing import LANE, TILE
from edgeq.formats.schemes import K_BLOCK, SUPERBLOCK, QuantScheme
from edgeq.formats.two_level import offsets
from edgeq.model.memory_layout import ACT_BLOCK as ACT_BLOCK

NO_SHIFT = 40
"""Group shift that makes every block use scale 0: one scale per row."""


Pair = tuple[ir.Value, ir.Value]


@dataclass(frozen=True)
class Variant:
    """One compiled form of the micro-kernel.

    Args:
        scheme: of the weights.
        tokens: activation rows worked on at once (weights are unpacked once for all).
    """

    scheme: QuantScheme
    tokens: int

    @property
    def symbol(self) -> str:
        """The LLVM name."""
        return f"edgeq_tile_{kernel_name(self.scheme)}_m{self.tokens}"


def kernel_name(scheme: QuantScheme) -> str:
    """The name of the kernel for a scheme: one for all schemes that are multiplied alike."""
    if scheme.codebook:
        kind = "p"
    elif scheme.symmetric:
        kind = "s"
    else:
        kind = "m" if scheme.minimum else "a"
    half = "h" if scheme.group_size == 16 else ""
    return f"q{scheme.bits}{kind}{half}{'x' if scheme.two_level else ''}"


class Isa:
    """How an instruction set multiplies bytes; subclasses override what they have instructions for.

    This base is the portable form: plain vector IR that LLVM turns into whatever the machine
    has (``smull``/``smlal`` on ARM cores without a dot product).
    """

    name = "generic"
    tokens: tuple[int, ...] = (1, 4)
    """Row counts the GEMM is compiled for, as many as registers hold."""
    signed8 = True
    """Whether 8-bit codes are turned to signed (code - 128) before the product."""
    target_features = ""
    """Features to compile with besides the processor's own, as LLVM's detection misses some."""
    float_lanes = 4
    """Float32 lanes of a register."""
    float_tokens: tuple[int, ...] = (3, 2, 1)
    """Row counts that the GEMM of float weights is compiled for: four sums of each fit in the
    registers beside what is multiplied."""
    float_panel = 16
    """Rows of float weights that are widened together: as many as a second-level cache holds beside
    a batch of activations."""
    prefetch = 0
    """How many bytes ahead of the weights to prefetch; 0 leaves it to the hardware."""

    def rows(self, tokens: int) -> int:
        """How many of the tile's 16 rows (16, 8 or 4) are worked on at once.

        Fewer leave registers for more tokens; the tile is then done in several passes.
        """
        return TILE

    def after(self, b: ir.IRBuilder, address: ir.Value, total: ir.Value) -> ir.Value:
        """The address of a token's activations, when ``total`` of the token before is known."""
        return address

    def repeated(self, b: ir.IRBuilder, address: ir.Value, field: int, ty: ir.Type) -> ir.Value:
        """Word ``field`` of an activation block's tail (its scale, the negated sums) repeated."""
        return splat(b, load(b, add(b, address, K_BLOCK + 4 * field), ty.element), ty)

    def factor(self, b: ir.IRBuilder, value: int, ty: ir.Type) -> ir.Value:
        """A constant to multiply by, made before the loop."""
        return const(value, ty)

    def bits(self, b: ir.IRBuilder, codes: ir.Value, n: int, mask: int) -> ir.Value:
        """The bits of ``mask`` of bytes shifted right by ``n``, or left where that is negative."""
        if n:
            by = const(abs(n), codes.type)
            codes = b.lshr(codes, by) if n > 0 else b.shl(codes, by)
        left = 255 >> n if n > 0 else 255 << -n & 255
        return codes if mask == left else b.and_(codes, const(mask, codes.type))

    def lookup(self, b: ir.IRBuilder, table: ir.Value, codes: ir.Value) -> ir.Value:
        """The byte of ``table`` <16 x i8> that each code names."""
        out = const(0, codes.type)
        for i in range(16):
            value = splat(b, b.extract_element(table, const(i, I32)), codes.type)
            out = b.select(b.icmp_unsigned("==", codes, const(i, codes.type)), value, out)
        return out

    def activations(self, b: ir.IRBuilder, address: ir.Value) -> list[ir.Value]:
        """The block's eight groups of four int8 codes, each repeated over 16 rows."""
        return [splat(b, load(b, add(b, address, 4 * j), I32), V16I32) for j in range(8)]

    def dot(
        self,
        b: ir.IRBuilder,
        start: ir.Value,
        weights: list[ir.Value],
        acts: list[ir.Value],
        bits: int,
    ) -> ir.Value:
        """start + sum over j of weights[j] . acts[j]: <16 x i32>."""
        wide16 = ir.VectorType(I16, 64)
        total32: ir.Value | None = None
        for part in runs(list(zip(weights, acts, strict=True)), products_in_16_bits(bits)):
            total16: ir.Value | None = None
            for w, a in part:
                product = b.mul(b.sext(w, wide16), b.sext(b.bitcast(a, V64I8), wide16))
                total16 = product if total16 is None else b.add(total16, product)
            pairs = pair_sums(b, total16, I32)
            total32 = pairs if total32 is None else b.add(total32, pairs)
        return b.add(start, pair_sums(b, total32, I32))


def products_in_16_bits(bits: int) -> int:
    """How many products of a code of so many bits and an activation add up in a signed 16-bit
    number; codes of 8 bits are signed."""
    return 32767 // (127 * (128 if bits == 8 else (1 << bits) - 1))


def runs(items: list[Pair], length: int) -> list[list[Pair]]:
    """A list cut into runs of at most so many items."""
    return [items[i : i + length] for i in range(0, len(items), length)]


def _unpack(
    b: ir.IRBuilder, isa: Isa, address: ir.Value, bits: int, signed: bool, rows: int
) -> list[ir.Value]:
    """The eight byte vectors of one block, in column order."""
    ty = ir.VectorType(I8, rows * LANE)
    step = TILE * LANE
    planes = [load(b, add(b, address, step * j), ty, rows * LANE) for j in range(bits)]

    if bits == 8:
        return [b.xor(p, const(-128, ty)) for p in planes] if signed else planes
    if bits >= 4:
        out = [isa.bits(b, p, n, 15) for p in planes[:4] for n in (0, 4)]
    else:
        out = [isa.bits(b, planes[i // 4], 2 * (i % 4), 3) for i in range(8)]
    if bits in (2, 4):
        return out
    # the high bits: one of each code, or two
    wide = 2 if bits == 6 else 1
    per_plane, below = 8 // wide, bits - wide
    mask = ((1 << wide) - 1) << below
    for i in range(8):
        plane = planes[below + i // per_plane]
        out[i] = b.or_(out[i], isa.bits(b, plane, wide * (i % per_plane) - below, mask))
    return out


def build(b: ir.IRBuilder, isa: Isa, variant: Variant) -> ir.Function:
    """Emit the micro-kernel into the builder's module (once) and return it.

    It does `Isa.rows` rows of a tile. Its arguments are integers: addresses of packed codes,
    scales, zero points (each of the first of its rows; of the table for a palette, of float16
    minimums where the scheme has them) and activations, the number of blocks, the group shift
    (block >> shift = group), the bytes between activation rows, the output's address, the bytes
    between its rows, and how many bytes ahead to prefetch. With two-level scales, the scales'
    address is that of the tile's first record and the shift is the number of the first row in the
    tile.
    """
    known = b.module.globals.get(variant.symbol)
    if known is not None:
        return known
    fn = ir.Function(b.module, ir.FunctionType(VOID, [I64] * 10), variant.symbol)
    fn.linkage = "internal"
    fn.attributes.add("noinline")
    codes, scales, zeros, acts, blocks, shift, act_stride, out, out_stride, ahead = fn.args
    entry, loop, done = (fn.append_basic_block(n) for n in ("entry", "loop", "done"))
    b = ir.IRBuilder(entry)
    # values from a palette are bytes, multiplied as 8-bit codes are
    scheme = variant.scheme
    bits, wide = scheme.bits, 8 if scheme.codebook else scheme.bits
    signed = isa.signed8 and wide == 8
    table = load(b, zeros, V16I8) if scheme.codebook else None
    if table is not None and not signed:
        table = b.xor(table, const(-128, V16I8))
    rows = isa.rows(variant.tokens)
    i8s, i32s, f32s = (ir.VectorType(t, rows) for t in (I8, I32, F32))
    mid = isa.factor(b, 1 << (wide - 1), i32s)
    b.branch(loop)
    b.position_at_end(loop)
    i = b.phi(I64)
    i.add_incoming(const(0), entry)
    totals = [b.phi(f32s) for _ in range(variant.tokens)]
    for total in totals:
        total.add_incoming(ir.Constant(f32s, [0.0] * rows), entry)

    at = b.add(codes, b.mul(i, const(TILE * LANE * bits)))
    weights = _unpack(b, isa, at, bits, signed and table is None, rows)
    if table is not None:
        weights = [isa.lookup(b, table, codes_) for codes_ in weights]
    if isa.prefetch:
        # several rows fill the first-level cache: what would wait there for weights would have to
        # wait for the rows that it pushed out
        level = 1 if variant.tokens <= 2 else 2
        there = b.add(at, ahead)
        for j in range(bits):
            prefetch(b, add(b, there, 64 * j), level)
    halves = 2 if scheme.group_size == 16 else 1
    params = _two_level_params if scheme.two_level else _group_params
    groups = [params(b, scheme, scales, zeros, i, shift, h, rows) for h in range(halves)]
    weight_scales = [group.scale for group in groups]
    zero_points = []
    if scheme.has_zero_points:
        for h in range(halves):
            index = b.add(_group(b, scheme, i, shift), const(h))
            zp = load(b, b.add(zeros, b.mul(index, const(TILE))), i8s, rows)
            zp = b.zext(zp, i32s)
            zero_points.append(b.sub(zp, const(128, i32s)) if signed else zp)

    at = b.add(acts, b.mul(i, const(ACT_BLOCK)))
    sums: list[ir.Value] = []
    for total in totals:
        if sums:
            at = isa.after(b, b.add(at, act_stride), sums[-1])
        a = isa.activations(b, at)
        scale = isa.repeated(b, at, 0, f32s)
        for h in range(halves):
            part = slice(4 * h, 4 * h + 4) if halves == 2 else slice(0, 8)
            minus = 1 + h if halves == 2 else 3
            if scheme.has_zero_points:
                start = b.mul(zero_points[h], isa.repeated(b, at, minus, i32s))
            elif scheme.minimum and signed:  # codes are 128 less than those of the scheme
                start = b.sub(const(0, i32s), b.mul(mid, isa.repeated(b, at, minus, i32s)))
            elif signed or scheme.minimum:
                start = const(0, i32s)
            else:
                negated = isa.repeated(b, at, minus, i32s)
                start = b.mul(mid, negated)
            whole = isa.dot(b, start, weights[part], a[part], wide)
            total = fma(b, b.sitofp(whole, f32s), b.fmul(scale, weight_scales[h]), total)
            if scheme.minimum:
                negated = b.sitofp(isa.repeated(b, at, minus, i32s), f32s)
                total = fma(b, b.fmul(negated, scale), groups[h].negated_minimum, total)
        sums.append(total)
    after = b.add(i, const(1))
    i.add_incoming(after, loop)
    for total, new in zip(totals, sums, strict=True):
        total.add_incoming(new, loop)
    b.cbranch(b.icmp_signed("<", after, blocks), loop, done)
    b.position_at_end(done)
    for m, value in enumerate(sums):
        store(b, value, b.add(out, b.mul(out_stride, const(m))), 4)
    b.ret_void()
    return fn


class _GroupParams(NamedTuple):
    """A group's parameters of several rows, float32."""

    scale: ir.Value
    negated_minimum: ir.Value | None


def _group(b: ir.IRBuilder, scheme: QuantScheme, block: ir.Value, shift: ir.Value) -> ir.Value:
    """The number of a block's group, or of its first."""
    return b.shl(block, const(1)) if scheme.group_size == 16 else b.lshr(block, shift)


def _group_params(
    b: ir.IRBuilder, scheme: QuantScheme, scales: ir.Value, zeros: ir.Value, block: ir.Value,
    shift: ir.Value, half: int, rows: int,
) -> _GroupParams:  # fmt: skip
    """Parameters of a block's group, or of one of its two, that are float16 numbers."""
    f16s, f32s = ir.VectorType(F16, rows), ir.VectorType(F32, rows)
    place = b.mul(b.add(_group(b, scheme, block, shift), const(half)), const(2 * TILE))

    def wide(base: ir.Value) -> ir.Value:
        return b.fpext(load(b, b.add(base, place), f16s, 2 * rows), f32s)

    return _GroupParams(wide(scales), b.fneg(wide(zeros)) if scheme.minimum else None)


def _two_level_params(
    b: ir.IRBuilder, scheme: QuantScheme, scales: ir.Value, zeros: ir.Value, block: ir.Value,
    shift: ir.Value, half: int, rows: int,
) -> _GroupParams:  # fmt: skip
    """Parameters of a block's group, or of one of its two, from `edgeq.formats.two_level`."""
    i8s, f16s, i32s, f32s = (ir.VectorType(t, rows) for t in (I8, F16, I32, F32))
    at, blocks = offsets(scheme), SUPERBLOCK // K_BLOCK
    record = b.add(scales, b.mul(b.udiv(block, const(blocks)), const(at.nbytes)))
    within = b.and_(block, const(blocks - 1))
    if scheme.group_size == 16:
        within = b.add(b.shl(within, const(1)), const(half))
    group = b.add(b.add(record, b.mul(within, const(TILE))), shift)
    upper = b.add(record, b.shl(shift, const(1)))

    def product(start: int, integers: ir.Value) -> ir.Value:
        above = b.fpext(load(b, add(b, upper, start), f16s, 2 * rows), f32s)
        return b.fmul(above, b.sitofp(integers, f32s))

    low = load(b, add(b, group, at.group_scales), i8s, rows)
    if not scheme.minimum:
        return _GroupParams(product(at.upper_scales, b.sext(low, i32s)), None)
    if scheme.packs_nibbles:
        high = b.lshr(low, const(4, i8s))
        low = b.and_(low, const(15, i8s))
    else:
        high = load(b, add(b, group, at.group_minimums), i8s, rows)
    scale = product(at.upper_scales, b.sext(low, i32s))
    return _GroupParams(scale, b.fneg(product(at.upper_minimums, b.sext(high, i32s))))
